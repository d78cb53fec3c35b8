"""Products in the precision of torch's recurrent layers, without a switch of torch and without a device."""

import threading
from ctypes import POINTER, c_float, cast

import numpy
import pytest
import torch

pytest.importorskip("triton", minversion="3.5")

from gpu_layers import Case, make, run
from rnnfast_kernels.gpu import launch, plan
from torch.utils._python_dispatch import TorchDispatchMode

from rnnfast.backends import gpu, gpu_products

CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch):
    """Launches are left out."""
    monkeypatch.setattr(launch.Launch, "run", lambda self: None)


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


class Products(TorchDispatchMode):
    """Counts torch's own products."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket._qualified_op_name in {
            f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")
        }:
            self.found.append((function, args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loop", [plan.best, plan.streamed], ids=["of the plan", "streamed"])
@pytest.mark.parametrize("P", [None, 5])
def test_every_product_of_a_layer_has_their_precision(loop, P, blas, launches):
    with plan.override(loop), Products() as products:
        run(gpu, make(Case("lstm", P=P), CPU))
    assert len(blas.computed) > 5
    assert not products.found
    with Products() as products:
        run(gpu, make(Case("lstm", P=P, dtype=torch.bfloat16), CPU))
    assert products.found


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
    run(gpu, make(Case("lstm", P=5), CPU))
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
