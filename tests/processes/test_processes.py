"""Several processes fit and tune together, and have what one process with all data has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from laplace import Laplace, pending, processes
from laplace.errors import InputError, ProcessError, UnsupportedError
from laplace.network import Batch
from laplace.network.shards import without_padding
from laplace.structures import subspace, wide_kron
from tests.kinds import KINDS, data, dense, make, network
from tests.processes.run import alone, assert_alike, assert_same_everywhere, run, shard

BINARY: dict[str, Any] = {"likelihood": "classification"}
X, Y = data("classification")
X, Y = X[:19], Y[:19]  # neither two nor three processes have equally many rows
TARGETS = data()[1][:19]


def refused(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        call()


def equals_one_process(subset: str, structure: str, likelihood: str) -> None:
    y = Y if likelihood == "classification" else TARGETS
    options: dict[str, Any] = {"likelihood": likelihood}
    la, one = make(subset, structure, **options), alone(make(subset, structure, **options), [(X, y)])
    if structure == "lowrank":
        la._truncation = one._truncation = type(one._truncation)(4)  # does not cut pairs of equal eigenvalues
        alone(one, [(X, y)])
    la.fit(shard(X, y))
    assert (la.n_data, la._fit.n_positions) == (19, 19)
    assert_alike(dense(la.posterior_precision), dense(one.posterior_precision))
    assert_alike(la.log_marginal_likelihood(), one.log_marginal_likelihood())
    assert_alike(la._fit.nll_of_outputs if subset == "last_layer" and likelihood == "regression" else la.loss,
                 one._fit.nll_of_outputs if subset == "last_layer" and likelihood == "regression" else one.loss)  # fmt: skip
    assert (la._fit.density is None) == (one._fit.density is None)
    if la._fit.density is not None:
        for ours, theirs in zip(la._fit.density._tensors, one._fit.density._tensors, strict=True):
            assert_alike(ours, theirs)
    assert_same_everywhere(dense(la.posterior_precision), la.loss)


def every_kind(rank: int, n: int) -> None:
    """Structures of all weights, last layers and subnetworks."""
    for index, (subset, structure) in enumerate(KINDS):
        equals_one_process(subset, structure, ("classification", "regression")[(index + n) % 2])


def sampled(rank: int, n: int) -> None:
    """Each process draws its own numbers; all end with the same sums."""
    torch.manual_seed(rank)
    for structure in ("kron", "lowrank", "ekfac"):
        la = make("all", structure, backend_kwargs={"stochastic": True}, **BINARY)
        la.fit(shard(X, Y))
        assert_same_everywhere(dense(la.posterior_precision))


def tuned(rank: int, n: int) -> None:
    """`tune` and `optimize_prior_precision` read shards, and find what one process finds."""
    for kind in (("last_layer", "kron"), ("all", "diag")):
        la, one = make(*kind, **BINARY), alone(make(*kind, **BINARY), [(X, Y)])
        la.fit(shard(X, Y))
        la.tune(shard(X + 0.1, Y))
        with processes.within(None):
            one.tune([(X + 0.1, Y)])
        found = la.prior_precision, la.mean, torch.tensor(la.output_temperature), torch.tensor(la.tuning_.value)
        assert_alike(found[0], one.prior_precision, tolerance=1e-6)
        assert_alike(found[1], one.mean, tolerance=1e-6)
        assert_alike(la.output_temperature, one.output_temperature, tolerance=1e-6)
        assert_alike(la.tuning_.value, one.tuning_.value, tolerance=1e-6)
        assert_same_everywhere(*found)
        la.optimize_prior_precision(method="gridsearch", grid_size=3, val_loader=shard(X, Y))
        with processes.within(None):
            one.optimize_prior_precision(method="gridsearch", grid_size=3, val_loader=[(X, Y)])
        assert_alike(la.prior_precision, one.prior_precision)
    if kind[0] == "all":
        return
    assert len(la._kept.phi) == 19


def shards_of_any_kind(rank: int, n: int) -> None:
    """Lists, generators, unequal and empty shards; a process without data has the same posterior."""
    rows = [slice(0, 12), slice(12, 19), slice(19, 19)][rank]
    batches = [(X[rows], Y[rows])] if rank < 2 else []
    for kind in (("last_layer", "kron"), ("all", "kron"), ("last_layer", "lowrank"), ("all", "ekfac")):
        la = make(*kind, last_layer_name=None, **BINARY) if kind[0] == "last_layer" else make(*kind, **BINARY)
        la.fit(iter(batches) if kind[0] == "last_layer" else batches)
        one = alone(make(*kind, **BINARY), [(X, Y)])
        assert_alike(dense(la.posterior_precision), dense(one.posterior_precision))
        assert la.n_data == 19
        if la._kept is not None:
            assert_alike(la._kept.phi, one._kept.phi)
            assert torch.equal(la._kept.y, Y)
        la.tune(batches)
        assert_same_everywhere(dense(la.posterior_precision), la.prior_precision, la.mean)
    refused(InputError, "empty", lambda: la.fit([]))


def more_data(rank: int, n: int) -> None:
    la, one = make("last_layer", "kron", **BINARY), alone(make("last_layer", "kron", **BINARY), [(X, Y)])
    la.fit(shard(X[:7], Y[:7]))
    la.fit(shard(X[7:], Y[7:]), override=False)
    assert_alike(dense(la.posterior_precision), dense(one.posterior_precision))


def one_fails(rank: int, n: int) -> None:
    """All raise, nothing is changed, and the next call works."""

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield X[rank : rank + 5], Y[rank : rank + 5]
        if rank == 1:
            raise OSError("disk on fire")
        yield X[5:], Y[5:]

    for kind in (("last_layer", "kron"), ("all", "diag")):
        la = make(*kind, **BINARY)
        la.fit(shard(X, Y))
        before = la.log_marginal_likelihood()
        for call in (la.fit, la.tune):
            error, words = (OSError, "on fire") if rank == 1 else (ProcessError, "process 1 of . raised OSError: disk")
            refused(error, words, lambda call=call: call(broken()))
        error, words = (UnsupportedError, "gridsaerch") if rank == 1 else (ProcessError, "process 1 of . raised Unsupp")
        options = {"method": "gridsaerch" if rank == 1 else "gridsearch"}  # spelling: gridsearch
        refused(error, words, partial(la.optimize_prior_precision, val_loader=shard(X, Y), **options))

        def loss(p: Tensor, y: Tensor) -> Tensor:
            if rank == 1:
                raise OSError("disk on fire")
            return -p.gather(1, y[:, None]).log().mean()

        error, words = (OSError, "on fire") if rank == 1 else (ProcessError, "process 1 of . raised OSError: disk")
        call = partial(la.optimize_prior_precision, method="gridsearch", grid_size=3, loss=loss)
        refused(error, words, partial(call, val_loader=shard(X, Y)))
        assert la.log_marginal_likelihood() == before
        assert la.tuning_ is None
        la.fit(shard(X, Y))


def what_has_no_sum(rank: int, n: int) -> None:
    refused(InputError, "same data.*within", lambda: make("last_layer", "kron", **BINARY).fit([(X, Y)]))
    other = network()
    with torch.no_grad():
        other[2].weight.add_(rank)
    refused(InputError, "different weights", lambda: make("last_layer", "kron", other, **BINARY).fit(shard(X, Y)))
    unlike = make("last_layer", "kron" if rank else "diag", **BINARY)
    refused(InputError, "other shapes", lambda: unlike.fit(shard(X, Y)))
    steps = make("all", "ekfac" if rank else "diag", **BINARY)
    refused((InputError, ProcessError), "other shapes|different steps", lambda: steps.fit(shard(X, Y)))
    for options in (
        {"subset_of_weights": "all", "n_subset": 4},
        {"functional_approximation": "nystrom", "subsample_size": 4, "n_eigenvalues": 2},
        {"functional_approximation": "variational", "inducing_locations": X[:3]},
    ):
        la = Laplace(network(), "classification", hessian_structure="gp", **options)
        refused(UnsupportedError, "one process", lambda la=la: la.fit(shard(X, Y)))


def processes_over_functions(rank: int, n: int) -> None:
    """The subset is that of one process, whose loader yields the data in order."""
    for likelihood, y in (("classification", Y), ("regression", TARGETS)):
        parts = [(X[r::n], y[r::n]) for r in range(n)]
        for loader, whole in ((shard(X, y), [(X, y)]), (iter([parts[rank]]), parts)):
            la, one = (Laplace(network(), likelihood, hessian_structure="gp", n_subset=7) for _ in range(2))
            la.fit(loader)
            alone(one, whole)
            assert_alike(la.log_marginal_likelihood(), one.log_marginal_likelihood())
            assert_alike(la.predictive_moments(X)[1], one.predictive_moments(X)[1])
            assert la.n_data == 19
    la.fit([(X, TARGETS)] if rank == 0 else [])
    alone(one, [(X, TARGETS)])
    assert_alike(la.predictive_moments(X)[1], one.predictive_moments(X)[1])
    la.tune(shard(X, TARGETS))
    with processes.within(None):
        one.tune([(X, TARGETS)])
    assert_alike(la.prior_precision, one.prior_precision, tolerance=1e-5)


def several_heads(rank: int, n: int) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            f = self.body(x)
            return {"a": f, "b": f[:, :1]}

    def fitted(loader: Any, group: Any) -> Tensor:
        la = Laplace(Two(), {"a": "classification", "b": "regression"}, "all", "diag")
        with processes.within(group):
            la.fit(loader)
        return la.log_marginal_likelihood()

    together = fitted([(X[rank::n], {"a": Y[rank::n], "b": TARGETS[rank::n, :1]})], dist.group.WORLD)
    assert_alike(together, fitted([(X, {"a": Y, "b": TARGETS[:, :1]})], None))


def groups(rank: int, n: int) -> None:
    """Two of three work together; the other is alone."""
    pair = dist.new_group([0, 1])
    la, one = make("last_layer", "kron", **BINARY), alone(make("last_layer", "kron", **BINARY), [(X, Y)])
    if rank < 2:
        with processes.within(pair):
            la.fit([(X[rank::2], Y[rank::2])])
            assert_same_everywhere(la.loss)
    else:
        alone(la, [(X, Y)])
    assert_alike(dense(la.posterior_precision), dense(one.posterior_precision))


def on_accelerators(rank: int, n: int) -> None:
    """Masked rows lie among the others until all are read."""
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(13, 2, 3, generator=noise, dtype=torch.float64)
    y = torch.randint(0, 2, (13, 2), generator=noise)
    y[torch.rand(13, 2, generator=noise) < 0.4] = -100
    y[9:] = -100
    for structure in ("kron", "full"):
        one = alone(make("last_layer", structure, **BINARY), [(x, y)])
        la = make("last_layer", structure, **BINARY)
        with processes.within(None):
            one.tune([(x, y)])
        free, pending.FREE = pending.FREE, set()
        try:
            la.fit(shard(x, y, 2))
            la.tune(shard(x, y, 2))
        finally:
            pending.FREE = free
        assert (la.n_data, la._fit.n_positions) == (13, one._fit.n_positions)
        assert_alike(la.mean, one.mean, tolerance=1e-6)
        assert_alike(dense(la.posterior_precision), dense(one.posterior_precision), tolerance=1e-6)


def calls_that_differ(rank: int, n: int) -> None:
    """What differs between processes is told to all, also before any data are read."""
    other = network()
    with torch.no_grad():
        other[0].weight.add_(rank)  # below the random head
    refused(InputError, "different weights", lambda: make("last_layer", "kron", other, **BINARY).fit(shard(X, Y)))
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(3).double(), network())
    norm[0].running_mean.add_(rank)
    la = Laplace(norm, "classification", hessian_structure="diag", last_layer_name="1.2")
    refused(InputError, r"BatchNorm.*broadcast\(buffer, 0\)", lambda: la.fit(shard(X, Y)))
    torch.distributed.broadcast(norm[0].running_mean, 0)
    la.fit(shard(X, Y))
    part = make("last_layer", "kron", **BINARY)
    if rank == 0:
        alone(part, [(X[:3], Y[:3])])
    refused(InputError, "not the same in all processes", lambda: part.fit(shard(X, Y), override=False))
    assert ("_fit" in vars(part)) == (rank == 0)
    alone(part, [(X[rank:], Y[rank:])])
    refused(InputError, "not the same in all processes", lambda: part.fit(shard(X, Y), override=False))
    assert part.n_data == 19 - rank
    error, words = (InputError, "_loader|DataLoader") if rank == 1 else (ProcessError, "process 1 of . raised")
    for call in (la.fit, la.tune):
        refused(error, words, lambda call=call: call(None if rank == 1 else shard(X, Y)))
    error, words = (
        (ValueError, 'prior_structure|"layerwise"|layerwise') if rank == 1 else (ProcessError, "process 1 of . raised")
    )
    before = la.prior_precision
    refused(error, words, lambda: la.tune(shard(X, Y), prior_structure="none" if rank == 1 else "scalar"))
    assert torch.equal(la.prior_precision, before)
    if rank == 0:
        assert la.plan([(X, Y)], tune=False).fit.forward_passes > 0  # of this process alone
    la.tune(shard(X, Y))


def as_a_matrix(rank: int, n: int) -> None:
    """Processes form a matrix where one would, and none does where one of them has no room."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2)).double()
    for options in ({}, {"rank": 15}):
        la, one = (Laplace(net, "classification", "all", "lowrank", **options) for _ in range(2))
        la.fit(shard(X, Y))
        alone(one, [(X, Y)])
        assert la._fit.curvature.n_passes == one._fit.curvature.n_passes
        assert_alike(dense(la.posterior_precision), dense(one.posterior_precision))
        assert_same_everywhere(dense(la.posterior_precision))
    known, subspace.MATRIX_ELEMENTS = subspace.MATRIX_ELEMENTS, 0 if rank == 1 else 2**24
    try:
        la = Laplace(net, "classification", "all", "lowrank")
        la.fit(shard(X, Y))
    finally:
        subspace.MATRIX_ELEMENTS = known
    assert_same_everywhere(dense(la.posterior_precision))


def many_outputs(rank: int, n: int) -> None:
    """All keep the outputs with most curvature in the sum; where no others were dropped, the sum is that of one."""
    before = wide_kron.WIDE, wide_kron.KEPT
    noise = torch.Generator().manual_seed(3)
    x, y = torch.randn(19, 3, generator=noise).double(), torch.randint(0, 6, (19,), generator=noise)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 6)).double()
    try:
        for kept in (6, 3):
            wide_kron.WIDE, wide_kron.KEPT = 2, kept
            la, one = (Laplace(net, "classification", hessian_structure="kron") for _ in range(2))
            for batches in (shard(x, y), [(x, y)] if rank == 1 else []):
                la.fit(batches)
                alone(one, [(x, y)])
                ours, theirs = la._fit.curvature, one._fit.curvature
                assert_alike(ours.sums.diagonal, theirs.sums.diagonal)
                assert_alike(ours.sums.inputs, theirs.sums.inputs)
                assert (ours.count, len(ours.sums.kept)) == (19, kept)
                if kept == 6 or not isinstance(batches, torch.utils.data.DataLoader):
                    assert_alike(la.posterior_precision.to_dense(), one.posterior_precision.to_dense())
                assert_same_everywhere(la.posterior_precision.to_dense(), ours.sums.kept)
    finally:
        wide_kron.WIDE, wide_kron.KEPT = before


CHECKS = {
    check.__name__: check
    for check in (
        every_kind, sampled, tuned, shards_of_any_kind, more_data, one_fails, what_has_no_sum,
        processes_over_functions, several_heads, groups, on_accelerators, calls_that_differ,
        many_outputs, as_a_matrix,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run(CHECKS, 3, tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_three_processes(outcomes: dict[str, list[str]], name: str) -> None:
    assert outcomes[name] == ["ok"] * 3


TWO = {check.__name__: check for check in (every_kind, tuned, one_fails)}


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    assert run(TWO, 2, tmp_path) == dict.fromkeys(TWO, ["ok"] * 2)


# -- without any other process ----------------------------------------------------------------------------------------


def test_one_process_is_alone():
    assert processes.team() is None
    batch = Batch(X, Y)
    assert list(without_padding(shard_of_three(0), iter([batch]))) == [batch]


def shard_of_three(rank: int) -> Any:
    data = torch.utils.data.TensorDataset(X, Y)
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=3, rank=rank, shuffle=False)
    return torch.utils.data.DataLoader(data, 4, sampler=sampler)
