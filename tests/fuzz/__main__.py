"""Searches for faults as long as it is told, and prints the smallest script for each that it finds."""

import argparse
import os
import sys
import time
from itertools import count
from pathlib import Path

from tests.fuzz.search import KINDS, search, search_apart

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("--seconds", type=float, default=60, help="how long to search (default 60)")
parser.add_argument(
    "--seed", type=int, default=0, help="where to begin; each check has the seed that it is reported by"
)
parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="what to draw (default all)")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
parser.add_argument("--backend", default="triton" if interpreted else "auto", help="the backend of the layers")
parser.add_argument("--mark", type=Path, help=argparse.SUPPRESS)  # given to the process that does the work
given = parser.parse_args()
if given.mark is None:
    failed = search_apart(given.kinds, given.seed, given.seconds, given.backend)
else:
    failed = search(given.kinds, count(given.seed), time.monotonic() + given.seconds, given.backend, given.mark)
sys.exit(failed > 0)
