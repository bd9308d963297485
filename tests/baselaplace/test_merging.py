"""`merge` and `subtract`: parts add up to the whole and come off again, and nothing is counted twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF, AutogradHessian
from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from laplace.structures import Kron
from tests.cases import ADDITIVE, BASIC, named
from tests.estimators import additive_structures, estimator
from tests.kinds import KINDS, data, dense, make, network
from tests.tools import assert_close

EXACT = [kind for kind in KINDS if kind[1] not in ("ekfac", "lowrank")]
exact_kinds = pytest.mark.parametrize(("subset", "structure"), EXACT)
both_likelihoods = pytest.mark.parametrize("likelihood", ["regression", "classification"])
BINARY: dict[str, Any] = {"likelihood": "classification"}
ROWS = slice(0, 7), slice(7, 12), slice(12, 20)


def of(rows: slice, *kind: str, model: nn.Module | None = None, **options: Any) -> Any:
    """Fitted to some rows."""
    la = make(*kind, model, **options)
    x, y = data(la.likelihood.value)
    la.fit([(x[rows], y[rows])])
    return la


def assert_same(la: Any, other: Any) -> None:
    assert_close(dense(la.posterior_precision), dense(other.posterior_precision), "posterior precision")
    assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood(), "evidence")
    assert (la.n_data, la._fit.n_positions) == (other.n_data, other._fit.n_positions)
    for name in ("nll", "output_nll", "mean"):
        here, there = getattr(la._fit, name), getattr(other._fit, name)
        assert (here is None) == (there is None)
        if here is not None:
            assert_close(here, there, name)
    assert (la._fit.density is None) == (other._fit.density is None)
    if la._fit.density is not None:
        for here, there in zip(la._fit.density._tensors, other._fit.density._tensors, strict=True):
            assert_close(here, there, "density")


@both_likelihoods
@exact_kinds
def test_parts_merged_are_the_whole_and_subtracted_the_rest(subset, structure, likelihood):
    first, second, third = (of(rows, subset, structure, likelihood=likelihood) for rows in ROWS)
    first.log_marginal_likelihood()  # whatever is cached must be dropped
    assert first.merge(second) is first
    first.merge(third)
    assert_same(first, of(slice(0, 20), subset, structure, likelihood=likelihood))
    assert_same(second, of(ROWS[1], subset, structure, likelihood=likelihood))
    assert first.subtract(third) is first
    assert_same(first, of(slice(0, 12), subset, structure, likelihood=likelihood))
    first.subtract(of(slice(0, 7), subset, structure, likelihood=likelihood))
    assert_same(first, second)


@pytest.mark.parametrize("structure", [structure for structure in ADDITIVE if structure != "lowrank"])
@pytest.mark.parametrize("case", [*BASIC, named("masked_positions"), named("soft_labels")], ids=str)
def test_masked_positions_and_soft_labels(case, structure):
    whole, (first, *rest) = estimator(case, structure), case.batches(3, 1)
    whole.fit([first, *rest])
    one, other = estimator(case, structure), estimator(case, structure)
    one.fit([first])
    other.fit(rest)
    assert_same(one.merge(other), whole)
    assert_same(whole.subtract(one.subtract(other)), other)


def test_float32_sums_that_are_left_are_a_posterior():
    """What is left of few rows of many is rounding in directions that they do not span."""
    model = network().float()
    x, y = (part.float() for part in data())
    for structure, precision in (("kron", 1e-4), ("full", 1.0), ("diag", 1e-4)):
        whole, most = (make("last_layer", structure, model, prior_precision=precision) for _ in range(2))
        batches = [(x[:19] + i, y[:19]) for i in range(40)]
        whole.fit([*batches, (x[19:], y[19:])])
        most.fit(list(reversed(batches)))
        whole.subtract(most)
        assert (whole.n_data, bool(torch.isfinite(whole.log_marginal_likelihood()))) == (1, True)
        whole.load_state_dict(whole.state_dict())
        assert bool((whole.functional_variance_fast(x)[1] > 0).all())


def test_a_loaded_object_merges_and_tunes_on_the_features_of_both():
    first, second = (of(rows, "last_layer", "kron", **BINARY) for rows in ROWS[:2])
    x, y = data("classification")
    both = of(slice(0, 12), "last_layer", "kron", **BINARY)
    first.merge(second)
    assert torch.equal(first._kept.phi, both._kept.phi)
    assert torch.equal(first._kept.datum, both._kept.datum)
    first.tune([(x[12:], y[12:])])
    both.tune([(x[12:], y[12:])])
    assert_close(first.mean, both.mean, "head")
    third, loaded = of(ROWS[2], "last_layer", "kron", **BINARY), make("last_layer", "kron", **BINARY)
    loaded.load_state_dict(third.state_dict())
    total = of(slice(0, 12), "last_layer", "kron", **BINARY).merge(loaded)
    assert_same(total, of(slice(0, 20), "last_layer", "kron", **BINARY))
    assert total._kept is None
    with pytest.warns(UserWarning, match="keeps the head of the model"):
        total.tune([(x, y)])


def test_rows_kept_are_gone_with_those_that_were_removed():
    la = of(slice(0, 20), "last_layer", "kron", **BINARY)
    la.subtract(of(ROWS[0], "last_layer", "kron", **BINARY))
    with pytest.warns(UserWarning, match=r"subtract\(\) removed some of their rows"):
        la.tune([data("classification")])


@additive_structures
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_a_fit_saved_midway_goes_on_elsewhere(case, structure, tmp_path):
    first, *rest = case.batches(3, 1)
    la, fresh, whole = (estimator(case, structure) for _ in range(3))
    la.fit([first])
    la.save(tmp_path / "midway")
    fresh.load(tmp_path / "midway")
    fresh.fit(rest, override=False)
    whole.fit([first, *rest])
    assert_same(fresh, whole)


def test_several_heads():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

        def forward(self, x):
            z = self.body(x).tanh()
            return {"a": self.a(z), "b": self.b(z)}

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = {"a": (x[:, 0] > 0).long(), "b": x[:, :1]}
    for subset in ("last_layer", "all"):
        parts = []
        for rows in (slice(0, 5), slice(5, 12), slice(0, 12)):
            la = Laplace(Two().double(), {"a": "classification", "b": "regression"}, subset, "diag")
            la.fit([(x[rows], {key: target[rows] for key, target in y.items()})])
            parts.append(la)
        first, second, whole = parts
        assert first.merge(second) is first
        assert_close(first.log_marginal_likelihood(), whole.log_marginal_likelihood(), "evidence")
        assert whole.subtract(second) is whole
        with pytest.raises(InputError, match="rows"):
            second.subtract(first)
        with pytest.raises(InputError, match="several heads"):
            second.merge(of(ROWS[0], "all", "diag"))


# -- refusals ---------------------------------------------------------------------------------------------------------


def assert_refuses(la: Any, other: Any, error: type[Exception], words: str, *methods: str) -> None:
    before = la.log_marginal_likelihood().item() if "_fit" in vars(la) else None
    for method in methods or ("merge", "subtract"):
        with pytest.raises(error, match=words):
            getattr(la, method)(other)
    if before is not None:
        assert la.log_marginal_likelihood().item() == before


@pytest.mark.parametrize("structure", ["ekfac", "lowrank"])
def test_structures_without_sums_are_refused(structure):
    la = of(ROWS[0], "last_layer", structure)
    assert_refuses(la, of(ROWS[1], "last_layer", structure), UnsupportedError, f'"{structure}".*"kron"')


@pytest.mark.parametrize(
    "options",
    [{"n_subset": 4}, {"functional_approximation": "nystrom", "subsample_size": 4, "n_eigenvalues": 2}],
    ids=["gp", "ella"],
)
def test_processes_are_refused(options):
    parts = [Laplace(network(), "regression", hessian_structure="gp", **options) for _ in ROWS[:2]]
    for la in parts:
        la.fit([data()])
    assert_refuses(parts[0], parts[1], UnsupportedError, "all data")


def test_other_objects_are_refused():
    kind = ("last_layer", "kron")
    la, b = of(slice(0, 20), *kind), of(ROWS[0], *kind)
    assert_refuses(la, make(*kind), NotFittedError, "fit")
    assert_refuses(make(*kind), la, NotFittedError, "fit")
    assert_refuses(la, of(ROWS[0], "last_layer", "full"), InputError, "KronLLLaplace.*got FullLLLaplace")
    assert_refuses(la, of(ROWS[0], "all", "kron"), InputError, "got KronLaplace")
    assert_refuses(la, 3, InputError, "got int")
    assert_refuses(la, of(ROWS[0], *kind, **BINARY), InputError, "likelihood differ")
    assert_refuses(la, of(ROWS[0], *kind, backend=AutogradEF), UnsupportedError, "GGN.*empirical Fisher")
    assert_refuses(la, la, InputError, "same data", "merge")
    assert_refuses(la, of(slice(0, 20), *kind), InputError, "same data", "merge")
    other = network()
    with torch.no_grad():
        other[0].weight.add_(0.1)
    assert_refuses(la, of(ROWS[0], *kind, model=other), InputError, "weights of the model differ")
    with torch.no_grad():
        other.load_state_dict(network().state_dict())
        other[2].weight.add_(0.1)
        moved = of(ROWS[0], *kind, model=other)
        other.load_state_dict(network().state_dict())  # trained further, or back, since that fit
    assert_refuses(la, moved, InputError, "same weights")
    b.mean = b.mean + 1
    assert_refuses(la, b, UnsupportedError, "by hand")
    assert_refuses(of(ROWS[0], "all", "full", model=network()), of(ROWS[1], "all", "full", sigma_noise=torch.tensor([1.0, 2.0]).double()), InputError, "another noise")  # fmt: skip
    subnetworks = [Laplace(network(), "regression", "subnetwork", "diag", subnetwork_indices=torch.tensor(i)) for i in ([1, 2], [1, 3])]  # fmt: skip
    for each in subnetworks:
        each.fit([data()])
    assert_refuses(*subnetworks, InputError, "subnetwork_indices differ")


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_no_part_counts_twice(structure):
    whole, part = of(slice(0, 12), "all", structure), of(ROWS[2], "all", structure)
    whole.merge(part)
    assert_refuses(whole, part, InputError, "count twice", "merge")
    whole.fit([tuple(rows[:2] for rows in data())], override=False)
    assert_refuses(whole, part, InputError, "count twice", "merge")
    whole.subtract(part).merge(part).subtract(part)
    first = of(ROWS[1], "all", structure)
    whole.subtract(first)
    assert_refuses(whole, first, InputError, "subtracted before", "subtract")
    whole.merge(first)
    assert whole.n_data == 14


def test_what_tune_or_elbo_chose_is_refused():
    la, other = of(ROWS[0], "last_layer", "kron", **BINARY), of(ROWS[1], "last_layer", "kron", **BINARY)
    la.tune([data("classification")])
    assert_refuses(la, other, UnsupportedError, "This object has the head that tune chose")
    assert_refuses(other, la, UnsupportedError, "The other object has the head that tune chose")
    averaged = of(ROWS[2], "last_layer", "kron", **BINARY)
    averaged.optimize_prior_precision(method="elbo", n_steps=2)
    assert_refuses(other, averaged, UnsupportedError, "averaged")


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "blockdiag"])
def test_rows_that_were_never_fitted_are_noticed(structure):
    la = of(slice(0, 12), "last_layer", structure)
    x, y = data()
    far, wrong = make("last_layer", structure), make("last_layer", structure)
    far.fit([(x[:4] * 10, y[:4])])  # larger features
    wrong.fit([(x[:4], y[:4] + 100)])  # larger losses
    assert_refuses(la, far, InputError, "larger", "subtract")
    assert_refuses(la, wrong, InputError, "larger", "subtract")
    assert_refuses(la, of(slice(0, 20), "last_layer", structure), InputError, "12 rows.*20 rows", "subtract")
    assert_refuses(la, of(slice(0, 12), "last_layer", structure), InputError, "some must be left", "subtract")


def test_classes_that_were_never_fitted_are_noticed():
    x, _ = data("classification")
    la, other = (make("last_layer", "diag", likelihood="classification") for _ in range(2))
    la.fit([(x, torch.zeros(20, dtype=torch.long))])
    other.fit([(x[:2], torch.ones(2, dtype=torch.long))])
    assert_refuses(la, other, InputError, "rows of class 1", "subtract")


def test_a_sampled_curvature_adds_and_is_not_subtracted():
    sampled = {"backend_kwargs": {"stochastic": True}, **BINARY}
    la, other = of(slice(0, 12), "last_layer", "diag", **sampled), of(ROWS[2], "last_layer", "diag", **sampled)
    assert_refuses(la, other, UnsupportedError, "sampled", "subtract")
    assert la.merge(other).n_data == 20


def test_a_hessian_may_be_negative():
    """No sum of squares: its parts come off exactly, whatever their sign."""
    options = {"backend": AutogradHessian, "prior_precision": 50.0}
    la, part = of(slice(0, 20), "all", "full", **options), of(ROWS[0], "all", "full", **options)
    rest = of(slice(7, 20), "all", "full", **options)
    assert bool((part.H.diagonal() < 0).any())
    assert_close(la.subtract(part).H, rest.H, "H")


def test_what_cannot_be_left_of_factors_is_named():
    one = Kron([[torch.eye(2), torch.eye(3)]])
    with pytest.raises(InputError, match="larger than what is there"):
        one.without(Kron([[2 * torch.eye(2), torch.eye(3)]]))
    with pytest.raises(ShapeError, match="do not add up"):
        one.without(Kron([[torch.eye(3), torch.eye(3)]]))
