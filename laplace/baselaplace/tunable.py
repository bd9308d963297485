"""``TunablePosterior``: what tuning needs of an estimator, and how it takes over what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from laplace import checks, tuning
from laplace.baselaplace.checkpoint import CheckpointedPosterior
from laplace.enums import CurvatureKind, LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import InputError, UnsupportedError
from laplace.network import evaluating, iterate
from laplace.network.parameters import expand_groups
from laplace.predictive import Linearization, Options
from laplace.prior import fix_prior_prec_structure
from laplace.types import Inputs

Noise = Literal["keep", "scalar", "per_output"]


class TunablePosterior(CheckpointedPosterior):
    """A posterior whose fit, data and hyperparameters tuning can work on."""

    tuning_: tuning.Tuning | None = None
    """What the last tuning found: choice, score and curve; print it, or draw it with ``plot()``."""

    def _problem(self) -> tuning.Problem:
        """What was learned and is not chosen, cut off the graph of hyperparameters."""
        temperature = torch.as_tensor(self._temperature, dtype=self._dtype, device=self._device).detach()
        return tuning.Problem(
            self._fitted,
            self._prior_mean.detach().to(self._dtype),
            self._prior.sizes,
            self.backend.kind,
            lambda sigma, output_temperature: self._unit_likelihood.at(sigma, temperature, output_temperature),
            self._sigma_noise.detach().to(self._dtype),
            self._output_temperature,
            self._posterior_options(),
        )

    def _structure_of(self, structure: PriorStructure, start: Tensor) -> PriorStructure:
        """The prior structure: of a start with several values theirs, where nothing else was asked for."""
        known = {len(self._prior.sizes): PriorStructure.LAYERWISE, self._prior.n_params: PriorStructure.DIAG}
        if start.numel() == 1 or structure is not PriorStructure.SCALAR:
            return structure
        return known.get(start.numel(), structure)

    def _spread(self, structure: PriorStructure, precision: Tensor) -> Tensor:
        """Precisions in the shape of the prior structure."""
        sizes = self._prior.sizes
        if structure is PriorStructure.DIAG and precision.numel() == len(sizes):
            precision = expand_groups(precision.reshape(-1), sizes)
        return fix_prior_prec_structure(precision, structure, len(sizes), sum(sizes), self._device, self._dtype)

    def _tuning_options(
        self,
        pred_type: PredType | str,
        link_approx: LinkApprox | str,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> Options:
        return self._options(pred_type, False, link_approx, n_samples, generator=generator, for_targets=True)

    def _repeated(self, options: Options) -> Callable[[], Options]:
        """The same random numbers whenever asked: scores are then smooth functions of hyperparameters."""
        seed = tuning.seed_of(options.generator)
        return lambda: replace(options, generator=torch.Generator(self._device).manual_seed(seed))

    def _cached(
        self,
        loader: Iterable[Any] | None,
        pred_type: PredType,
        method: TuningMethod | None,
        progress_bar: bool = False,
    ) -> tuning.CachedData:
        """Data to score hyperparameters on, after their one pass."""
        training = method in (TuningMethod.LOO, TuningMethod.CV)
        if loader is None:
            which, keyword = ("training", "train_loader") if training else ("validation", "val_loader")
            what = "tune" if method is None else f'method="{method.value}"'
            msg = f"{what} scores hyperparameters on {which} data: pass {keyword}=."
            raise InputError(msg)
        with evaluating(self.model):
            what = "training" if training else "validation"
            shown: dict[str, Any] = {"progress_bar": progress_bar, "description": f"[Linearizing at {what} data]"}
            keys: dict[str, Any] = {
                "dict_key_x": self.dict_key_x,
                "dict_key_y": self.dict_key_y,
                "device": self._device,
            }
            batches = iterate(loader, **keys, **shown)
            linearize = partial(self._for_tuning, pred_type)
            return tuning.CachedData.collect(batches, linearize, self._frozen_likelihood, what)

    def _for_tuning(self, pred_type: PredType, x: Inputs) -> Linearization:
        """Inputs, linearized with the model in evaluation mode."""
        with evaluating(self.model):
            return self._linearize(x, pred_type)

    def _scored(
        self,
        method: TuningMethod,
        problem: tuning.Problem,
        data: tuning.CachedData,
        score: tuning.Score,
        options: Options,
        grid: Tensor,
        n_folds: int,
        generator: torch.Generator | None,
    ) -> Callable[[Tensor], Tensor]:
        """From points of the grid to their scores."""
        likelihood, fresh = problem.likelihood(), self._repeated(options)
        if method is TuningMethod.GRIDSEARCH:
            # In the coordinates that all posteriors share.
            basis = problem.basis(data, grid[:1]) if options.pred_type is PredType.GLM else None
            rotated = data.rotated(basis, self._dtype)

            def scores(points: Tensor) -> Tensor:
                posteriors = [problem.posterior(point, likelihood, basis) for point in points.split(1)]
                return rotated.scores(score, posteriors, [likelihood] * len(posteriors), fresh, self._dtype)

            return scores
        if method is TuningMethod.LOO and not self._last_layer:
            msg = (
                'method="loo" compares priors each at its own best weights, which takes a last layer: where weights '
                "stay as they are, the score tends to the training loss and favors the strongest prior, whatever the "
                'data say. Use method="marglik", or validation data: tune(val_loader).'
            )
            raise UnsupportedError(msg)
        if problem.kind is not CurvatureKind.GGN:
            msg = (
                f'method="{method.value}" takes the curvature of the head again at other weights, by the generalized '
                "Gauss–Newton matrix; this back end computes an empirical Fisher. Use a GGN back end, or gridsearch."
            )
            raise UnsupportedError(msg)
        head = tuning.HeadData.collect(data, self._dtype)
        common = {"initial": problem.fit.mean}
        seed = tuning.seed_of(generator)

        def refitted(points: Tensor) -> Tensor:
            priors = [problem.prior(point) for point in points.split(1)]
            arguments = head, score, priors, likelihood, self._refitted_type, fresh
            if method is TuningMethod.LOO:
                return tuning.refitted_leave_one_out_scores(*arguments, **common)
            dealt = torch.Generator().manual_seed(seed)  # the same folds for all of the grid
            return tuning.cross_validation_scores(
                *arguments, n_folds=n_folds, generator=dealt, **common, **problem.options
            )

        return refitted

    def _initial_noise(self, problem: tuning.Problem, noise: Noise | None) -> Tensor | None:
        """The residuals' size, if the noise is to be chosen."""
        if noise == "keep":
            return None
        if noise is None:
            msg = "noise must be 'keep', 'scalar' or 'per_output'; got None."
            raise UnsupportedError(msg)
        self._second(noise, None)
        found = problem.residual_noise(per_output=noise == "per_output")
        if not bool((found > 0).all()):
            msg = (
                "The model fits every training target exactly: no observation noise is best. Keep a noise of your own."
            )
            raise InputError(msg)
        return found

    def _second(self, noise: Noise | None, output_temperature: bool | None) -> tuple[str | None, int]:
        """The hyperparameter that goes with the prior precision, and whether it has one value or several."""
        if not (noise is None or (isinstance(noise, str) and noise in ("keep", "scalar", "per_output"))):
            msg = f"noise must be 'keep', 'scalar' or 'per_output'; got {noise!r}."
            raise UnsupportedError(msg)
        if output_temperature is not None:
            output_temperature = checks.flag("output_temperature", output_temperature)
        found = self._unit_likelihood.beside_prior(noise, output_temperature)
        if noise == "per_output" and not self._last_layer:
            msg = (
                "noise='per_output' is chosen for a last layer, whose weights belong to outputs. For weights that "
                "outputs share use noise='scalar', or assign a sigma_noise for each output and call fit again."
            )
            raise UnsupportedError(msg)
        return found

    def _take_over(self, found: tuning.Tuning, verbose: bool) -> tuning.Tuning:
        """Assign what was found, all of it or nothing."""
        before = dict(vars(self))
        try:
            for name, value in found.hyperparameters.items():
                setattr(self, name, value.detach())
            self.tuning_ = found
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise
        if verbose:
            print(f"Optimized {found}")
        return found


def checked_steps(verbose: Any, progress_bar: Any, n_steps: Any, lr: Any = 1.0) -> tuple[bool, int, float]:
    """What every way of tuning is told: ``verbose``, ``n_steps`` and ``lr``; ``progress_bar`` must be a flag, too."""
    checks.flag("progress_bar", progress_bar)
    return checks.flag("verbose", verbose), checks.whole("n_steps", n_steps, 0), checks.number("lr", lr, positive=True)


def checked_grid(low: Any, high: Any, size: Any, base: Any) -> Tensor:
    """The grid of prior precisions that exponents, a number of points and a base of a user say."""
    return tuning.log_grid(
        checks.number("log_prior_prec_min", low),
        checks.number("log_prior_prec_max", high),
        checks.whole("grid_size", size),
        checks.number("log_prior_prec_base", base, positive=True),
    )


def chosen_method(method: TuningMethod | str) -> TuningMethod:
    """A method by its name.

    Parameters
    ----------
    method
        As in ``optimize_prior_precision``.

    Raises
    ------
    UnsupportedError
        If there is none; the message lists those that there are.
    """
    if method == "CV":
        msg = (
            "method='CV' was the old name of laplace-torch for grid search on validation data: pass "
            "method='gridsearch', val_loader=loader. Cross-validation on training data is method='cv', "
            "train_loader=loader."
        )
        raise UnsupportedError(msg)
    return choose(TuningMethod, method, "method")


def checked_limits(name: str, edges: Any) -> tuple[float, float]:
    """Two positive finite numbers in order."""
    try:
        low, high = (checks.number(name, edge) for edge in edges)
    except (TypeError, ValueError) as error:
        msg = f"{name} must be two numbers (low, high); got {edges!r}."
        raise InputError(msg) from error
    if not 0 < low < high < float("inf"):
        msg = f"{name} must be (low, high) with 0 < low < high, both finite; got ({low}, {high})."
        raise InputError(msg)
    return low, high


__all__ = ["Noise", "TunablePosterior", "checked_grid", "checked_limits", "checked_steps", "chosen_method"]
