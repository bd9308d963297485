"""What whole networks cannot do is said in words, before anything changes."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradHessian
from laplace.errors import InputError, NotPositiveDefiniteError, UnsupportedError
from tests.networks import Applied, named
from tests.test_whole_network import fitted, inputs


def test_a_model_without_trainable_weights():
    with pytest.raises(UnsupportedError, match=r"No weight of the model requires a gradient.*requires_grad_\(True\)"):
        Laplace(named("mlp").model().requires_grad_(False), "classification", "all", "diag")


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_a_problem_that_is_too_large_for_the_structure(structure, subset, monkeypatch):
    monkeypatch.setattr("laplace.linalg.memory_of", lambda _device: 10)
    network = named("mlp")
    la = Laplace(network.model(), "classification", subset, structure)
    if subset == "last_layer" and structure == "kron":
        return  # its layer is found while it is fitted, and its factors are small
    with pytest.raises(
        UnsupportedError, match=rf"hessian_structure='{structure}' for \d+ weights takes about .* are free.*'diag'"
    ):
        la.fit([network.data()])


def test_outputs_that_depend_on_the_rest_of_the_batch():
    model = Applied(
        lambda m, x: m.head(x - x.mean(0)) * m.gain, head=nn.Linear(3, 3), gain=nn.Parameter(torch.ones(1, 3))
    )
    mixing = Applied(
        lambda m, x: m.head(torch.tanh(m.first(x)) - torch.tanh(m.first(x)).mean(0)),
        first=nn.Linear(3, 3),
        head=nn.Linear(3, 3),
    )
    network = named("mlp")
    Laplace(model, "classification", "all", "diag").fit([network.data()])  # mixed before the first weight: no harm
    with pytest.raises(InputError, match=r"outputs of a row depend on the other rows"):
        Laplace(mixing, "classification", "all", "diag").fit([network.data()])


def test_an_input_that_is_written_to_afterwards():
    def forward(m, x):
        h = torch.sigmoid(x)
        out = m.head(h)
        h.zero_()
        return out

    model = Applied(forward, head=nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match=r"input of linear is written to later"):
        Laplace(model, "classification", "all", "diag").fit([named("mlp").data()])


def test_outputs_without_a_gradient():
    model = Applied(lambda m, x: m.head(x).detach(), head=nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match=r"do not depend on any weight.*no_grad"):
        Laplace(model, "classification", "all", "diag").fit([named("mlp").data()])


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_an_indefinite_hessian_is_reported_with_what_to_use_instead(structure):
    network = named("layer_norm")
    la = Laplace(network.model(), "classification", "all", structure, prior_precision=1e-3, backend=AutogradHessian)
    la.fit([network.data()])
    with pytest.raises(NotPositiveDefiniteError, match=r"(?s)GGN"):
        la(inputs(network))
    with pytest.raises(NotPositiveDefiniteError):
        la.log_marginal_likelihood()


def test_the_hessian_has_no_kronecker_factors():
    with pytest.raises(
        UnsupportedError,
        match=r"AutogradHessian does not provide hessian_structure='kron'.*'all'; it provides 'blockdiag', 'diag', 'full', 'lowrank'\. No back",
    ):
        Laplace(named("mlp").model(), "classification", "all", "kron", backend=AutogradHessian).fit(
            [named("mlp").data()]
        )


def test_a_weight_that_moved_after_fit_is_told():
    network, model = named("mlp"), named("mlp").model()
    la = fitted(network, "diag", model)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.warns(UserWarning, match=r"random weights have changed since fit"):
        la(inputs(network))


def test_a_weight_that_is_frozen_or_freed_after_construction():
    model = named("mlp").model()
    la = Laplace(model, "classification", "all", "diag")
    model[0].weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"requires_grad of '0.weight' has changed.*construct it again"):
        la.fit([named("mlp").data()])
    model[0].weight.requires_grad_(True)
    la.fit([named("mlp").data()])
    model[2].bias.requires_grad_(False)
    for action in (lambda: la.fit([named("mlp").data()]), lambda: la(inputs(named("mlp")))):
        with pytest.raises(UnsupportedError, match=r"'2.bias'"):
            action()
