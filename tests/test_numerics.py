"""Hard numbers: finite and close to float64, or a warning or an error that names size, cause and cure."""

import copy
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from laplace import Laplace
from laplace.errors import InputError, NumericalWarning
from tests import reference
from tests.cases import BASIC, EVERYTHING, STRUCTURES, Net
from tests.contracts import generator
from tests.estimators import basic_cases, dense, estimator, every_structure, evidence, outputs_and_covariance, posterior
from tests.tools import assert_close

LINKS = ({}, {"link_approx": "mc"}, {"link_approx": "bridge"}, {"link_approx": "bridge_norm"}, {"link_approx": "mc", "joint": True}, {"pred_type": "nn"})  # fmt: skip
VARIANCES = ({}, {"diagonal_output": True}, {"joint": True}, {"pred_type": "nn"})
KINDS = {"classification": LINKS, "regression": VARIANCES}
NARROW = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative error to float64 that each dtype of a model is allowed: some sixteen roundings of its outputs."""


def flat(result: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def fit(model: nn.Module, x: Tensor, y: Tensor, structure: str, **options):
    likelihood = "regression" if y.is_floating_point() else "classification"
    la = Laplace(model, likelihood, hessian_structure=structure, **{**EVERYTHING.get(structure, {}), **options})
    la.fit([(x[:3], y[:3]), (x[3:], y[3:])] if len(x) > 3 else [(x, y)])
    return la


def assert_sound(la, x: Tensor, likelihood: str) -> None:
    """Evidence and every prediction are finite, variances not negative, probabilities normalized."""
    assert bool(torch.isfinite(la.log_marginal_likelihood()))
    assert bool(torch.isfinite(la.sample(3)).all())
    for options in KINDS[likelihood]:
        result = flat(la(x, n_samples=20, generator=generator(0), **options))
        assert all(bool(torch.isfinite(part).all()) for part in result), options
        if likelihood == "classification":
            tolerance = 20 * torch.finfo(result[0].dtype).eps
            assert float((result[0].sum(-1) - 1).abs().max()) <= tolerance, options
            assert float(result[0].min()) >= 0, options
    if likelihood == "regression":
        assert float(la(x, diagonal_output=True)[1].min()) >= 0


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within a fraction of the largest entry."""
    for ours, theirs in zip(actual, expected, strict=True):
        error = float((ours.double() - theirs).abs().max() / theirs.abs().max())
        assert error <= tolerance, f"off by {error:.2g} of the largest entry, allowed {tolerance}"


def case_of(likelihood: str):
    return BASIC[likelihood == "regression"]


# -- extreme data -----------------------------------------------------------------------------------------------------


def saturated(dtype: torch.dtype) -> nn.Module:
    """Logits of ±1e4: each class is certain or impossible."""
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight.copy_(2e4 * torch.eye(3) - 1e4)
        model[1].bias.fill_(0.0)
    return model.to(dtype)


@every_structure
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_saturated_logits(structure, dtype, right):
    """Whether the network is right or wrong with certainty, its predictions are certain and its evidence finite."""
    x, y = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    la = fit(saturated(dtype), x.to(dtype), y if right else (y + 1) % 3, structure)
    assert_sound(la, x.to(dtype), "classification")
    assert_near([la(x.to(dtype))], [x], 1e-6)
    assert float(la.loss) == pytest.approx(0.0 if right else 12 * 2e4, rel=1e-2)
    assert_close(dense(la.posterior_precision).double(), torch.eye(12), "no curvature: the prior is left")


@every_structure
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_class_in_the_data(structure, dtype):
    case = BASIC[0]
    (x, _), model = case.data(), case.model()
    la = fit(model.to(dtype), x.to(dtype), torch.full((11,), 2), structure)
    assert_sound(la, x.to(dtype), "classification")
    wide = fit(case.model(), x, torch.full((11,), 2), structure)
    assert_near([la(x.to(dtype))], [wide(x)], 1e-4)


@every_structure
@basic_cases
@pytest.mark.parametrize("n_rows", [1, 5])
def test_fewer_data_than_weights(case, structure, n_rows):
    """The curvature is singular: the prior alone makes the posterior proper."""
    x, y = case.data(n_rows=n_rows)
    options = {key: value for key, value in case.laplace_options().items() if case.likelihood == "regression"}
    la, wide = (
        fit(case.model().to(t), x.to(t), y.to(t) if y.is_floating_point() else y, structure, prior_precision=0.01, **options)
        for t in (torch.float32, torch.float64)
    )  # fmt: skip
    assert n_rows < la.n_params
    assert_sound(la, x.float(), case.likelihood)
    model = case.model()
    problem = reference.Problem(model, case.forward, case.names, x, y, case.likelihood, case.n_outputs)
    assert_close(
        dense(wide.posterior_precision), case.scale * problem.curvature(structure) + 0.01 * torch.eye(la.n_params)
    )
    assert_near(flat(la(x.float())), flat(wide(x)), 1e-3)
    assert_near([la.log_marginal_likelihood()], [wide.log_marginal_likelihood()], 1e-4)


@every_structure
@basic_cases
@pytest.mark.parametrize("exponent", [-10, -5, 10])
def test_prior_precisions_from_1e_minus_10_to_1e_10(case, structure, exponent):
    delta = 10.0**exponent
    la = estimator(case, structure, prior_precision=delta)
    la.fit(case.batches(4, 4))
    assert_sound(la, case.test_inputs(), case.likelihood)
    precision = posterior(case, structure, delta=delta)
    assert_near([la.log_marginal_likelihood()], [evidence(case, precision, delta=delta)], 1e-6)
    # The inverse of a singular curvature and a prior of 1e-10 keeps 16 - 12 digits in float64.
    f, _, V = outputs_and_covariance(case, precision)
    variances = la.functional_variance_fast(case.test_inputs())[1]
    assert_near([variances], [V.diagonal(dim1=1, dim2=2)], 1e-3)
    if case.likelihood == "classification":
        assert_near([la(case.test_inputs())], [reference.probit(f, V)], 1e-3)


@basic_cases
@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("exponent", [-10, -5, 10])
def test_prior_precisions_from_1e_minus_10_to_1e_10_in_float32(case, structure, exponent):
    """These structures need no factorization of a matrix that is singular but for its prior."""
    la, wide = (
        estimator(case, structure, case.model().to(t), prior_precision=10.0**exponent)
        for t in (torch.float32, torch.float64)
    )
    la.fit([(x.float(), y if case.likelihood == "classification" else y.float()) for x, y in case.batches(4, 4)])
    wide.fit(case.batches(4, 4))
    assert_sound(la, case.test_inputs().float(), case.likelihood)
    assert_near([la.log_marginal_likelihood()], [wide.log_marginal_likelihood()], 0.05)


@basic_cases
@pytest.mark.parametrize("exponent", [-10, -6])
def test_a_dense_float32_posterior_without_prior_warns_and_names_the_cure(case, exponent):
    """The classifier's curvature is singular for every data set, so its dense float32 factor needs a jitter."""
    x, y = case.data(n_rows=5)
    narrow = {torch.float32: (x.float(), y if case.likelihood == "classification" else y.float())}
    narrow[torch.float64] = (x, y)
    options = {"prior_precision": 10.0**exponent}
    la = fit(case.model().float(), *narrow[torch.float32], "full", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_sound(la, x.float(), case.likelihood)
    assert {entry.category for entry in caught} <= {NumericalWarning}
    for entry in caught:
        text = str(entry.message)
        assert "is not positive definite to working precision; added" in text or "has a condition number of" in text
        assert "larger prior precision" in text
        assert "curvature_dtype=torch.float64" in text
    cured = fit(case.model().float(), *narrow[torch.float32], "full", curvature_dtype=torch.float64, **options)
    assert_sound(cured, x.float(), case.likelihood)
    assert cured.mean.dtype == torch.float64


@pytest.mark.every(3)
@every_structure
@pytest.mark.filterwarnings("ignore:The posterior precision has a condition number")  # of the scaled features
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("features", ["duplicated", "constant", "zero", "scaled"])
def test_degenerate_features(structure, likelihood, features):
    case, noise = case_of(likelihood), generator(5)
    C = case.n_outputs
    base = torch.randn(20, 3, generator=noise)
    x = {
        "duplicated": torch.cat([base, base], 1),
        "constant": torch.cat([base, torch.full((20, 3), 7.0)], 1),
        "zero": torch.zeros(20, 6),
        "scaled": torch.cat([base, 1e3 * base], 1),
    }[features]
    y = (
        torch.randint(C, (20,), generator=noise)
        if likelihood == "classification"
        else torch.randn(20, C, generator=noise)
    )
    model = nn.Sequential(nn.Identity(), nn.Linear(6, C))
    with torch.no_grad():
        model[1].weight.copy_(0.01 * torch.randn(C, 6, generator=noise))
    wide = fit(copy.deepcopy(model), x, y, structure)
    # Low rank drops what float32 cannot tell from zero beside the largest eigenvalue, as that of a bias beside 1e3.
    options = {"curvature_dtype": torch.float64} if structure == "lowrank" else {}
    la = fit(model.float(), x.float(), y.float() if y.is_floating_point() else y, structure, **options)
    assert_sound(wide, x, likelihood)
    assert_sound(la, x.float(), likelihood)
    assert_near(flat(la(x.float())), flat(wide(x)), 0.01)
    assert_near([la.log_marginal_likelihood()], [wide.log_marginal_likelihood()], 1e-3)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@every_structure
@basic_cases
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_models_in_a_narrow_dtype_agree_with_float64(case, structure, dtype):
    """Compared with the same rounded weights and data in float64, so that only the computation differs."""
    x, y = case.data()
    x, y = x.to(dtype), y if case.likelihood == "classification" else y.to(dtype)
    model = case.model().to(dtype)
    wide_y = y if case.likelihood == "classification" else y.double()
    wide = fit(case.model().to(dtype).double(), x.double(), wide_y, structure)
    for asked in (None, torch.float64):
        la = fit(model, x, y, structure, curvature_dtype=asked)
        assert_sound(la, x, case.likelihood)
        assert_near(flat(la(x)), flat(wide(x.double())), NARROW[dtype])
        assert_near([la.log_marginal_likelihood()], [wide.log_marginal_likelihood()], NARROW[dtype])
        assert {part.dtype for part in flat(la(x))} == {dtype}


@every_structure
def test_float64_curvature_of_a_float32_model_is_exact_where_float32_is_not(structure):
    """Features of 1e3 and 1e-3: their curvatures differ by more than float32 resolves."""
    x = torch.tensor([[1e3, 1e-3], [1e3, -1e-3], [-1e3, 2e-3]], dtype=torch.float32)
    y = torch.tensor([0, 1, 1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2)).float()
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
    asked = fit(model, x, y, structure, curvature_dtype=torch.float64, prior_precision=1e-4)
    assert dense(asked.H).dtype == dense(asked.posterior_precision).dtype == torch.float64
    wide = nn.Sequential(nn.Identity(), nn.Linear(2, 2)).double()
    wide.load_state_dict(model.state_dict())
    exact = fit(wide, x.double(), y, structure, prior_precision=1e-4)
    assert_near([asked.log_marginal_likelihood()], [exact.log_marginal_likelihood()], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_five_thousand_weights_in_float32(likelihood):
    """A dense posterior over P = 5,000 weights from 200 data, in seconds."""
    n_features, n_outputs = 499, 10
    assert (n_features + 1) * n_outputs == 5000
    noise, start = generator(1), time.perf_counter()
    x = torch.randn(200, n_features, generator=noise, dtype=torch.float32)
    y = torch.randint(n_outputs, (200,), generator=noise)
    if likelihood == "regression":
        y = torch.randn(200, n_outputs, generator=noise, dtype=torch.float32)
    model = nn.Sequential(nn.Identity(), nn.Linear(n_features, n_outputs)).float()
    la = fit(model, x, y, "full", prior_precision=1.0)
    assert la.n_params == 5000
    mean_and_variance = la.functional_variance_fast(x[:20])
    result = flat(la(x[:20], diagonal_output=likelihood == "regression"))
    assert all(bool(torch.isfinite(part).all()) for part in (*mean_and_variance, *result))
    assert float(mean_and_variance[1].min()) > 0
    if likelihood == "regression":  # conjugate theory: A = [x, 1]ᵀ[x, 1] + I for every output
        design = torch.cat([x, torch.ones(200, 1, dtype=torch.float32)], 1).double()
        cov = (design.T @ design + torch.eye(500)).inverse()
        expected = ((design[:20] @ cov) * design[:20]).sum(1, keepdim=True).expand(-1, n_outputs)
        assert_near([result[1]], [expected], 1e-4)
    assert time.perf_counter() - start < 60


# -- failures ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from laplace import Laplace
from laplace.utils import Kron, symeig
from torch import nn

torch.manual_seed(0)
bad = torch.full((3, 3), float("nan"))
model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
with torch.no_grad():
    model[2].bias[0] = float("nan")
attempts = [lambda: symeig(bad), lambda: Kron([[bad, bad]]).decompose(), lambda: symeig(torch.diag(torch.tensor([1.0, -1.0])))]
for structure in ("full", "kron", "diag"):
    attempts.append(lambda s=structure: Laplace(model, "classification", hessian_structure=s).fit([(torch.ones(2, 2), torch.tensor([0, 1]))]))
for attempt in attempts:
    try:
        attempt()
    except (ValueError, torch.linalg.LinAlgError) as error:
        print(type(error).__name__)
print("alive")
"""


def test_the_interpreter_never_exits():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NotPositiveDefiniteError"] * 3 + ["InputError"] * 3 + ["alive"]


@pytest.mark.filterwarnings("ignore:The posterior precision has a condition number")  # features of 1e20: rightly
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_overflow_is_explained(structure):
    """Targets so large that their squares are infinite in float32, and features whose products are."""
    model = Net(3, 5, 2).float()
    x = torch.randn(4, 3, dtype=torch.float32)
    la = Laplace(model, "regression", hessian_structure=structure)
    with pytest.raises(InputError, match=r"negative log-likelihood of batch 0.*overflow when squared"):
        la.fit([(x, torch.full((4, 2), 1e30, dtype=torch.float32))])
    head = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).float()
    with torch.no_grad():
        head[1].weight.zero_()
    la = Laplace(head, "regression", hessian_structure=structure)
    zeros = torch.zeros(4, 2, dtype=torch.float32)
    with pytest.raises(
        InputError, match=r"curvature.*not finite.*Scale the inputs, or.*curvature_dtype=torch\.float64"
    ):
        la.fit([(1e20 * x, zeros)])
    cured = Laplace(head, "regression", hessian_structure=structure, curvature_dtype=torch.float64)
    cured.fit([(1e20 * x, zeros)])
    assert_sound(cured, x, "regression")
