"""``ParametricLaplace``: sampling, prediction and tuning of a Gaussian over weights.

Predictions are delegated to ``predictive/``, tuning to ``tuning/``; what ``fit`` learns is in
``baselaplace/posterior.py``, saving in ``baselaplace/checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg, tuning
from laplace.baselaplace.checkpoint import CheckpointedPosterior
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods.base import check_outputs
from laplace.network import evaluating, full_precision, iterate
from laplace.network.parameters import expand_groups
from laplace.predictive import Linearization, compare, functional_samples, predict
from laplace.prior import GaussianPrior, fix_prior_prec_structure
from laplace.types import Inputs


class ParametricLaplace(CheckpointedPosterior):
    """A Gaussian posterior over weights, N(θ*, (s·H + P₀)⁻¹). See ``BaseLaplace`` for the parameters."""

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draw weights from the posterior, ``θ* + A^(−½) ε`` with standard normal ε.

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
        InputError
            If ``n_samples`` is not positive, or the generator is on another device.

        Notes
        -----
        Exact for the structure. Time a draw: O(P²) dense, O(C D (C + D)) Kronecker, O(P) diagonal.
        """
        self._options(PredType.NN, n_samples=n_samples, generator=generator)
        with torch.no_grad():
            return self._fitted.mean + self._frozen_posterior.sample(n_samples, generator)

    def functional_variance(self, Js: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """Covariance of the linearized outputs at each input, ``J Σ Jᵀ``, in output units squared.

        Parameters
        ----------
        Js
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        ``[batch, outputs, outputs]``; observation noise is not included.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.

        Notes
        -----
        The Jacobian dominates time and memory; calling the object never builds it.
        """
        return self._frozen_posterior.functional_variance(Js)

    def functional_covariance(self, Js: Tensor) -> Float[Tensor, "joint joint"]:
        """Covariance of the linearized outputs across inputs, ``[batch·outputs, batch·outputs]``.

        Parameters
        ----------
        Js
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        In output units squared, input by input; observation noise is not included.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.

        Notes
        -----
        Memory O((batch · outputs)²) beside the Jacobians.
        """
        return self._frozen_posterior.functional_covariance(Js)

    # -- prediction ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        joint: bool = False,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict at a batch of inputs.

        Parameters
        ----------
        x
            A batch of inputs: a tensor or any nesting of tensors.
        pred_type
            ``"glm"``: a Gaussian over the outputs of the linearized network, in closed form. ``"nn"``: the network at
            sampled weights, averaged (after the link: ``link_approx`` is not used).
        joint
            Regression: covariance across inputs. Classification, with ``link_approx="mc"``: average over functions.
        link_approx
            From logits to probabilities: ``"probit"``, ``"mc"``, ``"bridge"`` or ``"bridge_norm"``.
        n_samples
            For ``"mc"`` and ``"nn"``.
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
        Classification: probabilities ``[batch, *positions, C]``; of pairs, with ``fitting``, ``[batch, 2]``. Regression
        and scores (C = 1): mean ``[batch, *positions, C]`` and covariance ``[…, C, C]``, or variance ``[…, C]`` with
        ``diagonal_output`` or ``"nn"``, or ``[batch·C]`` and ``[batch·C, batch·C]`` with ``joint``; in target units,
        without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together.
        InputError
            If the model's outputs are not finite, or those of pairs have another shape.

        Notes
        -----
        Mean and covariance of the outputs are ``f*`` and ``J A⁻¹ Jᵀ``, A the posterior precision: exact for a last
        layer, else for the linearized network. Regression returns them; links approximate the average softmax (``"mc"``
        converges to it). One forward pass (all weights: and a backward pass an output). Then, for B inputs of a last
        layer, variances take O(B (D² + D C + C²)) with the Kronecker structure, O(B C D) diagonal, O(B C D²) full, and
        memory O(B C D) at most; covariances at most another factor C. The first call factorizes.

        References
        ----------
        Immer, Korzepa & Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization".
        arXiv:2008.08400
        """
        options = self._options(pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting)
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(x, options.pred_type, **model_kwargs)
            inputs = compare(inputs) if options.fitting else inputs
            with full_precision(self._device):
                return predict(inputs, posterior, self._frozen_likelihood, options, self._dtype)

    def _checked_linearization(
        self, x: Inputs, pred_type: PredType = PredType.GLM, **model_kwargs: Any
    ) -> Linearization:
        """Outputs at inputs of a user, which must be finite."""
        inputs = self._linearize(x, pred_type, **model_kwargs)
        check_outputs(inputs.f)
        return inputs

    def functional_samples(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the outputs (before any link), ``[n_samples, batch, *positions, C]``.

        Whole functions, coherent over the inputs of a call. For a linear last layer ``"glm"`` and ``"nn"`` have the
        same distribution.

        Parameters
        ----------
        x
            A batch of inputs.
        pred_type
            ``"glm"`` or ``"nn"``.
        n_samples
            How many.
        diagonal_output
            Draw each output from its own marginal instead (``"glm"``): cheaper, without correlations.
        generator
            Source of randomness, on the model's device.

        Returns
        -------
        In output units; without observation noise.

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
        Exact for the structure. Time O(n_samples · batch · C · D) beside the draws of the weights.
        """
        options = self._options(pred_type, n_samples=n_samples, diagonal_output=diagonal_output, generator=generator)
        if options.diagonal_output and options.pred_type is PredType.NN:
            msg = 'diagonal_output=True draws from marginals of the linearized outputs: it needs pred_type="glm".'
            raise UnsupportedError(msg)
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(x, options.pred_type)
            with full_precision(self._device):
                return functional_samples(inputs, posterior, options, self._dtype)

    def predictive_samples(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the predictions: ``functional_samples`` after the link (class probabilities; regression: means).

        Parameters
        ----------
        x, pred_type, n_samples, diagonal_output, generator
            As in ``functional_samples``.

        Returns
        -------
        ``[n_samples, batch, *positions, C]``: probabilities, or means in target units without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together.
        """
        samples = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return self._output_likelihood.expectation(samples)

    def _tuned(self, pred_type: PredType, x: Inputs) -> Linearization:
        """Validation inputs, linearized with the model in evaluation mode."""
        with evaluating(self.model):
            return self._linearize(x, pred_type)

    # -- tuning -------------------------------------------------------------------------------------------------------

    @linalg.lasting
    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GLM,
        method: TuningMethod | str = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        val_loader: Iterable[Any] | None = None,
        loss: tuning.Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Choose the prior precision and assign it.

        Parameters
        ----------
        pred_type, link_approx, n_samples
            How the validation predictions are made (``"gridsearch"``).
        method
            ``"marglik"``: gradient ascent on the log marginal likelihood. ``"gridsearch"``: loss on validation data.
        n_steps, lr
            Adam steps on log precisions, and their learning rate (``"marglik"``).
        init_prior_prec
            Where to start (``"marglik"``): a scalar, or one value a precision.
        prior_structure
            ``"scalar"``, ``"layerwise"`` (a parameter group each) or ``"diag"`` (a weight each).
        val_loader
            Validation batches (``"gridsearch"``).
        loss
            ``loss(probabilities, targets)``, for regression ``loss(means, covariances, targets)``, to minimize; the
            mean negative log predictive density (noise included) when ``None``.
        log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base
            The grid: ``base^min … base^max``, evenly spaced in the exponent.
        generator
            Source of randomness of sampled predictions (``"gridsearch"``), on the model's device. Every point of the
            grid sees the same random numbers.
        verbose
            Print the result in one line.
        progress_bar
            Show a progress bar.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If names are unknown, or the structure takes no such prior.
        InputError
            If validation data are missing or empty, the grid is no grid, or the objective is finite nowhere.

        Notes
        -----
        When something is raised the prior precision is what it was. Grid search runs the model over the validation data
        once; each point then costs matrix products.
        """
        how = choose(TuningMethod, method, "method")
        structure = choose(PriorStructure, prior_structure, "prior_structure")
        pairs = self._output_likelihood.n_items > 1
        options = self._options(pred_type, False, link_approx, n_samples, generator=generator, fitting=pairs)
        fit, sizes = self._fitted, self._prior.sizes

        def spread(precision: Tensor) -> Tensor:
            """Precisions in the shape of the prior structure."""
            if structure is PriorStructure.DIAG and precision.numel() == len(sizes):
                precision = expand_groups(precision.reshape(-1), sizes)
            return fix_prior_prec_structure(precision, structure, len(sizes), sum(sizes), self._device, self._dtype)

        def prior(precision: Tensor) -> GaussianPrior:
            return GaussianPrior(self._prior_mean.detach(), precision, sizes)

        if how is TuningMethod.MARGLIK:
            start = spread(self._checked("init_prior_prec", init_prior_prec, positive=True))
            self._fits_structure(prior(start))
            likelihood, kind, choices = self._frozen_likelihood, self.backend.kind, self._posterior_options()
            best, value = tuning.optimize(
                lambda precision: tuning.log_marginal_likelihood(fit, prior(precision), likelihood, kind, **choices),
                start,
                n_steps=n_steps,
                lr=lr,
                progress_bar=progress_bar,
            )
            result = f"log marginal likelihood {value:.4f}"
        else:
            if val_loader is None:
                msg = 'method="gridsearch" scores prior precisions on validation data: pass val_loader=.'
                raise InputError(msg)
            grid = tuning.log_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
            grid = grid.to(self._device, self._dtype)
            self._fits_structure(prior(spread(grid[0])))
            likelihood, dtype = self._frozen_likelihood, self._dtype
            with evaluating(self.model):
                batches = iterate(val_loader, dict_key_y=self.dict_key_y, device=self._device)
                data = tuning.Validation.collect(batches, partial(self._tuned, options.pred_type), likelihood)
            with torch.inference_mode(False), torch.no_grad(), full_precision(self._device):
                curvature = fit.curvature * likelihood.curvature_scale(self.backend.kind)
                draws = torch.randint(2**62, (), generator=generator, device=self._device)

                def score(point: Tensor) -> float:
                    # The same random numbers at each point: the loss is then a smooth function of the prior.
                    same = torch.Generator(self._device).manual_seed(int(draws))
                    posterior = curvature.posterior(prior(point.reshape(1)), **self._posterior_options())
                    return data.score(posterior, likelihood, replace(options, generator=same), loss, dtype)

                point, scores = tuning.search(score, grid, progress_bar=progress_bar)
            best = spread(point)
            result = f"validation loss {float(scores[torch.isfinite(scores)].min()):.4f}"
        self.prior_precision = best.detach()
        if verbose:
            shown = ", ".join(f"{float(p):.4g}" for p in best[:5]) + (", …" if len(best) > 5 else "")
            print(f"Optimized prior precision: {shown} ({result})")
