"""Run a case on our layer and on a plain loop in float64, and compare every result and gradient."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from rnnfast import fast_path, functional
from tests.fuzz import loop
from tests.fuzz.cases import Case
from tests.fuzz.tensors import Values, from_user, laid_out, pack, to_user

Named = dict[str, Tensor]
GRADIENTS = {"all": ("output", "final", "states"), "output": ("output",), "finals": ("final",)}


def check(case: Case) -> str | None:
    """Run the calls of a case and say what is wrong, or None."""
    fast_path.recorded.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        module = None if case.functional else make_module(case)
        for call in range(case.calls):
            values = Values(case, call)
            found = run_ours(case, values, module)
            problem = compare(case, values, found)
            if problem is not None:
                return f"call {call + 1}: {problem}"
    except Exception as error:  # whatever it is, it is what was looked for
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
    return None


def make_module(case: Case) -> rnnfast.modules.RNNBase:
    """Make our module of a case."""
    kind = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU}.get(case.cell, rnnfast.RNN)
    extra: dict = {"nonlinearity": case.cell[4:]} if kind is rnnfast.RNN else {}
    if case.proj_size:
        extra["proj_size"] = case.proj_size
    module = kind(
        case.input_size, case.hidden_size, case.layers, bias=case.bias, batch_first=case.batch_first,
        bidirectional=case.bidirectional, dropout=dropout(case), dtype=getattr(torch, case.dtype), **extra,
    )  # fmt: skip
    module.recompute = case.recompute
    return module.train(case.dropout != "idle")


def dropout(case: Case) -> float:
    """Return the probability of dropout."""
    return {"none": 0.0, "idle": 0.5, "total": 1.0}[case.dropout] if case.layers > 1 else 0.0


def modes(case: Case) -> contextlib.ExitStack:
    """Enter the mode of a case."""
    stack = contextlib.ExitStack()
    if case.mode in ("no_grad", "inference_tensors"):
        stack.enter_context(torch.no_grad())
    elif case.mode == "inference":
        stack.enter_context(torch.inference_mode())
    elif case.mode == "autocast":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack


def run_ours(case: Case, values: Values, module) -> Named:
    """Run our layer and return results and gradients in padded time-major form."""
    dtype, sequence = getattr(torch, case.dtype), {"x", "output", "states0", "states1"}

    def given(name: str, tensor: Tensor, layout: str) -> Tensor:
        return laid_out((to_user(case, tensor) if name in sequence else states(name, tensor)).to(dtype), layout)

    def states(name: str, tensor: Tensor) -> Tensor:
        return tensor[:, 0] if case.form == "unbatched" and not name.startswith("w") else tensor

    def layout(name: str) -> str:
        return {"x": case.x_layout, "h": case.hx_layout, "c": case.hx_layout}.get(name, case.weight_layout)

    with torch.inference_mode(case.mode == "inference_tensors"):
        leaves = {name: given(name, leaf, layout(name)) for name, leaf in values.poisoned.items()}
    along = {name: given(name, tensor, "plain") for name, tensor in values.along_poisoned.items()}
    incoming = {name: given(name, tensor, case.incoming_layout) for name, tensor in values.incoming_poisoned.items()}
    if module is not None:
        for n, (name, _) in enumerate(list(module.named_parameters())):
            setattr(module, name, nn.Parameter(leaves[f"w{n}"], requires_grad=False))
            leaves[f"w{n}"] = getattr(module, name)
    resets = None
    if case.resets:
        resets = values.resets if case.packed else to_user(case, values.resets)
        if case.packed and case.batch_first:
            resets = resets.mT

    def forward(leaves: Named) -> Named:
        hx = [leaves[name] for name in ("h", "c") if name in leaves]
        if case.hx == "shared":
            hx[1] = hx[0]
        weights = [leaf for name, leaf in leaves.items() if name.startswith("w")]
        state = None if case.hx == "none" else hx[0] if len(hx) == 1 else hx if case.hx == "list" else tuple(hx)
        x = leaves["x"]
        if case.packed:
            x = pack(case, values.leaves["x"])._replace(data=x)
        options = {
            "lengths": None if case.packed or case.lengths is None else torch.tensor(case.lengths, dtype=torch.long),
            "resets": resets, "all_states": case.all_states,
        }  # fmt: skip
        if module is not None:
            output, finals, *rest = module(x, state, **options)
        else:
            output, finals, *rest = getattr(functional, case.cell)(
                x, weights, state, num_layers=case.layers, bidirectional=case.bidirectional, dropout=dropout(case),
                batch_first=case.batch_first, training=case.dropout != "idle", recompute=case.recompute, **options,
            )  # fmt: skip
        results = {"output": output.data if case.packed else output}
        results |= {f"final{n}": s for n, s in enumerate(finals if isinstance(finals, tuple) else (finals,))}
        for n, s in enumerate(rest[0] if rest else ()):
            results[f"states{n}"] = s.data if case.packed else s
        return results

    found = derive(case, values.wanted(case), forward, leaves, along, incoming)

    def back(name: str, tensor: Tensor) -> Tensor:
        base = name.split(" ")[-1]
        if base in sequence:
            return from_user(case, tensor)
        return tensor.unsqueeze(1) if case.form == "unbatched" and not base.startswith("w") else tensor

    return {name: back(name, tensor) for name, tensor in found.items()}


def derive(
    case: Case, wanted: list[str], forward: Callable[[Named], Named], leaves: Named, along: Named, incoming: Named
) -> Named:
    """Return the results of `forward`, and the derivatives that the case asks for."""
    if case.derivative == "jvp":
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(leaf, along[n]) if n in wanted else leaf for n, leaf in leaves.items()}
            pairs = {name: forward_ad.unpack_dual(result) for name, result in forward(duals).items()}
            primal = {name: pair.primal for name, pair in pairs.items()}
            return primal | {
                f"change of {name}": torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent
                for name, pair in pairs.items()
            }
    trained = case.mode in ("train", "autocast")
    for name in wanted if trained else ():
        leaves[name].requires_grad_()
    with modes(case):
        results = forward(leaves)
    found = dict(results)
    ends = [name for name in results if name.startswith(GRADIENTS.get(case.results, [*results][-1]))]
    ends = [name for name in ends if results[name].requires_grad]
    if not trained or not ends:
        return found
    outs = [results[name] for name in ends]
    into = [incoming[name].to(results[name].dtype) for name in ends]
    second = case.derivative == "second"
    into = [g.requires_grad_(second) for g in into]
    inputs = [leaves[name] for name in wanted]
    grads = torch.autograd.grad(outs, inputs, into, create_graph=second, allow_unused=True, materialize_grads=True)
    found |= {f"d {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    if second:
        pairs = [(g, along[name]) for g, name in zip(grads, wanted, strict=True) if g.requires_grad]
        if pairs:
            again = torch.autograd.grad(
                [g for g, _ in pairs],
                [*inputs, *into],
                [v for _, v in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            names = [*(f"dd {name}" for name in wanted), *(f"dd {name}" for name in ends)]
            found |= dict(zip(names, again, strict=True))
    return found


def run_loop(case: Case, values: Values, dtype: torch.dtype, noise: float = 0.0, seed: int = 0) -> Named:
    """Run the plain loop; noise: of all it is given, relatively."""
    random = torch.Generator().manual_seed(seed)

    def made(tensors: Named) -> Named:
        def shaken(tensor: Tensor) -> Tensor:
            return tensor * (1 + noise * torch.randn(tensor.shape, generator=random, dtype=torch.float64))

        return {name: shaken(tensor).to(dtype) for name, tensor in tensors.items()}

    def forward(leaves: Named) -> Named:
        hx = [leaves[name] for name in ("h", "c") if name in leaves]
        weights = [leaf for name, leaf in leaves.items() if name.startswith("w")]
        hx = [hx[0], hx[0]] if case.hx == "shared" else hx
        return loop.run(case, leaves["x"], hx, weights, values.resets, loop.Activations(noise, random))

    plain = replace(case, mode="train") if case.mode == "autocast" else case
    return derive(plain, values.wanted(case), forward, made(values.leaves), made(values.along), made(values.incoming))


def run_torch(case: Case, values: Values) -> Named | None:
    """Run torch's own layer in the case's dtype, or return None where it lacks what is asked."""
    lengths = torch.tensor(case.lengths or (case.steps,) * case.batch, dtype=torch.long)
    if case.resets or case.all_states or not case.steps or not case.batch or lengths.min() < 1:
        return None
    if case.derivative != "first" or lengths.max() < case.steps:
        return None
    dtype = getattr(torch, case.dtype)

    def forward(leaves: Named) -> Named:
        hx = [leaves[name] for name in ("h", "c") if name in leaves]
        if case.hx == "shared":
            hx[1] = hx[0]
        state = tuple(hx) if case.cell == "lstm" else hx[0]
        weights = [leaf for name, leaf in leaves.items() if name.startswith("w")]
        constants = (case.bias, case.layers, dropout(case), case.dropout != "idle", case.bidirectional)
        function, x = getattr(torch._VF, case.cell), leaves["x"]
        if case.lengths is None:
            output, *finals = function(x, state, weights, *constants, False)
        else:
            p = pack_padded_sequence(x, lengths, enforce_sorted=False)
            order, inverse = p.sorted_indices, p.unsorted_indices
            state = tuple(s[:, order] for s in hx) if case.cell == "lstm" else hx[0][:, order]
            data, *finals = function(p.data, p.batch_sizes, state, weights, *constants)
            output = pad_packed_sequence(p._replace(data=data), total_length=case.steps)[0]
            finals = [f[:, inverse] for f in finals]
        return {"output": output} | {f"final{n}": f for n, f in enumerate(finals)}

    leaves, along, into = (
        {name: tensor.to(dtype) for name, tensor in tensors.items()}
        for tensors in (values.leaves, values.along, values.incoming)
    )
    return derive(case, values.wanted(case), forward, leaves, along, into)


def compare(case: Case, values: Values, found: Named) -> str | None:
    """Say how results differ from the loop's by more than rounding explains, or None."""
    expected = run_loop(case, values, torch.float64)
    for name in found.keys() - expected.keys():  # the loop of no steps knows of no derivatives
        expected[name] = torch.zeros_like(found[name], dtype=torch.float64)
    if found.keys() != expected.keys():
        return f"results {sorted(found)}, expected {sorted(expected)}"
    for name, right in expected.items():
        if found[name].shape != right.shape:
            return f"{name}: shape {list(found[name].shape)}, expected {list(right.shape)}"
    precision = torch.bfloat16 if case.mode == "autocast" else getattr(torch, case.dtype)
    facts, errors = torch.finfo(precision), distances(found, expected)
    floor = facts.smallest_normal * facts.eps * 4
    limits = {n: floor * right.numel() ** 0.5 + 8 * facts.eps * right.norm().item() for n, right in expected.items()}
    worse = [name for name in errors if not errors[name] <= limits[name]]
    if not worse or (case.cell == "rnn_relu" and facts.bits < 32):  # rounding may cross the kink
        return None
    peer = distances(run_torch(case, values) or run_loop(case, values, precision), expected)
    shaken = [distances(run_loop(case, values, torch.float64, 4 * facts.eps, n), expected) for n in range(4)]
    for name in worse:
        limit = limits[name] + 5 * peer[name] + 4 * max(each[name] for each in shaken)
        if not errors[name] <= limit:
            return (
                f"{name}: error {errors[name]:.2g}, of {expected[name].norm():.2g}; that of torch is {peer[name]:.2g}"
            )
    return None


def distances(found: Named, expected: Named) -> dict[str, float]:
    """Return the distance of each result from the expected one."""
    zeros = {name: torch.zeros_like(right) for name, right in expected.items()}
    found = zeros | found
    return {name: (found[name].detach().double() - right.detach()).norm().item() for name, right in expected.items()}
