"""The cooperative loop with several programs to a group, all at once, in the interpreter with TRITON_INTERPRET=1.

Whichever program goes first, every result must be right, and the same to the bit, and no two accesses may race. That
this can fail is shown with an exchange that is broken. What only hardware can show is in test_gpu_device.py.
"""

import threading

import pytest
import torch
from conftest import INTERPRETED
from gpu_layers import Case, check, make, run
from gpu_plans import TOGETHER, together

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from concurrent_interpreter import builder, concurrent
from rnnfast_kernels.gpu import backward, barrier, forward, plan, tiles
from triton.runtime.errors import InterpreterError

from rnnfast.backends import gpu, gpu_products


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Float32 products as exact as they come."""
    monkeypatch.setattr(gpu_products, "tf32_wanted", lambda: False)


def check_orders(case, loop, device, seeds=2):
    """Compare the results of one order with the reference, and those of others with the first."""
    layer = make(case, device)
    with plan.override(TOGETHER[loop]):
        with concurrent(0):
            first = check(gpu, layer)
        for seed in range(1, seeds):
            with concurrent(seed):
                again = run(gpu, layer)
            different = [name for name in first if not torch.equal(first[name], again[name])]
            assert not different, f"seed {seed}: {different}"


def named(*cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def long(*values):
    """What is left to the run of all tests: another combination of what is met one by one."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize("cell", [*map(long, ("rnn_tanh", "rnn_relu")), "lstm", "gru"])
def test_every_cell(cell, device):
    check_orders(Case(cell, T=3, B=3, H=33, layout="padded", resets=True), "split", device)


@pytest.mark.parametrize(("cell", "loop"), [
    ("lstm", "unsplit"),
    long("lstm", "grid"),
    long("gru", "wide"),
    ("gru", "grid of two lines"),
])  # fmt: skip
def test_every_loop(cell, loop, device):
    check_orders(Case(cell, T=4, B=3, H=33, reverse=(True,)), loop, device)


@named(
    Case("gru", T=5, B=3, layout="packed", resets=True, reverse=(True,)),
    long(Case("gru", T=5, B=3, layout="padded", reverse=(True,))),
    long(Case("gru", T=5, B=3, resets=True, reverse=(True,))),
    long(Case("gru", T=5, B=3, layout="packed", reverse=(True,))),
)
def test_layouts(case, device):
    check_orders(case, "unsplit", device)


LSTM_ROWS = Case("lstm", T=3, B=18, reverse=(False,))
RNN_ROWS = Case("rnn_tanh", T=3, B=18, layout="packed", resets=True, reverse=(True,))


@pytest.mark.parametrize(
    ("case", "loop"),
    [
        (LSTM_ROWS, "unsplit"),
        *(long(*each) for each in ((RNN_ROWS, "grid"), (LSTM_ROWS, "grid"), (RNN_ROWS, "unsplit"))),
    ],
    ids=str,
)
def test_several_tiles_of_rows(case, loop, device):
    check_orders(case, loop, device)


@pytest.mark.parametrize("cell", ["rnn_tanh", *map(long, ("rnn_relu", "lstm", "gru"))])
def test_half_precision(cell, device):
    check_orders(Case(cell, T=5, B=2, dtype=torch.bfloat16, reverse=(False,)), "unsplit", device)


@named(Case("rnn_relu", T=5, B=2, reverse=(False,)))
def test_many_orders(case, device):
    check_orders(case, "split", device, seeds=4)


def one_buffer(*args):
    tile, slot, own = tiles.exchange_tile(*args)
    return tile, slot * 0, own


def arrive_with(**options):
    return {"arrive": lambda counter: tl.atomic_add(counter, 1, **options)}


def wait_with(**options):
    def wait(counter, arrivals):
        while tl.atomic_add(counter, 0, **options) < arrivals:
            pass

    return {"wait": wait}


def not_once(counter, arrivals):
    """One program does not wait for the second arrivals."""
    if builder.grid_idx[0] != 1 or arrivals != 2 * 3:
        barrier.wait(counter, arrivals)


def arrive_first(p, group, *rest):
    barrier.arrive(p.counters + group * barrier.COUNTER_STRIDE)
    return tiles.exchange_tile(p, group, *rest)


def wait_and_arrive(counter, arrivals):
    barrier.wait(counter, arrivals)
    barrier.arrive(counter)


def one_buffer_of_parts(*args):
    to_column, from_column, slot, counter = PARTS_TILES(*args)
    return to_column, from_column, slot * 0, counter


def counter_of_all_columns(p, *rest):
    *tiles, _ = PARTS_TILES(p, *rest)
    return *tiles, p.counters + 2 * barrier.COUNTER_STRIDE


def counter_of_the_line(p, BLOCK_B, BLOCK_N, COLUMNS, SLICES):
    *tiles, _ = PARTS_TILES(p, BLOCK_B, BLOCK_N, COLUMNS, SLICES)
    return *tiles, p.counters + tl.program_id(0) // COLUMNS * barrier.COUNTER_STRIDE


PARTS_TILES = backward.parts_tiles
# What is replaced in the second exchange, by what, in a grid of two lines and two columns.
BROKEN_GRID = {
    "one buffer of parts": one_buffer_of_parts,
    "one counter for all columns": counter_of_all_columns,
    "one counter for line and column": counter_of_the_line,
}
# What is replaced in the module of a pass, and by what; a group has three members.
BROKEN = {
    "nobody waits": {"wait": lambda counter, arrivals: None},
    "one arrival too few": {"wait": lambda counter, arrivals: barrier.wait(counter, arrivals - 1)},
    "arrivals of the step before": {"wait": lambda counter, arrivals: barrier.wait(counter, arrivals - 3)},
    "one exchange buffer": {"exchange_tile": one_buffer},
    "one counter for all groups": {"COUNTER_STRIDE": 0},
    "one wait is absent": {"wait": not_once},
    "arrivals before stores": {"exchange_tile": arrive_first, "wait": wait_and_arrive, "arrive": lambda counter: None},
}
# Under sequential consistency the values are right.
UNORDERED = {
    "relaxed arrivals": arrive_with(sem="relaxed"),
    "arrivals for one processor": arrive_with(sem="release", scope="cta"),
    "relaxed waits": wait_with(sem="relaxed"),
    "waits for one processor": wait_with(sem="acquire", scope="cta"),
}
RACE = (
    r"data race at byte \d+ of p\.(exchange|parts|counters): an? .* by program \(\d, 0, 0\) is not ordered behind an? "
)
PASSES = pytest.mark.parametrize("module", [forward, backward], ids=["forward", "backward"])


@pytest.fixture
def broken_layer(request, module, device, monkeypatch):
    """A layer in whose pass something is replaced, with the plan for it."""
    for name, replacement in request.param.items():
        monkeypatch.setattr(module, name, replacement)
    with plan.override(TOGETHER["unsplit"]):
        yield make(Case("rnn_tanh", T=3, B=2), device)


def broken(changes):
    return pytest.mark.parametrize("broken_layer", changes.values(), ids=changes, indirect=True)


def try_orders(function, layer, seeds, races):
    for seed in seeds:
        with concurrent(seed, races):
            function(gpu, layer)


@PASSES
@broken(BROKEN)
def test_a_broken_exchange_gives_wrong_values(broken_layer):
    with pytest.raises(AssertionError, match="relative error"):
        try_orders(check, broken_layer, range(12), races=False)


@PASSES
@broken(BROKEN)
def test_a_broken_exchange_is_a_race(broken_layer):
    with pytest.raises(InterpreterError, match=RACE):
        try_orders(run, broken_layer, range(12), races=True)


@pytest.mark.parametrize("races", [False, True], ids=["wrong values", "a race"])
@pytest.mark.parametrize("replacement", BROKEN_GRID.values(), ids=BROKEN_GRID)
def test_a_broken_grid(replacement, races, device, monkeypatch):
    monkeypatch.setattr(backward, "parts_tiles", replacement)
    layer = make(Case("rnn_tanh", T=4, B=2, reverse=(False,)), device)
    error, words = (InterpreterError, RACE) if races else (AssertionError, "relative error")
    with plan.override(together(8, 1, slices=2)), pytest.raises(error, match=words):
        try_orders(run if races else check, layer, range(12), races)


@PASSES
@broken(UNORDERED)
def test_what_a_weak_memory_model_may_reorder_is_a_race_in_every_order(broken_layer):
    try_orders(check, broken_layer, [0], races=False)
    for seed in range(2):
        with pytest.raises(InterpreterError, match=RACE):
            try_orders(run, broken_layer, [seed], races=True)


@PASSES
def test_an_absent_arrival_is_a_deadlock(module, device, monkeypatch):
    """The second of the two groups waits, and the threads of all programs end."""
    layer = make(Case("rnn_tanh", T=4, B=2), device)
    monkeypatch.setattr(module, "arrive", lambda counter: builder.grid_idx[0] == 4 or barrier.arrive(counter))
    before = threading.active_count()
    said = r"deadlock: of 6 programs, \(3, 0, 0\), \(4, 0, 0\), \(5, 0, 0\) wait forever"
    with plan.override(TOGETHER["unsplit"]), concurrent(0), pytest.raises(InterpreterError, match=said):
        run(gpu, layer)
    assert threading.active_count() == before


def test_what_a_program_raises_ends_all(device, monkeypatch):
    def fail(counter, arrivals):
        raise ValueError("out of order")

    monkeypatch.setattr(forward, "wait", fail)
    before = threading.active_count()
    with plan.override(TOGETHER["unsplit"]), concurrent(0), pytest.raises(InterpreterError, match="out of order"):
        run(gpu, make(Case("rnn_tanh", T=4, B=2), device))
    assert threading.active_count() == before


@triton.jit
def enlist(count, order, TIMES: tl.constexpr):
    for _ in range(TIMES):
        tl.store(order + tl.atomic_add(count, 1), tl.program_id(0))


def test_the_seed_decides_the_order(device):
    def order(seed):
        count, order = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 12))
        with concurrent(seed):
            enlist[(4,)](count, order, 3)
        return tuple(order.tolist())

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(10)}) > 5
    assert all(sorted(order(seed)) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] for seed in range(3))
