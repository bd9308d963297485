"""``merge`` and ``subtract``: what was learned of other data is added or taken away, without a pass over them."""

# Functions of an estimator, in its own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from laplace import linalg
from laplace.baselaplace import states
from laplace.baselaplace.fitting import take_fit
from laplace.baselaplace.observed import KEPT_FEATURES
from laplace.baselaplace.statefile import digest
from laplace.errors import InputError, UnsupportedError
from laplace.fit import Fit
from laplace.tuning import HeadData

if TYPE_CHECKING:
    from laplace.baselaplace.parametric import ParametricLaplace

Own = TypeVar("Own")


@linalg.lasting
def merge(self: Own, other: Own) -> Own:
    """Add what another object learned of other data: the fit of both, as if one had seen all of them.

    Parameters
    ----------
    other
        An estimator of the same class, fitted to other data around the same weights of the same model: by another
        process, on another day, loaded from a file. It is left as it is.

    Returns
    -------
    This object. Curvature, loss, counts and the density of features are those of all data; hyperparameters stay.

    Raises
    ------
    NotFittedError
        Before ``fit`` of either.
    UnsupportedError
        If the structure keeps no sums (``"ekfac"``, ``"lowrank"``, ``"gp"``); if the curvatures are of two kinds; if
        weights or curvature of one were assigned, chosen by ``tune`` or averaged by ``method="elbo"``.
    InputError
        If the other object is no estimator of this class, or is of another model or likelihood, other weights or the
        same data. This object is then what it was.

    Warns
    -----
    UserWarning
        If ``tune`` compared with rows under the present density of features; tune again.

    Notes
    -----
    Exact: equal to one ``fit`` to all data, to rounding. No pass over data is made. Whether data overlap can be seen
    only where they are all the same, or those of a fit that was merged before, unless this object was saved since.
    """
    return _combined(self, other, add=True)


@linalg.lasting
def subtract(self: Own, other: Own) -> Own:
    """Remove what another object learned of some of the data: the fit to the rest, as if they had never been seen.

    The weights stay those of the model, which was trained on whatever it was trained on: removing data from it takes
    training, and then a new ``fit``.

    Parameters
    ----------
    other
        An estimator of the same class, fitted to the data to remove around the same weights. It is left as it is.

    Returns
    -------
    This object. Features that ``fit`` kept for ``tune`` are gone: pass ``train_loader=`` to it.

    Raises
    ------
    NotFittedError
        Before ``fit`` of either.
    UnsupportedError
        As of ``merge``, and where the curvature is sampled (``stochastic=True``), as that of the data to remove is then
        another one than what was added.
    InputError
        As of ``merge``; if more rows, larger losses or a larger curvature are to be removed than were fitted, for
        these were not among the data; or if no data would be left. This object is then what it was.

    Warns
    -----
    UserWarning
        If ``tune`` compared with rows under the present density of features; tune again.

    Notes
    -----
    Exact to rounding, which is that of all data: where few of many are left, their share of it is larger. Rows that
    were never fitted are noticed where counts, losses or diagonals would become negative. A state does not say whether
    its curvature was sampled: one that was loaded is taken as this object's ``backend_kwargs`` say.
    """
    return _combined(self, other, add=False)


def _combined(la: Any, other: Any, *, add: bool) -> Any:
    """Check, compute, assign: all of it or nothing."""
    what = "merge" if add else "subtract"
    if type(other) is not type(la):
        msg = f"{what} takes another {type(la).__name__}, fitted to other data; got {type(other).__name__}."
        raise InputError(msg)
    la.curvature_type.check_exact()
    here, there = la._fitted, other._fitted
    _check_same_model(la, other, what)
    for fit, whose in ((here, "This object"), (there, "The other object")):
        fit.curvature.check_exact()
        _check_sums(fit, whose)
    there = states.moved(there, la._moved(there.curvature), here.mean)
    if not torch.equal(here.mean, there.mean):
        msg = (
            f"{what} takes a fit around the same weights; the mean of the other one differs by up to "
            f"{float((here.mean - there.mean).abs().max()):.3g}. Fit both around the same weights of the model."
        )
        raise InputError(msg)
    mark = digest({"nll": there.nll, "n": there.n_data, "curvature": there.curvature.state()})
    if add:
        if other is la or _same_data(here, there) or here.parts.get(mark) == 1:
            msg = "The other object was fitted to the same data, which would count twice. Merge each part once."
            raise InputError(msg)
        fit, kept, why = here.merge(there), *_kept(la, other)
    else:
        if la.backend.is_sampled or other.backend.is_sampled:
            msg = (
                "A sampled curvature (stochastic=True) of some data is another one each time, and not what was added "
                "for them. Fit the data that are left, or use the exact curvature."
            )
            raise UnsupportedError(msg)
        if here.parts.get(mark) == -1:
            msg = "The data of the other object were subtracted before. Subtract each part once."
            raise InputError(msg)
        fit = here.subtract(there, squares=la.backend.matrix != "Hessian")
        kept, why = None, "subtract() removed some of their rows."
    fit = replace(fit, parts={**here.parts, mark: here.parts.get(mark, 0) + (1 if add else -1)})
    reason = (la if here.density is None else other)._why_not[0] if fit.density is None else la._why_not[0]
    with states.all_or_nothing(la):
        take_fit(la, fit, again=False)
        la._kept, la._why_not = kept, (reason, why)
        la._hyperparameters_changed()
    return la


def _check_same_model(la: ParametricLaplace, other: ParametricLaplace, what: str) -> None:
    """Raise unless two objects say the same of model, likelihood, random weights and curvature."""
    if la.backend.matrix != other.backend.matrix:
        msg = (
            f"{what} takes the same kind of curvature; this one is of the {la.backend.matrix}, the other one of the "
            f"{other.backend.matrix}. Pass the same backend= to both."
        )
        raise UnsupportedError(msg)
    ours, theirs = ({**one._identity(), **one._random_weights.choices()} for one in (la, other))
    for key, value in ours.items():
        given: Any = theirs[key]
        if not (torch.equal(value.cpu(), given.cpu()) if isinstance(value, Tensor) else value == given):
            name = "weights of the model" if key == "fingerprint" else key
            shown = "" if key == "fingerprint" else f": {value} here, {given} there"
            msg = (
                f"{what} takes a fit of the same model and likelihood; the {name} differ{shown}. Sums "
                "around other weights, or under another likelihood, belong to another posterior."
            )
            raise InputError(msg)


def _check_sums(fit: Fit, whose: str) -> None:
    """Raise unless a fit is a sum over data at the weights of the model."""
    if not fit.n_data or fit.is_unknown:
        msg = (
            f"{whose} was given its weights or curvature by hand (la.mean, la.H), which are no sum over data. Call "
            "fit(train_loader)."
        )
        raise UnsupportedError(msg)
    if fit.averaged:
        msg = (
            f"The curvature of {whose[0].lower()}{whose[1:]} is averaged over the posterior of all its data "
            '(method="elbo"), which are no sum around the same weights. Fit again, and choose after merging.'
        )
        raise UnsupportedError(msg)
    if fit.trained is not None:
        msg = (
            f"{whose} has the head that tune chose by its data; sums around different heads have no sum. Fit both "
            "again (fit starts from the head of the model), and call tune afterwards."
        )
        raise UnsupportedError(msg)


def _same_data(first: Fit, second: Fit) -> bool:
    """Whether two fits are of the same data in the same order: all is equal, to the last bit."""
    numbers = [(fit.n_data, fit.n_positions, float(fit.nll)) for fit in (first, second)]
    if numbers[0] != numbers[1] or numbers[0][2] == 0:  # nothing is known of rows without any loss
        return False
    return digest(first.curvature.state()) == digest(second.curvature.state())


def _kept(la: ParametricLaplace, other: ParametricLaplace) -> tuple[HeadData | None, str]:
    """Features of the data of both for ``tune``, and why there are none."""
    for one in (la, other):
        if one._kept is None:
            return None, one._why_not[1]
    here, there = la._kept, other._kept
    assert here is not None and there is not None, "both are there"
    if here.phi.numel() + there.phi.numel() > KEPT_FEATURES:
        return None, f"The features of the training data are more than {KEPT_FEATURES:,} numbers."
    together = here.followed_by(there.to(here.phi))
    return together, "The training data have targets of two kinds." if together is None else la._why_not[1]


__all__ = ["merge", "subtract"]
