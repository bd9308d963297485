"""How foreign inputs are (``ood_score``), by the density of their features or by predictions."""

# Functions of an estimator, in its own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from laplace import density, pending
from laplace.baselaplace.adjustments import distance
from laplace.density import FeatureDensity, Reference
from laplace.enums import ForeignScore, PredType, choose
from laplace.errors import NotFittedError, UnsupportedError, warn
from laplace.likelihoods import AbstractLikelihood
from laplace.likelihoods.predictions import PredictsProbabilities
from laplace.network import evaluating, full_precision
from laplace.predictive import Options
from laplace.types import ForeignScoreLike, Inputs

if TYPE_CHECKING:
    from laplace.baselaplace.parametric import ParametricLaplace

OF_PROBABILITIES = (ForeignScore.MAX_PROB, ForeignScore.ENTROPY, ForeignScore.MUTUAL_INFORMATION)
"""Scores that look at predictions alone."""


def _chosen(kind: ForeignScoreLike | None, likelihood: AbstractLikelihood, n_outputs: int) -> ForeignScore:
    """The kind that was asked for, or the default; Fisher's score needs classes."""
    classes = likelihood.n_groups(n_outputs) > 1
    if kind is None:
        return ForeignScore.FISHER if classes else ForeignScore.DENSITY
    found = choose(ForeignScore, kind, "kind")
    if found in (ForeignScore.FISHER, *OF_PROBABILITIES) and not classes:
        why = f"kind={found.value!r} looks at class probabilities, and there are none here."
        if isinstance(likelihood, PredictsProbabilities) and not likelihood.exclusive:
            why = (
                f"kind={found.value!r} is one number for a row of which one class is right; labels of "
                f"likelihood={likelihood.name!r} are independent and have an entropy each: la.predict(x).entropy."
            )
        msg = f"{why} Ask for kind='density'."
        raise UnsupportedError(msg)
    return found


@pending.gathers
def score(la: ParametricLaplace, x: Inputs, kind: Any, options: Options) -> Float[Tensor, "batch ..."]:
    """One number for each input, ``[batch, *positions]``."""
    fit, likelihood = la._fitted, la._frozen_likelihood
    chosen = _chosen(kind, likelihood, fit.n_outputs)
    if chosen is ForeignScore.MUTUAL_INFORMATION:
        samples = likelihood.expectation(la._functions(x, options))
        flat = likelihood.probabilities(samples.reshape(-1, samples.shape[-1]))
        return density.mutual_information(flat.reshape(*samples.shape[:-1], -1))
    if chosen in OF_PROBABILITIES:
        of, predicted = (
            density.max_prob if chosen is ForeignScore.MAX_PROB else density.entropy,
            la._predicted(x, la._options(PredType.GLM)),
        )
        assert isinstance(predicted, Tensor), "of classes"
        return of(likelihood.probabilities(predicted.reshape(-1, predicted.shape[-1]))).reshape(predicted.shape[:-1])
    found = fit.feature_density
    with evaluating(la.model, enable_backprop=la.enable_backprop):
        inputs = la._checked_linearization(x, PredType.NN)  # which takes no derivatives
        with full_precision(la._device):
            features = None if found is None else inputs.features
            if found is None or features is None:
                reason = fit.why_no_density or la._why_not[0]
                msg = f"kind={chosen.value!r} needs a density of the features of the training data. {reason}"
                raise UnsupportedError(msg)
            if chosen is ForeignScore.RELATIVE:
                values = found.relative(features)
            elif chosen is ForeignScore.DENSITY:
                values = distance(found, features, likelihood)
            else:
                reference = _reference(la, found, likelihood)
                at = likelihood.tempered(la._adjustments.temperature / la._output_temperature)
                values = reference.fisher(at.log_doubt(inputs.f).flatten(), found.g(features))
            return values.reshape(inputs.f.shape[:-1]).to(inputs.f.dtype)


def _reference(la: ParametricLaplace, found: FeatureDensity, likelihood: AbstractLikelihood) -> Reference:
    """Rows that scores are compared with: those that ``tune`` looked at, or the training data, with a warning."""
    known, kept = la._adjustments.reference, la._kept
    if known is not None:
        return known
    if kept is None:
        msg = (
            "kind='fisher' compares with rows of the data: call tune(val_loader) first. (fit kept no features; "
            "kind='density' needs no reference.)"
        )
        raise NotFittedError(msg)
    doubt = likelihood.log_doubt(kept.outputs(la._fitted.mean))
    known = Reference.of(doubt, found.g(kept.phi), "training")
    warn(" ".join(known.notes), UserWarning)
    la._adjustments = replace(la._adjustments, reference=known, temperature=la._output_temperature)
    return known


__all__ = ["score"]
