"""Published cells, each a function of a few lines, for `rnnfast.Recurrent`.

layer = rnnfast.Recurrent(rnnfast.cells.peephole_lstm, 64, 128)
"""

import torch

from rnnfast.declare import cell, surrogate


@cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole_lstm(x, u, state, p):
    """LSTM whose gates see the cell state (Gers and Schmidhuber, 2000)."""
    c = state[1]
    i = torch.sigmoid(x.i + u.i + p.p_i * c)
    f = torch.sigmoid(x.f + u.f + p.p_f * c)
    c = f * c + i * torch.tanh(x.g + u.g)
    o = torch.sigmoid(x.o + u.o + p.p_o * c)
    return o * torch.tanh(c), c


@cell(gates="f g o", states="h c")
def coupled_lstm(x, u, state):
    """LSTM whose input gate is 1 - f (Greff et al., 2015, "LSTM: A Search Space Odyssey", CIFG)."""
    f = torch.sigmoid(x.f + u.f)
    c = f * state[1] + (1 - f) * torch.tanh(x.g + u.g)
    return torch.sigmoid(x.o + u.o) * torch.tanh(c), c


@cell(gates="i f g o", states="h c", signals="keep_h keep_c drop_g")
def zoneout_lstm(x, u, state, s):
    """LSTM with zoneout (Krueger et al., 2016) and recurrent dropout (Semeniuta et al., 2016), by signals.

    keep_h, keep_c: 1 where a state stays as it was, else 0; in evaluation their probabilities. drop_g: the mask that
    multiplies the candidate; 1 in evaluation.
    """
    h, c = state
    i, f, o = torch.sigmoid(x.i + u.i), torch.sigmoid(x.f + u.f), torch.sigmoid(x.o + u.o)
    c_new = f * c + i * torch.tanh(x.g + u.g) * s.drop_g
    h_new = o * torch.tanh(c_new)
    return h_new + s.keep_h * (h - h_new), c_new + s.keep_c * (c - c_new)


@cell(gates="z a")
def li_gru(x, u, state):
    """Light GRU, without a reset gate and with a rectifier (Ravanelli et al., 2018, equation 5)."""
    z = torch.sigmoid(x.z + u.z)
    return z * state[0] + (1 - z) * torch.relu(x.a + u.a)


@cell(gates="f g", states="c")
def janet(x, u, state):
    """LSTM with the forget gate alone (van der Westhuizen and Lasenby, 2018, equation 4, beta = 1)."""
    s = x.f + u.f
    return torch.sigmoid(s) * state[0] + (1 - torch.sigmoid(s - 1)) * torch.tanh(x.g + u.g)


@cell(gates="c g")
def ugrnn(x, u, state):
    """Update gate RNN (Collins et al., 2017, section 2.1)."""
    g = torch.sigmoid(x.g + u.g)
    return g * state[0] + (1 - g) * torch.tanh(x.c + u.c)


@cell(gates="f n")
def minimal_gated_unit(x, u, state):
    """MGU in the form that takes one product (Zhou et al., 2016, the gate after the product, as in torch's GRU)."""
    f = torch.sigmoid(x.f + u.f)
    return state[0] + f * (torch.tanh(x.n + f * u.n) - state[0])


@cell(gates="h")
def antisymmetric_rnn(x, u, state):
    """Antisymmetric RNN, step 0.1, diffusion 0.1 (Chang et al., 2019, equation 10).

    Its recurrent weights are W - W^T: register that as a parametrization of `weight_hh_l0`.
    """
    return state[0] + 0.1 * torch.tanh(x.h + u.h - 0.1 * state[0])


@cell(gates="a", recurrent="", parameters="w")
def indrnn(x, state, p):
    """Independently recurrent network (Li et al., 2018, equation 2)."""
    return torch.relu(x.a + p.w * state[0])


@cell(gates="z f r", states="h c", recurrent="", parameters="v_f v_r")
def sru(x, state, p):
    """Simple recurrent unit without its highway connection (Lei et al., 2018, equations 1 to 4)."""
    c = state[1]
    f = torch.sigmoid(x.f + p.v_f * c)
    r = torch.sigmoid(x.r + p.v_r * c)
    c = f * c + (1 - f) * x.z
    return r * c, c


@cell(gates="z h", recurrent="")
def min_gru(x, state):
    """Minimal GRU (Feng et al., 2024, "Were RNNs All We Needed?", section 3.1)."""
    z = torch.sigmoid(x.z)
    return (1 - z) * state[0] + z * x.h


@cell(gates="h")
def leaky_rnn(x, u, state):
    """Leaky rate network with alpha = dt / tau = 0.2 (Song et al., 2016, equation 14)."""
    return 0.8 * state[0] + 0.2 * torch.relu(x.h + u.h)


@cell(gates="h", parameters="leak")
def leaky_rnn_learned(x, u, state, p):
    """Leaky rate network with a learned leak for each unit."""
    alpha = torch.sigmoid(p.leak)
    return state[0] + alpha * (torch.tanh(x.h + u.h) - state[0])


@cell(gates="i f z o", states="h c n m")
def slstm(x, u, state):
    """sLSTM of xLSTM with a dense recurrent matrix (Beck et al., 2024, equations 8 to 17)."""
    _, c, n, m = state
    log_i = x.i + u.i
    log_f = torch.nn.functional.logsigmoid(x.f + u.f) + m
    m = torch.maximum(log_i, log_f)
    i, f = torch.exp(log_i - m), torch.exp(log_f - m)
    c = f * c + i * torch.tanh(x.z + u.z)
    n = f * n + i
    return torch.sigmoid(x.o + u.o) * c / n, c, n, m


@cell(gates="v", states="s v", parameters="beta")
def recurrent_lif(x, u, state, p):
    """Recurrent leaky integrate-and-fire neuron, threshold 1, reset by subtraction (Neftci et al., 2019, section 2).

    The spike's gradient is that of the fast sigmoid (Zenke and Ganguli, 2018).
    """
    spike, v = state
    v = torch.sigmoid(p.beta) * v + x.v + u.v - spike.detach()
    return surrogate(v - 1, lambda z: 1 / (1 + 10 * z.abs()) ** 2), v


@cell(gates="r z n", signals="attention")
def augru(x, u, state, s):
    """GRU whose update gate is scaled by an attention score (Zhou et al., 2019, "DIEN", equations 16 and 17)."""
    r = torch.sigmoid(x.r + u.r)
    z = s.attention * torch.sigmoid(x.z + u.z)
    n = torch.tanh(x.n + r * u.n)
    return (1 - z) * state[0] + z * n


@cell(gates="r z n", states="h", signals="decay")
def decayed_gru(x, u, state, s):
    """GRU whose state decays between irregular steps, by a factor given as a signal.

    The decay acts on the direct path; in GRU-D (Che et al., 2018, equation 11) the product takes it, too.
    """
    h = s.decay * state[0]
    r = torch.sigmoid(x.r + u.r)
    z = torch.sigmoid(x.z + u.z)
    n = torch.tanh(x.n + r * u.n)
    return n + z * (h - n)


@cell(gates="f g o", states="h c", signals="i")
def entity_aware_lstm(x, u, state, s):
    """LSTM whose input gate is computed from static attributes, given as a signal (Kratzert et al., 2019)."""
    f = torch.sigmoid(x.f + u.f)
    c = f * state[1] + s.i * torch.tanh(x.g + u.g)
    return torch.sigmoid(x.o + u.o) * torch.tanh(c), c
