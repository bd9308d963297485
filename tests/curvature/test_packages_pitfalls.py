"""Models that packages get wrong without a word: every back end of theirs is right about them, or refuses them."""

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from laplace import Laplace, curvature
from laplace.curvature import BACKENDS, AutogradEF, AutogradGGN, AutogradHessian, by_autograd
from laplace.curvature.package import PackageInterface
from laplace.errors import UnsupportedError
from laplace.network.parameters import ParameterSubset
from tests.contracts import model_untouched
from tests.networks import Applied
from tests.tools import assert_close

PACKAGES = tuple(cls for cls in BACKENDS if issubclass(cls, PackageInterface))
every_package = pytest.mark.parametrize("cls", PACKAGES, ids=lambda cls: cls.__name__)
OURS = {"GGN": AutogradGGN, "empirical Fisher": AutogradEF, "Hessian": AutogradHessian}


def plain(forward=None, **further: Any) -> nn.Module:
    def default(m, x):
        return m.b(torch.tanh(m.a(x)))

    return Applied(forward or default, a=nn.Linear(3, 4), b=nn.Linear(4, 3), **further).double()


def closure() -> nn.Module:
    """A function on the model that holds on to its weights: a copy still calls the original's."""
    model = plain(lambda m, x: m.b(torch.tanh(m.a(x))) * m.size())
    model.size = lambda: model.a.weight.square().sum()
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].register_forward_hook(lambda _m, _i, out: 2 * out)
    return model


def sorted_rows() -> nn.Module:
    """As recurrent networks sort by length; the first row stays the first."""

    def forward(m, x):
        order = x[:, 0].argsort(descending=True)
        return m.b(torch.tanh(m.a(x[order]))[order.argsort()])

    return plain(forward)


@torch.jit.script
def scaled(w: torch.Tensor) -> torch.Tensor:
    return w.sum() * 0.1


def scripted() -> nn.Module:
    return plain(lambda m, x: m.b(torch.tanh(m.a(x))) * scaled(m.a.weight))


def gained() -> nn.Module:
    model = plain(lambda m, x: m.b(torch.tanh(m.a(x) * m.a.gain)))
    model.a.gain = nn.Parameter(torch.tensor(1.5))
    return model


def images(*layers: nn.Module, features: int) -> nn.Module:
    for layer in layers:
        layer.requires_grad_(False)
    return nn.Sequential(nn.Conv2d(2, 2, 3), *layers, nn.Flatten(), nn.Linear(features, 3)).double()


VECTORS = {"closure": closure, "hooked": hooked, "sorted_rows": sorted_rows, "scripted": scripted, "gained": gained}
IMAGES = {
    "frozen_circular": lambda: images(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), features=50),
    "frozen_reflect": lambda: images(nn.Conv2d(2, 2, 3, padding=2, padding_mode="reflect"), features=98),
    "frozen_same": lambda: images(nn.Conv2d(2, 2, 3, padding="same"), features=50),
    "divided_pool": lambda: images(nn.AvgPool2d(2, divisor_override=3), features=8),
    "ceiled_pool": lambda: images(nn.AvgPool2d(2, ceil_mode=True), features=18),
}


def data(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(5, 2, 7, 7) if name in IMAGES else torch.randn(5, 3)
    if name == "sorted_rows":
        x[0, 0] = 9.0
    return x, torch.tensor([0, 1, 2, 1, 0])


def compute(engine, x, y, quantity):
    if quantity == "jacobians":
        return engine.jacobians(x)[0]
    if quantity == "kron":
        sums = engine.kron(x, y, N=1)[1]
        return sums.divide_inputs(sums.counts).to_matrix()
    found = getattr(engine, quantity)(x, y)
    return found[0] if quantity == "gradients" else found[1]


# Ours takes the slow way for a weight that a script uses, and says so.
@pytest.mark.every(4)
@pytest.mark.filterwarnings("ignore:Some weights are differentiated one datum at a time")
@pytest.mark.parametrize("name", [*VECTORS, *IMAGES])
@every_package
def test_what_hooks_cannot_see_is_never_silently_wrong(cls, name):
    model, (x, y) = {**VECTORS, **IMAGES}[name](), data(name)
    refused, instead = 0, []
    for quantity in [*sorted(s.value for s in cls.structures), "jacobians", "gradients"]:
        # The factors of curvlinops are right about hooks of any kind but miss a weight that a script uses.
        if (name, cls.package, quantity) == ("scripted", "curvlinops", "kron"):
            continue
        with model_untouched(model):
            try:
                found = compute(cls(model, "classification"), x, y, quantity)
            except UnsupportedError as error:
                refused += 1
                instead.append(str(error))
                continue
        assert_close(found, compute(OURS[cls.matrix](model, "classification"), x, y, quantity), quantity)
    assert all("Autograd" in message for message in instead)
    if name in ("closure", "gained") and cls.package != "curvlinops":
        assert refused == len(cls.structures) + 2


@every_package
def test_state_of_the_model_is_not_written_by_the_copy(cls):
    """A buffer that each forward pass counts up is that of the passes of the model itself."""

    def forward(m, x):
        m.passes = m.passes + 1
        return m.b(torch.tanh(m.a(x)))

    model, (x, y) = plain(forward), data("")
    model.register_buffer("passes", torch.zeros(()))
    engine = cls(model, "classification")
    model(x)
    with contextlib.suppress(UnsupportedError):
        engine.full(x, y)
    passes = int(model.passes)
    assert passes <= 2, "one pass of the user's, one to compare with"


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_a_hook_of_the_user_is_seen_at_the_level_of_estimators(structure):
    (x, y), expected = data(""), None
    for cls in (AutogradGGN, curvature.CurvlinopsGGN, curvature.AsdlGGN, curvature.BackPackGGN):
        torch.manual_seed(0)
        la = Laplace(hooked(), "classification", "all", structure, backend=cls)
        try:
            la.fit([(x, y)])
        except UnsupportedError:
            assert cls is not AutogradGGN
            continue
        expected = la.log_det_posterior_precision if expected is None else expected
        assert_close(la.log_det_posterior_precision, expected)


def test_a_hessian_needs_little_memory_for_its_diagonal():
    """No P × P matrix: rows come a few at a time."""
    from tests.tools import LargestTensor

    model, n_params = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 2)), 60 * 40 + 40 + 82
    with LargestTensor() as largest:
        AutogradHessian(model, "classification").diag(torch.randn(3, 60), torch.tensor([0, 1, 1]))
    assert largest.numel < n_params**2 / 4


class Warns(torch.autograd.Function):
    """Warns in its backward pass, and is the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        warnings.warn("old", FutureWarning, stacklevel=1)
        return g * 1


def test_a_hessian_of_operations_that_warn_is_computed_row_by_row():
    model, (x, y) = plain(lambda m, x: m.b(Warns.apply(torch.tanh(m.a(x))))), data("")
    twin = plain()
    twin.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = AutogradHessian(model, "classification").full(x, y)[1]
    assert_close(found, AutogradHessian(twin, "classification").full(x, y)[1])


def test_a_hessian_under_inference_mode_and_of_a_loss_that_is_linear():
    model, (x, y) = plain(), data("")
    expected = AutogradHessian(model, "classification").full(x, y)[1]
    with torch.inference_mode():
        assert_close(AutogradHessian(model, "classification").full(x, y)[1], expected)
    weight = torch.randn(3, requires_grad=True)
    rows = list(by_autograd.hessian_rows((weight * torch.ones(3)).sum(), ParameterSubset((weight,))))
    assert_close(torch.stack(rows), torch.zeros(3, 3))
