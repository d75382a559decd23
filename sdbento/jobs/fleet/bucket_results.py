"""The results of jobs in the operator's bucket, where all servers find them.

Knows nothing of the database and of what is in a result.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdbento.jobs.delivery.bucket import Bucket
from sdbento.jobs.results import IsNeeded, is_stray

PREFIX = "sdbento-jobs/"  # of the keys: the bucket may hold other things
MISSING = ("NoSuchKey", "404", "InvalidRange", "416")


class BucketResults:
    """As `Results`, in a bucket. Raises ConnectionError where that does not do what is asked."""

    def __init__(self, bucket: Bucket) -> None:
        self._client = bucket.client
        self._bucket = bucket.name

    def place(self) -> str:
        """The same for all servers that use this bucket, and for no other bucket."""
        address = f"{self._client.meta.endpoint_url}/{self._bucket}"
        return uuid.uuid5(uuid.NAMESPACE_URL, address).hex

    def write(self, job_id: str, run: int, result: bytes) -> None:
        self._put(_key(job_id, run), result)

    def read(self, job_id: str, run: int) -> bytes | None:
        return self._get(_key(job_id, run))

    def read_part(self, job_id: str, run: int, start: int, num_bytes: int) -> bytes:
        """Bytes from `start` on, fewer than `num_bytes` at the end. Raises FileNotFoundError."""
        part = self._get(_key(job_id, run), Range=f"bytes={start}-{start + num_bytes - 1}")
        if part is None:
            raise FileNotFoundError(_key(job_id, run))
        return part

    def delete(self, job_id: str, run: int) -> None:
        self._delete(_key(job_id, run))

    def keep_only(self, is_needed: IsNeeded) -> None:
        """As in `Results`."""
        with _explained():
            pages = self._client.get_paginator("list_objects_v2")
            found = [
                (item["Key"], item["LastModified"].timestamp())
                for page in pages.paginate(Bucket=self._bucket, Prefix=PREFIX)
                for item in page.get("Contents", ())
            ]
        for key, modified in found:
            job_id, run, _ = key.removeprefix(PREFIX).rsplit(".", 2)
            if is_stray(is_needed(job_id, int(run)), modified):
                self._delete(key)

    def _put(self, key: str, data: bytes) -> None:
        with _explained():
            self._client.put_object(Bucket=self._bucket, Key=key, Body=data)

    def _get(self, key: str, **options: Any) -> bytes | None:
        from botocore.exceptions import ClientError

        with _explained():
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=key, **options)
            except ClientError as error:
                if error.response["Error"]["Code"] in MISSING:
                    return None
                raise
            data: bytes = answer["Body"].read()
            return data

    def _delete(self, key: str) -> None:
        with _explained():
            self._client.delete_object(Bucket=self._bucket, Key=key)


def _key(job_id: str, run: int) -> str:
    return f"{PREFIX}{job_id}.{run}.json"


@contextmanager
def _explained() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise ConnectionError(f"the bucket of the results: {error}") from error
