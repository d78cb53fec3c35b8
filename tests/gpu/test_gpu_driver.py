"""Every kernel through Triton's own driver and launcher, over a libcuda of ours (fake_cuda.py)."""

import math
from random import Random

import pytest
import torch

# The launcher of 3.5 does not link with the libcuda of the tests.
pytest.importorskip("triton", minversion="3.6")

import fake_cuda
from conftest import INTERPRETED

if INTERPRETED or torch.cuda.is_available():
    pytest.skip("wants Triton to compile, for a device that is not there", allow_module_level=True)
if fake_cuda.compiler() is None:
    pytest.skip("needs a C compiler, as Triton's launcher does", allow_module_level=True)

from compiled_kernels import parsed
from fake_cuda import Launched, asked
from gpu_layers import Case, check, make, run
from gpu_plans import ALONE, TOGETHER
from ptx.machine import Machine
from rnnfast_kernels.gpu import TRITON, launch, plan
from triton.runtime.jit import JITFunction

from rnnfast.backends import gpu, gpu_launch

CPU = torch.device("cpu")
LOOPS = {
    "resident": ALONE["resident"],
    "cooperative": TOGETHER["split"],
    "grid": TOGETHER["grid"],
    "gluon": lambda problem: plan.gluon(problem, 16, 8),
    "streamed": plan.streamed,
}
SHORT = (
    ("lstm", "resident"), ("lstm", "grid"), ("lstm", "gluon"), ("gru", "cooperative"), ("gru", "streamed"),
    ("rnn_tanh", "resident"),
)  # fmt: skip
EVERY = [
    pytest.param(cell, loop, marks=() if (cell, loop) in SHORT else pytest.mark.long)
    for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru")
    for loop in LOOPS
]
# Kernels of these sizes are compiled for other tests too.
SMALL = Case("lstm", T=3, B=3, H=33, dtype=torch.bfloat16, layout="padded", resets=True)


@pytest.fixture
def described(monkeypatch):
    """The launches that the backend asks for, of steps after the first too."""
    found = []
    run_one, run_again = launch.Launch.run, launch.Repeated.run

    def run(self):
        found.append(self)
        return run_one(self)

    def again(self, value):
        before = len(found)
        run_again(self, value)
        if len(found) == before:
            args = list(self.launch.args)
            args[launch.STEP] = value
            found.append(self.launch._replace(args=tuple(args)))

    monkeypatch.setattr(launch.Launch, "run", run)
    monkeypatch.setattr(launch.Repeated, "run", again)
    return found


@pytest.mark.parametrize(("cell", "loop"), EVERY)
def test_what_the_launcher_passes(cell, loop, described):
    """Every argument, the sizes of the launch, and whether it is cooperative."""
    layer = make(Case(cell, T=3, B=3, H=33, dtype=torch.bfloat16, layout="padded", resets=True), CPU)
    with plan.override(LOOPS[loop]), fake_cuda.fake_cuda() as launches:
        run(gpu, layer)
    assert len(launches) == len(described)
    names = [each.name for each in launches]
    steps = 3 if loop == "streamed" else 1
    kind = "step" if loop == "streamed" else "loop"
    assert names.count(f"forward_{kind}") == names.count(f"backward_{kind}") == steps
    assert names.count("shifted_rows") == 1
    for passed, wanted in zip(launches, described, strict=True):
        values = list(passed.values.values())
        expected = asked(wanted, passed.compiled)
        assert values[: len(expected)] == expected
        assert not any(values[len(expected) :])  # no scratch buffers
        assert passed.grid == (*wanted.grid, 1, 1)[:3]
        assert passed.threads == 32 * wanted.options["num_warps"]
        assert passed.shared == passed.compiled.metadata.shared <= 232448
        assert passed.stream == fake_cuda.STREAM
        waits = loop in ("cooperative", "grid", "gluon") and passed.name.endswith("_loop")
        assert passed.cooperative == waits == wanted.options.get("launch_cooperative_grid", False)


class Runner:
    """Runs what is launched, by its PTX, with the values that the launcher passed."""

    def __init__(self, described):
        self.described, self.random = described, Random(0)

    def __call__(self, launched: Launched) -> None:
        tensors = {}
        for at, tensor in enumerate(t for t in flat(self.described[-1].args) if isinstance(t, torch.Tensor)):
            tensors[str(at)] = (tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor.element_size())
        code = parsed(launched.compiled.asm["ptx"])
        values = list(launched.values.values())
        Machine(code, launched.grid, launched.threads, launched.shared, values, tensors).run(self.random)


def flat(value):
    if isinstance(value, tuple):
        for entry in value:
            yield from flat(entry)
    else:
        yield value


older = pytest.mark.skipif(TRITON < (3, 7), reason="tests/ptx has no bar.warp.sync, which Triton 3.6 writes there")


@pytest.mark.parametrize("loop", [pytest.param("grid", marks=(pytest.mark.long, older)), "streamed"])
def test_kernels_that_are_launched_so_compute_the_right_thing(loop, described):
    """The code that is launched, on the values that the launcher passes."""
    case = Case("lstm", T=2, B=3, H=33, dtype=torch.bfloat16, reverse=(False,))
    with plan.override(LOOPS[loop]), fake_cuda.fake_cuda(Runner(described)):
        check(gpu, make(case, CPU))


def cooperative_fails(error):
    return lambda launched: error if launched.cooperative else None


@pytest.mark.parametrize("error", [720, 701, 801])
def test_a_refusal_of_the_driver_runs_step_by_step(error):
    gpu_launch.warn_refused.cache_clear()
    layer = make(SMALL, CPU)
    with plan.override(TOGETHER["split"]):
        with fake_cuda.fake_cuda(cooperative_fails(error)) as launches:
            with pytest.warns(RuntimeWarning, match="the device refused a cooperative launch"):
                gpu.forward(layer, save=True, all_states=True)
            names = [each.name for each in launches]
            gpu.forward(layer, save=True, all_states=True)  # without another warning
            assert [each.name for each in launches] == 2 * names
        assert names == ["forward_loop", "forward_step", "forward_step", "forward_step"]
        with fake_cuda.fake_cuda() as launches:
            gpu.forward(layer, save=True, all_states=True)  # nothing is left of the refusal
        assert [each.name for each in launches] == ["forward_loop"]


def test_an_error_that_an_earlier_kernel_left_is_raised():
    with (
        plan.override(TOGETHER["split"]),
        fake_cuda.fake_cuda(cooperative_fails(700)) as launches,
        pytest.raises(RuntimeError, match="illegal memory access"),
    ):
        gpu.forward(make(SMALL, CPU), save=True, all_states=True)
    assert [each.name for each in launches] == ["forward_loop"]


def test_later_steps_do_not_go_through_triton(monkeypatch):
    searched, look = [], JITFunction.run

    def run_and_note(kernel, *args, **options):
        searched.append(kernel.fn.__name__)
        return look(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "run", run_and_note)
    with plan.override(plan.streamed), fake_cuda.fake_cuda() as launches:
        gpu.forward(make(SMALL, CPU), save=True, all_states=True)
    assert searched == ["forward_step"]
    assert [each.values["k"] for each in launches] == [0, 1, 2]


def test_a_grid_larger_than_the_device_is_never_asked_for():
    """By the plans of an H200, in which all programs that wait are on the device at once."""
    layer = make(Case("lstm", T=2, B=70, H=130, dtype=torch.bfloat16, reverse=(False,)), CPU)
    with fake_cuda.fake_cuda() as launches:
        gpu.forward(layer, save=True, all_states=True)
    (only,) = launches
    assert only.name == "forward_loop"
    assert only.cooperative
    assert math.prod(only.grid) <= 132
