# %% [markdown]
# # Continual learning
#
# Data come in parts, and old ones can't be kept. A network that is trained on the new part forgets the old ones. You
# want it to learn the new without losing the old: the posterior of what was learned before is the prior of what is
# learned next.

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
# Training minimizes the loss of the task at hand minus the log density of the weights under the posteriors of the
# tasks before, which is differentiable in the weights.

# %%
from laplace import Laplace


def learn(model, data, before, epochs=20):
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(50):
            optimizer.zero_grad()
            weights = nn.utils.parameters_to_vector(model.parameters())
            penalty = -sum(la.log_prob(weights, normalized=False) for la in before)
            (nn.functional.cross_entropy(model(x[rows]), y[rows]) + penalty / len(y)).backward()
            optimizer.step()


def remembering():
    model, before, found = network(), [], []
    for data in train:
        learn(model, data, before)
        la = Laplace(model, "classification", "all", "kron")
        la.fit([data])
        before.append(la)  # remembers the weights as they are now; no digit is kept
        found.append(accuracies(model))
    return found


# %% [markdown]
# Beside it, a network for which nothing is kept, and one with a single posterior of one precision per weight. That
# one can be the prior of the next `Laplace` as it is, so that the curvatures of all tasks add up in it:


# %%
def forgetting():
    model, found = network(), []
    for data in train:
        learn(model, data, [])
        found.append(accuracies(model))
    return found


def with_one_posterior():
    model, before, prior, found = network(), [], {}, []
    for data in train:
        learn(model, data, before)
        la = Laplace(model, "classification", "all", "diag", **prior)
        la.fit([data])
        before, prior = [la], {"prior_mean": la.mean, "prior_precision": la.posterior_precision}
        found.append(accuracies(model))
    return found


results = {"nothing is kept": forgetting(), "diagonal": with_one_posterior(), "Kronecker factors": remembering()}
print("| after the third task | task 1 | task 2 | task 3 |\n|---|---|---|---|")
for name, found in results.items():
    print(f"| {name} |", " | ".join(f"{value:.2f}" for value in found[-1]), "|")

# %% [markdown]
# These are accuracies on test digits. One number per weight holds hardly more than nothing here; Kronecker factors,
# which know how weights of a layer go together, hold most.
#
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

figure, axes = plt.subplots(
    1, 3, figsize=(9, 3), sharey=True, layout="constrained", num="Accuracy on each task by tasks learned"
)
for axis, (name, found) in zip(axes, results.items(), strict=True):
    for task in range(3):
        moments = range(task + 1, 4)
        axis.plot(moments, [found[k - 1][task] for k in moments], marker="o", label=f"task {task + 1}")
    axis.set(title=name, xlabel="tasks learned", xticks=[1, 2, 3], ylim=(0, 1.02))
axes[0].set_ylabel("test accuracy")
legend = axes[2].legend(fontsize="small", loc="lower left")

# %% [markdown]
# ## Data in parts, and a network that stays
#
# If the network is not trained again, only the posterior around it learns from the new data. That is one call, and it
# is exact: two halves give the posterior of the whole.

# %%
x, y = tasks[0]
model = network()
learn(model, (x[:800], y[:800]), [])
parts = Laplace(model, "classification")
parts.fit([(x[:400], y[:400])])
parts.fit([(x[400:800], y[400:800])], override=False)  # adds
whole = Laplace(model, "classification")
whole.fit([(x[:800], y[:800])])
print(parts.n_data, torch.allclose(parts.log_marginal_likelihood(), whole.log_marginal_likelihood()))

# %% [markdown]
# `la.merge(other)` adds what another process learned, `la.subtract(other)` removes data again ([Saving and
# moving](saving.md#parts-of-the-data)).
#
# ## When something simpler is enough
#
# **If a part of the old data can be kept**, train on it together with the new: a few examples of each class often
# remember more than any posterior. **If you know at prediction time which task it is**, a frozen network with a head
# for each forgets nothing ([several heads](models.md#several-heads)).
#
# A posterior describes the surroundings of one solution. The more tasks, the more the network is held where it is, and
# the less it can learn; multiply the penalty by a number below 1 if it learns too little, above 1 if it forgets.
# Train with few epochs: where a network is sure of every example, the loss hardly curves, and the posterior holds
# nothing.
#
# ## What next
#
# - Every structure has `log_prob`; only `"diag"` can be written into a prior. [Structures](structures.md).
# - Keep a posterior between the parts: [Saving and moving](saving.md).
# - Kirkpatrick et al. (2017), arXiv:1612.00796, train with the penalty of a diagonal posterior; Ritter, Botev &
#   Barber (2018), arXiv:1805.07810, with that of Kronecker factors, where each posterior is the prior of the next.
