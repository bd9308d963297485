"""What an estimator says about itself: ``repr(la)``, and the same as a table where notebooks show it."""

# Of estimators, in their own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from torch import Tensor, nn

from laplace.attributes import is_own

EVERYDAY = (
    "fit",
    "tune",
    "tuning_",
    "predict",
    "predict_std",
    "plan",
    "sample",
    "functional_samples",
    "predictive_samples",
    "ood_score",
    "log_marginal_likelihood",
    "optimize_prior_precision",
    "prior_precision",
    "sigma_noise",
    "output_temperature",
    "save",
    "load",
    "to",
)
"""What one reaches for, in the order in which one does. ``dir(la)`` lists these; all other names are there as well."""


def names(self: Any) -> list[str]:
    """Of the everyday names those that the class has, and attributes that a user's class added."""
    own = [name for cls in type(self).__mro__ if not is_own(cls) and cls is not object for name in vars(cls)]
    return [*(name for name in EVERYDAY if hasattr(type(self), name)), *(name for name in own if name[0] != "_")]


def rows(la: Any) -> list[tuple[str, str]]:
    """Labels and texts, in the order in which one asks; of an object that is not made yet there are none."""
    if "_unit_likelihood" not in vars(la) or "_is_untuned" not in vars(la):
        return []
    weights, fit, likelihood = la._random_weights, vars(la).get("_fit"), la._unit_likelihood
    found = [("weights", _weights(weights, la.model)), ("likelihood", likelihood.described)]
    options = "".join(f", {name}={value!r}" for name, value in la._backend_kwargs.items())
    found.append(("back end", la._backend_cls.__name__ + options))
    found.append(("prior precision", shown(la._prior_precision)))
    if bool((la._prior_mean != 0).any()):
        found.append(("prior mean", shown(la._prior_mean)))
    for name in likelihood.hyperparameters:
        found.append((name.replace("_", " "), shown(getattr(la, name))))
    if float(la.temperature) != 1:
        found.append(("likelihood temperature", shown(la.temperature)))
    if fit is None:
        return [*found, ("fitted", "no: call fit(train_loader)")]
    positions = f", {fit.n_positions:,} targets" if fit.n_positions != fit.n_data else ""
    seen = f"{fit.n_data:,} rows{positions}" if fit.n_data else "by hand, without data"
    found += [("fitted to", seen), ("curvature", f"{size(fit.curvature)} on {la._device}")]
    tuned = vars(la).get("tuning_")
    if tuned is not None:
        return [*found, ("tuned", tuned.grounds)]
    return [*found, ("tuned", "no: call tune(val_loader)" if la._is_untuned else "no")]


def text(self: Any) -> str:
    """The class, and a line for each row."""
    found = rows(self)
    lines = [f"  {label + ':':<24} {said}" for label, said in found]
    return "\n".join([type(self).__name__ + ("" if found else " (not constructed)"), *lines])


def html(self: Any) -> str:
    """The same as a table."""
    cells = "".join(
        f'<tr><th style="text-align: left">{escape(label)}</th><td style="text-align: left">{escape(said)}</td></tr>'
        for label, said in rows(self)
    )
    return f"<table><caption><code>{escape(type(self).__name__)}</code></caption>{cells}</table>"


def _weights(weights: Any, model: nn.Module) -> str:
    """Which weights are random, and how many."""
    subset = weights.subset
    count = "known after the first pass" if subset is None else f"{subset.n_params:,} weights"
    name = type(weights.network).__name__
    if weights.of_head:
        layer = getattr(model, "last_layer_name", None)
        return f"last layer{'' if layer is None else f' {layer!r}'} of {name}: {count}"
    total = sum(p.numel() for p in weights.network.parameters())
    if subset is None or subset.n_params == total:
        return f"all of {name}: {count}"
    return f"{subset.n_params:,} of the {total:,} weights of {name}"


def shown(value: Any) -> str:
    """The first numbers of a hyperparameter."""
    flat = value.detach().reshape(-1).tolist() if isinstance(value, Tensor) else [float(value)]
    more = f", … ({len(flat)})" if len(flat) > 3 else ""
    return ", ".join(f"{number:.4g}" for number in flat[:3]) + more


def size(value: Any) -> str:
    """Memory of all tensors in a value, in the largest unit that leaves a number above 1."""
    n_bytes = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(value)}.values())
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested values, sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif type(value).__module__.startswith("laplace.") and hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            if not name.startswith("_"):  # what was computed from the others, and can be again
                yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


__all__ = ["EVERYDAY", "html", "names", "text"]
