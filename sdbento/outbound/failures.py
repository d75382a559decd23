"""Why a URL could not be used, as an error that names the request's field and the host."""

from __future__ import annotations

import ssl

import httpcore
import httpx

from sdbento.errors import InvalidParameter, SDBentoError
from sdbento.settings import Settings

MAX_HOST_CHARS = 60  # of a host in a message


class Failed(Exception):
    """Why a URL cannot be used. `kind` is the error that the caller gets in its place."""

    def __init__(self, reason: str, kind: type[SDBentoError] = InvalidParameter) -> None:
        super().__init__(reason)
        self.kind = kind


FAILURES = (
    Failed,
    TimeoutError,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
)


def explained(
    error: Exception, problem: str, target: httpx.URL | None, settings: Settings, param: str
) -> SDBentoError:
    """The error for the client, who learns which host it is about."""
    kind = error.kind if isinstance(error, Failed) else InvalidParameter
    host = "" if target is None else target.raw_host.decode("ascii")
    if len(host) > MAX_HOST_CHARS:
        host = f"{host[:MAX_HOST_CHARS]}…"
    reason = _reason(error, settings.fetch_timeout)
    return kind(f"{problem} {host or 'its URL'}: {reason}", param=param)


def _reason(error: BaseException, seconds: float) -> str:
    if isinstance(error, Failed):
        return str(error)
    if isinstance(error, TimeoutError | httpcore.TimeoutException):
        return f"it took longer than the limit of {seconds:g} seconds (SDBENTO_FETCH_TIMEOUT)"
    match _cause(error):
        case ssl.SSLCertVerificationError() as cause:
            return f"its certificate was refused: {cause.verify_message.rstrip('.')}"
        case ssl.SSLError():
            return "TLS failed"
        case ConnectionRefusedError():
            return "the connection was refused"
    if isinstance(error, httpcore.ConnectError):
        return "the host cannot be reached"
    return "the host broke off or does not speak HTTP"


def _cause(error: BaseException) -> object:
    """What httpcore, and anyio below it, hide but keep."""
    cause = error.args[0] if error.args else None
    return getattr(cause, "__cause__", None) or cause
