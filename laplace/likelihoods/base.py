"""What every likelihood provides: p(y | f) in output space. No weights, no priors, no model.

Everything is computed at unit noise and temperature; ``scale`` and ``curvature_scale`` bring both in afterwards, so
that they stay differentiable and can change without refitting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar, NoReturn, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from laplace import linalg
from laplace.enums import CurvatureKind, LinkApprox, PredType
from laplace.errors import ShapeError, UnsupportedError
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.roots import DenseRoot, DiagonalRoot, Root
from laplace.types import Outputs, Scalar, Targets

Link = Callable[[Tensor, Tensor], Any]
"""From a Gaussian over outputs, mean and (co)variance, to what predictions are made of."""


class Ask(Enum):
    """What a prediction is made of."""

    VARIANCE = "variance"
    """Mean and variance of each output."""
    COVARIANCE = "covariance"
    """Mean and covariance of the outputs of a row."""
    JOINT = "joint"
    """Mean and covariance of all outputs of all rows."""
    FUNCTIONS = "functions"
    """Samples of whole functions."""


@dataclass(frozen=True)
class Positions:
    """The unmasked positions of a batch, flattened to rows."""

    f: Outputs
    """Outputs, ``[rows, C]``."""
    y: Targets
    """Targets of the same rows."""
    kept: Int[Tensor, " rows"] | None = None
    """Indices of the rows among all ``batch × positions``, or ``None`` when all are kept."""
    datum: Int[Tensor, " rows"] | None = None
    """Which row of the loader each belongs to, ``[rows]``; ``None`` when every datum has one position."""
    n_items: int = 1
    """How many scored items share a row, one after the other: 2 for pairs."""
    counted: Bool[Tensor, " rows"] | None = None
    """Which rows count, where masked ones are still there (``AbstractLikelihood.whole``); ``None`` when all do.

    Outputs at the others are sure of their targets: their loss, gradients and Hessians are zero.
    """

    def to(self, dtype: torch.dtype) -> Positions:
        """The same in another precision."""
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        return replace(self, f=self.f.to(dtype), y=y)

    def select(self, values: Tensor) -> Tensor:
        """Flatten ``[batch, *positions, k]`` and keep the same rows, ``[rows, n_items · k]``: items side by side."""
        flat = values.reshape(-1, self.n_items * values.shape[-1])
        flat = flat if self.kept is None else flat[self.kept]
        return flat if self.counted is None else torch.where(self.counted.unsqueeze(-1), flat, 0.0)

    def selected(self, n_counted: int | None = None) -> Positions:
        """Without the masked rows, of which those that count are ``n_counted``: where it is known nothing is read."""
        if self.counted is None:
            return self
        n_counted = int(self.counted.sum()) if n_counted is None else n_counted
        if n_counted == len(self.f):
            return replace(self, counted=None)
        kept = self.counted.byte().sort(descending=True, stable=True)[1][:n_counted]
        datum = kept if self.datum is None else self.datum[kept]
        return replace(self, f=self.f[kept], y=self.y[kept], kept=kept, datum=datum, counted=None)


class AbstractLikelihood(ABC):
    """p(y | f), with unit noise and temperature in all but the two scales.

    Outputs come flattened to ``[rows, C]`` (see ``flatten``). Subclasses are frozen dataclasses.
    """

    name: ClassVar[str]
    """As users write it: ``likelihood="..."``."""
    hyperparameters: ClassVar[tuple[str, ...]] = ()
    """Those beside the prior that tuning may choose: ``"sigma_noise"``, ``"output_temperature"``."""
    temperature: float | Tensor
    """T of the tempered likelihood ``p(y|f)^(1/T)``."""
    ignores_shifts: ClassVar[bool] = False
    """Whether predictions stay as they are when a number is added to all outputs of a row."""
    compares: ClassVar[bool] = False
    """Whether a target compares inputs, whose outputs then share a row."""

    # -- hyperparameters ----------------------------------------------------------------------------------------------

    def at(
        self, sigma_noise: Tensor, temperature: float | Tensor, output_temperature: float | Tensor
    ) -> AbstractLikelihood:
        """The likelihood with these numbers, of which it takes those that it has.

        Parameters
        ----------
        sigma_noise
            Standard deviation of the observation noise, ``[]`` or ``[C]``.
        temperature
            T of the tempered likelihood.
        output_temperature
            What logits are divided by when predicting.
        """
        numbers = {"temperature": temperature, "sigma_noise": sigma_noise, "output_temperature": output_temperature}
        taken = ("temperature", *self.hyperparameters)
        return replace(cast("Any", self), **{name: numbers[name] for name in taken})

    def tempered(self, factor: float) -> AbstractLikelihood:
        """The likelihood with another output temperature, where it has one.

        Parameters
        ----------
        factor
            What the present one is multiplied by.
        """
        if "output_temperature" not in self.hyperparameters:
            return self
        now = cast("Any", self)
        return replace(now, output_temperature=now.output_temperature * factor)

    def check_noise(self, sigma_noise: Tensor) -> None:
        """Raise where an observation noise other than 1 has no meaning."""
        if bool((sigma_noise.detach() != 1).any()):
            msg = f"sigma_noise is the observation noise of regression; leave it at 1 for {self.name}."
            raise UnsupportedError(msg)

    @classmethod
    def check_output_temperature(cls, value: float) -> None:
        """Raise where an output temperature other than 1 has no meaning."""
        if value != 1 and "output_temperature" not in cls.hyperparameters:
            msg = f"output_temperature divides logits before the link; outputs of {cls.name} pass none. Leave it at 1."
            raise UnsupportedError(msg)

    def beside_prior(self, noise: str | None, output_temperature: bool | None) -> tuple[str | None, int]:
        """The hyperparameter that ``tune`` chooses with the prior precision, and how many values it has (2: several).

        Parameters
        ----------
        noise
            ``"keep"``, ``"scalar"``, ``"per_output"``, or ``None`` for the default.
        output_temperature
            Whether it is chosen; ``None`` for the default.

        Raises
        ------
        UnsupportedError
            If one is asked for that the likelihood does not have.
        """
        if noise not in (None, "keep"):
            msg = f"noise={noise!r} is the observation noise of regression; {self.name} has none."
            raise UnsupportedError(msg)
        if "output_temperature" in self.hyperparameters:
            return ("output_temperature", 1) if output_temperature in (None, True) else (None, 0)
        if output_temperature:
            msg = f"output_temperature divides logits; {self.name} has none. Leave it out."
            raise UnsupportedError(msg)
        return None, 0

    def residual_noise(self, nll: Tensor, n_targets: int) -> Tensor:  # noqa: ARG002
        """The noise of most likelihood, from a loss at unit noise and its number of targets."""
        return self._refuse("an observation noise")

    def weighing(self, weights: Float[Tensor, " outputs"]) -> AbstractLikelihood:  # noqa: ARG002
        """The same at unit noise, with relative precisions of the outputs."""
        return self._refuse("a noise for each output")

    @property
    def described(self) -> str:
        """The name, and numbers of its own: those that are no hyperparameters."""
        known = {"temperature", "sigma_noise", "output_temperature"}
        own = {field.name: getattr(self, field.name) for field in fields(cast("Any", self)) if field.name not in known}
        given = {name: value for name, value in own.items() if value is not None and value is not False}
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in given.items()}
        numbers = ", ".join(f"{name}={value!r}" for name, value in plain.items())
        return f"{self.name}({numbers})" if numbers else str(self.name)

    def _refuse(self, what: str) -> NoReturn:
        msg = f"likelihood={self.name!r} has no {what.removeprefix('a ').removeprefix('an ')}."
        raise UnsupportedError(msg)

    @classmethod
    def check_balanced(cls) -> None:
        """Raise where targets are no classes whose numbers could be balanced."""
        msg = f"balanced=True draws equal numbers of each class; {cls.name} has none."
        raise UnsupportedError(msg)

    # -- fitting ------------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Tensor:
        """Factor of the negative log-likelihood: ``1/T``, with noise ``1/(σ² T)``, ``[]`` or ``[C]`` by output."""
        return 1 / torch.as_tensor(self.temperature)

    def curvature_scale(self, kind: CurvatureKind) -> Tensor:  # noqa: ARG002
        """Factor of the curvature; without noise that of the negative log-likelihood.

        Parameters
        ----------
        kind
            Which curvature it multiplies.
        """
        return self.scale

    def log_normalizer(self, n_positions: int, n_outputs: int) -> Scalar:  # noqa: ARG002
        """What is subtracted from ``−scale · nll`` to make it the log-likelihood, in nats; not tempered.

        Parameters
        ----------
        n_positions, n_outputs
            Numbers of unmasked positions and of outputs.
        """
        return torch.zeros_like(self.scale)

    @abstractmethod
    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """Negative log-likelihood summed over rows, in nats, without constants.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        y
            Targets of the same rows.
        """

    def nll_by_output(self, f: Outputs, y: Targets) -> Tensor:
        """The same for each output, ``[C]``, where outputs may have a noise of their own; else ``[]``."""
        return self.nll(f, y)

    def scaled_nll(self, f: Outputs, y: Targets) -> Scalar:
        """The same at the noise and temperature of the likelihood."""
        return self.scale.to(f) * self.nll(f, y)

    def training_factor(self, n_outputs: int) -> float:  # noqa: ARG002
        """What the loss per row is multiplied by to have the size that PyTorch's loss for it has."""
        return 1.0

    @abstractmethod
    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """Gradient of the negative log-likelihood in ``f``, ``[rows, C]``.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        y
            Targets of the same rows.
        """

    def observed(self, f: Outputs, y: Targets) -> Outputs:  # noqa: ARG002
        """Outputs at which ``hessian``, ``hessian_root`` and ``sample_gradient`` hold of these rows.

        Others than ``f`` where targets come with what is known of a row: its exposure, or that a label is missing.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        y
            Targets of the same rows, whose random part does not count.
        """
        return f

    @abstractmethod
    def hessian(self, f: Outputs) -> OutputHessian:
        """Fisher information in ``f``, which is the mean Hessian of the negative log-likelihood over targets.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        """

    @abstractmethod
    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """Roots ``r`` of the Hessians, ``r rᵀ = Λ``, with as few columns as the rank of Λ allows.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        """

    def lazy_root(self, f: Outputs) -> Root:
        """A root of the Hessians whose columns are made when they are asked for: all of them, or mixtures.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        """
        hessian = self.hessian(f)
        return DiagonalRoot(hessian.diag()) if hessian.root is None else DenseRoot(self.hessian_root(f))

    @abstractmethod
    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at targets drawn from the model, ``[samples, rows, C]``: ``E[g gᵀ]`` is the Hessian.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        n_samples
            How many targets to draw for each row.
        generator
            Source of randomness.
        """

    @abstractmethod
    def expectation(self, f: Tensor) -> Tensor:
        """E[y | f], ``[..., C]``: the outputs themselves, or class probabilities.

        Parameters
        ----------
        f
            Outputs, ``[..., C]``.
        """

    # -- predicting ---------------------------------------------------------------------------------------------------

    @classmethod
    def check_prediction(
        cls, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool, fitting: bool | None
    ) -> None:
        """Raise where options of a prediction have no meaning for the likelihood, or do not go together.

        Parameters
        ----------
        kind, link, joint, diagonal_output
            As in ``ParametricLaplace.__call__``.
        fitting
            Likewise; ``None`` for the prediction that targets are scored by.

        Raises
        ------
        UnsupportedError
            If so.
        """
        if fitting:
            problem = f"fitting=True is for reward modeling; it has no meaning for {cls.name}."
        elif joint and diagonal_output:
            problem = "joint=True asks for covariances across inputs, diagonal_output=True for none: pass one of them."
        elif joint and kind is PredType.NN:
            problem = 'joint=True needs pred_type="glm"; sampled predictions are functions already.'
        else:
            problem = cls._problem_with(kind, link, joint=joint, diagonal_output=diagonal_output)
        if problem:
            raise UnsupportedError(problem)

    @classmethod
    @abstractmethod
    def _problem_with(cls, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> str:
        """What is wrong with options of a prediction; empty for nothing."""

    @abstractmethod
    def asks(self, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> Ask:
        """What a prediction with these options, which were checked, is made of."""

    @abstractmethod
    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:
        """From a Gaussian over outputs to what ``predict`` and ``predictive_nll`` take."""

    @abstractmethod
    def average(
        self, functions: Iterable[Float[Tensor, "samples rows outputs"]], n_samples: int, center: Outputs
    ) -> tuple[Tensor, Tensor, Link]:
        """From samples of functions to what ``predict`` and ``predictive_nll`` take: an average after the link.

        Parameters
        ----------
        functions
            Samples of the outputs, in parts.
        n_samples
            How many there are in all.
        center
            Outputs near which they are, ``[rows, C]``.
        """

    @abstractmethod
    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> Tensor | tuple[Tensor, Tensor]:
        """From a Gaussian over outputs to what the user gets.

        Parameters
        ----------
        mean
            Mean of the outputs, ``[rows, C]``.
        cov
            Their variance ``[rows, C]`` or covariance ``[rows, C, C]``.
        link
            As ``self.link`` makes it, or as ``average`` returns it.

        Returns
        -------
        Class probabilities ``[rows, C]``; or mean and (co)variance of E[y|f], without the noise of targets.
        """

    def predict_joint(self, mean: Outputs, cov: Float[Tensor, "joint joint"]) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The same for all outputs of all rows at once, row by row, of their means ``[rows, C]`` and covariance."""
        return self._refuse("joint covariance of its predictions")

    @abstractmethod
    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Negative log predictive density of targets, summed over rows, in nats.

        Parameters
        ----------
        mean
            Mean of the outputs, ``[rows, C]``.
        cov
            Their variance ``[rows, C]`` or covariance ``[rows, C, C]``.
        y
            Targets of the same rows.
        link
            As in ``predict``.

        Notes
        -----
        Observation noise is included: the score is that of targets.
        """

    @abstractmethod
    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """Scores of predictions by name: functions like ``predictive_nll``; ``None`` where all predictions are needed.

        Those of the second kind see class probabilities, ``probabilities``.
        """

    def probabilities(self, prediction: Tensor) -> Float[Tensor, "rows classes"]:  # noqa: ARG002
        """One column per class, of predictions."""
        return self._refuse("class probabilities")

    def entropy(self, prediction: Tensor) -> Tensor:  # noqa: ARG002
        """Of predicted probabilities ``[..., C]``, in nats: ``[...]``, or of independent labels ``[..., C]``."""
        return self._refuse("entropy of its predictions")

    def noise_variance(self, mean: Outputs, variance: Outputs) -> Tensor | None:  # noqa: ARG002
        """E[Var(y|f)], of targets whose outputs are known, ``[rows, targets]``; ``None``: there are no such.

        In target units squared. It and the variance of E[y|f] that ``predict`` gives add up to that of targets.

        Parameters
        ----------
        mean, variance
            Of the outputs, ``[rows, C]``.
        """
        return self._refuse("variance of its targets (write noise_variance)")

    def label(self, y: Targets) -> Tensor:  # noqa: ARG002
        """Class indices ``[rows]``, or soft labels ``[rows, classes]``, of targets."""
        return self._refuse("classes")

    def check_metric(self, name: str, takes_spread: bool, pred_type: PredType) -> bool:  # noqa: ARG002
        """Whether a metric is given means alone of predictions that have a spread, too.

        Parameters
        ----------
        name
            Name of the metric.
        takes_spread
            Whether it can be called with means, (co)variances and targets.
        pred_type
            How predictions are made.

        Raises
        ------
        InputError
            If all hyperparameters would have the same score.
        """
        return False

    # -- what is foreign ----------------------------------------------------------------------------------------------

    def n_groups(self, n_outputs: int) -> int:  # noqa: ARG002
        """Number of classes whose features have a density of their own; 0: there is no density of features."""
        return 0

    def group_of(self, y: Targets) -> Tensor | None:  # noqa: ARG002
        """The class of each row in that density, ``[rows]``, or soft labels ``[rows, classes]``; ``None``: all one."""
        return None

    def log_doubt(self, f: Tensor) -> Float[Tensor, "*rows"]:  # noqa: ARG002
        """log(1 − max p) of the classes that outputs alone predict, ``[...]``."""
        return self._refuse("doubt about classes")

    def foreign_variance(self, scale: float, excess: Float[Tensor, " rows"]) -> Float[Tensor, "rows outputs"]:  # noqa: ARG002
        """Variance of the value that outputs of foreign rows have of their own, s² e in units of predictions.

        Parameters
        ----------
        scale
            s².
        excess
            e of each row, at least 0.

        Returns
        -------
        ``[rows, C]`` or ``[rows, 1]``, in output units squared.
        """
        return self._refuse("variance of foreign inputs")

    @property
    def scales_with_noise(self) -> bool:
        """Whether a predictive density is that at σ = 1 of residuals in units of σ, with covariances in those of σ²."""
        return False

    # -- items that are compared --------------------------------------------------------------------------------------

    def for_targets(self) -> AbstractLikelihood:
        """What targets are predicted with."""
        return self

    def arranged(self, inputs: Any, compare: Callable[[Any], Any]) -> Any:  # noqa: ARG002
        """Inputs, or what was made of them, as targets need them: compared where they are of pairs."""
        return inputs

    def check_rows(self) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise unless a head can be trained again, by a convex loss with one row of features for each target."""

    @classmethod  # noqa: B027 - most have nothing to refuse
    def check_diagonal_hessian(cls) -> None:
        """Raise where the diagonal of Hessians in the outputs means nothing."""

    def independent(self, wanted: bool) -> bool:
        """Whether outputs of a row are taken for functions of their own where that is wanted."""
        return wanted

    # -- a linear head f = W φ + b ------------------------------------------------------------------------------------

    def check_head(self, n_outputs: int) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise unless a head with so many outputs fits the likelihood."""

    def head_rows(self, positions: Positions, phi: Tensor) -> tuple[Float[Tensor, "rows features"], float]:
        """What W multiplies in each row, of features ``[batch, *positions, D]``; and the number that b multiplies."""
        return positions.select(phi), 1.0

    def head_hessian(self, hessian: OutputHessian) -> OutputHessian:
        """Hessians of rows in the outputs of the head at ``head_rows``."""
        return hessian

    def of_head(self, outputs: Outputs) -> Outputs:
        """Outputs of rows with the same likelihood, from those of the head at ``head_rows``."""
        return outputs

    # -- variational inference ----------------------------------------------------------------------------------------

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:  # noqa: ARG002
        """``−(1/α) log E[p(y|f)^α]`` under a Gaussian over outputs, row by row, without the normalizer, in nats.

        At α = 0 it is ``E[−log p(y|f)]``, at α = 1 the negative log predictive density.

        Parameters
        ----------
        mean
            ``[rows, C]``.
        cov
            What ``energy_asks`` says: ``[rows, C, C]`` or ``[rows, C]``.
        y
            Targets of the same rows.
        alpha
            α in [0, 1].

        References
        ----------
        Hernández-Lobato et al. (2016), "Black-box alpha divergence minimization". arXiv:1511.03243
        """
        return self._refuse("objective for variational inference")

    def energy_asks(self, alpha: float) -> Ask:  # noqa: ARG002
        """What the energy is made of: ``COVARIANCE``, or ``VARIANCE`` where that is enough."""
        return Ask.COVARIANCE

    def sampled_energy(
        self,
        samples: Float[Tensor, "samples rows outputs"],  # noqa: ARG002
        y: Targets,  # noqa: ARG002
        alpha: float,  # noqa: ARG002
    ) -> Float[Tensor, " rows"]:
        """The same from samples of the outputs."""
        return self._refuse("objective that is sampled: leave mc_softmax_samples at 0")

    @classmethod
    def check_sampled_energy(cls) -> None:
        """Raise unless the energy may be sampled."""
        msg = f"mc_softmax_samples draws logits; the objective of {cls.name} is exact without. Leave it at 0."
        raise UnsupportedError(msg)

    @classmethod
    def check_variational_head(cls, n_outputs: int) -> None:  # noqa: ARG003
        """Raise unless the weights of a head can be fitted by variational inference, with so many outputs.

        Parameters
        ----------
        n_outputs
            C.

        Raises
        ------
        UnsupportedError
            If they cannot; the message says what to use.
        """
        msg = (
            f'method="elbo" is made for classes (likelihood="classification", "binary" or "multilabel"); this is '
            f'{cls.name}. Use method="marglik", or validation data: tune(val_loader).'
        )
        raise UnsupportedError(msg)

    # -- data ---------------------------------------------------------------------------------------------------------

    def whole(self, f: Tensor, y: Tensor) -> Positions:
        """The same as ``flatten``, but that masked rows may be left where dropping them would wait for a device.

        Parameters
        ----------
        f, y
            As in ``flatten``.
        """
        return self.flatten(f, y)

    @abstractmethod
    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets and flatten ``[batch, *positions, C]`` to unmasked rows.

        Parameters
        ----------
        f
            Outputs, ``[batch, *positions, C]``.
        y
            Targets, as the likelihood takes them: class indices ``[batch, *positions]``, or numbers shaped as ``f``.
        """

    def check_axes(self, shape: Sequence[int], axis: int | None) -> None:
        """Raise unless the last axis of outputs is surely that of the C outputs.

        Parameters
        ----------
        shape
            Shape of the outputs, ``[batch, *positions, C]``.
        axis
            The one that was given, or where channels were seen; ``None`` if that is not known.

        Raises
        ------
        UnsupportedError
            If it was neither given nor seen, and the shape of targets cannot tell.
        """
        n_axes = len(shape)
        if n_axes >= 3 and axis is None and not self.tells_axis(shape):
            msg = (
                f"The outputs of the model are {list(shape)}, and neither their shape nor the functions that made them "
                "tell which axis holds the classes or the outputs of a regression. Say so: output_dim=1 if channels "
                "come after the batch, output_dim=-1 if they are last."
            )
            raise UnsupportedError(msg)

    def tells_axis(self, shape: Sequence[int]) -> bool:
        """Whether targets that fit outputs of this shape would not fit another order of its axes."""
        return len(shape) <= 3

    def count_outputs(self, shape: Sequence[int]) -> int:
        """C, of outputs ``[batch, *positions, C]``."""
        return shape[-1]

    def hard_targets(self, y: Targets) -> Targets:
        """Targets in the simplest form, for packages that need some where their values do not matter."""
        return y

    def training_loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The mean loss of outputs and targets by which training can go on; ``None``: that is refused."""
        return None

    def torch_loss(self) -> tuple[nn.Module, float] | None:
        """A summed PyTorch loss and the factor that makes it ``nll``, for packages; ``None``: they are refused."""
        return None

    @abstractmethod
    def count(self, y: Tensor, n_outputs: int) -> int | Tensor:
        """Number of unmasked positions in a batch of targets, maybe as a tensor on their device: ``pending.count``.

        Parameters
        ----------
        y
            Targets of a batch.
        n_outputs
            C.
        """


def datum_index(batch_size: int, n_rows: int, device: torch.device) -> Tensor | None:
    """Which datum each of ``n_rows`` flattened positions belongs to; ``None`` when there is one per datum."""
    if n_rows == batch_size:
        return None
    return torch.arange(batch_size, device=device).repeat_interleave(n_rows // max(batch_size, 1))


def variance_of(mean: Tensor, cov: Tensor) -> Tensor:
    """Variances of outputs, ``[..., C]``, of what is one or a covariance."""
    return cov if cov.dim() == mean.dim() else cov.diagonal(dim1=-2, dim2=-1)


def check_outputs(f: Tensor) -> None:
    """Raise unless outputs are finite."""
    linalg.check_finite(f, "The outputs of the model", "Look for NaN or infinite values in the inputs and weights.")


def check_same_shape(f: Tensor, y: Tensor, what: str) -> None:
    """Raise unless targets have the shape of the outputs."""
    if f.shape != y.shape:
        msg = (
            f"{what} must have the shape of the model's outputs, {list(f.shape)}; got {list(y.shape)}. Reshape the "
            "targets in the dataset."
        )
        raise ShapeError(msg)
