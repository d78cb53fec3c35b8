"""What a user does with rnnfast, each file runnable by itself: `python -m examples.sequence_classifier`."""

import argparse


def options(program: str, doc: str | None, **numbers: tuple[int, str]) -> argparse.Namespace:
    """Read the command line of an example. numbers: by name, the default and what it is."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default, said) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{said} (default {default})")
    return parser.parse_args()
