"""One forward pass, recorded with everything that derivatives in the random weights are made of.

``Recording.blocks`` turns directions in the outputs into derivatives: one backward pass per direction, in which
gradients go to the outputs of layers and never to weights; each group of weights gets its factors. Uses that no formula
describes are differentiated row by row, exactly and slowly, and the formulas are checked against autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from laplace.curvature import layouts
from laplace.curvature.check import agrees, norms_of, proves
from laplace.curvature.layers import READER_NAMES
from laplace.curvature.layouts import Layout
from laplace.curvature.memory import ATTEMPTS, READ_AGAIN, Found, Memory, Verdict, remember
from laplace.curvature.roles import Kept
from laplace.curvature.row_by_row import along, dense, row_by_row, warn_of_slow
from laplace.curvature.tape import Call, Tape, row_view, transposed_view
from laplace.curvature.uses import combined
from laplace.errors import UnsupportedError, quiet
from laplace.linalg import CHUNK_ELEMENTS, piece_elements
from laplace.network.parameters import ParameterSubset
from laplace.structures.entries import chosen
from laplace.structures.gather import looked_up
from laplace.structures.jacobian import DenseBlock, JacobianBlock, SumBlock
from laplace.structures.product import ProductBlock

NO_DEPENDENCE = (
    "The outputs of the model do not depend on any weight that is random. Unfreeze the weights that should be with "
    "requires_grad_(True), or choose others for a subnetwork; is part of forward under torch.no_grad()?"
)


class Recording:
    """Outputs ``[batch, *positions, C]`` at some inputs, and their derivatives in the random weights.

    ``constants`` are the other tensors of the model, and ``names`` those of the random weights, for messages. ``mask``
    says which positions of the outputs count, all when ``None``; factors are computed in ``dtype``, or when ``None`` in
    that of the outputs, at least float32.
    """

    def __init__(
        self,
        run: Callable[[Any], Tensor],
        x: Any,
        subset: ParameterSubset,
        constants: Sequence[Tensor],
        n_rows: int,
        memory: Memory,
        *,
        names: Sequence[str],
        create_graph: bool = False,
        mask: Bool[Tensor, "batch positions"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        tape = Tape(subset.parameters, constants, n_rows)
        with torch.enable_grad(), tape:
            self.outputs = run(x)
        if not self.outputs.requires_grad:
            raise UnsupportedError(NO_DEPENDENCE)
        for call in tape.calls:
            if any(tensor._version != version for tensor, version in call.inputs):
                msg = (
                    f"An input of {call.name} is written to later in the forward pass, so that what the layer saw is "
                    "lost. Use the operation that does not work in place."
                )
                raise UnsupportedError(msg)
        self.run, self.x, self.subset, self.parameters = run, x, subset, subset.parameters
        self.create_graph, self.n_rows = create_graph, len(self.outputs)
        self.dtype = dtype or torch.promote_types(self.outputs.dtype, torch.float32)
        self.calls: list[Call] = tape.calls
        self._tracked, self._opaque = tape.tracked, tape.opaque
        self._memory, self.names = memory, names
        self._kept = Kept(2 * CHUNK_ELEMENTS, prod(self.outputs.shape[1:]))
        self._lookups, self._reorders = tape.lookups, tape.reorders
        self.mask = mask

    @property
    def f(self) -> Tensor:
        """Outputs, ``[batch, *positions, C]``; with their graph if ``create_graph``."""
        return self.outputs if self.create_graph else self.outputs.detach()

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _gradients(self, direction: Tensor, *, create_graph: bool = False) -> list[Tensor | None]:
        """Gradients of ``direction · f`` at the output of every call."""
        if not self.calls:
            return []
        edges = [call.edge for call in self.calls]
        grads = torch.autograd.grad(
            along(self.outputs, direction), edges, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        shapes = [call.shape for call in self.calls]
        return [None if g is None else g.reshape(shape) for g, shape in zip(grads, shapes, strict=True)]

    @cached_property
    def _direction(self) -> Tensor:
        """A random direction in the outputs of each datum."""
        noise = torch.Generator().manual_seed(0)
        return torch.randn(self.outputs.shape, generator=noise, dtype=torch.float32).to(self.outputs, non_blocking=True)

    @cached_property
    def _plain(self) -> list[Tensor | None]:
        """Gradients in that direction, without a graph; dropped once layouts and verdict are known."""
        with torch.no_grad():
            return self._gradients(self._direction)

    @cached_property
    def _dtypes(self) -> set[torch.dtype]:
        """Dtypes that layers compute in, including those that autocasting chooses."""
        return {self.outputs.dtype, *(call.dtype for call in self.calls)}

    @cached_property
    def _eps(self) -> float:
        """The coarsest precision of any layer."""
        return max(torch.finfo(dtype).eps for dtype in self._dtypes)

    @cached_property
    def layouts(self) -> Found:
        """For each role of each call, the datum that each row belongs to, and which rows count.

        Regular layouts are read off some of the passes with equal shapes, ever fewer of them, and relied on in between,
        provided that the gradients allow no other and data are not indexed by data, which could reorder them. With
        masked data they are read in every pass.
        """
        key = (self.n_rows, self.outputs.shape, tuple((call.name, call.shape) for call in self.calls))
        lasting = self.mask is None and not self._reorders
        known, uses = self._memory.layouts.get(key, ([], 0))
        if lasting and known and uses not in READ_AGAIN:
            remember(self._memory.layouts, key, (known, uses + 1))
            return known
        found, certain = self._find_layouts()
        regular = all(
            item is not None and item[0] is not None and item[0].axis is not None for r in found for item in r
        )
        if lasting and certain and regular:
            remember(self._memory.layouts, key, (found, uses + 1))
        return found

    def _find_layouts(self) -> tuple[Found, bool]:
        """Layouts, by plain and weighted backward passes and one with the mask; and whether all of them are certain."""
        shape = (-1, *[1] * (self.outputs.dim() - 1))
        found: Found = []
        all_certain = True
        with torch.no_grad():
            plain = self._plain
            narrow = torch.float16 in self._dtypes or layouts.are_faint(plain)
            weights = layouts.datum_weights(self.n_rows, narrow, self.outputs.device)
            weighed = [self._direction * each.to(self.outputs).reshape(shape) for each in weights if self.n_rows > 1]
            heavy = [self._gradients(direction) for direction in weighed]
            seen = plain if self.mask is None else self._gradients(self._direction * self._spread(self.mask))
            trials: list[list[tuple[layouts.Trial, Tensor, int] | None]] = []
            for call, *grads in zip(self.calls, plain, seen, *heavy, strict=True):
                trials.append([])
                for _, role in call.roles:
                    if any(g is None for g in grads):
                        trials[-1].append(None)
                        continue
                    first, unmasked, *others = (role.rows(g.unsqueeze(0)).squeeze(0) for g in grads if g is not None)
                    trial = layouts.find(first, others, weights, role.n_lead, self._eps, narrow=narrow)
                    trials[-1].append((trial, unmasked, role.n_lead))
            # Read together: an accelerator is waited for once.
            numbers = [item[0].numbers for row in trials for item in row if item is not None]
            read = iter(torch.cat(numbers).tolist() if numbers else [])
            for row in trials:
                found.append([])
                for item in row:
                    if item is None:
                        found[-1].append(None)
                        continue
                    trial, unmasked, n_lead = item
                    layout, certain = trial.decide([next(read) for _ in range(len(trial.numbers))])
                    all_certain &= certain
                    found[-1].append((layout, None if layout is None else self._counted(unmasked, layout, n_lead)))
        return found, all_certain

    def _spread(self, mask: Tensor) -> Tensor:
        """A mask of positions in the shape of the outputs."""
        each = self.outputs.numel() // mask.numel()
        return mask.unsqueeze(-1).expand(*mask.shape, each).reshape(self.outputs.shape)

    def _counted(self, g: Tensor, layout: Layout, n_lead: int) -> Tensor | None:
        """Rows that count: no padding, no masked data, no masked positions on which no counted output depends."""
        real = None if layout.index is None else layout.index >= 0
        if self.mask is None:
            return real
        silent = (layout.apply(g, n_lead).flatten(2) == 0).all(2)
        masked = ~self.mask.any(1, keepdim=True)
        if silent.shape == self.mask.shape:
            masked = masked | ~self.mask
        counted = ~(masked & silent)
        return counted if real is None else counted & real

    # -- what the formulas describe -----------------------------------------------------------------------------------

    @cached_property
    def verdict(self) -> Verdict:
        """Groups that need the slow way, by a check against autograd or because their use mixes data in this pass."""
        calls = tuple((call.name, len(call.shape), len(call.roles)) for call in self.calls)
        key = (calls, *sorted(self._opaque.items()))
        known, attempts = self._memory.verdicts.get(key, (None, ATTEMPTS))
        if known is None or attempts:
            known, proven = self._judge(known)
            remember(self._memory.verdicts, key, (known, 0 if proven else attempts - 1))
        mixing = dict.fromkeys(sorted(self._mixing), "its use mixes the data of a batch")
        vars(self).pop("_plain", None)  # as many numbers as all activations
        return replace(known, slow={**known.slow, **mixing})

    def _judge(self, known: Verdict | None) -> tuple[Verdict, bool]:
        """Compare derivatives with autograd's; also whether every weight had a gradient large enough to judge by."""
        known = known or Verdict()
        groups = [group for group in range(len(self.parameters)) if group not in known.settled]
        weights, direction = [self.parameters[group] for group in groups], along(self.outputs, self._direction)
        exact = torch.autograd.grad(direction, weights, retain_graph=True, allow_unused=True)
        exact = [None if truth is None else dense(truth) for truth in exact]
        if not known.settled and all(truth is None for truth in exact):
            raise UnsupportedError(NO_DEPENDENCE)
        norms = norms_of(exact, self.dtype)
        # A gradient that is zero up to rounding (as of the bias of attention's keys) agrees with any other.
        largest = max([known.largest, *norms])
        verdict = Verdict(dict(known.slow), set(known.unseen), set(), set(known.settled), largest)
        noise, proven = torch.Generator().manual_seed(1), True
        with torch.no_grad():
            parts = self._parts([], set(known.settled), masked=False, columns=[list(self._plain)])
            for group, norm, truth in zip(groups, norms, exact, strict=True):
                name, blocks = self._opaque.get(group), parts[group]
                if truth is None:
                    verdict.unused.add(group)
                elif name is not None:
                    verdict.slow[group] = f"it is used by {name}, which has no formula here"
                elif not blocks and group not in self._mixing:
                    verdict.unseen.add(group)
                    verdict.slow[group] = "it is used by a function that cannot be watched"
                elif blocks and group not in self._mixing:
                    scale = partial(self._scale, group)
                    if not agrees(truth, blocks, scale, largest, self._eps, noise):
                        verdict.slow[group] = "part of its use cannot be watched"
                proves_it = proves(norm, largest, self._eps)
                proven &= truth is None or proves_it
                if proves_it and group not in self._mixing:
                    verdict.settled.add(group)
        # Tensors made here have no graph.
        self._kept = Kept(2 * CHUNK_ELEMENTS, prod(self.outputs.shape[1:]))
        return verdict, proven and largest > 0

    @cached_property
    def _mixing(self) -> frozenset[int]:
        """The groups of which a use mixes data in this pass."""
        rows = zip(self.calls, self.layouts, strict=True)
        uses = (use for call, row in rows for use in zip(call.roles, row, strict=True))
        return frozenset().union(*(self._tracked[id(t)][1] for (t, _), found in uses if found == (None, None)))

    def _scale(self, group: int) -> float:
        """Norm of the terms that the gradient of a group is a sum of."""
        calls = zip(self.calls, self._gradients(self._direction), strict=True)
        uses = [(role, g, tensor) for call, g in calls if g is not None for tensor, role in call.roles]
        own = [role.scale(g.unsqueeze(0)) for role, g, tensor in uses if group in self._tracked[id(tensor)][1]]
        return float(torch.stack([term.to(torch.float32) for term in own]).norm()) if own else 0.0

    # -- blocks -------------------------------------------------------------------------------------------------------

    @property
    def n_columns_at_once(self) -> int:
        """Number of directions that fit into the memory that chunks may take."""
        each = sum(torch.Size(call.shape).numel() for call in self.calls)
        if self.verdict.slow:
            each += self.n_rows * sum(self.parameters[group].numel() for group in self.verdict.slow)
            return max(1, 4 * CHUNK_ELEMENTS // each)
        return max(1, 8 * piece_elements(self.outputs.device) // max(1, each))

    def blocks(self, directions: Sequence[Tensor]) -> list[JacobianBlock]:
        """Derivatives of ``direction · f``, each ``[batch, *positions, C]``: one block per group, in their order."""
        slow = self.verdict.slow
        with torch.set_grad_enabled(self.create_graph):
            parts = self._parts(directions, set(slow))
            if slow:
                wanted = {group: self.parameters[group] for group in sorted(slow)}
                precision, create = (self.dtype, self._eps), self.create_graph
                slowly = row_by_row(self.run, self.x, self.outputs, wanted, directions, *precision, create_graph=create)
                for group, block in slowly.items():
                    parts[group] = [block]
                known = {group: slow[group] for group in slowly if self._opaque.get(group) in {None, *READER_NAMES}}
                warn_of_slow(known, self.names, self._memory.warned)
            sizes = (parameter.numel() for parameter in self.parameters)
            zeros = torch.zeros(len(directions), self.n_rows, 1, dtype=self.dtype, device=self.outputs.device)
            whole = [
                blocks[0] if len(blocks) == 1 else combined(blocks, zeros, size)
                for blocks, size in zip(parts, sizes, strict=True)
            ]
            return chosen(whole, self.subset)

    def columns(self, mix: Tensor) -> list[JacobianBlock]:
        """Derivatives of mixtures ``[columns, positions·C]`` of the outputs of each datum, the same for all data."""
        shape = (1, *self.outputs.shape[1:])
        return self.blocks([row.to(self.outputs.dtype).reshape(shape).expand_as(self.outputs) for row in mix])

    def _parts(
        self,
        directions: Sequence[Tensor],
        leave_out: set[int],
        *,
        masked: bool = True,
        columns: list[list[Tensor | None]] | None = None,
    ) -> list[list[JacobianBlock]]:
        """For each group the blocks of its uses; ``masked`` if directions are zero at masked outputs.

        Where their gradients are known, they are given as ``columns``, which are used up.
        """
        parts: list[list[JacobianBlock]] = [[] for _ in self.parameters]
        if columns is None:
            columns = [self._gradients(direction, create_graph=self.create_graph) for direction in directions]
        for number, call in enumerate(self.calls):
            grads = [column[number] for column in columns]
            if all(g is None for g in grads):
                continue
            some = next(g for g in grads if g is not None)
            whole = [torch.zeros_like(some) if g is None else g for g in grads]
            stacked = some.unsqueeze(0) if len(whole) == 1 else torch.stack(whole)
            self._kept.rows.clear()
            for column in columns:
                column[number] = None  # freed one by one: they take as much memory as all activations times columns
            for (tensor, role), found in zip(call.roles, self.layouts[number], strict=True):
                groups = self._tracked[id(tensor)][1] - leave_out
                # Weights whose use mixes data are in `leave_out`, except during the check, which comes first.
                if groups and found is not None and found[0] is not None:
                    counted = found[1] if masked else None
                    block = role.block(stacked, found[0], self._kept, self.dtype, counted)
                    self._place(tensor, block, groups, parts)
        return parts

    def _place(
        self, tensor: Tensor, block: JacobianBlock, groups: frozenset[int], parts: list[list[JacobianBlock]]
    ) -> None:
        """Add a block to the parts of the parameter that plays the role, or of those that it is derived from."""
        for group in groups:
            parameter = self.parameters[group]
            if tensor is parameter:
                parts[group].append(block)
                continue
            moved = self._moved(block, tensor, parameter)
            parts[group].append(self._pulled_back(block, tensor, parameter) if moved is None else moved)

    def _moved(self, block: JacobianBlock, view: Tensor, parameter: Tensor) -> JacobianBlock | None:
        """The block of a parameter whose rows are used, by a view or by looking them up, or whose transpose is."""
        if id(view) in self._lookups and isinstance(block, DenseBlock):
            return looked_up(block, self._lookups[id(view)], len(parameter))
        if isinstance(block, ProductBlock) and block.left.shape[2] == 1:
            if transposed_view(view, parameter):
                return replace(block, transposed=not block.transposed)
            first = row_view(view, parameter)
            if first is not None and not block.transposed:
                after = parameter.shape[0] - first - view.shape[0]
                return replace(block, left=torch.nn.functional.pad(block.left, (first, after)))
        elif isinstance(block, SumBlock):
            first = row_view(view, parameter)
            if first is not None:
                pad = (first, parameter.shape[0] - first - view.shape[0])
                return SumBlock(torch.nn.functional.pad(block.left, pad))
        return None

    def _pulled_back(self, block: JacobianBlock, tensor: Tensor, parameter: Tensor) -> DenseBlock:
        """Derivatives in a parameter, from those in a tensor that is derived from it."""
        J = block.dense().to(tensor.dtype)
        rows = J.reshape(-1, *tensor.shape)
        # Where a function has no batched derivative, torch loops and warns; the tensors here are small.
        with quiet("There is a performance drop"):
            (pulled,) = torch.autograd.grad(
                tensor, [parameter], rows, retain_graph=True, create_graph=self.create_graph, is_grads_batched=True
            )
        return DenseBlock(pulled.reshape(*J.shape[:2], -1).to(self.dtype))
