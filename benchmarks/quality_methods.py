"""The methods that ``quality.py`` compares on a network, and what it reads off their predictions."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality_data import split
from quality_networks import train
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tuning_data import Split

from laplace import Laplace
from laplace.evaluation import accuracy, brier_score, calibration_error, ood_auroc, uncertainty

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "mixture": {"average": "mixture"},
    "best point": {"average": False},
    "refit and T alone": {"distance_aware": False},
    "former recipe": {"refit": False, "distance_aware": False},
}
"""What ``tune`` of a last layer is told."""
RANGE = (0.05, 20.0)
"""Temperatures from least to largest, those of ``tune``."""
Predictor = Callable[[Tensor], Tensor]


def evaluations(models: list[nn.Module], action: Callable[[], object], rows: int) -> float:
    """Rows that networks evaluate during an action, in units of so many."""
    seen: list[int] = []
    hooks = [model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]))) for model in models]
    action()
    for hook in hooks:
        hook.remove()
    return sum(seen) / rows


# -- what is fitted to validation rows ---------------------------------------------------------------------------------


def minimize(parameters: list[Tensor], value: Callable[[], Tensor]) -> None:
    """L-BFGS from where the parameters are."""
    options = {"max_iter": 200, "tolerance_grad": 1e-9, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([one.requires_grad_() for one in parameters], **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = value()
        found.backward()
        return found

    optimizer.step(loss)
    for one in parameters:
        one.requires_grad_(False)


def temperature(logits: Tensor, y: Tensor, prior: bool = False) -> tuple[float, bool]:
    """The best T on validation rows, and whether it is at an end: there it is 1 where every row is right.

    With ``prior``, log T has a standard normal one; else the likelihood of rows that are all right grows as T falls.
    """
    if not prior and bool((logits.argmax(1) == y).all()):
        return 1.0, True
    log_t = torch.zeros(1, dtype=logits.dtype)
    minimize(
        [log_t],
        lambda: cross_entropy(logits * (-log_t).exp(), y) + prior * 0.5 * log_t.square().sum() / len(y),
    )
    t = float(log_t.exp())
    least, most = RANGE
    return min(max(t, least), most), not least < t < most


def log_probabilities(models: list[nn.Module], x: Tensor) -> Tensor:
    """Logarithm of the mean prediction of networks, in float64."""
    with torch.no_grad():
        each = torch.stack([model(x).double().log_softmax(1) for model in models])
    return each.logsumexp(0) - torch.tensor(len(models), dtype=each.dtype).log()


def scaled(logits: Predictor, data: Split, prior: bool = False) -> tuple[Predictor, dict[str, Any]]:
    """Predictions with the best temperature."""
    x, y = data.validation.dataset.tensors
    t, at_end = temperature(logits(x), y, prior)
    return lambda inputs: (logits(inputs) / t).softmax(1), {"temperature": t, "at an end": at_end}


def vector_scaled(model: nn.Module, data: Split) -> Predictor:
    """Every logit with a factor and a shift of its own, of most likely validation labels."""
    x, y = data.validation.dataset.tensors
    logits = log_probabilities([model], x)
    factor = torch.full((logits.shape[1],), 1 / temperature(logits, y)[0], dtype=logits.dtype)
    shift = torch.zeros_like(factor)
    minimize([factor, shift], lambda: cross_entropy(logits * factor + shift, y))
    return lambda inputs: (log_probabilities([model], inputs) * factor + shift).softmax(1)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """What the last linear layer sees, in float64."""
    *_, head = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    found: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return found[0].double()


def retrained(model: nn.Module, data: Split) -> tuple[Predictor, list[str]]:
    """The head fitted again by scikit-learn, its ridge by cross-validation of the training rows; its logits."""
    x, y = data.train.dataset.tensors
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search = LogisticRegressionCV(scoring="neg_log_loss", max_iter=1000)
        search.fit(features(model, x).numpy(), y.numpy())
    weight, bias = torch.tensor(search.coef_).double(), torch.tensor(search.intercept_).double()
    if len(weight) == 1:  # of two classes it has the difference
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    said = [str(one.message).split("\n")[0] for one in caught if not issubclass(one.category, FutureWarning)]
    return lambda inputs: features(model, inputs) @ weight.T + bias, said


def dropped_out(model: nn.Module, samples: int) -> Predictor:
    """Logarithm of the mean prediction of a network whose dropout is on, the same masks for every call."""

    def predict(x: Tensor) -> Tensor:
        layers = [layer.train() for layer in model.modules() if isinstance(layer, nn.Dropout)]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = log_probabilities([model] * samples, x)
        for layer in layers:
            layer.eval()
        return found

    return predict


# -- what is read off --------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What a method says about test rows: their losses, and what is told of them in one number each."""

    losses: Tensor
    numbers: dict[str, Any]


def aurocs(inside: Tensor, score: Predictor, data: Split) -> dict[str, float]:
    """How well a score tells foreign inputs from test rows, of which it is known."""
    return {kind: ood_auroc(inside, score(inputs)) for kind, inputs in data.foreign.items()}


def prediction_sets(probs: Tensor, y: Tensor, level: float) -> tuple[float, float]:
    """Share of rows whose class is among the most likely ones that together have a level, and how many those are."""
    sorted_probs, order = probs.sort(1, descending=True)
    size = (sorted_probs.cumsum(1) < level).sum(1) + 1
    rank = (order == y[:, None]).int().argmax(1)
    return float((rank < size).double().mean()), float(size.clamp(max=probs.shape[1]).double().mean())


def judge(predictor: Predictor, models: list[nn.Module], data: Split, config: dict[str, Any]) -> Judged:
    """Read the test rows and foreign inputs."""
    x, y = data.test.dataset.tensors
    found: list[Tensor] = []
    passes = evaluations(models, lambda: found.append(predictor(x)), len(x))
    probs = found[0]
    losses = -probs.double().gather(1, y[:, None]).squeeze(1).clamp(min=1e-300).log()
    coverage, size = prediction_sets(probs, y, config["level"])
    numbers = {
        "nll": float(losses.mean()),
        "ece": calibration_error(probs, y, n_bins=config["bins"]),
        "brier": brier_score(probs, y),
        "accuracy": accuracy(probs, y),
        "coverage": coverage,
        "set size": size,
        "ood": aurocs(uncertainty(probs), lambda inputs: uncertainty(predictor(inputs)), data),
        "evaluations": passes,
    }
    return Judged(losses, numbers)


def approximate(
    model: nn.Module, data: Split, asked: dict[str, Any], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A tuned posterior, and what it took: passes over each loader and of the network, and time."""
    n_train, n_validation = (len(loader.dataset) for loader in (data.train, data.validation))
    la = Laplace(model, "classification", **options)
    before = data.train.passes, data.validation.passes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        of_fit = evaluations([model], lambda: la.fit(data.train), n_train)
        passes = data.train.passes
        start = time.process_time()
        of_tune = evaluations([model], lambda: la.tune(data.validation, **asked), n_validation)
        seconds = time.process_time() - start
    cost = {
        "`fit`: passes of the training loader": passes - before[0],
        "`fit`: network evaluations per training row": of_fit,
        "`tune`: passes of the training loader": data.train.passes - passes,
        "`tune`: passes of the validation loader": data.validation.passes - before[1],
        "`tune`: network evaluations per validation row": of_tune,
        "`tune`: seconds of one core": seconds,
    }
    chosen = {name: float(value) for name, value in la.tuning_.hyperparameters.items()}
    told = {"chosen": chosen, "cost": cost}
    if caught:
        told["warnings"] = [str(warning.message) for warning in caught]
    return la, told


# -- one network -------------------------------------------------------------------------------------------------------


def plain(models: list[nn.Module], data: Split, config: dict[str, Any]) -> dict[str, Judged]:
    """Methods without a posterior."""
    single, several = models[:1], models[: config["members"]]
    found: dict[str, Judged] = {}

    def add(label: str, predictor: Predictor, told: dict[str, Any]) -> None:
        found[label] = judge(predictor, models, data, config)
        found[label].numbers.update(told)

    def own(x: Tensor) -> Tensor:
        return log_probabilities(single, x)

    add("MAP", lambda x: own(x).exp(), {})
    add("TS", *scaled(own, data))
    add("TS, prior on log T", *scaled(own, data, prior=True))
    add("vector scaling", vector_scaled(models[0], data), {})
    logits, said = retrained(models[0], data)
    add("retrained head, T", *scaled(logits, data))
    if said:
        found["retrained head, T"].numbers["warnings"] = said
    add("ensemble, T", *scaled(lambda x: log_probabilities(several, x), data))
    add("MC dropout, T", *scaled(dropped_out(models[-1], config["dropout"]["samples"]), data))
    return found


def paired(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Mean difference of losses over rows, and its standard error."""
    gaps = ours - theirs
    return {"d": float(gaps.mean()), "standard error": float(gaps.std() / len(gaps) ** 0.5)}


def measure(name: str, network: dict[str, Any], config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One network in every way."""
    entry, training = config["sets"][name], dict(config["training"])
    data, start = split(entry, name, network, config["batch"], folder), time.process_time()
    epochs = {key: entry.get(key, training.pop(key)) for key in ("early", "long")}
    training["epochs"] = epochs[network["training"]]
    seeds = [network["seed"] + 10_000 * k for k in range(config["members"] + 1)]
    models = [train(network, training, data, seed) for seed in seeds[:-1]]
    models.append(train(network, training, data, seeds[-1], config["dropout"]["share"]))
    found = plain(models, data, config)
    posteriors = {label: (asked, {}) for label, asked in RECIPES.items()}
    n_weights = sum(parameter.numel() for parameter in models[0].parameters())
    if network["architecture"].startswith("MLP") and n_weights <= config["all weights up to"]:
        posteriors["all weights"] = {}, {"subset_of_weights": "all", "hessian_structure": "kron"}
    for label, (asked, options) in posteriors.items():
        la, told = approximate(models[0], data, asked, options)
        found[label] = judge(la, models, data, config)
        found[label].numbers.update(told)
        if label == "default":
            found[label].numbers["score"] = aurocs(la.ood_score(data.test.dataset.tensors[0]), la.ood_score, data)
    for one in found.values():
        one.numbers.update(paired(one.losses, found["TS"].losses))
    ours = found["default"]
    ours.numbers["against"] = {
        label: paired(ours.losses, found[label].losses) for label in ("retrained head, T", "ensemble, T")
    }
    about = {"data": name, **network, "classes": data.n_outputs, "weights": n_weights}
    seconds = time.process_time() - start
    return {**about, "seconds": seconds, "methods": {label: one.numbers for label, one in found.items()}}
