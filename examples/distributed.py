# %% [markdown]
# # A posterior of many processes
#
# A network is trained by several processes, each on its share of the data, and its posterior is fitted and tuned by
# the same processes: `fit` adds their sums, so that each ends with the posterior of all data. Nothing but the sampler
# of the loaders is written for it, and that stands in every program of this kind.
#
# Run it with `torchrun --nproc_per_node 2 examples/distributed.py` (it needs scikit-learn); on a machine with GPUs it
# takes one for each process.

# %%
from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace import Laplace, processes


def loader_of(data: TensorDataset, *, shuffle: bool = False) -> DataLoader:
    """The share of this process. The sampler repeats rows until shares are equal; `fit` leaves the repetitions out."""
    return DataLoader(data, batch_size=64, sampler=DistributedSampler(data, shuffle=shuffle))


def trained(train: TensorDataset, device: torch.device) -> nn.Module:
    """A network, trained by all processes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(network)
    optimizer, loader = torch.optim.Adam(model.parameters(), lr=3e-3), loader_of(train, shuffle=True)
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
    return model


def nll(probabilities: torch.Tensor, y: torch.Tensor) -> float:
    """Negative log-likelihood of a label, in nats."""
    return -probabilities[torch.arange(len(y)), y.to(probabilities.device)].log().mean().item()


def main() -> None:
    """Train, fit, tune, and compare with one process."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, validation, test = (TensorDataset(x[rows], y[rows]) for rows in order.split([1001, 300, 496]))
    model = trained(train, device)

    # %% [markdown]
    # Each process reads its share; the posterior, the evidence and what `tune` chose are those of all, in each of them.

    # %%
    la = Laplace(model, "classification", hessian_structure="kron")
    la.fit(loader_of(train))
    evidence = la.log_marginal_likelihood().item()
    la.tune(loader_of(validation))

    # %% [markdown]
    # One process alone that reads everything gets the same. `within(None)` says that the others are not waited for.

    # %%
    if rank == 0:
        with processes.within(None):
            alone = Laplace(copy.deepcopy(model.module), "classification", hessian_structure="kron")
            alone.fit(DataLoader(train, batch_size=64))
            expected = alone.log_marginal_likelihood().item()
            alone.tune(DataLoader(validation, batch_size=64))
        inputs, targets = test.tensors[0].to(device), test.tensors[1]
        with torch.no_grad():
            network = nll(model.module(inputs).softmax(-1), targets)
        print(f"{size} processes fitted {la.n_data} rows of {len(train)}")
        print(f"log evidence: {evidence:.4f}; of one process: {expected:.4f}")
        together, by_one = nll(la(inputs), targets), nll(alone(inputs), targets)
        print(f"test NLL: network {network:.4f}, Laplace {together:.4f}, of one process {by_one:.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
