"""The two pages about the inside name what exists, and the recipes name every place to write in."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import laplace
from laplace import enums
from laplace.laplace import ESTIMATORS, FUNCTIONAL
from tests.test_house import STOREYS

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "laplace"
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("DESIGN.md", "CONTRIBUTING.md")}
DESIGN, CONTRIBUTING = PAGES.values()
FILE = re.compile(r"(?:\.?[\w<>-]+/)*[\w.<>*-]+\.(?:py|md|toml|yml|txt)|(?:\.?[\w-]+/)+")
"""A path of a file, or of a folder."""
ELSEWHERE = {
    "__init__.py",
    "einsum", "la", "torch", "weights_only",  # PyTorch's, and what snippets are about
    "MyLikelihood",  # a user's
}  # fmt: skip
"""Names that are no part of the code."""
FORMULA = re.compile(r"[^\x00-\x7f…]|^[A-Z]$|^\W+$|^\*")
"""Symbols, shapes and signs: these are no names."""
OPTIONS = {
    member.value
    for cls in vars(enums).values()
    if isinstance(cls, type) and issubclass(cls, enums.Enum)
    for member in cls
}
"""What users write in quotes."""


# -- names --------------------------------------------------------------------------------------------------------------


@functools.cache
def defined() -> frozenset[str]:
    """Everything that the code defines: modules, classes, functions, arguments, attributes, variables, options."""
    found = OPTIONS | owners().keys()
    for path in (
        path for folder in ("laplace", "tests", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.arg(arg=name):
                    found.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    found.add(name)
                case _:
                    pass
    return frozenset(found)


@functools.cache
def owners() -> dict[str, list[Any]]:
    """Modules by the last part of their names, and what they define, by name."""
    found: dict[str, list[Any]] = {}
    for module in pkgutil.walk_packages(laplace.__path__, "laplace."):
        loaded = importlib.import_module(module.name)
        found.setdefault(module.name.split(".")[-1], []).append(loaded)
        for name, value in vars(loaded).items():
            found.setdefault(name, []).append(value)
    return found


def has(owner: Any, name: str) -> bool:
    """Whether a class or module has a member: an attribute, an annotated field, or one that its methods assign."""
    if hasattr(owner, name) or not isinstance(owner, type):
        return hasattr(owner, name)
    ours = [base for base in owner.__mro__ if base.__module__.startswith("laplace.")]
    return any(name in vars(base).get("__annotations__", {}) for base in ours) or any(
        re.search(rf"self\.{name}\b.* = ", inspect.getsource(base)) for base in ours
    )


def file_exists(name: str) -> bool:
    """Whether a path is one of the repository or of ``laplace/``; of a bare name anywhere in there."""
    if "<name>" in name:  # of a file to be written: its folder
        return file_exists(name.rpartition("/")[0] + "/")
    if any((base / name).exists() for base in (ROOT, LIBRARY)):
        return True
    return "/" not in name and any(LIBRARY.rglob(name))


def missing_of(span: str) -> list[str]:
    """What does not exist of what stands in backticks; formulas are not looked at."""
    if FILE.fullmatch(span):
        return [] if span in ELSEWHERE or file_exists(span) else [span]
    if FORMULA.search(span):
        return []
    command = span.split()
    if command[0] in ("python", "make", "pip", "pre-commit"):
        return [word for word in command[1:] if FILE.fullmatch(word) and not file_exists(word)]
    try:
        tree = ast.parse(span.replace("…", "...").rstrip("=") if not span.startswith(".") else f"la{span}")
    except SyntaxError:
        return [span]
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in owners():
                found += [] if any(has(each, name) for each in owners()[owner]) else [f"{owner}.{name}"]
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                found += [] if len(name) == 1 or name in defined() | ELSEWHERE else [name]
            case ast.Constant(value=str(name)):
                found += [] if name in OPTIONS else [name]
            case _:
                pass
    return found


def missing(page: str) -> list[str]:
    """What a page names and nobody wrote: in backticks, and files, constants and classes in its blocks."""
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    found = [name for span in sorted(set(re.findall(r"`([^`\n]+)`", prose))) for name in missing_of(span)]
    for block in re.findall(r"^```\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        found += [name for name in re.findall(FILE, block) if name not in ELSEWHERE and not file_exists(name)]
        names = set(re.findall(r"\b(?:[A-Z]{4,}|[A-Z]\w*[a-z][A-Z]\w*)\b", block))
        found += sorted(name for name in names if name not in defined() | {"PyTorch", "BFGS"})
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    assert not missing(PAGES[page])


@pytest.mark.parametrize(
    "page",
    [
        "See `baselaplace/postirior.py`.",
        "See `tuning/base.py`.",  # there is one elsewhere
        "See `laplace/likelihoodz/<name>.py`.",
        "See `likelihoodz/`.",
        "See `WeightPosteriorr`.",
        "See `Fit.head_biaz`.",
        "See `FittedLaplace.accumulate`.",  # another class has one
        "See `kron.KronLaplaceCurvature`.",
        "Pass `hessian_shape=`.",
        'Pass `hessian_structure="dense"`.',
        "Call `optimize_posterior(method=…)`.",
        "Run `python docs/extensions/capability.py`.",
        "```\ntypes.py  tapes.py\n```",
        "```\nWeightPosterior\n```",
        "```\nmethods.py  METHODZ\n```",
    ],
)
def test_the_check_sees_what_does_not_exist(page: str) -> None:
    assert len(missing(page)) == 1


@pytest.mark.parametrize(
    "page",
    [
        "See `tuning/methods.py`, `kfac.py`, `laplace/network/heads.py`, `tests/structures/test_<name>.py` and `gp/`.",
        "See `METHODS`, `Fit.head`, `AbstractCurvature.check_memory` and `Λ ⊗ φφᵀ`.",
        'Pass `hessian_structure="gp"`, `rank=` and `tune(…)`; call `.fit()`.',
        "```\n3  tuning/ · gp/ · prior.py: METHODS of NetworkLinearization\n```",
    ],
)
def test_the_check_lets_others_pass(page: str) -> None:
    assert not missing(page)


# -- one keyword, one room ------------------------------------------------------------------------------------------------

KEYWORDS = DESIGN.split("## One keyword, one room")[1].split("\n## ")[0]
CALLS = ("__init__", "__call__", "fit", "tune", "optimize_prior_precision", "sample", "functional_samples")


def keywords() -> set[str]:
    """Of the constructors and methods of all estimators."""
    calls = [getattr(cls, name) for cls in {*ESTIMATORS.values(), *FUNCTIONAL.values()} for name in CALLS]
    found = [p for call in [*calls, laplace.Laplace] for p in inspect.signature(call).parameters.values()]
    return {p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self", "x", "X"}


def rooms() -> dict[str, list[Path]]:
    """Keyword to the files and folders that its row names."""
    found: dict[str, list[Path]] = {}
    for row in re.findall(r"^\| (`.*) \| (.*) \|$", KEYWORDS, re.MULTILINE):
        places = [LIBRARY / span for span in re.findall(r"`([^`]+)`", row[1]) if FILE.fullmatch(span)]
        for span in re.findall(r"`([^`]+)`", row[0]):
            for name in re.findall(r"\w+", re.sub(r'".*?"', "", span)):
                found.setdefault(name, []).extend(places)
    return found


def test_every_keyword_has_a_room() -> None:
    assert not keywords() - rooms().keys()


def test_the_reference_knows_every_keyword() -> None:
    page = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    assert not keywords() - set(re.findall(r"\w+", page))


@pytest.mark.parametrize("name", sorted(keywords()))
def test_the_room_of_a_keyword_knows_it(name: str) -> None:
    files = [file for place in rooms().get(name, []) for file in ([place] if place.is_file() else place.rglob("*.py"))]
    assert any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for file in files)


# -- storeys and classes --------------------------------------------------------------------------------------------------


def test_storeys_are_those_that_are_tested() -> None:
    block = DESIGN.split("## Storeys")[1].split("```")[1]
    found = {
        int(number): set(re.findall(r"(\w+)(?:\.py|/)", rest)) for number, rest in re.findall(r"(\d)  (.*)", block)
    }
    assert found == STOREYS


def test_the_tree_of_classes_is_that_of_the_code() -> None:
    block = DESIGN.split("## Who declares what")[1].split("```")[1]
    parents: list[tuple[int, type]] = []
    for line in block.strip().splitlines():
        depth = re.search(r"\w", line)
        names = re.match(r"\W*((?:\w+(?:, )?)+)", line)
        assert depth is not None
        assert names is not None
        classes = [value for name in names[1].split(", ") if name for value in owners()[name][:1]]
        assert classes
        parents = [(indent, cls) for indent, cls in parents if indent < depth.start()]
        assert all(issubclass(cls, parents[-1][1]) for cls in classes if parents), line
        parents.append((depth.start(), classes[0]))


# -- recipes --------------------------------------------------------------------------------------------------------------

OF_ONE_KIND = {
    "Add a likelihood": ("poisson|Poisson", r"\bbinary\b|Bernoulli"),
    "Add a link": ("bridge_norm|BRIDGE_NORM", "probit|PROBIT"),
    "Add a structure": ("(?i)ekfac", "(?i)blockdiag", "(?i)lowrank"),
    "Add a curvature back end": ("(?i)backpack", "(?i)asdl(?!_fisher)", "(?i)curvlinops"),
    "Add a kind of random weights": (r'"subnetwork"|SUBNETWORK|[^L]Subnetwork\b', r'"last_layer"|LAST_LAYER|LastLayer'),
    "Add a way to choose hyperparameters": (r'"loo"|\bLOO\b', r'"cv"|\bCV\b', "gridsearch|GRIDSEARCH"),
}
"""Recipe to how things of its kind are called: where all of them occur, the next one will."""
NO_PLACES = {
    "Add a likelihood": {
        "tests/test_exported.py", "tests/test_house.py", "tests/test_likelihood_objects.py", "tests/network/test_scoremask.py",
    },
    "Add a curvature back end": {
        "tests/test_rebuilding.py", "tests/likelihoods/test_fits.py", "docs/differences.md", "docs/migrating.md",
    },
    "Add a kind of random weights": {
        "laplace/baselaplace/options.py", "tests/baselaplace/test_names_of_old_code.py",
        "tests/baselaplace/test_subset_of_data.py", "tests/network/test_subnetmask.py",
    },
}  # fmt: skip
"""Where they occur for another reason: as examples, or as what one of them does not do."""


def recipe(title: str) -> str:
    """The text of a recipe."""
    return CONTRIBUTING.split(f"## {title}\n")[1].split("\n## ")[0]


@functools.cache
def texts() -> dict[str, str]:
    """Files of the library, of its tests and of its documentation."""
    found = [path for folder in ("laplace", "tests", "docs") for path in (ROOT / folder).rglob("*")]
    found = [path for path in found if path.suffix in (".py", ".md") and path != Path(__file__)]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


@functools.cache
def places(title: str) -> set[str]:
    """Files in which all things of a kind occur."""
    return {name for name, text in texts().items() if all(re.search(word, text) for word in OF_ONE_KIND[title])}


def named(text: str) -> set[str]:
    """Files that the tables of a recipe name."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return {span for row in rows for span in re.findall(r"`([^`]+)`", row) if FILE.fullmatch(span)}


@pytest.mark.parametrize("title", OF_ONE_KIND)
def test_a_recipe_names_every_place(title: str) -> None:
    assert places(title) - named(recipe(title)) == NO_PLACES.get(title, set())


@pytest.mark.parametrize("title", OF_ONE_KIND)
def test_a_place_that_a_recipe_leaves_out_is_seen(title: str) -> None:
    text = recipe(title)
    for place in places(title) & named(text):
        assert place in places(title) - named(text.replace(f"`{place}`", ""))


def test_the_code_of_a_likelihood_is_in_four_files() -> None:
    """Others name it in docstrings at most: the recipe says so. Dispersed counts derive from it."""
    code = {name for name, text in texts().items() if re.search(r"\bPOISSON\b|\bPoisson[A-Z]\w+", text)}
    assert {name for name in code if name.startswith("laplace/")} - {"laplace/likelihoods/negative_binomial.py"} == {
        "laplace/likelihoods/poisson.py",
        "laplace/likelihoods/__init__.py",
        "laplace/likelihoods/names.py",
        "laplace/enums.py",
    }
    assert "`LIKELIHOODS`" in recipe("Add a likelihood")


def test_the_pages_know_the_same_recipes() -> None:
    titles = set(re.findall(r"^## ((?:Add|Teach) .*)$", CONTRIBUTING, re.MULTILINE))
    assert titles == set(re.findall(r"\*((?:Add|Teach) [^*]+)\* \|$", DESIGN, re.MULTILINE))
