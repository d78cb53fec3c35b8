"""`python -m benchmarks`: measure, store, draw, or compare what is stored. See --help.

Exit status: 0 done; 1 a regression, or a contender of ours wrong or crashed; 2 bad input; 130 interrupted.
"""

import os
import sys

from benchmarks import options


def main(words: list[str] | None = None) -> int:
    arguments = options.parser().parse_args(words)
    try:
        return dispatch(arguments)
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


def dispatch(arguments) -> int:
    if arguments.compare:
        from benchmarks import compare

        return compare.show(*arguments.compare)
    check_machine(arguments)
    if arguments.facts:
        arguments.backend, arguments.peer = "numba", "torch"
    asked = options.asked(arguments)
    if arguments.list:
        show(asked, arguments)
        return 0
    limit_cores(arguments.threads)
    os.environ.update(options.PROCESSORS[arguments.processor])
    from benchmarks import session

    return session.run(asked, arguments)


def check_machine(arguments) -> None:
    """Raises ValueError where the device is not here or the threads are more than the cores."""
    options.choose("device", arguments.device, options.DEVICES)
    options.choose("processor", arguments.processor, options.PROCESSORS)
    cores = options.usable_cores()
    if not 1 <= arguments.threads <= cores:
        raise ValueError(f"threads must be 1 to {cores}, the cores of this machine; got {arguments.threads}")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("device 'cuda' is not on this machine; choose from cpu")


def show(asked, arguments) -> None:
    for question in asked:
        print(f"{question.name}: {question.title}")
        for contender in options.contenders(question, arguments):
            missing = contender.missing(arguments.device)
            print(f"    by {contender.name}" + (f" (skipped, {missing})" if missing else ""))
        for case in question.cases:
            print(f"  {case.id}")


def limit_cores(threads: int) -> None:
    """Give this process and its children as many cores as threads, so that every contender's pool has the same size."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


if __name__ == "__main__":
    sys.exit(main())
