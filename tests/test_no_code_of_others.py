"""No pickle, no code from a checkpoint, and no network unless a hub id is given."""

import ast
import json
import shutil
import socket
from pathlib import Path

import pytest

from bitknap.cli import main

ROOT = Path(__file__).parent.parent
FOLDERS = ("src/bitknap", "allocation", "benchmarks", "estimators", "kernels", "quantize")
FAST = ("--formats", "2,4", "--group-size", "8,row", "--tokens", "128")
TEXT = ("--text", str(ROOT / "LICENSE"))
EVIL = "from pathlib import Path\nPath({path!r}).write_text('executed')\n"


def sources():
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def called(node):
    """Return the dotted name of what a call calls, as far as it is one."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(names)])


def unsafe(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in modules:
                if name.partition(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve"):
                    yield f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        name = called(node.func)
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("eval", "exec", "compile") or name.endswith("read_pickle"):
            yield f"calls {name}"
        if name == "torch.load" and not _is(named.get("weights_only"), True):
            yield "calls torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and not _is(named.get("allow_pickle"), False):
            yield f"calls {name} without allow_pickle=False"
        if "trust_remote_code" in named and not _is(named["trust_remote_code"], False):
            yield "trusts remote code"


def _is(node, value):
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.slow
def test_no_module_unpickles_evaluates_or_trusts():
    found = [f"{path}: {what}" for path in sources() for what in unsafe(path)]
    assert found == []
    assert len(list(sources())) > 200


def test_the_scan_sees_what_it_looks_for(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nfrom dill import loads\ntorch.load(x)\nnp.load(x)\neval(x)\n"
        "torch.load(x, weights_only=True)\nmodel.eval()\nre.compile(x)\n"
        "load(x, trust_remote_code=True)\nload(x, trust_remote_code=False)\n"
    )
    assert len(list(unsafe(path))) == 6


@pytest.fixture
def watched(monkeypatch):
    """Refuse and count whatever would go out to a network."""
    calls = []

    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # The hub's own switches would hide a request.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False, raising=False)
    return calls


def commands(root, model):
    table, plan, out = root / "t.safetensors", root / "p.json", root / "out"
    return (
        ("inspect", model),
        ("estimate", model, "--estimator", "moments", *FAST, *TEXT, "-o", table),
        ("solve", table, "--budget", "4bpw", "-o", plan),
        ("quantize", model, "--plan", plan, "-o", out),
        ("show", out),
        ("convert", out, "--layout", "tiles", "-o", root / "tiles"),
        ("evaluate", out, "--tokens", "64", *TEXT),
        ("evaluate", model, "--tokens", "64", *TEXT),
    )


@pytest.mark.slow
def test_no_command_reaches_for_a_network_or_runs_a_models_code(made, tmp_path, watched):
    model = shutil.copytree(made.model, tmp_path / "model")
    witness = tmp_path / "executed"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (model / f"{name}.py").write_text(EVIL.format(path=str(witness)))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
    }
    (model / "config.json").write_text(json.dumps(config))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    for words in commands(tmp_path, model):
        main([str(word) for word in words])
        assert not witness.exists(), words
        assert watched == [], words
