"""Options of single calls, as code that calls back ends directly passes them: ``N``, ``mc_samples``, ``kfac_approx``."""

import pytest
import torch

from laplace import Laplace
from laplace.curvature import (
    BACKENDS,
    AsdlEF,
    AsdlGGN,
    AutogradEF,
    AutogradGGN,
    AutogradHessian,
    CurvlinopsEF,
    CurvlinopsGGN,
)
from laplace.enums import HessianStructure, SubsetOfWeights
from laplace.errors import InputError, UnsupportedError
from tests.contracts import generator
from tests.networks import named
from tests.tools import assert_close, assert_within

every_back_end = pytest.mark.parametrize("cls", BACKENDS, ids=lambda cls: cls.__name__)
IMAGES = named("two_convolutions")
"""Its first layers are used at many positions."""


@every_back_end
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_number_of_data_divides_input_factors_and_nothing_else(cls, subset):
    network, (x, y) = named("mlp"), named("mlp").data()
    la = Laplace(network.model(), network.likelihood, subset, "full", backend=cls)
    if subset == "last_layer":
        la.model.find_last_layer(x)
    engine = la.backend
    for structure in ("full", "diag"):
        if cls.can(HessianStructure(structure), SubsetOfWeights(subset)):
            loss, H = getattr(engine, structure)(x, y)
            for mine, expected in zip(getattr(engine, structure)(x, y, N=100), (loss, H), strict=True):
                assert_close(mine, expected, structure)
    if cls.can(HessianStructure.KRON, SubsetOfWeights(subset)):
        once, divided = engine.kron(x, y, N=1)[1], engine.kron(x, y, N=100)[1]
        by_keyword = engine.kron(x, y, 100)[1]
        for group, other, same in zip(once.kfacs, divided.kfacs, by_keyword.kfacs, strict=True):
            assert_close(other[0], group[0], "outputs' side")
            assert_close(same[-1], other[-1])
            if len(group) == 2:
                assert_close(100 * other[1], group[1], "inputs' side")


@pytest.mark.every(4)
@every_back_end
@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, "ten", None])
def test_a_number_of_data_that_is_none_is_refused(cls, wrong):
    network = named("mlp")
    engine = cls(network.model(), network.likelihood)
    for structure in ("full", "diag", "kron"):
        if structure == "kron" and not isinstance(wrong, int):
            continue  # the annotation of its argument says so, and is checked in tests
        if cls.can(HessianStructure(structure), SubsetOfWeights.ALL):
            with pytest.raises(InputError, match="N is the number of training data"):
                getattr(engine, structure)(*network.data(), N=wrong)


@every_back_end
def test_options_that_a_back_end_does_not_have_are_named(cls):
    network = named("mlp")
    engine = cls(network.model(), network.likelihood)
    for structure in ("full", "diag", "kron"):
        if cls.can(HessianStructure(structure), SubsetOfWeights.ALL):
            count = {"N": 5} if structure == "kron" else {}
            with pytest.raises(UnsupportedError, match="'number'"):
                getattr(engine, structure)(*network.data(), **count, number=5)


@pytest.mark.parametrize("cls", [AsdlGGN, AsdlEF])
def test_options_of_asdl_are_listed_where_one_is_unknown(cls):
    engine = cls(named("mlp").model(), "classification")
    with pytest.raises(UnsupportedError, match=r"no option 'data_sise'.*ASDL knows.*'data_size'"):
        engine.diag(*named("mlp").data(), data_sise=2)
    with pytest.raises(UnsupportedError, match=r"cannot set 'n_mc_samples'.*num_samples"):
        engine.kron(*named("mlp").data(), N=5, n_mc_samples=2)


@pytest.mark.parametrize("name", ["mlp", "mlp_regression"])
def test_samples_of_one_call_are_those_of_the_constructor(name):
    network, (x, y) = named(name), named(name).data()

    def draw(structure: str, samples: int | None, num_samples: int) -> torch.Tensor:
        options = {"stochastic": True, "num_samples": num_samples, "generator": generator(3)}
        engine = CurvlinopsGGN(network.model(), network.likelihood, **options)
        count = {"N": 1} if structure == "kron" else {}
        H = getattr(engine, structure)(x, y, **count, **({} if samples is None else {"mc_samples": samples}))[1]
        return H.to_matrix() if structure == "kron" else H

    for structure in ("full", "diag", "kron"):
        assert torch.equal(draw(structure, 7, 1), draw(structure, None, 7))
        assert not torch.equal(draw(structure, 7, 1), draw(structure, None, 1))


def test_many_samples_of_a_call_come_close_to_the_ggn():
    network, n = named("mlp"), 3000
    problem = network.problem()
    mean, variance = problem.sampled_fisher()
    H = CurvlinopsGGN(network.model(), network.likelihood, stochastic=True, generator=generator(0)).full(
        *network.data(), mc_samples=n
    )[1]
    assert_within(H, mean, (variance / n).sqrt())


@pytest.mark.parametrize("name", ["two_convolutions", "positions_then_flat"])
def test_factors_of_averaged_positions_are_those_of_the_built_in_back_ends(name):
    """Made against ``AutogradGGN(kfac_approx="reduce")``, whose tests have them from the definition."""
    network, (x, y) = named(name), named(name).data()

    def matrix(engine, **options) -> torch.Tensor:
        sums = engine.kron(x, y, N=1, **options)[1]
        return sums.divide_inputs(sums.counts).to_matrix()

    expected = matrix(AutogradGGN(network.model(), network.likelihood, kfac_approx="reduce"))
    expanded = matrix(AutogradGGN(network.model(), network.likelihood))
    assert not torch.allclose(expected, expanded)
    assert_close(matrix(CurvlinopsGGN(network.model(), network.likelihood), kfac_approx="reduce"), expected)
    by_option = CurvlinopsGGN(network.model(), network.likelihood, kfac_approx="reduce")
    assert_close(matrix(by_option), expected)
    assert_close(matrix(by_option, kfac_approx="expand"), expanded)
    ours = AutogradEF(network.model(), network.likelihood)
    ours._reduce = True
    assert_close(matrix(CurvlinopsEF(network.model(), network.likelihood), kfac_approx="reduce"), matrix(ours))


def test_averaged_positions_reach_the_package_through_an_estimator():
    fits = []
    for cls in (AutogradGGN, CurvlinopsGGN):
        la = Laplace(IMAGES.model(), IMAGES.likelihood, "all", "kron", backend=cls, backend_kwargs={"kfac_approx": "reduce"})  # fmt: skip
        la.fit([IMAGES.data()])
        fits.append(la)
    assert_close(fits[1](IMAGES.data()[0]), fits[0](IMAGES.data()[0]))
    assert fits[1].backend.made_with == {"kfac_approx": "reduce"}


def test_options_of_curvlinops_that_have_no_meaning_are_refused():
    network = named("mlp")
    exact = CurvlinopsGGN(network.model(), network.likelihood)
    sampled = CurvlinopsGGN(network.model(), network.likelihood, stochastic=True)
    data = network.data()
    with pytest.raises(UnsupportedError, match=r"mc_samples.*stochastic=True"):
        exact.full(*data, mc_samples=3)
    for wrong in (0, 2.0, True, "3"):
        with pytest.raises(InputError, match="mc_samples must be a positive whole number"):
            sampled.diag(*data, mc_samples=wrong)
    with pytest.raises(UnsupportedError, match=r"kfac_approx must be one of 'expand', 'reduce'"):
        exact.kron(*data, N=1, kfac_approx="reduced")
    with pytest.raises(UnsupportedError, match=r"kfac_approx must be one of"):
        CurvlinopsGGN(network.model(), network.likelihood, kfac_approx="mean")
    for engine, structure in ((exact, "full"), (CurvlinopsEF(network.model(), network.likelihood), "diag")):
        with pytest.raises(UnsupportedError, match="'kfac_approx'"):
            getattr(engine, structure)(*data, kfac_approx="reduce")
    with pytest.raises(UnsupportedError, match="'mc_samples'"):
        AutogradHessian(network.model(), network.likelihood).full(*data, mc_samples=3)
