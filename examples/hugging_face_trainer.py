# %% [markdown]
# # With the Hugging Face Trainer
#
# A callback fits the posterior of the network once the `Trainer` has trained it, tunes it on the evaluation data and
# adds what it brings to the log. A small vision transformer, made from a configuration, reads the handwritten digits
# that scikit-learn ships; nothing is downloaded.
#
# Run it with `python examples/hugging_face_trainer.py`: it prints two tables.

# %%
from __future__ import annotations

import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from laplace.evaluation import side_by_side
from laplace.integrations.transformers import LaplaceCallback

torch.set_num_threads(1)
set_seed(0)

# %% [markdown]
# ## Data and model
#
# Rows are dictionaries, as those of `datasets` are. That the images are under `pixel_values` is read off the model.

# %%
images, labels = load_digits(return_X_y=True)
rows = [
    {"pixel_values": torch.from_numpy(image / 16).float().view(1, 8, 8), "labels": int(label)}
    for image, label in zip(images, labels, strict=True)
]
train, rest = train_test_split(rows, train_size=600, random_state=0)
val, test = train_test_split(rest, train_size=300, random_state=0)

config = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, num_labels=10,
    hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
)  # fmt: skip
model = ViTForImageClassification(config)

# %% [markdown]
# ## The callback
#
# The trainer hands its evaluation data to callbacks once it has evaluated, here after each epoch; otherwise pass them
# as `LaplaceCallback(val_loader=…)`.

# %%
callback = LaplaceCallback("classification")
folder = tempfile.mkdtemp()
options: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
options["dataloader_pin_memory"] = False  # there is no accelerator to copy to
arguments = TrainingArguments(
    folder, num_train_epochs=20, learning_rate=2e-3, per_device_train_batch_size=60, log_level="error", **options
)
trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=val, callbacks=[callback])
trainer.train()
print("\nOn the evaluation data, on which confidence was tuned:\n")
print(callback.report)

# %% [markdown]
# On data that nobody has seen:

# %%
test_loader, val_loader = trainer.get_test_dataloader(test), trainer.get_eval_dataloader()
report = side_by_side(model, {"laplace": callback.laplace}, test_loader, val_loader=val_loader)
print("\nOn test data:\n")
print(report)
