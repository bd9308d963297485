"""``VaLLA`` and ``LLVaLLA``: variational inducing points (``functional_approximation="variational"``)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from laplace import checks
from laplace.baselaplace.inducing import checked_classes, count_inducing
from laplace.baselaplace.last_layer import LastLayer, as_extractor
from laplace.baselaplace.variational import VariationalPosterior
from laplace.curvature import CurvatureInterface
from laplace.enums import FeatureReduction, Likelihood
from laplace.errors import InputError, UnsupportedError
from laplace.network.batches import copied
from laplace.types import Inputs


class VaLLA(VariationalPosterior):
    """Variational linearized Laplace: a sparse Gaussian process around the outputs, with M inducing points.

    Parameters
    ----------
    model, likelihood
        As in ``BaseLaplace``.
    inducing_locations
        Inputs of the inducing points, a batch of M; or ``"random"`` or ``"kmeans"``: chosen from the training data (the
        second are cluster centers of inputs that are one floating-point tensor).
    num_inducing
        M; needed when locations are chosen, else it must be their number.
    inducing_classes
        Output of each inducing point, ``[M]`` (with several positions: index of the flattened outputs); dealt in turn
        when ``None``.
    sigma_noise, prior_precision
        Where training starts; the prior precision is one number.
    temperature
        As in ``BaseLaplace``; once fitted, another one needs a new object.
    prior_mean, enable_backprop, dict_key_x, dict_key_y, backend, backend_kwargs
        As in ``BaseLaplace``.
    seed
        Of chosen locations, and of ``mc_softmax_samples``.
    alpha
        Which divergence is minimized, in [0, 1]: 0 is that of variational inference, whose negative objective bounds
        the evidence from below; 1 fits the predictive density.
    mc_softmax_samples
        Samples of the logits in the objective of a classifier; 0 is a closed form (``gp/energy.py``).
    curvature_dtype
        As in ``BaseLaplace``.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive, ``alpha`` is not in [0, 1], or locations, their number and
        classes do not fit.

    Notes
    -----
    The mean is the network; away from inducing points the posterior is the prior. Inducing inputs stay where they are,
    so that kernels with the data are computed once. With all outputs of all data as inducing points, α = 0 and a
    Gaussian likelihood it is the posterior of ``FullLaplace``.

    References
    ----------
    Ortega, Rodríguez Santana & Hernández-Lobato (2024), "Variational linearized Laplace approximation for Bayesian deep
    learning". arXiv:2302.12565
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        inducing_locations: Inputs,
        num_inducing: int | None = None,
        inducing_classes: Tensor | Sequence[int] | None = None,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        alpha: float = 1.0,
        mc_softmax_samples: int = 0,
        *,
        curvature_dtype: torch.dtype | None = None,
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
        )
        self._check_kind()
        self.num_inducing = count_inducing(inducing_locations, num_inducing)
        self._asked_locations = copied(inducing_locations)
        self._asked_classes = checked_classes(inducing_classes, self.num_inducing)
        self.seed = checks.whole("seed", seed, 0)
        if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha <= 1:
            msg = f"alpha must lie in [0, 1]: 0 is variational inference, 1 fits the predictive density; got {alpha!r}."
            raise InputError(msg)
        self.alpha = float(alpha)
        self.mc_softmax_samples = checks.whole("mc_softmax_samples", mc_softmax_samples, 0)
        if mc_softmax_samples:
            self._unit_likelihood.check_sampled_energy()

    def log_marginal_likelihood(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Not available: what is trained is a bound or a divergence, and is found in ``fit_history_["objective"]``.

        Parameters
        ----------
        *args, **kwargs
            Unused.

        Raises
        ------
        UnsupportedError
            Always.
        """
        msg = (
            'The objective of VaLLA is fit_history_["objective"]; with alpha=0 its negative is a lower bound of the '
            "log evidence. For the Laplace evidence use another hessian_structure, or ELLA."
        )
        raise UnsupportedError(msg)

    def optimize_prior_precision(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Not available: ``fit`` trains the prior precision together with what the data say.

        Parameters
        ----------
        *args, **kwargs
            Unused.

        Raises
        ------
        UnsupportedError
            Always.
        """
        msg = (
            "VaLLA trains its prior precision in fit(train_loader, iterations=…, lr=…): what was trained at the "
            "inducing points belongs to it. Go on with fit(…, override=False), or assign la.prior_precision."
        )
        raise UnsupportedError(msg)


class LLVaLLA(LastLayer, VaLLA):
    """VaLLA of a last layer: from features alone, without a Jacobian and without a backward pass.

    Parameters
    ----------
    model, likelihood, inducing_locations, num_inducing, inducing_classes, sigma_noise, prior_precision, prior_mean
        As in ``VaLLA``.
    temperature, enable_backprop, feature_reduction, dict_key_x, dict_key_y, last_layer_name
        As in ``LLLaplace``.
    backend, backend_kwargs, seed, alpha, mc_softmax_samples, curvature_dtype
        As in ``VaLLA``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        inducing_locations: Inputs,
        num_inducing: int | None = None,
        inducing_classes: Tensor | Sequence[int] | None = None,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        alpha: float = 1.0,
        mc_softmax_samples: int = 0,
        *,
        curvature_dtype: torch.dtype | None = None,
    ) -> None:
        extractor = as_extractor(model, last_layer_name, enable_backprop, feature_reduction, dict_key_x, dict_key_y)
        super().__init__(
            extractor,
            likelihood,
            inducing_locations,
            num_inducing,
            inducing_classes,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            extractor.enable_backprop,
            extractor.dict_key_x,
            extractor.dict_key_y,
            backend,
            backend_kwargs,
            seed,
            alpha,
            mc_softmax_samples,
            curvature_dtype=curvature_dtype,
        )


__all__ = ["LLVaLLA", "VaLLA"]
