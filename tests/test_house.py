"""The plan of the house itself: size of files, direction of imports, what an import loads, tables and names."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import laplace
from laplace import enums

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "laplace"
MAX_CODE = 300
MAX_TEST_CODE = 350
"""Lines of code in a file; docstrings, comments and blank lines are apart, so that nobody saves on them."""

STOREYS = {
    0: {
        "attributes",
        "checks",
        "enums",
        "linalg",
        "errors",
        "free_memory",
        "pending",
        "optimizers",
        "optional",
        "processes",
        "schema",
        "types",
    },
    1: {"structures", "likelihoods", "network", "prior", "density"},
    2: {"curvature", "fit"},
    3: {"tuning", "predictive", "gp", "evaluation"},
    4: {"baselaplace", "lllaplace", "subnetlaplace"},
    5: {"laplace", "loading", "marglik_training", "overloads", "several"},
    6: {"utils", "integrations", "__init__"},
}
"""A room may import from its own storey and from lower ones. `__init__` is the front door, `utils` has doors only."""
STOREY = {room: storey for storey, rooms in STOREYS.items() for room in rooms}

CLOSED = {
    "structures": {"likelihoods"},
    "likelihoods": {"network", "structures", "prior"},
    "network": {"structures", "prior"},
    "prior": {"structures", "likelihoods"},
    "density": {"structures", "likelihoods", "network", "prior"},
    "curvature": {"prior"},
    "predictive": {"curvature"},
}
"""Doors that stay shut although the storeys would allow them: room -> rooms it never imports."""
NETWORK_FOR_SIZES = {"structures", "prior"}
"""Rooms that may know the sizes of the parameters, and nothing else of the network."""

HEAVY = {
    "accelerate", "asdl", "backpack", "botorch", "curvlinops", "gpytorch", "lightning", "linear_operator", "matplotlib",
    "mlxtend", "onnx", "onnxruntime", "onnxscript", "pandas", "scipy", "skorch", "sklearn", "torchmetrics", "torchvision",
    "transformers",
}  # fmt: skip
"""Packages that `import laplace` must not load: they are optional, or slow to import, or both."""

TABLES = [
    ("laplace.laplace", "ESTIMATORS", (enums.SubsetOfWeights, enums.HessianStructure)),
    ("laplace.laplace", "FUNCTIONAL", (enums.SubsetOfWeights, enums.FunctionalApproximation)),
    ("laplace.likelihoods", "LIKELIHOODS", (enums.Likelihood,)),
    ("laplace.structures", "STRUCTURES", (enums.HessianStructure,)),
    ("laplace.likelihoods.softmax", "LINKS", (enums.LinkApprox,)),
]
"""(module, table, enums of its keys): the literal tables that turn an option into its implementation."""


def module_name(path: Path) -> str:
    """`laplace/network/batches.py` -> `laplace.network.batches`; a package keeps its `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    """The part of a dotted name that STOREY knows."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_modules(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import from the library, wherever in the file it stands."""
    package = module.split(".")[:-1]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*anchor, *([node.module] if node.module else [])])
            if origin == "laplace":  # rooms are taken by name, anything else comes through the front door
                found = [f"laplace.{alias.name}" if alias.name in STOREY else "laplace" for alias in node.names]
            elif origin == "laplace.network":
                found = [f"{origin}.{alias.name}" for alias in node.names]
            else:
                found = [origin]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] == "laplace")


def broken_rules(source: str, module: str) -> list[str]:
    """What the imports of one module do against the plan."""
    room, broken = room_of(module), []
    for line, target in imported_modules(source, module):
        other = room_of(target)
        if other == room:
            continue
        where = f"{module}:{line} imports {target}: "
        if other not in STOREY:
            broken.append(where + f"{other!r} has no storey")
        elif STOREY[other] > STOREY[room]:
            broken.append(where + f"storey {STOREY[room]} may not import from storey {STOREY[other]}")
        elif other == "utils":
            broken.append(where + "utils holds forwarding addresses for users; import from the real home")
        elif other in CLOSED.get(room, ()):
            broken.append(where + f"{room} never imports {other}")
        elif other == "network" and room in NETWORK_FOR_SIZES and not target.startswith("laplace.network.parameters"):
            broken.append(where + f"{room} may use network.parameters only")
    return broken


parsed = functools.cache(ast.parse)
"""Source to tree: several tests read the same files."""

LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
ALL_FILES = sorted(
    path
    for folder in ("laplace", "tests", "benchmarks", "clients", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = ["laplace", *sorted(module.name for module in pkgutil.walk_packages(laplace.__path__, "laplace."))]


def name_of(path: Path) -> str:
    """A readable test id."""
    return str(path.relative_to(ROOT))


NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER
}  # fmt: skip


def lines_of_code(path: Path) -> int:
    """Lines that hold more than a string that stands alone, a comment or nothing."""
    lone = (
        node
        for node in ast.walk(parsed(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    prose = {line for node in lone for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in NOT_CODE]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - prose)


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    most = MAX_CODE if LIBRARY in path.parents else MAX_TEST_CODE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most or lines_of_code(path) <= most


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(parsed(path.read_text(encoding="utf-8"))), "say what lives here"


def test_every_room_has_a_storey() -> None:
    rooms = {room_of(module_name(path)) for path in LIBRARY_FILES}
    assert rooms <= set(STOREY), f"give {rooms - set(STOREY)} a storey in STOREYS"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    assert not broken_rules(path.read_text(encoding="utf-8"), module_name(path))


FIRST_CALLS = """
import sys, torch
from torch import nn
compiler = {"torch._dynamo", "sympy"} - set(sys.modules)
from laplace import Laplace
x, y = torch.randn(12, 2), torch.arange(12) % 3
model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
for subset in ("last_layer", "all"):
    la = Laplace(model, "classification", subset, "kron")
    la.fit([(x, y)])
    la.tune([(x, y)])
    la.optimize_prior_precision()
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=3)
    la(x)
    la(x, pred_type="nn", n_samples=2)
print(compiler & set(sys.modules))
"""


def test_first_calls_do_not_load_the_compiler_of_pytorch() -> None:
    """It takes seconds, and an interruption while it is loaded breaks every later call."""
    command = [sys.executable, "-W", "ignore", "-c", FIRST_CALLS]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("laplace.enums", "from laplace.prior import GaussianPrior", "storey 0 may not import from storey 1"),
        ("laplace.network.batches", "from ..curvature import autograd", "storey 1 may not import from storey 2"),
        ("laplace.tuning.marglik", "import laplace.baselaplace.full", "storey 3 may not import from storey 4"),
        ("laplace.fit", "from . import tuning", "storey 2 may not import from storey 3"),
        ("laplace.prior", "from laplace import Laplace", "storey 1 may not import from storey 6"),
        ("laplace.linalg", "if TYPE_CHECKING:\n    from laplace.types import A\n    import laplace.fit", "storey 0"),
        ("laplace.lllaplace", "def f():\n    from laplace.utils.matrix import Kron", "storey 4 may not"),
        ("laplace.__init__", "from laplace.utils.matrix import Kron", "forwarding addresses"),
        ("laplace.structures.full", "from laplace.likelihoods.base import X", "structures never imports likelihoods"),
        ("laplace.structures.full", "from laplace.network import batches", "network.parameters only"),
        ("laplace.likelihoods.base", "from laplace import network", "likelihoods never imports network"),
        ("laplace.curvature.kfac", "from ..prior import GaussianPrior", "curvature never imports prior"),
        ("laplace.predictive.pairs", "from laplace.curvature import x", "predictive never imports curvature"),
        ("laplace.fit", "import laplace.attic", "'attic' has no storey"),
    ],
)
def test_the_checker_sees_a_bad_import(module: str, source: str, complaint: str) -> None:
    broken = broken_rules(source, module)
    assert len(broken) == 1
    assert complaint in broken[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("laplace.structures.kron", "from laplace.network.parameters import expand_groups"),
        ("laplace.structures.kron", "from ..network import parameters\nfrom .base import X\nfrom laplace import prior"),
        ("laplace.curvature.autograd", "import torch\nfrom laplace.likelihoods import X\nfrom . import last_layer"),
        ("laplace.utils.matrix", "from laplace.structures.kron import Kron"),
        ("laplace.utils.__init__", "from laplace.utils.matrix import Kron"),
        ("laplace.__init__", "from laplace.laplace import Laplace"),
        ("laplace.evaluation.plots", "import laplaced\nfrom . import metrics"),
    ],
)
def test_the_checker_lets_a_good_import_pass(module: str, source: str) -> None:
    assert broken_rules(source, module) == []


# -- which likelihood it is, nobody asks ------------------------------------------------------------------------------

KNOW_LIKELIHOODS = {"enums", "laplace", "likelihoods"}
"""Rooms that may: the names, the factory, and the room itself."""
CAPABILITIES = {"compares", "has_link", "has_noise", "n_items"}
"""What would say it."""


def left_out(tree: ast.Module) -> set[ast.AST]:
    """Annotations, and defaults of signatures."""
    roots: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            roots += [*node.defaults, *node.kw_defaults]
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            roots.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            roots.append(node.returns)
    return {node for root in roots if root is not None for node in ast.walk(root)}


def names_in(node: ast.AST) -> set[str]:
    """Names and attributes anywhere in an expression."""
    parts = list(ast.walk(node))
    return {part.id for part in parts if isinstance(part, ast.Name)} | {
        part.attr for part in parts if isinstance(part, ast.Attribute)
    }


def questions(source: str) -> list[str]:
    """Where code asks which likelihood it has: by a member of the enum, its name, its class or a capability."""
    tree, found = parsed(source), []
    aside = left_out(tree)
    for node in ast.walk(tree):
        if node in aside:
            continue
        match node:
            case ast.Attribute(value=ast.Name("Likelihood") | ast.Attribute(attr="Likelihood")):
                found.append(node)
            case ast.Call(func=ast.Name("Likelihood") | ast.Attribute(attr="Likelihood")):
                found.append(node)
            case ast.Subscript(value=ast.Name("Likelihood") | ast.Attribute(attr="Likelihood")):
                found.append(node)
            case ast.Call(func=ast.Name("isinstance" | "issubclass"), args=[_, classes]):
                found += [node] * any(name.endswith("Likelihood") for name in names_in(classes))
            case ast.Attribute(attr=name) if name in CAPABILITIES:
                found.append(node)
            case ast.Constant(value=str(text)) if text in set(enums.Likelihood):
                found.append(node)
            case ast.Compare():
                sides = [node.left, *node.comparators]
                found += [node] * any(
                    isinstance(side, ast.Attribute) and side.attr == "name" and "ikelihood" in ast.unparse(side)
                    for side in sides
                )
            case _:
                pass
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found]


@pytest.mark.parametrize(
    "path", [path for path in LIBRARY_FILES if room_of(module_name(path)) not in KNOW_LIKELIHOODS], ids=name_of
)
def test_nobody_asks_which_likelihood_it_is(path: Path) -> None:
    assert not questions(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "if likelihood is Likelihood.REGRESSION: pass",
        "LOSSES = {enums.Likelihood.CLASSIFICATION: loss}",
        "if self.likelihood == Likelihood(name): pass",
        "if likelihood == 'classification': pass",
        "match likelihood:\n    case 'poisson': pass",
        "loss = {'binary': loss}[self.likelihood]",
        "if isinstance(self.likelihood, (int, likelihoods.GaussianLikelihood)): pass",
        "issubclass(cls, BradleyTerryLikelihood)",
        "rows = rows * self.output_likelihood.n_items",
        "def f(likelihood=Likelihood.REGRESSION):\n    return likelihood.has_noise",
        "if likelihood.name == other: pass",
    ],
)
def test_the_checker_sees_a_question(source: str) -> None:
    assert len(questions(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f(likelihood: Likelihood | str = Likelihood.CLASSIFICATION, *, kind: Any = 'binary') -> Likelihood: ...",
        "self.likelihood: Literal['regression'] = choose(Likelihood, likelihood, 'likelihood')",
        "ALL = frozenset(Likelihood)\nloss = self.output_likelihood.torch_loss()",
        "msg = f'likelihood={self.likelihood!r} takes no classification'\nname = likelihood.name",
        "if isinstance(prior, GaussianPrior) and parameter.name == 'weight': pass",
    ],
)
def test_the_checker_lets_others_pass(source: str) -> None:
    assert questions(source) == []


@pytest.mark.parametrize("path", sorted((LIBRARY / "utils").glob("*.py")), ids=name_of)
def test_doors_only_forward(path: Path) -> None:
    docstring, *body = parsed(path.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    for node in body:
        is_all = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        assert is_all or isinstance(node, (ast.Import, ast.ImportFrom)), ast.unparse(node)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_resolve(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    for attribute in public:
        getattr(module, attribute)


def test_the_front_door_lists_its_names() -> None:
    assert "Laplace" in laplace.__all__
    assert set(laplace.__all__) <= set(dir(laplace))


def test_import_loads_nothing_optional() -> None:
    code = "import sys, laplace; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "laplace" in loaded.split()
    assert HEAVY.isdisjoint(loaded.split())


@pytest.mark.parametrize(("module", "table", "keys"), TABLES, ids=lambda value: value if isinstance(value, str) else "")
def test_table_keys_are_options(module: str, table: str, keys: tuple[type, ...]) -> None:
    rows = getattr(importlib.import_module(module), table)
    assert rows
    for key, value in rows.items():
        parts = key if isinstance(key, tuple) else (key,)
        assert [type(part) for part in parts] == list(keys), f"{key!r} is not made of members of {keys}"
        assert callable(value), f"{table}[{key!r}] is not something to call"


def test_every_link_has_an_implementation() -> None:
    links = importlib.import_module("laplace.likelihoods.softmax").LINKS
    assert set(links) == set(enums.LinkApprox)


MOST_ANCESTORS = 5
"""Of an estimator, without `object` and `ABC`."""


def estimators() -> list[type]:
    """All classes of estimators, public or not."""
    found, todo = [], [laplace.BaseLaplace]
    while todo:
        found.append(todo[0])
        todo = [*todo[1:], *(cls for cls in todo[0].__subclasses__() if cls.__module__.startswith("laplace."))]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("cls", estimators(), ids=lambda cls: cls.__name__)
def test_an_estimator_has_few_ancestors(cls: type) -> None:
    assert len([base for base in cls.__mro__[1:] if base.__module__.startswith("laplace.")]) <= MOST_ANCESTORS


def test_no_class_of_estimators_is_there_for_one_other() -> None:
    """A class without a public name has several children, or none."""
    public = {getattr(laplace, name) for name in laplace.__all__}
    for cls in estimators():
        children = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("laplace.")]
        assert cls in public or len(children) != 1, f"{cls.__name__} is there for {children[0].__name__} alone"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=name_of)
def test_whether_a_head_has_a_bias_is_said_by_its_groups(path: Path) -> None:
    assert "bias: bool" not in path.read_text(encoding="utf-8"), "a head is a list of parameter groups (HeadBlock)"
