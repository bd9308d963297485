"""Few columns in the place of all (``backend_kwargs={"columns": k}``): the largest, and a random mixture of the rest.

With r the columns of a root of Λ at all positions of a datum, largest first, and independent signs ε:

    Λ = Σ_{j≤k} r_j r_jᵀ + E[m mᵀ],    m = Σ_{j>k} ε_j r_j

so that ``k + 1`` backward passes give without bias whatever is a sum of outer products. How far the mixtures may be
off is estimated from pairs of them: batches 1, 4, 16, … of a pass over the data have two, each of half the weight, and
entry by entry of the diagonal of the curvature ``E (m₁² − m₂²)² = 2 Var m²``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from laplace.curvature.memory import READ_AGAIN
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.likelihoods.roots import Root


@dataclass
class Remainder:
    """What mixtures add to the error, as far as one pass over the data has shown."""

    n_batches: int = 0
    """How many were seen."""
    n_mixed: int = 0
    """How many of them had columns to mix."""
    n_measured: int = 0
    """How many of these had two mixtures."""
    n_rows: int = 0
    """Number of unmasked positions that were seen."""
    n_measured_rows: int = 0
    """The same of batches with two mixtures."""
    variance: Tensor | None = None
    """Of the diagonal with one mixture each, summed over its entries, of batches with two, ``[]``."""
    total: Tensor | None = None
    """Diagonal of the curvature of these batches, ``[P]``."""
    _first: Tensor | None = None

    def see(self, squares: Float[Tensor, " params"], *, mixture: bool) -> None:
        """Take the squares of columns of a batch with two mixtures, which come one by one."""
        self.total = squares if self.total is None else self.total + squares
        if not mixture:
            return
        if self._first is None:
            self._first = squares
            return
        # Each holds half of the squares of its mixture: the whole ones differ by twice as much.
        variance = 2 * (squares - self._first).square().sum()
        self.variance = variance if self.variance is None else self.variance + variance
        self._first = None

    @property
    def error(self) -> float:
        """Standard error of the diagonal over its length, as if all batches were like those with two mixtures."""
        if not self.n_batches:
            return math.nan
        if self.variance is None or self.total is None:
            return 0.0  # there was nothing to mix
        # Two mixtures have half the variance of one.
        variance = float(self.variance) * (self.n_rows - self.n_measured_rows / 2) / self.n_measured_rows
        length = float(self.total.norm()) * self.n_rows / self.n_measured_rows
        return math.sqrt(variance) / length if length else 0.0


@dataclass
class Leading:
    """How many columns are exact, where the signs of the others come from, and what was seen of their error."""

    n_columns: int
    """k."""
    generator: torch.Generator | None = None
    """Source of the signs; ``None`` for PyTorch's own."""
    remainder: Remainder = field(default_factory=Remainder)
    """Of the latest pass over the data."""

    def draw(self, likelihood: AbstractLikelihood, positions: Positions) -> tuple[Float[Tensor, "rows C columns"], int]:
        """Columns for a batch, and how many of the last are mixtures to measure: two, or none.

        A column stands for a whole datum, and is zero at positions that it does not come from. Time and memory
        O(rows · C · k).
        """
        root, seen = likelihood.lazy_root(likelihood.observed(positions.f, positions.y)), self.remainder
        exact, rest, n_left = split(root, positions.datum, self.n_columns)
        seen.n_batches, seen.n_rows = seen.n_batches + 1, seen.n_rows + len(positions.f)
        if n_left < 2:  # the mixture of one column is that column
            return (torch.cat([exact, root.mix(rest.to(exact)).unsqueeze(-1)], -1) if n_left else exact), 0
        seen.n_mixed += 1
        n_mixtures = 2 if seen.n_mixed in {1, *READ_AGAIN} else 1
        if n_mixtures == 2:
            seen.n_measured, seen.n_measured_rows = seen.n_measured + 1, seen.n_measured_rows + len(positions.f)
        signs = (random_signs(rest, self.generator) for _ in range(n_mixtures))
        mixtures = [root.mix(each.to(exact) * rest) / n_mixtures**0.5 for each in signs]
        return torch.cat([exact, torch.stack(mixtures, -1)], -1), n_mixtures if n_mixtures == 2 else 0

    def begin_pass(self) -> None:
        """Forget what earlier passes showed."""
        self.remainder = Remainder()

    def __str__(self) -> str:
        """The estimated error, in a line."""
        seen = self.remainder
        if seen.n_batches and not seen.n_mixed:
            return f"columns={self.n_columns}: no datum has more than one column beside these, so that all are exact."
        return (
            f"columns={self.n_columns}: the diagonal of the curvature has a relative standard error of about "
            f"{seen.error:.1e}, estimated in {seen.n_measured} of {seen.n_batches} batches."
        )


def random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """As many independent signs, each 1 or −1 with equal probability."""
    return 2 * torch.randint(2, like.shape, generator=generator, device=like.device) - 1


def split(
    root: Root, datum: Int[Tensor, " rows"] | None, n_columns: int
) -> tuple[Float[Tensor, "rows C columns"], Bool[Tensor, "rows of_root"], int]:
    """The largest columns of each datum, a mask of the others, and how many others a datum has at most.

    Parameters
    ----------
    root
        Of the Hessians of the rows.
    datum
        Which datum each row belongs to, ascending; ``None`` when every row is one.
    n_columns
        How many columns of a datum are taken out.
    """
    sizes, place = root.sizes, None
    if datum is not None and len(datum):
        # The rows of a datum side by side, with columns of size −1 where it has fewer than others.
        number, counts = datum.unique_consecutive(return_inverse=True, return_counts=True)[1:]
        first = counts.cumsum(0) - counts
        place = (number, torch.arange(len(sizes), device=sizes.device) - first[number])
        padded = sizes.new_full((len(counts), int(counts.max()), sizes.shape[1]), -1.0)
        padded[place] = sizes
        sizes = padded.flatten(1)
    top, index = sizes.topk(min(n_columns, sizes.shape[1]), -1)
    exact, rest = [], torch.ones_like(root.sizes, dtype=torch.bool)
    for n in range(top.shape[1]):
        chosen = torch.zeros_like(sizes, dtype=torch.bool).scatter(1, index[:, n : n + 1], top[:, n : n + 1] >= 0)
        if place is not None:
            chosen = chosen.unflatten(1, (-1, root.sizes.shape[1]))[place]
        exact.append(root.mix(chosen.to(sizes)))
        rest &= ~chosen
    return torch.stack(exact, -1), rest, sizes.shape[1] - top.shape[1]


__all__ = ["Leading", "Remainder", "split"]
