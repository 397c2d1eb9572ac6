"""The rooms of the house: which may import which, read off every import statement.

`ORDER` is the one table. A module may import from its own room and from rooms above it in the
table, never from a room below; no imports run in a circle, be it of modules or of rooms.
"""

import ast
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "src/bitknap": "bitknap",
    "allocation": "bitknap.allocation",
    "benchmarks": "bitknap.benchmarks",
    "estimators": "bitknap.estimators",
    "kernels": "bitknap.kernels",
    "quantize": "bitknap.quantization",
}
# From the ground up: a line may use the lines above it. A name stands for a package with all
# in it, or for one module; the longest name that fits counts.
ORDER = """
bitknap.deprecation bitknap.errors bitknap.progress bitknap.version bitknap.quiet
bitknap.names
bitknap.arguments bitknap.disk

bitknap.allocation.codecs
bitknap.allocation.problem
bitknap.allocation.plans
bitknap.allocation.limits
bitknap.allocation.solvers
bitknap.allocation.search bitknap.allocation.tradeoffs
bitknap.allocation.refinement
bitknap.allocation.published
bitknap.allocation

bitknap.kernels.layout
bitknap.kernels.device
bitknap.kernels

bitknap.quantization.ggml
bitknap.quantization.models bitknap.quantization.rounding
bitknap.quantization.source
bitknap.quantization.transforms bitknap.quantization.stacks
bitknap.quantization.packed
bitknap.quantization.gguf
bitknap.quantization.runtime bitknap.quantization.targets
bitknap.quantization.vllm
bitknap.quantization

bitknap.estimators.measuring
bitknap.estimators.tables
bitknap.estimators.evidence
bitknap.estimators.sweep
bitknap.estimators.judging
bitknap.estimators.costs
bitknap.estimators.imported
bitknap.estimators.signals
bitknap.estimators.group_kl
bitknap.estimators.sparse
bitknap.estimators.published
bitknap.estimators

bitknap.report
bitknap.api
bitknap.testing
bitknap.benchmarks.models bitknap.benchmarks.reference bitknap.benchmarks.setting
bitknap.benchmarks.result_files bitknap.benchmarks.watched
bitknap.benchmarks.solvers bitknap.benchmarks.quantize
bitknap.benchmarks.kernels
bitknap.benchmarks.published
bitknap.benchmarks.compare bitknap.benchmarks.profiling
bitknap.benchmarks.questions
bitknap.benchmarks
bitknap.cli
bitknap.benchmarks.robustness
bitknap
"""
LEVEL = {name: level for level, line in enumerate(ORDER.splitlines()) for name in line.split()}


@cache
def modules():
    """Return the file of each module, by dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        base = ROOT / folder
        for file in base.rglob("*.py"):
            parts = file.relative_to(base).with_suffix("").parts
            if folder == "src/bitknap" and (base / parts[0]).is_symlink():
                continue
            name = [package, *parts[: -1 if parts[-1] == "__init__" else None]]
            found[".".join(name)] = file
    return found


@cache
def imports():
    """Return the modules that each module imports: at its top, in functions, and for types."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                full = (f"{node.module}.{alias.name}" for alias in node.names)
                graph[name] |= {one if one in known else str(node.module) for one in full}
        graph[name] -= {name}
    return graph


def room(module):
    """Return the name in `ORDER` that a module belongs to: the longest that fits."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(name for name in names if name in LEVEL)


def circle(graph):
    """Return nodes that lead back to the first of them, or None."""
    done: set[str] = set()
    for start in graph:
        path, waiting = [], [(start, iter(graph[start]))] if start not in done else []
        while waiting:
            node, rest = waiting[-1]
            if node not in path:
                path.append(node)
            following = next(rest, None)
            if following is None:
                done.add(node)
                path.pop()
                waiting.pop()
            elif following in path:
                return [*path[path.index(following) :], following]
            elif following not in done:
                waiting.append((following, iter(graph.get(following, ()))))
    return None


def test_every_module_has_a_room():
    assert set(LEVEL) - {room(name) for name in modules()} == set()
    strangers = [name for name in modules() if name.count(".") and room(name) == "bitknap"]
    assert sorted(strangers) == ["bitknap.__main__", "bitknap.transformers_hook"]


def test_no_import_goes_back_up():
    back = []
    for name, used in imports().items():
        for other in used:
            # A package's face names what is in it.
            face = modules()[name].name == "__init__.py" and other.startswith(f"{name}.")
            above = LEVEL[room(other)] < LEVEL[room(name)]
            if not (above or room(other) == room(name) or face):
                back.append(f"{name} imports {other}")
    assert back == []


def test_no_imports_run_in_a_circle():
    assert circle(imports()) is None


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_module_hides_behind_a_function():
    for name, file in modules().items():
        if file.name == "__init__.py":
            inside = {one.rpartition(".")[2] for one in modules() if one.rpartition(".")[0] == name}
            tree = ast.parse(file.read_text(encoding="utf-8"))
            named = {
                alias.asname or alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module != name
                for alias in node.names
            }
            assert inside & named == set(), name


def test_the_wheel_lists_every_room():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {
        name if file.name == "__init__.py" else name.rpartition(".")[0]
        for name, file in modules().items()
    }
    assert packages == set(setuptools["packages"])


def test_kernels_never_shadows_hugging_face():
    assert not (ROOT / "kernels" / "__init__.py").exists()
