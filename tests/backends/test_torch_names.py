"""Private names of torch: all of them in `rnnfast._torch`, and any of them may be missing."""

import ast
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
import torch

import rnnfast
from rnnfast import _torch

ROOT = Path(__file__).parents[2]
SOURCE = Path(_torch.__file__).read_text()
LOOKED_UP = re.findall(r'(?:found|needed)\(\s*"(torch\.[\w.]+)"', SOURCE)
NAMES = sorted({*LOOKED_UP, "torch.autograd.forward_ad._current_level"})
# Attributes with an underscore that are not torch's own, and those that every layer of torch.nn has had.
OURS = re.compile(
    r"_(torch|replace|fields|asdict|make|kept_weights|parameters|flat_weight\w*|init_flat_weights|\w*__)$"
)


def test_no_other_module_uses_private_names():
    wrong = []
    for path in (ROOT / "rnnfast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            of_torch = [name for name in names if name.startswith("_") and not OURS.match(name)]
            if of_torch and path.name != "_torch.py" and not is_own(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {of_torch[0]}")
    assert not wrong, "\n".join(wrong)


def is_own(node) -> bool:
    """Say whether an attribute is one of an object of our own."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@pytest.fixture
def without(monkeypatch):
    """Return a function that looks all names up where one is missing; torch itself has it again afterwards."""
    yield lambda *names: look_up_without(monkeypatch, names)
    importlib.reload(_torch)


def look_up_without(monkeypatch, names) -> None:
    with monkeypatch.context() as patch:
        for name in names:
            *path, last = name.split(".")[1:]
            owner = reduce(getattr, path, torch)
            if owner is torch.Tensor:  # which does not let go of what it inherits
                patch.setattr(torch, "Tensor", object)
            else:
                patch.delattr(owner, last, raising=False)  # a torch may lack it by itself
        importlib.reload(_torch)


def results(layer, x):
    """Forward, with weights' gradients, second derivatives, and a step of a cell: three times each."""
    found = []
    for _ in range(3):
        with torch.no_grad():
            found.append(layer(x)[0])
        inner = x.clone().requires_grad_()
        output, _ = layer(inner, lengths=torch.tensor([3, 1]))
        found += torch.autograd.grad(output.square().sum(), (inner, *layer.parameters()))
        (dx,) = torch.autograd.grad(layer(inner)[0].square().sum(), inner, create_graph=True)
        found += [dx.detach(), *torch.autograd.grad(dx.square().sum(), layer.parameters())]
        layer(x)[0].sum().backward()
        found += [w.grad.clone() for w in layer.parameters()]
        layer.zero_grad()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_layers_run_and_train_without(name, without):
    torch.manual_seed(0)
    layer = rnnfast.LSTM(3, 4).double()
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    expected = results(layer, x)
    without(name)
    torch.testing.assert_close(results(layer, x), expected, rtol=1e-10, atol=1e-12)


def test_the_fast_path_is_left_where_it_cannot_be_known_to_be_safe(without):
    x = torch.randn(3, 2, 3)
    for name in (
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch.Tensor._is_zerotensor",
        "torch._C._autograd._profiler_enabled",
        "torch._C._is_tracing",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._functorch.peek_interpreter_stack",
        "torch._C.DispatchKey.PreDispatch",
        "torch._C._dispatch_tls_is_dispatch_key_included",
    ):
        assert rnnfast.context.is_plain((x,))
        without(name)
        assert not rnnfast.context.is_plain((x,)), name
        importlib.reload(_torch)


def mapped(layer, x):
    """Map over samples, with gradients that nobody but x's owner wants."""
    layer.requires_grad_(False)
    return torch.func.vmap(lambda sample: layer(sample)[0], 1)(x.requires_grad_())


def mapped_without_gradients(layer, x):
    with torch.no_grad():
        return mapped(layer, x)


def pushed(layer, x):
    return torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))


def batched_gradients(layer, x):
    output = layer(x)[0]
    return torch.autograd.grad(output, [*layer.parameters()], output[None], is_grads_batched=True)


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("torch._C._functorch.get_interpreter_stack", mapped),
        ("torch._C._functorch.get_unwrapped", mapped),
        ("torch._C._AutoDispatchBelowAutograd", mapped_without_gradients),
        ("torch._C._functorch.TransformType.Jvp", pushed),
        ("torch._add_batch_dim", batched_gradients),
    ],
)
def test_a_transform_says_that_this_torch_is_unknown(name, transform, without):
    layer, x = rnnfast.GRU(3, 4), torch.randn(3, 2, 3)
    transform(layer, x)
    without(name)
    with pytest.raises(RuntimeError, match=f"rnnfast {rnnfast.__version__} does not know torch .*{name}"):
        transform(layer, x)


def test_forward_mode_runs_at_the_level_of_the_transform(without):
    """Without what is needed to leave the level, the same derivative comes of torch's operators."""
    layer, x, dx = rnnfast.GRU(3, 4).double(), *torch.randn(2, 3, 2, 3, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: layer(x)[0], (x,), (dx,))
    for name in (
        "torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter",
        "torch._C._functorch._unwrap_for_grad",
    ):
        without(name)
        torch.testing.assert_close(torch.func.jvp(lambda x: layer(x)[0], (x,), (dx,)), expected)


def test_names_of_weights_without_those_that_torch_keeps():
    for options in ({}, {"bias": False, "bidirectional": True}, {"num_layers": 2, "proj_size": 2}):
        layer = rnnfast.LSTM(3, 4, **options)
        kept = layer.__dict__.pop("_flat_weights_names")
        assert layer._flat_weights_names == kept


def test_functionalize_is_seen():
    seen = []
    for transform in (torch.func.functionalize, torch.func.vmap):
        transform(lambda x: seen.append(_torch.is_functionalized()) or x)(torch.zeros(2))
    assert [*seen, _torch.is_functionalized()] == [True, False, False]


def test_autocast_is_seen_without_the_private_name(without):
    without("torch._C._is_any_autocast_enabled")
    layer, x = rnnfast.LSTM(3, 4), torch.randn(3, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == torch.bfloat16
