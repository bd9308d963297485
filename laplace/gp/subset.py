"""Which data make up the subset, and what is kept of them while they pass by: one pass over any loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader

from laplace import linalg
from laplace.errors import InputError, OutOfMemoryError
from laplace.gp.kernel import SubsetKernel
from laplace.likelihoods import Positions
from laplace.network import full_precision
from laplace.network.batches import rows_of
from laplace.network.sampler import SoDSampler
from laplace.network.shards import follow
from laplace.predictive import Linearization
from laplace.processes import Team
from laplace.structures.head_block import HeadBlock
from laplace.types import Inputs

KEPT_ELEMENTS = 2**29
"""Numbers kept of data while it is not known which of them are in the subset: 2 GB in float32."""


def expected_rows(loader: Any, dict_key_y: str) -> int | None:
    """How many rows a loader will yield, as far as it says so; ``None`` where only going over it tells."""
    if isinstance(loader, (list, tuple)) and loader:
        targets = [
            batch[dict_key_y] if isinstance(batch, Mapping) and dict_key_y in batch else batch for batch in loader
        ]
        targets = [batch[-1] if isinstance(batch, (list, tuple)) and batch else batch for batch in targets]
        return sum(len(y) for y in targets) if all(isinstance(y, Tensor) and y.dim() for y in targets) else None
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None
    try:
        n = len(loader.sampler)  # pyright: ignore[reportArgumentType] - a sampler of a stream has no length
    except TypeError:
        return None
    return n - n % loader.batch_size if loader.drop_last else n


class Subset:
    """M of N data, without replacement: ``numpy.random.default_rng(seed).choice(N, M)`` in the order of the loader."""

    def __init__(
        self,
        size: int,
        seed: int,
        expected: int | None,
        *,
        diagonal: bool,
        independent: bool,
        linearize: Callable[[Inputs], Linearization],
        team: Team | None = None,
        places: Int[Tensor, " data"] | None = None,
    ) -> None:
        """``places``: where the data of this process are among those of a ``team``, if it is known."""
        self.size, self.seed, self.expected = size, seed, expected
        self.team, self.places = team, places
        self.diagonal, self.independent, self.linearize = diagonal, independent, linearize
        self.n_seen, self._n_kept, self._largest = 0, 0, 1
        self._chosen = None if expected is None else self._drawn(expected)
        self._datum: list[Tensor] = []

    def _drawn(self, n_data: int) -> Int[Tensor, " subset"]:
        """Which data of this process are in the subset."""
        if self.team is None:
            return self._draw(n_data)
        if self.places is None:
            self.places = follow(self.team, [record["n"] for record in self.team.exchange("rows", n=n_data)])
        assert len(self.places) == n_data, "there is a place for each datum"
        n_all = int(self.team.summed([torch.tensor(n_data)], "subset")[0])
        return torch.isin(self.places, self._draw(n_all)).nonzero().squeeze(1)

    def _draw(self, n_data: int) -> Int[Tensor, " subset"]:
        if self.size > n_data:
            msg = (
                f"n_subset={self.size} is more than there are: the training loader yields {n_data} rows. Pass at most "
                "that; with all of them the posterior is that of hessian_structure='full'."
            )
            raise InputError(msg)
        return torch.tensor(SoDSampler(n_data, self.size, self.seed).indices).sort().values

    def take(self, backend: Any, x: Inputs, y: Tensor) -> tuple[Tensor, SubsetKernel, Tensor]:
        """Loss of a batch, and kernel and roots of its data that are in the subset."""
        with torch.no_grad():
            f, phi = backend.model.forward_with_features(x) if backend.last_layer else (backend.outputs(x), None)
            with full_precision(f.device):
                positions = backend.positions(f, y)
                root = self._roots(backend, positions, of_head=phi is not None)
                # Scores of the two items of a pair may come one after the other: data are counted by targets.
                n_data = len(y)
                if not self.n_seen:
                    self._check_memory(root, len(positions.f) / max(1, n_data))
                rows = self._rows(n_data)
                if phi is None:
                    kernel, root = self._of_network(backend, x, f, positions, root, rows)
                else:
                    kernel, root = self._of_features(backend, phi.to(positions.f.dtype), positions, root, rows)
                loss = backend.loss(positions)
        self.n_seen += n_data
        self._largest = max(self._largest, n_data)
        return loss, kernel, root

    def _rows(self, n_data: int) -> Int[Tensor, " data"]:
        """Which data of the batch are in the subset; all of them while that is not known."""
        if self._chosen is None:
            return torch.arange(n_data)
        here = (self._chosen >= self.n_seen) & (self._chosen < self.n_seen + n_data)
        return self._chosen[here] - self.n_seen

    def _roots(self, backend: Any, positions: Positions, *, of_head: bool) -> Tensor:
        """Of the output Hessians of the unmasked positions."""
        hessian, likelihood = backend.output_hessian(positions), backend.output_likelihood
        hessian = likelihood.head_hessian(hessian) if of_head else hessian
        independent = likelihood.independent(self.independent)
        if hessian.root is None or self.diagonal or independent or hessian.n_outputs == 1:
            alone = hessian.diagonal if hessian.root is None and hessian.total is None else None
            half = (hessian.diag() if alone is None else alone).sqrt()
            return half if of_head or independent else torch.diag_embed(half.expand(-1, hessian.n_outputs))
        return hessian.root if backend.is_sampled else backend.output_root(positions)

    def _of_features(
        self, backend: Any, phi: Tensor, positions: Positions, root: Tensor, rows: Tensor
    ) -> tuple[SubsetKernel, Tensor]:
        features, constant = backend.output_likelihood.head_rows(positions, phi)
        datum = positions.datum if positions.datum is not None else torch.arange(len(features), device=features.device)
        here = torch.isin(datum, rows.to(datum.device))
        features, shapes = features[here], tuple(backend.shapes)
        phis = (features, features.new_full((len(features), 1), constant))[: len(shapes)]
        self._note(datum[here] + self.n_seen, sum(phi.numel() for phi in phis))
        return SubsetKernel.of_head(HeadBlock(phis, shapes)), root[here]

    def _of_network(
        self, backend: Any, x: Inputs, f: Tensor, positions: Positions, root: Tensor, rows: Tensor
    ) -> tuple[SubsetKernel, Tensor]:
        width, rows = positions.f.shape[-1], rows.to(f.device)
        each = f[0].numel() // width
        everywhere = root
        if positions.kept is not None:
            everywhere = root.new_zeros(len(f) * each, *root.shape[1:]).index_copy(0, positions.kept, root)
        chosen = everywhere.unflatten(0, (len(f), each))[rows].flatten(0, 1)
        batches = (rows_of(x, rows, len(f)),) if len(rows) else ()
        sizes = ((len(rows), each),) if len(rows) else ()
        self._note((rows + self.n_seen).repeat_interleave(each), len(rows) * f[0].numel())
        n_params = sum(parameter.numel() for parameter in backend.params)
        separate = backend.output_likelihood.independent(self.independent)
        return SubsetKernel(batches, sizes, width, n_params, separate, positions.f.dtype, self.linearize), chosen

    def _note(self, datum: Tensor, size: int) -> None:
        """Remember which data rows belong to, while it is not known which are in the subset or where they belong."""
        if self._chosen is not None:
            self._datum += [] if self.team is None else [datum]
            return
        self._datum.append(datum)
        self._n_kept += size
        if self._n_kept > KEPT_ELEMENTS:
            msg = (
                "The training loader does not say how many rows it yields, so that all of them are kept until the "
                "subset can be drawn, and they are too many. Pass a DataLoader over a dataset with a length."
            )
            raise InputError(msg)

    def _check_memory(self, root: Tensor, rows_each: float) -> None:
        n_rows = int(self.size * max(1.0, rows_each))
        parts, columns = (root.shape[1], n_rows) if root.dim() == 2 else (1, n_rows * root.shape[2])
        needed, available = 3 * parts * columns**2 * root.element_size(), linalg.memory_of(root.device)
        if available is not None and needed > available:
            msg = (
                f"n_subset={self.size} makes {parts} matrices of {columns}×{columns} numbers, about "
                f"{needed / 1e9:.1f} GB with their factors; {available / 1e9:.1f} GB are free. Pass a smaller "
                "n_subset, or independent_outputs=True."
            )
            raise OutOfMemoryError(msg)

    def finish(self, kernel: SubsetKernel, root: Tensor) -> tuple[SubsetKernel, Tensor, float]:
        """Kernel and roots of the subset, once all data have passed by, and N/M."""
        n_seen, is_ghost = self.n_seen, self.team is not None and self.team.is_ghost
        if self._chosen is None:
            kernel, root = self._restrict(kernel, root, self._drawn(0 if is_ghost else n_seen))
        elif n_seen != self.expected and not is_ghost:
            msg = (
                f"The training loader has {self.expected} rows by its length and yielded {self.n_seen}: the subset was "
                "drawn from the wrong number. Pass a generator over it, whose rows are counted as they come."
            )
            raise InputError(msg)
        if self.team is not None:
            n_seen = int(self.team.summed([torch.tensor(n_seen)], "seen")[0])
            kernel, root = self._gathered(self.team, kernel, root)
        if not bool((root != 0).any()):
            msg = (
                f"No target of the {self.size} data of the subset counts: all are masked, or the network is so "
                "confident that their Hessians vanish. Pass a larger n_subset or another seed."
            )
            raise InputError(msg)
        kernel = kernel.joined(kernel.n_rows if kernel.shares else self._largest)
        return kernel, root, n_seen / self.size

    def _restrict(self, kernel: SubsetKernel, root: Tensor, chosen: Tensor) -> tuple[SubsetKernel, Tensor]:
        """To the chosen data; a row of a last layer is one datum of its kernel."""
        datum = torch.cat(self._datum)
        here = torch.isin(datum, chosen.to(root.device))
        self._datum = [datum[here]]
        return kernel.restricted(here.nonzero().squeeze(1) if kernel.shares else chosen.to(root.device)), root[here]

    def _gathered(self, team: Team, kernel: SubsetKernel, root: Tensor) -> tuple[SubsetKernel, Tensor]:
        """The rows of all processes, of a last layer, in the order of their places."""
        own = None
        if kernel.n_rows and not team.is_ghost:
            assert self.places is not None, "known when the subset is drawn"
            datum = torch.cat(self._datum)
            own = [torch.cat([*kernel.batches]), root, self.places.to(datum.device)[datum]]
        rows = [record["rows"] for record in team.exchange("subset", rows=own) if record["rows"] is not None]
        phi, root, place = (torch.cat([part.to(root.device) for part in parts]) for parts in zip(*rows, strict=True))
        order = place.argsort(stable=True)
        return replace(kernel, batches=(phi[order],), sizes=((len(phi), 1),), _kept={}), root[order]


__all__ = ["Subset", "expected_rows"]
