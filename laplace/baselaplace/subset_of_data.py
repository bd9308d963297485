"""``FunctionalLaplace``: the posterior of a subset of the data as a Gaussian process; formulas are in ``gp/``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Self

from laplace import checks, linalg, processes
from laplace.baselaplace.described import described
from laplace.baselaplace.fitting import Learned, Training
from laplace.baselaplace.functional import BaseFunctionalLaplace
from laplace.baselaplace.keywords import BackendKeywords
from laplace.baselaplace.options import checked_weights
from laplace.curvature import CurvatureInterface
from laplace.enums import PredType
from laplace.errors import InputError, StateError
from laplace.fit import FIT_ENTRIES
from laplace.gp.kernel import SubsetKernel
from laplace.gp.process import ProcessLinearization
from laplace.gp.subset import Subset, expected_rows
from laplace.gp.subset_curvature import SubsetCurvature
from laplace.likelihoods import L_co
from laplace.network import Batch, evaluating
from laplace.network.batches import in_precision, to_device
from laplace.network.shards import places
from laplace.predictive import Linearization
from laplace.schema import Known, Table, flag, nested, tensor, whole
from laplace.structures import AbstractCurvature
from laplace.types import Inputs


@described
class FunctionalLaplace(BaseFunctionalLaplace[L_co]):
    """A Gaussian process around the outputs of a network: the Laplace approximation in function space.

    All weights that require a gradient are random. Its kernel is that of the linearized network, its data a random
    subset of the training data. With all data it is the posterior of ``FullLaplace``, at a cost that depends on data
    and outputs instead of weights. With M of N examples the prior precision is multiplied by N/M.

    Parameters
    ----------
    n_subset
        M, how many training examples to use: ``numpy.random.default_rng(seed).choice(N, M, replace=False)``, in the
        order in which the loader yields them.
    independent_outputs
        Leave out what outputs have in common: one process per output, C matrices of M² instead of one of (M C)².
    seed
        Seed of the choice of data.
    diagonal_hessian
        Use the diagonals of the likelihood's Hessians alone, as laplace-torch does for classification; by default they
        are whole.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive, or ``n_subset`` no positive whole number.

    Notes
    -----
    With C outputs the factorization takes O((M C)³) time and O((M C)²) memory, once; O(C M³) and O(C M²) where outputs
    do not meet: with ``independent_outputs``, and for a last layer with a Gaussian likelihood or ``diagonal_hessian``.

    References
    ----------
    Khan, Immer, Abedi & Korzepa (2019), "Approximate inference turns deep networks into Gaussian processes".
    arXiv:1906.01930; Immer, Korzepa & Bauer (2021), "Improving predictions of Bayesian neural nets via local
    linearization", section 3.3. arXiv:2008.08400
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = SubsetCurvature

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        n_subset: int,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: BackendKeywords | None = None,
        independent_outputs: bool = False,
        seed: int = 0,
        *,
        diagonal_hessian: bool = False,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            dict_key_x,
            dict_key_y,
            backend,
            backend_kwargs,
            curvature_dtype=curvature_dtype,
            output_key=output_key,
            output_fn=output_fn,
            output_dim=output_dim,
            shift_labels=shift_labels,
        )
        self.independent_outputs = checks.flag("independent_outputs", independent_outputs)
        self.diagonal_hessian = checks.flag("diagonal_hessian", diagonal_hessian)
        if self.diagonal_hessian:
            self._unit_likelihood.check_diagonal_hessian()
        self.n_subset, self.seed = checks.whole("n_subset", n_subset), checks.whole("seed", seed, 0)

    # -- fit ----------------------------------------------------------------------------------------------------------

    @linalg.lasting
    def fit(self, train_loader: Iterable[Any], progress_bar: bool = False) -> Self:
        """Choose the subset, and learn what its kernel is made of.

        Parameters
        ----------
        train_loader
            Yields ``(x, y)``, ``(x1, …, xk, y)`` or mappings: a ``DataLoader``, a list, any iterable of batches. One
            that has no length needs memory for all data until the subset is drawn.
        progress_bar
            Show a progress bar.

        Returns
        -------
        This object.

        Raises
        ------
        InputError
            If there are fewer data than ``n_subset``, or the loader yields no batches or no valid targets.
        UnsupportedError
            If model, likelihood and back end do not fit together, or matrices of the subset cannot fit the device.
        ShapeError
            If outputs, targets or the prior have shapes that do not fit.

        Notes
        -----
        One forward pass over the data and no backward pass; kernels and their factorization are left to the first use.
        The model is left as it was found, and if fitting fails, this object as well.
        """
        with processes.agreed():
            checks.loader("train_loader", train_loader)
            backend = self.backend
            if not self._random_weights.of_head:
                processes.refuse(type(self).__name__)
            accumulate = partial(self._accumulate, train_loader)
            training = Training(
                self._random_weights,
                backend,
                accumulate,
                partial(self._iterate, progress_bar=checks.flag("progress_bar", progress_bar)),
                lambda: None,  # what the subset takes is checked when the outputs are known
                lambda: self._check_prior(self._prior_precision, self._prior_mean),
                self._sigma_noise,
                lambda: self._dtype,
            )
            fit = training.fit(train_loader)
        self._fit = fit
        self._hyperparameters_changed()
        return self

    def _accumulate(self, loader: Any, batches: Iterable[Batch]) -> Learned | None:
        """Negative log-likelihood of all data and curvature of the subset; ``None`` when there are no data."""
        n_rows, team, where = expected_rows(loader, self.dict_key_y), processes.summed_over(), None
        if team is not None:
            where = places(team, loader, n_rows)
            n_rows = None if where is None else len(where)
        subset = Subset(
            self.n_subset,
            self.seed,
            n_rows,
            diagonal=self.diagonal_hessian,
            independent=self.independent_outputs,
            linearize=self._derive,
            team=team,
            places=where,
        )
        learned = self.curvature_type.accumulate(self.backend, batches, subset=subset)
        if learned is None or not bool(torch.isfinite(learned[0]).all()):
            return learned
        nll, curvature = learned
        assert isinstance(curvature, SubsetCurvature), "declared above"
        kernel, root, ratio = subset.finish(curvature.kernel, curvature.root)
        return nll, SubsetCurvature(kernel, root, ratio)

    def _derive(self, x: Inputs) -> Linearization:
        """Derivatives at data of the subset, which are made on first use: they must be those of the fit."""
        fit = self.__dict__.get("_fit")
        if fit is not None and not self._known("a prediction").equals(fit.mean):
            msg = (
                "The kernel of the subset is made of the network's derivatives when it is first used, and the weights "
                "have changed since fit. Fit again, or make a prediction before the weights change."
            )
            raise InputError(msg)
        with evaluating(self.model), torch.no_grad():
            return self._linearize(x)

    @property
    def gp_kernel_prior_variance(self) -> Tensor:
        """Prior variance of each weight in the kernel, ``M / (N δ)``, ``[1]``, in weight²."""
        curvature = self._fitted.curvature
        assert isinstance(curvature, SubsetCurvature), "declared above"
        return 1 / (self._prior_precision.to(self._dtype) * curvature.ratio)

    def functional_variance(self, Js_star: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """Covariance of the outputs at each input, in output units squared, without observation noise.

        Parameters
        ----------
        Js_star
            Jacobians, ``[batch, outputs, P]``.

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
        return self._frozen_posterior.functional_variance(self._checked_jacobians(Js_star))

    def functional_covariance(self, Js_star: Tensor) -> Float[Tensor, "joint joint"]:
        """Covariance of the outputs across inputs, ``[batch·outputs, batch·outputs]``, input by input.

        Parameters
        ----------
        Js_star
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        In output units squared, without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ShapeError
            If P differs from the number of random weights.
        UnsupportedError
            With ``independent_outputs`` of a whole network: its outputs have no weights in common.
        """
        return self._frozen_posterior.functional_covariance(self._checked_jacobians(Js_star))

    def log_prob(self, value: Float[Tensor, "*batch params"], normalized: bool = True) -> Float[Tensor, "*batch"]:
        """Log density of weights under the posterior of the subset, in nats, as in ``ParametricLaplace.log_prob``.

        Parameters
        ----------
        value
            Weights, ``[..., P]``.
        normalized
            Include the normalizer.

        Returns
        -------
        One number for each vector of weights.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.
        """
        normalized, quadratic = checks.flag("normalized", normalized), -0.5 * self.square_norm(value)
        if not normalized:
            return quadratic
        return quadratic + 0.5 * (self.log_det_posterior_precision - self.n_params * math.log(2 * math.pi))

    def square_norm(self, value: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """(θ − θ*)ᵀ A (θ − θ*) with A the posterior precision of the subset.

        Parameters
        ----------
        value
            Weights, ``[..., P]``.

        Returns
        -------
        One number for each vector of weights; without unit.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.
        """
        mean = self._fitted.mean
        return self._posterior.quadratic(checked_weights(value, mean) - mean)

    def sample(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draw weights whose linearized network is a draw from the process.

        Parameters
        ----------
        n_samples
            How many.
        generator
            Source of randomness, on the model's device.

        Returns
        -------
        ``[n_samples, P]``, in public order.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            With ``independent_outputs`` of a whole network, which is over no weights.
        InputError
            If ``n_samples`` is not positive, or the generator is on another device.

        Notes
        -----
        Exact: draws from the prior are corrected by what they miss at the data (Matheron's rule). O(n_samples · P).
        """
        self._options(PredType.NN, n_samples=n_samples, generator=generator)
        with torch.no_grad():
            return self._fitted.mean + self._frozen_posterior.sample(n_samples, generator)

    def _functions_at(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        curvature = self._fitted.curvature
        assert isinstance(curvature, SubsetCurvature), "declared above"
        return ProcessLinearization(self._linearize(x, **model_kwargs), curvature.kernel, self._dtype)

    # -- saving -------------------------------------------------------------------------------------------------------

    state_entries: ClassVar[Table] = {
        "n_subset": whole(1),
        "seed": whole(0),
        "independent_outputs": flag,
        "diagonal_hessian": flag,
        **FIT_ENTRIES,
        "loss": tensor((), low=0),  # nothing can be assigned by hand
        "n_data": whole(1),
    }
    _saved: ClassVar[tuple[str, ...]] = (
        *BaseFunctionalLaplace._saved,
        "n_subset",
        "seed",
        "independent_outputs",
        "diagonal_hessian",
    )

    @property
    def _curvature_entries(self) -> Table:
        if self._random_weights.of_head:
            return super()._curvature_entries
        return {**super()._curvature_entries, "kernel": nested(SubsetKernel.network_entries)}

    def _check_taken(self, known: Known) -> None:
        super()._check_taken(known)
        curvature = self._fitted.curvature
        assert isinstance(curvature, SubsetCurvature), "declared above"
        if not bool(torch.isfinite(curvature.root.square().sum())):
            msg = "The state is damaged: the squares of 'H'['root'] are not finite."
            raise StateError(msg)
        if not curvature.kernel.shares:
            if curvature.kernel.separates != (curvature.root.dim() == 2):
                msg = "The state is damaged: 'H'['root'] and 'H'['kernel']['separates'] do not go together."
                raise StateError(msg)
            if not self._known("load_state_dict").equals(self._fitted.mean):
                msg = (
                    "The kernel of the state is made of the network's derivatives at the weights of the fit, 'mean', "
                    "and the model has others. Give it those, or fit again."
                )
                raise StateError(msg)
            with evaluating(self.model), torch.no_grad():
                for x, (data, rows) in zip(curvature.kernel.batches, curvature.kernel.sizes, strict=True):
                    f = self._random_weights.outputs(x)
                    if f.numel() != data * rows * curvature.kernel.n_outputs or not bool(torch.isfinite(f).all()):
                        msg = "The state is damaged: at its inputs the model has other outputs than in the fit."
                        raise StateError(msg)

    def _curvature_from(self, state: Mapping[str, Any]) -> AbstractCurvature:
        return SubsetCurvature.from_state(state, self._dtype, self._derive)

    def _moved(self, curvature: AbstractCurvature) -> AbstractCurvature:
        assert isinstance(curvature, SubsetCurvature), "declared above"
        kernel = curvature.kernel
        if kernel.shares:
            return super()._moved(curvature)
        # Not by way of a state, which holds plain containers: the model is given what the loader yielded.
        old, new = kernel.dtype, self._dtype
        batches = tuple(in_precision(to_device(x, self._device), old, new) for x in kernel.batches)
        kernel = replace(kernel, batches=batches, dtype=new, linearize=self._derive, _kept={})
        return replace(curvature, kernel=kernel, root=curvature.root.to(self._device, new), _cache={})

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying take along: not what was made of the subset, which is made again."""
        state = super().__getstate__()
        fit = state.get("_fit")
        if fit is not None:
            state["_fit"] = replace(fit, curvature=replace(fit.curvature, _cache={}))
        return state


__all__ = ["FunctionalLaplace"]
