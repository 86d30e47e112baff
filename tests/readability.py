"""Measures of how much one line of Python asks of its reader.

The limits in `tests/test_house.py` were set beside packages that are known for being easy to read.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

VAGUE_NAMES = frozenset(
    [
        "again",
        "asked",
        "data2",
        "found",
        "foo",
        "here",
        "its",
        "known",
        "left",
        "like",
        "made",
        "more",
        "near",
        "obj",
        "one",
        "ones",
        "other",
        "others",
        "ours",
        "own",
        "rest",
        "said",
        "stuff",
        "theirs",
        "there",
        "thing",
        "things",
        "tmp",
        "told",
        "wanted",
        "what",
        "which",
    ]
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Readability:
    """Measures of some files.

    nodes_per_line:    syntax nodes per line of code inside functions.
    tuple_assignments: share of assignments that bind several names to several expressions.
    comprehensions:    per 100 lines. conditionals: conditional expressions per 100 lines.
    vague_names:       share of bound names that say nothing about the domain.
    """

    nodes_per_line: float
    tuple_assignments: float
    comprehensions: float
    conditionals: float
    vague_names: float


def measure(paths: Iterable[Path]) -> Readability:
    """Measure some Python files together."""
    total = _Totals()
    for path in paths:
        _add(total, path)
    return Readability(
        nodes_per_line=total.nodes / max(1, total.function_lines),
        tuple_assignments=total.tuple_assignments / max(1, total.assignments),
        comprehensions=100 * total.comprehensions / max(1, total.lines),
        conditionals=100 * total.conditionals / max(1, total.lines),
        vague_names=total.vague / max(1, total.names),
    )


@dataclass
class _Totals:
    nodes: int = 0
    function_lines: int = 0
    lines: int = 0
    assignments: int = 0
    tuple_assignments: int = 0
    comprehensions: int = 0
    conditionals: int = 0
    names: int = 0
    vague: int = 0


def _add(total: _Totals, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    total.lines += sum(1 for line in lines if line.strip())
    for function in _outermost_functions(tree):
        body = _without_docstring(function)
        if body:
            total.nodes += sum(1 for statement in body for _ in ast.walk(statement))
            code = lines[body[0].lineno - 1 : body[-1].end_lineno]
            total.function_lines += sum(1 for line in code if _is_code(line))
    for node in ast.walk(tree):
        total.comprehensions += isinstance(node, COMPREHENSIONS)
        total.conditionals += isinstance(node, ast.IfExp)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            total.assignments += 1
            total.tuple_assignments += _binds_several(node)
    names = list(_bound_names(tree))
    total.names += len(names)
    total.vague += sum(name in VAGUE_NAMES for name in names)


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            yield child
        else:
            yield from _outermost_functions(child)


def _without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    has_docstring = ast.get_docstring(function, clean=False) is not None
    return function.body[1:] if has_docstring else function.body


def _is_code(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _binds_several(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> bool:
    """`a, b = x, y`; unpacking a single value is something else."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def _bound_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
