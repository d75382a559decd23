"""A PostgreSQL server from the machine's own installation, on loopback, for a test session."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg

from tests.support.server import free_port

PROGRAMS = ("initdb", "pg_ctl", "postgres")
OWNER = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
_numbers = count()


def is_installed() -> bool:
    return all(map(shutil.which, PROGRAMS))


@contextmanager
def postgres() -> Iterator[str]:
    """The address of the server, `postgresql://user@host:port`, without a database."""
    folder, port = Path(tempfile.mkdtemp()), free_port()
    if OWNER is not None:
        shutil.chown(folder, OWNER)
    try:
        _run(folder, "initdb", "-D", str(folder / "data"), "-U", "tester", "-A", "trust")
        _start(folder, port)
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


def _start(folder: Path, port: int) -> None:
    data, log = str(folder / "data"), str(folder / "log")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    _run(folder, "pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")


def _stop(folder: Path) -> None:
    _run(folder, "pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "-w", "stop")


def _run(folder: Path, *command: str) -> None:
    subprocess.run(command, check=True, user=OWNER, cwd=folder, stdout=subprocess.DEVNULL)


def new_database(server: str) -> str:
    """The address of a new, empty database on the server."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server}/{name}"
