"""One equation, several compilers: rebuild a cell's function over a compiler's own `sigmoid`, `tanh` and so on."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any


def bind(function: Callable, namespace: Mapping[str, Any], salt: str = "") -> FunctionType:
    """Return `function` with `namespace` as its globals, ready for `@triton.jit` or `@numba.njit`.

    The result's name carries a hash of the function's source and of `salt` (whatever else the meaning depends on:
    the source of the namespace's functions, a lane count). Numba's disk cache keys on names and bytecode but not on
    globals, so without the hash two bindings would share one cache entry, and an edited activation would not recompile.
    """
    source = inspect.getsource(function)
    digest = hashlib.sha256(f"{source}\0{salt}".encode()).hexdigest()[:12]
    name = f"{function.__name__}_{digest}"
    names = {"co_name": name}
    if sys.version_info >= (3, 11):
        names["co_qualname"] = name
    bound = FunctionType(function.__code__.replace(**names), dict(namespace), name)
    bound.__module__ = function.__module__
    bound.__qualname__ = name
    bound.__doc__ = function.__doc__
    return bound
