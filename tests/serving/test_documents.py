"""The OpenAPI document and its page, as a real server answers them in BentoML's place."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sdbento.doors.docs.examples import EXAMPLES
from sdbento.doors.docs.reference import FILES
from sdbento.doors.docs.schemas import operations
from tests.support.server import Server, assert_error


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return server.client.get("/docs.json").json()


def test_the_server_answers_its_own_document(document: Any) -> None:
    assert document["openapi"] == "3.1.0"
    assert {"/generate", "/run", "/models", "/livez", "/docs"} <= document["paths"].keys()


@pytest.mark.parametrize("path", EXAMPLES)
def test_every_example_succeeds(server: Server, document: Any, path: str) -> None:
    operation = document["paths"][path]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    answer = server.client.post(path, json=example)
    assert str(answer.status_code) in operation["responses"]
    assert answer.is_success, answer.text
    media_type = answer.headers["content-type"].partition(";")[0]
    assert media_type in operation["responses"][str(answer.status_code)]["content"]


def test_every_route_without_parameters_can_be_read(server: Server, document: Any) -> None:
    for path, method, operation in operations(document):
        if method == "get" and not operation.get("parameters"):
            with server.client.stream("GET", path) as answer:  # that of /batch never ends
                assert str(answer.status_code) in operation["responses"], path
                assert answer.status_code in (200, 307), path


def test_the_page_is_made_of_files_of_this_server(server: Server) -> None:
    page = server.client.get("/docs")
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    folder = f"docs/{FILES.version}/"
    names = ["swagger-ui.css", "swagger-ui-bundle.js", "start.js"]
    assert files == [folder + names[0], "data:,", folder + names[1], folder + names[2]]
    for file in files[::2] + files[3:]:
        answer = server.client.get(f"/{file}")
        assert answer.is_success and answer.headers["x-content-type-options"] == "nosniff"
    script = server.client.get(f"/{folder}start.js").text
    assert 'url: "docs.json"' in script and "validatorUrl: null" in script


@pytest.mark.parametrize(
    "path", ["/web", "/web/", "/web/icon.svg", "/web/x/main.js", "/docs/start.js"]
)
def test_a_file_without_its_version_is_not_there(server: Server, path: str) -> None:
    assert_error(server.client.get(path), 404)


def test_the_browser_is_told_to_load_nothing_from_elsewhere(server: Server) -> None:
    policy = server.client.get("/docs").headers["content-security-policy"]
    sources = set(policy.replace(";", "").split()) - {"data:", "blob:"}
    assert not {source for source in sources if "." in source or ":" in source or "*" in source}
    assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize("name", ["VERSION", "LICENSE", "..%2Freference.py", "%2e%2e/service.py"])
def test_no_other_file_is_served(server: Server, name: str) -> None:
    assert_error(server.client.get(f"/docs/{name}"), 404)
