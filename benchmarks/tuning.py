"""Ways to choose hyperparameters, on real data: the tables of ``docs/tuning.md``.

    python benchmarks/tuning.py [--output DIR]

For five data sets and three seeds (each another split and another network) a network, the network with its best
temperature or noise, and Laplace approximations of each structure are tuned on validation (or training) data in every
way; test data and foreign inputs are scored once, and nothing is chosen on them. The configuration is ``tuning.json``;
writes ``results/tuning.json`` and ``results/tuning.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import markdown
from torch import Tensor, nn
from tuning_data import Split, split, train

from laplace import Laplace
from laplace.errors import InputError
from laplace.evaluation import SoftmaxPredictor, calibration_error, fit_temperature, ood_auroc, uncertainty

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "tuning.json").read_text(encoding="utf-8"))
STRUCTURES = {
    "last layer, full": ("last_layer", "full"),
    "last layer, kron": ("last_layer", "kron"),
    "last layer, diag": ("last_layer", "diag"),
    "all weights, kron": ("all", "kron"),
    "all weights, diag": ("all", "diag"),
}
DEFAULT = "last layer, kron: tune"
NETWORK = "MAP"
SCALED = {"classification": "MAP, temperature", "regression": "MAP, best noise"}
VERDICTS = ("better", "level", "unclear", "worse")
COLUMNS = {
    "NLL": ("nll", 3),
    "ECE": ("ece", 3),
    "OOD, photographs": ("ood photographs", 3),
    "OOD, classes": ("ood classes", 3),
    "tuning, s": ("seconds", 2),
}


# -- ways to tune ------------------------------------------------------------------------------------------------------


def by_tune(la: Any, data: Split) -> None:
    """Prior precision, and temperature or noise, around the head that all rows share."""
    la.tune(data.validation, refit=False, distance_aware=False)


def by_grid(la: Any, data: Split) -> None:
    """The prior precision alone; a regression has the noise that is best for the network."""
    if data.likelihood == "regression":
        la.sigma_noise = residual(la.model, data.validation.dataset.tensors)
    la.optimize_prior_precision(method="gridsearch", val_loader=data.validation, **CONFIG["grid"])


def by_evidence(la: Any, data: Split) -> None:
    """Prior precision, and noise, by the training data."""
    la.optimize_prior_precision(method="marglik", noise="scalar" if data.likelihood == "regression" else "keep")


def by_leaving_out(la: Any, data: Split) -> None:
    """The prior precision, by each training row without itself."""
    la.optimize_prior_precision(method="loo", train_loader=data.train, **CONFIG["training_grid"])


def by_folds(la: Any, data: Split) -> None:
    """The prior precision, by five folds of the training rows."""
    la.optimize_prior_precision(method="cv", train_loader=data.train, **CONFIG["training_grid"])


METHODS: list[tuple[str, Callable[[Any, Split], None], set[str]]] = [
    ("tune", by_tune, set(STRUCTURES)),
    ("gridsearch", by_grid, set(STRUCTURES)),
    ("marglik", by_evidence, set(STRUCTURES)),
    ("loo", by_leaving_out, {"last layer, full", "last layer, diag"}),
    ("cv", by_folds, {"last layer, full", "last layer, kron", "last layer, diag"}),
]
"""Name, call, and the structures that it is for."""


# -- predictions and their scores --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a row of the table is made of: the loss of each test row, and how foreign each input looks."""

    losses: Tensor
    familiar: Tensor
    foreign: dict[str, Tensor]
    ece: float | None
    seconds: float
    chosen: dict[str, float]
    notes: list[str]


def residual(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    """Root mean squared residual: the noise of most likelihood."""
    x, y = data
    with torch.no_grad():
        return float((model(x) - y).square().mean().sqrt())


def log_losses(probs: Tensor, y: Tensor) -> Tensor:
    """−log p(y | x), one number per row."""
    return -probs.double().gather(1, y[:, None]).log().squeeze(1)


def gaussian_losses(mean: Tensor, variance: Tensor | float, y: Tensor) -> Tensor:
    """The same for a Gaussian with one output."""
    variance = torch.as_tensor(variance).double()
    return 0.5 * ((y - mean).double().square() / variance + (2 * math.pi * variance).log()).reshape(len(y), -1).sum(1)


def outcome(
    predictor: Callable[[Tensor], Any], data: Split, seconds: float, chosen: dict[str, float], notes: list[str]
) -> Outcome:
    """Read the test data, once."""
    x, y = data.test.dataset.tensors
    if data.likelihood == "regression":
        mean, variance = predictor(x)
        losses = gaussian_losses(mean, variance, y)
        return Outcome(losses, torch.empty(0), {}, None, seconds, chosen, notes)
    probs = torch.cat([predictor(part) for part in x.split(CONFIG["batch"])])
    strange = {
        name: torch.cat([uncertainty(predictor(part)) for part in inputs.split(CONFIG["batch"])])
        for name, inputs in data.foreign.items()
    }
    ece = calibration_error(probs, y, n_bins=CONFIG["bins"])
    return Outcome(log_losses(probs, y), uncertainty(probs), strange, ece, seconds, chosen, notes)


def networks_alone(model: nn.Module, data: Split) -> dict[str, Outcome]:
    """The network, and the network with the one number that is best on the validation data."""
    start = time.perf_counter()
    if data.likelihood == "regression":
        best = residual(model, data.validation.dataset.tensors)
        seconds = time.perf_counter() - start
        first = residual(model, data.train.dataset.tensors)
        rows = {NETWORK: (first, 0.0), SCALED["regression"]: (best, seconds)}
        return {
            name: outcome(lambda x, s=sigma: (model(x).detach(), s**2), data, time_, {"sigma_noise": sigma}, [])
            for name, (sigma, time_) in rows.items()
        }
    notes = []
    scaled = SoftmaxPredictor(model)
    try:
        scaled = fit_temperature(model, data.validation)
    except InputError as error:  # every validation row is right: no temperature is best, the network stays as it is
        notes.append(str(error))
    seconds = time.perf_counter() - start
    return {
        NETWORK: outcome(SoftmaxPredictor(model), data, 0.0, {}, []),
        SCALED["classification"]: outcome(scaled, data, seconds, {"output_temperature": scaled.temperature}, notes),
    }


def predictor_of(la: Any) -> Callable[[Tensor], Any]:
    """An estimator as a predictor; for regression of targets, noise included."""
    if la.likelihood != "regression":
        return la

    def of_targets(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, cov = la(x)
        return mean, cov.squeeze(-1) + la.sigma_noise**2

    return of_targets


def approximations(model: nn.Module, data: Split) -> dict[str, Outcome]:
    """Every structure, tuned in every way; each starts from the same values."""
    found = {}
    for structure, (subset, kind) in STRUCTURES.items():
        noise = residual(model, data.train.dataset.tensors) if data.likelihood == "regression" else 1.0
        la = Laplace(model, data.likelihood, subset, kind, sigma_noise=noise)
        la.fit(data.train)
        for name, tune, structures in METHODS:
            if structure not in structures:
                continue
            la.prior_precision, la.sigma_noise, la.output_temperature = 1.0, noise, 1.0
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                start = time.perf_counter()
                tune(la, data)
                seconds = time.perf_counter() - start
            chosen = {key: float(value) for key, value in la.tuning_.hyperparameters.items()}
            notes = [str(warning.message) for warning in caught]
            found[f"{structure}: {name}"] = outcome(predictor_of(la), data, seconds, chosen, notes)
    return found


def relative_variances(model: nn.Module, data: Split) -> dict[str, float]:
    """Mean variance of the logits at foreign inputs, over that at test inputs: last layer, kron, whatever is tuned."""
    if not data.foreign:
        return {}
    la = Laplace(model, data.likelihood, "last_layer", "kron", prior_precision=CONFIG["variance_precision"])
    la.fit(data.train)
    usual = la.functional_variance_fast(data.test.dataset.tensors[0])[1].mean()
    return {name: float(la.functional_variance_fast(x)[1].mean() / usual) for name, x in data.foreign.items()}


# -- comparisons -------------------------------------------------------------------------------------------------------


def difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Mean difference of paired losses, and its standard error over test rows."""
    gaps = ours - theirs
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)


def placements(familiar: Tensor, foreign: Tensor) -> tuple[Tensor, Tensor]:
    """For each familiar input the share of foreign ones that look stranger, and the reverse; ties count half."""

    def share_below(values: Tensor, among: Tensor) -> Tensor:
        among = among.sort().values
        below = torch.searchsorted(among, values) + torch.searchsorted(among, values, right=True)
        return below.double() / (2 * len(among))

    return 1 - share_below(familiar, foreign), share_below(foreign, familiar)


def ood_difference(ours: Outcome, theirs: Outcome, name: str) -> tuple[float, float]:
    """Difference of two AUROC on the same inputs, and its standard error (DeLong, DeLong & Clarke-Pearson, 1988)."""
    pairs = [placements(one.familiar, one.foreign[name]) for one in (ours, theirs)]
    inside, outside = pairs[0][0] - pairs[1][0], pairs[0][1] - pairs[1][1]
    error = (inside.var() / len(inside) + outside.var() / len(outside)) ** 0.5
    return float(outside.mean()), float(error)


def verdict(gap: tuple[float, float], less_is_better: bool) -> str:
    """Beyond two standard errors better or worse; else level where the difference is small, unclear where it is not."""
    mean, error = gap
    small = CONFIG["small_difference"]
    if abs(mean) > max(2 * error, small["at_least"]):
        return "better" if (mean < 0) == less_is_better else "worse"
    return "level" if abs(mean) < small["at_most"] else "unclear"


def compare(outcomes: dict[str, Outcome], likelihood: str) -> dict[str, Any]:
    """The default recipe beside the scaled network, for one network."""
    ours, theirs = outcomes[DEFAULT], outcomes[SCALED[likelihood]]
    gaps = {"nll": difference(ours.losses, theirs.losses)}
    gaps |= {f"ood {name}": ood_difference(ours, theirs, name) for name in ours.foreign}
    return {
        name: {"difference": gap[0], "standard_error": gap[1], "verdict": verdict(gap, name == "nll")}
        for name, gap in gaps.items()
    }


def row_of(one: Outcome) -> dict[str, Any]:
    """The numbers of a row."""
    ood = {f"ood {name}": ood_auroc(one.familiar, scores) for name, scores in one.foreign.items()}
    ece = {} if one.ece is None else {"ece": one.ece}
    numbers = {"nll": float(one.losses.mean()), **ece, **ood, "seconds": one.seconds}
    return {**numbers, "chosen": one.chosen, "notes": one.notes}


# -- tables ------------------------------------------------------------------------------------------------------------


def cell(values: list[float], digits: int) -> str:
    """Mean ± standard error; no-break spaces keep them on one line."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{digits}f}\u00a0±\u00a0{error:.{digits}f}"


def table(runs: list[dict[str, Any]]) -> str:
    """Averages of one data set over seeds."""
    first = runs[0]["rows"]
    columns = {title: column for title, column in COLUMNS.items() if column[0] in first[NETWORK]}
    lines = []
    for name in first:
        cells = [cell([run["rows"][name][key] for run in runs], digits) for key, digits in columns.values()]
        label = f"**{name}**" if name == DEFAULT else name
        lines.append([label, *cells[:-1], "" if name == NETWORK else cells[-1]])
    return markdown(["", *columns], lines)


def signed(gap: dict[str, Any] | None) -> str:
    """A difference with its error and what it says."""
    if gap is None:
        return ""
    mean = round(gap["difference"], 4) + 0.0  # no −0
    says = gap["verdict"] if gap["verdict"] == "level" else f"**{gap['verdict']}**"
    return f"{mean:+.4f}\u00a0±\u00a0{gap['standard_error']:.4f} {says}"


def verdicts(runs: list[dict[str, Any]]) -> str:
    """The default recipe minus the scaled network, a line for each network."""
    lines = []
    for run in runs:
        chosen = run["rows"][DEFAULT]["chosen"]
        shown = ", ".join(f"{value:.3g}" for value in chosen.values())
        cells = [signed(run["default_minus_scaled"].get("nll"))]
        for name in ("photographs", "classes"):
            variance = run["relative_variances"].get(name)
            shown_variance = "" if variance is None else f"{variance:.2f}"
            cells += [signed(run["default_minus_scaled"].get(f"ood {name}")), shown_variance]
        lines.append([run["data"], run["seed"], shown, *cells])
    columns = ["ΔNLL", "ΔOOD, photographs", "their variance", "ΔOOD, classes", "their variance"]
    return markdown(["", "seed", "precision, T or σ", *columns], lines)


def counts(runs: list[dict[str, Any]]) -> str:
    """How often the default recipe is better, and so on."""
    parts = []
    for title, key in (("NLL", "nll"), ("photographs", "ood photographs"), ("held-out classes", "ood classes")):
        found = [run["default_minus_scaled"][key]["verdict"] for run in runs if key in run["default_minus_scaled"]]
        parts.append(f"{title} " + ", ".join(f"{found.count(v)} {v}" for v in VERDICTS if v in found))
    return "In sum: " + "; ".join(parts) + "."


def text(runs: list[dict[str, Any]]) -> str:
    """Everything that the page shows."""
    parts = [verdicts(runs), counts(runs)]
    for name in CONFIG["sets"]:
        part = table([run for run in runs if run["data"] == name])
        parts.append(
            f'<details markdown="1"><summary>{name}: every structure and method</summary>\n\n{part}\n\n</details>'
        )
    return "\n\n".join(parts)


def main() -> None:
    """Measure every data set and seed, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(CONFIG["threads"])
    start = time.perf_counter()
    runs = []
    for name, config in CONFIG["sets"].items():
        for seed in range(CONFIG["seeds"]):
            data = split(name, config, seed, CONFIG["batch"])
            model = train(config, data, seed)
            outcomes = networks_alone(model, data) | approximations(model, data)
            runs.append(
                {
                    "data": name,
                    "seed": seed,
                    "default_minus_scaled": compare(outcomes, data.likelihood),
                    "relative_variances": relative_variances(model, data),
                    "rows": {row: row_of(one) for row, one in outcomes.items()},
                }
            )
            print(f"{name} {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()}
    record = {"machine": machine, "config": CONFIG, "runs": runs}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "tuning.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "tuning.md").write_text(text(runs) + "\n", encoding="utf-8")
    print(text(runs))


if __name__ == "__main__":
    main()
