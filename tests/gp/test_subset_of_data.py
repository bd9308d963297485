"""The posterior of a subset, over weights and over functions, against dense algebra."""

import pytest
import torch

from laplace.errors import NotPositiveDefiniteError, NumericalWarning, UnsupportedError
from laplace.gp.kernel import SubsetKernel
from laplace.gp.subset_of_data import SubsetPrecision
from tests import reference
from tests.contracts import check_precision
from tests.gp.subsets import KINDS, Sample, sample
from tests.gp.test_kernel import roots
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
everywhere = pytest.mark.parametrize(("kind", "name"), KINDS)
DELTA = 1.3


def posterior(here: Sample, root: torch.Tensor) -> SubsetPrecision:
    return SubsetPrecision(here.kernel, root, here.kernel.gram(root), torch.tensor(1 / DELTA))


@pytest.mark.parametrize("name", ["mlp", "positions"])
def test_over_all_weights_it_is_a_precision(name):
    here = sample("whole", name)
    (root,) = roots(here)
    check_precision(posterior(here, root), here.precision(root, DELTA))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["classification", "no_bias_regression"])
def test_over_a_last_layer_it_is_a_precision(name, number):
    here = sample("last", name)
    root = roots(here)[number]
    bias = len(here.kernel.groups) > 1
    check_precision(posterior(here, root), here.precision(root, DELTA), n_outputs=here.n_outputs, bias=bias)


@everywhere
def test_functions_have_the_covariance_of_the_process(kind, name):
    here = sample(kind, name)
    for root in roots(here):
        found = posterior(here, root)
        J, expected = here.J_inputs, here.covariance(root, DELTA)
        blocks = expected.view(len(J), here.n_outputs, len(J), -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        assert_close(found.functional_variance(J), blocks)
        if kind != "separate":
            assert_close(found.functional_covariance(J), expected)
            assert_close(expected, reference.joint_covariance(J, here.precision(root, DELTA)), "two ways of the truth")


def test_independent_outputs_are_over_no_weights():
    here = sample("separate", "mlp")
    found = posterior(here, *roots(here))
    for call in (found.solve, found.quadratic):
        with pytest.raises(UnsupportedError, match="independent_outputs"):
            call(torch.zeros(found.n_params))
    with pytest.raises(UnsupportedError, match="independent_outputs"):
        found.functional_covariance(here.J_inputs)
    with pytest.raises(UnsupportedError, match="independent_outputs"):
        found.diagonal_of_inverse()


@everywhere
def test_without_a_prior_there_is_no_variance_and_without_data_all_of_it(kind, name):
    here = sample(kind, name)
    root = roots(here)[0]
    certain = SubsetPrecision(here.kernel, root, here.kernel.gram(root), torch.tensor(1e-12))
    assert float(certain.functional_variance(here.J_inputs).abs().max()) < 1e-8
    nothing = SubsetPrecision(here.kernel, 0 * root, 0 * here.kernel.gram(root), torch.tensor(1.0))
    variance = nothing.functional_variance(here.J_inputs).diagonal(dim1=1, dim2=2)
    assert_close(variance, here.J_inputs.square().sum(-1))


def test_a_gram_matrix_that_is_none_is_announced_or_refused():
    here = sample("last", "classification")
    root = here.roots(diagonal=True, shared=True)
    gram = here.kernel.gram(root)
    eye = torch.eye(gram.shape[1])
    spectrum = torch.full((len(eye),), 1e4).index_fill(0, torch.tensor([2]), -1 - 1e-12)
    slightly = SubsetPrecision(here.kernel, root, spectrum.diag().unsqueeze(0), torch.tensor(1.0))
    with pytest.warns(NumericalWarning, match=r"kernel of the subset .* added \d\.\d\de-\d+ to its diagonal"):
        slightly.factor  # noqa: B018 - factorizes
    wrong = SubsetPrecision(here.kernel, root, -3 * eye.unsqueeze(0), torch.tensor(1.0))
    with pytest.raises(NotPositiveDefiniteError, match="kernel of the subset"):
        wrong.factor  # noqa: B018


def test_float32_agrees_with_float64():
    here = sample("last", "classification")
    root = here.roots(diagonal=False)
    narrow = SubsetKernel.of_head(here.kernel.head.to(torch.float32))
    found = SubsetPrecision(
        narrow, root.float(), narrow.gram(root.float()), torch.tensor(1 / DELTA, dtype=torch.float32)
    )
    assert_close(
        found.functional_variance(here.J_inputs.float()), posterior(here, root).functional_variance(here.J_inputs)
    )
