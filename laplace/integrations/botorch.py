"""A model of BoTorch: the posterior over the outputs of a trained network, for Bayesian optimization.

    from laplace.integrations.botorch import LaplaceModel

It holds a fitted regression of this library, and goes wherever BoTorch takes a model: into acquisition functions,
``optimize_acqf``, fantasies and Thompson sampling. Needs the extra ``botorch``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from botorch.models.model import FantasizeMixin
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch_community.models.blls import AbstractBLLModel
from botorch_community.models.vbll_helper import Normal
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.operators import DiagLinearOperator, LowRankRootLinearOperator
from torch import Tensor, nn

from laplace import checks, linalg
from laplace.baselaplace import ParametricLaplace
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.integrations.conditioning import Observations, check_learned, move, own, rows, shared, with_data
from laplace.likelihoods.draws import draw
from laplace.network import evaluating, full_precision
from laplace.predictive import NetworkLinearization
from laplace.predictive.adjusted import Adjusted
from laplace.structures.jacobian import sum_parts

MOST_DENSE = 2048
"""Up to how many random weights the root of their covariance is written out."""


class SampledFunction(nn.Module):
    """A function that was drawn from the posterior: weights that are drawn once, evaluated anywhere, differentiable.

    Attributes
    ----------
    num_outputs
        The number of outputs, m.
    """

    moves: Tensor
    """How far the weights of each function are from the mean, ``[samples, P]``."""

    def __init__(self, model: Any, moves: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.num_outputs, self._model, self._shape = model.num_outputs, model, shape
        self.register_buffer("moves", moves, persistent=False)

    @property
    def num_inputs(self) -> int:
        """The number of inputs, d."""
        return self._model.num_inputs

    def forward(self, x: Tensor) -> Tensor:
        """Its values.

        Parameters
        ----------
        x
            Inputs, ``[..., d]``.

        Returns
        -------
        ``[*sample_shape, ..., m]``, in the units of the targets, without observation noise.
        """
        values = self._model._at_weights(x if x.dim() > 1 else x.unsqueeze(0), self.moves)
        values = values.reshape(*self._shape, *values.shape[1:])
        return values if x.dim() > 1 else values.squeeze(-2)


class LaplaceModel(AbstractBLLModel, FantasizeMixin):
    """A fitted regression as a model of BoTorch.

    Parameters
    ----------
    la
        A fitted posterior over weights, ``Laplace(network, "regression")``, of the last layer or of any others. What it
        has learned is taken over, so that what happens to it afterwards does not matter here; it stays as it is, and so
        does its network, whose weights are shared.
    input_transform
        From the X that BoTorch sees to the inputs of the network, such as ``Normalize(d, bounds=bounds)``.
    outcome_transform
        From the Y that BoTorch sees to the targets that the network was trained on, such as ``Standardize(m=1)``. Both
        are taken as they are: one that learns has seen its data.
    num_inputs
        d, which the maximizer of sampled functions in ``botorch_community`` asks for; by default that of the first X.

    Raises
    ------
    UnsupportedError
        If ``la`` is no posterior over weights, or not one of a regression with constant noise, or predicts without its
        variance (``weight_uncertainty=False``).
    NotFittedError
        If it was not fitted.
    InputError
        If ``input_transform`` is one that learns, and leaves inputs as they are: it has seen no data.

    Notes
    -----
    The posterior at X is that of ``la(x)``: mean f and covariance J A⁻¹ Jᵀ, J the derivatives of the outputs in the
    random weights, for all t-batches at once. With up to 2,048 random weights it is R Rᵀ with R = J A^(−½), computed in
    float64; where q·m points are more than weights the covariance is kept as this root. For b t-batches of q points and
    m outputs this takes O(b q m P²) time and O(b q m P) memory, beside one forward pass (all weights: one backward pass
    for each output). It is differentiable in X whatever ``la.enable_backprop`` says, which is not changed.

    Networks in float64 are best for acquisition functions, whose line searches see the rounding of float32.

    Examples
    --------
    >>> from botorch.acquisition import qLogExpectedImprovement
    >>> from laplace import Laplace
    >>> X = torch.rand(20, 2, dtype=torch.float64)
    >>> Y = -(X - 0.5).square().sum(1, keepdim=True)
    >>> network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()  # trained, in real life
    >>> la = Laplace(network, "regression", "last_layer", "full").fit([(X, Y)])
    >>> model = LaplaceModel(la)
    >>> acquisition = qLogExpectedImprovement(model, best_f=Y.max())
    >>> acquisition(torch.rand(5, 3, 2, dtype=torch.float64)).shape  # 5 t-batches of 3 points
    torch.Size([5])
    """

    input_transform: Any
    outcome_transform: Any

    def __init__(
        self,
        la: Any,
        input_transform: nn.Module | None = None,
        outcome_transform: nn.Module | None = None,
        num_inputs: int | None = None,
    ) -> None:
        super().__init__()
        self._la = own(la)
        self._outputs: list[int] | None = None
        self._observed: Observations | None = None
        self._num_inputs = None if num_inputs is None else checks.whole("num_inputs", num_inputs)
        if input_transform is not None:
            self.input_transform = check_learned(input_transform)
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        self.eval()

    # -- what BoTorch asks --------------------------------------------------------------------------------------------

    @property
    def la(self) -> ParametricLaplace:
        """The posterior over weights as this model has it: a copy, which shares the network."""
        return shared(self._la)

    @property
    def likelihood(self) -> Any:
        """The likelihood: a Gaussian with the noise of ``la``."""
        return self._la.likelihood_

    @property
    def num_outputs(self) -> int:
        """The number of outputs, m."""
        return self._la.n_outputs if self._outputs is None else len(self._outputs)

    @property
    def num_inputs(self) -> int:
        """The number of inputs, d; ``InputError`` while it is not known."""
        if self._num_inputs is None:
            msg = "The number of inputs is not known before the model has seen some: pass num_inputs=."
            raise InputError(msg)
        return self._num_inputs

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self._la._device

    @property
    def batch_shape(self) -> torch.Size:
        """That of the observations of fantasies; else ``[]``."""
        return torch.Size() if self._observed is None else self._observed.Y.shape[:-2]

    def _set_transformed_inputs(self) -> None:
        """Nothing: no inputs are kept that a transform would have to follow."""

    def __call__(self, X: Tensor) -> Normal:
        """Mean and variance of a new target at each input, of an outcome transform that keeps it Gaussian.

        Parameters
        ----------
        X
            Inputs, ``[..., d]``.

        Returns
        -------
        A normal distribution ``[..., m]``, with observation noise.
        """
        found: Any = self.posterior(X.unsqueeze(-2), observation_noise=True)
        return Normal(found.mean.squeeze(-2), found.variance.squeeze(-2).sqrt())

    def fit(self, train_X: Tensor, train_Y: Tensor) -> LaplaceModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Learn the curvature at other data, with the network as it is: it is trained elsewhere.

        Parameters
        ----------
        train_X
            Inputs, ``[n, d]``.
        train_Y
            Targets, ``[n, m]``.

        Returns
        -------
        This object. The posterior that it was made of stays as it was.
        """
        la = shared(self._la)
        la.fit([self._inside(train_X, train_Y)])
        vars(self).pop("_root", None)
        self._la, self._observed = la, None
        return self

    # -- posterior ----------------------------------------------------------------------------------------------------

    def posterior(  # pyright: ignore[reportIncompatibleMethodOverride] - as BoTorch's own models have it
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Posterior:
        """The joint posterior of the outputs at q points, for each t-batch.

        Parameters
        ----------
        X
            ``[*batch, q, d]``.
        output_indices
            Which outputs; all by default.
        observation_noise
            Whether to add the noise of ``la``, or variances to add, ``[*batch, q or 1, m]`` in the units of the
            network's targets.
        posterior_transform
            Applied to the result.

        Returns
        -------
        A ``GPyTorchPosterior`` over ``[*batch, q, m]``, where the batch is broadcast with ``batch_shape``; another kind
        where a transform makes it that.

        Raises
        ------
        ShapeError
            If X or the outputs of the network have other shapes.
        InputError
            If an output index does not exist, or outputs are not finite.
        """
        self.eval()
        if output_indices is not None:
            model = self.subset_output(output_indices)
            return model.posterior(X, None, observation_noise, posterior_transform)
        x = self.transform_inputs(self._checked(X))
        mean, covariance = self._conditioned(x)
        q, m = mean.shape[-2:]
        if isinstance(observation_noise, Tensor):
            what = "observation_noise must be variances for the mean of the posterior"
            _broadcast(what, observation_noise.shape, mean.shape, into=True)
            variances = observation_noise.to(mean).expand(*mean.shape)
            covariance = covariance + DiagLinearOperator(variances.flatten(-2))
        elif checks.flag("observation_noise", observation_noise):
            noise = self._noise(mean)
            if linalg.is_diagonal(noise):
                covariance = covariance + DiagLinearOperator(noise.diagonal().repeat(q).expand(*mean.shape[:-2], -1))
            else:
                covariance = covariance + to_linear_operator(torch.kron(torch.eye(q).to(noise), noise))
        if m == 1:
            distribution = MultivariateNormal(mean.squeeze(-1), covariance)
        else:
            distribution = MultitaskMultivariateNormal(mean, covariance)
        posterior: Any = GPyTorchPosterior(distribution)
        if hasattr(self, "outcome_transform"):
            posterior = self.outcome_transform.untransform_posterior(posterior, X=X)
        if posterior_transform is None:
            return posterior
        knows_inputs = "X" in inspect.signature(posterior_transform.forward).parameters  # since BoTorch 0.17
        return posterior_transform(posterior, X=X) if knows_inputs else posterior_transform(posterior)

    def _conditioned(self, x: Tensor) -> tuple[Tensor, Any]:
        """Mean ``[*batch, q, m]`` and covariance ``[*batch, q·m, q·m]`` at inputs of the network."""
        seen = self._observed
        if seen is None:
            mean, covariance, root = self._joint(x)
            if root is not None and self._outputs is None and mean.shape[-1] == 1 and mean.shape[-2] > root.shape[-1]:
                return mean, LowRankRootLinearOperator(root)
            covariance = covariance if root is None else root @ root.mT
            return self._chosen(mean, covariance)
        batch = _broadcast("The batch of X must be broadcast with the model's", x.shape[:-2], self.batch_shape)
        parts = [part.expand(*batch, *part.shape[-2:]) for part in (seen.X.to(x), x)]
        mean, covariance, root = self._joint(torch.cat(parts, -2))
        covariance = covariance if root is None else root @ root.mT
        n, k = seen.Y.shape[-2], seen.Y.shape[-2] * mean.shape[-1]
        factor = linalg.cholesky(covariance[..., :k, :k] + seen.noise.to(mean), "covariance of the observations")
        gap = (seen.Y.to(mean) - mean[..., :n, :]).flatten(-2).unsqueeze(-1)
        half = torch.linalg.solve_triangular(factor, covariance[..., :k, k:], upper=False)
        moved = half.mT @ torch.linalg.solve_triangular(factor, gap, upper=False)
        mean = mean[..., n:, :] + moved.reshape(mean[..., n:, :].shape)
        return self._chosen(mean, covariance[..., k:, k:] - half.mT @ half)

    def _chosen(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Any]:
        """The outputs that were asked for."""
        if self._outputs is None:
            return mean, to_linear_operator(covariance)
        q, m = mean.shape[-2:]
        chosen = covariance.unflatten(-1, (q, m)).unflatten(-3, (q, m))[..., self._outputs]
        chosen = chosen[..., self._outputs, :, :].flatten(-4, -3).flatten(-2)
        return mean[..., self._outputs], to_linear_operator(chosen)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean ``[*batch, q, C]``, and covariance ``[*batch, q·C, q·C]`` or its root ``[*batch, q·C, P]``."""
        la, (*batch, q, _) = self._la, x.shape
        inputs = self._linearized(x)
        n, posterior = inputs.n_outputs, la._frozen_posterior
        mean = inputs.f.reshape(*batch, q, n).to(x)
        with full_precision(self.device):
            seen = la._adjusted(inputs)
            extra = seen.extra if isinstance(seen, Adjusted) else None
            if posterior.n_params <= MOST_DENSE:
                root = (rows(inputs, la._dtype).double() @ self._root).reshape(*batch, q * n, -1).to(x)
                if extra is None:
                    return mean, root, root
                covariance = root @ root.mT
            elif q == 1:
                covariance = inputs.covariance(posterior, la._dtype).reshape(*batch, n, n).to(x)
            else:
                J = rows(inputs, la._dtype).reshape(-1, q * n, posterior.n_params)
                covariance = posterior.functional_variance(J).reshape(*batch, q * n, q * n).to(x)
        if extra is not None:
            covariance = covariance + torch.diag_embed(extra.to(x).reshape(*batch, q * n))
        return mean, covariance, None

    @cached_property
    def _root(self) -> Tensor:
        """A root of the covariance of the random weights, ``[P, P]``."""
        with torch.no_grad(), full_precision(self.device):
            return linalg.invsqrt_precision(self._la._frozen_posterior.to_dense().double())

    def _linearized(self, x: Tensor) -> NetworkLinearization:
        """Outputs at inputs ``[..., d]``, flattened to rows, and their derivatives in the random weights."""
        la = self._la
        with evaluating(la.model, enable_backprop=True):
            inputs = la._checked_linearization(x.reshape(-1, x.shape[-1]).to(la._random_weights.first))
        assert isinstance(inputs, NetworkLinearization), "of a posterior over weights"
        if inputs.f.dim() != 2:
            msg = (
                "BoTorch asks for the outputs of one point at a time, [points, outputs]; those of this network are "
                f"{list(inputs.f.shape)}. Wrap it in a module that flattens them."
            )
            raise ShapeError(msg)
        return inputs

    def _noise(self, like: Tensor) -> Tensor:
        """The covariance of the noise of the chosen outputs of a point, ``[m, m]``."""
        likelihood, n = self._la.likelihood_, self._la.n_outputs
        noise = torch.diag((likelihood.sigma_noise**2).to(like).expand(n))
        if likelihood.noise_covariance is not None:
            noise = noise @ likelihood.noise_covariance.to(like)
        return noise if self._outputs is None else noise[self._outputs][:, self._outputs]

    # -- observations -------------------------------------------------------------------------------------------------

    def condition_on_observations(self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **_: Any) -> LaplaceModel:
        """The posterior given more observations, by Bayes' rule: mean and covariance move, the network stays.

        Parameters
        ----------
        X
            ``[*batch, n, d]``.
        Y
            ``[*batch, n, m]``; may have more batch dimensions than X, as fantasies have.
        noise
            Variances of the observation noise, ``[*batch, n, m]`` in the units of the network's targets; by default
            the noise of ``la``.

        Returns
        -------
        Another model. Of a last layer, without batch dimensions, gradients or ``noise``: one whose ``la`` has these
        data as well (``fit(override=False)``) and the weights that they lead to. Otherwise, and for all that follows,
        the observations are kept beside the posterior, which is conditioned in function space with each call, for all
        batches at once and differentiable in X and Y. With ``hessian_structure="full"`` both are the same; others
        approximate the curvature of new data in the former, and in the latter are exact given the posterior.

        Raises
        ------
        ShapeError
            If X and Y do not belong together.
        InputError
            If they are not finite, or a variance of the noise is negative.
        UnsupportedError
            If the structure takes no further data (``override=False``), or this model has some of the outputs only.

        Notes
        -----
        In function space each call takes O((n·m)³) for each batch on top.
        """
        self.eval()
        if self._outputs is not None:
            msg = "This model has some of the outputs only: condition the model of all of them, and then choose."
            raise UnsupportedError(msg)
        x, y = self._inside(X, Y)
        if not bool(x.isfinite().all() and y.isfinite().all()):
            msg = "Observations must be finite numbers; X or Y holds NaN or infinite values. Leave those points out."
            raise InputError(msg)
        if noise is not None and not bool((noise.isfinite() & (noise >= 0)).all()):
            msg = f"noise holds variances, finite and not negative; the smallest is {float(noise.min()):.3g}."
            raise InputError(msg)
        known = noise is not None or self._observed is not None or x.requires_grad or y.requires_grad
        if x.dim() == 2 and y.dim() == 2 and self._la._weights_type.of_head and not known:
            return self._with(_la=with_data(self._la, x, y, self._noise(y)))
        temperature = float(self._la.temperature)
        if noise is None:
            covariance = torch.kron(torch.eye(y.shape[-2]).to(y), self._noise(y))
        else:
            _broadcast("noise must be variances of Y", noise.shape, y.shape, into=True)
            covariance = torch.diag_embed(noise.to(y).expand(y.shape).flatten(-2))
        batch = _broadcast("The batch of X must be broadcast with that of Y", x.shape[:-2], y.shape[:-2])
        x = x.expand(*batch, *x.shape[-2:])
        y = y.expand(*x.shape[:-2], *y.shape[-2:])
        new = Observations(x, y, temperature * covariance)
        return self._with(_observed=new if self._observed is None else self._observed.followed_by(new))

    def subset_output(self, idcs: list[int]) -> LaplaceModel:
        """The model of some of the outputs.

        Parameters
        ----------
        idcs
            Which.

        Returns
        -------
        Another model, which shares everything.

        Raises
        ------
        InputError
            If there is no such output.
        """
        m = self.num_outputs
        if not idcs or any(not -m <= index < m for index in idcs):
            msg = f"There are {m} outputs: indices are from 0 to {m - 1}; got {list(idcs)}."
            raise InputError(msg)
        idcs = [index % m for index in idcs]
        chosen = idcs if self._outputs is None else [self._outputs[index] for index in idcs]
        model = self._with(_outputs=chosen)
        if hasattr(self, "outcome_transform"):
            model.outcome_transform = self.outcome_transform.subset_output(idcs)
        return model

    def _with(self, **changes: Any) -> LaplaceModel:
        """Another model that differs in these attributes."""
        twin = copy.copy(self)
        vars(twin)["_modules"] = dict(self._modules)
        if "_la" in changes:
            vars(twin).pop("_root", None)
        vars(twin).update(changes)
        return twin

    # -- functions ----------------------------------------------------------------------------------------------------

    def sample(
        self, sample_shape: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> SampledFunction:
        """Draw functions, for Thompson sampling: weights are drawn once, so that each is one function everywhere.

        Parameters
        ----------
        sample_shape
            How many; ``None`` for one, without a dimension of its own.
        generator
            Source of randomness, on the device of the network.

        Returns
        -------
        A module that maps ``[..., d]`` to ``[*sample_shape, ..., m]``: of a last layer the network with other weights
        there, else the linearized network. Observation noise and the width at foreign inputs (``distance_scale``) are
        no part of it.

        Raises
        ------
        UnsupportedError
            Of a model with a batch of fantasies.
        """
        la, seen, shape = self._la, self._observed, torch.Size(sample_shape or ())
        if self.batch_shape:
            msg = (
                f"This model has a batch {list(self.batch_shape)} of fantasies; functions are drawn from one "
                "posterior: draw them before, or condition on observations without a batch."
            )
            raise UnsupportedError(msg)
        generator = checks.generator(generator, self.device)
        with torch.no_grad(), full_precision(self.device):
            posterior = la._frozen_posterior
            moves = posterior.sample(shape.numel(), generator)
            if seen is not None:
                inputs = self._linearized(seen.X)
                J, at = rows(inputs, la._dtype), inputs.mean(la._dtype)
                noise = seen.noise.to(J)
                drawn = next(iter(draw(seen.Y.to(at).reshape(1, -1), noise.unsqueeze(0), len(moves), generator)))
                gap = drawn.reshape(len(moves), -1) - at.flatten() - moves @ J.T
                moves = moves + move(posterior, J, noise, gap)
        return SampledFunction(self, moves, shape)

    def _at_weights(self, X: Tensor, moves: Tensor) -> Tensor:
        """Outputs ``[samples, *batch, q, m]`` at weights that are moved by ``[samples, P]``."""
        self.eval()
        x = self.transform_inputs(self._checked(X))
        inputs = self._linearized(x)
        with full_precision(self.device):
            blocks = inputs.blocks(self._la._dtype)
            parts = moves.split([block.n_params for block in blocks], -1)
            moved = sum_parts([block.apply(v) for block, v in zip(blocks, parts, strict=True)]).mT
            values = (inputs.mean(self._la._dtype) + moved).reshape(len(moves), *x.shape[:-1], -1).to(x)
        values = values if self._outputs is None else values[..., self._outputs]
        return self.outcome_transform.untransform(values, X=X)[0] if hasattr(self, "outcome_transform") else values

    # -- checks -------------------------------------------------------------------------------------------------------

    def _checked(self, X: Any) -> Tensor:
        """Inputs of BoTorch, ``[..., q, d]``."""
        x = checks.tensor("X", X, "a tensor [*batch, q, d]")
        if x.dim() < 2 or not x.is_floating_point() or x.shape[-1] != (self._num_inputs or x.shape[-1]):
            d = "d" if self._num_inputs is None else self._num_inputs
            msg = f"X must be floating-point numbers [*batch, q, {d}]; got {x.dtype} {list(x.shape)}."
            raise ShapeError(msg)
        self._num_inputs = x.shape[-1]
        return x

    def _inside(self, X: Any, Y: Any) -> tuple[Tensor, Tensor]:
        """Observations in the units of the network."""
        self.eval()
        x, y = self._checked(X), checks.tensor("Y", Y, "a tensor [*batch, n, m]")
        if y.dim() < 2 or x.shape[-2] != y.shape[-2] or y.shape[-1] != self.num_outputs:
            msg = (
                f"Y must have one row for each of X, [*batch, {x.shape[-2]}, {self.num_outputs}]; got {list(y.shape)}."
            )
            raise ShapeError(msg)
        y = self.outcome_transform(y, X=x)[0] if hasattr(self, "outcome_transform") else y
        x = self.transform_inputs(x)
        return x, y.to(x)


def _broadcast(what: str, shape: Sequence[int], other: Sequence[int], *, into: bool = False) -> torch.Size:
    """The common shape of two; ``into``: it must be the other."""
    try:
        found = torch.broadcast_shapes(shape, other)
    except RuntimeError:
        found = None
    if found is None or (into and found != torch.Size(other)):
        msg = f"{what}, {list(other)}; got {list(shape)}."
        raise ShapeError(msg)
    return found


__all__ = ["LaplaceModel", "SampledFunction"]
