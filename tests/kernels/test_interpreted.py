"""Every Triton kernel and width in the interpreter, compared with the plain torch reference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "interpreted.py"


@pytest.fixture(scope="module")
def errors():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name",
    [
        "every width",
        "every grid",
        "tails alone",
        "gate differs",
        "runs",
        "no gate",
        "gpt-oss",
        "sums scaled",
        "weights scaled",
        "dense",
        "sums launched",
        "narrow products",
        "row blocks",
        "row blocks, grouped",
        "row blocks, dense",
        "exponents",
        "exponents of gate",
        "exponents, grouped",
        "exponents, weights scaled",
        "exponents, dense",
    ],
)
def test_kernels_do_what_the_reference_does(errors, name):
    assert errors[name] < 1
