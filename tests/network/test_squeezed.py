"""Models that squeeze their outputs: a batch of one row is a row of any other batch."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import ShapeError
from tests.networks import Applied
from tests.tools import assert_close


def regressor() -> nn.Module:
    return Applied(lambda m, x: m.head(torch.tanh(m.first(x))).squeeze(), first=nn.Linear(3, 4), head=nn.Linear(4, 1))


def classifier() -> nn.Module:
    return Applied(lambda m, x: m.head(torch.tanh(m.first(x))).squeeze(), first=nn.Linear(3, 4), head=nn.Linear(4, 3))


def images() -> nn.Module:
    """Its features are squeezed already."""
    return Applied(
        lambda m, x: m.head(torch.tanh(m.first(x.reshape(-1, 3, 1, 1))).squeeze()),
        first=nn.Conv2d(3, 4, 1),
        head=nn.Linear(4, 3),
    )


def positions() -> nn.Module:
    return Applied(
        lambda m, x: m.head(torch.tanh(m.first(x.unsqueeze(-1)))).squeeze(), first=nn.Linear(1, 4), head=nn.Linear(4, 1)
    )


MODELS = {
    "regressor": (regressor, "regression", lambda: torch.randn(5)),
    "column": (regressor, "regression", lambda: torch.randn(5, 1)),
    "classifier": (classifier, "classification", lambda: torch.randint(3, (5,))),
    "images": (images, "classification", lambda: torch.randint(3, (5,))),
    "positions": (positions, "regression", lambda: torch.randn(5, 3)),
}


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", MODELS)
def test_batches_of_one_row_are_rows_of_any_batch(name, subset):
    torch.manual_seed(0)
    build, likelihood, targets = MODELS[name]
    model, x, y = build(), torch.randn(5, 3), targets()
    several, single = (Laplace(model, likelihood, subset, "diag") for _ in range(2))
    several.fit([(x, y)])
    single.fit([(x[b : b + 1], y[b : b + 1]) for b in range(5)])
    assert_close(single.log_marginal_likelihood(), several.log_marginal_likelihood())
    for options in ({}, {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}):
        whole, rows = several(x, **options), [single(x[b : b + 1], **options) for b in range(5)]
        whole, rows = (whole, zip(*rows, strict=True)) if isinstance(whole, tuple) else ((whole,), [rows])
        for together, apart in zip(whole, rows, strict=True):
            joined = torch.cat(tuple(apart))
            assert joined.shape == together.shape
            if not options:
                assert_close(joined, together)


def test_one_number_for_several_rows_is_refused_in_words():
    model = Applied(lambda m, x: m.first(x).mean(), first=nn.Linear(3, 1))
    with pytest.raises(ShapeError, match=r"one number for a batch of 4 rows.*not their loss or mean"):
        Laplace(model, "regression", "all", "diag").fit([(torch.randn(4, 3), torch.randn(4))])
