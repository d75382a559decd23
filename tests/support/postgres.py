"""A PostgreSQL server from the machine's own installation, on loopback, for a test session."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from itertools import count
from pathlib import Path

import psycopg

from tests.support.server import free_port

PROGRAMS = ("initdb", "pg_ctl", "postgres")
# Debian keeps them apart by version, and not in PATH.
PATH = os.pathsep.join([os.environ.get("PATH", ""), *sorted(glob("/usr/lib/postgresql/*/bin"))])
OWNER = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
UNSAFE = "-c fsync=off"  # the machine does not fail during a test
_numbers = count()


def is_installed() -> bool:
    return all(shutil.which(program, path=PATH) for program in PROGRAMS)


@contextmanager
def postgres(settings: str = UNSAFE) -> Iterator[str]:
    """The address of the server, `postgresql://user@host:port`, without a database."""
    folder, port = Path(tempfile.mkdtemp()), free_port()
    if OWNER is not None:
        shutil.chown(folder, OWNER)
    try:
        _run(folder, "initdb", "-D", str(folder / "data"), "-U", "tester", "-A", "trust")
        _start(folder, port, settings)
        try:
            yield f"postgresql://tester@127.0.0.1:{port}"
        finally:
            _stop(folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def stopped(server: str) -> Iterator[None]:
    """The server at this address is stopped at once, and started again after the block."""
    with psycopg.connect(f"{server}/postgres") as connection:
        (data,) = connection.execute("SHOW data_directory").fetchone() or ("",)
        port = connection.info.port
    _stop(Path(data).parent)
    try:
        yield
    finally:
        _start(Path(data).parent, port)


def _start(folder: Path, port: int, settings: str = UNSAFE) -> None:
    data, log = str(folder / "data"), str(folder / "log")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 {settings}"
    _run(folder, "pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")


def _stop(folder: Path) -> None:
    _run(folder, "pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "-w", "stop")


def _run(folder: Path, *command: str) -> None:
    program = shutil.which(command[0], path=PATH) or command[0]
    command = (program, *command[1:])
    subprocess.run(command, check=True, user=OWNER, cwd=folder, stdout=subprocess.DEVNULL)


def new_database(server: str) -> str:
    """The address of a new, empty database on the server."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server}/{name}"
