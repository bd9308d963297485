"""What a prediction contains: its mean, and how much of its uncertainty is that of the weights (``predict``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.likelihoods import AbstractLikelihood
from laplace.predictive.base import Linearization
from laplace.structures import AbstractPrecision


@dataclass(frozen=True)
class Prediction:
    """Predictions of a batch, with their uncertainty in parts.

    What a likelihood does not have is ``None``: of classes there are entropies, of numbers variances. *Epistemic* is
    what more training data would take away, *aleatoric* what they would not.

    Attributes
    ----------
    mean
        Of classes their probabilities, else the expected target (of a reward model the score), ``[batch, *positions,
        C]``, or with C where the model has it.
    epistemic_variance
        Of E[y | weights], in target units squared, in the shape of ``mean``.
    aleatoric_variance
        The expected variance of a target whose weights are known: the observation noise. ``None`` for scores.
    total_variance
        Their sum, the variance of a target. ``None`` for scores.
    entropy
        Of the predicted probabilities, in nats, ``[batch, *positions]``; of independent labels one for each,
        ``[batch, *positions, C]``.
    expected_entropy
        What is left of it when the weights are known, in nats: the aleatoric part.
    mutual_information
        Of target and weights, in nats: the epistemic part, ``entropy − expected_entropy``.

    Examples
    --------
    >>> from laplace import Laplace
    >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    >>> la = Laplace(model, "classification", prior_precision=2.0).fit([(x, y)])
    >>> prediction = la.predict(x)
    >>> prediction.mean.shape, prediction.mutual_information.shape
    (torch.Size([8, 3]), torch.Size([8]))
    """

    mean: Float[Tensor, "*rows"]
    epistemic_variance: Float[Tensor, "*rows"] | None = None
    aleatoric_variance: Float[Tensor, "*rows"] | None = None
    total_variance: Float[Tensor, "*rows"] | None = None
    entropy: Float[Tensor, "..."] | None = None
    expected_entropy: Float[Tensor, "..."] | None = None
    mutual_information: Float[Tensor, "..."] | None = None

    def with_each(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """With a function of each part in the shape of ``mean``, such as another order of axes."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        n_axes = self.mean.dim()
        changed = {name: function(v) for name, v in parts.items() if v is not None and v.dim() == n_axes}
        return Prediction(**{**parts, **changed})

    def alone(self) -> Prediction:
        """With parts that hold no memory but their own: no graph, and no larger tensor that they are views of."""

        def own(value: Tensor) -> Tensor:
            value = value.detach()
            return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value

        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Prediction(**{name: own(value) for name, value in parts.items() if value is not None})

    def as_tuple(self) -> tuple[Tensor, ...]:
        """The parts that are there, in the order of the attributes: the mean first."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """The predictions of several batches as one."""
    of_each = zip(*(part.as_tuple() for part in parts), strict=True)
    names = [field.name for field in fields(Prediction) if getattr(parts[0], field.name) is not None]
    return Prediction(**{name: torch.cat(values) for name, values in zip(names, of_each, strict=True)})


def explain(
    found: Tensor | tuple[Tensor, Tensor],
    inputs: Linearization,
    precision: AbstractPrecision,
    likelihood: AbstractLikelihood,
    samples: Callable[[], Tensor],
    dtype: torch.dtype,
) -> Prediction:
    """The parts of a prediction that was made of these inputs; samples of probabilities are drawn where there are some.

    The mutual information is that of the samples, and at most the entropy of the prediction: their difference is the
    expected entropy, whatever the link approximates.
    """
    if isinstance(found, Tensor):
        each, entropy = samples(), likelihood.entropy(found)
        information = likelihood.entropy(each.mean(0)) - likelihood.entropy(each).mean(0)
        information = information.clamp(min=0).minimum(entropy)
        parts = {"expected_entropy": entropy - information, "mutual_information": information}
        return Prediction(found, entropy=entropy, **parts)
    mean, epistemic = found
    if epistemic.dim() > mean.dim():
        epistemic = epistemic.diagonal(dim1=-2, dim2=-1)
    noise = likelihood.noise_variance(inputs.mean(dtype), inputs.variance(precision, dtype))
    if noise is None:
        return Prediction(mean, epistemic)
    noise = noise.to(mean).reshape(mean.shape)
    return Prediction(mean, epistemic, noise, epistemic + noise)


__all__ = ["Prediction", "explain", "joined"]
