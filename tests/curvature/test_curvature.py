"""The interface a user's own back end derives from."""

import pytest
import torch
from torch import nn

from laplace.curvature import AutogradGGN, CurvatureInterface, EFInterface, GGNInterface
from laplace.enums import CurvatureKind
from laplace.errors import UnsupportedError
from laplace.likelihoods import PoissonLikelihood
from laplace.network import FeatureExtractor
from tests.cases import BASIC, CASES, Case, named
from tests.tools import assert_close, assert_mean_is


def jacobians_by_autograd(self, x, enable_backprop=False):
    """What a user writes who knows nothing of closed forms; [rows, C, P] with one row per position."""
    f = self.model(x)
    f = f.reshape(-1, f.shape[-1])
    rows = [torch.autograd.grad(value, self.params, retain_graph=True) for value in f.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return J.reshape(*f.shape, -1).detach(), f.detach()


class PlainGGN(GGNInterface):
    jacobians = jacobians_by_autograd


class PlainEF(EFInterface):
    def jacobians(self, x, enable_backprop=False):
        with torch.enable_grad():
            return jacobians_by_autograd(self, x)


class Nothing(CurvatureInterface):
    """Provides no structure of its own."""


def backend(cls, case: Case, **options):
    return cls(case.extractor(), case.likelihood, last_layer=True, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ggn_follows_from_jacobians(case):
    (x, y), problem, engine = case.data(), case.problem(), backend(PlainGGN, case)
    for structure, expected in (("full", problem.ggn()), ("diag", problem.ggn().diagonal())):
        loss, H = getattr(engine, structure)(x, y)
        assert_close(loss, problem.nll(), "loss")
        assert_close(H, expected, structure)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_empirical_fisher_follows_from_jacobians(case):
    (x, y), problem, engine = case.data(), case.problem(), backend(PlainEF, case)
    for structure, expected in (("full", problem.empirical_fisher()), ("diag", problem.empirical_fisher().diagonal())):
        loss, H = getattr(engine, structure)(x, y)
        assert_close(loss, problem.nll(), "loss")
        assert_close(H, expected, structure)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_a_stochastic_back_end_samples_also_from_jacobians(case, structure):
    generator = torch.Generator().manual_seed(0)
    engine = backend(PlainGGN, case, stochastic=True, generator=generator)
    draws = torch.stack([getattr(engine, structure)(*case.data())[1] for _ in range(200)])
    assert draws.std(0).max() > 0
    ggn = case.problem().ggn()
    assert_mean_is(draws, ggn if structure == "full" else ggn.diagonal())


def test_the_kind_of_a_back_end_decides_how_it_scales():
    assert (GGNInterface.kind, EFInterface.kind) == (CurvatureKind.GGN, CurvatureKind.EF)


@pytest.mark.parametrize(
    ("cls", "methods"), [(Nothing, ("full", "diag", "kron")), (PlainGGN, ("kron",)), (PlainEF, ("kron",))]
)
def test_structures_that_a_back_end_lacks_are_refused_by_name(cls, methods):
    engine, (x, y) = backend(cls, BASIC[0]), BASIC[0].data()
    for method in methods:
        with pytest.raises(UnsupportedError, match=f"{cls.__name__}.*'{method}'"):
            getattr(engine, method)(x, y, **({"N": 1} if method == "kron" else {}))


def test_last_layer_jacobians_can_keep_the_graph_to_the_inputs():
    case = BASIC[1]
    engine = AutogradGGN(case.extractor(enable_backprop=True), case.likelihood, last_layer=True)
    x = case.test_inputs().requires_grad_()
    J, f = engine.last_layer_jacobians(x, enable_backprop=True)
    assert J.requires_grad
    assert f.requires_grad
    assert torch.autograd.grad(J.sum(), x)[0].abs().max() > 0
    J, f = engine.last_layer_jacobians(x)
    assert not J.requires_grad
    assert not f.requires_grad


def test_a_back_end_for_all_weights_has_the_jacobians_of_the_last_layer_too():
    case = BASIC[1]
    x = case.test_inputs()
    ours = AutogradGGN(case.extractor(), case.likelihood).last_layer_jacobians(x)
    theirs = AutogradGGN(case.extractor(), case.likelihood, last_layer=True).last_layer_jacobians(x)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


def test_params_are_those_of_the_last_layer():
    case = BASIC[0]
    engine = backend(AutogradGGN, case)
    head = engine.model.model.head
    assert [p is q for p, q in zip(engine.params, head.parameters(), strict=True)] == [True, True]


@pytest.mark.parametrize("case", [BASIC[0], named("masked_positions"), named("soft_labels")], ids=str)
def test_positions_are_counted_without_the_masked_ones(case):
    assert backend(AutogradGGN, case).count(case.data()[1]) == case.problem().n_positions()


def test_what_is_no_last_layer_is_refused():
    case = BASIC[0]
    with pytest.raises(UnsupportedError, match="FeatureExtractor"):
        AutogradGGN(case.model(), case.likelihood, last_layer=True)
    with pytest.raises(UnsupportedError, match=r"last_layer=True and subnetwork_indices are two choices"):
        AutogradGGN(case.extractor(), case.likelihood, last_layer=True, subnetwork_indices=torch.arange(3))
    with pytest.raises(UnsupportedError, match="likelihood"):
        AutogradGGN(case.extractor(), "clustering", last_layer=True)


@pytest.mark.parametrize("method", ["full", "diag", "kron"])
def test_options_that_nobody_reads_are_refused(method):
    engine, (x, y) = backend(AutogradGGN, BASIC[0]), BASIC[0].data()
    with pytest.raises(UnsupportedError, match="fisher_type"):
        getattr(engine, method)(x, y, fisher_type="mc", **({"N": 1} if method == "kron" else {}))


class Own(GGNInterface):
    """A back end of a user that overrides nothing."""


def targets_of(kind, shape):
    """Likelihood, targets beside outputs of this shape, and the diagonal of its Hessian in the outputs, by definition."""
    draw = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 5, shape, generator=draw)
    exposure = 0.5 + torch.rand(shape, generator=draw, dtype=torch.float64)
    return {
        "integer labels": ("multilabel", counts % 2, lambda f: f.sigmoid() * (1 - f.sigmoid())),
        "exposures": (
            PoissonLikelihood(exposure=True),
            torch.stack([counts.double(), exposure], -1),
            lambda f: exposure * f.exp(),
        ),
    }[kind]


@pytest.mark.parametrize("last_layer", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("integer labels", (5, 3)),
        ("integer labels", (5, 1)),
        ("integer labels", (5, 2, 3)),
        ("exposures", (5, 3)),
        ("exposures", (5, 2)),
        ("exposures", (4, 1, 2)),
    ],
)
def test_targets_reach_the_likelihood_in_the_shape_they_came_in(kind, shape, last_layer):
    likelihood, y, hessian = targets_of(kind, shape)
    C, x = shape[-1], torch.randn(*shape[:-1], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = nn.Linear(4, C).double()
    model = FeatureExtractor(nn.Sequential(layer), last_layer_name="0") if last_layer else layer
    engine = Own(model, likelihood if isinstance(likelihood, str) else likelihood.name, last_layer=last_layer)
    if not isinstance(likelihood, str):
        engine.with_likelihood(likelihood)
    if last_layer:
        engine.model.find_last_layer(x)
    phi = torch.cat([x, torch.ones_like(x[..., :1])], -1).reshape(-1, 5)
    weights = hessian(layer(x).detach()).reshape(-1, C)
    expected = torch.einsum("nc,ni,nj->cij", weights, phi, phi)  # a block [W_c, b_c] for each output
    order = [c * 5 + i for c in range(C) for i in range(4)] + [c * 5 + 4 for c in range(C)]
    expected = torch.block_diag(*expected)[order][:, order]
    _, H = engine.full(x, y)
    assert_close(H, expected, "full")
    assert_close(engine.diag(x, y)[1], expected.diagonal(), "diag")
