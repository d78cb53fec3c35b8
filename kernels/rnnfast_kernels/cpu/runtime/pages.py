"""Large pages for large memory: a fresh buffer of megabytes costs as many page faults as it has pages.

Linux gives pages of 2 MB, in place of 4 KB, to memory that asks for them.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

LARGE_PAGE = 1 << 21
WORTH_IT = 2 * LARGE_PAGE
MADV_HUGEPAGE = 14


@functools.cache
def madvise() -> Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int] | None:
    """The system call, where it is Linux's."""
    return ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def ask_for_large_pages(address: int, size: int) -> None:
    """Ask for large pages wherever a buffer that is large enough holds whole ones. What is refused changes nothing."""
    advise = madvise()
    if size >= WORTH_IT and advise is not None:
        first = -(-address // LARGE_PAGE) * LARGE_PAGE
        whole = (address + size - first) // LARGE_PAGE * LARGE_PAGE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(whole), MADV_HUGEPAGE)
