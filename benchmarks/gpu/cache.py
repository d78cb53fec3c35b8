"""Kernels that were compiled where there is no GPU, found by Triton on the machine that has one.

Triton keeps a compiled kernel under a hash of the kernel, its options and its own build. The build differs between two
Pythons although the same release writes the same code; so for kernels that travel its part of the hash is the release's
number, on both sides. Files of the cache name each other by absolute paths, which are set anew where they are unpacked.
A kernel that is not found is compiled, as ever.
"""

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "gpu" / "kernels"
ARCHIVE = ROOT / "build" / "gpu" / "kernels.tar.gz"
# In the environment of processes that are to look for them: the release of Triton that compiled the kernels.
RELEASE = "RNNFAST_KERNELS_OF_TRITON"
# What compilation leaves on its way to machine code.
PASSING = {".source", ".ttir", ".ttgir", ".llir", ".ptx"}


def pin() -> bool:
    """Leave Triton's build out of its hashes where it is the release that is asked for; say whether it is."""
    from triton import __version__
    from triton.runtime import cache

    if os.environ.get(RELEASE) != __version__ or not hasattr(cache, "triton_key"):
        return False
    cache.triton_key = lambda: __version__
    return True


def environment(release: str | None) -> dict[str, str]:
    """What processes need in their environment to find the kernels."""
    return {} if release is None else {RELEASE: release, "TRITON_CACHE_DIR": str(FOLDER)}


def pack(release: str, archive: Path = ARCHIVE, folder: Path = FOLDER) -> int:
    """Put the kernels into the archive, without what only compilation wants; return how many there are."""
    for path in list(folder.rglob("*")):
        if path.suffix in PASSING or path.suffix == ".so" or path.name.endswith(".so.1"):
            path.unlink()
    name_groups(folder)
    (folder / "unpacked").unlink(missing_ok=True)
    (folder / "release").write_text(release)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, ".")
    return sum(1 for _ in folder.rglob("*.cubin"))


def name_groups(folder: Path) -> None:
    """Name the files of each group that are there by where they are: Triton finds a kernel if it finds all of these."""
    for path in folder.rglob("__grp__*"):
        files = {name: path.parent / name for name in json.loads(path.read_text())["child_paths"]}
        there = {name: str(file) for name, file in files.items() if file.exists()}
        path.write_text(json.dumps({"child_paths": there}))


def unpack(archive: Path = ARCHIVE, folder: Path = FOLDER) -> str | None:
    """Lay the kernels where they are looked for; return the release that compiled them, or None without any.

    Those of the same archive that are there stay, and with them what was compiled since.
    """
    if not archive.exists():
        return None
    stamp = folder / "unpacked"
    try:
        origin = hashlib.sha256(archive.read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text() == origin:
            return (folder / "release").read_text()
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        name_groups(folder)
        stamp.write_text(origin)
        return (folder / "release").read_text()
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        return None


def pytest_sessionstart() -> None:
    """As a plugin of pytest, where kernels are compiled to travel: tests compile theirs, and run none of them."""
    if os.environ.get("STANDS_IN") == "fill":
        import compiled_kernels

        from benchmarks.gpu.layers import standing_in

        compiled_kernels.compiled_for = lambda target: standing_in()


# As a plugin of pytest, and in the processes of the stages.
if RELEASE in os.environ:
    pin()
