"""The Numba kernels' machine code: for other processors, kept on disk, damaged there, and loaded without Numba."""

import hashlib
import platform

import pytest
import torch
from cpu_layers import run_python
from rnnfast_kernels.cpu.runtime import compiled

from rnnfast.backends import cpu


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 processors")
@pytest.mark.parametrize(
    ("processor", "cell"),
    [
        ("avx2", "lstm"),
        pytest.param("avx2", "gru", marks=pytest.mark.long),
        pytest.param("avx2", "rnn_tanh", marks=pytest.mark.long),
        pytest.param("sse", "rnn_tanh", marks=pytest.mark.long),
        pytest.param("sse", "lstm", marks=pytest.mark.long),
        pytest.param("sse", "gru", marks=pytest.mark.long),
    ],
)
def test_other_vector_lengths(processor, cell):
    code = f"""
        import torch
        from cpu_layers import Case
        Case("{cell}", 9, 13, 7, 21, bidirectional=True).check()
        Case("{cell}", 5, 3, 33, 34, lengths=[5, 5, 2], layout="packed").check()
    """
    done = run_python(code, RNNFAST_CPU=processor)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 processors")
@pytest.mark.parametrize(
    ("processor", "dtype"),
    [
        ("sse", "float16"),
        pytest.param("avx2", "bfloat16", marks=pytest.mark.long),
        pytest.param("avx2", "float16", marks=pytest.mark.long),
        pytest.param("sse", "bfloat16", marks=pytest.mark.long),
    ],
)
def test_half_precision_without_products_of_it(processor, dtype):
    code = f"""
        import torch
        from cpu_layers import Case
        from rnnfast.backends import cpu
        if cpu.unsupported("rnn_tanh", torch.device("cpu"), torch.{dtype}):
            print("unsupported")
        else:
            Case("rnn_tanh", 9, 13, 7, 21, dtype=torch.{dtype}, bidirectional=True).check()
            Case("rnn_tanh", 5, 1, 8, 20, dtype=torch.{dtype}).check()
    """
    done = run_python(code, RNNFAST_CPU=processor)
    assert done.returncode == 0, done.stderr
    assert ("unsupported" in done.stdout) == ((processor, dtype) == ("sse", "float16"))


def kept_code() -> tuple[str, bytes]:
    """The name and the machine code of a kernel, compiled here if it has not been yet."""
    cpu.obtain("rnn_relu", torch.float32)
    name = compiled.file_name("rnn_relu", "float32", 1)
    return name, compiled.read(name)


def test_without_a_cache_folder(tmp_path):
    """Kernels are compiled for this process alone, with one warning."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    _, code = kept_code()
    (tmp_path / "code").write_bytes(code)
    code = f"""
        import pathlib, warnings
        from cpu_layers import Case
        from rnnfast_kernels.cpu.runtime import compiled
        compilations = []
        def compile_code(*kind):
            compilations.append(kind)
            return pathlib.Path({str(tmp_path / "code")!r}).read_bytes()
        compiled.compile_code = compile_code
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                Case("rnn_relu", 5, 3, 3, 18).check()
        found = [str(w.message) for w in caught if "NUMBA_CACHE_DIR" in str(w.message)]
        assert len(found) == len(compilations) == 1, (caught, compilations)
    """
    done = run_python(code, NUMBA_CACHE_DIR=str(blocked))
    assert done.returncode == 0, done.stderr


@pytest.fixture
def damaged(tmp_path):
    """A cache file of which a part is absent."""
    name, code = kept_code()
    kept = tmp_path / "rnnfast" / name
    kept.parent.mkdir()
    kept.write_bytes((hashlib.sha256(code).digest() + code)[:1000])
    return kept


def test_a_damaged_cache_file_has_no_content(damaged):
    assert compiled.content_of(damaged) is None


@pytest.mark.long
def test_a_damaged_cache_file_is_compiled_again(damaged, tmp_path):
    done = run_python(
        """
        from cpu_layers import Case
        Case("rnn_relu", 5, 3, 3, 18).check()
        """,
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert compiled.content_of(damaged)


def test_kept_code_runs_without_importing_numba():
    """Once compiled, a kernel needs LLVM alone, so that a first call costs a fraction of a second."""
    cpu.obtain("lstm", torch.float32)
    code = """
        import sys
        from cpu_layers import Case
        from rnnfast.backends import cpu
        import torch
        assert cpu.unsupported("lstm", torch.device("cpu"), torch.float32) is None
        Case("lstm", 5, 3, 3, 18).check()
        assert "numba" not in sys.modules
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
