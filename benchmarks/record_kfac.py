"""Record Kronecker factors of curvlinops' "expand" setting, through laplace-torch 0.3 in an environment of its own.

    PATH/TO/PYTHON benchmarks/record_kfac.py

Writes ``tests/parity/kfac_expand.npz``: data, weights, and factors of a small convolutional network in float64.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from laplace.curvature import CurvlinopsGGN

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.Tanh(),
    nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 3),
)  # fmt: skip
x, y = torch.randn(6, 2, 6, 4), torch.randint(3, (6,))
loss, kron = CurvlinopsGGN(model, "classification").kron(x, y, N=len(x))
arrays = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
arrays |= {"x": x, "y": y, "loss": loss.detach(), "matrix": kron.to_matrix().detach()}
np.savez_compressed(
    Path(__file__).with_name("kfac_expand.npz"), **{key: value.numpy() for key, value in arrays.items()}
)
print({key: tuple(value.shape) for key, value in arrays.items()})
