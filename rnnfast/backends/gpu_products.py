"""Matrix products around and between the steps of a layer, in the precision that torch gives its recurrent layers.

torch has one switch for float32 products by TF32 in recurrent layers, inside cuDNN, and another for all other products.
The second belongs to the whole process, so nothing here sets it: where the two differ, the product is asked of cuBLAS,
which takes its precision by the call.
"""

import os
from ctypes import CDLL, byref, c_float, c_int, c_longlong, c_void_p
from functools import cache
from typing import Any

import torch
from rnnfast_kernels.warn import warn_user
from torch import Tensor

# Constants of cuBLAS: a type, whether an operand is transposed, how to compute, which algorithm, what a call returns.
FLOAT32 = 0
AS_IT_IS, TRANSPOSED = 0, 1
COMPUTE_IEEE, COMPUTE_TF32 = 69, 77
DEFAULT_ALGORITHM = -1
SUCCESS = 0


def tf32_wanted() -> bool:
    """Whether torch lets its own recurrent layers round float32 products to TF32."""
    if hasattr(torch.backends.cudnn, "rnn"):
        return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return torch.backends.cudnn.allow_tf32


def tf32_in_products() -> bool:
    """Whether torch's own matrix products round float32 to TF32."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def differs(like: Tensor) -> bool:
    """Whether torch would multiply tensors like this one in another precision than its recurrent layers do."""
    if like.dtype != torch.float32 or not like.is_cuda or torch.version.hip:
        return False
    return tf32_in_products() != tf32_wanted()


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, own: bool | None = None) -> Tensor:
    """a @ b, of two matrices or of two batches of as many, into `out` where it is given.

    own: what `differs` says of them, where it has been asked.
    """
    if differs(a) if own is None else own:
        result = gemm(a, b, out)
        if result is not None:
            return result
    return torch.bmm(a, b, out=out) if a.dim() == 3 else torch.mm(a, b, out=out)


def multiply_add(bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a @ b + bias, of matrices, and of a vector for all rows or None."""
    if bias is None:
        return multiply(a, b)
    return multiply(a, b).add_(bias) if differs(a) else torch.addmm(bias, a, b)


@cache
def library() -> Any:
    """The cuBLAS that torch has loaded, or None."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return CDLL(f"libcublas.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None


def layout(matrix: Tensor) -> tuple[Tensor, int, int]:
    """A matrix that cuBLAS can read, perhaps a copy; whether it lies transposed; and how far its lines are apart."""
    rows, columns = matrix.shape[-2:]
    if matrix.stride(-1) == 1 and matrix.stride(-2) >= columns:
        return matrix, AS_IT_IS, matrix.stride(-2)
    if matrix.stride(-2) == 1 and matrix.stride(-1) >= rows:
        return matrix, TRANSPOSED, matrix.stride(-1)
    return matrix.contiguous(), AS_IT_IS, columns


def gemm(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor | None:
    """a @ b by cuBLAS in the precision of recurrent layers; None, with nothing done, where it does not take them.

    cuBLAS counts along columns first, so that it is asked for the transpose, b^T a^T.
    """
    sizes = (*a.shape, b.shape[-1])
    if library() is None or min(sizes) == 0 or max(sizes) >= 2**31:
        return None
    result = a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
    if result.stride(-1) != 1 or result.shape != (*a.shape[:-1], b.shape[-1]):
        return None
    (a, a_lies, a_line), (b, b_lies, b_line) = layout(a), layout(b)
    batch, one, zero = (a.shape[0] if a.dim() == 3 else 1), c_float(1), c_float(0)
    strides = [c_longlong(t.stride(0) if t.dim() == 3 else 0) for t in (b, a, result)]
    status = library().cublasGemmStridedBatchedEx(
        c_void_p(torch.cuda.current_blas_handle()),
        b_lies, a_lies, c_int(b.shape[-1]), c_int(a.shape[-2]), c_int(a.shape[-1]),
        byref(one), c_void_p(b.data_ptr()), FLOAT32, c_int(b_line), strides[0],
        c_void_p(a.data_ptr()), FLOAT32, c_int(a_line), strides[1],
        byref(zero), c_void_p(result.data_ptr()), FLOAT32, c_int(result.stride(-2)), strides[2],
        c_int(batch), COMPUTE_TF32 if tf32_wanted() else COMPUTE_IEEE, DEFAULT_ALGORITHM,
    )  # fmt: skip
    if status != SUCCESS:
        warn_declined(status)
        return None
    return result


@cache
def warn_declined(status: int) -> None:
    """Warn, once per reason, that a product is in the precision of torch's other products."""
    warn_user(
        f"cuBLAS declined a product in the precision of recurrent layers (status {status}); it follows "
        "torch.backends.cuda.matmul instead"
    )
