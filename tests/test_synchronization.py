"""Loops do not wait for an accelerator: what is checked is gathered there, and read after the first batch and at the end.

On the CPU, where reading costs nothing, the library is told that it does, and what would wait is counted. Where there
is a CUDA device, PyTorch counts.
"""

import warnings

import pytest
import torch
from torch import nn

from laplace import Laplace, pending
from laplace.curvature import AutogradEF
from laplace.errors import InputError, ProcessError, UnsupportedError
from tests.synchronizations import Synchronizations
from tests.tools import assert_close

D, C, SIZE = 4, 3, 5


class Positions(nn.Module):
    """Outputs at every position, or at none."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, n_outputs)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def counts(*shape):
    return torch.randint(0, 4, shape).to(torch.get_default_dtype())


def masked(n):
    return torch.randint(0, C, (n, 3)).masked_fill(torch.arange(3 * n).reshape(n, 3) % 4 == 1, -100)


def labels_or_none(n):
    missing = torch.arange(n * C).reshape(n, C) % 5 == 1
    missing[1] = True
    return torch.randint(0, 2, (n, C)).double().masked_fill(missing, torch.nan)


DATA = {
    "classification": ("classification", C, (D,), lambda n: torch.randint(0, C, (n,))),
    "soft": ("classification", C, (D,), lambda n: torch.rand(n, C).softmax(-1)),
    "positions": ("classification", C, (3, D), lambda n: torch.randint(0, C, (n, 3))),
    "masked": ("classification", C, (3, D), masked),
    "regression": ("regression", C, (D,), lambda n: torch.randn(n, C)),
    "binary": ("binary", 1, (D,), lambda n: torch.randint(0, 2, (n,))),
    "multilabel": ("multilabel", C, (D,), labels_or_none),
    "poisson": ("poisson", C, (D,), lambda n: counts(n, C)),
    "heteroscedastic_regression": ("heteroscedastic_regression", 2, (D,), lambda n: torch.randn(n, 1)),
}


@pytest.fixture
def reading_waits(monkeypatch):
    """The host waits for numbers of every device."""
    monkeypatch.setattr(pending, "FREE", set())


def batches(name: str, n: int, device="cpu"):
    _, _, shape, targets = DATA[name]
    torch.manual_seed(1)
    return [(torch.randn(SIZE, *shape).to(device), targets(SIZE).to(device)) for _ in range(n)]


def approximation(name: str, structure: str = "kron", subset: str = "last_layer", device="cpu", **options):
    torch.manual_seed(2)
    likelihood, n_outputs, *_ = DATA[name]
    model = Positions(n_outputs).to(device)
    return Laplace(model, likelihood, subset_of_weights=subset, **{"hessian_structure": structure, **options})


def waits(call, device) -> int:
    """How often a call waits for a device."""
    if device.type == "cpu":
        with Synchronizations() as found:
            call()
        return found.count
    call()  # the first one loads kernels
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def fit_waits(n: int, name: str, device, *args, **options) -> int:
    data, la = batches(name, n, device), approximation(name, *args, device=device, **options)
    return waits(lambda: la.fit(data), device)


@pytest.mark.parametrize("name", DATA)
def test_a_last_layer_is_fitted_without_waiting_in_between(name, device, reading_waits):
    assert fit_waits(2, name, device) == fit_waits(7, name, device) <= 16


@pytest.mark.parametrize("structure", ["diag", "full", "ekfac"])
def test_so_it_is_with_any_structure(structure, device, reading_waits):
    assert fit_waits(2, "masked", device, structure) == fit_waits(7, "masked", device, structure)


@pytest.mark.parametrize("options", [{"stochastic": True}, {"stochastic": False}])
def test_all_weights_are_fitted_without_waiting_between_readings_of_layouts(options, device, reading_waits):
    # Layouts are read in passes 0, 1, 4, 16, ...
    found = [fit_waits(n, "regression", device, "kron", "all", backend_kwargs=options) for n in (6, 14)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("structure", "once_in_a_batch"), [("diag", 0), ("kron", 1)])
def test_only_factors_of_all_weights_ask_whether_labels_are_masked(structure, once_in_a_batch, device, reading_waits):
    found = [fit_waits(n, "classification", device, structure, "all") for n in (6, 14)]
    assert found[1] - found[0] == once_in_a_batch * (14 - 6)


PREDICTED = [
    ("classification", "last_layer", {"hessian_structure": "kron"}),
    ("poisson", "last_layer", {"hessian_structure": "diag"}),
    ("binary", "all", {"hessian_structure": "kron"}),
    ("regression", "all", {"hessian_structure": "full"}),
    ("regression", "last_layer", {"hessian_structure": "gp", "n_subset": 9}),
]


@pytest.mark.parametrize(("name", "subset", "options"), PREDICTED)
def test_a_prediction_waits_once_at_its_end(name, subset, options, device, reading_waits):
    la = approximation(name, subset=subset, device=device, **options)
    la.fit(batches(name, 3, device))
    x = batches(name, 1, device)[0][0]
    la(x), la(x)  # factorizes, compares with the network, reads layouts
    assert waits(lambda: la(x), device) == 1


def test_a_prediction_of_many_batches_waits_no_more_than_that_of_two(device, reading_waits):
    la = approximation("classification", device=device)
    la.fit(batches("classification", 3, device))
    la.predict(batches("classification", 1, device)[0][0])
    few, many = (iter(batches("classification", n, device)) for n in (2, 7))
    # The second call on a CUDA device finds its iterator read: the loaders are lists there.
    few, many = (list(part) for part in (few, many))
    found = [waits(lambda part=part: la.predict(Loader(part)), device) for part in (few, many)]
    assert found[0] == found[1] <= 2


class Loader:
    """Can be read again, and is no list."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("classification", 280), ("regression", 420)])
def test_tuning_waits_no_more_for_many_batches_than_for_two(name, most, device, reading_waits):
    x, y = (torch.cat(part) for part in zip(*batches(name, 12, device), strict=True))
    found = []
    for n in (2, 12):
        la = approximation(name, device=device)
        la.fit(batches(name, 6, device))
        parts = list(zip(x.chunk(n), y.chunk(n), strict=True))
        found.append(waits(lambda la=la, parts=parts: la.tune(parts), device))
    assert found[0] == found[1] <= most


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("structure", ["kron", "full"])
def test_what_is_learned_does_not_depend_on_when_flags_are_read(name, structure, monkeypatch):
    found = []
    for free in ({"cpu"}, set()):
        monkeypatch.setattr(pending, "FREE", free)
        la = approximation(name, structure)
        la.fit(batches(name, 4))
        found.append(la)
    now, later = found
    assert_close(later._fitted.curvature.to_dense(), now._fitted.curvature.to_dense())
    assert_close(later.loss, now.loss)
    assert (later.n_data, later._fitted.n_positions) == (now.n_data, now._fitted.n_positions)
    for kept, expected in zip(*(vars(la._kept).values() if la._kept else () for la in found), strict=True):
        assert not isinstance(kept, torch.Tensor) or torch.equal(kept.nan_to_num(-1), expected.nan_to_num(-1))
    assert (later._fitted.density is None) == (now._fitted.density is None)
    if now._fitted.density is not None:
        for part, expected in zip(later._fitted.density._tensors, now._fitted.density._tensors, strict=True):
            assert_close(part, expected)


@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_empirical_fishers_of_masked_positions_do_not_depend_on_it_either(subset, monkeypatch):
    found = []
    for free in ({"cpu"}, set()):
        monkeypatch.setattr(pending, "FREE", free)
        la = approximation("masked", "full", subset, backend=AutogradEF)
        la.fit(batches("masked", 3))
        found.append(la.H)
    assert_close(*found)


def spoil(x=None, y=None):
    def spoiled(data):
        inputs, targets = data[2]
        if x is not None:
            inputs.view(-1)[1] = x
        if y is not None:
            targets.view(-1)[1] = y
        return data

    return spoiled


NAN = float("nan")
FAULTS = {
    "a label that is no class": ("classification", spoil(y=C), InputError, "Batch 2 .*0..2 .*has 0..3"),
    "a label below zero": ("masked", spoil(y=-3), InputError, "Batch 2 .*has -100..2"),
    "an input that is NaN": ("classification", spoil(x=NAN), InputError, "Batch 2 .*1 of 5 rows hold NaN"),
    "a target that is NaN": ("regression", spoil(y=NAN), InputError, "Batch 2 .*Regression targets must be finite"),
    "soft labels": ("soft", spoil(y=2.0), InputError, "Batch 2 .*sum to one"),
    "a count": ("poisson", spoil(y=0.5), InputError, "Batch 2 .*takes counts"),
    "a binary target": ("binary", spoil(y=2), InputError, "Batch 2 .*0 or 1"),
    "a label of several": ("multilabel", spoil(y=1.5), InputError, "Batch 2 .*between them"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_that_comes_later_is_the_same(fault, monkeypatch):
    name, spoiled, error, says = FAULTS[fault]
    messages = []
    for free in ({"cpu"}, set()):
        monkeypatch.setattr(pending, "FREE", free)
        la = approximation(name)
        la.fit(batches(name, 2))
        before = la.H.to_matrix()
        with pytest.raises(error, match=says) as caught:
            la.fit(spoiled(batches(name, 5)))
        assert torch.equal(la.H.to_matrix(), before)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["classification", "masked"])
def test_probabilities_are_no_logits_when_seen_later_either(name, reading_waits):
    model = Positions(C)
    with torch.no_grad():
        model.last.weight.zero_()
        model.last.bias.copy_(torch.tensor([0.2, 0.3, 0.5]))
    with pytest.raises(UnsupportedError, match="are probabilities"):
        Laplace(model, "classification").fit(batches(name, 5))


def test_an_error_comes_at_most_so_many_batches_late(reading_waits, monkeypatch):
    monkeypatch.setattr(pending, "EVERY", 4)
    taken, data = [], spoil(y=C)(batches("classification", 20))
    with pytest.raises(InputError, match="Batch 2 "):
        approximation("classification").fit(taken.append(1) or batch for batch in data)
    assert len(taken) <= 5


def test_a_prediction_says_at_its_end_what_is_wrong(reading_waits):
    la = approximation("classification")
    la.fit(batches("classification", 2))
    x = batches("classification", 1)[0][0]
    with pytest.raises(InputError, match="1 of 5 rows hold NaN"):
        la(x.index_fill(0, torch.tensor([2]), NAN))
    with torch.no_grad():
        la.model.model.last.bias.add_(1)
    with pytest.warns(UserWarning, match="have changed since fit"):
        la(x)


def test_the_counter_sees_what_waits_and_nothing_else():
    x = torch.arange(6.0)
    asks = [
        lambda: float(x.sum()), lambda: bool((x > 1).any()), lambda: x[x > 1], lambda: x.tolist(), lambda: x.numpy(),
        lambda: torch.equal(x, x), lambda: torch.allclose(x, x), lambda: x.nonzero(), lambda: x.unique(),
        lambda: torch.tensor(3.0, device="cpu"), lambda: x.new_tensor([1.0]), lambda: x[[0, 2]],
        lambda: x.repeat_interleave(torch.ones(6, dtype=torch.long)), lambda: torch.linalg.cholesky(torch.eye(2)),
    ]  # fmt: skip
    for ask in asks:
        with Synchronizations() as found:
            ask()
        assert found.count >= 1
    with Synchronizations() as found:
        y = x.clone()
        y[y > 1] = 0.0
        torch.where(x > 1, x, 0.0).sum(), x[2:], x[torch.arange(2)], x.sort(), torch.full((), 3.0, device="cpu")
        torch.linalg.cholesky_ex(torch.eye(2)), x.repeat_interleave(2)
    assert not found.count, str(found)


def test_flags_do_not_hide_that_another_process_failed(reading_waits):
    """All know of that one; a second error would be told to processes that are gone."""

    def run(error):
        with pending.gathered():
            pending.refuse(torch.tensor(True), InputError, lambda: "an earlier flag")
            raise error

    with pytest.raises(ProcessError, match="another one"):
        run(ProcessError("another one"))
    with pytest.raises(InputError, match="an earlier flag"):
        run(RuntimeError("this one"))
