"""Models as people really have them: wrapped, compiled, mixed in precision, trained on; and hyperparameters they keep."""

import copy

import pytest
import torch
from torch import nn

from laplace import DiagLLLaplace, FullLLLaplace, KronLLLaplace, Laplace
from laplace.curvature import AutogradEF, GGNInterface
from laplace.enums import HessianStructure
from laplace.errors import InputError, NotPositiveDefiniteError, UnsupportedError
from laplace.network import FeatureExtractor
from laplace.prior import GaussianPrior
from laplace.structures import DiagCurvature
from tests.cases import STRUCTURES
from tests.tools import assert_close

every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def network(n_outputs=3, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, n_outputs)).to(dtype)


def data(n=20, n_classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator).to(dtype), torch.randint(n_classes, (n,), generator=generator)


def fitted(structure, model=None, likelihood="classification", **options):
    x, y = data()
    la = Laplace(network() if model is None else model, likelihood, hessian_structure=structure, **options)
    la.fit([(x[:12], y[:12]), (x[12:], y[12:])])
    return la


# -- hyperparameters ---------------------------------------------------------------------------------------------------


@every_structure
def test_a_density_keeps_its_gradient_in_the_prior_after_a_prediction(structure):
    la, value = fitted(structure), torch.linspace(-1, 1, 21)
    gradients = []
    for predict_first in (False, True):
        precision = torch.tensor([1.7], requires_grad=True)
        la.prior_precision = precision
        if predict_first:
            la(data()[0])
        la.log_prob(value).backward()
        gradients.append(precision.grad)
    assert_close(gradients[0], gradients[1])


@every_structure
def test_tuning_follows_the_published_loop_and_leaves_its_gradients_alone(structure):
    x, _ = data()
    la = Laplace(network(2), "regression", hessian_structure=structure)
    la.fit([(x, torch.sin(x[:, :2]))])
    log_prior, log_sigma = (torch.zeros(1, requires_grad=True) for _ in range(2))
    (-la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())).backward()
    sigma_gradient = log_sigma.grad.clone()
    la.optimize_prior_precision(n_steps=3)
    assert torch.equal(log_sigma.grad, sigma_gradient)
    assert torch.equal(copy.deepcopy(la)(x)[1], la(x)[1])


@every_structure
def test_hyperparameters_are_not_shared_with_the_users_tensors(structure):
    shared = torch.ones(1)
    first, second = fitted(structure, prior_precision=shared), fitted(structure, prior_precision=shared)
    first.prior_precision *= 100
    assert float(first.prior_precision) == 100.0
    assert float(second.prior_precision) == float(shared) == 1.0
    with pytest.raises(InputError, match="positive"):
        first.prior_precision *= -1
    assert float(first.prior_precision) == 100.0


def test_an_evidence_that_is_refused_assigns_neither_value():
    la = fitted("kron")
    with pytest.raises(UnsupportedError, match="sigma_noise"):
        la.log_marginal_likelihood(torch.tensor([5.0]), torch.tensor(0.5))
    assert float(la.prior_precision) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, "float64"])
def test_a_curvature_dtype_that_cannot_be_factorized_is_refused(dtype):
    with pytest.raises(UnsupportedError, match=r"curvature_dtype must be torch\.float32 or torch\.float64"):
        Laplace(network(), "classification", curvature_dtype=dtype)


# -- precision ---------------------------------------------------------------------------------------------------------


@every_structure
def test_autocasting_is_for_the_model_alone(structure):
    """The features are those of bfloat16; what is made of them is not."""
    model, (x, y) = network(dtype=torch.float32), data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        la = Laplace(model, "classification", hessian_structure=structure)
        la.fit([(x, y)])
        probabilities = la(x)
        f, phi = la.model.forward_with_features(x)
    exact = Laplace(model[2], "classification", hessian_structure=structure, last_layer_name="")
    with torch.autocast("cpu", torch.bfloat16):
        exact.fit([(phi, y)])
    assert_close(la.log_det_posterior_precision, exact.log_det_posterior_precision)
    assert la.log_det_posterior_precision.dtype == torch.float32
    assert (probabilities.float().sum(-1) - 1).abs().max() < 0.02  # rounded to the dtype of the outputs
    assert f.dtype == torch.bfloat16


def test_directions_without_curvature_keep_the_prior_variance_in_float32():
    """Features of low rank: a precision below the rounding of the sums still is that of the prior."""
    torch.manual_seed(0)
    phi = (torch.randn(4000, 5) @ torch.randn(5, 64)).float()
    head = nn.Linear(64, 3).float()
    la = KronLLLaplace(head, "classification", prior_precision=1e-4, last_layer_name="")
    la.fit([(phi, torch.randint(3, (4000,)))])
    wide = KronLLLaplace(
        copy.deepcopy(head).double(),
        "classification",
        prior_precision=1e-4,
        last_layer_name="",
        curvature_dtype=torch.float64,
    )
    wide.fit([(phi.double(), torch.zeros(4000, dtype=torch.long))])
    strange = torch.randn(7, 64).float()
    ratio = la.functional_variance_fast(strange)[1] / wide.functional_variance_fast(strange.double())[1]
    assert (ratio - 1).abs().max() < 1e-3


@every_structure
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_a_head_in_another_precision_than_the_backbone_decides(structure, dtypes):
    backbone, head = dtypes

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 6).to(backbone)
            self.head = nn.Linear(6, 3).to(head)

        def forward(self, x):
            return self.head(self.body(x).tanh().to(head))

    x, y = data(dtype=backbone)
    la = Laplace(Mixed(), "classification", hessian_structure=structure)
    la.fit([(x, y)])
    assert la(x).dtype == head
    assert torch.isfinite(la.log_marginal_likelihood())


# -- models ------------------------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """Merges an update into its weight in evaluation mode, as some adapters do."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.update, self.merged = torch.full((6, 4), 0.01), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.update if not mode else -self.update
            self.merged = not mode
        return self


def test_modules_that_act_on_train_and_eval_are_switched_back():
    model = network()
    model[0] = Merging(4, 6).double()
    model.train()
    before = model[0].weight.clone()
    fitted("kron", model)
    assert model[0].training
    assert not model[0].merged
    torch.testing.assert_close(model[0].weight, before, rtol=0, atol=1e-15)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, pixels, scale=1.0):
        return self.net(pixels * scale)


class PassesOn(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrap", [nn.DataParallel, PassesOn], ids=["DataParallel", "*args, **kwargs"])
def test_wrapped_models_take_mappings_as_the_model_inside(wrap):
    x, y = data()
    torch.manual_seed(0)
    plain = Keywords()
    la = Laplace(wrap(plain), "classification", dict_key_x="pixels")
    la.fit([{"pixels": x, "labels": y}])
    direct = Laplace(plain, "classification", dict_key_x="pixels")
    direct.fit([{"pixels": x, "labels": y}])
    assert_close(la({"pixels": x}), direct({"pixels": x}))


def test_compiled_models_are_those_they_were_compiled_from():
    model, (x, y) = network(), data()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    la = Laplace(compiled, "classification")
    la.fit([(x, y)])
    assert_close(la(x), fitted("kron", model)(x))


def test_outputs_that_leave_the_head_on_a_later_batch_are_noticed():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x).clamp(-1.5, 1.5)

    x, y = data()
    la = Laplace(Clamped(), "classification")
    la.fit([(x, y)])
    with pytest.raises(UnsupportedError, match="not those of its last linear layer"):
        la.fit([(x, y), (1e3 * x, y)])


def test_a_head_that_is_the_whole_model_is_not_tied():
    x, y = data()
    la = Laplace(nn.Linear(4, 3), "classification")
    la.fit([(x, y)])
    assert la(x).shape == (20, 3)


def test_a_head_is_found_under_each_of_its_names():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.head = self.fc

        def forward(self, x):
            return self.head(x)

    x, y = data()
    la = Laplace(Alias(), "classification", last_layer_name="head")
    la.fit([(x, y)])
    assert la.n_params == 15


def test_what_a_feature_extractor_was_told_holds():
    extractor = FeatureExtractor(network(), "2", enable_backprop=True, dict_key_x="pixels", dict_key_y="target")
    la = Laplace(extractor, "classification")
    assert (la.enable_backprop, la.dict_key_x, la.dict_key_y) == (True, "pixels", "target")
    assert la.model.last_layer_name == "2"


@every_structure
def test_weights_that_moved_since_fit_are_reported(structure):
    model = network()
    la, (x, _) = fitted(structure, model), data()
    with torch.no_grad():
        model[0].weight += 1  # another feature map is another model, but the posterior is over the head
    la(x)
    with torch.no_grad():
        model[2].weight += 1
    for call in (la, la.functional_samples, la.functional_variance_fast):
        with pytest.warns(UserWarning, match="changed since fit"):
            call(x)


def test_options_that_follow_the_input_are_not_inputs():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, views, scale=1.0):
            return self.net(scale * (views[0] + views[1]))

    x, y = data()
    la = Laplace(Views(), "classification")
    la.fit([([x, x], y)])
    assert_close(la([x, x]), la([x + x, 0 * x]))


# -- data and back ends ------------------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("backend", [None, AutogradEF], ids=["GGN", "EF"])
def test_training_data_that_are_all_masked_are_refused(structure, backend):
    x, y = data()
    la = Laplace(network(), "classification", hessian_structure=structure, backend=backend)
    with pytest.raises(InputError, match="All 20 rows"):
        la.fit([(x, torch.full_like(y, -100))])
    la.fit([(x, torch.full_like(y, -100)), (x, y)])
    assert la.n_data == 40


@pytest.mark.parametrize("options", [{"link_approx": "mc"}, {"pred_type": "nn"}], ids=["mc", "nn"])
def test_a_sampled_grid_search_scores_every_point_with_the_same_random_numbers(options):
    """Two runs agree bit for bit, and two equal points have equal scores."""
    la, (x, y), scores = fitted("kron"), data(), []

    def loss(probabilities, targets):
        scores.append(float(-probabilities.gather(1, targets[:, None]).log().mean()))
        return scores[-1]

    for _ in range(2):
        with pytest.warns(UserWarning, match="end of the grid|does not depend"):
            la.optimize_prior_precision(
                method="gridsearch", val_loader=[(x, y)], loss=loss, grid_size=3, n_samples=10, log_prior_prec_min=2,
                log_prior_prec_max=2, generator=torch.Generator().manual_seed(3), **options,
            )  # fmt: skip
    assert len(set(scores)) == 1
    assert len(scores) == 6


class OnlyJacobians(GGNInterface):
    """What a user writes first."""


def test_the_error_of_a_missing_structure_names_those_there_are():
    la = Laplace(network(), "classification", backend=OnlyJacobians)
    with pytest.raises(UnsupportedError, match="it provides 'blockdiag', 'diag', 'full', 'lowrank'"):
        la.fit([data()])


def test_a_negative_diagonal_is_refused():
    prior = GaussianPrior(torch.zeros(()), torch.ones(1), (3,))
    with pytest.raises(NotPositiveDefiniteError, match="negative curvature"):
        DiagCurvature(torch.tensor([1.0, -2.0, 0.0])).posterior(prior)


def test_the_structures_of_the_built_in_back_ends_are_declared():
    for cls in (FullLLLaplace, KronLLLaplace, DiagLLLaplace):
        assert {s.value for s in cls(network(), "classification").backend.structures} == set(STRUCTURES)
    assert HessianStructure.KRON in AutogradEF.structures
