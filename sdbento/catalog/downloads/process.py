"""A process that asks the Hub for us, which can be ended at any moment: see `child`.

It is started when it is first needed: not for what is in the cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdbento import errors
from sdbento.errors import Cancelled, ModelLoadFailed, SDBentoError

ROOT = Path(__file__).parents[3]
START = "import sys; sys.path.insert(0, sys.argv[1]); from sdbento.catalog.downloads import child; "
END_TIMEOUT = 5.0  # seconds in which it removes what it has not finished


class HubError(Exception):
    """What the Hub, the way there, or the disk has done; `error` tells a client about it.

    `kind`: absent, refused, away or disk, as `child` has them.
    """

    def __init__(self, error: SDBentoError, kind: str) -> None:
        super().__init__(error.message)
        self.error = error
        self.kind = kind


@dataclass(frozen=True)
class RemoteFile:
    size: int
    blob: str  # names its content


@dataclass(frozen=True)
class Listing:
    """The newest revision of a repository, with its files by path."""

    repo: str
    revision: str
    files: Mapping[str, RemoteFile]

    def size(self, paths: Collection[str]) -> int:
        return sum(self.files[path].size for path in paths)


class HubProcess:
    """`end` may be called from any thread; the others belong to one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ended = False
        self._lock = threading.Lock()  # guards the two

    def list(self, repo: str) -> Listing:
        """Raises HubError, or Cancelled when ended."""
        answer = self._ask({"list": repo})
        files = {path: RemoteFile(*entry) for path, entry in answer["files"].items()}
        return Listing(repo, answer["revision"], files)

    def get(self, listing: Listing, paths: Collection[str], whole: bool) -> Path:
        """The folder with these files, downloaded where they must be. `whole`: they are all that is
        needed of the repository. Raises as `list` does."""
        wanted = {path: listing.files[path] for path in paths}
        files = {path: (file.size, file.blob) for path, file in wanted.items()}
        command = {"get": listing.repo, "revision": listing.revision, "files": files}
        return Path(self._ask({**command, "whole": whole}))

    def end(self) -> None:
        """Stop whatever it does; its unfinished files are removed. Blocking, for a moment."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is not None:
            _close(process)

    def _ask(self, command: Mapping[str, Any]) -> Any:
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):  # it was ended meanwhile
            line = ""
        if self._ended:
            raise Cancelled("the download was stopped: nobody waits for it any more")
        if not line:
            error = ModelLoadFailed("the process that downloads has died; try again")
            raise HubError(error, "refused")
        answer = json.loads(line)
        if answer.get("last"):
            _close(process)  # the next command starts another
        if "ok" in answer:
            return answer["ok"]
        raise HubError(getattr(errors, answer["error"])(answer["message"]), answer["kind"])

    def _start(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise Cancelled("the download was stopped: nobody waits for it any more")
            if self._process is not None and self._process.poll() is not None:
                _close(self._process)
                self._process = None
            if self._process is None:
                # In a session of its own: what ends the server's whole group, such as Ctrl-C, would
                # give it no time to remove its files.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", f"{START}child.main()", str(ROOT)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            return self._process


def _close(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):  # it has ended already
        process.stdin.close()
    try:
        process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:  # it hangs in a call that it cannot leave
        process.kill()
        process.wait()
    process.stdout.close()
