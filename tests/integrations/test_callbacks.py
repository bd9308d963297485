"""Callbacks of Lightning and of the Hugging Face ``Trainer``: what they hold is what a call of one's own would hold."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from laplace import Laplace
from laplace.errors import InputError, UnsupportedError
from laplace.integrations import lightning as of_lightning
from laplace.integrations import transformers as of_transformers
from tests.tools import assert_close

FEATURES, LABELS = cast("tuple[np.ndarray, np.ndarray]", load_iris(return_X_y=True))
X, Y = torch.from_numpy(FEATURES), torch.from_numpy(LABELS)
TRAIN, HELD = torch.arange(150) % 3 > 0, torch.arange(150) % 3 == 0


@pytest.fixture(autouse=True)
def others_warn():
    """Both libraries warn of workers, cards and versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Module(pl.LightningModule):
    """A network of its own, or the outputs of its first column alone."""

    def __init__(self, n_outputs: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = self.net(batch[0])
        if outputs.shape[1] == 1:
            return nn.functional.mse_loss(outputs[:, 0], batch[1].reshape(-1))
        return nn.functional.cross_entropy(outputs, batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("seen", float(len(batch[0])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def loaders(y: Tensor = Y, x: Tensor = X) -> tuple[DataLoader, DataLoader]:
    train, held = (DataLoader(TensorDataset(x[rows], y[rows]), batch_size=25) for rows in (TRAIN, HELD))
    return train, held


def trained(callback: Any, module: pl.LightningModule, *data: Any, logger: Any = False) -> pl.Trainer:
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=8, callbacks=[callback], logger=logger, enable_checkpointing=False, **options)
    trainer.fit(module, *data)
    return trainer


def test_lightning_fits_tunes_and_logs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    train, held = loaders()
    callback, module = of_lightning.LaplaceCallback("classification"), Module()
    assert callback.laplace is None
    trainer = trained(callback, module, train, held, logger=CSVLogger(str(tmp_path)))
    expected = Laplace(module, "classification")
    expected.fit(train).tune(held)
    assert_close(callback.laplace(X), expected(X))
    assert callback.report is not None
    assert set(callback.report.rows) == {"MAP", "laplace"}
    assert trainer.logger is not None
    (written,) = Path(cast("str", trainer.logger.log_dir)).glob("metrics.csv")
    head, *rows = written.read_text().splitlines()
    column = head.split(",").index("laplace/NLL")
    assert float(rows[-1].split(",")[column]) == pytest.approx(callback.report.rows["laplace"]["NLL"])
    assert "network/ECE" in head
    assert "predict ms" not in head


def test_lightning_with_a_network_inside_loaders_of_its_own_and_the_evidence() -> None:
    torch.manual_seed(0)
    train, _ = loaders(X[:, 3:], X[:, :3].repeat(1, 2)[:, :4])
    module = Module(1)
    other = [(X[:, :3].repeat(1, 2)[:50, :4], X[:50, 3:])]
    options: dict[str, Any] = {"network": "net", "train_loader": other, "laplace_options": {"prior_precision": 3.0}}
    callback = of_lightning.LaplaceCallback("regression", "all", "diag", tuning="marglik", **options)
    trained(callback, module, train)
    assert callback.report is None
    assert callback.laplace.model is module.net
    expected = Laplace(module.net, "regression", "all", "diag", prior_precision=3.0)
    expected.fit(other).optimize_prior_precision(method="marglik", noise="scalar")
    assert_close(callback.laplace.sigma_noise, expected.sigma_noise)
    for ours, theirs in zip(callback.laplace(other[0][0]), expected(other[0][0]), strict=True):
        assert_close(ours, theirs)


def test_regressors_are_compared_too() -> None:
    train, held = loaders(X[:, 3:], X[:, :3].repeat(1, 2)[:, :4])
    callback = of_lightning.LaplaceCallback("regression")
    trained(callback, Module(1), train, held)
    assert callback.report is not None
    assert "CRPS" in callback.report.columns


class Nested(Module):
    """One whose batches come from loaders with names."""

    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch["a"])


def test_of_several_loaders_the_one_that_is_passed_is_taken() -> None:
    torch.manual_seed(0)
    train, held = loaders()
    callback, module = of_lightning.LaplaceCallback("classification", train_loader=train, val_loader=held), Nested()
    trained(callback, module, {"a": train, "b": train}, [held, train])
    expected = Laplace(module, "classification").fit(train)
    expected.tune(held)
    assert_close(callback.laplace(X), expected(X))
    one = of_lightning.LaplaceCallback("classification")
    trained(one, Nested(), {"a": train}, {"held": held})
    assert one.report is not None
    unasked = of_lightning.LaplaceCallback("classification", tuning=None, log=False)
    trained(unasked, Module(), train, [held, held])
    assert unasked.laplace.n_data == 100
    with pytest.raises(UnsupportedError, match=r"2 training loaders.*fit on as train_loader="):
        trained(of_lightning.LaplaceCallback("classification"), Nested(), {"a": train, "b": train}, held)
    with pytest.raises(UnsupportedError, match=r"2 validation loaders.*as val_loader="):
        trained(of_lightning.LaplaceCallback("classification"), Module(), train, {"a": held, "b": held})


@pytest.mark.parametrize(
    ("choices", "options", "said"),
    [
        (("classes",), {}, "classes"),
        (("classification", "last_layer", "crown"), {}, "crown"),
        (("classification",), {"laplace_options": {"prior_width": 1.0}}, "prior_width"),
        (("classification",), {"network": "nets"}, r"'nets' is no part of the Module; its parts are 'net'"),
    ],
)
def test_choices_that_are_none_are_said_before_training(
    choices: tuple[Any, ...], options: dict[str, Any], said: str
) -> None:
    module = Module()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises((ValueError, TypeError), match=said):
        trained(of_lightning.LaplaceCallback(*choices, **options), module, *loaders())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_missing_data_are_said_before_training() -> None:
    train, held = loaders()
    module = Module()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(InputError, match=r'Pass val_loader=.*tuning="marglik"'):
        trained(of_lightning.LaplaceCallback("classification"), module, train)
    with pytest.raises(UnsupportedError, match=r"2 validation loaders.*val_loader="):
        trained(of_lightning.LaplaceCallback("classification"), module, train, [held, held])
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    with pytest.raises(UnsupportedError, match="tuning is"):
        of_lightning.LaplaceCallback("classification", tuning=cast("Any", "evidence"))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=2, max_position_embeddings=8, **sizes))


def sentences(n: int) -> list[dict[str, Tensor]]:
    """The label says whether a certain word is there."""
    words = torch.randint(2, 30, (n, 6), generator=torch.Generator().manual_seed(n))
    return [
        {"input_ids": row, "attention_mask": torch.ones(6).long(), "labels": (row > 26).any().long()} for row in words
    ]


def test_the_trainer_of_hugging_face_fits_tunes_and_logs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "no"}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, report_to=[], disable_tqdm=True, use_cpu=True, **options
    )
    callback = of_transformers.LaplaceCallback("classification")
    trainer = Trainer(bert(), arguments, train_dataset=sentences(64), eval_dataset=sentences(40), callbacks=[callback])
    trainer.train()
    expected = Laplace(trainer.model, "classification")
    expected.fit(trainer.get_train_dataloader()).tune(trainer.get_eval_dataloader())
    batch = next(iter(trainer.get_eval_dataloader()))
    torch.testing.assert_close(callback.laplace(batch), expected(batch), rtol=1e-4, atol=1e-5)  # in other batches
    assert callback.report is not None
    (logged,) = [entry for entry in trainer.state.log_history if "laplace/NLL" in entry]
    assert logged["laplace/NLL"] == callback.report.rows["laplace"]["NLL"]
    assert logged["step"] == trainer.state.global_step


def test_the_trainer_of_hugging_face_says_before_training_that_it_will_miss_data(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, report_to=[], disable_tqdm=True, use_cpu=True)
    callback = of_transformers.LaplaceCallback("classification")
    trainer = Trainer(bert(), arguments, train_dataset=sentences(16), callbacks=[callback])
    with pytest.raises(InputError, match="Pass val_loader="):
        trainer.train()
    assert trainer.state.global_step == 0
