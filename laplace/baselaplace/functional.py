"""``BaseFunctionalLaplace``: predictions of a posterior over functions (``hessian_structure="gp"``).

Subclasses say what they know of the outputs at some inputs (``_functions_at``) and of the posterior
(``_frozen_posterior``); predictions are delegated to ``predictive/``, as those of posteriors over weights are.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import checks
from laplace.baselaplace.checkpoint import Checkpointed
from laplace.baselaplace.options import check_model_keywords
from laplace.enums import LinkApprox, PredType, choose
from laplace.errors import UnsupportedError
from laplace.likelihoods.base import check_outputs
from laplace.likelihoods.draws import draw
from laplace.network import evaluating, full_precision
from laplace.network.batches import require_rows
from laplace.predictive import Linearization, Options, compare, functional_samples, predict
from laplace.structures import AbstractPrecision
from laplace.types import Inputs


class BaseFunctionalLaplace(Checkpointed):
    """A Gaussian process around the outputs of a network: the linearized network in function space.

    See ``BaseLaplace`` for the parameters.
    """

    @property
    @abstractmethod
    def _frozen_posterior(self) -> AbstractPrecision:
        """What the data say, on no graph and cached."""

    @abstractmethod
    def _functions_at(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        """Outputs at inputs, and what the posterior needs to know of them."""

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

    def _function_options(self, pred_type: PredType | str, *arguments: Any, **keywords: Any) -> Options:
        """How to predict, checked: of the process (``"gp"``), which is the linearized network (``"glm"``)."""
        kind = choose(PredType, pred_type, "pred_type")
        if kind is PredType.NN:
            msg = (
                'pred_type="nn" runs the network at sampled weights; a posterior over functions has none. Use "gp", or '
                'another hessian_structure than "gp".'
            )
            raise UnsupportedError(msg)
        return self._options(PredType.GLM, *arguments, **keywords)

    def _checked_functions(self, x: Inputs, options: Options, **model_kwargs: Any) -> Linearization:
        """At inputs of a user, whose outputs must be finite."""
        require_rows(x)
        inputs = self._functions_at(x, **model_kwargs)
        check_outputs(inputs.f)
        return compare(inputs) if options.fitting else inputs

    def __call__(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GP,
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
            ``"gp"``, or ``"glm"``, which is the same: a Gaussian over the outputs of the linearized network.
        joint
            Regression: covariance across inputs. Classification, with ``link_approx="mc"``: average over functions.
        link_approx
            From logits to probabilities: ``"probit"``, ``"mc"``, ``"bridge"`` or ``"bridge_norm"``.
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
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_functions(x, options, **model_kwargs)
            with full_precision(self._device):
                return predict(inputs, posterior, self._frozen_likelihood, options, self._dtype)

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
                return inputs.f, inputs.restore(inputs.covariance(posterior, self._dtype))

    def functional_samples(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
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
        joint, diagonal_output = checks.flag("joint", joint), checks.flag("diagonal_output", diagonal_output)
        if joint and diagonal_output:
            msg = "joint=True asks for covariances across inputs, diagonal_output=True for none: pass one of them."
            raise UnsupportedError(msg)
        options = self._function_options(
            pred_type, n_samples=n_samples, diagonal_output=diagonal_output, generator=generator
        )
        return self._samples(x, options, joint=joint)

    def _samples(self, x: Inputs, options: Options, *, joint: bool) -> Tensor:
        """Of outputs, or of the logits of pairs."""
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_functions(x, options)
            with full_precision(self._device):
                if joint or options.diagonal_output:
                    return functional_samples(inputs, posterior, options, self._dtype)
                covariance = inputs.covariance(posterior, self._dtype)
                parts = draw(inputs.mean(self._dtype), covariance, options.n_samples, options.generator)
                return torch.cat([inputs.restore(part, 1) for part in parts])

    def predictive_samples(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
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
            samples = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator, joint)
            return self._output_likelihood.expectation(samples)
        options = self._function_options(
            pred_type, n_samples=n_samples, diagonal_output=diagonal_output, generator=generator, fitting=True
        )
        joint = checks.flag("joint", joint)
        return (self._samples(x, options, joint=joint) / self.output_temperature).softmax(-1)


__all__ = ["BaseFunctionalLaplace"]
