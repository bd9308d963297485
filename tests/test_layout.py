"""Outputs whose C outputs are on another axis than the last: everything is as for the network that moves them there."""

import copy
import pickle

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.evaluation.report import predict
from tests import reference
from tests.cases import EVERYTHING, STRUCTURES
from tests.estimators import dense
from tests.tools import assert_close

C, IGNORED = 3, -100


class Moved(nn.Module):
    """A network whose outputs have channels last."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).movedim(1, -1)


def network(head=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Conv2d(2, C, 2, padding=1) if head is None else head()
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), head).double().eval()


def images(n=5, seed=1):
    return torch.randn(n, 1, 3, 2, generator=torch.Generator().manual_seed(seed)).double()


X, NEW = images(), images(3, 2)
LABELS = network()(X).argmax(1)
LABELS[0, 0], LABELS[2] = IGNORED, IGNORED
SOFT = network()(X).detach().flip(0).softmax(1)
NUMBERS = network()(X).detach().flip(0)
TARGETS = {"labels": ("classification", LABELS), "soft": ("classification", SOFT), "numbers": ("regression", NUMBERS)}
every_target = pytest.mark.parametrize(("likelihood", "y"), TARGETS.values(), ids=TARGETS)
WEIGHTS = ("last_layer", "all")
BLOCKS = [(weights, structure) for weights in WEIGHTS for structure in ("full", "kron", "diag")]
POINT = {"n_subset": 5}
KINDS = {
    **{f"{weights} {structure}": (weights, structure, {}) for weights, structure in BLOCKS},
    "subnetwork": ("subnetwork", "full", {"subnetwork_indices": torch.tensor([3, 12, 15])}),
    **{f"process {weights}": (weights, "gp", POINT) for weights in WEIGHTS},
    **{
        f"ella {weights}": (
            weights,
            "gp",
            {"functional_approximation": "nystrom", "n_eigenvalues": 5, "subsample_size": 5},
        )
        for weights in WEIGHTS
    },
}


def moved(y):
    """Targets in the order of axes of outputs with channels last."""
    return y.movedim(1, -1) if y.is_floating_point() else y


def both(kind, likelihood, y, **options):
    """The same posterior of a network with channels on axis 1, and of one with channels last."""
    weights, structure, further = KINDS[kind]
    found = Laplace(network(), likelihood, weights, structure, **further, **options)
    truth = Laplace(Moved(network()), likelihood, weights, structure, **further)
    found.fit([(X[:2], y[:2]), (X[2:], y[2:])])
    truth.fit([(X[:2], moved(y[:2])), (X[2:], moved(y[2:]))])
    return found, truth


def in_layout(found):
    """What a network with channels last predicts, in the layout of the other."""
    if not isinstance(found, tuple):
        return found.movedim(-1, 1)
    mean, cov = found
    return mean.movedim(-1, 1), cov.movedim((-2, -1), (1, 2)) if cov.dim() > mean.dim() else cov.movedim(-1, 1)


def compare(found, expected):
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for one, other in pairs:
        assert one.shape == other.shape
        assert_close(one, other)


@pytest.mark.parametrize(
    ("kind", "target"),
    [(kind, target) for kind in KINDS for target in TARGETS if "ella" not in kind or target != "soft"],
)
def test_predictions_are_those_of_the_network_that_moves_its_channels(kind, target):
    """Soft labels but for ELLA, which takes class indices."""
    likelihood, y = TARGETS[target]
    found, truth = both(kind, likelihood, y)
    assert found.output_dim == 1
    assert truth.output_dim == 3
    compare(found(NEW), in_layout(truth(NEW)))
    if likelihood == "regression":
        compare(found(NEW, diagonal_output=True), in_layout(truth(NEW, diagonal_output=True)))
        compare(found(NEW, joint=True), truth(NEW, joint=True))
    if not hasattr(found, "functional_variance") or "ella" in kind:
        return
    seed = torch.Generator().manual_seed
    drawn = [la.predictive_samples(NEW, n_samples=4, generator=seed(0)) for la in (found, truth)]
    compare(drawn[0], drawn[1].movedim(-1, 2))
    drawn = [la.functional_samples(NEW, n_samples=4, generator=seed(0)) for la in (found, truth)]
    compare(drawn[0], drawn[1].movedim(-1, 2))


@pytest.mark.parametrize("kind", ["last_layer kron", "all diag", "process last_layer"])
@pytest.mark.parametrize("name", ["labels", "numbers"])
def test_parts_of_a_prediction_have_the_layout_of_the_model(kind, name):
    found, truth = both(kind, *TARGETS[name])
    seed = torch.Generator().manual_seed
    told, expected = (la.predict(NEW, generator=seed(0)) for la in (found, truth))
    compare(told.mean, found(NEW) if name == "labels" else found(NEW)[0])
    for one, other in zip(told.as_tuple(), expected.as_tuple(), strict=True):
        compare(one, other.movedim(-1, 1) if other.dim() == 4 else other)
    parts = [found.predict(part, generator=seed(0)).mean for part in NEW.split(1)]
    compare(torch.cat(parts), told.mean)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_posterior_of_a_convolution_is_that_of_brute_force(structure, likelihood):
    y = TARGETS["labels" if likelihood == "classification" else "numbers"][1]
    model = network()
    la = Laplace(model, likelihood, hessian_structure=structure, **EVERYTHING.get(structure, {}))
    la.fit([(X, y)])
    names = ("2.weight", "2.bias")
    problem = reference.Problem(model, lambda m, x: m(x).movedim(1, -1), names, X, moved(y), likelihood, C)
    precision = problem.curvature(structure) + torch.eye(la.n_params).double()
    assert_close(dense(la.posterior_precision), precision)
    assert_close(la.mean, problem.theta())
    J = problem.jacobian(NEW)
    cov = reference.output_covariance(J.flatten(0, 1), precision)
    if likelihood == "classification":
        f = model(NEW).movedim(1, -1)
        compare(la(NEW), reference.probit(f.reshape(-1, C), cov).reshape(f.shape).movedim(-1, 1))
    else:
        compare(la(NEW)[1], cov.reshape(3, 3, 2, C, C).movedim((-2, -1), (1, 2)))


HEADS = {
    "1×1": lambda: nn.Conv2d(2, C, 1),
    "strided": lambda: nn.Conv2d(2, C, 2, stride=2, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(2, C, (2, 3), stride=2, padding=1),
    "circular": lambda: nn.Conv2d(2, C, (3, 1), padding=(1, 0), padding_mode="circular"),
    "without bias": lambda: nn.Conv2d(2, C, 2, padding=1, bias=False),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_variance_of_a_convolution_is_that_of_its_jacobians(name):
    """In the order of the parameters; of a transposed convolution in that of the weight with outputs first."""
    model = network(HEADS[name])
    y = model(X).detach()
    la = Laplace(model, "regression", hessian_structure="full", prior_precision=0.7)
    la.fit([(X, y)])
    names = ("2.weight",) if model[2].bias is None else ("2.weight", "2.bias")
    problem = reference.Problem(model, lambda m, x: m(x).movedim(1, -1), names, X, moved(y), "regression", C)
    precision = problem.ggn() + 0.7 * torch.eye(la.n_params).double()
    cov = reference.output_covariance(problem.jacobian(NEW).flatten(0, 1), precision)
    mean, found = la(NEW)
    assert_close(mean, model(NEW))
    assert_close(found.movedim((1, 2), (-2, -1)).reshape(cov.shape), cov)
    order = torch.arange(model[2].weight.numel()).reshape(model[2].weight.shape)
    if isinstance(model[2], nn.ConvTranspose2d):
        order = order.transpose(0, 1)
    order = torch.cat([order.flatten(), torch.arange(order.numel(), la.n_params)])
    assert_close(la.posterior_precision, precision[order][:, order])
    assert_close(la.mean, problem.theta()[order])
    assert_close(la.mean, nn.utils.parameters_to_vector(la.params))
    assert_close(la.head_(torch.tanh(model[0](NEW))), model(NEW))
    theta = la.sample(2)[1]
    la.mean = theta
    shifted = la.head_(torch.tanh(model[0](NEW))) - model(NEW)
    step = torch.zeros_like(theta)
    step[order] = theta - problem.theta()[order]
    assert_close(shifted.movedim(1, -1).flatten(1, 2), problem.jacobian(NEW) @ step)


@pytest.mark.every(4, each_value=False)
@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("kind", ["last_layer kron", "all diag"])
@every_target
def test_tuning_sees_the_same_rows(kind, likelihood, y):
    found, truth = both(kind, likelihood, y)
    results = [
        la.tune([(X, targets)], [(X, targets)] if kind.startswith("last") else None)
        for la, targets in ((found, y), (truth, moved(y)))
    ]
    assert_close(*(torch.tensor(result.value).double() for result in results))
    compare(found(NEW), in_layout(truth(NEW)))


@pytest.mark.parametrize("kind", ["last_layer kron", "all diag"])
@pytest.mark.parametrize("score", ["density", "max_prob", "entropy", "mutual_information", "relative"])
def test_foreign_positions_have_a_score_each(kind, score):
    found, truth = both(kind, "classification", LABELS)
    seed = torch.Generator().manual_seed
    scores = [la.ood_score(NEW, score, generator=seed(0)) for la in (found, truth)]
    assert scores[0].shape == (3, 3, 2)
    assert_close(*scores)


@pytest.mark.parametrize("kind", ["last_layer kron", "all diag"])
def test_an_axis_that_was_given_is_the_same_as_one_that_was_found(kind):
    found, truth = both(kind, "regression", NUMBERS, output_dim=1)
    compare(found(NEW), in_layout(truth(NEW)))
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.output_dim == 1
        compare(other(NEW), found(NEW))


@pytest.mark.filterwarnings("ignore:The best prior precision")
@pytest.mark.parametrize("kind", ["last_layer kron", "all diag", "process last_layer"])
def test_a_state_of_one_object_serves_another_that_has_not_run_yet(kind, tmp_path):
    found, _ = both(kind, "regression", NUMBERS)
    found.save(tmp_path / "state")
    weights, structure, further = KINDS[kind]
    other = Laplace(network(), "regression", weights, structure, **further)
    other.load(tmp_path / "state")
    other.optimize_prior_precision(method="gridsearch", val_loader=[(X, NUMBERS)], grid_size=3)
    found.optimize_prior_precision(method="gridsearch", val_loader=[(X, NUMBERS)], grid_size=3)
    assert_close(other.prior_precision, found.prior_precision)
    compare(other(NEW), found(NEW))


def test_an_axis_that_nothing_tells_is_refused_until_it_is_given():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, 3).double())

        def forward(self, x):
            return torch.einsum("bi,ijk->bjk", x, self.weight)

    x, y = torch.randn(4, 3).double(), torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(UnsupportedError, match=r"tell which axis.*output_dim=1"):
        Laplace(Hidden(), "classification", "all", "diag").fit([(x, y)])
    for axis in (1, 2, -1, -2):
        la = Laplace(Hidden(), "classification", "all", "diag", output_dim=axis)
        la.fit([(x, y)])
        assert_close(la(x).sum(axis), torch.ones(4, 3).double())


@pytest.mark.parametrize("axis", [0, True, "channels", 1.0])
def test_an_axis_that_is_none_is_refused(axis):
    with pytest.raises(InputError, match=r"output_dim must be the axis.*never 0"):
        Laplace(network(), "classification", output_dim=axis)


def test_an_axis_that_the_outputs_lack_is_refused():
    la = Laplace(network(), "classification", output_dim=4)
    with pytest.raises(ShapeError, match=r"output_dim=4.*have 4 axes"):
        la.fit([(X, LABELS)])


def test_a_wrong_axis_is_refused_by_the_head():
    la = Laplace(network(), "classification", output_dim=2)
    with pytest.raises(UnsupportedError, match=r"output_dim=2 is another axis than that of the outputs"):
        la.fit([(X, LABELS)])
    la = Laplace(network(), "classification", output_dim=3)
    with pytest.raises(ShapeError, match=r"output_dim=3 is another axis than that of the outputs"):
        la.fit([(X, LABELS)])


def test_reports_read_classes_where_the_estimator_puts_them():
    found, truth = both("last_layer kron", "classification", LABELS)
    assert_close(*(predict(la, [(NEW, LABELS[:3])]).probs for la in (found, truth)))
