"""Binary classification: one output, the logit of a Bernoulli distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laplace import linalg, pending
from laplace.density import log_one_minus_max
from laplace.enums import Likelihood, LinkApprox
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import quadrature, softmax
from laplace.likelihoods.base import Ask, Link, Positions, check_outputs, datum_index, variance_of
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsProbabilities
from laplace.types import Outputs, Scalar, Targets


@dataclass(frozen=True)
class BernoulliLikelihood(PredictsProbabilities):
    """−log p(y|f) = softplus(f) − y f, tempered by 1/T; y is 0 or 1.

    Attributes
    ----------
    temperature
        T.
    output_temperature
        What the logit is divided by before the link, when predicting.

    Notes
    -----
    The link ``"probit"`` is off by at most 0.02 from the integral over the logit, whatever its mean and variance.
    """

    temperature: float | Tensor = 1.0
    output_temperature: float | Tensor = 1.0

    name: ClassVar[str] = Likelihood.BINARY.value
    links: ClassVar[Mapping[LinkApprox, Callable[..., Tensor]]] = {
        LinkApprox.PROBIT: softmax.probit,
        LinkApprox.MC: softmax.mc,
    }
    variance_links: ClassVar[frozenset[LinkApprox]] = frozenset(links)
    unlinked: ClassVar[str] = 'is made for several classes; for a single logit use "probit" or "mc".'

    # -- fitting: all of it for any number of logits, and for soft labels; of missing ones (NaN) nothing is left ------

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """Cross-entropy summed over rows."""
        return -(_both(y) * _log_both(f)).sum()

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """σ(f) − y, ``[rows, C]``; of a confident output without the difference, which would leave no digits."""
        absent, present = _both(y).chunk(2, -1)
        return absent * torch.sigmoid(f) - present * torch.sigmoid(-f)

    def hessian(self, f: Outputs) -> OutputHessian:
        """diag(p (1 − p))."""
        return OutputHessian(f.shape[-1], diagonal=_spread(f))

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """Its root, ``[rows, C, C]``."""
        return torch.diag_embed(_spread(f).sqrt())

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at labels drawn from the probabilities, ``[samples, rows, C]``."""
        uniform = torch.rand(n_samples, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
        return torch.where(uniform < f.sigmoid(), -torch.sigmoid(-f), f.sigmoid())

    def n_groups(self, n_outputs: int) -> int:  # noqa: ARG002 - there is one
        """Two."""
        return 2

    def group_of(self, y: Targets) -> Tensor | None:
        """0 or 1."""
        return (y[:, 0] > 0.5).long()

    def torch_loss(self) -> tuple[nn.Module, float] | None:
        """``BCEWithLogitsLoss`` and 1."""
        return nn.BCEWithLogitsLoss(reduction="sum"), 1.0

    # -- predicting: each logit is that of two classes, (0, f); probabilities of 0 come first, ``[rows, 2C]`` ---------

    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:
        """To log probabilities of 0 and of 1, ``[rows, 2C]``."""
        link = self.links[name]
        if name is LinkApprox.MC:
            link = partial(link, n_samples=n_samples, generator=generator)
        T = self.output_temperature

        def linked(mean: Outputs, cov: Tensor) -> Tensor:
            found = link(_pairs(mean / T), _pairs(variance_of(mean, cov) / T**2))
            return found.unflatten(0, mean.shape).movedim(-1, 1).flatten(1)

        return linked

    def average(
        self,
        functions: Iterable[Float[Tensor, "samples rows outputs"]],
        n_samples: int,
        center: Outputs,  # noqa: ARG002 - probabilities are averaged as they are
    ) -> tuple[Tensor, Tensor, Link]:
        """Log of the average probabilities of 0 and of 1, ``[rows, 2C]``."""
        found = softmax.average((_log_both(f / self.output_temperature) for f in functions), n_samples)
        return found, torch.zeros_like(found), lambda mean, _cov: mean

    def expectation(self, f: Tensor) -> Tensor:
        """The probability of 1, ``[..., C]``."""
        return (f / self.output_temperature).sigmoid()

    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> Outputs:
        """The probability of 1, ``[rows, C]``."""
        return link(mean, cov).chunk(2, -1)[1].exp()

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Cross-entropy of the predictive probabilities, summed; in log space, so that it stays finite."""
        return -(_both(y) * link(mean, cov)).sum()

    def brier(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Σ (p − y)² over 0 and 1, summed over rows and outputs."""
        label = _both(y)
        absent, present = label.chunk(2, -1)
        known = (absent + present).repeat(1, 2)
        return (known * (link(mean, cov).exp() - label).square()).sum()

    def label(self, y: Targets) -> Tensor:
        """The two probabilities of each label, ``[rows · C, 2]``; zeros of a missing one."""
        return _both(y).unflatten(-1, (2, -1)).mT.flatten(0, -2)

    def probabilities(self, prediction: Tensor) -> Float[Tensor, "rows classes"]:
        """Of 0 and 1, ``[rows · C, 2]``."""
        return torch.stack([1 - prediction, prediction], -1).flatten(0, -2)

    def log_doubt(self, f: Tensor) -> Float[Tensor, "*rows"]:
        """At the output temperature."""
        return log_one_minus_max(f / linalg.number(self.output_temperature, f.device, f.dtype))

    # -- variational inference ----------------------------------------------------------------------------------------

    def energy_asks(self, alpha: float) -> Ask:  # noqa: ARG002
        """Labels are independent, given their logits."""
        return Ask.VARIANCE

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:
        """Of each label's marginal, summed, by quadrature.

        To rounding for standard deviations of f up to 1, to 1e-6 nats at 3.
        """
        variance, (absent, present) = variance_of(mean, cov), _both(y).chunk(2, -1)
        known = absent + present
        if alpha == 0:
            found = quadrature.mean(lambda f: absent * F.softplus(f) + present * F.softplus(-f), mean, variance)
            return self.scale * found.sum(-1)
        power = alpha * self.scale
        found = quadrature.log_mean_exp(
            lambda f: power * (absent * F.logsigmoid(-f) + present * F.logsigmoid(f)),
            lambda f: power * (present * torch.sigmoid(-f) - absent * torch.sigmoid(f)),
            lambda f: power * known * _spread(f),
            mean,
            variance,
        )
        return -(known * found).sum(-1) / alpha

    @classmethod
    def check_sampled_energy(cls) -> None:
        """It may be."""

    def sampled_energy(
        self, samples: Float[Tensor, "samples rows outputs"], y: Targets, alpha: float
    ) -> Float[Tensor, " rows"]:
        """From samples of the logits, of all labels of a row together."""
        log_p = self.scale * (_both(y) * _log_both(samples)).sum(-1)
        return softmax.sampled(log_p, alpha)

    # -- data ---------------------------------------------------------------------------------------------------------

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets, 0 or 1 in ``[batch, *positions]`` or ``[batch, *positions, 1]``, and flatten positions."""
        check_one_output(f.shape[-1])
        if y.shape not in (f.shape, f.shape[:-1]):
            msg = f"Binary targets must have the shape {list(f.shape[:-1])} or {list(f.shape)}; got {list(y.shape)}."
            raise ShapeError(msg)
        proper = ((y == 0) | (y == 1)).all() & (not y.is_complex())
        msg = 'likelihood="binary" takes targets that are 0 or 1, of any type; others came.'
        pending.refuse(~proper, InputError, lambda: msg)
        check_outputs(f)
        flat = f.reshape(-1, 1)
        return Positions(flat, y.reshape(-1, 1).to(f.dtype), datum=datum_index(len(f), len(flat), f.device))

    def check_head(self, n_outputs: int) -> None:
        """Raise unless there is one output."""
        check_one_output(n_outputs)

    def count(self, y: Tensor, n_outputs: int) -> int | Tensor:  # noqa: ARG002
        """Number of targets."""
        return y.numel()


def check_one_output(n_outputs: int) -> None:
    """Raise unless the model has one output."""
    if n_outputs != 1:
        msg = (
            f'likelihood="binary" is one logit for each target, and the model has {n_outputs} outputs. For classes of '
            'which one is right use "classification".'
        )
        raise UnsupportedError(msg)


def _both(y: Tensor) -> Tensor:
    """How much a label says 0, and how much 1: ``(1 − y, y)``, ``[rows, 2C]``; nothing of a missing one."""
    return torch.cat([1 - y, y], -1).nan_to_num(0.0)


def _log_both(f: Tensor) -> Tensor:
    """log σ(−f) and log σ(f), ``[..., 2C]``."""
    return torch.cat([F.logsigmoid(-f), F.logsigmoid(f)], -1)


def _pairs(values: Tensor) -> Float[Tensor, "logits two"]:
    """(0, v) of each value, ``[rows · C, 2]``."""
    return torch.stack([torch.zeros_like(values), values], -1).flatten(0, -2)


def _spread(f: Tensor) -> Tensor:
    """p (1 − p), with all digits where p is near 0 or 1."""
    return torch.sigmoid(f) * torch.sigmoid(-f)
