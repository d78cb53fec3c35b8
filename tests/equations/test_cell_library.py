"""The published cells, and random ones: derived gradients and kernels against autograd of the eager step."""

import pytest
import torch
from closeness import assert_all_close
from conftest import backends_under_test
from hypothesis import given, settings
from hypothesis import strategies as some
from rnnfast_kernels.bind import bind

import rnnfast
from rnnfast import cells, torch_functions
from rnnfast.declare import Cell

F64 = {"dtype": torch.float64}
LIBRARY = {name: cell for name, cell in vars(cells).items() if isinstance(cell, Cell)}
FUNCTIONS = {**torch_functions.BACKWARD, "zeros_like": torch.zeros_like}


def leaves_of(cell: Cell, *shape: int) -> dict[str, list[torch.Tensor]]:
    """Random values for every entry of a step's arguments, in the order of loops."""
    torch.manual_seed(0)
    found = {
        group: [torch.randn(shape, **F64, requires_grad=True) for _ in names]
        for group, names in cell.kernel.groups.items()
    }
    if "n" in cell.states:
        # A normaliser is a sum of exponentials.
        at = cell.kernel.states.index("n")
        found["state"][at] = found["state"][at].detach().abs().add(1).requires_grad_()
    return found


def check_gradient(cell: Cell) -> None:
    """Hold the derived forward and backward against autograd through the user's function."""
    kernel, groups = cell.kernel, leaves_of(cell, 40)
    more = [groups["p"], groups["s"]] if kernel.more else []
    new = cell.step(**groups)
    found, saved = bind(kernel.forward, FUNCTIONS)(groups["x"], groups["u"], groups["state"], *more)
    assert_all_close(dict(enumerate(new)), {n: each.expand(40) for n, each in enumerate(map(as_tensor, found))}, 1e-12)
    seeds = [torch.randn(40, **F64) for _ in new]
    flat = [leaf for group in groups.values() for leaf in group]
    connected = [(each, seed) for each, seed in zip(new, seeds, strict=True) if each.requires_grad]
    expected = [None] * len(flat)
    if connected:
        results, used = zip(*connected, strict=True)
        expected = torch.autograd.grad(results, flat, used, allow_unused=True)
    with torch.no_grad():
        got = bind(kernel.backward, FUNCTIONS)(seeds, saved, groups["state"], [as_tensor(f) for f in found], *more)
    got = [each for group in got for each in group]
    for n, (a, b) in enumerate(zip(expected, got, strict=True)):
        a = torch.zeros(40, **F64) if a is None else a
        assert_all_close({n: a}, {n: as_tensor(b).expand(40)}, 1e-10)


def as_tensor(value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, **F64)


@pytest.mark.parametrize("name", LIBRARY)
def test_derived_gradient_is_that_of_autograd(name):
    check_gradient(LIBRARY[name])


@pytest.mark.parametrize("name", LIBRARY)
def test_every_cell_is_found_by_its_name(name):
    assert LIBRARY[name].identity.startswith(name)


@pytest.mark.long
@pytest.mark.skipif(backends_under_test() != ["numba"], reason="these are kernels of the CPU")
@pytest.mark.parametrize("name", LIBRARY)
def test_kernels_compute_what_the_plain_loop_does(name):
    cell = LIBRARY[name]
    torch.manual_seed(0)
    layer = rnnfast.Recurrent(cell, 3, 17, bidirectional=True, **F64)
    x = torch.randn(6, 4, 3, **F64, requires_grad=True)
    signals = {each: torch.rand(6, 4, 1, **F64) for each in cell.signals}
    found = {}
    for backend in ("reference", "numba"):
        with rnnfast.use_backend(backend):
            output, _ = layer(x, signals=signals, lengths=torch.tensor([6, 2, 0, 5]))
        grads = torch.autograd.grad(output.square().sum(), (x, *layer.parameters()))
        found[backend] = dict(enumerate((output, *grads)))
    assert_all_close(found["reference"], found["numba"], 1e-10)


OUTSIDE = {"peephole_lstm": "PeepholeLSTMCell", "janet": "JANETCell", "li_gru": "LiGRUCell", "ugrnn": "UGRNNCell"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_equal_to_torchrecurrents(name):
    """The same weights, the same output and gradients as another library's step in a loop."""
    theirs = getattr(pytest.importorskip("torchrecurrent"), OUTSIDE[name])(3, 5, **F64)
    ours = rnnfast.Recurrent(LIBRARY[name], 3, 5, **F64)
    weights = [theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh]
    with torch.no_grad():
        for own, other in zip(ours.parameters(), weights, strict=False):
            own.copy_(other.normal_())
        vectors = theirs.weight_ph.chunk(3) if name == "peephole_lstm" else ()
        for parameter, other in zip(LIBRARY[name].parameters, vectors, strict=True):
            getattr(ours, f"{parameter}_l0").copy_(other)
    x, state, steps = torch.randn(6, 2, 3, **F64), None, []
    for step in x:
        state = theirs(step, state)
        steps.append(state[0] if isinstance(state, tuple) else state)
    with rnnfast.use_backend("reference"):
        output, _ = ours(x)
    expected = torch.autograd.grad(torch.stack(steps).sin().sum(), weights)
    got = torch.autograd.grad(output.sin().sum(), list(ours.parameters())[:4])
    assert_all_close(dict(enumerate((torch.stack(steps), *expected))), dict(enumerate((output, *got))), 1e-10)


# Without hardsigmoid: its gradient in torch is grad times a sixth that was rounded to float32.
UNARY = (
    "sigmoid", "tanh", "relu", "exp", "sin", "cos", "abs", "softplus", "logsigmoid", "elu", "gelu", "silu",
    "leaky_relu", "hardtanh", "square", "erf", "expm1",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "maximum", "minimum", "where", "div")


def apply(name: str, a, b):
    """Combine two values without leaving the range of moderate numbers."""
    if name == "div":
        return a / (1 + b * b)
    if name == "where":
        return torch.where(a > b, a * 0.5, b)
    if name in ("maximum", "minimum"):
        return getattr(torch, name)(a, b)
    return getattr(torch, name)(a, b)


@some.composite
def random_cells(draw):
    """A cell of one to five states and zero to six gates: a list of operations on what was computed before."""
    gates, states = draw(some.integers(0, 6)), draw(some.integers(1, 5))
    recurrent = draw(some.lists(some.integers(0, gates - 1), unique=True)) if gates else []
    counts = gates, len(recurrent), states, draw(some.integers(0, 2)), draw(some.integers(0, 2))
    inputs = sum(counts)
    steps = draw(
        some.lists(
            some.tuples(
                some.sampled_from(UNARY), some.sampled_from(BINARY), some.integers(0, 50), some.integers(0, 50)
            ),
            max_size=8,
        )
    )
    picks = [draw(some.integers(0, 50)) for _ in range(states)]

    def step(x, u, state, p, s):
        values = [torch.tanh(each) for group in (x, u, state, p, s) for each in group]
        total = values[0]
        for value in values[1:]:
            total = total + value * 0.7
        values = [*values, total]
        for unary, binary, a, b in steps:
            function = getattr(torch, unary, None) or getattr(torch.nn.functional, unary)
            value = function(apply(binary, values[a % len(values)], values[b % len(values)]))
            values.append(torch.clamp(value, -5.0, 5.0))
        return tuple(torch.tanh(values[pick % len(values)] + values[inputs] * 0.3) for pick in picks)

    return counts, recurrent, step


@settings(max_examples=30, deadline=None)
@given(random_cells())
def test_random_cells(drawn):
    (gates, _, states, parameters, signals), recurrent, step = drawn
    names = [f"g{n}" for n in range(gates)]
    cell = rnnfast.cell(
        gates=names,
        states=[f"h{n}" for n in range(states)],
        recurrent=[names[n] for n in recurrent],
        parameters=[f"p{n}" for n in range(parameters)],
        signals=[f"s{n}" for n in range(signals)],
    )(step)
    check_gradient(cell)
