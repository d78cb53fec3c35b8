"""Compile the kernels of a cell and a dtype, and keep them on disk.

Every function is bound (see `bind`) over the cell, the target and one another. The names of the compiled entry points
carry a hash of all sources of this folder, of the cell and of the target, so that Numba's disk cache, which looks at
names and bytecode only, can neither miss nor mistake one for another.
"""

# ruff: noqa: F821

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from numba import njit

from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import CELLS, Cell
from rnnfast_kernels.cpu import activations, gradients, loops, products, tile, vector
from rnnfast_kernels.cpu.job import Record
from rnnfast_kernels.cpu.target import Target, target

lock = threading.RLock()

# Packing of one weight, or of some of its blocks, in one of three ways.
PACK = Record("kind", "weight", "weight_row", "bias", "units", "depth", "panels", "first", "last", "places")
GATE_COLUMNS, COLUMNS, ROWS = 0, 1, 2


def pack(address):
    """Pack one weight, or some blocks of it."""
    job = pack_at(address)
    if job.kind == GATE_COLUMNS:
        pack_gate_columns(job.weight, job.bias, job.units, job.depth, job.panels, job.first, job.last)
    elif job.kind == COLUMNS:
        pack_plain_columns(job.weight, job.bias, job.units, job.depth, job.panels, job.first, job.last)
    else:
        fill_places(job.places, job.weight, job.weight_row, job.depth)
        pack_rows(job.places, job.depth, job.units, job.panels, job.first, job.last)


# What an entry point can be asked to do.
PACK_WEIGHT, FORWARD, BACKWARD, ROWS_PRODUCT, OUTER_PRODUCT = range(5)


def run_job(task, address):
    """The one entry point: a task and the address of its record. (One, because what tasks share then compiles once.)"""
    if task == PACK_WEIGHT:
        pack(address)
    elif task == FORWARD:
        layer_forward(address)
    elif task == BACKWARD:
        layer_backward(address)
    elif task == ROWS_PRODUCT:
        rows_product(address)
    else:
        outer_product(address)


HELPERS = (
    loops.live_rows,
    loops.first_index,
    loops.x_address,
    loops.is_reset,
    loops.step_at,
    loops.gates_address,
    loops.project_inputs,
    loops.start_states,
    loops.apply_resets,
    loops.clear_padding,
    loops.advance,
    loops.project_output,
    loops.start_gradients,
    loops.end_gradients,
    loops.add_gradients,
    loops.entering_states,
    loops.differentiate_cell,
    loops.clear_gradients,
    gradients.right_address,
    gradients.pack_strip,
    gradients.add_block,
    pack,
    loops.layer_forward,
    loops.layer_backward,
    gradients.rows_product,
    gradients.outer_product,
)


@functools.cache
def sources() -> str:
    """All that a compiled kernel depends on beside its cell and its target."""
    folder = Path(__file__).parent
    return "".join(path.read_text() for path in (*sorted(folder.glob("*.py")), folder.parent / "bind.py"))


def inline(function: Callable, namespace: dict, **options) -> None:
    """Compile `function` over `namespace` and add it there.

    Its name carries the salt too: code from the disk cache holds such functions under names that must not meet those
    of another cell or dtype compiled in this process.
    """
    namespace[function.__name__] = njit(bind(function, namespace, namespace["SALT"]), error_model="numpy", **options)


def vectors(target: Target, salt: str) -> dict:
    """Memory, arithmetic and activations."""
    namespace = {
        "SALT": salt,
        **vector.operations(target),
        **activations.constants(target.dtype),
        "transpose_square": tile.transposer(target),
        "ITEM": target.item,
        "LANES": target.lanes,
        "VECTOR": target.vector,
    }
    for function in (activations.decay, *activations.ACTIVATIONS):
        inline(function, namespace, forceinline=True)
    for function in (products.copy_row, products.add_row, products.clear_row, products.fill_places):
        inline(function, namespace)
    return namespace


def tiled(target: Target, gates: int, namespace: dict) -> dict:
    """The functions of `products`, for panels of so many gates."""
    widest = widest_panel(gates)
    rows = target.rows(gates * widest)
    widths = tuple(gates * blocks for blocks in (1, 2, 4) if blocks <= widest)
    over = {
        **namespace,
        "SALT": f"{namespace['SALT']} {gates}",
        "GATES": gates,
        "WIDEST": widest,
        "ROWS": rows,
        "multiply": tile.multiplier(target, widths, rows),
    }
    for function in (products.panel_blocks, products.tile_rows):
        inline(function, over, forceinline=True)
    for function in (products.pack_columns, products.pack_rows, products.project):
        inline(function, over)
    return over


def widest_panel(gates: int) -> int:
    """Blocks of the widest panel: about four vectors."""
    return {1: 4, 2: 2}.get(gates, 1)


def assemble(cell: Cell, target: Target, salt: str) -> dict:
    """Everything that an entry point may call."""
    base = vectors(target, salt)
    plain = tiled(target, 1, base)
    gated = plain if cell.gates == 1 else tiled(target, cell.gates, base)
    extra = len(cell.states) - 1
    namespace = {
        **base,
        "GATES": cell.gates,
        "EXTRA": extra,
        "multiply": gated["multiply"],
        "gate_blocks": gated["panel_blocks"],
        "gate_rows": gated["tile_rows"],
        "project_gates": gated["project"],
        "pack_gate_columns": gated["pack_columns"],
        "project_plain": plain["project"],
        "pack_plain_columns": plain["pack_columns"],
        "pack_rows": plain["pack_rows"],
        "load_gates": base["tuple_loader"](cell.gates),
        "load_kept": base["tuple_loader"](cell.saved),
        "load_extra": base["tuple_loader"](extra),
        "layer_at": loops.LAYER.reader(),
        "product_at": gradients.PRODUCT.reader(),
        "outer_at": gradients.OUTER.reader(),
        "pack_at": PACK.reader(),
    }
    namespace.update(PACK_WEIGHT=PACK_WEIGHT, FORWARD=FORWARD, BACKWARD=BACKWARD, ROWS_PRODUCT=ROWS_PRODUCT)
    namespace.update(INPUTS=gradients.INPUTS, ENTERING=gradients.ENTERING)
    namespace.update(GATE_COLUMNS=GATE_COLUMNS, COLUMNS=COLUMNS)
    for name, equations in (("cell_forward", cell.forward), ("cell_backward", cell.backward)):
        namespace[name] = njit(bind(equations, base, salt), forceinline=True, error_model="numpy")
    for function in HELPERS:
        inline(function, namespace)
    return namespace


@functools.cache
def kernel(cell_name: str, dtype: str) -> Callable[[int, int], None]:
    """Compile, or load from the disk cache, the entry point of a cell and a dtype."""
    with lock:
        cell = CELLS[cell_name]
        chosen = target(dtype)
        equations = inspect.getsource(cell.forward) + inspect.getsource(cell.backward)
        salt = f"{sources()}\0{equations}\0{cell.gates} {cell.saved} {cell.states}\0{chosen}"
        function = bind(run_job, assemble(cell, chosen, salt), salt)
        options = {"nogil": True, "error_model": "numpy"}
        try:
            return njit("void(int64, int64)", cache=True, **options)(function)
        except (OSError, RuntimeError) as error:
            warn_uncached(str(error))
            return njit("void(int64, int64)", **options)(function)


@functools.cache
def warn_uncached(reason: str) -> None:
    warnings.warn(
        f"rnnfast cannot keep compiled kernels on disk, so every process compiles them again ({reason}); "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
