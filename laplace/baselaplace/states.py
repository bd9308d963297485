"""From what a fit learned to the entries of a state, and back: values in, values out.

A state holds tensors and plain values only, so that ``torch.load(..., weights_only=True)`` reads it; it holds no data.
It names its schema version and the fingerprint of the model's weights, and is refused where either differs, where its
digest is not that of its entries, or where an entry is not what the tables say (``state_entries`` of each class).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace.baselaplace.adjustments import Adjustments
from laplace.baselaplace.peer_states import PEER_STRUCTURES, check_peer, is_peer, translated
from laplace.baselaplace.random_weights import AllWeights
from laplace.baselaplace.statefile import SCHEMA_VERSION, check_origin
from laplace.density import ClassSums
from laplace.errors import NotPositiveDefiniteError, StateError
from laplace.fit import Fit
from laplace.schema import Table, anything, finite, flag, tensor, text
from laplace.structures import AbstractCurvature, AbstractPrecision

OF_CONTENT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the content of a state may make fail: a ``StateError`` then; what else is raised is not about the state."""

IDENTITY = ("cls_name", "likelihood", "curvature_kind", "fingerprint", "feature_reduction")
"""What a state and the object that loads it must agree on."""

SINCE_5: Mapping[str, Any] = {"trained": None, "density": None, "averaged": False, "adjustments": Adjustments().state()}
"""What version 5 added, as it was before."""

HEADER: Table = {
    "schema_version": anything,
    "cls_name": text,
    "likelihood": text,
    "curvature_kind": text,
    "fingerprint": text,
    "temperature": finite(above=0),
    "output_temperature": finite(above=0),
    "enable_backprop": flag,
    "prior_precision": tensor((1,), ("L",), ("P",), above=0),
    "prior_mean": tensor((), (1,), ("P",)),
    "sigma_noise": tensor((), ("C",), above=0),
}
"""What every state holds: what it belongs to, settings and hyperparameters."""


def tables_of(cls: type) -> Table:
    """The checks of all entries of a state, as the bases of a class say them; the nearest says it last."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        found.update({key: check for key, check in vars(base).get("state_entries", {}).items() if key not in found})
    return found


@contextmanager
def all_or_nothing(*holders: object) -> Generator[None]:
    """Give objects back the attributes that they had if something is raised."""
    before = [(holder, dict(vars(holder))) for holder in holders]
    try:
        yield
    except BaseException:
        for holder, attributes in before:
            vars(holder).clear()
            vars(holder).update(attributes)
        raise


@contextmanager
def blamed() -> Generator[None]:
    """Say of what the content of a state makes fail that the state is at fault."""
    try:
        yield
    except StateError:
        raise
    except OF_CONTENT as error:
        msg = f"The state holds what this object cannot take: {error}"
        raise StateError(msg) from error


def readable(
    state: Any, entries: Table, own: Mapping[str, Any], weights: AllWeights, structure: str, like: Tensor
) -> dict[str, Any]:
    """Entries of a state of this library or, of a structure over weights, of laplace-torch; of the right origin."""
    found = _readable(state, own, weights, structure, like)
    earlier = is_peer(state) or state["schema_version"] != SCHEMA_VERSION
    new = {name: value for name, value in SINCE_5.items() if name in entries and earlier}
    return {**new, **found}


def _readable(state: Any, own: Mapping[str, Any], weights: AllWeights, structure: str, like: Tensor) -> dict[str, Any]:
    """The entries that are there."""
    if not is_peer(state):
        check_origin(state, {name: own[name] for name in own if name in IDENTITY})
        return {key: value for key, value in state.items() if key != "digest"}
    if structure not in PEER_STRUCTURES:
        msg = (
            f"The state was saved by laplace-torch, from which {own['cls_name']} cannot be made. Those of its "
            "classes with hessian_structure 'full', 'kron' and 'diag' can be read; fit others again."
        )
        raise StateError(msg)
    check_peer(state, own, {"dtype": like.dtype}, last_layer=weights.of_head)
    weights.find(state, like.device)
    mean, subset = weights.of_peer(state["mean"].detach().to(like.device)), weights.subset
    if subset is None or len(mean) != subset.n_params or not subset.equals(mean):
        msg = (
            "The weights of the model are not those in the state, 'mean': give it those it had when it was fitted "
            "by laplace-torch, or fit again."
        )
        raise StateError(msg)
    own = {"schema_version": SCHEMA_VERSION, **own, **weights.choices()}
    return translated(state, own, mean, structure)


def check_usable(finite: bool, posterior: Callable[[], AbstractPrecision] | None) -> None:
    """Raise unless what was taken over makes a posterior; that of a Hessian, which may be negative, is factorized."""
    try:  # the Hessian of a network may be negative somewhere, as long as the prior makes up for it
        usable = finite and (posterior is None or bool(torch.isfinite(posterior().logdet())))
    except NotPositiveDefiniteError:
        usable = False
    if not usable:
        msg = "The state is damaged: its curvature and hyperparameters make no posterior that is finite and positive."
        raise StateError(msg)


def of_fit(fit: Fit, curvature: str) -> dict[str, Any]:
    """The entries that say what was learned; that of the curvature has a name of its own."""
    return {
        "mean": fit.mean,
        "loss": None if bool(torch.isnan(fit.nll)) else fit.nll,
        "n_data": fit.n_data,
        "n_positions": fit.n_positions,
        "n_outputs": fit.n_outputs,
        "output_loss": fit.output_nll,
        "noise_shape": fit.noise_shape,
        "trained": fit.trained,
        "density": None if fit.density is None else fit.density.state(),
        "averaged": fit.averaged,
        curvature: fit.curvature.state(),
    }


def fit_from(
    state: Mapping[str, Any], curvature: AbstractCurvature, head: Sequence[tuple[int, ...]] | None, dtype: torch.dtype
) -> Fit:
    """What was learned, from its entries."""
    counts = state["n_data"], state["n_positions"], state["n_outputs"]
    found = (state.get("output_loss"), state.get("noise_shape"))
    by_output, shape = (None if value is None else value.to(dtype) for value in found)
    mean = state["mean"].to(dtype)
    loss = mean.new_full((), torch.nan) if state["loss"] is None else state["loss"].to(dtype)
    trained, density = (state.get(name) for name in ("trained", "density"))
    return Fit(
        mean,
        curvature,
        loss,
        *counts,
        by_output,
        head,
        shape,
        None if trained is None else trained.to(dtype),
        None if density is None else ClassSums.from_state(density),
        state.get("averaged", False),
    )


def moved(fit: Fit, curvature: AbstractCurvature, like: Tensor) -> Fit:
    """A fit where ``like`` is, in its precision; the curvature is there already."""
    numbers = {name: getattr(fit, name) for name in ("mean", "nll", "output_nll", "noise_shape", "trained")}
    there = {name: None if value is None else value.to(like) for name, value in numbers.items()}
    density = None if fit.density is None else fit.density.to(like.device)
    return replace(fit, curvature=curvature, density=density, **there)


__all__ = ["HEADER", "all_or_nothing", "blamed", "check_usable", "fit_from", "moved", "of_fit", "readable", "tables_of"]
