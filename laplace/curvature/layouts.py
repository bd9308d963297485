"""Which datum each row of a layer's inputs belongs to.

Layers see their rows in any order: batch first, batch second (attention), flattened with positions (windows, frames).
Instead of guessing from shapes, the layout is read off a few backward passes, all but the first with every datum
weighted by a number of its own: the ratios of gradients at a row name the datum. Weights are powers of two, positive or
negative: scaling by them commutes with rounding, so that ratios are exact in whatever precision the model computes
(TF32 on a GPU, bfloat16, float16). Rows that mix data have other ratios and are recognized as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDE = tuple(range(-32, 32))
"""Exponents of the weights."""
NARROW = tuple(range(-3, 1))
"""Exponents for float16 and for tiny gradients, which would overflow or vanish with the others."""
FAINT = 1e-18
"""Gradients below this are tiny in float32 and in dtypes with its range of exponents."""
TOLERANCE, SMALL = 2e-3, 1e-4
"""Tolerance of ratios, and size of negligible rows relative to the largest, if layers may round below float32.

Ratios are powers of two, but sums in a random order (on a GPU) deviate from them, and rounding adds to it.
"""
SURE = 1e-5
"""The same for both in float32 on a CPU, which has no such layers: a larger deviation means that data are mixed."""


def datum_weights(n_rows: int, narrow: bool, device: torch.device) -> Float[Tensor, "passes batch"]:
    """Weights ``[passes, batch]`` that tell all data apart, in random order; ``narrow`` uses small powers of two."""
    powers = sorted(NARROW if narrow else WIDE, key=abs)
    numbers = torch.tensor([sign * 2.0**power for power in powers for sign in (1, -1)], dtype=torch.float32)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(n_rows))
    passes = [numbers[order % len(numbers)]]
    while (order := order // len(numbers)).any():
        passes.append(numbers[order % len(numbers)])
    return torch.stack(passes).to(device, non_blocking=True)


@dataclass(frozen=True)
class Layout:
    """How the leading axes of a tensor become ``[batch, positions]``."""

    lead: tuple[int, ...]
    """The leading axes, some of them split so that one is the batch."""
    axis: int | None = 0
    """The axis that is the batch; ``None`` when rows are in no order."""
    index: Int[Tensor, "batch positions"] | None = None
    """Indices of the rows of each datum, ``[batch, positions]``, if they are in no order; −1 pads."""

    def apply(self, values: Tensor, n_lead: int, n_before: int = 0) -> Tensor:
        """``[*before, *lead, *after]`` → ``[*before, batch, positions, *after]``."""
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


@dataclass(frozen=True)
class Trial:
    """The layouts that gradients may have, and what tells which of them they have, not read yet."""

    candidates: Sequence[Layout]
    numbers: Float[Tensor, " numbers"]
    """Whether and how well each one fits, and whether gradients are large enough to tell, ``[2 · candidates + 1]``."""
    scattered: Callable[[], Layout | None] = lambda: None
    """Finds the layout of rows in no order."""

    def decide(self, numbers: Sequence[float]) -> tuple[Layout | None, bool]:
        """The layout, ``None`` if a row mixes data, by the numbers that were read; and whether it is certain.

        A layout is certain if it is the only one that these gradients allow.
        """
        n = len(self.candidates)
        fitting = [
            (far, layout) for far, fits, layout in zip(numbers[n:-1], numbers[:n], self.candidates, strict=True) if fits
        ]
        if not fitting:
            return self.scattered(), True
        best = min(fitting, key=lambda found: found[0])[1]
        return best, len(fitting) == 1 and bool(numbers[-1])


def find(
    plain: Tensor,
    weighed: Sequence[Tensor],
    weights: Float[Tensor, "passes batch"],
    n_lead: int,
    eps: float,
    *,
    narrow: bool = False,
) -> Trial:
    """What tells the layout of rows from gradients ``[*lead, *after]``.

    ``plain`` are gradients in a random direction of the outputs, ``weighed`` the same with each datum multiplied by its
    weight.
    """
    lead, n_rows = tuple(plain.shape[:n_lead]), weights.shape[1]
    if n_rows == 1:
        return Trial([Layout((1, *lead))], torch.ones(3, device=plain.device))
    dtype = torch.promote_types(plain.dtype, torch.float32)
    rows = [g.reshape(max(1, lead_size(lead)), -1) for g in (plain, *weighed)]
    # A few random projections of a row stand for the row: what holds for them holds for it.
    noise = torch.randn(rows[0].shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    # In units of the largest gradient, whose square may overflow or underflow.
    unit = rows[0].abs().amax().to(dtype).clamp(min=torch.finfo(dtype).tiny)
    noise = noise.to(plain.device, dtype, non_blocking=True)
    flat, *targets = (row.to(dtype) @ noise / unit for row in rows)
    target = torch.stack(targets)
    size = torch.linalg.vector_norm(rows[0].to(dtype) / unit, dim=1, keepdim=True)
    is_sure = plain.device.type == "cpu" and eps <= torch.finfo(torch.float32).eps
    relative, small = (SURE, SURE) if is_sure else (max(TOLERANCE, 8 * eps), max(SMALL, eps))
    least = least_exact(plain.dtype, narrow) / unit
    allowed = relative * size + small * size.max() + least
    possible, fits, far = list(candidates(lead, n_rows)), [], []
    for candidate in possible:
        data = candidate.apply(torch.arange(len(flat), device=flat.device).reshape(lead), n_lead)
        datum = torch.empty_like(data.flatten())
        datum[data.flatten()] = torch.arange(n_rows, device=flat.device).repeat_interleave(data.shape[1])
        residual = deviation(flat, target, weights[:, datum])
        fits.append((residual <= allowed).all())
        far.append(residual.sum())
    numbers = torch.stack([number.to(torch.float32) for number in (*fits, *far, (size > least).any())])
    return Trial(possible, numbers, partial(scattered, flat, target, weights, allowed))


def least_exact(dtype: torch.dtype, narrow: bool) -> float:
    """Size of gradients below which scaling by weights may be inexact, with a margin for the terms they are sums of."""
    finfo = torch.finfo(dtype)
    smallest = 2.0 ** min(NARROW if narrow else WIDE)
    # Float16 keeps numbers below its smallest normal one; others may be flushed to zero.
    return 64 * finfo.tiny * finfo.eps / smallest if dtype == torch.float16 else 2e4 * finfo.tiny / smallest


def deviation(flat: Tensor, target: Tensor, weights: Tensor) -> Float[Tensor, "passes rows projections"]:
    """Difference of weighted gradients from plain ones times the weights of their data, in units of plain gradients."""
    return (target / weights.to(target).unsqueeze(-1) - flat).abs()


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
    """The layout of rows in no order: the ratios of a row's gradients name its datum.

    Rows without gradient name none: they are given to any datum, which changes no derivative, and count as inputs.
    """
    ratio = (flat * target).sum(-1) / flat.square().sum(-1).clamp(min=torch.finfo(flat.dtype).tiny)
    names, order = names_of(weights).sort()
    datum = order[torch.searchsorted(names, names_of(ratio)).clamp(max=len(order) - 1)]
    if not bool((deviation(flat, target, weights[:, datum]) <= allowed).all()):
        return None
    rows = [torch.nonzero(datum == number).flatten() for number in range(len(order))]
    return Layout((), None, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))


def names_of(ratios: Float[Tensor, "passes rows"]) -> Int[Tensor, " rows"]:
    """One number per row that encodes the powers of two, and signs, nearest to its ratios."""
    powers = ratios.abs().clamp(2.0**-64, 2.0**63).log2().round().nan_to_num().long() + 64
    places = 256 ** torch.arange(len(ratios), device=ratios.device).unsqueeze(1)
    return ((2 * powers + (ratios < 0)) * places).sum(0)


def are_faint(gradients: Sequence[Tensor | None]) -> bool:
    """Whether the gradients of some call are so small that scaling them far would lose them."""
    sizes = [g.abs().amax().double() for g in gradients if g is not None and g.numel() and g.dtype != torch.float64]
    if not sizes:
        return False
    largest = torch.stack(sizes)
    return bool(((largest > 0) & (largest < FAINT)).any())
