"""``FeatureLaplace``: what ELLA and VaLLA share, posteriors over functions in terms of features of the outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.baselaplace.described import described
from laplace.baselaplace.functional import BaseFunctionalLaplace
from laplace.errors import StateError, UnsupportedError
from laplace.fit import FIT_ENTRIES, Fit
from laplace.gp.derivatives import Blocks, InducingPoints, Jacobian, jacobian, one_output
from laplace.gp.posterior import FeatureMap, FunctionLinearization
from laplace.likelihoods import L_co, Positions
from laplace.network import evaluating, full_precision
from laplace.predictive import Linearization, NetworkLinearization, compare
from laplace.predictive.linearization import StoredDerivatives
from laplace.schema import Known, Table, nested, tensor, whole
from laplace.structures.dense_jacobian import check_jacobians
from laplace.structures.jacobian import DenseBlock
from laplace.types import Inputs

KEPT_ELEMENTS = 2**29
"""Numbers kept of derivatives of points and of training data: 2 GB in float32."""


@described
class FeatureLaplace(BaseFunctionalLaplace[L_co]):
    """A posterior over the weights of features, ``N(0, (A + δ I)⁻¹)``, and perhaps what they leave of the prior.

    Parameters
    ----------
    sigma_noise
        Standard deviation of the observation noise, in target units: one number for all outputs; regression only.
    """

    fit_history_: dict[str, list[Any]]
    """What happened during ``fit``, by name."""

    # -- checks of what users pass ------------------------------------------------------------------------------------

    def _checked_sigma_noise(self, value: Any) -> Tensor:
        sigma = super()._checked_sigma_noise(value)
        if sigma.numel() > 1:
            msg = f"{type(self).__name__} sums over outputs while it fits: pass one sigma_noise for all of them."
            raise UnsupportedError(msg)
        return sigma

    def _check_kind(self) -> None:
        """Raise if the back end stands for another curvature, or samples it: only its derivatives are used."""
        if self._backend_cls.matrix != "GGN":
            article = "a" if self._backend_cls.matrix == "Hessian" else "an"
            msg = (
                f"{type(self).__name__} weighs features by the Hessian of the likelihood in the outputs, which is a "
                f"generalized Gauss-Newton matrix; {self._backend_cls.__name__} computes {article} "
                f"{self._backend_cls.matrix}. Pass a GGN back end, or backend=None."
            )
            raise UnsupportedError(msg)
        if self._backend_kwargs.get("stochastic"):
            msg = (
                f"{type(self).__name__} weighs features by exact Hessians in the outputs, and samples none: leave "
                "stochastic=True out of backend_kwargs. A sampled matrix takes hessian_structure='diag', 'kron' or "
                "'full'."
            )
            raise UnsupportedError(msg)

    @contextmanager
    def _fitting(self) -> Generator[None]:
        """The model as it predicts, on no graph, linearized at the weights it has now.

        An earlier fit is out of sight: its weights may be others, and outputs would be said to have moved.
        """
        earlier: Fit | None = self.__dict__.get("_fit")
        if earlier is not None:
            del self._fit
        try:
            with evaluating(self.model), torch.no_grad(), full_precision(self._device):
                yield
        finally:
            if earlier is not None:
                self._fit = earlier

    # -- posterior ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _feature_map(self) -> FeatureMap:
        """From derivatives to features, as they were fitted."""

    def _functions_at(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        return FunctionLinearization.of(self._linearize(x, **model_kwargs), self._feature_map(), self._dtype)

    def _point_blocks(self, x: Inputs, column: Tensor) -> Blocks:
        """Derivatives of one output of each datum, in factors."""
        return one_output(self._linearize(x), column, self._dtype)

    def _points(self, parts: Sequence[tuple[Inputs, Tensor]]) -> InducingPoints:
        """One output each of some data, kept in factors while memory allows; else derived again when asked for."""
        batches: list[Callable[[], Blocks]] = []
        left = KEPT_ELEMENTS
        for x, column in parts:
            blocks = self._point_blocks(x, column)
            left -= sum(block.size for block in blocks)
            batches.append(partial(self._point_blocks, x, column) if left < 0 else partial(list, blocks))
        return InducingPoints(batches, [len(column) for _, column in parts])

    def _jacobian_at(self, x: Inputs, y: Tensor) -> tuple[Jacobian, Positions]:
        """Derivatives at training data, of the logits of pairs where targets compare items; and their targets."""
        inputs, likelihood = self._linearize(x), self._frozen_likelihood
        # The weights of a last layer without a name are known from here on.
        self._check_prior(self._prior_precision, self._prior_mean)
        inputs = likelihood.arranged(inputs, compare)
        return jacobian(inputs, self._dtype), likelihood.flatten(inputs.f, y).to(self._dtype)

    def _written(self, jacobians: Tensor) -> FunctionLinearization:
        """Functions with Jacobians of a user."""
        jacobians = self._checked_jacobians(jacobians)
        check_jacobians(jacobians, self.n_params)
        sizes = (self.n_params,) if self._random_weights.of_head else self._prior.sizes
        blocks = [DenseBlock(part) for part in jacobians.transpose(0, 1).split(sizes, -1)]
        inputs = NetworkLinearization(jacobians[..., 0], StoredDerivatives(blocks))
        return FunctionLinearization.of(inputs, self._feature_map(), self._dtype)

    def functional_variance(self, jacobians: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """Covariance of the outputs at each input, in output units squared, without observation noise.

        Parameters
        ----------
        jacobians
            ``[batch, outputs, P]``.

        Returns
        -------
        ``[batch, outputs, outputs]``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ShapeError
            If P differs from the number of random weights.

        Notes
        -----
        The Jacobian dominates time and memory; calling the object never builds it.
        """
        posterior = self._frozen_posterior
        return self._written(jacobians).covariance(posterior, self._dtype)

    def functional_covariance(self, jacobians: Tensor) -> Float[Tensor, "joint joint"]:
        """Covariance of the outputs across inputs, ``[batch·outputs, batch·outputs]``, input by input.

        Parameters
        ----------
        jacobians
            ``[batch, outputs, P]``.

        Returns
        -------
        In output units squared, without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ShapeError
            If P differs from the number of random weights.
        """
        posterior = self._frozen_posterior
        return self._written(jacobians).joint_covariance(posterior, self._dtype)

    # -- saving -------------------------------------------------------------------------------------------------------

    _curvature_entry: ClassVar[str] = "learned"
    state_entries: ClassVar[Table] = {
        "mean": FIT_ENTRIES["mean"],
        "loss": tensor((), low=0),
        "n_data": whole(1),
        "n_positions": whole(1),
        "n_outputs": whole(1, "C"),
    }
    _history_entries: ClassVar[Table]
    """What the entries of ``fit_history_`` must be in a state."""

    @property
    def _head_shapes(self) -> None:
        """What was learned sums over outputs, of a head, too."""

    def _entries(self) -> Table:
        return {**super()._entries(), "fit_history": nested(self._history_entries)}

    def _choices(self) -> dict[str, Any]:
        history = vars(self).get("fit_history_", {})
        return {**super()._choices(), "fit_history": {name: list(values) for name, values in history.items()}}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.fit_history_ = {name: list(values) for name, values in state["fit_history"].items()}

    def _check_taken(self, known: Known) -> None:  # noqa: ARG002
        with torch.no_grad():
            self._frozen_posterior.logdet()
            if not bool(torch.isfinite(self.log_likelihood)):
                msg = "The state is damaged: with the loss and the hyperparameters in it the likelihood is not finite."
                raise StateError(msg)


__all__ = ["FeatureLaplace"]
