"""Saving and moving a fitted approximation: ``state_dict``, ``save``, ``load``, ``to``, pickling.

A state holds tensors and plain values only, so that ``torch.load(..., weights_only=True)`` reads it; it holds no data.
It names its schema version and the fingerprint of the model's weights, and is refused where either differs.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from laplace import linalg
from laplace.baselaplace.posterior import WeightPosterior
from laplace.baselaplace.weights import RandomWeights
from laplace.errors import StateError
from laplace.fit import Fit
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature

Own = TypeVar("Own", bound="Checkpointed")

SCHEMA_VERSION = 3
"""Version of the layout of a state; raised when it changes."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and values of everything in ``model.state_dict()``, in hexadecimal.

    A model that was trained further has another one. Buffers that are not persistent, such as caches, do not count.

    Parameters
    ----------
    model
        Any module; read.

    Returns
    -------
    64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def check(state: Any, expected: Mapping[str, Any]) -> None:
    """Raise unless a state can be loaded: complete, of this schema, and made by the same kind of object.

    Parameters
    ----------
    state
        What is to be loaded.
    expected
        Entries that must be equal: class, likelihood, curvature, fingerprint.

    Raises
    ------
    StateError
        If it cannot; the message says what differs and what to do.
    """
    if not isinstance(state, Mapping) or "schema_version" not in state:
        msg = "This is no state of a Laplace approximation: it has no 'schema_version'. Save one with la.save(path)."
        raise StateError(msg)
    if state["schema_version"] != SCHEMA_VERSION:
        msg = (
            f"The state has schema version {state['schema_version']}, this release reads {SCHEMA_VERSION}. Load it "
            "with the release that saved it, or fit again."
        )
        raise StateError(msg)
    for key, value in expected.items():
        if state.get(key) != value:
            advice = "Construct the object with what was saved."
            if key == "fingerprint":
                advice = "The weights of the model differ: give it those it had when it was fitted, or fit again."
            there = state.get(key)
            if key == "fingerprint":
                there, value = str(there)[:12], value[:12]
            msg = f"The state was saved for another object: {key} is {there!r} there, {value!r} here. {advice}"
            raise StateError(msg)


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state atomically: the file is complete or not there, whatever happens meanwhile.

    Parameters
    ----------
    state
        Made by ``state_dict``.
    path
        Of the file; it is replaced.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move(value: Any, device: torch.device, known: dict[int, Tensor] | None = None) -> Any:
    """Copies of the tensors of nested mappings and lists on a device, each in its own precision.

    A tensor that occurs twice (the factor that weight and bias share) stays one tensor.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().to(device, copy=True)
        return known[id(value)]
    if isinstance(value, Mapping):
        return {key: move(item, device, known) for key, item in value.items()}
    if isinstance(value, list):
        return [move(item, device, known) for item in value]
    return value


class Checkpointed(RandomWeights):
    """What a fit learned can be saved, loaded, moved and pickled."""

    def _identity(self) -> dict[str, Any]:
        """What a state and the object that loads it must agree on."""
        return {
            "cls_name": type(self).__name__,
            "likelihood": self.likelihood.value,
            "curvature_kind": self._backend_cls.kind.value,
            "fingerprint": fingerprint(self._network),
        }

    def _sizes_in(self, state: Mapping[str, Any]) -> tuple[int, ...]:  # noqa: ARG002 - subset classes read it
        """Sizes of the parameter groups that are random in a state."""
        return self._known_parameters("load_state_dict").sizes

    def _choices(self) -> dict[str, Any]:
        """Plain settings that a state carries and restores."""
        return {
            "temperature": float(self.temperature),
            "output_temperature": self.output_temperature,
            "enable_backprop": self.enable_backprop,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Assign the settings of ``_choices``."""
        self.temperature = state["temperature"]
        self.output_temperature = state["output_temperature"]
        self.enable_backprop = state["enable_backprop"]

    def _header(self) -> dict[str, Any]:
        """What every state holds: what it belongs to, settings and hyperparameters."""
        return {
            "schema_version": SCHEMA_VERSION,
            **self._identity(),
            **self._choices(),
            "prior_precision": self.prior_precision.detach(),
            "prior_mean": self.prior_mean.detach(),
            "sigma_noise": self.sigma_noise.detach(),
        }

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that ``fit`` learned and the hyperparameters: tensors and plain values, no data.

        Returns
        -------
        A dictionary that ``torch.save`` writes and ``torch.load(..., weights_only=True)`` reads; its tensors are those
        of this object, not copies.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        """

    @linalg.lasting
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another object learned about the same model.

        Parameters
        ----------
        state_dict
            Made by ``state_dict``; its tensors may be on any device.

        Raises
        ------
        StateError
            If it is no state, of another schema, class, likelihood or curvature, or the weights of the model differ.
            This object is then what it was.
        """
        check(state_dict, self._identity())
        before = [(holder, dict(vars(holder))) for holder in self._changed_by_loading]
        try:
            self._take(move(dict(state_dict), self._device))
        except BaseException as error:
            for holder, attributes in before:
                vars(holder).clear()
                vars(holder).update(attributes)
            if isinstance(error, StateError):
                raise
            if isinstance(error, KeyError):
                msg = f"The state is incomplete: it has no entry {error}."
                raise StateError(msg) from error
            if isinstance(error, ValueError):
                msg = f"The state holds what this object cannot take: {error}"
                raise StateError(msg) from error
            raise

    @property
    def _changed_by_loading(self) -> tuple[object, ...]:
        """The objects whose attributes loading assigns."""
        return (self,)

    @abstractmethod
    def _take(self, state: Mapping[str, Any]) -> None:
        """Assign everything in a state, on the right device."""

    def _take_hyperparameters(self, state: Mapping[str, Any]) -> GaussianPrior:
        """Assign settings and noise; return the prior, which is assigned when it has been checked."""
        self._restore(state)
        self.sigma_noise = state["sigma_noise"]
        mean = self._checked("prior_mean", state["prior_mean"])
        precision = self._checked("prior_precision", state["prior_precision"], positive=True)
        prior = GaussianPrior(mean, precision, self._sizes_in(state))
        self._fits_structure(prior)
        return prior

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``state_dict()`` to a file, atomically.

        Parameters
        ----------
        path
            Of the file; it is replaced.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        """
        save(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str], map_location: Any = None) -> None:
        """Read a file written by ``save`` and take over what it holds; nothing in it is executed.

        Parameters
        ----------
        path
            Of the file.
        map_location
            Where ``torch.load`` puts tensors first: the model's device when ``None``. They end there in any case.

        Raises
        ------
        StateError
            If the file is no state, and as in ``load_state_dict``.
        """
        location = self._device if map_location is None else map_location
        try:
            state = torch.load(path, map_location=location, weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            msg = (
                f"The file {os.fspath(path)!r} cannot be read as a state: {reason} States are written by la.save(path)."
            )
            raise StateError(msg) from error
        self.load_state_dict(state)

    @linalg.lasting
    def to(self: Own, device: torch.device | str) -> Own:
        """Move the model, what was learned and the hyperparameters to a device.

        Parameters
        ----------
        device
            Where to.

        Returns
        -------
        This object.
        """
        self.model.to(device)
        self._backend = None
        self.prior_mean, self.sigma_noise, self.temperature = self._prior_mean, self._sigma_noise, self._temperature
        self.prior_precision = self._prior_precision
        self._move_fit()
        return self

    @abstractmethod
    def _move_fit(self) -> None:
        """What was learned, on the device of the model."""

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying take along: not the back end, the cache, or the graph of a hyperparameter."""
        state = {key: value.detach() if isinstance(value, Tensor) else value for key, value in self.__dict__.items()}
        return {**state, "_backend": None, "_posterior_cache": {}}


class CheckpointedPosterior(WeightPosterior, Checkpointed):
    """A posterior over weights that can be saved, loaded, moved and pickled."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``fit`` learned and the hyperparameters: tensors and plain values, no data.

        Returns
        -------
        A dictionary that ``torch.save`` writes and ``torch.load(..., weights_only=True)`` reads; its tensors are those
        of this object, not copies.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        """
        fit = self._fitted
        return {
            **self._header(),
            "mean": fit.mean,
            "loss": fit.nll,
            "n_data": fit.n_data,
            "n_positions": fit.n_positions,
            "n_outputs": fit.n_outputs,
            "output_loss": fit.output_nll,
            "noise_shape": fit.noise_shape,
            "H": fit.curvature.state(),
        }

    def _curvature_from(self, state: Mapping[str, Any]) -> AbstractCurvature:
        """The curvature that a state describes."""
        return self.curvature_type.from_state(state, self._dtype)

    def _take(self, state: Mapping[str, Any]) -> None:
        kinds = {"mean": Tensor, "loss": Tensor, "n_data": int, "n_positions": int, "n_outputs": int, "H": Mapping}
        for key, kind in kinds.items():
            if not isinstance(state[key], kind):
                msg = f"The state is damaged: {key!r} must be a {kind.__name__}; it is a {type(state[key]).__name__}."
                raise StateError(msg)
        curvature = self._curvature_from(state["H"])
        prior = self._take_hyperparameters(state)
        if {len(state["mean"]), curvature.n_params} != {prior.n_params}:
            msg = (
                f"The state holds {len(state['mean'])} weights and a curvature of {curvature.n_params}; the model has "
                f"{prior.n_params} random weights."
            )
            raise StateError(msg)
        self._prior_mean, self._prior_precision = prior.mean, prior.precision
        counts = state["n_data"], state["n_positions"], state["n_outputs"]
        others = (
            None if value is None else value.to(self._dtype) for value in (state["output_loss"], state["noise_shape"])
        )
        by_output, shape = others
        mean, loss = state["mean"].to(self._dtype), state["loss"].to(self._dtype)
        self._fit = Fit(mean, curvature, loss, *counts, by_output, self._head_bias, shape)
        self._hyperparameters_changed()

    def _move_fit(self) -> None:
        fit: Fit | None = self.__dict__.get("_fit")
        if fit is not None:
            self._fit = replace(
                fit,
                mean=fit.mean.to(self._device),
                nll=fit.nll.to(self._device),
                output_nll=None if fit.output_nll is None else fit.output_nll.to(self._device),
                noise_shape=None if fit.noise_shape is None else fit.noise_shape.to(self._device),
                curvature=self._moved(fit.curvature),
            )

    def _moved(self, curvature: AbstractCurvature) -> AbstractCurvature:
        """A curvature on the device of the model."""
        return self._curvature_from(move(curvature.state(), self._device))
