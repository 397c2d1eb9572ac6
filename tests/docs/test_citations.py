"""Sections of the documentation that comments in the code refer to are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [
    path
    for folder in ("allocation", "benchmarks", "estimators", "kernels", "quantize", "src", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__) and "src/bitknap/quantization" not in str(path)
]
CITED = re.compile(r"\b([a-z-]+(?:/[a-z-]+)*\.md)#([\w-]+)")
# How sections of notes outside the repository were once cited.
DEAD = re.compile(r"\b(?:methods|formats|kernels|architecture)\.md,? (?:§|section )?\d")


def anchors_of(page):
    return set(re.findall(r"\{ #([\w-]+) \}", page.read_text(encoding="utf-8")))


def test_every_cited_section_is_on_its_page():
    cited = {found for path in CODE for found in CITED.findall(path.read_text(encoding="utf-8"))}
    assert cited
    for page, anchor in sorted(cited):
        assert anchor in anchors_of(ROOT / "docs" / page), f"{page}#{anchor}"


def test_no_comment_cites_notes_that_nobody_has():
    assert [path for path in CODE if DEAD.search(path.read_text(encoding="utf-8"))] == []


def test_every_example_is_linked():
    page = (ROOT / "docs/reference/examples.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(\.\./examples/(\w+\.py)\)", page))
    assert linked == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_links_lead_to_files(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^):#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
