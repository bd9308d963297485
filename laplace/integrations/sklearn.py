"""Classifiers and regressors of scikit-learn: a network, and the Laplace approximation that calibrates it.

    from laplace.integrations.sklearn import LaplaceClassifier, LaplaceRegressor

They are trained by skorch, or hold a network that is trained already; needs the extra ``sklearn``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.model_selection import train_test_split
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, column_or_1d, validate_data
from torch import Tensor, nn

from laplace.baselaplace.keywords import AnyKeywords
from laplace.errors import InputError, UnsupportedError
from laplace.integrations.after_training import Grounds, check_tuning, learn
from laplace.laplace import Laplace
from laplace.likelihoods import LikelihoodLike
from laplace.network import evaluating
from laplace.optional import require
from laplace.types import HessianStructureLike, SubsetOfWeightsLike

Factory = Callable[[int, int], nn.Module]
"""Makes a network from the number of features and that of outputs."""
HIDDEN, EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 64, 100, 0.01, 1e-3
"""The network and the training of an estimator that is given neither."""


def default_network(n_features: int, n_outputs: int) -> nn.Module:
    """Two hidden layers of 64 units."""
    return nn.Sequential(
        nn.Linear(n_features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_outputs)
    )


class _Estimator(BaseEstimator, ABC):
    """What both share: training or taking over a network, fitting its posterior, tuning on rows held out."""

    _criterion: type[nn.Module]

    def __init__(
        self,
        module: Any = None,
        *,
        likelihood: LikelihoodLike = "classification",
        subset_of_weights: SubsetOfWeightsLike = "last_layer",
        hessian_structure: HessianStructureLike = "kron",
        tuning: Grounds = "validation",
        validation_fraction: float = 0.2,
        batch_size: int = 128,
        device: str = "cpu",
        random_state: Any = None,
        laplace_options: AnyKeywords | None = None,
    ) -> None:
        self.module = module
        self.likelihood = likelihood
        self.subset_of_weights = subset_of_weights
        self.hessian_structure = hessian_structure
        self.tuning: Grounds = tuning
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.laplace_options = laplace_options

    @abstractmethod
    def _encoded(self, y: Any, *, again: bool = False) -> Tensor:
        """Targets as the network has them; learns what it needs to decode predictions."""

    @abstractmethod
    def _n_outputs(self, targets: Tensor) -> int:
        """How many outputs a new network gets."""

    def _learn(self, X: Any, y: Any, X_val: Any, y_val: Any) -> None:
        """Train or take over the network, fit its posterior, tune it."""
        check_tuning(self.tuning)
        if (X_val is None) != (y_val is None):
            msg = "X_val and y_val belong together: pass both, or none to hold rows of X out."
            raise InputError(msg)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        dtype = _precision(self.module)
        inputs, targets = _tensor(X).to(dtype), self._encoded(y)
        held = None
        if X_val is not None:
            held = _tensor(self._checked(X_val)).to(dtype), self._encoded(y_val, again=True)
        if held is None and self.tuning == "validation":
            inputs, held_inputs, targets, held_targets = self._split(inputs, targets, seed)
            held = held_inputs, held_targets
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module_ = self._trained(inputs, targets)
        self._check_outputs(_outputs(self.module_, inputs))
        options = dict(self.laplace_options or {})
        make: Any = Laplace
        self.laplace_ = make(self.module_, self.likelihood, self.subset_of_weights, self.hessian_structure, **options)
        batches = self._batches(inputs, targets)
        learn(self.laplace_, batches, None if held is None else self._batches(*held), self.tuning)

    @abstractmethod
    def _check_outputs(self, n_outputs: int) -> None:
        """Raise where the network has other outputs than the targets need."""

    def _trained(self, inputs: Tensor, targets: Tensor) -> nn.Module:
        """The network as it is, where it is; or trained by skorch."""
        if isinstance(self.module, nn.Module):
            return self.module
        skorch: Any = require("skorch", "sklearn")
        if isinstance(self.module, skorch.NeuralNet):
            net: Any = clone(self.module)
        else:
            make = default_network if self.module is None else self.module
            if not callable(make):
                msg = (
                    "module is a trained torch.nn.Module, a function (n_features, n_outputs) -> Module, a network of "
                    f"skorch, or None; got {type(self.module).__name__}."
                )
                raise UnsupportedError(msg)
            net = skorch.NeuralNet(
                make(math.prod(inputs.shape[1:]), self._n_outputs(targets)),
                criterion=self._criterion,
                optimizer=torch.optim.Adam,
                optimizer__weight_decay=WEIGHT_DECAY,
                lr=LEARNING_RATE,
                max_epochs=EPOCHS,
                batch_size=self.batch_size,
                iterator_train__shuffle=True,
                train_split=None,
                verbose=0,
                device=self.device,
            )
        net.fit(inputs, targets)
        return net.module_.eval()

    def _split(self, inputs: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows to learn from and rows held out; of each class some, where each has enough."""
        labels = targets.numpy() if not targets.is_floating_point() else None
        n_held = max(1, round(len(inputs) * self.validation_fraction))
        if labels is not None:
            counts = np.bincount(labels)
            if counts[counts > 0].min() < 2 or min(n_held, len(inputs) - n_held) < (counts > 0).sum():
                labels = None
        rows = np.arange(len(inputs))
        kept, held = train_test_split(rows, test_size=n_held, random_state=seed, stratify=labels)
        return inputs[kept], inputs[held], targets[kept], targets[held]

    def _batches(self, inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows in batches, as views."""
        return list(zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True))

    def _checked(self, X: Any, y: Any = "no_validation", *, reset: bool = False) -> Any:
        """Validated by scikit-learn: rows with the features that ``fit`` saw; images are arrays, too."""
        targets: dict[str, Any] = {}
        if not isinstance(y, str):
            targets = {"y": y, "multi_output": True, "y_numeric": isinstance(self, RegressorMixin)}
        options: dict[str, Any] = {"dtype": np.float64, "ensure_min_samples": 2 if reset else 1}
        options["allow_nd"] = True  # spelling: meant
        return validate_data(self, X, **targets, **options, reset=reset)

    def _predicted(self, X: Any, call: Callable[[Tensor], Any]) -> Any:
        """A prediction of all rows, batch after batch."""
        check_is_fitted(self)
        like = next(self.module_.parameters())
        rows = _tensor(self._checked(X)).to(like.dtype)
        found = [call(some.to(like.device)) for some in rows.split(self.batch_size)]
        if isinstance(found[0], Tensor):
            return torch.cat(found).detach().cpu().double().numpy()
        return tuple(torch.cat(parts).detach().cpu().double().numpy() for parts in zip(*found, strict=True))

    def ood_score(self, X: Any) -> np.ndarray:
        """How foreign rows look beside the training data: larger is more foreign (see ``laplace_.ood_score``).

        Parameters
        ----------
        X
            Rows, ``[n, ...]``.

        Returns
        -------
        One score per row, ``[n]``.
        """
        return self._predicted(X, self.laplace_.ood_score)

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks: several targets are taken by regressors."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = isinstance(self, RegressorMixin)
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        """Whether there is a posterior."""
        return "laplace_" in vars(self)


class LaplaceClassifier(ClassifierMixin, _Estimator):
    """A network as a classifier of scikit-learn, with the calibrated probabilities of a Laplace approximation.

    Parameters
    ----------
    module
        The network, with one output per class (or one logit for two classes): a trained ``torch.nn.Module``, which is
        not trained again; a function ``(n_features, n_outputs) -> Module``; or a network of skorch, whose parameters
        can be searched as ``module__lr``. ``None``: two hidden layers of 64 units.
    likelihood
        ``"classification"``; ``"binary"`` of a trained network with one logit.
    subset_of_weights, hessian_structure
        As of ``laplace.Laplace``.
    tuning
        How confidence is chosen: ``"validation"``, by ``la.tune`` on rows held out; ``"marglik"``, by the evidence; or
        ``None``, not at all.
    validation_fraction
        Share of the rows that is held out from training for ``tuning="validation"``, where ``fit`` is given none.
    batch_size
        Rows at a time, in training and predictions.
    device
        Where a network is trained; one that is trained already stays where it is.
    random_state
        Seed of the split and of training: an integer, a ``RandomState``, or ``None``.
    laplace_options
        Further options of ``laplace.Laplace``, such as ``{"prior_precision": 10.0}``.

    Attributes
    ----------
    classes_
        Labels, in the order of the columns of ``predict_proba``.
    module_
        The trained network.
    laplace_
        Its posterior: samples, ``predict``, ``save`` and all else that an estimator of this library does.
    n_features_in_
        Number of features of a row.

    Notes
    -----
    Without a trained network, Adam trains it for 100 epochs. A trained one was trained on other rows than it is tuned
    on if ``fit(X, y, X_val=..., y_val=...)`` gets them; otherwise a share of ``X`` is held out from the posterior, and
    is only as foreign to the network as its training made it.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from laplace.integrations.sklearn import LaplaceClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = LaplaceClassifier(random_state=0).fit(X, y)
    >>> classifier.predict_proba(X).shape
    (150, 3)
    """

    _criterion = nn.CrossEntropyLoss

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> LaplaceClassifier:
        """Train the network, unless it is trained; fit its posterior, and tune it.

        Parameters
        ----------
        X
            Rows, ``[n, ...]``.
        y
            Their labels, ``[n]``.
        X_val, y_val
            Rows to tune on; by default some are held out.

        Returns
        -------
        This object.

        Raises
        ------
        ValueError
            If rows or labels are not valid, or there is one class only.
        InputError
            If the network has another number of outputs than there are classes.
        """
        rows, labels = self._checked(X, y, reset=True)
        self._learn(rows, labels, X_val, y_val)
        return self

    def _encoded(self, y: Any, *, again: bool = False) -> Tensor:
        if again:
            y = np.asarray(y)
            if foreign := sorted(set(np.unique(y).tolist()) - set(self.classes_.tolist())):
                msg = f"y_val has labels that y does not have: {foreign[:5]}."
                raise InputError(msg)
            return torch.from_numpy(np.searchsorted(self.classes_, y))
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            msg = f"A classifier needs at least two classes; here is one class only, {self.classes_[0]!r}."
            raise ValueError(msg)
        return torch.from_numpy(codes.astype(np.int64))

    def _n_outputs(self, targets: Tensor) -> int:  # noqa: ARG002
        return len(self.classes_)

    def _check_outputs(self, n_outputs: int) -> None:
        if n_outputs != len(self.classes_) and (n_outputs, len(self.classes_)) != (1, 2):
            msg = f"The network has {n_outputs} outputs, and y has {len(self.classes_)} classes: expected one for each."
            raise InputError(msg)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Calibrated probabilities.

        Parameters
        ----------
        X
            Rows, ``[n, ...]``.

        Returns
        -------
        ``[n, n_classes]``, in the order of ``classes_``.
        """
        check_is_fitted(self)
        found = self._predicted(X, self.laplace_)
        found = np.concatenate([1 - found, found], 1) if found.shape[1] == 1 else found
        return found / found.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each row.

        Parameters
        ----------
        X
            Rows, ``[n, ...]``.

        Returns
        -------
        Labels, ``[n]``.
        """
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]


class LaplaceRegressor(RegressorMixin, _Estimator):
    """A network as a regressor of scikit-learn, with the error bars of a Laplace approximation.

    Parameters
    ----------
    module
        The network, with one output per target: as of ``LaplaceClassifier``. The outputs of a trained one are in the
        units of ``y``.
    likelihood
        ``"regression"``; of a trained network also ``"poisson"`` and others whose targets have a variance.
    subset_of_weights, hessian_structure, tuning, validation_fraction, batch_size, device, random_state, laplace_options
        As of ``LaplaceClassifier``. Tuning chooses the noise as well.

    Attributes
    ----------
    module_
        The trained network. A network that was trained here sees targets with mean 0 and standard deviation 1.
    laplace_
        Its posterior, in the units of the network.
    y_mean_, y_scale_
        Mean and standard deviation of the targets that the network was trained on; 0 and 1 for a trained network.
    n_features_in_
        Number of features of a row.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from laplace.integrations.sklearn import LaplaceRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> mean, std = LaplaceRegressor(random_state=0).fit(X, y).predict(X, return_std=True)
    >>> mean.shape, std.shape
    ((442,), (442,))
    """

    _criterion = nn.MSELoss

    def __init__(
        self,
        module: Any = None,
        *,
        likelihood: LikelihoodLike = "regression",
        subset_of_weights: SubsetOfWeightsLike = "last_layer",
        hessian_structure: HessianStructureLike = "kron",
        tuning: Grounds = "validation",
        validation_fraction: float = 0.2,
        batch_size: int = 128,
        device: str = "cpu",
        random_state: Any = None,
        laplace_options: AnyKeywords | None = None,
    ) -> None:
        super().__init__(
            module,
            likelihood=likelihood,
            subset_of_weights=subset_of_weights,
            hessian_structure=hessian_structure,
            tuning=tuning,
            validation_fraction=validation_fraction,
            batch_size=batch_size,
            device=device,
            random_state=random_state,
            laplace_options=laplace_options,
        )

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> LaplaceRegressor:
        """Train the network, unless it is trained; fit its posterior, and tune it with the noise.

        Parameters
        ----------
        X
            Rows, ``[n, ...]``.
        y
            Their targets, ``[n]`` or ``[n, k]``.
        X_val, y_val
            Rows to tune on; by default some are held out.

        Returns
        -------
        This object.

        Raises
        ------
        ValueError
            If rows or targets are not valid.
        InputError
            If the network has another number of outputs than there are targets.
        """
        rows, targets = self._checked(X, y, reset=True)
        self._is_flat = np.ndim(targets) == 1
        self._learn(rows, targets, X_val, y_val)
        return self

    def _encoded(self, y: Any, *, again: bool = False) -> Tensor:
        y = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
        if not again:
            trained, scale = isinstance(self.module, nn.Module), y.std(0)
            self.y_mean_ = np.zeros(y.shape[1]) if trained else y.mean(0)
            self.y_scale_ = np.ones(y.shape[1]) if trained else np.where(scale > 0, scale, 1.0)
        return torch.from_numpy((y - self.y_mean_) / self.y_scale_).to(_precision(self.module))

    def _n_outputs(self, targets: Tensor) -> int:
        return targets.shape[1]

    def _check_outputs(self, n_outputs: int) -> None:
        if n_outputs != len(self.y_mean_):
            msg = f"The network has {n_outputs} outputs, and y has {len(self.y_mean_)} targets: expected one for each."
            raise InputError(msg)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The expected targets, and on request their error bars.

        Parameters
        ----------
        X
            Rows, ``[n, ...]``.
        return_std
            Also return the standard deviation of a new target: weights and noise together.

        Returns
        -------
        Means, ``[n]`` or ``[n, k]``, in the units of ``y``; with ``return_std`` also standard deviations.
        """

        def both(rows: Tensor) -> tuple[Tensor, Tensor]:
            told = self.laplace_.predict(rows)
            return told.mean, told.total_variance.sqrt()

        mean, std = self._predicted(X, both)
        mean, std = mean * self.y_scale_ + self.y_mean_, std * self.y_scale_
        mean, std = (mean[:, 0], std[:, 0]) if self._is_flat else (mean, std)
        return (mean, std) if return_std else mean


def _tensor(rows: Any) -> Tensor:
    """An array as a tensor; a copy where it cannot be written to, which tensors can."""
    return torch.from_numpy(np.require(rows, requirements=["W"]))


def _precision(module: Any) -> torch.dtype:
    """That of a network, or of those that are made without saying one."""
    found = (p.dtype for p in module.parameters() if p.is_floating_point()) if isinstance(module, nn.Module) else ()
    return next(iter(found), torch.get_default_dtype())


def _outputs(module: nn.Module, inputs: Tensor) -> int:
    """How many outputs the network has."""
    with evaluating(module), torch.no_grad():
        return int(module(inputs[:1].to(next(module.parameters()).device)).shape[-1])


__all__ = ["LaplaceClassifier", "LaplaceRegressor", "default_network"]
