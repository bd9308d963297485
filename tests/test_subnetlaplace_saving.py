"""Subnetworks: saving, copying and moving; and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from laplace import FullSubnetLaplace, Laplace
from laplace.baselaplace.statefile import digest
from laplace.curvature import AutogradGGN, GGNInterface
from laplace.enums import HessianStructure
from laplace.errors import InputError, NotFittedError, StateError, UnsupportedError
from tests.cases import Net
from tests.contracts import generator
from tests.tools import assert_close, assert_same

structures = pytest.mark.parametrize("structure", ["full", "diag"])
SHUFFLED = [25, 3, 17, 0, 16]


def data(device="cpu"):
    noise = generator(0)
    return torch.randn(5, 3, generator=noise).to(device), torch.randn(5, 2, generator=noise).to(device)


def model() -> nn.Module:
    """26 weights, the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(3, 4, 2)


def subnet(structure: str = "full", index=SHUFFLED, net=None, **options):
    index = torch.tensor(index) if isinstance(index, list) else index
    net = model() if net is None else net
    return Laplace(net, "regression", "subnetwork", structure, subnetwork_indices=index, **options)


def fitted(structure: str, **options):
    la = subnet(structure, prior_precision=torch.tensor([0.5, 1.0, 2.0]), prior_mean=0.1, sigma_noise=0.7, **options)
    la.fit([data()])
    return la


def seen(la) -> list[torch.Tensor]:
    x = data()[0]
    return [
        *la(x),
        la.H,
        la.mean,
        la.sample(2, generator=generator(0)),
        la.functional_samples(x, "nn", n_samples=2, generator=generator(1)),
        la.log_marginal_likelihood().detach(),
        la.log_prob(la.mean + 0.1).detach(),
        la.prior_precision_diag,
    ]


@structures
def test_a_state_holds_the_subnetwork_and_is_read_safely(structure, tmp_path):
    la, twin = fitted(structure), subnet(structure)
    la.save(tmp_path / "state")
    twin.load(tmp_path / "state")
    assert_same(seen(twin), seen(la))
    state = torch.load(tmp_path / "state", weights_only=True)
    assert state["subnetwork_indices"].tolist() == SHUFFLED
    assert_close(state["mean"], la.mean_subnet)


@structures
def test_copies_and_pickles_give_the_same_numbers(structure):
    la = fitted(structure)
    for twin in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        assert_same(seen(twin), seen(la))
        assert twin.params[0] is next(iter(twin.model.parameters()))
        twin.fit([data()])
        assert_same(seen(twin), seen(la))


@structures
def test_a_state_of_another_subnetwork_is_refused_and_nothing_changed(structure):
    state, other = fitted(structure).state_dict(), subnet(structure, [0, 3, 16, 17, 25])
    with pytest.raises(StateError, match=r'another subnetwork.*state\["subnetwork_indices"\]'):
        other.load_state_dict(state)
    with pytest.raises(NotFittedError):
        other.state_dict()
    assert other.subnetwork_indices.tolist() == [0, 3, 16, 17, 25]
    del state["subnetwork_indices"]
    state["digest"] = digest(state)
    with pytest.raises(StateError, match="no entry 'subnetwork_indices'"):
        subnet(structure).load_state_dict(state)


@structures
def test_an_approximation_moves_with_its_model(structure, device):
    la = fitted(structure)
    before = seen(la)
    assert la.to(device) is la
    assert la.subnetwork_indices.device.type == la.mean.device.type == device.type
    x = data()[0].to(device)
    assert_close(la(x)[1].cpu(), before[1])
    la.fit([data(device)])
    assert_close(la.H.cpu(), before[2])
    assert_close(la.prior_precision_diag.cpu(), before[-1])


def test_indices_are_copied():
    index = torch.tensor(SHUFFLED)
    la = subnet(index=index)
    index.zero_()
    assert la.subnetwork_indices.tolist() == SHUFFLED
    la.fit([data()])


def test_a_fit_that_fails_changes_nothing():
    la = fitted("full")
    before = seen(la)
    x, y = data()
    with pytest.raises(InputError):
        la.fit([(x, y), (x * torch.nan, y)])
    assert_same(seen(la), before)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ((1, 2), InputError, r"one-dimensional torch\.LongTensor.*got tuple.*mask\.select\(\)"),
        (torch.ones(26, dtype=torch.bool), InputError, "boolean mask"),
        (torch.tensor([0.0, 1.0]), InputError, r"\.long\(\)"),
        (torch.tensor([[0, 1]]), InputError, "one-dimensional"),
        (torch.zeros(0, dtype=torch.long), InputError, "empty"),
        (torch.tensor([26]), InputError, "26 weights.*another model"),
        (torch.tensor([3, 3]), InputError, "more than once"),
    ],
)
def test_indices_that_are_none_are_refused_when_the_object_is_made(index, error, message):
    with pytest.raises(error, match=message):
        subnet(index=index)


def test_frozen_weights_cannot_be_random():
    net = model()
    net.body.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"'body\.0\.weight'.*requires_grad_\(True\)"):
        subnet(net=net)
    net.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="none is random"):
        subnet(net=net)


def test_weights_that_are_frozen_after_construction_are_named():
    net = model()
    la = subnet(net=net)
    net.head.weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"'head\.weight' has changed"):
        la.fit([data()])


def test_a_subnetwork_has_no_kronecker_factors():
    with pytest.raises(UnsupportedError, match=r"'subnetwork'.*'kron'.*\('subnetwork', 'full'\)"):
        subnet("kron")
    backend = AutogradGGN(model(), "regression", subnetwork_indices=torch.tensor([1]))
    assert not backend.provides(HessianStructure.KRON)


def test_indices_belong_to_the_estimator_and_to_no_other():
    index = torch.tensor([1, 2])
    with pytest.raises(UnsupportedError, match=r"backend_kwargs cannot hold subnetwork_indices"):
        Laplace(model(), "regression", "all", "diag", backend_kwargs={"subnetwork_indices": index}).fit([data()])
    with pytest.raises(TypeError, match="subnetwork_indices"):
        Laplace(model(), "regression", "all", "diag", subnetwork_indices=index)
    with pytest.raises(TypeError, match="subnetwork_indices"):
        Laplace(model(), "regression", "subnetwork", "diag")
    with pytest.raises(UnsupportedError, match="two choices of random weights"):
        AutogradGGN(model(), "regression", last_layer=True, subnetwork_indices=index)


def test_a_back_end_that_does_not_know_subnetworks_is_refused():
    class Mine(GGNInterface):
        pass

    with pytest.raises(UnsupportedError, match=r"Mine does not provide subset_of_weights='subnetwork'.*AutogradGGN"):
        subnet(backend=Mine).fit([data()])


def test_weights_on_which_nothing_depends_are_refused():
    net = model()
    net.unused = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"do not depend on any weight that is random.*choose others"):
        subnet(index=[27], net=net).fit([data()])


def test_before_a_fit_it_is_the_prior_of_the_chosen_weights_and_what_needs_one_says_so():
    la = FullSubnetLaplace(model(), "regression", torch.tensor(SHUFFLED), prior_mean=0.5)
    assert torch.equal(la.mean_subnet, torch.full((5,), 0.5))
    assert torch.equal(la.mean[torch.tensor(SHUFFLED)], la.mean_subnet)
    assert torch.equal(la.H, torch.zeros(5, 5))
    for call in (la.state_dict, la.log_marginal_likelihood, lambda: la(torch.zeros(1, 3))):
        with pytest.raises(NotFittedError):
            call()
    assert (la.n_params, la.n_params_subnet, la.n_layers) == (26, 5, 3)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    file = tmp_path / "state"
    buffer = io.BytesIO()
    torch.save({"H": torch.ones(2)}, buffer)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(StateError, match="no state"):
        subnet().load(file)
