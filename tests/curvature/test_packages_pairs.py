"""Reward modeling with ASDL and curvlinops: curvature of pairs, and scores and preferences predicted with it."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import BACKENDS, AutogradEF, AutogradGGN, AutogradHessian, CurvlinopsGGN
from laplace.curvature.package import PackageInterface
from laplace.enums import HessianStructure, Likelihood
from laplace.errors import ShapeError, UnsupportedError
from tests.cases import named
from tests.contracts import generator, model_untouched
from tests.tools import assert_close, assert_within

PACKAGES = [c for c in BACKENDS if issubclass(c, PackageInterface) and Likelihood.REWARD_MODELING in c.likelihoods]
SAMPLERS = [cls for cls in PACKAGES if cls.matrix == "GGN"]
OURS = {"GGN": AutogradGGN, "empirical Fisher": AutogradEF, "Hessian": AutogradHessian}
every_package = pytest.mark.parametrize("cls", PACKAGES, ids=lambda cls: cls.__name__)
subsets = pytest.mark.parametrize("subset", ["all", "last_layer"])
cases = pytest.mark.parametrize("name", ["preferences", "no_bias_preferences", "compared_preferences"])


def back_end(cls, case, subset: str, **options):
    if subset == "all":
        return cls(case.model(), case.likelihood, **options)
    engine = cls(case.extractor(), case.likelihood, last_layer=True, **options)
    engine.model.find_last_layer(case.data()[0])
    return engine


def of_weights(case, subset: str):
    """Truth by brute force, for all weights or those of the head."""
    problem = case.problem()
    if subset == "last_layer":
        return problem
    return type(problem)(
        case.model(), problem.forward, tuple(key for key, _ in case.model().named_parameters()),
        problem.x, problem.y, problem.likelihood, problem.n_outputs,
    )  # fmt: skip


def test_asdl_and_curvlinops_know_pairs():
    assert {cls.__name__[:4] for cls in PACKAGES} == {"Asdl", "Curv"}


@pytest.mark.every(3)
@every_package
@subsets
@cases
def test_the_curvature_of_pairs_is_exact(cls, subset, name):
    case = named(name)
    (x, y), problem = case.data(), of_weights(case, subset)
    truth = {"GGN": problem.ggn, "empirical Fisher": problem.empirical_fisher, "Hessian": problem.true_hessian}
    expected = truth[cls.matrix]()
    engine, ours = back_end(cls, case, subset), back_end(OURS[cls.matrix], case, subset)
    for structure in sorted(cls.structures):
        if structure is HessianStructure.KRON:
            for mine, theirs in zip(engine.kron(x, y, N=7)[1].kfacs, ours.kron(x, y, N=7)[1].kfacs, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert_close(a, b, "the factors of the built-in back end")
            continue
        loss, H = getattr(engine, structure.value)(x, y)
        assert_close(loss, problem.nll())
        assert_close(H, expected if structure is HessianStructure.FULL else expected.diagonal(), structure.value)
    assert_close(engine.gradients(x, y)[0], problem.gradients())
    assert_close(engine.jacobians(x[:, 0])[0], problem.jacobian(x[:, 0]).flatten(0, 1), "Jacobians of scores")


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("cls", [cls for cls in PACKAGES if cls.matrix != "Hessian"], ids=lambda cls: cls.__name__)
@subsets
def test_scores_and_preferences_are_those_of_the_built_in_back_end(cls, subset, structure):
    case, model = named("preferences"), named("preferences").model()
    fits = []
    for backend in (cls, OURS[cls.matrix]):
        with model_untouched(model):
            la = Laplace(model, case.likelihood, subset, structure, backend=backend, prior_precision=0.3)
            la.fit(case.batches(1, 5))
            pairs, items = case.data(shift=1)[0], case.data(shift=1)[0][:, 0]
            fits.append([*la(items), la(pairs, fitting=True), la.log_marginal_likelihood(), la.loss])
    for mine, theirs in zip(*fits, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("cls", SAMPLERS, ids=lambda cls: cls.__name__)
@subsets
def test_the_sampled_fisher_of_pairs_has_the_curvature_as_its_expectation(cls, subset):
    case, n = named("preferences"), 500
    mean, variance = of_weights(case, subset).sampled_fisher()
    engine = back_end(cls, case, subset, stochastic=True, num_samples=n, generator=generator(0))
    assert_within(engine.diag(*case.data())[1], mean.diagonal(), (variance.diagonal() / n).sqrt())


@every_package
@subsets
def test_no_pairs_have_no_curvature_and_wrong_shapes_are_refused(cls, subset):
    case = named("preferences")
    x, y = case.data()
    engine = back_end(cls, case, subset)
    for structure in sorted(cls.structures):
        count = {"N": 1} if structure is HessianStructure.KRON else {}
        H = getattr(engine, structure.value)(x[:0], y[:0], **count)[1]
        assert float((H.to_matrix() if count else H).abs().max()) == 0
        with pytest.raises(ShapeError, match="fitted on pairs"):
            getattr(engine, structure.value)(x[:, 0], y, **count)


class Contrast(nn.Module):
    """Scores that depend on the other item of a pair."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(x - x.mean(1, keepdim=True) if x.dim() == 3 else x)


def test_scores_that_depend_on_the_other_item_are_refused():
    case = named("preferences")
    with pytest.raises(UnsupportedError, match=r"other scores.*AutogradGGN"):
        CurvlinopsGGN(Contrast().double(), "reward_modeling").full(*case.data())


@pytest.mark.parametrize("width", [5, 2], ids=lambda width: f"{width} inputs")
@every_package
def test_a_row_with_both_scores_of_a_pair_is_a_row_of_layers(cls, width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, width, dtype=torch.float64), torch.arange(6) % 2
    engine, ours = cls(model, "reward_modeling"), OURS[cls.matrix](model, "reward_modeling")
    for structure in cls.structures & type(ours).structures:
        count = {"N": 6} if structure is HessianStructure.KRON else {}
        mine, theirs = (getattr(one, structure.value)(x, y, **count)[1] for one in (engine, ours))
        assert_close(*(H.to_matrix() if count else H for H in (mine, theirs)), structure.value)
