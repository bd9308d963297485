"""The built-in back ends against brute force."""

import pytest
import torch

from laplace.curvature import last_layer
from laplace.curvature.autograd import AutogradEF, AutogradGGN, AutogradHessian
from laplace.errors import UnsupportedError
from laplace.network.feature_extractor import FeatureExtractor
from tests.cases import BASIC, CASES, STRUCTURES, Case, named
from tests.contracts import check_backend, model_untouched
from tests.tools import assert_close, assert_mean_is, assert_within


def backend(cls, case: Case, **options):
    return cls(case.extractor(), case.likelihood, last_layer=True, **options)


def dense(curvature: tuple) -> torch.Tensor:
    loss, value = curvature
    return value.to_matrix() if hasattr(value, "to_matrix") else value if value.dim() == 2 else value.diag()


def compute(backend, structure: str, case: Case) -> torch.Tensor:
    x, y = case.data()
    return dense(structured(backend, structure, x, y))


def structured(backend, structure: str, x, y) -> tuple:
    """What a back end gives for a structure, as one tensor: the eigenvalues in the axes of the weights are a diagonal."""
    if structure == "blockdiag":
        loss, blocks = backend.blockdiag(x, y)
        return loss, torch.block_diag(*blocks)
    if structure == "ekfac":
        head = backend.model.model.head
        loss, diagonals = backend.ekfac(x, y, [[None, None], [None]], [tuple(p.shape) for p in head.parameters()])
        return loss, torch.cat([diagonal.flatten() for diagonal in diagonals])
    if structure == "lowrank":
        loss, products, trace = backend.lowrank(x, y, torch.eye(len(backend.zeros())))
        assert_close(products.trace(), trace)
        return loss, products
    return getattr(backend, structure)(x, y, **({"N": 1} if structure == "kron" else {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ggn_is_exact(case):
    check_backend(backend(AutogradGGN, case), case, fisher=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_empirical_fisher_is_exact_and_takes_gradients_a_datum(case):
    check_backend(backend(AutogradEF, case), case, fisher=True)


@pytest.mark.parametrize("case", [BASIC[0], named("masked_positions")], ids=str)
def test_small_chunks_do_not_change_the_empirical_fisher(case, monkeypatch):
    monkeypatch.setattr(last_layer, "chunk_elements", lambda device: 30)
    check_backend(backend(AutogradEF, case), case, fisher=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_hessian_of_the_last_layer_is_the_ggn(case):
    check_backend(backend(AutogradHessian, case), case, fisher=False)
    assert_close(compute(backend(AutogradHessian, case), "full", case), case.problem().true_hessian())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampled_fisher_has_the_ggn_as_its_expectation(case):
    """Within five standard errors of the mean over n labels a position; the one-label variance is known exactly."""
    n = 3000
    options = {"stochastic": True, "num_samples": n}
    mean, variance = case.problem().sampled_fisher()
    error = (variance / n).sqrt()
    assert_close(mean, case.problem().ggn())
    sampled = [backend(AutogradGGN, case, **options, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    assert_within(compute(sampled[0], "full", case), mean, error, "full")
    assert_within(compute(sampled[1], "diag", case).diagonal(), mean.diagonal(), error.diagonal(), "diag")
    x, y = case.data()
    (G, A), (_, exact_A) = sampled[2].kron(x, y, N=case.problem().n_positions())[1].kfacs[0], case.problem().factors()
    assert_close(A, exact_A)
    if case.bias and not case.problem().pairs:  # the bias block of the full matrix is the sum of Lambda
        C = case.n_outputs
        assert_within(G, mean[-C:, -C:], error[-C:, -C:], "kron")


@pytest.mark.every(4, each_value=False)
@pytest.mark.parametrize("num_samples", [1, 8])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_the_variance_of_the_sampled_fisher_falls_with_the_number_of_samples(case, num_samples):
    """With n labels a datum the variance of each entry is the exact one-label variance divided by n."""
    generator = torch.Generator().manual_seed(2)
    sampled = backend(AutogradGGN, case, stochastic=True, num_samples=num_samples, generator=generator)
    n = 300
    draws = torch.stack([compute(sampled, "full", case) for _ in range(n)])
    mean, variance = case.problem().sampled_fisher()
    assert_within(draws.mean(0), mean, (variance / num_samples / n).sqrt(), "mean")
    # The total variance over entries: a mean of n numbers, whose standard error their spread gives.
    assert_mean_is(((draws - mean) ** 2).sum((1, 2)), variance.sum() / num_samples, "variance")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_sampled_fisher_is_reproducible_for_a_generator_and_differs_between_seeds(case, structure):
    def draw(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return compute(backend(AutogradGGN, case, stochastic=True, generator=generator), structure, case)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(5)
    first = draw(None)
    assert not torch.equal(first, draw(None))
    torch.manual_seed(5)
    assert torch.equal(first, draw(None))


def test_sampling_options_without_sampling_are_refused():
    for options in ({"num_samples": 2}, {"generator": torch.Generator()}):
        with pytest.raises(UnsupportedError, match="stochastic=True"):
            backend(AutogradGGN, BASIC[0], **options)
    with pytest.raises(UnsupportedError, match="at least 1"):
        backend(AutogradGGN, BASIC[0], stochastic=True, num_samples=0)


@pytest.mark.parametrize("cls", [AutogradGGN, AutogradEF, AutogradHessian])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_pass_a_batch_and_the_model_is_untouched(cls, structure):
    case, model = BASIC[0], BASIC[0].model()
    engine = cls(case.extractor(model), case.likelihood, last_layer=True)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with model_untouched(model):
        value = compute(engine, structure, case)
    handle.remove()
    assert calls == [1]
    assert not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_curvature_is_float32_at_least_and_float64_on_request(structure, dtype):
    case = BASIC[0]
    model = case.model().to(dtype)
    x, y = case.data()
    for asked in (None, torch.float64):
        engine = AutogradGGN(FeatureExtractor(model, "head"), case.likelihood, last_layer=True, curvature_dtype=asked)
        loss, value = structured(engine, structure, x.to(dtype), y)
        value = dense((loss, value))
        assert loss.dtype == (asked or torch.promote_types(dtype, torch.float32))
        # Kronecker sums are float64 always: what is made of them has the precision of the loss.
        assert value.dtype == (torch.float64 if structure == "kron" else loss.dtype)
        assert bool(torch.isfinite(value).all())
