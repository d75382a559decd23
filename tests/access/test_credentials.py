"""Keys in headers: every way in which clients send one, and what is none."""

from __future__ import annotations

from base64 import b64encode

import pytest

from sdbento.access.credentials import MAX_KEY_BYTES, presented


def basic(text: str) -> bytes:
    return b"Basic " + b64encode(text.encode())


@pytest.mark.parametrize(
    ("header", "user"),
    [
        (b"Bearer the-key", None),
        (b"bearer   the-key  ", None),
        (b"BEARER the-key", None),
        (b"Bearer\tthe-key", None),
        (b"the-key", None),
        (basic("anybody:the-key"), "anybody"),
        (basic(":the-key"), ""),
        (basic("the-key:"), None),
        (basic("the-key"), None),
        (basic("the-key:").rstrip(b"="), None),
        (basic("the-key:").replace(b"Basic", b"bAsIc"), None),
    ],
)
def test_a_key_is_found_in_authorization(header: bytes, user: str | None) -> None:
    [credential] = presented([(b"authorization", header)])
    assert (credential.key, credential.user) == (b"the-key", user)


def test_the_password_of_basic_may_contain_colons_and_any_letters() -> None:
    [credential] = presented([(b"authorization", basic("a:b:ç"))])
    assert credential.key == "b:ç".encode()


def test_a_key_of_its_own_header_is_a_second_guess() -> None:
    headers = [(b"authorization", b"Basic Zm9vOmJhcg=="), (b"x-api-key", b"the-key")]
    assert [one.key for one in presented(headers)] == [b"bar", b"the-key"]


def test_a_header_that_is_sent_again_is_no_further_guess() -> None:
    headers = [(b"authorization", b"Bearer 1"), (b"authorization", b"Bearer 2")]
    assert [one.key for one in presented(headers)] == [b"1"]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"   ",
        b"Bearer",
        b"Bearer ",
        b"Basic",
        b"Basic ",
        b"Basic Og==",
        b"Basic !!!",
        b"Basic \xff\xfe",
        b"Digest username=x",
        b"Bearer " + b"x" * (MAX_KEY_BYTES + 1),
        basic("x" * 10_000),
    ],
)
def test_what_is_no_key_is_none(header: bytes) -> None:
    assert presented([(b"authorization", header)]) == []


def test_a_credential_does_not_show_its_key() -> None:
    assert "the-key" not in repr(presented([(b"authorization", b"Bearer the-key")]))
