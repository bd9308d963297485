"""BackPACK, ASDL and curvlinops with a subnetwork: the dense curvature restricted, or a refusal."""

import pytest
import torch

from laplace import Laplace
from laplace.curvature import BACKENDS
from laplace.curvature.package import PackageInterface
from laplace.enums import HessianStructure, SubsetOfWeights
from laplace.network import evaluating
from tests.contracts import generator, model_untouched
from tests.networks import Network, named
from tests.subnetworks import as_matrix, chosen, truth
from tests.tools import assert_close

PACKAGES = [cls for cls in BACKENDS if issubclass(cls, PackageInterface)]
every_package = pytest.mark.parametrize("cls", PACKAGES, ids=lambda cls: cls.__name__)
NAMES = {"GGN": "GGN", "empirical Fisher": "EF", "Hessian": "Hessian"}


def fitted(network: Network, cls, structure: str, index: torch.Tensor, model=None):
    model = network.model() if model is None else model
    options = {"subnetwork_indices": index, "backend": cls, "prior_precision": 50.0}
    la = Laplace(model, network.likelihood, "subnetwork", structure, **options)
    x, y = network.data()
    la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    return la


@pytest.mark.every(8)
@every_package
@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "two_convolutions", "batch_norm_1d", "masked_rows"])
@pytest.mark.parametrize("choice", ["few", "shuffled"])
def test_a_package_computes_the_dense_curvature_restricted_and_leaves_the_model_alone(cls, name, choice):
    network, model = named(name), named(name).model().train()
    index = chosen(network, choice)
    x = network.data(shift=2, n_rows=3)[0]
    J = network.problem().jacobian(x).flatten(0, 1)[..., index]
    for structure in HessianStructure.FULL, HessianStructure.DIAG:
        if not cls.can(structure, SubsetOfWeights.SUBNETWORK):
            continue
        with model_untouched(model):
            la = fitted(network, cls, structure, index, model)
            la(x)
        H = truth(name, NAMES[cls.matrix])[index][:, index]
        assert_close(as_matrix(la.H), H if structure is HessianStructure.FULL else H.diagonal().diag())
        with model_untouched(model), evaluating(model):
            assert_close(la.backend.jacobians(x)[0], J)
            gradients, _ = la.backend.gradients(*network.data())
        assert_close(gradients, network.problem().gradients()[:, index])


@every_package
def test_layers_without_a_chosen_weight_need_not_be_known(cls):
    """Neither BackPACK nor ASDL knows the weights of ``RMSNorm``; they are constants here."""
    network = named("rms_norm")
    n_params = sum(p.numel() for p in network.model().parameters())
    index = n_params - 4 + torch.randperm(4, generator=generator(0))
    matrix = truth("rms_norm", NAMES[cls.matrix])[index][:, index]
    assert_close(fitted(network, cls, "full", index).H, matrix)


@every_package
def test_a_subnetwork_has_no_kronecker_factors(cls):
    assert not cls.can(HessianStructure.KRON, SubsetOfWeights.SUBNETWORK)
