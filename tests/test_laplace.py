"""From option names to an estimator."""

import pytest
import torch

from laplace import (
    ELLA,
    LLELLA,
    BaseFunctionalLaplace,
    BlockDiagLLLaplace,
    DiagLLLaplace,
    EKFACLLLaplace,
    FullLLLaplace,
    FunctionalApproximation,
    HessianStructure,
    KronLLLaplace,
    Laplace,
    Likelihood,
    LLVaLLA,
    LowRankLLLaplace,
    SubsetOfWeights,
    VaLLA,
)
from laplace.errors import UnsupportedError
from laplace.laplace import ESTIMATORS
from tests.cases import BASIC

CLASSES = {
    "full": FullLLLaplace,
    "kron": KronLLLaplace,
    "diag": DiagLLLaplace,
    "blockdiag": BlockDiagLLLaplace,
    "ekfac": EKFACLLLaplace,
    "lowrank": LowRankLLLaplace,
}


@pytest.mark.parametrize(("structure", "cls"), CLASSES.items())
def test_names_and_members_choose_the_same_class(structure, cls):
    case = BASIC[0]
    by_name = Laplace(case.model(), case.likelihood, "last_layer", structure)
    by_member = Laplace(
        case.model(), Likelihood(case.likelihood), SubsetOfWeights.LAST_LAYER, HessianStructure(structure)
    )
    assert type(by_name) is type(by_member) is cls
    assert ESTIMATORS[SubsetOfWeights.LAST_LAYER, HessianStructure(structure)] is cls


@pytest.mark.parametrize(
    ("subset", "approximation", "cls"),
    [("all", "nystrom", ELLA), ("all", "variational", VaLLA), ("last_layer", "nystrom", LLELLA), ("last_layer", "variational", LLVaLLA)],
)  # fmt: skip
def test_function_space_approximations_are_chosen_by_name(subset, approximation, cls):
    own = {"subsample_size": 3, "n_eigenvalues": 2} if approximation == "nystrom" else {"inducing_locations": torch.zeros(2, 3)}  # fmt: skip
    for name in (approximation, FunctionalApproximation(approximation)):
        la = Laplace(BASIC[0].model(), "classification", subset, "gp", functional_approximation=name, **own)
        assert type(la) is cls
        assert isinstance(la, BaseFunctionalLaplace)
    with pytest.raises(TypeError, match="no option 'n_subset'"):
        Laplace(BASIC[0].model(), "classification", subset, "gp", functional_approximation=approximation, n_subset=3)


def test_the_default_is_kron_on_the_last_layer():
    assert type(Laplace(BASIC[0].model(), "classification")) is KronLLLaplace


def test_further_arguments_reach_the_estimator():
    la = Laplace(BASIC[1].model(), "regression", "last_layer", "kron", 0.5, 2.0, damping=True)
    assert (float(la.sigma_noise), float(la.prior_precision), la.damping) == (0.5, 2.0, True)
    with pytest.raises(TypeError, match="damping"):
        Laplace(BASIC[1].model(), "regression", hessian_structure="diag", damping=True)
    with pytest.raises(TypeError, match="unknown"):
        Laplace(BASIC[1].model(), "regression", unknown=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"subset_of_weights": "last"}, "subset_of_weights must be one of 'all', 'last_layer', 'subnetwork'"),
        ({"hessian_structure": "kronn"}, "hessian_structure must be one of.*Did you mean 'kron'"),
        ({"likelihood": "classify"}, "likelihood must be one of"),
        (
            {"subset_of_weights": "subnetwork"},
            r"no estimator for subset_of_weights='subnetwork'.*\('last_layer', 'kron'\)",
        ),
        (
            {"subset_of_weights": "subnetwork", "hessian_structure": "ekfac"},
            r"hessian_structure='ekfac'.*\('last_layer', 'full'\)",
        ),
        ({"functional_approximation": "nystrom"}, "functional_approximation='nystrom' needs"),
        ({"functional_approximation": "none"}, "functional_approximation must be one of 'sod'"),
    ],
)
def test_choices_that_do_not_exist_list_those_that_do(options, says):
    arguments = {"likelihood": "classification", **options}
    with pytest.raises(UnsupportedError, match=says):
        Laplace(BASIC[0].model(), **arguments)


def test_the_default_functional_approximation_is_accepted_by_name():
    for name in ("sod", FunctionalApproximation.SOD):
        assert Laplace(BASIC[0].model(), "classification", functional_approximation=name) is not None
