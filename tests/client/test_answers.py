"""Answers as objects."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image

from sdbento.client.answers import Generation, Model, Sampler, to_generation
from sdbento.doors.http import listings
from sdbento.images.codec import encode
from sdbento.images.metadata import Metadata, read_metadata
from sdbento.request.schema import GenerateResponse, Timings

METADATA = Metadata("a cat\nSteps: 4, Seed: 7, Size: 3x2", {"seed": 7})


def generation(output_format: str = "png", num_images: int = 1) -> Generation:
    file = encode(Image.new("RGB", (3, 2), 7), output_format, METADATA)
    response = GenerateResponse(
        images=[b64encode(file).decode()] * num_images,
        seeds=[7 + i for i in range(num_images)],
        infotexts=[f"text {i}" for i in range(num_images)],
        model="shapes",
        parameters={"prompt": "a cat"},
        timings=Timings(queued=0.0, denoising=1.0, decoding=0.5, total=1.5),
        warnings=["w"],
    )
    return to_generation(response.model_dump(mode="json"))


def test_an_answer_has_all_that_the_server_tells() -> None:
    made = generation(num_images=2)
    assert made.seeds == [7, 8]
    assert made.infotexts == ["text 0", "text 1"]
    assert made.image is made.images[0]
    assert made.image.to_pil().size == (3, 2)
    assert (made.model, made.parameters, made.warnings) == ("shapes", {"prompt": "a cat"}, ["w"])
    assert made.timings.total == 1.5


@pytest.mark.parametrize(
    ("output_format", "suffix"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")]
)
def test_an_image_is_saved_as_the_server_made_it(
    tmp_path: Path, output_format: str, suffix: str
) -> None:
    image = generation(output_format).image
    path = image.save(tmp_path / "out")
    assert path == tmp_path / f"out{suffix}"
    assert path.read_bytes() == image.data
    assert read_metadata(path.read_bytes()) == METADATA
    assert image.save(str(tmp_path / f"OUT{suffix.upper()}")).exists()


def test_a_file_does_not_get_the_suffix_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.jpg or \.jpeg; ask .* output_format"):
        generation("jpeg").save(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_several_images_are_numbered(tmp_path: Path) -> None:
    assert generation(num_images=1).save(tmp_path / "one.png") == [tmp_path / "one.png"]
    saved = generation(num_images=2).save(tmp_path / "out.png")
    assert saved == [tmp_path / "out-1.png", tmp_path / "out-2.png"]
    assert generation(num_images=2).save(tmp_path / "a") == [
        tmp_path / "a-1.png",
        tmp_path / "a-2.png",
    ]


def test_models_and_samplers_are_those_of_the_server() -> None:
    assert get_type_hints(Model).keys() >= listings.Model.model_fields.keys()
    for ours, theirs in ((Model, listings.Model), (Sampler, listings.Sampler)):
        told = {name: field.annotation for name, field in theirs.model_fields.items()}
        assert {name: field.annotation for name, field in ours.model_fields.items()} == told
