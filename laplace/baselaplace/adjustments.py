"""How predictions differ from those of the posterior alone, and how foreign inputs are: what ``tune`` chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.density import Excess, FeatureDensity, Reference
from laplace.errors import StateError, UnsupportedError
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood
from laplace.predictive import Linearization, Options, compare, predict
from laplace.predictive.adjusted import Adjusted, Contrasts
from laplace.schema import Table, finite, flag, listed, nested, optional, tensor, whole
from laplace.structures import AbstractPrecision


@dataclass(frozen=True)
class Mixture:
    """Heads, temperatures and scales under which predictions are made and averaged."""

    heads: Float[Tensor, "heads params"] | None
    """Weights of the heads; ``None``: that of the fit alone."""
    head: tuple[int, ...]
    """Which head each point has."""
    shares: tuple[float, ...]
    """What each counts; they sum to one."""
    temperatures: tuple[float, ...]
    """T of each, relative to the output temperature."""
    scales: tuple[float, ...]
    """s² of each."""

    entries: ClassVar[Table] = {
        "heads": optional(tensor(("heads", "P"))),
        "head": listed(whole(0)),
        "shares": listed(finite(low=0, high=1)),
        "temperatures": listed(finite(above=0)),
        "scales": listed(finite(low=0)),
    }

    @classmethod
    def of(cls, points: Sequence[tuple[float, int, float, float]], heads: Tensor | None, temperature: float) -> Mixture:
        """From share, head, T and s² of each point, without the heads that none has."""
        shares, head, temperatures, scales = zip(*points, strict=True)
        if heads is not None:
            used = sorted(set(head))
            heads, head = heads[used], tuple(used.index(index) for index in head)
        return cls(heads, head, shares, tuple(t / temperature for t in temperatures), scales)

    def state(self) -> dict[str, Any]:
        """Plain values and a tensor."""
        plain = {name: list(getattr(self, name)) for name in ("head", "shares", "temperatures", "scales")}
        return {"heads": self.heads, **plain}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Mixture:
        """From a state that passed the checks of ``entries``."""
        head, *others = (tuple(state[name]) for name in ("head", "shares", "temperatures", "scales"))
        n_heads = 1 if state["heads"] is None else len(state["heads"])
        if not head or {len(head)} != {len(values) for values in others} or max(head) >= n_heads:
            msg = "The state is damaged: the points of its mixture do not fit its heads, or one another."
            raise StateError(msg)
        return cls(state["heads"], head, *others)


@dataclass(frozen=True)
class Adjustments:
    """Settings of predictions beside the posterior."""

    weight_uncertainty: bool = True
    """Whether the posterior's variance counts."""
    scale: float = 0.0
    """s², the size of the variance that foreign inputs have."""
    excess: Excess | None = None
    """How far rows of the data lie; ``None`` where nobody has looked."""
    reference: Reference | None = None
    """What scores of foreign inputs are compared with."""
    mixture: Mixture | None = None
    """Predictions that are averaged; ``None``: there is one."""
    temperature: float = 1.0
    """Output temperature of the probabilities in ``reference``."""
    contrasts: bool = False
    """Whether variances are those of outputs less their mean: what all outputs of a row share changes no prediction."""

    entries: ClassVar[Table] = {
        "weight_uncertainty": flag,
        "scale": finite(low=0),
        "excess": optional(nested(Excess.entries)),
        "reference": optional(nested(Reference.entries)),
        "mixture": optional(nested(Mixture.entries)),
        "temperature": finite(above=0),
        "contrasts": flag,
    }

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        parts = {name: getattr(self, name) for name in ("excess", "reference", "mixture")}
        values = {name: None if part is None else part.state() for name, part in parts.items()}
        plain = {name: getattr(self, name) for name in ("weight_uncertainty", "scale", "temperature", "contrasts")}
        return {**plain, **values}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Adjustments:
        """From a state that passed the checks of ``entries``."""
        types = {"excess": Excess, "reference": Reference, "mixture": Mixture}
        parts: dict[str, Any] = {
            name: None if state[name] is None else kind.from_state(state[name]) for name, kind in types.items()
        }
        plain = {name: state[name] for name in ("weight_uncertainty", "scale", "temperature", "contrasts")}
        return cls(**plain, **parts)

    def scaled(self, scale: float) -> Adjustments:
        """With another s², of all points of a mixture."""
        if scale and self.excess is None:
            msg = "distance_scale is relative to validation rows, at which nobody has looked: call tune(val_loader)."
            raise UnsupportedError(msg)
        mixture = self.mixture
        mixture = None if mixture is None else replace(mixture, scales=(scale,) * len(mixture.scales))
        return replace(self, scale=scale, mixture=mixture)

    def without_rows(self) -> Adjustments:
        """Where rows that were looked at belong to another density or another head: without widths and references."""
        mixture = self.mixture
        mixture = None if mixture is None else replace(mixture, scales=(0.0,) * len(mixture.scales))
        return replace(self, scale=0.0, excess=None, reference=None, mixture=mixture)

    def applied(self, inputs: Linearization, e: Tensor | None, likelihood: AbstractLikelihood) -> Linearization:
        """Inputs as predictions see them, with the excess of each row."""
        extra = None if e is None or not self.scale else likelihood.foreign_variance(self.scale, e)
        inputs = Contrasts(inputs) if self.contrasts and self.weight_uncertainty else inputs
        if extra is None and self.weight_uncertainty:
            return inputs
        return Adjusted(inputs, extra, self.weight_uncertainty)

    def excess_of(
        self, inputs: Linearization, fit: Fit, likelihood: AbstractLikelihood
    ) -> Float[Tensor, " rows"] | None:
        """How far rows lie beyond those of the data; ``None`` where that changes nothing, or is not known."""
        wide = self.scale if self.mixture is None else max(self.mixture.scales)
        found = fit.feature_density if wide and self.excess is not None else None  # which takes O(C · D³) once
        features = None if found is None else inputs.features
        if self.excess is None or found is None or features is None:
            return None
        return self.excess(distance(found, features, likelihood))

    def predict(
        self,
        inputs: Linearization,
        fit: Fit,
        precision: AbstractPrecision,
        likelihood: AbstractLikelihood,
        options: Options,
        dtype: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predictions at linearized inputs."""
        e, mixture = self.excess_of(inputs, fit, likelihood), self.mixture
        if mixture is None:
            inputs = self.applied(inputs, e, likelihood)
            return predict(compare(inputs) if options.fitting else inputs, precision, likelihood, options, dtype)
        heads = mixture.heads
        moved = (
            [inputs] if heads is None else [inputs.with_weights(theta) for theta in heads.to(inputs.f.device, dtype)]
        )
        total = torch.zeros(())
        points = zip(mixture.head, mixture.shares, mixture.temperatures, mixture.scales, strict=True)
        for head, share, temperature, scale in points:
            at = likelihood.tempered(temperature)
            seen = replace(self, scale=scale).applied(moved[head], e, at)
            found_here = predict(seen, precision, at, options, dtype)
            assert isinstance(found_here, Tensor), "probabilities are averaged"
            total = total.to(found_here) + share * found_here
        return total


def distance(
    found: FeatureDensity, features: Float[Tensor, "rows features"], likelihood: AbstractLikelihood
) -> Float[Tensor, " rows"]:
    """How far rows lie from the training data: g, or the Mahalanobis distance where there is one class."""
    n_groups = likelihood.n_groups(found.sums.n_classes)
    return found.g(features) if n_groups > 1 else found.distance(features)


__all__ = ["Adjustments", "Mixture", "distance"]
