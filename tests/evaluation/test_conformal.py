"""Sets and intervals against their definitions in plain Python, and their coverage over many draws of the data."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace import Laplace
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation import conformal
from laplace.likelihoods import CategoricalLikelihood, GaussianLikelihood

SETS, INTERVALS = ["lac", "aps", "raps"], ["scaled", "cqr", "absolute"]


class Table:
    """An estimator whose inputs are the probabilities that it predicts."""

    likelihood_ = CategoricalLikelihood()
    model = nn.Identity()
    dict_key_x, dict_key_y = "input_ids", "labels"
    prior_precision = sigma_noise = temperature = output_temperature = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x


class Moments(Table):
    """An estimator whose inputs are the mean and the variance that it predicts."""

    likelihood_ = GaussianLikelihood()
    sigma_noise = torch.tensor(0.05)

    def __call__(self, x: Tensor, diagonal_output: bool) -> tuple[Tensor, Tensor]:
        assert diagonal_output
        return x[:, :1], x[:, 1:]


def random_rows(n_rows: int, n_classes: int = 6, sharpness: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities, and labels that follow other ones: the predictor is wrong."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_rows, n_classes, generator=generator)
    y = torch.multinomial((1.5 * logits).softmax(-1), 1, generator=generator).squeeze(-1)
    other = torch.randn(n_rows, n_classes, generator=generator)
    return (sharpness * (logits + 0.5 * other)).softmax(-1), y


def regression(n_outputs: int = 1, sigma_noise: float = 0.3) -> Any:
    """Fitted on inputs near zero, so that variances grow away from it."""
    model = nn.Linear(2, n_outputs)
    la = Laplace(model, "regression", "last_layer", "full", sigma_noise=sigma_noise)
    la.fit([(0.5 * torch.randn(20, 2), torch.randn(20, n_outputs))])
    return la


def targets(la: Any, x: Tensor) -> Tensor:
    """Noise that the likelihood does not expect: far from Gaussian, larger where inputs are."""
    noise = torch.distributions.StudentT(3.0).sample((len(x), la.n_outputs))
    return la.model(x).detach() + (0.2 + x.norm(dim=-1, keepdim=True)) * noise


# -- by hand ----------------------------------------------------------------------------------------------------------

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.6, 0.1, 0.3], [0.25, 0.35, 0.4]])
LABELS = torch.tensor([0, 1, 0, 2])
NEW = torch.tensor([[0.9, 0.06, 0.04], [0.45, 0.41, 0.14], [0.34, 0.33, 0.33]])


def test_lac_by_hand() -> None:
    # Scores 0.3, 0.6, 0.4, 0.6; at level 0.6 the rank is ⌈5 · 0.6⌉ = 3, the threshold 0.6: classes of at least 0.4.
    found = conformal(Table(), [(PROBS, LABELS)], level=0.6)
    assert (found.method, found.n_rows, float(found.threshold)) == ("lac", 4, pytest.approx(0.6))
    assert found(NEW).tolist() == [[True, False, False], [True, True, False], [False, False, False]]


def test_aps_by_hand() -> None:
    # Mass before the target 0, 0.5, 0, 0; at level 0.8 the rank is 4, the threshold 0.5.
    found = conformal(Table(), [(PROBS, LABELS)], level=0.8, method="aps")
    assert float(found.threshold) == 0.5
    assert found(NEW).tolist() == [[True, False, False], [True, True, False], [True, True, False]]


def test_the_rank_is_that_of_the_decimal_level() -> None:
    """0.1 · 3 is a little more than 0.3 in floating point: a rank too many would leave no threshold here."""
    probs, y = random_rows(999)
    scores = (1 - probs.gather(1, y[:, None])).squeeze(1).sort().values
    for level, rank in [(0.07, 70), (0.14, 140), (0.28, 280), (0.55, 550), (0.56, 560), (0.999, 999)]:
        assert float(conformal(Table(), [(probs, y)], level=level).threshold) == float(scores[rank - 1])


@pytest.mark.parametrize("method", ["aps", "raps"])
def test_sets_are_those_of_the_definition(method: str) -> None:
    probs, y = random_rows(200)
    found = conformal(Table(), [(probs[:120], y[:120]), (probs[120:], y[120:])], level=0.8, method=method)

    def score(row: Tensor, label: int) -> float:
        order = sorted(range(len(row)), key=lambda c: -float(row[c]))
        rank = order.index(label) + 1
        return float(row[order[: rank - 1]].sum()) + found.penalty * max(0, rank - found.n_free)

    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)) if method == "raps" else torch.arange(200)
    kept = order[40:] if method == "raps" else order
    scores = sorted(score(row, int(label)) for row, label in zip(probs[kept], y[kept], strict=True))
    assert float(found.threshold) == pytest.approx(scores[math.ceil((len(kept) + 1) * 0.8) - 1], abs=1e-12)
    fresh, _ = random_rows(50, seed=1)
    expected = [[score(row, label) <= float(found.threshold) + 1e-12 for label in range(6)] for row in fresh]
    assert found(fresh).tolist() == expected
    assert found(fresh).sum() > 50, "sets of one class are no test of the order"


def test_the_numbers_of_raps_are_those_of_least_sets() -> None:
    probs, y = random_rows(500, n_classes=40, sharpness=1.0)
    found = conformal(Table(), [(probs, y)], method="raps")
    assert found.n_rows == 400
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:100]
    ranks, sizes = [], {}
    for row, label in zip(probs[order], y[order], strict=True):
        ranks.append(1 + int((row > row[label]).sum()))
    assert found.n_free == sorted(ranks)[math.ceil(101 * 0.9) - 1]
    for penalty in (0.001, 0.01, 0.1, 0.2, 0.5):
        above = (probs[order][:, None, :] > probs[order][:, :, None]).double()
        scores = above @ probs[order].unsqueeze(-1)
        scores = scores.squeeze(-1) + penalty * (above.sum(-1) + 1 - found.n_free).clamp(min=0)
        q = scores[torch.arange(100), y[order]].sort().values[math.ceil(101 * 0.9) - 1]
        sizes[penalty] = int((scores <= q + 1e-12).sum())
    assert found.penalty == min(sizes, key=lambda penalty: sizes[penalty])


def test_raps_has_no_long_tail() -> None:
    probs, y = random_rows(2000, n_classes=40, sharpness=1.0)
    fresh, _ = random_rows(500, n_classes=40, sharpness=1.0, seed=1)
    widest = {method: int(conformal(Table(), [(probs, y)], method=method)(fresh).sum(-1).max()) for method in SETS}
    assert widest["raps"] < widest["aps"]


def test_intervals_are_those_of_the_definition() -> None:
    la = regression(n_outputs=2)
    la.sigma_noise = torch.tensor([0.3, 0.8])
    x, fresh = torch.randn(60, 2), torch.randn(7, 2)
    y = targets(la, x)

    def moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, cov = la(inputs)
        return mean, (cov.diagonal(dim1=1, dim2=2) + torch.tensor([0.09, 0.64])).sqrt()

    mean, sigma = moments(x)
    center, spread = moments(fresh)
    z = NormalDist().inv_cdf(0.9)
    rank = math.ceil(61 * 0.8) - 1
    residual = (y - mean).abs()
    expected = {
        "scaled": (residual / sigma).sort(0).values[rank] * spread,
        "absolute": residual.sort(0).values[rank].expand(7, 2),
        "cqr": (residual - z * sigma).sort(0).values[rank] + z * spread,
    }
    for method, half in expected.items():
        lower, upper = conformal(la, [(x, y)], 0.8, method)(fresh)
        torch.testing.assert_close(lower, center - half)
        torch.testing.assert_close(upper, center + half)


def test_scaled_intervals_are_narrow_where_the_posterior_is_sure() -> None:
    la = regression()
    x = torch.randn(100, 2)
    y = targets(la, x)
    inputs = torch.tensor([[0.0, 0.0], [30.0, 30.0]])
    width = {}
    for method in INTERVALS:
        lower, upper = conformal(la, [(x, y)], method=method)(inputs)
        width[method] = (upper - lower).squeeze(-1).tolist()
    assert width["scaled"][0] < width["scaled"][1] / 3
    assert width["cqr"][0] < width["cqr"][1] - 1
    assert width["absolute"][0] == pytest.approx(width["absolute"][1])


def test_intervals_of_cqr_have_no_negative_width() -> None:
    la = regression(sigma_noise=5.0)  # far too wide, so that the threshold is negative
    x = 3 * torch.randn(50, 2)
    found = conformal(la, [(x, la.model(x).detach() + 12 * (x.norm(dim=-1, keepdim=True) > 6))], 0.5, "cqr")
    lower, upper = found(torch.zeros(1, 2))
    assert float(found.threshold) < 0
    assert bool((upper >= lower).all())


# -- coverage ---------------------------------------------------------------------------------------------------------

N_CALIBRATION, N_NEW, N_DRAWS = 20, 50, 300
EXACT = math.ceil(21 * 0.9) / 21
"""Coverage where no scores are equal; the quantile without its correction would have 18 / 21."""
ERROR = 4 * math.sqrt((EXACT * (1 - EXACT) / (N_CALIBRATION + 2) + 0.09 / N_NEW) / N_DRAWS)
"""Four standard errors of the mean over draws: thresholds vary as a beta distribution, counts as a binomial one."""


@pytest.mark.parametrize("method", INTERVALS)
def test_intervals_cover_at_their_level(method: str) -> None:
    la = regression(sigma_noise=0.05)
    x = torch.randn(N_DRAWS * (N_CALIBRATION + N_NEW), 2)
    rows = torch.cat(la(x, diagonal_output=True), -1)
    covered, n = 0, N_CALIBRATION
    for m, y in zip(rows.chunk(N_DRAWS), targets(la, x).chunk(N_DRAWS), strict=True):
        lower, upper = conformal(Moments(), [(m[:n], y[:n])], method=method)(m[n:])
        covered += int(((lower <= y[n:]) & (y[n:] <= upper)).sum())
    assert covered / (N_DRAWS * N_NEW) == pytest.approx(EXACT, abs=ERROR)


@pytest.mark.parametrize("method", SETS)
def test_sets_cover_at_their_level(method: str) -> None:
    n = N_CALIBRATION * 5 // 4 if method == "raps" else N_CALIBRATION  # of which raps leaves as many for the threshold
    covered = 0
    for seed in range(N_DRAWS):
        probs, y = random_rows(n + N_NEW, seed=seed)
        sets = conformal(Table(), [(probs[:n], y[:n])], method=method)(probs[n:])
        covered += int(sets[torch.arange(N_NEW), y[n:]].sum())
    assert covered / (N_DRAWS * N_NEW) == pytest.approx(EXACT, abs=ERROR)


@pytest.mark.parametrize("method", SETS)
def test_classes_of_probability_zero_are_covered(method: str) -> None:
    """One label in five belongs to a class that the network holds impossible."""
    torch.manual_seed(1)
    y = torch.arange(1000) % 5
    top = torch.where(torch.rand(1000) < 0.2, (y + 1) % 5, y)
    probs = nn.functional.one_hot(top, 5).double()
    sets = conformal(Table(), [(probs[:500], y[:500])], method=method)(probs[500:])
    assert float(sets[torch.arange(500), y[500:]].double().mean()) >= 0.9


# -- estimators -------------------------------------------------------------------------------------------------------

ESTIMATORS = [
    {"subset_of_weights": "last_layer", "hessian_structure": "kron"},
    {"subset_of_weights": "all", "hessian_structure": "diag"},
    {"subset_of_weights": "all", "hessian_structure": "gp", "n_subset": 10},
]


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_every_estimator_has_intervals(options: dict[str, Any], n_outputs: int) -> None:
    la = Laplace(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, n_outputs)), "regression", **options)
    x, y = torch.randn(30, 2), torch.randn(30, n_outputs)
    la.fit([(x, y)])
    lower, upper = conformal(la, [(x, y)])(x[:5])
    assert lower.shape == upper.shape == (5, n_outputs)
    assert bool((lower < upper).all())


@pytest.mark.parametrize("options", ESTIMATORS, ids=str)
@pytest.mark.parametrize(("likelihood", "n_outputs", "n_classes"), [("classification", 3, 3), ("binary", 1, 2)])
def test_every_estimator_has_sets(options: dict[str, Any], likelihood: str, n_outputs: int, n_classes: int) -> None:
    la = Laplace(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, n_outputs)), likelihood, **options)
    x, y = torch.randn(30, 2), torch.arange(30) % n_classes
    la.fit([(x, y)])
    for method in SETS:
        assert conformal(la, [(x, y)], method=method)(x[:5]).shape == (5, n_classes)
    probs = la(x) if n_outputs > 1 else torch.cat([1 - la(x), la(x)], -1)
    expected = conformal(Table(), [(probs, y)])(probs)
    assert torch.equal(conformal(la, [(x, y)])(x), expected)


def test_options_are_those_of_predictions() -> None:
    la = Laplace(nn.Linear(2, 3), "classification", "last_layer", "full")
    x, y = torch.randn(30, 2), torch.arange(30) % 3
    la.fit([(x, y)])
    found = conformal(la, [(x, y)], link_approx="bridge")
    assert float(found.threshold) == float(conformal(Table(), [(la(x, link_approx="bridge"), y)]).threshold)
    assert torch.equal(found(x), 1 - la(x, link_approx="bridge") <= found.threshold)
    assert float(found.threshold) != float(conformal(la, [(x, y)]).threshold)


def test_a_hyperparameter_that_changes_ends_the_guarantee() -> None:
    la = regression()
    x = torch.randn(20, 2)
    found = conformal(la, [(x, targets(la, x))])
    found(x)
    la.prior_precision = 3.0
    with pytest.raises(InputError, match="prior_precision of the estimator is no longer"):
        found(x)


# -- MAPIE ------------------------------------------------------------------------------------------------------------


def test_lac_is_that_of_mapie() -> None:
    mapie = pytest.importorskip("mapie.classification")
    base = pytest.importorskip("sklearn.base")

    class Same(base.ClassifierMixin, base.BaseEstimator):
        classes_ = torch.arange(6).numpy()

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return x

        def predict(self, x):
            return x.argmax(1)

    probs, y = random_rows(150)
    fresh, _ = random_rows(100, seed=1)
    theirs = mapie.SplitConformalClassifier(Same(), confidence_level=0.85, conformity_score="lac")
    theirs.conformalize(probs.numpy(), y.numpy())
    ours = conformal(Table(), [(probs, y)], level=0.85)(fresh)
    assert ours.tolist() == theirs.predict_set(fresh.numpy())[1][..., 0].tolist()


def test_absolute_intervals_are_those_of_mapie() -> None:
    mapie = pytest.importorskip("mapie.regression")
    base = pytest.importorskip("sklearn.base")
    la = regression()

    class Means(base.RegressorMixin, base.BaseEstimator):
        fitted_ = True

        def fit(self, x, y):
            return self

        def predict(self, x):
            return la(torch.as_tensor(x))[0].squeeze(-1).numpy()

    x, fresh = torch.randn(99, 2), torch.randn(10, 2)
    y = targets(la, x)
    theirs = mapie.SplitConformalRegressor(Means(), confidence_level=0.9, conformity_score="absolute", prefit=True)
    theirs.conformalize(x.numpy(), y.squeeze(-1).numpy())
    expected = torch.as_tensor(theirs.predict_interval(fresh.numpy())[1][..., 0])
    torch.testing.assert_close(torch.cat(conformal(la, [(x, y)], method="absolute")(fresh), -1), expected)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "method", "needed"),
    [(0.9, "lac", 9), (0.9, "aps", 9), (0.95, "lac", 19), (0.9, "raps", 11), (0.3, "raps", 5)],
)
def test_too_few_rows_are_counted(level: float, method: str, needed: int) -> None:
    probs, y = random_rows(needed)
    with pytest.raises(InputError, match=rf"at least {needed} calibration rows, and the loader has {needed - 1}\b"):
        conformal(Table(), [(probs[1:], y[1:])], level, method)
    assert math.isfinite(conformal(Table(), [(probs, y)], level, method).threshold)


def test_wrong_calls_are_explained() -> None:
    probs, y = random_rows(30)
    rows = [(probs, y)]
    for level in (0, 1, 1.5, -0.1, math.nan, "high"):
        with pytest.raises(InputError, match="level must be"):
            conformal(Table(), rows, level)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="method must be one of 'lac', 'aps', 'raps' for classification"):
        conformal(Table(), rows, method="scaled")
    with pytest.raises(InputError, match="empty"):
        conformal(Table(), [])
    with pytest.raises(InputError, match="must be a loader"):
        conformal(Table(), probs)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="la must be a fitted estimator"):
        conformal(nn.Linear(2, 2), rows)
    with pytest.raises(UnsupportedError, match="leave out joint="):
        conformal(Table(), rows, joint=True)
    with pytest.raises(UnsupportedError, match="Positions of one input"):
        conformal(Table(), [(probs.reshape(10, 3, 6), y.reshape(10, 3))])
    with pytest.raises(InputError, match="masked"):
        conformal(Table(), [(probs, torch.where(y == 0, -100, y))])
    with pytest.raises(InputError, match="soft labels"):
        conformal(Table(), [(probs, probs)])
    with pytest.raises(ShapeError, match="Class indices"):
        conformal(Table(), [(probs, y[:3])])
    with pytest.raises(UnsupportedError, match="leave out diagonal_output="):
        conformal(regression(), [(torch.randn(30, 2), torch.randn(30, 1))], diagonal_output=True)
    with pytest.raises(UnsupportedError, match="'scaled', 'cqr', 'absolute' for regression"):
        conformal(regression(), [(torch.randn(30, 2), torch.randn(30, 1))], method="lac")


@pytest.mark.parametrize(
    "likelihood", ["poisson", "negative_binomial", "reward_modeling", "multilabel", "heteroscedastic_regression"]
)
def test_other_likelihoods_are_refused_by_name(likelihood: str) -> None:
    la = Laplace(nn.Linear(2, 2), likelihood)
    says = "several right labels" if likelihood == "multilabel" else "neither class probabilities"
    with pytest.raises(UnsupportedError, match=f"{likelihood}.*{says}"):
        conformal(la, [(torch.randn(30, 2), torch.ones(30, 1))])


def test_labels_that_are_all_or_nothing_are_classes() -> None:
    probs, y = random_rows(30)
    one_hot = nn.functional.one_hot(y, 6).double()
    assert float(conformal(Table(), [(probs, one_hot)]).threshold) == float(conformal(Table(), [(probs, y)]).threshold)
