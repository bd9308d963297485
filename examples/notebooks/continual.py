# %% [markdown]
# # Continual learning
#
# Data come in parts, and old ones can't be kept. A network that is trained on the new part forgets the old ones. You want it to
# learn the new without losing the old: the posterior of what was learned before is the prior of what is learned next.

# %% The data and the network
import torch
from sklearn.datasets import load_digits
from torch import nn

# Three tasks of scikit-learn's digits: as they are, and with their pixels in two other orders.
torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = (images / 16).float()
order = torch.randperm(len(labels))
orders = [torch.arange(64), torch.randperm(64), torch.randperm(64)]
tasks = [(images[order][:, pixels], labels[order]) for pixels in orders]
train = [(x[:800], y[:800]) for x, y in tasks]
test = [(x[800:], y[800:]) for x, y in tasks]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


def accuracies(model):
    with torch.no_grad():
        return [float((model(x).argmax(-1) == y).float().mean()) for x, y in test]


# %% [markdown]
# ## Ten lines
#
# Training minimizes the negative log-likelihood of the task at hand minus the log density of the weights under the
# posterior of all tasks before. With one precision for each weight (`"diag"`) a posterior is the prior of the next
# `Laplace` as it is.

# %%
from laplace import Laplace


def learn(model, data, before, epochs=60):
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(50):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum") * len(y) / len(rows)
            if before is not None:
                weights = nn.utils.parameters_to_vector(model.parameters())
                loss = loss - before.log_prob(weights, normalized=False)
            (loss / len(y)).backward()
            optimizer.step()


def continual(keep):
    model, before, found = network(), None, []
    for data in train:
        learn(model, data, before)
        if keep:
            prior = {} if before is None else {"prior_mean": before.mean, "prior_precision": before.posterior_precision}
            la = Laplace(model, "classification", "all", "diag", **prior)
            la.fit([data])
            before = la
        found.append(accuracies(model))
    return found, before


forgets, _ = continual(keep=False)
remembers, la = continual(keep=True)
print("| after task | forgets: 1 | 2 | 3 | remembers: 1 | 2 | 3 |\n|---|---|---|---|---|---|---|")
for k, (without, kept) in enumerate(zip(forgets, remembers, strict=True), 1):
    print(f"| {k} |", " | ".join(f"{value:.2f}" for value in (*without, *kept)), "|")

# %% [markdown]
# Each row is a moment: after the first, second and third task. The columns are accuracies on test digits of tasks 1, 2 and 3. The
# network that forgets is only trained on, with nothing kept; the one that remembers keeps one posterior, of as many numbers as it
# has weights, and no digit.
#
# ## The picture

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained", num="Accuracy on each task over time")
for each, found, title in zip(axes, (forgets, remembers), ("nothing is kept", "the posterior is the prior"), strict=True):
    for task in range(3):
        moments = range(task + 1, 4)
        each.plot(moments, [found[k - 1][task] for k in moments], marker="o", label=f"task {task + 1}")
    each.set(title=title, xlabel="tasks learned", xticks=[1, 2, 3], ylim=(0, 1.02))
axes[0].set_ylabel("test accuracy")
legend = axes[1].legend(fontsize="small", loc="lower left")

# %% [markdown]
# ## Data in parts, and a network that stays
#
# Where the network is not trained again, only what is random around it is to learn from the new data. That is one call, and it
# is exact: two halves give the posterior of the whole.

# %%
x, y = tasks[0]
model = network()
learn(model, (x[:800], y[:800]), None)
parts = Laplace(model, "classification")
parts.fit([(x[:400], y[:400])])
parts.fit([(x[400:800], y[400:800])], override=False)  # adds
whole = Laplace(model, "classification")
whole.fit([(x[:800], y[:800])])
print(parts.n_data, torch.allclose(parts.log_marginal_likelihood(), whole.log_marginal_likelihood()))

# %% [markdown]
# `la.merge(other)` adds what another process learned, `la.subtract(other)` removes data again
# ([Saving and moving](saving.md#parts-of-the-data)).
#
# ## When something simpler is enough
#
# **If a part of the old data can be kept**, train on it together with the new: a few examples of each class often remember
# more than any posterior. **If tasks are told apart when they are asked for**, a frozen network with a head for each forgets nothing
# ([several heads](choosing.md#several-heads)). The posterior of a network with one mode says little of others: the more
# tasks, the more the network is held where it is, and the less it can learn. Multiply the penalty by a number below 1 if it
# learns too little.
#
# ## What next
#
# - Other structures than one number per weight: any of them has `log_prob`, as the penalty of the next task; only `"diag"` can be
#   written into a prior. [Structures](structures.md).
# - Keep a posterior between the parts: [Saving and moving](saving.md).
# - Kirkpatrick et al. (2017), arXiv:1612.00796, train with the penalty of a diagonal posterior; Ritter, Botev & Barber (2018),
#   arXiv:1805.07810, with that of Kronecker factors, where each posterior is the prior of the next.
