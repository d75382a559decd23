"""Training of `emoji`: from SVG to a model that a server serves, with icons drawn here."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.server import QUICK, generated, serving

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sdbento.catalog.specs import PACKAGE  # noqa: E402
from training.emoji import render, report, train_controlnet, train_text, train_unet  # noqa: E402
from training.emoji.budget import Budget, KernelMuon, Training, as_matrix  # noqa: E402
from training.emoji.captions import (  # noqa: E402
    COLOURS,
    STYLES,
    Catalogue,
    Scene,
    is_held_out_combination,
)
from training.emoji.carry import PART_BYTES, join, quantise, split  # noqa: E402
from training.emoji.compose import compose, layout_of  # noqa: E402
from training.emoji.icons import Icon, read_index, read_pictures, write  # noqa: E402
from training.emoji.networks import FULL, TOY, build_unet  # noqa: E402
from training.emoji.score import WORDINGS, backgrounds_of, questions  # noqa: E402
from training.emoji.start import start  # noqa: E402
from training.emoji.train_text import PATCH, told  # noqa: E402
from training.emoji.wording import WORDS, worded  # noqa: E402

SHAPES = {
    "red dot": '<circle cx="16" cy="16" r="16" fill="#f00"/>',
    "blue box": '<rect width="32" height="32" fill="#00f"/>',
    "green kite": '<path d="M16 0 32 16 16 32 0 16Z" fill="#0a0"/>',
}


@pytest.fixture(scope="module")
def icons_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three icons in each style, rendered as those of the packages are."""
    path = tmp_path_factory.mktemp("icons") / "icons.zip"
    write(
        path,
        [
            (Icon(style, name, ("thing",)), render.render(render.svg_of({"body": body}, SQUARE)))
            for style in STYLES
            for name, body in SHAPES.items()
        ],
    )
    return path


ADDITIONS = (
    "training.emoji.train_lora pixel-art --batch 4",
    "training.emoji.train_lora outline --batch 4",
    "training.emoji.train_controlnet --batch 4",
    "training.emoji.train_preview",
)
SQUARE = {"width": 32, "height": 32}


def many_icons() -> list[Icon]:
    return [Icon(style, f"thing {i}", (f"item {i}",)) for i in range(200) for style in STYLES]


def test_an_icon_fills_its_box_and_the_background_the_rest(icons_file: Path) -> None:
    pictures = read_pictures(icons_file)
    scene = Scene(
        (1, 0), ((0.25, 0.5, 0.5), (0.75, 0.5, 0.5)), "yellow", "a blue box and a red dot"
    )
    (image,) = compose(pictures, layout_of([scene]))
    colours = (image.permute(1, 2, 0) + 1) * 127.5
    expected = {(64, 32): (0, 0, 255), (64, 96): (255, 0, 0), (4, 4): COLOURS["yellow"]}
    for (row, column), colour in expected.items():
        assert colours[row, column].tolist() == pytest.approx(colour, abs=6)
    assert backgrounds_of(image[None]) == ["yellow"]


def test_a_scene_stands_in_the_middle_of_other_sizes(icons_file: Path) -> None:
    pictures = read_pictures(icons_file)
    layout = layout_of([Scene((2,), ((0.5, 0.5, 0.75),), "pink", "a green kite")])
    square = compose(pictures, layout)
    upright = compose(pictures, layout, (192, 128))
    assert torch.allclose(upright[:, :, 32:160], square, atol=1e-3)
    assert backgrounds_of(upright[:, :, :32]) == backgrounds_of(upright[:, :, 160:]) == ["pink"]
    double = compose(pictures, layout, (256, 256))
    halved = torch.nn.functional.avg_pool2d(double, 2)
    assert (halved - square).abs().mean() < 0.02


def test_training_shows_nothing_that_is_held_out() -> None:
    icons = many_icons()
    catalogue = Catalogue(icons)
    rng = np.random.default_rng(0)
    scenes = [catalogue.sample(rng) for _ in range(3000)]
    assert catalogue.held_out
    for scene in scenes:
        assert catalogue.held_out.isdisjoint(scene.icons)
        for index in scene.icons:
            assert not is_held_out_combination(icons[index], scene.background)


def test_a_held_out_icon_is_known_in_other_styles() -> None:
    icons = many_icons()
    names = [icons[index].name for index in Catalogue(icons).held_out]
    assert len(names) == len(set(names))
    assert 0.02 < len(names) / 200 < 0.1


def test_scores_ask_for_all_three_kinds() -> None:
    icons = many_icons()
    groups = Counter(question.group for question in questions(icons))
    assert groups == {"trained": 250, "held-out combination": 150, "held-out icon": 100}


def test_captions_say_what_the_scene_shows() -> None:
    icons = many_icons()
    catalogue = Catalogue(icons)
    rng = np.random.default_rng(1)
    said = 0
    for scene in (catalogue.sample(rng) for _ in range(500)):
        first = icons[scene.icons[0]]
        if any(word in scene.caption for word in (first.name, *first.synonyms)):
            said += 1
            assert scene.background == "white" or scene.background in scene.caption
            assert first.style == "3d" or any(w in scene.caption for w in STYLES[first.style])
    assert said > 400


def test_added_words_make_no_other_name_of_a_name() -> None:
    names = ("dog", "hot dog", "rod", "fishing rod")
    catalogue = Catalogue([Icon(style, name) for style in STYLES for name in names])
    rng = np.random.default_rng(2)
    described = 0
    for scene in (catalogue.sample(rng) for _ in range(3000)):
        shown = [catalogue.icons[index].name for index in scene.icons]
        assert ("hot dog" in scene.caption) <= ("hot dog" in shown)
        described += any(f" {name}" in scene.caption for name in shown)
    assert described > 1000


def test_other_words_leave_what_the_prompt_names() -> None:
    rng = np.random.default_rng(3)
    captions = {worded(rng, "a red apple on a blue background") for _ in range(300)}
    assert len(captions) > 200
    assert all("a red apple on a blue background" in caption for caption in captions)
    known = " ".join(itertools.chain(*WORDS.values())).split()
    new = {word for wording in WORDINGS for word in wording.replace(",", "").split()}
    assert len(new.difference(known, ["a", "of", "for", "by", "the", "{}"])) >= 15


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("red-apple", True),
        ("police-car-light", True),
        ("artist-medium-dark", False),
        ("artist-light", False),
        ("baby-medium-skin-tone", False),
        ("flag-albania", False),
        ("triangular-flag", True),
    ],
)
def test_flags_and_skin_tones_are_left_out(name: str, wanted: bool) -> None:
    names = ("police-car", "artist", "artist-medium-dark", "artist-light", name)
    assert render.is_wanted(name, {each: {} for each in names}) is wanted


def test_the_last_tokens_tell_the_latents_patch_by_patch() -> None:
    latents = torch.randn(2, 4, 16, 16)
    context = torch.randn(2, 77, 80)
    for token, (row, column) in enumerate(itertools.product(range(4), range(4))):
        rows, columns = (slice(PATCH * place, PATCH * (place + 1)) for place in (row, column))
        context[:, 61 + token, :64] = latents[:, :, rows, columns].flatten(1)
    assert torch.equal(told(context, 16), latents)


@pytest.mark.parametrize("matrix_rate", [None, 1e-2])
def test_training_goes_on_where_it_was_cut_off(tmp_path: Path, matrix_rate: float | None) -> None:
    def training() -> Training:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 1)
        return Training(network, 1e-2, tmp_path / "state.pt", 0.9, matrix_rate)

    def loss(own: Training) -> torch.Tensor:
        weight = own.parameters[0]
        return (weight - 1).square().sum()

    first = training()
    first.progress = 0.5
    first._advance(lambda: loss(first), 8)
    first.checkpoint()
    second = training()
    assert (second.step, second.samples, second.progress) == (1, 8, 0.5)
    assert torch.equal(second.parameters[0], first.parameters[0])
    assert torch.equal(second.averages[0], first.averages[0])
    momenta = [own.state_dict()["state"] for own in second.optimizers]
    assert str(momenta) == str([own.state_dict()["state"] for own in first.optimizers])
    second.run(lambda: loss(second), 8, Budget(0.0))
    assert second.progress == 1
    assert training().progress == 0  # the next run begins a schedule of its own


def test_a_model_in_parts_is_put_together_again(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    content = random.Random(1).randbytes(PART_BYTES + 1000)
    (tmp_path / "pipeline" / "weights").write_bytes(content)
    split(tmp_path / "pipeline", tmp_path / "parts")
    assert len(list((tmp_path / "parts").iterdir())) == 2
    join(tmp_path / "parts", tmp_path / "out")
    assert (tmp_path / "out" / "pipeline" / "weights").read_bytes() == content


def test_weights_in_8_bits_are_nearly_the_same() -> None:
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(-3, 3, 6)[:, None, None, None]
    whole, factors = quantise(weight)
    assert whole.dtype is torch.int8
    assert ((whole * factors - weight).abs() <= factors * 0.51).all()


def test_the_document_has_the_figures_of_the_last_run() -> None:
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.written(text) == text, "run `python -m training.emoji.report`"


def test_a_kernel_is_trained_as_the_matrix_that_it_is() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(8, 6, 3, 3)
    kernel = torch.nn.Parameter(numbers.contiguous(memory_format=torch.channels_last))
    before = as_matrix(kernel.detach()).clone()
    matrix = torch.nn.Parameter(before.clone())
    assert matrix.shape == (8, 9 * 6)
    gradient = torch.randn(kernel.shape)
    kernel.grad, matrix.grad = gradient, as_matrix(gradient)
    for parameter in (kernel, matrix):
        KernelMuon([parameter], rate=0.01).step()
    assert torch.equal(as_matrix(kernel.detach()), matrix)
    assert not torch.equal(matrix, before)
    with pytest.raises(ValueError, match="channels-last"):
        KernelMuon([torch.nn.Parameter(numbers)], rate=0.01)


def test_training_can_go_on_from_the_package(tmp_path: Path) -> None:
    start(tmp_path)
    packaged = load_file(PACKAGE / "bundled/emoji/unet/diffusion_pytorch_model.safetensors")
    weights = train_unet.build(tmp_path, FULL, "cpu").state_dict()
    assert weights.keys() == packaged.keys()
    assert all(torch.equal(weights[name], value.float()) for name, value in packaged.items())
    said = train_text.load(tmp_path, FULL, "cpu")(torch.zeros(1, 77, dtype=torch.long))
    assert said.last_hidden_state.isfinite().all()


def test_edges_matter_from_the_first_step_and_disturb_nothing() -> None:
    unet = build_unet(TOY)
    controlnet = train_controlnet.build(unet)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, TOY.text_width)
    edges = torch.zeros(2, 3, 128, 128)
    edges[1, :, 40:90, 60] = 1

    def outputs() -> list[torch.Tensor]:
        skips, middle = controlnet(
            latents, torch.tensor([500]), text, controlnet_cond=edges, return_dict=False
        )
        return [*skips, middle]

    assert not any(output.any() for output in outputs())
    seen = controlnet.controlnet_cond_embedding(edges)
    assert 0.1 < (seen[0] - seen[1]).abs().max() < 10


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_trial_of_all_stages_makes_a_model_that_is_served(
    icons_file: Path, tmp_path: Path
) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    command = [sys.executable, "-m", "training.emoji.run", "--toy", "--seconds", "6"]
    command += ["--out", str(out), "--results", str(results), "--carried", str(icons_file.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + (results / "log.txt").read_text(encoding="utf-8")
    assert len(read_index(icons_file)) == len(STYLES) * len(SHAPES)
    rows = json.loads((results / "score.json").read_text(encoding="utf-8"))
    own = {"emoji", "emoji, other words added"}
    assert {row["pictures"] for row in rows} == {"real", "through the autoencoder"} | own
    for stage in ADDITIONS:
        command = [sys.executable, "-m", *stage.split(), "--out", str(out), "--minutes", "0.02"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    command = [sys.executable, "-m", "training.emoji.score_effects", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert (out / "effects.png").exists()
    join(results, tmp_path)
    with serving(tmp_path, SD_MODEL=str(tmp_path / "pipeline")) as server:
        server.wait_until_ready()
        (image,) = generated(server, **QUICK | {"prompt": "a red dot, flat style"})
    assert image.shape == (128, 128, 3)
