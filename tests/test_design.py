"""The two pages about the inside name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("DESIGN.md", "CONTRIBUTING.md")
SOURCE = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("laplace", "tests", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "test_design.py"
)
WORDS = set(re.findall(r"\w+", SOURCE))
"""Every identifier, and every word of a text, in the code."""


def spans(page: str) -> set[str]:
    """What stands in backticks, outside of blocks."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


def missing(page: str) -> list[str]:
    """Files that are not there, and names that occur nowhere in the code."""
    found = []
    for span in sorted(spans(page)):
        if re.fullmatch(r"[\w./-]+\.(py|md|toml|yml)|[\w./-]+/", span):
            places = [ROOT / span, ROOT / "laplace" / span]
            if not any(place.exists() for place in places) and not list((ROOT / "laplace").rglob(span.split("/")[-1])):
                found.append(span)
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?=?", span):
            found += [word for word in re.findall(r"[A-Za-z_]\w+", span.split("(")[0]) if word not in WORDS]
    return found


ELSEWHERE = {"make", "pip"}
"""Names that are no part of the code."""


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name: str) -> None:
    found = [span for span in missing((ROOT / name).read_text(encoding="utf-8")) if span not in ELSEWHERE]
    assert not found, f"{name} names {found}"


@pytest.mark.parametrize("span", ["baselaplace/postirior.py", "WeightPosteriorr", "Fit.head_biaz", "tuning/methodz.py"])
def test_the_check_sees_what_does_not_exist(span: str) -> None:
    assert missing(f"See `{span}`.")
    assert not missing("See `tuning/methods.py`, `METHODS`, `Fit.head` and `laplace/network/heads.py`.")


def test_the_recipe_for_a_likelihood_names_every_place() -> None:
    """Where the latest one occurs in the library: its file, the enum, the table; and in the tests its rows."""
    recipe = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a likelihood")[1].split("\n## ")[0]
    assert all(
        place in recipe for place in ("laplace/likelihoods/", "laplace/enums.py", "LIKELIHOODS", "tests/likelihoods/")
    )
    code = {
        path.relative_to(ROOT / "laplace").as_posix()
        for path in (ROOT / "laplace").rglob("*.py")
        if re.search(r"\bPOISSON\b|\bPoisson[A-Z]\w+", path.read_text(encoding="utf-8"))
    }
    assert code == {"likelihoods/poisson.py", "likelihoods/__init__.py", "enums.py"}
