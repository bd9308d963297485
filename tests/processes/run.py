"""Real processes that make checks together: started once for a file, with the outcome of each check in each of them."""

from __future__ import annotations

import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace import processes

Check = Callable[[int, int], None]
"""What a process does, given its rank and how many there are; all make the same checks in the same order."""


def run(checks: Mapping[str, Check], n: int, folder: Path) -> dict[str, list[str]]:
    """What came of each check in each process: ``"ok"``, or a traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_work, (n, port, checks, str(folder)), n)
    return {name: [(folder / f"{name}.{rank}").read_text() for rank in range(n)] for name in checks}


def _work(rank: int, n: int, port: int, checks: Mapping[str, Check], folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(n))
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=n, timeout=timedelta(seconds=60))
    for name, check in checks.items():
        start = time.process_time()
        try:
            check(rank, n)
            found = "ok"
        except BaseException:
            found = traceback.format_exc()
        (Path(folder) / f"{name}.{rank}").write_text(found)
        if os.environ.get("TELL") and rank == 0:
            print(name, f"{time.process_time() - start:.2f}", found, flush=True)
        dist.barrier()
    dist.destroy_process_group()


def shard(x: Tensor, y: Tensor, size: int = 4, **options: Any) -> DataLoader[Any]:
    """The part of this process, in the order of the data; rows are repeated so that all parts are equally long."""
    data = TensorDataset(x, y)
    return DataLoader(data, size, sampler=DistributedSampler(data, shuffle=False), **options)


def alone(la: Any, loader: Any) -> Any:
    """Fitted by this process to all data."""
    with processes.within(None):
        la.fit(loader)
    return la


def assert_alike(first: Any, *others: Any, tolerance: float = 1e-10) -> None:
    """That numbers are equal to the rounding of sums in another order."""
    first = torch.as_tensor(first)
    for other in map(torch.as_tensor, others):
        assert torch.allclose(first, other, rtol=tolerance, atol=tolerance), float((first - other).abs().max())


def assert_same_everywhere(*tensors: Tensor) -> None:
    """That all processes have the same numbers, to the last bit."""
    here = processes.team()
    assert here is not None
    for every in here.gathered([tensor.detach() for tensor in tensors]):
        for ours, theirs in zip(tensors, every, strict=True):
            assert torch.equal(ours, theirs)
