"""The eigenvalue-corrected Kronecker estimators."""

import pytest
import torch

from laplace import EKFACLaplace, EKFACLLLaplace, FullLaplace, KronLaplace, KronLLLaplace, Laplace
from laplace.curvature import AutogradEF, AutogradHessian, BackPackGGN, GGNInterface
from laplace.errors import InputError, UnsupportedError
from tests.cases import BASIC
from tests.estimators import fitted
from tests.networks import named
from tests.test_whole_network import precision as kron_precision
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.mark.parametrize("name", ["mlp", "conv2d", "positions", "embedding", "encoder", "conv1d_depthwise", "lstm"])
@pytest.mark.parametrize("backend", [None, AutogradEF], ids=["GGN", "EF"])
@pytest.mark.filterwarnings("ignore:The recurrent layers")
def test_no_block_is_further_from_the_curvature_than_that_of_kron(name, backend):
    """And in the eigenbasis its diagonal is that of the curvature: the best there is, in the Frobenius norm."""
    network, model = named(name), named(name).model()
    full, kron, ekfac = (
        cls(model, network.likelihood, backend=backend) for cls in (FullLaplace, KronLaplace, EKFACLaplace)
    )
    for la in (full, kron, ekfac):
        x, y = network.data()
        la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    problem, H = network.problem(), full.H
    matrices = (H, kron.H_facs.to_matrix(), ekfac.H.to_matrix())
    blocks = list(zip(*(problem.groups(M) for M in matrices), strict=True))
    gains = []
    for exact, product, corrected in blocks:
        gains.append(float((exact - product).norm() - (exact - corrected).norm()))
        assert gains[-1] >= -1e-10 * float(exact.norm())
        assert_close(corrected.trace(), exact.trace())  # a basis does not change it
    assert max(gains) > 1e-4 * float(H.norm())
    for (exact, _, _), vectors, s in zip(blocks, ekfac.H.eigenvectors, ekfac.H.spectrum, strict=True):
        sides = [torch.eye(n) if v is None else v for v, n in zip(vectors, s.shape, strict=True)]
        Q = torch.kron(*(side.contiguous() for side in sides)) if len(sides) == 2 else sides[0]
        assert_close((Q.T @ exact @ Q).diagonal(), s.flatten())


def test_a_product_is_left_as_it_is():
    """One datum has an exact product for its curvature: nothing is corrected."""
    network, model = named("mlp_regression"), named("mlp_regression").model()
    x, y = network.data()
    kron, ekfac = (cls(model, "regression") for cls in (KronLaplace, EKFACLaplace))
    for la in (kron, ekfac):
        la.fit([(x[:1], y[:1])])
    assert_close(ekfac.H.to_matrix(), kron.H_facs.to_matrix())
    assert kron_precision(network, ekfac).shape == (ekfac.n_params,) * 2


def test_loaders_are_read_twice_and_those_that_cannot_be_are_refused():
    network, model = named("mlp"), named("mlp").model()
    la = EKFACLaplace(model, network.likelihood)
    with pytest.raises(InputError, match=r"hessian_structure='ekfac'.*iterator"):
        la.fit(iter([network.data()]))
    (x, y), calls = network.data(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    la.fit([(x[:2], y[:2]), (x[2:], y[2:])])
    assert (len(calls), la.n_data) == (5, len(y))  # two passes, and one of the first batch that looks for features

    class Shrinking:
        """A loader that yields less each time."""

        def __init__(self):
            self.batches = [(x[:2], y[:2]), (x[2:], y[2:])]

        def __iter__(self):
            yield from self.batches
            self.batches = self.batches[1:]

    before = la.H
    with pytest.raises(InputError, match=r"5 rows in its first pass and 3 in a later one"):
        la.fit(Shrinking())
    assert_close(la.H.to_matrix(), before.to_matrix())


def test_features_of_a_last_layer_are_kept_so_that_the_model_runs_once_over_any_iterable():
    case, calls = BASIC[0], []
    model = case.model()
    model.register_forward_hook(lambda *_: calls.append(1))
    la = EKFACLLLaplace(model, case.likelihood)
    la.fit(iter(case.batches(1, 3)))
    assert len(calls) == 3
    assert_close(la.H.to_matrix(), case.problem().curvature("ekfac"))


def test_adding_to_a_fit_is_refused_before_the_data_are_read():
    case = BASIC[0]
    la = fitted(case, "ekfac")
    before = la.H.to_matrix()

    def batches():
        pytest.fail("the data were read")
        yield

    with pytest.raises(UnsupportedError, match=r"override=False"):
        la.fit(batches(), override=False)
    assert_close(la.H.to_matrix(), before)


class WithFactors(GGNInterface):
    """A user's own back end: Jacobians, and Kronecker factors of a last layer."""

    def kron(self, x, y, N, **kwargs):
        la = KronLLLaplace(self.model, self.likelihood)
        return la.backend.kron(x, y, N)


def test_back_ends_provide_it_if_they_have_factors():
    case = BASIC[0]
    la = EKFACLLLaplace(case.model(), case.likelihood, backend=WithFactors)
    la.fit(case.batches(4))
    assert_close(la.H.to_matrix(), case.problem().curvature("ekfac"))
    for backend, says in ((AutogradHessian, "No back end of the Hessian"), (BackPackGGN, "AutogradGGN")):
        la = Laplace(named("mlp").model(), "classification", "all", "ekfac", backend=backend)
        with pytest.raises(UnsupportedError, match=f"does not provide hessian_structure='ekfac'.*{says}"):
            la.fit([named("mlp").data()])


def test_a_noise_for_each_output_scales_the_rows_of_independent_outputs():
    case = BASIC[1]
    sigma = torch.tensor([0.5, 2.0])
    la, full = (fitted(case, structure, sigma_noise=sigma) for structure in ("ekfac", "full"))
    P = case.problem().groups(full.posterior_precision)
    trace = sum(block.trace() for block in P)
    assert_close(la.posterior_precision.to_matrix().trace(), trace)
