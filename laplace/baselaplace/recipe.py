"""``tune`` of a posterior over weights: head, temperature or noise, and width where inputs are foreign."""

# Functions of an estimator, in its own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace.baselaplace.adjustments import Adjustments, Mixture, distance
from laplace.baselaplace.tuned import collected
from laplace.density import Excess, Reference
from laplace.enums import CurvatureKind, LinkApprox, PriorStructure
from laplace.errors import InputError, UnsupportedError, warn
from laplace.fit import Fit
from laplace.network import full_precision
from laplace.tuning import (
    CachedData,
    Candidate,
    Chosen,
    HeadData,
    Problem,
    Recipe,
    Settings,
    Tuning,
    Validation,
    check_same_data,
    methods,
    recipe,
    refitted_heads,
)

if TYPE_CHECKING:
    from laplace.baselaplace.parametric import ParametricLaplace


LONG = 10
"""Seconds that are told before."""


@dataclass(frozen=True)
class Outcome:
    """What ``tune`` assigns."""

    fit: Fit
    adjustments: Adjustments
    tuning: Tuning


def tune(
    la: ParametricLaplace, asked: Settings, wanted: Recipe, temperature: Any, limits: Mapping[str, tuple[float, float]]
) -> Outcome:
    """Choose by validation data; nothing is assigned."""
    methods.check_val_loader(asked)
    now, asked = la._fitted, replace(asked, train_loader=wanted.train_loader)
    fit, training = now, None
    if now.trained is not None:  # start from the head of the model
        training = _training_data(la, asked, "tune starts from the head of the model.")
        fit = replace(la._at_head(now, training, now.trained), trained=None)
    problem = replace(la._problem(), fit=fit)
    asked = replace(asked, start=la._prior_precision.detach())
    val = collected(la, asked, asked.val_loader, "validation")
    val = val if fit is now else val.with_weights(fit.mean)
    with torch.no_grad(), full_precision(fit.mean.device):
        return _Tuner(la, problem, asked, wanted, training, val, temperature, limits)()


def _training_data(la: ParametricLaplace, asked: Settings, why: str) -> HeadData:
    """Features and targets of the training data: of a loader, which must yield the data of the fit, or those kept."""
    if asked.train_loader is not None:
        data = HeadData.collect(collected(la, asked, asked.train_loader, "training"), la._dtype)
        check_same_data(la._fitted, data, la._unit_likelihood)
        return data
    if la._kept is None:
        msg = f"{why} That takes the features of the training data. {la._why_not[1]} Pass train_loader=."
        raise UnsupportedError(msg)
    return la._kept


@dataclass
class _Tuner:
    """One call of ``tune``."""

    la: ParametricLaplace
    problem: Problem
    """At the model's own head."""
    asked: Settings
    wanted: Recipe
    training: HeadData | None
    """Where they were needed before."""
    val: CachedData
    temperature: Any
    limits: Mapping[str, tuple[float, float]]
    notes: list[str] = field(default_factory=list)

    def __call__(self) -> Outcome:
        """Choose."""
        if self.wanted.average == "mixture" and not self._classes:
            msg = "average='mixture' averages probabilities of classes; others average parameters (the default)."
            raise UnsupportedError(msg)
        rows = self._rows()
        reason = self._why_no_refit()
        if reason is None:
            return self._refitted(self.training or _training_data(self.la, self.asked, "The head is refitted."), rows)
        if self.wanted.refit:
            msg = f"refit=True is not possible here. {reason}"
            raise UnsupportedError(msg)
        given = self.wanted.max_rows is not None or self.wanted.train_loader is not None
        if self.wanted.refit is None and given:
            msg = f"train_loader= and max_rows= go with a refit, which is not possible here. {reason}"
            raise UnsupportedError(msg)
        self.notes.append(f"Head of the model: {reason}")
        return self._as_it_is(rows)

    def _why_no_refit(self) -> str | None:
        """Why the head stays that of the model, in words; ``None`` where it is refitted."""
        if self.wanted.refit is False:
            return "refit=False."
        if self.problem.fit.head is None:
            return "The head is refitted where it alone is random (subset_of_weights='last_layer')."
        if self.problem.kind is not CurvatureKind.GGN:
            return "The head is refitted with the generalized Gauss–Newton matrix; this back end has another curvature."
        if self.asked.loss != "nll":
            return "Heads are chosen by score='nll'."
        if self.problem.fit.is_unknown:
            return "The curvature was assigned by hand, so that nothing is known of the data."
        try:
            self.problem.likelihood().check_rows()
        except UnsupportedError as error:
            return str(error)
        if self.wanted.train_loader is None and self.la._kept is None:
            reason = f"{self.la._why_not[1]} Pass train_loader=, the loader that fit had."
            if self.wanted.refit is None:
                warn(f"tune keeps the head of the model. {reason}", UserWarning)
            return reason
        return None

    # -- validation data ----------------------------------------------------------------------------------------------

    def _rows(self) -> Validation:
        """Validation rows, with how far they lie where that is known and asked for."""
        rows = Validation.of(self.problem, self.val, self.asked)
        if self.wanted.distance_aware is False:
            self.notes.append("No width for foreign inputs: distance_aware=False.")
            return rows
        far, excess = self._far
        reason = self.problem.fit.why_no_density or self.la._why_not[0] if excess is None else excess.reason
        if self.asked.loss != "nll":
            reason = "It is chosen by score='nll'."
        if self.asked.options.link in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM):
            reason = "The Laplace bridge does not see a variance that all logits share."
        if far is not None and excess is not None and reason is None:
            return replace(rows, excess=excess(far).to(rows.positions.f))
        if self.wanted.distance_aware:
            msg = f"distance_aware=True is not possible here. {reason}"
            raise UnsupportedError(msg)
        self.notes.append(f"No width for foreign inputs: {reason}")
        return rows

    @cached_property
    def _far(self) -> tuple[Tensor, Excess] | tuple[None, None]:
        """g, or the Mahalanobis distance, of validation rows, and its quantiles; ``None`` where there is no density."""
        density, likelihood = self.problem.fit.feature_density, self.problem.likelihood()
        if density is None:
            return None, None
        parts = []
        for get, positions in self.val.batches:
            features = get().features
            if features is None:
                return None, None
            parts.append(distance(density, positions.select(features), likelihood))
        far = torch.cat(parts)
        return far, Excess.of(far)

    # -- the head of the model ----------------------------------------------------------------------------------------

    def _as_it_is(self, rows: Validation) -> Outcome:
        """The hyperparameters; then width for foreign inputs, with temperature or noise once more."""
        found = methods.by_validation(
            self.problem, self.asked, lambda *_: self.val, self.temperature, self.limits, leave_out=self._classes
        )
        uses, precision = found.uses_variance, self._precision
        values = {"prior_precision": precision, **found.hyperparameters}
        if not uses:
            self.notes.append("The posterior's variance is left out: validation data are predicted best without it.")
        adjustments = Adjustments(uses)
        if rows.excess is not None:
            unit, limits, name = self._width(rows, values.get("sigma_noise"))
            precision = values["prior_precision"]
            variance = rows.variance(precision, self.problem.likelihood(unit)) if uses else None
            own = Candidate(self.problem.fit.mean, variance=variance)
            chosen = recipe.choose(rows, [own], limits, self.wanted.average, unit)
            values |= self._values(chosen, unit, name, precision)
            adjustments = Adjustments(uses, chosen.scale, mixture=self._mixture(chosen, None))
            found = replace(found, value=chosen.value)
        elif self.wanted.average == "mixture":
            self.notes.append("No mixture: one head, one temperature and no width are nothing to average.")
        found = replace(found, hyperparameters=values, notes=tuple(self.notes))
        return Outcome(self.problem.fit, self._looked(adjustments, self.problem.fit.mean, rows, values), found)

    # -- another head -------------------------------------------------------------------------------------------------

    def _refitted(self, training: HeadData, rows: Validation) -> Outcome:
        """Heads under several priors, averaged with temperature or noise and width for foreign inputs."""
        problem, fit = self.problem, self.problem.fit
        unit, limits, name = self._width(rows)
        self._check_labels(training, rows)
        at = problem.likelihood(output_temperature=1.0) if unit is None else problem.likelihood(unit)
        precision = self._precision
        self._tell(training)
        shape, max_rows = precision / precision.log().mean().exp(), self.wanted.max_rows
        within = self.limits.get("prior_precision", (0.0, math.inf))
        heads = refitted_heads(problem, training, shape, at, max_rows, within)
        own = [Candidate(fit.mean)]
        if not self._classes:  # the posterior's variance counts, around the head that it belongs to
            precisions = [h.precision for h in heads if h.precision is not None]
            own += [Candidate(fit.mean, p, rows.variance(p, at)) for p in precisions]
            around = [self._around(h.theta, rows, training) for h in heads]
            heads = [replace(h, variance=r.variance(p, at)) for h, p, r in zip(heads, precisions, around, strict=True)]
        chosen = recipe.choose(rows, [*own, *heads], limits, self.wanted.average, unit)
        values = self._values(chosen, unit, name, precision if chosen.precision is None else chosen.precision)
        thetas = torch.stack([c.theta for c in [*own, *heads]])
        adjustments = Adjustments(not self._classes, chosen.scale, mixture=self._mixture(chosen, thetas))
        n_rows = min(len(training.phi), max_rows or len(training.phi))
        self.notes.append(f"Heads refitted on {n_rows:,} rows of training features.")
        alone = {"MAP": rows.nll(rows.positions.f, None, at) / len(rows.positions.f)}
        if name is not None:
            alone[f"MAP with its {name.replace('_', ' ')}"] = chosen.by_candidate[0]
        value = chosen.value
        if not self._classes:  # with the variance of the precision that was averaged
            likelihood = problem.likelihood(values.get("sigma_noise"))
            variance = self._around(chosen.theta, rows, training).variance(values["prior_precision"], likelihood)
            value = rows.nll(rows.outputs(chosen.theta), variance, likelihood, chosen.scale) / len(rows.positions.f)
        points = torch.stack([h.precision.reshape(-1)[0] for h in heads if h.precision is not None])
        curve = points.cpu(), torch.tensor(chosen.by_candidate[len(own) :])
        tuned = Tuning("validation", "nll", value, values, *curve, alone, notes=tuple(self.notes))
        new = self.la._at_head(fit, training, chosen.theta)
        if self.asked.structure is not PriorStructure.SCALAR:
            tuned, adjustments = self._refined(new, values, tuned, adjustments)
        return Outcome(new, self._looked(adjustments, chosen.theta, rows, values), tuned)

    def _around(self, theta: Tensor, rows: Validation, training: HeadData) -> Validation:
        """Validation rows with the curvature at another head, which is the same where the loss is quadratic."""
        f = rows.positions.f[:1]
        here, there = (self.problem.likelihood().hessian(at).sum() for at in (f, f + 1))
        if torch.equal(here, there):
            return rows
        return replace(rows, problem=replace(rows.problem, fit=self.la._at_head(self.problem.fit, training, theta)))

    def _refined(
        self, fit: Fit, values: dict[str, Tensor], tuned: Tuning, adjustments: Adjustments
    ) -> tuple[Tuning, Adjustments]:
        """A precision for each parameter group, with the head fixed; nothing else changes."""
        sigma = values.get("sigma_noise", self.problem.sigma_noise)
        output_temperature = values.get("output_temperature", self.problem.output_temperature)
        problem = replace(self.problem, fit=fit, sigma_noise=sigma, output_temperature=float(output_temperature))
        hyperparameters = problem.likelihood().hyperparameters
        noise, fixed = "keep" if "sigma_noise" in hyperparameters else None, False if self._classes else None
        asked = replace(self.asked, start=values["prior_precision"], noise=noise)
        val, within = self.val.with_weights(fit.mean), {k: v for k, v in self.limits.items() if k == "prior_precision"}
        found = methods.by_validation(problem, asked, lambda *_: val, fixed, within, leave_out=self._classes)
        values |= found.hyperparameters
        return replace(tuned, hyperparameters=values), replace(adjustments, weight_uncertainty=found.uses_variance)

    def _check_labels(self, training: HeadData, rows: Validation) -> None:
        """Say what is odd about the classes of validation rows."""
        likelihood = self.problem.likelihood()
        n_groups = likelihood.n_groups(rows.positions.f.shape[-1])
        labels = [likelihood.group_of(y) for y in (training.y, rows.positions.y)]
        if n_groups < 2 or any(label is None or label.dim() > 1 for label in labels):
            return
        there, here = (set(label.unique().tolist()) for label in labels if label is not None)
        if unseen := sorted(here - there):
            self._say(
                f"Classes of the validation data without a row in the training data: {unseen[:10]}, {len(unseen)} in "
                "all. No head can learn them: leave those rows out, or fit data that have them."
            )
        if len(rows.positions.f) < n_groups:
            self._say(
                f"Validation rows: {len(rows.positions.f)}, for {n_groups} classes. What they choose is uncertain; use "
                "more."
            )

    def _tell(self, training: HeadData) -> None:
        """Print how long it takes, where that is long."""
        seconds = recipe.seconds(training, self.problem.fit.mean, self.wanted.max_rows)
        if seconds > LONG:
            print(
                f"tune: heads of {training.shapes[0][0]:,} outputs are refitted on {len(training.phi):,} rows of "
                f"{training.shapes[0][1]:,} features, in about {seconds:.0f} s; max_rows= takes fewer rows.",
                file=sys.stderr,
            )

    def _say(self, message: str) -> None:
        """Warn, and keep it."""
        warn(message, UserWarning)
        self.notes.append(message)

    @property
    def _classes(self) -> bool:
        """Whether probabilities of classes are predicted, which need no variance."""
        return "output_temperature" in self.problem.likelihood().hyperparameters

    @property
    def _precision(self) -> Tensor:
        """The present prior precision."""
        assert self.asked.start is not None, "tune says where to start"
        return self.asked.start.to(self.problem.fit.mean)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _width(
        self, rows: Validation, sigma: Tensor | None = None
    ) -> tuple[Tensor | None, tuple[float, float], str | None]:
        """What a noise is measured in (``None``: a temperature is chosen), limits of its logarithm, and its name."""
        name, n_values = methods.beside_prior(self.problem, self.asked.noise, self.temperature)
        given = self.limits.get(name) if name is not None else None
        logs = None if given is None else (math.log(given[0]), math.log(given[1]))
        if "sigma_noise" not in self.problem.likelihood().hyperparameters:
            fixed = math.log(self.problem.output_temperature)
            return None, (fixed, fixed) if name is None else logs or recipe.LOG_TEMPERATURES, name
        if name is None:
            return self.problem.sigma_noise, (0.0, 0.0), name
        f, likelihood = rows.positions.f, self.problem.likelihood()
        nll = likelihood.nll_by_output(f, rows.positions.y)
        unit = likelihood.residual_noise(nll if n_values > 1 else nll.sum(), len(f) if n_values > 1 else f.numel())
        if not bool((unit > 0).all()):
            msg = "The model predicts every validation target exactly, so that no noise is best. Use other data."
            raise InputError(msg)
        low, high = logs or recipe.LOG_NOISES
        if sigma is None:
            return unit, (low, high), name
        ratio = float((sigma / unit).log().mean())
        return sigma, (min(low - ratio, 0.0), max(high - ratio, 0.0)), name

    def _values(self, chosen: Chosen, unit: Tensor | None, name: str | None, precision: Tensor) -> dict[str, Tensor]:
        """Hyperparameters; precisions come as those at the unit of noise."""
        width = math.exp(chosen.log_width)
        if unit is None:
            values = {"prior_precision": precision}
            return values if name is None else {**values, name: precision.new_tensor(width)}
        return {"prior_precision": precision / width**2, **({} if name is None else {name: unit * width})}

    def _mixture(self, chosen: Chosen, heads: Tensor | None) -> Mixture | None:
        """The points of ``average="mixture"``."""
        return Mixture.of(chosen.points, heads, math.exp(chosen.log_width)) if chosen.points else None

    def _looked(
        self, adjustments: Adjustments, theta: Tensor, rows: Validation, values: Mapping[str, Any]
    ) -> Adjustments:
        """With distances and doubts of the validation rows, which later ones are compared with."""
        far, excess = self._far
        if far is None:
            return adjustments
        likelihood, reference = self.problem.likelihood(output_temperature=values.get("output_temperature")), None
        if likelihood.n_groups(rows.positions.f.shape[-1]) > 1:
            reference = Reference.of(likelihood.log_doubt(rows.outputs(theta)), far)
        density = self.problem.fit.feature_density
        self.notes.extend(() if density is None else density.notes)
        temperature = float(values.get("output_temperature", self.problem.output_temperature))
        return replace(adjustments, excess=excess, reference=reference, temperature=temperature)


__all__ = ["Outcome", "tune"]
