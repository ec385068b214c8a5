r"""Recurrent cells with layer normalization, and a multi-layer LSTM built of them.

The statistics of layer normalization come from one sample at one time step, so that a recurrent network can use
them: nothing depends on the batch, on the length of the sequence, or on whether the network trains. They keep the
hidden state in one range however long the sequence is. Use them where a plain LSTM trains slowly; where a
Transformer serves, there is :class:`evenly.nn.LayerNorm` itself.

With :math:`\mathrm{LN}(z; α, β) = α ⊙ (z - μ)/\sqrt{σ^2 + ε} + β` over the whole vector :math:`z` (biased variance):

.. math::
    \text{RNN:}\quad & h_t = f(\mathrm{LN}(W_h h_{t-1} + W_x x_t; α, β)) \\
    \text{LSTM:}\quad & (\hat f, \hat ı, \hat o, \hat g) =
        \mathrm{LN}(W_h h_{t-1}; α_1, β_1) + \mathrm{LN}(W_x x_t; α_2, β_2) + b \\
    & c_t = σ(\hat f) ⊙ c_{t-1} + σ(\hat ı) ⊙ \tanh \hat g, \quad
      h_t = σ(\hat o) ⊙ \tanh(\mathrm{LN}(c_t; α_3, β_3)) \\
    \text{GRU:}\quad & (\hat z, \hat r) = \mathrm{LN}(W_h h_{t-1}; α_1, β_1) + \mathrm{LN}(W_x x_t; α_2, β_2) \\
    & \hat h = \tanh(\mathrm{LN}(W x_t; α_3, β_3) + σ(\hat r) ⊙ \mathrm{LN}(U h_{t-1}; α_4, β_4)), \quad
      h_t = (1 - σ(\hat z)) ⊙ h_{t-1} + σ(\hat z) ⊙ \hat h

Each LN of the gates runs over their concatenation, as in the paper. Many libraries normalize each gate by itself
instead; ``per_gate=True`` does that.

Reference: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016, arXiv 1607.06450, section 3.1
(equation 4, the RNN) and the appendix (equations 20 to 22, the LSTM; 26 to 28, the GRU).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from evenly.core import normalize

__all__ = ["LayerNormGRUCell", "LayerNormLSTM", "LayerNormLSTMCell", "LayerNormRNNCell"]


class LayerNormRNNCell(nn.Module):
    """One step of a vanilla recurrent network with layer normalization.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450, equation 4.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        eps: added to the variance.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.

    Shape:
        ``forward(x, state=None) -> state``: x is (N, input_size) or (input_size,), state (N, hidden_size) or
        (hidden_size,), zeros where it is not given.

    Raises:
        ValueError: a size that is not positive, a negative eps, an unknown nonlinearity, or at the call another
            shape than expected.

    >>> import torch
    >>> from evenly.nn import LayerNormRNNCell
    >>> cell = LayerNormRNNCell(3, 8)
    >>> cell(torch.ones(2, 3)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        eps: float = 1e-5,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, hidden_size, eps)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity is {nonlinearity!r}; expected 'tanh' or 'relu'")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.eps = eps
        self.nonlinearity = nonlinearity
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size, device=device, dtype=dtype))
        self.norm = _GateNorm(hidden_size, 1, eps, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)); gains 1, biases 0."""
        _reset(self, self.hidden_size)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Advance the state by one step; see the class."""
        _check_input(x, self.input_size)
        (state,) = _check_state(x, self.hidden_size, state)
        summed = nn.functional.linear(x, self.weight_ih) + nn.functional.linear(state, self.weight_hh)
        return getattr(torch, self.nonlinearity)(self.norm(summed))

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, eps={self.eps}, nonlinearity={self.nonlinearity}"


class LayerNormLSTMCell(nn.Module):
    """One step of an LSTM with layer normalization of the gates and of the cell's output.

    The cell that is kept in memory is the unnormalized one. The rows of the weights are the gates in PyTorch's
    order (input, forget, cell, output), so that ``weight_ih`` and ``weight_hh`` of :class:`torch.nn.LSTMCell` fit.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450, equations 20 to 22.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        eps: added to the variance.
        per_gate: normalize each gate by itself instead of the four together, as the paper does.
        device, dtype: of the parameters.

    Shape:
        ``forward(x, state=None) -> (h, c)``: x is (N, input_size) or (input_size,); state is ``(h, c)``, each
        (N, hidden_size) or (hidden_size,), zeros where it is not given.

    Raises:
        ValueError: a size that is not positive, a negative eps, or at the call another shape than expected.

    >>> import torch
    >>> from evenly.nn import LayerNormLSTMCell
    >>> cell = LayerNormLSTMCell(3, 8)
    >>> h, c = cell(torch.ones(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        eps: float = 1e-5,
        per_gate: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, hidden_size, eps)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.eps = eps
        self.per_gate = per_gate
        gates = 4 if per_gate else 1
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size, device=device, dtype=dtype))
        self.norm_ih = _GateNorm(4 * hidden_size, gates, eps, device, dtype)
        self.norm_hh = _GateNorm(4 * hidden_size, gates, eps, device, dtype)
        self.norm_c = _GateNorm(hidden_size, 1, eps, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)); gains 1, biases 0."""
        _reset(self, self.hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Advance the state by one step; see the class."""
        _check_input(x, self.input_size)
        h, c = _check_state(x, self.hidden_size, *(state if state is not None else (None, None)))
        return self._step(self._project(x), h, c)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, eps={self.eps}, per_gate={self.per_gate}"

    def _project(self, x: Tensor) -> Tensor:
        # What the input adds to the gates. It does not depend on the state: all time steps go through at once.
        return self.norm_ih(nn.functional.linear(x, self.weight_ih), shift=self.bias)

    def _step(self, projected: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.norm_hh(nn.functional.linear(h, self.weight_hh), residual=projected)
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c


class LayerNormGRUCell(nn.Module):
    """One step of a gated recurrent unit with layer normalization.

    The rows of the weights are reset gate, update gate, candidate, as in :class:`torch.nn.GRUCell`. The update gate
    is the paper's: it weighs the candidate, where PyTorch's weighs the old state. The reset gate multiplies the
    normalized recurrent part of the candidate.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450, equations 26 to 28.

    Args:
        input_size: features of the input.
        hidden_size: features of the state.
        eps: added to the variance.
        per_gate: normalize reset and update gate each by itself instead of together, as the paper does.
        device, dtype: of the parameters.

    Shape:
        ``forward(x, state=None) -> state``: x is (N, input_size) or (input_size,), state (N, hidden_size) or
        (hidden_size,), zeros where it is not given.

    Raises:
        ValueError: a size that is not positive, a negative eps, or at the call another shape than expected.

    >>> import torch
    >>> from evenly.nn import LayerNormGRUCell
    >>> cell = LayerNormGRUCell(3, 8)
    >>> cell(torch.ones(2, 3)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        eps: float = 1e-5,
        per_gate: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_sizes(input_size, hidden_size, eps)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.eps = eps
        self.per_gate = per_gate
        gates = 2 if per_gate else 1
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.norm_ih = _GateNorm(2 * hidden_size, gates, eps, device, dtype)
        self.norm_hh = _GateNorm(2 * hidden_size, gates, eps, device, dtype)
        self.norm_in = _GateNorm(hidden_size, 1, eps, device, dtype)
        self.norm_hn = _GateNorm(hidden_size, 1, eps, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)); gains 1, biases 0."""
        _reset(self, self.hidden_size)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Advance the state by one step; see the class."""
        _check_input(x, self.input_size)
        (state,) = _check_state(x, self.hidden_size, state)
        sizes = [2 * self.hidden_size, self.hidden_size]
        gates_x, new_x = nn.functional.linear(x, self.weight_ih).split(sizes, -1)
        gates_h, new_h = nn.functional.linear(state, self.weight_hh).split(sizes, -1)
        gates = torch.sigmoid(self.norm_hh(gates_h, residual=self.norm_ih(gates_x)))
        reset, update = gates.chunk(2, -1)
        candidate = torch.tanh(self.norm_in(new_x) + reset * self.norm_hn(new_h))
        return state + update * (candidate - state)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, eps={self.eps}, per_gate={self.per_gate}"


class LayerNormLSTM(nn.Module):
    """A (multi-layer, bidirectional) LSTM with layer normalization; the arguments of :class:`torch.nn.LSTM`.

    Each layer and direction is a :class:`LayerNormLSTMCell` in ``cells``, in the order layer 0 forward, layer 0
    backward, layer 1 forward, and so on. The input's part of the gates is computed for all time steps in one matrix
    product and one normalization; the recurrence costs one of each a step.

    Reference: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450, equations 20 to 22.

    Args:
        input_size: features of the input.
        hidden_size: features of the state of each layer and direction.
        num_layers: stacked layers.
        batch_first: input and output are (N, T, ·) instead of (T, N, ·).
        dropout: probability of dropping an output of every layer but the last, while training.
        bidirectional: run a second cell a layer from the end to the start.
        per_gate: see :class:`LayerNormLSTMCell`.
        eps: added to the variance.
        device, dtype: of the parameters.

    Shape:
        ``forward(x, state=None) -> (output, (h, c))``. x is (T, N, input_size), or (T, input_size) without a batch,
        or a :class:`~torch.nn.utils.rnn.PackedSequence`. output is (T, N, D * hidden_size), D = 2 if bidirectional,
        else 1; packed if x is. h and c are (num_layers * D, N, hidden_size), the state after each sequence's last
        step; so is the given state, zeros by default.

    Raises:
        ValueError: a size that is not positive, a dropout outside [0, 1] or with one layer only (it would do
            nothing), a negative eps, or at the call another shape than expected or an empty sequence.

    >>> import torch
    >>> from evenly.nn import LayerNormLSTM
    >>> lstm = LayerNormLSTM(3, 8, num_layers=2, bidirectional=True)
    >>> output, (h, c) = lstm(torch.randn(5, 4, 3))
    >>> output.shape, h.shape
    (torch.Size([5, 4, 16]), torch.Size([4, 4, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        per_gate: bool = False,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; expected 1 or more")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; expected a probability between 0 and 1")
        if dropout and num_layers == 1:
            raise ValueError(
                f"dropout is {dropout} with one layer, where it does nothing: it drops outputs between layers. "
                "Use num_layers=2 or more, or nn.Dropout on the output"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.per_gate = per_gate
        self.eps = eps
        self.directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            LayerNormLSTMCell(
                input_size if layer == 0 else self.directions * hidden_size, hidden_size, eps, per_gate, device, dtype
            )
            for layer in range(num_layers)
            for _ in range(self.directions)
        )

    def reset_parameters(self) -> None:
        """Reset every cell; see :meth:`LayerNormLSTMCell.reset_parameters`."""
        for cell in self.cells:
            cell.reset_parameters()  # type: ignore[operator]

    def forward(
        self, x: Tensor | PackedSequence, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the sequences; see the class."""
        if isinstance(x, PackedSequence):
            return self._packed(x, state)
        if x.dim() not in (2, 3):
            layout = "(N, T, F)" if self.batch_first else "(T, N, F)"
            raise ValueError(f"expected {layout}, or (T, F) without a batch, got a shape of {tuple(x.shape)}")
        _check_input(x, self.input_size)
        single = x.dim() == 2
        if single:
            x = x.unsqueeze(1)
            if state is not None:
                state = (state[0].unsqueeze(1), state[1].unsqueeze(1))
        elif self.batch_first:
            x = x.transpose(0, 1)
        output, (h, c) = self._run(x, state, None)
        if single:
            return output.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return (output.transpose(0, 1) if self.batch_first else output), (h, c)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"dropout={self.dropout}, bidirectional={self.bidirectional}, per_gate={self.per_gate}, eps={self.eps}"
        )

    def _packed(
        self, x: PackedSequence, state: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        # Inside, the sequences stand sorted by length, as they are packed; the given and returned states do not.
        padded, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        _check_input(padded, self.input_size)
        if state is not None and x.sorted_indices is not None:
            state = (state[0].index_select(1, x.sorted_indices), state[1].index_select(1, x.sorted_indices))
        output, (h, c) = self._run(padded, state, lengths.to(padded.device))
        packed = pack_padded_sequence(output, lengths)
        if x.unsorted_indices is not None:
            h, c = h.index_select(1, x.unsorted_indices), c.index_select(1, x.unsorted_indices)
        return PackedSequence(packed.data, packed.batch_sizes, x.sorted_indices, x.unsorted_indices), (h, c)

    def _run(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        steps, batch = x.shape[:2]
        if steps == 0:
            raise ValueError("expected at least one time step, got an empty sequence")
        shape = (self.num_layers * self.directions, batch, self.hidden_size)
        if state is None:
            zeros = x.new_zeros(shape)
            state = (zeros, zeros)
        for name, given in zip(("h", "c"), state, strict=True):
            if tuple(given.shape) != shape:
                raise ValueError(f"expected a state {name} of shape {shape}, got {tuple(given.shape)}")
        active = None
        if lengths is not None:
            active = (torch.arange(steps, device=x.device)[:, None] < lengths).unsqueeze(-1)
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            sides = []
            for direction in range(self.directions):
                place = layer * self.directions + direction
                cell: Any = self.cells[place]
                output, h, c = _unroll(cell, x, state[0][place], state[1][place], active, direction == 1)
                sides.append(output)
                last_h.append(h)
                last_c.append(c)
            x = torch.cat(sides, -1) if len(sides) > 1 else sides[0]
            if self.dropout and layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, (torch.stack(last_h), torch.stack(last_c))


class _GateNorm(nn.Module):
    # LN(z; α, β) over the last axis, whole or cut into equal gates; α and β always cover the whole axis.
    def __init__(self, size: int, gates: int, eps: float, device: Any, dtype: Any) -> None:
        super().__init__()
        self.size = size
        self.gates = gates
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def forward(self, z: Tensor, residual: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        bias = self.bias if shift is None else self.bias + shift
        affine: dict[str, Any] = {"weight": self.weight, "bias": bias, "eps": self.eps, "residual": residual}
        if self.gates == 1:
            return normalize(z, "... d -> ...", **affine)
        return normalize(z, "... (gate d) -> ... gate", affine="(gate d)", gate=self.gates, **affine)

    def extra_repr(self) -> str:
        return f"{self.size}, gates={self.gates}, eps={self.eps}"


def _unroll(
    cell: LayerNormLSTMCell, x: Tensor, h: Tensor, c: Tensor, active: Tensor | None, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # active: (T, N, 1), false after a sequence's end. There the state stays and the output is not used.
    projected = cell._project(x).unbind(0)
    order = range(len(projected))
    outputs = [h] * len(projected)
    for t in reversed(order) if backward else order:
        new_h, new_c = cell._step(projected[t], h, c)
        if active is not None:
            new_h, new_c = torch.where(active[t], new_h, h), torch.where(active[t], new_c, c)
        h, c = new_h, new_c
        outputs[t] = h
    return torch.stack(outputs), h, c


def _reset(cell: nn.Module, hidden_size: int) -> None:
    bound = 1 / math.sqrt(hidden_size)
    for name, parameter in cell.named_parameters():
        if name in ("weight_ih", "weight_hh"):
            nn.init.uniform_(parameter, -bound, bound)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)


def _check_sizes(input_size: int, hidden_size: int, eps: float) -> None:
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more")
    if eps < 0:
        raise ValueError(f"eps is {eps}; expected 0 or more")


def _check_input(x: Tensor, input_size: int) -> None:
    if x.dim() == 0 or x.shape[-1] != input_size:
        raise ValueError(f"expected an input with {input_size} features in its last axis, got {tuple(x.shape)}")


def _check_state(x: Tensor, hidden_size: int, *state: Tensor | None) -> list[Tensor]:
    if x.dim() > 2:
        raise ValueError(f"a cell takes one time step, (N, F) or (F,); got {tuple(x.shape)}")
    shape = (*x.shape[:-1], hidden_size)
    full = []
    for given in state:
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"expected a state of shape {shape}, got {tuple(given.shape)}")
        full.append(x.new_zeros(shape) if given is None else given)
    return full
