"""A plan by hand: the best one with some of its choices replaced, for tuning."""

from rnnfast_kernels.gpu.plan import Plan, Problem, best, cooperative, fits, gluon, resident, row_tiles, streamed

# What may be told: the numbers that a plan is made from, and of Gluon loops, whether it is one and whether it polls.
CHOICES = ("rows", "units", "warps", "slices", "gluon", "polled")


def varied(problem: Problem, choices: dict[str, int], loop: str | None = None) -> Plan:
    """The best plan with some choices, named as in CHOICES, replaced and with what follows from them.

    Raises ValueError where a name is none of CHOICES or the device cannot run the result.
    """
    unknown = [name for name in choices if name not in CHOICES]
    if unknown:
        raise ValueError(f"unknown choice {unknown[0]!r}; choose from {', '.join(CHOICES)}")
    # The number of warps and a grid are choices of Triton loops.
    in_gluon = False if "warps" in choices or "slices" in choices else None
    if "gluon" in choices or "polled" in choices:
        in_gluon = bool(choices.get("gluon", True))
    plan = best(problem, in_gluon)
    if in_gluon and not plan.gluon:
        raise ValueError(f"no Gluon loop takes {problem.cell} with {problem.H} units in {problem.dtype}")
    if not choices and loop in (None, plan.loop):
        return plan
    rows = max(choices.get("rows", plan.block_b), row_tiles(problem)[0])
    units, warps = choices.get("units", plan.block_n), choices.get("warps", plan.warps)
    loop = loop or plan.loop
    if loop == "streamed":
        return streamed(problem)
    if loop == "resident":
        plan = resident(problem, rows, warps)
    elif plan.gluon:
        plan = gluon(problem, rows, units, bool(choices.get("polled", plan.polled)))
    else:
        plan = cooperative(problem, rows, units, warps, choices.get("slices", plan.slices))
    if not fits(problem, plan):
        device = problem.device
        raise ValueError(
            f"{plan.programs} programs with {plan.shared} bytes of shared memory each; the device runs "
            f"{device.processors} at once with {device.shared} bytes"
        )
    return plan
