"""Save one small state of every class, and what is seen of it, for the tests of later releases.

    python -m tests.states.make FOLDER

Writes ``FOLDER/<situation>.pt`` and ``FOLDER/expected.json``. What is in ``v3`` was made by the last release whose states
have schema version 3, in ``v4`` by the last of version 4; neither is ever made again: a new schema gets a new folder.
"""

import json
import sys
from pathlib import Path

import torch

from tests.states.situations import SITUATIONS, fitted, seen


def main(folder: Path) -> None:
    """Fit, save and look."""
    folder.mkdir(parents=True)
    expected = {}
    for name in SITUATIONS:
        torch.manual_seed(0)
        la = fitted(name)
        la.save(folder / f"{name}.pt")
        expected[name] = seen(la, name)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
