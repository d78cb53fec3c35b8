"""Compile everything for a cell and a dtype: from equations to LLVM IR.

Every function is bound (see `bind`) over the cell, the target and the functions before it.
"""

from collections.abc import Callable, Iterable

from numba import _dynfunc, cfunc, njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.typing.templates import Signature

from rnnfast_kernels.bind import bind
from rnnfast_kernels.cpu.ir import activations, elementary, int8, memory, operands, tile, waiting, widened
from rnnfast_kernels.cpu.loops import backward, forward, gradients, products, steps, tangents, tasks
from rnnfast_kernels.cpu.runtime import schedule
from rnnfast_kernels.cpu.target import Target, widest_panel
from rnnfast_kernels.equations.cell import Cell

HELPERS = (
    steps.live_rows,
    steps.first_index,
    steps.x_address,
    steps.is_reset,
    steps.step_at,
    steps.gates_address,
    forward.project_inputs,
    forward.start_states,
    forward.apply_resets,
    forward.clear_padding,
    forward.advance,
    forward.project_output,
    forward.write_aux_finals,
    forward.forward_turn,
    backward.start_gradients,
    backward.end_gradients,
    backward.last_unit,
    backward.last_width_block,
    backward.add_gradients,
    backward.entering_states,
    backward.differentiate_cell,
    backward.clear_gradients,
    backward.through_cell,
    backward.through_recurrent,
    backward.backward_turn,
    steps.run_turn,
    steps.run_turns,
    gradients.right_address,
    gradients.pack_strip,
    gradients.add_block,
    products.pack,
    forward.layer_forward,
    backward.layer_backward,
    gradients.rows_product,
    gradients.outer_product,
    *tangents.HELPERS,
)


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


def inline(function: Callable, namespace: dict, signature: Signature | None = None, **options) -> None:
    """Compile `function` over `namespace` and add it there; without a signature, for every set of arguments it gets.

    Its name carries the namespace's salt, since Numba links functions by their names.
    """
    bound = bind(function, namespace, namespace["SALT"])
    namespace[function.__name__] = njit(signature, **OPTIONS, **options)(bound)


def integers(function: Callable, result: types.Type = types.void) -> Signature:
    """The signature of a function of integers. (Numba would specialise it for constants.)"""
    return result(*[types.int64] * function.__code__.co_argcount)


# The functions of `HELPERS` that a forward pass over packed weights calls.
INFERENCE = (
    *HELPERS[: HELPERS.index(backward.start_gradients)],
    steps.run_forward_turn,
    steps.run_turns,
    forward.layer_forward,
)


def vectors(target: Target, salt: str) -> dict:
    """Memory, waiting, arithmetic and activations."""
    namespace = {
        "SALT": salt,
        **memory.operations(target),
        **operands.operations(target),
        **waiting.OPERATIONS,
        **activations.constants(target.dtype),
        **elementary.operations(target.dtype),
        "transpose_square": tile.transposer(target),
        "multiply_unpacked": tile.unpacked_multiplier(target),
        "ACC_BYTES": target.acc_bytes,
        "IO_BYTES": target.io_bytes,
        "LANES": target.lanes,
        "VECTOR": target.vector,
        "HEAD": target.head,
    }
    rows = operands.ROWS
    if target.weights:
        namespace |= widened.operations()
        rows = widened.ROWS
    if target.weights == "int8":
        namespace |= int8.operations(target)
        rows = int8.ROWS
    for function in (
        activations.decay,
        *activations.ACTIVATIONS,
        *activations.HVP,
        *elementary.PLAIN,
        *operands.LINES,
    ):
        inline(function, namespace, forceinline=True)
    for function in rows:
        inline(function, namespace, integers(function, types.int64))
    for function in products.ROWS:
        inline(function, namespace, integers(function))
    return namespace


def tiled(target: Target, gates: int, namespace: dict, functions: Iterable[Callable]) -> dict:
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
    for function in products.PLACES:
        inline(function, over, forceinline=True)
    for function in functions:
        inline(function, over, integers(function))
    return over


def assemble(cell: Cell, target: Target, salt: str, derivatives: int) -> dict:
    """Everything that an entry point may call. Without derivatives, weights are packed beforehand."""
    base = vectors(target, salt)
    parts = {1: tuple(each for each in products.PLAIN if derivatives or each not in products.PACKING)}
    for gates in (cell.gates, cell.recurrent):
        gated = (each for each in products.GATED if derivatives or each not in products.PACKING)
        parts[gates] = (*parts.get(gates, ()), *gated)
    made = {gates: tiled(target, gates, base, dict.fromkeys(wanted)) for gates, wanted in parts.items() if gates}
    plain, gated, recurrent = made[1], made[cell.gates], made[cell.recurrent or cell.gates]
    aux = len(cell.states) - 1
    namespace = {
        **base,
        "GATES": cell.gates,
        "AUX": aux,
        "RECURRENT": cell.recurrent,
        "PARAMETERS": len(cell.parameters),
        "SIGNALS": len(cell.signals),
        "multiply": recurrent["multiply"],
        "multiply_block": recurrent["multiply_block"],
        "start_tile": recurrent["start_tile"],
        "project_unpacked": gated["project_unpacked"],
        "recurrent_blocks": recurrent["panel_blocks"],
        "recurrent_rows": recurrent["tile_rows"],
        "recurrent_panel": recurrent["panel_address"],
        "project_gate_blocks": gated["project_blocks"],
        "project_plain": plain["project"],
        "project_plain_blocks": plain["project_blocks"],
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
    if derivatives:
        namespace |= {
            "pack_gate_columns": gated["pack_columns"],
            "pack_recurrent_columns": recurrent["pack_columns"],
            "pack_plain_columns": plain["pack_columns"],
            "pack_rows": plain["pack_rows"],
        }
    for module in (products, gradients, steps, tasks):
        namespace |= {name: number for name, number in vars(module).items() if isinstance(number, int)}
    for name, equations in (
        ("cell_forward", cell.make_forward(("p", "s"))),
        ("cell_backward", cell.make_backward(("p", "s"))),
        *((("cell_jvp", cell.jvp), ("cell_hvp", cell.hvp)) if cell.standard else ()),
    ):
        namespace[name] = njit(bind(equations, base, salt), forceinline=True, **OPTIONS)
    helpers = HELPERS if cell.standard else tuple(each for each in HELPERS if each not in tangents.HELPERS)
    for function in helpers if derivatives else INFERENCE:
        inline(function, namespace)
        if function is steps.run_forward_turn:
            namespace["run_turn"] = namespace["run_forward_turn"]
    return namespace


def llvm_ir(cell: Cell, target: Target, derivatives: int) -> tuple[list[str], str]:
    """Compile a job: LLVM modules, to be linked, and the name of the job's function in the first of them."""
    salt = f"{cell.name} {target} {derivatives}"
    library = tile.library(target, {1, cell.gates, cell.recurrent} - {0})
    entry = bind(tasks.ENTRIES[derivatives], assemble(cell, target, salt, derivatives), salt)
    compiled = cfunc("void(int64, int64)", error_model="numpy", pipeline_class=IntermediateCompiler)(entry)
    return [compiled.inspect_llvm(), str(library), str(schedule.module())], compiled.native_name
