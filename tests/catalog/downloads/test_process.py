"""The process that asks the Hub: what it downloads, and what is left when it is ended."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import psutil
import pytest

from sdbento.catalog.downloads import child
from sdbento.catalog.downloads.process import HubError, HubProcess
from sdbento.catalog.hub import cached_folder
from sdbento.errors import Cancelled, ModelLoadFailed, UnknownModel
from tests.support.fake_hub import FakeHub, Sent, fake_hub, use

LIMIT = 60.0
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def the_hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def hub(the_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    use(the_hub, tmp_path / "cache", monkeypatch)
    the_hub.faults.status = 0
    return the_hub


@pytest.fixture
def process() -> Iterator[HubProcess]:
    process = HubProcess()
    yield process
    process.end()


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def partial_files(tmp_path: Path) -> list[Path]:
    return [*tmp_path.rglob("*.incomplete")]


def test_files_are_downloaded_and_only_a_whole_set_is_what_the_cache_has(
    hub: FakeHub, process: HubProcess
) -> None:
    hub.add("org/whole", a=b"1", b=b"22", c=b"333")
    listing = process.list("org/whole")
    assert listing.size(["a", "c"]) == 4
    folder = process.get(listing, ["a"], whole=False)
    assert (folder / "a").read_bytes() == b"1"
    with pytest.raises(OSError, match="cached snapshot"):
        cached_folder("org/whole")
    assert process.get(listing, ["a", "c"], whole=True) == cached_folder("org/whole")
    assert {path.name for path in folder.iterdir()} == {"a", "c"}


def test_faults_of_the_hub_are_told_apart_and_the_next_try_works(
    hub: FakeHub, process: HubProcess
) -> None:
    hub.add("org/faults", a=b"content")
    with pytest.raises(HubError) as absent:
        process.list("org/none")
    assert (type(absent.value.error), absent.value.kind) == (UnknownModel, "absent")
    hub.faults.status, hub.faults.where = 403, "tree"
    with pytest.raises(HubError) as refused:
        process.list("org/faults")
    assert refused.value.kind == "refused"
    hub.faults.status = 0
    assert process.list("org/faults").files["a"].size == 7


def test_a_file_that_is_larger_than_announced_stops_the_download(
    hub: FakeHub, process: HubProcess, tmp_path: Path
) -> None:
    never = threading.Event()
    hub.add("org/liar", huge=Sent(size=40_000_000, announced=1000, hold=never), a=b"1")
    listing = process.list("org/liar")
    with pytest.raises(HubError, match="more than it announced") as caught:
        process.get(listing, ["huge"], whole=True)
    assert caught.value.kind == "refused"
    until(lambda: not partial_files(tmp_path))
    folder = process.get(listing, ["a"], whole=True)  # it is started anew
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_download_that_is_ended_leaves_nothing_behind(
    hub: FakeHub, process: HubProcess, tmp_path: Path
) -> None:
    hub.add("org/slow", huge=Sent(size=10_000_000, hold=threading.Event()))
    failures: list[BaseException] = []

    def download() -> None:
        try:
            process.get(process.list("org/slow"), ["huge"], whole=True)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=download)
    thread.start()
    until(lambda: bool(partial_files(tmp_path)) and "org/slow/huge" in hub.under_way)
    process.end()
    thread.join(LIMIT)
    assert [type(failure) for failure in failures] == [Cancelled]
    assert partial_files(tmp_path) == []
    until(lambda: "org/slow/huge" not in hub.under_way)
    with pytest.raises(Cancelled):
        process.list("org/slow")


PARENT = """
from sdbento.catalog.downloads.process import HubProcess
process = HubProcess()
listing = process.list("org/orphan")
print(process._process.pid, flush=True)
process.get(listing, ["huge"], whole=True)
"""


def test_it_dies_with_its_parent(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/orphan", huge=Sent(size=10_000_000, hold=threading.Event()))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    orphan = psutil.Process(int(parent.stdout.readline()))
    until(lambda: bool(partial_files(tmp_path)))
    parent.kill()
    parent.communicate()
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
    assert partial_files(tmp_path) == []


def test_what_a_failed_machine_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    old, young, whole = (blobs / name for name in ("a.1.incomplete", "b.2.incomplete", "c"))
    for path in (old, young, whole):
        path.touch()
    for path in (old, whole):
        os.utime(path, (0, 0))
    child._sweep()
    assert sorted(blobs.iterdir()) == [young, whole]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_is_named(fault: int) -> None:
    told = child._told(OSError(fault, "it is so"))
    assert (told["kind"], told["error"]) == ("disk", ModelLoadFailed.__name__)
    assert "Hub cache cannot be written" in told["message"]
    assert "HF_HUB_CACHE" in told["message"]
