"""`make demo`: what rnnfast does, in under three minutes on two cores.

1. The import: one line changes.
2. The agreement: a language model is trained with torch.nn.LSTM and with rnnfast.LSTM from the same seed; the losses
   must agree.
3. The time: layers beside torch.nn, each checked against torch.nn in float64 before it is timed. Where other programs
   disturb the measurement, no ratio is told.
4. A cell of your own: declared in nine lines, checked against its eager step, timed beside the loop in Python.
5. A frozen model: the trained model with int8 weights, its loss and its size.

The loss curves and the ratios are saved as demo.png.
"""

import copy
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import TypeVar

import torch

import rnnfast
from benchmarks import machine, measure, store
from benchmarks.cases import Case
from benchmarks.contenders import BASELINE, OURS, PEERS, by_backend
from benchmarks.measure import Settings
from benchmarks.worker import Progress
from examples import options, own_cell
from examples.language_model import BATCH, HIDDEN, STEPS, Corpus, LanguageModel, Run, train, write_text

# Training ends after so many batches; on a slow or busy machine training and timing each end after so many seconds.
BATCHES, SECONDS = 120, 40
REPORT_EVERY = 20
AGREEMENT = 1e-4  # relative, of the two losses at every batch
CASES = [
    Case(cell, T, B=16, I=128, H=128, mode=mode)
    for T in (16, 128, 1024)
    for cell in ("rnn", "lstm", "gru")
    for mode in ("inference", "training")
]
# With torch.nn this far from itself in its own rounds, a ratio says nothing.
MOST_NOISE = 0.25
FEWEST = 10  # rounds for a ratio
PICTURE = Path("demo.png")
Item = TypeVar("Item")


def main() -> int:
    options("examples.demo", __doc__)
    start = time.perf_counter()
    show_import()
    runs, corpus = show_agreement()
    ratios = show_times()
    show_own_cell()
    show_frozen(runs[OURS].model, corpus)
    draw(runs, ratios)
    print(f"\n{PICTURE} shows losses and ratios. The demonstration took {time.perf_counter() - start:.0f} s.")
    return 0 if apart(runs) <= AGREEMENT else 1


def heading(number: int, text: str) -> None:
    print(f"\n{number}. {text}\n", flush=True)


def show_import() -> None:
    heading(1, "The import")
    print("    - from torch.nn import LSTM\n    + from rnnfast import LSTM\n")
    print(f"torch {torch.__version__}, rnnfast {rnnfast.__version__}, {torch.get_num_threads()} threads")
    load = machine.load()
    if load is not None and load > torch.get_num_threads():
        print(f"Other programs keep this machine busy (load {load}): the times below may say little.")
    print("Loading kernels; on the first run they are compiled, which takes ten to twenty seconds each.", flush=True)
    start = time.perf_counter()
    rnnfast.warmup(rnnfast.RNN(16, 16), rnnfast.LSTM(16, 16), rnnfast.GRU(16, 16), verbose=True)
    print(f"ready after {time.perf_counter() - start:.1f} s")


def show_agreement() -> tuple[dict[str, Run], Corpus]:
    """Train both models and print their losses side by side."""
    heading(2, "The same losses")
    corpus = Corpus()
    print(f"A character model on {len(corpus.data):,} characters of Python's manual, T={STEPS} B={BATCH} H={HIDDEN}")
    print(f"{'batch':>8} {'torch.nn':>10} {'rnnfast':>10} {'difference':>12}")
    progress = Progress(BATCHES)

    def watch(done: int, runs: dict[str, Run]) -> None:
        if done % REPORT_EVERY == 0 or done == 1:
            torch_loss, our_loss = (run.losses[-1] for run in runs.values())
            progress.print(f"{done:8d} {torch_loss:10.5f} {our_loss:10.5f} {abs(our_loss / torch_loss - 1):12.1e}")
        progress.done += 1
        progress.show("training both models")

    layers = {BASELINE: torch.nn.LSTM, OURS: rnnfast.LSTM}
    runs = train(layers, len(corpus.characters), until_late(corpus.batches(BATCHES)), watch=watch)
    progress.clear()
    verdict = "agree" if apart(runs) <= AGREEMENT else "DISAGREE"
    print(f"The losses {verdict}: at most {apart(runs):.1e} apart, relative; {AGREEMENT:.0e} is allowed.")
    print(f"Training: {compared(runs[BASELINE].seconds, runs[OURS].seconds)}.")
    print(f"What it writes after {len(runs[OURS].losses)} batches: {write_text(runs[OURS].model, corpus, 80)!r}")
    return runs, corpus


def until_late(items: Iterable[Item]) -> Iterator[Item]:
    """Pass items on while there is time."""
    start = time.perf_counter()
    for item in items:
        yield item
        if time.perf_counter() - start > SECONDS:
            return


def apart(runs: dict[str, Run]) -> float:
    """Return the largest relative difference of the two losses over all batches."""
    pairs = zip(runs[BASELINE].losses, runs[OURS].losses, strict=True)
    return max(abs(ours / theirs - 1) for theirs, ours in pairs)


def compared(theirs: list[float], ours: list[float]) -> str:
    """Tell two times that were taken in turn, and their ratio where enough rounds are alike; the first is left out."""
    if len(ours) < FEWEST:
        return f"only {len(ours)} rounds in {SECONDS} s, too few to tell a ratio"
    middle, low, high = measure.spread(measure.ratios(theirs[1:], ours[1:]))
    told = f"{1e3 * measure.quantile(theirs[1:], 0.5):.1f} ms and {1e3 * measure.quantile(ours[1:], 0.5):.1f} ms"
    if (high - low) / 2 > MOST_NOISE * middle:
        return f"{told}; the ratio varies from {low:.1f} to {high:.1f}, so other programs disturbed it and none is told"
    return f"{told}, {middle:.2f} times as fast"


def show_times() -> dict[str, dict[int, float]]:
    """Check and time layers; print and return the ratios to torch.nn, by layer and T. A disturbed one is NaN."""
    heading(3, "The time")
    print("Times as fast as torch.nn, B=16 I=128 H=128; each layer is checked against torch.nn in float64 first")
    columns = list(dict.fromkeys(f"{case.cell.upper()} {case.mode}" for case in CASES))
    print(f"{'T':>6}" + "".join(f"{column:>16}" for column in columns) + f"{'error':>10}")
    progress, found, errors = Progress(len(CASES)), {column: {} for column in columns}, []
    for place, case in enumerate(until_late(CASES)):
        column = columns[place % len(columns)]
        progress.show(f"timing {column}, T={case.T}")
        ratio, told, error = time_case(case)
        found[column][case.T] = ratio
        errors.append((told, error))
        progress.done += 1
        if column == columns[-1]:
            row = errors[-len(columns) :]
            line = "".join(f"{told:>16}" for told, _ in row)
            progress.print(f"{case.T:6d}{line}{max(error for _, error in row):10.1e}")
    progress.clear()
    if len(errors) < len(CASES):
        print(f"{len(CASES) - len(errors)} of {len(CASES)} are left out: these took {SECONDS} s already.")
    withheld = sum(told == "disturbed" for told, _ in errors)
    if withheld:
        print(f"{withheld} of {len(errors)} were disturbed by other programs: torch.nn differs from itself by more "
              f"than {MOST_NOISE:.0%}, and no ratio is told.")  # fmt: skip
    return found


def time_case(case: Case) -> tuple[float, str, float]:
    """Return the ratio to torch.nn, NaN where it is disturbed, how to tell it, and the worst error.

    Raises RuntimeError if a result is wrong, with the tensor and its error.
    """
    settings = Settings(seconds=0.15, fewest=3, most=15)
    record = measure.run_case(case, [PEERS[BASELINE], by_backend("auto")], settings, lambda name: None)
    for row in record["rows"]:
        if row["status"] != "ok":
            raise RuntimeError(f"{row['contender']}, {case.id}: {row['status']}, {row['reason']}")
    row = store.ok_rows(record)[OURS]
    if record["noise"] > MOST_NOISE:
        return float("nan"), "disturbed", row["error"]
    ratio = row["ratio"][0]
    return ratio, "even" if store.verdict(row, record["noise"]) == "even" else f"{ratio:.2f}x", row["error"]


def show_own_cell() -> None:
    """Check a declared cell against its eager step, and time it beside a loop."""
    heading(4, "A cell of your own")
    print("\n".join(f"    {line}" for line in own_cell.source().splitlines()))
    print("\nChecking it against its eager step in float64; compiling takes some seconds on the first run.", flush=True)
    print(f"largest relative difference of output and gradients: {max(own_cell.compare().values()):.1e}")
    loop, ours = own_cell.times()
    print(f"One training call, T=64 B=16 H=128, a loop in Python and rnnfast.Recurrent: {compared(loop, ours)}")


@torch.no_grad()
def show_frozen(model: LanguageModel, corpus: Corpus) -> None:
    """Freeze the trained model in int8; print its loss and the bytes of its recurrent weights before and after."""
    heading(5, "A frozen model")
    print('    rnnfast.freeze(model.eval(), weights="int8")\n', flush=True)
    frozen = rnnfast.freeze(copy.deepcopy(model).eval(), weights="int8")
    ((inputs, targets),) = corpus.batches(1, seed=1)
    losses, seconds = [], {name: [] for name in ("float32", "int8")}
    for each in (model, frozen):
        logits, _ = each(inputs)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    one = inputs[:, :1]
    for _ in range(30):
        for name, each in zip(seconds, (model, frozen), strict=True):
            start = time.perf_counter()
            each(one)
            seconds[name].append(time.perf_counter() - start)
    print(f"loss on new text: {losses[0]:.4f} with float32 weights, {losses[1]:.4f} with int8, a quarter of the size")
    print(f"one row, T={STEPS}, float32 and int8: {compared(*seconds.values())}")


def draw(runs: dict[str, Run], ratios: dict[str, dict[int, float]]) -> None:
    """Save the loss curves and the ratios; those that are not told leave a gap."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {BASELINE: {"color": "0.6", "linewidth": 4}, OURS: {"color": "tab:red", "linewidth": 1.2}}
    for name, run in runs.items():
        smooth = [mean(run.losses[max(0, n - 4) : n + 1]) for n in range(len(run.losses))]
        left.plot(range(1, len(smooth) + 1), smooth, label=name, **styles[name])
    left.set(title="Language model: same seed, same batches", xlabel="batch", ylabel="cross-entropy, mean of 5 batches")
    left.legend(frameon=False)
    for column, by_length in ratios.items():
        line = "-" if "inference" in column else "--"
        right.plot(list(by_length), list(by_length.values()), line, marker="o", markersize=3, label=column)
    if any(ratio == ratio for by_length in ratios.values() for ratio in by_length.values()):
        right.set_yscale("log", base=2)
        right.yaxis.set_major_formatter("{x:g}")
    right.axhline(1, color="0.6")
    right.set(title="One layer, B=16 I=H=128", xlabel="sequence length T", ylabel="times as fast as torch.nn")
    right.set_xscale("log", base=2)
    right.set_xlim(CASES[0].T / 1.2, CASES[-1].T * 1.2)
    right.xaxis.set_major_formatter("{x:g}")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
