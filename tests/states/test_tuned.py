"""States of objects whose head, width and mixture `tune` chose."""

import copy
import functools

import pytest
import torch

from laplace import Laplace
from laplace.errors import StateError
from tests.baselaplace.recipes import classification


@functools.cache
def _saved():
    data = classification()
    la = Laplace(data.model, "classification")
    la.fit(data.train)
    la.tune(data.val, average="mixture")
    return data, la.state_dict()


def saved():
    """Data, and a state without digest, so that entries themselves are looked at."""
    data, state = _saved()
    state = copy.deepcopy(state)
    del state["digest"]
    return data, state


def test_nothing_of_a_state_is_data():
    data, state = saved()
    rows = {len(x) for x, _ in data.train} | {sum(len(x) for x, _ in data.train)}

    def sizes(value):
        if isinstance(value, torch.Tensor):
            yield from value.shape
        elif isinstance(value, dict):
            for each in value.values():
                yield from sizes(each)
        elif isinstance(value, list):
            for each in value:
                yield from sizes(each)

    assert not rows & set(sizes(state))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("trained",), torch.zeros(3)),
        (("trained",), torch.full((15,), torch.nan)),
        (("adjustments", "weight_uncertainty"), 1),
        (("adjustments", "scale"), -1.0),
        (("adjustments", "excess"), {"q50": 1.0}),
        (("adjustments", "reference", "source"), "test"),
        (("adjustments", "mixture", "head"), [0, 99]),
        (("adjustments", "mixture", "shares"), [2.0]),
        (("adjustments", "mixture", "temperatures"), [0.0]),
        (("adjustments", "mixture", "scales"), []),
        (("adjustments", "mixture", "heads"), torch.zeros(2, 3)),
        (("density", "counts"), torch.tensor([-1.0, 2.0, 3.0])),
        (("adjustments",), None),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*no digest")
def test_entries_that_are_wrong_are_refused_and_change_nothing(path, value):
    data, state = saved()
    la = Laplace(data.model, "classification")
    la.load_state_dict(state)
    before = la(4 * data.test)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(StateError):
        la.load_state_dict(state)
    assert torch.equal(la(4 * data.test), before)
