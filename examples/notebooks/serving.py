# %% [markdown]
# # Serve it
#
# A calibrated classifier is to answer requests in a program that has neither PyTorch nor this library: ONNX Runtime, a
# C++ server, a phone. Or it stays in Python, and each request should cost as little as that of the bare network.

# %% The data and the network
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

# 1,797 handwritten digits of scikit-learn: 500 to train on, 300 to tune on, 997 for the test.
torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
order = torch.randperm(len(labels))
x, y = (images / 16).float().view(-1, 1, 8, 8)[order], labels[order]
x_train, x_val, x_test = x.split([500, 300, 997])
y_train, y_val, y_test = y.split([500, 300, 997])

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(288, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(60):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x_train), y_train).backward()
    optimizer.step()
model = model.eval()
temporary = tempfile.TemporaryDirectory()  # for the files that leave
folder = Path(temporary.name)

# %% [markdown]
# ## Ten lines
#
# `pip install "laplace-posthoc[onnx]"` brings `onnx`, `onnxscript` and `onnxruntime`; the server needs only the last of
# them.

# %%
from laplace import Laplace

la = Laplace(model, "classification", hessian_structure="kron")  # of the last layer
la.fit([(x_train, y_train)])
la.tune([(x_val, y_val)])
module = la.export_module()  # a plain nn.Module: module(x) is la(x)

shapes = ({0: torch.export.Dim("batch")},)  # batches of any size
options = {"dynamo": True, "dynamic_shapes": shapes, "input_names": ["x"]}
program = torch.onnx.export(module, (x_test[:2],), verbose=False, **options)
program.save(folder / "tuned.onnx")

# %% [markdown]
# The program that serves it needs no PyTorch:

# %%
import onnxruntime

session = onnxruntime.InferenceSession(folder / "tuned.onnx")
(probabilities,) = session.run(None, {"x": x_test.numpy()})  # [997, 10]

# %% [markdown]
# ## A server
#
# A program of its own reads requests, each a line with a JSON list of images, and answers with probabilities and the
# time that they took. The bare network is exported beside the tuned one, so that one sees what calibrated
# probabilities cost.

# %%
server = '''"""Answer requests, one a line: python server.py model.onnx"""

import json
import sys
import time

import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
for line in sys.stdin:
    x = np.asarray(json.loads(line), dtype=np.float32)
    start = time.perf_counter()
    (probabilities,) = session.run(None, {"x": x})
    taken = 1e3 * (time.perf_counter() - start)
    print(json.dumps({"probabilities": probabilities.tolist(), "milliseconds": taken}))
print(json.dumps(sorted({"torch", "laplace"} & set(sys.modules))))
'''
written = (folder / "server.py").write_text(server)
network = nn.Sequential(model, nn.Softmax(-1)).eval()
program = torch.onnx.export(network, (x_test[:2],), verbose=False, **options)
program.save(folder / "network.onnx")

# %% [markdown]
# Requests of 1 to 256 images, 30 of each size; one of 500 images of noise; and one of all test images, whose answers
# are compared with those of PyTorch, to 1e-5. The last two columns are shares of images whose largest probability is
# 0.8 or more.

# %% How they are compared
import json
import statistics
import subprocess
import sys

from laplace.evaluation import mean_nll

sizes = [1, 4, 16, 64, 256]
requests = [x_test[:size] for size in sizes for _ in range(30)] + [torch.rand(500, 1, 8, 8), x_test]
lines = "".join(json.dumps(request.tolist()) + "\n" for request in requests)
confidence, times, nll = {}, {}, {}
print("| served | imports torch | as in PyTorch | NLL | digits ≥ 0.8 | noise ≥ 0.8 |")
print("|---" * 6 + "|")
for name, file, bare in (("the network", "network.onnx", network), ("tuned", "tuned.onnx", la)):
    command = [sys.executable, str(folder / "server.py"), str(folder / file)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    *answers, loaded = map(json.loads, done.stdout.splitlines())
    noise, probabilities = (torch.tensor(answer["probabilities"]) for answer in answers[-2:])
    with torch.no_grad():
        same = torch.allclose(probabilities, bare(x_test), rtol=0, atol=1e-5)
    sure = {"test digits": probabilities.amax(-1), "noise": noise.amax(-1)}
    shares = " | ".join(f"{(values >= 0.8).float().mean():.2f}" for values in sure.values())
    nll[name] = mean_nll(probabilities, y_test)
    print(f"| {name} | {bool(loaded)} | {same} | {nll[name]:.3f} | {shares} |")
    confidence[name] = sure
    measured = [answer["milliseconds"] for answer in answers]
    times[name] = [statistics.median(measured[30 * k + 5 : 30 * k + 30]) for k in range(len(sizes))]  # 5 warm up

# %%
print("The tuned file predicts the digits better:", nll["tuned"] < nll["the network"])

# %% [markdown]
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

what = (
    "The largest probability that each server answers for digits and for noise, and the time of a request by its size"
)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", num=what)
for color, (name, found) in zip(("C0", "C1"), confidence.items(), strict=True):
    for (inputs, values), style in zip(found.items(), ("-", ":"), strict=True):
        shares = (values[:, None] >= torch.linspace(0.1, 1, 91)).float().mean(0)
        left.plot(torch.linspace(0.1, 1, 91), shares, color=color, linestyle=style, label=f"{name}, {inputs}")
left.set(xlabel="probability p", ylabel="share of inputs", title="the largest probability is p or more")
left.legend(fontsize="small", loc="lower left")
for name, milliseconds in times.items():
    right.loglog(sizes, milliseconds, marker="o", label=name)
right.set(xlabel="images in a request", ylabel="ms, one core", title="time in the server", xticks=sizes)
right.set_xticklabels(sizes)
right.minorticks_off()
legend = right.legend()

# %% [markdown]
# On the left is what the servers answered. The network calls three in five images of noise a digit with a probability
# of 0.8 or more, the tuned file one in five; of true digits 95 and 90 in 100 get as much. On the right, the tuned file
# does more than a softmax: one image takes 0.2 ms instead of less than 0.1, 64 images take 1.5 times as long as with
# the network, and 256 twice as long. Most of that goes into the density of the features of each image, by which
# predictions are widened where images are foreign. It is computed in float64, O(C · D²) for each row.
# `la.tune(val_loader, distance_aware=False)` leaves it out.
#
# ## Without ONNX
#
# The same module goes through `torch.export`, ahead of time or to other runtimes:

# %%
program = torch.export.export(module, (x_test[:2],), dynamic_shapes=shapes)
torch.export.save(program, folder / "tuned.pt2")
loaded = torch.export.load(folder / "tuned.pt2").module()  # without this library
print(torch.allclose(loaded(x_test), la(x_test), atol=1e-6))

# %% [markdown]
# ## What is exported
#
# `la.export_module(link_approx="probit")` is a copy of the network in evaluation mode, followed by the closed form of
# its predictions: the variance of the last layer, the density of features, heads, temperatures and prior that `tune`
# chose, and the link. All numbers are parameters and buffers, so that `to(device)`, `state_dict()`, `copy.deepcopy` and
# `torch.save` do what they do for any module, and nothing refers to `la`. `module.half()` and `module.bfloat16()`
# convert the network alone: variances keep their digits. `print(module.closed_form)` shows the formulas as operations.
#
# - **Structures**: `"diag"`, `"kron"`, `"full"`, `"lowrank"`, `"ekfac"`, `"blockdiag"` of a last layer of any kind
#   (linear, convolution, LoRA).
# - **Likelihoods**: classification, binary, multi-label, regression, heteroscedastic regression, Poisson and negative
#   binomial, and one of your own whose formulas do not look at values. Regressions return mean and covariance; with
#   `diagonal_output=True` mean and variance.
# - **Links**: `"probit"`, `"mf1"`, `"mf2"`, `"bridge"`, `"bridge_norm"`.
# - **Exporters**: `torch.export.export` (`strict=True` and `False`), `torch.compile(fullgraph=True)`,
#   `torch.onnx.export(dynamo=True)` and `torch.jit.trace`. Batches of any size share one graph: say so with
#   `dynamic_shapes`.
# - **Inputs that are a mapping**, as of Hugging Face models, are one argument. ONNX takes a trailing dictionary for
#   keywords, so name it:
#
# ```python
# x = {"input_ids": ids, "attention_mask": mask}
# shapes = {"x": {"input_ids": {0: batch}, "attention_mask": {0: batch}}}
# program = torch.onnx.export(module, kwargs={"x": x}, dynamo=True, dynamic_shapes=shapes)
# ```
#
# The exported predictions of every structure, likelihood and exporter are compared with `la(x)` at batches of 1, 7 and
# 64 rows (`tests/exported_predictions.py`): in double precision to rounding; ONNX Runtime in float32 to 1e-5 (measured:
# at most 3e-7, and 7e-6 after `tune`).
#
# ## Limits
#
# - **All weights, subnetworks and Gaussian processes** are refused: their predictions take derivatives of the network
#   at each input. So is `link_approx="mc"`, which draws samples. The message says what to do.
# - **Nothing is checked** in what was exported: NaN in the inputs give NaN, and outputs that are not finite are no
#   error.
# - `la.ood_score`, `la.predict` and samples stay with `la`. A server that is to refuse foreign inputs can look at the
#   confidence: where `tune` made predictions aware of distance, foreign inputs get flat probabilities.
# - **The network must export.** If `torch.export.export(model, (x,))` fails, so does this; `torch.compile(la)` may
#   still work in pieces.
# - A model that squeezes the axis of the batch away for one row cannot take batches of any size; `squeeze(-1)` of the
#   outputs is fine.
# - **Several heads** are exported one by one, each with a copy of the network: `la["kind"].export_module()`.
# - **An exported module stays as it is**: after `fit`, `tune` or an assignment, call `export_module` again.
#
# ## When something simpler is enough
#
# - **Predictions in Python, and everything else** (samples, `la.predict`, `la.ood_score`, the evidence, further
#   tuning): `la` itself; [save and load it](saving.md).
# - **The same calls, faster, in Python**, where later assignments still take effect: `torch.compile(la,
#   fullgraph=True)`, see [what compiles](memory_and_speed.md#torchcompile).
# - **A module** to put into another model, to compile, or to convert with a tool of your own: `la.export_module()`.
# - **One file for another program**: `la.export_module()`, then `torch.onnx.export`, `torch.export.export` or
#   `torch.jit.trace`.
#
# **If a temperature is all you need** ([Calibrate a classifier](calibrate.md)), divide the logits by it in the module
# that you export: that costs nothing in the server.
#
# ## What next
#
# - How foreign inputs widen predictions: [What is foreign](foreign.md).
# - Sets of classes with a guarantee, from any probabilities that are served: [Decisions](decisions.md).
# - Keep what was fitted, for Python: [Saving and moving](saving.md).
