"""What there is, in the lists that AUTOMATIC1111's clients ask for.

Files are called by their names, without folders. Lists of what this server does not have are empty.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from sdbento.access.caller import current_caller
from sdbento.catalog.specs import ModelSpec
from sdbento.doors.a1111.tools.extras import FILTERS, NONE
from sdbento.doors.a1111.tools.options import TheChoices, title_of
from sdbento.doors.http.routing import TheApp, door
from sdbento.images.redaction import public_name
from sdbento.lora.lookup import known
from sdbento.settings import Settings

router = door("AUTOMATIC1111")


class Sampler(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str]


class Scheduler(BaseModel):
    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1.0
    need_inner_model: bool = False


class Upscaler(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float = 4.0


class LatentUpscaleMode(BaseModel):
    name: str


class Checkpoint(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


MODEL_OF_LORA = "ss_sd_model_name"
"""Under this name a trainer writes into a LoRA's file which model it was trained on."""


class Lora(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, str] = {}


class Embedding(BaseModel):
    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int = Field(description="Width of its vectors")
    vectors: int


class Embeddings(BaseModel):
    loaded: dict[str, Embedding] = Field(description="Those that the caller's model can read")
    skipped: dict[str, Embedding]


@router.get("/sdapi/v1/samplers")
async def samplers(app: TheApp) -> list[Sampler]:
    """The samplers. A schedule goes into `scheduler`, or behind the name: "DPM++ 2M Karras"."""
    listed = await run_in_threadpool(app.list_samplers)
    return [Sampler(name=one.name, aliases=list(one.aliases), options={}) for one in listed]


@router.get("/sdapi/v1/schedulers")
async def schedulers() -> list[Scheduler]:
    """The noise schedules. Others that the web UI has mean the nearest of these."""
    from sdbento.doors.a1111.sampling import SCHEDULES  # imports torch

    return [Scheduler(name=one.name, label=one.label) for one in SCHEDULES if one.exact]


@router.get("/sdapi/v1/upscalers")
async def upscalers() -> list[Upscaler]:
    """The upscalers: filters, and no network."""
    return [Upscaler(name=name) for name in (NONE, *FILTERS)]


@router.get("/sdapi/v1/latent-upscale-modes")
async def latent_upscale_modes() -> list[LatentUpscaleMode]:
    """The upscaler of txt2img's second pass that does not leave latent space."""
    return [LatentUpscaleMode(name="Latent")]


@router.get("/sdapi/v1/sd-models")
async def sd_models(app: TheApp, choices: TheChoices) -> list[Checkpoint]:
    """The models; the one that the caller uses comes first."""
    current = title_of(app, choices.of(current_caller()).checkpoint)
    listed = await run_in_threadpool(app.list_models)
    titles = [public_name(model.spec.name) for model in listed]
    titles.sort(key=lambda title: title != current)
    return [Checkpoint(title=title, model_name=title, filename=title) for title in titles]


@router.get("/sdapi/v1/loras")
async def loras(app: TheApp) -> list[Lora]:
    """The LoRAs that `<lora:name:weight>` in a prompt may name."""
    models = await run_in_threadpool(known, app.settings)
    return [
        Lora(name=name, alias=name, path=name, metadata={MODEL_OF_LORA: model} if model else {})
        for name, model in models.items()
    ]


@router.get("/sdapi/v1/embeddings")
async def embeddings(app: TheApp, choices: TheChoices) -> Embeddings:
    """The textual inversions that a prompt may name; `skipped` are those for other models."""
    model = await app.find_model(choices.of(current_caller()).checkpoint)
    return await run_in_threadpool(_embeddings, model, app.settings)


@router.get("/sdapi/v1/sd-vae")
@router.get("/sdapi/v1/sd-modules")
@router.get("/sdapi/v1/hypernetworks")
@router.get("/sdapi/v1/face-restorers")
@router.get("/sdapi/v1/realesrgan-models")
@router.get("/sdapi/v1/prompt-styles")
@router.get("/sdapi/v1/extensions")
async def nothing() -> list[dict[str, str]]:
    """This server has none of these: the list is empty."""
    return []


@router.post("/sdapi/v1/refresh-checkpoints")
@router.post("/sdapi/v1/refresh-vae")
@router.post("/sdapi/v1/refresh-loras")
@router.post("/sdapi/v1/refresh-embeddings")
async def refresh() -> None:
    """There is nothing to do: each list is read from the disk when it is asked for."""


def _embeddings(model: ModelSpec, settings: Settings) -> Embeddings:
    from sdbento.prompts.check import encoder_indices
    from sdbento.prompts.inversions import read_all

    encoders = encoder_indices(model)
    answer = Embeddings(loaded={}, skipped={})
    for inversion in read_all(settings.embeddings_dir):
        listed = answer.loaded if inversion.is_for(encoders) else answer.skipped
        num_vectors, width = inversion.vectors[min(inversion.vectors)].shape
        listed[inversion.name] = Embedding(shape=width, vectors=num_vectors)
    return answer
