"""Names in tables: the nearest one, and what other packages add."""

import sys

import pytest

from bitknap.errors import InputError
from bitknap.names import Catalog, Entry, unknown
from bitknap.testing.fake_packages import install

GROUP = "bitknap.things"
CATALOG = Catalog(
    what="thing",
    group=GROUP,
    rows=(
        Entry(name="own", about="Ours.", place="builtins:dict", settings={"a": 1}),
        Entry(name="other", place="builtins:dict"),
    ),
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return what installs a made-up package whose entry points are of `GROUP`."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def add(name, points, code=""):
        install(tmp_path, name, {GROUP: points}, code)

    yield add
    for module in set(sys.modules) - before:
        del sys.modules[module]


def test_an_unknown_name_lists_all_and_the_nearest():
    error = unknown("thing", "owm", ["own", "Other"])
    assert str(error) == "thing 'owm' is unknown; one of own, Other; did you mean own?"
    assert str(unknown("thing", "OTHER", ["own", "Other"])).endswith("; did you mean Other?")
    assert str(unknown("thing", "zzz", ["own"])) == "thing 'zzz' is unknown; one of own"
    assert str(unknown("thing", "own", [])) == "thing 'own' is unknown; there are none"
    with pytest.raises(InputError, match="thing 'othr' is unknown; one of own, other; did you"):
        CATALOG.find("othr")


def test_rows_are_made_with_their_settings():
    assert CATALOG.find("own")() == {"a": 1}
    assert CATALOG.find("own")(b=2) == {"a": 1, "b": 2}
    assert CATALOG.find("own").described() == "Ours."
    assert CATALOG.find("other").described().startswith("dict() -> new empty dictionary")
    assert CATALOG.clashes() == ()


def test_a_package_adds_a_name(packages):
    packages("thing-maker", {"third": "thing_maker:Third"}, 'class Third:\n    """A third."""\n')
    assert CATALOG.names() == ("own", "other", "third")
    assert "thing_maker" not in sys.modules
    third = CATALOG.find("third")
    assert (third.package, third.own) == ("thing-maker 1.0", False)
    assert "thing_maker" not in sys.modules
    assert type(third()).__name__ == "Third"
    assert third.described() == "A third."


def test_keywords_that_a_row_takes(packages):
    code = "def made(seed, gap=0): return seed, gap\nvalue = 3\n"
    packages("thing-maker", {"made": "thing_maker:made", "value": "thing_maker:value"}, code)
    made = CATALOG.find("made")
    assert [made.accepts(word) for word in ("seed", "gap", "time_limit")] == [True, True, False]
    assert made(seed=1) == (1, 0)
    assert not CATALOG.find("value").accepts("seed")
    assert CATALOG.find("value")() == 3


@pytest.mark.parametrize("names", [("own", "own"), ("third", "third")])
def test_two_packages_of_one_name_are_refused(packages, names):
    packages("first-pack", {names[0]: "first_pack:Any"})
    packages("second-pack", {names[1]: "second_pack:Any", "fourth": "second_pack:Any"})
    with pytest.raises(InputError) as error:
        CATALOG.find(names[0])
    said = str(error.value)
    assert "first-pack 1.0 and second-pack 1.0" in said
    assert said.startswith(f"thing '{names[0]}': offered {3 if names[0] == 'own' else 2} times, by")
    assert ("bitknap" in said.split(";")[0]) == (names[0] == "own")
    assert [str(one) for one in CATALOG.clashes()] == [said]
    assert CATALOG.find("fourth").package == "second-pack 1.0"
    assert CATALOG.find("other").own


@pytest.mark.parametrize(
    ("code", "place", "reason"),
    [
        ("import no_such_module", "broken:Thing", "ModuleNotFoundError: No module named 'no_such"),
        ("x = (", "broken:Thing", "SyntaxError"),
        ("raise RuntimeError('two\\nlines')", "broken:Thing", "RuntimeError: two lines"),
        ("import sys; sys.exit(3)", "broken:Thing", "SystemExit: 3"),
        ("", "broken:Thing", "AttributeError"),
        ("", "no such place", "cannot import no such place"),
    ],
)
def test_a_broken_package_is_one_line_and_breaks_no_other(packages, code, place, reason):
    packages("broken", {"third": place}, code)
    assert CATALOG.find("own")() == {"a": 1}
    for broken in (CATALOG.find("third").load, CATALOG.find("third").described):
        with pytest.raises(InputError) as error:
            broken()
        assert reason in str(error.value)
        assert "package broken 1.0" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_package_that_cannot_be_made_is_one_line(packages):
    packages("broken", {"third": "broken:Thing"}, "class Thing:\n def __init__(self, x): pass\n")
    with pytest.raises(InputError, match=r"third: package broken 1\.0 cannot make broken:Thing"):
        CATALOG.find("third")()


def test_metadata_that_cannot_be_read_hides_nothing(packages, tmp_path):
    packages("good", {"third": "good:Thing"})
    packages("bad", {})
    (tmp_path / "bad-1.0.dist-info" / "entry_points.txt").write_text("[bitknap.things]\nno sign\n")
    assert CATALOG.names() == ("own", "other", "third")


def test_an_older_copy_further_down_the_path_is_hidden(packages, tmp_path):
    packages("maker", {"third": "maker:Thing"})
    install(tmp_path / "old", "maker", {GROUP: {"third": "maker:Thing"}})
    sys.path.append(str(tmp_path / "old"))
    try:
        assert CATALOG.find("third").package == "maker 1.0"
    finally:
        sys.path.remove(str(tmp_path / "old"))
