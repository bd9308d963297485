"""Data after their one forward pass: everything that predictions at them need, for any hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace import pending
from laplace.errors import InputError, numbered
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.linalg import CHUNK_ELEMENTS, trying
from laplace.network.batches import copied
from laplace.predictive import Linearization, NetworkLinearization
from laplace.predictive.pairs import compare
from laplace.predictive.pushforward import Options, moments_of_each
from laplace.processes import Team
from laplace.structures import AbstractPrecision
from laplace.structures.basis import Basis
from laplace.tuning.scores import Score

KEPT_ELEMENTS = 2**29
"""Numbers kept of the derivatives of validation data: 2 GB in float32."""

Batches = Sequence[tuple[Callable[[], Linearization], Positions]]


@dataclass(frozen=True)
class CachedData:
    """Linearized inputs and their targets."""

    batches: Batches
    """How to get the linearized inputs of each batch, and its unmasked positions. Batches of features are one."""

    @classmethod
    def collect(
        cls,
        batches: Iterable[tuple[Any, Tensor]],
        linearize: Callable[[Any], Linearization],
        likelihood: AbstractLikelihood,
        what: str = "validation",
        team: Team | None = None,
        device: torch.device | None = None,
    ) -> CachedData:
        """Run the model over data, once; keep what predictions are made of while memory allows.

        With a ``team`` the features of a last layer, on a device, are those of all its processes, each of which runs
        the model over its own data.

        Features of a last layer are always few. Derivatives of a whole network are kept for as many batches as fit
        ``KEPT_ELEMENTS`` numbers; the batches after those are run again whenever they are scored.

        Raises
        ------
        InputError
            If there are none, all are masked, or one cannot be used; the message numbers it.
        """
        collected: list[tuple[Callable[[], Linearization], Positions]] = []
        left = KEPT_ELEMENTS

        def arranged(x: Any) -> Linearization:
            return likelihood.arranged(linearize(x), compare)

        with pending.gathered() as flags:
            for index, batch in enumerate(batches):
                # Copies, since derivatives hold inputs, and loaders may fill the same tensor again.
                x, y = copied(batch[0]), copied(batch[1])
                with numbered(index, x):
                    inputs = arranged(x)
                    positions = likelihood.whole(inputs.f, y)
                found = inputs.kept(left)
                if found is None:
                    collected.append((partial(arranged, x), positions))
                else:
                    kept, size = found
                    left -= size
                    collected.append((partial(_same, kept), positions))
                flags.next_batch()
        collected = _unmasked(collected)
        if team is not None:
            collected = _gathered(team, collected, what, device)
        if not any(len(positions.f) for _, positions in collected):
            empty = "every target is masked" if collected else "it is empty"
            msg = f"The {what} loader has nothing to score hyperparameters on: {empty}. Pass labeled batches."
            raise InputError(msg)
        return cls(_joined(collected))

    @property
    def n_rows(self) -> int:
        """Number of unmasked positions."""
        return sum(len(positions.f) for _, positions in self.batches)

    @property
    def positions(self) -> Positions:
        """Unmasked positions of all batches."""
        return _all_positions([positions for _, positions in self.batches])

    def with_weights(self, theta: Tensor) -> CachedData:
        """The same at other weights of a last layer, in which outputs are linear."""
        moved: list[tuple[Callable[[], Linearization], Positions]] = []
        for get, positions in self.batches:
            inputs = get().with_weights(theta.to(positions.f))
            f = select(positions, inputs.f.reshape(-1, inputs.f.shape[-1]))
            moved.append((partial(_same, inputs), replace(positions, f=f.to(positions.f))))
        return CachedData(moved)

    def rotated(self, basis: Basis | None, dtype: torch.dtype) -> CachedData:
        """The same in other coordinates of the weights, kept where the data are."""
        if basis is None:
            return self
        rotated: list[tuple[Callable[[], Linearization], Positions]] = []
        for get, positions in self.batches:
            if isinstance(get, partial) and get.func is _same:
                rotated.append((partial(_same, get().rotated(basis, dtype)), positions))
            else:
                rotated.append((partial(_rotate, get, basis, dtype), positions))
        return CachedData(rotated)

    def scores(
        self,
        score: Score,
        precisions: Sequence[AbstractPrecision],
        likelihoods: Sequence[AbstractLikelihood],
        fresh_options: Callable[[], Options],
        dtype: torch.dtype,
        description: str | None = None,
    ) -> Tensor:
        """Score under several posteriors: differentiable for those scores that are.

        Parameters
        ----------
        score
            What to compute.
        precisions, likelihoods
            One each a posterior, in the coordinates of these data.
        fresh_options, dtype
            How to predict, asked again for each posterior, so that samples can be the same; and what to compute in.
        description
            Show a progress bar over batches with this text.

        Returns
        -------
        One number each, to minimize; means over unmasked positions for scores that are sums.
        """
        at_once = max(1, 4 * CHUNK_ELEMENTS // max(1, sum(positions.f.numel() for _, positions in self.batches)))
        found = []
        for start in range(0, len(precisions), at_once):
            part = slice(start, start + at_once)
            with trying():
                found += self._some_scores(
                    score, precisions[part], likelihoods[part], fresh_options, dtype, description
                )
        return score.sign * torch.stack([torch.as_tensor(value) for value in found])

    def _some_scores(
        self,
        score: Score,
        precisions: Sequence[AbstractPrecision],
        likelihoods: Sequence[AbstractLikelihood],
        fresh_options: Callable[[], Options],
        dtype: torch.dtype,
        description: str | None,
    ) -> list[Any]:
        likelihoods = [likelihood.for_targets() for likelihood in likelihoods]
        totals: list[Any] = [0.0] * len(precisions)
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in precisions]
        for get, positions in tqdm(self.batches, desc=description, disable=description is None):
            if not len(positions.f):
                continue
            y = positions.y.to(dtype) if positions.y.is_floating_point() else positions.y
            every = moments_of_each(get(), precisions, likelihoods, fresh_options, dtype)
            for index, ((mean, cov, link), likelihood) in enumerate(zip(every, likelihoods, strict=True)):
                mean, cov = select(positions, mean), select(positions, cov)
                if score.additive is not None:
                    totals[index] = totals[index] + score.additive(likelihood, mean, cov, y, link)
                else:
                    prediction = likelihood.predict(mean, cov, link)
                    rows = (prediction,) if isinstance(prediction, Tensor) else prediction
                    parts[index].append((*rows, positions.y))
        if score.additive is not None:
            return [total / self.n_rows for total in totals]
        assert score.whole is not None, "a score is one or the other"
        columns = [[torch.cat(column) for column in zip(*part, strict=True)] for part in parts]
        return [_number(score.whole(*arguments), score.name) for arguments in columns]


def _unmasked(batches: list[tuple[Callable[[], Linearization], Positions]]) -> list[Any]:
    """Without masked rows, which are counted together."""
    masks = [p.counted for _, p in batches if p.counted is not None]
    counts = iter(torch.stack([mask.sum() for mask in masks]).tolist() if masks else [])
    return [(get, p if p.counted is None else p.selected(next(counts))) for get, p in batches]


def _number(value: Any, name: str) -> Any:
    """What a loss returned, which must be a number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        msg = f"The loss {name!r} must return one number to minimize; it returned {type(value).__name__}."
        raise InputError(msg) from error


def _same(inputs: Linearization) -> Linearization:
    """What was kept."""
    return inputs


def _rotate(get: Callable[[], Linearization], basis: Basis, dtype: torch.dtype) -> Linearization:
    """What is made again, in other coordinates."""
    return get().rotated(basis, dtype)


def select(positions: Positions, rows: Tensor) -> Tensor:
    """The unmasked among flattened rows."""
    return rows if positions.kept is None else rows[positions.kept]


def _joined(batches: Batches) -> Batches:
    """One batch of many, where inputs are features: a few large products instead of many small ones."""
    inputs = [get() if isinstance(get, partial) and get.func is _same else None for get, _ in batches]
    positions = [found for _, found in batches]
    first = inputs[0]
    if first is None or len(batches) == 1 or not all(item is not None and item.is_linear for item in inputs):
        return batches
    found = [item if p.kept is None else item.select(p.kept) for item, p in zip(inputs, positions, strict=True) if item]
    return [(partial(_same, found[0].followed_by(found[1:])), _all_positions(positions))]


def _gathered(
    team: Team, batches: Batches, what: str, device: torch.device | None
) -> list[tuple[Callable[[], Linearization], Positions]]:
    """Features, outputs and targets of all processes as one batch; O(rows · (D + C)) numbers go to each."""
    own = None
    if batches:
        parts = [(get(), positions) for get, positions in batches]
        found = [item if p.kept is None else item.select(p.kept) for item, p in parts]
        inputs, positions = found[0].followed_by(found[1:]), _all_positions([p for _, p in parts])
        assert isinstance(inputs, NetworkLinearization), "of a last layer"
        shapes = [list(block.shape) for block in inputs.head]
        own = [positions.f, inputs.head[0].phi, positions.y, positions.datum, shapes]
    records = [record["rows"] for record in team.exchange(f"{what} data", rows=own)]
    collected: list[tuple[Callable[[], Linearization], Positions]] = []
    for f, phi, y, datum, shapes in filter(None, records):
        f, phi, y = (part.to(device) for part in (f, phi, y))
        inputs = NetworkLinearization.of_head(f, phi, [tuple(shape) for shape in shapes])
        collected.append((partial(_same, inputs), Positions(f, y, datum=None if datum is None else datum.to(device))))
    return collected


def _all_positions(parts: Sequence[Positions]) -> Positions:
    """Unmasked positions of all batches; data are counted on."""
    datum, start = [], 0
    known = [part.datum for part in parts if part.datum is not None and len(part.datum)]
    last = iter(torch.stack([index.max() for index in known]).tolist() if known else [])
    for part in parts:
        index = torch.arange(len(part.f), device=part.f.device) if part.datum is None else part.datum
        datum.append(index + start)
        start += len(index) if part.datum is None or not len(index) else next(last) + 1
    alone = all(part.datum is None for part in parts)
    first = parts[0]
    f, y = torch.cat([part.f for part in parts]), torch.cat([part.y for part in parts])
    return replace(first, f=f, y=y, kept=None, datum=None if alone else torch.cat(datum))
