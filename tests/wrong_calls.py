"""Calls that make no sense, generated: every keyword of everything public, times the values that people pass for it.

Each keyword has a sort (a flag, a count, a loader …), each sort a list of wrong values. `calls` goes through estimators,
their constructors and methods, keyword by keyword; `tests/test_wrong_calls.py` says what must come of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from laplace import Laplace, marglik_training
from tests.wrong_values import INF, METHODS, N_IN, N_OUT, NAN, UNCHECKED, UNREAD, WRONG, inputs, model, sort_of


def batches(likelihood: str, n: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Two batches."""
    noise = torch.Generator().manual_seed(2)
    if likelihood == "reward_modeling":
        x = torch.randn(n, 2, N_IN, generator=noise, dtype=torch.float32)
        y = torch.arange(n) % 2
    else:
        x = torch.randn(n, N_IN, generator=noise, dtype=torch.float32)
        y = (
            torch.arange(n) % N_OUT
            if likelihood == "classification"
            else torch.randn(n, N_OUT, generator=noise, dtype=torch.float32)
        )
    return [(x[: n // 2], y[: n // 2]), (x[n // 2 :], y[n // 2 :])]


@dataclass(frozen=True, eq=False)
class Subject:
    """An estimator to be called wrongly: options of `Laplace`, and of `fit`."""

    name: str
    likelihood: str
    options: dict[str, Any]
    fit_options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def n_out(self) -> int:
        return 1 if self.likelihood == "reward_modeling" else N_OUT

    def make(self, network: nn.Module | None = None, **options: Any) -> Any:
        network = model(self.n_out) if network is None else network
        return Laplace(network, **{"likelihood": self.likelihood, **self.options, **options})

    def fitted(self) -> Any:
        la = self.make()
        la.fit(batches(self.likelihood), **self.fit_options)
        return la

    def part(self) -> Any:
        """Fitted to some of the same data, where that is possible; not fitted else."""
        la = self.make()
        if la.curvature_type.name.value != "gp":
            la.fit(batches(self.likelihood)[:1])
        return la


def _subjects() -> list[Subject]:
    classification, regression, pairs = "classification", "regression", "reward_modeling"
    gp = {"hessian_structure": "gp"}
    rows = [
        ("last-kron", classification, {}),
        ("last-full", regression, {"hessian_structure": "full"}),
        ("last-diag", pairs, {"hessian_structure": "diag"}),
        ("last-lowrank", classification, {"hessian_structure": "lowrank", "rank": 3}),
        ("last-ekfac", regression, {"hessian_structure": "ekfac"}),
        ("last-blockdiag", classification, {"hessian_structure": "blockdiag"}),
        ("all-kron", regression, {"subset_of_weights": "all"}),
        ("all-full", classification, {"subset_of_weights": "all", "hessian_structure": "full"}),
        ("all-diag", classification, {"subset_of_weights": "all", "hessian_structure": "diag"}),
        ("all-lowrank", regression, {"subset_of_weights": "all", "hessian_structure": "lowrank", "rank": 3}),
        ("all-ekfac", classification, {"subset_of_weights": "all", "hessian_structure": "ekfac"}),
        ("all-blockdiag", regression, {"subset_of_weights": "all", "hessian_structure": "blockdiag"}),
        ("subnet-full", classification, {"subset_of_weights": "subnetwork", "hessian_structure": "full", "subnetwork_indices": torch.arange(5)}),
        ("subnet-diag", regression, {"subset_of_weights": "subnetwork", "hessian_structure": "diag", "subnetwork_indices": torch.arange(5)}),
        ("last-gp", classification, {**gp, "n_subset": 4}),
        ("all-gp", regression, {**gp, "subset_of_weights": "all", "n_subset": 4}),
        ("last-ella", classification, {**gp, "functional_approximation": "nystrom", "subsample_size": 4, "n_eigenvalues": 2}),
        ("all-ella", regression, {**gp, "subset_of_weights": "all", "functional_approximation": "nystrom", "subsample_size": 4, "n_eigenvalues": 2}),
        ("last-valla", classification, {**gp, "functional_approximation": "variational", "inducing_locations": inputs(3)}),
        ("all-valla", regression, {**gp, "subset_of_weights": "all", "functional_approximation": "variational", "inducing_locations": inputs(3)}),
    ]  # fmt: skip
    return [Subject(*row, {"iterations": 2} if "valla" in row[0] else {}) for row in rows]


SUBJECTS = _subjects()


@dataclass(frozen=True)
class Call:
    """One wrong call: `make` gives what to call, on a fitted estimator if there is one."""

    kind: str
    name: str
    call: Callable[[Any], Any]
    subject: Subject | None = None

    def __str__(self) -> str:
        return self.name


N_WEIGHTS = {(False, 2): 10, (False, 1): 5, (True, 2): 26}
"""Of the last layer or of all, by the number of outputs."""


@cache
def takes(subject: Subject) -> type:
    """The class of a subject."""
    return type(subject.make())


def keywords_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in UNCHECKED]


def base_arguments(subject: Subject, method: str) -> list[dict[str, Any]]:
    """Arguments with which a call makes sense; one of them is then replaced."""
    data = batches(subject.likelihood)
    n = 5 if "subnet" in subject.name else N_WEIGHTS[subject.name[:3] == "all", subject.n_out]
    given: dict[str, Any] = {
        "x": inputs(), "X": inputs(), "train_loader": data, "val_loader": data, "grid": [1.0, 2.0], "data": data,
        "value": torch.zeros(n), "Js": torch.ones(1, 2, n), "Js_star": torch.ones(1, 2, n),
        "jacobians": torch.ones(1, 2, n), "subnet_samples": torch.zeros(2, n), "device": "cpu",
        "pred_type": "glm", "link_approx": "probit", "n_samples": 3, "state_dict": {},
    }  # fmt: skip
    parameters = inspect.signature(getattr(takes(subject), method)).parameters
    if "other" in parameters:
        given["other"] = subject.part()
    needed = {name: given[name] for name, p in parameters.items() if p.default is p.empty and name in given}
    if method == "ood_score":
        if subject.likelihood == "reward_modeling" or (subject.likelihood == "regression" and "subnet" in subject.name):
            return []  # there is no score
        return [{**needed, "kind": "max_prob" if subject.likelihood == "classification" else "density"}]
    if method == "plan":
        return [{**needed, "tune": False}]
    if method == "tune":
        return [{**needed, "n_steps": 2}]
    if method == "optimize_prior_precision" and "method" in parameters:
        small = {**needed, "n_steps": 2, "grid_size": 3}
        return [{**small, "method": "marglik"}, {**small, "method": "gridsearch", "val_loader": data}]
    return [needed]


def of_constructors(subject: Subject) -> Iterator[Call]:
    """Every keyword of the constructor, by way of `Laplace`."""
    own = ["subset_of_weights", "hessian_structure", "functional_approximation"]
    for keyword in [*own, *keywords_of(takes(subject))]:
        for label, value in WRONG[sort_of("", keyword)].items():
            if keyword == "model":
                make = lambda _la, value=value: Laplace(value, **{"likelihood": subject.likelihood, **subject.options})  # noqa: E731
            else:
                make = lambda _la, keyword=keyword, value=value: subject.make(**{keyword: value})  # noqa: E731
            yield Call("constructors", f"{subject}({keyword}={label})", make, subject)


def of_methods(subject: Subject) -> Iterator[Call]:
    """Every keyword of every method."""
    for method in METHODS:
        function = getattr(takes(subject), method, None)
        if function is None:
            continue
        for number, arguments in enumerate(base_arguments(subject, method)):
            unread = UNREAD.get(arguments.get("method"), ())
            for keyword in keywords_of(function):
                if keyword in unread:
                    continue
                for label, value in WRONG[sort_of(method, keyword)].items():
                    changed = {**arguments, keyword: value}
                    call = lambda la, method=method, changed=changed: getattr(la, method)(**changed)  # noqa: E731
                    yield Call("methods", f"{subject}.{method}({keyword}={label})" + "'" * number, call, subject)


def of_training() -> Iterator[Call]:
    """`marglik_training`."""
    for keyword in keywords_of(marglik_training):
        for label, value in WRONG[sort_of("marglik_training", keyword)].items():
            arguments = {"train_loader": batches("regression"), "likelihood": "regression", "n_epochs": 2}
            call = lambda _la, a={**arguments, keyword: value}: marglik_training(**{"model": model(), **a})  # noqa: E731
            yield Call("training", f"marglik_training({keyword}={label})", call)


class Swallows(nn.Module):
    """A model that takes any keyword, as wrappers do."""

    def __init__(self, n_out: int = N_OUT) -> None:
        super().__init__()
        self.body = model(n_out)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        del kwargs
        return self.body(x)


def misspelt(options: list[str]) -> dict[str, str]:
    """A letter left out, doubled, or changed with its neighbor, and what people write instead: from that to the option."""
    found = {
        "num_samples": "n_samples",
        "nsamples": "n_samples",
        "link_aprox": "link_approx",
        "diag_output": "diagonal_output",
    }
    for option in options:
        middle = len(option) // 2
        swapped = option[: middle - 1] + option[middle] + option[middle - 1] + option[middle + 1 :]
        for wrong in (option[:-2] + option[-1], option + option[-1], swapped):
            if wrong not in options:
                found[wrong] = option
    return found


def of_misspelt(subject: Subject) -> Iterator[Call]:
    """Options of a prediction, misspelt; of a model that takes any keyword, and of one that takes none."""
    options = [name for name in keywords_of(takes(subject).__call__) if name != "x"]
    for wrong in misspelt(options):
        yield Call(
            "misspelt", f"{subject}.__call__({wrong}=)", lambda la, wrong=wrong: la(inputs(), **{wrong: 1}), subject
        )


def wrong_data(likelihood: str) -> dict[str, Any]:
    """What loaders yield that cannot be learned from."""
    (x, y), _ = batches(likelihood)
    classes = not y.is_floating_point()
    found: dict[str, Any] = {
        "no batch of rows": [(x[:0], y[:0])], "targets as texts": [(x, ["a"] * len(y))], "inputs as texts": [("x", y)],
        "arrays": [(x.numpy(), y.numpy())], "array of inputs": [(x.numpy(), y)], "array of targets": [(x, y.numpy())],
        "doubles": [(x.double(), y)], "halves": [(x.half(), y)], "whole numbers": [(x.long(), y)],
        "wide": [(torch.ones(*x.shape[:-1], N_IN + 1), y)], "fewer targets": [(x, y[:-1])], "more targets": [(x[:-1], y)],
        "nan inputs": [(torch.full_like(x, NAN), y)], "inf inputs": [(torch.full_like(x, INF), y)],
        "three items": [(x, y, torch.arange(len(y)))], "wrong keys": [{"a": x, "b": y}], "no inputs": [{"labels": y}],
        "index": [{"data": x, "label": y, "index": torch.arange(len(y))}], "none": [None], "swapped": [(y, x)],
        "meta inputs": [(x.to("meta"), y)], "complex inputs": [(x.to(torch.complex64), y)], "a number": [(x, 1.0)],
        "complex targets": [(x, y.to(torch.complex64))], "meta targets": [(x, y.to("meta"))],
        "deep targets": [(x, y.reshape(len(y), -1, 1, 1).expand(-1, -1, 3, 2))], "scalar inputs": [(torch.tensor(1.0), y)],
        "shapes change": [(x, y), (torch.ones(2, N_IN + 2), y[:2])], "sparse targets": [(x, y.to_sparse())],
    }  # fmt: skip
    if classes:
        found |= {
            "labels too large": [(x, y + 9)],
            "negative labels": [(x, y - 5)],
            "float labels": [(x, y.float())],
            "one column": [(x, y.unsqueeze(-1))],
            "flags": [(x, y > 0.5)],
        }
    else:
        found |= {
            "nan targets": [(x, torch.full_like(y, NAN))],
            "vector of targets": [(x, y[:, 0])],
            "third output": [(x, torch.ones(len(y), N_OUT + 1))],
        }
    return found


def of_data(subject: Subject) -> Iterator[Call]:
    """Data that cannot be learned from, and calls as in other libraries."""
    (x, y), _ = batches(subject.likelihood)
    options = subject.fit_options
    for label, data in wrong_data(subject.likelihood).items():
        yield Call("data", f"{subject}.fit({label})", lambda la, data=data: la.fit(data, **options), subject)
    yield Call("data", f"{subject}.fit(x, y)", lambda la: la.fit(x, y), subject)
    yield Call("data", f"{subject}.fit()", lambda la: la.fit(), subject)
    yield Call("data", f"{subject}.fit(x)", lambda la: la.fit(x, **options), subject)


class Returns(nn.Module):
    """A network, and what is done to its outputs."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.change = model(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.body(x))


def _fails(f: Tensor) -> Tensor:
    raise RuntimeError("of the model's own")


WRONG_MODELS: dict[str, Callable[[], nn.Module]] = {
    "meta": lambda: model().to("meta"),
    "no weights": lambda: nn.Tanh(),
    "frozen": lambda: model().requires_grad_(False),
    "scripted": lambda: torch.jit.script(model()),
    "traced": lambda: torch.jit.trace(model(), inputs()),
    "no outputs": lambda: Returns(lambda f: None),
    "a text": lambda: Returns(lambda f: "f"),
    "one number": lambda: Returns(lambda f: f.sum()),
    "other rows": lambda: Returns(lambda f: f[:1]),
    "a tuple": lambda: Returns(lambda f: (f, f)),
    "a mapping": lambda: Returns(lambda f: {"out": f}),
    "whole numbers": lambda: Returns(lambda f: f.long()),
    "detached": lambda: Returns(lambda f: f.detach()),
    "nan": lambda: Returns(lambda f: f * NAN),
    "half": lambda: model().half(),
    "complex": lambda: model(dtype=torch.complex64),
    "fails": lambda: Returns(_fails),
    "not implemented": lambda: nn.Module(),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, N_OUT)),
}


def of_models(subject: Subject) -> Iterator[Call]:
    """Models that have no posterior."""
    if subject.likelihood == "reward_modeling":
        return

    def run(network: Callable[[], nn.Module]) -> None:
        subject.make(network()).fit(batches(subject.likelihood), **subject.fit_options)

    for label, network in WRONG_MODELS.items():
        yield Call("models", f"{subject}: {label}", lambda _la, network=network: run(network), subject)


def calls(subject: Subject) -> Iterator[Call]:
    """All wrong calls of an estimator."""
    for of in (of_constructors, of_methods, of_misspelt, of_data, of_models):
        yield from of(subject)
