"""Mistakes that pyright and mypy find, each on the line whose end says so. `test_types.py` runs both; nothing runs this."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import laplace
from laplace import Laplace


def mistakes(model: nn.Module, batches: list[tuple[Tensor, Tensor]], x: Tensor) -> None:
    Laplace(model, "classification", "all", hessian_structure="krom")  # typo: the text of a structure
    Laplace(model, "clasification")  # typo: the text of a likelihood
    Laplace(model, "classification", prior_precison=2.0)  # typo: a keyword of the constructor
    Laplace(model, "classification", "all", "full", damping=True)  # typo: a keyword of another structure
    Laplace(model, "classification", "subnetwork", "kron", subnetwork_indices=x)  # typo: no such combination
    Laplace(model, "regression", hessian_structure="gp")  # typo: a keyword that is needed is missing
    Laplace(model, "classification", backend_kwargs={"stochastik": True})  # typo: an option of the back end
    la = Laplace(model, "classification")
    la.fitt(batches)  # typo: a method
    la.fit(batches, overide=False)  # typo: a keyword of fit
    la.fit(batches, progress_bar="yes")  # typo: the type of a flag
    la.tune(batches, refitt=True)  # typo: a keyword of tune
    la.tune(batches, limits={"temperature": (0.5, 2.0)})  # typo: a key of limits
    la(x, link_approx="probitt")  # typo: the text of a link
    la(x, link_aprox="probit")  # typo: a keyword of a call
    la(x, n_sample=10)  # typo: another keyword of a call
    la.predict(x, n_samples="10")  # typo: the type of a number
    la.optimize_prior_precision(method="marglk")  # typo: the text of a method
    la.optimize_prior_precision(grid_sise=5)  # typo: a keyword of optimize_prior_precision
    moments: tuple[Tensor, Tensor] = la(x)  # typo: probabilities are one tensor
    print(la.prior_precission)  # typo: an attribute
    la.prior_precision = "1"  # typo: the type of a hyperparameter
    la.weight_uncertainty = "no"  # typo: the type of a flag that is assigned
    print(la.predict(x).epistemic_varianze)  # typo: an attribute of a prediction
    Laplace(model, "regression").fit(batches)(x).mean()  # typo: mean and variance are no tensor
    laplace.load("la.pt", model, backend_kwarg=None)  # typo: a keyword of load
    laplace.laod("la.pt", model)  # typo: a function
    Laplace(model, {"kind": "classification"}).tune(batches, scor="nll")  # typo: a keyword of several heads
    print(la.sample(generator=torch.manual_seed), moments)  # typo: a function in place of a generator
