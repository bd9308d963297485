"""Small changes of expressions: what `mutants.py` draws from."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*"}
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
TRANSPOSED = {"T", "mT"}


class Mutant(NamedTuple):
    """One change: file, line, which kind, and the text before and after."""

    path: str
    line: int
    kind: str
    start: int
    stop: int
    before: str
    after: str

    @property
    def room(self) -> str:
        """The room that it is in."""
        return Path(self.path).parts[1]

    @property
    def code(self) -> str:
        """The line that it is in."""
        return (ROOT / self.path).read_text().splitlines()[self.line - 1].strip()

    @property
    def change(self) -> tuple[str, ...]:
        """What it is, wherever its line is."""
        return self.path, self.code, self.kind, self.before, self.after

    def applied(self, source: bytes) -> bytes:
        """The changed file; all other lines keep their numbers.

        Parameters
        ----------
        source
            The file as it is.
        """
        lines = "\n" * (self.before.count("\n") - self.after.count("\n"))
        return source[: self.start] + f"{self.after[:-1]}{lines})".encode() + source[self.stop :]


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a file.

    Parameters
    ----------
    path
        Of the file.
    """
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.expr) -> str:
        return source[slice(*span(node))].decode()

    for node in executed(ast.parse(source)):
        for kind, after in changes(node, text):
            start, stop = span(node)
            name = str(path.relative_to(ROOT))
            yield Mutant(name, node.lineno, kind, start, stop, text(node), f"({after})")


def executed(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that compute something: no annotations, texts, errors or checks of types.

    Parameters
    ----------
    tree
        Where.
    """
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.JoinedStr, ast.Assert)):
                continue
            if isinstance(child, ast.Assign) and getattr(child.targets[0], "id", "") in ("msg", "__all__"):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from executed(child)


def changes(node: ast.expr, text: Callable[[ast.expr], str]) -> Iterator[tuple[str, str]]:
    """What an expression may become.

    Parameters
    ----------
    node
        The expression.
    text
        From an expression to its source.
    """
    if isinstance(node, ast.BinOp):
        # Of types and texts, sums are no arithmetic.
        if any(isinstance(side, (ast.List, ast.Tuple, ast.JoinedStr)) for side in (node.left, node.right)):
            return
        if other := OPERATORS.get(type(node.op)):
            yield "operator", f"({text(node.left)}) {other} ({text(node.right)})"
        if isinstance(node.op, (ast.Add, ast.Sub)):
            yield "dropped term", text(node.left)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        kind = "axis" if isinstance(node.operand, ast.Constant) and node.operand.value in (1, 2) else "sign"
        yield kind, "-3" if kind == "axis" else text(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield "comparison", f"{text(node.left)} {COMPARISONS[type(node.ops[0])]} {text(node.comparators[0])}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        yield "constant", repr(node.value + 1)
    elif isinstance(node, ast.Attribute) and node.attr in TRANSPOSED:
        yield "axis", text(node.value)
