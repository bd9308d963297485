# %% [markdown]
# # Where a language model is unsure
#
# A small causal language model reads text letter by letter. A posterior over its last layer says of each next letter
# how uncertain it is, and how much of that is the fault of the weights: what more text would take away. The labels of
# such a model are its inputs; they are shifted by one position as the model's own loss shifts them.
#
# Run it with `python examples/tokens.py` (it needs transformers); it prints a table and writes a picture to
# `examples/output/tokens.png`.

# %%
from __future__ import annotations

import argparse
import codecs
import contextlib
import io
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from laplace import Laplace

parser = argparse.ArgumentParser(description="The uncertainty of a language model about each letter.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the picture")
mpl.use("Agg")

# %% [markdown]
# ## Text
#
# scikit-learn ships descriptions of data sets: some 40,000 letters of English. The last of them are kept for
# validation. Three other texts are only read: a description that was left out, the Zen of Python, and the Zen with each
# letter replaced by the one 13 places on, as Python itself stores it.

# %%
folder = resources.files("sklearn.datasets") / "descr"
described = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".rst")}
left_out = described.pop("wine_data.rst")
known = "\n".join(described[name] for name in sorted(described))
with contextlib.redirect_stdout(io.StringIO()):
    import this
zen = codecs.decode(this.s, "rot13")
texts = {"a description left out": left_out, "the Zen of Python": zen, "the same in ROT13": this.s}
letters = sorted(set(known + "".join(texts.values())))
LENGTH = 64


def tokens(text: str) -> Tensor:
    """Rows of 64 letters as numbers."""
    numbers = torch.tensor([letters.index(letter) for letter in text])
    return numbers[: len(numbers) // LENGTH * LENGTH].reshape(-1, LENGTH)


rows = tokens(known)
train, validation = rows[:-40], rows[-40:]

# %% [markdown]
# ## The model

# %%
torch.manual_seed(0)
sizes: dict[str, Any] = {"vocab_size": len(letters), "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
for _ in range(30):
    for part in train[torch.randperm(len(train))].split(32):
        optimizer.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
model.eval()

# %% [markdown]
# ## A posterior over the last layer
#
# The batches are those that the model takes itself. `shift_labels=True` says what the labels are; without it the
# library finds out, and says so.


# %%
def batches(part: Tensor) -> list[dict[str, Tensor]]:
    """Rows as the model takes them, labels included."""
    return [{"input_ids": some, "labels": some} for some in part.split(32)]


la = Laplace(model, "classification", "last_layer", "kron", shift_labels=True)
la.fit(batches(train))
la.tune(batches(validation), max_rows=8000)

print("| text | negative log-likelihood | entropy | mutual information | `ood_score` |")
print("|---|---|---|---|---|")
for name, text in {"validation": known[-40 * LENGTH :], **texts}.items():
    part = tokens(text)
    inputs = {"input_ids": part}
    told = la.predict(inputs, n_samples=20)
    assert told.entropy is not None
    assert told.mutual_information is not None
    likelihood = told.mean[:, :-1].gather(2, part[:, 1:, None]).log()
    numbers = (-likelihood, told.entropy, told.mutual_information, la.ood_score(inputs))
    print(f"| {name} | " + " | ".join(f"{float(number.mean()):.3f}" for number in numbers) + " |")

# %% [markdown]
# A model is as sure of text that makes no sense to it: ROT13 costs it twice as many nats, and its entropies do not
# tell. The density of the features, which `ood_score` looks at, tells a little.
#
# ## The picture
#
# Each letter is colored by what the model did not know before it came: the entropy of its prediction.

# %%
output = parser.parse_args().output
output.mkdir(parents=True, exist_ok=True)
import matplotlib.pyplot as plt

figure, axes = plt.subplots(2, 1, figsize=(10, 5), layout="constrained")
for axis, name in zip(axes, list(texts)[:2], strict=True):
    part = tokens(texts[name])[2:8]
    told = la.predict({"input_ids": part}, n_samples=20)
    assert told.entropy is not None
    shown = torch.cat([torch.full((len(part), 1), float("nan")), told.entropy[:, :-1]], 1)
    axis.imshow(shown.numpy(), cmap="Oranges", vmin=0, vmax=4.5, aspect="auto")
    for row, line in enumerate(part.tolist()):
        for column, letter in enumerate(line):
            axis.text(column, row, letters[letter].strip(), ha="center", va="center", family="monospace", fontsize=8)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(axes[0].images[0], ax=axes, label="entropy (nats)")
figure.savefig(output / "tokens.png", dpi=120)
print(f"Written to {output / 'tokens.png'}")
