"""What ``fit`` keeps of the training data beside the curvature: sums of features, and the features themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace.density import Accumulator, ClassSums, reason_against
from laplace.errors import UnsupportedError
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.processes import Team
from laplace.tuning import HeadData

KEPT_FEATURES = 2**27
"""Numbers of features that are kept for ``tune``: 512 MB in float32."""
UNSEEN = "The back end runs the model in a way of its own, in which features are not seen."
NOT_A_HEAD = "The head is refitted where it alone is random (subset_of_weights='last_layer')."


@dataclass
class Observed:
    """Features of the batches of a fit, as they come."""

    likelihood: AbstractLikelihood
    left: int = field(default_factory=lambda: KEPT_FEATURES)
    """How many more numbers are kept; below 0 none are any more."""
    why_no_density: str = UNSEEN
    why_not_kept: str = UNSEEN
    _shapes: Sequence[tuple[int, ...]] = ()
    _sums: Accumulator | None = None
    _shared: ClassSums | None = None
    """Those of all processes."""
    _phi: list[Tensor] = field(default_factory=list)
    _y: list[Tensor] = field(default_factory=list)
    _datum: list[Tensor] = field(default_factory=list)
    _counted: list[Tensor | None] = field(default_factory=list)
    """Which rows count, where masked ones were left among them."""
    _n_data: int = 0

    wanted: bool = True
    """Whether batches that come are new ones, and it is known what they are good for."""

    def stop(self) -> None:
        """What comes now was seen before."""
        self.wanted = False

    def give_up(self, reason: str) -> None:
        """There is no density of features, and none are kept: what is known of some batches is not known of all."""
        self.wanted, self._sums, self.why_no_density = False, None, reason
        self._keep_none(reason)

    def _keep_none(self, reason: str) -> None:
        for part in (self._phi, self._y, self._datum, self._counted):
            part.clear()
        self.left, self.why_not_kept = -1, reason

    def add(self, f: Tensor, phi: Tensor, y: Tensor, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        """One batch: outputs, features and targets; of a head with the shapes of its parameter groups."""
        if not self.wanted:
            return
        n_groups, why_not = self.likelihood.n_groups(f.shape[-1]), reason_against(phi.shape[-1])
        if not n_groups:
            why_not = (
                "There is one for classes, and for a regression with the same noise for all inputs; "
                f"likelihood={self.likelihood.name!r} is neither."
            )
        try:
            self.likelihood.check_rows()
        except UnsupportedError as error:
            shapes = None
            self._keep_none(str(error))
        else:
            if shapes is None:
                self._keep_none(NOT_A_HEAD)
        if why_not is not None:
            self.why_no_density = why_not
            self.wanted = shapes is not None  # for a head it is kept nevertheless
            if not self.wanted:
                return
        positions = self.likelihood.whole(f, y)
        rows = positions.select(phi.detach().reshape(-1, phi.shape[-1]))
        if shapes is not None:
            self._keep(rows, positions, shapes, len(y))
        if why_not is not None:
            return
        self._sums = Accumulator(n_groups) if self._sums is None else self._sums
        self._sums.add(rows, self.likelihood.group_of(positions.y), positions.counted)

    def _keep(self, rows: Tensor, positions: Positions, shapes: Sequence[tuple[int, ...]], n_data: int) -> None:
        """Keep a batch; where there is no room for it, nothing is kept."""
        if self.left < 0:
            return
        self.left -= rows.numel()
        if self.left < 0:
            self._keep_none(f"The features of the training data are more than {KEPT_FEATURES:,} numbers.")
            return
        if self._y and (self._y[0].dim(), self._y[0].dtype) != (positions.y.dim(), positions.y.dtype):
            self._keep_none("The training data have targets of two kinds, such as hard and soft labels.")
            return
        index = torch.arange(len(rows), device=rows.device) if positions.datum is None else positions.datum
        self._shapes = shapes
        self._phi.append(rows.clone())
        self._y.append(positions.y.detach().clone())
        self._datum.append(index + self._n_data)
        self._counted.append(positions.counted)
        self._n_data += n_data

    def reasons(self, added: bool) -> tuple[str, str]:
        """Why there is no density, and why no features are there, where that is so."""
        return self.why_no_density, "Those of the data before are gone." if added and self._phi else self.why_not_kept

    def share(self, team: Team) -> None:
        """Bring what processes have seen together: sums are added, and each keeps the rows of all."""
        seen = {"density": self._sums is not None, "kept": len(self._phi) > 0, "n": sum(p.numel() for p in self._phi)}
        told = {**seen, "reasons": [self.why_no_density, self.why_not_kept], "ghost": team.is_ghost}
        records = [record for record in team.exchange("features", **told) if not record["ghost"]]
        without = [record["reasons"][0] for record in records if not record["density"]]
        if without or self._sums is None:
            self._sums, self.why_no_density = None, without[0] if without else self.why_no_density
        else:
            self._shared = self._sums.finish().summed(team)
        without = [record["reasons"][1] for record in records if not record["kept"]]
        if not without and sum(record["n"] for record in records) > KEPT_FEATURES:
            without = [f"The features of the training data are more than {KEPT_FEATURES:,} numbers."]
        if without:
            self._keep_none(without[0])
            return
        kept = None if team.is_ghost else self.kept
        own = None if kept is None else [kept.phi, kept.y, kept.datum, list(map(list, kept.shapes))]
        parts, like = [each["rows"] for each in team.exchange("rows", rows=own)], self._phi[0]
        for each in (self._phi, self._y, self._datum, self._counted):
            each.clear()
        start = 0
        for part in parts:
            if part is not None:
                phi, y, datum, shapes = part
                self._shapes = [tuple(shape) for shape in shapes]
                self._phi.append(phi.to(like))
                self._y.append(y.to(like.device))
                self._datum.append(datum.to(like.device) + start)
                self._counted.append(None)  # masked rows were left out before
                start += int(datum.max()) + 1 if len(datum) else 0
        if len({(y.dim(), y.dtype) for y in self._y}) > 1:
            self._keep_none("The training data have targets of two kinds, such as hard and soft labels.")

    @property
    def density(self) -> ClassSums | None:
        """The sums; ``None`` where there are none."""
        if self._shared is not None:
            return self._shared
        return None if self._sums is None else self._sums.finish()

    @property
    def kept(self) -> HeadData | None:
        """The data after their forward pass; ``None`` where they are not all there."""
        if not self._phi:
            return None
        phi, y, datum = (torch.cat(parts) for parts in (self._phi, self._y, self._datum))
        if any(part is not None for part in self._counted):
            pairs = zip(self._counted, self._datum, strict=True)
            counted = torch.cat([torch.ones_like(d, dtype=torch.bool) if part is None else part for part, d in pairs])
            if not bool(counted.all()):
                phi, y, datum = phi[counted], y[counted], datum[counted]
        return HeadData(phi, y, self._shapes, datum)


__all__ = ["KEPT_FEATURES", "UNSEEN", "Observed"]
