"""What the fuzzer has found."""

from dataclasses import replace

import pytest
import torch
from conftest import backends_under_test
from torch.func import grad, jvp

from rnnfast.functional import gru
from tests.fuzz.cases import CELLS, Case, legal
from tests.fuzz.search import check

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="what is drawn is on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # torch's, of what is drawn
]
BACKEND = backends_under_test()[0]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"form": "packed_unsorted"}, {"lengths": (0, 2)}])
@pytest.mark.parametrize("derivative", ["first", "second"])
def test_incoming_gradients_with_the_negative_bit(cell, options, derivative):
    """They are contiguous views whose memory has the other sign."""
    sizes = {"input_size": 3, "hidden_size": 4, "steps": 2, "batch": 2, "hx": "given"}
    case = legal(Case(cell, incoming_layout="negated", derivative=derivative, **sizes, **options))
    assert check("layers", (case,), BACKEND) is None


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "layers": 2}, {"lengths": (0, 0)}, {"resets": True}])
def test_second_derivatives_of_no_steps(cell, options):
    sizes = {"input_size": 3, "hidden_size": 4, "steps": 0, "batch": 2, "hx": "given"}
    for derivative in ("second", "jvp"):
        case = legal(Case(cell, derivative=derivative, **sizes, **options))
        assert check("layers", (case,), BACKEND) is None


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", [{"hidden_size": 0}, {"input_size": 0}, {"hidden_size": 0, "bidirectional": True}])
@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_functions_over_weights_of_no_size(cell, sizes, mode):
    case = Case(cell, **({"input_size": 3, "hidden_size": 4} | sizes), steps=2, batch=2, hx="given", mode=mode, calls=3)
    for derivative in ("first", "second"):
        assert check("layers", (legal(replace(case, derivative=derivative)),), BACKEND) is None


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"resets": True}])
@pytest.mark.parametrize("derivative", ["first", "second"])
def test_padding_of_the_plain_loop(cell, options, derivative):
    """It runs what kernels cannot, and nested forward mode; NaN in the padding reached its gradients of weights."""
    sizes = {"input_size": 3, "hidden_size": 4, "steps": 3, "batch": 3, "lengths": (1, 0, 3), "hx": "given"}
    assert check("layers", (Case(cell, derivative=derivative, **sizes, **options),), "reference") is None


def test_padding_under_nested_forward_mode():
    x, w = torch.randn(3, 2, 2), [torch.randn(*size, dtype=torch.float32) for size in ((9, 2), (9, 3))]
    poisoned = x.clone()
    poisoned[1:, 0] = torch.nan

    def gradient(x):
        def once(w_ih):
            return jvp(lambda w_ih: gru(x, [w_ih, w[1]], lengths=torch.tensor([1, 3]))[0], (w_ih,), (w_ih,))[1]

        return grad(lambda w_ih: jvp(once, (w_ih,), (w_ih,))[1].sum())(w[0])

    torch.testing.assert_close(gradient(poisoned), gradient(x))
