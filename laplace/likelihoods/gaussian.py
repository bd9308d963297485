"""Regression: a Gaussian with standard deviation ``sigma_noise`` around the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import linalg
from laplace.enums import CurvatureKind, Likelihood, PredType
from laplace.errors import InputError, ShapeError, UnsupportedError
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
    noise_covariance
        Σ, the covariance of the noise of the outputs of a row where that of one output tells about another's,
        ``[C, C]``, symmetric and positive definite; ``None`` for the identity. The noise has the covariance σ² Σ, of
        which ``tune`` and the evidence may choose σ, one number: ``GaussianLikelihood(noise_covariance=Sigma)``. It is
        copied, and taken as it is: nothing is differentiated in it.

    Raises
    ------
    InputError
        If Σ is no tensor, not symmetric or not positive definite.
    """

    sigma_noise: Any = field(default_factory=lambda: torch.ones(()))
    temperature: float | Tensor = 1.0
    noise_covariance: Tensor | None = None

    name: ClassVar[str] = Likelihood.REGRESSION.value
    hyperparameters: ClassVar[tuple[str, ...]] = ("sigma_noise",)

    def __post_init__(self) -> None:
        """Check the covariance, and take a number for a tensor."""
        object.__setattr__(self, "sigma_noise", torch.as_tensor(self.sigma_noise))
        if self.noise_covariance is not None:
            check_covariance(self.noise_covariance)
            object.__setattr__(self, "noise_covariance", self.noise_covariance.detach().clone())

    def check_noise(self, sigma_noise: Tensor) -> None:
        """Any noise is one; beside a covariance one number is."""
        if self.noise_covariance is not None and sigma_noise.numel() > 1:
            msg = (
                "sigma_noise is one number beside noise_covariance, whose diagonal says how outputs differ; got "
                f"{sigma_noise.numel()} values. Put them into the covariance."
            )
            raise UnsupportedError(msg)

    def beside_prior(self, noise: str | None, output_temperature: bool | None) -> tuple[str | None, int]:
        """The noise, one or one per output."""
        if output_temperature:
            msg = "output_temperature divides logits; regression has none. Its noise is chosen instead: noise='scalar'."
            raise UnsupportedError(msg)
        if noise == "per_output" and self.noise_covariance is not None:
            msg = "noise='per_output' scales each output; beside noise_covariance there is one number: noise='scalar'."
            raise UnsupportedError(msg)
        return (None, 0) if noise == "keep" else ("sigma_noise", 2 if noise == "per_output" else 1)

    def residual_noise(self, nll: Tensor, n_targets: int) -> Tensor:
        """Root mean squared residual."""
        return (2 * nll / n_targets).sqrt()

    def weighing(self, weights: Float[Tensor, " outputs"]) -> AbstractLikelihood:
        """The same at unit noise, with relative precisions of the outputs."""
        return _WeighedGaussian(weights=weights)

    def _factor(self, like: Tensor) -> Float[Tensor, "outputs outputs"]:
        """L with ``L Lᵀ = Σ``."""
        assert self.noise_covariance is not None, "asked where there is one"
        covariance = self.noise_covariance.detach().to(like.device, torch.float64)
        return linalg.cholesky(covariance, "noise covariance").to(like.dtype)

    def _whitened(self, values: Tensor) -> Tensor:
        """L⁻¹ times each row, ``[rows, C]``."""
        if self.noise_covariance is None:
            return values
        return torch.linalg.solve_triangular(self._factor(values), values.mT, upper=False).mT

    def _spread(self, like: Tensor) -> Float[Tensor, " outputs"]:
        """The variance of the noise of each output, ``[1]`` or ``[C]``: σ² diag Σ."""
        variance = (self.sigma_noise**2).to(like).reshape(-1)
        if self.noise_covariance is None:
            return variance
        return variance * self.noise_covariance.detach().diagonal().to(like)

    @property
    def scale(self) -> Tensor:
        """1/(σ² T), ``[]`` or ``[C]``."""
        return 1 / (self.sigma_noise**2 * self.temperature)

    def curvature_scale(self, kind: CurvatureKind) -> Tensor:
        """1/(σ² T), ``[]`` or ``[C]``; for the empirical Fisher 1/(σ⁴ T), its gradients being (f − y)/σ²."""
        return self.scale if kind is CurvatureKind.GGN else self.scale / self.sigma_noise**2

    def log_normalizer(self, n_positions: int, n_outputs: int) -> Scalar:
        """N Σ_c log(σ_c √2π), in nats; with a covariance and N ½ log |Σ|."""
        each = n_outputs * (self.sigma_noise.log().mean() + 0.5 * math.log(2 * math.pi))
        if self.noise_covariance is not None:
            each = each + self._factor(self.sigma_noise).diagonal().log().sum()
        return n_positions * each

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """½ Σ (y − f)²."""
        return 0.5 * ((f - y) * self.gradient(f, y)).sum()

    def nll_by_output(self, f: Outputs, y: Targets) -> Tensor:
        """½ Σ (y − f)² for each output, ``[C]``; with a covariance outputs have no noise of their own, ``[]``."""
        if self.noise_covariance is not None:
            return self.nll(f, y)
        return 0.5 * (f - y).square().sum(0)

    def scaled_nll(self, f: Outputs, y: Targets) -> Scalar:
        """``Σ_c s_c ½ Σ (y_c − f_c)²`` where outputs have noise of their own."""
        scale = self.scale.to(f)
        return scale * self.nll(f, y) if scale.dim() == 0 else (scale * self.nll_by_output(f, y)).sum()

    def training_factor(self, n_outputs: int) -> float:
        """``MSELoss`` is a mean over outputs of squares that are not halved."""
        return 2 / n_outputs

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """f − y or Σ⁻¹ (f − y), ``[rows, C]``."""
        if self.noise_covariance is not None:
            return torch.cholesky_solve((f - y).mT, self._factor(f)).mT
        return f - y

    def hessian(self, f: Outputs) -> OutputHessian:
        """The identity, one number for all outputs of a row; or Σ⁻¹ by its root."""
        if self.noise_covariance is not None:
            return OutputHessian(f.shape[-1], root=self.hessian_root(f))
        return OutputHessian(f.shape[-1], diagonal=torch.ones_like(f[:, :1]))

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """The identity, or L⁻ᵀ, ``[rows, C, C]``."""
        eye = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        if self.noise_covariance is not None:
            return torch.linalg.solve_triangular(self._factor(f).mT, eye, upper=True).expand(len(f), -1, -1)
        return eye.expand(len(f), -1, -1)

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers, or those times L⁻ᵀ, ``[samples, rows, C]``."""
        noise = torch.randn(n_samples, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
        if self.noise_covariance is not None:
            return torch.einsum("ck,srk->src", self.hessian_root(f[:1])[0], noise)
        return noise

    def n_groups(self, n_outputs: int) -> int:  # noqa: ARG002 - whatever it is
        """One."""
        return 1

    def foreign_variance(self, scale: float, excess: Float[Tensor, " rows"]) -> Float[Tensor, "rows outputs"]:
        """σ² s² e² of each output, by its noise."""
        return self._spread(excess) * (scale * excess.square()).unsqueeze(-1)

    def expectation(self, f: Tensor) -> Tensor:
        """The outputs themselves."""
        return f

    def noise_variance(self, mean: Outputs, variance: Outputs) -> Outputs:  # noqa: ARG002 - the same everywhere
        """σ² of each output."""
        return self._spread(mean).expand_as(mean)

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:  # noqa: ARG002
        """Negative log density of N(mean, cov + σ²), summed, in nats; a variance scores each output by itself."""
        noise = self._spread(mean)
        if cov.dim() == mean.dim():
            return nn.functional.gaussian_nll_loss(mean, y, cov + noise, full=True, reduction="sum", eps=0.0)
        if self.noise_covariance is None:
            noise = noise * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        else:
            noise = self.sigma_noise.to(mean) ** 2 * self.noise_covariance.detach().to(mean)
        noisy = 0.5 * (cov + cov.mT) + noise
        factor = linalg.cholesky(noisy, "predictive covariance")
        # By hand: the first use of torch.distributions.MultivariateNormal imports a computer algebra system.
        whitened = torch.linalg.solve_triangular(factor, (y - mean).unsqueeze(-1), upper=False)
        half_logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum()
        return 0.5 * (whitened.square().sum() + mean.numel() * math.log(2 * math.pi)) + half_logdet

    @property
    def scales_with_noise(self) -> bool:
        """Yes; a class that derives from this one may have another density."""
        return type(self) is GaussianLikelihood

    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """Two sums."""
        return {"nll": self.predictive_nll, "crps": self.crps}

    def crps(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:  # noqa: ARG002
        """Of each output's marginal, noise included: Gneiting & Raftery (2007), equation 21."""
        var = cov if cov.dim() == mean.dim() else cov.diagonal(dim1=-2, dim2=-1)
        sigma = (var + self._spread(var)).sqrt()
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
        scale, r = self.scale, self._whitened(y - mean)
        if self.noise_covariance is not None:
            root = self._factor(mean)
            half = torch.linalg.solve_triangular(root, cov, upper=False)
            cov = torch.linalg.solve_triangular(root, half.mT, upper=False)
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
        self.check_head(f.shape[-1])
        check_outputs(f)
        linalg.check_finite(y, "Regression targets", "Leave those rows out of the data.")
        flat = f.reshape(-1, f.shape[-1])
        return Positions(flat, y.reshape(flat.shape).to(f.dtype), datum=datum_index(len(f), len(flat), f.device))

    def check_head(self, n_outputs: int) -> None:
        """Raise unless the covariance is that of so many outputs."""
        if self.noise_covariance is not None and len(self.noise_covariance) != n_outputs:
            msg = (
                f"noise_covariance is {list(self.noise_covariance.shape)}, and the model has {n_outputs} outputs. It "
                "has one row and one column for each of them."
            )
            raise ShapeError(msg)

    def training_loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The squared error, unless outputs share a noise."""
        return squared_error if self.noise_covariance is None else None

    def torch_loss(self) -> tuple[nn.Module, float] | None:
        """``MSELoss`` and ½, unless outputs share a noise."""
        return (nn.MSELoss(reduction="sum"), 0.5) if self.noise_covariance is None else None

    def count(self, y: Tensor, n_outputs: int) -> int:
        """Number of positions: every one of them counts."""
        return y.numel() // n_outputs


@dataclass(frozen=True)
class _WeighedGaussian(GaussianLikelihood):
    """At unit noise, with relative precisions w of the outputs that are part of what is summed; never a user's."""

    weights: Tensor = field(default_factory=lambda: torch.ones(1))
    """w, ``[C]``."""

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """w (f − y), ``[rows, C]``."""
        return self.weights.to(f) * (f - y)

    def hessian(self, f: Outputs) -> OutputHessian:
        """diag(w)."""
        return OutputHessian(f.shape[-1], diagonal=self.weights.to(f).expand_as(f))

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """diag(√w), ``[rows, C, C]``."""
        return torch.diag(self.weights.to(f).sqrt().expand(f.shape[-1])).expand(len(f), -1, -1)

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers times √w, ``[samples, rows, C]``."""
        return self.weights.to(f).sqrt() * super().sample_gradient(f, n_samples, generator)


def check_covariance(covariance: Any) -> None:
    """Raise unless a noise covariance is one.

    Raises
    ------
    InputError
        If it is not symmetric, or not positive definite.
    """
    what = "noise_covariance must be a symmetric positive definite matrix [C, C]"
    if not isinstance(covariance, Tensor):
        msg = f"{what}, a tensor; got {type(covariance).__name__}. Convert it with torch.as_tensor."
        raise InputError(msg)
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1] or not covariance.is_floating_point():
        msg = f"{what}; got {list(covariance.shape)} of {covariance.dtype}."
        raise InputError(msg)
    wide = covariance.detach().double()
    rounding = 100 * torch.finfo(covariance.dtype).eps * wide.abs().max()
    if not bool(((wide - wide.mT).abs() <= rounding).all()):
        msg = f"{what}; entries differ from those on the other side of the diagonal, or are not finite."
        raise InputError(msg)
    if int(torch.linalg.cholesky_ex(wide).info):
        least = float(torch.linalg.eigvalsh(wide)[0])
        msg = (
            f"{what}; its least eigenvalue is {least:.3g}. An estimate from few residuals is singular: shrink it, "
            "(1 − a) Σ + a diag(Σ)."
        )
        raise InputError(msg)


def squared_error(f: Tensor, y: Tensor) -> Tensor:
    """The mean, whether outputs are ``[batch]`` or ``[batch, 1]``."""
    return nn.functional.mse_loss(f, y.reshape(f.shape).to(f.dtype))
