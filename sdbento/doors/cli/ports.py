"""Checks whether a server can listen on a port."""

from __future__ import annotations

import socket


def listening_problem(host: str, port: int) -> str | None:
    """Why a server cannot listen on `port` of `host`, or None if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            return str(error.strerror).lower()
    return None
