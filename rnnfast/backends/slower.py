"""Where torch was faster than the CPU kernels (see `measured`), as `python -m benchmarks --facts` found.

By instructions: where and when it was measured; cell, pass, ranges of T, B and H, and torch's time over the kernels'.
"""

Range = tuple[int, int]

MEASURED: dict[str, tuple[str, tuple[tuple[str, str, Range, Range, Range, float], ...]]] = {
    "AVX-512 of Intel": (
        "Intel(R) Xeon(R) Processor, 1 thread, busy machine, torch 2.13.0+cpu, 2026-11-29",
        (
            ("gru", "forward", (1, 1), (3, 8), (321, 505), 0.72),
            ("gru", "forward", (1, 1), (9, 32), (321, 505), 0.83),
            ("gru", "forward", (2, 2), (3, 8), (506, 809), 0.75),
            ("gru", "forward", (3, 8), (1, 2), (321, 505), 0.86),
            ("gru", "training", (1, 1), (1, 2), (321, 505), 0.84),
            ("rnn", "forward", (1, 1), (3, 8), (506, 809), 0.57),
            ("rnn", "forward", (1, 1), (9, 32), (506, 809), 0.77),
            ("rnn", "forward", (2, 2), (3, 8), (506, 809), 0.63),
            ("rnn", "forward", (2, 2), (3, 8), (810, 1295), 0.75),
            ("rnn", "forward", (3, 8), (1, 2), (506, 809), 0.65),
            ("rnn", "training", (1, 1), (1, 2), (506, 809), 0.81),
            ("rnn", "training", (1, 1), (3, 8), (321, 505), 0.76),
            ("rnn", "training", (1, 1), (9, 32), (321, 505), 0.78),
            ("rnn", "training", (2, 2), (3, 8), (506, 809), 0.83),
        ),
    ),
    "AVX2": (
        "Intel(R) Xeon(R) Processor held to AVX2, 1 thread, busy machine, torch 2.13.0+cpu, 2026-11-29",
        (
            ("gru", "forward", (1, 1), (3, 8), (321, 505), 0.77),
            ("gru", "forward", (1, 1), (3, 8), (506, 809), 0.63),
            ("gru", "forward", (1, 1), (9, 32), (506, 809), 0.81),
            ("gru", "forward", (2, 2), (3, 8), (506, 809), 0.71),
            ("gru", "forward", (3, 8), (1, 2), (321, 505), 0.81),
            ("gru", "forward", (3, 8), (1, 2), (506, 809), 0.62),
            ("gru", "training", (1, 1), (3, 8), (321, 505), 0.77),
            ("gru", "training", (1, 1), (9, 32), (321, 505), 0.84),
            ("rnn", "forward", (1, 1), (3, 8), (506, 809), 0.73),
            ("rnn", "forward", (1, 1), (3, 8), (810, 1295), 0.64),
            ("rnn", "forward", (1, 1), (9, 32), (810, 1295), 0.82),
            ("rnn", "forward", (2, 2), (3, 8), (810, 1295), 0.78),
            ("rnn", "forward", (3, 8), (1, 2), (506, 809), 0.68),
            ("rnn", "forward", (3, 8), (1, 2), (810, 1295), 0.68),
            ("rnn", "training", (1, 1), (1, 2), (506, 809), 0.83),
            ("rnn", "training", (1, 1), (3, 8), (321, 505), 0.76),
            ("rnn", "training", (1, 1), (3, 8), (506, 809), 0.67),
            ("rnn", "training", (1, 1), (9, 32), (506, 809), 0.83),
        ),
    ),
}
