"""Optional packages: imported when used, and named with their extra where they are missing."""

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
