"""No kernel reads or writes beyond a tensor's end: what it is given ends where pages begin that nobody may touch."""

import ctypes
import mmap

import pytest
import torch
from cpu_layers import run_python

import rnnfast

if not hasattr(mmap, "MAP_ANONYMOUS"):
    pytest.skip("needs POSIX memory maps", allow_module_level=True)

MODULES = {"rnn": rnnfast.RNN, "lstm": rnnfast.LSTM, "gru": rnnfast.GRU}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Steps, batch, inputs, hidden, directions.
SIZES = [(3, 1, 5, 7, 1), (3, 4, 5, 7, 1), (2, 9, 6, 8, 1), (4, 7, 33, 17, 2), (1, 2, 3, 40, 1), (5, 13, 31, 65, 1)]


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to where the next byte belongs to a page without access."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, room + mmap.PAGESIZE, access, kind, -1, 0)
    assert libc.mprotect(start + room, mmap.PAGESIZE, 0) == 0
    memory = (ctypes.c_char * size).from_address(start + room - size)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def run_at_the_end(cell: str, dtype: torch.dtype) -> None:
    """Train, differentiate twice and infer with every tensor at the end of its pages."""
    for steps, batch, inputs, hidden, directions in SIZES:
        module = MODULES[cell](inputs, hidden, bidirectional=directions == 2, dtype=dtype)
        for parameter in module.parameters():
            parameter.data = at_the_end(parameter)
        shapes = [(steps, batch, inputs), *[(directions, batch, hidden)] * (1 + (cell == "lstm"))]
        x, *hx = (at_the_end(torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes)
        states = tuple(hx) if cell == "lstm" else hx[0]
        output, _ = module(x, states)
        leaves = (x, *hx, *module.parameters())
        gradients = torch.autograd.grad(output, leaves, at_the_end(torch.randn_like(output)), create_graph=True)
        changes = [at_the_end(torch.randn_like(gradient)) for gradient in gradients]
        torch.autograd.grad(gradients, leaves, changes)
        with torch.no_grad():
            for _ in range(3):
                module(x, states)


def test_the_pages_are_guarded():
    """Otherwise the tests below could not fail."""
    done = run_python("""
        import ctypes, torch
        from test_cpu_bounds import at_the_end
        tensor = at_the_end(torch.zeros(5))
        ctypes.string_at(tensor.data_ptr(), 21)
    """)
    assert done.returncode < 0


@pytest.mark.parametrize("cell", MODULES)
def test_nothing_beyond_a_tensor_is_touched(cell):
    done = run_python(f"""
        from test_cpu_bounds import DTYPES, run_at_the_end
        for dtype in DTYPES:
            run_at_the_end("{cell}", dtype)
    """)
    assert done.returncode == 0, done.stderr
