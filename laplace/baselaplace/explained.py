"""``predict``: predictions with their uncertainty in parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace import checks, pending
from laplace.baselaplace.options import check_model_keywords
from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError, UnsupportedError
from laplace.free_memory import explained_predictions
from laplace.network import evaluating, full_precision
from laplace.network.batches import inputs_of, is_loader, number_of
from laplace.predictive import Options, Prediction, compare
from laplace.predictive.prediction import explain, joined
from laplace.types import Inputs, LinkApproxLike, ModelKeyword


def predict(
    self: Any,
    x: Inputs | Iterable[Any],
    link_approx: LinkApproxLike = LinkApprox.PROBIT,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
    fitting: bool = False,
    progress_bar: bool = False,
    **model_kwargs: ModelKeyword,
) -> Prediction:
    """Predict, and say how much of the uncertainty is that of the weights.

    Parameters
    ----------
    x
        A batch of inputs: a tensor, or any nesting of tuples, lists and mappings of tensors. Any other iterable is a
        loader of batches as ``fit`` takes them, or of inputs alone; their targets are not looked at.
    link_approx
        From logits to probabilities, as in a call of the object.
    n_samples
        For the entropies of a classifier, and ``link_approx="mc"``.
    generator
        Source of randomness, on the model's device.
    fitting
        Reward modeling: ``x`` are pairs, ``[batch, 2, ...]``; predict which item is preferred. Others raise.
    progress_bar
        Show a progress bar over the batches of a loader.
    **model_kwargs
        Passed to the model's ``forward``.

    Returns
    -------
    A ``Prediction``. Its ``mean`` is what a call of the object returns, and ``epistemic_variance`` the variance that
    it returns beside it; observation noise comes on top, in ``aleatoric_variance``.

    Raises
    ------
    NotFittedError
        Before ``fit``.
    UnsupportedError
        If options do not exist or do not go together, a keyword for the model is a misspelt option, or a likelihood of
        one's own does not say the variance of its targets (``noise_variance``).
    InputError
        If the model's outputs are not finite, or a loader yields nothing.

    Notes
    -----
    One forward pass (of all weights also one backward pass per output). A loader is read batch by batch: of each the
    prediction is kept, without a graph, on the device of the model. Of classes, ``n_samples`` samples of the
    outputs are drawn. Width at foreign inputs counts as epistemic. Of a mixture (``average="mixture"``) samples are
    those of the averaged head.

    References
    ----------
    Depeweg, Hernández-Lobato, Doshi-Velez & Udluft (2018), "Decomposition of uncertainty in Bayesian deep learning for
    efficient and risk-sensitive learning". arXiv:1710.07283
    """
    # Variances are enough for the probit approximation and for moments; other links use covariances.
    options = self._options(PredType.GLM, False, link_approx, n_samples, False, generator, fitting)
    if options.link is LinkApprox.PROBIT:
        options = replace(options, diagonal_output=True)
    check_model_keywords(self._network, predict, model_kwargs)
    progress_bar = checks.flag("progress_bar", progress_bar)
    if not is_loader(x):
        return _at(self, x, options, model_kwargs)
    parts: list[Prediction] = []
    with torch.no_grad(), pending.gathered() as flags:
        for batch in tqdm(iter(x), "[Predicting]", number_of(x), disable=not progress_bar):
            parts.append(_at(self, inputs_of(batch, self._device), options, model_kwargs).alone())
            flags.next_batch()
    if not parts:
        msg = "The loader yields no batch: there is nothing to predict. An iterator can be read once only."
        raise InputError(msg)
    return joined(parts)


def predict_std(
    self: Any,
    x: Inputs | Iterable[Any],
    link_approx: LinkApproxLike = LinkApprox.PROBIT,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
    **model_kwargs: ModelKeyword,
) -> Tensor:
    """The standard deviation of a new target: weights and observation noise together.

    Parameters
    ----------
    x, link_approx, n_samples, generator, **model_kwargs
        As in ``predict``.

    Returns
    -------
    In target units, in the shape of ``la.predict(x).mean``: the square root of its ``total_variance``.

    Raises
    ------
    NotFittedError
        Before ``fit``.
    UnsupportedError
        Of a classifier, whose predictions are probabilities, and of scores, which are no targets.
    """
    found = predict(self, x, link_approx, n_samples, generator, False, False, **model_kwargs)
    if found.total_variance is None:
        what = "scores have no target" if found.entropy is None else "probabilities have entropies instead"
        msg = (
            f"likelihood={self.likelihood!r} has no standard deviation of a target: {what}. la.predict(x) returns "
            "the parts that there are."
        )
        raise UnsupportedError(msg)
    return found.total_variance.sqrt()


@pending.gathers
def _at(la: Any, x: Inputs, options: Options, model_kwargs: dict[str, Any]) -> Prediction:
    """Of one batch."""
    with explained_predictions(), evaluating(la.model, enable_backprop=la.enable_backprop):
        posterior, likelihood = la._predicting_posterior, la._frozen_likelihood
        inputs = la._checked_linearization(x, **model_kwargs)
        with full_precision(la._device):
            found = la._adjustments.predict(inputs, la._fitted, posterior, likelihood, options, la._dtype)
            seen = la._adjusted(inputs)
            seen, of = (compare(seen), likelihood.for_targets()) if options.fitting else (seen, likelihood)
            told = explain(
                found, seen, posterior, of, lambda: of.expectation(la._samples_at(seen, posterior, options)), la._dtype
            )
    if la._is_untuned:
        la._compared(seen.f, found, likelihood)
    return told.with_each(la._reading.returned)


__all__ = ["predict", "predict_std"]
