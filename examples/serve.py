# %% [markdown]
# # Serve it
#
# A classifier of handwritten digits is tuned, and leaves as one file of ONNX. A plain process with `onnxruntime` and
# NumPy, and neither this library nor PyTorch, answers requests from that file. The bare network leaves in the same
# way beside it, so that one sees what the calibrated probabilities cost per request.
#
# Run it with `python examples/serve.py` (it needs `pip install "laplace-posthoc[onnx,examples]"`): it writes the
# files and a table to `examples/output`.

# %%
from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from laplace import Laplace
from laplace.evaluation import mean_nll

torch.set_num_threads(1)

parser = argparse.ArgumentParser(description="Export calibrated predictions to ONNX and serve them without PyTorch.")
parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output", help="folder of the results")
OUTPUT = parser.parse_args().output
OUTPUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A network, fitted and tuned
#
# 500 digits to train on, 300 to tune on, 997 to test on. The network is small and convolutional.

# %%
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

la: Any = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")
la.fit([(x_train, y_train)])
la.tune([(x_val, y_val)])

# %% [markdown]
# ## Two files
#
# `la.export_module()` is a plain module; from there on it is PyTorch's exporter. `dynamic_shapes` leaves the number
# of rows of a request open. The bare network ends in a softmax here, so that both files answer with probabilities.


# %%
def to_onnx(module: nn.Module, path: Path) -> None:
    """Write a module that takes a batch of images."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's exporter, about itself
        batch = torch.export.Dim("batch")
        program = torch.onnx.export(
            module, (x_test[:2],), dynamo=True, dynamic_shapes=({0: batch},), input_names=["x"], verbose=False
        )
    assert program is not None
    program.save(path)


files = {"the network": OUTPUT / "network.onnx", "tuned": OUTPUT / "tuned.onnx"}
to_onnx(nn.Sequential(model, nn.Softmax(-1)).eval(), files["the network"])
to_onnx(la.export_module(), files["tuned"])

# %% [markdown]
# ## A server
#
# A program of its own that reads requests, one JSON list of images a line, and answers with probabilities and the
# time that they took. It imports NumPy and `onnxruntime`; what else it has loaded it says at the end.

# %%
SERVER = OUTPUT / "server.py"
SERVER.write_text(
    '''"""Answer requests, one a line: python server.py model.onnx"""

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
    milliseconds = 1e3 * (time.perf_counter() - start)
    print(json.dumps({"probabilities": probabilities.tolist(), "milliseconds": milliseconds}), flush=True)
print(json.dumps(sorted({"torch", "laplace"} & set(sys.modules))))
''',
    encoding="utf-8",
)


def served(path: Path, requests: list[torch.Tensor]) -> tuple[list[dict[str, Any]], list[str]]:
    """Answers of a server to requests, and which of `torch` and `laplace` it loaded."""
    lines = "".join(json.dumps(request.tolist()) + "\n" for request in requests)
    command = [sys.executable, str(SERVER), str(path)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    *answers, loaded = map(json.loads, done.stdout.splitlines())
    return answers, loaded


# %% [markdown]
# ## Requests
#
# 200 of one image, of which the first ten warm up, 50 of 64 images, and one of all test images, whose answers are
# compared.

# %%
with torch.no_grad():
    expected = {"the network": model(x_test).softmax(-1), "tuned": la(x_test)}
lines = ["| served | NLL | one image, ms | 64 images, ms | largest difference | imports |", "|---|---|---|---|---|---|"]
for name, path in files.items():
    single = [x_test[i : i + 1] for i in range(200)]
    many = [x_test[64 * (i % 15) : 64 * (i % 15) + 64] for i in range(50)]
    answers, loaded = served(path, [*single, *many, x_test])
    times = [statistics.median(each["milliseconds"] for each in part) for part in (answers[10:200], answers[205:250])]
    found = torch.tensor(answers[-1]["probabilities"])
    difference = float((found - expected[name]).abs().max())
    imports = ", ".join(loaded) or "neither torch nor laplace"
    lines.append(
        f"| {name} | {mean_nll(found, y_test):.3f} | {times[0]:.3f} | {times[1]:.2f} | {difference:.0e} | {imports} |"
    )
table = "\n".join(lines)
print(table)
(OUTPUT / "serve.md").write_text(table + "\n", encoding="utf-8")
