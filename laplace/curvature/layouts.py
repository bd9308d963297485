"""Which datum each row of a layer's inputs belongs to.

Layers see their rows in any order: batch first, batch second (attention), flattened with positions (windows, frames).
Instead of guessing from shapes, the layout is read off two backward passes, one of them with every datum weighed by a
number of its own: the ratio of the two gradients at a row names the datum. Rows that mix data are recognized as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


def datum_weights(n_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight for each datum, all different by a half at least, in a fixed random order."""
    noise = torch.Generator().manual_seed(n_rows)
    order = torch.randperm(n_rows, generator=noise)
    return (order + 1 + 0.5 * torch.rand(n_rows, generator=noise, dtype=torch.float64)).to(device, dtype)


@dataclass(frozen=True)
class Layout:
    """How leading axes become ``[batch, positions]``.

    Attributes
    ----------
    lead
        The leading axes, some of them split so that one is the batch.
    axis
        Which of them that is; ``None`` when rows are in no order.
    index
        The rows of each datum, ``[batch, positions]``, in no order; −1 fills up.
    """

    lead: tuple[int, ...]
    axis: int | None = 0
    index: Int[Tensor, "batch positions"] | None = None

    def apply(self, values: Tensor, n_lead: int, n_before: int = 0) -> Tensor:
        """``[*before, *lead, *after]`` → ``[*before, batch, positions, *after]``.

        Parameters
        ----------
        values
            Numbers a row.
        n_lead
            How many leading axes there are.
        n_before
            How many axes come before them.
        """
        before, after = values.shape[:n_before], values.shape[n_before + n_lead :]
        if self.axis == 0 and values.shape[n_before : n_before + n_lead] == self.lead:
            if n_lead == 2:
                return values
            return (
                values.unsqueeze(n_before + 1) if n_lead == 1 else values.flatten(n_before + 1, n_before + n_lead - 1)
            )
        if self.axis is not None:
            split = values.reshape(*before, *self.lead, *after).movedim(n_before + self.axis, n_before)
            return split.reshape(*before, self.lead[self.axis], -1, *after)
        assert self.index is not None, "one of the two is given"
        flat = values.reshape(*before, -1, *after)
        rows = flat.index_select(n_before, self.index.clamp(min=0).flatten())
        rows = rows.unflatten(n_before, tuple(self.index.shape))
        shape = [1] * n_before + list(self.index.shape) + [1] * len(after)
        return rows * (self.index >= 0).reshape(shape)


def find(plain: Tensor, weighed: Tensor, weights: Tensor, n_lead: int) -> tuple[Layout | None, bool]:
    """The layout of rows, from their gradients.

    Parameters
    ----------
    plain
        Gradients in a random direction of the outputs, ``[*lead, *after]``.
    weighed
        The same with the outputs of each datum multiplied by its weight.
    weights
        ``[batch]``, all different.
    n_lead
        How many leading axes there are.

    Returns
    -------
    The layout, ``None`` when a row mixes data; and whether it is the only one that these gradients allow.
    """
    lead, n_rows = tuple(plain.shape[:n_lead]), len(weights)
    if n_rows == 1:
        return Layout((1, *lead)), True
    rows = [g.reshape(max(1, lead_size(lead)), -1) for g in (plain, weighed)]
    # A few random projections of a row say as much as the row: what holds for them holds for it.
    noise = torch.randn(rows[0].shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    flat, target = ((row @ noise.to(row)).double() for row in rows)
    size = flat.abs().amax(1, keepdim=True)
    # Rounding grows with the weight, and does not spare rows that are small.
    rounding = 4 * torch.finfo(plain.dtype).eps * n_rows
    allowed = (1e-3 + rounding) * size + 10 * rounding * size.max()
    fitting: list[tuple[float, Layout]] = []
    for candidate in candidates(lead, n_rows):
        data = candidate.apply(torch.arange(len(flat), device=flat.device).reshape(lead), n_lead)
        expected = torch.empty_like(flat[:, :1])
        expected[data.flatten()] = weights.double().repeat_interleave(data.shape[1]).unsqueeze(1)
        residual = (target - expected * flat).abs()
        if bool((residual <= allowed).all()):
            fitting.append((float(residual.sum()), candidate))
    if not fitting:
        return scattered(flat, target, weights.double(), allowed), True
    best = min(fitting, key=lambda found: found[0])[1]
    return best, len(fitting) == 1 and bool(flat.any())


def lead_size(lead: tuple[int, ...]) -> int:
    """Number of rows."""
    return int(torch.Size(lead).numel())


def candidates(lead: tuple[int, ...], n_rows: int) -> Iterator[Layout]:
    """Layouts in which one leading axis is the batch, or the batch and positions flattened."""
    for axis, size in enumerate(lead):
        if size == n_rows:
            yield Layout(lead, axis)
    for axis, size in enumerate(lead):
        if size > n_rows and size % n_rows == 0:
            split = (n_rows, size // n_rows)
            yield Layout((*lead[:axis], *split, *lead[axis + 1 :]), axis)
            yield Layout((*lead[:axis], *reversed(split), *lead[axis + 1 :]), axis + 1)


def scattered(flat: Tensor, target: Tensor, weights: Tensor, allowed: Tensor) -> Layout | None:
    """Rows in no order: each names its datum by the ratio of its gradients.

    Rows without gradient name none; they are given to any, which changes no derivative, and count as inputs.
    """
    ratio = (flat * target).sum(1) / flat.square().sum(1).clamp(min=torch.finfo(flat.dtype).tiny)
    nearest = (ratio.unsqueeze(1) - weights).abs().argmin(1)
    if bool(((target - weights[nearest].unsqueeze(1) * flat).abs() > allowed).any()):
        return None
    rows = [torch.nonzero(nearest == datum).flatten() for datum in range(len(weights))]
    return Layout((), None, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))
