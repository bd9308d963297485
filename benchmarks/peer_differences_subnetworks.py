"""The numbers of the section "Subnetworks" of docs/differences.md; see ``peer_differences.py`` for how to run it.

python benchmarks/peer_differences_subnetworks.py                                # this library
/path/to/laplace-torch/bin/python benchmarks/peer_differences_subnetworks.py     # the peer
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peer_differences import CASES, LargestTensor, case, class_data, largest, loader, main, net, regression_data
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace import Laplace
from laplace.utils import ModuleNameSubnetMask, fit_diagonal_swag_var

CASES.clear()


class Counted:
    """A loader that counts the batches it yields."""

    def __init__(self, batches: DataLoader) -> None:
        self.batches, self.dataset, self.n = batches, batches.dataset, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.n += 1
            yield batch


CHOSEN = torch.tensor([0, 3, 7, 16, 20])


def subnetwork(structure: str = "full", **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """A fitted subnetwork, with its network and data."""
    x, y = class_data()
    model = net(3)
    la = Laplace(model, "classification", "subnetwork", structure, subnetwork_indices=CHOSEN, **options)
    la.fit(loader(x, y))
    return la, model, x, y


def flat(model: nn.Module) -> Tensor:
    """All weights in one vector."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@case("log_prob of the trained weights")
def log_prob() -> float:
    la, model, *_ = subnetwork()
    return float(la.log_prob(flat(model)[CHOSEN]))


@case("square_norm of the trained weights, full")
def square_norm() -> float:
    la, model, *_ = subnetwork()
    return float(la.square_norm(flat(model)[CHOSEN]))


@case("a precision for each chosen weight, evidence")
def diagonal_prior() -> float:
    la, *_ = subnetwork(prior_precision=torch.linspace(0.5, 1.5, len(CHOSEN)))
    return float(la.log_marginal_likelihood())


@case("a precision for each touched parameter tensor, evidence")
def layerwise_prior() -> float:
    la, *_ = subnetwork(prior_precision=torch.tensor([0.5, 1.5]))
    return float(la.log_marginal_likelihood())


@case("optimize_prior_precision(prior_structure='layerwise')", prior_structure="layerwise")
@case("optimize_prior_precision(prior_structure='diag')", prior_structure="diag")
def tuned(prior_structure: str) -> str:
    la, *_ = subnetwork("diag")
    la.optimize_prior_precision(prior_structure=prior_structure)
    return f"works, {tuple(la.prior_precision.shape)}"


@case("indices in another order: largest change of the variances in regression")
def other_order() -> float:
    x, y = regression_data()
    found = []
    for indices in (CHOSEN, CHOSEN.flip(0)):
        la = Laplace(net(2), "regression", "subnetwork", "full", subnetwork_indices=indices)
        la.fit(loader(x, y))
        found.append(la(x)[1].detach())
    return largest(*found)


@case("20 weights of a network of 40,175: largest tensor of a fit", n_rows=8)
def largest_tensor(n_rows: int) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 200), nn.Tanh(), nn.Linear(200, 193), nn.Tanh(), nn.Linear(193, 3))
    x, y = class_data(n_rows)
    la = Laplace(model, "classification", "subnetwork", "full", subnetwork_indices=torch.arange(20))
    with LargestTensor() as largest_numbers:
        la.fit(loader(x, y))
    return f"{largest_numbers.numel} numbers, {flat(model).numel()} weights"


@case("ModuleNameSubnetMask of a module with children, ['0'] of Sequential(Sequential(Linear(3, 4)), Linear(4, 3))")
def module_with_children() -> str:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Linear(4, 3))
    return f"{len(ModuleNameSubnetMask(model, module_names=['0']).select())} weights"


@case("SWAG: batches seen for 6 snapshots of a loader of 3 batches, a snapshot every batch, every second", freqs=(1, 2))
def swag(freqs: tuple[int, ...]) -> str:
    seen = []
    for freq in freqs:
        x, y = class_data()
        batches = Counted(loader(x, y))
        criterion = nn.CrossEntropyLoss()
        fit_diagonal_swag_var(net(3), batches, criterion, n_snapshots_total=6, snapshot_freq=freq)
        seen.append(batches.n)
    return ", ".join(map(str, seen))


@case("SWAG: largest change of the network's weights")
def swag_weights() -> float:
    model = net(3)
    before = flat(model).clone()
    fit_diagonal_swag_var(model, loader(*class_data()), nn.CrossEntropyLoss(), n_snapshots_total=6)
    return largest(flat(model), before)


if __name__ == "__main__":
    main()
