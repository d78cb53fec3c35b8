"""The operators refuse tensors that do not fit together: whoever calls them, they trust no size."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import rnnfast


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_graph_called_with_another_batch_size(batch):
    ours = rnnfast.GRU(4, 4)
    graph = make_fx(lambda a: ours(a)[0])(torch.randn(7, 3, 4))
    with pytest.raises(RuntimeError, match="expected hx"):
        graph(torch.randn(7, batch, 4))


def forward_arguments() -> dict:
    """Tensors of an LSTM of 3 inputs, 4 units with a projection to 2, 5 steps of 6 rows, by name."""
    return {
        "x": torch.randn(5, 6, 3),
        "h": torch.randn(1, 6, 2),
        "c": torch.randn(1, 6, 4),
        "w_ih": torch.randn(16, 3),
        "w_hh": torch.randn(16, 2),
        "b_ih": torch.randn(16),
        "b_hh": torch.randn(16),
        "w_hr": torch.randn(2, 4),
        "resets": torch.zeros(5, 6, dtype=torch.bool),
    }


def call(given: dict, left: list | None = None) -> list:
    constants, tensors = ("numba", "lstm", [False], [True] * 5 + [False, False, True]), list(given.values())
    if left is None:
        return torch.ops.rnnfast.layer(*constants, True, True, tensors)
    states, saved, gradients = left[:2], left[2:4], left[4:]
    needs = [True, True, True, False]
    return torch.ops.rnnfast.layer_backward(*constants, needs, 1, tensors, states, saved, gradients)


def wrong(tensor: torch.Tensor, way: str) -> torch.Tensor:
    if way == "dtype":
        return tensor.double()
    if way == "longer":
        return torch.cat((tensor, tensor))
    return tensor[..., :-1]


@pytest.mark.parametrize("way", ["dtype", "longer", "narrower"])
@pytest.mark.parametrize("name", forward_arguments())
def test_forward(name, way):
    given = forward_arguments()
    call(given)
    with pytest.raises(RuntimeError, match="rnnfast: expected"):
        call(given | {name: wrong(given[name], way)})


@pytest.mark.parametrize("way", ["dtype", "longer", "narrower"])
@pytest.mark.parametrize("place", range(8))
def test_backward(place, way):
    """States, saved tensors and gradients."""
    given = forward_arguments()
    h, c, h_final, c_final, *saved = call(given)
    left = [h, c, *saved, *map(torch.ones_like, (h, c, h_final, c_final))]
    assert len(saved) == 2
    call(given, left)
    left[place] = wrong(left[place], way)
    with pytest.raises(RuntimeError, match="rnnfast: expected"):
        call(given, left)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("shape", "right", "wrong"),
    [
        pytest.param((6,), [3, 3], ([3, 2, 2], [2, 3, 1], [4, 1, 1], [3, 4, -1], [3, 3, 1, -1]), id="packed"),
        pytest.param((2, 3), [3, 1], ([2, 3], [4, 1], [1, -1], [3], [3, 2, 1]), id="padded"),
    ],
)
def test_sizes_of_rows(shape, right, wrong, frozen):
    """Sizes that grow, that exceed the batch, that are negative, or whose number or sum is another."""
    x, w_ih, w_hh = torch.randn(*shape, 3), torch.randn(12, 3), torch.randn(12, 4)
    h = torch.zeros(1, 3, 4)

    def call(sizes):
        if frozen:
            constants = ("gru", "float32", 3, 4, 4, False, False, [False], False, "")
            return torch.ops.rnnfast.frozen_layer(*constants, x, [h], [w_ih, w_hh], torch.tensor(sizes), None, [])
        constants = ("numba", "gru", [False], [True, True, *[False] * 4, True, False], False, False)
        return torch.ops.rnnfast.layer(*constants, [x, h, w_ih, w_hh, torch.tensor(sizes)])

    call(right)
    for sizes in wrong:
        with pytest.raises(RuntimeError, match="batch_sizes"):
            call(sizes)


def test_the_number_of_tensors():
    with pytest.raises(RuntimeError, match="expected 9 tensors of a layer of lstm, got 8"):
        call({name: each for name, each in forward_arguments().items() if name != "resets"})
