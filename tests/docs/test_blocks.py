"""Every command and code block of README, CONTRIBUTING and docs runs, page by page, top to bottom.

How a block says what is to be done with it:

    ```python             runs in the page's namespace, in the page's own empty folder
    ```console            lines after `$ ` run: bitknap in this process, and python FILE; the lines
                          below, if any, are what they print; a failing command must print its error
    ```json title="x"     any fence with a title is written to that file first; JSON must parse
    <!-- output -->       the next ```text is what the python block above prints
    <!-- not run: why --> the next block does not run; every reason is counted below

In what is printed, … stands for anything, numbers may differ by a tenth (other processors round
otherwise), and lines and corners of tables are not compared. A trailing & is left out: one
after the other gives what side by side does.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Results are written by programs and hold no blocks; the folder is a link.
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if "measurements" not in path.parts
)
# Blocks that no test can run here, by reason; a page that adds one says so here as well.
NOT_RUN = {
    "needs a GPU": 3,
    "fetches a model": 1,
    "runs vLLM": 2,
    "installs packages": 4,
    "needs other programs": 1,
    "needs files of other tools": 2,
    "takes minutes": 3,
}
_FENCE = re.compile(r"^(`{3,})(\w*)(?: +title=\"([^\"]+)\")?$")
_COMMENT = re.compile(r"^<!-- (output|not run)(?:: (.+))? -->$")
_NUMBER = re.compile(r"[+−-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")
# Nothing to run in these.
_PLAIN = {"", "text", "json", "toml", "yaml"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: number of its first line in the page.
        language: language of the fence.
        title: the file that it is, or "".
        text: what is inside.
        output: whether it is what the block above prints.
        reason: why it is not run, or "".
    """

    line: int
    language: str
    title: str
    text: str
    output: bool
    reason: str


def blocks_of(page):
    """Return the blocks of a page, in order."""
    found, comment = [], None
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if fence := _FENCE.match(line):
            inside = []
            while (text := next(lines)[1]) != fence[1]:
                inside.append(text)
            found.append(_block(fence, number + 1, inside, comment))
            comment = None
        elif mark := _COMMENT.match(line):
            comment = mark
        elif line.strip():
            assert "```" not in line, f"{page}:{number}: a fence that the tests cannot read"
            comment = None
    return found


def _block(fence, first, lines, comment):
    kind = comment[1] if comment else ""
    return Block(
        line=first,
        language=fence[2],
        title=fence[3] or "",
        text="\n".join(lines),
        output=kind == "output",
        reason=comment[2] if kind == "not run" else "",
    )


def commands_of(text):
    """Return the commands of a console block, each with the lines that it prints."""
    found: list[tuple[list[str], list[str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            words = shlex.split(line[2:], comments=True)
            found.append((words[:-1] if words[-1:] == ["&"] else words, []))
        else:
            assert found, f"the first line is not a command: {line!r}"
            found[-1][1].append(line)
    return [(words, "\n".join(lines)) for words, lines in found]


def same_number(wanted, got):
    """Return whether two words are one, or numbers that differ by a tenth at most."""
    first, second = _NUMBER.findall(wanted), _NUMBER.findall(got)
    if wanted == got:
        return True
    if not first or _NUMBER.sub("#", wanted) != _NUMBER.sub("#", got):
        return False
    pairs = [
        [float(number.replace(",", "").replace("−", "-")) for number in pair]
        for pair in zip(first, second, strict=True)
    ]
    return all(abs(a - b) <= 0.1 * max(abs(a), abs(b)) for a, b in pairs)


def prints(wanted, got):
    """Return whether a text is what a page says, … standing for anything."""
    words = re.sub(r"[─-╿]", " ", got).split()
    parts = [part.split() for part in re.sub(r"[─-╿]", " ", wanted).split("…")]
    at = 0
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        starts = [0] if index == 0 else range(at, len(words) - len(part) + 1)
        if last and index:
            starts = [len(words) - len(part)] if len(words) - len(part) >= at else []
        for start in starts:
            here = words[start : start + len(part)]
            if len(here) == len(part) and all(map(same_number, part, here)):
                at = start + len(part)
                break
        else:
            return False
    return at == len(words) or not parts[-1]


class Runner:
    """Runs the blocks of one page in a folder.

    Attributes:
        estimates: what estimates of the bundled models wrote, which pages share: by the words of
            the command, what was printed and the files.
    """

    def __init__(self, folder, capsys, estimates):
        self.folder, self.capsys, self.estimates = folder, capsys, estimates
        self.names = {"__name__": "page"}
        self.printed = ""

    def run(self, block):
        """Run a block, and compare what it prints."""
        if block.title:
            (self.folder / block.title).write_text(block.text + "\n")
        if block.language == "json":
            json.loads(block.text)
        if block.output:
            assert prints(block.text, self.printed), f"printed:\n{self.printed}"
        elif block.language == "python" and not block.title:
            self.capsys.readouterr()
            exec(compile(block.text, "block", "exec"), self.names)
            self.printed = self.capsys.readouterr().out
        elif block.language == "console":
            for words, wanted in commands_of(block.text):
                self._command(words, wanted)
        else:
            assert block.title or block.language in _PLAIN, f"{block.language}: cannot be run"

    def _command(self, words, wanted):
        if words == ["wait"]:
            return
        self.capsys.readouterr()
        shared = words[:2] == ["bitknap", "estimate"] and words[2].startswith("reference:")
        if shared and tuple(words) in self.estimates:
            printed, files = self.estimates[tuple(words)]
            for file in files:
                shutil.copy(file, self.folder)
        else:
            before = set(self.folder.iterdir())
            printed = self._output_of(words, wanted)
            if shared:
                kept = Path(tempfile.mkdtemp(dir=self.folder.parent))
                made = set(self.folder.iterdir()) - before
                files = [Path(shutil.copy(path, kept)) for path in made if path.is_file()]
                self.estimates[tuple(words)] = printed, files
        assert not wanted or prints(wanted, printed), f"{shlex.join(words)}\nprinted:\n{printed}"

    def _output_of(self, words, wanted):
        from bitknap.cli import main

        status = 0
        try:
            if words[0] == "bitknap":
                main(words[1:])
            elif words[0] == "python":
                self._python(words[1:])
            else:
                raise AssertionError(f"{words[0]}: only bitknap and python run here")
        except SystemExit as error:
            status = int(error.code or 0)
        printed = self.capsys.readouterr()
        failed = wanted.startswith("bitknap: ")
        assert bool(status) == failed, f"{shlex.join(words)}: {status}\n{printed.err}"
        return printed.err if failed else printed.out

    def _python(self, words):
        before = sys.argv
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
        finally:
            sys.argv = before


def _name(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def estimates():
    return {}


@pytest.mark.campaign
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_of_a_page_run_top_to_bottom(page, tmp_path, capsys, monkeypatch, estimates):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runner = Runner(tmp_path, capsys, estimates)
    for block in blocks_of(page):
        if block.reason:
            continue
        try:
            runner.run(block)
        except BaseException as error:
            error.add_note(f"{_name(page)}, the block in line {block.line}")
            raise


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 7000


def test_blocks_that_are_not_run_are_counted():
    reasons = Counter(block.reason for page in PAGES for block in blocks_of(page) if block.reason)
    assert reasons == Counter(NOT_RUN)


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        ("cost 1.00", "│ cost │ 1.05 │", True),
        ("cost 1.00", "cost 1.2", False),
        ("a … d", "a b c d", True),
        ("a … d", "a b c", False),
        ("a …", "a b c", True),
        ("… c", "a b c", True),
        ("a", "a b", False),
        ("1,474,528 B", "1,480,000 B", True),
        ("int3-g64", "int2-g64", False),
    ],
)
def test_what_is_printed_is_compared_word_by_word(wanted, got, same):
    assert prints(wanted, got) is same


def test_console_blocks_are_commands_with_what_they_print():
    text = "$ bitknap show \\\n  out\nsome lines\n$ bitknap study run s &\n$ wait  # for it"
    assert commands_of(text) == [
        (["bitknap", "show", "out"], "some lines"),
        (["bitknap", "study", "run", "s"], ""),
        (["wait"], ""),
    ]
