"""Layers of declared cells as plain loops that call the step with tensors, and how ours compare with them."""

import torch
from rnnfast_kernels.equations import trace
from torch import Tensor

Named = dict[str, Tensor]


def derive(case, wanted: list[str], leaves: Named, results: Named, incoming: Named) -> Named:
    """Return results and their gradients by what is wanted, or those of the gradients' squares."""
    ends = [name for name in results if results[name].requires_grad]
    if not wanted or not ends:
        return results
    second, inputs = case.derivative == "second", [leaves[name] for name in wanted]
    options = {"allow_unused": True, "materialize_grads": True}
    outs, into = [results[name] for name in ends], [incoming[name] for name in ends]
    grads = torch.autograd.grad(outs, inputs, into, create_graph=second, **options)
    found = results | {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    pieces = [grad for grad in grads if grad.requires_grad]
    if second and pieces:
        again = torch.autograd.grad([grad.square().sum() for grad in pieces], inputs, **options)
        found |= {f"d2 {name}": grad for name, grad in zip(wanted, again, strict=True)}
    return found


def step(cell, x: Tensor, state: list[Tensor], weights: Named, signals: Named) -> list[Tensor]:
    """Take one step. weights: those of one layer and direction, by name without its end."""
    gates = x @ weights["weight_ih"].mT + weights.get("bias_ih", 0)
    given = {
        "x": gates,
        "state": state,
        "p": [weights[n] for n in cell.parameters],
        "s": [signals[n] for n in cell.signals],
    }
    if cell.recurrent:
        read = state[cell.states.index(cell.read)]
        given["u"] = read @ weights["weight_hh"].mT + weights.get("bias_hh", 0)
    new = cell(**{name: given[name] for name in trace.arguments_of(cell.function)})
    new = new if isinstance(new, tuple | list) else (new,)
    return [each.expand_as(old) for each, old in zip(new, state, strict=True)]


def run(case, values, leaves: Named, dtype: torch.dtype) -> Named:
    """Run the layers over padded input and return every result by name."""
    cell, directions = case.declared, 2 if case.bidirectional else 1
    lengths = torch.tensor(case.lengths or (case.steps,) * case.batch, dtype=torch.long)
    live = (torch.arange(case.steps)[:, None] < lengths)[..., None]
    rows = torch.zeros(case.batch, case.hidden_size, dtype=dtype)
    x, finals, found = leaves["x"], [], []
    for n in range(case.layers):
        found = []
        for d in range(directions):
            end = f"_l{n}{'_reverse' * d}"
            weights = {name.removesuffix(end): leaf for name, leaf in leaves.items() if name.endswith(end)}
            at = n * directions + d
            state = [leaves[f"state {s}"][at] if s in values.states else rows for s in cell.states]
            outputs = [[rows] * len(state)] * case.steps
            for t in reversed(range(case.steps)) if d else range(case.steps):
                signals = {s: moment(leaves[f"signal {s}"], t) for s in cell.signals}
                entering = [torch.where(values.resets[t][:, None], torch.zeros_like(s), s) for s in state]
                new = step(cell, x[t], entering, weights, signals)
                state = [torch.where(live[t], a, b) for a, b in zip(new, state, strict=True)]
                outputs[t] = [torch.where(live[t], a, torch.zeros_like(a)) for a in new]
            finals.append(state)
            empty = [s.new_zeros(0, *s.shape) for s in state]
            found.append([torch.stack(parts) for parts in zip(*outputs, strict=True)] if outputs else empty)
        states = [torch.cat(parts, -1) for parts in zip(*found, strict=True)]
        x = states[cell.states.index(cell.output)]
    results = {"output": x}
    results |= {f"final {s}": torch.stack([f[k] for f in finals]) for k, s in enumerate(cell.states)}
    if case.all_states:
        results |= {f"states {s}": states[k] for k, s in enumerate(cell.states)}
    return results


def moment(signal: Tensor, t: int) -> Tensor:
    """Return a signal at a step."""
    return signal[t if signal.shape[0] > 1 else 0]


def expected_in(case, values, dtype: torch.dtype) -> Named:
    """Return the loop's results and gradients, computed in a dtype."""
    leaves = {name: leaf.to(dtype, copy=True) for name, leaf in values.leaves.items()}
    leaves = {name: leaf.requires_grad_(name in values.wanted) for name, leaf in leaves.items()}
    incoming = {name: tensor.to(dtype) for name, tensor in values.incoming.items()}
    return derive(case, values.wanted, leaves, run(case, values, leaves, dtype), incoming)


def compare(case, values, found: Named) -> str | None:
    """Say how results differ from the loop's by more than rounding explains, or None."""
    expected, dtype = expected_in(case, values, torch.float64), getattr(torch, case.dtype)
    # Gradients of what no step has read are zero, or are none.
    for name in found.keys() ^ expected.keys():
        if not name.startswith(("d ", "d2 ")):
            return f"results {sorted(found)}, expected {sorted(expected)}"
        one, other = (found, expected) if name in found else (expected, found)
        other[name] = torch.zeros_like(one[name])
    peer = None
    for name, right in expected.items():
        if found[name].shape != right.shape:
            return f"{name}: shape {list(found[name].shape)}, expected {list(right.shape)}"
        facts, error = torch.finfo(dtype), distance(found[name], right)
        limit = facts.smallest_normal * right.numel() ** 0.5 + 16 * facts.eps * right.norm().item()
        if error <= limit:
            continue
        if case.jumps and facts.bits < 64 and found[name].isfinite().all():
            continue
        peer = peer or peers(case, values, dtype)
        others = [distance(each.get(name, right), right) for each in peer]
        if not error <= limit + 8 * max(others):
            return f"{name}: error {error:.2g}, of {right.norm():.2g}; that of the loop is {others[0]:.2g}"
    return None


def peers(case, values, dtype: torch.dtype) -> list[Named]:
    """Return the results of the loop in a dtype, and in float64 with inputs that are off by its rounding."""
    found, exact = [expected_in(case, values, dtype)], values.leaves
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(leaf.shape, generator=random, dtype=leaf.dtype) for name, leaf in exact.items()}
        values.leaves = {name: leaf * (1 + 4 * torch.finfo(dtype).eps * noise[name]) for name, leaf in exact.items()}
        found.append(expected_in(case, values, torch.float64))
    values.leaves = exact
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return (found.detach().double() - expected.detach()).norm().item()
