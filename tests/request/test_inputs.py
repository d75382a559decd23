from __future__ import annotations

import pytest

from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter
from sdbento.request.inputs import InputImages, make_control_images, read_images
from sdbento.request.settle import settle
from tests.request.test_settle import IMAGE, MASK, MAX_PIXELS, request, spec
from tests.support.images import gradient

SETTINGS = load_settings()


def test_images_are_read_from_every_accepted_form() -> None:
    images = read_images(
        request(
            image=IMAGE,
            mask_image=MASK,
            controlnet=[{"type": "canny", "preprocess": True}, {"type": "x", "image": IMAGE}],
        ),
        SETTINGS,
    )
    assert images.image is not None and images.mask is not None
    assert all(image is not None for image in images.controls)


def test_control_images_are_made_at_the_size_of_the_image() -> None:
    controls = [{"type": "canny", "preprocess": True}, {"type": "x"}]
    asked = request(image=IMAGE, controlnet=controls, width=128, height=72)
    images = read_images(asked, SETTINGS)
    settled, _ = settle(asked, spec(), images.size, MAX_PIXELS)
    edges, other = make_control_images(settled, images).controls
    assert edges is not None and other is not None
    assert edges.size == (128, 72)
    assert len(edges.getcolors() or ()) == 2  # black and white
    assert other.tobytes() == gradient().tobytes()


@pytest.mark.parametrize(
    ("controls", "param"),
    [
        ([{"type": "canny"}], "controlnet.0.image"),
        ([{"type": "inpaint"}], "controlnet.0.image"),
        ([{"type": "canny", "image": IMAGE}, {"type": "inpaint"}], "controlnet.1.image"),
    ],
    ids=str,
)
def test_a_controlnet_without_any_image_is_refused(
    controls: list[dict[str, str]], param: str
) -> None:
    with pytest.raises(InvalidParameter, match="required") as caught:
        read_images(request(controlnet=controls), SETTINGS)
    assert caught.value.param == param


def test_outpainting_enlarges_the_image_before_its_size_is_settled() -> None:
    asked = request(image=IMAGE, outpaint={"left": 32, "top": 16})
    images = read_images(asked, SETTINGS)
    assert images.image is not None and images.image.size == (96, 80)
    settled, _ = settle(asked, spec(), images.size, MAX_PIXELS)
    assert (settled.width, settled.height) == (96, 80)


def test_the_size_is_the_images_else_the_control_images() -> None:
    image, control = gradient(203, 101), gradient(77, 145)
    assert InputImages().size is None
    assert InputImages(image).size == (203, 101)
    assert InputImages(controls=(None, control)).size == (77, 145)
    assert InputImages(image, controls=(control,)).size == (203, 101)
