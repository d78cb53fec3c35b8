"""One way to compare: relative L2 norm of the difference, per named tensor, against a float64 reference."""

import torch
from torch import Tensor

# Rounding of a chain of products and activations in each dtype, as torch's own layers show it on the sizes tested.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def relative_error(reference: Tensor, got: Tensor) -> float:
    """Return |got - reference| / |reference| in L2 norm, computed in float64; the plain norm for a zero reference."""
    reference, got = reference.detach().double(), got.detach().double()
    scale = reference.norm()
    return ((got - reference).norm() / (scale if scale > 0 else 1)).item()


def mismatch(name: str, reference: Tensor, got: Tensor, tolerance: float | None = None) -> str | None:
    """Say how `got` misses the reference's shape, or the tolerance of its own dtype; None where it does not."""
    if got.shape != reference.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    limit = TOLERANCES[got.dtype] if tolerance is None else tolerance
    error = relative_error(reference, got)
    return None if error <= limit else f"{name}: relative error {error:.3g} over {limit:.3g}"


def assert_close(name: str, reference: Tensor, got: Tensor, tolerance: float | None = None) -> None:
    """Fail unless `got` is the reference, up to rounding."""
    assert_all_close({name: reference}, {name: got}, tolerance)


def assert_same(reference: Tensor, got: Tensor, backend: str) -> None:
    """Fail unless the results of calls of different sizes are equal: to the bit where all of a layer is our kernel.

    On a GPU the input product is a library's, whose sums depend on its sizes.
    """
    if backend == "triton":
        assert_close("other sizes", reference, got)
    else:
        assert torch.equal(reference, got)


def assert_all_close(reference: dict[str, Tensor], got: dict[str, Tensor], tolerance: float | None = None) -> None:
    """Compare two sets of named tensors and list every mismatch."""
    assert reference.keys() == got.keys()
    found = [mismatch(name, reference[name], got[name], tolerance) for name in reference]
    assert not any(found), "\n".join(filter(None, found))
