from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image, ImageDraw

from sdbento.errors import InvalidParameter, ModelLoadFailed
from sdbento.images import preprocessors
from sdbento.images.preprocessors import ANNOTATORS, BUILT_IN, MAX_DETECTORS, REPOSITORY, preprocess

SIZE = (96, 64)


def square() -> Image.Image:
    """A black square from (24, 16) to (55, 47) on white."""
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).rectangle((24, 16, 55, 47), fill="black")
    return image


class Aux:
    """A stand-in for controlnet_aux: networks that fill an image with their class's colour."""

    def __init__(self) -> None:
        self.downloaded: list[tuple[str, str]] = []
        self.loaded: list[str] = []
        self.seen: list[tuple[tuple[int, int], dict[str, Any]]] = []
        self.failure: Exception | None = None
        self.drawing = threading.Lock()

    def hf_hub_download(self, repository: str, file: str) -> str:
        if self.failure is not None:
            raise self.failure
        self.downloaded.append((repository, file))
        return file

    def modules(self) -> dict[str, ModuleType]:
        aux = self

        class Processor:
            def __init__(self, name: str) -> None:
                aux.loaded.append(name)
                self.params = {"scribble": False}

            def processor(self, image: Image.Image, **options: Any) -> Image.Image:
                assert aux.drawing.acquire(blocking=False), "two images in one network"
                time.sleep(0.002)
                aux.seen.append((image.size, options))
                aux.drawing.release()
                return Image.new("L", (512, 768), 200)

        processor = ModuleType("controlnet_aux.processor")
        processor.Processor = Processor  # type: ignore[attr-defined]
        return {"controlnet_aux": ModuleType("controlnet_aux"), processor.__name__: processor}


@pytest.fixture(autouse=True)
def _nothing_loaded() -> Iterator[None]:
    preprocessors._detector.cache_clear()
    yield
    preprocessors._detector.cache_clear()


@pytest.fixture
def aux(monkeypatch: pytest.MonkeyPatch) -> Aux:
    aux = Aux()
    for name, module in aux.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(preprocessors, "hf_hub_download", aux.hf_hub_download)
    return aux


# Built in


def test_canny_draws_only_the_outline() -> None:
    drawn = preprocess("canny", square())
    pixels = np.asarray(drawn)
    assert (drawn.mode, drawn.size) == ("RGB", SIZE)
    assert set(np.unique(pixels)) == {0, 255}
    assert (pixels == pixels[:, :, :1]).all()
    ys, xs = np.nonzero(pixels[:, :, 0])
    assert all(
        min(abs(x - 24), abs(x - 55), abs(y - 16), abs(y - 47)) <= 1
        for x, y in zip(xs, ys, strict=True)
    )
    for row, column in ((32, 24), (32, 55), (16, 40), (47, 40)):
        assert pixels[row - 1 : row + 2, column - 1 : column + 2].any()


def test_scribble_draws_white_strokes_in_dark_places() -> None:
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).line((10, 32, 86, 32), fill="black", width=3)
    pixels = np.asarray(preprocess("scribble", image))[:, :, 0]
    assert set(np.unique(pixels)) == {0, 255}
    assert (pixels[32, 12:84] == 255).all()
    assert not pixels[:24].any() and not pixels[42:].any()


def test_tile_is_the_image_itself() -> None:
    assert preprocess("tile", square()).tobytes() == square().tobytes()


@pytest.mark.parametrize("kind", BUILT_IN)
def test_transparency_counts_as_white(kind: str) -> None:
    image = square().convert("RGBA")
    image.putalpha(0)
    white = Image.new("RGB", SIZE, "white")
    assert preprocess(kind, image).tobytes() == preprocess(kind, white).tobytes()


# Networks


@pytest.mark.parametrize("kind", ANNOTATORS)
def test_the_other_kinds_are_drawn_by_a_network(kind: str, aux: Aux) -> None:
    drawn = preprocess(kind, square())
    assert (drawn.mode, drawn.size, drawn.getpixel((5, 5))) == ("RGB", SIZE, (200, 200, 200))
    assert aux.loaded == [ANNOTATORS[kind].processor]
    assert aux.downloaded == [(REPOSITORY, file) for file in ANNOTATORS[kind].files]
    assert aux.seen == [(SIZE, {"scribble": False, "output_type": "pil"})]


def test_a_network_is_loaded_once_and_draws_one_at_a_time_however_many_ask(aux: Aux) -> None:
    barrier = threading.Barrier(8)

    def draw(_: int) -> Image.Image:
        barrier.wait()
        return preprocess("depth", square())

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(draw, range(8)))) == 8
    assert aux.loaded == ["depth_midas"]


def test_only_a_few_networks_are_kept(aux: Aux) -> None:
    kinds = list(ANNOTATORS)[: MAX_DETECTORS + 1]
    for kind in [*kinds, kinds[-1], kinds[0]]:
        preprocess(kind, square())
    assert aux.loaded == [ANNOTATORS[kind].processor for kind in [*kinds, kinds[0]]]


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    for kind in ("seg", "someone/controlnet", "x" * 500):
        with pytest.raises(InvalidParameter, match=r"canny.*depth") as caught:
            preprocess(kind, square())
        assert caught.value.param == "controlnet.preprocess"
        assert '"preprocess": false' in caught.value.message
        assert len(caught.value.message) < 300


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    monkeypatch.delitem(sys.modules, "controlnet_aux.processor", raising=False)
    with pytest.raises(InvalidParameter, match=r"pip install 'sdbento\[preprocessors\]'") as caught:
        preprocess("depth", square())
    assert caught.value.param == "controlnet.preprocess"
    assert '"preprocess": false' in caught.value.message


def test_weights_that_cannot_be_fetched_are_reported_and_fetched_again(aux: Aux) -> None:
    aux.failure = LocalEntryNotFoundError("no network")
    with pytest.raises(ModelLoadFailed, match=r"depth.*the Hub cannot be reached") as caught:
        preprocess("depth", square())
    assert caught.value.param == "controlnet.preprocess"
    aux.failure = None
    assert preprocess("depth", square()).size == SIZE


def test_an_incompatible_extra_is_not_the_fault_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModelLoadFailed, match="depth"):
        preprocess("depth", square())


def test_a_strip_that_would_grow_beyond_bounds_is_refused(aux: Aux) -> None:
    with pytest.raises(InvalidParameter, match="8 times"):
        preprocess("depth", Image.new("RGB", (90, 10)))
    assert aux.loaded == []
