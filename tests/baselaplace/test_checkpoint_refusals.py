"""States that are refused: of another object, damaged, or no states at all. Refusing changes nothing."""

import copy

import pytest
import torch
from torch import nn

from laplace import FullLLLaplace, Laplace
from laplace.baselaplace.statefile import digest
from laplace.curvature import AutogradEF
from laplace.errors import NotFittedError, StateError
from tests.cases import BASIC, Net, tensor_loader
from tests.contracts import model_untouched
from tests.estimators import estimator, everything, fitted
from tests.tools import assert_same


def trained_further() -> nn.Module:
    model = BASIC[0].model()
    with torch.no_grad():
        model.body[0].weight.add_(0.1)
    return model


def with_two_heads() -> nn.Module:
    model = BASIC[0].model()
    model.add_module("other", nn.Linear(6, 4).double())
    return model


OTHERS = {
    "class": (lambda: estimator(BASIC[0], "diag"), "cls_name is 'KronLLLaplace' there, 'DiagLLLaplace' here"),
    "likelihood": (
        lambda: Laplace(BASIC[0].model(), "regression", hessian_structure="kron"),
        "likelihood is 'classification' there, 'regression' here",
    ),
    "curvature": (lambda: estimator(BASIC[0], "kron", backend=AutogradEF), "curvature_kind is 'ggn' there, 'ef' here"),
    "reduction": (
        lambda: estimator(BASIC[0], "kron", feature_reduction="average"),
        "feature_reduction is None there, 'average' here",
    ),
    "last layer": (lambda: estimator(BASIC[0], "kron", last_layer_name="body.0"), "last layer 'head'.*'body.0'"),
    "weights": (lambda: estimator(BASIC[0], "kron", trained_further()), "weights of the model differ.*fit again"),
    "another model": (lambda: estimator(BASIC[0], "kron", with_two_heads()), "fingerprint"),
    "dtype": (lambda: estimator(BASIC[0], "kron", BASIC[0].model().float()), "fingerprint"),
}


@pytest.mark.parametrize(("build", "says"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_object_is_refused_in_words(build, says, tmp_path):
    fitted(BASIC[0], "kron").save(tmp_path / "state")
    la = build()
    with model_untouched(la.model), pytest.raises(StateError, match=says):
        la.load(tmp_path / "state")
    with pytest.raises(NotFittedError):
        la.state_dict()


def without(*path: str):
    def damage(state):
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return damage


def replaced(key: str, value):
    return lambda state: state.__setitem__(key, value)


def first_factor(value):
    return lambda state: state["H"]["sums"][0].__setitem__(0, value)


DAMAGE = {
    "schema": (replaced("schema_version", 99), "schema version 99, this release reads 3 and 4.*release that saved it"),
    "no schema": (without("schema_version"), "no state of a Laplace approximation.*la.save"),
    "no curvature": (without("H"), "incomplete.*'H'"),
    "no factors": (without("H", "sums"), "incomplete.*'sums'"),
    "no mean": (without("mean"), "incomplete.*'mean'"),
    "no counts": (without("n_data"), "incomplete.*'n_data'"),
    "no noise": (without("sigma_noise"), "incomplete.*'sigma_noise'"),
    "no damping": (without("damping"), "incomplete.*'damping'"),
    "no layer": (without("last_layer_name"), "incomplete.*'last_layer_name'"),
    "no class": (without("cls_name"), "cls_name is None"),
    "mean too short": (replaced("mean", torch.zeros(3)), r"'mean' must be a tensor of the shape \[28\]"),
    "mean without values": (replaced("mean", None), "'mean' must be a tensor.*it is None"),
    "wrong factors": (first_factor(torch.eye(3)), r"'sums'.*factors of 24 weights"),
    "factors not square": (first_factor(torch.zeros(2, 3)), r"'sums'.*of the shape \[2, 2\]"),
    "factors too few": (replaced("H", {"sums": [[torch.eye(3)]], "counts": [3], "resolution": 0.0}), "list of 2 entries"),
    "curvature without entries": (replaced("H", 3), "'H' must be a mapping"),
    "prior of another shape": (replaced("prior_precision", torch.ones(5)), "prior_precision"),
    "prior without meaning": (replaced("prior_precision", torch.tensor([-1.0])), "prior_precision"),
    "one precision per weight": (replaced("prior_precision", torch.ones(28)), "Kronecker"),
    "noise without meaning": (replaced("sigma_noise", torch.tensor(0.5)), "sigma_noise"),
    "temperature without meaning": (replaced("temperature", -1.0), "temperature"),
    "damping without meaning": (replaced("damping", "yes"), "damping"),
    "layer unknown": (replaced("last_layer_name", "fc"), "'fc'"),
}  # fmt: skip


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "fitted"])
@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused_and_changes_nothing(damage, says, fresh):
    case = BASIC[0]
    state = copy.deepcopy(fitted(case, "kron", prior_precision=9.0, temperature=2.0, enable_backprop=True).state_dict())
    damage(state)
    state["digest"] = digest(state)
    la = estimator(case, "kron") if fresh else fitted(case, "kron", prior_precision=0.7)
    before = None if fresh else everything(la, case)
    hyperparameters = (float(la.prior_precision), float(la.prior_mean), la.temperature, la.damping, la.enable_backprop)
    name = la.model.last_layer_name
    with model_untouched(la.model), pytest.raises(StateError, match=says):
        la.load_state_dict(state)
    assert hyperparameters == (
        float(la.prior_precision), float(la.prior_mean), la.temperature, la.damping, la.enable_backprop,
    )  # fmt: skip
    assert la.model.last_layer_name == name
    if fresh:
        with pytest.raises(NotFittedError):
            la.state_dict()
    else:
        assert_same(everything(la, case), before)


@pytest.mark.parametrize("thing", [None, 3, [1, 2], {}, {"weight": torch.ones(2)}, Net(1, 1, 1)], ids=str)
def test_what_is_no_state_is_refused(thing):
    with pytest.raises(StateError, match=r"no state of a Laplace approximation"):
        estimator(BASIC[0], "kron").load_state_dict(thing)


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    la, path = fitted(BASIC[0], "kron"), tmp_path / "file"
    before = everything(la, BASIC[0])
    path.write_bytes(b"not a state")
    with pytest.raises(StateError, match=r"cannot be read.*la\.save"):
        la.load(path)
    torch.save(la, path)  # whole objects are code, which is not run
    with pytest.raises(StateError, match="cannot be read"):
        la.load(path)
    torch.save(la.model.model.state_dict(), path)
    with pytest.raises(StateError, match="no state of a Laplace approximation"):
        la.load(path)
    path.write_bytes(b"")
    with pytest.raises(StateError, match="cannot be read"):
        la.load(path)
    with pytest.raises(StateError, match="cannot be read"):
        la.load(tmp_path)
    for wrong in (lambda: la.load(tmp_path / "missing"), lambda: la.save(tmp_path / "missing" / "state")):
        with pytest.raises(FileNotFoundError, match="missing") as error:
            wrong()
        assert isinstance(error.value, StateError)
    with pytest.raises(StateError, match="is a folder"):
        la.save(tmp_path)
    assert_same(everything(la, BASIC[0]), before)


def test_a_state_of_another_structure_is_refused_by_class_not_by_luck():
    case = BASIC[0]
    state = fitted(case, "diag").state_dict()
    la = FullLLLaplace(case.model(), "classification")
    with pytest.raises(StateError, match="'DiagLLLaplace' there, 'FullLLLaplace' here"):
        la.load_state_dict(state)
    la.fit(tensor_loader(case, 4))
    assert la.n_data == len(case.data()[1])
