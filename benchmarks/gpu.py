"""Everything that needs a GPU, in one command for a machine that has one and where nothing can be installed.

    PYTHONPATH=.:kernels python3 -m benchmarks.gpu                  all tests on the GPU, then the benchmark
    PYTHONPATH=.:kernels python3 -m benchmarks.gpu --case lstm-1024 --plan eager=0 --plan forward:warps=8
    PYTHONPATH=.:kernels python3 -m benchmarks.gpu --device cpu     a rehearsal in Triton's interpreter, tiny sizes

With --case only these cases are measured, by the Triton backend's own plan and by every plan given, see
`benchmarks.tuning`; `--list` names the cases. Each part runs in a process of its own within its share of the time, so
that one that fails, crashes or hangs leaves the others theirs. Results go to $OUT, by default benchmarks/results/: what
the tests said, and the measurements as JSON and PNG, written after every case. A table of all parts comes last; the
exit status is 0 where every part was done without a failure.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 540
# What a part may take to end in order, once it is told to.
GRACE_SECONDS = 20
# Most processes that share a part's tests, and the device: most of a test's time is compilation on the host.
TESTERS = 8
MEASURE = ("benchmarks", "--backend", "triton")


@dataclass(frozen=True)
class Part:
    """share: of the time, beside those of the other parts. tests: files; none where the part measures.

    alone: its tests want the device for themselves.
    """

    name: str
    share: int
    tests: tuple[str, ...] = ()
    alone: bool = False


PARTS = (
    Part("kernels", 3, ("gpu_numerics",)),
    Part("device", 3, ("gpu_device",), alone=True),
    Part(
        "layers",
        4,
        (
            "sequences", "numerics", "modules", "autograd", "stream", "autocast", "transforms", "ensembles",
            "accelerate", "cell_modules", "parametrizations", "compile", "export", "torch_samples",
        ),
    ),
    Part("benchmark", 4),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    part: str
    state: str
    seconds: float
    counts: str = ""
    failures: tuple[str, ...] = ()


def run(words: Sequence[str], seconds: float, log: Path | None, interpreted: bool) -> tuple[str, float]:
    """Run a Python module with the repository on its path; say how it ended, and after how many seconds.

    At the end of its time it is asked to end, then it and all that it has started are killed.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    output = None if log is None else log.open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        code = process.wait(seconds)
        state = "done" if code == 0 else f"ended by signal {-code}" if code < 0 else f"status {code}"
    except subprocess.TimeoutExpired:
        state = f"stopped after {seconds:.0f} s"
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            state += ", killed"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if output is not None:
        output.close()
    return state, time.monotonic() - start


def test(part: Part, out: Path, seconds: float, interpreted: bool) -> Outcome:
    """Run a part's tests, shared among processes of which each has a core or two."""
    processes = 1 if part.alone else max(1, min(TESTERS, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:

        def run_share(n: int) -> tuple[str, float]:
            share = f"{n}/{processes}"
            return run(pytest_words(part, share, junits[n]), seconds, logs[n], interpreted)

        junits, logs = ([Path(folder) / f"{n}.{kind}" for n in range(processes)] for kind in ("xml", "txt"))
        ends = list(pool.map(run_share, range(processes)))
        found = [read_tests(junit, log) for junit, log in zip(junits, logs, strict=True)]
        # A traceback of what hangs is here too.
        (out / f"tests-{part.name}.txt").write_text("".join(log.read_text(errors="replace") for log in logs))
    state = next((state for state, _ in ends if state != "done"), "done")
    counts, failures = sum((f.counts for f in found), Counter()), [name for f in found for name in f.failures]
    text = ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped"))
    text += "" if all(f.complete for f in found) else " before it was cut off"
    return Outcome(part.name, state, max(took for _, took in ends), text, tuple(failures))


def pytest_words(part: Part, share: str, junit: Path) -> list[str]:
    words = ["pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--maxfail=30", "--tb=short"]
    # The machine's packages are of other versions, which may deprecate what ours do not.
    # A launch that the device refuses is no such thing.
    words += [
        "-W",
        "default",
        "-W",
        "error:the device refused:RuntimeWarning",
        "-o",
        "faulthandler_timeout=60",
        f"--junitxml={junit}",
        "--share",
        share,
    ]
    if importlib.util.find_spec("pytest_timeout"):
        words += ["-o", "timeout=90", "-o", "timeout_method=thread"]
    return [*words, *(f"tests/test_{name}.py" for name in part.tests)]


class Tests(NamedTuple):
    """How many tests ended how, whether these are all, and which failed."""

    counts: Counter
    complete: bool
    failures: tuple[str, ...]


def read_tests(junit: Path, log: Path) -> Tests:
    """What became of the tests; from the log where pytest came to no end."""
    if junit.exists():
        suite = ElementTree.parse(junit).getroot()[0]
        total, failed, skipped = (
            int(suite.get("tests", 0)),
            int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
            int(suite.get("skipped", 0)),
        )
        cases = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
        names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in cases)
        return Tests(Counter(passed=total - failed - skipped, failed=failed, skipped=skipped), True, names)
    lines = log.read_text(errors="replace").splitlines()
    verdicts = [word for line in lines for word in ("passed", "failed", "skipped") if f" {word.upper()}" in line]
    failures = tuple(line.strip() for line in lines if " FAILED" in line or " ERROR" in line)
    return Tests(Counter(verdicts), False, failures)


def measure(part: Part, out: Path, seconds: float, interpreted: bool, words: Sequence[str]) -> Outcome:
    """Run the benchmark; it stores every case as it is measured, and draws what it has when it is told to end."""
    state, took = run([*MEASURE, "--out", str(out), *words], seconds, None, interpreted)
    return Outcome(part.name, state, took, *read_results(out / "results.json"))


def read_results(path: Path) -> tuple[str, tuple[str, ...]]:
    """How many rows ended how, and those that went wrong."""
    if not path.exists():
        return "no results", ()
    records = json.loads(path.read_text())["records"]
    rows = [(record["case"], row) for record in records for row in record["rows"] if row["contender"] != "torch"]
    wrong = [(case, row) for case, row in rows if row["status"] in ("wrong", "crashed")]
    names = tuple(f"{case.get('label') or case} {row['contender']}: {row['reason']}" for case, row in wrong)
    good = sum(row["status"] == "ok" for _, row in rows)
    return f"{len(records)} cases, {good} measurements, {len(wrong)} wrong or crashed", names


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [f"  {o.part:10} {o.seconds:6.0f} s  {o.state:24} {o.counts}" for o in outcomes]
    for outcome in outcomes:
        lines += [f"  {outcome.part}: {failure[:150]}" for failure in outcome.failures[:12]]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--case", metavar="LABELS", help="measure only these cases, separated by commas")
    p.add_argument("--plan", metavar="PLAN", action="append", default=[], help="and by this plan; may be given again")
    p.add_argument("--list", action="store_true", help="name the cases and end")
    p.add_argument("--parts", default=",".join(part.name for part in PARTS), help="default %(default)s")
    p.add_argument("--seconds", type=float, default=SECONDS, help="for everything, default %(default)s")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    return p


def measure_words(arguments: argparse.Namespace) -> list[str]:
    """What the benchmark is asked, besides the folder of its results."""
    plans = [word for plan in arguments.plan for word in ("--plan", plan)]
    if arguments.device == "cpu":
        tiny = [
            "--sizes",
            "3,2,4,8",
            "--cell",
            "lstm,gru",
            "--dtype",
            "float32",
            "--peer",
            "torch",
            "--seconds",
            "0.01",
        ]
        return ["--device", "cpu", *tiny, *plans]
    asked = ["--case", arguments.case, "--question", "marks"] if arguments.case else ["--quick"]
    return ["--device", "cuda", *asked, *plans]


def main(given: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").absolute()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.list:
        return subprocess.call(
            [sys.executable, "-m", "benchmarks", "--device", "cuda", "--question", "marks", "--list"]
        )
    end = time.monotonic() + arguments.seconds
    wanted = ["benchmark"] if arguments.case else arguments.parts.split(",")
    outcomes: list[Outcome] = []
    interpreted = arguments.device == "cpu"
    parts = [part for part in PARTS if part.name in wanted]
    for at, part in enumerate(parts):
        share = part.share / sum(other.share for other in parts[at:])
        seconds = max(1.0, share * (end - time.monotonic()) - GRACE_SECONDS)
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        if part.tests:
            outcomes.append(test(part, out, seconds, interpreted))
        else:
            outcomes.append(measure(part, out, seconds, interpreted, measure_words(arguments)))
        (out / "gpu.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1) + "\n")
    print(f"\n{table(outcomes)}")
    return 0 if all(o.state == "done" and not o.failures for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
