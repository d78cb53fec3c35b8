"""The inputs, and the wrong inputs, that torch tests its own modules with."""

import pytest
import torch
from torch import nn

import rnnfast

pytest.importorskip("expecttest", reason="torch's test data imports it")
common = pytest.importorskip("torch.testing._internal.common_modules")

# The import of torch's own test data forbids setting backend flags, for the whole process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

F64 = {"dtype": torch.float64}
NAMES = ("RNN", "LSTM", "GRU")


def database(name: str):
    """Return torch's own description of a module's inputs."""
    return next(info for info in common.module_db if info.name in (f"nn.{name}", name))


def call_inputs(name: str, function: str, dtype):
    """Return torch's sample or error inputs of a module."""
    info, device = database(name), torch.get_default_device()
    return getattr(info, function)(info, device=device, dtype=dtype, requires_grad=False, training=True)


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_sample_inputs(name, backend):
    samples = list(call_inputs(name, "module_inputs_func", torch.float64))
    assert samples
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = getattr(nn, name)(*args, **kwargs, **F64)
        ours = getattr(rnnfast, name)(*args, **kwargs, **F64)
        ours.load_state_dict(theirs.state_dict())
        expected = theirs(*sample.forward_input.args, **sample.forward_input.kwargs)
        got = ours(*sample.forward_input.args, **sample.forward_input.kwargs)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [*NAMES, "RNNCell", "LSTMCell", "GRUCell"])
def test_torchs_own_error_inputs(name, backend):
    samples = list(call_inputs(name, "module_error_inputs_func", torch.float32))
    assert samples
    for sample in samples:
        given = sample.module_error_input
        args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
        call = given.forward_input or common.FunctionInput()
        with pytest.raises(sample.error_type, match=sample.error_regex):
            getattr(rnnfast, name)(*args, **kwargs)(*call.args, **call.kwargs)
