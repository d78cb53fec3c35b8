"""Everything that needs a GPU, in one command for a machine that has one and where nothing can be installed.

    PYTHONPATH=.:kernels python3 -m benchmarks.gpu                     the GPU tests, then the benchmark
    PYTHONPATH=.:kernels python3 -m benchmarks.gpu --sizes 1024,16,768,768 --cell lstm --dtype float16

With arguments, which are those of `python -m benchmarks`, only that is measured. Results go as
JSON and PNG to $OUT, by default benchmarks/results/. The exit status is that of the first part that failed.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 540
TESTS = ("tests/test_gpu_numerics.py", "tests/test_gpu_plan.py")


def run(seconds: float, *words: str) -> int:
    """Run a Python module in this interpreter with the repository on its path; 124 where it takes too long."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: {' '.join(words)}", file=sys.stderr)
        return 124


def main(words: list[str]) -> int:
    end = time.monotonic() + SECONDS
    out = os.environ.get("OUT", str(ROOT / "benchmarks" / "results"))
    measure = ("benchmarks", "--device", "cuda", "--out", out)
    if words:
        return run(SECONDS, *measure, *words)
    tested = run(SECONDS * 0.6, "pytest", "-q", "-p", "no:cacheprovider", *TESTS)
    measured = run(end - time.monotonic(), *measure, "--quick")
    return tested or measured


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
