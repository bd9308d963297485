"""The numbers of the section "Function space" of docs/differences.md; see ``peer_differences.py`` for how to run it.

python benchmarks/peer_differences_function_space.py                                # this library
/path/to/laplace-torch/bin/python benchmarks/peer_differences_function_space.py     # the peer
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from peer_differences import CASES, case, class_data, largest, loader, main, net, regression_data
from torch import Tensor

from laplace import Laplace

CASES.clear()
DELTA = 1.3


def process(likelihood: str, subset: str = "last_layer", **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """A process of 20 data, with its model and data."""
    x, y = regression_data() if likelihood == "regression" else class_data()
    model = net(2 if likelihood == "regression" else 3)
    options = {"n_subset": len(x), "prior_precision": DELTA, **options}
    la = Laplace(model, likelihood, subset, "gp", **options)
    la.fit(loader(x, y))
    return la, model, x, y


def jacobians(model: Any, x: Tensor, *, all_weights: bool) -> Tensor:
    """Written out, ``[rows, C, P]``."""
    parameters = list((model if all_weights else model[-1]).parameters())

    def gradient(f: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, parameters, retain_graph=True)])

    return torch.stack([torch.stack([gradient(f) for f in model(row)]) for row in x])


def precision(model: Any, x: Tensor, likelihood: str, *, all_weights: bool) -> Tensor:
    """Σ Jᵀ Λ J + δ I by its definition."""
    J = jacobians(model, x, all_weights=all_weights)
    p = model(x).softmax(-1).detach()
    Lambda = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    Lambda = torch.eye(J.shape[1]).expand(len(x), -1, -1) if likelihood == "regression" else Lambda
    return torch.einsum("ncp,nck,nkq->pq", J, Lambda, J) + DELTA * torch.eye(J.shape[2])


@case("variances, regression, all weights: largest relative difference to J P^-1 J'", "regression", "all")
@case("variances, regression, last layer: largest relative difference to J P^-1 J'", "regression", "last_layer")
@case("variances, classification, all weights: largest relative difference to J P^-1 J'", "classification", "all")
@case("variances, classification, last layer: largest relative difference to J P^-1 J'", "classification", "last_layer")
def variances(likelihood: str, subset: str) -> float:
    la, model, x, _ = process(likelihood, subset)
    J = jacobians(model, x, all_weights=subset == "all")
    P = precision(model, x, likelihood, all_weights=subset == "all")
    exact = torch.einsum("bcp,pq,bcq->bc", J, P.inverse(), J)
    found = la.predictive_moments(x)[1].detach().diagonal(dim1=1, dim2=2)
    return largest(found / exact, torch.ones_like(exact))


@case("probabilities (probit), classification, last layer: largest difference to those of the exact variances")
def probabilities() -> float:
    la, model, x, _ = process("classification")
    J, P = jacobians(model, x, all_weights=False), precision(model, x, "classification", all_weights=False)
    exact = torch.einsum("bcp,pq,bcq->bc", J, P.inverse(), J)
    return largest(la(x).detach(), (model(x) / (1 + torch.pi / 8 * exact).sqrt()).softmax(-1).detach())


@case("log |P| - log |P0|, regression, last layer: found / exact")
def log_det_ratio() -> str:
    la, model, x, _ = process("regression")
    P = precision(model, x, "regression", all_weights=False)
    exact = P.logdet() - len(P) * torch.tensor(DELTA).log()
    return f"{float(la.log_det_ratio):.4f} / {float(exact):.4f}"


@case("the same at sigma 0.7, temperature 0.9, 15 of 20 data, with 20/15 of their curvature: found / exact")
def log_det_ratio_of_some() -> str:
    la, model, x, _ = process("regression", n_subset=15, seed=0, sigma_noise=0.7, temperature=0.9)
    rows = np.random.default_rng(0).choice(20, 15, replace=False)
    prior = DELTA * torch.eye(10)
    H = precision(model, x[rows], "regression", all_weights=False) - prior
    exact = (20 / 15 * H / (0.49 * 0.9) + prior).logdet() - prior.logdet()
    return f"{float(la.log_det_ratio):.4f} / {float(exact):.4f}"


@case("scatter, regression, last layer: found / exact")
def scatter() -> str:
    la, model, _, _ = process("regression")
    exact = DELTA * sum(p.square().sum() for p in model[-1].parameters())
    return f"{float(la.scatter):.4f} / {float(exact):.4f}"


@case("a last layer that is named")
def named_layer() -> str:
    la, _, x, _ = process("classification", last_layer_name="2")
    return f"works, {tuple(la(x).shape)}"


@case("sample(2)")
def sample() -> str:
    la, *_ = process("regression")
    try:
        return f"shape {tuple(la.sample(2).shape)}"
    except NotImplementedError:
        return "raises NotImplementedError"


@case("state_dict of the last layer, read by torch.load(weights_only=True)")
def state() -> str:
    la, *_ = process("regression")
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    return f"works, {len(torch.load(buffer, weights_only=True))} entries"


@case("n_subset larger than the data")
def too_many() -> str:
    la, *_ = process("regression", n_subset=21)
    return f"n_data={la.n_data}"


def features(kind: str, subset: str = "all", **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """ELLA ("nystrom") or VaLLA ("variational") of 20 data of regression with one output, σ = 0.5."""
    x, y = regression_data(n_outputs=1)
    model = net(1)
    if kind == "nystrom":
        options = {"subsample_size": 20, "n_eigenvalues": 20, **options}
    else:
        options = {"inducing_locations": x, "num_inducing": 20, "alpha": 0.0, **options}
    options |= {"functional_approximation": kind, "prior_precision": DELTA, "sigma_noise": 0.5}
    return Laplace(model, "regression", subset, "gp", **options), model, x, y


@case("variational, last layer: variances of 20 data", "variational")
@case("nystrom, last layer: variances of 20 data", "nystrom")
def of_a_last_layer(kind: str) -> str:
    la, _, x, y = features(kind, "last_layer")
    la.fit(loader(x, y))
    return f"works, {tuple(la.predictive_moments(x)[1].shape)}"


@case("nystrom, all data, all eigenvalues: largest relative difference of variances to J P^-1 J' at the data")
def nystrom_at_data() -> float:
    la, model, x, y = features("nystrom")
    la.fit(loader(x, y))
    J = jacobians(model, x, all_weights=True)
    P = 4 * torch.einsum("ncp,ncq->pq", J, J) + DELTA * torch.eye(J.shape[2])
    exact = torch.einsum("bcp,pq,bcq->bc", J, P.inverse(), J)
    found = la.predictive_moments(x)[1].detach().diagonal(dim1=1, dim2=2)
    return largest(found / exact, torch.ones_like(exact))


@case("nystrom: log evidence")
def nystrom_evidence() -> float:
    la, _, x, y = features("nystrom")
    la.fit(loader(x, y))
    return float(la.log_marginal_likelihood())


@case("variational, alpha = 0, inducing points = data: objective before the first step / -log evidence")
def variational_objective() -> str:
    la, model, x, y = features("variational")
    la.fit(loader(x, y, batch_size=20), iterations=1, lr=1e-9)
    J = jacobians(model, x, all_weights=True).squeeze(1)
    P = 4 * J.T @ J + DELTA * torch.eye(J.shape[1])
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    fit = torch.distributions.Normal(model(x).detach(), 0.5).log_prob(y).sum()
    evidence = fit - (P.logdet() - len(P) * torch.tensor(DELTA).log() + DELTA * theta @ theta) / 2
    return f"{float(la.fit_history_['objective'][0]):.4f} / {-float(evidence):.4f}"


if __name__ == "__main__":
    main()
