"""Static types: what signatures say is what runs, and pyright and mypy find the mistakes of `typos.py` and no others."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typing_extensions

from laplace import BaseFunctionalLaplace, BaseLaplace, Laplace, ParametricLaplace, enums, overloads, types
from laplace.baselaplace import calling, keywords
from laplace.baselaplace.fitted import FittedLaplace
from laplace.baselaplace.options import check_backend_keywords
from laplace.curvature import BACKENDS
from laplace.evaluation.conformal import INTERVALS, SETS, Method
from laplace.laplace import ESTIMATORS, FUNCTIONAL
from laplace.likelihoods import LIKELIHOODS, MomentsLike, ProbabilitiesLike
from laplace.likelihoods.predictions import PredictsMoments, PredictsProbabilities
from laplace.likelihoods.softmax import LINKS
from laplace.predictive.keywords import PredictionKeywords, PredictKeywords
from laplace.several import SeveralHeads
from laplace.tuning.methods import METHODS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
USER, TYPOS = HERE / "user.py", HERE / "typos.py"

# -- names ----------------------------------------------------------------------------------------------------------------


def texts(alias: Any) -> set[str]:
    """The texts in an alias, without members of enums."""
    if get_origin(alias) is Literal:
        return {value for value in get_args(alias) if isinstance(value, str) and not isinstance(value, Enum)}
    return {text for part in get_args(alias) for text in texts(part)}


@pytest.mark.parametrize("name", [name for name in types.__all__ if name.endswith("Like")])
def test_an_option_takes_its_members_and_their_texts(name: str) -> None:
    alias, enum = getattr(types, name), getattr(enums, name.removesuffix("Like"))
    assert enum in get_args(alias)
    assert texts(alias) == {member.value for member in enum}


@pytest.mark.parametrize(
    ("alias", "base"), [(ProbabilitiesLike, PredictsProbabilities), (MomentsLike, PredictsMoments)], ids=str
)
def test_a_likelihood_is_named_with_those_that_predict_the_same(alias: Any, base: type) -> None:
    own = {name for name, cls in LIKELIHOODS.items() if issubclass(cls, base)}
    members = {value for part in get_args(alias) for value in get_args(part) if isinstance(value, Enum)}
    assert base in get_args(alias)
    assert members == own
    assert texts(alias) == {member.value for member in own}


def test_methods_and_links_are_those_of_the_tables() -> None:
    assert set(get_args(Method)) == {*SETS, *INTERVALS}
    assert texts(types.LinkApproxLike) == {link.value for link in LINKS}
    assert texts(types.TuningMethodLike) == {method.value for method in METHODS if method is not None}


# -- keywords -------------------------------------------------------------------------------------------------------------


def hints(where: Any) -> dict[str, Any]:
    """Resolved annotations, by name."""
    return typing_extensions.get_type_hints(where, localns={"BaseLaplace": BaseLaplace}, include_extras=True)


def keywords_of(function: Callable[..., Any], *left_out: str) -> dict[str, Any]:
    """The annotation of each keyword of a function."""
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind not in kinds and p.name not in ("self", *left_out)]
    return {name: hints(function)[name] for name in named}


def needed(function: Callable[..., Any]) -> set[str]:
    """Keywords without a default."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is p.empty} - {"self", "model", "likelihood"}


def declared() -> list[dict[str, Any]]:
    """The declarations of `Laplace` for one structure and one choice of weights each."""
    found = [hints(function) for function in typing_extensions.get_overloads(overloads.Laplace)]
    return [
        each for each in found if (get_origin(each["return"]) or each["return"]) not in (FittedLaplace, SeveralHeads)
    ]


def test_every_class_of_the_tables_is_declared() -> None:
    found: dict[Any, type] = {}
    for each in declared():
        names = ("subset_of_weights", "hessian_structure", "functional_approximation")
        members = [value for name in names for value in get_args(each.get(name)) if isinstance(value, Enum)]
        found[tuple(member for member in members if member is not enums.HessianStructure.GP)] = get_origin(
            each["return"]
        )
    assert found == {**ESTIMATORS, **FUNCTIONAL}


@pytest.mark.parametrize("each", declared(), ids=lambda each: get_origin(each["return"]).__name__)
def test_a_declaration_has_the_keywords_of_its_class(each: dict[str, Any]) -> None:
    cls = get_origin(each["return"])
    (options,) = get_args(each["options"])
    assert hints(options) == keywords_of(cls.__init__, "model", "likelihood")
    assert options.__required_keys__ == needed(cls.__init__)


def test_keywords_of_some_estimator_are_those_of_all() -> None:
    found: dict[str, Any] = {}
    for cls in (*ESTIMATORS.values(), *FUNCTIONAL.values()):
        found.update(keywords_of(cls.__init__, "model", "likelihood"))
    assert hints(keywords.AnyKeywords) == found


def test_the_docstring_of_the_factory_names_every_keyword() -> None:
    said = set(re.findall(r"``(\w+)``", Laplace.__doc__ or ""))
    assert hints(keywords.AnyKeywords).keys() <= said


@pytest.mark.parametrize(
    ("options", "function", "left_out"),
    [
        (keywords.TuneKeywords, FittedLaplace.tune, ["val_loader"]),
        (keywords.OptimizeKeywords, BaseLaplace.optimize_prior_precision, ["method"]),
        (PredictionKeywords, ParametricLaplace.__call__, ["x"]),
        (PredictKeywords, FittedLaplace.predict, ["x", "fitting"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_keywords_that_are_passed_on_are_those_of_the_method(options: Any, function: Any, left_out: list[str]) -> None:
    assert hints(options) == keywords_of(function, *left_out)


def test_processes_pass_on_what_other_estimators_take_by_name_alone() -> None:
    parameters = inspect.signature(BaseLaplace.optimize_prior_precision).parameters.values()
    assert hints(keywords.FurtherKeywords).keys() == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("cls", [ParametricLaplace, BaseFunctionalLaplace])
def test_a_call_is_declared_with_its_keywords(cls: Any) -> None:
    for function in typing_extensions.get_overloads(calling.call):
        own = keywords_of(function)
        assert list(own) == list(keywords_of(cls.__call__))
        assert {**own, "fitting": bool} == keywords_of(cls.__call__)
        assert hints(function)["model_kwargs"] == hints(cls.__call__)["model_kwargs"] == types.ModelKeyword


def test_a_back_end_takes_the_keywords_that_are_declared() -> None:
    taken: set[str] = set()
    for name in hints(keywords.BackendKeywords):
        for backend in BACKENDS:
            try:
                check_backend_keywords(backend, {name: None})
            except TypeError:
                continue
            taken.add(name)
    assert taken == set(hints(keywords.BackendKeywords))


# -- pyright and mypy -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """The library is found as an installed package is."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}


def mistakes() -> set[tuple[str, int]]:
    """Where `typos.py` says that there is one."""
    lines = TYPOS.read_text(encoding="utf-8").splitlines()
    return {(TYPOS.name, number) for number, line in enumerate(lines, 1) if "# typo: " in line}


def run(*command: str) -> str:
    """What a checker prints."""
    found = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert found.returncode == 1, found.stdout + found.stderr
    return found.stdout


@pytest.mark.filterwarnings("ignore::UserWarning")  # ten rows are too few to choose by
def test_the_script_of_a_user_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(USER), run_name="__main__")
    assert "KronLLLaplace" in capsys.readouterr().out


def test_there_are_ten_mistakes_and_more() -> None:
    assert len(mistakes()) >= 10


def test_pyright_finds_the_mistakes_and_no_others() -> None:
    said = run("pyright", "--project", str(HERE / "pyrightconfig.json"), "--pythonpath", sys.executable, "--outputjson")
    found = json.loads(said)["generalDiagnostics"]
    errors = {(Path(each["file"]).name, each["range"]["start"]["line"] + 1): each["message"] for each in found}
    assert errors.keys() == mistakes(), errors


@pytest.mark.slow
def test_mypy_finds_the_mistakes_and_no_others(tmp_path: Path) -> None:
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}", f"--python-executable={sys.executable}"]
    run("mypy", *options, str(TYPOS))  # the second run reads the library from the cache
    said = run("mypy", *options, str(USER), str(TYPOS))
    errors = {(Path(file).name, int(line)) for file, line in re.findall(r"^(.*?):(\d+): error:", said, re.MULTILINE)}
    assert errors == mistakes(), said
