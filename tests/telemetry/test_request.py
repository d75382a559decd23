from __future__ import annotations

import pytest

from sdbento.errors import NotFound
from sdbento.telemetry.request import (
    MAX_CONTENTS,
    RequestFacts,
    handling,
    note_caller,
    note_error,
    request_id,
)


@pytest.mark.parametrize("given", ["a", "7d1f-4.c_2:b", "A" * 128])
def test_a_well_formed_id_is_kept(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "a b", "a\n", "-a", "ä", "A" * 129, 'a"', "a=b"])
def test_any_other_is_replaced_by_a_new_one(given: str | None) -> None:
    made = request_id(given)
    assert made != given and request_id(made) == made
    assert request_id(given) != made


def test_a_line_tells_what_is_known_and_no_contents_unless_asked() -> None:
    facts = RequestFacts("id", client="127.0.0.1")
    with handling(facts):
        note_caller("alice", None)
        note_error(NotFound("no such thing"))
    facts.add_contents(["a prompt"] * 20, ["https://host/a.png"])
    assert facts.told("not_found", 1.23456, with_contents=False) == {
        "outcome": "not_found",
        "error": "not_found",
        "key": "alice",
        "client": "127.0.0.1",
        "seconds": 1.2346,
    }
    told = facts.told("ok", 1.0, with_contents=True)
    assert told["prompts"] == ["a prompt"] * MAX_CONTENTS
    assert told["image_urls"] == ["https://host/a.png"]


def test_what_belongs_to_no_request_is_noted_nowhere() -> None:
    note_caller("alice", None)
    note_error(NotFound("no such thing"))
