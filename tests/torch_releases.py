"""What older releases of torch cannot do at all: tests of it are skipped there, with the release named."""

import pytest
import torch

from rnnfast import _torch


def needs(there: bool, lack: str) -> pytest.MarkDecorator:
    """Skip a test unless `there`. lack: what this torch does not do, as the end of a sentence."""
    return pytest.mark.skipif(not there, reason=f"torch {torch.__version__} {lack}")


needs_onnx_operators = needs(hasattr(torch.onnx, "ops"), "exports no operators of ONNX itself")
needs_saved_data = needs(hasattr(torch._C._autograd.SavedTensor, "data"), "does not show what was saved")
# Without it, training takes the ordinary path: hooks would be passed over.
needs_saving_hooks = needs(_torch.saving_hooks is not _torch.always, "does not tell of hooks on saved tensors")
needs_compiled_autograd = needs(torch.__version__ >= "2.7", "compiles no backward pass that slices by what it computes")
# "Please report a bug to PyTorch", it says.
needs_compiled_jvp = needs(torch.__version__ >= "2.7", "fails an assertion of its own in a graph with forward mode")
needs_exporting = needs(hasattr(torch.compiler, "is_exporting"), "does not tell that a program is being exported")
