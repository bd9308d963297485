"""Maximizing the log marginal likelihood over prior precisions and noise (``method="marglik"``).

By L-BFGS on logarithms, until it converges; with one precision per weight of a diagonal curvature in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace.errors import InputError, NumericalWarning, UnsupportedError, warn
from laplace.optimizers import Adam, lbfgs
from laplace.structures import DiagCurvature
from laplace.tuning.cached import CachedData
from laplace.tuning.problem import Problem, log_likelihood, log_marginal_likelihood

BOUNDS = (1e-6, 1e8)
"""Within which prior precisions are chosen by evidence, in 1/weight²: beyond them it no longer changes."""


class _NotFiniteError(Exception):
    """The objective has no value here."""


def optimize(
    objective: Callable[[Tensor], Tensor],
    initial: Tensor,
    *,
    n_steps: int,
    lr: float,
    bounds: tuple[Tensor | float, Tensor | float] = (0.0, float("inf")),
    progress_bar: bool = False,
    description: str = "[Optimizing the marginal likelihood]",
) -> tuple[Tensor, float]:
    """The best positive values ``[n]`` that L-BFGS on their logarithms meets, the start included; their objective."""
    start = initial.detach().log()
    low, high = (torch.as_tensor(bound, dtype=start.dtype, device=start.device).log() for bound in bounds)
    seen = [(-float("inf"), initial.detach().clone())]

    with tqdm(desc=description, unit="it", disable=not progress_bar) as bar:

        def evaluate(log_values: Tensor) -> Tensor:
            """The objective, on the graph of the logarithms."""
            log_values = log_values.to(start.dtype)
            with torch.enable_grad():
                value = objective(torch.minimum(torch.maximum(log_values, low), high).exp())
            current = float(value.detach())
            if not torch.isfinite(value.detach()):
                raise _NotFiniteError(current)
            if current > seen[0][0]:
                # Unmoved values are given back as they came: no rounding by logarithm and exponential.
                moved = not torch.equal(log_values.detach(), start)
                best = log_values.detach().clamp(low, high).exp() if moved else initial.detach().clone()
                seen[0] = current, best
            bar.update()
            return value

        try:
            evaluate(start)
        except _NotFiniteError as error:
            msg = (
                f"The log marginal likelihood is {error} at the initial prior precision. Pass another "
                "init_prior_prec, or check the training data for extreme values."
            )
            raise InputError(msg) from None
        try:
            if n_steps:
                lbfgs(lambda log_values: -evaluate(log_values), start, max_iter=n_steps, first_step=lr)
        except _NotFiniteError:
            _adam(evaluate, seen[0][1].log(), n_steps, lr)
    return seen[0][1], seen[0][0]


def _adam(evaluate: Callable[[Tensor], Tensor], log_values: Tensor, n_steps: int, lr: float) -> None:
    """Go on until the objective has no value again."""
    log_values = log_values.requires_grad_()
    optimizer = Adam([log_values], lr)
    for step in range(n_steps):
        try:
            value = evaluate(log_values)
        except _NotFiniteError as error:
            msg = f"The log marginal likelihood became {error} in step {step}; the best value before it is kept."
            warn(msg, NumericalWarning)
            return
        with torch.enable_grad():
            optimizer.step(torch.autograd.grad(-value, [log_values]))


def maximize_evidence(
    problem: Problem,
    initial: Tensor,
    sigma_noise: Tensor | None = None,
    *,
    n_steps: int = 100,
    lr: float = 1e-1,
    bounds: tuple[float, float] = BOUNDS,
    progress_bar: bool = False,
) -> tuple[Tensor, Tensor | None, float, int]:
    """Choose prior precisions, and noise if asked, by evidence.

    Found are precisions, ``[1]``, ``[n_layers]`` or ``[P]``, in 1/weight²; noise, ``[]`` or ``[C]``, in target units
    (``None`` if it was not asked for); the evidence, in nats; how many precisions are at the bounds. The noise is
    bounded to a factor of 10⁴ around its start. One precision per weight with a diagonal curvature has a closed form;
    with noise it is taken at each value of the noise.
    """
    curvature, inside = problem.fit.curvature, initial.clamp(*bounds)
    n_values = initial.numel()
    noise = initial.new_zeros(0) if sigma_noise is None else sigma_noise.reshape(-1)

    def split(values: Tensor) -> tuple[Tensor, Tensor | None]:
        found = values[len(values) - len(noise) :]
        return values[: len(values) - len(noise)], None if sigma_noise is None else found.reshape(sigma_noise.shape)

    low, high = torch.full_like(initial, bounds[0]), torch.full_like(initial, bounds[1])
    low, high = torch.cat([low, noise * 1e-4]), torch.cat([high, noise * 1e4])
    ascend = partial(optimize, n_steps=n_steps, lr=lr, progress_bar=progress_bar)
    if n_steps and isinstance(curvature, DiagCurvature) and n_values == curvature.n_params and n_values > 1:

        def optimum(sigma: Tensor | None) -> Tensor:
            h = problem.curvature(problem.likelihood(sigma))
            assert isinstance(h, DiagCurvature), "scaling keeps the structure"
            return diagonal_optimum(h.vector.detach(), problem.fit.mean - problem.prior_mean, bounds)

        best_noise = sigma_noise
        if sigma_noise is not None:
            # At the optimum the evidence does not change with the precisions: its slope is that in the noise alone.
            values, _ = ascend(
                lambda v: problem.evidence(optimum(v.reshape(sigma_noise.shape)), v.reshape(sigma_noise.shape)),
                noise,
                bounds=(low[n_values:], high[n_values:]),
            )
            best_noise = values.reshape(sigma_noise.shape)
        best = optimum(best_noise)
        value = float(problem.evidence(best, best_noise))
    else:
        start = inside if n_steps else initial
        values, value = ascend(lambda v: problem.evidence(*split(v)), torch.cat([start, noise]), bounds=(low, high))
        best, best_noise = split(values)
    n_clipped = int(((best <= bounds[0] * 1.0001) | (best >= bounds[1] * 0.9999)).sum())
    return best, best_noise, value, n_clipped


def warn_of_interpolation(
    problem: Problem, precision: Tensor, sigma_noise: Tensor, collect: Callable[[], CachedData]
) -> None:
    """Warn if the noise that the evidence chose is that of a network which interpolates its data.

    Where the effective number of parameters ``γ = P − tr(δ Σ)`` is more than half the number of targets; or, where
    targets were kept, where the noise is less than 5 % of their standard deviation.

    References
    ----------
    MacKay (1992), "Bayesian interpolation", for γ: at the optimum σ² is the sum of squared residuals by n − γ.
    """
    n_targets = problem.fit.n_positions * problem.fit.n_outputs
    gamma = effective_parameters(problem, precision, sigma_noise)
    reason = None
    if gamma > MOST_EFFECTIVE * n_targets:
        reason = f"its weights take up {gamma:.0f} of the {n_targets} degrees of freedom of the targets"
    else:
        try:
            y = collect().positions.y.to(sigma_noise)
        except UnsupportedError:  # fit kept none
            return
        ratio = float((sigma_noise / y.std(0, correction=0)).min()) if len(y) > 1 else 1.0
        if ratio < LEAST_NOISE:
            reason = f"{ratio:.1%} of the standard deviation of the targets"
    if reason is not None:
        msg = (
            f"The noise that the evidence chose, {float(sigma_noise.min()):.3g}, is that of a network which nearly "
            f"interpolates its training data: {reason}. Unless the data have that little noise, intervals will be much "
            "too narrow: choose it on validation data, tune(val_loader)."
        )
        warn(msg, UserWarning)


MOST_EFFECTIVE, LEAST_NOISE = 0.5, 0.05
"""Effective parameters for each target, and noise relative to the targets, from which on a network interpolates."""


def effective_parameters(problem: Problem, precision: Tensor, sigma_noise: Tensor) -> float:
    """``γ = P − tr(δ Σ) = −∂ (log|A| − log|P₀|) / ∂ log δ``: of any structure as cheap as its evidence."""
    curvature = problem.curvature(problem.likelihood(sigma_noise))
    with torch.enable_grad():
        step = torch.zeros_like(precision[:1], requires_grad=True)
        ratio = curvature.log_det_ratio(problem.prior(precision.detach() * step.exp()), **problem.options)
        (slope,) = torch.autograd.grad(ratio, [step])
    return -float(slope)


def diagonal_optimum(h: Tensor, shift: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Prior precision of each weight, ``[P]``, that maximizes the evidence of a diagonal curvature h, scaled, ``[P]``.

    The positive root of ``h / (h + δ) = δ (θ − μ₀)²``, which is ``2 / ((θ − μ₀)² (1 + √(1 + 4 / (h (θ − μ₀)²))))``:
    written so that nothing cancels.

    References
    ----------
    The stationary point of MacKay's evidence (1992) for one weight and one precision.
    """
    square = shift.square()
    optimum = 2 / (square + (square * (square + 4 / h)).sqrt())
    # Without curvature the prior has the last word: none where it costs evidence, and where it costs none, all.
    return torch.where(h > 0, optimum, torch.where(square > 0, 0.0, torch.inf)).clamp(*bounds)


__all__ = [
    "BOUNDS",
    "diagonal_optimum",
    "log_likelihood",
    "log_marginal_likelihood",
    "maximize_evidence",
    "optimize",
    "warn_of_interpolation",
]
