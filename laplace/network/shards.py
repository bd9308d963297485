"""Shards of a data set that is spread over processes: rows that only fill them up, batches for those that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from laplace.network.batches import Batch, plain, rows_of, to_device
from laplace.processes import Team, team


def without_padding(loader: Any, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches without the rows that a sampler repeats so that all processes have equally many.

    ``DistributedSampler`` and the batch samplers of accelerate put them last. Of other samplers nothing is known. A
    process that is alone gets all rows.
    """
    count = None if team() is None else _counter(loader)
    if count is None:
        yield from batches
        return
    for index, (x, y) in enumerate(batches):
        n = count(index)
        if n >= len(y):
            yield Batch(x, y)
        elif n > 0:
            yield Batch(rows_of(x, slice(0, n), len(y)), y[:n])


def _counter(loader: Any) -> Callable[[int], int] | None:
    """How many rows of a batch are no repetition, by its number; ``None`` where there is no known sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or batch_sampler is None:
        return None
    sampler = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is BatchSampler and isinstance(sampler, DistributedSampler):
        n_rows = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # pyright: ignore[reportArgumentType]
        return lambda index: n_rows - index * batch_sampler.batch_size
    if type(batch_sampler).__name__ == "BatchSamplerShard":  # of accelerate
        return _of_accelerate(batch_sampler)
    return None


def _of_accelerate(shard: Any) -> Callable[[int], int] | None:
    """The same of its ``BatchSamplerShard``: batches go round the processes, or each is cut into their shares."""
    size, n, rank = shard.batch_size, shard.num_processes, shard.process_index
    if size is None:
        return None
    try:
        n_rows = len(shard.batch_sampler.sampler)
    except (AttributeError, TypeError):
        return None
    if shard.split_batches:
        share = size // n
        return lambda index: n_rows - index * size - rank * share
    return lambda index: n_rows - (index * n + rank) * size


def places(here: Team, loader: Any, n_rows: int | None) -> Int[Tensor, " rows"] | None:
    """Where the rows of this process are among those of all; ``None`` if one does not know how many it has.

    Those of a ``DistributedSampler`` are dealt out one by one; others follow each other, process by process.

    Parameters
    ----------
    here
        The processes.
    loader
        Whose sampler may be known.
    n_rows
        How many rows it has, with those that only fill the shards up.
    """
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    dealt: Tensor | None = None
    if _counter(loader) is not None and isinstance(sampler, DistributedSampler) and n_rows is not None:
        dealt = torch.arange(sampler.rank, len(sampler.dataset), sampler.num_replicas)[:n_rows]  # pyright: ignore[reportArgumentType]
    n_rows = n_rows if dealt is None else len(dealt)
    records = here.exchange("places", n=n_rows, dealt=dealt is not None)
    sizes = [record["n"] for record in records]
    if None in sizes:
        return None
    return dealt if all(record["dealt"] for record in records) else follow(here, sizes)


def follow(here: Team, sizes: Sequence[int]) -> Int[Tensor, " rows"]:
    """Places of the rows of this process where those of all follow each other."""
    return torch.arange(sizes[here.rank]) + sum(sizes[: here.rank])


def filled(here: Team, batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches of this process; where it has none, one of another process, which does not count.

    So that each process makes the same sums, of the same shapes, with the same last layer.
    """
    first = next(batches, None)
    empty = [record["empty"] for record in here.exchange("first batch", empty=first is None)]
    here.is_ghost = first is None
    if any(empty) and not all(empty):
        donor = empty.index(False)
        given = None if first is None or here.rank != donor else [plain(first.x), first.y]
        x, y = here.exchange("given batch", batch=given)[donor]["batch"]
        first = Batch(*to_device((x, y), device)) if first is None else first
    if first is not None:
        yield first
    if not here.is_ghost:
        yield from batches


def is_collective(model: nn.Module) -> bool:
    """Whether processes run a model together, since each holds a part of its weights (FSDP)."""
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    return bool(names & {"FSDPModule", "FullyShardedDataParallel"})


def in_step(here: Team, batches: Iterator[Batch], run: Callable[[Any], Any]) -> Iterator[Batch]:
    """The batches of this process; while others have more, the last one is run again, and does not count."""
    x: Any = None
    while True:
        batch = next(batches, None)
        more = [record["more"] for record in here.exchange("next batch", more=batch is not None)]
        if not any(more):
            return
        if batch is None:
            run(x)
        else:
            x = batch.x
            yield batch


def in_turn(here: Team, batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches of all processes, one of each in turn, the same in all of them."""
    while True:
        batch = next(batches, None)
        given = None if batch is None else [plain(batch.x), batch.y]
        found = [record["batch"] for record in here.exchange("batch", batch=given)]
        if all(each is None for each in found):
            return
        for each in found:
            if each is not None:
                x, y = to_device((each[0], each[1]), device)
                yield Batch(x, y)


__all__ = ["filled", "follow", "in_step", "in_turn", "is_collective", "places", "without_padding"]
