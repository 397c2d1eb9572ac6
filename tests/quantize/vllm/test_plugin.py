"""vLLM's plug-in is found by its entry point, and never keeps another model from loading."""

import logging
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_entry_point_is_a_function_that_never_fails(monkeypatch, caplog):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name, value), *others = project["entry-points"]["vllm.general_plugins"].items()
    assert (name, others) == ("bitknap", [])
    monkeypatch.setitem(sys.modules, "vllm", None)  # another vLLM, or half of one
    register = EntryPoint(name, value, "vllm.general_plugins").load()
    with caplog.at_level(logging.WARNING):
        register()
    assert "install vLLM 0.32" in caplog.text and caplog.text.count("\n") == 1
