"""Recurrent layers, unrolled: what their weights multiply at each step, so that they have factors like other weights.

PyTorch runs a whole layer in one function, inside which nothing can be watched. Here it is computed step by step from
its weights, with one product for the inputs of all steps,

    p_t = W_ih x_t + b_ih (+ b_hh)        h_t = cell(p_t, W_hh h_{t−1})

The gradient at p_t is that of both weights (of a ``GRU`` that of W_hh differs by its reset gate, a known factor), so
that all steps are positions of one call. Its result is compared with that of the layer, whose function is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace.curvature.layers import as_they_are
from laplace.curvature.roles import Product, Role, Sum

Roles = list[tuple[Tensor, Role]]


@dataclass
class Steps:
    """What the steps of one layer in one direction leave behind."""

    outputs: list[Tensor] = field(default_factory=list)
    """Hidden states ``[batch, H]``, in the order of time."""
    before: list[Tensor] = field(default_factory=list)
    """Those that each step started from."""
    resets: list[Tensor] = field(default_factory=list)
    """Of a ``GRU`` what the last third of gradients at p is multiplied by for W_hh, ``[batch, H]``."""
    last: tuple[Tensor, ...] = ()
    """The state at the end."""

    def add(self, before: Tensor, state: tuple[Tensor, ...], reset: Tensor | None = None) -> None:
        """Take one step."""
        self.before.append(before)
        self.outputs.append(state[0])
        self.last = state
        if reset is not None:
            self.resets.append(reset)

    def turned(self) -> Steps:
        """In the reversed order."""
        return Steps(self.outputs[::-1], self.before[::-1], self.resets[::-1], self.last)


Cell = Callable[[Tensor, "tuple[Tensor, ...]", Tensor, "Tensor | None", Steps], "tuple[Tensor, ...]"]
"""From p_t, the state and W_hh with its bias (where it is not part of p) to the next state; notes the step."""


def lstm_cell(p: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, steps: Steps) -> Any:  # noqa: ARG001
    """``c' = f c + i g``, ``h' = o tanh c'``."""
    h, c = state
    size = h.shape[1]
    both, g, o = torch.addmm(p, h, weight.t()).split([2 * size, size, size], 1)
    i, f = both.sigmoid().chunk(2, 1)
    c = f * c + i * g.tanh()
    steps.add(h, after := (o.sigmoid() * c.tanh(), c))
    return after


def gru_cell(p: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, steps: Steps) -> Any:
    """``n = tanh(p_n + r (W_hn h + b_hn))``, ``h' = n + z (h − n)``."""
    (h,) = state
    hidden = F.linear(h, weight, bias)
    size = h.shape[1]
    r, z = (p[:, : 2 * size] + hidden[:, : 2 * size]).sigmoid().chunk(2, 1)
    n = (p[:, 2 * size :] + r * hidden[:, 2 * size :]).tanh()
    steps.add(h, after := (n + z * (h - n),), r)
    return after


def plain_cell(
    activation: Callable[[Tensor], Tensor],
    p: Tensor,
    state: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001
    steps: Steps,
) -> Any:
    """``h' = a(p + W_hh h)``."""
    (h,) = state
    steps.add(h, after := (activation(torch.addmm(p, h, weight.t())),))
    return after


CELLS: dict[Any, Cell] = {
    torch.lstm: lstm_cell,
    torch.gru: gru_cell,
    torch.rnn_tanh: partial(plain_cell, torch.tanh),
    torch.rnn_relu: partial(plain_cell, torch.relu),
}
"""For each function of recurrent layers its step."""
SINGLE: dict[Any, Any] = {
    torch.lstm_cell: torch.lstm,
    torch.gru_cell: torch.gru,
    torch.rnn_tanh_cell: torch.rnn_tanh,
    torch.rnn_relu_cell: torch.rnn_relu,
}
"""For each function of a single step that of the layer."""


@dataclass(frozen=True)
class Unrolled:
    """A layer that was computed step by step."""

    outputs: Any
    """What its function returns."""
    calls: Sequence[tuple[Tensor, Roles]]
    """The products with all inputs, and what weights do in them; one for each layer and direction."""


@dataclass(frozen=True)
class Series:
    """How the steps of a layer lie in a tensor: along an axis, or of packed sequences one after the other."""

    axis: int = 0
    """The axis of time."""
    sizes: Sequence[int] | None = None
    """Number of sequences at each step of packed ones, descending."""

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """The steps, ``[batch, ...]`` each."""
        return values.unbind(self.axis) if self.sizes is None else values.split(list(self.sizes))

    def join(self, steps: Sequence[Tensor]) -> Tensor:
        """All steps."""
        return torch.stack(list(steps), self.axis) if self.sizes is None else torch.cat(list(steps))


def unrolled(func: Any, args: Sequence[Any]) -> Unrolled | None:
    """Compute a recurrent layer step by step; ``None`` where it is left to the exact, slow way.

    That is so for projections (``proj_size``), for dropout between layers while training, and where the steps do not
    give what the layer gives.
    """
    with torch.enable_grad():
        found = one_step(func, args) if func in SINGLE else whole_layer(func, args)
    if found is None:
        return None
    with torch.no_grad():
        truth = func(*args)
    return found if agree(found.outputs, truth) else None


def one_step(func: Any, args: Sequence[Any]) -> Unrolled | None:
    """One step of a cell that its user calls in a loop."""
    x, state, *weights = args
    start = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    weights = [weight for weight in weights if weight is not None]
    if x.dim() != 2 or len(weights) not in (2, 4):
        return None
    steps, call = one_way(CELLS[SINGLE[func]], x.unsqueeze(0), start, weights, Series(), backwards=False)
    return Unrolled(steps.last if isinstance(state, (tuple, list)) else steps.last[0], [call])


def whole_layer(func: Any, args: Sequence[Any]) -> Unrolled | None:
    """All steps of a layer, with all of its parts."""
    packed = len(args) == 9 and isinstance(args[3], (tuple, list))
    x, *rest = args
    series = Series(sizes=rest.pop(0).tolist()) if packed else Series(axis=int(bool(rest.pop(-1))))
    state, flat, has_biases, n_layers, dropout, training, bidirectional = rest
    states = tuple(state) if isinstance(state, (tuple, list)) else (state,)
    n_directions, each = 1 + bool(bidirectional), 2 + 2 * bool(has_biases)
    if (training and dropout) or len(flat) != each * n_layers * n_directions or not x.numel():
        return None
    inputs, calls, last = x, [], []
    for layer in range(n_layers):
        sides: list[Tensor] = []
        for number in range(layer * n_directions, (layer + 1) * n_directions):
            start, weights = [s[number] for s in states], flat[each * number : each * (number + 1)]
            backwards = number % n_directions == 1
            steps, call = one_way(CELLS[func], inputs, start, weights, series, backwards=backwards)
            calls.append(call)
            last.append(steps.last)
            sides.append(series.join(steps.outputs))
        inputs = sides[0] if n_directions == 1 else torch.cat(sides, -1)
    return Unrolled((inputs, *(torch.stack(parts) for parts in zip(*last, strict=True))), calls)


def one_way(
    cell: Cell, x: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], series: Series, *, backwards: bool
) -> tuple[Steps, tuple[Tensor, Roles]]:
    """The steps of one layer in one direction, and the roles of its weights."""
    (of_inputs, of_hidden), biases = weights[:2], weights[2:]
    p, later = F.linear(x, of_inputs, biases[0] if biases else None), biases[1] if biases else None
    if later is not None and cell is not gru_cell:
        p = p + later
    each = series.split(p)
    steps, ended = Steps(), []
    state = tuple(part[: len(each[-1 if backwards else 0])] for part in start)
    for p_t in reversed(each) if backwards else each:
        now, size = len(state[0]), len(p_t)
        if size < now:  # packed sequences that are over
            ended.append([part[size:] for part in state])
            state = tuple(part[:size] for part in state)
        elif size > now:  # and, from behind, that begin
            state = tuple(torch.cat([part, first[now:size]]) for part, first in zip(state, start, strict=True))
        state = cell(p_t, state, of_hidden, later, steps)
    if ended:
        steps.last = tuple(torch.cat(parts) for parts in zip(steps.last, *reversed(ended), strict=True))
    steps = steps.turned() if backwards else steps
    return steps, (p, roles(x, steps, weights, series))


def roles(x: Tensor, steps: Steps, weights: Sequence[Tensor], series: Series) -> Roles:
    """What the weights do, in terms of gradients at p, ``[columns, *lead, G]``."""
    n_lead = x.dim() - 1

    def reset(g: Tensor) -> Tensor:
        factor = series.join(steps.resets)
        return torch.cat([g[..., : -factor.shape[-1]], g[..., -factor.shape[-1] :] * factor], -1)

    hidden = reset if steps.resets else as_they_are
    # Functions that a weight and its bias have in common, so that what they make is shared.
    of_inputs = Product(lambda: x.unsqueeze(-2), as_they_are, n_lead)
    of_hidden = Product(lambda: series.join(steps.before).unsqueeze(-2), hidden, n_lead)
    found: Roles = [(weights[0], of_inputs), (weights[1], of_hidden)]
    if len(weights) > 2:
        found += [(weights[2], Sum(as_they_are, n_lead)), (weights[3], Sum(hidden, n_lead))]
    return found


def agree(ours: Any, theirs: Any) -> bool:
    """Whether two results, one tensor or several, are the same up to rounding, which grows over steps."""
    if not isinstance(ours, Tensor):
        return len(ours) == len(theirs) and all(map(agree, ours, theirs))
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    eps = torch.finfo(theirs.dtype).eps
    limit = max(10 * min(eps, torch.finfo(torch.float32).eps) ** 0.5, 16 * eps) * theirs.abs().max().clamp(min=1)
    return bool((ours.detach() - theirs).abs().max() <= limit)
