"""What tests of several runtimes share."""

from zipfile import ZipFile

import pytest

from bitknap.benchmarks.packaging import build, checkout


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Unpack the wheel of this checkout: on `PYTHONPATH`, it is as if pip had installed it."""
    root = tmp_path_factory.mktemp("wheel")
    with ZipFile(build(checkout(), root, "wheel")) as wheel:
        wheel.extractall(root / "site")
    return root / "site"
