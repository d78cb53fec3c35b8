"""The Triton kernels against the reference loop in float64: on a GPU, in the interpreter with TRITON_INTERPRET=1, or as
compiled for a GPU that is not there with `--compiled-for sm_90` (compiled_kernels.py).

Every loop is forced in turn by a plan of the test's own. In the interpreter, where programs run one after another, a
cooperative loop has one program to a group here; several programs to a group are in test_gpu_cooperative.py. Elsewhere
they are here too, and so are layers of usual sizes by the plans of the device.
"""

from contextlib import nullcontext
from dataclasses import replace

import conftest
import loop_backend
import pytest
import torch
from conftest import INTERPRETED
from gpu_layers import Case, check, exact, make, run

if not (INTERPRETED or conftest.compiled_for or torch.cuda.is_available()):
    pytest.skip("needs a GPU, TRITON_INTERPRET=1, or --compiled-for", allow_module_level=True)

import triton
import triton.language as tl
from compiled_kernels import compiled_for
from gpu_plans import ALONE, TOGETHER
from rnnfast_kernels.gpu import launch, plan
from rnnfast_kernels.gpu.streamed import ShiftTensors
from rnnfast_kernels.gpu.tiles import finish_products, rows_of_step

from rnnfast.backends import gpu, gpu_launch, gpu_products

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")


@pytest.fixture(autouse=True)
def kernels_run_as_compiled():
    """Where that is asked for."""
    with compiled_for(conftest.compiled_for) if conftest.compiled_for else nullcontext():
        yield


@pytest.fixture(params=ALONE)
def loop(request):
    """One loop, forced for the length of the test."""
    with plan.override(ALONE[request.param]):
        yield request.param


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Float32 products as exact as they come."""
    monkeypatch.setattr(gpu_products, "tf32_wanted", lambda: False)


def named(*cases):
    return pytest.mark.parametrize("case", cases, ids=str)


@named(*(Case(cell, T=3, B=3, H=33, layout="padded", resets=True) for cell in CELLS))
def test_every_loop(case, loop, device):
    check(gpu, make(case, device))


at_once = pytest.mark.skipif(INTERPRETED, reason="programs run one after another, in one order")


@at_once
@named(*(Case(cell, T=4, B=18, H=33, layout="padded", resets=True) for cell in ("lstm", "gru")))
@pytest.mark.parametrize("forced", TOGETHER)
def test_programs_that_share_a_recurrence(case, forced, device):
    with plan.override(TOGETHER[forced]):
        check(gpu, make(case, device))


USUAL = (
    ("lstm", 1, 256, torch.bfloat16),
    ("lstm", 16, 512, torch.float16),
    ("lstm", 16, 650, torch.float32),
    ("gru", 16, 650, torch.bfloat16),
    ("lstm", 64, 768, torch.bfloat16),
    ("gru", 16, 1024, torch.float32),
    ("lstm", 64, 1024, torch.bfloat16),
    ("lstm", 16, 2048, torch.bfloat16),
)


@at_once
@named(
    *(
        Case(cell, T=3, B=B, H=H, dtype=dtype, layout=layout, reverse=(False,))
        for (cell, B, H, dtype), layout in zip(USUAL, ("dense", "packed") * 4, strict=True)
    )
)
def test_usual_sizes_by_the_plans_of_the_device(case, device):
    check(gpu, make(case, device))


SIZES = ((1, 1, 1, 1), (3, 1, 7, 130), (2, 33, 65, 65), (1, 130, 1, 7))


@named(*(Case(cell, *size, reverse=(True,)) for cell in ("lstm", "gru") for size in SIZES))
@pytest.mark.parametrize("forced", ["resident", "cooperative", "streamed"])
def test_sizes_that_are_multiples_of_nothing(case, forced, device):
    with plan.override(ALONE[forced]):
        check(gpu, make(case, device))


@triton.jit(do_not_specialize=["k", "T", "B"])
def write_first_row(p, result, k, T, B):
    tl.store(result, rows_of_step(p, k, False, T, B, 0)[0])


def test_rows_are_counted_in_64_bits(device):
    """T beyond 65,535 times B beyond 2**31 rows."""
    tensors = ShiftTensors(None, None, None, None, None)
    result = torch.zeros(1, dtype=torch.int64, device=device)
    write_first_row[(1,)](tensors, result, 69_999, 70_000, 40_000)
    assert result.item() == 69_999 * 40_000


@triton.jit
def add_parts_of_gates(p_parts, p_sums, COUNT: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    tile = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    part = tl.arange(0, SPLIT)[:, None, None] * (M * N) + tile[None, :, :]
    products = ()
    for g in tl.static_range(COUNT):
        products = products + (tl.load(p_parts + g * SPLIT * M * N + part),)  # noqa: RUF005
    sums = finish_products(products, COUNT, M, N, SPLIT)
    for g in tl.static_range(COUNT):
        tl.store(p_sums + g * M * N + tile, sums[g])


@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("gates", [1, 2, 3, 4, 5])
def test_the_parts_of_any_number_of_gates_add_up(gates, split, device):
    parts = torch.randn(gates, split, 16, 8, device=device)
    sums = torch.full((gates, 16, 8), float("nan"), device=device)
    add_parts_of_gates[(1,)](parts, sums, gates, split, 16, 8)
    torch.testing.assert_close(sums, parts.sum(1))


# Relu is not smooth: of few values none is so near zero that rounding turns it on or off.
STEPS = {"rnn_tanh": 4, "rnn_relu": 2, "lstm": 4, "gru": 4}
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@named(*(Case(cell, T=STEPS[cell], dtype=dtype) for cell in CELLS for dtype in DTYPES))
@pytest.mark.parametrize("forced", ["resident", "cooperative", "streamed"])
def test_dtypes(case, forced, device):
    if case.dtype == torch.float64 and forced != "streamed":
        pytest.skip("float64 is streamed")
    with plan.override(ALONE[forced]):
        check(gpu, make(case, device))


LAYOUTS = [(layout, resets) for layout in ("dense", "padded", "packed") for resets in (False, True)]


@named(*(Case(cell, T=3, layout=layout, resets=resets) for cell in ("lstm", "gru") for layout, resets in LAYOUTS))
def test_layouts(case, device):
    check(gpu, make(case, device))


@named(*(Case("lstm", T=3, P=5, layout=layout, resets=resets, bias=False) for layout, resets in LAYOUTS))
def test_projection(case, device):
    check(gpu, make(case, device))


@named(Case("lstm", B=6, layout="padded"), Case("gru", B=6), Case("lstm", B=6, P=5))
def test_gradients_by_group_add_up(case, device):
    layer = make(case, device)
    whole, parts = run(gpu, layer), run(gpu, layer, groups=3)
    for name, value in parts.items():
        if name.startswith("dw"):
            assert value.shape[0] == 3
            torch.testing.assert_close(value.sum(0), whole[name], atol=1e-5, rtol=1e-5)


def test_gradients_by_group_are_those_of_the_group_alone(device):
    layer = make(Case("gru", B=6, reverse=(False,)), device)
    parts = run(gpu, layer, groups=3)
    alone = replace(layer, x=layer.x[:, 1::3], hx=tuple(h[:, 1::3] for h in layer.hx))
    result = gpu.forward(layer, save=True, all_states=True)
    ds = [torch.cos(torch.arange(t.numel()).to(t)).view(t.shape)[:, 1::3] for t in result.states]
    df = [torch.cos(torch.arange(t.numel()).to(t)).view(t.shape)[:, 1::3] for t in result.finals]
    result = gpu.forward(alone, save=True, all_states=True)
    grads = gpu.backward(alone, result.states, result.saved, tuple(ds), tuple(df), gpu.Needs(True, True, True))
    for n, value in enumerate(w for w in grads.weights[0] if w is not None):
        torch.testing.assert_close(parts[f"dw{n}"][1], value.cpu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"dstates": False}, {"dfinals": False}, {"needs": gpu.Needs(True, False, False)}],
    ids=["no dstates", "no dfinals", "only dx"])  # fmt: skip
@pytest.mark.parametrize("case", [Case("lstm"), Case("lstm", P=5)], ids=["plain", "projected"])
def test_gradients_that_are_absent_or_not_wanted(case, options, device):
    check(gpu, make(case, device), **options)


@named(Case("lstm", T=0), Case("gru", B=0), Case("lstm", T=0, P=5), Case("gru", T=3, B=1, layout="padded"))
def test_nothing_to_run(case, device):
    layer = make(case, device)
    if case.layout == "padded":
        layer = replace(layer, batch_sizes=torch.zeros_like(layer.batch_sizes))
    check(gpu, layer)


@pytest.mark.parametrize("cell", CELLS)
def test_states_are_kept_in_float32_from_step_to_step(cell, device):
    """In bfloat16 a state that were rounded each step would drift; the error must not grow with T."""
    errors = []
    for steps in (2, 40):
        layer = make(Case(cell, T=steps, B=2, H=16, dtype=torch.bfloat16, reverse=(False,)), device)
        got = gpu.forward(layer, save=False, all_states=True)
        expected = loop_backend.forward(exact(layer), save=False, all_states=True)
        difference = got.finals[-1].cpu().double() - expected.finals[-1]
        errors.append((difference.norm() / expected.finals[-1].norm()).item())
    assert errors[1] < 4 * max(errors[0], 2e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(cell, loop, device):
    layer = make(Case(cell, T=3, B=3, reverse=(False,)), device)
    clean = gpu.forward(layer, save=False, all_states=False).states[0]
    layer.x[1, 1] = float("nan")
    got = gpu.forward(layer, save=False, all_states=False).states[0]
    assert torch.equal(got[:, ::2], clean[:, ::2])
    assert torch.equal(got[0], clean[0])
    assert got[1:, 1].isnan().all()


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_stops_nan_both_ways(cell, loop, device):
    layer = make(Case(cell, T=3, B=2, reverse=(False,)), device)
    layer.hx[0][:, 1] = float("nan")
    resets = torch.zeros(3, 2, dtype=torch.bool, device=device)
    resets[0, 1] = True
    got = run(gpu, replace(layer, resets=resets))
    assert all(value.isfinite().all() for value in got.values())
    assert not got["dhx0"][:, 1].any()


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter's own loads")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("forced", ["cooperative", "cooperative-few-rows"])
def test_rows_that_a_batch_does_not_have_may_hold_anything(cell, forced, device, monkeypatch):
    """On a device, what a load leaves out is whatever the registers held."""
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load
    poisoned = []

    def poisoning_load(self, pointers, mask, other, *options):
        loaded = load(self, pointers, mask, other, *options)
        if other is None and loaded.data.dtype == "float32":
            loaded.data[~mask.data] = float("nan")
            poisoned.append(mask)
        return loaded

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", poisoning_load)
    with plan.override(ALONE[forced]):
        check(gpu, make(Case(cell, T=2, B=3, layout="padded", reverse=(True,)), device))
    assert poisoned


@at_once
def test_two_runs_are_bitwise_equal(loop, device):
    layer = make(Case("gru", T=2, B=18), device)
    first, second = run(gpu, layer), run(gpu, layer)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_refused_launch_runs_step_by_step_and_warns_once(device, monkeypatch):
    run_once, refused = launch.Launch.run, []

    def refuse(self):
        if getattr(self.args[0], "counters", None) is not None:
            refused.append(self)
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        run_once(self)

    monkeypatch.setattr(launch.Launch, "run", refuse)
    gpu_launch.warn_refused.cache_clear()
    with plan.override(ALONE["cooperative"]), pytest.warns(RuntimeWarning, match="too many blocks") as caught:
        check(gpu, make(Case("lstm"), device))
    assert len(refused) == 2
    assert len(caught) == 1
