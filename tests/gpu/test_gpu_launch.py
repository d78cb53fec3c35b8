"""What the Triton backend asks of the device, without one: nothing here runs or compiles a kernel."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", minversion="3.5")

from gpu_layers import Case, gradients_like, make, run
from rnnfast_kernels.gpu import launch, plan
from triton.runtime.errors import OutOfResources

from rnnfast.backends import Needs, Weights, gpu, gpu_launch

CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch):
    """Launches are kept instead of run."""
    kept = []
    monkeypatch.setattr(launch.Launch, "run", lambda self: kept.append(self))
    return kept


def shifted(tensor):
    """The same values, 4 bytes behind an address that is a multiple of 64."""
    if tensor is None:
        return None
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    at = 4 // tensor.element_size()
    return room[at : at + tensor.numel()].view(tensor.shape).copy_(tensor)


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from tensors_of(entry)


LOOPS = {
    "resident": lambda problem: plan.resident(problem, 16, 4),
    "cooperative": lambda problem: plan.cooperative(problem, 16, 8, 4),
    "streamed": plan.streamed,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_kernels_get_no_address_that_is_not_aligned(loop, layout, launches):
    layer = make(Case("lstm", T=3, B=4, H=16, layout=layout, resets=True, reverse=(False,)), CPU)
    views = replace(
        layer,
        hx=tuple(map(shifted, layer.hx)),
        weights=tuple(Weights(*map(shifted, w)) for w in layer.weights),
        resets=shifted(layer.resets),
    )
    assert views.weights[0].w_hh.data_ptr() % 16 == 4
    with plan.override(LOOPS[loop]):
        result = gpu.forward(views, save=True, all_states=True)
        ds, df = (tuple(map(shifted, gradients_like(t))) for t in (result.states, result.finals))
        gpu.backward(views, result.states, tuple(map(shifted, result.saved)), ds, df, Needs(True, True, True))
    addresses = [t.data_ptr() for each in launches for t in tensors_of(each.args)]
    assert len(addresses) > 25
    assert not [address for address in addresses if address % 16]


def test_what_a_pass_writes_is_never_a_copy(launches):
    written = {
        launch.forward_loop: {"gates", "extra", "states", "finals", "exchange", "counters"},
        launch.backward_loop: {"dx", "du", "dinitial", "exchange", "counters", "parts", "dparameters", "dsignals"},
    }
    with plan.override(LOOPS["cooperative"]):
        run(gpu, make(Case("lstm", H=16), CPU))
    fused = [each for each in launches if each.kernel in written]
    assert len(fused) == 2
    for each in fused:
        assert set(each.args[0].read) | written[each.kernel] == set(each.args[0]._fields)
        assert set(each.args[0].read) & written[each.kernel] == set()


def test_counters_reach_as_far_as_a_launch_goes(monkeypatch):
    """A sequence whose arrivals int32 does not count runs step by step; one step less runs in one launch."""
    ran = []
    for name in ("run_fused", "stream_forward", "stream_backward"):
        monkeypatch.setattr(gpu_launch, name, lambda *_, name=name: ran.append(name) or True)
    layer = make(Case("lstm", H=16, reverse=(False,)), CPU)
    members = 2
    longest = (2**31 - 1) // members - 1
    with plan.override(LOOPS["cooperative"]):
        for T in (longest, longest + 1):
            extent = launch.Extent(T, 7, 1, 0)
            recurrence = gpu_launch.Recurrence(gpu.CELLS["lstm"], 16, extent)
            tensors = gpu_launch.ForwardTensors(*[None] * 3, *[None] * 9)._replace(w_hh=layer.weights[0].w_hh[None])
            gpu_launch.run_forward(recurrence, tensors, True)
            tensors = gpu_launch.BackwardTensors(*[None] * 16)._replace(w_hh=layer.weights[0].w_hh[None])
            gpu_launch.run_backward(recurrence, tensors)
    assert ran == ["run_fused", "run_fused", "stream_forward", "stream_backward"]


REFUSED = (
    RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"),
    RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    OutOfResources(300_000, 232_448, "shared memory"),
)
OTHER = (
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Internal Triton PTX codegen error: ptxas: out of resources"),
)


@pytest.mark.parametrize("error", REFUSED + OTHER, ids=str)
@pytest.mark.parametrize("loop", ["resident", "cooperative"])
def test_only_a_refusal_runs_step_by_step(error, loop, monkeypatch):
    def run(self):
        if self.kernel is launch.forward_loop:
            raise error
        return None

    monkeypatch.setattr(launch.Launch, "run", run)
    gpu_launch.warn_refused.cache_clear()
    layer = make(Case("lstm", H=16), CPU)
    with plan.override(LOOPS[loop]):
        if error in REFUSED and loop == "cooperative":
            with pytest.warns(RuntimeWarning, match="the device refused"):
                gpu.forward(layer, save=False, all_states=False)
        else:
            with pytest.raises(type(error)) as raised:
                gpu.forward(layer, save=False, all_states=False)
            assert raised.value is error


def test_later_steps_run_the_kernel_of_the_first(monkeypatch):
    """On the same stream, with the number of the step as all that changes."""
    found, direct = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args, stream: direct.append((grid, stream, args))

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 7

    monkeypatch.setattr(launch.triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(launch.Launch, "run", lambda self: found.append(self) or Compiled())
    steps = launch.Repeated(launch.Launch(None, (1, 2, 3), ("tensors", "carry", 0, 5), {}))
    for k in range(4):
        steps.run(k)
    assert [each.args for each in found] == [("tensors", "carry", 0, 5)]
    assert direct == [((1, 2, 3), 7, ("tensors", "carry", k, 5)) for k in (1, 2, 3)]
