# %% [markdown]
# # With Lightning
#
# A callback fits the posterior of the network once Lightning has trained it, tunes it on the validation data and logs
# what it brings. The data are the handwritten digits that scikit-learn ships.
#
# Run it with `python examples/lightning_callback.py`: it prints two tables.

# %%
from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from laplace.evaluation import side_by_side
from laplace.integrations.lightning import LaplaceCallback

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")  # workers of loaders, and the like
pl.seed_everything(0, verbose=False)

# %% [markdown]
# ## A module as one writes it
#
# The last rows are for testing, and nobody sees them before.

# %%
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.from_numpy(images / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels))
train, val, test = random_split(data, [600, 300, len(data) - 900], torch.Generator().manual_seed(0))
train_loader, val_loader, test_loader = (DataLoader(part, batch_size=60) for part in (train, val, test))


class Digits(pl.LightningModule):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %% [markdown]
# ## The callback
#
# After training `callback.laplace` is the estimator, and `callback.report` what was logged.

# %%
callback, module = LaplaceCallback("classification"), Digits()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(max_epochs=30, callbacks=[callback], accelerator="cpu", **quiet)
trainer.fit(module, train_loader, val_loader)
print("On the validation data, on which confidence was tuned:\n")
print(callback.report)

# %% [markdown]
# On data that nobody has seen:

# %%
report = side_by_side(module, {"laplace": callback.laplace}, test_loader, val_loader=val_loader)
print("\nOn test data:\n")
print(report)
