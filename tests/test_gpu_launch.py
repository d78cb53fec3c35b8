"""What the Triton backend asks of the device, without one: nothing here runs or compiles a kernel."""

import threading
from ctypes import POINTER, c_float, cast
from dataclasses import replace

import numpy
import pytest
import torch

pytest.importorskip("triton")

from gpu_layers import Case, gradients_like, make
from rnnfast_kernels.gpu import launch, plan
from triton.runtime.errors import OutOfResources

from rnnfast.backends import Needs, Weights, gpu, gpu_launch, gpu_products

CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch):
    """Launches are kept instead of run."""
    kept = []
    monkeypatch.setattr(launch.Launch, "run", lambda self: kept.append(self))
    return kept


def plain(value) -> int:
    return getattr(value, "value", value)


class Blas:
    """cuBLAS over numpy, as its manual has it: every matrix by columns, `line` elements from one to the next."""

    def __init__(self):
        self.computed, self.status, self.meanwhile = [], 0, lambda: None

    def cublasGemmStridedBatchedEx(self, handle, ta, tb, m, n, k, alpha, a, at, lda, sa, b, bt, ldb, sb, beta, c, ct,
                                   ldc, sc, batch, compute, algorithm):  # fmt: skip
        assert (at, bt, ct, algorithm) == (0, 0, 0, -1)
        assert (alpha._obj.value, beta._obj.value) == (1.0, 0.0)
        self.meanwhile()
        self.computed.append(compute)
        if self.status:
            return self.status
        ta, tb, m, n, k, batch = map(plain, (ta, tb, m, n, k, batch))

        def matrix(address, line, stride, at, rows, columns):
            line, start = plain(line), plain(address) + 4 * at * plain(stride)
            assert line >= rows
            memory = numpy.ctypeslib.as_array(cast(start, POINTER(c_float)), ((columns - 1) * line + rows,))
            return numpy.lib.stride_tricks.as_strided(memory, (rows, columns), (4, 4 * line))

        for at in range(batch):
            left = matrix(a, lda, sa, at, *((k, m) if ta else (m, k)))
            right = matrix(b, ldb, sb, at, *((n, k) if tb else (k, n)))
            with numpy.errstate(all="ignore"):  # what no kernel has filled holds anything
                matrix(c, ldc, sc, at, m, n)[:] = (left.T if ta else left) @ (right.T if tb else right)
        return 0


@pytest.fixture
def blas(monkeypatch):
    """Products differ in precision from torch's own, on the CPU, and go to this cuBLAS."""
    found = Blas()
    monkeypatch.setattr(gpu_products, "library", lambda: found)
    monkeypatch.setattr(gpu_products, "differs", lambda like: like.dtype == torch.float32)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 1)
    gpu_products.warn_declined.cache_clear()
    return found


def operands():
    """Pairs of matrices and of batches that lie in memory in every way that layers have."""
    wide = torch.randn(5, 40)
    yield torch.randn(5, 3), torch.randn(4, 3).t()
    yield torch.randn(7, 5).t(), torch.randn(7, 4)
    yield wide[:, 3:9], torch.randn(6, 8)
    yield wide[:, ::2], torch.randn(20, 8)
    yield wide.view(5, 2, 20)[:, 1], torch.randn(20, 1)
    yield torch.randn(1, 6), torch.randn(6, 8)
    yield torch.randn(2, 3, 4), torch.randn(2, 5, 4).transpose(1, 2)
    yield torch.randn(6, 2, 3).permute(1, 2, 0), torch.randn(6, 2, 4).transpose(0, 1)
    yield torch.randn(2, 1, 4), torch.randn(1, 4, 5).expand(2, 4, 5)


@pytest.mark.parametrize(("a", "b"), list(operands()))
def test_products_asked_of_cublas_are_right(a, b, blas):
    torch.testing.assert_close(gpu_products.multiply(a, b), torch.matmul(a, b))
    result = torch.empty(*a.shape[:-1], b.shape[-1])
    assert gpu_products.multiply(a, b, result) is result
    torch.testing.assert_close(result, torch.matmul(a, b))
    if a.dim() == 2:
        bias = torch.randn(b.shape[-1])
        torch.testing.assert_close(gpu_products.multiply_add(bias, a, b), torch.addmm(bias, a, b))
    assert len(blas.computed) >= 2


def test_empty_and_double_products_are_torchs(blas):
    assert gpu_products.multiply(torch.ones(3, 0), torch.ones(0, 2)).equal(torch.zeros(3, 2))
    assert gpu_products.multiply(torch.ones(0, 3), torch.ones(3, 2)).shape == (0, 2)
    assert gpu_products.multiply(torch.ones(2, 2).double(), torch.ones(2, 2).double()).dtype == torch.float64
    assert not blas.computed


def test_a_product_that_cublas_declines_is_torchs_with_a_warning(blas):
    blas.status = 15
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with pytest.warns(RuntimeWarning, match="status 15"):
        first = gpu_products.multiply(a, b)
    assert first.equal(a @ b)
    assert gpu_products.multiply(a, b).equal(a @ b)  # a second warning were an error


@pytest.mark.parametrize("wanted", [True, False], ids=["tf32", "ieee"])
def test_no_switch_of_torch_moves_while_a_layer_multiplies(wanted, blas, launches, monkeypatch):
    """Neither in this thread nor in another, and the older switches can be read meanwhile."""
    matmul, seen = torch.backends.cuda.matmul, []

    def look():
        seen.append((matmul.allow_tf32, torch.get_float32_matmul_precision()))

    def look_from_another_thread():
        other = threading.Thread(target=look)
        other.start()
        other.join()
        look()

    monkeypatch.setattr(gpu_products, "tf32_wanted", lambda: wanted)
    blas.meanwhile = look_from_another_thread
    before = matmul.allow_tf32, torch.get_float32_matmul_precision()
    forward_and_backward(make(Case("lstm", P=5), CPU))
    assert len(seen) > 20
    assert set(seen) == {before}
    assert set(blas.computed) == {gpu_products.COMPUTE_TF32 if wanted else gpu_products.COMPUTE_IEEE}


@pytest.mark.parametrize("legacy", [True, False])
def test_switches_are_read_in_the_words_in_which_they_were_set(legacy):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if not legacy and not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older switches only")
    before = [getattr(matmul, "fp32_precision", None), cudnn.allow_tf32]
    try:
        for on in (True, False):
            if legacy:
                matmul.allow_tf32 = cudnn.allow_tf32 = on
            else:
                matmul.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if on else "ieee"
            assert gpu_products.tf32_in_products() == gpu_products.tf32_wanted() == on
    finally:
        if before[0] is None:
            matmul.allow_tf32 = False
        else:
            matmul.fp32_precision = before[0]
        cudnn.allow_tf32 = before[1]


def forward_and_backward(layer):
    result = gpu.forward(layer, save=True, all_states=True)
    ds, df = gradients_like(result.states), gradients_like(result.finals)
    gpu.backward(layer, result.states, result.saved, ds, df, Needs(True, True, True))


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
    "cooperative": lambda problem: plan.cooperative(problem, 16, 8, 16, 1, 4, shared=10**9),
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
        launch.backward_loop: {"dx", "du", "dinitial", "exchange", "counters", "parts"},
    }
    with plan.override(LOOPS["cooperative"]):
        forward_and_backward(make(Case("lstm", H=16), CPU))
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
    steps = launch.Repeated(launch.Launch(None, (1, 2, 3), ("tensors", "carry", 0, 5), {}), launch.STEP)
    for k in range(4):
        steps.run(k)
    assert [each.args for each in found] == [("tensors", "carry", 0, 5)]
    assert direct == [((1, 2, 3), 7, ("tensors", "carry", k, 5)) for k in (1, 2, 3)]
