"""Saving, loading, moving and copying what was learned."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from laplace.baselaplace import statefile
from laplace.errors import NotFittedError
from tests.cases import ADDITIVE, BASIC, named
from tests.contracts import generator
from tests.estimators import basic_cases, dense, estimator, every_structure, everything, fitted
from tests.tools import assert_close, assert_same

HYPERPARAMETERS = {"prior_precision": 0.3, "prior_mean": 0.1, "temperature": 0.9}


def leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]


def written(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


# -- what a state is --------------------------------------------------------------------------------------------------


@every_structure
@basic_cases
def test_a_state_holds_tensors_and_plain_values_that_torch_reads_safely(case, structure):
    state = fitted(case, structure, **HYPERPARAMETERS).state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {torch.Tensor, int, float, str, bool, type(None)}
    assert not any(leaf.requires_grad for leaf in leaves(state) if isinstance(leaf, torch.Tensor))
    again = torch.load(io.BytesIO(written(state)), weights_only=True)
    assert again.keys() == state.keys()
    for ours, theirs in zip(leaves(again), leaves(state), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@basic_cases
def test_a_state_names_its_schema_and_the_weights_it_was_made_for(case):
    model = case.model()
    state = fitted(case, "kron", model).state_dict()
    assert state["schema_version"] == statefile.SCHEMA_VERSION
    assert state["fingerprint"] == statefile.fingerprint(model) == statefile.fingerprint(case.model())
    with torch.no_grad():
        model.body[0].weight[0, 0] += 1e-12
    assert state["fingerprint"] != statefile.fingerprint(model)


def test_the_fingerprint_sees_whatever_a_model_saves_in_any_dtype_and_no_caches():
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.BatchNorm1d(2), nn.Linear(2, 2).half())
        model.register_buffer("flag", torch.tensor(True))
        model.register_buffer("cache", torch.zeros(3, 2), persistent=False)
        model.register_buffer("empty", torch.zeros(0))
        model.register_buffer("columns", torch.zeros(3, 2).T)
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        return model

    prints = {statefile.fingerprint(build())}
    assert statefile.fingerprint(build()) in prints
    for change in ("0.bias", "1.running_mean", "1.num_batches_tracked", "2.weight", "flag", "cache"):
        model = build()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            tensors[change].view(-1)[-1:] = 0 if change == "flag" else 7
        prints.add(statefile.fingerprint(model))
    assert len(prints) == 6


@pytest.mark.every(4)
@every_structure
@basic_cases
def test_a_state_holds_no_training_example(case, structure):
    x, y = case.data()
    state = fitted(case, structure).state_dict()
    content = written(state)
    for row in range(len(y)):
        assert x[row].numpy().tobytes() not in content
        if y.is_floating_point():
            assert y[row].numpy().tobytes() not in content
    more = estimator(case, structure)
    more.fit(case.batches(4) * 20)
    assert len(written(more.state_dict())) == len(content), "the size does not grow with the data"


# -- round trips ------------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("case", [*BASIC, named("average"), named("no_bias_regression"), named("masked_rows")], ids=str)
def test_a_fresh_object_that_loads_a_file_predicts_the_same_numbers(case, structure, tmp_path):
    la = fitted(case, structure, **HYPERPARAMETERS)
    la.save(tmp_path / "state")
    fresh = estimator(case, structure)
    assert fresh.load(tmp_path / "state") is None
    assert_same(everything(fresh, case), everything(la, case))
    assert (fresh.n_data, fresh.n_outputs, fresh.temperature) == (la.n_data, la.n_outputs, 0.9)
    assert fresh.model.last_layer_name == "head"


@every_structure
@basic_cases
def test_a_loaded_object_goes_on_like_the_original(case, structure):
    """It adds data, tunes its prior and is saved again."""
    la, fresh = fitted(case, structure), estimator(case, structure)
    fresh.load_state_dict(la.state_dict())
    for each in (la, fresh):
        each.fit(case.batches(4), override=structure not in ADDITIVE)
        each.optimize_prior_precision(n_steps=3)
    assert_same(everything(fresh, case), everything(la, case))
    assert written(fresh.state_dict()) == written(la.state_dict())


@pytest.mark.parametrize(
    "precision", [torch.tensor([0.5, 2.0]), torch.linspace(0.5, 2.0, 28)], ids=["groups", "weights"]
)
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_priors_of_any_shape_are_saved(structure, precision, tmp_path):
    case = BASIC[0]
    la = fitted(case, structure, prior_precision=precision, prior_mean=torch.linspace(-1, 1, 28))
    la.save(tmp_path / "state")
    fresh = estimator(case, structure)
    fresh.load(tmp_path / "state")
    assert torch.equal(fresh.prior_precision, precision)
    assert_same(everything(fresh, case), everything(la, case))


def test_damping_and_noise_are_saved():
    case = BASIC[1]
    la = fitted(case, "kron", damping=True, sigma_noise=0.4)
    fresh = estimator(case, "kron")
    fresh.load_state_dict(la.state_dict())
    assert fresh.damping is True
    assert_same(everything(fresh, case), everything(la, case))


@every_structure
@basic_cases
def test_later_changes_of_a_state_do_not_reach_the_object_that_loaded_it(case, structure):
    la, fresh = fitted(case, structure), estimator(case, structure)
    state, before = la.state_dict(), everything(la, case)
    fresh.load_state_dict(state)
    for leaf in leaves(state):
        if isinstance(leaf, torch.Tensor):
            leaf.fill_(1e6)
    assert_same(everything(fresh, case), before)


@every_structure
def test_a_state_is_read_into_the_precision_asked_for(structure):
    case = BASIC[0]
    la, narrow = fitted(case, structure), estimator(case, structure, curvature_dtype=torch.float32)
    narrow.load_state_dict(la.state_dict())
    assert narrow.mean.dtype == narrow.prior_precision.dtype == dense(narrow.H).dtype == torch.float32
    torch.testing.assert_close(narrow(case.test_inputs()), la(case.test_inputs()), rtol=1e-4, atol=1e-5)


@every_structure
def test_loading_puts_everything_on_the_models_device(structure, device, tmp_path):
    case = BASIC[0]
    la = fitted(case, structure)
    la.save(tmp_path / "state")
    fresh = estimator(case, structure, case.model().to(device))
    for location in (None, "cpu", device, lambda storage, _location: storage):
        fresh.load(tmp_path / "state", map_location=location)
        found = [*leaves(fresh.state_dict()), fresh(case.test_inputs().to(device))]
        assert {leaf.device.type for leaf in found if isinstance(leaf, torch.Tensor)} == {device.type}
    assert_close(found[-1].cpu(), la(case.test_inputs()))


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state", "state.pt"])
def test_a_failure_while_writing_leaves_the_old_file_and_no_litter(name, tmp_path, monkeypatch):
    case = BASIC[0]
    la, path = fitted(case, "diag"), tmp_path / name
    la.save(path)
    old = path.read_bytes()

    def fails(state, file):
        file.write(b"half a state")
        raise OSError("disk full")

    la.prior_precision = 5.0
    with monkeypatch.context() as patch:
        patch.setattr(statefile.torch, "save", fails)
        with pytest.raises(OSError, match="disk full"):
            la.save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [name]
    la.save(str(path))
    assert path.read_bytes() != old
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_saving_and_the_state_need_a_fit(tmp_path):
    la = estimator(BASIC[0], "diag")
    for request in (la.state_dict, lambda: la.save(tmp_path / "state")):
        with pytest.raises(NotFittedError, match="fit"):
            request()
    assert list(tmp_path.iterdir()) == []


# -- copies and devices -----------------------------------------------------------------------------------------------


@pytest.mark.every(3)
@every_structure
@basic_cases
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda la: pickle.loads(pickle.dumps(la))], ids=["deepcopy", "pickle"]
)
def test_copies_predict_the_same_numbers(case, structure, clone):
    model = case.model()
    la = fitted(case, structure, model, **HYPERPARAMETERS)
    delta = torch.tensor(2.0, requires_grad=True)
    la.log_marginal_likelihood(prior_precision=delta * 1.5).backward()
    before = everything(la, case)
    twin = clone(la)
    assert_same(everything(twin, case), before)
    assert twin.prior_precision.is_leaf
    assert la.prior_precision.requires_grad, "the original keeps its graph"
    twin.prior_precision = 7.0
    twin.fit(case.batches(4), override=structure not in ADDITIVE)
    assert_same(everything(la, case), before)


@every_structure
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda la: pickle.loads(pickle.dumps(la))], ids=["deepcopy", "pickle"]
)
def test_a_generator_of_the_back_end_is_copied_with_its_state(structure, clone):
    case, noise = BASIC[0], generator(3)
    la = fitted(case, structure, backend_kwargs={"stochastic": True, "num_samples": 2, "generator": noise})
    twin = clone(la)
    assert_same(everything(twin, case), everything(la, case))
    for each in (la, twin):
        each.fit(case.batches(4))
    assert_same(everything(twin, case), everything(la, case))


@every_structure
@basic_cases
def test_a_fitted_object_moves_to_a_device(case, structure, device):
    la = fitted(case, structure, **HYPERPARAMETERS)
    la.temperature = torch.tensor(0.9)
    before = la(case.test_inputs())
    la(case.test_inputs())
    assert la.to(device) is la
    result = la(case.test_inputs().to(device))
    for ours, theirs in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (result, before)), strict=True):
        assert ours.device.type == device.type
        assert_close(ours.cpu(), theirs)
    found = [*leaves(la.state_dict()), la.temperature, la.log_marginal_likelihood(), la.sample(2)]
    assert {leaf.device.type for leaf in found if isinstance(leaf, torch.Tensor)} == {device.type}
    unfitted = estimator(case, structure).to(device)
    unfitted.fit(case.batches(4))
    assert unfitted.mean.device.type == device.type


def test_a_state_is_written_to_and_read_from_an_open_file():
    case = BASIC[0]
    la, file = fitted(case, "kron", **HYPERPARAMETERS), io.BytesIO()
    la.save(file)
    file.seek(0)
    other = estimator(case, "kron")
    other.load(file)
    assert torch.equal(other.mean, la.mean)
    assert other.log_marginal_likelihood() == la.log_marginal_likelihood()
