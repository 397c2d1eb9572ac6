"""Text in, token windows out; every unusable text is one line."""

import numpy as np
import pytest

from bitknap.errors import InputError
from bitknap.estimators.measuring.text import read_text, token_windows


def letters(text, add_special_tokens, verbose):
    """Tokenize each character; there are no special tokens."""
    return {"input_ids": [ord(c) for c in text]}


def test_windows_are_cut_from_the_text():
    text = "".join(f"{i:03d}\n" for i in range(30))  # 120 tokens
    windows = token_windows(letters, text, 40, 8)
    assert windows.shape == (5, 8)
    assert windows.dtype.is_signed
    for window in windows:
        assert "".join(map(chr, window.tolist())) in text


def test_windows_are_spread_over_the_whole_text():
    text = "".join(map(chr, range(100, 1100)))
    starts = token_windows(letters, text, 50, 10)[:, 0].numpy() - 100
    assert starts[0] == 0
    assert starts[-1] >= 750
    assert np.array_equal(np.diff(starts), np.full(4, 200))
    whole = token_windows(letters, text, 1000, 10)
    assert whole.reshape(-1).tolist() == list(range(100, 1100))


def test_tokens_are_rounded_down_to_whole_windows():
    text = "x" * 100
    assert token_windows(letters, text, 39, 8).shape == (4, 8)
    assert token_windows(letters, text, 5, 8).shape == (1, 5)
    assert token_windows(letters, "x" * 5000, 5000, 10**9).shape == (2, 2048)


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_text(text):
    with pytest.raises(InputError, match="the text is empty"):
        token_windows(letters, text, 16, 8)


@pytest.mark.parametrize("tokens", [101, 200])
def test_a_text_that_is_too_short(tokens):
    with pytest.raises(InputError, match=f"has 100 tokens, {tokens} were asked for"):
        token_windows(letters, "x" * 100, tokens, 1 if tokens == 1 else 50 + tokens)


@pytest.mark.parametrize("tokens", [1, 0, -3])
def test_too_few_tokens_to_predict_one(tokens):
    with pytest.raises(InputError, match="at least 2"):
        token_windows(letters, "x" * 100, tokens, 8)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Zwölf".encode("latin-1"))
    (tmp_path / "mixed.txt").write_bytes("Zwölf".encode() + "Zwölf".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("words".encode("utf-16"))
    (tmp_path / "wide-without-mark.txt").write_bytes("words".encode("utf-16-le"))
    (tmp_path / "binary.txt").write_bytes(b"words\0words")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b"\xef\xbb\xbf \r\n")
    for path, reason in (
        ("latin.txt", "not UTF-8 text \\(byte 0xf6 at 2\\); convert it"),
        ("mixed.txt", "not UTF-8 text \\(byte 0xf6 at 8\\)"),
        ("wide.txt", "not UTF-8 text \\(byte 0xff at 0\\)"),
        ("wide-without-mark.txt", "not text \\(a NUL character at 1\\)"),
        ("binary.txt", "not text \\(a NUL character at 5\\)"),
        ("empty.txt", "the text is empty"),
        ("blank.txt", "the text is empty"),
        ("missing.txt", "No such file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            read_text(str(tmp_path / path), "calibration")
        assert str(tmp_path / path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "text.txt").write_text("Zwölf\nBoxkämpfer", encoding="utf-8")
    assert read_text(str(tmp_path / "text.txt"), "evaluation") == "Zwölf\nBoxkämpfer"


def test_line_ends_and_a_byte_order_mark_are_no_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffZwölf\r\n\r\n  Boxkämpfer\rjagen\n".encode())
    assert read_text(str(file), "evaluation") == "Zwölf\n\n  Boxkämpfer\njagen\n"


def test_a_text_is_encoded_whole():
    asked = []

    def counting(text, add_special_tokens, verbose):
        asked.append(text)
        return letters(text, add_special_tokens, verbose)

    text = "one\n\n\n    two\n" * 20
    assert token_windows(counting, text, 100, 10).shape == (10, 10)
    assert asked.count(text) == 1


def test_the_bundled_texts_do_not_overlap():
    one, other = (set(read_text("builtin", p).splitlines()) for p in ("calibration", "evaluation"))
    long = {line for line in one & other if len(line) > 60}
    assert len(long) <= 0.001 * len(one)


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_the_bundled_texts_are_their_domains_in_order(purpose):
    from bitknap.benchmarks.compare.models import DOMAINS

    words = read_text("builtin", purpose)
    size = len(words) // len(DOMAINS)
    marks = {"books": "'' said", "code": "self.", "speeches": "the Congress", "wiki": " <unk> "}
    for name, mark in marks.items():
        counts = [words[at * size : (at + 1) * size].count(mark) for at in range(len(DOMAINS))]
        assert counts.index(max(counts)) == DOMAINS.index(name)
