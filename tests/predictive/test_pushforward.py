"""From a posterior over the weights of a linear layer to predictions."""

import pytest
import torch

from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError
from laplace.likelihoods import resolve
from laplace.likelihoods import softmax as links
from laplace.predictive import NetworkLinearization, pushforward
from laplace.predictive import linearization as linearization_module
from laplace.predictive.pushforward import Options
from laplace.structures import DiagPrecision, FullPrecision, Kron
from tests import reference
from tests.contracts import generator, linear_jacobian, of_head
from tests.structures.samples import PER_LAYER, C, D, P, psd, uniform
from tests.tools import LargestTensor, assert_close, assert_covariance_of, assert_within

F64 = torch.float64
PRECISIONS = {
    "full": FullPrecision(psd(P, 1, rank=P) + torch.eye(P).double()),
    "diag": DiagPrecision(uniform(P, 2) + 1),
    "kron": Kron([[psd(C, 1), psd(D, 2)], [psd(C, 1)]]).decompose() + (PER_LAYER + 1),
}
every_structure = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
positions = pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=["rows", "positions"])


def linearization(*shape: int) -> NetworkLinearization:
    noise = generator(5)
    return of_head(torch.randn(*shape, C, generator=noise), torch.randn(*shape, D, generator=noise))


def jacobian(inputs: NetworkLinearization) -> torch.Tensor:
    return torch.stack([linear_jacobian(row, C, True) for row in inputs.head[0].phi])


def predict(inputs, precision, likelihood: str, **options):
    return pushforward.predict(inputs, precision, resolve(likelihood), Options(**options), F64)


@positions
@every_structure
def test_regression_predicts_mean_and_covariance(precision, shape):
    inputs = linearization(*shape)
    V = reference.output_covariance(jacobian(inputs), precision.to_dense())
    mean, cov = predict(inputs, precision, "regression")
    assert_close(mean, inputs.f)
    assert_close(cov, V.reshape(*shape, C, C))
    mean, var = predict(inputs, precision, "regression", diagonal_output=True)
    assert_close(mean, inputs.f)
    assert_close(var, V.diagonal(dim1=1, dim2=2).reshape(*shape, C))
    mean, joint = predict(inputs, precision, "regression", joint=True)
    assert_close(mean, inputs.f.flatten())
    assert_close(joint, reference.joint_covariance(jacobian(inputs), precision.to_dense()))


@positions
@every_structure
@pytest.mark.parametrize("diagonal_output", [False, True])
def test_classification_applies_the_link_to_the_covariance(precision, shape, diagonal_output):
    inputs = linearization(*shape)
    V = reference.output_covariance(jacobian(inputs), precision.to_dense())
    mean = inputs.f.reshape(-1, C)
    probit = predict(inputs, precision, "classification", diagonal_output=diagonal_output)
    assert_close(probit, reference.probit(mean, V).reshape(*shape, C))
    options = {"diagonal_output": diagonal_output, "n_samples": 50, "generator": generator(0)}
    sampled = predict(inputs, precision, "classification", link=LinkApprox.MC, **options)
    V = torch.diag_embed(V.diagonal(dim1=1, dim2=2)) if diagonal_output else V
    if not diagonal_output:
        for link, normalized in ((LinkApprox.BRIDGE, False), (LinkApprox.BRIDGE_NORM, True)):
            bridged = predict(inputs, precision, "classification", link=link)
            assert_close(bridged, reference.bridge(mean, V, normalized=normalized).reshape(*shape, C))
    assert_close(sampled, links.mc(mean, V, 50, generator(0)).exp().reshape(*shape, C))


@positions
@every_structure
def test_sampled_functions_have_the_joint_covariance(precision, shape):
    inputs, n = linearization(*shape), 20_000
    drawn = pushforward.functional_samples(inputs, precision, Options(n_samples=n, generator=generator(0)), F64)
    assert drawn.shape == (n, *shape, C)
    joint = reference.joint_covariance(jacobian(inputs), precision.to_dense())
    assert_covariance_of(drawn.flatten(1), inputs.f.flatten(), joint)


@every_structure
def test_samples_with_diagonal_output_have_independent_outputs(precision):
    inputs, n = linearization(3), 20_000
    options = Options(n_samples=n, generator=generator(0), diagonal_output=True)
    drawn = pushforward.functional_samples(inputs, precision, options, F64)
    V = reference.output_covariance(jacobian(inputs), precision.to_dense())
    for row in range(3):
        assert_covariance_of(drawn[:, row], inputs.f[row], V[row].diagonal().diag())


@positions
@every_structure
def test_weight_samples_of_a_linear_layer_agree_with_the_closed_form(precision, shape):
    """The last layer is linear, so sampling weights estimates the very same Gaussian."""
    inputs, n = linearization(*shape), 20_000
    mean, var = predict(inputs, precision, "regression", pred_type=PredType.NN, n_samples=n, generator=generator(0))
    V = reference.output_covariance(jacobian(inputs), precision.to_dense()).diagonal(dim1=1, dim2=2).reshape(*shape, C)
    assert_within(mean, inputs.f, (V / n).sqrt(), "mean")
    assert_within(var, V, V * (2 / (n - 1)) ** 0.5, "variance")


@every_structure
@pytest.mark.parametrize("options", [{"pred_type": PredType.NN}, {"joint": True}], ids=["nn", "joint"])
def test_sampled_classification_converges_to_the_exact_integral(precision, options):
    inputs, n = linearization(4), 20_000
    V = reference.output_covariance(jacobian(inputs), precision.to_dense())
    exact = reference.expected_softmax(inputs.f, V)
    link = LinkApprox.MC
    probabilities = predict(
        inputs, precision, "classification", link=link, n_samples=n, generator=generator(0), **options
    )
    assert_within(probabilities, exact, (exact * (1 - exact) / n).sqrt(), "probabilities")


def test_the_variance_over_samples_is_unbiased_and_needs_two():
    inputs, precision = linearization(3), PRECISIONS["diag"]
    draw = {"pred_type": PredType.NN, "generator": generator(0)}
    mean, var = predict(inputs, precision, "regression", n_samples=5, **draw)
    options = Options(n_samples=5, generator=generator(0))
    drawn = pushforward.functional_samples(inputs, precision, options, F64)
    assert_close(mean, drawn.mean(0))
    assert_close(var, drawn.var(0))
    with pytest.raises(InputError, match="at least 2"):
        predict(inputs, precision, "regression", n_samples=1, **draw)


def test_results_come_in_the_dtype_of_the_outputs():
    inputs = linearization(3)
    narrow = of_head(inputs.f.float(), inputs.head[0].phi.float())
    mean, cov = predict(narrow, PRECISIONS["full"], "regression")
    assert mean.dtype == cov.dtype == torch.float32
    assert predict(narrow, PRECISIONS["full"], "classification").dtype == torch.float32


def test_averaging_softmaxes_keeps_no_samples(monkeypatch):
    monkeypatch.setattr(linearization_module, "chunks", lambda total, each: iter([10] * (total // 10)))
    inputs = linearization(4)
    with LargestTensor() as largest:
        predict(inputs, PRECISIONS["diag"], "classification", pred_type=PredType.NN, link=LinkApprox.MC, n_samples=500)
    assert largest.numel <= 10 * max(P, 4 * C), largest.operation
