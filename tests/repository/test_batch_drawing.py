"""docs/images/batch.svg: drawn from a recording, which is whole."""

from __future__ import annotations

from collections import defaultdict
from xml.etree import ElementTree

from sdbento.live.batch import Batch, BatchImage, BatchRequest, Lane, Queue
from tools.batch_animation import DRAWING, RECORDING, _note
from tools.batch_drawing import Call, Recording, Request, drawn

RECORDED = Recording.from_json(RECORDING.read_text(encoding="utf-8"))
LARGEST = 500_000  # bytes that a page of documents may load for it


def test_the_drawing_is_that_of_the_recording() -> None:
    assert DRAWING.read_text(encoding="utf-8") == drawn(RECORDED)
    assert RECORDING.read_text(encoding="utf-8") == RECORDED.as_json() + "\n"


def test_the_recording_has_every_step_of_every_image() -> None:
    steps: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for call in RECORDED.calls:
        for number, image, step in call.images:
            steps[number, image].append(step)
        assert len(call.images) <= call.rows <= 2 * len(call.images)
    assert steps == {
        (request.number, image): list(range(1, request.num_steps + 1))
        for request in RECORDED.requests
        for image in range(request.num_images)
    }
    times = [call.at for call in RECORDED.calls]
    assert times == sorted(times)


def test_it_shows_what_the_sentence_above_it_says() -> None:
    assert len({request.sampler for request in RECORDED.requests}) >= 4
    assert any(request.loras for request in RECORDED.requests)
    sizes = [len(call.images) for call in RECORDED.calls]
    assert max(sizes) >= 3 and sizes[0] == 1


def test_the_drawing_needs_no_other_file_and_runs_nothing() -> None:
    text = DRAWING.read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    elements = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert elements <= {"svg", "title", "desc", "style", "g", "rect", "text", "image"}
    assert "url(" not in text and "@import" not in text
    assert text.count("href=") == text.count('href="data:image/webp;base64,')


def test_two_calls_and_what_is_written_of_them() -> None:
    one = Request(7, "a <cat>", "Euler", ["ink"], 2, 1, ["data:image/webp;base64,AAAA"])
    text = drawn(Recording([Call(5.0, 2, 0.5, [(7, 0, 1)]), Call(6.0, 2, 1.0, [(7, 0, 2)])], [one]))
    assert "2 calls; one image after the other: 2" in text
    assert "UNet call 2: 1 image, 2 rows" in text
    assert text.count('<image href="data:image/webp;base64,AAAA"') == 1
    assert "a &lt;cat&gt; + LoRA ink (2 steps, Euler) takes part from call 1 to 2." in text


def test_every_image_is_shown_as_it_was_made() -> None:
    assert all(len(request.pictures) == request.num_images for request in RECORDED.requests)


def test_a_snapshot_becomes_a_call() -> None:
    calls: list[Call] = []
    requests: dict[int, Request] = {}
    lane = Lane(
        *("shapes", 64, 64, 1, 0.0, 2, 0.25, True),
        images=(BatchImage(1, 0, 3, 9, 2, True), BatchImage(1, 1, 0, 9, 0, False)),
    )
    request = BatchRequest(1, True, "a cat", "DDIM", (), 0, 0, 2, 0, 0, 1.0, None)
    batch = Batch(4, 12.5, 1, None, Queue(0, 1, 2, 0, None), (lane,), (request,), (), ())
    _note(batch, calls, requests)
    _note(batch, calls, requests)  # nothing new
    assert calls == [Call(12.5, 2, 0.25, [(1, 0, 3)])]
    assert requests == {1: Request(1, "a cat", "DDIM", [], 9, 2)}
