# %% [markdown]
# # Where a segmentation network may be wrong
#
# A network says of each pixel what it belongs to: here digits lie on photographs, and it knows zeros, ones and sevens.
# At which pixels is it wrong? And does it notice a digit that it has never seen? (It does not.)
#
# The network returns class scores `[batch, C, H, W]`, as segmentation networks do, in a dictionary beside something
# else. Nothing has to be said about the axis of the classes: the last layer is a convolution. Where the scores are is
# said by `output_key="out"`. Predictions come back as `[batch, C, H, W]`.
#
# Run it with `python examples/segmentation.py`: it prints a table, and writes it with a picture to `examples/output`.

# %%
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import Laplace

torch.set_num_threads(1)  # the images are tiny: a second thread costs more than it brings

parser = argparse.ArgumentParser(description="A tiny segmentation network and its uncertainty, pixel by pixel.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the results")
parser.add_argument("--steps", type=int, default=500, help="how many steps to train the network")

# %% [markdown]
# ## Data
#
# scikit-learn ships 1797 handwritten digits of 8×8 pixels and two photographs. A digit is enlarged twice, and its ink
# is mixed with a square of a photograph, lighter or darker than what is there. Pixels with little ink are neither
# background nor digit; their label is -100, and they count nowhere. Training, validation and test images are made of
# different digits; the photograph of test images is another one than that of training images.

# %%
KNOWN, FOREIGN, SIZE, IGNORED = (0, 1, 7), 4, 24, -100
CLASSES = ("background", *(f"digit {digit}" for digit in KNOWN))


def scenes(digits: np.ndarray, labels: np.ndarray, photo: np.ndarray, noise: np.random.Generator) -> TensorDataset:
    """An image `[1, 24, 24]` and its labels `[24, 24]` for each digit; those of an unknown digit are `C`."""
    images, targets = [], []
    for digit, label in zip(digits, labels, strict=True):
        top, left = (int(noise.integers(0, side - SIZE)) for side in photo.shape)
        image = photo[top : top + SIZE, left : left + SIZE].copy()
        ink, (row, column) = np.zeros((SIZE, SIZE)), noise.integers(0, SIZE - 15, 2)
        ink[row : row + 16, column : column + 16] = np.kron(digit / 16, np.ones((2, 2)))
        tone = noise.uniform(0.8, 1.0) if image.mean() < 0.5 else noise.uniform(0.0, 0.2)
        image = image + ink * (tone - image) + noise.normal(0, 0.03, image.shape)
        target = np.where(ink > 0.5, 1 + KNOWN.index(label) if label in KNOWN else len(CLASSES), 0)
        images.append(image[None])
        targets.append(np.where((ink > 0.1) & (ink <= 0.5), IGNORED, target))
    return TensorDataset(torch.tensor(np.stack(images)).float(), torch.tensor(np.stack(targets)))


def data() -> dict[str, TensorDataset]:
    """Images to train on, to choose the temperature on, to test on, and some with a digit that was never seen."""
    noise = np.random.default_rng(0)
    digits, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    digits = digits.reshape(-1, 8, 8)
    temple, flower = (image.mean(-1)[::2, ::2] / 255 for image in load_sample_images().images)
    known = noise.permutation(np.flatnonzero(np.isin(labels, KNOWN)))
    parts = {"train": known[:300], "validation": known[300:400], "test": known[400:]}
    parts["foreign"] = np.flatnonzero(labels == FOREIGN)[:100]
    return {
        name: scenes(digits[rows], labels[rows], temple if name in ("train", "validation") else flower, noise)
        for name, rows in parts.items()
    }


# %% [markdown]
# ## The network
#
# Four convolutions that look at ever larger surroundings, and a 1×1 convolution that makes class scores of what they
# found. Its weights are what becomes random.


# %%
class Segmenter(nn.Module):
    """Class scores for each pixel, `[batch, C, 24, 24]`, and what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        steps = [(1, 12, 1), (12, 16, 2), (16, 16, 4), (16, 16, 4)]
        layers = [(nn.Conv2d(a, b, 3, padding=far, dilation=far), nn.ReLU()) for a, b, far in steps]
        self.body = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.head = nn.Conv2d(16, len(CLASSES), 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores and features."""
        features = self.body(x)
        return {"out": self.head(features), "features": features}


def train(dataset: TensorDataset, steps: int) -> Segmenter:
    """Adam on cross-entropy."""
    torch.manual_seed(0)
    model, batches = Segmenter(), DataLoader(dataset, batch_size=50, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    step = 0
    while step < steps:
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x)["out"], y, ignore_index=IGNORED).backward()
            optimizer.step()
            step += 1
    return model.eval()


# %% [markdown]
# ## What is known, and what is not
#
# `1 - max p` is the probability, pixel by pixel, that the prediction is wrong, if the probabilities are right: its mean
# (`believed`) should be the share of pixels that are wrong (`wrong`). `nll` is the mean negative log-likelihood of the
# labels (nats, lower is better). How well `1 - max p` finds the wrong pixels is the area under the ROC curve (0.5 for
# guessing).
#
# `ood_score` asks another question: how far are the features of this pixel from those of the training data? It is asked
# to tell the pixels of a digit that was never seen from those of known digits, and cannot: a piece of a stroke looks
# alike in every digit, to this network and its features. Uncertainty about a pixel is no detector of unknown objects.


# %%
def rows(values: Tensor, y: Tensor) -> Tensor:
    """The pixels that count, of values `[batch, H, W]` or probabilities `[batch, C, H, W]`."""
    kept = y != IGNORED
    return values[kept] if values.dim() == y.dim() else values.movedim(1, -1)[kept]


def scores(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """How good probabilities `[batch, C, H, W]` are."""
    p, label = rows(probabilities, y), y[y != IGNORED]
    wrong = p.argmax(-1) != label
    return {
        "wrong": float(wrong.double().mean()),
        "believed": float((1 - p.amax(-1)).mean()),
        "nll": float(-p.gather(1, label.unsqueeze(1)).clamp(min=1e-12).log().mean()),
        "AUROC of errors": float(roc_auc_score(wrong, 1 - p.amax(-1))),
    }


def of_digits(known: Tensor, y: Tensor, foreign: Tensor, z: Tensor) -> float:
    """How well a score tells pixels of a foreign digit from those of known ones."""
    of_known, of_foreign = known[(y > 0) & (y < len(CLASSES))], foreign[z == len(CLASSES)]
    is_foreign = torch.cat([torch.zeros_like(of_known), torch.ones_like(of_foreign)])
    return float(roc_auc_score(is_foreign, torch.cat([of_known, of_foreign])))


def picture(columns: dict[str, Tensor], n_known: int) -> Figure:
    """One row for each image: what it shows, its labels, and maps of the same size."""
    n_rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.75 * len(columns), 1.75 * n_rows), layout="constrained")
    for column, (title, maps) in enumerate(columns.items()):
        for row, values in enumerate(maps):
            axes = figure.add_subplot(n_rows, len(columns), row * len(columns) + column + 1)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(title, fontsize="small")
            if column == 0:
                axes.set_ylabel("known digit" if row < n_known else "never seen", fontsize="small")
            if values.dtype is torch.long:
                shown = np.ma.masked_less(values.numpy(), 0)
                axes.imshow(shown, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
            else:
                low, high = (0.0, 1.0) if column == 0 else (float(maps.min()), float(maps.max()))
                axes.imshow(values.numpy(), cmap="gray" if column == 0 else "magma", vmin=low, vmax=high)
    return figure


def main(output: Path, steps: int) -> None:
    """Train, fit, tune, predict, print and draw."""
    sets = data()
    model = train(sets["train"], steps)
    la = Laplace(model, "classification", output_key="out")  # last layer, Kronecker factors
    la.fit(DataLoader(sets["train"], batch_size=50))
    la.tune(DataLoader(sets["validation"], batch_size=50))

    (x, y), (foreign, z) = sets["test"].tensors, sets["foreign"].tensors
    with torch.no_grad():
        plain = model(x)["out"].softmax(1)
    probabilities = la(x)
    assert probabilities.shape == plain.shape == (len(x), len(CLASSES), SIZE, SIZE)
    table = {"network": scores(plain, y), "Laplace": scores(probabilities, y)}
    lines = ["| | " + " | ".join(table["network"]) + " |", "|---" * 5 + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |" for name, row in table.items()
    ]
    doubt, doubt_foreign = 1 - probabilities.amax(1), 1 - la(foreign).amax(1)
    far, far_foreign = la.ood_score(x, "density"), la.ood_score(foreign, "density")
    lines += [
        "",
        f"Always background: wrong {float((rows(y, y) > 0).double().mean()):.3f}.",
        f"A digit that was never seen, by 1 - max p: AUROC {of_digits(doubt, y, doubt_foreign, z):.3f}; "
        f"by ood_score: {of_digits(far, y, far_foreign, z):.3f}.",
    ]
    text = "\n".join(lines)
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "segmentation.md").write_text(text + "\n", encoding="utf-8")
    known = [int((y.amax((1, 2)) == label).nonzero()[0]) for label in (1, 2, 3)]
    chosen = torch.cat([x[known], foreign[:3]])
    p = la(chosen)
    columns = {
        "image": chosen.squeeze(1).clamp(0, 1),
        "label (white: none)": torch.cat([y[known], z[:3]]),
        "most probable": p.argmax(1),
        "1 - max p": 1 - p.amax(1),
        "ood_score": la.ood_score(chosen, "density"),
    }
    picture(columns, len(known)).savefig(output / "segmentation.png", dpi=110)


if __name__ == "__main__":
    given = parser.parse_args()
    main(given.output, given.steps)
