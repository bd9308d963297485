"""What ``fit`` does: one or more passes over the training data, counted and checked, to a ``Fit``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace import pending, processes
from laplace.baselaplace.adjustments import Adjustments
from laplace.baselaplace.observed import UNSEEN, Observed
from laplace.baselaplace.random_weights import AllWeights
from laplace.baselaplace.statefile import digest, fingerprint
from laplace.curvature import CurvatureInterface
from laplace.errors import InputError, ShapeError, UnsupportedError, warn
from laplace.fit import Fit
from laplace.free_memory import explained
from laplace.network import Batch, Passes, evaluating
from laplace.network.feature_extractor import seeing_features
from laplace.network.looking import Look, looking
from laplace.network.shards import filled, in_step, is_collective
from laplace.processes import Team
from laplace.structures import AbstractCurvature

Learned = tuple[Tensor, AbstractCurvature]
"""Negative log-likelihood ``[]``, or ``[C]`` by output, and curvature, at unit noise and temperature."""


LESS = (
    "la.plan(loader) says what would fit: smaller batches, hessian_structure='diag' or 'kron', the last layer, or "
    "backend_kwargs={'stochastic': True}."
)
"""What a fit that has no memory could be instead."""


@dataclass(frozen=True)
class Training:
    """What a fit needs to know of an estimator."""

    weights: AllWeights
    """Which are random."""
    backend: CurvatureInterface
    """Computes the curvature."""
    accumulate: Callable[[Iterable[Batch]], Learned | None]
    """From batches to what was learned; ``None`` when there are none."""
    read: Callable[[Iterable[Any]], Iterator[Batch]]
    """Batches of a loader."""
    ready: Callable[[], None]
    """Called when the first batch has come and the weights are known: raises if the curvature has no room."""
    check_prior: Callable[[], None]
    """Called when the model has run: raises if the prior does not fit."""
    sigma_noise: Tensor
    """``[]``, or ``[C]``."""
    dtype: Callable[[], torch.dtype]
    """Says that of the curvature: of a last layer it is known when the layer is."""
    observed: Observed | None = None
    """What looks at features on the way; ``None``: nobody does."""

    def fit(self, loader: Iterable[Any]) -> Fit:
        """Learn from a loader."""
        counts: dict[str, Any] = {}
        collective = is_collective(self.weights.model)
        if collective and not self.weights.of_head:
            msg = (
                "The weights of the model are spread over processes (FSDP), and a posterior over all of them needs "
                'each process to hold them. Use subset_of_weights="last_layer", or a model that is not sharded.'
            )
            raise UnsupportedError(msg)

        def read() -> Iterator[Batch]:
            if counts and self.observed is not None:
                self.observed.stop()
                look.extractor = None
            counts.update(data=0, positions=0)
            if self.backend.leading is not None:
                self.backend.leading.begin_pass()
            batches = self.read(loader)
            if team is not None:
                batches = filled(team, batches, self.weights.first.device)
                batches = in_step(team, batches, self.weights.outputs) if collective else batches
            return self._counted(batches, counts, seen, look)

        with (
            explained("fit", lambda: LESS),
            evaluating(self.weights.model),
            self._noise_by_output() as shape,
            seeing_features() as seen,
            looking() as look,
            processes.summing() as team,
        ):
            learned = self.accumulate(Passes(loader, read))
            if team is not None and learned is not None:
                self._share(team, counts)
        if learned is None:
            msg = "The training loader is empty: there is nothing to learn the curvature from."
            if isinstance(loader, Iterator):
                msg += " It is an iterator, such as a generator, and may have been read before: pass a new one."
            raise InputError(msg)
        n_positions = int(counts["positions"])  # one that was counted on an accelerator is read here, once
        if not n_positions:
            msg = (
                f"All {counts['data']} rows of training data are masked: there is nothing to learn the curvature from."
            )
            raise InputError(msg)
        nll, curvature = learned[0].detach(), learned[1]
        subset, n_outputs = self.weights.subset, self.weights.n_outputs(self.backend)
        assert subset is not None, "the model has run"
        if self.sigma_noise.numel() not in (1, n_outputs):
            msg = f"sigma_noise has {self.sigma_noise.numel()} values, one for each output; the model has {n_outputs}."
            raise ShapeError(msg)
        mean, by_output = subset.vector().to(self.dtype()), nll if nll.dim() else None
        numbers = counts["data"], n_positions, n_outputs
        density = None if self.observed is None else self.observed.density
        if self.backend.leading is not None:
            print(self.backend.leading, file=sys.stderr)
        return Fit(mean, curvature, nll.sum(), *numbers, by_output, self.weights.head, shape, density=density)

    def _share(self, team: Team, counts: dict[str, Any]) -> None:
        """Bring counts, and what was seen of features, together, and see that processes have the same model.

        Raises
        ------
        InputError
            If they have others.
        """
        subset = self.weights.subset
        assert subset is not None, "the model has run"
        model = self.weights.model  # of one that is sharded each process has another part
        own = [digest({"": subset.vector()}), "" if is_collective(model) else fingerprint(model)]
        marks = [record["weights"] for record in team.exchange("weights", weights=own)]
        if any(mark != own for mark in marks):
            msg = (
                "The processes have different weights or buffers, around which their curvatures have no sum. Load the "
                "same weights in each (DistributedDataParallel does); running statistics of BatchNorm, which each "
                "process has of its own after training, take SyncBatchNorm, or torch.distributed.broadcast(buffer, 0) "
                "for each of model.buffers(). Or fit in each alone, within laplace.processes.within(None)."
            )
            raise InputError(msg)
        numbers = team.summed([torch.tensor([int(count) for count in counts.values()])], "counts")[0].tolist()
        counts.update(zip(counts, numbers, strict=True))
        if self.observed is not None:
            self.observed.share(team)

    def _observe(self, batch: Batch, seen: Sequence[tuple[Tensor, Tensor]], look: Look) -> None:
        """Show features to whoever looks at them: those that were seen in a pass, or of a pass of their own."""
        observed, weights = self.observed, self.weights
        if observed is None:
            return
        if weights.head is not None:
            if not seen:
                observed.give_up(UNSEEN)
                return
            try:
                observed.add(*seen[-1], batch.y, weights.head)
            except (ShapeError, InputError):  # a pass of the back end over something else
                observed.give_up(UNSEEN)
        elif not weights.sees_features:
            observed.give_up("Features are not looked at for a subnetwork.")
        elif observed.wanted:
            try:
                with torch.no_grad():
                    found = look.read(batch.x)
                observed.add(*(weights.outputs_and_features(batch.x) if found is None else found), batch.y)
                look.extractor = weights.extractor if observed.wanted else None
            except (UnsupportedError, ShapeError) as error:
                observed.give_up(f"The features of the last layer are not known. {error}")
                look.extractor = None

    def _counted(
        self, batches: Iterator[Batch], counts: dict[str, Any], seen: list[tuple[Tensor, Tensor]], look: Look
    ) -> Iterator[Batch]:
        """Pass batches on; count rows and positions; check the prior as soon as the weights are known."""
        for batch in batches:
            if not counts["data"]:
                self.weights.before_first(self.backend, batch.x)
                self.ready()
            seen.clear()
            look.passed = None
            yield batch
            if not counts["data"]:
                self.check_prior()
            with pending.unchecked():  # the back end has checked outputs and targets
                self._observe(batch, seen, look)
            counts["data"] += len(batch.y)
            counts["positions"] += self.backend.count(batch.y)

    @contextmanager
    def _noise_by_output(self) -> Generator[Tensor | None]:
        """What fitting a regression of several outputs needs to know of their noise; yields what became part of sums.

        A last layer scales afterwards, and keeps the loss of each output for that; shared weights are summed with the
        noise that outputs have relative to the first.

        Raises
        ------
        UnsupportedError
            If the back end computes with one noise for all outputs.
        """
        backend, sigma = self.backend, self.sigma_noise
        before, shape = backend.output_likelihood, None
        if not self.weights.of_head and sigma.dim():
            if not backend.weighs_outputs:
                msg = (
                    f"{type(backend).__name__} computes with one noise for all outputs; sigma_noise has one for each. "
                    "Use a built-in back end (backend=None)."
                )
                raise UnsupportedError(msg)
            shape = (sigma / sigma[0]).detach()
            backend.output_likelihood = before.weighing(shape**-2)
        backend.loss_by_output = self.weights.of_head
        try:
            yield shape
        finally:
            backend.output_likelihood, backend.loss_by_output = before, False


def check_previous(team: Team | None, previous: Fit | None) -> None:
    """Raise where a fit cannot be added to (``override=False``), or is another one in another process.

    Raises
    ------
    InputError
        If it is another one.
    """
    if previous is not None:
        previous.check_merge()
    if team is None:
        return
    own = None if previous is None else [previous.n_data, previous.n_positions, float(previous.nll.nan_to_num())]
    for rank, record in enumerate(team.exchange("fit", previous=own)):
        other = record["previous"]
        if (own is None) != (other is None) or (own and other and not all(map(_close, own, other))):
            msg = (
                f"override=False adds to what was learned before, which is not the same in all processes: that of "
                f"process {team.rank} is {_told(own)}, that of process {rank} {_told(other)}. Fit or load the same in "
                "each first, or fit with override=True."
            )
            raise InputError(msg)


def _close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-6)


def _told(previous: Sequence[float] | None) -> str:
    """A fit in words."""
    return "none" if previous is None else f"of {previous[0]} rows with a loss of {previous[2]:.6g}"


def check_memory(self: Any) -> None:
    """Raise if the curvature cannot fit the memory of the device, as soon as the weights are known."""
    subset = self._random_weights.subset
    if subset is not None:
        tensors = subset.parameters if subset.choice is None else [subset.vector()]
        head, kind = self._head_shapes, self.curvature_type
        kind = kind if head is None else kind.of_head(head[0][0])
        kind.check_memory(tensors, self._dtype)


def take_fit(la: Any, fit: Fit, *, again: bool) -> None:
    """Assign a fit, and drop what was chosen for another head or compared with rows under another density."""
    earlier, now = vars(la).get("_fit"), la._adjustments
    la._fit = fit
    if again:
        la._adjustments = Adjustments()
        if earlier is not None and earlier.trained is not None:
            la.output_temperature = 1.0
            msg = (
                "fit starts from the head of the model: the head, temperature and width that were chosen before are "
                "gone. Call tune(val_loader) again."
            )
            warn(msg, UserWarning)
    elif now.scale or now.mixture is not None or now.reference is not None:
        la._adjustments = now.without_rows()
        msg = (
            "Other data change the density of the features: widths of predictions at foreign inputs, and what "
            "ood_score compares with, are gone. Call tune(val_loader) again."
        )
        warn(msg, UserWarning)


__all__ = ["Learned", "Training", "check_memory", "check_previous", "take_fit"]
