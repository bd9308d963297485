"""Masks that select the weights with the highest scores."""

import pytest
import torch
from torch import nn

from laplace import DiagLaplace, FullLaplace, Laplace
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods.categorical import cross_entropy
from laplace.likelihoods.gaussian import squared_error
from laplace.utils import fit_diagonal_swag_var
from laplace.utils.subnetmask import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    RandomSubnetMask,
    ScoreBasedSubnetMask,
)
from tests.cases import Net, Squeezed
from tests.contracts import generator, model_untouched
from tests.tools import assert_close

CLASSES = torch.tensor([0, 1, 1, 0])


def net(n_outputs: int = 2, cls: type = Net) -> Net:
    """26 weights: 12 and 4 in the body, 8 and 2 in the head."""
    return cls(3, 4, n_outputs)


def batches(y: torch.Tensor = CLASSES):
    x = torch.randn(4, 3, generator=generator(0))
    return [(x[:3], y[:3]), (x[3:], y[3:])]


class Given(ScoreBasedSubnetMask):
    """A mask of a user with scores that are given."""

    def __init__(self, model, n_params_subnet, scores):
        super().__init__(model, n_params_subnet)
        self.scores = scores

    def compute_param_scores(self, train_loader):
        return self.scores


def highest(scores: torch.Tensor, n: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))[:n])


@pytest.mark.parametrize("n", [1, 7, 26])
def test_the_highest_scores_win_and_of_equal_ones_the_first(n):
    scores = torch.randint(5, (26,), generator=generator(0)).double()
    mask = Given(net(), n, scores)
    assert mask.n_params_subnet == n
    assert mask.select().tolist() == highest(scores, n)
    assert int(Given(net(), n, scores).get_subnet_mask(None).sum()) == n


def test_scores_of_frozen_weights_do_not_count():
    model = net()
    model.body[0].weight.requires_grad_(False)
    scores = torch.arange(26.0).flip(0)
    scores[0] = torch.nan
    assert Given(model, 3, scores).select().tolist() == [12, 13, 14]
    with pytest.raises(InputError, match=r"between 1 and 14, the number of weights that require"):
        Given(model, 15, scores)


@pytest.mark.parametrize("n", [0, -1, 27, 2.0, None, True, "3"])
def test_numbers_of_weights_that_are_none_are_refused(n):
    with pytest.raises(InputError, match="n_params_subnet must"):
        LargestMagnitudeSubnetMask(net(), n)


def test_scores_that_are_none_are_refused():
    with pytest.raises(ShapeError, match=r"\[26\]; got \[3\]"):
        Given(net(), 2, torch.ones(3)).select()
    with pytest.raises(InputError, match="26 scores are NaN"):
        Given(net(), 2, torch.ones(26) * torch.nan).select()


def test_the_largest_weights_are_selected():
    model = net()
    with model_untouched(model):
        indices = LargestMagnitudeSubnetMask(model, 5).select()
    assert indices.tolist() == highest(nn.utils.parameters_to_vector(model.parameters()).detach().abs(), 5)


def test_random_weights_are_those_of_the_generator_and_any_is_as_likely():
    draws = [RandomSubnetMask(net(), 5, generator=generator(seed)).select().tolist() for seed in range(400)]
    assert draws[3] == RandomSubnetMask(net(), 5, generator=generator(3)).select().tolist()
    counts = torch.tensor(draws).flatten().bincount(minlength=26)
    error = (400 * 5 / 26 * (1 - 5 / 26)) ** 0.5
    assert bool(((counts - 400 * 5 / 26).abs() < 5 * error).all())
    torch.manual_seed(1)
    first = RandomSubnetMask(net(), 5).select()
    torch.manual_seed(1)
    model = net()
    assert torch.equal(first, RandomSubnetMask(model, 5).select())


# -- variances --------------------------------------------------------------------------------------------------------


def test_the_largest_variances_of_a_diagonal_posterior_are_selected():
    model, la = net(), None
    la = DiagLaplace(model, "classification", prior_precision=0.1)
    mask = LargestVarianceDiagLaplaceSubnetMask(model, 5, la)
    with model_untouched(model):
        indices = mask.select(batches())
    twin = DiagLaplace(model, "classification", prior_precision=0.1)
    twin.fit(batches())
    assert indices.tolist() == highest(twin.posterior_variance, 5)
    assert_close(la.posterior_variance, twin.posterior_variance)


def test_variances_of_a_diagonal_posterior_find_their_places_among_frozen_weights():
    model = net()
    model.body[0].bias.requires_grad_(False)
    la = DiagLaplace(model, "classification")
    scores = LargestVarianceDiagLaplaceSubnetMask(model, 5, la).compute_param_scores(batches())
    assert bool((scores[12:16] == 0).all())
    assert_close(torch.cat([scores[:12], scores[16:]]), la.posterior_variance)


def test_a_posterior_that_cannot_score_is_refused():
    model = net()
    with pytest.raises(UnsupportedError, match="a FullLaplace has no posterior_variance"):
        LargestVarianceDiagLaplaceSubnetMask(model, 3, FullLaplace(model, "classification"))
    with pytest.raises(UnsupportedError, match="a str has no fit"):
        LargestVarianceDiagLaplaceSubnetMask(model, 3, "diag")
    last = Laplace(model, "classification", "last_layer", "diag")
    with pytest.raises(ShapeError, match=r"variances \[10\]; the model has 26 weights"):
        LargestVarianceDiagLaplaceSubnetMask(model, 3, last).select(batches())
    with pytest.raises(InputError, match="training data"):
        LargestVarianceDiagLaplaceSubnetMask(model, 3, DiagLaplace(model, "classification")).select()


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_weights_that_move_most_are_selected(likelihood):
    model = net()
    classification = likelihood == "classification"
    data = batches() if classification else batches(torch.randn(4, 2, generator=generator(1)))
    loss = nn.CrossEntropyLoss() if classification else nn.MSELoss()
    mask = LargestVarianceSWAGSubnetMask(model, 5, likelihood, 3, 2, 0.05)
    with model_untouched(model):
        indices = mask.select(data)
    assert indices.tolist() == highest(fit_diagonal_swag_var(model, data, loss, 3, 2, 0.05), 5)


def test_squeezed_outputs_meet_targets_with_an_axis_of_their_own():
    model, y = net(1, Squeezed), torch.randn(4, 1, generator=generator(1))
    scores = [
        LargestVarianceSWAGSubnetMask(model, 5, "regression", 3).compute_param_scores(batches(targets))
        for targets in (y, y.squeeze(1))
    ]
    assert_close(*scores)


def test_losses_are_means_over_what_counts():
    f, y = torch.randn(2, 3, 4), torch.tensor([[0, 3, -100], [1, -100, 2]])
    rows = [f[b, t].log_softmax(-1)[y[b, t]] for b in range(2) for t in range(3) if y[b, t] >= 0]
    assert_close(cross_entropy(f, y), -torch.stack(rows).mean())
    assert_close(cross_entropy(f, y.int()), cross_entropy(f, y))
    assert float(cross_entropy(f, torch.full_like(y, -100))) == 0
    soft = torch.rand(2, 3, 4).softmax(-1)
    assert_close(cross_entropy(f, soft), -(soft * f.log_softmax(-1)).sum(-1).mean())
    assert_close(squared_error(f[..., 0], soft[..., :1]), (f[..., 0] - soft[..., 0]).square().mean())


def test_what_cannot_be_trained_is_refused():
    for likelihood in ("reward_modeling", "binary", "poisson"):
        with pytest.raises(UnsupportedError, match=f"For '{likelihood}' call fit_diagonal_swag_var"):
            LargestVarianceSWAGSubnetMask(net(), 3, likelihood)
    with pytest.raises(UnsupportedError, match="likelihood must be one of"):
        LargestVarianceSWAGSubnetMask(net(), 3, "student")
    with pytest.raises(InputError, match="training data"):
        LargestVarianceSWAGSubnetMask(net(), 3).select()


def test_weights_that_are_frozen_too_late_are_noticed():
    model = net()
    mask = RandomSubnetMask(model, 20)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="20 weights are to be selected, and 0 require a gradient"):
        mask.select()
