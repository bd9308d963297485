"""``SeveralHeads``: a model that returns several outputs, each with a likelihood of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from laplace import checks, processes
from laplace.baselaplace import statefile
from laplace.baselaplace.adjustments import Adjustments
from laplace.baselaplace.fitted import FittedLaplace
from laplace.baselaplace.keywords import OptimizeKeywords, TuneKeywords
from laplace.baselaplace.options import prediction_options
from laplace.baselaplace.states import all_or_nothing
from laplace.enums import PredType
from laplace.errors import (
    InputError,
    MissingKeyError,
    NotFittedError,
    StateError,
    UnknownAttributeError,
    UnsupportedError,
)
from laplace.likelihoods import AbstractLikelihood, LikelihoodLike, chosen
from laplace.likelihoods.several import Part, SeveralLikelihood, columns
from laplace.network import evaluating, full_precision
from laplace.network.batches import inputs_of, is_loader
from laplace.network.outputs import entry
from laplace.network.several import Key, SideBySide, Targets, rows_of, target
from laplace.predictive import Options, Prediction
from laplace.predictive.keywords import PredictionKeywords, PredictKeywords
from laplace.predictive.part import SomeOutputs
from laplace.predictive.prediction import explain, joined
from laplace.tuning import Tuning
from laplace.types import Inputs, Scalar, TuningMethodLike

LOADERS = ("val_loader", "train_loader")
Make = Callable[..., Any]
"""Constructs an estimator from a likelihood and options."""


class SeveralHeads:
    """Laplace approximation of a model that returns several outputs: one likelihood for each.

    ``Laplace(model, {"kind": "classification", "price": "regression"})`` makes one for a model that returns a mapping
    with these keys (of a tuple the keys are 0, 1, …). Batches are ``(x, y)`` with targets in a mapping (or tuple) of
    the same keys. What takes inputs returns a dictionary with those keys.

    Of last layers the curvature is block-diagonal over heads, so that each head is an estimator of its own:
    ``la["kind"]`` has all that an ``LLLaplace`` has. With all weights, which heads share, the curvature is that of all
    heads together, exact for the structure: Σ_k J_kᵀ Λ_k J_k.

    Parameters
    ----------
    model
        The trained network. It returns a mapping, a sequence, or an object with attributes.
    likelihoods
        Names or objects, by the key of the output. Noise and temperatures of heads with all weights are those of the
        objects (``GaussianLikelihood(sigma_noise=…)``); last layers have those of their estimators.
    make
        Constructs an estimator from a likelihood and options; ``Laplace`` passes it.
    is_joint
        Whether weights are shared by heads, as all weights are.
    dict_key_y
        Entry of mapping batches that holds the targets.

    Raises
    ------
    UnsupportedError
        If there is no head, an option does not exist, or one is given that heads need for themselves.

    Notes
    -----
    Last layers: ``fit`` reads the loader once for each head, and a prediction runs the model once for each. All
    weights: once for all.
    """

    _STATE: ClassVar[tuple[str, ...]] = ("_make", "_is_joint", "_heads", "_parts", "_joint")

    def __init__(
        self,
        model: nn.Module,
        likelihoods: Mapping[Any, LikelihoodLike],
        make: Make,
        *,
        is_joint: bool,
        dict_key_y: str = "labels",
    ) -> None:
        if not likelihoods:
            msg = "likelihood is an empty mapping: give one for each output of the model, by its key."
            raise UnsupportedError(msg)
        self.model, self.dict_key_y = model, dict_key_y
        self.likelihoods = {key: chosen(likelihood) for key, likelihood in likelihoods.items()}
        for key, likelihood in self.likelihoods.items():
            if likelihood.for_targets() is not likelihood:
                msg = f"Head {key!r}: likelihood={likelihood.name!r} compares inputs, and has no place among heads."
                raise UnsupportedError(msg)
        self._make, self._is_joint = make, is_joint
        self._heads: dict[Key, Any] = {}
        self._parts: tuple[Part, ...] = ()
        self._joint: Any = None
        if not is_joint:
            self._heads = {key: make(model, one, output_key=key) for key, one in likelihoods.items()}
        else:
            self._made(())  # options are checked now, not in fit

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute of one's own; hyperparameters are those of estimators (``UnknownAttributeError``)."""
        given = name in ("model", "dict_key_y", "likelihoods") and name not in vars(self)
        if not given and name not in self._STATE:
            where = "la.joint" if vars(self).get("_is_joint") else "la[key]"
            msg = f"{name!r} cannot be assigned to several heads: hyperparameters are those of the estimators, {where}."
            raise UnknownAttributeError(msg)
        super().__setattr__(name, value)

    def _made(self, parts: tuple[Part, ...], function: Any = None) -> Any:
        """An estimator of all heads together."""
        return self._make(self.model, SeveralLikelihood(parts), output_fn=function or SideBySide(self.keys))

    @property
    def keys(self) -> tuple[Key, ...]:
        """Keys of the heads."""
        return tuple(self.likelihoods)

    def __getitem__(self, key: Key) -> FittedLaplace:
        """The estimator of one head (last layers).

        Raises
        ------
        MissingKeyError
            If there is no such head.
        UnsupportedError
            With all weights, which heads share: there is one estimator, ``la.joint``.
        """
        if key not in self.likelihoods:
            msg = f"There is no head {key!r}; there are {', '.join(map(repr, self.keys))}."
            raise MissingKeyError(msg)
        if self._is_joint:
            msg = "With all weights heads share one posterior: la.joint is its estimator."
            raise UnsupportedError(msg)
        return self._heads[key]

    @property
    def joint(self) -> FittedLaplace:
        """The estimator of all heads together (all weights).

        Raises
        ------
        UnsupportedError
            Of last layers: each head has an estimator of its own, ``la[key]``.
        NotFittedError
            Before ``fit``.
        """
        if not self._is_joint:
            msg = f"Last layers have an estimator each: la[key], with the keys {', '.join(map(repr, self.keys))}."
            raise UnsupportedError(msg)
        if self._joint is None:
            msg = "Call fit(train_loader) first: how many outputs each head has is not known before."
            raise NotFittedError(msg)
        return self._joint

    @property
    def _estimators(self) -> list[Any]:
        return [self.joint] if self._is_joint else list(self._heads.values())

    # -- learning -----------------------------------------------------------------------------------------------------

    @processes.agreed()
    def fit(self, train_loader: Iterable[Any], override: bool = True, progress_bar: bool = False) -> SeveralHeads:
        """Learn the curvature of all heads.

        Parameters
        ----------
        train_loader
            Batches ``(x, y)``, or mappings with ``dict_key_y``; y is a mapping or a sequence of the targets of the
            heads. Last layers read it once for each head.
        override, progress_bar
            As in ``ParametricLaplace.fit``.

        Returns
        -------
        This object.

        Raises
        ------
        InputError
            If it is an iterator, which can be read once, while there are several last layers; and as of one head.
            Nothing is changed then.
        MissingKeyError
            If targets of a head are missing.
        """
        options = {"override": override, "progress_bar": progress_bar}
        if self._is_joint:
            joint, parts = self._joint, self._parts
            if override or joint is None:
                train_loader, seen = self._look(train_loader)
                joint = self._made(seen) if joint is None or seen != parts else joint
                parts = seen
            with all_or_nothing(joint):
                joint.fit(self._of(train_loader, None, parts), **options)
            self._joint, self._parts = joint, parts
            return self
        self._check_readable(train_loader)
        with all_or_nothing(*self._estimators):
            for key, la in self._heads.items():
                la.fit(self._of(train_loader, key), **options)
        return self

    def merge(self, other: SeveralHeads) -> SeveralHeads:
        """Add what another object learned of other data, head by head; as ``merge`` of one estimator.

        Parameters
        ----------
        other
            Of the same heads of the same model, fitted to other data.

        Returns
        -------
        This object.

        Raises
        ------
        InputError
            If the other one has other heads, and as of one estimator. Nothing is changed then.
        NotFittedError, UnsupportedError
            As of one estimator.
        """
        return self._combined("merge", other)

    def subtract(self, other: SeveralHeads) -> SeveralHeads:
        """Remove what another object learned of some of the data, head by head; as ``subtract`` of one estimator.

        Parameters
        ----------
        other
            Of the same heads of the same model, fitted to the data to remove.

        Returns
        -------
        This object.

        Raises
        ------
        InputError
            If the other one has other heads, and as of one estimator. Nothing is changed then.
        NotFittedError, UnsupportedError
            As of one estimator.
        """
        return self._combined("subtract", other)

    def _combined(self, how: str, other: Any) -> SeveralHeads:
        """Each estimator with its like."""
        if not isinstance(other, SeveralHeads) or (self.keys, self._is_joint) != (other.keys, other._is_joint):
            msg = f"{how} takes several heads, of the same weights and with the keys {list(self.keys)}."
            raise InputError(msg)
        with all_or_nothing(*self._estimators):
            for la, there in zip(self._estimators, other._estimators, strict=True):
                getattr(la, how)(there)
        return self

    def tune(self, val_loader: Iterable[Any], **options: Unpack[TuneKeywords]) -> dict[Key, Tuning] | Tuning:
        """Choose hyperparameters on validation data: of each last layer, or the prior precision of all weights.

        Parameters
        ----------
        val_loader
            Batches as in ``fit``.
        **options
            As in ``FittedLaplace.tune``.

        Returns
        -------
        What each head's ``tune`` returns, by its key; with all weights that of the joint posterior.
        """
        if self._is_joint:
            return self.joint.tune(self._of(val_loader, None), **options)
        self._check_readable(val_loader)
        with all_or_nothing(*self._estimators):
            return {key: la.tune(self._of(val_loader, key), **options) for key, la in self._heads.items()}

    def optimize_prior_precision(
        self, method: TuningMethodLike = "marglik", **options: Unpack[OptimizeKeywords]
    ) -> None:
        """Choose prior precisions, of each last layer or of all weights, and assign them.

        Parameters
        ----------
        method, **options
            As in ``BaseLaplace.optimize_prior_precision``; loaders as in ``fit``.
        """
        with all_or_nothing(*self._estimators):
            for key, la in self._heads.items() if not self._is_joint else [(None, self.joint)]:
                own: dict[str, Any] = {
                    name: self._of(value, key) if name in LOADERS else value for name, value in options.items()
                }
                la.optimize_prior_precision(method=method, **own)

    def log_marginal_likelihood(self) -> Scalar:
        """Laplace approximation of log p(D) in nats, of all heads: independent last layers add up."""
        return torch.stack([la.log_marginal_likelihood() for la in self._estimators]).sum()

    # -- batches ------------------------------------------------------------------------------------------------------

    def _check_readable(self, loader: Any) -> None:
        """Raise if a loader can be read once only, and there are several last layers."""
        if isinstance(loader, Iterator) and len(self.keys) > 1:
            msg = (
                f"Last layers of {len(self.keys)} heads read the loader once for each, and an iterator can be read "
                "once: pass a DataLoader or a list of batches."
            )
            raise InputError(msg)

    def _of(self, loader: Any, key: Key | None, parts: Sequence[Part] | None = None) -> Targets:
        """A loader with the targets of one head, or of all of them side by side."""
        parts = self._parts if parts is None else parts
        if key is None:
            return Targets(loader, self.dict_key_y, lambda y: packed(y, parts))
        return Targets(loader, self.dict_key_y, lambda y: target(y, key))

    def _look(self, loader: Iterable[Any]) -> tuple[Iterable[Any], tuple[Part, ...]]:
        """How many outputs and targets each head has, by the first batch; and the loader, still unread."""
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            msg = "The training loader is empty: there is nothing to learn the curvature from."
            raise InputError(msg)
        widths: dict[Key, int] = {}

        def look(returned: Any) -> Tensor:
            widths.update({key: rows_of(key, entry(returned, key)).shape[1] for key in self.keys})
            return SideBySide(self.keys)(returned)

        probe = self._made((), look)
        y = first.get(self.dict_key_y) if isinstance(first, Mapping) else first[-1]
        with torch.no_grad(), evaluating(probe.model):
            probe._random_weights.outputs(inputs_of(first, probe._device))
        parts, at, column = [], 0, 0
        for key, likelihood in self.likelihoods.items():
            own, width = target(y, key), widths[key]
            n_columns = columns(own).shape[1]
            where = slice(at, at + width), slice(column, column + n_columns)
            parts.append(Part(key, likelihood, *where, not own.is_floating_point(), tuple(own.shape[1:])))
            at, column = at + width, column + n_columns
        return (itertools.chain([first], batches) if isinstance(loader, Iterator) else loader), tuple(parts)

    # -- predicting ---------------------------------------------------------------------------------------------------

    def __call__(self, x: Inputs, **options: Unpack[PredictionKeywords]) -> dict[Key, Tensor | tuple[Tensor, Tensor]]:
        """Predict at a batch of inputs.

        Parameters
        ----------
        x
            A batch of inputs.
        **options
            As in a call of one estimator (``pred_type=``, ``link_approx=``, …); they hold for all heads.

        Returns
        -------
        By key, what an estimator of the head returns: probabilities, or mean and covariance.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If an option has no meaning for one of the heads.
        """
        if not self._is_joint:
            return {key: la(x, **options) for key, la in self._heads.items()}
        return self._at(x, options, lambda found, *_: found)

    def predict(self, x: Inputs | Iterable[Any], **options: Unpack[PredictKeywords]) -> dict[Key, Prediction]:
        """Predict, and say how much of the uncertainty is that of the weights: a ``Prediction`` for each head.

        Parameters
        ----------
        x
            A batch of inputs, or a loader.
        **options
            As in ``FittedLaplace.predict``.

        Raises
        ------
        InputError
            If a loader yields nothing, or is an iterator while there are several last layers.
        """
        if not self._is_joint:
            if isinstance(x, Iterator):
                self._check_readable(x)
            return {key: la.predict(x, **options) for key, la in self._heads.items()}
        la: Any = self.joint
        batches = [inputs_of(batch, la._device) for batch in x] if is_loader(x) else [x]
        if not batches:
            msg = "The loader yields no batch: there is nothing to predict."
            raise InputError(msg)

        def told(found: Any, view: SomeOutputs, likelihood: AbstractLikelihood, how: Any) -> Prediction:
            posterior = la._predicting_posterior
            return explain(
                found,
                view,
                posterior,
                likelihood,
                lambda: likelihood.expectation(la._samples_at(view, posterior, how)),
                la._dtype,
            )

        found = [self._at(batch, options, told) for batch in batches]
        return {key: joined([one[key] for one in found]) for key in self.keys}

    def _at(self, x: Inputs, asked: Mapping[str, Any], then: Callable[..., Any]) -> dict[Key, Any]:
        """What is made of each head's prediction, of one pass of the model."""
        la: Any = self.joint
        posterior, results = la._predicting_posterior, {}
        options = {part.key: part_options(part.likelihood, la._device, asked) for part in self._parts}
        kinds = {how.pred_type for how in options.values()}
        with evaluating(la.model, enable_backprop=la.enable_backprop):
            inputs = la._checked_linearization(x, **({} if kinds == {PredType.GLM} else {"pred_type": kinds.pop()}))
            with full_precision(la._device):
                for part in self._parts:
                    view, how = SomeOutputs(la._adjusted(inputs), part.outputs), options[part.key]
                    found = Adjustments().predict(view, la._fitted, posterior, part.likelihood, how, la._dtype)
                    results[part.key] = then(found, view, part.likelihood, how)
        return results

    # -- states -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``fit`` learned and the hyperparameters, of all heads: tensors and plain values, no data."""
        shapes = [[part.outputs.stop, part.targets.stop, part.integer, list(part.shape)] for part in self._parts]
        states = [la.state_dict() for la in self._estimators]
        return {"heads": list(self.keys), "parts": shapes, "states": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another object learned about the same model and heads.

        Parameters
        ----------
        state_dict
            Made by ``state_dict``.

        Raises
        ------
        StateError
            If it is none, or belongs to other heads, and as of one estimator. This object is then what it was.
        """
        heads = state_dict.get("heads") if isinstance(state_dict, Mapping) else None
        if heads != list(self.keys) or {"parts", "states"} - state_dict.keys():
            msg = f"Expected a state of the heads {', '.join(map(repr, self.keys))}; got one of {heads}."
            raise StateError(msg)
        n_states = 1 if self._is_joint else len(self.keys)
        if not isinstance(state_dict["states"], list) or len(state_dict["states"]) != n_states:
            msg = f"The state does not hold what it should: {n_states} states of estimators."
            raise StateError(msg)
        if self._is_joint:
            parts = self._parts_in(state_dict["parts"])
            joint = self._made(parts)
            joint.load_state_dict(state_dict["states"][0])
            self._joint, self._parts = joint, parts
            return
        with all_or_nothing(*self._estimators):
            for la, state in zip(self._estimators, state_dict["states"], strict=True):
                la.load_state_dict(state)

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write ``state_dict()`` to a file, atomically."""
        statefile.save(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str] | IO[bytes], map_location: Any = None) -> None:
        """Read a file written by ``save``; nothing in it is executed."""
        self.load_state_dict(statefile.read(path, "cpu" if map_location is None else map_location))

    def _parts_in(self, shapes: Any) -> tuple[Part, ...]:
        """The heads as a state describes them."""
        try:
            starts = [(0, 0), *((int(a), int(b)) for a, b, _, _ in shapes)]
            return tuple(
                Part(
                    key,
                    likelihood,
                    slice(start[0], int(a)),
                    slice(start[1], int(b)),
                    bool(integer),
                    tuple(map(int, shape)),
                )
                for (key, likelihood), start, (a, b, integer, shape) in zip(
                    self.likelihoods.items(), starts[:-1], shapes, strict=True
                )
            )
        except (TypeError, ValueError) as error:
            msg = "The state does not say how many outputs and targets each head has."
            raise StateError(msg) from error


def packed(y: Any, parts: Sequence[Part]) -> Tensor:
    """The targets of all heads as columns, ``[batch, k]``."""
    found = []
    for part in parts:
        own = target(y, part.key)
        if own.is_floating_point() is part.integer or tuple(own.shape[1:]) != part.shape:
            msg = f"The targets of head {part.key!r} are of another kind than in the first batch: {checks.shown(own)}."
            raise InputError(msg)
        found.append(columns(own))
    return torch.cat(found, 1)


def part_options(likelihood: AbstractLikelihood, device: torch.device, asked: Mapping[str, Any]) -> Options:
    """How to predict a head, checked."""
    known = [name for name in checks.options_of(prediction_options) if name not in ("likelihood", "device")]
    checks.known_options("__call__", asked, known)
    given: dict[str, Any] = {"pred_type": PredType.GLM, **asked}
    return prediction_options(likelihood, device, **given)


__all__ = ["SeveralHeads"]
