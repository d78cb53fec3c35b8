"""Compile everything for a cell and a dtype: from equations to LLVM IR.

A job's entry point calls functions by name, and these call others. What is reached so is compiled, and nothing else:
each function is bound (see `bind`) over the cell, the target and the functions that it calls.
"""

import dis
from collections.abc import Callable, Iterable, Mapping
from inspect import isfunction

from numba import _dynfunc, cfunc, njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from rnnfast_kernels.bind import bind
from rnnfast_kernels.cpu.ir import activations, elementary, held, memory, operands, tile, transpose, unpacked, waiting
from rnnfast_kernels.cpu.ir.library import library
from rnnfast_kernels.cpu.loops import backward, forward, gradients, products, steps, tangents, tasks
from rnnfast_kernels.cpu.runtime import schedule
from rnnfast_kernels.cpu.target import Target, widest_panel
from rnnfast_kernels.equations.cell import Cell

Functions = Mapping[str, Callable]


def by_name(functions: Iterable[Callable]) -> dict[str, Callable]:
    return {function.__name__: function for function in functions}


# What entry points may call, directly or not, beside the functions of `products` and the cell's.
LOOPS = by_name(
    function
    for module in (steps, forward, backward, gradients, tangents)
    for function in vars(module).values()
    if isfunction(function)
) | {"pack": products.pack}


class IntermediateLibrary(JITCodeLibrary):
    """A function's LLVM IR, optimised and ready to be linked into its callers, without machine code of its own."""

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True


class IntermediateCompiler(Compiler):
    """Numba's compiler up to LLVM IR. Numba would generate machine code for every function that another one calls."""

    def __init__(self, typing_context, target_context, library, *rest):
        library = IntermediateLibrary(target_context.codegen(), "rnnfast")
        super().__init__(typing_context, target_context, library, *rest)
        self.state.targetctx.get_executable = function_without_code


def function_without_code(library, description, environment):
    """The object by which Numba tells one compiled function from another. Nobody calls it."""
    return _dynfunc.make_function(description.lookup_module(), description.qualname, "", 0, environment, (library,))


# Functions are called by one another alone, so nothing is compiled that Python would call them by.
OPTIONS = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": IntermediateCompiler,
}


def used_by(function: Callable) -> list[str]:
    """The names that a function takes from its globals."""
    return [each.argval for each in dis.get_instructions(function) if each.opname == "LOAD_GLOBAL"]


def reached(function: Callable, functions: Functions) -> set[str]:
    """The names that a function takes from its globals, and those that functions so called take."""
    found, pending = set[str](), [function]
    while pending:
        new = set(used_by(pending.pop())) - found
        found |= new
        pending += [functions[name] for name in new if name in functions]
    return found


def compile_into(
    namespace: dict,
    functions: Functions,
    wanted: Iterable[str] | None = None,
    result: types.Type | None = None,
    **options,
) -> None:
    """Compile functions into a namespace, each after those of them that it calls.

    wanted: names of those to compile, without which it is all. result: their result's type; they are compiled for
    integers alone then, else for every set of arguments that they get.
    """
    for name in functions if wanted is None else wanted:
        if name not in namespace:
            function = functions[name]
            callees = (callee for callee in used_by(function) if callee in functions)
            compile_into(namespace, functions, callees, result, **options)
            # Numba would specialise a function for integers that are constants.
            signature = None if result is None else result(*[types.int64] * function.__code__.co_argcount)
            # The name carries the namespace's salt, since Numba links functions by their names.
            namespace[name] = njit(signature, **OPTIONS, **options)(bind(function, namespace, namespace["SALT"]))


def vectors(target: Target, salt: str) -> dict:
    """Memory, waiting, arithmetic and activations."""
    namespace = {
        "SALT": salt,
        **memory.operations(target),
        **operands.operations(target),
        **waiting.OPERATIONS,
        **activations.constants(target.dtype),
        **elementary.operations(target.dtype),
        "transpose_square": transpose.transposer(target),
        "multiply_unpacked": unpacked.multiplier(target),
        "ACC_BYTES": target.acc_bytes,
        "IO_BYTES": target.io_bytes,
        "LANES": target.lanes,
        "VECTOR": target.vector,
        "HEAD": target.head,
    }
    numeric = (activations.exp_neg_parts, *activations.ACTIVATIONS, *activations.HVP)
    numeric += (*elementary.PLAIN, *operands.LINES)
    compile_into(namespace, by_name(numeric), forceinline=True)
    rows = by_name(operands.ROWS)
    if target.format:
        of_format = held.products_of(target)
        namespace |= of_format.operations(target)
        rows = {"copies_start": operands.copies_start, "as_operands": of_format.as_operands}
    compile_into(namespace, rows, result=types.int64)
    # Layers of frozen weights are float32: the rows that they are given are as those that they compute.
    namespace.setdefault("io_operands", namespace["as_operands"])
    compile_into(namespace, by_name(products.ROWS), result=types.void)
    return namespace


def tiled(target: Target, gates: int, namespace: dict, wanted: Iterable[str]) -> dict:
    """Functions of `products`, for panels of so many gates."""
    over = {
        **namespace,
        "SALT": f"{namespace['SALT']} {gates}",
        "GATES": gates,
        "WIDEST": widest_panel(gates),
        "ROWS": target.rows(gates),
        "STRIP": target.strip(gates * widest_panel(gates)),
        "multiply": tile.multiplier(target, gates),
    }
    compile_into(over, by_name(products.PLACES), forceinline=True)
    compile_into(over, by_name(products.PRODUCTS), (name for name in wanted if name not in over), types.void)
    return over


def assemble(entry: Callable, functions: Functions, cell: Cell, target: Target, salt: str) -> dict:
    """Everything that an entry point calls, directly or not. functions: those of `loops` by name."""
    base, names, aux = vectors(target, salt), reached(entry, functions), len(cell.states) - 1
    namespace = {
        **base,
        "GATES": cell.gates,
        "AUX": aux,
        "RECURRENT": cell.recurrent,
        "PARAMETERS": len(cell.parameters),
        "SIGNALS": len(cell.signals),
        "load_gates": base["tuple_loader"](cell.gates),
        "load_recurrent": base["tuple_loader"](cell.recurrent),
        "load_kept": base["tuple_loader"](cell.saved),
        "load_parameters": base["io_tuple_loader"](len(cell.parameters)),
        "load_signals": memory.signal_loader(target, len(cell.signals)),
        "load_aux": base["tuple_loader"](aux),
        "load_io_aux": base["io_tuple_loader"](aux),
        "layer_at": steps.LAYER.reader(),
        "product_at": gradients.PRODUCT.reader(),
        "outer_at": gradients.OUTER.reader(),
        "pack_at": products.PACK.reader(),
    }
    for module in (products, gradients, steps, tasks):
        namespace |= {name: number for name, number in vars(module).items() if isinstance(number, int)}
    recurrent = cell.recurrent or cell.gates
    tables = ((cell.gates, products.OF_GATES), (recurrent, products.OF_RECURRENT), (1, products.OF_MATRIX))
    wanted: dict[int, set[str]] = {}
    for gates, table in tables:
        wanted.setdefault(gates, set()).update(own for name, own in table.items() if name in names)
    made = {gates: tiled(target, gates, base, sorted(own)) for gates, own in wanted.items()}
    for gates, table in tables:
        namespace |= {name: made[gates][own] for name, own in table.items() if name in names}
    equations = {
        "cell_forward": lambda: cell.make_forward(("p", "s")),
        "cell_backward": lambda: cell.make_backward(("p", "s")),
        "cell_jvp": lambda: cell.jvp,
        "cell_hvp": lambda: cell.hvp,
    }
    for name, derive in equations.items():
        if name in names:
            namespace[name] = njit(bind(derive(), base, salt), forceinline=True, **OPTIONS)
    compile_into(namespace, functions, (name for name in used_by(entry) if name in functions))
    return namespace


def llvm_ir(cell: Cell, target: Target, derivatives: int) -> tuple[list[str], str]:
    """Compile a job: LLVM modules, to be linked, and the name of the job's function in the first of them."""
    salt = f"{cell.name} {target} {derivatives}"
    functions = LOOPS if derivatives else LOOPS | {"run_turn": steps.run_forward_turn}
    entry = tasks.ENTRIES[derivatives]
    bound = bind(entry, assemble(entry, functions, cell, target, salt), salt)
    compiled = cfunc("void(int64, int64)", error_model="numpy", pipeline_class=IntermediateCompiler)(bound)
    tiles = library(target, {1, cell.gates, cell.recurrent} - {0})
    return [compiled.inspect_llvm(), str(tiles), str(schedule.module())], compiled.native_name
