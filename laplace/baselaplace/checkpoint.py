"""Saving and moving a fitted approximation: ``state_dict``, ``save``, ``load``, ``to``, pickling.

A state holds tensors and plain values only, so that ``torch.load(..., weights_only=True)`` reads it; it holds no data.
It names its schema version and the fingerprint of the model's weights, and is refused where either differs, where its
digest is not that of its entries, or where an entry is not what the tables say (``state_entries`` of each class).
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from laplace import checks, linalg
from laplace.baselaplace.peer_states import PEER_STRUCTURES, check_peer, is_peer, translated
from laplace.baselaplace.posterior import WeightPosterior
from laplace.baselaplace.statefile import (
    SCHEMA_VERSION,
    check_origin,
    fingerprint,
    move,
    read,
    save,
    signed,
    warn_without_digest,
)
from laplace.baselaplace.weights import RandomWeights
from laplace.errors import NotPositiveDefiniteError, StateError
from laplace.fit import FIT_ENTRIES, Fit
from laplace.likelihoods import chosen
from laplace.prior import GaussianPrior
from laplace.schema import Known, Table, anything, check_entries, finite, flag, nested, tensor, text
from laplace.structures import AbstractCurvature

Own = TypeVar("Own", bound="Checkpointed")

OF_CONTENT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the content of a state may make fail: a ``StateError`` then; what else is raised is not about the state."""


class Checkpointed(RandomWeights):
    """What a fit learned can be saved, loaded, moved and pickled."""

    state_entries: ClassVar[Table] = {
        "schema_version": anything,
        "cls_name": text,
        "likelihood": text,
        "curvature_kind": text,
        "fingerprint": text,
        "temperature": finite(above=0),
        "output_temperature": finite(above=0),
        "enable_backprop": flag,
        "prior_precision": tensor((1,), ("L",), ("P",), above=0),
        "prior_mean": tensor((), (1,), ("P",)),
        "sigma_noise": tensor((), ("C",), above=0),
    }
    """What the entries of a state must be that this class adds; its bases say so of theirs."""

    def _entries(self) -> Table:
        """A check for every entry of a state."""
        found: dict[str, Any] = {}
        for cls in type(self).__mro__:
            found = {
                **found,
                **{key: check for key, check in vars(cls).get("state_entries", {}).items() if key not in found},
            }
        return found

    def _identity(self) -> dict[str, Any]:
        """What a state and the object that loads it must agree on."""
        return {
            "cls_name": type(self).__name__,
            "likelihood": self._unit_likelihood.described,
            "curvature_kind": self._backend_cls.kind.value,
            "fingerprint": fingerprint(self._network),
        }

    def _sizes_in(self, state: Mapping[str, Any]) -> tuple[int, ...]:  # noqa: ARG002 - subset classes read it
        """Sizes of the parameter groups that are random in a state."""
        return self._known_parameters("load_state_dict").sizes

    def _known_of(self, state: Mapping[str, Any]) -> Known:
        """Sizes that the entries of a state must have."""
        sizes = self._sizes_in(state)
        return {"dtype": self._dtype, "sizes": tuple(sizes), "P": sum(sizes), "L": len(sizes)}

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
        A dictionary that ``torch.save`` writes and ``torch.load(..., weights_only=True)`` reads. All in it are copies;
        its ``"digest"`` tells whether an entry was changed afterwards.

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
            Made by ``state_dict``, here or of a parametric class of laplace-torch 0.2.2 or 0.3 (``full``, ``kron``,
            ``diag``); its tensors may be on any device.

        Raises
        ------
        StateError
            If it is no state, of another schema, class, likelihood or curvature, an entry is not what it must be or
            not what was saved, or the weights of the model differ. This object is then what it was.

        Warns
        -----
        UserWarning
            If the state has no digest, as those of earlier releases.
        """
        before = [(holder, dict(vars(holder))) for holder in self._changed_by_loading]
        try:
            if is_peer(state_dict):
                state = self._translated(state_dict)
            else:
                check_origin(state_dict, self._identity())
                state = {key: value for key, value in state_dict.items() if key != "digest"}
            known = self._known_of(state)
            check_entries(state, self._entries(), known)
            if not is_peer(state_dict):
                warn_without_digest(state_dict)
            self._take(move(state, self._device))
            self._check_taken(known)
        except BaseException as error:
            for holder, attributes in before:
                vars(holder).clear()
                vars(holder).update(attributes)
            if isinstance(error, StateError) or not isinstance(error, OF_CONTENT):
                raise
            msg = f"The state holds what this object cannot take: {error}"
            raise StateError(msg) from error

    def _translated(self, state: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """A state of laplace-torch as one of this class."""
        msg = (
            f"The state was saved by laplace-torch, from which {type(self).__name__} cannot be made. Those of its "
            "classes with hessian_structure 'full', 'kron' and 'diag' can be read; fit others again."
        )
        raise StateError(msg)

    def _know_weights(self, state: Mapping[str, Any]) -> None:
        """Find out from a state of laplace-torch which weights are random; the last layer does."""

    @property
    def _changed_by_loading(self) -> tuple[object, ...]:
        """The objects whose attributes loading assigns."""
        return (self,)

    @abstractmethod
    def _take(self, state: Mapping[str, Any]) -> None:
        """Assign everything in a state, on the right device."""

    @abstractmethod
    def _check_taken(self, known: Known) -> None:
        """Raise if what was assigned cannot be used."""

    def _take_hyperparameters(self, state: Mapping[str, Any]) -> GaussianPrior:
        """Assign settings and noise; return the prior, which is assigned when it has been checked."""
        self._restore(state)
        self.sigma_noise = state["sigma_noise"]
        mean = self._checked("prior_mean", state["prior_mean"])
        precision = self._checked("prior_precision", state["prior_precision"], positive=True)
        prior = GaussianPrior(mean, precision, self._sizes_in(state))
        self._fits_structure(prior)
        return prior

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write ``state_dict()`` to a file, atomically.

        Parameters
        ----------
        path
            Of the file; it is replaced. A file that is open for writing is written to as it is.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        StateError
            If the folder does not exist (then it is a ``FileNotFoundError``, too), or the path is a folder.
        """
        save(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str] | IO[bytes], map_location: Any = None) -> None:
        """Read a file written by ``save`` and take over what it holds; nothing in it is executed.

        Parameters
        ----------
        path
            Of the file, or a file that is open.
        map_location
            Where ``torch.load`` puts tensors first: the model's device when ``None``. They end there in any case.

        Raises
        ------
        StateError
            If the file cannot be read (a ``FileNotFoundError``, too, where there is none), and as in
            ``load_state_dict``.
        """
        self.load_state_dict(read(path, self._device if map_location is None else map_location))

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

        Raises
        ------
        InputError
            If there is no such device; nothing is moved then.
        """
        self.model.to(checks.device("device", device))
        self._follow_model()
        return self

    def _follow_model(self) -> None:
        """Bring what was learned, and the hyperparameters, to where the model is, and to its precision."""
        self._backend = None
        self.prior_mean, self.sigma_noise, self.temperature = self._prior_mean, self._sigma_noise, self._temperature
        self.prior_precision = self._prior_precision
        self._move_fit()

    @abstractmethod
    def _move_fit(self) -> None:
        """What was learned, on the device of the model and in the precision of the curvature."""

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying take along: not the back end, the cache, or the graph of a hyperparameter."""
        state = {key: value.detach() if isinstance(value, Tensor) else value for key, value in self.__dict__.items()}
        return {**state, "_backend": None, "_posterior_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, by earlier releases as well: the cache was ``None`` there."""
        vars(self).update(state)
        vars(self).setdefault("_unit_likelihood", chosen(state["likelihood"]))
        vars(self)["_posterior_cache"] = {}


class CheckpointedPosterior(WeightPosterior, Checkpointed):
    """A posterior over weights that can be saved, loaded, moved and pickled."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``fit`` learned and the hyperparameters: tensors and plain values, no data.

        Returns
        -------
        A dictionary that ``torch.save`` writes and ``torch.load(..., weights_only=True)`` reads. All in it are copies;
        its ``"digest"`` tells whether an entry was changed afterwards.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        """
        fit = self._fitted
        return signed(
            {
                **self._header(),
                "mean": fit.mean,
                "loss": None if bool(torch.isnan(fit.nll)) else fit.nll,
                "n_data": fit.n_data,
                "n_positions": fit.n_positions,
                "n_outputs": fit.n_outputs,
                "output_loss": fit.output_nll,
                "noise_shape": fit.noise_shape,
                "H": fit.curvature.state(),
            }
        )

    state_entries: ClassVar[Table] = FIT_ENTRIES

    def _entries(self) -> Table:
        return {**super()._entries(), "H": nested(self._curvature_entries)}

    @property
    def _curvature_entries(self) -> Table:
        """What the entries of a saved curvature must be."""
        return self.curvature_type.entries

    def _translated(self, state: Mapping[str, Any]) -> dict[str, Any]:
        structure = self.curvature_type.name.value
        if structure not in PEER_STRUCTURES:
            return super()._translated(state)
        check_peer(state, self._identity(), {"dtype": self._dtype}, last_layer=self._last_layer)
        self._know_weights(state)
        chosen = self._chosen_indices().get("subnetwork_indices")
        mean, subset = state["mean"].detach().to(self._device), self._known_parameters("load_state_dict")
        if chosen is not None and len(mean) > int(chosen.max()):
            mean = mean[chosen]
        if len(mean) != subset.n_params or not subset.equals(mean):
            msg = (
                "The weights of the model are not those in the state, 'mean': give it those it had when it was fitted "
                "by laplace-torch, or fit again."
            )
            raise StateError(msg)
        own = {"schema_version": SCHEMA_VERSION, **self._identity(), **self._choices()}
        return translated(state, own, mean, structure)

    def _curvature_from(self, state: Mapping[str, Any]) -> AbstractCurvature:
        """The curvature that a state describes."""
        return self.curvature_type.from_state(state, self._dtype)

    def _take(self, state: Mapping[str, Any]) -> None:
        curvature = self._curvature_from(state["H"])
        prior = self._take_hyperparameters(state)
        self._prior_mean, self._prior_precision = prior.mean, prior.precision
        counts = state["n_data"], state["n_positions"], state["n_outputs"]
        by_output, shape = (
            None if value is None else value.to(self._dtype) for value in (state["output_loss"], state["noise_shape"])
        )
        mean = state["mean"].to(self._dtype)
        loss = mean.new_full((), torch.nan) if state["loss"] is None else state["loss"].to(self._dtype)
        self._fit = Fit(mean, curvature, loss, *counts, by_output, self._head_bias, shape)
        self._hyperparameters_changed()

    def _check_taken(self, known: Known) -> None:
        scale = self._output_likelihood.curvature_scale(self._backend_cls.kind)
        usable = self._fitted.scaled(scale).is_finite
        if not bool(torch.isnan(self._fitted.nll)):
            usable = usable and bool(torch.isfinite(self.log_likelihood))
        if usable and known.get("negative"):
            try:  # the Hessian of a network may be negative somewhere, as long as the prior makes up for it
                self._frozen_posterior.logdet()
            except NotPositiveDefiniteError:
                usable = False
        if not usable:
            msg = (
                "The state is damaged: its curvature and hyperparameters make no posterior that is finite and positive."
            )
            raise StateError(msg)

    def _move_fit(self) -> None:
        fit: Fit | None = self.__dict__.get("_fit")
        if fit is not None:
            self._fit = replace(
                fit,
                mean=fit.mean.to(self._device, self._dtype),
                nll=fit.nll.to(self._device, self._dtype),
                output_nll=None if fit.output_nll is None else fit.output_nll.to(self._device, self._dtype),
                noise_shape=None if fit.noise_shape is None else fit.noise_shape.to(self._device, self._dtype),
                curvature=self._moved(fit.curvature),
            )

    def _moved(self, curvature: AbstractCurvature) -> AbstractCurvature:
        """A curvature on the device of the model, in its precision."""
        return self._curvature_from(move(curvature.state(), self._device))
