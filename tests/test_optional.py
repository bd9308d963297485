"""Optional packages: imported when used, and named with their extra where they are missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from laplace.errors import BackendUnavailableError
from laplace.optional import require


def test_what_is_installed_is_imported():
    assert require("collections.abc", "none").__name__ == "collections.abc"


def test_what_is_missing_is_named_with_its_extra():
    with pytest.raises(BackendUnavailableError, match=r"'a_package_that_is_not_there'.*laplace-posthoc\[backpack\]"):
        require("a_package_that_is_not_there.module", "backpack")


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there") as caught:
        require("broken_package", "evaluation")
    assert not isinstance(caught.value, BackendUnavailableError)


@pytest.mark.slow
def test_a_package_with_the_same_import_name_is_found_at_import(tmp_path: Path) -> None:
    folder = tmp_path / "laplace_torch-0.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: laplace-torch\nVersion: 0.3\n")
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])}
    command = [sys.executable, "-c", "import laplace"]
    told = subprocess.run(command, env=where, capture_output=True, text=True, check=True).stderr
    assert "laplace-torch 0.3 is installed in the same environment" in told
    assert "pip uninstall laplace-torch laplace-posthoc" in told
    alone = {**where, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(command, env=alone, capture_output=True, text=True, check=True).stderr == ""
