"""Every error that a client can see, as one tree. Doors show what `to_body` returns.

    SDBentoError                 500  internal_error     unexpected; the log has the details
      MalformedRequest           400  malformed_request  the body is not what the route reads
        UnsupportedEncoding      415  unsupported_encoding  a compressed body
      Unauthorized               401  unauthorized       a key is needed, and this is none
      Forbidden                  403  forbidden          this key does not allow it
      NotFound                   404  not_found          no such route
        UnknownModel             404  unknown_model      there is no model of that name
      TooLarge                   413  too_large          more bytes than the limit
      InvalidParameter           422  invalid_parameter  a field is out of its bounds
        UnknownSampler           422  unknown_sampler    no sampler of that name
        UnsupportedSampler       422  unsupported_sampler  a sampler that is not affine
        UnsupportedModel         422  unsupported_model  weights or an architecture we refuse
      Overloaded                 429  queue_full         the queue is full; try after retry_after
        LimitReached             429  limit_reached      a limit of this caller, or its share
      Cancelled                  499  cancelled          the client went away or cancelled
      GenerationFailed           500  generation_failed  this image failed, for the reason given
      NotOffered                 501  not_offered        another server has this, this one does not
      Unavailable                503  unavailable        starting, stopping
        ModelLoadFailed          503  model_load_failed  could not be loaded now; may be tried again
        OutOfMemory              503  out_of_memory      the device is too small for this request
      DeadlineExceeded           504  deadline_exceeded  too late, or certain to be

`outcome` is the same in one word of few, for logs, metrics and traces: see OUTCOMES.

`classify` is the one place where foreign exceptions (torch, Hub, safetensors, PIL, network) become
errors of this tree. Knows nothing of HTTP beyond the status numbers.
"""

from __future__ import annotations

import difflib
import errno
import uuid
from collections.abc import Iterable
from typing import Any, NoReturn

from sdbento.url_redaction import redacted_message

OK = "ok"  # the outcome of a request that was answered as it asked
# How requests end. Of errors, a class's word holds for those below it that have none of their own.
OUTCOMES = (
    OK,
    "invalid",
    "unauthorized",
    "forbidden",
    "not_found",
    "overloaded",
    "cancelled",
    "out_of_memory",
    "unavailable",
    "timeout",
    "failed",
)
# Seconds after which another server may answer where this one has stopped, or the jobs' database.
NEXT_SERVER = 5.0


class SDBentoError(Exception):
    """Base of all errors with a public message. `param` names the request field at fault."""

    status = 500
    type = "internal_error"
    outcome = "failed"
    request_id: str | None = None  # set by our client: what the server's log calls the request

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.message = redacted_message(message)  # it may quote what the client sent
        super().__init__(self.message)
        self.param = param
        self.retry_after = retry_after

    def to_body(self) -> dict[str, Any]:
        """The one error shape of every door that has no convention of its own."""
        return {"error": {"type": self.type, "message": self.message, "param": self.param}}


class MalformedRequest(SDBentoError):
    status, type = 400, "malformed_request"
    outcome = "invalid"


class UnsupportedEncoding(MalformedRequest):
    status, type = 415, "unsupported_encoding"


class Unauthorized(SDBentoError):
    status, type = 401, "unauthorized"
    outcome = "unauthorized"


class Forbidden(SDBentoError):
    status, type = 403, "forbidden"
    outcome = "forbidden"


class NotFound(SDBentoError):
    status, type = 404, "not_found"
    outcome = "not_found"


class UnknownModel(NotFound):
    type = "unknown_model"


class TooLarge(SDBentoError):
    status, type = 413, "too_large"
    outcome = "invalid"


class InvalidParameter(SDBentoError):
    status, type = 422, "invalid_parameter"
    outcome = "invalid"


class UnknownSampler(InvalidParameter):
    type = "unknown_sampler"


class UnsupportedSampler(InvalidParameter):
    type = "unsupported_sampler"


class UnsupportedModel(InvalidParameter):
    type = "unsupported_model"


class Overloaded(SDBentoError):
    status, type = 429, "queue_full"
    outcome = "overloaded"


class LimitReached(Overloaded):
    type = "limit_reached"


class Cancelled(SDBentoError):
    status, type = 499, "cancelled"
    outcome = "cancelled"


class GenerationFailed(SDBentoError):
    type = "generation_failed"


class NotOffered(SDBentoError):
    status, type = 501, "not_offered"
    outcome = "invalid"


class Unavailable(SDBentoError):
    status, type = 503, "unavailable"
    outcome = "unavailable"


class ModelLoadFailed(Unavailable):
    type = "model_load_failed"


class OutOfMemory(Unavailable):
    type = "out_of_memory"
    outcome = "out_of_memory"


class DeadlineExceeded(SDBentoError):
    status, type = 504, "deadline_exceeded"
    outcome = "timeout"


def stopping() -> Unavailable:
    """The error for requests that this server does not finish, because it is stopping."""
    message = "the server is stopping; send the request again, to another one or to the next"
    return Unavailable(message, retry_after=NEXT_SERVER)


# Foreign exceptions by class name, so that no library is imported just for a comparison.
# Of an exception's class and its bases, the first that is listed decides.
_SMALLER = "ask for a smaller width and height or fewer images"
_CACHE = "the model's files in the Hub cache are damaged or incomplete; delete them and try again"
_DATABASE = "the jobs' database does not answer; try again later"
_FOREIGN: dict[str, tuple[type[SDBentoError], str]] = {
    # Python and torch
    "CancelledError": (Cancelled, "the request was cancelled"),
    "OutOfMemoryError": (OutOfMemory, f"the device ran out of memory; {_SMALLER}"),
    "MemoryError": (OutOfMemory, f"the machine ran out of memory; {_SMALLER}"),
    "AcceleratorError": (GenerationFailed, "the device failed; see the server's log"),
    "ConnectionError": (Unavailable, "a network connection failed"),
    "TimeoutError": (Unavailable, "an operation timed out"),
    # the Hub
    "GatedRepoError": (
        ModelLoadFailed,
        "the model is gated: accept its licence on the Hub and set HF_TOKEN",
    ),
    "LocalTokenNotFoundError": (ModelLoadFailed, "the model needs a Hub token: set HF_TOKEN"),
    "RepositoryNotFoundError": (UnknownModel, "no such model on the Hub, or it is private"),
    "RevisionNotFoundError": (UnknownModel, "the Hub has no such revision of the model"),
    "RevisionResolutionError": (UnknownModel, "the Hub has no such revision of the model"),
    "HFValidationError": (UnknownModel, "that is not a name that a model on the Hub can have"),
    "HfUriError": (UnknownModel, "that is not a name that a model on the Hub can have"),
    "EntryNotFoundError": (ModelLoadFailed, "the model's repository lacks a file it needs"),
    "LocalEntryNotFoundError": (
        ModelLoadFailed,
        "the model is not on this machine and the Hub cannot be reached",
    ),
    "OfflineModeIsEnabled": (
        ModelLoadFailed,
        "the model is not on this machine and downloads are switched off",
    ),
    "HfHubHTTPError": (ModelLoadFailed, "the Hub refused the download"),
    "FileMetadataError": (ModelLoadFailed, "the Hub answered a download with something else"),
    "XetDownloadError": (ModelLoadFailed, "a download from the Hub failed"),
    "XetAuthenticationError": (ModelLoadFailed, "a download from the Hub failed"),
    "XetObjectNotFoundError": (ModelLoadFailed, "a download from the Hub failed"),
    "CacheNotFound": (ModelLoadFailed, _CACHE),
    "CachedRepoTreeNotFoundError": (ModelLoadFailed, _CACHE),
    "CorruptedCacheException": (ModelLoadFailed, _CACHE),
    # weights
    "SafetensorError": (ModelLoadFailed, "a weights file is damaged or incomplete"),
    "SafetensorsParsingError": (ModelLoadFailed, "a weights file is damaged or incomplete"),
    "NotASafetensorsRepoError": (UnsupportedModel, "the model has no safetensors weights"),
    # the jobs' database, by SQLAlchemy
    "OperationalError": (Unavailable, _DATABASE),
    "InterfaceError": (Unavailable, _DATABASE),
    "InternalError": (Unavailable, _DATABASE),  # PostgreSQL is read-only while another takes over
    # images
    "UnidentifiedImageError": (InvalidParameter, "the image cannot be decoded"),
    "DecompressionBombError": (TooLarge, "the image has too many pixels"),
    "DecompressionBombWarning": (TooLarge, "the image has too many pixels"),
    # the network, by httpx and requests
    "TimeoutException": (Unavailable, "a network request timed out"),
    "RequestError": (Unavailable, "a network request failed"),
    "HTTPStatusError": (Unavailable, "a network request was refused"),
    "RequestException": (Unavailable, "a network request failed"),
    "InvalidURL": (InvalidParameter, "the URL is not valid"),
}


def classify(exc: BaseException) -> SDBentoError:
    """The error of this tree that tells a client about `exc`.

    An exception that is not known becomes a 500 whose message has an id and no internals. `exc` is
    its cause: log both, and the id of the client's message leads to the traceback.
    """
    if isinstance(exc, SDBentoError):
        return exc
    if (known := _recognise(exc)) is not None:
        kind, message = known
        error = kind(message, retry_after=NEXT_SERVER if message == _DATABASE else None)
    else:
        error = SDBentoError(f"unexpected error, id {uuid.uuid4().hex[:12]}; see the server's log")
    error.__cause__ = exc
    return error


def reraise(exc: Exception) -> NoReturn:
    """Raise what `classify` makes of `exc`. An error of the tree is raised as it is, lest it become
    its own cause."""
    error = classify(exc)
    if error is exc:
        raise error
    raise error from exc


def unexplained(exc: BaseException) -> BaseException | None:
    """`exc` if `classify` does not know it, else None. For a log's `exc_info`: only what is not
    known needs a traceback."""
    return exc if type(classify(exc)) is SDBentoError else None


def is_sick(error: BaseException) -> bool:
    """Whether the GPU has failed for good: it reported any error but a lack of memory.

    The error may be what `classify` made of the device's own. After such an error CUDA answers
    every later call of the process with the same one ("CUDA error: an illegal memory access was
    encountered", "unspecified launch failure"); only a new process can use the device again.
    """
    return any(_is_device_failure(cause) for cause in _causes(error))


def nearest_names(
    name: str, names: Iterable[str], count: int = 3, cutoff: float = 0.5
) -> list[str]:
    """What may have been meant by a name that is none of `names`, for the message that says so.

    At most `count` of them, the most similar first, each with a similarity of at least `cutoff`:
    1 is the same name, 0 one without a common letter (difflib).
    """
    return difflib.get_close_matches(name, names, n=count, cutoff=cutoff)


def _causes(error: BaseException) -> list[BaseException]:
    """`error` and what caused it, each once: `raise e from e` makes an error its own cause."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    return causes


def _is_device_failure(error: BaseException) -> bool:
    names, text = {cls.__name__ for cls in type(error).__mro__}, str(error)
    if "OutOfMemoryError" in names or "out of memory" in text or "_ALLOC_FAILED" in text:
        return False
    # torch raises AcceleratorError for CUDA itself, RuntimeError for CUDA's libraries.
    return "AcceleratorError" in names or (
        "RuntimeError" in names and text.startswith(("CUDA error", "cuDNN error"))
    )


def _hub_fault(exc: BaseException) -> str | None:
    """What the Hub's answer says of the Hub itself, if anything."""
    status = getattr(getattr(exc, "response", None), "status_code", 0)
    if status == 429:
        return "the Hub asks for a pause (429 Too Many Requests); try again later"
    return f"the Hub has a fault (status {status}); try again later" if status >= 500 else None


def _recognise(exc: BaseException) -> tuple[type[SDBentoError], str] | None:
    sqlite: str | None = getattr(getattr(exc, "orig", None), "sqlite_errorname", None)
    if sqlite == "SQLITE_FULL":
        return Unavailable, "the disk is full"
    if sqlite is not None and sqlite.startswith("SQLITE_READONLY"):
        return Unavailable, "the jobs' database cannot be written: it, or its disk, is read-only"
    for cls in type(exc).__mro__:
        if cls.__name__ == "HfHubHTTPError" and (fault := _hub_fault(exc)) is not None:
            return ModelLoadFailed, fault
        if cls.__name__ in _FOREIGN:
            return _FOREIGN[cls.__name__]
    if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        return Unavailable, "the disk is full"
    if isinstance(exc, RuntimeError) and "can't allocate memory" in str(exc):  # torch on a CPU
        return _FOREIGN["MemoryError"]
    return None
