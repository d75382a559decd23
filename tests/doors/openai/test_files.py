"""Files under names that cannot be guessed: how long they stay, and whose go first."""

from __future__ import annotations

import pytest

from sdbento.doors.openai.files import Files
from sdbento.errors import TooLarge


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_names_are_long_and_differ_and_end_in_the_formats_suffix() -> None:
    files = Files(60, 1000)
    names = [files.add([b"x"], kind, None)[0] for kind in ("png", "jpeg", "webp") * 10]
    assert len(set(names)) == 30
    assert [name[-4:] for name in names[:2]] == [".png", ".jpg"]
    assert names[2].endswith(".webp")
    assert min(map(len, names)) > 40


def test_a_file_is_kept_for_its_time_and_no_longer() -> None:
    clock = Clock()
    files = Files(60, 1000, clock)
    [name] = files.add([b"data"], "png", None)
    clock.now += 59
    file = files.get(name)
    assert file is not None and file.data == b"data"
    assert files.seconds_left(file) == 1
    clock.now += 1
    assert files.get(name) is None


def test_the_oldest_go_when_there_is_no_more_room() -> None:
    files = Files(60, 10)
    names = [files.add([b"1234"], "png", None)[0] for _ in range(3)]
    assert [files.get(name) is not None for name in names] == [False, True, True]


def test_a_flood_of_one_caller_does_not_wash_away_the_files_of_another() -> None:
    files = Files(60, 10)
    [kept] = files.add([b"12"], "png", "quiet")
    for _ in range(20):
        files.add([b"123"], "png", "loud")
    assert files.get(kept) is not None


def test_more_than_there_is_room_for_is_refused_and_costs_nobody() -> None:
    files = Files(60, 10)
    [theirs] = files.add([b"12345"], "png", "b")
    with pytest.raises(TooLarge, match="11 bytes"):
        files.add([b"123456", b"12345"], "png", "a")
    assert files.get(theirs)


def test_what_comes_in_counts_for_its_owner() -> None:
    files = Files(60, 100)
    [own] = files.add([b"x" * 35], "png", "a")
    [theirs] = files.add([b"x" * 40], "png", "b")
    [new] = files.add([b"x" * 50], "png", "a")
    assert files.get(theirs) and files.get(new) and not files.get(own)


@pytest.mark.parametrize("name", ["", "x.png", "../../etc/passwd", "\0"])
def test_other_names_stand_for_nothing(name: str) -> None:
    assert Files(60, 1000).get(name) is None
