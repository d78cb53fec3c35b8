"""All nestings of torch.func's transforms to depth three, over x and over weights, against a plain loop in float64."""

from itertools import chain, product
from math import prod
from random import Random

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from rnnfast import functional
from tests.fuzz.loop import Activations, step

# torch's forward mode scripts its own decompositions when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
STEPS, INPUTS, HIDDEN = 2, 2, 2


def fixed(*size: int, seed: int = 0) -> Tensor:
    """Return the same tensor for the same arguments, without torch's random numbers, which `vmap` refuses."""
    random = Random(f"{seed} {size}")
    return torch.tensor([random.gauss(0, 1) for _ in range(prod(size))], dtype=torch.float64).reshape(size)


def scalar(g):
    """Return g with its result weighed and summed."""

    def total(v, o):
        found = g(v, o)
        return (found.sin() * fixed(*found.shape)).sum()

    return total


def contracted(jacobian: Tensor, like: Tensor) -> Tensor:
    """Sum a Jacobian over its results, with weights: its size would grow with every transform."""
    results = jacobian.shape[: jacobian.dim() - like.dim()]
    return (jacobian.flatten(0, len(results) - 1) * fixed(results.numel(), *(1,) * like.dim())).sum(0)


def pulled(g, v, o):
    """Pull a gradient of the result back."""
    found, pull = vjp(lambda v: g(v, o), v)
    return pull(fixed(*found.shape))[0]


# Each takes a function of v and o to another one; derivatives are those by v.
TRANSFORMS = {
    "grad": lambda g: grad(scalar(g)),
    "jvp": lambda g: lambda v, o: jvp(lambda v: g(v, o), (v,), (fixed(*v.shape, seed=1),))[1],
    "vjp": lambda g: lambda v, o: pulled(g, v, o),
    "vmap": lambda g: lambda v, o: vmap(g, (None, 0))(v, torch.stack([o, o * 0.7])),
    "vmap over v": lambda g: lambda v, o: vmap(g, (0, None))(torch.stack([v, v * 0.7]), o),
    "jacfwd": lambda g: lambda v, o: contracted(jacfwd(g)(v, o), v),
    "jacrev": lambda g: lambda v, o: contracted(jacrev(g)(v, o), v),
    "hessian": lambda g: lambda v, o: contracted(hessian(scalar(g))(v, o), v),
}


def layer(cell: str, over: str, ours: bool):
    """Return a layer as a function of v and o: of x and the recurrent weight, or the other way round."""
    gates = GATES[cell] * HIDDEN
    w_ih, b_ih, b_hh = fixed(gates, INPUTS, seed=2), fixed(gates, seed=3), fixed(gates, seed=4)

    def run(x, w_hh):
        if ours:
            return getattr(functional, cell)(x, [w_ih, w_hh, b_ih, b_hh])[0]
        h = c = x.new_zeros(x.shape[1], HIDDEN)
        found = []
        for row in x:
            h, c = step(cell, row, h, c, [w_ih, w_hh, b_ih, b_hh], Activations(0.0, torch.Generator()))
            found.append(h)
        return torch.stack(found)

    return run if over == "x" else lambda w_hh, x: run(x, w_hh)


def tangent(g, v: Tensor, o: Tensor) -> Tensor:
    """Differentiate by `dual_level` around everything."""
    with forward_ad.dual_level():
        found, change = forward_ad.unpack_dual(g(forward_ad.make_dual(v, fixed(*v.shape, seed=5)), o))
        return torch.zeros_like(found) if change is None else change


def backward(g, v: Tensor, o: Tensor) -> Tensor:
    """Differentiate by autograd around everything."""
    v = v.clone().requires_grad_()
    found = g(v, o)  # a derivative of the rectifier's may depend on nothing
    return torch.autograd.grad(found.sin().sum(), v)[0] if found.requires_grad else torch.zeros_like(v)


AROUND = {"nothing": lambda g, v, o: g(v, o), "dual_level": tangent, "backward": backward}


def check(cell: str, over: str, names: tuple[str, ...], around: str) -> None:
    """Compare one nesting, the innermost transform first."""
    x, w_hh = fixed(STEPS, 1, INPUTS, seed=6), fixed(GATES[cell] * HIDDEN, HIDDEN, seed=7)
    v, o = (x, w_hh) if over == "x" else (w_hh, x)
    plain, ours = layer(cell, over, False), layer(cell, over, True)
    for name in names:
        plain, ours = TRANSFORMS[name](plain), TRANSFORMS[name](ours)
    try:
        expected = AROUND[around](plain, v, o)
    except RuntimeError as error:
        if "Nested forward mode AD is not supported" not in str(error):  # torch has no dual level around forward mode
            raise
        with pytest.raises(RuntimeError):
            AROUND[around](ours, v, o)
        return
    scale = expected.abs().max().item()
    torch.testing.assert_close(AROUND[around](ours, v, o), expected, rtol=1e-8, atol=1e-10 + 1e-10 * scale)


NESTINGS = list(chain.from_iterable(product(TRANSFORMS, repeat=depth) for depth in (1, 2, 3)))
EVERY_ONE = list(product(GATES, ("x", "w"), NESTINGS, AROUND))


def is_slow(nesting: tuple[str, ...]) -> bool:
    """Say whether a nesting is of many derivatives."""
    return sum({"hessian": 2, "vmap": 0, "vmap over v": 0}.get(name, 1) for name in nesting) > 3


def test_some():
    quick = [each for each in EVERY_ONE if not is_slow(each[2])]
    for each in Random(1).sample(quick, 40):
        check(*each)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("over", ["x", "w"])
def test_every_nesting(cell, over):
    """Those of depth three are each under one of the things that can be around."""
    for n, nesting in enumerate(NESTINGS):
        around = list(AROUND) if len(nesting) < 3 else [list(AROUND)[(n + n // 3) % 3]]
        for each in around:
            check(cell, over, nesting, each)
