"""Runs whole jobs on a device that is not there and on the CPU; prints what differs as JSON.

A process of its own, as `pretend_device` asks. Run as `python pretended.py FOLDER [FAMILY …]`.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import bitknap
from bitknap.allocation import Budget, Problem, formats, solve
from bitknap.api.calibration import calibration_windows
from bitknap.benchmarks.compare.models import Options, prepare
from bitknap.benchmarks.compare.run import compare
from bitknap.benchmarks.compare.strategies import names
from bitknap.estimators.named import Settings, named
from bitknap.estimators.sweep.layer_by_layer import calibrate_by_layer
from bitknap.estimators.sweep.recorded import Recorded
from bitknap.estimators.sweep.weightless_model import Skeleton
from bitknap.estimators.tables.monotone import isotonic
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.quantization.source.devices import Computing
from bitknap.testing import tiny_model
from bitknap.testing.pretend_device import NAME, install, pretending

ROOT = Path(__file__).parent.parent.parent
MENU = formats((2, 4), (8, "row"), (True, False))
TEXT = ROOT / "benchmarks" / "reference" / "calibration.txt"
# Some are read off routers, others from the outputs of layers or of the whole model.
STRATEGIES = ("ours", "uniform", "chowdhury", "mxmoe", "gemq", "hawq", "moqa")
ESTIMATORS = ("calibrated", "fisher", "fisher-output", "moments", "weight-error", "data-free")
# Every job runs on the first family; on the others those whose code knows the model's parts.
FAMILIES = ("mixtral", "deepseek_v2", "gpt_oss")


def asked(device, **more):
    return bitknap.Calibration(text=TEXT, tokens=128, include=("attention",), device=device, **more)


def saved(folder, family):
    tiny_model(family, vocab_size=4096).save_pretrained(folder)
    for file in (ROOT / "benchmarks" / "reference" / "mixtral").glob("tokenizer*.json"):
        shutil.copy(file, folder / file.name)
    return folder


def estimated(model, name, device, **more):
    made = named([name], Settings(routers=None))
    include = () if name.startswith("fisher") else ("attention",)
    given = bitknap.Calibration(text=TEXT, tokens=128, include=include, device=device, **more)
    return bitknap.estimate(model, made, MENU, calibration=given)


def by_layer(model, name, host=None):
    """Return the costs from a pass over one layer at a time on the device.

    Args:
        model: folder of the model.
        name: name of the estimator.
        host: bytes of memory in which layers may wait; None for half of the machine's.
    """
    made, source = named([name], Settings(routers=None)), Checkpoint.open(model)
    given = asked(NAME) if name == "calibrated" else bitknap.Calibration(text=TEXT, tokens=128)
    evidence = calibrate_by_layer(
        Skeleton(source, given.include, where=Computing(device=torch.device(NAME, 0), host=host)),
        calibration_windows(source, given),
        Recorded.of(made.needs),
    )
    table = made.estimate(replace(evidence, device=torch.device(NAME, 0)), MENU)
    return isotonic(table)[0].cost


def packed(model, device, rounding, out):
    table = estimated(model, "data-free", "cpu")
    plan = solve(Problem(table, Budget.bits(3.5))).plan
    how = bitknap.Packing(rounding=rounding, force=True)
    bitknap.quantize(model, plan, out, packing=how, calibration=asked(device))
    return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}


def compared(model, device, folder):
    """Return the KL of strategies that measure in different ways."""
    text = (ROOT / "benchmarks" / "reference" / "evaluation.txt").read_text()
    judged = folder / "judged.txt"
    judged.write_text(text[:20_000])
    options = Options(
        model=str(model),
        text=str(TEXT),
        tokens=128,
        evaluations=2,
        refine_tokens=128,
        evaluation=(str(judged),),
        judged=128,
        formats=MENU,
        device=device,
    )
    run = compare(prepare(options), names(STRATEGIES), (3.5,))
    cells = run.done.values()
    assert "failed" not in {cell.status for cell in cells}, [
        (cell.strategy, cell.values) for cell in cells if cell.status == "failed"
    ]
    return [float(cell.kl.mean()) for cell in cells if cell.status == "ok"]


def apart(a, b):
    """Return the largest difference of two arrays, relative to the second."""
    a, b = np.asarray(a), np.asarray(b)
    return float((np.abs(a - b) / np.maximum(np.abs(b), 1e-300)).max())


def differences(folder, family):
    """Yield what was compared, and how far the two devices are apart."""
    model, every = saved(folder / "model", family), family == FAMILIES[0]
    for name in ESTIMATORS if every else ("calibrated",):
        here = estimated(model, name, "cpu").cost
        yield name, apart(estimated(model, name, NAME).cost, here)
        if name in ("calibrated", "fisher"):
            waiting = by_layer(model, name)
            yield f"{name}, layer by layer", apart(waiting, here)
            read_each_time = by_layer(model, name, host=0)
            yield f"{name}, from the disk", float(not np.array_equal(waiting, read_each_time))
    for rounding in ("rtn", "hqq", "gptq") if every else ("rtn",):
        wrote = [packed(model, on, rounding, folder / f"{rounding}-{on}") for on in ("cpu", NAME)]
        yield f"quantize, {rounding}", float(wrote[0] != wrote[1])
    if every:
        here, there = (
            estimated(model, "moments", on, dtype="bfloat16").cost for on in ("cpu", NAME)
        )
        # Last digits of float32 decide which way a factor is rounded.
        yield "bfloat16", float(apart(there, here) > 0.05)
        yield "compare", apart(*(compared(model, on, folder) for on in (NAME, "cpu")))
    out = folder / "rtn-cpu"
    asked = [bitknap.Evaluation(text=TEXT, tokens=256, device=on) for on in ("cpu", NAME)]
    losses = [bitknap.evaluate(out, model, evaluation=one).kl for one in asked]
    yield "evaluate", apart(*losses)


def check_refusal(device):
    """Raise AssertionError unless the device refuses tensors elsewhere: it would find nothing."""
    there, here = torch.ones(2, 2, device=device), torch.ones(2, 2)
    for mixed in (lambda: there @ here, lambda: torch.cat([there, here]), lambda: there.add_(here)):
        try:
            mixed()
        except RuntimeError:
            continue
        raise AssertionError("the stand-in computes with tensors elsewhere")


if __name__ == "__main__":
    install()
    root = Path(sys.argv[1])
    with pretending() as there:
        check_refusal(there)
        found = {
            f"{family}: {what}": value
            for family in sys.argv[2:] or FAMILIES
            for what, value in differences(root / family, family)
        }
    print(json.dumps(found))
