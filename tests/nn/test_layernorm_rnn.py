"""The recurrent cells against loops written from the equations in numpy float64, and against their properties."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from evenly.nn import LayerNormGRUCell, LayerNormLSTM, LayerNormLSTMCell, LayerNormRNNCell

IN, HIDDEN, BATCH, STEPS = 5, 6, 3, 7
CELLS = (LayerNormRNNCell, LayerNormLSTMCell, LayerNormGRUCell)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def layer_norm(z, gain, bias, eps, gates=1):
    """LN of one vector, or of equal pieces of it, with plain loops over the pieces."""
    pieces = []
    for piece in np.split(z, gates):
        mean = sum(piece) / len(piece)
        variance = sum((value - mean) ** 2 for value in piece) / len(piece)
        pieces.append((piece - mean) / np.sqrt(variance + eps))
    return gain * np.concatenate(pieces) + bias


def rnn_step(p, x, h, eps, gates):
    summed = p["weight_hh"] @ h + p["weight_ih"] @ x
    return np.tanh(layer_norm(summed, p["norm.weight"], p["norm.bias"], eps))


def lstm_step(p, x, h, c, eps, gates):
    summed = (
        layer_norm(p["weight_hh"] @ h, p["norm_hh.weight"], p["norm_hh.bias"], eps, gates)
        + layer_norm(p["weight_ih"] @ x, p["norm_ih.weight"], p["norm_ih.bias"], eps, gates)
        + p["bias"]
    )
    i, f, g, o = np.split(summed, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(layer_norm(c, p["norm_c.weight"], p["norm_c.bias"], eps)), c


def gru_step(p, x, h, eps, gates):
    n = len(h)
    w_gates, w_new = p["weight_ih"][: 2 * n], p["weight_ih"][2 * n :]
    u_gates, u_new = p["weight_hh"][: 2 * n], p["weight_hh"][2 * n :]
    summed = layer_norm(u_gates @ h, p["norm_hh.weight"], p["norm_hh.bias"], eps, gates) + layer_norm(
        w_gates @ x, p["norm_ih.weight"], p["norm_ih.bias"], eps, gates
    )
    r, z = np.split(summed, 2)
    new = np.tanh(
        layer_norm(w_new @ x, p["norm_in.weight"], p["norm_in.bias"], eps)
        + sigmoid(r) * layer_norm(u_new @ h, p["norm_hn.weight"], p["norm_hn.bias"], eps)
    )
    return (1 - sigmoid(z)) * h + sigmoid(z) * new


def scramble(module):
    """Gains and biases away from 1 and 0, so that leaving one out shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def parameters(module):
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_lstm_cell_is_the_equations(per_gate, eps):
    cell = scramble(LayerNormLSTMCell(IN, HIDDEN, eps, per_gate, dtype=torch.float64))
    x, h, c = torch.randn(BATCH, IN).double(), torch.randn(BATCH, HIDDEN).double(), torch.randn(BATCH, HIDDEN).double()
    got_h, got_c = cell(x, (h, c))
    for row in range(BATCH):
        want = lstm_step(parameters(cell), x[row].numpy(), h[row].numpy(), c[row].numpy(), eps, 4 if per_gate else 1)
        np.testing.assert_allclose(got_h[row].detach(), want[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(got_c[row].detach(), want[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_gate", [False, True])
def test_gru_cell_is_the_equations(per_gate):
    cell = scramble(LayerNormGRUCell(IN, HIDDEN, 1e-3, per_gate, dtype=torch.float64))
    x, h = torch.randn(BATCH, IN).double(), torch.randn(BATCH, HIDDEN).double()
    got = cell(x, h)
    for row in range(BATCH):
        want = gru_step(parameters(cell), x[row].numpy(), h[row].numpy(), 1e-3, 2 if per_gate else 1)
        np.testing.assert_allclose(got[row].detach(), want, rtol=0, atol=1e-12)


def test_rnn_cell_is_the_equations():
    cell = scramble(LayerNormRNNCell(IN, HIDDEN, 1e-3, dtype=torch.float64))
    x, h = torch.randn(BATCH, IN).double(), torch.randn(BATCH, HIDDEN).double()
    got = cell(x, h)
    for row in range(BATCH):
        want = rnn_step(parameters(cell), x[row].numpy(), h[row].numpy(), 1e-3, 1)
        np.testing.assert_allclose(got[row].detach(), want, rtol=0, atol=1e-12)
    relu = LayerNormRNNCell(IN, HIDDEN, nonlinearity="relu")
    assert relu(torch.randn(BATCH, IN)).min() == 0


def test_per_gate_differs_from_the_paper():
    torch.manual_seed(1)
    whole = LayerNormLSTMCell(IN, HIDDEN)
    split = LayerNormLSTMCell(IN, HIDDEN, per_gate=True)
    split.load_state_dict(whole.state_dict())
    x, state = torch.randn(BATCH, IN), (torch.randn(BATCH, HIDDEN), torch.randn(BATCH, HIDDEN))
    assert (whole(x, state)[0] - split(x, state)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("cell_type", CELLS)
def test_state_defaults_to_zeros_and_one_sample_needs_no_batch(cell_type):
    cell = scramble(cell_type(IN, HIDDEN))
    x = torch.randn(BATCH, IN)
    zeros = torch.zeros(BATCH, HIDDEN)
    state = (zeros, zeros) if cell_type is LayerNormLSTMCell else zeros
    torch.testing.assert_close(cell(x), cell(x, state))
    single = cell(x[1])
    batched = cell(x)
    if cell_type is LayerNormLSTMCell:
        single, batched = single[0], batched[0]
    torch.testing.assert_close(single, batched[1])


@pytest.mark.parametrize("cell_type", CELLS)
def test_batch_composition_and_mode_do_not_matter(cell_type):
    cell = scramble(cell_type(IN, HIDDEN, dtype=torch.float64))
    x = torch.randn(BATCH, IN).double()
    everyone = cell(x)
    alone = cell.eval()(x[:1])
    if cell_type is LayerNormLSTMCell:
        everyone, alone = everyone[0], alone[0]
    torch.testing.assert_close(everyone[:1], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell_type", CELLS)
def test_scaling_a_weight_matrix_changes_nothing(cell_type):
    # Each matrix has an LN of its own in the LSTM and GRU; in the RNN both feed one LN and must scale together.
    cell = scramble(cell_type(IN, HIDDEN, 0.0, dtype=torch.float64))
    x = torch.randn(BATCH, IN).double()
    state = torch.randn(BATCH, HIDDEN).double()
    given = (state, state) if cell_type is LayerNormLSTMCell else state
    scaled = copy.deepcopy(cell)
    with torch.no_grad():
        scaled.weight_hh.mul_(3.0)
        scaled.weight_ih.mul_(3.0 if cell_type is LayerNormRNNCell else 0.5)
    torch.testing.assert_close(scaled(x, given), cell(x, given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell_type", CELLS)
def test_gradcheck(cell_type):
    cell = scramble(cell_type(3, 4, dtype=torch.float64))
    x = torch.randn(2, 3).double().requires_grad_()
    h = torch.randn(2, 4).double().requires_grad_()
    names = [name for name, _ in cell.named_parameters()]

    def run(x, h, *values):
        state = (h, 0.5 * h) if cell_type is LayerNormLSTMCell else h
        return torch.func.functional_call(cell, dict(zip(names, values, strict=True)), (x, state))

    assert torch.autograd.gradcheck(run, (x, h, *cell.parameters()))


def unroll(lstm, x, state=None, layer=0, reverse=False):
    cell = lstm.cells[layer]
    outputs = []
    for step in reversed(x) if reverse else x:
        state = cell(step, state)
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs), state


@pytest.mark.parametrize("per_gate", [False, True])
def test_lstm_is_its_cell_step_by_step(per_gate):
    lstm = scramble(LayerNormLSTM(IN, HIDDEN, per_gate=per_gate, dtype=torch.float64))
    x = torch.randn(STEPS, BATCH, IN).double()
    h, c = torch.randn(1, BATCH, HIDDEN).double(), torch.randn(1, BATCH, HIDDEN).double()
    output, (last_h, last_c) = lstm(x, (h, c))
    want, (want_h, want_c) = unroll(lstm, x, (h[0], c[0]))
    torch.testing.assert_close(output, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(last_h[0], want_h, rtol=0, atol=1e-12)
    torch.testing.assert_close(last_c[0], want_c, rtol=0, atol=1e-12)
    one, two = (torch.autograd.grad(y.square().sum(), list(lstm.parameters())) for y in (output, want))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_lstm_against_the_numpy_loop_over_time():
    lstm = scramble(LayerNormLSTM(IN, HIDDEN, dtype=torch.float64))
    x = torch.randn(STEPS, BATCH, IN).double()
    output, _ = lstm(x)
    for row in range(BATCH):
        h, c = np.zeros(HIDDEN), np.zeros(HIDDEN)
        for step in range(STEPS):
            h, c = lstm_step(parameters(lstm.cells[0]), x[step, row].numpy(), h, c, 1e-5, 1)
            np.testing.assert_allclose(output[step, row].detach(), h, rtol=0, atol=1e-12)


def test_layers_and_directions():
    lstm = scramble(LayerNormLSTM(IN, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64))
    x = torch.randn(STEPS, BATCH, IN).double()
    output, (h, c) = lstm(x)
    inputs, place = x, 0
    for _ in range(2):
        forward, state_f = unroll(lstm, inputs, layer=place)
        backward, state_b = unroll(lstm, inputs, layer=place + 1, reverse=True)
        for shift, state in enumerate((state_f, state_b)):
            torch.testing.assert_close(h[place + shift], state[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(c[place + shift], state[1], rtol=0, atol=1e-12)
        inputs, place = torch.cat([forward, backward], -1), place + 2
    torch.testing.assert_close(output, inputs, rtol=0, atol=1e-12)


def test_shapes_are_those_of_torch_lstm():
    for options in ({}, {"batch_first": True}, {"num_layers": 3, "bidirectional": True, "batch_first": True}):
        ours, theirs = LayerNormLSTM(IN, HIDDEN, **options), nn.LSTM(IN, HIDDEN, **options)
        for x in (torch.randn(STEPS, BATCH, IN), torch.randn(STEPS, IN)):
            (a, (h, c)), (b, (h_, c_)) = ours(x), theirs(x)
            assert (a.shape, h.shape, c.shape) == (b.shape, h_.shape, c_.shape)


def test_batch_first_is_a_transpose():
    lstm = LayerNormLSTM(IN, HIDDEN)
    first = LayerNormLSTM(IN, HIDDEN, batch_first=True)
    first.load_state_dict(lstm.state_dict())
    x = torch.randn(STEPS, BATCH, IN)
    torch.testing.assert_close(first(x.transpose(0, 1))[0].transpose(0, 1), lstm(x)[0])


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_are_each_sequence_alone(enforce_sorted):
    lstm = scramble(LayerNormLSTM(IN, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64))
    lengths = [6, 4, 1] if enforce_sorted else [2, 6, 4]
    sequences = [torch.randn(length, IN).double() for length in lengths]
    state = torch.randn(2, 4, 3, HIDDEN).double().unbind(0)
    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    output, (h, c) = lstm(packed, state)
    assert isinstance(output, PackedSequence)
    padded, out_lengths = pad_packed_sequence(output)
    assert out_lengths.tolist() == lengths
    for row, sequence in enumerate(sequences):
        want, (want_h, want_c) = lstm(sequence, (state[0][:, row], state[1][:, row]))
        torch.testing.assert_close(padded[: lengths[row], row], want, rtol=0, atol=1e-12)
        torch.testing.assert_close(h[:, row], want_h, rtol=0, atol=1e-12)
        torch.testing.assert_close(c[:, row], want_c, rtol=0, atol=1e-12)


def test_padding_of_a_packed_batch_gets_no_gradient():
    lstm = LayerNormLSTM(IN, HIDDEN, bidirectional=True)
    x = torch.randn(STEPS, 2, IN, requires_grad=True)
    output, _ = lstm(pack_padded_sequence(x, [STEPS, 2]))
    output.data.square().sum().backward()
    assert x.grad[2:, 1].abs().max() == 0
    assert x.grad[:2, 1].abs().min() > 0


def test_dropout_only_between_layers_and_only_in_training():
    lstm = LayerNormLSTM(IN, HIDDEN, num_layers=2, dropout=0.5)
    plain = LayerNormLSTM(IN, HIDDEN, num_layers=2)
    plain.load_state_dict(lstm.state_dict())
    x = torch.randn(STEPS, BATCH, IN)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    torch.testing.assert_close(lstm.eval()(x)[0], plain(x)[0])
    lstm.train()
    torch.testing.assert_close(lstm(x)[1][0][0], plain(x)[1][0][0])  # the first layer's own state sees no dropout
    assert (lstm(x)[0] != 0).all()  # nor does the output


def test_weights_of_torch_lstm_fit():
    ours, theirs = LayerNormLSTMCell(IN, HIDDEN), nn.LSTMCell(IN, HIDDEN)
    missing, unexpected = ours.load_state_dict(
        {"weight_ih": theirs.weight_ih, "weight_hh": theirs.weight_hh}, strict=False
    )
    assert not unexpected
    assert "weight_ih" not in missing
    # With LN turned into the identity by hand, the cell is torch's: the gate order is the same.
    x, state = torch.randn(BATCH, IN), (torch.randn(BATCH, HIDDEN), torch.randn(BATCH, HIDDEN))
    for norm in (ours.norm_ih, ours.norm_hh, ours.norm_c):
        norm.forward = lambda z, residual=None, shift=None: (
            z + (residual if residual is not None else 0) + (shift if shift is not None else 0)
        )
    with torch.no_grad():
        ours.bias.copy_(theirs.bias_ih + theirs.bias_hh)
    torch.testing.assert_close(ours(x, state), theirs(x, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    lstm = LayerNormLSTM(IN, HIDDEN, num_layers=2, dtype=dtype)
    output, (h, c) = lstm(torch.randn(STEPS, BATCH, IN, dtype=dtype))
    assert output.dtype == h.dtype == c.dtype == dtype


def test_autocast_trains():
    lstm = LayerNormLSTM(IN, HIDDEN, num_layers=2, bidirectional=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = lstm(torch.randn(STEPS, BATCH, IN))
        loss = output.float().square().mean()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in lstm.parameters())


def test_state_dict_and_deepcopy():
    lstm = scramble(LayerNormLSTM(IN, HIDDEN, num_layers=2, bidirectional=True))
    other = LayerNormLSTM(IN, HIDDEN, num_layers=2, bidirectional=True)
    other.load_state_dict(lstm.state_dict())
    x = torch.randn(STEPS, BATCH, IN)
    torch.testing.assert_close(other(x)[0], lstm(x)[0])
    torch.testing.assert_close(copy.deepcopy(lstm)(x)[0], lstm(x)[0])
    lstm.reset_parameters()
    assert (lstm.cells[3].norm_hh.weight == 1).all()
    assert (lstm.cells[3].bias == 0).all()
    assert lstm.cells[3].weight_hh.abs().max() <= HIDDEN**-0.5


@pytest.mark.parametrize("cell_type", CELLS)
def test_wrong_arguments_are_refused(cell_type):
    with pytest.raises(ValueError, match="hidden_size is 0"):
        cell_type(IN, 0)
    with pytest.raises(ValueError, match="eps is -1"):
        cell_type(IN, HIDDEN, eps=-1)
    cell = cell_type(IN, HIDDEN)
    with pytest.raises(ValueError, match=f"input with {IN} features"):
        cell(torch.randn(BATCH, IN + 1))
    with pytest.raises(ValueError, match="one time step"):
        cell(torch.randn(STEPS, BATCH, IN))
    bad = torch.zeros(BATCH + 1, HIDDEN)
    with pytest.raises(ValueError, match=r"state of shape \(3, 6\)"):
        cell(torch.randn(BATCH, IN), (bad, bad) if cell_type is LayerNormLSTMCell else bad)


def test_wrong_arguments_of_the_lstm_are_refused():
    with pytest.raises(ValueError, match="num_layers is 0"):
        LayerNormLSTM(IN, HIDDEN, num_layers=0)
    with pytest.raises(ValueError, match=r"dropout is 1\.5"):
        LayerNormLSTM(IN, HIDDEN, num_layers=2, dropout=1.5)
    with pytest.raises(ValueError, match="with one layer"):
        LayerNormLSTM(IN, HIDDEN, dropout=0.1)
    lstm = LayerNormLSTM(IN, HIDDEN)
    with pytest.raises(ValueError, match=r"got a shape of \(1, 7, 3, 5\)"):
        lstm(torch.randn(1, STEPS, BATCH, IN))
    with pytest.raises(ValueError, match="empty sequence"):
        lstm(torch.randn(0, BATCH, IN))
    with pytest.raises(ValueError, match=r"state h of shape \(1, 3, 6\)"):
        lstm(torch.randn(STEPS, BATCH, IN), (torch.zeros(1, 2, HIDDEN), torch.zeros(1, 3, HIDDEN)))
    with pytest.raises(ValueError, match="nonlinearity is 'gelu'"):
        LayerNormRNNCell(IN, HIDDEN, nonlinearity="gelu")


def test_empty_batch():
    output, (h, _) = LayerNormLSTM(IN, HIDDEN)(torch.randn(STEPS, 0, IN))
    assert output.shape == (STEPS, 0, HIDDEN)
    assert h.shape == (1, 0, HIDDEN)
