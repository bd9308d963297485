"""A callback of the Hugging Face ``Trainer``: once the network is trained, its posterior is fitted, tuned and logged.

    from laplace.integrations.transformers import LaplaceCallback

Needs ``transformers`` and ``accelerate`` (the extra ``transformers``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laplace.integrations.after_training import AfterTraining
from laplace.optional import require

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = require("transformers", "transformers").TrainerCallback


class LaplaceCallback(AfterTraining, TrainerCallback):
    """Fits the posterior of the network after training, tunes it on the evaluation data, and logs what it brings.

    Parameters
    ----------
    likelihood, subset_of_weights, hessian_structure
        As of ``laplace.Laplace``. A sequence classifier is ``"classification"``; so is a language model, whose labels
        are shifted as its loss shifts them.
    tuning
        How confidence is chosen: ``"validation"``, by ``la.tune`` on the evaluation data; ``"marglik"``, by the
        evidence; or ``None``, not at all.
    train_loader, val_loader
        Data to fit and to tune on, where they are not those of the trainer. The trainer has evaluation data after
        training only if it evaluated on the way (``eval_strategy="epoch"``); of several sets they are the last one.
    network
        Name of the part of the model that is the network; ``None`` where that is the model itself.
    log
        Compare the network with its posterior on the evaluation data, and add the numbers to ``state.log_history``.
    laplace_options
        Further options of ``laplace.Laplace``, such as ``{"backend": ...}``.

    Attributes
    ----------
    laplace
        The fitted estimator, once training has ended; ``None`` before.
    report
        The table of what was logged (``laplace.evaluation.Report``); ``None`` where there is none: without evaluation
        data, or for likelihoods of several labels or of counts.

    Raises
    ------
    InputError
        As training begins: if ``tuning="validation"`` and there will be no evaluation data.
    UnsupportedError
        If ``tuning`` is something else; as training begins, what ``laplace.Laplace`` raises for these choices.

    Notes
    -----
    Costs the passes of ``fit`` over the training data and of ``tune`` and three more over the evaluation data. With
    ``load_best_model_at_end=True`` the weights are those that were loaded. Numbers of the evaluation data are a little
    too good, as confidence was tuned on them; in several processes they are those of the first one's share.

    Examples
    --------
    >>> callback = LaplaceCallback("classification")  # doctest: +SKIP
    >>> trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=held)  # doctest: +SKIP
    >>> trainer.add_callback(callback)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> probabilities = callback.laplace(batch)  # doctest: +SKIP
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Raise where the data to tune on will be missing, or the choices are none."""
        self._estimator(kwargs["model"])
        self._check_held(is_there=str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Fit, tune, compare, log."""
        numbers = self._learn(kwargs["model"], kwargs["train_dataloader"], kwargs.get("eval_dataloader"))
        if numbers:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})


__all__ = ["LaplaceCallback"]
