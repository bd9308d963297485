"""How unusual a number is among those of reference rows: quantiles, the excess that widens predictions, tails.

Excess   e = max(0, (v − q95) / (q95 − q50))
Tail     log of the share of reference rows beyond v
Fisher   −log tail(log(1 − max p)) − log tail(g)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.density.sums import wide
from laplace.errors import InputError
from laplace.linalg import lasting, wide_dtype
from laplace.schema import Known, Table, check_entries, finite, refuse, tensor, text, whole

MAX_QUANTILES = 1000
"""Of a tail, which are kept."""
LEAST_SPREAD = 1e-9
"""q95 − q50, relative to the larger of them, below which they count as equal: that much is rounding."""


def checked(values: Tensor, what: str) -> Float[Tensor, " rows"]:
    """Numbers of reference rows in one vector, in float64 and in ascending order.

    Raises
    ------
    InputError
        If there are none, or one is not finite.
    """
    flat = values.detach().flatten().to(wide_dtype(values))
    if not len(flat) or not bool(torch.isfinite(flat).all()):
        got = f"{int((~torch.isfinite(flat)).sum())} of {len(flat)} that are not" if len(flat) else "no row"
        msg = f"{what} must be finite numbers of at least one reference row; got {got}."
        raise InputError(msg)
    return flat.sort().values


def quantile(ascending: Float[Tensor, " rows"], share: float) -> float:
    """The (n + 1)-quantile (type 6 of Hyndman & Fan): what a new row exceeds with the probability 1 − share.

    It lies at the rank (n + 1) · share, between the smallest and the largest value, which it is where there are too
    few rows: for a share of .95 below 20.
    """
    n = len(ascending)
    rank = min(max((n + 1) * share, 1.0), float(n))
    below = min(math.floor(rank), max(n - 1, 1))
    low, high = float(ascending[below - 1]), float(ascending[min(below, n - 1)])
    return low + (rank - below) * (high - low)


# -- what widens predictions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Excess:
    """By how much numbers exceed those of reference rows: e = max(0, (v − q95) / (q95 − q50)).

    Called with g (or the distance of regression) of any shape it returns e; zeros where it is off.
    """

    q50: float
    """Median of the reference rows."""
    q95: float
    """What one reference row in twenty exceeds."""

    entries: ClassVar[Table] = {"q50": finite(), "q95": finite()}

    @classmethod
    @lasting
    def of(cls, values: Tensor) -> Excess:
        """From the numbers of validation rows.

        Raises
        ------
        InputError
            If there are none, or one is not finite.
        """
        ascending = checked(values, "Densities or distances")
        return cls(quantile(ascending, 0.5), quantile(ascending, 0.95))

    @property
    def reason(self) -> str | None:
        """Why it is off, in words; ``None`` if it is on."""
        if self.q95 - self.q50 > LEAST_SPREAD * max(abs(self.q50), abs(self.q95)):
            return None
        return (
            f"The median and the 95 % quantile of how far the validation rows lie are equal ({self.q50:.6g}), so that "
            "there is no scale for what lies beyond, and predictions are not widened. Give more validation rows."
        )

    def __call__(self, values: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """e, which can be differentiated."""
        if self.reason is not None:
            return torch.zeros_like(values)
        return ((values - self.q95) / (self.q95 - self.q50)).clamp(min=0)

    def state(self) -> dict[str, Any]:
        """Both quantiles."""
        return {"q50": self.q50, "q95": self.q95}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Excess:
        """From a state that passed the checks of ``entries``.

        Raises
        ------
        StateError
            If the quantiles are not in order.
        """
        if state["q95"] < state["q50"]:
            refuse("'q95'", f"at least {state['q50']:g}, the median", state["q95"])
        return cls(state["q50"], state["q95"])


# -- tails ------------------------------------------------------------------------------------------------------------


def _ranks(n: int) -> list[int]:
    """At most ``MAX_QUANTILES`` ranks from 1 to n: half of them evenly, half the denser the nearer to the largest."""
    if n <= MAX_QUANTILES:
        return list(range(1, n + 1))
    half = MAX_QUANTILES // 2
    even = {1 + round(step * (n - 1) / (half - 1)) for step in range(half)}
    return sorted(even | {n + 1 - round(n ** (step / (half - 1))) for step in range(half)})


def _scale(ascending: Float[Tensor, " rows"]) -> float:
    """Mean excess of the largest tenth (of five rows at least) over the row before; positive."""
    n = len(ascending)
    top = max(math.ceil(n / 10), min(5, n - 1))
    excess = float((ascending[n - top :] - ascending[max(n - top - 1, 0)]).mean())
    spread = float(ascending[-1] - ascending[0])
    return next(width for width in (excess, spread, 1.0) if width > 0)  # both numbers are in nats


@dataclass(frozen=True)
class Tail:
    """The share of reference rows beyond a number, as its logarithm.

    Between quantiles the logarithm is linear. Past the largest the share falls exponentially, by the mean excess of
    the largest values, and before the smallest it tends to 1 as fast: it is continuous, falls everywhere, and is never
    cut off, so that far rows keep their order.
    """

    values: Float[Tensor, " quantiles"]
    """Quantiles of the reference rows, ascending."""
    log_shares: Float[Tensor, " quantiles"]
    """log of the share at each of them or beyond, of n + 1 rows: (n + 1 − rank) / (n + 1)."""
    scale: float
    """In which it falls by one nat past the largest."""

    entries: ClassVar[Table] = {
        "values": wide(tensor(("quantiles",))),
        "log_shares": wide(tensor(("quantiles",))),
        "scale": finite(above=0),
    }

    @classmethod
    @lasting
    def of(cls, values: Tensor, what: str = "The values") -> Tail:
        """From the numbers of reference rows, of which equal ones count together.

        Raises
        ------
        InputError
            If there are none, or one is not finite.
        """
        ascending = checked(values, what)
        n = len(ascending)
        points, n_equal = ascending.unique_consecutive(return_counts=True)
        first = n_equal.cumsum(0) - n_equal  # how many rows are smaller
        kept = torch.tensor(_ranks(len(points)), device=points.device) - 1
        log_shares = torch.log((n - first[kept]).to(points) / (n + 1))
        return cls(points[kept], log_shares, _scale(ascending))

    def __call__(self, values: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """The logarithm of the share of reference rows beyond; never positive."""
        v, x, log_shares = values.to(self.values), self.values, self.log_shares
        past = log_shares[-1] - (v - x[-1]) / self.scale
        before = torch.log1p(-torch.exp((v - x[0]).clamp(max=0) / self.scale + torch.log1p(-log_shares[0].exp())))
        found = torch.where(v > x[-1], past, before)
        if len(x) == 1:
            return found
        right = torch.searchsorted(x, v.detach().contiguous()).clamp(1, len(x) - 1)
        along = (v - x[right - 1]) / (x[right] - x[right - 1])
        between = torch.lerp(log_shares[right - 1], log_shares[right], along)
        return torch.where((v >= x[0]) & (v <= x[-1]), between, found)

    def state(self) -> dict[str, Any]:
        """Quantiles, shares, and the scale."""
        return {"values": self.values, "log_shares": self.log_shares, "scale": self.scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Tail:
        """From a state that passed the checks of ``entries``.

        Raises
        ------
        StateError
            If quantiles are not in order, or there are too many or none.
        """
        values, log_shares = state["values"].to(dtype), state["log_shares"].to(dtype)
        if not 1 <= len(values) <= MAX_QUANTILES or not bool((values.diff() > 0).all()):
            refuse("'values'", f"1 to {MAX_QUANTILES} numbers in ascending order", state["values"])
        if not bool((log_shares < 0).all() and (log_shares.diff() < 0).all()):
            refuse("'log_shares'", "negative numbers in descending order", state["log_shares"])
        return cls(values, log_shares, float(state["scale"]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tail:
        """On another device or in another dtype."""
        return Tail(self.values.to(device, dtype), self.log_shares.to(device, dtype), self.scale)


def _tail(value: Any, where: str, known: Known) -> None:
    """The entries of a tail, whose number of quantiles is its own."""
    check_entries(value, Tail.entries, {"dtype": known["dtype"]}, where)


def _source(value: Any, where: str, known: Known) -> None:
    """Which rows the reference is of."""
    text(value, where, known)
    if value not in SOURCES:
        refuse(where, " or ".join(map(repr, SOURCES)), value)


SOURCES = ("validation", "training")
"""Rows that a reference can be of."""


@dataclass(frozen=True)
class Reference:
    """What scores of new rows are compared with: tails of log(1 − max p) and of g over reference rows."""

    max_prob: Tail
    """Of log(1 − max p)."""
    density: Tail
    """Of g."""
    source: str
    """``"validation"`` or ``"training"``: the network knows training rows better than any new ones."""
    n_rows: int
    """How many rows there were."""

    entries: ClassVar[Table] = {
        "max_prob": _tail,
        "density": _tail,
        "source": _source,
        "n_rows": whole(1),
    }

    @classmethod
    def of(cls, log_one_minus_max: Tensor, g: Tensor, source: str = "validation") -> Reference:
        """From log(1 − max p) and g of the same reference rows.

        Raises
        ------
        InputError
            If they are not of the same rows, there are none, one is not finite, or the source is unknown.
        """
        if log_one_minus_max.shape != g.shape:
            got = f"{list(g.shape)} and {list(log_one_minus_max.shape)}"
            msg = f"Expected one g for each log(1 − max p); got the shapes {got}."
            raise InputError(msg)
        if source not in SOURCES:
            msg = f"source must be {' or '.join(map(repr, SOURCES))}; got {source!r}."
            raise InputError(msg)
        return cls(Tail.of(log_one_minus_max, "log(1 − max p)"), Tail.of(g, "The values of g"), source, g.numel())

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about it, in sentences."""
        if self.source == "validation":
            return ()
        return (
            f"Scores are compared with {self.n_rows} training rows, which the network knows better than any new ones, "
            "so that all new rows look somewhat foreign. Call tune(val_loader) to compare with validation rows.",
        )

    def fisher(self, log_one_minus_max: Float[Tensor, "*rows"], g: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Fisher's score of both, −log tail(log(1 − max p)) − log tail(g); higher is more foreign, from 0 on."""
        return -self.max_prob(log_one_minus_max) - self.density(g)

    def state(self) -> dict[str, Any]:
        """Both tails, and which rows they are of."""
        return {
            "max_prob": self.max_prob.state(),
            "density": self.density.state(),
            "source": self.source,
            "n_rows": self.n_rows,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Reference:
        """From a state that passed the checks of ``entries``.

        Raises
        ------
        StateError
            If a tail is not in order.
        """
        tails = (Tail.from_state(state[name], dtype) for name in ("max_prob", "density"))
        return cls(*tails, source=state["source"], n_rows=state["n_rows"])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Reference:
        """On another device or in another dtype."""
        return Reference(self.max_prob.to(device, dtype), self.density.to(device, dtype), self.source, self.n_rows)


__all__ = ["MAX_QUANTILES", "Excess", "Reference", "Tail", "quantile"]
