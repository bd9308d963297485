"""Posteriors over functions of the networks and cases, and what they must be by brute force."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from laplace import Laplace
from tests import reference
from tests.cases import Case
from tests.networks import Network

SIGMA, DELTA = 0.7, 1.3
Thing = Case | Network


def subset(thing: Thing) -> str:
    """Which weights of a situation are random."""
    return "last_layer" if isinstance(thing, Case) else "all"


def noise(thing: Thing) -> dict[str, float]:
    """The noise of a regression."""
    return {"sigma_noise": SIGMA} if thing.likelihood == "regression" else {}


def batches(thing: Thing, *sizes: int) -> list[Any]:
    """The data, cut."""
    if isinstance(thing, Case):
        return thing.batches(*sizes)
    x, y = thing.data()
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    slices = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(y)], strict=True) if a < len(y)]
    return [(reference.rows_of(x, s), y[s]) for s in slices]


def build(thing: Thing, approximation: str, model: Any = None, **options: Any) -> Any:
    """An approximation in function space, not fitted."""
    own = getattr(thing, "options", {})
    return Laplace(
        thing.model() if model is None else model,
        thing.likelihood,
        subset(thing),
        "gp",
        functional_approximation=approximation,
        **{"prior_precision": DELTA, **noise(thing), **own, **options},
    )


def full(thing: Thing, **options: Any) -> Any:
    """The posterior over weights, with dense curvature, fitted."""
    own = getattr(thing, "options", {})
    la = Laplace(
        thing.model(),
        thing.likelihood,
        subset(thing),
        "full",
        **{"prior_precision": DELTA, **noise(thing), **own, **options},
    )
    la.fit(batches(thing, 2))
    return la


def new_inputs(thing: Thing) -> Any:
    """Inputs that are not training data."""
    return thing.data(n_rows=3, shift=2)[0]


def jacobian(thing: Thing, x: Any) -> Tensor:
    """``[rows, T·C, P]`` by brute force."""
    return thing.problem().jacobian(x).flatten(1, 2)
