"""`make demo`: train one language model with torch.nn.LSTM and with rnnfast.LSTM, then time layers of every length.

Both models start from the same seed. Their losses must agree, and every row of the table is checked against torch.nn in
float64 before it is timed. The loss curves and the ratios end up in a picture.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, median

import torch

import rnnfast
from benchmarks import oracle, workload
from benchmarks.cases import CELLS, Case
from benchmarks.contenders import BASELINE, OURS, PEERS, by_backend
from benchmarks.measure import Effort, alternate, cpu_clock
from benchmarks.measure import ratios as times_faster
from benchmarks.progress import Progress
from benchmarks.run import check
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
    rnnfast.warmup()
    print(f"ready after {time.perf_counter() - start:.1f} s")
    runs = compare_models()
    ratios = compare_lengths()
    draw(runs, ratios)
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
        progress.advance(1)
        progress.show("training both models")

    layers = {BASELINE: torch.nn.LSTM, OURS: rnnfast.LSTM}
    runs = train(layers, len(corpus.characters), until_late(corpus.batches(BATCHES)), watch=watch)
    progress.clear()
    seconds = {name: sum(run.seconds) for name, run in runs.items()}
    verdict = "agree" if apart(runs) <= AGREEMENT else "DISAGREE"
    print(f"losses {verdict}: at most {apart(runs):.1e} apart, relative; {AGREEMENT:.0e} is allowed")
    print(f"training took {seconds[BASELINE]:.1f} s with torch.nn.LSTM, {seconds[OURS]:.1f} s with rnnfast.LSTM: "
          f"{seconds[BASELINE] / seconds[OURS]:.2f} times as fast")  # fmt: skip
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


def compare_lengths() -> dict[tuple[str, str], list[float]]:
    """Check and time one layer of every cell and length; return the ratios to torch.nn by cell and mode."""
    print("\nHow many times faster than torch.nn a layer with B=16 I=128 H=128 is, checked against torch.nn in float64")
    print(
        f"{'T':>6}" + "".join(f"{f'{cell.upper()} {mode}':>16}" for cell in CELLS for mode in MODES) + f"{'error':>10}"
    )
    progress = Progress(sum(LENGTHS))
    ratios: dict[tuple[str, str], list[float]] = {(cell, mode): [] for cell in CELLS for mode in MODES}
    for T in LENGTHS:
        errors = []
        for cell, mode in ratios:
            progress.show(f"timing {cell.upper()} {mode}, T={T}")
            ratio, error = measure(Case(cell, T, B=16, I=128, H=128, mode=mode))
            ratios[cell, mode].append(ratio)
            errors.append(error)
            progress.advance(T / len(ratios))
        progress.print(
            f"{T:6d}" + "".join(f"{values[-1]:15.2f}x" for values in ratios.values()) + f"{max(errors):10.1e}"
        )
    progress.clear()
    for cell in CELLS:
        print(f"{cell.upper()}: median {median(ratios[cell, 'inference']):.2f}x in inference,"
              f" {median(ratios[cell, 'training']):.2f}x in training")  # fmt: skip
    return ratios


def measure(case: Case) -> tuple[float, float]:
    """Check a case against float64, time it in turns with torch.nn, and return the ratio and the largest error.

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
    effort = Effort(seconds=0.1, fewest=3, most=20)
    samples = alternate(calls, cpu_clock, effort, entering=lambda name: None)
    return median(times_faster(samples[BASELINE], samples[OURS])), error


def draw(runs: dict[str, Run], ratios: dict[tuple[str, str], list[float]]) -> None:
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
            right.plot(LENGTHS, ratios[cell, mode], line, marker="o", markersize=3, color=color, label=label)
    right.axhline(1, color="0.6")
    right.set_xscale("log", base=2)
    right.set_xticks(LENGTHS, [str(T) for T in LENGTHS])
    right.set(title="One layer, B=16 I=H=128", xlabel="sequence length T", ylabel="times as fast as torch.nn")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize="small")
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
