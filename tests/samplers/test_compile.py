"""Compiled samplers against the schedulers they replace, stepped as the stock pipelines do."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdbento.errors import InvalidParameter, UnsupportedSampler
from sdbento.samplers import compile as compiling
from sdbento.samplers.compile import compile_table
from sdbento.samplers.names import list_samplers
from sdbento.samplers.scheduler import SPACINGS, SamplerSpec, build_scheduler
from sdbento.samplers.step_table import StepTable, Window
from tests.support.schedulers import EDM, SD, config_of

pytestmark = [  # of schedulers stepped here, outside compile_table, which is quiet
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

SAMPLERS = {info.name: info for info in list_samplers()}
SIGMAS = [(info.name, sigmas) for info in SAMPLERS.values() for sigmas in info.sigmas]
UNSPACED = ("DPM-Solver Singlestep", "DPM++ 2S", "DPM++ SDE", "EDM Euler", "EDM DPM++ 2M")
SHAPE = (1, 4, 4, 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.4 * latents + timestep.to(latents.dtype) / 2000)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def run_stock(
    spec: SamplerSpec,
    config: dict[str, Any],
    num_steps: int,
    start: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Generator]:
    """The denoising loop of StableDiffusionPipeline, or of its img2img where `start` is given."""
    scheduler = build_scheduler(spec, config)
    scheduler.set_timesteps(num_steps, device="cpu")
    generator = seeded()
    latents = torch.randn(SHAPE, generator=generator, dtype=dtype)
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
    if "eta" in accepted:
        options["eta"] = spec.eta
    timesteps = scheduler.timesteps
    if start is None:
        latents = latents * scheduler.init_noise_sigma
        if len(timesteps) > 1 and timesteps[0] == timesteps[1]:
            scheduler.set_begin_index(0)  # the stock pipeline does not, and fails; see below
    else:
        timesteps = timesteps[start * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start * scheduler.order)
        latents = scheduler.add_noise(torch.ones(SHAPE, dtype=dtype), latents, timesteps[:1])
    for timestep in timesteps:
        output = model(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents, **options, return_dict=False)[0]
    return latents, generator


def run_table(
    table: StepTable,
    start: int | None = None,
    dtype: torch.dtype = torch.float64,
    noise_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Generator]:
    generator = seeded()
    noise = torch.randn(SHAPE, generator=generator, dtype=dtype)
    slots = torch.zeros(table.num_slots, noise.numel(), dtype=dtype)
    slots[0] = noise.flatten() * table.init_noise_sigma
    if start is not None:
        slots[0] = table.start_signal + table.start_noise * noise.flatten()
    for i, timestep in enumerate(table.timesteps):
        output = model(slots[:1] * table.input_scale[i], timestep)
        slots = table.matrices[i].to(dtype) @ torch.cat([slots[:1], output, slots[1:]])
        for draw in range(table.draws[i]):
            noise = torch.randn(SHAPE, generator=generator, dtype=noise_dtype)
            if draw == table.draws[i] - 1:
                slots += table.noise[i].to(dtype)[:, None] * noise.flatten()
    return slots[0].view(SHAPE), generator


def check(
    spec: SamplerSpec,
    config: dict[str, Any],
    num_steps: int,
    *,
    start: int | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-5,
) -> None:
    """The table ends where the scheduler ends, and leaves the generator as the scheduler does."""
    table = compile_table(spec, config, num_steps, Window(start or 0))
    expected, stock_generator = run_stock(spec, config, num_steps, start, dtype)
    noise_dtype = torch.float32 if table.draws_in_fp32 else dtype
    latents, generator = run_table(table, start, dtype, noise_dtype)
    error = float((latents - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, (spec, num_steps, config, error)
    assert torch.equal(generator.get_state(), stock_generator.get_state()), spec


@pytest.mark.parametrize(("name", "sigmas"), SIGMAS)
def test_a_table_replays_its_scheduler(name: str, sigmas: str) -> None:
    spec = SamplerSpec(name, sigmas)
    for i, num_steps in enumerate((1, 2, 3, 7, 20, 6)):
        prediction = ("epsilon", "v_prediction")[i % 2]
        check(spec, config_of(name, prediction_type=prediction), num_steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_table_in_float32_replays_its_scheduler_in_float32(name: str) -> None:
    check(SamplerSpec(name), config_of(name), 20, dtype=torch.float32, tolerance=5e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in UNSPACED])
def test_a_table_replays_its_scheduler_for_every_timestep_spacing(name: str, spacing: str) -> None:
    check(SamplerSpec(name, timestep_spacing=spacing), config_of(name), 7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_table_can_start_in_the_middle_as_for_img2img(name: str) -> None:
    check(SamplerSpec(name), config_of(name), 9, start=0)
    check(SamplerSpec(name), config_of(name), 9, start=4)
    check(SamplerSpec(name), config_of(name), 9, start=8)


def test_two_equal_first_timesteps_lead_diffusers_astray_but_not_a_table() -> None:
    scheduler = build_scheduler(SamplerSpec("DPM++ 2M", "beta"), SD)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    latents = torch.zeros(SHAPE)
    with pytest.raises(IndexError):
        [scheduler.step(latents, timestep, latents) for timestep in scheduler.timesteps]
    check(SamplerSpec("DPM++ 2M", "beta"), SD, 50)


@pytest.mark.parametrize("name", ["DDIM", "DDIM Parallel", "TCD"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_adds_noise(name: str, eta: float) -> None:
    check(SamplerSpec(name, eta=eta), config_of(name), 7)
    assert sum(compile_table(SamplerSpec(name, eta=eta), config_of(name), 7).draws) >= 6


def test_eta_is_ignored_where_the_scheduler_does_not_take_it() -> None:
    check(SamplerSpec("Euler", eta=1.0), SD, 7)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPM-Solver", {"solver_order": order, "algorithm_type": algorithm})
        for order in (1, 2, 3)
        for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        if (order, algorithm) != (3, "sde-dpmsolver")  # diffusers has no such update
    ]
    + [
        ("DPM-Solver Singlestep", {"solver_order": order, "algorithm_type": "dpmsolver++"})
        for order in (1, 2, 3)
    ]
    + [
        ("UniPC", {"solver_order": order, "predict_x0": predict_x0})
        for order in (1, 2, 3)
        for predict_x0 in (True, False)
    ]
    + [("DEIS", {"solver_order": order}) for order in (1, 2, 3)]
    + [("SA-Solver", {"predictor_order": 3, "corrector_order": 3})]
    + [("PNDM", {"skip_prk_steps": False})]
    + [("DPM++ 2M", {"use_lu_lambdas": True}), ("DPM++ 2M", {"final_sigmas_type": "sigma_min"})]
    + [("Euler", {"interpolation_type": "log_linear"}), ("Euler", {"timestep_type": "continuous"})]
    + [("DDPM", {"variance_type": "fixed_large"})],
)
def test_the_models_own_options_are_respected(name: str, options: dict[str, Any]) -> None:
    if options.get("algorithm_type", "").endswith("dpmsolver") or "predict_x0" in options:
        options = {**options, "final_sigmas_type": "sigma_min"}
    for num_steps in (5, 18):
        check(SamplerSpec(name), config_of(name, **options), num_steps)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "Euler", "Euler a", "DPM++ 2M", "UniPC", "LCM"])
def test_zero_terminal_snr_is_respected(name: str) -> None:
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    check(SamplerSpec(name), config_of(name, prediction_type="v_prediction", **options), 8)


@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_configuration_is_replayed_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in SAMPLERS if not n.startswith(("EDM", "DPM2"))]))
    drawn: dict[str, list[Any]] = {
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
        "beta_end": [0.012, 0.02],
        "num_train_timesteps": [100, 1000],
        "timestep_spacing": ["leading", "trailing", "linspace"],
        "steps_offset": [0, 1],
        "set_alpha_to_one": [True, False],
        "rescale_betas_zero_snr": [True, False],
        "solver_order": [1, 2, 3],
        "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho"],
        "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"],
        "final_sigmas_type": ["zero", "sigma_min"],
        "lower_order_final": [True, False],
        "euler_at_final": [True, False],
        "use_karras_sigmas": [True, False],
        "use_lu_lambdas": [True, False],
        "predict_x0": [True, False],
        "variance_type": ["fixed_small", "fixed_large", None],
        "thresholding": [False, False, True],
        "clip_sample": [False, False, True],
    }
    chosen = data.draw(st.lists(st.sampled_from(sorted(drawn)), unique=True, max_size=6))
    config = SD | {option: data.draw(st.sampled_from(drawn[option])) for option in chosen}
    num_steps = data.draw(st.integers(1, 17))
    start = data.draw(st.none() | st.integers(0, num_steps - 1))
    spec = SamplerSpec(name, eta=data.draw(st.sampled_from([0.0, 0.5])))
    try:
        compile_table(spec, config, num_steps, Window(start or 0))
    except (UnsupportedSampler, InvalidParameter):
        return
    check(spec, config, num_steps, start=start)


def test_the_stochastic_samplers_are_those_that_draw_noise() -> None:
    for name, info in SAMPLERS.items():
        drawn = sum(compile_table(SamplerSpec(name), config_of(name), 5).draws)
        assert (drawn > 0) == info.stochastic, name


def test_a_step_that_needs_no_noise_still_moves_the_generator() -> None:
    table = compile_table(SamplerSpec("Euler a"), SD, 5)
    assert table.draws == (1,) * 5
    assert float(table.noise[-1].abs().max()) == 0


def test_a_table_holds_only_the_memory_that_is_read() -> None:
    sizes = {"Euler": 0, "DPM++ 2M": 1, "DPM++ 3M": 2, "Heun": 2, "PLMS": 3, "UniPC": 3}
    for name, num_memory in sizes.items():
        table = compile_table(SamplerSpec(name), SD, 20)
        assert table.num_slots == 1 + num_memory, name
        assert table.matrices.shape == (table.num_steps, 1 + num_memory, 2 + num_memory)
        assert table.noise.shape == (table.num_steps, 1 + num_memory)


def test_a_table_counts_unet_evaluations() -> None:
    evaluations = {"Euler": 10, "PLMS": 11, "Heun": 19, "DPM2": 19}
    for name, num_steps in evaluations.items():
        assert compile_table(SamplerSpec(name), SD, 10).num_steps == num_steps


def test_a_class_that_clips_by_default_does_not_clip_latents() -> None:
    config = {key: value for key, value in SD.items() if key != "clip_sample"}
    assert build_scheduler(SamplerSpec("DDIM"), config).config["clip_sample"] is False
    loaded = diffusers.DDIMScheduler.from_config(config).config  # as a pipeline holds it
    assert loaded["clip_sample"] is True
    check(SamplerSpec("DDIM"), dict(loaded), 5)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("DDIM", {"clip_sample": True}, "clip_sample"),
        ("DDIM", {"thresholding": True}, "thresholding"),
        ("DPM++ 2M", {"thresholding": True}, "thresholding"),
        ("DDPM", {"variance_type": "learned_range"}, "variance_type"),
    ],
)
def test_an_option_that_is_not_affine_is_refused_by_name(
    name: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedSampler, match=named):
        compile_table(SamplerSpec(name), config_of(name, **options), 5)


def test_an_option_that_the_sampler_does_not_have_is_ignored() -> None:
    check(SamplerSpec("Euler"), config_of("Euler", clip_sample=True), 5)


def test_sigmas_that_a_sampler_lacks_are_refused_with_those_it_has() -> None:
    with pytest.raises(InvalidParameter, match="it has normal") as caught:
        compile_table(SamplerSpec("DDIM", sigmas="karras"), SD, 5)
    assert caught.value.param == "sigmas"
    with pytest.raises(UnsupportedSampler, match="it has normal") as caught:
        compile_table(SamplerSpec("DDIM Karras"), SD, 5)
    assert caught.value.param == "scheduler"


@pytest.mark.parametrize(
    ("spec", "num_steps", "param"),
    [
        (SamplerSpec("Euler", sigmas="cosine"), 5, "sigmas"),
        (SamplerSpec("Euler Karras", sigmas="beta"), 5, "sigmas"),
        (SamplerSpec("Euler", timestep_spacing="even"), 5, "timestep_spacing"),
        (SamplerSpec("EDM Euler", timestep_spacing="leading"), 5, "timestep_spacing"),
        (SamplerSpec("DDIM", eta=-1.0), 5, "eta"),
        (SamplerSpec("DDIM", eta=float("nan")), 5, "eta"),
        (SamplerSpec("Euler"), 0, "num_inference_steps"),
        (SamplerSpec("LCM"), 51, "scheduler"),
        (SamplerSpec("DDIM"), 1001, "scheduler"),
    ],
)
def test_options_that_a_sampler_does_not_support_are_refused_by_field(
    spec: SamplerSpec, num_steps: int, param: str
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        compile_table(spec, config_of(spec.name), num_steps)
    assert caught.value.param == param


def test_a_schedulers_own_refusal_is_passed_on_and_its_crash_is_not() -> None:
    with pytest.raises(
        UnsupportedSampler, match=r"LCM with num_inference_steps=51 .*original_steps"
    ):
        compile_table(SamplerSpec("LCM"), SD, 51)
    with pytest.raises(UnsupportedSampler, match=r"scheduler configuration$"):
        compile_table(SamplerSpec("PNDM"), config_of("PNDM", skip_prk_steps=False), 2)


@pytest.mark.parametrize("start", [-1, 5, 100])
def test_a_start_beyond_the_steps_is_refused(start: int) -> None:
    with pytest.raises(InvalidParameter, match="no step to do"):
        compile_table(SamplerSpec("Heun"), SD, 5, Window(start))


def test_edm_samplers_go_with_edm_models_only() -> None:
    with pytest.raises(UnsupportedSampler, match="non-EDM"):
        compile_table(SamplerSpec("EDM Euler"), SD, 5)
    with pytest.raises(UnsupportedSampler, match="needs EDM"):
        compile_table(SamplerSpec("Euler"), EDM, 5)


def test_a_table_is_compiled_once_for_all_spellings_of_its_name() -> None:
    table = compile_table(SamplerSpec("Euler"), SD, 6)
    assert (
        compile_table(SamplerSpec("EulerDiscreteScheduler"), dict(reversed(SD.items())), 6) is table
    )
    assert compile_table(SamplerSpec("Euler"), SD, 7) is not table
    assert compile_table(SamplerSpec("Euler"), SD, 6, Window(1)) is not table
    assert compile_table(SamplerSpec("Euler"), config_of("Euler", steps_offset=0), 6) is not table


def test_the_cache_is_bounded() -> None:
    assert compiling._compile.cache_info().maxsize == compiling.CACHE_SIZE


def test_threads_that_ask_for_one_table_at_once_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling._compile.cache_clear()
    built = []

    def build(*args: Any) -> Any:
        built.append(args)
        return build_scheduler(*args)

    monkeypatch.setattr(compiling, "build_scheduler", build)
    barrier = threading.Barrier(8)

    def ask(i: int) -> StepTable:
        barrier.wait()
        torch.randn(1)  # a compile in another thread must not affect this thread's noise
        return compile_table(SamplerSpec("Euler a"), SD, 12 + i % 2)

    with ThreadPoolExecutor(8) as threads:
        tables = list(threads.map(ask, range(8)))
    assert len({id(table) for table in tables}) == 2
    assert len(built) == 2


def test_compiling_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    options = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "unheard_of": 1}
    compile_table(SamplerSpec("DPM-Solver Singlestep"), config_of("DPM", **options), 5)
    assert capfd.readouterr().err == ""


def test_compiling_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    compile_table(SamplerSpec("SA-Solver"), SD, 11)
    assert torch.equal(torch.get_rng_state(), before)
