"""The two kinds of predictions: moments of what is predicted, and probabilities of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.density import entropy
from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods.base import AbstractLikelihood, Ask, Link
from laplace.types import Outputs, Scalar, Targets

BRIDGES = (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM)
OF_CLASSES = (*BRIDGES, LinkApprox.MF1, LinkApprox.MF2)
"""Links that turn several logits into probabilities, and of anything else make no sense."""
MAX_AVERAGED = 100
"""Most classes over whose logits variational inference averages."""


def as_it_is(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """The link of what is predicted already."""
    return mean, cov


def moments_of(parts: Iterable[Tensor], n_samples: int, center: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of samples that come in parts, from numbers near which they are."""
    if n_samples < 2:
        msg = f"A variance over samples needs n_samples of at least 2; got {n_samples}."
        raise InputError(msg)
    total, squares = torch.zeros_like(center), torch.zeros_like(center)
    for part in parts:
        deviation = part - center
        total, squares = total + deviation.sum(0), squares + deviation.square().sum(0)
    shift = total / n_samples
    return center + shift, (squares - n_samples * shift.square()) / (n_samples - 1)


class PredictsMoments(AbstractLikelihood):
    """Predictions are mean and (co)variance of E[y|f]; every link is their closed form."""

    @classmethod
    def _problem_with(cls, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> str:  # noqa: ARG003
        if link in OF_CLASSES:
            return f"link_approx={link.value!r} turns logits into probabilities; regression and scores have none."
        return ""

    def asks(self, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> Ask:  # noqa: ARG002
        """Covariances, unless variances or samples are asked for."""
        if kind is PredType.NN:
            return Ask.FUNCTIONS
        if joint:
            return Ask.JOINT
        return Ask.VARIANCE if diagonal_output else Ask.COVARIANCE

    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:  # noqa: ARG002
        """Outputs are what is predicted."""
        return as_it_is

    def average(
        self, functions: Iterable[Float[Tensor, "samples rows outputs"]], n_samples: int, center: Outputs
    ) -> tuple[Tensor, Tensor, Link]:
        """Mean and variance ``[rows, C]`` of E[y|f] over samples, without keeping all of them."""
        return *moments_of((self.expectation(f) for f in functions), n_samples, self.expectation(center)), as_it_is

    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """Mean and (co)variance of E[y|f]."""
        return link(mean, cov)

    def predict_joint(self, mean: Outputs, cov: Float[Tensor, "joint joint"]) -> tuple[Tensor, Tensor]:
        """The same across inputs."""
        return self.link(LinkApprox.PROBIT, 1, None)(mean.flatten(), cov)


class PredictsProbabilities(AbstractLikelihood):
    """Predictions are class probabilities; links give their logs, so that scores of saturated ones stay finite."""

    hyperparameters: ClassVar[tuple[str, ...]] = ("output_temperature",)
    output_temperature: float | Tensor
    """What logits are divided by before the link: T > 1 softens, T < 1 sharpens."""
    links: ClassVar[Any]
    """Those that there are: a set, or functions by name."""
    variance_links: ClassVar[frozenset[LinkApprox]]
    """Links that use variances alone."""
    unlinked: ClassVar[str] = "has no such link"
    """Why the other links are missing."""
    exclusive: ClassVar[bool] = True
    """Whether one class of a row is right, of those whose probabilities are predicted."""

    @classmethod
    def _problem_with(cls, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> str:
        if link not in cls.links:
            return f"link_approx={link.value!r} {cls.unlinked}"
        if joint and link is not LinkApprox.MC:
            return 'Probabilities with joint=True average over whole functions: pass link_approx="mc" with it.'
        if link in OF_CLASSES and kind is PredType.NN:
            return f'pred_type="nn" averages over weight samples; link_approx={link.value!r} needs pred_type="glm".'
        if link in BRIDGES and diagonal_output:
            return f"link_approx={link.value!r} needs covariances between outputs: leave out diagonal_output=True."
        return ""

    def asks(self, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> Ask:
        """As little as the link needs."""
        if kind is PredType.NN or joint:
            return Ask.FUNCTIONS
        return Ask.VARIANCE if diagonal_output or link in self.variance_links else Ask.COVARIANCE

    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> Tensor:
        """Class probabilities, ``[rows, C]``; rows sum to one."""
        return link(mean, cov).exp()

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Cross-entropy of the predictive probabilities, summed; in log space, so that it stays finite."""
        log_probabilities, label = link(mean, cov), self.label(y)
        if label.is_floating_point():
            return -(label * log_probabilities).sum()
        return F.nll_loss(log_probabilities, label, reduction="sum")

    def brier(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Σ_c (p_c − y_c)², summed over rows."""
        probabilities, label = link(mean, cov).exp(), self.label(y)
        if not label.is_floating_point():
            label = F.one_hot(label, probabilities.shape[-1]).to(probabilities.dtype)
        return (probabilities - label).square().sum()

    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """Two sums, and the calibration error."""
        return {"nll": self.predictive_nll, "brier": self.brier, "ece": None}

    def label(self, y: Targets) -> Tensor:
        """The targets themselves."""
        return y

    def probabilities(self, prediction: Tensor) -> Float[Tensor, "rows classes"]:
        """The predictions themselves."""
        return prediction

    def entropy(self, prediction: Tensor) -> Tensor:
        """−Σ p log p over classes, ``[...]``; of each label where several may be right, ``[..., C]``."""
        rows = self.probabilities(prediction.reshape(-1, prediction.shape[-1]))
        return entropy(rows).reshape(prediction.shape[:-1] if self.exclusive else prediction.shape)

    def foreign_variance(self, scale: float, excess: Float[Tensor, " rows"]) -> Float[Tensor, "rows outputs"]:
        """T² s² e of each logit."""
        T = linalg.number(self.output_temperature, excess.device, excess.dtype)
        return (T**2 * scale * excess).unsqueeze(-1)

    @classmethod
    def check_variational_head(cls, n_outputs: int) -> None:
        """Raise where there are so many classes that a few points for each row say little."""
        if n_outputs > MAX_AVERAGED:
            msg = (
                f'method="elbo" averages over the logits of up to {MAX_AVERAGED} classes; the model has {n_outputs}. '
                "Use validation data: tune(val_loader)."
            )
            raise UnsupportedError(msg)
