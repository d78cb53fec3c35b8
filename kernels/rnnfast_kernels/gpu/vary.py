"""A plan by hand: the best one with some of its choices replaced, for tuning."""

from dataclasses import replace

from rnnfast_kernels.gpu.plan import (
    STAGES,
    Plan,
    Problem,
    best,
    cooperative,
    fits,
    gluon,
    resident,
    row_tiles,
    streamed,
)

# What may be told, and which of a plan's fields that is.
CHOICES = {
    "rows": "block_b",
    "units": "block_n",
    "k": "block_k",
    "split": "split",
    "warps": "warps",
    "slices": "slices",
    "eager": "eager",
    "kept": "kept",
    "stages": "stages",
    "registers": "registers",
    "gluon": "gluon",
    "polled": "polled",
}
# What a Gluon loop is made from.
OF_GLUON = {"block_b", "block_n", "polled"}


def varied(problem: Problem, choices: dict[str, int], loop: str | None = None) -> Plan:
    """The best plan with some choices, named as in CHOICES, replaced and with what follows from them.

    Raises ValueError where a name is none of CHOICES or the device cannot run the result.
    """
    unknown = [name for name in choices if name not in CHOICES]
    if unknown:
        raise ValueError(f"unknown choice {unknown[0]!r}; choose from {', '.join(CHOICES)}")
    given = {CHOICES[name]: value for name, value in choices.items()}
    # Choices beyond those of Gluon loops are of Triton's.
    in_gluon = None
    if "gluon" in given or "polled" in given:
        in_gluon = bool(given.pop("gluon", True))
    if not set(given) <= OF_GLUON:
        in_gluon = False
    plan = best(problem, in_gluon)
    if in_gluon and not plan.gluon:
        raise ValueError(f"no Gluon loop takes {problem.cell} with {problem.H} units in {problem.dtype}")
    loop = loop or plan.loop
    rows, units, warps = (given.get(name, getattr(plan, name)) for name in ("block_b", "block_n", "warps"))
    fewest = row_tiles(problem)[0]
    if plan.gluon and loop == "cooperative":
        plan = gluon(problem, max(rows, fewest), units, bool(given.get("polled", plan.polled)))
        given = {}
    elif loop == "cooperative":
        k, split = given.get("block_k", plan.block_k or 32), given.get("split", plan.split)
        eager = bool(given.get("eager", plan.eager or plan.kept < plan.chunks))
        ahead, slices = given.get("stages", STAGES), given.get("slices", plan.slices)
        plan = cooperative(problem, max(rows, fewest), units, k, split, warps, eager=eager, ahead=ahead, slices=slices)
    else:
        plan = resident(problem, max(rows, fewest), warps) if loop == "resident" else streamed(problem)
    follows = {"block_b", "block_n", "block_k", "split", "slices", "eager", "stages"} if loop != "streamed" else set()
    plan = replace(plan, **{name: value for name, value in given.items() if name not in follows})
    if not fits(problem, plan):
        device = problem.device
        raise ValueError(
            f"{plan.programs} programs with {plan.shared} bytes of shared memory each; the device runs "
            f"{device.processors} at once with {device.shared} bytes"
        )
    return plan
