"""Old spellings keep working, and each says what to write in its place."""

import inspect
import warnings
from dataclasses import dataclass

import pytest

from bitknap.deprecation import grouped_keywords, moved_module, renamed_keywords, renamed_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Two fields of a made-up request."""

    tokens: int = 128
    seed: int = 0


@renamed_keywords(n_tokens="tokens")
def counted(model, *, tokens=1):
    return model, tokens


@grouped_keywords("request", Request)
def asked(model, *, request=None):
    return model, request


@grouped_keywords("request", Request, names={"random_state": "seed"})
def seeded(*, request=None):
    return request


def call(function, *args, **kwargs):
    """Call a function with keywords that its signature does not show."""
    return function(*args, **kwargs)


def test_a_renamed_keyword_works_and_warns_at_the_caller():
    with pytest.warns(
        DeprecationWarning, match=r"counted\(n_tokens=…\) is deprecated.*tokens="
    ) as record:
        assert call(counted, "m", n_tokens=7) == ("m", 7)
    assert record[0].filename == __file__


def test_new_spellings_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(counted, "m", tokens=7) == ("m", 7)
        assert call(asked, "m", request=Request(seed=1)) == ("m", Request(seed=1))
        assert call(asked, "m") == ("m", None)


def test_both_spellings_at_once_are_refused():
    with pytest.raises(TypeError, match="n_tokens= and tokens="):
        call(counted, "m", n_tokens=7, tokens=7)


def test_grouped_keywords_become_one_value():
    with pytest.warns(DeprecationWarning, match=r"request=Request\(tokens=…\)") as record:
        assert call(asked, "m", tokens=7) == ("m", Request(tokens=7))
    assert record[0].filename == __file__
    with pytest.warns(DeprecationWarning):
        assert call(asked, "m", tokens=7, request=Request(seed=1))[1] == Request(tokens=7, seed=1)


def test_a_grouped_keyword_may_have_another_name():
    with pytest.warns(DeprecationWarning, match=r"random_state=…\).*Request\(seed=…\)"):
        assert call(seeded, random_state=3) == Request(seed=3)
    with pytest.raises(TypeError, match="seed"):
        call(seeded, seed=3)


def test_an_unknown_field_is_refused_at_the_decoration():
    with pytest.raises(TypeError, match="Request has no field depth"):
        grouped_keywords("request", Request, names={"depth": "depth"})


def test_the_signature_shows_the_new_spelling_only():
    assert list(inspect.signature(counted).parameters) == ["model", "tokens"]


def test_renamed_names():
    get = renamed_names("old", {"Broken": "bitknap.errors:FileError"})
    with pytest.warns(DeprecationWarning, match=r"old\.Broken .*bitknap\.errors\.FileError"):
        assert get("Broken").__name__ == "FileError"
    with pytest.raises(AttributeError, match="Other"):
        get("Other")


def test_a_moved_module():
    get = moved_module("old", "bitknap.errors")
    with pytest.warns(DeprecationWarning, match=r"old\.FileError"):
        assert get("FileError").__name__ == "FileError"
    with pytest.raises(AttributeError):
        get("__path__")
    with pytest.raises(AttributeError):
        get("Other")
