"""The planner: a pure function, so every promise it makes is checked over a grid of sizes and devices."""

from dataclasses import replace
from functools import cache
from itertools import islice, product

import pytest

pytest.importorskip("triton", minversion="3.5")

from rnnfast_kernels.cells import TORCH_CELLS
from rnnfast_kernels.gpu import aot, launch, plan
from rnnfast_kernels.gpu.vary import varied

H200 = plan.Device("sm_90", 132, 232448)
DEVICES = {
    "A100": plan.Device("sm_80", 108, 166912),
    "H200": H200,
    "slice of an H200": plan.Device("sm_90", 16, 232448),
    "B200": plan.Device("sm_100", 148, 232448),
    "RTX 5090": plan.Device("sm_120", 170, 101376),
    "MI300X": plan.Device("gfx942", 304, 65536, 64),
    "unheard of": plan.Device("sm_75", 40, 65536),
}
WIDTHS = (1, 7, 17, 33, 65, 100, 128, 130, 256, 512, 650, 768, 1000, 1024, 1900, 2048, 4096)
BATCHES = (1, 3, 16, 33, 64, 130, 2048)


def problem(cell="lstm", H=512, B=16, D=1, dtype="bfloat16", precision="ieee", backward=False, device=H200):
    return plan.Problem(cell, H, B, D, dtype, precision, backward, device)


def grid(device):
    kinds = (("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "ieee"))
    for cell, H, B, D, (dtype, precision), backward in product(
        TORCH_CELLS, WIDTHS, BATCHES, (1, 2), kinds, (False, True)
    ):
        yield problem(cell, H, B, D, dtype, precision, backward, device)


@cache
def chosen_plans(device, step):
    """Every so manyth problem of the grid with its plan."""
    return [(asked, plan.choose(asked)) for asked in islice(grid(device), 0, None, step)]


# Five divides the number of choices of no dimension, so that every one of them is met.
SAMPLED = pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.long)], ids=["sampled", "all"])


@SAMPLED
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_no_plan_can_deadlock_or_overrun(device, step):
    for asked, chosen in chosen_plans(device, step):
        assert chosen.shared <= device.shared, (asked, chosen)
        if device.amd and chosen.loop == "cooperative":
            # A chunk of one gate's weights passes through shared memory.
            assert chosen.block_n * chosen.split * chosen.block_k * asked.itemsize <= chosen.shared, (asked, chosen)
        if chosen.members > 1:
            assert chosen.loop == "cooperative"
            assert chosen.programs <= device.processors, (asked, chosen)


@SAMPLED
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_plan_covers_the_layer(device, step):
    for asked, chosen in chosen_plans(device, step):
        if chosen.loop == "streamed":
            continue
        assert chosen.members * chosen.block_n >= asked.H
        assert chosen.members == chosen.columns * chosen.slices
        # Each slice has the units of its programs.
        assert chosen.width >= min(chosen.columns * chosen.block_n, asked.H)
        assert chosen.programs == chosen.members * asked.D * -(-asked.B // chosen.block_b)
        assert 0 <= chosen.kept <= chosen.chunks
        assert chosen.split == (chosen.warps if chosen.loop == "cooperative" and chosen.slices == 1 else 1)
        assert all(size & (size - 1) == 0 for size in (chosen.block_b, chosen.reach, chosen.block_k, chosen.split))


@pytest.mark.parametrize(
    ("asked", "loop"),
    [
        (problem(H=64), "resident"),
        (problem(H=64, backward=True), "resident"),
        (problem("gru", H=128), "resident"),
        (problem(H=1024), "cooperative"),
        (problem(H=768, backward=True), "cooperative"),
        (problem(H=1024, dtype="float32", precision="tf32"), "cooperative"),
        (problem(H=8192), "streamed"),
        (problem(H=1024, B=4096), "streamed"),
        (problem(H=64, dtype="float64"), "streamed"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.cell}-{value.H}x{value.B}-{value.dtype}",
)
def test_the_loop_of_some_layers(asked, loop):
    assert plan.choose(asked).loop == loop


def test_weights_stay_in_registers_where_they_fit():
    assert plan.choose(problem(H=1024)).kept == plan.choose(problem(H=1024)).chunks
    large = plan.choose(problem(H=2048))
    assert 0 < large.kept < large.chunks


def test_weights_that_do_not_fit_the_chip_are_not_read_in_every_step_of_one_launch():
    assert plan.choose(problem(H=1024, dtype="float32")).loop == "cooperative"
    assert plan.choose(problem(H=2048, dtype="float32")).loop == "streamed"


def test_programs_form_a_grid_where_they_would_read_too_much():
    assert plan.choose(problem(H=256, backward=True)).slices == 1
    assert plan.choose(problem(H=1024, B=64)).slices == 1
    large = problem(H=1024, backward=True)
    chosen = plan.choose(large)
    assert chosen.slices > 1
    assert chosen.columns > 1
    one = varied(large, {"slices": 1})
    assert plan.step_time(large, chosen) < 0.8 * plan.step_time(large, one)


def test_float32_without_matrix_instructions_takes_tiles_of_few_rows():
    plain = {"dtype": "float32", "precision": "ieee"}
    assert plan.choose(problem(B=1, **plain)).block_b == 4
    assert plan.choose(problem(B=1, dtype="float32", precision="tf32")).block_b == 16
    assert plan.choose(problem(B=1, device=DEVICES["MI300X"], **plain)).block_b == 16


def test_a_step_has_the_registers_that_it_needs():
    """What is counted: the operand, the sums by what each takes, and on AMD the weights."""
    asked = problem(H=1024)
    assert plan.registers_of_step(asked, plan.cooperative(asked, 16, 8, 4)) == 64 + 4 * 4
    back = problem(H=1024, backward=True)
    assert plan.registers_of_step(back, plan.cooperative(back, 16, 8, 8)) == 128 + 2 * 4
    assert plan.registers_of_step(back, plan.cooperative(back, 16, 8, 8, 16)) == 8 + 2 * 8
    plain = problem(H=1024, dtype="float32")
    assert plan.registers_of_step(plain, plan.cooperative(plain, 16, 8, 8)) == 64 + 12 * 4
    assert plan.registers_of_step(plain, plan.cooperative(plain, 8, 16, 4)) == 3 * 64 + 4 * 4
    amd = problem(H=1024, device=DEVICES["MI300X"])
    weights = 4 * 16 * 1024 * 2
    assert plan.registers_of_step(amd, plan.cooperative(amd, 16, 16, 8)) == weights // (4 * 8 * 64)
    grid = replace(amd, backward=True, H=128)
    copies, weights = 4, 4 * 32 * 32 * 2
    assert plan.registers_of_step(grid, plan.cooperative(grid, 16, 8, 8, 4)) == copies * weights // (4 * 8 * 64)


@SAMPLED
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_no_plan_of_a_triton_loop_takes_more(device, step):
    for asked, chosen in chosen_plans(device, step):
        if chosen.loop == "cooperative" and not chosen.gluon:
            assert plan.registers_of_step(asked, chosen) <= plan.STEP_ROOM, (asked, chosen)


def test_an_odd_width_costs_no_more_than_the_next_round_one():
    for H, rounded in ((511, 512), (767, 768), (1001, 1024), (33, 64), (65, 128)):
        odd, even = problem(H=H), problem(H=rounded)
        assert plan.step_time(odd, plan.choose(odd)) <= plan.step_time(even, plan.choose(even)) * 1.05


@SAMPLED
def test_one_processor_means_no_waiting(step):
    for _, chosen in chosen_plans(replace(H200, processors=1), step):
        assert chosen.members == 1


def test_an_override_holds_for_its_block():
    ordinary = plan.choose(problem())
    with plan.override(plan.streamed):
        assert plan.choose(problem()).loop == "streamed"
    assert plan.choose(problem()) == ordinary


@SAMPLED
def test_no_choice_changes_nothing(step):
    for asked, chosen in chosen_plans(H200, step):
        assert varied(asked, {}) == chosen, asked


def test_a_choice_changes_what_follows_from_it():
    asked = problem(H=1024)
    wide = varied(asked, {"units": 16})
    assert (wide.block_n, wide.members) == (16, 64)
    assert wide.shared > plan.choose(asked).shared
    grid = varied(replace(asked, backward=True), {"slices": 4})
    assert (grid.slices, grid.columns, grid.split) == (4, 32, 1)
    assert varied(asked, {"rows": 4}, "streamed") == plan.streamed(asked)


@pytest.mark.parametrize(
    ("choices", "loop", "words"),
    [
        ({"row": 16}, None, "unknown choice 'row'; choose from rows, units"),
        ({}, "resident", "the device runs 132 at once with 232448"),
        ({"units": 4}, None, "256 programs"),
    ],
)
def test_a_choice_that_cannot_run_says_why(choices, loop, words):
    with pytest.raises(ValueError, match=words):
        varied(problem(H=1024), choices, loop)


@pytest.mark.parametrize(
    ("arch", "cell", "H", "B", "backward", "tile"),
    [("sm_90", "lstm", 1024, 64, True, (64, 8, 8, 16)), ("sm_100", "gru", 512, 128, False, (16, 32, 4))],
)
def test_tiles_of_which_a_compiler_spilled_are_no_candidates(arch, cell, H, B, backward, tile):
    """In TF32, by Triton 3.6 and 3.9."""
    asked = plan.Problem(cell, H, B, 1, "float32", "tf32", backward, aot.TARGETS[arch][1])
    refused = plan.cooperative(asked, *tile)
    assert plan.fits(asked, refused)
    assert refused not in plan.candidates(asked)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("B", [1, 65535 * 4, 65535 * 8 + 1, 3_000_000])
def test_a_grid_has_no_more_programs_along_the_batch_than_a_device_takes(B, dtype):
    """65,535 in every dimension but the first."""
    asked = problem(H=40, B=B, dtype=dtype)
    with plan.override(plan.streamed):
        step = aot.describe(aot.Case("sm_90", asked, False))
    shift = launch.shift(step.args[0], None, 40, 2 * B, 1, launch.Extent(2, B, 1, 0))
    assert max(*step.grid[1:], *shift.grid[1:]) <= 65535
    assert step.grid[1] * plan.streamed(asked).block_b >= B
