"""``−(1/α) log E[p(y|f)^α]`` for Gaussian outputs, row by row: the data term of variational inference (VaLLA).

At α → 0 it is ``E[−log p(y|f)]``, whose sum with the KL divergence is the negative evidence lower bound; at α = 1 it is
the negative log predictive density. It falls from the one to the other as α grows.

References
----------
Hernández-Lobato et al. (2016), "Black-box alpha divergence minimization".
arXiv:1511.03243
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.predictive.links import probit
from laplace.types import Outputs, Scalar, Targets


def gaussian(
    mean: Outputs, cov: Float[Tensor, "rows outputs outputs"], y: Outputs, scale: Scalar, alpha: float
) -> Float[Tensor, " rows"]:
    """Of a Gaussian likelihood, exactly: ``½ s rᵀ (I + α s V)⁻¹ r + (1/2α) log |I + α s V|`` with r = y − f.

    Parameters
    ----------
    mean
        Of the outputs, ``[rows, C]``.
    cov
        V, ``[rows, C, C]``.
    y
        Targets, ``[rows, C]``.
    scale
        s = 1/(σ² T).
    alpha
        α in [0, 1].

    Returns
    -------
    ``[rows]``, in nats, without the normalizer of the density.
    """
    r = y - mean
    if alpha == 0:
        return 0.5 * scale * (r.square().sum(-1) + cov.diagonal(dim1=1, dim2=2).sum(-1))
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    factor = linalg.cholesky(eye + alpha * scale * cov, "predictive covariance")
    half = torch.linalg.solve_triangular(factor, r.unsqueeze(-1), upper=False).squeeze(-1)
    return 0.5 * scale * half.square().sum(-1) + factor.diagonal(dim1=1, dim2=2).log().sum(-1) / alpha


def expected_cross_entropy(
    mean: Outputs, cov: Float[Tensor, "rows outputs outputs"], y: Targets
) -> Float[Tensor, " rows"]:
    """An upper bound of ``E[logsumexp f − f_y]``: the tilted bound, with the probabilities at the mean as tilt.

    ``E[lse f] ≤ pᵀm + lse(m − pᵀm + ½ w)``, ``w_c = (e_c − p)ᵀ V (e_c − p)``. To first order in V it is the expansion
    ``−log p(y|m) + ½ tr(Λ V)`` of the Laplace approximation, and it does not see a change common to all logits.

    Parameters
    ----------
    mean
        Of the logits, ``[rows, C]``.
    cov
        V, ``[rows, C, C]``.
    y
        Class indices ``[rows]`` or soft labels ``[rows, C]``.

    Returns
    -------
    ``[rows]``, in nats.

    References
    ----------
    Knowles & Minka (2011), "Non-conjugate variational message passing for multinomial and binary regression", section
    5.3, for independent logits.
    """
    p = mean.softmax(-1)
    center = (p * mean).sum(-1, keepdim=True)
    Vp = (cov @ p.unsqueeze(-1)).squeeze(-1)
    w = cov.diagonal(dim1=1, dim2=2) - 2 * Vp + (p * Vp).sum(-1, keepdim=True)
    lse = (mean - center + 0.5 * w).logsumexp(-1) + center.squeeze(-1)
    return lse - _of_label(mean, y)


def categorical(mean: Outputs, cov: Tensor, y: Targets, scale: Scalar, alpha: float) -> Float[Tensor, " rows"]:
    """Of a softmax, in closed form: between the tilted bound (α = 0) and the probit approximation (α = 1).

    With a = α/T it is ``(1/T) [(1 − a) · bound − a · log p̄(y)]``: linear in a, as it is where log p is Gaussian. Above
    a = 1 (cold likelihoods) it is that of a = 1.

    Parameters
    ----------
    mean
        Of the logits, ``[rows, C]``.
    cov
        V, ``[rows, C, C]``; where a is 1 its diagonal ``[rows, C]`` is enough.
    y
        Class indices ``[rows]`` or soft labels ``[rows, C]``.
    scale
        1/T.
    alpha
        α in [0, 1].

    Returns
    -------
    ``[rows]``, in nats.
    """
    power = min(alpha * float(scale), 1.0)
    total = mean.new_zeros(len(mean))
    if power < 1:
        total = total + (1 - power) * expected_cross_entropy(mean, cov, y)
    if power > 0:
        variance = cov if cov.dim() == mean.dim() else cov.diagonal(dim1=1, dim2=2)
        # A variance that is zero to rounding may be just below it.
        total = total - power * _of_label(probit(mean, variance.clamp(min=0)), y)
    return scale * total


def sampled_categorical(
    samples: Float[Tensor, "samples rows outputs"], y: Targets, scale: Scalar, alpha: float
) -> Float[Tensor, " rows"]:
    """Of a softmax, from samples of the logits: ``−(1/α) log mean p(y|f)^α``.

    Parameters
    ----------
    samples
        Logits, ``[samples, rows, C]``.
    y
        Class indices ``[rows]`` or soft labels ``[rows, C]``.
    scale
        1/T.
    alpha
        α in [0, 1].

    Returns
    -------
    ``[rows]``, in nats.

    Notes
    -----
    Converges with the number of samples S; for α > 0 with a bias of order 1/S.
    """
    nll = -scale * _of_label(samples.log_softmax(-1), y)
    if alpha == 0:
        return nll.mean(0)
    return (math.log(len(samples)) - (-alpha * nll).logsumexp(0)) / alpha


def _of_label(values: Tensor, y: Targets) -> Tensor:
    """The entry of the class, or the mean over a soft label: ``[..., rows]``."""
    label = y if y.is_floating_point() else F.one_hot(y, values.shape[-1]).to(values.dtype)
    return (values * label).sum(-1)
