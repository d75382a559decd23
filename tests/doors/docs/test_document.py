"""The OpenAPI document: valid, complete, and true to the errors that it describes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator

from sdbento.doors.docs.document import document
from sdbento.doors.docs.schemas import COMPONENTS, operations
from sdbento.doors.error_shape import ErrorShape
from sdbento.doors.http.routing import mounted
from sdbento.errors import InvalidParameter, NotFound, SDBentoError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML


@pytest.fixture(scope="module")
def written() -> Any:
    from tools.docs_check import written

    return written()


def problems(written: Any) -> list[str]:
    from tools.docs_check import problems

    return list(problems(written))


def test_the_document_is_valid_and_has_every_route(written: Any) -> None:
    assert problems(written) == []


def test_what_is_wrong_with_a_document_is_noticed(written: Any) -> None:
    broken = copy.deepcopy(written)
    del broken["paths"]["/models"]
    del broken["paths"]["/run"]["post"]["requestBody"]["content"]["application/json"]["example"]
    broken["paths"]["/nowhere"] = {"get": {"responses": {"200": {}}}}
    found = problems(broken)
    assert "GET /models is not in the document" in found
    assert "POST /run has no example" in found
    assert "GET /nowhere is in the document, but not served" in found
    assert any("description" in line for line in found)  # which an answer must have


def test_names_of_operations_are_unique(written: Any) -> None:
    names = [operation["operationId"] for *_, operation in operations(written)]
    assert len(set(names)) == len(names)
    assert {"txt2img", "status_id_get", "index"} <= set(names)


def schemas_in(node: Any) -> Iterator[dict[str, Any]]:
    """All that say of which type something is."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        yield from schemas_in(child)


def test_bounds_have_the_names_that_schemas_have_for_them(written: Any) -> None:
    for schema in schemas_in(written["components"]):
        assert not {"ge", "gt", "le", "lt", "multiple_of"} & schema.keys(), schema


def test_titles_of_schemas_are_unique(written: Any) -> None:
    schemas = written["components"]["schemas"]
    titles = [schema.get("title", name) for name, schema in schemas.items()]
    assert len(set(titles)) == len(titles)


def test_every_operation_has_a_summary_a_tag_and_answers(written: Any) -> None:
    tags = {tag["name"] for tag in written["tags"]}
    for path, method, operation in operations(written):
        assert operation["summary"] and len(operation["summary"]) < 100, path
        assert set(operation["tags"]) <= tags, path
        assert {"500", "503"} <= operation["responses"].keys(), (path, method)


def shouting(error: SDBentoError) -> dict[str, Any]:
    return {"oh": error.message.upper(), "code": error.status, "where": {"field": error.param}}


def test_errors_are_described_in_the_shape_of_their_door() -> None:
    shape = ErrorShape(body=shouting)
    written = document(mounted(), {"/generate": shape})
    for path, errors in (("/generate", shape), ("/txt2img", ErrorShape())):
        answer = written["paths"][path]["post"]["responses"]["422"]
        reference = answer["content"]["application/json"]["schema"]["$ref"]
        schema = written["components"]["schemas"][reference.removeprefix(COMPONENTS)]
        validator: Any = OAS31Validator(schema)
        for error in (SDBentoError("x"), NotFound("y"), InvalidParameter("z", param="seed")):
            validator.validate(errors.body(error))
        assert not validator.is_valid({})


def test_statuses_are_those_of_their_door(written: Any) -> None:
    for path, method, ours in (
        ("/generate", "post", True),
        ("/v1/images/edits", "post", False),
        ("/v1/models/{id}", "get", False),
    ):
        answers = written["paths"][path][method]["responses"]
        assert ("422" in answers) is ours
        assert ("field is wrong" in answers["400"]["description"]) is not ours


def test_a_form_has_files_where_json_has_text(written: Any) -> None:
    schemas = written["components"]["schemas"]
    assert schemas["MaskedRequestForm"]["properties"]["mask_image"]["format"] == "binary"
    assert "format" not in schemas["MaskedRequest"]["properties"]["mask_image"]
    assert schemas["MaskedRequestForm"]["required"] == schemas["MaskedRequest"]["required"]


def test_the_document_says_which_routes_need_a_key(written: Any) -> None:
    assert written["security"] == [{"bearer": []}, {"basic": []}]
    assert document(mounted(), {}, needs_keys=False)["security"][-1] == {}
    for path, _, operation in operations(written):
        is_open = path in ("/", "/web/{file}", "/livez", "/readyz", "/ping")
        is_open |= path == "/v1/images/files/{name}"
        assert (operation.get("security") == []) is is_open, path
        assert ("401" in operation["responses"]) is not is_open, path


@pytest.mark.parametrize("name", ["ImageBody", "Txt2Img"])
def test_lenient_bodies_may_leave_fields_empty(written: Any, name: str) -> None:
    schema = written["components"]["schemas"][name] | {"components": written["components"]}
    validator: Any = OAS31Validator(schema)
    fields = [field for field in schema["properties"] if field != "prompt"]
    for empty in (None, ""):
        validator.validate({"prompt": "x", **dict.fromkeys(fields, empty)})
    assert not validator.is_valid({"prompt": "x", "width": []})
    assert not any(isinstance(one.get("default"), dict) for one in schema["properties"].values())
