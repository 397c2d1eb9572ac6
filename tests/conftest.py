"""Fixtures of the command line's tests; what they import is loaded only where they are used."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
# Rows of whole groups of 32, which other runtimes ask for.
_WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 32}
# Tests of what transformers arranges as Bitknap knows it since 5.20 alone.
_SINCE_5_20 = ("aria", "test_a_token_beyond_the_capacity")
# Files that take longest. They begin first, so that no process is left alone with one at the end.
_LONGEST = (
    "docs/test_blocks.py",
    "devices/test_devices.py",
    "benchmarks/compare/test_run.py",
    "kernels/test_interpreted.py",
    "cli/test_estimate_command.py",
    "cli/test_journal_of_estimate.py",
    "quantize/runtime/test_transformers_plugin.py",
    "api/test_refining.py",
    "ggml/test_library.py",
    "disk/test_outputs.py",
    "sweep/test_backward_sweep.py",
    "gguf/test_writer.py",
    "quantize/runtime/test_kernel_experts.py",
    "tests/test_overwriting.py",
    "quantize/runtime/test_architectures.py",
)


def pytest_collection_modifyitems(items):
    """Order files, and skip what an older transformers, which pyproject.toml allows, cannot do."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(_LONGEST))
    major, minor = version("transformers").split(".")[:2]
    if (int(major), int(minor)) >= (5, 20):
        return
    for item in items:
        if any(word in item.name for word in _SINCE_5_20):
            item.add_marker(pytest.mark.skip(reason="needs transformers 5.20"))


@pytest.fixture(scope="session")
def saved():
    """Save a tiny model with the tokenizer of the bundled ones."""
    from bitknap.testing import tiny_model

    def save(folder, family="mixtral", **changes):
        model = tiny_model(family, vocab_size=4096, **changes)
        model.save_pretrained(folder)
        for file in (ROOT / "benchmarks" / "reference" / "mixtral").glob("tokenizer*.json"):
            shutil.copy(file, folder / file.name)
        return folder

    return save


@pytest.fixture(scope="session")
def made(saved, tmp_path_factory):
    """A model folder, a table, a plan and a packed checkpoint, all made by the command line."""
    from bitknap.cli import main

    root = tmp_path_factory.mktemp("cli")
    model = saved(root / "model")
    table, plan, out = root / "table.safetensors", root / "plan.json", root / "out"
    fast = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128")
    main(["estimate", str(model), *fast, "--text", str(ROOT / "LICENSE"), "-o", str(table)])
    main(["solve", str(table), "--budget", "4bpw", "-o", str(plan)])
    main(["quantize", str(model), "--plan", str(plan), "-o", str(out)])
    return SimpleNamespace(root=root, model=model, table=table, plan=plan, out=out)


@pytest.fixture
def listing():
    """List the files and folders below one."""
    return lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def refused(capsys, tmp_path, listing):
    """Run a command that must fail: one line on stderr, status 2, and no file more or less."""
    from bitknap.cli import main

    def run(*arguments):
        before = listing(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert exit.value.code == 2
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("bitknap: ")
        assert "Traceback" not in lines[0]
        assert listing(tmp_path) == before
        return lines[0]

    return run


@pytest.fixture
def document(capsys):
    """Run a command with --json and return its document."""
    from bitknap.cli import main

    def run(*arguments):
        capsys.readouterr()
        main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert captured.err == ""
        return json.loads(captured.out)

    return run


@pytest.fixture
def background(tmp_path_factory):
    """Start a command in another process; returns it once its journal has enough lines.

    Both have the same number of threads, on which the last digits of sums depend.
    """
    running = []

    def start(words, journal, lines, *, slowed=(), setup=""):
        import torch
        from tests.background import Command

        folder = tmp_path_factory.mktemp("background")
        command = Command(words, folder, slowed, setup, torch.get_num_threads())
        running.append(command)
        command.runs_until(journal, lines)
        return command

    yield start
    for command in running:
        command.kill()
        command.wait()


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """Save a tiny model with rows of whole groups of 32, once for each family and its changes."""
    from bitknap.testing import tiny_model

    known: dict[tuple[str, str], Path] = {}

    def save(family, **changes):
        key = family, str(sorted(changes.items()))
        if key not in known:
            known[key] = tmp_path_factory.mktemp(family)
            model = tiny_model(family, vocab_size=128, **{**_WIDE, **changes})
            model.save_pretrained(known[key])
        return known[key]

    return save


@pytest.fixture(scope="session")
def mixed():
    """Make a plan for a target with formats drawn at random, equal where the target ties units."""

    import numpy as np

    from bitknap.allocation import BitPlan, profile
    from bitknap.quantization.models.headers_only import walk_headers
    from bitknap.quantization.source.checkpoint import Checkpoint
    from bitknap.quantization.targets.catalog import target_of

    def make(folder, name, include=(), seed=0, offered=None):
        target, source = target_of(name), Checkpoint.open(folder)
        units = walk_headers(source.config, source.shapes, include).units
        menu = [
            one
            for one in offered or target.menu(units)
            if target.holds(one, units.rows, units.cols).all()
        ]
        labels = profile(target.profile).labels(units)
        drawn = np.random.default_rng(seed).integers(len(menu), size=len(units))[labels]
        header = {"method": target.rounding or "rtn"}
        return BitPlan.from_choice(units, menu, drawn, model=source.fingerprint, header=header)

    return make
