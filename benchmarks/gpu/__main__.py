"""Everything that needs a GPU, in two calls that end in time, on a machine with nothing installed.

    PYTHONPATH=.:kernels python3 -m benchmarks.gpu first     at most 520 s, what matters most first
    PYTHONPATH=.:kernels python3 -m benchmarks.gpu second    at most 200 s: more tests, and what was not measured yet
    PYTHONPATH=.:kernels python3 -m benchmarks.gpu fill      without a GPU: compile what the calls want, to travel along
    PYTHONPATH=.:kernels python3 -m benchmarks.gpu first --device tiny    without a GPU: go through all of it

Each stage runs in processes of its own and ends in time, so that one that fails, crashes or hangs leaves the others
theirs; behind a case at which a process ended, another goes on. Results go to $OUT, by default benchmarks/results/gpu/:
rows.jsonl, every row as it was measured; log.txt and tests.txt, what was said; gpu.html, pictures. A table of twenty
lines comes last; the exit status is 0 where every stage was done without a failure. A single case, and by a plan:

    python -m benchmarks --device cuda --question marks --case lstm-1024 --backend triton --plan forward:warps=8
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu import cache, report
from benchmarks.gpu.processes import GRACE_SECONDS, ROOT, read_tests, run_all, run_on

# Kept back for the table and the pictures.
LAST_SECONDS = 20
# Most processes that share a stage, and the device: most of their time is compilation on the host.
PROCESSES = 14
# How much longer stages may take where they only are gone through.
SLOWER = 10
# The rows of the first call, which the second does not measure again.
MEASURED = cache.ARCHIVE.parent / "rows.jsonl"
# The device tests that come first: all that a barrier which waits forever would show.
STREAMS = "two_grids or captured or inside_a_capture or current_stream"


@dataclass(frozen=True)
class Stage:
    """seconds: at most. processes: that share its work. tests: folder/name of files, of which `which` run."""

    name: str
    seconds: int
    processes: int = 1
    tests: tuple[str, ...] = ()
    which: str = ""


LAYERS = (
    "modules/sequences", "modules/numerics", "modules/modules", "autograd/autograd", "modules/stream",
    "autograd/autocast", "autograd/transforms", "autograd/ensembles", "modules/accelerate", "modules/cell_modules",
    "modules/parametrizations", "autograd/compile", "autograd/export", "modules/torch_samples",
)  # fmt: skip
KERNELS = Stage("kernels", 80, PROCESSES, ("gpu/gpu_numerics",))
CALLS = {
    "first": (
        520,
        (
            Stage("smoke", 90, PROCESSES),
            Stage("streams", 45, 4, ("gpu/gpu_device",), STREAMS),
            Stage("probe", 30),
            Stage("warm", 60, PROCESSES),
            KERNELS,
            Stage("grid", 125),
            Stage("sweep", 45),
            Stage("plans", 45),
        ),
    ),
    "second": (
        200,
        (
            Stage("smoke", 30, PROCESSES),
            Stage("device", 45, 4, ("gpu/gpu_device",), f"not ({STREAMS})"),
            Stage("layers", 50, PROCESSES, LAYERS),
            Stage("grid", 45),
            Stage("sweep", 15),
        ),
    ),
}
FILL = (
    Stage("probe", 600),
    Stage("smoke", 3600, 2),
    Stage("warm", 7200, 2),
    replace(KERNELS, seconds=7200, processes=2),
)


@dataclass(frozen=True)
class Outcome:
    stage: str
    state: str
    seconds: float
    counts: str = ""
    failures: tuple[str, ...] = ()


def run_stage(stage: Stage, out: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run a stage, shared among its processes, and keep what they said."""
    cores = os.cpu_count() or 1
    processes = min(stage.processes, max(2, cores - 2))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs, junits, progress = (
            [Path(folder, f"{n}.{kind}") for n in range(processes)] for kind in ("txt", "xml", "begun")
        )
        # A stage of ours ends by itself, after the row that it is at.
        environment = {**environment, "OUT": str(out), "UNTIL": str(start + seconds - 2 * GRACE_SECONDS)}
        if processes > 1:
            environment["OMP_NUM_THREADS"] = "1"
        commands = []
        for n, junit in enumerate(junits):
            share = f"{n}/{processes}"
            ours = ["benchmarks.gpu.stages", stage.name, share, str(progress[n])]
            commands.append(pytest_words(stage, share, junit, environment) if stage.tests else ours)
        if stage.tests:
            states = run_all(commands, seconds, logs, environment)
        else:
            states = run_on(commands, seconds, logs, environment, progress)
        said = "".join(log.read_text(errors="replace") for log in logs)
        with (out / ("tests.txt" if stage.tests else "log.txt")).open("a") as file:
            file.write(f"== {stage.name}\n{said}")
        state = next((state for state in states if state != "done"), "done")
        took = time.monotonic() - start
        if not stage.tests:
            lines = [line for line in said.splitlines() if line.startswith(("TROUBLE", "WRONG")) or "Error" in line]
            counts = f"{len(lines)} troubles; kernels {kernels(said)}"
            return Outcome(stage.name, state, took, counts, tuple(dict.fromkeys(lines)))
        found = [read_tests(junit, log) for junit, log in zip(junits, logs, strict=True)]
    counts, failures = sum((f.counts for f in found), Counter()), [name for f in found for name in f.failures]
    text = ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped"))
    text += "" if all(f.complete for f in found) else " before it was cut off"
    return Outcome(stage.name, state, took, text, tuple(failures))


def kernels(said: str) -> str:
    """How many kernels the processes of a stage found, and how many they compiled."""
    numbers = re.findall(r"^kernels: (\d+) found, (\d+) compiled ([\d.]+) s$", said, re.MULTILINE)
    found, compiled, seconds = (
        (sum(map(float, column)) for column in zip(*numbers, strict=True)) if numbers else (0, 0, 0)
    )
    return f"{found:.0f} found, {compiled:.0f} compiled, {seconds:.0f} s"


def pytest_words(stage: Stage, share: str, junit: Path, environment: dict[str, str]) -> list[str]:
    words = ["pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--maxfail=30", "--tb=short"]
    words += ["-p", "benchmarks.gpu.cache"] if cache.RELEASE in environment else []
    # The machine's packages are of other versions, which may deprecate what ours do not; a launch that the device
    # refuses is no such thing.
    words += ["-W", "default", "-W", "error:the device refused:RuntimeWarning", "-o", "faulthandler_timeout=30"]
    words += [f"--junitxml={junit}", "--share", share]
    words += ["-k", stage.which] if stage.which else []
    if importlib.util.find_spec("pytest_timeout"):
        words += ["-o", "timeout=60", "-o", "timeout_method=thread"]
    if environment.get("STANDS_IN") == "fill":
        words += ["--compiled-for", "sm_90", "--maxfail=0", "-o", "timeout=3600"]
    return [*words, *("tests/{}/test_{}.py".format(*name.split("/")) for name in stage.tests)]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    p.add_argument("call", nargs="?", choices=(*CALLS, "fill"), default="first", help="default %(default)s")
    p.add_argument("--stages", metavar="NAMES", help="only these, separated by commas")
    p.add_argument("--seconds", type=float, help="for everything")
    p.add_argument(
        "--done", metavar="FILE", help="rows not to measure again, default for second: those that first left there"
    )
    p.add_argument("--device", choices=("cuda", "tiny"), default="cuda", help="tiny: no GPU, no sizes of interest")
    return p


def rehearsed(stage: Stage) -> Stage:
    """The same stage where there is neither a GPU nor a hurry: of its tests one that Triton's interpreter runs."""
    which = "rows_are_counted" if stage.tests else ""
    return Stage(stage.name, SLOWER * stage.seconds, min(2, stage.processes), stage.tests[:1], which)


def call(stages: Sequence[Stage], seconds: float, out: Path, environment: dict[str, str], tests: dict[str, str]):
    """Run the stages one after another, each within its time and what is left of the whole."""
    end = time.monotonic() + seconds - LAST_SECONDS
    outcomes: list[Outcome] = []
    for stage in stages:
        left = min(stage.seconds, end - time.monotonic() - 2 * GRACE_SECONDS)
        if left < 5:
            outcomes.append(Outcome(stage.name, "no time left", 0.0))
            continue
        outcome = run_stage(stage, out, left, {**environment, **(tests if stage.tests else {})})
        outcomes.append(outcome)
        print(f"{time.monotonic() - end + seconds - LAST_SECONDS:4.0f} s  {line(outcome)}", flush=True)
        (out / "stages.json").write_text(json.dumps([vars(each) for each in outcomes], indent=1) + "\n")
    return outcomes


def line(o: Outcome) -> str:
    return f"{o.stage:8} {o.seconds:5.0f} s  {o.state:22} {o.counts}"


def fill(wanted: Sequence[str]) -> int:
    """Compile for the calls, without a GPU, and pack what was compiled."""
    import triton

    environment = {**cache.environment(triton.__version__), "STANDS_IN": "fill"}
    with tempfile.TemporaryDirectory() as out:
        stages = [stage for stage in FILL if not wanted or stage.name in wanted]
        outcomes = call(stages, 4 * 3600, Path(out), environment, {})
    kernels = cache.pack(triton.__version__)
    size = cache.ARCHIVE.stat().st_size / 2**20
    print(f"{kernels} kernels by Triton {triton.__version__} in {cache.ARCHIVE}, {size:.1f} MiB")
    # Of tests whose kernels never run, many fail.
    return 0 if all(o.state == "done" for o in outcomes if o.stage != KERNELS.name) else 1


def main(given: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    wanted = arguments.stages.split(",") if arguments.stages else []
    if arguments.call == "fill":
        return fill(wanted)
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu").absolute()
    out.mkdir(parents=True, exist_ok=True)
    seconds, stages = CALLS[arguments.call]
    real = arguments.device == "cuda"
    earlier = str(MEASURED) if real and arguments.call == "second" and MEASURED.exists() else None
    done = Path(arguments.done or earlier).resolve() if arguments.done or earlier else None
    for name in ("rows.jsonl", "log.txt", "tests.txt"):
        if (out / name).resolve() != done:
            (out / name).unlink(missing_ok=True)
    environment, tests = cache.environment(cache.unpack()), {}
    if done:
        environment["DONE"] = str(done)
    if not real:
        seconds, stages, tests = SLOWER * seconds, tuple(map(rehearsed, stages)), {"TRITON_INTERPRET": "1"}
        environment["STANDS_IN"] = "tiny"
    stages = tuple(stage for stage in stages if not wanted or stage.name in wanted)
    outcomes = call(stages, arguments.seconds or seconds, out, environment, tests)
    if real and arguments.call == "first" and (out / "rows.jsonl").exists():
        MEASURED.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "rows.jsonl", MEASURED)
    failures = [failure for o in outcomes for failure in o.failures]
    print("\n".join(report.table([line(o) for o in outcomes], failures, out)), flush=True)
    report.draw(out)
    return 0 if all(o.state == "done" and not o.failures for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
