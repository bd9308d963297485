"""Hyperparameters, their checks, and back ends of the user's own."""

import pytest
import torch

from laplace import BaseLaplace, Laplace, ParametricLaplace
from laplace.curvature import AutogradEF, AutogradGGN, CurvatureInterface, GGNInterface
from laplace.enums import HessianStructure, Likelihood
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.structures import Kron
from tests.cases import BASIC, named
from tests.estimators import basic_cases, dense, estimator, every_structure, fitted, posterior
from tests.tools import assert_close


@every_structure
@basic_cases
def test_the_hierarchy_and_the_recorded_types(case, structure):
    la = estimator(case, structure)
    assert isinstance(la, ParametricLaplace)
    assert isinstance(la, BaseLaplace)
    assert la.likelihood == case.likelihood
    assert la.likelihood is Likelihood(case.likelihood)
    assert la.prior_precision.shape == (1,)
    assert la.prior_mean.shape == la.sigma_noise.shape == ()
    assert la.prior_precision.dtype == la.sigma_noise.dtype == torch.float64


@pytest.mark.parametrize(
    "value", [3, 3.0, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3), torch.tensor(3.0, dtype=torch.float32)]
)
def test_hyperparameters_take_numbers_and_tensors(value):
    la = estimator(BASIC[1], "diag", prior_precision=value, sigma_noise=value)
    assert_close(la.prior_precision, torch.tensor([3.0]))
    assert_close(la.sigma_noise, torch.tensor(3.0))
    la.temperature = value
    assert float(la.temperature) == 3.0


@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise", "temperature"])
@pytest.mark.parametrize(
    "value", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([]), "one", None, torch.tensor([0.0])]
)
def test_values_without_a_meaning_are_refused_on_construction_and_on_assignment(name, value):
    with pytest.raises(InputError, match=name):
        estimator(BASIC[1], "diag", **{name: value})
    la = estimator(BASIC[1], "diag")
    before = getattr(la, name)
    with pytest.raises(InputError, match=name):
        setattr(la, name, value)
    assert torch.equal(torch.as_tensor(getattr(la, name)), torch.as_tensor(before))


@pytest.mark.parametrize(("name", "shape"), [("sigma_noise", (1, 2)), ("temperature", (2,))])
def test_noise_is_a_number_or_a_vector_and_temperature_a_number(name, shape):
    with pytest.raises(InputError, match="number"):
        estimator(BASIC[1], "diag", **{name: torch.ones(shape)})


def test_noise_has_no_meaning_in_classification():
    with pytest.raises(UnsupportedError, match="sigma_noise"):
        estimator(BASIC[0], "diag", sigma_noise=0.5)
    la = estimator(BASIC[0], "diag", sigma_noise=1.0)
    with pytest.raises(UnsupportedError, match="sigma_noise"):
        la.sigma_noise = 0.5


@every_structure
def test_a_prior_that_does_not_fit_the_weights_is_refused_as_soon_as_they_are_known(structure):
    case = BASIC[1]
    for wrong in (torch.ones(3), torch.ones(13)):
        with pytest.raises(ShapeError, match="parameter groups"):
            fitted(case, structure, prior_precision=wrong)
        with pytest.raises(ShapeError, match="parameter groups"):
            estimator(case, structure, last_layer_name="head", prior_precision=wrong)
        la = fitted(case, structure)
        with pytest.raises(ShapeError, match="parameter groups"):
            la.prior_precision = wrong
        assert_close(dense(la.posterior_precision), posterior(case, structure))
    with pytest.raises(InputError, match="vector"):
        estimator(case, structure, prior_precision=torch.ones(3, 4))


@every_structure
def test_a_prior_with_a_gradient_may_be_given(structure):
    case = BASIC[1]
    delta = torch.tensor(2.0, requires_grad=True)
    la = fitted(case, structure, prior_precision=delta)
    la.log_marginal_likelihood().backward()
    assert delta.grad.abs() > 0


def test_what_is_no_model_or_back_end_is_refused():
    with pytest.raises(UnsupportedError, match="Module"):
        estimator(BASIC[0], "diag", model=lambda x: x)
    for wrong in ("AutogradGGN", dict, BASIC[0].model()):
        with pytest.raises(UnsupportedError, match="CurvatureInterface"):
            estimator(BASIC[0], "diag", backend=wrong)
    with pytest.raises(UnsupportedError, match="'regression', 'classification'"):
        Laplace(BASIC[0].model(), "student")


# -- back ends --------------------------------------------------------------------------------------------------------


class Spy(GGNInterface):
    """A user's own back end that returns numbers of its own: whatever bypasses it is seen."""

    calls: list

    def __init__(self, *args, note="none", **kwargs):
        super().__init__(*args, **kwargs)
        self.note = note
        type(self).calls = [] if note == "none" else [note]

    def _record(self, name, x, y):
        self.calls.append(name)
        n_params = sum(p.numel() for p in self.params)
        return torch.tensor(float(len(y))), len(y) * torch.arange(1.0, n_params + 1)

    def full(self, x, y, **kwargs):
        loss, vector = self._record("full", x, y)
        return loss, vector.diag()

    def diag(self, x, y, **kwargs):
        return self._record("diag", x, y)

    def kron(self, x, y, N, **kwargs):
        loss, _ = self._record("kron", x, y)
        shapes = [p.shape for p in self.params]
        return loss, Kron([[len(y) * torch.eye(size) for size in shape] for shape in shapes])

    def ekfac(self, x, y, basis, shapes, **kwargs):
        return self._record("ekfac", x, y)[0], super().ekfac(x, y, basis, shapes, **kwargs)[1]


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@basic_cases
def test_a_users_own_back_end_is_never_bypassed(case, structure):
    la = fitted(case, structure, backend=Spy)
    assert Spy.calls == [structure] * 3
    n, n_params = len(case.data()[1]), la.n_params
    assert isinstance(la.backend, Spy)
    assert float(la.loss) == n
    H = dense(la.H)
    if structure == "kron":  # sums of both sides, the inputs' divided by the rows seen
        assert_close(H, n * torch.eye(n_params))
    else:
        assert_close(H.diagonal(), n * torch.arange(1.0, n_params + 1))


@every_structure
def test_backend_kwargs_reach_the_back_end(structure):
    case = BASIC[0]
    la = fitted(case, structure, backend=Spy, backend_kwargs={"note": "given", "stochastic": True, "num_samples": 3})
    assert (la.backend.note, la.backend.stochastic, la.backend.num_samples) == ("given", True, 3)
    assert Spy.calls[0] == "given"
    with pytest.raises(TypeError, match="unknown"):
        fitted(case, structure, backend_kwargs={"unknown": 1})


@pytest.mark.every(3)
@every_structure
@basic_cases
def test_sampled_curvature_is_reproducible_through_backend_kwargs(case, structure):
    def draw(seed: int) -> torch.Tensor:
        options = {"stochastic": True, "num_samples": 2, "generator": torch.Generator().manual_seed(seed)}
        return dense(fitted(case, structure, backend_kwargs=options).posterior_precision)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@every_structure
def test_fisher_kwargs_are_refused_by_back_ends_that_take_none(structure):
    for backend in (None, AutogradGGN, AutogradEF, Spy):
        with pytest.raises(UnsupportedError, match="asdl_fisher_kwargs"):
            estimator(BASIC[0], structure, backend=backend, asdl_fisher_kwargs={"fisher_type": "mc"})


class TakesFisherKwargs(Spy):
    accepts_fisher_kwargs = True

    def diag(self, x, y, **kwargs):
        self.calls.append(kwargs)
        return super().diag(x, y)


def test_fisher_kwargs_reach_back_ends_that_take_them():
    fitted(BASIC[0], "diag", backend=TakesFisherKwargs, asdl_fisher_kwargs={"fisher_type": "mc"})
    assert TakesFisherKwargs.calls[0] == {"fisher_type": "mc"}


class DiagonalOnly(Spy):
    structures = frozenset({HessianStructure.DIAG})


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_structures_that_a_back_end_does_not_declare_are_refused(structure):
    with pytest.raises(
        UnsupportedError, match=f"DiagonalOnly does not provide hessian_structure='{structure}'.*'diag'"
    ):
        fitted(BASIC[0], structure, backend=DiagonalOnly)
    fitted(BASIC[0], "diag", backend=DiagonalOnly)


def test_the_default_back_end_is_the_exact_ggn():
    assert type(fitted(BASIC[0], "diag").backend) is AutogradGGN
    assert issubclass(AutogradGGN, CurvatureInterface)


def test_the_back_end_reads_mappings_by_the_keys_given():
    la = fitted(named("whole_mapping"), "diag")
    assert (la.backend.dict_key_x, la.backend.dict_key_y) == ("inputs", "target")
