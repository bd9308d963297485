"""What a user does first, with the installed package: run from a folder that is not the repository's."""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

import torch

import laplace

repository = Path(sys.argv[1]).resolve()
place = Path(laplace.__file__).resolve()
assert repository not in place.parents, f"laplace is imported from the repository: {place}"
files = {str(file) for file in distribution("laplace-posthoc").files or ()}
assert "laplace/py.typed" in files, "the package has no py.typed"
assert not [name for name in files if name.startswith(("tests/", "benchmarks/", "docs/"))], "more than the library"
assert any(name.endswith("licenses/LICENSE") for name in files), "the package has no license"
assert version("laplace-posthoc") == laplace.__version__

torch.manual_seed(0)
x, y = torch.randn(90, 4), torch.arange(90) % 3
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
for subset in ("last_layer", "all"):
    la = laplace.Laplace(model, "classification", subset)
    la.fit([(x[:60], y[:60])])
    la.tune([(x[60:], y[60:])])
    with tempfile.TemporaryDirectory() as folder:
        la.save(Path(folder) / "state.pt")
        again = laplace.load(Path(folder) / "state.pt", model)
    torch.testing.assert_close(again(x), la(x))
print(f"laplace {laplace.__version__} with PyTorch {torch.__version__}, Python {sys.version.split()[0]}: works")
