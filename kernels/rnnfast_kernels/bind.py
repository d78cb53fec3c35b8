"""One equation, several compilers: rebuild a cell's function over a compiler's own `sigmoid`, `tanh` and so on."""

import hashlib
import inspect
import marshal
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any


def bind(function: Callable, namespace: Mapping[str, Any], salt: str = "") -> FunctionType:
    """Return `function` with `namespace` as its globals, ready for `@triton.jit` or `@numba.njit`.

    The result's name carries a hash of the function's source and of `salt` (whatever else the meaning depends on:
    a cell, a target). Numba links what it compiles by name, so that without the hash one binding would be called where
    another was meant. Where sources are not installed, compiled code stands for them.
    """
    try:
        meaning = inspect.getsource(function).encode()
    except OSError:
        meaning = marshal.dumps(function.__code__)
    digest = hashlib.sha256(meaning + f"\0{salt}".encode()).hexdigest()[:12]
    name = f"{function.__name__}_{digest}"
    names = {"co_name": name}
    if sys.version_info >= (3, 11):
        names["co_qualname"] = name
    bound = FunctionType(function.__code__.replace(**names), dict(namespace), name)
    bound.__module__ = function.__module__
    bound.__qualname__ = name
    bound.__doc__ = function.__doc__
    return bound
