"""How exact tanh of the CPU kernels is, above all near 1, where 1 - y^2 is small and its error grows in a gradient."""

import random

import numpy as np
import pytest
import torch
from closeness import relative_error
from layers import in_float64, pair, run

import rnnfast

BITS = {torch.float32: 23, torch.float64: 52}
# Units in the last place that tanh may err by, from this |tanh| on.
LIMITS = ((0.0, 3.0), (0.5, 1.8), (0.8, 1.0), (0.9, 0.8), (0.99, 0.6))
WIDTH = 64


def through_a_layer(x: torch.Tensor) -> torch.Tensor:
    """tanh of every element, by a layer that does nothing else."""
    layer = rnnfast.RNN(WIDTH, WIDTH, bias=False, dtype=x.dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(WIDTH))
        layer.weight_hh_l0.zero_()
        return layer(x.view(1, -1, WIDTH))[0].view(-1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", BITS, ids=["f32", "f64"])
def test_tanh_errs_by_few_units_in_the_last_place_and_by_less_than_one_near_one(dtype, sign):
    small = torch.logspace(-30, -2, 100 * WIDTH, dtype=torch.float64)
    usual = torch.linspace(0.01, 12 if dtype == torch.float32 else 22, 400 * WIDTH, dtype=torch.float64)
    x = (torch.cat((small, usual)) * sign).to(dtype)
    y = through_a_layer(x).cpu().numpy()
    exact = np.tanh(x.cpu().numpy().astype(np.longdouble))
    unit = np.exp2(np.floor(np.log2(np.abs(exact))) - BITS[dtype])
    error = np.abs(y - exact) / unit
    for least, limit in LIMITS:
        assert error[np.abs(exact) >= least].max() <= limit, least
    assert (np.abs(y) <= 1).all()


def test_tanh_at_the_ends():
    tiny = torch.finfo(torch.float32).tiny
    ends = torch.tensor([0.0, torch.inf, torch.nan, tiny, 9.5, 40.0, 1e-20])
    expected = torch.tensor([0.0, 1.0, torch.nan, tiny, 1.0, 1.0, 1e-20])
    for sign in (1, -1):
        # One each in a row of its own, as 0 times infinity is NaN in a product.
        x = torch.ones(len(ends), 1)
        layer = rnnfast.RNN(1, 1, bias=False)
        with torch.no_grad():
            layer.weight_ih_l0.fill_(1)
            y = layer((x * sign * ends[:, None])[None])[0].view(-1)
        torch.testing.assert_close(y, sign * expected, rtol=0, atol=0, equal_nan=True)


def test_tanh_does_not_fall_where_its_formula_changes():
    x = torch.tensor(0.625) + torch.arange(-32 * WIDTH, 32 * WIDTH) * 2.0**-24
    assert through_a_layer(x).diff().min() >= -(2.0**-24)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_gradients_of_small_layers_are_as_exact_as_torchs(cell):
    """600 of each cell. An error of a single one may be chance: torch's own is zero now and then."""
    errors = []
    for seed in range(120):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        steps, batch, width, hidden = (draw.randint(1, most) for most in (4, 3, 6, 4))
        theirs, ours = pair(cell, width, hidden)
        x = (torch.randn(steps, batch, width) * draw.choice([0.3, 1, 3, 8])).requires_grad_()
        exact = run(in_float64(theirs), x.detach().double().requires_grad_())
        expected, got = run(theirs, x), run(ours, x)
        errors += [
            (relative_error(value, got[name]), relative_error(value, expected[name]))
            for name, value in exact.items()
            if name.startswith("d")
        ]
    found, allowed = np.array(errors).T
    assert (found > np.maximum(5 * allowed, 1e-6)).sum() <= len(errors) // 200
    assert found.mean() <= 1.25 * allowed.mean()
