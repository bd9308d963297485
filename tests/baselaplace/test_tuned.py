"""Hyperparameters chosen together, on validation data, for the head that the model has; `test_recipe.py` has the rest."""

import math

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import InputError, ShapeError, UnsupportedError
from tests import networks
from tests.cases import BASIC, CASES, named
from tests.contracts import generator, model_untouched
from tests.estimators import basic_cases, every_structure, fitted
from tests.tools import assert_close

F64 = torch.float64
ALONE = {"refit": False, "distance_aware": False}
"""Hyperparameters and nothing else."""
pytestmark = pytest.mark.filterwarnings(
    "ignore:The validation score is best",
    "ignore:The best .* stays at its limits",
    "ignore:Classes of the validation data",
)


def validation(case, n_rows=60, shift=3):
    x, y = case.data(n_rows=n_rows, shift=shift)
    return (
        [case.batch(x, y)]
        if not isinstance(x, torch.Tensor)
        else [(x[p], y[p]) for p in torch.arange(n_rows).split(17)]
    )


def validation_score(la, case, loader) -> float:
    """Mean negative log predictive density, from the predictions that users get."""
    total, count = 0.0, 0
    for x, y in loader:
        if case.likelihood == "regression":
            mean, cov = la(x)
            noise = torch.diag_embed(la.sigma_noise.square().expand(mean.shape[-1]))
            total -= float(torch.distributions.MultivariateNormal(mean, cov + noise).log_prob(y).sum())
        else:
            options = {"fitting": True} if case.likelihood == "reward_modeling" else {}
            total -= float(la(x, **options)[torch.arange(len(y)), y].log().sum())
        count += len(y)
    return total / count


def map_score(case, model, loader, value=None) -> float:
    """The same of the network alone: at an output temperature, or at a noise."""
    f = torch.cat([case.forward(model, x) for x, _ in loader]).detach()
    y = torch.cat([y for _, y in loader])
    if case.likelihood == "regression":
        return float(-torch.distributions.Normal(f, case.sigma if value is None else value).log_prob(y).sum(-1).mean())
    f = f.reshape(len(y), -1)
    return float(nn.functional.cross_entropy(f / (value or 1.0), y))


@pytest.mark.every(4, each_value=False)
@every_structure
@pytest.mark.parametrize("case", [*BASIC, named("preferences"), named("no_bias_regression")], ids=str)
def test_the_result_is_never_worse_than_the_network_at_its_best_temperature_or_noise(case, structure):
    model = case.model()
    la, loader = fitted(case, structure, model), validation(case)
    with model_untouched(model):
        found = la.tune(loader, **ALONE)
    score = validation_score(la, case, loader)
    assert score == pytest.approx(found.value, abs=1e-6)
    values = torch.logspace(-2, 2, 400, dtype=F64).tolist()
    best = min(map_score(case, model, loader, value) for value in values)
    assert score <= min(map_score(case, model, loader), best) + 1e-6
    assert found.candidates["MAP"] == pytest.approx(map_score(case, model, loader), abs=1e-6)
    assert found is la.tuning_


@pytest.mark.every(3, each_value=False)
@every_structure
@basic_cases
def test_no_point_nearby_is_better(case, structure):
    la, loader = fitted(case, structure), validation(case)
    found = la.tune(loader, **ALONE)
    name = "sigma_noise" if case.likelihood == "regression" else "output_temperature"
    precision, second = float(la.prior_precision), float(getattr(la, name))
    for factor in (0.9, 1.1):
        for first_moves in (True, False):
            la.prior_precision = min(precision * (factor if first_moves else 1), 1e12)
            setattr(la, name, second * (1 if first_moves else factor))
            assert validation_score(la, case, loader) >= found.value - 1e-5


@pytest.mark.every(4, each_value=False)
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "masked_rows"], ids=str)
def test_every_kind_of_data_can_be_tuned_on(case):
    la = fitted(case, "kron")
    x, y = case.data(shift=3)
    found = la.tune([case.batch(x, y)], **ALONE)
    assert math.isfinite(found.value)
    assert found.value <= found.candidates["MAP"] + 1e-9


@pytest.mark.every(3, each_value=False)
@pytest.mark.parametrize("name", ["mlp", "mlp_regression"])
@every_structure
def test_all_weights_are_tuned_by_the_predictions_of_the_linearized_network(name, structure):
    network = networks.named(name)
    la = Laplace(network.model(), network.likelihood, "all", structure)
    x, y = network.data()
    la.fit([(x, y)])
    found = la.tune([(x, y)], **ALONE)
    assert validation_score(la, network, [(x, y)]) == pytest.approx(found.value, abs=1e-6)
    assert found.value <= found.candidates["MAP"] + 1e-9


@pytest.mark.slow
def test_layerwise_precisions_reach_at_least_what_one_reaches():
    for case in BASIC:
        for structure in ("kron", "diag"):
            la, loader = fitted(case, structure), validation(case)
            one, two = la.tune(loader, **ALONE).value, la.tune(loader, prior_structure="layerwise", **ALONE).value
            assert la.prior_precision.shape in ((2,), (1,))
            assert two <= one + 1e-6


@pytest.mark.parametrize("score", ["brier", lambda p, y: -(p.gather(1, y[:, None]).log().mean())], ids=["brier", "own"])
def test_other_differentiable_scores_are_minimized(score):
    la, loader = fitted(BASIC[0], "kron"), validation(BASIC[0])
    found = la.tune(loader, score=score, **ALONE)
    assert found.value <= min(found.candidates.values()) + 1e-12
    if callable(score):
        assert found.value == pytest.approx(la.tune(loader, **ALONE).value, abs=1e-6)


@pytest.mark.parametrize("options", [{"link_approx": "mc"}, {"link_approx": "bridge"}, {"pred_type": "nn"}])
def test_other_predictions_are_tuned_with_the_same_random_numbers_at_every_step(options):
    la, loader = fitted(BASIC[0], "kron"), validation(BASIC[0])
    first = la.tune(loader, n_samples=20, generator=generator(1), **options, **ALONE)
    second = la.tune(loader, n_samples=20, generator=generator(1), **options, **ALONE)
    assert first.value == second.value
    assert_close(first.hyperparameters["prior_precision"], second.hyperparameters["prior_precision"])


def all_right():
    """An approximation, and validation data without an error: no temperature is cold enough."""
    case = BASIC[0]
    x, _ = case.data(n_rows=60, shift=3)
    model = case.model()
    return fitted(case, "diag", model), [(x, case.forward(model, x).argmax(-1))]


def test_brackets_extend_to_their_limits_and_stay_there_with_a_warning():
    la, loader = all_right()
    for low in (1e-3, 0.5):
        with pytest.warns(UserWarning, match="output temperature stays at its limits"):
            la.tune(loader, limits={"output_temperature": (low, 2.0)}, **ALONE)
        assert la.output_temperature == pytest.approx(low)


def test_data_without_an_error_sharpen_nothing():
    la, loader = all_right()
    with pytest.warns(UserWarning, match="no temperature is best, and none below 1 was tried") as warned:
        found = la.tune(loader, **ALONE)
    assert not [record for record in warned if "stays at its limits" in str(record.message)]
    assert la.output_temperature == pytest.approx(1.0)
    assert list(found.candidates) == ["MAP"]


@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["underconfident", "overconfident"])
def test_the_temperature_falls_no_further_than_the_network_alone_is_better_for_it(scale):
    case = BASIC[0]
    x, _ = case.data(n_rows=60, shift=3)
    model = case.model()
    y = torch.distributions.Categorical(logits=case.forward(model, x).detach() * scale).sample()
    y = torch.where(torch.arange(60) % 7 == 0, (y + 1) % 3, y)
    # Rows with the largest features, where uncertain weights widen most, are wrong: a low temperature would make room.
    la = fitted(case, "diag", model)
    network = min(torch.logspace(-2, 2, 2000).tolist(), key=lambda t: map_score(case, model, [(x, y)], t))
    found = la.tune([(x, y)], **ALONE)
    assert la.output_temperature >= min(1.0, network) - 2e-2
    assert found.value <= found.candidates["MAP with its output temperature"] + 1e-9
    free = fitted(case, "diag", model).tune([(x, y)], limits={"output_temperature": (1e-3, 1e3)}, **ALONE)
    assert free.value <= found.value + 1e-6


def test_the_network_alone_is_compared_with_but_not_chosen_where_limits_of_the_precision_exclude_it():
    la, loader = fitted(BASIC[0], "diag"), validation(BASIC[0])
    plain = la.tune(loader, **ALONE).candidates
    found = la.tune(loader, limits={"prior_precision": (1e-3, 0.1)}, **ALONE)
    assert 1e-3 <= float(la.prior_precision) <= 0.1 + 1e-9
    assert found.candidates == pytest.approx(plain)


def test_what_is_not_asked_for_is_left_alone():
    la, loader = fitted(BASIC[0], "diag", temperature=1.3), validation(BASIC[0])
    la.output_temperature = 1.7
    la.tune(loader, output_temperature=False, **ALONE)
    assert (la.output_temperature, float(la.temperature)) == (1.7, 1.3)
    la = fitted(BASIC[1], "diag", prior_mean=0.2)
    la.tune(validation(BASIC[1]), noise="keep", **ALONE)
    assert float(la.sigma_noise) == pytest.approx(BASIC[1].sigma)
    assert float(la.prior_mean) == pytest.approx(0.2)


@pytest.mark.every(3, each_value=False)
@every_structure
def test_the_model_runs_once_a_batch(structure):
    case = BASIC[0]
    model, calls = case.model(), []
    la = fitted(case, structure, model)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    la.tune(validation(case))
    handle.remove()
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score": "ece"}, "proper score"),
        ({"score": "mse"}, "must be one of"),
        ({"score": lambda p, y: p.detach().sum()}, "without a gradient"),
        ({"score": lambda p, y: float(p.sum())}, "without a gradient"),
        ({"score": lambda p, y: p.numpy().sum()}, "without a gradient"),
        ({"score": lambda p, y: p.sum() * torch.nan}, "not finite at any"),
        ({"prior_structure": "diag"}, "evidence"),
        ({"limits": {"prior_precision": (2.0, 1.0)}}, "low < high"),
        ({"limits": {"precision": (1.0, 2.0)}}, "'prior_precision'"),
        ({"noise": "scalar"}, "classification has none"),
        ({"noise": "some"}, "'keep', 'scalar' or 'per_output'"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_changes(options, says):
    la = fitted(BASIC[0], "diag", prior_precision=2.5)
    with pytest.raises((InputError, UnsupportedError), match=says):
        la.tune(validation(BASIC[0]), **options)
    assert (float(la.prior_precision), la.output_temperature, la.tuning_) == (2.5, 1.0, None)


def test_a_score_without_a_gradient_is_refused_before_any_search():
    asked = []

    def score(p, y):
        asked.append(1)
        return p.detach().sum()

    la = fitted(BASIC[0], "diag")
    with pytest.raises(InputError, match="without a gradient"):
        la.tune(validation(BASIC[0]), score=score, **ALONE)
    assert len(asked) == 1


def test_validation_data_that_do_not_fit_are_refused():
    la = fitted(BASIC[0], "diag")
    x, y = BASIC[0].data()
    for loader, error, says in (
        (None, InputError, "val_loader"),
        ([], InputError, "empty"),
        ([(x, y + 100)], InputError, "lie in"),
        ([(x, y[:, None])], ShapeError, "shape"),
    ):
        with pytest.raises(error, match=says):
            la.tune(loader)
    with pytest.raises(UnsupportedError, match="noise is chosen instead"):
        fitted(BASIC[1], "diag").tune(validation(BASIC[1]), output_temperature=True)


def test_a_failure_while_assigning_brings_all_hyperparameters_back(monkeypatch):
    la = fitted(BASIC[1], "diag", prior_precision=2.5, sigma_noise=0.4)
    before = la(BASIC[1].test_inputs())

    def fails(self, value):
        raise RuntimeError("no")

    monkeypatch.setattr(type(la), "sigma_noise", property(type(la).sigma_noise.fget, fails))
    with pytest.raises(RuntimeError, match="no"):
        la.tune(validation(BASIC[1]))
    assert float(la.prior_precision) == 2.5
    for ours, theirs in zip(la(BASIC[1].test_inputs()), before, strict=True):
        assert_close(ours, theirs)


def test_the_result_prints_as_one_line_and_draws_its_curve(capsys):
    la = fitted(BASIC[0], "kron")
    found = la.tune(validation(BASIC[0]), verbose=True, **ALONE)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "prior precision" in out
    assert "output temperature" in out
    assert f"MAP {found.candidates['MAP']:.4f}" in out
    axes = found.plot()
    assert axes.get_xscale() == "log"
    assert len(axes.lines[0].get_xdata()) == len(found.points)
    assert found.value <= float(found.values.min()) + 1e-9


def test_the_state_of_tuning_survives_copies():
    import copy
    import pickle

    la = fitted(BASIC[0], "diag")
    la.tune(validation(BASIC[0]))
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        assert other.tuning_.value == la.tuning_.value
