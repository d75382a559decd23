"""The results of several servers in one place: a folder that they share, or a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdbento.errors import NotFound, Unavailable, classify
from sdbento.jobs.delivery.bucket import Bucket
from sdbento.jobs.fleet.bucket_results import PREFIX, BucketResults
from sdbento.jobs.results import Results
from sdbento.jobs.store.job_store import JobStore
from tests.jobs.fleet.conftest import OpenStore
from tests.support.jobs import add_and_claim, current
from tests.support.s3 import SECRET, Store, storing


@pytest.fixture
def s3() -> Iterator[Store]:
    with storing() as s3:
        yield s3


@pytest.fixture
def in_bucket(s3: Store) -> BucketResults:
    return BucketResults(Bucket(s3.url, "somebody", SECRET, "pictures", 60))


@pytest.fixture(params=["folder", "bucket"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Results | BucketResults:
    if request.param == "folder":
        return Results(tmp_path / "results")
    made: BucketResults = request.getfixturevalue("in_bucket")
    return made


def test_every_server_reads_a_result(
    open_store: OpenStore, results: Results | BucketResults
) -> None:
    one, other = open_store(results=results), open_store(results=results)
    result = b'"' + b"0123456789" * 100 + b'"'
    assert one.complete(add_and_claim(one), result)
    job = current(other)
    assert other.result(job) == result
    assert other.part_of_result(job, 1, 10) == b"0123456789"
    results.delete("a", 1)
    with pytest.raises(NotFound):
        other.result(job)
    with pytest.raises(NotFound):
        other.part_of_result(job, 0, 10)


def test_no_result_is_kept_in_or_missed_from_a_folder_that_is_not_mounted(
    open_store: OpenStore, tmp_path: Path
) -> None:
    store = open_store(results=Results(tmp_path / "mount" / "results"))
    done, running = add_and_claim(store, "done"), add_and_claim(store, "running")
    store.complete(done, b"[]")
    (tmp_path / "mount").rename(tmp_path / "away")
    (tmp_path / "mount").mkdir()
    job = current(store, "done")
    for call in (
        lambda: store.complete(running, b"[]"),
        lambda: store.result(job),
        lambda: store.part_of_result(job, 0, 1),
    ):
        with pytest.raises(ConnectionError, match="the results is gone") as caught:
            call()
        assert classify(caught.value).status == 503
    (tmp_path / "mount").rmdir()
    (tmp_path / "away").rename(tmp_path / "mount")
    assert store.result(job) == b"[]"
    assert store.complete(running, b"[]")


def test_results_that_no_row_names_are_removed_at_a_start(
    open_store: OpenStore, results: Results | BucketResults
) -> None:
    one = open_store(results=results)
    one.complete(add_and_claim(one, "done"), b"[]")
    results.write("done", 7, b"[]")  # another server's, which this one has not heard of yet
    running = add_and_claim(one, "running")
    results.write("running", running.run, b"[]")
    failed = add_and_claim(one, "failed")
    results.write("failed", failed.run, b"[]")
    one.fail(failed, "no")
    other = open_store(results=results)
    other.recover()
    kept = [results.read(job_id, run) for job_id, run in (("done", 1), ("running", 1))]
    assert kept == [b"[]", b"[]"]
    assert results.read("failed", 1) is None


def test_servers_that_keep_results_in_different_places_are_not_a_fleet(
    open_store: OpenStore, tmp_path: Path, in_bucket: BucketResults
) -> None:
    one = open_store()
    for elsewhere in (Results(tmp_path / "mine"), in_bucket):
        with pytest.raises(Unavailable, match="SDBENTO_JOB_RESULTS_DIR"):
            open_store(results=elsewhere)
    one.close()
    open_store(results=in_bucket)  # nobody is left whose results it could not read


def test_the_bucket_may_hold_other_things(in_bucket: BucketResults, s3: Store) -> None:
    in_bucket.write("a", 1, b"[]")
    s3.objects["/pictures/holiday.1.json"] = ("", b"mine")
    assert f"/pictures/{PREFIX}a.1.json" in s3.objects
    in_bucket.keep_only(lambda *_: None)  # all are of 2020
    assert [*s3.objects] == ["/pictures/holiday.1.json"]


def test_a_bucket_that_refuses_is_tried_again_like_a_full_disk(
    open_store: OpenStore, in_bucket: BucketResults, s3: Store
) -> None:
    store: JobStore = open_store(results=in_bucket)
    job = add_and_claim(store)
    s3.statuses = [403]
    with pytest.raises(OSError, match="bucket of the results") as caught:
        store.complete(job, b"[]")
    assert isinstance(classify(caught.value), Unavailable)
    assert current(store).status == "IN_PROGRESS"
    assert store.complete(job, b"[]")
