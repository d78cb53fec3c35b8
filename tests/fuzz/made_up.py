"""Cells that nobody wrote: steps of random expressions, in bounds, in which all that is declared is used."""

from functools import cache
from random import Random

import torch

import rnnfast

SMOOTH = (
    "torch.tanh({})", "torch.sigmoid({})", "torch.sin({})", "torch.nn.functional.softplus({})", "({}) * 0.7",
    "torch.nn.functional.gelu({})", "torch.exp(-0.5 * ({}) ** 2)", "torch.log1p(({}) ** 2)",
)  # fmt: skip
KINKED = ("torch.relu({})", "torch.abs({})", "torch.clamp({}, -0.6, 0.7)", "torch.nn.functional.leaky_relu({}, 0.1)")
PAIRS = ("({} + {})", "({} - {})", "({} * {})", "(({} + 0.3) * {})")
KINKED_PAIRS = ("torch.maximum({}, {})", "torch.minimum({}, {})", "torch.where({0} > 0.1, {1}, {0} * 0.5)")
BOUNDED = (
    "torch.tanh({})",
    "torch.sigmoid({})",
    "(({0}) / (1 + torch.abs({0})))",
    "(0.5 * {old} + 0.5 * torch.sin({}))",
)


def source(seed: int) -> tuple[str, dict]:
    """Return the source of a step, and what to declare."""
    random = Random(f"cell {seed}")
    kinked = random.random() < 0.4
    gates, states = "abcd"[: random.randint(1, 4)], "hmn"[: random.randint(1, 3)]
    recurrent = [g for g in gates if random.random() < 0.7]
    parameters, signals = ("pq"[: random.choice((0, 0, 1, 2))] for _ in range(2))
    signals = signals.replace("p", "s").replace("q", "r")
    singles, pairs = SMOOTH + KINKED * kinked, PAIRS + KINKED_PAIRS * kinked
    groups = {"x": gates, "u": recurrent, "p": parameters, "s": signals}
    leaves = [f"{group}.{name}" for group, names in groups.items() for name in names]
    leaves += [f"state[{n}]" for n in range(len(states))]
    random.shuffle(leaves)
    lines = []
    for n in range(len(states)):
        # Every leaf is in some state's expression; some are in several, and later states may read earlier ones.
        own = leaves[n :: len(states)] + random.sample(leaves, min(2, len(leaves))) + ([f"new{n - 1}"] if n else [])
        value = own[0]
        for leaf in own[1:]:
            value = random.choice(pairs).format(value, leaf)
            if random.random() < 0.5:
                lines.append(f"v = {random.choice(singles).format(value)}")
                value = "v"
        lines += [f"v = {value}", f"new{n} = {random.choice(BOUNDED).format('v', old=f'state[{n}]')}"]
    used = [name for name in ("x", "u", "state", "p", "s") if groups.get(name, True)]
    body = [
        f"def made_up_{seed}({', '.join(used)}):",
        *lines,
        f"return {', '.join(f'new{n}' for n in range(len(states)))}",
    ]
    declared = {
        "gates": " ".join(gates), "states": " ".join(states), "recurrent": " ".join(recurrent),
        "parameters": " ".join(parameters), "signals": " ".join(signals),
        "output": random.choice(states), "read": random.choice(states),
    }  # fmt: skip
    return "\n    ".join(body), declared


@cache
def made_up(seed: int) -> rnnfast.declare.Cell:
    """Declare the cell of a seed."""
    text, declared = source(seed)
    names: dict = {"torch": torch}
    exec(text, names)
    return rnnfast.cell(**declared)(names[f"made_up_{seed}"])
