"""What callbacks of training loops do after training: fit the posterior of the network, tune it, compare both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from torch import nn

from laplace.baselaplace.keywords import AnyKeywords
from laplace.errors import InputError, UnsupportedError
from laplace.evaluation import Report, compare_regressors, side_by_side
from laplace.laplace import Laplace
from laplace.likelihoods import AbstractLikelihood, LikelihoodLike
from laplace.likelihoods.predictions import PredictsProbabilities
from laplace.types import HessianStructureLike, SubsetOfWeightsLike

Loader: TypeAlias = Iterable[Any]
Grounds: TypeAlias = Literal["validation", "marglik"] | None
"""On what confidence is chosen: held-out data, the evidence, or not at all."""


def check_tuning(tuning: Grounds) -> None:
    """Raise unless ``tuning`` is one of the grounds."""
    if tuning not in ("validation", "marglik", None):
        msg = f'tuning is "validation", "marglik" or None; got {tuning!r}.'
        raise UnsupportedError(msg)


def learn(la: Any, train: Loader, held: Loader | None, tuning: Grounds) -> None:
    """Fit an estimator and choose its confidence; ``held`` is there for ``tuning="validation"``."""
    la.fit(train)
    if tuning == "validation":
        la.tune(held)
    elif tuning == "marglik":
        noise = "scalar" if "sigma_noise" in la.likelihood_.hyperparameters else "keep"
        la.optimize_prior_precision(method="marglik", noise=noise)
    else:
        la.accept_untuned()


def compared(la: Any, held: Loader | None) -> Report | None:
    """The network alone and its posterior on held-out data; ``None`` where no table is for the likelihood."""
    if held is None:
        return None
    likelihood: AbstractLikelihood = la.likelihood_
    keys: dict[str, Any] = {"dict_key_x": la.dict_key_x, "dict_key_y": la.dict_key_y, "timed": False}
    if isinstance(likelihood, PredictsProbabilities):
        return side_by_side(la.model, {"laplace": la}, held, **keys) if likelihood.exclusive else None
    if "sigma_noise" in likelihood.hyperparameters:
        return compare_regressors(la.model, {"laplace": la}, held, val_loader=held, **keys)
    return None


class AfterTraining:
    """The choices of a callback, and what it does with them."""

    def __init__(
        self,
        likelihood: LikelihoodLike,
        subset_of_weights: SubsetOfWeightsLike = "last_layer",
        hessian_structure: HessianStructureLike = "kron",
        *,
        tuning: Grounds = "validation",
        train_loader: Loader | None = None,
        val_loader: Loader | None = None,
        network: str | None = None,
        log: bool = True,
        laplace_options: AnyKeywords | None = None,
    ) -> None:
        check_tuning(tuning)
        self._choices = likelihood, subset_of_weights, hessian_structure
        self._tuning: Grounds = tuning
        self._train_loader, self._val_loader = train_loader, val_loader
        self._network, self._log = network, log
        self._options = dict(laplace_options or {})
        self.laplace: Any = None
        self.report: Report | None = None

    def _check_held(self, *, is_there: bool) -> None:
        """Raise, before the training, where ``tune`` would miss its data after it."""
        if self._tuning == "validation" and self._val_loader is None and not is_there:
            msg = (
                'tuning="validation" chooses confidence on held-out data, and this training has none. Pass val_loader= '
                'to the callback, or tuning="marglik", which needs none.'
            )
            raise InputError(msg)

    def _estimator(self, model: nn.Module) -> Any:
        """An estimator of the network, not fitted."""
        network, name = model, self._network
        if name is not None:
            try:
                network = model.get_submodule(name)
            except AttributeError as error:
                names = ", ".join(repr(child) for child, _ in model.named_children())
                msg = f"network={name!r} is no part of the {type(model).__name__}; its parts are {names or 'none'}."
                raise InputError(msg) from error
        make: Any = Laplace
        return make(network, *self._choices, **self._options)

    def _learn(self, model: nn.Module, train: Loader, held: Loader | None) -> dict[str, float]:
        """Fit and tune; returns the numbers to log. ``laplace`` changes once all has worked."""
        held = held if self._val_loader is None else self._val_loader
        self._check_held(is_there=held is not None)
        la = self._estimator(model)
        learn(la, train if self._train_loader is None else self._train_loader, held, self._tuning)
        report = compared(la, held) if self._log else None
        self.laplace, self.report = la, report
        rows = {} if report is None else report.rows
        names = {"MAP": "network"}
        return {f"{names.get(row, row)}/{name}": value for row, found in rows.items() for name, value in found.items()}


__all__ = ["AfterTraining", "check_tuning", "compared", "learn"]
