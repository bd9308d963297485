"""Record states that laplace-torch saves, and what it computes from them, in an environment of its own.

    PATH/TO/PYTHON -m benchmarks.record_states tests/states/laplace_torch/VERSION

The environment has laplace-torch (and with 0.2.2 curvlinops before 3.0) instead of this library.
Writes ``FOLDER/<situation>.pt`` and ``FOLDER/expected.json``: mean, evidence, posterior precision and predictions.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace.curvature import AsdlGGN, BackPackGGN
from tests.states.situations import PEER, build

torch.set_default_dtype(torch.float64)
warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
expected: dict[str, dict[str, Any]] = {}
for name, (_, likelihood, options, x, y, x_new) in PEER.items():
    torch.manual_seed(0)
    subnetwork = options["subset_of_weights"] == "subnetwork"
    options["backend"] = AsdlGGN if subnetwork and likelihood == "classification" else BackPackGGN
    try:
        la = build(name)
        la.fit(DataLoader(TensorDataset(x, y), batch_size=5))
    except Exception as error:
        print(f"{name}: laplace-torch does not fit it: {type(error).__name__}: {error}")
        continue
    torch.save(la.state_dict(), folder / f"{name}.pt")
    precision = la.posterior_precision
    precision = precision.to_matrix() if hasattr(precision, "to_matrix") else precision
    result = la(x_new)
    found = {"mean": la.mean, "evidence": la.log_marginal_likelihood(), "precision": precision}
    found |= {f"prediction {i}": part for i, part in enumerate(result if isinstance(result, tuple) else [result])}
    expected[name] = {key: value.detach().tolist() for key, value in found.items()}
    print(f"{name}: {sorted(la.state_dict())}")
(folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
