"""Results are the caller's own: none shares memory with an argument or with another result."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnfast

LAYERS = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU}
FORMS = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([2, 3])},
    "no rows": {"lengths": torch.tensor([0, 0])},
    "states": {"all_states": True},
    "states and lengths": {"all_states": True, "lengths": torch.tensor([3, 2])},
    "packed": {},
    "packed states": {"all_states": True},
}


def tensors(result) -> list[torch.Tensor]:
    """List the tensors of nested results and arguments."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = [result.data] if isinstance(result, PackedSequence) else result
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize(
    ("form", "backend"), [(f, b) for f in FORMS for b in ("auto", "torch") if b == "auto" or "states" not in f]
)
@pytest.mark.parametrize("name", LAYERS)
def test_no_two_results_share_memory(name, form, backend):
    x = pack_sequence([torch.randn(3, 3)] * 2) if "packed" in form else torch.randn(3, 2, 3)
    for layer in (LAYERS[name](3, 4), LAYERS[name](3, 4, 2, bidirectional=True)):
        state = torch.randn(layer.num_layers * (1 + layer.bidirectional), 2, 4)
        for hx in (None, (state, state.clone()) if name == "lstm" else state):
            for call in range(5):
                with torch.set_grad_enabled(call > 1), rnnfast.use_backend(backend):
                    results = tensors(layer(x, hx, **FORMS[form]))
                given = [*tensors([x, hx] if hx is not None else [x]), *layer.parameters()]
                places = [t.untyped_storage().data_ptr() for t in (*results, *given)]
                assert len(set(places)) == len(places)
