"""Files that come with a model may hold anything: it is refused, or an ordinary model."""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdbento.catalog import families, hub
from sdbento.catalog.configs import MAX_COUNT, MAX_ITEMS, MAX_NUMBER, check_configs
from sdbento.catalog.layout import INDEX, UNET, model_layout
from sdbento.errors import SDBentoError, UnsupportedModel
from tests.support.checkpoints import SD15, SD21, SDXL, save_zeros
from tests.support.tiny import save_tiny

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sdxl", tmp_path_factory.mktemp("hostile") / "mine")


def read(folder: Path, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / file).read_text())
    return content


@quick
@given(data=st.data())
def test_a_model_whose_configurations_hold_anything_is_refused_or_understood(
    folder: Path, data: st.DataObject
) -> None:
    index, unet = read(folder, INDEX), read(folder, UNET)
    for config in (index, unet):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON)
    with suppress(SDBentoError):
        assert families.from_configs("mine", index, unet).side > 0
        model_layout("mine", index)


CONTROLNET = ("in_channels", "conditioning_channels", "addition_embed_type", "class_embed_type")


@quick
@given(values=st.dictionaries(st.sampled_from(CONTROLNET), JSON))
def test_a_controlnet_whose_configuration_holds_anything_is_refused_or_understood(
    values: dict[str, Any],
) -> None:
    config = {"_class_name": "ControlNetModel", **values}
    with suppress(UnsupportedModel):
        families.controlnet_family("mine", config)


@quick
@given(data=st.data(), known=st.sampled_from([SD15, SD21, SDXL]))
def test_a_file_whose_tensors_have_any_shapes_is_refused_or_understood(
    tmp_path: Path, data: st.DataObject, known: dict[str, tuple[int, ...]]
) -> None:
    shapes = dict(known)
    for key in data.draw(st.sets(st.sampled_from(sorted(shapes)))):
        shapes[key] = data.draw(st.lists(st.integers(0, 9), max_size=4).map(tuple))
    path = save_zeros(tmp_path / "model.safetensors", shapes)
    with suppress(UnsupportedModel):
        assert families.from_checkpoint("mine", path).side > 0


@quick
@given(header=JSON | st.dictionaries(st.text(max_size=5), st.fixed_dictionaries({"dtype": JSON})))
def test_a_file_with_any_header_is_refused(tmp_path: Path, header: Any) -> None:
    content = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content)
    with pytest.raises(UnsupportedModel):
        families.from_checkpoint("mine", path)


def test_a_header_that_would_take_long_to_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = families.MAX_HEADER_BYTES + 8
    path.write_bytes(struct.pack("<Q", size) + b" " * size)
    with pytest.raises(UnsupportedModel, match="its header has more than"):
        families.from_checkpoint("mine", path)


@pytest.mark.parametrize("depth", [100, 900, 5000, 200_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
@pytest.mark.parametrize("file", [INDEX, UNET, "vae/config.json"])
def test_configurations_that_are_nested_deeply_do_no_harm(
    file: str, brackets: str, depth: int, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "mine")
    layout = model_layout("mine", read(copy, INDEX))
    opening, closing = brackets[:-1] * depth, brackets[-1] * depth
    (copy / file).write_text(f'{{"a": {opening}0{closing}}}')
    if depth < 1000:
        check_configs(layout, copy)
        return
    with pytest.raises(UnsupportedModel, match=r"nested too deeply|has more than"):
        check_configs(layout, copy)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": "' + "x" * hub.MAX_CONFIG_BYTES + '"}', "has more than 1000000 bytes"),
        ("[1]", "not a JSON object"),
        ("{", "cannot be read"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"a": NaN}', "a in its unet/config.json is out of bounds"),
        ('{"a": [[{"b": 1e999}]]}', "a in its unet/config.json is out of bounds"),
        (f'{{"a": {MAX_NUMBER + 1}}}', "out of bounds"),
        (f'{{"layers_per_block": [2, {MAX_COUNT + 1}]}}', "layers_per_block in its"),
        (json.dumps({"betas": [0] * (MAX_ITEMS + 1)}), "betas in its"),
    ],
    ids=range(9),
)
def test_configurations_that_no_model_has_are_refused(
    text: str, reason: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "mine")
    layout = model_layout("mine", read(copy, INDEX))
    check_configs(layout, copy)
    (copy / UNET).write_text(text)
    with pytest.raises(UnsupportedModel) as caught:
        check_configs(layout, copy)
    assert reason in caught.value.message
    assert str(tmp_path) not in caught.value.message
