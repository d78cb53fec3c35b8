"""What a step computes of unusual values: comparisons, infinity, NaN, division by zero, as torch does."""

import re

import pytest
import torch
from rnnfast_kernels.bind import bind

import rnnfast
from rnnfast import reference, torch_functions

INF, NAN = float("inf"), float("nan")
VALUES = torch.tensor([0.0, 1.0, -1.0, 0.5, 3.0, -3.0, 1e-9, 20.5, INF, -INF, NAN], dtype=torch.float64)

STEPS = {
    "products of comparisons": lambda a, b, h: (a > 2) * (b > 2) + h,
    "the larger of comparisons": lambda a, b, h: torch.maximum(a > 2, b > 2) * h,
    "the smaller of comparisons": lambda a, b, h: torch.minimum(a > 2, b > 2) * h,
    "a choice of comparisons": lambda a, b, h: torch.where(torch.where(a > 2, b > 2, h > 2), h, b),
    "counted comparisons": lambda a, b, h: ((a > 2).float() + (b > 2)) * h,
    "a number divided by 0": lambda a, b, h: torch.minimum(h, 1 / torch.zeros_like(h)) + a - b,
    "-1 divided by 0": lambda a, b, h: torch.maximum(h, -1 / torch.zeros_like(h)) + a - b,
    "0 divided by 0": lambda a, b, h: torch.where(a > 2, torch.zeros_like(h) / torch.zeros_like(h), b) + h,
    "logarithms of 0": lambda a, b, h: torch.maximum(h, torch.log(torch.zeros_like(h))) * a + b,
    "log1p of -1": lambda a, b, h: torch.maximum(h, torch.log1p(-torch.ones_like(h))) * a + b,
    "a large exponent": lambda a, b, h: torch.minimum(h, torch.exp(torch.ones_like(h) * 1e4)) * a + b,
    "rsqrt of 0": lambda a, b, h: torch.minimum(h, torch.rsqrt(torch.zeros_like(h))) * a + b,
    "powers below 0": lambda a, b, h: a**-2 + b**-1 + h,
    "relu": lambda a, b, h: torch.relu(a) + torch.relu(-b) * h,
}


def with_gradients(function, values):
    """Return a new state [N, 1] and its gradients by a, b and h."""
    leaves = [each.clone().requires_grad_() for each in values]
    (new,) = function(*leaves)
    new = reference.as_state(new, leaves[2])
    return [new.detach(), *torch.autograd.grad(new.sum(), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", STEPS)
def test_values_and_gradients_are_torchs(name):
    step, cell = STEPS[name], rnnfast.cell(gates="a")(lambda x, u, state: STEPS[name](x.a, u.a, state[0]))
    values = [each.reshape(-1, 1) for each in torch.meshgrid(VALUES, VALUES, VALUES, indexing="ij")]
    forward = bind(cell.kernel.forward, torch_functions.FORWARD)
    backward = bind(cell.kernel.backward, torch_functions.BACKWARD)
    expected = with_gradients(lambda *given: (step(*given),), values)
    traced = with_gradients(lambda a, b, h: forward((a,), (b,), (h,))[0], values)
    a, b, h = values
    (new,), saved = forward((a,), (b,), (h,))
    derived = backward((torch.ones_like(h),), saved, (h,), (reference.as_state(new, h),))
    derived = [torch.zeros_like(h) if each is None else reference.as_state(each, h) for (each,) in derived]
    for got in (traced, [expected[0], *derived]):
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-7, atol=0, equal_nan=True)


REFUSED = {
    "a sum of comparisons": (lambda x, u, state: ((x.a > 5) + (u.a > 5)) * state[0], "a | b, or a.float() + b"),
    "a sum of their products": (lambda x, u: (x.a > 5) * (u.a > 5) + (x.a > 6), "a sum of two comparisons"),
    "a look at the dtype": (lambda x, u: x.a + u.a if x.a.dtype == torch.float32 else x.a, "look at the dtype"),
    "a look at the device": (lambda x, u: x.a + u.a if x.a.device.type == "cpu" else x.a, "look at the device"),
    "divmod": (lambda x, u: divmod(x.a, 2)[0] + u.a, "cannot be traced: TypeError: unsupported operand"),
    "a format": (lambda x, u: print(f"{x.a:.2f}") or u.a, "cannot be traced: TypeError: unsupported format"),
    "a number too large": (lambda x, u: x.a * 10**400 + u.a, "cannot be traced: OverflowError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_line(name):
    step, says = REFUSED[name]
    with pytest.raises(rnnfast.CellError, match=re.escape(says)) as caught:
        rnnfast.cell(gates="a")(step)
    assert f"test_step_values.py:{step.__code__.co_firstlineno}: " in str(caught.value)
