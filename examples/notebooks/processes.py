# %% [markdown]
# # Many processes
#
# The data are too many for one process, or lie in shards already, and training runs under `torch.distributed`. You want
# the posterior of all data, without collecting them in one place.
#
# `fit` and `tune` are then calls of all processes of the group: each reads its shard of the data, sums are added over
# all of them, and each ends with the posterior, evidence and counts of the whole, the same to the last bit. Nothing
# is written for it but the sampler that such programs have anyway, so that Lightning, Hugging Face and accelerate
# need no other code.

# %% The data and the network
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# 1,797 handwritten digits of scikit-learn: 1,001 to train on, 300 to tune on, 496 for the test.
torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
x, y = (images / 16).float(), labels
order = torch.randperm(len(y))
train, validation, test = (TensorDataset(x[rows], y[rows]) for rows in order.split([1001, 300, 496]))

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(20):
    for images, labels in DataLoader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

temporary = tempfile.TemporaryDirectory()  # what the processes read and write
folder = Path(temporary.name)
torch.save({"model": model, "train": train, "validation": validation}, folder / "start.pt")

# %% [markdown]
# ## Ten lines
#
# A program of all processes. `train` has an odd number of rows: the sampler repeats one of them in the second shard,
# and `fit` leaves it out again.

# %%
program = """
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from laplace import Laplace

folder = sys.argv[1]
start = torch.load(f"{folder}/start.pt", weights_only=False)
model, train, validation = start["model"], start["train"], start["validation"]

dist.init_process_group("gloo")  # or nccl, or any other
la = Laplace(model, "classification", hessian_structure="kron")  # or a model in DDP
la.fit(DataLoader(train, batch_size=64, sampler=DistributedSampler(train)))
la.tune(DataLoader(validation, batch_size=64, sampler=DistributedSampler(validation)))
la.save(f"{folder}/la-{dist.get_rank()}.pt")  # of this process alone, as predictions are
dist.destroy_process_group()
"""
written = (folder / "program.py").write_text(program)

# %% [markdown]
# `torchrun --nproc_per_node 2 program.py` starts it twice, and says to each process which one it is:

# %%
import subprocess
import sys

torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
command = [*torchrun, "--nproc_per_node", "2", str(folder / "program.py"), str(folder)]
done = subprocess.run(command, check=True, capture_output=True)

# %% [markdown]
# Beside it one process that reads everything, and one that reads the first shard only:

# %% How they are compared
from torch.utils.data import DistributedSampler, Subset

from laplace import Laplace
from laplace.evaluation import mean_nll


def by_one_process(rows):
    la = Laplace(model, "classification", hessian_structure="kron")
    la.fit(DataLoader(Subset(train, rows), batch_size=64))
    la.tune(DataLoader(validation, batch_size=64))
    return la


shard = list(DistributedSampler(train, num_replicas=2, rank=0))
fitted = {"one process": by_one_process(range(1001)), "the first shard alone": by_one_process(shard)}
for rank in range(2):
    fitted[f"process {rank} of two"] = Laplace(model, "classification", hessian_structure="kron")
    fitted[f"process {rank} of two"].load(folder / f"la-{rank}.pt")

x_test, y_test = test.tensors
print("| posterior of | rows | log evidence | test NLL |\n|---|---|---|---|")
with torch.no_grad():
    print(f"| none: the network | | | {mean_nll(model(x_test).softmax(-1), y_test):.4f} |")
for name, la in fitted.items():
    print(f"| {name} | {la.n_data} | {la.log_marginal_likelihood():.3f} | {mean_nll(la(x_test), y_test):.4f} |")

# %% [markdown]
# Both processes hold the posterior of 1,001 rows, and it is that of one process. These digits are easy, so that half of
# them predict as well here: what counts is that nothing depends on how the data are split.
#
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

weights = torch.eye(650)[:, None]  # the variance of each weight of the last layer
std = {}
for name, la in fitted.items():
    la.prior_precision = 1.0  # as before `tune`, which chose another one for the shard alone
    std[name] = la.functional_variance(weights).flatten().sqrt()
reference = std.pop("one process")

what = "Posterior standard deviations of 650 weights: of two processes as of one, of a shard alone larger"
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", num=what)
left.axline((0.4, 0.4), slope=1, color="0.6", linewidth=1)
for color, name in (("C1", "the first shard alone"), ("C0", "process 0 of two")):
    style = {"color": color, "label": name}
    left.scatter(reference, std[name], s=6, **style)
    difference = (std[name] / reference - 1).abs()
    right.hist(difference, bins=torch.logspace(-8, 0, 49), histtype="step", linewidth=1.5, **style)
left.set(xlabel="fitted by one process", ylabel="fitted otherwise", title="standard deviation of each weight")
right.set(xlabel="relative difference from one process", ylabel="weights", title="how far apart they are", xscale="log")
legend = left.legend(fontsize="small")

# %% [markdown]
# Two processes differ from one by the rounding of float32, for sums are taken in another order. A shard alone is less
# certain of most weights. The two processes are equal to the last bit, in what they predict as well:

# %%
first, second = fitted["process 0 of two"], fitted["process 1 of two"]
print(torch.allclose(std["process 0 of two"], reference, rtol=1e-4))
print(torch.equal(std["process 0 of two"], std["process 1 of two"]))
print(torch.equal(first(x_test), second(x_test)))

# %% [markdown]
# ## What to know
#
# - **Which calls are of all processes**: `fit`, `tune`, and `optimize_prior_precision` where it reads data. They make
#   the same calls, with the same options, on the same model; other weights or buffers are refused (running statistics
#   of BatchNorm, which DDP leaves different in each process, take `torch.distributed.broadcast(buffer, 0)` for each
#   of `model.buffers()`), and so is `override=False` after fits that differ. Predictions, the evidence, samples,
#   `plan` and `save` are of one process. A call of one process alone waits for the others, and says so after a
#   minute: make it `with laplace.processes.within(None):`. There every process has data and a posterior of its own.
#   `within(group)` names another group than the default.
# - **What is exact**: every structure of weights, whichever are random, and `hessian_structure="gp"` of a last layer:
#   what one process with all data finds, to the rounding of sums in another order. `"ekfac"` and `"lowrank"` meet
#   after each of their passes. With more than 4,096 outputs `"kron"` keeps the covariances of the outputs with most
#   curvature in the sum, as far as each process had kept them. Processes of all weights, ELLA and VaLLA need all data
#   in one process, and refuse. A sampled curvature (`stochastic=True`) is drawn with the random numbers of each
#   process and then summed.
# - **Rows that only fill shards up** are not counted: those that `DistributedSampler` (also that of Lightning)
#   repeats at the end, and those of loaders that accelerate prepared (`even_batches`). Loaders of streams
#   (`dispatch_batches`) and samplers of other libraries say nothing of such rows: let them drop the last ones. Shards
#   may also be any iterables, of any length, and empty. The same data in every process would count several times, and
#   are refused.
# - **A process that raises** makes all raise: itself with its own error, the others with a `ProcessError` that says
#   which process it was, and what it said. All are then what they were. A process that dies is noticed by the group's
#   own timeout.
# - **Tuning.** Of a last layer each process runs its own validation data, and their features go to all, O(rows · (D +
#   C)) numbers; else the batches go to all in turn, and each process runs the model over all of them, in the time
#   that one would take. Every process then finds the same. The features of the training data that `fit` keeps for
#   `tune` are those of all processes, in each (2²⁷ numbers at most). Folds (`"cv"`) and `max_rows` draw from the rows
#   in the order of the processes. Where predictions are sampled, pass no `generator`, or one with the same seed in
#   each.
# - **What is sent**: one sum of the curvature for each pass (`all_reduce`: P² numbers of `"full"`, P of `"diag"`, the
#   factors of `"kron"`), sums of the density, and small records as bytes that `torch.load(weights_only=True)` reads:
#   nothing is pickled.
# - **Sharded models.** With FSDP the random last layer has to be in each process: shard the rest
#   (`fully_shard(model.backbone)`, or `ignored_modules=[model.head]`). Processes then run the model equally often,
#   whatever their shards are; a prediction is a call of all of them. All weights of a sharded model are refused.
#
# ## When something simpler is enough
#
# **If one process can read all the data in time**, let it: `fit` is one pass over them. It needs no group, and
# `la.save` hands the posterior to the other processes ([Saving and moving](saving.md)).
#
# **If the processes do not talk to each other**, or run at different times, fit parts anywhere and add them with
# [`la.merge(other)`](saving.md#parts-of-the-data).
#
# ## What next
#
# - A program that also trains by these processes, through DDP, and takes a GPU for each where there are any:
#   `torchrun --nproc_per_node 2 examples/distributed.py`.
# - Fit when a `Trainer` has ended, in all of its processes: [In Lightning and the Trainer](trainers.md).
# - What `tune` does: [Tuning](tuning.md). What it will cost: [a plan](memory_and_speed.md#before-the-work-laplan).
#
# ::: laplace.processes.within
