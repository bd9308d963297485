"""Masks by names, and what all masks have in common."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from laplace import Laplace
from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from laplace.utils import subnetmask
from laplace.utils.subnetmask import LastLayerSubnetMask, ModuleNameSubnetMask, ParamNameSubnetMask, SubnetMask
from tests.cases import KeywordInputs, Net
from tests.contracts import model_untouched

RANGES = {
    "body.0.weight": range(12),
    "body.0.bias": range(12, 16),
    "head.weight": range(16, 24),
    "head.bias": range(24, 26),
}


def net() -> Net:
    """26 weights: 12 and 4 in the body, 8 and 2 in the head."""
    return Net(3, 4, 2)


def positions(*names: str) -> list[int]:
    return [index for name in RANGES if name in names for index in RANGES[name]]


class Every(SubnetMask):
    """A mask of a user: what `chosen` makes of the weights."""

    def __init__(self, model, chosen):
        super().__init__(model)
        self.chosen = chosen

    def get_subnet_mask(self, train_loader):
        assert train_loader is None
        return self.chosen(self.parameter_vector)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float64])
def test_a_mask_of_a_users_own_is_a_mask_and_its_indices_fit_an_estimator(dtype):
    model = net()
    mask = Every(model, lambda theta: (theta > 0).to(dtype))
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    with model_untouched(model):
        indices = mask.select()
    assert indices.dtype == torch.int64
    assert indices.tolist() == [index for index, value in enumerate(theta.tolist()) if value > 0]
    assert torch.equal(mask.indices, indices)
    assert mask.n_params_subnet == len(indices)
    la = Laplace(model, "classification", "subnetwork", "full", subnetwork_indices=indices)
    la.fit([(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))])
    assert la.H.shape == (len(indices), len(indices))


def test_nothing_is_there_before_it_is_selected_and_it_is_selected_once():
    mask = ParamNameSubnetMask(net(), ["head.bias"])
    for name in ("indices", "n_params_subnet"):
        with pytest.raises(NotFittedError, match=r"ParamNameSubnetMask\.select\(\) first"):
            getattr(mask, name)
    mask.select()
    with pytest.raises(UnsupportedError, match=r"selected already.*make a new mask"):
        mask.select()


def test_changing_the_returned_indices_does_not_change_the_mask():
    mask = ParamNameSubnetMask(net(), ["head.bias"])
    mask.select().zero_()
    mask.indices.zero_()
    assert mask.indices.tolist() == positions("head.bias")


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (lambda theta: theta[1:] > 0, ShapeError, r"\[26\]; got \[25\]"),
        (lambda _: [True] * 26, ShapeError, r"\[26\]; got list"),
        (lambda theta: theta * 0, InputError, "no weight"),
        (lambda theta: theta * 0 + 2, InputError, r"zeros and ones; it has \[2\.0"),
        (lambda theta: theta * torch.nan, InputError, "zeros and ones"),
    ],
)
def test_a_mask_that_is_none_is_refused_and_can_be_selected_again(chosen, error, message):
    mask = Every(net(), chosen)
    with pytest.raises(error, match=message):
        mask.select()
    with pytest.raises(NotFittedError):
        _ = mask.indices
    mask.chosen = lambda theta: torch.ones_like(theta)
    assert len(mask.select()) == 26


def test_indices_count_frozen_weights_and_never_name_one():
    model = net()
    model.body.requires_grad_(False)
    assert ModuleNameSubnetMask(model, ["head"]).select().tolist() == positions("head.weight", "head.bias")
    with pytest.raises(InputError, match=r"frozen weights \(at \[0, 1, 2\]\)"):
        Every(model, lambda theta: torch.ones_like(theta)).select()
    with pytest.raises(UnsupportedError, match=r"'body\.0\.bias' does not require a gradient"):
        ParamNameSubnetMask(model, ["body.0.bias", "head.bias"])
    with pytest.raises(UnsupportedError, match=r"module 'body' has no weights that require"):
        ModuleNameSubnetMask(model, ["body"])
    model.head.bias.requires_grad_(False)
    assert ModuleNameSubnetMask(model, ["head"]).select().tolist() == positions("head.weight")
    with pytest.raises(UnsupportedError, match="none can be selected"):
        ParamNameSubnetMask(model.requires_grad_(False), ["head.bias"])


# -- by names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["head.bias"], ["head.weight", "body.0.weight"], list(RANGES)])
def test_parameters_are_selected_by_their_names(names):
    assert ParamNameSubnetMask(net(), names).select().tolist() == positions(*names)


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [
        (["head"], ["head.weight", "head.bias"]),
        (["body"], ["body.0.weight", "body.0.bias"]),
        (["head", "body.0"], list(RANGES)),
        ([""], list(RANGES)),
    ],
)
def test_modules_are_selected_by_their_names_with_all_that_is_in_them(modules, parameters):
    assert ModuleNameSubnetMask(net(), modules).select().tolist() == positions(*parameters)


def test_a_tied_weight_is_selected_by_either_module():
    model = net()
    model.twin = nn.Linear(4, 2, bias=False)
    model.twin.weight = model.head.weight
    assert ModuleNameSubnetMask(model, ["twin"]).select().tolist() == positions("head.weight")


@pytest.mark.parametrize(
    ("cls", "names", "error", "message"),
    [
        (ParamNameSubnetMask, ["head.wight"], UnsupportedError, r"no parameter 'head\.wight'.*Did you mean 'head\.weight'"),
        (ModuleNameSubnetMask, ["heads"], UnsupportedError, r"no module 'heads'; see model\.named_modules\(\).*'head'"),
        (ModuleNameSubnetMask, ["body.1"], UnsupportedError, r"'body\.1' has no weights"),
        (ParamNameSubnetMask, "head.weight", InputError, "list of names; got 'head.weight'"),
        (ModuleNameSubnetMask, [3], InputError, "list of names"),
        (ParamNameSubnetMask, [], InputError, "parameter_names is empty"),
    ],
)  # fmt: skip
def test_names_that_are_none_are_refused(cls, names, error, message):
    with pytest.raises(error, match=message):
        cls(net(), names)


# -- the last layer ---------------------------------------------------------------------------------------------------


def test_the_last_layer_is_found_by_a_pass_or_by_its_name():
    model = net().train()
    head = positions("head.weight", "head.bias")
    assert LastLayerSubnetMask(model, "head").select().tolist() == head
    mask = LastLayerSubnetMask(model)
    with pytest.raises(InputError, match=r"looks at training data: pass select\(train_loader\)"):
        mask.select()
    with pytest.raises(InputError, match=r"empty.*last_layer_name="):
        mask.select([])
    with model_untouched(model):
        assert mask.select([(torch.randn(2, 3), torch.tensor([0, 1]))]).tolist() == head
    assert isinstance(mask, ModuleNameSubnetMask)


def test_the_last_layer_may_have_a_parametrized_weight():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), parametrizations.weight_norm(nn.Linear(4, 2)))
    names = [name for name, _ in model.named_parameters()]
    assert names[2] == "2.bias"
    assert LastLayerSubnetMask(model, "2").select().tolist() == list(range(16, 16 + 2 + 2 + 8))


def test_a_last_layer_that_is_none_is_refused():
    with pytest.raises(UnsupportedError, match="must be a torch"):
        LastLayerSubnetMask(net(), "body")
    with pytest.raises(UnsupportedError, match="no module"):
        LastLayerSubnetMask(net(), "nothing")
    model = net()
    model.head.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="'head' has no weights that require"):
        LastLayerSubnetMask(model).select([(torch.randn(2, 3), torch.tensor([0, 1]))])


def test_mappings_enter_by_their_keys():
    model = KeywordInputs(3, 4, 2)
    mask = LastLayerSubnetMask(model, dict_key_x="input_ids", dict_key_y="target")
    batch = {"input_ids": torch.randn(2, 3), "target": torch.tensor([0, 1])}
    assert mask.select([batch]).tolist() == list(range(16, 26))


def test_every_recorded_mask_is_at_its_recorded_address():
    assert set(subnetmask.__all__) >= {
        "LargestMagnitudeSubnetMask", "LargestVarianceDiagLaplaceSubnetMask", "LargestVarianceSWAGSubnetMask",
        "LastLayerSubnetMask", "ModuleNameSubnetMask", "ParamNameSubnetMask", "RandomSubnetMask",
    }  # fmt: skip
