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
_numbers = count()


def is_installed() -> bool:
    return all(map(shutil.which, PROGRAMS))


@contextmanager
def postgres() -> Iterator[str]:
    """The address of the server, `postgresql://user@host:port`, without a database."""
    folder, port = Path(tempfile.mkdtemp()), free_port()
    owner = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if owner is not None:
        shutil.chown(folder, owner)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, user=owner, cwd=folder, stdout=subprocess.DEVNULL)

    data, log = str(folder / "data"), str(folder / "log")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        run("initdb", "-D", data, "-U", "tester", "-A", "trust")
        run("pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")
        try:
            yield f"postgresql://tester@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def new_database(server: str) -> str:
    """The address of a new, empty database on the server."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server}/{name}"
