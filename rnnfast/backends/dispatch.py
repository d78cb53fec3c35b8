"""Which backend runs a case, and why: `use_backend`, the environment's default, and what `auto` means.

`auto` takes Triton for CUDA and ROCm tensors and Numba for CPU tensors. torch runs what neither supports, and the sizes
at which it was measured faster (`measured`). The plain loop runs what torch lacks too.
The setting is a context variable: it belongs to the thread or task that made it.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, partial, wraps
from types import ModuleType
from typing import NamedTuple, ParamSpec, TypeVar, get_args

import torch
from rnnfast_kernels.warn import warn_user

from rnnfast import _torch
from rnnfast.backends import BackendName, measured
from rnnfast.spec import shown

P = ParamSpec("P")
R = TypeVar("R")
BACKENDS = get_args(BackendName)
# Cells of which one step on a CPU runs faster on torch's operators (docs/pytorch.md).
STEPS_FASTER_BY_TORCH = ("rnn_tanh", "rnn_relu")
MODULES = {"triton": "rnnfast.backends.gpu", "numba": "rnnfast.backends.cpu"}


def checked(name: object, source: str) -> str:
    """Return a backend's name, or raise ValueError naming the valid ones."""
    if name not in BACKENDS:
        expected = ", ".join(repr(valid) for valid in BACKENDS)
        raise ValueError(f"{source}: expected one of {expected}, got {name!r}")
    return str(name)


_setting: ContextVar[str | None] = ContextVar("rnnfast_backend", default=None)


def setting() -> str:
    """Return the backend asked for here: by `use_backend`, else by RNNFAST_BACKEND, else "auto"."""
    name = _setting.get()
    return default_setting() if name is None else name


@cache
def default_setting() -> str:
    """Read RNNFAST_BACKEND, once."""
    return checked(os.environ.get("RNNFAST_BACKEND") or "auto", "RNNFAST_BACKEND")


class use_backend:
    """Run layers on one backend: "auto", "triton", "numba", "reference" or "torch".

    In a `with` statement or as a decorator, those of the block or function; called alone, it sets the backend for the
    rest of the thread or task. A named backend that cannot run a case raises RuntimeError; it never falls back
    silently. The environment variable RNNFAST_BACKEND sets the backend for all threads and tasks.

    Args:
        name: "auto" takes Triton for CUDA and ROCm tensors and Numba for CPU tensors, torch's operators where these
            cannot run the case or were measured slower, and the plain loop where torch lacks the cell or an option;
            "reference" is the plain loop, which runs everything.

    Raises:
        ValueError: the name is none of the above. TypeError: what is decorated is no function.
    """

    def __init__(self, name: BackendName) -> None:
        self.name = name
        self.tokens = [_setting.set(checked(name, "use_backend"))]
        self.is_statement = True

    def __enter__(self) -> None:
        if not self.is_statement:
            self.tokens.append(_setting.set(self.name))
        self.is_statement = False

    def __exit__(self, *error: object) -> None:
        for token in reversed(tuple(self.tokens)):
            try:
                _setting.reset(token)
            except ValueError:  # set in another thread or task
                continue
            self.tokens.remove(token)
            return

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if self.is_statement:
            self.is_statement = False
            self.__exit__()
        if isinstance(function, type) or not callable(function) or inspect.isasyncgenfunction(function):
            kind = "an asynchronous generator" if callable(function) else type(function).__name__
            kind = "a class" if isinstance(function, type) else kind
            raise TypeError(f"use_backend: expected a function to decorate, got {kind}; decorate what it calls")
        if inspect.isgeneratorfunction(function):
            return _torch.wrap_generator(partial(use_backend, self.name), function)

        @wraps(function)
        def run(*args: P.args, **options: P.kwargs) -> R:
            with use_backend(self.name):
                return function(*args, **options)

        @wraps(function)
        async def run_task(*args: P.args, **options: P.kwargs):
            with use_backend(self.name):
                return await function(*args, **options)  # type: ignore[misc]

        return run_task if inspect.iscoroutinefunction(function) else run  # type: ignore[return-value]


class Choice(NamedTuple):
    """A backend and the reason for it, in words. broken: why the installation cannot run kernels meant for the case."""

    backend: str
    reason: str
    broken: str = ""


@_torch.constant_in_graphs
def backend_of(
    cell: str, device: torch.device, dtype: torch.dtype, needs_ours: bool, sizes: measured.Sizes | None = None
) -> str:
    """Return the name that `choose` chooses. A compiled graph keeps the answer it was traced with."""
    choice = choose(cell, device, dtype, needs_ours, sizes)
    if choice.backend in MODULES and load(choice.backend).obtain(cell, dtype) is not None:
        automatic.cache_clear()
        choice = choose(cell, device, dtype, needs_ours, sizes)
    if choice.broken:
        warn_broken(choice.broken)
    return choice.backend


@cache
def warn_broken(reason: str) -> None:
    """Warn, once for each reason, that calls do not run on the kernels meant for them."""
    warn_user(f"rnnfast runs without its own kernels: {reason}")


def choose(
    cell: str, device: torch.device, dtype: torch.dtype, needs_ours: bool, sizes: measured.Sizes | None = None
) -> Choice:
    """Choose the backend of one call.

    needs_ours: the call uses what torch.nn cannot do (resets, every cell state), which rules out "torch".
    sizes: where "auto" may step aside for torch's operator, because it was measured faster.

    Raises:
        RuntimeError: the backend that was asked for by name cannot run the case.
    """
    asked = setting()
    if asked == "auto":
        choice = automatic(cell, device, dtype, needs_ours)
        fact = measured.slower(cell, sizes) if sizes is not None and choice.backend == "numba" else None
        return choice if fact is None else Choice("torch", f"the CPU kernel was {fact}")
    problem = unsupported(asked, cell, device, dtype, needs_ours)
    if problem is not None:
        raise RuntimeError(f"the {asked!r} backend cannot run this: {problem}")
    return Choice(asked, "asked for by name")


def choose_step(cell: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Choose the backend of one call of a cell module, a single step."""
    if setting() == "auto" and device.type == "cpu" and cell in STEPS_FASTER_BY_TORCH:
        return Choice("torch", "for a single step of this cell torch's operator is faster")
    return choose(cell, device, dtype, False)


@_torch.constant_in_graphs
def steps_by_torch(cell: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether `choose_step` chooses torch. A compiled graph keeps the answer it was traced with."""
    choice = choose_step(cell, device, dtype)
    if choice.broken:
        warn_broken(choice.broken)
    return choice.backend == "torch" or (
        choice.backend == "numba" and backend_of(cell, device, dtype, False) == "torch"
    )


@cache
def automatic(cell: str, device: torch.device, dtype: torch.dtype, needs_ours: bool) -> Choice:
    """Choose for `auto`: the device's own kernels where they can run the case, else torch, else the reference loop."""
    own = "triton" if device.type == "cuda" else "numba"
    problem = unsupported(own, cell, device, dtype, needs_ours)
    if problem is None:
        return Choice(own, f"fused kernel for {device.type} tensors")
    refused = f"{own} cannot run this: {problem}"
    failed = refused if device.type in ("cpu", "cuda") and is_broken(own, cell, dtype) else ""
    if needs_ours:
        return Choice("reference", f"{refused}; torch.nn lacks an option that is used", failed)
    if not hasattr(_torch.operators, cell):
        return Choice("reference", f"{refused}; torch.nn lacks the cell {shown(cell)}", failed)
    return Choice("torch", refused, failed)


def is_broken(backend: str, cell: str, dtype: torch.dtype) -> bool:
    """Say whether it is the installation, not the case, that the backend for a device fails on."""
    try:
        module = load(backend)
    except Exception:  # whatever a library raises that cannot be loaded
        return True
    return module.broken(cell, dtype) is not None


def differentiates_twice(backend: str, cell: str, dtype: torch.dtype) -> bool:
    """Say whether a backend has kernels for second derivatives; torch's operators do without."""
    module = load(backend)
    return hasattr(module, "jvp") and module.obtain(cell, dtype, 2) is None


def records(backend: str) -> bool:
    """Say whether a backend has recorded programs for the fast path (`rnnfast.backends.CompilingBackend`)."""
    return backend in MODULES and hasattr(load(backend), "compiled_layer")


def unsupported(backend: str, cell: str, device: torch.device, dtype: torch.dtype, needs_ours: bool) -> str | None:
    """Say why a backend cannot run the case, or None where it can."""
    if backend == "torch":
        if not hasattr(_torch.operators, cell):
            return f"torch.nn lacks the cell {shown(cell)}"
        return "torch.nn has neither resets nor all_states" if needs_ours else None
    if backend == "reference":
        return None
    try:
        module = load(backend)
    except ImportError as error:
        return f"{error.name} cannot be imported ({error})"
    except Exception as error:  # whatever a library raises that cannot be loaded
        return f"{MODULES[backend]} cannot be imported ({type(error).__name__}: {error})"
    return module.unsupported(cell, device, dtype)


@cache
def load(backend: str) -> ModuleType:
    """Import a backend's module; this is what imports Numba or Triton."""
    return importlib.import_module(MODULES[backend])
