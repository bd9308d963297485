"""From a Gaussian over logits to class probabilities (``link_approx=``), and to energies. Pure functions.

Links take the mean ``[rows, C]`` and a variance ``[rows, C]`` or covariance ``[rows, C, C]`` of the logits and return
*log* probabilities ``[rows, C]``, so that the score of a saturated prediction stays finite. Rows sum to one (after
exponentiation) for any finite logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laplace.enums import LinkApprox
from laplace.likelihoods.draws import draw
from laplace.linalg import chunk_elements, some_rows
from laplace.types import Outputs, Scalar, Targets

LogProbabilities = Float[Tensor, "rows outputs"]


def probit(mean: Float[Tensor, "rows outputs"], cov: Tensor) -> LogProbabilities:
    """Softmax of ``f / √(1 + π/8 · var f)``: needs variances only.

    Parameters
    ----------
    mean
        Mean of the logits, ``[rows, C]``.
    cov
        Their variance ``[rows, C]`` or covariance ``[rows, C, C]``.

    Returns
    -------
    Log probabilities, ``[rows, C]``.

    Notes
    -----
    Approximate. O(rows · C) time and memory.

    References
    ----------
    MacKay (1992), "The evidence framework applied to classification networks", for two classes; the multi-class form
    scales each logit by its own variance.
    """
    var = cov if cov.dim() == mean.dim() else cov.diagonal(dim1=-2, dim2=-1)
    return (mean / (1 + math.pi / 8 * var).sqrt()).log_softmax(-1)


def mean_field_1(mean: Float[Tensor, "rows outputs"], cov: Tensor) -> LogProbabilities:
    """Mean field of pairwise differences: needs variances only.

    ``p_k ∝ 1 / Σ_j exp(−(m_k − m_j) / √(1 + π/8 (S_kk + S_jj)))``, the sum over all classes.

    Parameters
    ----------
    mean
        Mean of the logits, ``[rows, C]``.
    cov
        Their variance ``[rows, C]`` or covariance ``[rows, C, C]``, of which the diagonal is used.

    Returns
    -------
    Log probabilities, ``[rows, C]``.

    Notes
    -----
    Approximate. O(rows · C²) time; memory is bounded by chunks of rows.

    References
    ----------
    Lu, Ie & Sha (2020), "Mean-field approximation to Gaussian-softmax integral with application to uncertainty
    estimation". arXiv:2006.07584
    """
    var = cov if cov.dim() == mean.dim() else cov.diagonal(dim1=-2, dim2=-1)
    some = some_rows(_rows_at_once(mean), mean, var)
    return torch.cat([_pairwise(m, v.unsqueeze(2) + v.unsqueeze(1)) for m, v in some])


def mean_field_2(mean: Float[Tensor, "rows outputs"], cov: Tensor) -> LogProbabilities:
    """Mean field of pairwise differences with covariances: nothing changes where a constant is added to all logits.

    ``p_k ∝ 1 / Σ_j exp(−(m_k − m_j) / √(1 + π/8 (S_kk + S_jj − 2 S_kj)))``, the sum over all classes.

    Parameters
    ----------
    mean
        Mean of the logits, ``[rows, C]``.
    cov
        Their covariance ``[rows, C, C]``; of independent logits the variance ``[rows, C]``.

    Returns
    -------
    Log probabilities, ``[rows, C]``.

    Notes
    -----
    Approximate; the best of the closed forms for two or three classes and for covariance that logits share. With many
    nearly independent logits ``probit`` is closer. O(rows · C²) time; memory is bounded by chunks of rows.

    References
    ----------
    Lu, Ie & Sha (2020), "Mean-field approximation to Gaussian-softmax integral with application to uncertainty
    estimation". arXiv:2006.07584
    """
    if cov.dim() == mean.dim():
        return mean_field_1(mean, cov)
    found = []
    for m, S in some_rows(_rows_at_once(mean), mean, cov):
        var = S.diagonal(dim1=-2, dim2=-1)
        found.append(_pairwise(m, (var.unsqueeze(2) + var.unsqueeze(1) - S - S.mT).clamp(min=0)))
    return torch.cat(found)


def _pairwise(mean: Tensor, variance: Float[Tensor, "rows outputs outputs"]) -> LogProbabilities:
    """Log of the normalized ``1 / Σ_j exp(−(m_k − m_j) / √(1 + π/8 v_kj))``."""
    difference = mean.unsqueeze(1) - mean.unsqueeze(2)  # m_j − m_k, [rows, k, j]
    # Both classes of a pair are equal in their own entry, whatever the variances: exp(0).
    return (-(difference / (1 + math.pi / 8 * variance).sqrt()).logsumexp(-1)).log_softmax(-1)


def _rows_at_once(mean: Tensor) -> int:
    """How many rows of pairs of classes fit the memory that chunks may take."""
    return max(1, chunk_elements(mean.device) // mean.shape[-1] ** 2)


def bridge(mean: Float[Tensor, "rows outputs"], cov: Float[Tensor, "rows outputs outputs"]) -> LogProbabilities:
    """Mean of the Dirichlet that the Laplace bridge assigns to the logits' Gaussian.

    The Gaussian is first conditioned on logits that sum to zero: the softmax does not see their sum, but conditioning
    on it still shifts the distribution unless all logits share their covariance with the sum. Then
    ``α_k = (1 − 2/C + e^{f_k} Σ_j e^{−f_j} / C²) / Σ_kk`` and the probabilities are ``α / Σ α``.

    Parameters
    ----------
    mean
        Mean of the logits, ``[rows, C]``.
    cov
        Their covariance, ``[rows, C, C]``.

    Returns
    -------
    Log probabilities, ``[rows, C]``.

    Notes
    -----
    Approximate; accurate while variances are of moderate size. Multiplying the covariance by a number changes
    nothing, so that a scalar prior precision hardly acts: see ``bridge_norm``. O(rows · C²) time and memory.

    References
    ----------
    Hobbhahn, Kristiadi & Hennig (2022), "Fast predictive uncertainty for classification with Bayesian deep networks".
    arXiv:2003.01227
    """
    mean, var = _sum_to_zero(mean, cov)
    return _dirichlet_mean(mean, var)


def bridge_norm(mean: Float[Tensor, "rows outputs"], cov: Float[Tensor, "rows outputs outputs"]) -> LogProbabilities:
    """The Laplace bridge with variances scaled to a mean of √(C/2), and logits accordingly.

    Keeps the bridge in the range in which it is accurate when variances are large.

    Parameters
    ----------
    mean
        Mean of the logits, ``[rows, C]``.
    cov
        Their covariance, ``[rows, C, C]``.

    Returns
    -------
    Log probabilities, ``[rows, C]``.

    Notes
    -----
    Approximate. O(rows · C²) time and memory. The normalization is that of laplace-torch.
    """
    mean, var = _sum_to_zero(mean, cov)
    size = var.mean(-1, keepdim=True) / math.sqrt(mean.shape[-1] / 2)
    return _dirichlet_mean(mean / size.sqrt(), var / size)


def mc(
    mean: Float[Tensor, "rows outputs"], cov: Tensor, n_samples: int = 100, generator: torch.Generator | None = None
) -> LogProbabilities:
    """Log of the average softmax over samples of the logits; all rows share their base samples, a Sobol sequence.

    Parameters
    ----------
    mean
        Mean of the logits, ``[rows, C]``.
    cov
        Their variance ``[rows, C]`` (independent outputs) or covariance ``[rows, C, C]``.
    n_samples
        Number of samples. They are spread evenly (scrambled Sobol points): with ten classes the error of 128 is about
        a third of that of 100 independent ones.
    generator
        Source of randomness.

    Returns
    -------
    Log probabilities, ``[rows, C]``.

    Notes
    -----
    Unbiased for the probabilities, not for their logs; beyond 1,024 classes samples are independent. Sampling errors
    are shared by rows, so they do not average out over them. Time O(n_samples · rows · C), with covariances another
    factor C and O(rows · C³) once; memory bounded by chunks.
    """
    return average_softmax(draw(mean, cov, n_samples, generator, spread=True), n_samples)


def average_softmax(parts: Iterable[Float[Tensor, "samples rows outputs"]], n_samples: int) -> LogProbabilities:
    """Log of the average softmax over samples that come in parts."""
    return average((f.log_softmax(-1) for f in parts), n_samples)


def average(parts: Iterable[Float[Tensor, "samples rows outputs"]], n_samples: int) -> LogProbabilities:
    """Log of the average of probabilities, whose logs come in parts."""
    total: Tensor | None = None
    for log_p in parts:
        part = log_p.logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None, "the caller checks that there are samples"
    return total - math.log(n_samples)


def _sum_to_zero(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variances of the logits given that they sum to zero."""
    # Keep sums of logits below the largest number: so far out the probabilities are zero and one anyway.
    limit = torch.finfo(mean.dtype).max / (8 * mean.shape[-1])
    mean = mean.clamp(-limit, limit)
    # Without any uncertainty every scale gives the same answer: take one.
    certain = (cov == 0).flatten(1).all(1)[:, None, None]
    cov = torch.where(certain, torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device), cov)
    row_sums = cov.sum(-1)
    total = row_sums.sum(-1, keepdim=True)
    var = cov.diagonal(dim1=-2, dim2=-1)
    conditioned = var - row_sums.square() / total
    # Non-negative but for rounding; a floor at rounding level keeps the division below finite.
    floor = torch.finfo(var.dtype).eps * var.amax(-1, keepdim=True)
    return mean - row_sums * mean.sum(-1, keepdim=True) / total, torch.maximum(conditioned, floor)


def _dirichlet_mean(mean: Tensor, var: Tensor) -> LogProbabilities:
    """Log of α / Σα, computed in logs so that no exponential overflows."""
    n_classes = mean.shape[-1]
    growth = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(n_classes)
    if n_classes > 2:  # with two classes the constant 1 − 2/C vanishes
        growth = torch.logaddexp(growth, torch.full_like(growth, math.log1p(-2 / n_classes)))
    return (growth - var.log()).log_softmax(-1)


LINKS: dict[LinkApprox, Callable[..., Tensor]] = {
    LinkApprox.PROBIT: probit,
    LinkApprox.MC: mc,
    LinkApprox.MF1: mean_field_1,
    LinkApprox.MF2: mean_field_2,
    LinkApprox.BRIDGE: bridge,
    LinkApprox.BRIDGE_NORM: bridge_norm,
}
"""Which function implements which name."""

VARIANCE_LINKS = frozenset({LinkApprox.PROBIT, LinkApprox.MF1})
"""Links that use variances alone: covariances are not computed for them."""


# -- the data term of variational inference ---------------------------------------------------------------------------


def expected_cross_entropy(
    mean: Outputs, cov: Float[Tensor, "rows outputs outputs"], y: Targets
) -> Float[Tensor, " rows"]:
    """An upper bound of ``E[logsumexp f − f_y]``: the tilted bound, with the probabilities at the mean as tilt.

    ``E[lse f] ≤ pᵀm + lse(m − pᵀm + ½ w)``, ``w_c = (e_c − p)ᵀ V (e_c − p)``. To first order in V it is the expansion
    ``−log p(y|m) + ½ tr(Λ V)`` of the Laplace approximation, and it does not see a change common to all logits.

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


def energy(mean: Outputs, cov: Tensor, y: Targets, scale: Scalar, alpha: float) -> Float[Tensor, " rows"]:
    """Of a softmax, in closed form: between the tilted bound (α = 0) and the probit approximation (α = 1).

    With a = α/T it is ``(1/T) [(1 − a) · bound − a · log p̄(y)]``: linear in a, as it is where log p is Gaussian. Above
    a = 1 (cold likelihoods) it is that of a = 1.
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


def sampled_energy(
    samples: Float[Tensor, "samples rows outputs"], y: Targets, scale: Scalar, alpha: float
) -> Float[Tensor, " rows"]:
    """Of a softmax, from samples of the logits: ``−(1/α) log mean p(y|f)^α``.

    Converges with the number of samples S; for α > 0 with a bias of order 1/S.
    """
    return sampled(scale * _of_label(samples.log_softmax(-1), y), alpha)


def sampled(log_p: Float[Tensor, "samples rows"], alpha: float) -> Float[Tensor, " rows"]:
    """``−(1/α) log mean p^α``, and ``−mean log p`` at α = 0."""
    if alpha == 0:
        return -log_p.mean(0)
    return (math.log(len(log_p)) - (alpha * log_p).logsumexp(0)) / alpha


def _of_label(values: Tensor, y: Targets) -> Tensor:
    """The entry of the class, or the mean over a soft label: ``[..., rows]``."""
    label = y if y.is_floating_point() else F.one_hot(y, values.shape[-1]).to(values.dtype)
    return (values * label).sum(-1)
