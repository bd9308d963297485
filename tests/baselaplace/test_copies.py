"""What a getter returned can be changed, and nothing else changes with it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from laplace.utils import KronDecomposed
from tests.kinds import DOUBLE, data, every_kind, fitted, make, observed, random_weights, tensors_in
from tests.tools import assert_close

GETTERS = (
    "mean", "mean_subnet", "H", "H_facs", "loss", "posterior_precision", "posterior_covariance", "posterior_scale",
    "posterior_variance", "prior_precision", "prior_precision_diag", "prior_mean", "sigma_noise", "subnetwork_indices",
    "V", "Kinv", "scatter", "log_likelihood",
)  # fmt: skip


@every_kind
def test_changing_what_a_getter_returned_changes_nothing(subset, structure):
    la = fitted(subset, structure, prior_precision=0.7 * torch.ones(2 if subset == "last_layer" else 1, **DOUBLE))
    before, n_tensors = observed(la), 0
    for name in GETTERS:
        if hasattr(la, name):
            for tensor in tensors_in(getattr(la, name)):
                tensor.mul_(0).add_(3)
                n_tensors += 1
    assert n_tensors > 9
    for old, new in zip(before, observed(la), strict=True):
        assert torch.equal(old, new)


@every_kind
def test_every_public_property_hands_out_memory_of_its_own(subset, structure):
    """Whatever a later property returns: its tensors share no storage with what the object keeps."""
    la = fitted(subset, structure)
    observed(la)
    kept = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(la)}
    assert len(kept) > 5
    names = [name for name in dir(type(la)) if isinstance(getattr(type(la), name), property) and name[0] != "_"]
    assert len(names) > 15
    for name in names:
        if name in ("params", "backend"):  # the parameters are the user's own
            continue
        for tensor in tensors_in(getattr(la, name)):
            assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() not in kept, name


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["gp", "kron"])
def test_a_mean_put_back_into_the_network_stays_when_training_goes_on(subset, structure):
    options: dict[str, Any] = {"n_subset": 10} if structure == "gp" else {}
    la = make(subset, structure, **options)
    x, y = data()
    la.fit([(x, y)])
    before, mean = la(x[:3]), la.mean.clone()
    if structure != "gp":
        vector_to_parameters(la.sample(1)[0], random_weights(la))
    vector_to_parameters(la.mean, random_weights(la))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = la(x[:3])
    assert_close(after[0], before[0])
    assert_close(after[1], before[1])
    optimizer = torch.optim.SGD(la.model.parameters(), lr=0.1)
    nn.functional.mse_loss(la.model(x), y).backward()
    optimizer.step()
    assert torch.equal(la.mean, mean)
    if structure != "gp":
        with pytest.warns(UserWarning, match="have changed since fit"):
            la(x[:3])


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_moved_kronecker_precision_is_that_of_its_new_factors(subset):
    la = fitted(subset, "kron")
    before, expected = observed(la), la.posterior_precision.to_matrix()
    precision = la.posterior_precision
    assert_close(precision.to_matrix(), expected)  # whatever was computed before the change counts no more
    precision.eigenvalues = [[2 * side for side in block] for block in precision.eigenvalues]
    precision.eigenvectors = [[None if q is None else q.clone() for q in block] for block in precision.eigenvectors]
    precision.deltas = torch.zeros_like(precision.deltas)
    doubled = [[2 * side for side in block] for block in la.H.eigenvalues]
    assert_close(precision.to_matrix(), KronDecomposed(la.H.eigenvectors, doubled).to_matrix())
    for old, new in zip(before, observed(la), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    "options",
    [
        {"n_subset": 8},
        {"functional_approximation": "nystrom", "subsample_size": 8, "n_eigenvalues": 3},
        {"functional_approximation": "variational", "num_inducing": 4, "inducing_locations": "random"},
    ],
    ids=["subset", "nystrom", "variational"],
)
def test_posteriors_over_functions_hand_out_memory_of_their_own(subset, options):
    la = make(subset, "gp", **options)
    la.fit([data()], **({"iterations": 2} if "num_inducing" in options else {}))
    la(data()[0][:2])
    kept = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(la)}
    own = [name for name in dir(type(la)) if isinstance(getattr(type(la), name), property) and name[0] != "_"]
    left_out = {"params", "backend", "H", "posterior_precision"}
    if "num_inducing" in options:  # has no evidence
        left_out |= {"log_det_ratio", "log_det_posterior_precision"}
    found = {name: getattr(la, name) for name in own if name not in left_out}
    assert len(found) > 10
    for name, value in found.items():
        for tensor in tensors_in(value):
            assert tensor.untyped_storage().data_ptr() not in kept, name
