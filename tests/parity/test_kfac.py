"""Factors of convolutions agree with those that curvlinops computes with its "expand" setting (recorded)."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from laplace.curvature import AutogradGGN
from tests.tools import assert_close


def test_factors_of_convolutions_agree_with_the_expand_setting_of_curvlinops():
    recorded = {
        key: torch.as_tensor(value) for key, value in np.load(Path(__file__).with_name("kfac_expand.npz")).items()
    }
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.Tanh(),
        nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    model.load_state_dict({key[6:]: value for key, value in recorded.items() if key.startswith("model.")})
    x, y = recorded["x"], recorded["y"]
    loss, kron = AutogradGGN(model, "classification").kron(x, y, N=len(x))
    assert_close(loss, recorded["loss"])
    blocks, start = [], 0
    for parameter in model.parameters():
        rows = slice(start, start + parameter.numel())
        blocks.append(recorded["matrix"][rows, rows])
        start = rows.stop
    assert_close(kron.to_matrix(), torch.block_diag(*blocks))
