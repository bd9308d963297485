"""Curvature from a recorded forward pass: one backward pass per column of the output Hessian's root.

``H = Σ J Λ Jᵀ = Σ (J r)(J r)ᵀ`` over data and columns r of the root of Λ. Columns are taken a few at a time, so that
memory is bounded by activations, never by outputs times weights.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from laplace import pending
from laplace.curvature import kfac
from laplace.curvature.columns import ColumnSums, Sums
from laplace.curvature.curvature import CurvatureInterface
from laplace.curvature.leading import Remainder
from laplace.curvature.memory import Memory
from laplace.curvature.recording import Recording
from laplace.curvature.replay import check_repeatable
from laplace.curvature.uses import MixedBlock
from laplace.enums import HessianStructure
from laplace.errors import PerformanceWarning, UnsupportedError, warn
from laplace.likelihoods import Positions
from laplace.likelihoods.roots import Root
from laplace.network.batches import count_rows, differentiable
from laplace.network.compiled import as_written
from laplace.network.modes import full_precision
from laplace.network.threads import alone
from laplace.network.whole_network import WholeNetwork
from laplace.structures import Kron
from laplace.structures.jacobian import JacobianBlock
from laplace.types import Inputs, Jacobians

MANY_COLUMNS = 1000
"""Backward passes per batch from which a warning names the sampled Fisher."""


class AllWeightsEngine:
    """Curvature and Jacobians of all or of chosen weights from recorded passes."""

    def __init__(self, backend: CurvatureInterface, network: WholeNetwork, reduce: bool) -> None:
        self.backend, self.network, self.reduce = backend, network, reduce
        self.memory = Memory()

    def record(self, x: Inputs, *, create_graph: bool = False, **model_kwargs: Any) -> Recording:
        """Run the model and keep what derivatives are made of."""

        def run(rows: Any) -> Tensor:
            # Keywords travel with the inputs, so that single rows get their own.
            with as_written(self.network.model.modules()):
                return self.backend.outputs(rows[0], **rows[1])

        with alone(self.network.model):
            self.network.check_still_random()
            return Recording(
                run,
                differentiable((x, model_kwargs)),
                self.network.subset,
                self.network.constants,
                count_rows(x),
                self.memory,
                names=self.network.names,
                create_graph=create_graph,
                dtype=self.backend.curvature_dtype,
            )

    @contextmanager
    def sums(self, x: Inputs, y: Tensor) -> Generator[tuple[Tensor, Sums], None, None]:
        """Loss and curvature of a batch: one backward pass per column of the output Hessian's root."""
        recording = self.record(x)
        f = recording.f
        with torch.no_grad(), full_precision(f.device):
            positions = self.backend.positions(f, y, whole=True)
            blocks = self._blocks(recording, positions)
            factors = partial(masked_kron, recording, positions, blocks, self.network, reduce=self.reduce)
            like = torch.zeros((), dtype=recording.dtype, device=f.device)
            yield self.backend.loss(positions), ColumnSums(blocks, self.network.subset.sizes, like, factors)

    def _blocks(self, recording: Recording, positions: Positions) -> Iterator[list[JacobianBlock]]:
        """Derivatives along the columns of the output Hessian's root, some at a time."""
        backend, f = self.backend, recording.f
        if backend.leading is not None:
            root, n_mixtures = backend.leading.draw(backend.output_likelihood, positions)
            columns = directions(root, positions, f)
            if n_mixtures:
                return measured(recording, columns, n_mixtures, backend.leading.remainder)
            return blocks_of(recording, columns)
        if backend.adds_over_positions or backend.is_sampled:
            return blocks_of(recording, directions(backend.output_root(positions), positions, f))
        likelihood = backend.output_likelihood
        return blocks_of(
            recording, Directions(likelihood.lazy_root(likelihood.observed(positions.f, positions.y)), positions, f)
        )

    def jacobians(self, x: Inputs, enable_backprop: bool) -> tuple[Jacobians, Tensor]:
        """Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``, written out."""
        recording = self.record(x, create_graph=enable_backprop)
        f = recording.f.to(recording.dtype)
        parts = [
            torch.cat([block.dense() for block in recording.blocks(some)], -1)
            for some in chunks(recording, unit_directions(recording.outputs))
        ]
        return torch.cat(parts).transpose(0, 1).reshape(-1, f.shape[-1], parts[0].shape[-1]), f.reshape(-1, f.shape[-1])

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss."""
        recording = self.record(x)
        with torch.no_grad():
            positions = self.backend.positions(recording.f, y)
            root = self.backend.output_likelihood.gradient(positions.f, positions.y).unsqueeze(-1)
            blocks = recording.blocks(directions(root, positions, recording.f))
            gradients = torch.cat([block.dense() for block in blocks], -1)[0]
            return gradients, self.backend.output_likelihood.nll(positions.f, positions.y)

    def repeatable(
        self, batches: Iterable[tuple[Inputs, Tensor]], structure: HessianStructure
    ) -> Iterable[tuple[Inputs, Tensor]]:
        """The batches, if they can be read again."""
        check_repeatable(batches, structure)
        return batches


def mask_of(positions: Positions, f: Tensor) -> Bool[Tensor, "batch positions"] | None:
    """Which positions count, ``[batch, positions]``; ``None`` when all do."""
    if positions.counted is not None:
        return None if bool(positions.counted.all()) else positions.counted.reshape(len(f), -1)
    if positions.kept is None:
        return None
    rows = torch.zeros(f.numel() // positions.f.shape[-1], dtype=torch.bool, device=f.device)
    rows[positions.kept] = True
    return rows.reshape(len(f), -1)


def spread(rows: Float[Tensor, "rows outputs"], positions: Positions, f: Tensor) -> Tensor:
    """Numbers of unmasked positions in the shape of the outputs, ``[batch, *positions, C]``; zeros at masked ones."""
    if positions.kept is None:
        return rows.to(f.dtype).reshape(f.shape)
    everywhere = rows.new_zeros(f.numel() // rows.shape[1], rows.shape[1])
    return everywhere.index_copy(0, positions.kept, rows).to(f.dtype).reshape(f.shape)


def directions(root: Float[Tensor, "rows outputs columns"], positions: Positions, f: Tensor) -> list[Tensor]:
    """Columns that all positions of a datum share (those of gradients, samples and mixtures) as directions in ``f``."""
    return [spread(column, positions, f) for column in root.unbind(-1)]


class Directions(Sequence[Tensor]):
    """Columns of roots as directions in the outputs, one for each position of a datum, made when they are asked for.

    Parameters
    ----------
    root
        Of the output Hessians of unmasked positions.
    positions
        Which those are.
    f
        Outputs.
    """

    def __init__(self, root: Root, positions: Positions, f: Tensor) -> None:
        self.root, self.positions, self.f = root, positions, f
        sizes = root.sizes
        each = max(1, f.numel() // positions.f.shape[-1] // max(1, len(f)))
        rows = torch.arange(len(sizes), device=f.device) if positions.kept is None else positions.kept
        self.position, self.shared = rows % each, each > 1
        # Columns that are zero for all data need no pass; where none need be, nothing is read.
        self.places = [(t, j) for t in range(each) for j in range(sizes.shape[1])]
        if positions.kept is not None or pending.is_free(sizes.device):
            some = sizes.new_zeros(each, sizes.shape[1]).index_add(0, self.position, (sizes != 0).to(sizes))
            self.places = [(int(t), int(j)) for t, j in some.nonzero().tolist()]
        if len(self) > MANY_COLUMNS:
            msg = (
                f"The exact curvature takes a backward pass for each of {len(self)} outputs of a datum. Pass "
                "backend_kwargs={'columns': k} for the largest k of them and one random mixture of the others, or "
                "backend_kwargs={'stochastic': True} to sample it with one."
            )
            warn(msg, PerformanceWarning)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """One of them, or a list of some."""
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        t, j = self.places[index]
        weights = torch.zeros_like(self.root.sizes)
        weights[:, j] = (self.position == t).to(weights) if self.shared else 1
        return spread(self.root.mix(weights), self.positions, self.f)


def unit_directions(f: Tensor) -> list[Tensor]:
    """One direction for each output of a datum, in their order."""
    eye = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device)
    return [row.reshape(1, *f.shape[1:]).expand_as(f) for row in eye]


def chunks(recording: Recording, columns: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """As many columns at a time as memory allows."""
    step = recording.n_columns_at_once
    for start in range(0, len(columns), step):
        yield list(columns[start : start + step])


def masked_kron(
    recording: Recording,
    positions: Positions,
    columns: Iterable[list[JacobianBlock]],
    network: WholeNetwork,
    *,
    reduce: bool,
) -> Kron:
    """Factors with inputs averaged over rows that count: what else is summed needs directions alone, zero at others."""
    recording.mask = mask_of(positions, recording.f)
    return kron(recording, columns, network, reduce=reduce)


def blocks_of(recording: Recording, columns: Sequence[Tensor]) -> Iterator[list[JacobianBlock]]:
    """Derivatives along columns, as many at a time as memory allows; those of zero where there are none."""
    for some in chunks(recording, columns or [torch.zeros_like(recording.outputs)]):
        yield recording.blocks(some)


def measured(
    recording: Recording, columns: list[Tensor], n_mixtures: int, remainder: Remainder
) -> Iterator[list[JacobianBlock]]:
    """The same, with the last columns one by one, while their squares are compared."""
    exact = len(columns) - n_mixtures
    for start, some in ((0, columns[:exact]), *((n, [columns[n]]) for n in range(exact, len(columns)))):
        for blocks in blocks_of(recording, some):
            remainder.see(torch.cat([block.squares() for block in blocks]), mixture=start >= exact)
            yield blocks


def kron(recording: Recording, columns: Iterable[list[JacobianBlock]], network: WholeNetwork, *, reduce: bool) -> Kron:
    """Factors of ``Σ J Jᵀ``: raw sums with the number of rows in the inputs' side of each block."""
    diagonal = check_kron(recording, network)

    def blocks() -> Iterator[list[JacobianBlock]]:
        for found in columns:
            for group, block in enumerate(found):
                if isinstance(block, MixedBlock):
                    refuse(network, group, "it is used in ways that share no factors (as a table and as a matrix, say)")
            yield found

    return kfac.kron(blocks(), diagonal, torch.finfo(recording.dtype).eps, reduce=reduce)


def check_kron(recording: Recording, network: WholeNetwork) -> set[int]:
    """The groups that get a diagonal block; raises for those that can have none."""
    diagonal: set[int] = set()
    for group in recording.verdict.unused:
        refuse(network, group, "the outputs of a batch do not depend on it (is it used for some data only?)")
    for group in recording.verdict.slow:
        if isinstance(network.owner(group)[1], (nn.RNNBase, nn.RNNCellBase)):
            diagonal.add(group)
        elif group in recording.verdict.unseen:
            refuse(network, group, "it is used where no formula sees it")
    layers = sorted({network.owner(group)[0] for group in diagonal})
    if layers:
        msg = (
            f"The recurrent layers {', '.join(map(repr, layers))} have no Kronecker factors here, as with proj_size: "
            "their blocks are exact diagonals, computed one datum at a time. Freeze them with requires_grad_(False) to "
            "leave them out."
        )
        warn(msg, PerformanceWarning)
    return diagonal


def refuse(network: WholeNetwork, group: int, reason: str) -> NoReturn:
    """Raise: a weight cannot be represented by a Kronecker structure."""
    msg = (
        f'Kronecker factors ("kron", "ekfac") cannot represent the parameter {network.names[group]!r}: {reason}. Use '
        'hessian_structure="diag" or "full", or freeze it with requires_grad_(False).'
    )
    raise UnsupportedError(msg)
