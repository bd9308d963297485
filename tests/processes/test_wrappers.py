"""Models and loaders that other code made for several processes: DDP, FSDP, accelerate."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace, processes
from laplace.errors import UnsupportedError
from tests.kinds import data, dense, network
from tests.processes.run import alone, assert_alike, assert_same_everywhere, run, shard

pytestmark = pytest.mark.slow  # each process imports much
EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
X, Y = data("classification")
X, Y = X[:19], Y[:19]
CPU = torch.device("cpu")


class Net(nn.Module):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()).double()
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def with_ddp(rank: int, n: int) -> None:
    """Also after training steps, and with buffers that each forward pass of a wrapper would send around."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = DistributedDataParallel(net)
    for subset in ("last_layer", "all"):
        model(X).sum().backward()
        la, one = Laplace(model, "classification", subset), Laplace(net, "classification", subset)
        la.fit(shard(X, Y))
        alone(one, [(X, Y)])
        assert_alike(dense(la.posterior_precision), dense(one.posterior_precision))
        la.tune(shard(X, Y))
        assert_same_everywhere(la.mean, la.prior_precision, la(X))
        la(X[: rank + 1])  # of this process alone


def inner(net: Net) -> Net:
    net.body = FullyShardedDataParallel(net.body, device_id=CPU)
    return net


def part(net: Net) -> Net:
    fully_shard(net.body)
    return net


def without_head(net: Net) -> Net:
    fully_shard(net, ignored_params=set(net.head.parameters()))
    return net


SHARDED: list[Callable[[Net], nn.Module]] = [
    inner,
    part,
    without_head,
    lambda net: FullyShardedDataParallel(net, ignored_modules=[net.head], device_id=CPU),
]


def with_fsdp(rank: int, n: int) -> None:
    """Processes run the model together, though they have other numbers of batches."""
    one = alone(Laplace(Net(), "classification"), [(X, Y)])
    with processes.within(None):
        one.tune([(X, Y)])
    for wrap in SHARDED:
        model = wrap(Net())
        la = Laplace(model, "classification")
        la.fit(shard(X, Y, 2))  # of the last batches only some have rows that count
        assert la.n_data == 19
        la.tune([(X[12:], Y[12:])] if rank else [(X[:5], Y[:5]), (X[5:12], Y[5:12])])
        assert_alike(la.log_marginal_likelihood(), one.log_marginal_likelihood(), tolerance=1e-6)
        with pytest.raises(UnsupportedError, match=r"FSDP.*last_layer"):
            Laplace(model, "classification", "all").fit(shard(X, Y))
    for options in ({}, {"use_orig_params": True}):
        whole = FullyShardedDataParallel(Net(), device_id=CPU, **options)
        with pytest.raises(UnsupportedError, match=r"spread over processes.*ignored_modules"):
            Laplace(whole, "classification").fit(shard(X, Y))


def with_accelerate(rank: int, n: int) -> None:
    """What it prepares; rows that it repeats are not counted twice, however it deals batches out."""
    import accelerate

    for split in (False, True):
        options = accelerate.utils.DataLoaderConfiguration(split_batches=split)
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=options)
        model = accelerator.prepare(network())
        for rows, size in ((19, 2), (9, 2), (5, 4)):
            whole = TensorDataset(X[:rows], Y[:rows])
            loader = accelerator.prepare(DataLoader(whole, size * n if split else size))
            la = Laplace(model, "classification", hessian_structure="diag")
            la.fit(loader)
            one = alone(Laplace(network(), "classification", hessian_structure="diag"), [(X[:rows], Y[:rows])])
            assert la.n_data == rows
            assert_alike(la.log_marginal_likelihood(), one.log_marginal_likelihood())


CHECKS = {check.__name__: check for check in (with_ddp, with_fsdp, with_accelerate)}
if importlib.util.find_spec("accelerate") is None:
    del CHECKS["with_accelerate"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run(CHECKS, 2, tmp_path_factory.mktemp("wrappers"))


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(outcomes: dict[str, list[str]], name: str) -> None:
    assert outcomes[name] == ["ok"] * 2


def test_the_example_runs_with_two_processes_and_finds_what_one_finds() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(EXAMPLE)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert "2 processes fitted 1001 rows of 1001" in found
    evidence = re.search(r"log evidence: (\S+); of one process: (\S+)", found)
    losses = re.search(r"network (\S+), Laplace (\S+), of one process (\S+)", found)
    assert evidence is not None
    assert losses is not None
    together, one = map(float, evidence.groups())
    assert abs(together - one) < 1e-4 * abs(one)
    network_alone, tuned, tuned_by_one = map(float, losses.groups())
    assert tuned < network_alone
    assert abs(tuned - tuned_by_one) < 1e-3
