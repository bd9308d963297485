"""States that laplace-torch 0.2.2 and 0.3 saved (``benchmarks/record_states.py``) give its posterior, evidence, predictions."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import NotFittedError, StateError
from laplace.utils.matrix import Kron
from tests.states.situations import PEER, build, fitted
from tests.tools import assert_close

FOLDERS = sorted((Path(__file__).parent / "laplace_torch").iterdir())
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def state_of(name: str, folder: Path = FOLDERS[-1]) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_all_of_both_releases_are_there():
    assert [folder.name for folder in FOLDERS] == ["0.2.2", "0.3"]
    for folder in FOLDERS:
        assert {path.stem for path in folder.glob("*.pt")} == set(PEER)


@folders
@pytest.mark.parametrize("name", PEER)
def test_a_state_of_laplace_torch_gives_what_it_computed(folder, name):
    la = build(name)
    la.load(folder / f"{name}.pt")
    precision = la.posterior_precision
    result = la(PEER[name][-1])
    found = {
        "mean": la.mean,
        "evidence": la.log_marginal_likelihood(),
        "precision": precision.to_matrix() if hasattr(precision, "to_matrix") else precision,
    }
    found |= {f"prediction {i}": part for i, part in enumerate(result if isinstance(result, tuple) else [result])}
    expected = json.loads((folder / "expected.json").read_text())[name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], torch.tensor(value), key)


@pytest.mark.parametrize("name", ["classify_all_kron", "regress_last_layer_full", "classify_subnetwork_diag"])
def test_what_was_read_goes_on_as_an_own_fit_and_is_saved_as_an_own_state(name):
    la, own = build(name), fitted(name)
    la.load_state_dict(state_of(name))
    again = build(name)
    again.load_state_dict(la.state_dict())  # no warning: it has a digest
    assert torch.equal(again(PEER[name][-1])[0], la(PEER[name][-1])[0])
    *_, x, y, _ = PEER[name]
    for each in (la, own):
        each.fit([(x, y)], override=False)
        each.prior_precision = 0.75
    assert_close(la.log_marginal_likelihood(), own.log_marginal_likelihood())


@pytest.mark.parametrize("name", ["classify_all_kron", "classify_last_layer_diag"])
def test_what_is_missing_is_named(name):
    whole = state_of(name)
    for key in whole:
        la = build(name)
        with pytest.raises(StateError, match=rf"incomplete: it has no entry '{key}'"):
            la.load_state_dict({other: value for other, value in whole.items() if other != key})
        with pytest.raises(NotFittedError):
            la.state_dict()


def damaged(**changes) -> dict:
    return {**state_of("classify_all_kron"), **changes}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (damaged(more=1), "does not know: 'more'"),
        (damaged(cls_name="DiagLaplace"), "cls_name is 'DiagLaplace' there, 'KronLaplace' here"),
        (damaged(likelihood="regression"), "likelihood is 'regression' there"),
        (damaged(mean=torch.zeros(17)), "weights of the model are not those in the state"),
        (damaged(mean=torch.zeros(3)), "weights of the model are not those in the state"),
        (damaged(H=torch.eye(17)), "'H' must be a list"),
        (damaged(H=[[torch.eye(2)]]), "'sums'.*list of 4 entries"),
        (damaged(H=[[torch.eye(3), torch.full((2, 2), torch.nan)]] * 4), "finite"),
        (damaged(H=Kron([[torch.eye(17)]])), r"the state\['H'\] must be a tensor"),
        (damaged(prior_precision=torch.tensor([-1.0])), "'prior_precision'"),
        (damaged(loss="many"), "'loss'"),
        (damaged(n_data=0), "'n_data'"),
    ],
)
def test_damaged_states_are_refused_and_change_nothing(state, says):
    la = build("classify_all_kron")
    with pytest.raises(StateError, match=says):
        la.load_state_dict(state)
    with pytest.raises(NotFittedError):
        la.state_dict()


def test_other_structures_say_what_can_be_read():
    model, likelihood, *_ = PEER["classify_all_full"]
    for structure in ("ekfac", "gp"):
        la = Laplace(model(), likelihood, "all", structure, **({"n_subset": 3} if structure == "gp" else {}))
        with pytest.raises(StateError, match=r"laplace-torch.*'full', 'kron' and 'diag'"):
            la.load_state_dict(state_of("classify_all_full"))


def test_a_last_layer_is_found_by_the_saved_batch_or_named():
    name = "classify_last_layer_full"
    state, model = state_of(name), PEER[name][0]
    la = build(name)
    la.load_state_dict(state)
    assert la.model.last_layer_name == "2"
    with pytest.raises(StateError, match="last_layer_name="):
        build(name).load_state_dict({**state, "data": None})
    named = Laplace(model(), "classification", "last_layer", "full", last_layer_name="2")
    named.load_state_dict({**state, "data": None})
    build(name).load_state_dict({**state, "data": None, "_last_layer_name": "2"})
    with pytest.raises(StateError, match=r"'0'.*'2'"):
        named.load_state_dict({**state, "_last_layer_name": "0"})


def test_a_file_with_other_objects_says_how_to_read_it_at_ones_own_risk(tmp_path):
    name = "classify_last_layer_full"
    state = {**state_of(name), "data": nn.Linear(1, 1)}
    torch.save(state, tmp_path / "state")
    with pytest.raises(
        StateError, match=r"you trust it: la\.load_state_dict\(torch\.load\(path, weights_only=False\)\)"
    ):
        build(name).load(tmp_path / "state")
    la = Laplace(PEER[name][0](), "classification", "last_layer", "full", last_layer_name="2")
    la.load_state_dict(torch.load(tmp_path / "state", weights_only=False))
    assert la.n_data == 8
