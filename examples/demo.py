"""`make demo`: train one language model with torch.nn.LSTM and with rnnfast.LSTM, then time layers of every length.

Both models start from the same seed. Their losses must agree, and every row of the table is checked against torch.nn in
float64 before it is timed. The loss curves and the ratios end up in a picture.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

import rnnfast
from benchmarks import oracle, workload
from benchmarks.cases import CELLS, Case
from benchmarks.contenders import BASELINE, OURS, PEERS, by_backend
from benchmarks.measure import Settings, alternate, check, cpu_clock
from benchmarks.worker import Progress
from examples.language_model import BATCH, HIDDEN, STEPS, Corpus, Run, train, write_text

# Training ends after so many batches, or on a slow or busy machine at the first batch after so many seconds.
BATCHES, SECONDS = 250, 100
REPORT_EVERY = 25
AGREEMENT = 1e-4  # relative, of the two losses at every batch
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
MODES = ("inference", "training")
PICTURE = Path("demo.png")


def main() -> int:
    start = time.perf_counter()
    print(f"torch {torch.__version__}, rnnfast {rnnfast.__version__}, {torch.get_num_threads()} threads")
    if os.getloadavg()[0] > torch.get_num_threads():
        print("other programs keep this machine busy: the times below say little")
    print("loading the kernels, which compiles them on the first run ...", flush=True)
    rnnfast.warmup(verbose=True)
    print(f"ready after {time.perf_counter() - start:.1f} s")
    runs = compare_models()
    draw(runs, compare_lengths())
    print(f"\n{PICTURE} shows both; the demonstration took {time.perf_counter() - start:.0f} s")
    return 0 if apart(runs) <= AGREEMENT else 1


def compare_models() -> dict[str, Run]:
    """Train both models and print their losses side by side."""
    corpus = Corpus()
    print(f"\nA character model on {len(corpus.data):,} characters of Python's manual, T={STEPS} B={BATCH} H={HIDDEN}")
    print(f"{'batch':>8} {'torch.nn':>10} {'rnnfast':>10} {'difference':>12}")
    progress = Progress(BATCHES)

    def watch(done: int, runs: dict[str, Run]) -> None:
        if done % REPORT_EVERY == 0 or done == 1:
            torch_loss, our_loss = (run.losses[-1] for run in runs.values())
            difference = abs(our_loss / torch_loss - 1)
            progress.print(f"{done:8d} {torch_loss:10.5f} {our_loss:10.5f} {difference:12.1e}")
        progress.done += 1
        progress.show("training both models")

    layers = {BASELINE: torch.nn.LSTM, OURS: rnnfast.LSTM}
    runs = train(layers, len(corpus.characters), until_late(corpus.batches(BATCHES)), watch=watch)
    progress.clear()
    seconds = {name: sum(run.seconds) for name, run in runs.items()}
    verdict = "agree" if apart(runs) <= AGREEMENT else "DISAGREE"
    print(f"losses {verdict}: at most {apart(runs):.1e} apart, relative; {AGREEMENT:.0e} is allowed")
    print(f"training took {seconds[BASELINE]:.1f} s with torch.nn.LSTM, {seconds[OURS]:.1f} s with rnnfast.LSTM: "
          f"{seconds[BASELINE] / seconds[OURS]:.2f} times as fast")  # fmt: skip
    fastest = {name: min(run.seconds) for name, run in runs.items()}
    print(f"the fastest batch took {fastest[BASELINE] * 1e3:.0f} ms and {fastest[OURS] * 1e3:.0f} ms: "
          f"{fastest[BASELINE] / fastest[OURS]:.2f} times as fast")  # fmt: skip
    print(
        f"what it writes after {len(runs[OURS].losses)} batches: {write_text(runs[OURS].model, corpus, length=120)!r}"
    )
    return runs


def until_late(batches: Iterable) -> Iterator:
    """Pass batches on while there is time."""
    start = time.perf_counter()
    for batch in batches:
        yield batch
        if time.perf_counter() - start > SECONDS:
            return


def apart(runs: dict[str, Run]) -> float:
    """Return the largest relative difference of the two losses over all batches."""
    pairs = zip(runs[BASELINE].losses, runs[OURS].losses, strict=True)
    return max(abs(ours / theirs - 1) for theirs, ours in pairs)


@dataclass(frozen=True)
class Row:
    """One timed case. ratio: of the fastest rounds. error: of the worst tensor. calm: torch's rounds are alike."""

    ratio: float
    error: float
    calm: bool


Table = dict[tuple[str, str], list[Row]]  # by cell and mode, one row per length


def compare_lengths() -> Table:
    """Check and time one layer of every cell, mode and length, and print the ratios to torch.nn."""
    print("\nHow many times faster than torch.nn a layer with B=16 I=128 H=128 is, checked against torch.nn in float64")
    columns = [(cell, mode) for cell in CELLS for mode in MODES]
    print(f"{'T':>6}" + "".join(f"{f'{cell.upper()} {mode}':>16}" for cell, mode in columns) + f"{'error':>10}")
    progress = Progress(sum(LENGTHS))
    table: Table = {column: [] for column in columns}
    for T in LENGTHS:
        for cell, mode in columns:
            progress.show(f"timing {cell.upper()} {mode}, T={T}")
            table[cell, mode].append(measure(Case(cell, T, B=16, I=128, H=128, mode=mode)))
            progress.done += T / len(columns)
        latest = [rows[-1] for rows in table.values()]
        error = max(row.error for row in latest)
        progress.print(f"{T:6d}" + "".join(f"{row.ratio:15.2f}x" for row in latest) + f"{error:10.1e}")
    progress.clear()
    print("median" + "".join(f"{median(row.ratio for row in rows):15.2f}x" for rows in table.values()))
    disturbed = sum(not row.calm for rows in table.values() for row in rows)
    if disturbed:
        print(f"other programs disturbed {disturbed} of {len(LENGTHS) * len(columns)}: torch's rounds differ twofold")
    return table


def measure(case: Case) -> Row:
    """Check a case against float64, then time it in turns with torch.nn.

    Raises RuntimeError if a result is wrong, with the tensor and its error.
    """
    work = workload.draw(case, "cpu", seed=0)
    reference = oracle.expected(work)
    calls, error = {}, 0.0
    for contender in (PEERS[BASELINE], by_backend("auto")):
        row, call = check(contender, work, reference)
        if call is None:
            raise RuntimeError(f"{contender.name}, {case.id}: {row['status']}, {row['reason']}")
        calls[contender.name], error = call, row["error"]
    samples = alternate(calls, cpu_clock, Settings(seconds=0.1, fewest=3, most=20), entering=lambda name: None)
    fastest = {name: min(seconds) for name, seconds in samples.items()}
    calm = max(samples[BASELINE]) < 2 * fastest[BASELINE]
    return Row(fastest[BASELINE] / fastest[OURS], error, calm)


def draw(runs: dict[str, Run], table: Table) -> None:
    """Save the loss curves and the ratios."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {BASELINE: {"color": "0.6", "linewidth": 4}, OURS: {"color": "tab:red", "linewidth": 1.2}}
    for name, run in runs.items():
        smooth = [mean(run.losses[max(0, n - 4) : n + 1]) for n in range(len(run.losses))]
        left.plot(range(1, len(smooth) + 1), smooth, label=f"{name}, {sum(run.seconds):.0f} s", **styles[name])
    left.set(title="Language model: same seed, same batches", xlabel="batch", ylabel="cross-entropy, mean of 5 batches")
    left.legend(frameon=False)
    for cell, color in zip(CELLS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for mode, line in zip(MODES, ("-", "--"), strict=True):
            label = f"{cell.upper()}, {mode}"
            ratios = [row.ratio for row in table[cell, mode]]
            right.plot(LENGTHS, ratios, line, marker="o", markersize=3, color=color, label=label)
    right.axhline(1, color="0.6")
    right.set_xscale("log", base=2)
    right.set_xticks(LENGTHS, [str(T) for T in LENGTHS])
    right.set(title="One layer, B=16 I=H=128", xlabel="sequence length T", ylabel="times as fast as torch.nn")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
