"""``ParametricLaplace``: sampling and prediction of a Gaussian over weights, by delegation to ``predictive/``.

What ``fit`` learns is in ``baselaplace/posterior.py``, saving in ``baselaplace/checkpoint.py``, tuning in
``baselaplace/tuned.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.baselaplace.options import check_model_keywords
from laplace.baselaplace.tuned import TunedPosterior
from laplace.enums import LinkApprox, PredType
from laplace.errors import UnsupportedError
from laplace.likelihoods.base import check_outputs
from laplace.network import evaluating, full_precision
from laplace.network.batches import require_rows
from laplace.predictive import Linearization, Options, compare, functional_samples, predict
from laplace.predictive.pushforward import output_moments, samples_of_moments
from laplace.types import Inputs


class ParametricLaplace(TunedPosterior):
    """A Gaussian posterior over weights, N(θ*, (s·H + P₀)⁻¹). See ``BaseLaplace`` for the parameters."""

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draw weights from the posterior, ``θ* + A^(−½) ε`` with standard normal ε; before ``fit`` from the prior.

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
            Before ``fit``, where the last layer is not known yet.
        InputError
            If ``n_samples`` is not positive, or the generator is on another device.

        Notes
        -----
        Exact for the structure. Time a draw: O(P²) dense, O(C D (C + D)) Kronecker, O(P) diagonal.
        """
        self._options(PredType.NN, n_samples=n_samples, generator=generator)
        with torch.no_grad():
            return self._mean + self._gaussian.sample(n_samples, generator)

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
        return self._gaussian.functional_variance(self._checked_jacobians(Js))

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
        return self._gaussian.functional_covariance(self._checked_jacobians(Js))

    def functional_variance_fast(self, X: Inputs) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
        """Outputs (logits, of a classifier) and their variances, without covariances and without a Jacobian.

        Parameters
        ----------
        X
            A batch of inputs.

        Returns
        -------
        Outputs and variances, ``[batch, *positions, C]`` each; output units and their square.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        InputError
            If the model's outputs are not finite.

        Notes
        -----
        Exact for the structure; the first call factorizes. For probabilities call the object.
        """
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(X)
            with full_precision(self._device):
                return inputs.f, inputs.restore(inputs.variance(posterior, self._dtype))

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
            If options do not exist or do not go together, or a keyword for the model is a misspelt option.
        InputError
            If a flag is neither ``True`` nor ``False``, or the model's outputs are not finite, or those of pairs have
            another shape.

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
        check_model_keywords(self._network, type(self).__call__, model_kwargs)
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(x, options.pred_type, **model_kwargs)
            inputs = compare(inputs) if options.fitting else inputs
            with full_precision(self._device):
                return predict(inputs, posterior, self._frozen_likelihood, options, self._dtype)

    def _checked_linearization(
        self, x: Inputs, pred_type: PredType = PredType.GLM, **model_kwargs: Any
    ) -> Linearization:
        """Outputs at inputs of a user: some, and finite."""
        require_rows(x)
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
        return self._functions(x, options)

    def _functions(self, x: Inputs, options: Options, **model_kwargs: Any) -> Float[Tensor, "samples batch ..."]:
        """Samples of the outputs."""
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(x, options.pred_type, **model_kwargs)
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

    # -- names that code written for laplace-torch calls --------------------------------------------------------------

    def _nn_functional_samples(
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Float[Tensor, "samples batch ..."]:
        """As ``functional_samples`` with ``pred_type="nn"``."""
        return self._functions(X, self._options(PredType.NN, n_samples=n_samples, generator=generator), **model_kwargs)

    def _nn_predictive_samples(
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Float[Tensor, "samples batch ..."]:
        """As ``predictive_samples`` with ``pred_type="nn"``."""
        samples = self._nn_functional_samples(X, n_samples, generator, **model_kwargs)
        return self._output_likelihood.expectation(samples)

    def _glm_predictive_distribution(
        self, X: Inputs, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs before any link and their covariances (variances with ``diagonal_output``), or the joint ones."""
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(X)
            with full_precision(self._device):
                return output_moments(inputs, posterior, self._dtype, joint, diagonal_output)

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the Gaussian over outputs that ``_glm_predictive_distribution`` returned."""
        options = self._options(PredType.GLM, n_samples=n_samples, generator=generator)
        return samples_of_moments(f_mu, f_var, options, diagonal_output)

    def _glm_predictive_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples batch ..."]:
        """The same after the link."""
        samples = self._glm_functional_samples(f_mu, f_var, n_samples, diagonal_output, generator)
        return self._output_likelihood.expectation(samples)
