"""The command line: what may be asked, and one line that names the valid choices where something else was."""

import argparse
import os
import re
from collections.abc import Iterable
from dataclasses import replace

from benchmarks import questions
from benchmarks.cases import BYTES, CELLS, DECLARED, MODES, parse_sizes
from benchmarks.contenders import BACKENDS, BASELINE, PEERS, Contender, by_backend, by_plan
from benchmarks.questions import Limits, Question

DEVICES = ("cpu", "cuda")
# What holds ours, torch and the libraries under it, and JAX to a processor's instructions. ONNX Runtime cannot be held.
PROCESSORS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "RNNFAST_CPU": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    },
    "sse": {
        "RNNFAST_CPU": "sse",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
    },
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    p = Parser(
        prog="python -m benchmarks", description="Time rnnfast beside its peers, each checked before it is timed."
    )
    ask = p.add_argument_group("what to ask (lists are separated by commas)")
    ask.add_argument("--quick", action="store_true", help="sequence lengths to 1024 and single steps; under 3 minutes")
    ask.add_argument("--question", metavar="NAMES", help=", ".join(question.name for question in questions.full("cpu")))
    ask.add_argument("--sizes", metavar="T,B,I,H", help="one size instead of the questions")
    ask.add_argument("--grid", metavar="N", type=int, help="N random sizes instead of the questions, and their means")
    ask.add_argument("--limits", metavar="T=A:B,...", help="the grid's ranges of T, B, I and H (default %(default)s)",
                     default="T=1:2000,B=1:64,I=1:640,H=16:1024")  # fmt: skip
    ask.add_argument("--case", metavar="LABELS", help="cases by their label, such as lstm-1024 of question marks")
    ask.add_argument("--cell", metavar="NAMES", help=", ".join(CELLS))
    ask.add_argument("--mode", metavar="NAMES", help=", ".join(MODES))
    ask.add_argument("--dtype", metavar="NAMES", help=", ".join(BYTES))
    ask.add_argument("--backend", metavar="NAMES", default="auto", help=f"ours: {', '.join(BACKENDS)}")
    ask.add_argument("--plan", metavar="PLAN", action="append", default=[],
                     help="the Triton backend by this plan too, such as rows=32,warps=8; repeatable")  # fmt: skip
    ask.add_argument("--peer", metavar="NAMES", help=f"{', '.join(PEERS)}; torch always takes part")
    ask.add_argument("--facts", action="store_true",
                     help="a grid of few steps; rewrites the table by which `auto` leaves sizes to torch")  # fmt: skip
    how = p.add_argument_group("how to measure")
    how.add_argument("--device", default="cpu", help=", ".join(DEVICES))
    how.add_argument(
        "--processor", default="native", help=f"that everyone is held to: {', '.join(PROCESSORS)} (default %(default)s)"
    )
    how.add_argument("--threads", type=int, default=usable_cores(), help="for every contender (default %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of weights, inputs and the grid (default %(default)s)")
    how.add_argument("--seconds", type=float, help="for one contender on one case (default 0.5, quick 0.2)")
    how.add_argument("--out", metavar="FOLDER", help="where the results go (default benchmarks/results/<device>/)")
    other = p.add_argument_group("instead of measuring")
    other.add_argument("--list", action="store_true", help="show the cases and who takes part")
    other.add_argument(
        "--compare", nargs=2, metavar=("A.json", "B.json"), help="what changed from A to B; exit 1 on a regression"
    )
    return p


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose(kind: str, text: str | None, valid: Iterable[str]) -> tuple[str, ...] | None:
    """Read a list of names; None where none was given. Raises ValueError with the valid ones."""
    if text is None:
        return None
    valid = tuple(valid)
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in valid]
    if unknown:
        raise ValueError(f"unknown {kind} {unknown[0]!r}; choose from {', '.join(valid)}")
    return names


def parse_limits(text: str) -> Limits:
    """Read `T=1:2000,B=1:64`; what is left out keeps its default. Raises ValueError."""
    ranges = {}
    for part in text.split(","):
        found = re.fullmatch(r"([TBIH])=(\d+):(\d+)", part.strip())
        if not found or not 1 <= int(found[2]) <= int(found[3]):
            raise ValueError(f"limits must read like T=1:2000,B=1:64,I=1:640,H=16:1024; got {part!r}")
        ranges[found[1]] = int(found[2]), int(found[3])
    return replace(Limits(), **ranges)


def contenders(question: Question, arguments: argparse.Namespace) -> list[Contender]:
    """Who is asked this question: torch, ours by backend, then the peers."""
    peers = choose("peer", arguments.peer, PEERS)
    backends = choose("backend", arguments.backend, BACKENDS) or ()
    others = [name for name in (question.peers if peers is None else peers) if name != BASELINE]
    ours = [*map(by_backend, backends), *map(by_plan, arguments.plan)]
    return [PEERS[BASELINE], *ours, *(PEERS[name] for name in others)]


def asked(arguments: argparse.Namespace) -> list[Question]:
    """The questions with the cases that the filters leave. Raises ValueError where an option is not valid."""
    cells = choose("cell", arguments.cell, (*CELLS, *DECLARED))
    modes = choose("mode", arguments.mode, MODES)
    dtypes = choose("dtype", arguments.dtype, BYTES)
    everything = questions.full(arguments.device)
    labels = choose("case", arguments.case, {case.label for question in everything for case in question.cases} - {""})
    for plan in arguments.plan:
        from benchmarks.contenders import ours

        ours.parse_plan(plan)
    names = choose("question", arguments.question, [question.name for question in everything])
    if arguments.sizes:
        sizes = parse_sizes(arguments.sizes)
        chosen = [questions.one_size(sizes, dtype) for dtype in dtypes or (questions.base(arguments.device).dtype,)]
    elif arguments.facts:
        if labels or cells or modes or dtypes or names:
            raise ValueError("facts are about a whole grid, whose rows they replace; leave the filters out")
        chosen = [questions.facts()]
    elif arguments.grid is not None:
        if arguments.grid < 1:
            raise ValueError(f"grid must be at least 1 size, got {arguments.grid}")
        chosen = [questions.grid(arguments.grid, arguments.seed, parse_limits(arguments.limits))]
    else:
        chosen = questions.quick(arguments.device) if arguments.quick and not names else everything
        chosen = [question for question in chosen if not names or question.name in names]
    left = []
    filters = {"label": labels, "cell": cells, "mode": modes, "dtype": dtypes}
    for question in chosen:
        cases = tuple(
            case
            for case in question.cases
            if all(not wanted or getattr(case, name) in wanted for name, wanted in filters.items())
        )
        if cases:
            left.append(replace(question, cases=cases))
    if not left:
        raise ValueError("no case is left by these options together; see --list")
    for question in left:
        contenders(question, arguments)
    return left


NARROWING = ("quick", "facts", "question", "case", "sizes", "grid", "cell", "mode", "dtype", "peer", "plan", "backend")


def is_partial(arguments: argparse.Namespace) -> bool:
    """Whether the run is less than everything, so that it must not replace the full results."""
    return any(getattr(arguments, name) != parser().get_default(name) for name in NARROWING)
