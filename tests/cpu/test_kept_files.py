"""Machine code on disk in bad circumstances: odd files, full disks, sources replaced under a process, forks."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rnnfast_kernels.cpu.runtime import compiled

KERNELS = Path(compiled.__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this platform")
def test_what_is_no_file_is_not_waited_for_and_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "rnnfast").mkdir()
    os.mkfifo(tmp_path / "rnnfast" / "kernel.bin")
    found = []
    reader = threading.Thread(target=lambda: found.append(compiled.read("kernel.bin")), daemon=True)
    reader.start()
    reader.join(10)
    assert found == [None]
    compiled.write("kernel.bin", b"code")
    assert compiled.read("kernel.bin") == b"code"


def test_no_part_of_a_file_stays_where_the_disk_has_no_room_for_its_last_byte(tmp_path):
    """The last bytes are written when the file is closed."""
    resource = pytest.importorskip("resource", reason="no limits of file sizes on this platform")
    content = bytes(100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) - 1, limits[1]))
    try:
        reason = compiled.write_whole(tmp_path / "kernel.bin", content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in reason
    assert list(tmp_path.iterdir()) == []


REPLACED = """
import sys
from pathlib import Path
from rnnfast_kernels.cpu.runtime import compiled
name = compiled.file_name("gru", "float32", 1)
source = Path(compiled.__file__).parent.parent / "job.py"
source.write_text(source.read_text() + "ANOTHER = 1\\n")
compiled.compile_code = lambda *kind: b"code of the sources of old"
try:
    compiled.kernel("gru", "float32")
except RuntimeError as error:
    assert "have changed on disk" in str(error), error
else:
    raise AssertionError("compiled")
assert compiled.read(name) is None
assert compiled.file_name("gru", "float32", 1) == name
"""


def test_sources_replaced_under_a_process_get_none_of_its_code(tmp_path):
    """An upgrade while Python runs: what is in memory is old, what is on disk new, and the cache is for both."""
    shutil.copytree(KERNELS, tmp_path / KERNELS.name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    done = subprocess.run([sys.executable, "-c", REPLACED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_child_forked_while_another_thread_compiles_has_kernels():
    begun = threading.Event()

    def compile_slowly():
        with compiled.lock:
            begun.set()
            time.sleep(0.3)

    compiler = threading.Thread(target=compile_slowly)
    compiler.start()
    begun.wait()
    child = os.fork()
    if child == 0:
        os._exit(not compiled.lock.acquire(timeout=5))
    compiler.join()
    assert os.waitpid(child, 0)[1] == 0
