"""``BaseFunctionalLaplace``: predictions of a posterior over functions (``hessian_structure="gp"``).

Subclasses say what they know of the outputs at some inputs (``_functions_at``) and of the posterior
(``_frozen_posterior``); predictions are delegated to ``predictive/``, as those of posteriors over weights are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self, Unpack

from laplace import checks, pending
from laplace.baselaplace import calling
from laplace.baselaplace.adjustments import Adjustments
from laplace.baselaplace.described import described
from laplace.baselaplace.fitted import FittedLaplace
from laplace.baselaplace.keywords import FurtherKeywords, LossLike
from laplace.baselaplace.options import check_model_keywords
from laplace.curvature import CurvatureInterface
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import UnsupportedError
from laplace.free_memory import explained_predictions
from laplace.likelihoods import L_co
from laplace.likelihoods.base import check_outputs
from laplace.likelihoods.draws import draw
from laplace.network import evaluating, full_precision
from laplace.network.batches import require_rows
from laplace.predictive import Linearization, Options, compare, functional_samples, predict
from laplace.prior import GaussianPrior
from laplace.structures import AbstractPrecision
from laplace.types import Inputs, LinkApproxLike, ModelKeyword, PredTypeLike, PriorStructureLike, TuningMethodLike


@described
class BaseFunctionalLaplace(FittedLaplace[L_co]):
    """A Gaussian process around the outputs of a network: the linearized network in function space.

    Parameters
    ----------
    prior_precision
        Precision of the isotropic Gaussian prior, in 1/weight²: one number.
    backend
        Class that computes derivatives, for a generalized Gauss–Newton matrix; ``AutogradGGN`` when ``None``. Of an
        object its class and options are taken.
    """

    _adjustments: ClassVar[Adjustments] = Adjustments()
    """None: predictions are the posterior's."""

    @abstractmethod
    def _functions_at(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        """Outputs at inputs, and what the posterior needs to know of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute; weights and curvature cannot be assigned (``UnsupportedError``)."""
        if name in ("mean", "H"):
            msg = (
                f"{type(self).__name__} is made of data, and its {name} cannot be assigned: call fit(train_loader). "
                "Posteriors over weights (hessian_structure='full', 'diag', 'kron', ...) take one."
            )
            raise UnsupportedError(msg)
        super().__setattr__(name, value)

    def _check_backend(self, backend: CurvatureInterface) -> None:
        if backend.matrix != "GGN":
            msg = (
                f"A Gaussian process is the posterior of a generalized Gauss-Newton matrix; {type(backend).__name__} "
                f"computes an {backend.matrix}. Pass a GGN back end, or backend=None."
            )
            raise UnsupportedError(msg)
        if backend.leading is not None:
            msg = (
                f"{type(self).__name__} takes exact Hessians in the outputs, which cost it no backward pass for each "
                "column: leave columns out of backend_kwargs. Posteriors over weights (hessian_structure='diag', "
                "'kron', 'full', ...) take it."
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
                'prior_precision must be one number and prior_structure must be "scalar"; got '
                f"{prior.precision.numel()}. Others take hessian_structure='diag', 'kron' or 'full'."
            )
            raise UnsupportedError(msg)

    def sample(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:  # noqa: ARG002
        """Not available: the posterior is one over functions; draw those with ``functional_samples``.

        Parameters
        ----------
        n_samples, generator
            Unused.

        Raises
        ------
        UnsupportedError
            Always.
        """
        msg = (
            f"{type(self).__name__} is a posterior over functions and has no weights to draw. Draw functions with "
            "functional_samples(x, joint=True)."
        )
        raise UnsupportedError(msg)

    def _function_options(self, pred_type: PredTypeLike, *arguments: Any, **keywords: Any) -> Options:
        """How to predict, checked: of the process (``"gp"``), which is the linearized network (``"glm"``)."""
        kind = choose(PredType, pred_type, "pred_type")
        if kind is PredType.NN:
            msg = (
                'pred_type="nn" runs the network at sampled weights; a posterior over functions has none. Use "gp", or '
                'another hessian_structure than "gp".'
            )
            raise UnsupportedError(msg)
        return self._options(PredType.GLM, *arguments, **keywords)

    @property
    def _predicting_posterior(self) -> AbstractPrecision:
        """The posterior: its variance is always used."""
        return self._frozen_posterior

    def _adjusted(self, inputs: Linearization) -> Linearization:
        """Inputs as predictions see them: as they are."""
        return inputs

    def _checked_linearization(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        """At inputs of a user."""
        return self._checked_functions(x, Options(), **model_kwargs)

    def _checked_functions(self, x: Inputs, options: Options, **model_kwargs: Any) -> Linearization:
        """At inputs of a user, whose outputs must be finite."""
        require_rows(x)
        inputs = self._functions_at(x, **model_kwargs)
        check_outputs(inputs.f)
        return compare(inputs) if options.fitting else inputs

    @calling.typed
    @pending.gathers
    def __call__(
        self: Self,  # annotated: from its cache mypy would otherwise take the first overload
        x: Inputs,
        pred_type: PredTypeLike = PredType.GP,
        joint: bool = False,
        link_approx: LinkApproxLike = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: ModelKeyword,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict at a batch of inputs.

        Parameters
        ----------
        x
            A batch of inputs: a tensor or any nesting of tensors.
        pred_type
            ``"gp"``, or ``"glm"``, which is the same: a Gaussian over the outputs of the linearized network.
        joint
            Regression: covariance across inputs. Classification, with ``link_approx="mc"``: average over functions.
        link_approx
            From logits to probabilities: ``"probit"``, ``"mf1"``, ``"mf2"``, ``"mc"``, ``"bridge"``, ``"bridge_norm"``.
        n_samples
            For ``"mc"``.
        diagonal_output
            Use and return variances instead of covariances.
        generator
            Source of randomness, on the model's device.
        fitting
            Reward modeling: ``x`` are pairs, ``[batch, 2, ...]``; predict which item is preferred. Others raise.
        **model_kwargs
            Passed to the model's ``forward``.

        Returns
        -------
        As in ``ParametricLaplace.__call__``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together.
        InputError
            If the model's outputs are not finite.
        """
        options = self._function_options(pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting)
        check_model_keywords(self._network, type(self).__call__, model_kwargs)
        with explained_predictions(), evaluating(self.model, enable_backprop=self.enable_backprop):
            posterior = self._frozen_posterior
            inputs = self._checked_functions(x, options, **model_kwargs)
            with full_precision(self._device):
                found = predict(inputs, posterior, likelihood := self._frozen_likelihood, options, self._dtype)
        found = self._compared(inputs.f, found, likelihood) if self._is_untuned else found
        return self._reading.returned(found)

    @pending.gathers
    def predictive_moments(self, x: Inputs, *, joint: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs, before any link and without observation noise.

        Parameters
        ----------
        x
            A batch of inputs.
        joint
            Across inputs as well.

        Returns
        -------
        Mean ``[batch, *positions, C]`` and covariance ``[batch, *positions, C, C]``; with ``joint`` ``[batch·C]`` and
        ``[batch·C, batch·C]``, input by input. Output units and their square.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        InputError
            If the model's outputs are not finite.
        """
        joint, posterior = checks.flag("joint", joint), self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_functions(x, Options())
            with full_precision(self._device):
                if joint:
                    covariance = inputs.joint_covariance(posterior, self._dtype)
                    return inputs.f.flatten(), covariance.to(inputs.f.dtype)
                covariance = inputs.restore(inputs.covariance(posterior, self._dtype))
                return self._reading.returned((inputs.f, covariance))

    def functional_samples(
        self,
        x: Inputs,
        pred_type: PredTypeLike = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        joint: bool = False,
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the outputs, before any link, ``[n_samples, batch, *positions, C]``.

        Parameters
        ----------
        x
            A batch of inputs.
        pred_type
            ``"gp"`` or ``"glm"``, which are the same.
        n_samples
            How many.
        diagonal_output
            Draw each output from its own marginal: without correlations.
        generator
            Source of randomness, on the model's device.
        joint
            Draw whole functions, with their covariance across inputs. Else only the distribution of each input is
            right: all inputs of a draw share their random numbers, which makes smooth curves of it.

        Returns
        -------
        In output units, without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together.
        InputError
            If the model's outputs are not finite.

        Notes
        -----
        ``joint`` may need a matrix ``[batch·C, batch·C]`` and its root.
        """
        return self._reading.returned(self._drawn(x, pred_type, n_samples, diagonal_output, generator, joint), 1)

    def _drawn(
        self, x: Inputs, pred_type: Any, n_samples: Any, diagonal_output: Any, generator: Any, joint: Any
    ) -> Tensor:
        """Samples of the outputs with C last; options are checked."""
        joint, diagonal_output = checks.flag("joint", joint), checks.flag("diagonal_output", diagonal_output)
        if joint and diagonal_output:
            msg = "joint=True asks for covariances across inputs, diagonal_output=True for none: pass one of them."
            raise UnsupportedError(msg)
        options = self._function_options(
            pred_type, n_samples=n_samples, diagonal_output=diagonal_output, generator=generator
        )
        return self._samples(x, options, joint=joint)

    def _samples(self, x: Inputs, options: Options, *, joint: bool) -> Tensor:
        """Samples of outputs, or of the logits of pairs."""
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_functions(x, options)
            with full_precision(self._device):
                if joint or options.diagonal_output:
                    return functional_samples(inputs, posterior, options, self._dtype)
                return self._samples_at(inputs, posterior, options)

    def _samples_at(self, inputs: Linearization, posterior: AbstractPrecision, options: Options) -> Tensor:
        """Samples of the outputs of each input."""
        covariance = inputs.covariance(posterior, self._dtype)
        parts = draw(inputs.mean(self._dtype), covariance, options.n_samples, options.generator)
        return torch.cat([inputs.restore(part, 1) for part in parts])

    def predictive_samples(
        self,
        x: Inputs,
        pred_type: PredTypeLike = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        joint: bool = False,
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the predictions: ``functional_samples`` after the link (class probabilities; regression: means).

        Parameters
        ----------
        x, pred_type, n_samples, diagonal_output, generator, joint
            As in ``functional_samples``.
        fitting
            Reward modeling: ``x`` are pairs; sample the probabilities of preferences.

        Returns
        -------
        ``[n_samples, batch, *positions, C]``; of pairs ``[n_samples, batch, 2]``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together.
        """
        if not checks.flag("fitting", fitting):
            samples = self._drawn(x, pred_type, n_samples, diagonal_output, generator, joint)
            return self._reading.returned(self._output_likelihood.expectation(samples), 1)
        options = self._function_options(
            pred_type, n_samples=n_samples, diagonal_output=diagonal_output, generator=generator, fitting=True
        )
        joint = checks.flag("joint", joint)
        return (self._samples(x, options, joint=joint) / self.output_temperature).softmax(-1)

    # -- tuning -------------------------------------------------------------------------------------------------------

    def optimize_prior_precision(
        self,
        pred_type: PredTypeLike = PredType.GP,
        method: TuningMethodLike = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructureLike = PriorStructure.SCALAR,
        val_loader: Iterable[Any] | None = None,
        loss: LossLike | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApproxLike = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        **further: Unpack[FurtherKeywords],
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
        ours = checks.options_of(FittedLaplace.optimize_prior_precision)
        checks.known_options("optimize_prior_precision", further, ours)
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

    def _checked_method(self, method: Any) -> TuningMethod:
        how = super()._checked_method(method)
        if how not in (TuningMethod.MARGLIK, TuningMethod.GRIDSEARCH):
            msg = (
                f"method={how.value!r} leaves out training data, of which this posterior knows a subset. Use "
                "method='marglik', or validation data (method='gridsearch')."
            )
            raise UnsupportedError(msg)
        return how

    def _tuning_options(
        self, pred_type: PredTypeLike, link_approx: LinkApproxLike, n_samples: int, generator: Any
    ) -> Options:
        return self._function_options(pred_type, False, link_approx, n_samples, generator=generator, for_targets=True)

    def _for_tuning(self, pred_type: PredType, x: Inputs) -> Linearization:  # noqa: ARG002
        return self._functions_at(x)


__all__ = ["BaseFunctionalLaplace"]
