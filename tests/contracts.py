"""One contract a room: what every likelihood, structure, link and back end must satisfy, compared with dense algebra.

A test file builds an instance, states what it means, and calls its contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace.enums import CurvatureKind
from laplace.predictive import NetworkLinearization
from laplace.structures.head_block import head_blocks
from tests import reference
from tests.cases import Case
from tests.likelihood_kinds import KINDS
from tests.tools import assert_close, assert_covariance_of, assert_mean_is


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- likelihoods ------------------------------------------------------------------------------------------------------


def check_likelihood(likelihood: Any, f: Tensor, y: Tensor) -> None:
    """Everything but predictions is that of the density in `likelihood_kinds`; f [rows, C] with one target per row."""
    kind = KINDS[likelihood.name]
    n, n_outputs = len(f), f.shape[1]
    others = f.flip(0) + 0.3
    normalizer = likelihood.log_normalizer(n, n_outputs)
    for at in (f, others):
        assert_close(likelihood.nll(at, y) + normalizer, -kind.log_density(at, y).sum(), "nll and its normalizer")
        assert_close(likelihood.gradient(at, y), kind.gradients(at, y), "gradient")
        assert_close(likelihood.gradient(at, y), torch.func.grad(likelihood.nll)(at, y), "gradient, by autograd of nll")
    assert_close(likelihood.nll_by_output(f, y).sum(), likelihood.nll(f, y), "nll by output")

    fisher = kind.fisher(f)
    output_hessian = likelihood.hessian(f)
    assert_close(output_hessian.dense(), fisher, "Hessian")
    assert_close(output_hessian.diag(), fisher.diagonal(dim1=1, dim2=2), "diagonal of the Hessian")
    assert_close(output_hessian.sum(), fisher.sum(0), "sum of the Hessians")
    root = likelihood.hessian_root(f)
    assert root.shape[2] <= n_outputs
    assert_close(root @ root.mT, fisher, "square of the root of the Hessian")
    lazy = likelihood.lazy_root(f)
    alone = torch.eye(lazy.sizes.shape[1], dtype=f.dtype).unsqueeze(1).expand(-1, len(f), -1)
    columns = torch.stack([lazy.mix(weights) for weights in alone], -1)
    assert_close(columns @ columns.mT, fisher, "square of the columns of the root")
    assert_close(columns.square().sum(1), lazy.sizes, "squared lengths of the columns")

    for_targets = likelihood.for_targets()
    expected = kind.expect(f, lambda at, y: kind.numbers(y, n_outputs).to(at))
    assert_close(kind.mean(f), expected, "mean of the table, by the density")
    assert_close(for_targets.expectation(f), expected, "expectation")
    assert_close(for_targets.expectation(f.expand(2, *f.shape)), expected.expand(2, *expected.shape), "of samples")

    check_sampled_gradients(likelihood, f, fisher)
    check_tempering(likelihood, f, y)
    check_loss_for_packages(likelihood, y, f, others)

    kept = likelihood.flatten(f, y)
    assert torch.equal(kept.f, f)
    assert torch.equal(kept.y, y)
    assert likelihood.count(y, likelihood.count_outputs(f.shape)) == n


def check_sampled_gradients(likelihood: Any, f: Tensor, fisher: Tensor) -> None:
    """Their mean is 0 and their second moment the Fisher information; seeds decide."""
    n = 4000
    g = likelihood.sample_gradient(f, n, generator(0))
    assert g.shape == (n, *f.shape)
    for row in range(len(f)):
        assert_mean_is(g[:, row], torch.zeros(f.shape[1]), "mean of sampled gradients")
        assert_mean_is(torch.einsum("nc,nk->nck", g[:, row], g[:, row]), fisher[row], "second moment of them")
    assert torch.equal(g, likelihood.sample_gradient(f, n, generator(0)))
    assert not torch.equal(g, likelihood.sample_gradient(f, n, generator(1)))


def check_tempering(likelihood: Any, f: Tensor, y: Tensor) -> None:
    """At temperature 2 the likelihood and its curvature have half the weight; nothing else changes."""
    hot = likelihood.at(torch.ones(()), 2.0, 1.0)
    assert_close(torch.as_tensor(hot.scale), torch.tensor(0.5), "scale")
    for kind in ("ggn", "ef"):
        assert_close(torch.as_tensor(hot.curvature_scale(CurvatureKind(kind))), torch.tensor(0.5), "curvature scale")
    assert_close(hot.scaled_nll(f, y), likelihood.nll(f, y) / 2, "scaled nll")
    assert_close(hot.nll(f, y), likelihood.nll(f, y), "nll, which is at unit temperature")
    assert_close(hot.hessian(f).dense(), likelihood.hessian(f).dense(), "Hessian, which is at unit temperature")


def check_loss_for_packages(likelihood: Any, y: Tensor, *outputs: Tensor) -> None:
    """The loss for third-party packages is the nll, constants included: they report it as such."""
    if likelihood.torch_loss() is not None:
        loss, factor = likelihood.torch_loss()
        for f in outputs:
            assert_close(factor * loss(f, y), likelihood.nll(f, y), "the loss for third-party packages")


# -- structures -------------------------------------------------------------------------------------------------------


def check_curvature(first: Any, second: Any, union: Tensor, dense: tuple[Tensor, Tensor], prior: Any) -> None:
    """Two curvatures with the dense meanings `dense`; `union` is that of their data together."""
    assert_close(first.to_dense(), dense[0], "dense")
    assert_close(first.merge(second).to_dense(), union, "merge")
    assert_close(second.merge(first).to_dense(), union, "merge in the other order")
    assert_close(first.to_dense(), dense[0], "dense after merge: curvatures are immutable")
    assert_close(second.to_dense(), dense[1], "dense after merge: curvatures are immutable")
    check_scaling(first, dense[0], prior)


def check_scaling(curvature: Any, dense: Tensor, prior: Any) -> None:
    """A curvature is `dense`; its multiples and posteriors are those of `dense`."""
    assert_close(curvature.to_dense(), dense, "dense")
    matrix = curvature.to_dense()
    assert_close(matrix, matrix.T, "symmetry")
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10 * matrix.abs().max(), "a sum of outer products"

    factor = torch.tensor(1.7, requires_grad=True)
    assert_close((curvature * factor).to_dense(), 1.7 * dense, "multiple")
    precision = (curvature * factor).posterior(prior)
    P0 = prior.diagonal().diag()
    assert_close(precision.to_dense(), 1.7 * dense + P0, "posterior precision")
    (slope,) = torch.autograd.grad(precision.logdet(), factor)
    assert_close(slope, ((1.7 * dense + P0).inverse() @ dense).trace(), "derivative of the log-determinant")
    check_precision(precision, 1.7 * dense + P0)


def check_precision(precision: Any, dense: Tensor, *, n_outputs: int | None = None, bias: bool = True) -> None:
    """`precision` is the factorized form of `dense` [P, P]; with `n_outputs`, of the weights of a linear layer."""
    P = len(dense)
    covariance = dense.inverse()
    noise = generator(3)
    v = torch.randn(2, 3, P, generator=noise)
    assert_close(precision.to_dense(), dense, "dense")
    assert_close(precision.solve(v), v @ covariance, "solve")
    assert_close(precision.solve(v[0, 0]), covariance @ v[0, 0], "solve, one vector")
    assert_close(precision.quadratic(v), torch.einsum("abp,pq,abq->ab", v, dense, v), "quadratic")
    assert_close(precision.quadratic(v[0, 0]), v[0, 0] @ dense @ v[0, 0], "quadratic, one vector")
    assert_close(precision.logdet(), dense.logdet(), "log-determinant")
    assert_close(precision.diagonal_of_inverse(), covariance.diagonal(), "marginal variances")

    J = torch.randn(4, 3, P, generator=noise)
    assert_close(precision.functional_variance(J), reference.output_covariance(J, dense), "functional variance")
    assert_close(precision.functional_covariance(J), reference.joint_covariance(J, dense), "functional covariance")

    z = precision.sample(20_000, generator(4))
    assert z.shape == (20_000, P)
    assert_covariance_of(z, torch.zeros(P), covariance)
    assert torch.equal(z, precision.sample(20_000, generator(4)))
    assert not torch.equal(z, precision.sample(20_000, generator(5)))
    if n_outputs is not None:
        check_head(precision, dense, n_outputs, bias)


def check_head(precision: Any, dense: Tensor, n_outputs: int, bias: bool) -> None:
    """The closed forms for a linear layer equal the materialized Jacobian, for outputs and for mixtures of them."""
    n_features = len(dense) // n_outputs - bias
    phi = torch.randn(4, n_features, generator=generator(6))
    J = torch.stack([linear_jacobian(row, n_outputs, bias) for row in phi])
    blocks = head_blocks(phi, shapes_of(n_outputs, n_features, bias))
    mix = torch.randn(2, n_outputs, generator=generator(7))
    for some, rows in ((blocks, J), ([block.mix(mix) for block in blocks], mix @ J)):
        V = reference.output_covariance(rows, dense)
        assert_close(precision.block_covariance(some), V, "covariance")
        assert_close(precision.block_variance(some).T, V.diagonal(dim1=1, dim2=2), "variance")
        assert_close(precision.block_kernel(some), reference.joint_covariance(rows, dense), "kernel")
    pairs = [block.differences() for block in blocks]
    V = reference.output_covariance(J[::2] - J[1::2], dense)
    assert_close(precision.block_covariance(pairs), V, "covariance of differences")


def linear_jacobian(phi: Tensor, n_outputs: int, bias: bool) -> Tensor:
    """[C, P]: derivative of W phi + b in (vec W, b)."""
    eye = torch.eye(n_outputs).to(phi)
    weight = torch.kron(eye, phi.unsqueeze(0))
    return torch.cat([weight, eye], 1) if bias else weight


# -- predictive -------------------------------------------------------------------------------------------------------


def check_link(link: Callable[[Tensor, Tensor], Tensor], expected: Callable[[Tensor, Tensor], Tensor]) -> None:
    """log-probabilities of `link` are those of the formula, normalized and finite for any logits, equivariant."""
    noise = generator(7)
    for n_classes in (2, 3, 5):
        mean = 2 * torch.randn(6, n_classes, generator=noise)
        root = torch.randn(6, n_classes, n_classes, generator=noise)
        cov = root @ root.mT + 0.1 * torch.eye(n_classes)
        before = mean.clone(), cov.clone()
        log_probabilities = link(mean, cov)
        assert_close(log_probabilities.exp(), expected(mean, cov), f"{n_classes} classes")
        assert torch.equal(mean, before[0]), "the mean is not written to"
        assert torch.equal(cov, before[1]), "the covariance is not written to"
        order = torch.randperm(n_classes, generator=noise)
        permuted = link(mean[:, order], cov[:, order][:, :, order])
        assert_close(permuted, log_probabilities[:, order], "classes in another order")
        check_normalized_for_any_logits(link, n_classes)


def check_normalized_for_any_logits(link: Callable[[Tensor, Tensor], Tensor], n_classes: int) -> None:
    """Rows sum to one, without NaN or infinity, for logits up to 1e4 and variances from 1e-6 to 1e6."""
    noise = generator(8)
    for size in (1.0, 30.0, 1e3, 1e4):
        for variance in (1e-6, 1.0, 1e6):
            mean = size * (2 * torch.rand(5, n_classes, generator=noise) - 1)
            mean[0], mean[1, 0], mean[2, 0] = 0.0, size, -size
            cov = torch.diag_embed(variance * (0.5 + torch.rand(5, n_classes, generator=noise)))
            log_probabilities = link(mean, cov)
            what = f"logits of size {size:g}, variance {variance:g}"
            assert bool(torch.isfinite(log_probabilities.exp()).all()), what
            assert not bool(log_probabilities.isnan().any()), what
            assert_close(log_probabilities.exp().sum(-1), torch.ones(5), what)


# -- back ends --------------------------------------------------------------------------------------------------------


def check_backend(backend: Any, case: Case, *, fisher: bool) -> None:
    """A last-layer back end on all rows of a case: loss, curvature in each structure, Jacobians, gradients."""
    problem = case.problem()
    x, y = case.data()
    for structure in ("full", "diag"):
        loss, H = getattr(backend, structure)(x, y)
        expected = problem.curvature(structure, fisher=fisher)
        assert_close(loss, problem.nll(), "loss")
        assert_close(H, expected if structure == "full" else expected.diagonal(), structure)
    loss, kron = backend.kron(x, y, N=problem.n_positions())
    assert_close(loss, problem.nll(), "loss")
    assert_close(kron.to_matrix(), problem.kron(fisher=fisher), "kron")
    J, f = backend.jacobians(x)
    assert_close(J, problem.jacobian(x).flatten(0, 1), "Jacobians")
    assert_close(f, problem.outputs(problem.theta(), x).flatten(0, 1), "outputs")
    gradients, loss = backend.gradients(x, y)
    assert_close(gradients, problem.gradients(), "gradients")
    assert_close(loss, problem.nll(), "loss")


def check_columns(backend: Any, case: Case, *, fisher: bool) -> None:
    """What is made of columns: diagonal blocks, the diagonal in a basis, products and the trace."""
    problem = case.problem()
    (x, y), H = case.data(), problem.empirical_fisher() if fisher else problem.ggn()
    blocks = problem.groups(H)
    loss, found = backend.blockdiag(x, y)
    assert_close(loss, problem.nll(), "loss")
    for ours, exact in zip(found, blocks, strict=True):
        assert_close(ours, exact, "diagonal block")

    shapes = [
        tuple(problem.model.get_parameter(name).flatten(1 if "weight" in name else 0).shape) for name in case.names
    ]
    bases = [[torch.linalg.qr(torch.randn(n, n, generator=generator(9)))[0] for n in shape] for shape in shapes]
    loss, found = backend.ekfac(x, y, bases, shapes)
    assert_close(loss, problem.nll(), "loss")
    for ours, exact, sides in zip(found, blocks, bases, strict=True):
        Q = torch.kron(*sides) if len(sides) == 2 else sides[0]
        assert_close(ours.flatten(), (Q.T @ exact @ Q).diagonal(), "diagonal in a basis")

    V = torch.randn(len(H), 3, generator=generator(10))
    loss, products, trace = backend.lowrank(x, y, V)
    assert_close(loss, problem.nll(), "loss")
    assert_close(products, H @ V, "products")
    assert_close(trace, H.trace(), "trace")


@contextmanager
def model_untouched(model: nn.Module) -> Iterator[None]:
    """The body leaves parameters, gradients, buffers, modes, hooks and attributes of `model` exactly as they were."""
    before = _snapshot(model)
    try:
        yield
    finally:
        after = _snapshot(model)
        assert before.keys() == after.keys(), f"modules changed: {before.keys() ^ after.keys()}"
        for name, attributes in before.items():
            assert attributes.keys() == after[name].keys(), f"{name}: {attributes.keys() ^ after[name].keys()}"
            for key, value in attributes.items():
                assert _same(value, after[name][key]), f"{name or 'the model'}: {key} changed"


def _snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: {key: _copy(value) for key, value in vars(module).items()} for name, module in model.named_modules()}


def _copy(value: Any) -> Any:
    """Identity and contents, so that a change of either is seen."""
    if isinstance(value, Tensor):
        gradient = value.grad if value.is_leaf else None
        kept = None if gradient is None else (id(gradient), gradient.clone())
        return "tensor", id(value), value.detach().clone(), value.requires_grad, kept, value._version
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_copy(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        if not isinstance(second, Tensor) or first.shape != second.shape:
            return False
        return torch.equal(first, second) or torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and first == second


def shapes_of(n_outputs: int, n_features: int, bias: bool = True) -> list[tuple[int, ...]]:
    """Of the parameter groups of a head."""
    weight = (n_outputs, n_features)
    return [weight, (n_outputs,)] if bias else [weight]


def of_head(f: Tensor, phi: Tensor, bias: bool = True) -> NetworkLinearization:
    """Outputs and features as predictions see them."""
    return NetworkLinearization.of_head(f, phi, shapes_of(f.shape[-1], phi.shape[-1], bias))
