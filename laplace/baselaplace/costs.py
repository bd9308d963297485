"""What ``fit``, predictions and ``tune`` take, measured on one batch.

What is measured runs on copies of the estimator that share the model with it, and on few rows first: memory is known
before a whole batch is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from laplace.baselaplace.measured import Call, Measured, Repeated, Watch, measured, peak_of, whole
from laplace.baselaplace.observed import KEPT_FEATURES
from laplace.errors import InputError, OutOfMemoryError, ShapeError, UnsupportedError
from laplace.free_memory import Memory, amount, explained, of_device
from laplace.network import ParameterSubset, evaluating
from laplace.network.batches import inputs_of, rows_of
from laplace.network.heads import head_of
from laplace.network.whole_network import unwrap
from laplace.structures import STRUCTURES

FEW = 2
"""Rows of which memory is measured first."""


@dataclass(frozen=True)
class Cost:
    """What one call takes.

    Attributes
    ----------
    readings
        How often the data are read.
    forward_passes, backward_passes
        Of the model, a batch each; a pass of single rows is a part of one. ``None``: not measured.
    bytes
        Most memory in use at once, above the weights of the model and the batch; ``None`` where it is not known.
    seconds
        ``None`` where it was not measured.
    fits
        Whether there is room for ``bytes`` now; ``None`` where that is not known.
    instead
        What would fit, where it does not; or why something was not measured.
    """

    readings: int | None = None
    forward_passes: float | None = None
    backward_passes: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    fits: bool | None = None
    instead: tuple[str, ...] = ()


@dataclass
class Planner:
    """Measures an estimator on one batch."""

    la: Any
    batch: Any
    """As a loader yielded it."""
    x: Any
    """Its inputs, on the device of the model."""
    rows: int
    n_batches: int | None
    n_rows: int | None

    @cached_property
    def memory(self) -> Memory | None:
        """What was free before anything was measured."""
        return of_device(self.la._device)

    @cached_property
    def _scout(self) -> Any:
        """A copy that has seen the batch, so that the random weights are known."""
        twin = self._twin()
        weights = twin._random_weights
        with evaluating(twin.model), torch.no_grad():
            weights.before_first(twin.backend, self.x)
            if weights.subset is None:
                weights.outputs(self.x)
        return twin

    @cached_property
    def known(self) -> ParameterSubset:
        """The random weights."""
        return self._scout._known("A plan")

    def _twin(self, fit: Any = None, **kept: Any) -> Any:
        """A copy of the estimator that shares the user's model, and nothing that can be written to."""
        la = self.la
        twin = object.__new__(type(la))
        vars(twin).update(vars(la))
        vars(twin).pop("_random_weights", None)
        reading = replace(la._reading, seen=dict(la._reading.seen))
        vars(twin).update(_reading=reading, _backend=None, _posterior_cache={}, _is_untuned=False)
        if la._random_weights.of_head:
            old = la.model
            names = {"dict_key_x": old.dict_key_x, "dict_key_y": old.dict_key_y, "reading": reading}
            how = old.last_layer_name, old.enable_backprop, old.feature_reduction
            vars(twin)["model"] = type(old)(old.model, *how, **names)
        if fit is None:
            for name in ("_fit", "_adjustments", "_kept", "_why_not", "_mean_by_hand"):
                vars(twin).pop(name, None)
        else:
            vars(twin).update(_fit=fit, **kept)
        return twin

    def costs(self, *, tune: bool) -> tuple[Cost, Cost, Cost]:
        """Of ``fit``, predictions and, if asked for, ``tune``."""
        needed = self.la.curvature_type.bytes_needed(self._shapes, self._scout._dtype)
        if self.memory is not None and needed > self.memory.free:
            none = Cost(bytes=needed, fits=False, instead=self._structures(self.memory))
            return none, replace(none, instead=()), replace(none, instead=())
        fits: list[Any] = []
        fitted = self._measured(lambda loader: fits.append(self._fitted(loader)))
        if isinstance(fitted, Cost):
            return fitted, Cost(), Cost()
        most = KEPT_FEATURES * torch.finfo(self._scout._dtype).bits // 8
        fit, predict = self._cost(fitted, most=most), self._prediction(fits[-1], fitted.kept)
        if not tune or predict.bytes is None or predict.fits is False:
            return fit, predict, Cost()
        return fit, predict, self._tuning(fits[-1], fitted.kept)

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the parameter groups; of chosen weights all together."""
        known = self.known
        return [tuple(p.shape) for p in known.parameters] if known.choice is None else [(known.n_params,)]

    # -- the calls ----------------------------------------------------------------------------------------------------

    def _fitted(self, loader: Repeated) -> Any:
        """A copy that is fitted."""
        twin = self._twin()
        twin.fit(loader)
        return twin

    def _prediction(self, fitted: Any, kept: int) -> Cost:
        """Of predictions: the first factorizes, those after it do not."""
        own = vars(self.la).get("_fit")
        la, network = fitted if own is None else self._twin(own), self._network

        def predict(loader: Repeated) -> list[Any]:
            with torch.no_grad():
                return [la(inputs_of(batch, la._device)) for batch in loader]

        few = rows_of(self.batch, slice(0, FEW), self.rows)
        try:
            with explained("a prediction", lambda: ""):
                peak, live, seconds = peak_of(predict, few, self._watch(), network)
        except OutOfMemoryError as error:
            return Cost(fits=False, instead=(str(error), *self._fewer_rows(None)))
        found = self._measured(predict, beside=live)
        if isinstance(found, Cost):
            return found
        once = seconds if not found.seconds[1] else max(0.0, seconds - found.seconds[1] * FEW / self.rows)
        found = replace(found, peak=max(peak, live + found.peak), seconds=(once, found.seconds[1]))
        return self._cost(found, beside=kept)

    def _tuning(self, fitted: Any, kept: int) -> Cost:
        """Of ``tune``: what is no pass over the data grows with their rows, too."""
        names = ("_kept", "_why_not", *(("model", "_reading") if fitted._random_weights.of_head else ()))

        def tune(la: Any, loader: Repeated) -> None:
            self._twin(la._fit, **{name: vars(la)[name] for name in names if name in vars(la)}).tune(loader)

        network = self._network
        try:
            with explained("tuning", lambda: ""):
                found = measured(lambda loader: tune(fitted, loader), self.batch, self._watch, network)
                one = self._fitted(Repeated(self.batch, 1, self._watch()))
                less = whole(lambda loader: tune(one, loader), self.batch, self._watch(), network)
        except OutOfMemoryError as error:
            return Cost(fits=False, instead=(str(error), *self._fewer_rows(None)))
        except (InputError, UnsupportedError) as error:
            return Cost(instead=(f"not measured on this batch: {error}",))
        parts = {
            name: _line(getattr(less, name), sum(getattr(found, name)) + getattr(found, name)[1])
            for name in ("forward", "backward", "seconds")
        }
        return self._cost(replace(found, **parts), beside=kept)

    # -- measuring ----------------------------------------------------------------------------------------------------

    @property
    def _network(self) -> nn.Module:
        """The module whose passes are counted: of a compiled or a parallel one the inner one, which all passes run."""
        return unwrap(self.la._network)

    def _watch(self) -> Watch:
        return Watch(self.rows, self.la._device)

    def _measured(self, run: Call, beside: int = 0) -> Measured | Cost:
        """What a call takes, or that it does not fit."""
        needed: int | None = None
        try:
            with explained("the batch", lambda: ""):
                needed = self._more_than_free(run, beside)
                if needed is None:
                    return measured(run, self.batch, self._watch, self._network)
        except OutOfMemoryError as error:
            return Cost(fits=False, instead=(str(error), *self._fewer_rows(None)))
        return Cost(bytes=needed, fits=False, instead=self._fewer_rows(needed))

    def _more_than_free(self, run: Call, beside: int) -> int | None:
        """What a batch takes if that is more than is free: it is tried with ever more of its rows."""
        rows, sizes = FEW, []
        while self.memory is not None and rows < self.rows:
            few = rows_of(self.batch, slice(0, rows), self.rows)
            try:
                sizes.append((rows, beside + peak_of(run, few, self._watch(), self._network)[0]))
            except InputError:  # where all of these rows are masked, or some class is not among them
                return None
            if _at(sizes, self.rows) < self.memory.free / 2:
                return None
            if len(sizes) > 1 and _at(sizes, 2 * rows) > self.memory.free:
                return _at(sizes, self.rows)
            rows *= 2
        return None

    def _cost(self, found: Measured, *, beside: int = 0, most: float = float("inf")) -> Cost:
        """Of all batches."""
        n = self.n_batches or 1
        by_rows = n if self.n_rows is None else self.n_rows / self.rows
        size = int(beside + found.peak + min(most, found.growth * max(0.0, by_rows - 2)))
        forward, backward = (of[0] + n * of[1] for of in (found.forward, found.backward))
        seconds = found.seconds[0] + by_rows * found.seconds[1]
        fits = None if self.memory is None else size <= self.memory.free
        advice = () if fits is not False else self._fewer_rows(size)
        return Cost(found.readings, round(forward, 6), round(backward, 6), size, seconds, fits, advice)

    # -- what takes less ----------------------------------------------------------------------------------------------

    def _fewer_rows(self, needed: int | None) -> tuple[str, ...]:
        """What takes less where it is the batch that does not fit."""
        advice: list[str] = []
        if self.memory is not None and needed is not None and self.rows > 1:
            held = self.la.curvature_type.bytes_needed(self._shapes, self._scout._dtype)
            rows = int(self.rows * max(0, self.memory.free - held) / max(1, needed) / 2)
            if rows:
                advice.append(f"batches of {rows} rows")
        of_head = self.la._random_weights.of_head
        if not of_head and not getattr(self._scout.backend, "is_sampled", True):
            advice.append("backend_kwargs={'stochastic': True}, one backward pass instead of one for each output")
        return (*advice, *(() if self.memory is None else self._structures(self.memory)))

    def _structures(self, memory: Memory) -> tuple[str, ...]:
        """Structures, and a last layer, that fit."""
        own, dtype = self.la.curvature_type, self._scout._dtype
        advice = _fitting(self._shapes, dtype, memory, own.bytes_needed(self._shapes, dtype), "")
        if not self.la._random_weights.of_head:
            head = self._head()
            if head is not None:
                advice = (*advice, *_fitting(head, dtype, memory, memory.free, " with subset_of_weights='last_layer'"))
        return advice or ("fewer random weights (requires_grad_(False) on some layers)",)

    def _head(self) -> list[tuple[int, ...]] | None:
        """Shapes of the weights of the last layer, if there is one that is linear."""
        weights = self._scout._random_weights
        try:
            weights.outputs_and_features(self.x)
        except (UnsupportedError, ShapeError):
            return None
        layer = weights.extractor.last_layer
        return None if layer is None else head_of(layer).groups(layer)


def _line(one: float, two: float) -> tuple[float, float]:
    """What comes once and with each batch, by what one and two of them take."""
    each = min(max(0.0, two - one), two / 2)
    return two - 2 * each, each


def _fitting(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, memory: Memory, below: int, where: str
) -> tuple[str, ...]:
    """Structures that take less, and fit."""
    sizes = {name.value: structure.bytes_needed(shapes, dtype) for name, structure in STRUCTURES.items()}
    small = {name: size for name, size in sizes.items() if size < min(below, memory.free)}
    listed = ", ".join(f"{name!r} ({amount(size)})" for name, size in sorted(small.items(), key=lambda item: item[1]))
    return (f"hessian_structure={listed}{where}",) if listed else ()


def _at(sizes: Sequence[tuple[int, int]], rows: int) -> int:
    """Memory of a number of rows, on the line through the last two that were measured, or the origin."""
    (before, less), (last, size) = (0, 0) if len(sizes) < 2 else sizes[-2], sizes[-1]
    return int(size + max(0, size - less) * (rows - last) / (last - before))


__all__ = ["Cost", "Planner"]
