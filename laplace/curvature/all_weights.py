"""Curvature from a recorded forward pass: one backward pass per column of the output Hessian's root.

``H = Σ J Λ Jᵀ = Σ (J r)(J r)ᵀ`` over data and columns r of the root of Λ. Columns are taken a few at a time, so that
memory is bounded by activations, never by outputs times weights.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from laplace.curvature import kfac
from laplace.curvature.columns import ColumnSums, Sums
from laplace.curvature.curvature import CurvatureInterface
from laplace.curvature.memory import Memory
from laplace.curvature.recording import Recording
from laplace.curvature.replay import check_repeatable
from laplace.curvature.uses import MixedBlock
from laplace.enums import HessianStructure
from laplace.errors import PerformanceWarning, UnsupportedError, warn
from laplace.likelihoods import Positions
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
            positions = self.backend.positions(f, y)
            recording.mask = mask_of(positions, f)
            root = self.backend.output_root(positions)
            together = self.backend.adds_over_positions or self.backend.is_sampled
            columns = directions(root, positions, f, together=together)
            factors = partial(kron, recording, columns, self.network, reduce=self.reduce)
            blocks = (recording.blocks(some) for some in chunks(recording, columns))
            like = torch.zeros((), dtype=recording.dtype, device=f.device)
            yield self.backend.loss(positions), ColumnSums(blocks, self.network.subset.sizes, like, factors)

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
            blocks = recording.blocks(directions(root, positions, recording.f, together=True))
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
    if positions.kept is None:
        return None
    rows = torch.zeros(f.numel() // positions.f.shape[-1], dtype=torch.bool, device=f.device)
    rows[positions.kept] = True
    return rows.reshape(len(f), -1)


def directions(
    root: Float[Tensor, "rows outputs columns"], positions: Positions, f: Tensor, *, together: bool
) -> list[Tensor]:
    """Columns of the root as directions in the outputs, ``[batch, *positions, C]`` each.

    Parameters
    ----------
    root
        One a row of unmasked positions.
    positions
        Which those are.
    f
        Outputs.
    together
        One direction for all positions of a datum (gradients and samples, which add up); else one for each of them.
    """
    n_rows, n_outputs, n_columns = f.numel() // root.shape[1], root.shape[1], root.shape[2]
    everywhere = root
    if positions.kept is not None:
        everywhere = root.new_zeros(n_rows, n_outputs, n_columns).index_copy(0, positions.kept, root)
    split = everywhere.to(f.dtype).reshape(len(f), -1, n_outputs, n_columns)
    if together or split.shape[1] == 1:
        return [column.reshape(f.shape) for column in split.unbind(-1)]
    columns: list[Tensor] = []
    for t in range(split.shape[1]):
        if bool((split[:, t] != 0).any()):
            here = torch.zeros_like(split)
            here[:, t] = split[:, t]
            columns += [column.reshape(f.shape) for column in here.unbind(-1)]
    if len(columns) > MANY_COLUMNS:
        msg = (
            f"The exact curvature takes a backward pass for each of {len(columns)} outputs of a datum. Pass "
            "backend_kwargs={'stochastic': True} to sample it with one."
        )
        warn(msg, PerformanceWarning)
    return columns


def unit_directions(f: Tensor) -> list[Tensor]:
    """One direction for each output of a datum, in their order."""
    eye = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device)
    return [row.reshape(1, *f.shape[1:]).expand_as(f) for row in eye]


def chunks(recording: Recording, columns: list[Tensor]) -> Iterator[list[Tensor]]:
    """As many columns at a time as memory allows."""
    step = recording.n_columns_at_once
    for start in range(0, len(columns), step):
        yield columns[start : start + step]


def kron(recording: Recording, columns: list[Tensor], network: WholeNetwork, *, reduce: bool) -> Kron:
    """Factors of ``Σ J Jᵀ``: raw sums with the number of rows in the inputs' side of each block."""
    diagonal = check_kron(recording, network)

    def blocks() -> Iterator[list[JacobianBlock]]:
        for some in chunks(recording, columns or [torch.zeros_like(recording.outputs)]):
            found = recording.blocks(some)
            for group, block in enumerate(found):
                if isinstance(block, MixedBlock):
                    refuse(network, group, "it is used in ways that share no factors (as a table and as a matrix, say)")
            yield found

    # A device without float64 sums in what it has.
    wide = recording.dtype if recording.outputs.device.type == "mps" else torch.float64
    return kfac.kron(blocks(), diagonal, wide, torch.finfo(recording.dtype).eps, reduce=reduce)


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
            f"The recurrent layers {', '.join(map(repr, layers))} have no Kronecker factors here: their blocks are "
            "exact diagonals, computed one datum at a time. Freeze them with requires_grad_(False) to leave them out."
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
