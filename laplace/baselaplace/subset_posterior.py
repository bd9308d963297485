"""``SubsetPosterior``: what ``fit`` learns of a subset of the data, how it is tuned and saved, by ``gp/``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace import checks, tuning
from laplace.baselaplace.functional import BaseFunctionalLaplace
from laplace.baselaplace.tunable import chosen_method
from laplace.baselaplace.tuned import TunedPosterior
from laplace.curvature import CurvatureInterface
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from laplace.errors import InputError, StateError, UnsupportedError
from laplace.gp.network_kernel import NetworkKernel
from laplace.gp.process import ProcessLinearization
from laplace.gp.subset import Subset, expected_rows
from laplace.gp.subset_curvature import SubsetCurvature
from laplace.network import Batch, evaluating
from laplace.network.batches import in_precision, to_device
from laplace.predictive import Linearization, Options
from laplace.prior import GaussianPrior
from laplace.schema import Known, Table, flag, nested, tensor, whole
from laplace.structures import AbstractCurvature
from laplace.types import Inputs


class SubsetPosterior(TunedPosterior, BaseFunctionalLaplace):
    """A posterior of some of the data, over functions. See ``FunctionalLaplace`` for the parameters."""

    curvature_type: ClassVar[type[AbstractCurvature]] = SubsetCurvature

    n_subset: int
    seed: int
    independent_outputs: bool
    diagonal_hessian: bool

    # -- fit ----------------------------------------------------------------------------------------------------------

    def fit(self, train_loader: Iterable[Any], progress_bar: bool = False) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Choose the subset, and learn what its kernel is made of.

        Parameters
        ----------
        train_loader
            Yields ``(x, y)``, ``(x1, …, xk, y)`` or mappings: a ``DataLoader``, a list, any iterable of batches. One
            that has no length needs memory for all data until the subset is drawn.
        progress_bar
            Show a progress bar.

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
        The model is left as it was found. When something is raised, so is this object.
        """
        super().fit(train_loader, True, progress_bar)

    def _accumulate(
        self, train_loader: Iterable[Any], batches: Iterable[Batch]
    ) -> tuple[Tensor, AbstractCurvature] | None:
        subset = Subset(
            self.n_subset,
            self.seed,
            expected_rows(train_loader, self.dict_key_y),
            diagonal=self.diagonal_hessian,
            independent=self.independent_outputs,
            linearize=self._derive,
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
        if fit is not None and not self._known_parameters("a prediction").equals(fit.mean):
            msg = (
                "The kernel of the subset is made of the network's derivatives when it is first used, and the weights "
                "have changed since fit. Fit again, or make a prediction before the weights change."
            )
            raise InputError(msg)
        with evaluating(self.model), torch.no_grad():
            return self._linearize(x)

    def _check_backend(self, backend: CurvatureInterface) -> None:
        if backend.matrix != "GGN":
            msg = (
                f"A Gaussian process is the posterior of a generalized Gauss-Newton matrix; {type(backend).__name__} "
                f"computes an {backend.matrix}. Pass a GGN back end, or backend=None."
            )
            raise UnsupportedError(msg)

    def _checked_prior_precision(self, value: Any) -> Tensor:
        precision = super()._checked_prior_precision(value)
        self._fits_structure(GaussianPrior(precision.new_zeros(()), precision, (precision.numel(),)))
        return precision

    def _fits_structure(self, prior: GaussianPrior) -> None:
        if prior.precision.numel() > 1:
            msg = (
                f"{type(self).__name__} has an isotropic prior over the weights, so that its kernel scales with it: "
                f"prior_precision must be one number; got {prior.precision.numel()}. Others take hessian_structure="
                "'diag', 'kron' or 'full'."
            )
            raise UnsupportedError(msg)

    def _functions_at(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        curvature = self._fitted.curvature
        assert isinstance(curvature, SubsetCurvature), "declared above"
        return ProcessLinearization(self._linearize(x, **model_kwargs), curvature.kernel, self._dtype)

    # -- tuning -------------------------------------------------------------------------------------------------------

    def _tuning_options(
        self,
        pred_type: PredType | str,
        link_approx: LinkApprox | str,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> Options:
        return self._function_options(pred_type, False, link_approx, n_samples, generator=generator, for_targets=True)

    def _for_tuning(self, pred_type: PredType, x: Inputs) -> Linearization:  # noqa: ARG002
        with evaluating(self.model):
            return self._functions_at(x)

    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GP,
        method: TuningMethod | str = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        val_loader: Iterable[Any] | None = None,
        loss: str | tuning.Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        **further: Any,
    ) -> None:
        """Choose the prior precision, by evidence or by validation over a grid, and assign it.

        Parameters
        ----------
        pred_type
            ``"gp"`` or ``"glm"``: the same.
        prior_structure
            ``"scalar"``; others raise.
        method, n_steps, lr, init_prior_prec, val_loader, loss, log_prior_prec_min, log_prior_prec_max, grid_size
            As in ``ParametricLaplace.optimize_prior_precision``.
        link_approx, n_samples, verbose, progress_bar, log_prior_prec_base
            As there.
        **further
            The keyword arguments that follow there: ``generator``, ``noise``, ``bounds``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If names are unknown, the prior structure is not ``"scalar"``, or the method leaves out training data.
        InputError
            If validation data are missing or empty, the grid is no grid, or the objective is finite nowhere.

        Notes
        -----
        One eigendecomposition of the Gram matrix of the subset serves all precisions. Evidence then takes O(M C) a
        step, a grid one pass over the validation data and products with their kernels.
        """
        ours = checks.options_of(TunedPosterior.optimize_prior_precision)
        checks.known_options("optimize_prior_precision", further, ours)
        how = chosen_method(method)
        if how not in (TuningMethod.MARGLIK, TuningMethod.GRIDSEARCH):
            msg = (
                f"method={how.value!r} leaves out training data, of which this posterior knows a subset. Use "
                "method='marglik', or validation data (method='gridsearch')."
            )
            raise UnsupportedError(msg)
        super().optimize_prior_precision(
            pred_type,
            method,
            n_steps,
            lr,
            init_prior_prec,
            prior_structure,
            val_loader,
            loss,
            log_prior_prec_min,
            log_prior_prec_max,
            grid_size,
            link_approx,
            n_samples,
            verbose,
            progress_bar,
            log_prior_prec_base,
            **further,
        )

    # -- saving -------------------------------------------------------------------------------------------------------

    state_entries: ClassVar[Table] = {
        "n_subset": whole(1),
        "seed": whole(0),
        "independent_outputs": flag,
        "diagonal_hessian": flag,
        "loss": tensor((), low=0),  # nothing can be assigned by hand
        "n_data": whole(1),
    }

    @property
    def _curvature_entries(self) -> Table:
        if self._last_layer:
            return super()._curvature_entries
        return {**super()._curvature_entries, "kernel": nested(NetworkKernel.entries)}

    def _check_taken(self, known: Known) -> None:
        super()._check_taken(known)
        curvature = self._fitted.curvature
        assert isinstance(curvature, SubsetCurvature), "declared above"
        if not bool(torch.isfinite(curvature.root.square().sum())):
            msg = "The state is damaged: the squares of 'H'['root'] are not finite."
            raise StateError(msg)
        if isinstance(curvature.kernel, NetworkKernel):
            if curvature.kernel.separates != (curvature.root.dim() == 2):
                msg = "The state is damaged: 'H'['root'] and 'H'['kernel']['separates'] do not go together."
                raise StateError(msg)
            if not self._known_parameters("load_state_dict").equals(self._fitted.mean):
                msg = (
                    "The kernel of the state is made of the network's derivatives at the weights of the fit, 'mean', "
                    "and the model has others. Give it those, or fit again."
                )
                raise StateError(msg)
            with evaluating(self.model), torch.no_grad():
                for x, (data, rows) in zip(curvature.kernel.batches, curvature.kernel.sizes, strict=True):
                    f = self._whole(x)
                    if f.numel() != data * rows * curvature.kernel.width or not bool(torch.isfinite(f).all()):
                        msg = "The state is damaged: at its inputs the model has other outputs than in the fit."
                        raise StateError(msg)

    def _choices(self) -> dict[str, Any]:
        own = ("n_subset", "seed", "independent_outputs", "diagonal_hessian")
        return {**super()._choices(), **{name: getattr(self, name) for name in own}}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.n_subset, self.seed = int(state["n_subset"]), int(state["seed"])
        for name in ("independent_outputs", "diagonal_hessian"):
            setattr(self, name, checks.flag(name, state[name]))

    def _curvature_from(self, state: Mapping[str, Any]) -> AbstractCurvature:
        if self._last_layer:
            return super()._curvature_from(state)
        kernel = NetworkKernel.from_state(state["kernel"], self._dtype, self._derive)
        return SubsetCurvature(kernel, state["root"].to(self._dtype), float(state["ratio"]))

    def _moved(self, curvature: AbstractCurvature) -> AbstractCurvature:
        assert isinstance(curvature, SubsetCurvature), "declared above"
        kernel = curvature.kernel
        if not isinstance(kernel, NetworkKernel):
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


__all__ = ["SubsetPosterior"]
