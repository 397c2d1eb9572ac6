"""Limits of size, which keep every file and every function within one look."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("src/bitknap", "allocation", "benchmarks", "estimators", "kernels", "quantize", "tests")
LINES_OF_A_FILE = 400
FILES_OF_A_FOLDER = 16
LINES_OF_A_FUNCTION = 60
ARGUMENTS = 7


@cache
def files():
    """Return our files by their path in the checkout, each once: not behind a link."""
    return {
        str(file.relative_to(ROOT)): file
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file.resolve() == file
    }


@cache
def functions(path):
    """Return each function of a module, and whether its first argument is given."""
    return list(_functions(ast.parse(files()[path].read_text(encoding="utf-8"))))


def _functions(parent):
    """Yield the functions among a node's statements, at any depth; expressions hold none."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for node in getattr(parent, field, ()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                roots = {root(decorator) for decorator in node.decorator_list}
                method = isinstance(parent, ast.ClassDef) and "staticmethod" not in roots
                if "triton" not in roots:
                    yield node, method
            yield from _functions(node)


def root(decorator):
    """Return the first name of a decorator: "triton" of `@triton.jit(...)`."""
    while not isinstance(decorator, ast.Name):
        decorator = decorator.func if isinstance(decorator, ast.Call) else decorator.value
    return decorator.id


def longest(path):
    """Return the lines of each function that has too many, by path and name."""
    sizes = {f"{path}:{f.name}": f.end_lineno - f.lineno + 1 for f, _ in functions(path)}
    return {name: lines for name, lines in sizes.items() if lines > LINES_OF_A_FUNCTION}


def many(path):
    """Return the arguments of each public function that has too many, by path and name."""
    counts = {}
    for f, method in functions(path):
        given = f.args.posonlyargs + f.args.args + f.args.kwonlyargs
        if not f.name.startswith("_") or f.name == "__init__":
            counts[f"{path}:{f.name}"] = len(given) - method
    return {name: count for name, count in counts.items() if count > ARGUMENTS}


def test_files_are_short():
    lines = {path: file.read_text("utf-8").count("\n") for path, file in files().items()}
    assert {path for path, count in lines.items() if count > LINES_OF_A_FILE} == set()


def test_folders_have_few_modules():
    counts: dict[Path, int] = {}
    for file in files().values():
        counts[file.parent] = counts.get(file.parent, 0) + 1
    assert {folder for folder, count in counts.items() if count > FILES_OF_A_FOLDER} == set()


def test_functions_are_short():
    """Triton kernels are exempt: they cannot be cut without costing speed."""
    assert {name for path in files() for name in longest(path)} == set()


@pytest.mark.slow
def test_public_functions_have_few_arguments():
    assert {name for path in files() for name in many(path)} == set()
