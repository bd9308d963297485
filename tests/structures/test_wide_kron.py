"""The output factor of a last layer with very many outputs: a diagonal, and a block of the outputs with most of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace import EKFACLLLaplace, KronLLLaplace, Laplace
from laplace.curvature import AutogradEF
from laplace.errors import NumericalWarning, StateError, UnsupportedError
from laplace.structures import KronCurvature, dense_jacobian, wide_kron
from laplace.structures.head_block import head_blocks
from laplace.structures.wide_kron import WideKron, WideKronCurvature
from tests.cases import BASIC, named
from tests.contracts import check_curvature, generator, linear_jacobian, shapes_of
from tests.estimators import everything, fitted
from tests.structures.samples import PER_LAYER, SCALAR, prior, psd, uniform
from tests.structures.test_every_structure import check_moments, normal
from tests.tools import LargestTensor, assert_close

C, D = 5, 4
pytestmark = pytest.mark.filterwarnings("ignore:hessian_structure='kron' for:laplace.errors.NumericalWarning")
F64 = torch.float64


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    """Three outputs are very many, and of five four are kept."""
    monkeypatch.setattr(wide_kron, "WIDE", 2)
    monkeypatch.setattr(wide_kron, "KEPT", 4)


def raw(seed: int, *, bias: bool = True) -> tuple[Tensor, Tensor, WideKron]:
    G, A = psd(C, seed, rank=C), psd(D, seed + 1, rank=3)
    return G, A, WideKron.of(G.diagonal(), lambda kept: G[kept.unsqueeze(1), kept], A, shapes_of(C, D, bias), 0.0)


def outer_of(kept: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """From matrices, each with the outputs that were kept of it: their diagonals, and covariances of what is kept."""
    total = torch.zeros(C, C, dtype=F64)
    for G, own in parts:
        for c in range(C):
            for k in range(C):
                if c == k or all(each in own.tolist() and each in kept.tolist() for each in (c, k)):
                    total[c, k] += G[c, k]
    return total


def dense(outer: Tensor, A: Tensor, count: int, *, bias: bool) -> Tensor:
    return torch.block_diag(torch.kron(outer, A / count), *[outer] * bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER], ids=["scalar", "per layer"])
def test_it_satisfies_the_contract(precision, bias):
    (G1, A1, first), (G2, A2, second) = raw(1, bias=bias), raw(3, bias=bias)
    assert first.kept.tolist() != second.kept.tolist()
    kept = (G1 + G2).diagonal().topk(4).indices
    parts, sizes = [(G1, first.kept), (G2, second.kept)], (C * D, C)[: 1 + bias]
    check_curvature(
        WideKronCurvature(first, 5, F64),
        WideKronCurvature(second, 2, F64),
        dense(outer_of(kept, *parts), A1 + A2, 7, bias=bias),
        (
            dense(outer_of(first.kept, parts[0]), A1, 5, bias=bias),
            dense(outer_of(second.kept, parts[1]), A2, 2, bias=bias),
        ),
        prior(precision[: len(sizes)], sizes),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mixed", [False, True], ids=["outputs", "mixtures"])
def test_predictions_are_those_of_written_derivatives(bias, mixed):
    _, _, sums = raw(1, bias=bias)
    phi, shapes = normal(3, D), shapes_of(C, D, bias)
    blocks, J = head_blocks(phi, shapes), torch.stack([linear_jacobian(row, C, bias) for row in phi], 1)
    if mixed:
        mix = normal(2, C, seed=1)
        blocks, J = [block.mix(mix) for block in blocks], torch.einsum("mq,qbp->mbp", mix, J)
    curvature, over = WideKronCurvature(sums, 5, F64), prior(uniform(len(shapes)), (C * D, C)[: 1 + bias])
    precision = (curvature * 0.7).posterior(over)
    check_moments(precision, blocks, J, 0.7 * curvature.to_dense() + over.diagonal().diag())


def test_outputs_in_other_units_scale_rows_and_columns():
    _, _, sums = raw(1)
    factors = uniform(C)
    every = torch.cat([factors.repeat_interleave(D), factors])
    curvature, over = WideKronCurvature(sums, 5, F64), prior(uniform(1), (C * D, C))
    root = every.sqrt()
    wanted = root.unsqueeze(1) * curvature.to_dense() * root
    scaled = curvature.scale_weights(every)
    assert_close(scaled.to_dense(), wanted)
    assert_close(scaled.log_det_ratio(over), (wanted + over.diagonal().diag()).logdet() - over.logdet())
    damped = curvature.log_det_ratio(over, damping=True)
    assert_close(damped, curvature.posterior(over, damping=True).logdet() - over.logdet())


# -- of data ----------------------------------------------------------------------------------------------------------


def head(n_outputs: int = 6, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs, bias=bias))


def data(n: int = 20, n_outputs: int = 6) -> tuple[Tensor, Tensor]:
    noise = generator(1)
    return torch.randn(n, 3, generator=noise), torch.randint(n_outputs, (n,), generator=noise)


def moments(la: Any, x: Tensor) -> list[Tensor]:
    cov = la.functional_covariance(torch.eye(la.n_params).unsqueeze(0))
    return [cov, la.functional_variance_fast(x)[1], la(x), la(x, link_approx="mf2"), la.log_marginal_likelihood()]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", [{}, {"damping": True}, {"backend": AutogradEF}], ids=["ggn", "damped", "ef"])
def test_with_all_outputs_kept_it_is_the_kronecker_posterior(bias, options, monkeypatch):
    x, y = data()
    monkeypatch.setattr(wide_kron, "KEPT", 6)
    found = []
    for limit in (2, 100):
        monkeypatch.setattr(wide_kron, "WIDE", limit)
        la = KronLLLaplace(head(bias=bias), "classification", prior_precision=0.3, **options)
        la.fit([(x[:7], y[:7]), (x[7:], y[7:])])
        found.append(moments(la, x[:4]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_diagonal_likelihood_loses_nothing(monkeypatch):
    case, found = BASIC[1], []
    for limit in (1, 100):
        monkeypatch.setattr(wide_kron, "WIDE", limit)
        monkeypatch.setattr(wide_kron, "KEPT", 1)
        la = fitted(case, "kron")
        assert isinstance(la._fitted.curvature, WideKronCurvature if limit == 1 else KronCurvature)
        found.append([*la(case.test_inputs()), *la(case.test_inputs(), joint=True), la.log_marginal_likelihood()])
        la.sigma_noise = torch.tensor([0.5, 2.0])
        found[-1] += la(case.test_inputs())
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_what_is_kept_is_part_of_the_exact_factor_and_positive_however_the_data_came():
    x, y = data(40)
    la = KronLLLaplace(head(), "classification")
    with pytest.warns(NumericalWarning, match=r"for 6 outputs: .* among the 4 outputs .* \(\d\d% of the trace\)"):
        la.fit([(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)])
    p = head()(x).softmax(-1)
    G = (torch.diag(p.sum(0)) - p.T @ p).detach()
    H = la.H
    assert_close(H.diagonal, G.diagonal())
    assert H.kept.tolist() == G.diagonal().topk(4).indices.sort().values.tolist()
    off = H.block - G[H.kept.unsqueeze(1), H.kept]
    assert float(torch.linalg.eigvalsh(H.block).min()) > 0
    assert bool((off >= -1e-12).all()), "covariances, which are negative, are added where both were kept"
    whole = KronLLLaplace(head(), "classification")
    whole.fit([(x, y)])
    assert_close(whole.H.block, G[H.kept.unsqueeze(1), H.kept])


def test_draws_have_the_posterior_covariance():
    x, y = data()
    la = KronLLLaplace(head(), "classification", prior_precision=0.5)
    la.fit([(x, y)])
    f = la.functional_samples(x[:2], n_samples=4000, generator=generator(0))
    variance = la.functional_variance_fast(x[:2])[1]
    torch.testing.assert_close(f.var(0), variance, rtol=0.15, atol=0)


def test_it_is_tuned_saved_and_loaded(tmp_path):
    case = named("classification")
    model = case.model()
    la = Laplace(model, case.likelihood, prior_precision=2.0)
    la.fit(case.batches(1, 3))
    la.optimize_prior_precision(method="marglik", n_steps=5)
    la.tune(case.batches(4))
    la.save(tmp_path / "state.pt")
    other = Laplace(model, case.likelihood)
    other.load(tmp_path / "state.pt")
    for ours, theirs in zip(everything(other, case), everything(la, case), strict=True):
        assert torch.equal(ours, theirs)
    state = la.state_dict()
    state["H"]["sums"][0][0]["kept"] = torch.tensor([3, 1, 0, 2])
    del state["digest"]
    with pytest.raises(StateError, match="ascending order"):
        other.load_state_dict(state)


def test_what_needs_the_whole_matrix_is_refused_by_name():
    x, y = data()
    la = EKFACLLLaplace(head(), "classification")
    with pytest.raises(UnsupportedError, match=r"'ekfac' needs a matrix of 6×6 .*'kron'.* 'diag'"):
        la.fit([(x, y)])
    la = KronLLLaplace(head(), "classification")
    la.fit([(x, y)])
    with pytest.raises(UnsupportedError, match=r"la\.H has its diagonal"):
        _ = la.H_facs
    with pytest.raises(UnsupportedError, match="cannot be assigned"):
        la.H = la.H
    with pytest.raises(UnsupportedError, match="elbo"):
        la.optimize_prior_precision(method="elbo")


def test_covariances_that_are_too_many_are_refused_and_name_what_is_not(monkeypatch):
    x, y = data()
    la = KronLLLaplace(head(), "classification")
    la.fit([(x, y)])
    monkeypatch.setattr(dense_jacobian, "MOST_COVARIANCES", 50)
    with pytest.raises(UnsupportedError, match=r"covariances of 6 outputs .*link_approx='probit'"):
        la(x, link_approx="bridge")
    la(x)


def test_copies_share_no_memory():
    x, y = data()
    la = KronLLLaplace(head(), "classification")
    la.fit([(x, y)])
    before = la(x)
    la.H.block.zero_()
    la.posterior_precision.outputs[0].zero_()
    assert torch.equal(la(x), before)


def test_nothing_of_the_size_of_the_output_factor_is_made(monkeypatch):
    n_outputs, rows = 400, 16
    monkeypatch.setattr(wide_kron, "KEPT", 10)
    x, y = data(rows, n_outputs)
    la = KronLLLaplace(head(n_outputs), "classification")
    with LargestTensor() as largest:
        la.fit([(x, y)])
        la.functional_variance_fast(x)
        la.log_marginal_likelihood()
        la.sample(2)
        la(x)
    assert largest.numel <= 100 * rows * n_outputs / 16, largest.operation
    assert largest.numel < n_outputs**2


def test_before_any_data_a_wide_head_has_no_square_matrix():
    la = KronLLLaplace(head(400), "classification", last_layer_name="2")
    with LargestTensor() as largest:
        assert la.H.kfacs[0][0].dim() == 1
        la.sample(2)
    assert largest.numel < 400**2
