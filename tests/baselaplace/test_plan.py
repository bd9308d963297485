"""`plan`: passes and memory are those of the calls that it speaks of, nothing is changed, what cannot fit is not run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace import Laplace, Plan
from laplace.baselaplace import costs
from laplace.errors import InputError, NotFittedError, OutOfMemoryError, UnsupportedError
from laplace.free_memory import Memory
from tests.contracts import model_untouched
from tests.tools import peak_bytes, slow_but

ROWS, BATCHES = 24, 5
X = torch.randn(ROWS * BATCHES, 6, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(len(X)) % 4
LOADER = DataLoader(TensorDataset(X, Y), batch_size=ROWS)


def network(width: int = 16) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    ).float()


def approximation(subset: str = "last_layer", structure: str = "kron", width: int = 16, **options: Any) -> Any:
    return Laplace(network(width), "classification", subset, structure, **options)


class Counter:
    """Passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = self.backward = 0
        model.register_forward_hook(self._passed)

    def _passed(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._back)

    def _back(self, _: Tensor) -> None:
        self.backward += 1

    def of(self, run: Any) -> tuple[int, int]:
        before = self.forward, self.backward
        run()
        return self.forward - before[0], self.backward - before[1]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_passes_of_a_model_in_a_wrapper_are_those_of_the_model(subset, wrap):
    plain = Laplace(network(), "classification", subset, "diag").plan(LOADER, tune=False)
    wrapped = Laplace(wrap(network()), "classification", subset, "diag").plan(LOADER, tune=False)
    for name in ("fit", "predict"):
        own, other = getattr(plain, name), getattr(wrapped, name)
        assert own.forward_passes > 0
        assert (own.forward_passes, own.backward_passes) == (other.forward_passes, other.backward_passes)


@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize("structure", slow_but(["kron"], ["diag", "kron", "ekfac", "full"]))
def test_passes_are_those_of_the_calls(subset: str, structure: str) -> None:
    la = approximation(subset, structure)
    tunes = subset == "last_layer"
    plan, counter = la.plan(LOADER, tune=tunes), Counter(la._network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for run, cost in (
            (lambda: la.fit(LOADER), plan.fit),
            (lambda: [la(x) for x, _ in LOADER], plan.predict),
            *([(lambda: la.tune(LOADER), plan.tune)] if tunes else []),
        ):
            forward, backward = counter.of(run)
            assert cost.forward_passes == forward
            # Layouts of rows are read again in some passes.
            assert backward == pytest.approx(cost.backward_passes, rel=0.1, abs=4)
    assert plan.fit.readings == (2 if structure == "ekfac" and subset == "all" else 1)


WIDE, DENSE = 96, 64
"""Wide enough that the memory is that of curvature and factors, not of small things; blocks of all weights are dense."""


@pytest.mark.parametrize(
    ("subset", "structure"),
    # Not all-full: it is large, and the same as all-blockdiag here.
    slow_but(["last_layer-full"], ["last_layer", "all"], ["diag", "kron", "full", "blockdiag", "lowrank"])[:7]
    + slow_but([], ["all"], ["blockdiag", "lowrank"]),
)
def test_memory_is_within_a_factor_of_two_of_what_the_allocator_gives(subset: str, structure: str) -> None:
    la = approximation(subset, structure, DENSE if (subset, structure) == ("all", "blockdiag") else WIDE)
    plan = la.plan(LOADER, tune=False)
    assert plan.fit.bytes is not None
    assert plan.predict.bytes is not None

    def fit_and_predict() -> None:
        la.fit(LOADER)
        la.accept_untuned()
        for x, _ in LOADER:
            la(x)

    fit = peak_bytes(lambda: la.fit(LOADER))
    assert fit / 2 < plan.fit.bytes < 2 * fit
    both = peak_bytes(fit_and_predict)
    assert both / 2 < max(plan.fit.bytes, plan.predict.bytes) < 2 * both


def snapshot(la: Any) -> dict[str, Any]:
    """Everything that an object knows; of its extractor as well."""
    known = {name: dict(v) if isinstance(v, dict) else v for name, v in vars(la).items() if name != "model"}
    extractor = {k: v for k, v in vars(la.model).items() if not k.startswith("_") or k == "_verified"}
    return {**known, "extractor": extractor, "seen": dict(la._reading.seen)}


@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize("fitted", [False, True], ids=["before fit", "after fit"])
def test_nothing_is_changed(subset: str, fitted: bool) -> None:
    own, sampled = torch.Generator().manual_seed(4), torch.Generator().manual_seed(5)
    options = {"backend_kwargs": {"stochastic": True, "generator": sampled}} if subset == "all" else {}
    la = approximation(subset, **options)
    la.model.train()
    loader = DataLoader(TensorDataset(X, Y), batch_size=ROWS, shuffle=True, generator=own)
    if fitted:
        la.fit(LOADER)
        la(X[:3])
    states = torch.get_rng_state(), own.get_state(), sampled.get_state()
    numpy, before = np.random.get_state()[1].copy(), snapshot(la)
    with model_untouched(la._network), warnings.catch_warnings():
        warnings.simplefilter("error")
        tunes = fitted and subset == "last_layer"
        plan = la.plan(loader, tune=tunes)
    after = snapshot(la)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = after[name] is value or (isinstance(value, (dict, str, bool, float, Memory)) and after[name] == value)
        assert same or (isinstance(value, Tensor) and torch.equal(after[name], value)) or name == "_reading", name
    for state, now in zip(states, (torch.get_rng_state(), own.get_state(), sampled.get_state()), strict=True):
        assert torch.equal(state, now)
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert all(cost.fits and cost.seconds is not None for cost in (plan.fit, plan.predict))
    assert (plan.tune.seconds is not None) == tunes
    if not fitted:
        with pytest.raises(NotFittedError):
            la.n_outputs  # noqa: B018


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)


@pytest.mark.parametrize(
    ("data", "n_batches", "n_rows"),
    [
        (LOADER, BATCHES, len(X)),
        ([(X[:10], Y[:10]), (X[10:15], Y[10:15])], 2, 15),
        ((X, Y), 1, None),
        ([X, Y], 1, None),
        (DataLoader(Stream(), batch_size=8), None, None),
    ],
    ids=["loader", "list of batches", "batch", "batch as a list", "stream"],
)
def test_a_loader_says_how_many_there_are(data: Any, n_batches: int | None, n_rows: int | None) -> None:
    plan = approximation().plan(data, tune=False)
    assert (plan.n_batches, plan.n_rows) == (n_batches, n_rows)
    assert plan.fit.forward_passes == (n_batches or 1)
    assert ("does not say how many" in str(plan)) == (n_batches is None)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (iter([(X, Y)]), r"an iterator \(list_iterator\).*fit would then miss"),
        ([], "empty"),
        (X, "a loader, or one batch"),
        ([X], "yield"),
    ],
    ids=["iterator", "empty", "tensor", "no targets"],
)
def test_what_cannot_be_planned_is_refused(data: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        approximation().plan(data)


def test_posteriors_over_functions_have_no_plan() -> None:
    la = Laplace(network(), "classification", hessian_structure="gp", n_subset=10)
    with pytest.raises(UnsupportedError, match=r"FunctionalLLLaplace is a posterior over functions"):
        la.plan(LOADER)


@pytest.mark.parametrize(("free", "fits"), [(30_000, ["'diag'", "'kron'"]), (3_000, ["'diag'"])])
def test_what_cannot_fit_is_not_run_and_what_would_is_said(
    free: int, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "of_device", lambda device: Memory(free, "a test"))
    la = approximation(structure="full")
    monkeypatch.setattr(la._network, "forward", lambda x: nn.Sequential.forward(la._network, x))
    plan = la.plan(LOADER)
    n_params = 16 * 4 + 4
    assert plan.fit.bytes == 3 * 4 * n_params**2
    assert not plan.fit.fits
    assert plan.fit.seconds is None
    for name in ("'diag'", "'kron'", "'blockdiag'"):
        assert (name in plan.fit.instead[0]) == (name in fits), name
    assert "no" in str(plan).split()


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_tried_with_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "of_device", lambda device: Memory(2**21, "a test"))
    rows: list[int] = []
    x, y = torch.randn(2**14, 6, dtype=torch.float32), torch.arange(2**14) % 4
    la = approximation("all", "diag", 64)
    hook = la._network.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    la.plan((x, y), tune=False)  # the model itself runs on the batch, to find out what it returns
    hook.remove()
    plan = la.plan((x, y), tune=False)
    assert sorted(rows)[-2] <= 2**10
    assert not plan.fit.fits
    assert plan.fit.bytes is not None
    assert plan.fit.bytes > 2**21
    assert any("'stochastic': True" in text for text in plan.fit.instead)
    assert any(text.startswith("batches of ") for text in plan.fit.instead)
    assert any("last_layer" in text for text in plan.fit.instead)


def test_fit_refuses_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    la = approximation(structure="full")
    monkeypatch.setattr("laplace.linalg.memory_of", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match=r"'full' for 68 weights takes about 55.5 kB; 1 kB are free.*la\.plan"):
        la.fit(LOADER)


def test_it_prints_as_a_table_and_has_plain_values() -> None:
    plan = approximation("all", "diag").plan(LOADER, tune=False)
    assert isinstance(plan, Plan)
    lines = str(plan).splitlines()
    assert "5 batches of 24 rows" in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == ["fit", "predict", "tune"]
    told = plan.to_dict()
    assert told["fit"]["forward_passes"] == plan.fit.forward_passes
    assert told["n_rows"] == len(X)
