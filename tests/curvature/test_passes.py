"""How often a fit of all weights runs the model: once for each batch, and once more to find the last layer."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import quiet


class Counting(nn.Sequential):
    """Counts its passes."""

    n_passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n_passes += 1
        return super().forward(x)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_fit_runs_the_model_once_for_each_batch(structure):
    model = Counting(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    x, y = torch.randn(20, 3), torch.arange(20) % 4
    la = Laplace(model, "classification", "all", structure)
    la.fit([(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)])
    assert model.n_passes == 5 + 1


def test_the_density_of_features_is_that_of_the_features():
    model = Counting(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    x, y = torch.randn(20, 3), torch.arange(20) % 4
    la = Laplace(model, "classification", "all", "diag")
    la.fit([(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)])
    head = Laplace(model, "classification", "last_layer", "diag")
    head.fit([(x, y)])
    with quiet(""):
        torch.testing.assert_close(la.ood_score(x, kind="density"), head.ood_score(x, kind="density"))
