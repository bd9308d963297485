"""Regression: a Gaussian with standard deviation ``sigma_noise`` around the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import linalg
from laplace.enums import CurvatureKind, Likelihood, PredType
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods.base import AbstractLikelihood, Link, Positions, check_outputs, check_same_shape, datum_index
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsMoments
from laplace.types import Outputs, Scalar, Targets


@dataclass(frozen=True)
class GaussianLikelihood(PredictsMoments):
    """−log p(y|f) = ‖y − f‖² / (2σ²) + C log(σ√2π), tempered by 1/T in its first term.

    Attributes
    ----------
    sigma_noise
        σ, the standard deviation of the observation noise in target units: ``[]``, or ``[C]``, one for each output.
    temperature
        T.
    weights
        Relative precisions of the outputs, ``[C]``, where they are part of what is summed at unit noise; ``None`` for
        equal ones.
    """

    sigma_noise: Tensor = field(default_factory=lambda: torch.ones(()))
    temperature: float | Tensor = 1.0
    weights: Tensor | None = None

    name: ClassVar[str] = Likelihood.REGRESSION.value
    hyperparameters: ClassVar[tuple[str, ...]] = ("sigma_noise",)

    @classmethod
    def check_noise(cls, sigma_noise: Tensor) -> None:
        """Any noise is one."""

    @classmethod
    def beside_prior(cls, noise: str | None, output_temperature: bool | None) -> tuple[str | None, int]:
        """The noise, one or one per output."""
        if output_temperature:
            msg = "output_temperature divides logits; regression has none. Its noise is chosen instead: noise='scalar'."
            raise UnsupportedError(msg)
        return (None, 0) if noise == "keep" else ("sigma_noise", 2 if noise == "per_output" else 1)

    def residual_noise(self, nll: Tensor, n_targets: int) -> Tensor:
        """Root mean squared residual."""
        return (2 * nll / n_targets).sqrt()

    def weighing(self, weights: Float[Tensor, " outputs"]) -> AbstractLikelihood:
        """The same at unit noise, with relative precisions of the outputs."""
        return GaussianLikelihood(weights=weights)

    @property
    def scale(self) -> Tensor:
        """1/(σ² T), ``[]`` or ``[C]``."""
        return 1 / (self.sigma_noise**2 * self.temperature)

    def curvature_scale(self, kind: CurvatureKind) -> Tensor:
        """1/(σ² T), ``[]`` or ``[C]``; for the empirical Fisher 1/(σ⁴ T), its gradients being (f − y)/σ²."""
        return self.scale if kind is CurvatureKind.GGN else self.scale / self.sigma_noise**2

    def log_normalizer(self, n_positions: int, n_outputs: int) -> Scalar:
        """N Σ_c log(σ_c √2π), in nats."""
        return n_positions * n_outputs * (self.sigma_noise.log().mean() + 0.5 * math.log(2 * math.pi))

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """½ Σ w (y − f)²."""
        return 0.5 * ((f - y) * self.gradient(f, y)).sum()

    def nll_by_output(self, f: Outputs, y: Targets) -> Float[Tensor, " outputs"]:
        """½ Σ (y − f)² for each output, ``[C]``."""
        return 0.5 * (f - y).square().sum(0)

    def scaled_nll(self, f: Outputs, y: Targets) -> Scalar:
        """``Σ_c s_c ½ Σ (y_c − f_c)²`` where outputs have noise of their own."""
        scale = self.scale.to(f)
        return scale * self.nll(f, y) if scale.dim() == 0 else (scale * self.nll_by_output(f, y)).sum()

    def training_factor(self, n_outputs: int) -> float:
        """``MSELoss`` is a mean over outputs of squares that are not halved."""
        return 2 / n_outputs

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """w (f − y), ``[rows, C]``."""
        return f - y if self.weights is None else self.weights.to(f) * (f - y)

    def hessian(self, f: Outputs) -> OutputHessian:
        """The identity, one number for all outputs of a row; or diag(w)."""
        diagonal = torch.ones_like(f[:, :1]) if self.weights is None else self.weights.to(f).expand_as(f)
        return OutputHessian(f.shape[-1], diagonal=diagonal)

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """The identity, or diag(√w), ``[rows, C, C]``."""
        eye = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        return (eye if self.weights is None else eye * self.weights.to(f).sqrt()).expand(len(f), -1, -1)

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers (times √w), ``[samples, rows, C]``."""
        noise = torch.randn(n_samples, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
        return noise if self.weights is None else self.weights.to(f).sqrt() * noise

    def n_groups(self, n_outputs: int) -> int:  # noqa: ARG002 - whatever it is
        """One."""
        return 1

    def foreign_variance(self, scale: float, excess: Float[Tensor, " rows"]) -> Float[Tensor, "rows outputs"]:
        """σ² s² e² of each output."""
        return (self.sigma_noise.to(excess) ** 2).reshape(-1) * (scale * excess.square()).unsqueeze(-1)

    def noise_variance(self, mean: Outputs, variance: Outputs) -> Float[Tensor, "rows outputs"]:  # noqa: ARG002
        """σ²."""
        return (self.sigma_noise.to(mean) ** 2).expand_as(mean)

    def expectation(self, f: Tensor) -> Tensor:
        """The outputs themselves."""
        return f

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:  # noqa: ARG002
        """Negative log density of N(mean, cov + σ²), summed, in nats; a variance scores each output by itself."""
        noise = (self.sigma_noise**2).to(mean.dtype)
        if cov.dim() == mean.dim():
            return nn.functional.gaussian_nll_loss(mean, y, cov + noise, full=True, reduction="sum", eps=0.0)
        noisy = 0.5 * (cov + cov.mT) + noise * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        factor = linalg.cholesky(noisy, "predictive covariance")
        # By hand: the first use of torch.distributions.MultivariateNormal imports a computer algebra system.
        whitened = torch.linalg.solve_triangular(factor, (y - mean).unsqueeze(-1), upper=False)
        half_logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum()
        return 0.5 * (whitened.square().sum() + mean.numel() * math.log(2 * math.pi)) + half_logdet

    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """Two sums."""
        return {"nll": self.predictive_nll, "crps": self.crps}

    def crps(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:  # noqa: ARG002
        """Of each output's marginal, noise included: Gneiting & Raftery (2007), equation 21."""
        var = cov if cov.dim() == mean.dim() else cov.diagonal(dim1=-2, dim2=-1)
        sigma = (var + (self.sigma_noise**2).to(var)).sqrt()
        z = (y - mean) / sigma
        density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
        return (sigma * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))).sum()

    def check_metric(self, name: str, takes_spread: bool, pred_type: PredType) -> bool:
        """Means do not depend on the posterior of a linearized network."""
        if takes_spread:
            return False
        if pred_type is PredType.GLM:
            msg = (
                f"{name} scores means, which do not depend on the prior precision of a linearized network: every value "
                'would be as good. Leave loss out (the density of the targets), or pass loss="crps".'
            )
            raise InputError(msg)
        return True

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:
        """Exactly: ``½ s rᵀ (I + α s V)⁻¹ r + (1/2α) log |I + α s V|`` with r = y − f."""
        scale, r = self.scale, y - mean
        if alpha == 0:
            return 0.5 * scale * (r.square().sum(-1) + cov.diagonal(dim1=1, dim2=2).sum(-1))
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        factor = linalg.cholesky(eye + alpha * scale * cov, "predictive covariance")
        half = torch.linalg.solve_triangular(factor, r.unsqueeze(-1), upper=False).squeeze(-1)
        return 0.5 * scale * half.square().sum(-1) + factor.diagonal(dim1=1, dim2=2).log().sum(-1) / alpha

    @classmethod
    def check_variational_head(cls, n_outputs: int) -> None:  # noqa: ARG003
        """Raise: there is nothing to approximate."""
        msg = (
            'method="elbo" fits a Gaussian to a posterior that is none; that of a last layer with Gaussian noise is '
            'one already, and its fit is exact. Use method="marglik", "loo", or validation data: tune(val_loader).'
        )
        raise UnsupportedError(msg)

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets, numbers in the shape of the outputs (or without the last axis, C = 1); flatten positions."""
        if not y.is_floating_point():
            msg = f"Regression targets must be floating-point numbers; got {y.dtype}. Convert them with y.float()."
            raise InputError(msg)
        if y.shape == f.shape[:-1] and f.shape[-1] == 1:
            y = y.unsqueeze(-1)
        check_same_shape(f, y, "Regression targets")
        check_outputs(f)
        linalg.check_finite(y, "Regression targets", "Leave those rows out of the data.")
        flat = f.reshape(-1, f.shape[-1])
        return Positions(flat, y.reshape(flat.shape).to(f.dtype), datum=datum_index(len(f), len(flat), f.device))

    def training_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The squared error."""
        return squared_error

    def torch_loss(self) -> tuple[nn.Module, float]:
        """``MSELoss`` and ½."""
        return nn.MSELoss(reduction="sum"), 0.5

    def count(self, y: Tensor, n_outputs: int) -> int:
        """Number of positions: every one of them counts."""
        return y.numel() // n_outputs


def squared_error(f: Tensor, y: Tensor) -> Tensor:
    """The mean, whether outputs are ``[batch]`` or ``[batch, 1]``."""
    return nn.functional.mse_loss(f, y.reshape(f.shape).to(f.dtype))
