"""A callback of Lightning: once the network is trained, its posterior is fitted, tuned and logged.

    from laplace.integrations.lightning import LaplaceCallback

Needs ``lightning`` or ``pytorch_lightning`` (the extra ``lightning`` installs the former).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from laplace.errors import UnsupportedError
from laplace.integrations.after_training import AfterTraining, Loader
from laplace.optional import is_installed, require

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    _old = is_installed("pytorch_lightning") and not is_installed("lightning")
    Callback = require("pytorch_lightning" if _old else "lightning.pytorch", "lightning").Callback


class LaplaceCallback(AfterTraining, Callback):
    """Fits the posterior of the network after training, tunes it on the validation data, and logs what it brings.

    Parameters
    ----------
    likelihood, subset_of_weights, hessian_structure
        As of ``laplace.Laplace``.
    tuning
        How confidence is chosen: ``"validation"``, by ``la.tune`` on the validation data; ``"marglik"``, by the
        evidence; or ``None``, not at all.
    train_loader, val_loader
        Data to fit and to tune on, where they are not those of the trainer: for one, without augmentation.
    network
        Name of the attribute of the ``LightningModule`` that is the network, such as ``"model"``; ``None`` where the
        module itself returns the outputs.
    log
        Compare the network with its posterior on the validation data, and log the numbers.
    laplace_options
        Further options of ``laplace.Laplace``, such as ``{"backend": ...}``.

    Attributes
    ----------
    laplace
        The fitted estimator, once training has ended; ``None`` before.
    report
        The table of what was logged (``laplace.evaluation.Report``); ``None`` where there is none: without validation
        data, or for likelihoods of several labels or of counts.

    Raises
    ------
    InputError
        As training begins: if ``tuning="validation"`` and there are no validation data.
    UnsupportedError
        If ``tuning`` is something else. As training begins: if the trainer has several loaders of the data that are
        asked for; or what ``laplace.Laplace`` raises for these choices.

    Notes
    -----
    Costs the passes of ``fit`` over the training data and of ``tune`` and three more over the validation data. The
    numbers are logged as ``laplace/NLL``, ``network/NLL`` and so on by each logger of the trainer. They are a little
    too good, as confidence was tuned on the same data. In several processes they are those of the first one's share.

    Examples
    --------
    >>> callback = LaplaceCallback("classification")  # doctest: +SKIP
    >>> Trainer(callbacks=[callback]).fit(module, train_loader, val_loader)  # doctest: +SKIP
    >>> probabilities = callback.laplace(x)  # doctest: +SKIP
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise where the data to fit or to tune on are missing, or the choices are none."""
        self._estimator(pl_module)
        self._check_held(is_there=self._data(trainer)[1] is not None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit, tune, compare, log."""
        numbers = self._learn(pl_module, *self._data(trainer))
        for logger in trainer.loggers if numbers else ():
            logger.log_metrics(numbers, step=trainer.global_step)

    def _data(self, trainer: Any) -> tuple[Any, Loader | None]:
        """The data of a trainer, to fit and to tune or compare on, as far as they are asked for."""
        train = self._train_loader
        if train is None:
            train = _the_one(trainer.train_dataloader, "training", "fit", "train_loader")
        if self._val_loader is not None or not (self._log or self._tuning == "validation"):
            return train, self._val_loader
        return train, _the_one(trainer.val_dataloaders, "validation", "tune and compare", "val_loader")


def _the_one(loaders: Any, kind: str, use: str, option: str) -> Loader | None:
    """The only loader of a trainer, which holds several as a list, by name, or as a ``CombinedLoader``."""
    loaders = getattr(loaders, "iterables", loaders)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        if len(loaders) > 1:
            msg = f"The trainer has {len(loaders)} {kind} loaders. Pass the one to {use} on as {option}=."
            raise UnsupportedError(msg)
        return loaders[0] if loaders else None
    return loaders


__all__ = ["LaplaceCallback"]
