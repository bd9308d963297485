"""The low-rank estimators."""

import pytest
import torch
from torch import nn

from laplace import FullLaplace, Laplace, LowRankLaplace, LowRankLLLaplace
from laplace.curvature import AsdlGGN, AutogradEF, AutogradHessian
from laplace.errors import InputError, NumericalWarning, UnsupportedError
from tests.cases import BASIC
from tests.contracts import generator
from tests.estimators import dense, fitted
from tests.networks import named
from tests.tools import LargestTensor, assert_close

MLP = named("mlp")


def problem(n_rows: int = 150):
    """A network whose curvature has many eigenvalues of different sizes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(n_rows, 4), torch.randint(3, (n_rows,))
    return model, [(x[:50], y[:50]), (x[50:], y[50:])]


def test_predictions_and_evidence_converge_to_the_dense_ones_with_the_rank():
    model, batches = problem()
    x = batches[0][0][:5]
    full = FullLaplace(model, "classification")
    full.fit(batches)
    prediction, evidence, P = full(x), float(full.log_marginal_likelihood()), full.n_params
    errors, gaps = [], []
    for rank in (2, 10, 25, 40, P):
        la = LowRankLaplace(model, "classification", rank=rank)
        la.fit(batches)
        assert la.rank <= rank
        errors.append(float((la(x) - prediction).abs().max()))
        gaps.append(float(la.log_marginal_likelihood()) - evidence)
    assert errors == sorted(errors, reverse=True)
    assert gaps == sorted(gaps, reverse=True), "each eigenpair that is dropped raises the evidence"
    assert gaps[0] > 1
    assert max(errors[-1], abs(gaps[-1])) < 1e-9
    assert_close(dense(la.H), full.H)
    assert_close(la.functional_variance(torch.eye(P).unsqueeze(0)), full.posterior_covariance.unsqueeze(0))


def test_eigenvalues_are_the_leading_ones_of_the_dense_curvature():
    model, batches = problem()
    full, la = FullLaplace(model, "classification"), LowRankLaplace(model, "classification", rank=8)
    for each in (full, la):
        each.fit(batches)
    exact = torch.linalg.eigvalsh(full.H).flip(0)
    torch.testing.assert_close(la.H[1], exact[:8], rtol=1e-2, atol=0)
    assert bool((la.H[1] <= exact[:8] * (1 + 1e-12)).all())
    assert la.n_passes == 1, "fewer weights than eight times the directions"
    assert la.captured_trace == pytest.approx(float(la.H[1].sum() / exact.sum()))


def test_a_share_of_the_trace_says_how_many_eigenpairs_and_passes():
    model, batches = problem()
    la = LowRankLaplace(model, "classification", captured_trace=0.8)
    la.fit(batches)
    assert 0.8 <= la.captured_trace < 0.9
    default = LowRankLaplace(model, "classification")
    default.fit(batches)
    assert default.captured_trace >= 0.95
    assert default.rank > la.rank


def test_the_identity_of_woodbury_holds_for_v_and_kinv():
    model, batches = problem()
    la = LowRankLaplace(model, "classification", rank=7, prior_precision=torch.tensor([0.5, 1.0, 2.0, 4.0]))
    la.fit(batches)
    (vectors, values), delta = la.posterior_precision
    assert (vectors.shape, values.shape, delta.shape) == ((la.n_params, 7), (7,), (la.n_params,))
    covariance = (1 / delta).diag() - la.V @ la.Kinv @ la.V.T
    assert_close(covariance, dense(la.posterior_precision).inverse())


@pytest.mark.parametrize("prior", [0.7, torch.tensor([0.5, 1.0, 2.0, 4.0])], ids=["scalar", "per group"])
def test_the_gradient_of_the_evidence_is_right_in_prior_and_noise(prior):
    network = named("mlp_regression")
    la = LowRankLaplace(network.model(), "regression", rank=6)
    la.fit([network.data()])
    start = torch.as_tensor(prior).double().reshape(-1).requires_grad_(), torch.tensor(0.6, requires_grad=True)
    assert torch.autograd.gradcheck(lambda delta, sigma: la.log_marginal_likelihood(delta, sigma), start)


def test_the_empirical_fisher_is_exact_at_full_rank():
    full, la = (cls(MLP.model(), "classification", backend=AutogradEF) for cls in (FullLaplace, LowRankLaplace))
    la._truncation = type(la._truncation)(captured_trace=1.0)
    for each in (full, la):
        each.fit([MLP.data()])
    assert la.rank == len(MLP.data()[1])  # a gradient a datum
    assert_close(dense(la.H), full.H)


def test_the_positive_part_of_the_hessian_is_kept_and_needs_a_rank():
    model = MLP.model()
    full = FullLaplace(model, "classification", backend=AutogradHessian)
    full.fit([MLP.data()])
    values, vectors = torch.linalg.eigh(full.H)
    assert float(values.min()) < -1e-3
    la = LowRankLaplace(model, "classification", backend=AutogradHessian, rank=full.n_params)
    la.fit([MLP.data()])
    assert_close(dense(la.H), (vectors * values.clamp(min=0)) @ vectors.T)
    assert la.captured_trace is None
    with pytest.raises(UnsupportedError, match="pass rank="):
        LowRankLaplace(model, "classification", backend=AutogradHessian).fit([MLP.data()])


def test_nothing_of_the_size_of_the_curvature_or_a_jacobian_is_made():
    """P > 50,000: the largest tensor of fit, prediction and evidence is that of the directions."""
    rows, C, rank = 16, 10, 5
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, C)
    ).float()
    P = sum(p.numel() for p in model.parameters())
    assert P >= 50_000
    x, y = torch.randn(rows, 1, 12, 12).float(), torch.randint(C, (rows,))
    la = LowRankLaplace(model, "classification", rank=rank)
    with LargestTensor() as largest:
        la.fit([(x, y)])
        la(x)
        la.log_marginal_likelihood()
        la.sample(3)
    assert largest.numel <= (rank + 10) * P, largest.operation
    assert largest.numel < rows * C * P / 10


def test_a_one_shot_loader_is_refused_but_for_a_last_layer():
    la = LowRankLaplace(MLP.model(), "classification", rank=2)
    with pytest.raises(InputError, match=r"hessian_structure='lowrank'.*iterator"):
        la.fit(iter([MLP.data()]))
    case, calls = BASIC[0], []
    model = case.model()
    model.register_forward_hook(lambda *_: calls.append(1))
    la = LowRankLLLaplace(model, case.likelihood, rank=4)
    la.fit(iter(case.batches(1, 3)))
    assert (len(calls), la.n_passes, la.rank) == (3, 1, 4)
    la = LowRankLLLaplace(model, case.likelihood)
    la.fit(iter(case.batches(1, 3)))
    assert len(calls) == 6, "features are kept for further passes"


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_the_last_layer_keeps_the_leading_eigenpairs(case):
    la = fitted(case, "lowrank", rank=3, captured_trace=None)
    exact = torch.linalg.eigvalsh(case.problem().ggn()).flip(0)
    torch.testing.assert_close(la.H[1], exact[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_float32_gives_the_numbers_of_float64(case, rank):
    """Outputs of a regression share their curvature: rounding must not choose which of equal eigenpairs is kept."""
    variances = []
    for dtype in (torch.float64, torch.float32):
        x, y = (each.to(dtype) if each.is_floating_point() else each for each in case.data())
        la = LowRankLLLaplace(case.model().to(dtype), case.likelihood, rank=rank)
        la.fit([(x, y)])
        variances.append(la.functional_variance_fast(case.test_inputs().to(dtype))[1])
    assert_close(*variances)


def test_adding_to_a_fit_warns_where_something_was_dropped():
    model, (first, second) = problem()
    la = LowRankLaplace(model, "classification", rank=3)
    la.fit([first])
    with pytest.warns(NumericalWarning, match="compressed to rank 3"):
        la.fit([second], override=False)
    assert la.rank == 3
    assert la.n_data == 150


def test_fits_are_deterministic_and_leave_the_global_generator_alone():
    model, batches = problem()
    before, found = torch.get_rng_state(), []
    for _ in range(2):
        la = LowRankLaplace(model, "classification", rank=3)
        la.fit(batches)
        found.append(la.sample(2, generator=generator(0)))
    assert torch.equal(*found)
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_carries_the_choice_and_a_fit_can_go_on(tmp_path):
    model, (first, second) = problem()
    la = LowRankLaplace(model, "classification", rank=4)
    la.fit([first])
    la.save(tmp_path / "state.pt")
    other = LowRankLaplace(model, "classification")
    other.load(tmp_path / "state.pt")
    assert (other.rank, other.n_passes, other.captured_trace) == (la.rank, la.n_passes, la.captured_trace)
    with pytest.warns(NumericalWarning):
        other.fit([second], override=False)
    assert other.rank == 4


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": 2.0}, {"rank": True}, {"captured_trace": 0.0}, {"captured_trace": 1.1}]
)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_choices_that_make_no_sense_are_refused(subset, options):
    with pytest.raises(InputError, match=r"rank must be|captured_trace is a share"):
        Laplace(MLP.model(), "classification", subset, "lowrank", **options)
    with pytest.raises(InputError, match="pass one of them"):
        Laplace(MLP.model(), "classification", subset, "lowrank", rank=2, captured_trace=0.5)


def test_packages_do_not_provide_it_and_the_message_says_who_does():
    la = LowRankLaplace(MLP.model(), "classification", backend=AsdlGGN)
    with pytest.raises(UnsupportedError, match=r"AsdlGGN does not provide hessian_structure='lowrank'.*AutogradGGN"):
        la.fit([MLP.data()])


def test_tuning_that_fits_the_head_again_keeps_the_same_number_of_eigenpairs():
    """Each fold's curvature is truncated as the estimator's is; nothing else would score the posterior that is used."""
    case = BASIC[0]
    la = fitted(case, "lowrank", rank=2, captured_trace=None)
    x, y = case.data()
    _, curvature = la._refitted_type.from_batch(la.backend, x, y)
    assert len(curvature.values) == 2
