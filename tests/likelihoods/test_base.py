"""What all likelihoods share: Hessians kept by their structure, and the table of names."""

import pytest
import torch
from torch import nn

from laplace.enums import Likelihood
from laplace.errors import UnsupportedError
from laplace.likelihoods import LIKELIHOODS, OutputHessian, resolve, with_loss
from tests.tools import LargestTensor, assert_close

ROWS, OUTPUTS = 4, 3
DIAGONAL = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(ROWS, OUTPUTS)
ROOT = torch.randn(ROWS, OUTPUTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kept", "dense"),
    [
        (OutputHessian(OUTPUTS, diagonal=DIAGONAL), torch.diag_embed(DIAGONAL)),
        (OutputHessian(OUTPUTS, diagonal=DIAGONAL[:, :1]), DIAGONAL[:, :1, None] * torch.eye(OUTPUTS).double()),
        (OutputHessian(OUTPUTS, root=ROOT), ROOT @ ROOT.mT),
        (OutputHessian(OUTPUTS, diagonal=DIAGONAL, root=ROOT), torch.diag_embed(DIAGONAL) + ROOT @ ROOT.mT),
        (OutputHessian(OUTPUTS, diagonal=DIAGONAL, root=ROOT, sign=-1), torch.diag_embed(DIAGONAL) - ROOT @ ROOT.mT),
        (OutputHessian(OUTPUTS, root=ROOT[..., :1]), ROOT[..., :1] @ ROOT[..., :1].mT),
        (
            OutputHessian(OUTPUTS, diagonal=DIAGONAL, root=ROOT, sign=-1, total=DIAGONAL),
            torch.diag_embed(DIAGONAL) - ROOT @ ROOT.mT + torch.diag_embed((ROOT**2).sum(-1)),
        ),
    ],
    ids=["diagonal", "shared diagonal", "root", "plus", "minus", "rank one", "diagonal given"],
)
def test_output_hessian_means_diagonal_plus_or_minus_root(kept, dense):
    assert_close(kept.dense(), dense)
    assert_close(kept.diag(), dense.diagonal(dim1=1, dim2=2))
    assert_close(kept.sum(), dense.sum(0))


def test_diagonal_and_sum_never_build_one_matrix_a_row():
    rows, outputs = 50, 40
    kept = OutputHessian(outputs, diagonal=torch.rand(rows, outputs), root=torch.rand(rows, outputs, 1), sign=-1)
    with LargestTensor() as largest:
        kept.diag()
        kept.sum()
    assert largest.numel <= max(rows * outputs, outputs**2), largest.operation


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_names_and_members_resolve_to_the_same_likelihood(name):
    assert type(resolve(name)) is type(resolve(name.value)) is LIKELIHOODS[name]
    assert resolve(name).name == name


def test_noise_and_temperature_reach_the_likelihood():
    assert float(resolve("regression", sigma_noise=0.5, temperature=2.0).scale) == pytest.approx(2.0)
    assert float(resolve("classification", temperature=2.0).scale) == pytest.approx(0.5)


def test_every_name_has_a_likelihood():
    assert set(LIKELIHOODS) == set(Likelihood)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UnsupportedError, match=r"'regression'.*'reward_modeling'.*Did you mean 'classification'"):
        resolve("clasification")


def test_packages_take_the_likelihoods_whose_loss_they_know():
    labels = {Likelihood.CLASSIFICATION}
    assert with_loss(nn.CrossEntropyLoss) == labels
    assert with_loss(nn.CrossEntropyLoss, compared=True) == labels | {Likelihood.REWARD_MODELING}
    assert with_loss(nn.MSELoss, nn.BCEWithLogitsLoss) == {Likelihood.REGRESSION, Likelihood.BINARY}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_only_likelihoods_of_one_output_or_of_pairs_refuse_a_head_with_three(name):
    likelihood = resolve(name)
    likelihood.check_head(2 if name == "heteroscedastic_regression" else 1)
    refused = {
        "reward_modeling": r"one score each.*3 outputs.*Give it one output",
        "binary": r"one logit.*3 outputs",
        "heteroscedastic_regression": r"two outputs for each target.*model has 3\. Double",
    }
    if name in refused:
        with pytest.raises(UnsupportedError, match=refused[name]):
            likelihood.check_head(3)
    else:
        likelihood.check_head(3)
