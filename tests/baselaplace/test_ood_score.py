"""How foreign inputs are."""

import math

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import InputError, NotFittedError, UnsupportedError
from tests.baselaplace.recipes import C, classification, features, joined, logits, regression, tuned
from tests.cases import named
from tests.contracts import generator, model_untouched
from tests.density import brute_force
from tests.estimators import fitted
from tests.tools import assert_close


def test_densities_are_those_of_the_definition():
    data = classification()
    la = tuned(data)
    (phi, y), rows = features(data, data.train), data.model.body(data.test).detach()
    with model_untouched(data.model):
        g = la.ood_score(data.test, "density")
    assert_close(g, -brute_force.mixture(phi, y).log_prob(rows))
    shared, pooled = brute_force.pooled(phi, y), torch.cov(phi.T)
    relative = [
        min(brute_force.squared_distance(row, phi[y == c].mean(0), shared) for c in range(C))
        - brute_force.squared_distance(row, phi.mean(0), pooled)
        for row in rows
    ]
    assert_close(la.ood_score(data.test, "relative"), torch.tensor(relative))


def test_fishers_score_adds_the_log_tails_of_doubt_and_density():
    data = classification()
    la = tuned(data)
    (phi, y), (phi_val, _) = features(data, data.train), features(data, data.val)
    density = brute_force.mixture(phi, y)

    def parts(rows):
        p = (logits(la.mean, rows) / la.output_temperature).softmax(-1)
        return (1 - p.max(-1).values).log(), -density.log_prob(rows)

    known, x = parts(phi_val), 3 * data.test
    new = parts(data.model.body(x).detach())
    expected = [
        -sum(brute_force.tail(k.tolist(), float(v[i])) for k, v in zip(known, new, strict=True)) for i in range(len(x))
    ]
    assert_close(la.ood_score(x), torch.tensor(expected))
    assert torch.equal(la.ood_score(x), la.ood_score(x, "fisher"))


def test_scores_of_predictions_are_those_of_predictions():
    data = classification()
    la = tuned(data)
    p = la(data.test)
    assert_close(la.ood_score(data.test, "max_prob"), 1 - p.max(-1).values)
    assert_close(la.ood_score(data.test, "entropy"), -(p * p.log()).sum(-1))
    la.weight_uncertainty, la.distance_scale = True, 0
    samples = la.predictive_samples(data.test, n_samples=500, generator=generator(0))
    mean = samples.mean(0)
    expected = -(mean * mean.log()).sum(-1) + (samples * samples.log()).sum(-1).mean(0)
    assert_close(la.ood_score(data.test, "mutual_information", 500, generator(0)), expected)


def test_foreign_inputs_have_higher_scores():
    data = classification()
    la = tuned(data)
    far = 6 * torch.randn(200, 3, generator=generator(1), dtype=torch.float64)
    near, _ = joined(data.val)
    for kind in ("fisher", "density"):
        a, b = la.ood_score(near, kind), la.ood_score(far, kind)
        assert (b[:, None] > a).double().mean() > 0.8


def test_without_validation_rows_training_rows_are_compared_with_and_it_is_said():
    data = classification()
    la = Laplace(data.model, "classification")
    la.fit(data.train)
    with pytest.warns(UserWarning, match="training rows"):
        first = la.ood_score(data.test)
    assert torch.equal(la.ood_score(data.test), first)  # said once
    la.fit(data.train)
    la.forget_data()
    with pytest.raises(NotFittedError, match=r"tune\(val_loader\)"):
        la.ood_score(data.test)
    assert_close(la.ood_score(data.test, "density"), tuned(data).ood_score(data.test, "density"))


def test_regression_has_distances_and_no_doubt():
    data = regression()
    la = Laplace(data.model, "regression")
    la.fit(data.train)
    (phi, _), rows = features(data, data.train), data.model.body(data.test).detach()
    S = brute_force.covariance_of(0, phi, torch.zeros(len(phi), dtype=torch.long))
    expected = [math.sqrt(brute_force.squared_distance(row, phi.mean(0), S)) for row in rows]
    assert_close(la.ood_score(data.test), torch.tensor(expected))
    with pytest.raises(UnsupportedError, match="kind='density'"):
        la.ood_score(data.test, "fisher")
    with pytest.raises(UnsupportedError, match="probabilities"):
        la.ood_score(data.test, "entropy")


def test_densities_add_up_over_fits_and_do_not_depend_on_batches():
    data = classification()
    whole, parts = Laplace(data.model, "classification"), Laplace(data.model, "classification")
    x, y = joined(data.train + data.val)
    whole.fit([(x, y)])
    parts.fit(data.train)
    parts.fit(data.val, override=False)
    assert_close(whole.ood_score(data.test, "density"), parts.ood_score(data.test, "density"))


def test_positions_have_a_score_each_and_masked_ones_do_not_count():
    case = named("masked_positions")
    la = fitted(case, "kron")
    x = case.test_inputs()
    score = la.ood_score(x, "density")
    assert score.shape == la(x).shape[:-1]
    assert torch.isfinite(score).all()


def test_what_has_no_density_says_why():
    data = classification()
    subnetwork = Laplace(data.model, "classification", "subnetwork", "full", subnetwork_indices=torch.arange(4))
    subnetwork.fit(data.train)
    preferences = fitted(named("preferences"), "diag")
    for la, x in ((subnetwork, data.test), (preferences, named("preferences").test_inputs())):
        with pytest.raises(UnsupportedError, match="density of the features"):
            la.ood_score(x, "density")
    other = Laplace(nn.Sequential(nn.Linear(3, C), nn.Softplus()).double(), "classification", "all", "diag")
    other.fit(data.train)  # its outputs are not those of a linear layer
    with pytest.raises(UnsupportedError, match="features of the last layer are not known"):
        other.ood_score(data.test, "density")
    with pytest.raises(UnsupportedError, match="must be one of"):
        tuned(data).ood_score(data.test, "variance")
    with pytest.raises((InputError, NotFittedError)):
        Laplace(data.model, "classification").ood_score(data.test)


@pytest.mark.parametrize("kind", ["fisher", "max_prob", "entropy", "mutual_information"])
def test_independent_labels_are_said_to_have_an_entropy_each(kind):
    data = regression()
    la = Laplace(data.model, "multilabel")
    x, y = joined(data.train)
    la.fit([(x, (y > 0).long())])
    with pytest.raises(
        UnsupportedError, match=r"independent and have an entropy each: la\.predict\(x\)\.entropy"
    ) as said:
        la.ood_score(data.test, kind)
    assert "none here" not in str(said.value)
    assert la.predict(data.test).entropy.shape == la(data.test).shape
    assert torch.isfinite(la.ood_score(data.test, "density")).all()


def test_noise_by_input_has_no_density_for_a_reason_of_its_own():
    data = regression()
    la = Laplace(data.model, "heteroscedastic_regression")
    la.fit([(x, y[:, :1]) for x, y in data.train])
    with pytest.raises(UnsupportedError, match="same noise for all inputs; likelihood='heteroscedastic") as said:
        la.ood_score(data.test, "density")
    assert "convex" not in str(said.value)
    with pytest.warns(UserWarning, match="best without weight uncertainty"):
        found = la.tune([(x, y[:, :1]) for x, y in data.val])
    (note,) = [note for note in found.notes if note.startswith("No width")]
    assert "same noise for all inputs" in note
    assert any("convex" in note for note in found.notes if note.startswith("Head of the model"))
