"""Models that round: TF32, bfloat16 and float16, in which layouts are told and formulas checked all the same."""

import pytest
import torch
from torch import nn

from laplace.curvature import AutogradGGN, layouts, memory
from laplace.curvature.layers import READERS
from laplace.curvature.roles import Sum
from laplace.errors import InputError, PerformanceWarning, ShapeError
from laplace.structures import Kron
from tests.networks import Applied, encoder, parameter
from tests.tools import assert_close

LOW = [torch.bfloat16, torch.float16]


class Rounded(torch.autograd.Function):
    """To 10 bits of mantissa, forward and backward: what convolutions do on a GPU."""

    @staticmethod
    def forward(ctx, x):
        return Rounded.of(x)

    @staticmethod
    def backward(ctx, g):
        return Rounded.of(g)

    @staticmethod
    def of(x):
        bits = x.detach().contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class Convolution(nn.Conv2d):
    def forward(self, x):
        return Rounded.apply(super().forward(x))


def convolutional(layer=nn.Conv2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        layer(1, 4, 3, padding=1), nn.ReLU(), layer(4, 4, 3, padding=1), nn.ReLU(), layer(4, 4, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    ).eval()  # fmt: skip


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 6, 6, dtype=torch.float32), torch.randint(3, (n,))


def sequences(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randint(7, (n, 4)), torch.randint(3, (n,))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return encoder().float().eval()


@pytest.fixture(autouse=True)
def single_precision():
    """These models and their data are in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def compare(model, exact, x, y, tolerance, **autocast):
    """A diagonal and factors without row-by-row derivatives (whose warning would be an error), at some precision."""
    engine, wide = AutogradGGN(model, "classification"), AutogradGGN(exact.double(), "classification")
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        assert not engine.derivatives(x).verdict.slow
        diagonal, kron = engine.diag(x, y)[1], engine.kron(x, y, N=1)[1]
    x = x.double() if x.is_floating_point() else x
    assert relative(diagonal, wide.diag(x, y)[1]) < tolerance
    expected = wide.kron(x, y, N=1)[1]
    assert kron.counts == expected.counts
    for ours, theirs in zip(kron.kfacs, expected.kfacs, strict=True):
        assert [side.shape for side in ours] == [side.shape for side in theirs]
    assert relative(kron.diag(), expected.diag()) < tolerance


@pytest.mark.parametrize("n", [5, 150])
def test_rounded_convolutions_have_their_formulas(n):
    compare(convolutional(Convolution), convolutional(), *images(n), 5e-3)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("build", "data"), [(convolutional, images), (transformer, sequences)])
def test_autocast_models_have_their_formulas(build, data, dtype):
    compare(build(), build(), *data(20), 20 * torch.finfo(dtype).eps, dtype=dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("build", "data"), [(convolutional, images), (transformer, sequences)])
def test_models_of_low_precision_have_their_formulas(build, data, dtype):
    x, y = data(20)
    x, model = (x.to(dtype) if x.is_floating_point() else x), build().to(dtype)
    exact = build()
    exact.load_state_dict(model.state_dict())
    compare(model, exact, x, y, 20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_wrong_formulas_are_found_in_every_precision(dtype, monkeypatch):
    read, names = READERS[nn.functional.linear]

    def wrong(out, call):
        return [(t, Sum(lambda g: 1.5 * g, 1) if isinstance(role, Sum) else role) for t, role in read(out, call)]

    monkeypatch.setitem(READERS, nn.functional.linear, (wrong, names))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    engine, x = AutogradGGN(model, "classification"), torch.randn(64, 3).to(dtype)
    assert set(engine.derivatives(x).verdict.slow) == {1, 3}
    with pytest.warns(PerformanceWarning, match=r"'0\.bias': part of its use"):
        engine.diag(x, torch.randint(3, (64,)))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_rows_that_depend_on_each_other_are_found_in_every_precision(dtype):
    torch.manual_seed(0)
    model = Applied(
        lambda m, x: m.head(torch.tanh(m.first(x) - m.first(x).mean(0))), first=nn.Linear(3, 6), head=nn.Linear(6, 3)
    ).to(dtype)
    engine, x = AutogradGGN(model, "classification"), torch.randn(40, 3).to(dtype)
    assert {0} <= set(engine.derivatives(x).verdict.slow)
    with pytest.raises(InputError, match=r"depend on the other rows"):
        engine.diag(x, torch.randint(3, (40,)))


def test_the_slow_way_of_a_known_function_is_named_once_with_its_reason():
    def forward(m, x):
        return m.head(torch.tanh(m.first(x) + m.shift.repeat(len(x), 1)))

    model = Applied(forward, first=nn.Linear(3, 4), shift=parameter(1, 4), head=nn.Linear(4, 3)).float()
    engine, x, y = AutogradGGN(model, "classification"), torch.randn(6, 3), torch.randint(3, (6,))
    with pytest.warns(PerformanceWarning, match=r"one datum at a time.*: 'shift': its use mixes the data") as caught:
        engine.diag(x, y)
    assert len(caught) == 1
    engine.diag(x, y)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("n", [1, 2, 8, 9, 128, 129, 1000, 20000])
def test_weights_tell_all_data_apart_and_are_powers_of_two(n, narrow):
    weights = layouts.datum_weights(n, narrow, torch.device("cpu"))
    assert len(weights.unique(dim=1).T) == n
    assert bool((weights.abs().log2() == weights.abs().log2().round()).all())
    assert len(layouts.names_of(weights).unique()) == n
    if n <= 128 and not narrow:
        assert len(weights) == 1, "one more backward pass for batches of usual size"


def test_what_is_remembered_of_shapes_is_bounded_and_the_last_used_stays():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    engine, x = AutogradGGN(model, "classification"), torch.randn(memory.KEPT + 20, 3)
    for n in range(2, len(x)):
        assert engine.derivatives(x[:n]).layouts
        assert engine.derivatives(x[:2]).layouts
    known = engine._engine.memory.layouts
    assert len(known) == memory.KEPT
    assert {key[0] for key in known} == {2, *range(len(x) - memory.KEPT + 1, len(x))}


def test_factors_of_another_form_do_not_add_up_in_words():
    two, one = [torch.eye(2), torch.eye(3)], [torch.eye(6)]
    with pytest.raises(ShapeError, match=r"parameter 1 .*\[\[2, 2\], \[3, 3\]\] and \[\[6, 6\]\].*do not add up"):
        Kron([one, two]) + Kron([one, one])
    with pytest.raises(ShapeError, match=r"of 1 and of 2 parameters"):
        Kron([one]) + Kron([one, one])
    assert_close((Kron([one]) + Kron([one])).to_matrix(), 2 * torch.eye(6))


class Mixing(nn.Module):
    """Two layers, a factor between them, and a trace of the mean over the batch."""

    def __init__(self, factor=1.0, mix=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.factor, self.mix = factor, mix
        self.float()

    def forward(self, x):
        h = self.first(x.flip(0)).relu().flip(0)  # rows in another order
        return self.head(self.factor * (h + self.mix * h.mean(0, keepdim=True)))


@pytest.mark.parametrize("n", [2, 3, 16, 130])
@pytest.mark.parametrize("mix", [1e-3, 1e-4])
def test_a_trace_of_other_data_is_seen_in_float32(n, mix):
    engine, x = AutogradGGN(Mixing(mix=mix), "classification"), torch.randn(n, 4, dtype=torch.float32)
    with pytest.warns(PerformanceWarning, match=r"'first.weight': its use mixes the data"):
        engine.jacobians(x)


@pytest.mark.parametrize("n", [2, 5, 129, 200, 1000])
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e25])
def test_rows_are_told_apart_whatever_the_size_of_gradients(n, factor):
    model, x = Mixing(factor), torch.randn(n, 4, dtype=torch.float32)
    x[0] = 0
    J, _ = AutogradGGN(model, "classification").jacobians(x)
    active = (model.first(x) > 0).double()
    truth = factor * torch.einsum("kh,bh,bi->bkhi", model.head.weight.double(), active, x.double()).flatten(2)
    assert float(((J[..., :20].double() - truth).norm() / truth.norm()).detach()) < 1e-5


def test_gradients_next_to_nothing_that_mix_data_are_refused():
    engine, x = AutogradGGN(Mixing(1e-25, 0.5), "classification"), torch.randn(8, 4, dtype=torch.float32)
    with pytest.warns(PerformanceWarning, match="mixes the data"):
        engine.jacobians(x)
