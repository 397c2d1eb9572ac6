"""The environments of other runtimes are made whole or not at all, and found again."""

import pytest
from tests.runtimes.environments import ask, environment

from bitknap.benchmarks.runtimes import environments
from bitknap.benchmarks.runtimes.environments import RUNTIMES, Runtime
from bitknap.errors import BitknapError


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """Offer one runtime with these requirements, in a folder of its own."""
    monkeypatch.setenv("BITKNAP_RUNTIMES", str(tmp_path))

    def offer(*requirements):
        environments._made.cache_clear()
        monkeypatch.setitem(RUNTIMES, "some", Runtime(requirements=requirements))
        return tmp_path

    yield offer
    environments._made.cache_clear()


def test_requirements_are_pinned_and_name_the_folder():
    for name, runtime in RUNTIMES.items():
        assert all("==" in word for word in runtime.requirements), name
    one, two = (Runtime(requirements=(word,)) for word in ("a==1", "a==2"))
    assert one.hash() != two.hash()
    assert one.hash() == Runtime(requirements=("a==1",)).hash()


@pytest.mark.runtime
def test_an_environment_is_made_once_and_asked(offered):
    folder = offered()
    python = environment("some")
    assert python.is_file() and python.is_relative_to(folder)
    made = python.stat().st_ino, python.parent.stat().st_mtime_ns
    environments._made.cache_clear()
    assert environment("some") == python
    assert (python.stat().st_ino, python.parent.stat().st_mtime_ns) == made
    assert ask("some", "import sys; print(1); answer([question, sys.prefix])", {"a": 1}) == [
        {"a": 1},
        str(python.parent.parent),
    ]
    with pytest.raises(BitknapError, match="ZeroDivisionError"):
        ask("some", "answer(1 / 0)", None)


@pytest.mark.runtime
def test_what_cannot_be_installed_skips_with_the_reason_and_leaves_nothing(offered):
    folder = offered("/no/such/package.whl")
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match=r"some cannot be installed: .*package"):
            environment("some")
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
