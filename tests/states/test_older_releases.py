"""States that earlier releases saved load ever after, and give the numbers that were seen then."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

import laplace
from laplace.laplace import ESTIMATORS, FUNCTIONAL
from tests.states.situations import SITUATIONS, build, fitted, seen

FOLDERS = sorted(path for path in Path(__file__).parent.glob("v*") if path.is_dir())
SAVED = [pytest.param(folder, name, id=f"{folder.name}-{name}") for folder in FOLDERS for name in SITUATIONS]


@pytest.mark.parametrize(("folder", "name"), SAVED)
def test_a_state_of_an_earlier_release_gives_the_numbers_that_were_seen(folder, name):
    la = build(name)
    without_digest = pytest.warns(UserWarning, match=r"no digest.*la\.save")
    with without_digest if folder.name == "v3" else contextlib.nullcontext():
        la.load(folder / f"{name}.pt")
    expected = json.loads((folder / "expected.json").read_text())[name]
    found = seen(la, name)
    assert found.keys() == expected.keys()
    single = name == "single_precision"
    for key, value in expected.items():
        if isinstance(value, (str, int)):
            assert found[key] == value, key
        else:
            ours, theirs = torch.tensor(found[key]), torch.tensor(value)
            rtol, atol = (1e-4, 1e-5) if single or name == "double_curvature" else (1e-9, 1e-11)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    again = build(name)
    again.load_state_dict(la.state_dict())
    assert seen(again, name) == found, "saved by this release it has a digest, and loads without a warning"


def test_there_is_a_state_of_every_class():
    classes = {cls.__name__ for cls in [*ESTIMATORS.values(), *FUNCTIONAL.values()]}
    assert len(classes) == 20
    for folder in FOLDERS:
        recorded = json.loads((folder / "expected.json").read_text())
        assert classes <= {entry["class"] for entry in recorded.values()}
        assert all(hasattr(laplace, entry["class"]) for entry in recorded.values())


@pytest.mark.parametrize("name", ["all_full", "all_kron", "last_layer_ekfac", "all_lowrank", "subnetwork_diag"])
def test_what_was_assigned_by_hand_is_saved_though_its_loss_is_not_known(name):
    la, again = fitted(name), build(name)
    la.H = la.H
    la.mean = getattr(la, "mean_subnet", la.mean) + 0.125
    again.load_state_dict(la.state_dict())
    assert torch.equal(again.mean, la.mean)
    assert again.state_dict()["digest"] == la.state_dict()["digest"]
    with pytest.raises(AttributeError, match="assigned by hand"):
        again.log_marginal_likelihood()
