"""Regression with a noise that depends on the input: the network predicts means and logs of variances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.enums import Likelihood
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import quadrature
from laplace.likelihoods.base import Ask, Link, Positions, check_outputs, datum_index
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsMoments, as_it_is, moments_of
from laplace.types import Outputs, Scalar, Targets


@dataclass(frozen=True)
class HeteroscedasticLikelihood(PredictsMoments):
    """−log p(y|f) = ½ s + ½ (y − m)² e^(−s) + ½ log 2π, summed over targets and tempered by 1/T in its first two terms.

    Of the C = 2K outputs the first K are means m and the last K logs of variances s: a head ``nn.Linear(D, 2 * K)``,
    whose outputs ``m, s = f.chunk(2, -1)`` PyTorch trains by ``gaussian_nll_loss(m, y, s.exp())``. Targets are
    ``[batch, *positions, K]``, and so are predictions: mean and (co)variance of m, without the noise. The curvature is
    the Fisher information, diag(e^(−s), ½), which is positive wherever targets lie.

    Attributes
    ----------
    temperature
        T.

    Notes
    -----
    The head stays that of the model: its loss is not convex, so that ``tune`` chooses the prior precision alone, and
    ``"loo"`` and ``"cv"`` are refused. The variance of a target is that of m, which falls with data, and the mean noise
    E[e^s] = e^(s + ½ var s), which does not: both are in ``la.predict(x)``.

    References
    ----------
    Nix & Weigend (1994), "Estimating the mean and variance of the target probability distribution"; Immer, Palumbo,
    Marx & Vogt (2023), "Effective Bayesian heteroscedastic regression with deep neural networks".
    """

    temperature: float | Tensor = 1.0

    name: ClassVar[str] = Likelihood.HETEROSCEDASTIC_REGRESSION.value

    def log_normalizer(self, n_positions: int, n_outputs: int) -> Scalar:
        """½ N K log 2π, in nats."""
        return torch.full_like(self.scale, n_positions * (n_outputs // 2) * 0.5 * math.log(2 * math.pi))

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """½ Σ s + (y − m)² e^(−s)."""
        m, s = f.chunk(2, -1)
        return 0.5 * (s + (y - m).square() * (-s).exp()).sum()

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """((m − y) e^(−s), ½ − ½ (y − m)² e^(−s)), ``[rows, 2K]``."""
        m, s = f.chunk(2, -1)
        by_mean = (m - y) * (-s).exp()
        return torch.cat([by_mean, 0.5 + 0.5 * by_mean * (y - m)], -1)

    def hessian(self, f: Outputs) -> OutputHessian:
        """diag(e^(−s), ½)."""
        return OutputHessian(f.shape[-1], diagonal=_fisher(f))

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """Its root, ``[rows, 2K, 2K]``."""
        return torch.diag_embed(_fisher(f).sqrt())

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at targets drawn around the means, ``[samples, rows, 2K]``."""
        m, s = f.chunk(2, -1)
        noise = torch.randn(n_samples, *m.shape, dtype=f.dtype, device=f.device, generator=generator)
        return torch.cat([-noise * (-s / 2).exp(), 0.5 - 0.5 * noise.square()], -1)

    # -- predicting ---------------------------------------------------------------------------------------------------

    def expectation(self, f: Tensor) -> Tensor:
        """The means, ``[..., K]``."""
        return f.chunk(2, -1)[0]

    def average(
        self, functions: Iterable[Float[Tensor, "samples rows outputs"]], n_samples: int, center: Outputs
    ) -> tuple[Tensor, Tensor, Link]:
        """Mean and variance of all outputs over samples, ``[rows, 2K]``: the noise is uncertain, too."""
        return *moments_of(functions, n_samples, center), as_it_is

    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Mean ``[rows, K]`` and variance ``[rows, K]`` or covariance ``[rows, K, K]`` of the means."""
        K = mean.shape[-1] // 2
        return mean[:, :K], cov[:, :K] if cov.dim() == mean.dim() else cov[:, :K, :K]

    def predict_joint(self, mean: Outputs, cov: Float[Tensor, "joint joint"]) -> tuple[Tensor, Tensor]:
        """Of the means of all rows, ``[rows · K]`` and ``[rows · K, rows · K]``."""
        n, C = mean.shape
        means = torch.arange(n * C, device=mean.device).view(n, C)[:, : C // 2].flatten()
        return mean.flatten()[means], cov[means][:, means]

    def noise_variance(self, mean: Outputs, variance: Outputs) -> Tensor:
        """E[e^s] = e^(s + ½ var s), ``[rows, K]``."""
        pair = _Pair.of(mean, variance)
        return (pair.s + pair.var_s / 2).exp()

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:  # noqa: ARG002
        """Of each target's marginal, summed: ``−log ∫ N(y; m, e^s) N(m, s)``.

        In closed form over m, by quadrature over s: to 1e-10 nats for standard deviations of s up to 3 and correlations
        of m and s up to 0.999, also of targets far from their means, where the integrand has two maxima.
        """
        return (_Pair.of(mean, cov).marginal_nll(y, torch.ones_like(y)) + 0.5 * math.log(2 * math.pi)).sum()

    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """The log density."""
        return {"nll": self.predictive_nll}

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:
        """Of each target's marginal, summed: at α = 0 in closed form, else by quadrature."""
        pair = _Pair.of(mean, cov)
        if alpha == 0:
            # Weighed by e^(−s), the mean of m moves by its covariance with s.
            square = (y - pair.m + pair.both).square() + pair.var_m
            each = 0.5 * (pair.s + square * (pair.var_s / 2 - pair.s).exp())
            return self.scale * each.sum(-1)
        power = alpha * self.scale
        return pair.marginal_nll(y, power * torch.ones_like(y)).sum(-1) / alpha

    def energy_asks(self, alpha: float) -> Ask:  # noqa: ARG002
        """Mean and variance of a target are uncertain together."""
        return Ask.COVARIANCE

    # -- data ---------------------------------------------------------------------------------------------------------

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets, one number for each pair of outputs (or without the last axis, K = 1); flatten positions."""
        self.check_head(f.shape[-1])
        if not y.is_floating_point():
            msg = f"Regression targets must be floating-point numbers; got {y.dtype}. Convert them with y.float()."
            raise InputError(msg)
        shape = (*f.shape[:-1], f.shape[-1] // 2)
        if y.shape == f.shape[:-1] and shape[-1] == 1:
            y = y.unsqueeze(-1)
        if y.shape != shape:
            msg = (
                f"Regression targets must have the shape {list(shape)}, one for two outputs of {list(f.shape)}, its "
                f"mean and the log of its variance; got {list(y.shape)}. Reshape the targets in the dataset."
            )
            raise ShapeError(msg)
        check_outputs(f)
        linalg.check_finite(y, "Regression targets", "Leave those rows out of the data.")
        flat = f.reshape(-1, f.shape[-1])
        y = y.reshape(-1, shape[-1]).to(f.dtype)
        return Positions(flat, y, datum=datum_index(len(f), len(flat), f.device))

    def check_head(self, n_outputs: int) -> None:
        """Raise unless outputs are pairs."""
        if n_outputs % 2:
            msg = (
                f'likelihood="{self.name}" has two outputs for each target, means first and then logs of variances; '
                f"the model has {n_outputs}. Double its outputs: nn.Linear(..., 2 * n_targets)."
            )
            raise UnsupportedError(msg)

    def check_rows(self) -> None:
        """Raise: means and noise of a head have no single best fit."""
        msg = (
            "The last layer is trained again where its loss is convex; that of means and logs of variances is not. Use "
            'method="marglik", or validation data: tune(val_loader), which keeps the head of the model.'
        )
        raise UnsupportedError(msg)

    def count(self, y: Tensor, n_outputs: int) -> int:
        """Number of positions."""
        return 2 * y.numel() // n_outputs


class _Pair(NamedTuple):
    """Means, variances and covariance of m and s, ``[rows, K]`` each."""

    m: Tensor
    s: Tensor
    var_m: Tensor
    var_s: Tensor
    both: Tensor

    @classmethod
    def of(cls, mean: Outputs, cov: Tensor) -> _Pair:
        K = mean.shape[-1] // 2
        if cov.dim() == mean.dim():
            variance, both = cov, torch.zeros_like(mean[:, :K])
        else:
            variance = cov.diagonal(dim1=-2, dim2=-1)
            both = 0.5 * (cov[:, :K, K:].diagonal(dim1=-2, dim2=-1) + cov[:, K:, :K].diagonal(dim1=-2, dim2=-1))
        variance = variance.clamp(min=0)
        return cls(mean[:, :K], mean[:, K:], variance[:, :K], variance[:, K:], both)

    def marginal_nll(self, y: Tensor, a: Tensor) -> Tensor:
        """``−log E[exp(−a (½ s + ½ (y − m)² e^(−s)))]`` of each target.

        Given s, m is Gaussian with mean ``m + b (s − s̄)`` and variance τ², and its integral a closed form.
        """
        b = self.both / self.var_s.clamp(min=torch.finfo(y.dtype).tiny)
        at = a * (self.var_m - b * self.both).clamp(min=0)

        largest = -0.9 * math.log(torch.finfo(y.dtype).tiny)

        def parts(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # log(e^s + a τ²), whose exponential does not overflow on the way.
            log_v = (s.clamp(-largest, largest).exp() + at).log() + (s - largest).clamp(min=0)
            log_v = log_v + (s + largest).clamp(max=0).where(at == 0, 0)
            # In units of the standard deviation: squares of neither overflow in a gradient.
            z = (y - self.m - b * (s - self.s)) * (-log_v / 2).exp()
            return z, log_v, s - log_v

        def log_p(s: Tensor) -> Tensor:
            z, _, log_q = parts(s)
            return -0.5 * (a * s - log_q + a * z.square())

        def slope(s: Tensor) -> Tensor:
            z, log_v, log_q = parts(s)
            q = log_q.exp()
            return 0.5 * (1 - a - q + a * z.square() * q) + a * z * b * (-log_v / 2).exp()

        def curvature(s: Tensor) -> Tensor:
            z, log_v, log_q = parts(s)
            q, moved = log_q.exp(), b * (-log_v / 2).exp()
            along = 0.5 * q * (1 - q) + 0.5 * a * z.square() * q * (2 * q - 1)
            return along + a * (moved.square() + 2 * z * moved * q)

        # The integrand is large where m is moved to y, where the noise is as large as the distance, or between.
        distance = y - self.m
        tiny = torch.finfo(y.dtype).tiny
        moved = self.s + (distance / b).where(b != 0, 0)
        loud = (a * distance.square()).clamp(min=tiny).log()
        starts = torch.stack([moved, torch.maximum(loud, self.s)]).detach()
        return -quadrature.log_mean_exp_of_modes(log_p, slope, curvature, self.s, self.var_s, starts, a / 2)


def _fisher(f: Outputs) -> Outputs:
    """(e^(−s), ½)."""
    s = f.chunk(2, -1)[1]
    return torch.cat([(-s).exp(), torch.full_like(s, 0.5)], -1)


__all__ = ["HeteroscedasticLikelihood"]
