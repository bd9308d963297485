"""Every keyword of every estimator is described where users look: in ``help``, and on the pages; its text is written once."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import laplace
from laplace import BaseLaplace, DiagLLLaplace, DiagSubnetLaplace, FunctionalLLLaplace, KronLLLaplace, LLVaLLA
from laplace.baselaplace.described import described, described_by

ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / "laplace" / "baselaplace").glob("*.py"),
    *(ROOT / "laplace" / f"{name}.py" for name in ("lllaplace", "subnetlaplace", "marglik_training")),
]
"""Where options of estimators are described."""


def estimators(cls: type = BaseLaplace) -> list[type]:
    """All classes of the library that derive from one, and itself."""
    below = {found for child in cls.__subclasses__() for found in estimators(child)}
    return [
        cls,
        *sorted((found for found in below if found.__module__.startswith("laplace.")), key=lambda c: c.__name__),
    ]


def options(docstring: str) -> list[tuple[str, str]]:
    """Names and texts in a section ``Parameters``, read line by line."""
    found: list[tuple[str, list[str]]] = []
    lines = inspect.cleandoc(docstring).splitlines()
    if "Parameters" not in lines:
        return []
    for line, below in zip(
        lines[lines.index("Parameters") + 2 :], [*lines[lines.index("Parameters") + 3 :], ""], strict=True
    ):
        if below.startswith("---"):
            break
        if line and not line.startswith(" "):
            found.append((line, []))
        elif line:
            found[-1][1].append(line.strip())
    return [(name, " ".join(text)) for names, text in found for name in names.split(", ")]


def written() -> Counter[str]:
    """Texts of options as the source files have them, and how often each stands there."""
    texts: Counter[str] = Counter()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) or (
                isinstance(node, ast.FunctionDef) and node.name in ("as_extractor", "marglik_training")
            ):
                texts.update({text for _, text in options(ast.get_docstring(node) or "")})
    return texts


@pytest.mark.parametrize("what", [*estimators(), laplace.marglik_training], ids=lambda what: what.__name__)
def test_every_keyword_is_described_and_in_order(what: Any) -> None:
    signature = list(inspect.signature(what).parameters)
    found = options(what.__doc__ or "")
    assert {name for name, _ in found} == set(signature)
    assert all(len(text) > 5 for _, text in found)
    first_of_their_text = [
        name for index, (name, text) in enumerate(found) if text not in [t for _, t in found[:index]]
    ]
    assert first_of_their_text == sorted(first_of_their_text, key=signature.index)


def test_no_text_of_an_option_is_written_twice() -> None:
    texts = written()
    assert len(texts) > 40  # they were found
    assert [text for text, times in texts.items() if times > 1] == []
    assert [text for text in texts if re.match(r"As in|See ``", text)] == []


@pytest.mark.parametrize(
    ("cls", "name", "start"),
    [
        (KronLLLaplace, "damping", "Add the root"),  # of KronLaplace
        (KronLLLaplace, "model", "The trained network, or a ``FeatureExtractor``"),  # of LLLaplace
        (DiagLLLaplace, "model", "The trained network, or a ``FeatureExtractor``"),
        (DiagSubnetLaplace, "prior_mean", "Mean of the Gaussian prior: a scalar, one value for each chosen weight"),
        (FunctionalLLLaplace, "prior_precision", "Precision of the isotropic"),  # of functions, not of last layers
        (LLVaLLA, "sigma_noise", "Observation noise from which training starts"),
        (LLVaLLA, "last_layer_name", "Name of the last layer"),
    ],
)
def test_the_nearest_class_that_describes_an_option_does(cls: type, name: str, start: str) -> None:
    assert dict(options(cls.__doc__ or ""))[name].startswith(start)


@described
class First:
    """A class.

    Parameters
    ----------
    a
        Of the first.
    b, c
        Of both,
        in two lines.

    Raises
    ------
    ValueError
        Never.
    """

    def __init__(self, a: int, b: int, c: int, d: int = 0) -> None:
        self.all = a, b, c, d


def further(d: int) -> int:
    """Something else.

    Parameters
    ----------
    d
        Of the function.
    """
    return d


@described_by(further)
class Second(First):
    """Another, without a section of its own.

    Notes
    -----
    None.
    """

    def __init__(self, c: int, d: int, *, b: int, a: int) -> None:
        super().__init__(a, b, c, d)


@described
class Third(Second):
    """A third.

    Parameters
    ----------
    c
        Of the third.
    """


def test_a_section_stands_before_others_and_in_the_order_of_the_signature() -> None:
    assert Second.__doc__ == (
        "Another, without a section of its own.\n\nParameters\n----------\nb, c\n    Of both,\n    in two lines.\n"
        "d\n    Of the function.\na\n    Of the first.\n\nNotes\n-----\nNone.\n"
    )


def test_a_class_may_describe_one_of_two_options_that_share_a_text_again() -> None:
    assert options(Third.__doc__ or "") == [
        ("c", "Of the third."), ("d", "Of the function."), ("b", "Of both, in two lines."), ("a", "Of the first."),
    ]  # fmt: skip


def test_without_docstrings_nothing_is_made_up() -> None:
    class Silent(First):
        pass

    assert described(Silent).__doc__ is None


def test_pages_show_what_help_shows() -> None:
    griffe = pytest.importorskip("griffe")
    path = ROOT / "docs" / "extensions" / "described.py"
    specification = importlib.util.spec_from_file_location("described_on_pages", path)
    assert specification is not None
    assert specification.loader is not None
    extension = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(extension)
    extensions = griffe.load_extensions(extension.Described)
    found = griffe.load("laplace", extensions=extensions, search_paths=[ROOT])
    for what in (*estimators(), laplace.marglik_training):
        page = found[f"{what.__module__.partition('.')[2]}.{what.__name__}"]
        assert page.docstring.value == inspect.getdoc(what)
