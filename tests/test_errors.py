"""The tree of errors, and the mapping of foreign errors to it."""

from __future__ import annotations

import asyncio
import builtins
import errno
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from sdbento import errors
from sdbento.errors import (
    NEXT_SERVER,
    OK,
    OUTCOMES,
    Cancelled,
    GenerationFailed,
    InvalidParameter,
    ModelLoadFailed,
    OutOfMemory,
    SDBentoError,
    TooLarge,
    Unavailable,
    UnknownModel,
    UnsupportedModel,
    classify,
    is_sick,
    nearest_names,
)
from tests.support.device_errors import SICK
from tests.support.server import free_port

TREE = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SDBentoError)
]
NETWORK = ["httpx", "httpx2", "requests.exceptions"]
LIBRARIES = ["torch", "safetensors", "PIL.Image", "huggingface_hub.errors", "hf_xet", *NETWORK]

# Exceptions of these libraries that nothing here can raise, with the reason.
NOT_OURS = {
    "requests.exceptions": "BaseHTTPError|CompatJSONDecodeError|.*Warning",  # urllib3's, json's
    "torch": "FatalError|JITException",  # TorchScript
    "huggingface_hub.errors": "CLI.*|Confirmation.*|DDUF.*|DeviceCode.*|DryRun.*|FileDuplication.*"
    "|OIDC.*|Sandbox.*|StrictDataclass.*"  # its command line, single-file format, sandboxes
    "|HTTPError|.*Generation.*|OverloadedError|UnknownError|ValidationError"
    "|InferenceEndpointError",  # its clients of hosted models
}
# Programming errors, and base classes that are not raised themselves: a 500 is right.
NOT_OURS |= dict.fromkeys(["httpx", "httpx2"], "HTTPError|CookieConflict|Stream.*|.*NotRead")


def foreign_exceptions() -> list[type[BaseException]]:
    found = []
    for library in LIBRARIES:
        for name, cls in sorted(vars(importlib.import_module(library)).items()):
            if not (inspect.isclass(cls) and issubclass(cls, BaseException)):
                continue
            if hasattr(builtins, name) or re.fullmatch(NOT_OURS.get(library, ""), name):
                continue
            found.append(cls)
    return found


def instance(name: str) -> BaseException:
    """An exception by module and class, made without the arguments of its constructor."""
    module, _, cls = name.rpartition(".")
    made = getattr(importlib.import_module(module), cls)
    exc = made.__new__(made)
    assert isinstance(exc, BaseException)
    return exc


@pytest.mark.parametrize("cls", TREE)
def test_each_error_of_the_tree_has_a_status_and_a_type_and_stands_in_the_drawing(
    cls: type[SDBentoError],
) -> None:
    assert 400 <= cls.status <= 599
    assert re.search(rf"\b{cls.__name__} +{cls.status}  {cls.type} ", errors.__doc__ or "")


def test_outcomes_are_those_of_the_errors_and_ok() -> None:
    assert {OK, *(cls.outcome for cls in TREE)} == {*OUTCOMES}


def test_types_are_unique() -> None:
    assert len({cls.type for cls in TREE}) == len(TREE)


def test_every_error_body_has_the_same_shape() -> None:
    error = InvalidParameter("width is odd", param="width")
    assert error.to_body() == {
        "error": {"type": "invalid_parameter", "message": "width is odd", "param": "width"}
    }
    assert str(error) == "width is odd"


def test_an_error_of_the_tree_is_its_own_class() -> None:
    error = UnknownModel("no such model")
    assert classify(error) is error


@pytest.mark.parametrize(
    "cls", foreign_exceptions(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}"
)
def test_every_foreign_error_is_mapped(cls: type[BaseException]) -> None:
    error = classify(cls.__new__(cls))
    assert error.type != "internal_error", f"{cls.__module__}.{cls.__name__} is not mapped"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("torch.OutOfMemoryError", OutOfMemory),
        ("torch.AcceleratorError", GenerationFailed),
        ("builtins.MemoryError", OutOfMemory),
        ("asyncio.CancelledError", Cancelled),
        ("builtins.TimeoutError", Unavailable),
        ("builtins.ConnectionResetError", Unavailable),
        ("huggingface_hub.errors.RepositoryNotFoundError", UnknownModel),
        ("huggingface_hub.errors.RevisionNotFoundError", UnknownModel),
        ("huggingface_hub.errors.HFValidationError", UnknownModel),
        ("huggingface_hub.errors.GatedRepoError", ModelLoadFailed),
        ("huggingface_hub.errors.LocalEntryNotFoundError", ModelLoadFailed),
        ("huggingface_hub.errors.OfflineModeIsEnabled", ModelLoadFailed),
        ("huggingface_hub.errors.HfHubHTTPError", ModelLoadFailed),
        ("huggingface_hub.errors.NotASafetensorsRepoError", UnsupportedModel),
        ("safetensors.SafetensorError", ModelLoadFailed),
        ("PIL.UnidentifiedImageError", InvalidParameter),
        ("PIL.Image.DecompressionBombError", TooLarge),
        ("httpx.ReadTimeout", Unavailable),
        ("httpx.ConnectError", Unavailable),
        ("httpx2.ConnectError", Unavailable),
        ("httpx.InvalidURL", InvalidParameter),
        ("requests.exceptions.ConnectionError", Unavailable),
    ],
)
def test_foreign_errors_become_errors_of_the_tree(name: str, kind: type[SDBentoError]) -> None:
    assert type(classify(instance(name))) is kind


def test_the_nearest_base_class_decides() -> None:
    gated = classify(instance("huggingface_hub.errors.GatedRepoError"))  # also a RepositoryNotFound
    assert "licence" in gated.message
    assert "timed out" in classify(instance("httpx.ConnectTimeout")).message


def test_running_out_of_memory_on_a_cpu_is_recognised() -> None:
    torch = importlib.import_module("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert type(classify(caught.value)) is OutOfMemory


def test_a_full_disk_is_recognised() -> None:
    assert classify(OSError(errno.ENOSPC, "No space left on device")).message == "the disk is full"


def test_a_disk_that_is_full_for_the_database_is_recognised(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'small.db'}")
    with engine.connect() as connection:
        connection.execute(text("PRAGMA max_page_count = 2"))
        with pytest.raises(OperationalError) as caught:
            connection.execute(text("CREATE TABLE t AS SELECT randomblob(100000) AS a"))
    engine.dispose()
    assert classify(caught.value).message == "the disk is full"


def test_a_database_that_is_away_may_be_asked_again_soon() -> None:
    with pytest.raises(OperationalError) as caught:
        create_engine(f"postgresql+psycopg://localhost:{free_port()}/jobs").connect()
    error = classify(caught.value)
    assert (error.status, error.type, error.retry_after) == (503, "unavailable", NEXT_SERVER)


def test_an_unknown_error_is_a_500_with_an_id_and_no_internals() -> None:
    secret = KeyError("/home/me/secret")
    first, second = classify(secret), classify(secret)
    assert (first.status, first.type) == (500, "internal_error")
    assert "secret" not in json.dumps(first.to_body())
    assert re.search(r"id [0-9a-f]{12};", first.message)
    assert first.message != second.message
    assert first.__cause__ is secret


@pytest.mark.parametrize(
    "exc", [asyncio.QueueEmpty(), RuntimeError("odd"), OSError(5, "I/O error")]
)
def test_ordinary_errors_are_not_taken_for_something_else(exc: Exception) -> None:
    assert classify(exc).type == "internal_error"


@pytest.mark.parametrize(("error", "sick"), SICK)
def test_only_a_failure_of_the_device_itself_marks_it_as_failed(
    error: Exception, sick: bool
) -> None:
    assert is_sick(classify(error)) is sick


def test_an_error_that_is_its_own_cause_is_judged_once() -> None:
    error = InvalidParameter("width is bad")
    error.__cause__ = error
    assert not is_sick(error)


def test_the_nearest_names_are_few_similar_and_the_most_similar_come_first() -> None:
    names = ["ochre", "ink", "outlines", "outline", "online"]
    assert nearest_names("outlime", names) == ["outline", "outlines", "online"]
    assert nearest_names("outlime", names, count=1) == ["outline"]
    assert nearest_names("outlime", names, cutoff=0.9) == []
    assert nearest_names("???", names) == []
    assert len(nearest_names("???", names, cutoff=0)) == 3
