"""``FeatureLaplace``: what ELLA and VaLLA share, posteriors over functions in terms of features of the outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg
from laplace.baselaplace.functional import BaseFunctionalLaplace
from laplace.baselaplace.statefile import move, signed
from laplace.errors import StateError, UnsupportedError
from laplace.fit import FIT_ENTRIES
from laplace.gp.last_layer import FeaturePoints
from laplace.gp.linearized import block_points, feature_points, tangents
from laplace.gp.posterior import FeatureMap, FeaturePrecision, FunctionLinearization, Rest
from laplace.gp.tangents import Points, Tangents, WrittenTangents
from laplace.gp.whole_network import BlockPoints
from laplace.likelihoods import Positions
from laplace.network import evaluating, full_precision
from laplace.network.batches import in_precision, plain
from laplace.predictive import FeatureLinearization, JacobianLinearization, Linearization, compare
from laplace.prior import GaussianPrior
from laplace.schema import Known, Table, nested, tensor, whole
from laplace.structures.dense_jacobian import check_jacobians
from laplace.structures.jacobian import JacobianBlock
from laplace.types import Inputs, Scalar

KEPT_ELEMENTS = 2**29
"""Numbers kept of derivatives of points and of training data: 2 GB in float32."""


@dataclass(frozen=True)
class FeatureFit:
    """What a fit learned. Replaced as a whole, so that a failing fit changes nothing.

    Attributes
    ----------
    mean
        The weights at which the network was linearized, ``[P]``.
    tensors
        What the method learned, by name.
    nll
        Negative log-likelihood at unit noise and temperature, summed, in nats.
    n_data, n_positions, n_outputs
        Rows of the loader, unmasked positions in them, and C.
    """

    mean: Float[Tensor, " params"]
    tensors: Mapping[str, Any]
    nll: Scalar
    n_data: int
    n_positions: int
    n_outputs: int


class FeatureLaplace(BaseFunctionalLaplace):
    """A posterior over the weights of features, ``N(0, (A + δ I)⁻¹)``, and perhaps what they leave of the prior."""

    fit_history_: dict[str, list[Any]]
    """What happened during ``fit``, by name."""
    _fit: FeatureFit
    """There once it was fitted."""
    _posterior_cache: dict[str, FeaturePrecision]

    # -- the border ---------------------------------------------------------------------------------------------------

    def _fits_structure(self, prior: GaussianPrior) -> None:
        if prior.precision.numel() > 1:
            msg = (
                f"{type(self).__name__} has an isotropic prior over the weights: prior_precision must be one number; "
                f"got {prior.precision.numel()}. Use hessian_structure='diag', 'kron' or 'full' for others."
            )
            raise UnsupportedError(msg)

    def _checked_prior_precision(self, value: Any) -> Tensor:
        precision = super()._checked_prior_precision(value)
        self._fits_structure(GaussianPrior(precision.new_zeros(()), precision, (precision.numel(),)))
        return precision

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
        earlier: FeatureFit | None = self.__dict__.get("_fit")
        if earlier is not None:
            del self._fit
        try:
            with evaluating(self.model), torch.no_grad(), full_precision(self._device):
                yield
        finally:
            if earlier is not None:
                self._fit = earlier

    # -- what was learned ---------------------------------------------------------------------------------------------

    @property
    @linalg.lasting
    def _fitted(self) -> FeatureFit:
        fit: FeatureFit | None = self.__dict__.get("_fit")
        if fit is None:
            message = "This attribute or call"
            raise self._not_fitted(message)
        if self._left_behind(fit.mean):
            self._follow_model()
        return self._fit

    @property
    def mean(self) -> Float[Tensor, " params"]:
        """The weights at which the network was linearized, ``[P]``; a copy."""
        return self._fitted.mean.clone()

    @property
    def loss(self) -> Scalar:
        """Negative log-likelihood of the training data at σ = T = 1, without constants, in nats."""
        return self._fitted.nll.clone()

    @property
    def n_data(self) -> int:
        """Number of training data that were used."""
        return self._fitted.n_data

    @property
    def n_outputs(self) -> int:
        """C."""
        return self._fitted.n_outputs

    @property
    def log_likelihood(self) -> Scalar:
        """Log p(D | θ*) at the present noise and temperature, in nats."""
        fit, likelihood = self._fitted, self._output_likelihood
        return -likelihood.scale * fit.nll - likelihood.log_normalizer(fit.n_positions, fit.n_outputs)

    @property
    def scatter(self) -> Scalar:
        """(θ* − μ₀)ᵀ P₀ (θ* − μ₀)."""
        return self._prior.scatter(self._fitted.mean)

    # -- posterior ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _feature_map(self) -> FeatureMap:
        """From tangents to features, as they were fitted."""

    @abstractmethod
    def _learned(self) -> Float[Tensor, "k k"]:
        """A, at the present noise and temperature."""

    def _hyperparameters_changed(self) -> None:
        self._posterior_cache: dict[str, FeaturePrecision] = {}  # replaced, not emptied, as in WeightPosterior

    @property
    def _posterior(self) -> FeaturePrecision:
        """A + δ I, on the graph of hyperparameters that are being differentiated."""
        return FeaturePrecision.of(self._learned(), self._prior_precision.to(self._dtype).squeeze(0))

    @property
    @linalg.lasting
    def _frozen_posterior(self) -> FeaturePrecision:
        self._fitted  # noqa: B018 - follows the model, which may have been moved
        cache = self._posterior_cache
        if "posterior" not in cache:
            with torch.no_grad(), full_precision(self._device):
                cache["posterior"] = self._posterior
        return cache["posterior"]

    def _functions_at(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        return FunctionLinearization.of(self._linearize(x, **model_kwargs), self._feature_map(), self._dtype)

    def _point_blocks(self, x: Inputs, column: Tensor) -> list[JacobianBlock]:
        """Derivatives of one output of each datum, in factors."""
        inputs = self._linearize(x)
        assert isinstance(inputs, JacobianLinearization), "a whole network"
        return block_points(inputs, column, self._dtype)

    def _points(self, parts: Sequence[tuple[Inputs, Tensor]]) -> Points:
        """One output each of some data, kept in factors while memory allows; else derived again when asked for.

        Parameters
        ----------
        parts
            Inputs, and which of the ``positions · C`` outputs of each.
        """
        if self._last_layer:
            found = [(self._linearize(x), column) for x, column in parts]
            features = [feature_points(i, c, self._dtype) for i, c in found if isinstance(i, FeatureLinearization)]
            phi, output = torch.cat([p.phi for p in features]), torch.cat([p.output for p in features])
            return FeaturePoints(phi, output, features[0].n_outputs, features[0].bias)
        pieces: list[Callable[[], list[JacobianBlock]]] = []
        left = KEPT_ELEMENTS
        for x, column in parts:
            blocks = self._point_blocks(x, column)
            left -= sum(block.size for block in blocks)
            pieces.append(partial(self._point_blocks, x, column) if left < 0 else partial(list, blocks))
        return BlockPoints(pieces, [len(column) for _, column in parts])

    def _tangents_at(self, x: Inputs, y: Tensor) -> tuple[Tangents, Positions]:
        """Tangents at training data, of the logits of pairs where targets compare items; and their targets."""
        inputs, likelihood = self._linearize(x), self._frozen_likelihood
        # The weights of a last layer without a name are known from here on.
        self._check_prior(self._prior_precision, self._prior_mean)
        inputs = likelihood.arranged(inputs, compare)
        return tangents(inputs, self._dtype), likelihood.flatten(inputs.f, y).to(self._dtype)

    def _written(self, jacobians: Tensor) -> FunctionLinearization:
        """Functions with Jacobians of a user."""
        jacobians = self._checked_jacobians(jacobians)
        check_jacobians(jacobians, self.n_params)
        at, features = WrittenTangents(jacobians), self._feature_map()
        phi = features.features(at)
        return FunctionLinearization(jacobians[..., 0], phi, Rest(at, phi) if features.has_rest else None)

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

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``fit`` learned and the hyperparameters: tensors and plain values.

        Returns
        -------
        A dictionary that ``torch.save`` writes and ``torch.load(..., weights_only=True)`` reads. All in it are copies;
        its ``"digest"`` tells whether an entry was changed afterwards.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If inputs of inducing points hold something else than tensors and plain values.
        """
        fit = self._fitted
        return signed(
            {
                **self._header(),
                "mean": fit.mean,
                "loss": fit.nll,
                "n_data": fit.n_data,
                "n_positions": fit.n_positions,
                "n_outputs": fit.n_outputs,
                "learned": plain(fit.tensors),
                "fit_history": {name: list(values) for name, values in self.fit_history_.items()},
            }
        )

    state_entries: ClassVar[Table] = {
        "mean": FIT_ENTRIES["mean"],
        "loss": tensor((), low=0),
        "n_data": whole(1),
        "n_positions": whole(1),
        "n_outputs": whole(1, "C"),
    }
    _learned_entries: ClassVar[Table]
    """What the entries of what was learned must be."""
    _history_entries: ClassVar[Table]

    def _entries(self) -> Table:
        own = {"learned": nested(self._learned_entries), "fit_history": nested(self._history_entries)}
        return {**super()._entries(), **own}

    def _take(self, state: Mapping[str, Any]) -> None:
        prior = self._take_hyperparameters(state)
        self._prior_mean, self._prior_precision = prior.mean, prior.precision
        counts = state["n_data"], state["n_positions"], state["n_outputs"]
        mean, nll = (state[key].to(self._dtype) for key in ("mean", "loss"))
        self._fit = FeatureFit(mean, dict(state["learned"]), nll, *counts)
        self.fit_history_ = {name: list(values) for name, values in state["fit_history"].items()}
        self._fit_changed()

    def _check_taken(self, known: Known) -> None:  # noqa: ARG002
        with torch.no_grad():
            self._frozen_posterior.logdet()
            if not bool(torch.isfinite(self.log_likelihood)):
                msg = "The state is damaged: with the loss and the hyperparameters in it the likelihood is not finite."
                raise StateError(msg)

    def _fit_changed(self) -> None:
        """Forget what depends on the fit."""
        self._hyperparameters_changed()

    def _move_fit(self) -> None:
        fit: FeatureFit | None = self.__dict__.get("_fit")
        if fit is not None:
            moved = move([fit.mean, dict(fit.tensors), fit.nll], self._device)
            mean, tensors, nll = in_precision(moved, fit.mean.dtype, self._dtype)
            self._fit = replace(fit, mean=mean, tensors=tensors, nll=nll)
        self._fit_changed()


__all__ = ["FeatureFit", "FeatureLaplace"]
