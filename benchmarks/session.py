"""One run of the suite: measure every case, keep the results as they come, then print, draw and write the report."""

import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import facts, options, page, report, store, worker
from benchmarks.cases import CELLS
from benchmarks.contenders import OURS, Contender
from benchmarks.measure import Settings
from benchmarks.questions import Question
from benchmarks.worker import Progress, Worker

QUICK_SECONDS, FULL_SECONDS = 0.2, 0.5
# One core's worth of other work in the minute before the run.
BUSY_LOAD = 1.0


def run(asked: list[Question], arguments) -> int:
    """Measure what is asked. Returns the exit status."""
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else FULL_SECONDS)
    settings = Settings(arguments.device, arguments.seed, seconds)
    results = {
        "schema": store.SCHEMA,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "finished": "",
        # As typed, but for the folder, which means nothing elsewhere.
        "command": re.sub(r" --out[ =]('[^']*'|\S+)", "", shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])),
        "complete": False,
        "machine": {},
        "skipped": {},
        "startup": [],
        "records": [],
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is kept like Ctrl-C's
    with worker.working(arguments.threads, worker.PATIENCE_SECONDS[arguments.device]) as measuring:
        formats = tuple(dict.fromkeys(case.dtype for question in asked for case in question.cases))
        results["machine"] = measuring.ask("facts", arguments.device, formats)
        path = folder(results["machine"].pop("folder"), arguments) / "results.json"
        print(heading(results["machine"]))
        try:
            measure_all(measuring, asked, arguments, settings, results, path)
            results["complete"] = True
        except KeyboardInterrupt:
            print(f"\ninterrupted; {len(results['records'])} measured cases are kept")
    results["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    if not results["records"]:
        return 130
    finish(results, path)
    if arguments.facts and results["complete"]:
        from rnnfast.backends.measured import instructions

        count = facts.write(results, instructions())
        print(f"{facts.FILE}: {count} sizes at which torch is faster on {instructions()}")
    return 0 if results["complete"] and not failures(results) else 1 if results["complete"] else 130


def folder(machine_name: str, arguments) -> Path:
    """Full results go to the machine's folder, partial ones below it, so that they never replace the full ones."""
    if arguments.out:
        return Path(arguments.out)
    kind = "quick" if arguments.quick else "partial"
    return store.RESULTS / machine_name / (kind if options.is_partial(arguments) else "")


def measure_all(measuring: Worker, asked, arguments, settings: Settings, results: dict[str, Any], path: Path) -> None:
    progress = Progress(sum(len(question.cases) for question in asked))
    for question in asked:
        standing = take_part(question, arguments, results["skipped"])
        progress.print(f"\n{question.name}: {question.title}")
        progress.print(report.text_lines([list(report.COLUMNS)])[0])
        for case in question.cases:
            progress.show(case.id)
            record = measuring.measure(case, standing, settings, progress)
            record = {"question": question.name, "case": case.to_json(), **record}
            results["records"].append(record)
            progress.print("\n".join(report.text_lines(report.case_rows(record, results["machine"]))))
            progress.done += 1
            store.save(path, results)
        left_out = report.skips(store.records_of(results, question.name))
        if left_out:
            progress.print(left_out)
    if not options.is_partial(arguments):
        progress.show("import and first call")
        results["startup"] = measuring.ask("startup", CELLS, progress=progress, what="import and first call")
        progress.print(
            "\nimport and first call\n"
            + "\n".join(f"  {row['what']:<40}{row['ms']:>10} ms" for row in results["startup"])
        )
    progress.clear()


def take_part(question: Question, arguments, skipped: dict[str, str]) -> list[Contender]:
    """The contenders that are installed; the others are named in `skipped`, each once on the screen."""
    standing = []
    for contender in options.contenders(question, arguments):
        missing = contender.missing(arguments.device)
        if missing is None:
            standing.append(contender)
        elif contender.name not in skipped:
            skipped[contender.name] = missing
            print(f"{contender.name} is skipped: {missing}")
    return standing


def heading(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['device']}, {machine['threads']} threads for every contender, commit {machine['commit']}",
        store.limits_text(machine),
        versions,
    ]
    if machine["load"] is not None and machine["load"] > BUSY_LOAD:
        lines.append(f"other programs keep this machine busy, load {machine['load']}: the numbers below say little")
    return "\n".join(lines)


def failures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ours that are wrong or crashed."""
    rows = (row for record in results["records"] for row in record["rows"])
    return [row for row in rows if row["contender"].startswith(OURS) and row["status"] in ("wrong", "crashed")]


def finish(results: dict[str, Any], path: Path) -> None:
    store.save(path, results)
    print("\n" + report.marks_text(results["records"]))
    print(f"\n{path}\n{page.write(results, path.parent)}")
