"""Warnings that name the line of the user's code."""

import sys
import warnings

from rnnfast_kernels.equations.trace import is_ours


def warn_user(message: str) -> None:
    """Warn, naming the line outside of rnnfast and torch that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and is_ours(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
