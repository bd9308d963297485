"""The density of features, compared with distributions of PyTorch made by the definition."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_wine
from torch.testing import assert_close

from laplace.density import FeatureDensity
from laplace.density import density as density_module
from laplace.density import sums as sums_module
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests.density.brute_force import covariance_of, mixture, oas, pooled, rows_of, squared_distance
from tests.density.test_sums import accumulated
from tests.tools import LargestTensor

C, D = 4, 5
NEW = torch.Generator().manual_seed(1)


def new_rows(n=12, width=D):
    return 5 + 6 * torch.randn(n, width, generator=NEW.manual_seed(1))


def density(phi, y, n_classes=C, **options):
    return FeatureDensity(accumulated(phi, y, n_classes=n_classes, **options))


@pytest.fixture
def tied(monkeypatch):
    monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)


@pytest.mark.parametrize(("n", "n_features"), [(60, 5), (60, 1), (60, 2), (24, 5), (400, 3)])
def test_g_is_the_log_density_of_a_mixture(n, n_features):
    phi, y = rows_of(C, n_features, n)
    x = new_rows(width=n_features)
    found = density(phi, y)
    assert_close(found.g(x), -mixture(phi, y).log_prob(x))
    assert found.notes == ()


def test_g_of_the_tied_form(tied):
    phi, y = rows_of(C, D, 60)
    found = density(phi, y)
    assert_close(found.g(new_rows()), -mixture(phi, y, tied=True).log_prob(new_rows()))
    assert len(found.notes) == 1
    assert found.notes[0].startswith("All 4 classes share one covariance")


def test_both_forms_agree_where_classes_have_the_same_covariance(monkeypatch):
    phi = torch.randn(2000, 2) * torch.tensor([1.0, 2.0])
    phi, y = torch.cat([phi, phi + 3]), torch.arange(2).repeat_interleave(2000)
    of_classes = density(phi, y, 2).g(new_rows(width=2))
    monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    assert_close(of_classes, density(phi, y, 2).g(new_rows(width=2)), rtol=0.02, atol=0)


def test_classes_with_one_row_or_none():
    phi, y = rows_of(C, D, 60)
    y[y == 1] = 0
    y[(y == 2).nonzero().flatten()[1:]] = 3
    found = density(phi, y)
    assert found.present.tolist() == [0, 2, 3]
    assert_close(found.g(new_rows()), -mixture(phi, y).log_prob(new_rows()))
    assert_close(found.factors[1].lower @ found.factors[1].lower.mT, pooled(phi, y))
    assert found.notes == (
        "The density leaves classes out that have no rows: 1.",
        "Classes with one row have the covariance that all share: 2.",
    )


def test_a_density_does_not_depend_on_how_its_sums_came_about():
    phi, y = rows_of(C, D, 90)
    parts = [accumulated(phi[i::3], y[i::3]) for i in range(3)]
    merged = FeatureDensity(parts[2].merge(parts[0]).merge(parts[1]).subtract(parts[1]))
    kept = torch.arange(90) % 3 != 1
    assert_close(merged.g(new_rows()), density(phi[kept], y[kept]).g(new_rows()))


def test_rows_of_soft_labels_count_by_their_shares():
    phi, y = rows_of(2, D, 40)
    weights = torch.full((40, 2), 0.25)
    weights[torch.arange(40), y] = 0.75
    # Three copies of each row in its class and one in the other are four times these weights.
    copies, labels = phi.repeat(4, 1), torch.cat([y, y, y, 1 - y])
    soft, hard = accumulated(phi, weights, n_classes=2), accumulated(copies, labels, n_classes=2)
    assert_close(4 * soft.moments, hard.moments)
    assert_close(FeatureDensity(soft).means, FeatureDensity(hard).means)
    assert_close(FeatureDensity(soft).log_shares, FeatureDensity(hard).log_shares)
    assert_close(FeatureDensity(soft).g(new_rows()), FeatureDensity(hard).g(new_rows()), rtol=0.3, atol=0)


def test_a_class_of_less_than_one_row_has_the_shared_covariance():
    phi, y = rows_of(2, D, 40)
    weights = torch.tensor([0.99, 0.01])[torch.stack([y * 0, y * 0 + 1], 1)]
    found = density(phi, weights, 2)
    assert found.sums.counts[1] < 1
    shared = found.shared_covariance
    assert_close(found.factors[1].lower @ found.factors[1].lower.mT, shared)
    assert torch.isfinite(found.g(new_rows())).all()


def test_the_relative_score(monkeypatch):
    phi, y = rows_of(C, D, 60)
    shared, everything = pooled(phi, y), torch.from_numpy(torch.cov(phi.T).numpy())
    expected = [
        min(squared_distance(x, phi[y == c].mean(0), shared) for c in range(C))
        - squared_distance(x, phi.mean(0), everything)
        for x in new_rows()
    ]
    assert_close(density(phi, y).relative(new_rows()), torch.tensor(expected))
    monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    assert_close(density(phi, y).relative(new_rows()), torch.tensor(expected))
    assert density(phi, y).relative_notes == ()


def test_the_distance_of_regression():
    phi, y = rows_of(1, D, 60)
    S = covariance_of(0, phi, y)
    expected = [squared_distance(x, phi.mean(0), S) ** 0.5 for x in new_rows()]
    assert_close(density(phi, None, 1).distance(new_rows()), torch.tensor(expected))


def test_normalized_features():
    phi, y = rows_of(C, D, 60)
    found = density(phi, y, normalize_features=True)
    unit = phi / phi.square().sum(1, keepdim=True).sqrt()
    x = new_rows()
    assert_close(found.g(x), -mixture(unit, y).log_prob(x / x.square().sum(1, keepdim=True).sqrt()))
    assert_close(found.g(x), found.g(7 * x))


# -- singular covariances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
@pytest.mark.parametrize("form", ["class form", "tied form"])
def test_a_constant_feature_is_finite_far_away(form, value, monkeypatch):
    if form == "tied form":
        monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    phi, y = rows_of(C, D, 200)
    phi[:, 2] = value
    found, x = density(phi, y), phi[:4].clone()
    near = found.g(x)
    x[1, 2] += 1e9
    x[2, 2] += 1e-3
    far = found.g(x)
    assert torch.isfinite(far).all()
    assert far[1] > 1e15
    assert_close(far[2], near[2], atol=1.0, rtol=0)  # a little beside what was constant is not foreign
    assert torch.isfinite(found.relative(x)).all()
    assert torch.isfinite(found.distance(x)).all()
    assert any("had no inverse" in note for note in found.notes) == (form == "tied form")
    assert any("covariance that classes share had no inverse" in note for note in found.relative_notes)


def test_a_shared_singular_covariance_is_shrunk_by_its_own_weight(tied):
    phi, y = rows_of(C, D, 60)
    phi[:, 2] = 0.0
    found = density(phi, y)
    factor = found.shared_factor
    assert_close(factor.lower @ factor.lower.mT, oas(pooled(phi, y), 60 - C))
    assert found.notes[1].startswith("1 of 1 class covariances had no inverse")


@pytest.mark.parametrize("form", ["class form", "tied form"])
@pytest.mark.parametrize("n", [8, 20])
def test_fewer_rows_than_features(form, n, monkeypatch):
    if form == "tied form":
        monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    phi, y = rows_of(C, 30, n)
    found = density(phi, y)
    near, far = found.g(phi), found.g(phi + 100)
    assert torch.isfinite(near).all()
    assert torch.isfinite(far).all()
    assert far.min() > near.max() + 10


def test_equal_features_and_a_class_of_equal_rows():
    phi, y = rows_of(C, D, 60)
    phi[:, 1] = phi[:, 0]
    phi[y == 2] = phi[y == 2][0]
    found = density(phi, y)
    assert torch.isfinite(found.g(new_rows())).all()
    assert found.g(phi[y == 2]).amax() < found.g(new_rows()).amin()


def test_large_means_lose_nothing():
    phi, y = rows_of(C, D, 60)
    assert_close(density(phi + 1e4, y).g(new_rows() + 1e4), density(phi, y).g(new_rows()), rtol=1e-4, atol=0)


def test_features_of_the_wine_data():
    wine = load_wine()
    phi, y = torch.from_numpy(wine.data), torch.from_numpy(wine.target)
    train = torch.arange(len(y)) % 2 == 0
    found = density(phi[train], y[train], 3)
    assert_close(found.g(phi[~train]), -mixture(phi[train], y[train]).log_prob(phi[~train]), rtol=1e-6, atol=0)


# -- how it is called -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["g", "relative", "distance"])
@pytest.mark.parametrize("form", ["class form", "tied form"])
def test_scores_keep_the_axes_of_rows_and_take_any_precision(score, form, monkeypatch):
    if form == "tied form":
        monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    function = getattr(density(*rows_of(C, D, 60)), score)
    x = new_rows()
    assert_close(function(x.view(3, 4, D)), function(x).view(3, 4))
    assert function(x[:0]).shape == (0,)
    narrow = function(x.float())
    assert narrow.dtype == torch.float64
    assert_close(narrow, function(x.float().double()), rtol=0, atol=0)
    monkeypatch.setattr(density_module, "piece_elements", lambda device: 1)
    monkeypatch.setattr(density_module, "ROWS_AT_A_TIME", 5)
    assert_close(function(x), torch.cat([function(row.unsqueeze(0)) for row in x]))
    with pytest.raises(ShapeError, match=r"Expected 5 features .* got the shape \[2, 4\]"):
        function(torch.ones(2, 4))


@pytest.mark.parametrize("score", ["g", "relative", "distance"])
def test_scores_are_differentiable_also_after_inference_mode(score):
    found, x = density(*rows_of(C, D, 60)), new_rows(3).requires_grad_()
    with torch.inference_mode():
        getattr(found, score)(x)
    assert torch.autograd.gradcheck(getattr(found, score), (x,))


@pytest.mark.parametrize("form", ["class form", "tied form"])
def test_memory_of_scores_is_bounded(form, monkeypatch):
    if form == "tied form":
        monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    n_classes, width, n = 40, 30, 1500
    found = density(*rows_of(n_classes, width, 400), n_classes)
    x = new_rows(n, width)
    expected = found.g(x[:3]), found.relative(x[:3])  # factors are there from now on
    monkeypatch.setattr(density_module, "piece_elements", lambda device: 256 * n_classes)
    with LargestTensor() as largest:
        scores = found.g(x), found.relative(x)
    assert_close(tuple(score[:3] for score in scores), expected)
    assert largest.numel <= n * width, largest.operation  # the features themselves: not [rows, C] or [rows, C, D]


def test_moments_of_many_classes_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(sums_module, "MAX_MOMENTS", 1)
    n_classes, width = 300, 20
    phi, y = rows_of(n_classes, width, 900)
    with LargestTensor() as largest:
        density(phi.clone(), y, n_classes).g(phi[:100])
    assert largest.numel <= 100 * n_classes < n_classes * width**2, largest.operation


# -- what has no density --------------------------------------------------------------------------------------------------


def test_what_has_no_density_is_refused():
    with pytest.raises(UnsupportedError, match=r"two rows or more; got 4 rows in 4 classes"):
        density(torch.randn(4, D), torch.arange(4))
    with pytest.raises(UnsupportedError, match="constant within every class"):
        density(torch.ones(12, D) * torch.arange(12).unsqueeze(1).remainder(4), torch.arange(12) % 4)
    with pytest.raises(UnsupportedError, match="constant within every class"):
        density(torch.zeros(12, D), torch.arange(12) % 4)
    for bad in (torch.nan, torch.inf, 1e200):
        phi, y = rows_of(C, D, 20)
        phi[3, 1] = bad
        with pytest.raises(InputError, match="Features must be finite"):
            density(phi, y)
