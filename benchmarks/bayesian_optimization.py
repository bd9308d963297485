"""Bayesian optimization with a network and its posterior, beside a Gaussian process and random search.

    python benchmarks/bayesian_optimization.py [--minutes M] [--folder DIR] [--output DIR] [--config FILE]
        [--picture FILE]

All methods start from the same scrambled Sobol points, and then see ``q`` new values in each round. ``random`` goes on
with Sobol points. The others maximize the same acquisition function, ``qLogExpectedImprovement``, by the same
``optimize_acqf``: of ``SingleTaskGP`` with the defaults of BoTorch, or of ``LaplaceModel`` around a network that is
trained in each round on all values seen so far, from new first weights, and whose prior precision and noise maximize
the evidence.

The configuration is ``bayesian_optimization.json``: functions, seeds, budgets, and the settings of the network, which
were chosen on the functions and seeds under ``"chosen_on"`` before any of the others was run. Each search has a file in
``--folder``, which is read instead of searching again. With ``--minutes`` none is begun after so many, and the same
command goes on; the last call writes ``bayesian_optimization.json`` and ``bayesian_optimization.md`` of ``--output``,
and the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.exceptions.warnings import BotorchWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.test_functions import synthetic
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from matplotlib.figure import Figure
from measuring import markdown
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from laplace import Laplace
from laplace.integrations.botorch import LaplaceModel

HERE = Path(__file__).resolve().parent
ACTIVATIONS = {"tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}


class Problem:
    """A test function of BoTorch on the unit cube, to be maximized; of ``embedded`` inputs only the first count."""

    def __init__(self, name: str, dim: int, embedded: int | None = None) -> None:
        arguments = {} if name in ("Branin", "Hartmann") and dim == 2 else {"dim": dim}
        self._function = getattr(synthetic, name)(**arguments, negate=True).double()
        self.dim, self._active = embedded or dim, dim

    def __call__(self, X: Tensor) -> Tensor:
        """Values ``[n, 1]`` at points ``[n, d]`` of the unit cube."""
        low, high = self._function.bounds
        return self._function(low + (high - low) * X[:, : self._active]).unsqueeze(-1)

    @property
    def optimum(self) -> float:
        """The largest value."""
        return float(self._function.optimal_value)


def network(dim: int, settings: dict[str, Any]) -> nn.Sequential:
    """Hidden layers of equal width, and a last one without an activation."""
    layers: list[nn.Module] = []
    for _ in range(settings["layers"]):
        layers += [nn.Linear(dim, settings["width"]), ACTIVATIONS[settings["activation"]]()]
        dim = settings["width"]
    return nn.Sequential(*layers, nn.Linear(dim, 1)).double()


def trained(X: Tensor, Y: Tensor, settings: dict[str, Any]) -> nn.Sequential:
    """From new first weights, by L-BFGS on half the squared errors of all rows and half the squared weights."""
    model = nn.Sequential(OnCircles(), *network(2 * X.shape[1], settings))
    weights = list(model.parameters())
    options: dict[str, Any] = {"max_iter": settings["iterations"], "history_size": 20, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(weights, **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(weight.square().sum() for weight in weights)
        total = 0.5 * ((model(X) - Y).square().sum() + settings["weight_decay"] * penalty)
        total.backward()
        return total

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return model


def laplace_model(X: Tensor, Y: Tensor, settings: dict[str, Any]) -> LaplaceModel:
    """A network and its posterior, tuned by the evidence."""
    transform = Standardize(m=1)
    y = transform(Y)[0]
    la = Laplace(trained(X, y, settings), "regression", settings["subset_of_weights"], "full", sigma_noise=0.1)
    la.fit([(X, y)]).optimize_prior_precision(method="marglik", noise="scalar")
    return LaplaceModel(la, outcome_transform=transform)


class OnCircles(nn.Module):
    """Each input becomes an angle of a half circle, ``(sin, cos)``: all points of the unit cube have the same norm.

    The prior variance of a network grows with the norm of its inputs, so that without it corners look most uncertain.
    """

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.pi * (x - 0.5)
        return torch.cat([angle.sin(), angle.cos()], -1)


def gaussian_process(X: Tensor, Y: Tensor, settings: dict[str, Any]) -> SingleTaskGP:
    """With the defaults of BoTorch, fitted by its marginal likelihood."""
    del settings
    gp = SingleTaskGP(X, Y, outcome_transform=Standardize(m=1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
    return gp


def search(problem: Problem, method: str, seed: int, config: dict[str, Any], budget: dict[str, Any]) -> dict[str, Any]:
    """The best value after each round, and how long a round took."""
    torch.manual_seed(seed)
    sobol = SobolEngine(problem.dim, scramble=True, seed=seed)
    X = sobol.draw(budget["initial"]).double()
    Y = problem(X)
    best, start = [float(Y.max())], time.perf_counter()
    bounds = torch.stack([torch.zeros(problem.dim), torch.ones(problem.dim)]).double()
    for round_ in range(budget["rounds"]):
        if method == "random":
            new = sobol.draw(budget["q"]).double()
        else:
            make = gaussian_process if method == "GP" else laplace_model
            model = make(X, Y, config["methods"][method])
            sampler = SobolQMCNormalSampler(torch.Size([config["samples"]]), seed=round_)
            acquisition = qLogExpectedImprovement(model, best_f=Y.max(), sampler=sampler)
            new, _ = optimize_acqf(acquisition, bounds, q=budget["q"], **config["acquisition"])
        X, Y = torch.cat([X, new]), torch.cat([Y, problem(new)])
        best.append(float(Y.max()))
    seconds = (time.perf_counter() - start) / budget["rounds"]
    return {"best": [float(f"{value:.6g}") for value in best], "seconds a round": round(seconds, 3)}


def label(function: dict[str, Any]) -> str:
    """How a function is called in tables."""
    name = f"{function['name']}-{function['dim']}"
    return f"{name} in {function['embedded']} dimensions" if "embedded" in function else name


def of_one(runs: list[dict[str, Any]]) -> tuple[float, float, float, list[float]]:
    """Median and mean of the last best values of all seeds, the standard error of the mean, and medians by round."""
    last = [run["best"][-1] for run in runs]
    error = statistics.stdev(last) / len(last) ** 0.5 if len(last) > 1 else float("nan")
    by_round = [statistics.median(values) for values in zip(*(run["best"] for run in runs), strict=True)]
    return statistics.median(last), statistics.mean(last), error, by_round


def table(results: list[dict[str, Any]]) -> str:
    """One line for each function and method."""
    columns = ["function", "values seen", "method", "best value: median", "mean ± standard error", "largest possible"]
    lines = []
    for one in results:
        budget = one["budget"]
        seen = budget["initial"] + budget["rounds"] * budget["q"]
        for method, runs in one["runs"].items():
            median, mean, error, _ = of_one(runs)
            cells = [one["function"], seen, method, f"{median:.3f}", f"{mean:.3f} ± {error:.3f}"]
            lines.append([*cells, f"{one['optimum'] + 0.0:.3f}"])
    return markdown(columns, lines)


def picture(results: list[dict[str, Any]]) -> Figure:
    """The median of the best value over the values seen, between the worst and the best of all seeds."""
    figure = Figure(figsize=(max(3.7 * len(results), 6), 3.6), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        budget = one["budget"]
        seen = [budget["initial"] + round_ * budget["q"] for round_ in range(budget["rounds"] + 1)]
        for (method, runs), color in zip(one["runs"].items(), ("C7", "C1", "C0", "C2"), strict=True):
            by_round = list(zip(*(run["best"] for run in runs), strict=True))
            axes.plot(seen, [statistics.median(values) for values in by_round], color=color, label=method)
            low, high = [min(values) for values in by_round], [max(values) for values in by_round]
            axes.fill_between(seen, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set(title=one["function"], xlabel="values seen")
        if one["function"].startswith("Rosenbrock"):
            axes.set_yscale("symlog", linthresh=1.0)
            axes.set_ylim(top=-100)
        else:
            axes.axhline(one["optimum"], color="black", linewidth=0.6, linestyle=":")
    figure.axes[0].set_ylabel("best value")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    """Search, or read what was found, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no search after so many")
    parser.add_argument("--folder", type=Path, default=HERE / ".bayesian_optimization", help="one file for each search")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--config", type=Path, default=HERE / "bayesian_optimization.json")
    parser.add_argument(
        "--picture", type=Path, default=HERE.parent / "docs" / "assets" / "bayesian_optimization.png", help="where to"
    )
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    torch.set_num_threads(config["threads"])
    for category in (BotorchWarning, NumericalWarning, RuntimeWarning, UserWarning):
        warnings.simplefilter("ignore", category)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    start, left, results = time.monotonic(), 0, []
    for function in config["functions"]:
        budget = function["budget"]
        problem = Problem(**{key: function[key] for key in ("name", "dim", "embedded") if key in function})
        found: dict[str, list[dict[str, Any]]] = {method: [] for method in config["methods"]}
        for seed in config["seeds"]:
            for method in found:
                file = arguments.folder / f"{label(function)}, {method}, {seed}.json".replace(" ", "_")
                if not file.exists() and (time.monotonic() - start) / 60 > arguments.minutes:
                    left += 1
                    continue
                if not file.exists():
                    file.write_text(json.dumps(search(problem, method, seed, config, budget)), encoding="utf-8")
                    told = json.loads(file.read_text(encoding="utf-8"))
                    print(file.stem, told["best"][-1], told["seconds a round"], flush=True)
                found[method].append(json.loads(file.read_text(encoding="utf-8")))
        results.append({"function": label(function), "optimum": problem.optimum, "budget": budget, "runs": found})
    if left:
        sys.exit(f"{left} searches are left: call again.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    told = {"torch": torch.__version__, "config": config, "results": results}
    (arguments.output / "bayesian_optimization.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "bayesian_optimization.md").write_text(table(results) + "\n", encoding="utf-8")
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    picture(results).savefig(arguments.picture, dpi=110)
    print(table(results))


if __name__ == "__main__":
    main()
