"""Model names, and what each stands for: family, where it comes from, defaults.

A name is looked up in the catalogue (configs/models.yaml), in the models folder, then among local
paths and Hub ids; where SDBENTO_ALLOW_ANY_MODEL is off, only the default model's may be one of the
latter. Reads small files only, never weights. Knows nothing of loading or of devices.
"""

from __future__ import annotations

import difflib
import logging
import re
import threading
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from sdbento import families, hub
from sdbento.errors import SDBentoError, UnknownModel, classify
from sdbento.families import Family, PredictionType, Traits
from sdbento.settings import Settings

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
CATALOG_FILE = PACKAGE.parent / "configs" / "models.yaml"  # a wheel, too, has it beside the package
BUNDLED = "bundled:"
MAX_CACHED = 256  # models that are neither catalogued nor resident
BYTES_HALF = 2
ACTIVATIONS = 1.4  # memory of a running model over that of its weights
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

LatentRGB = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class ModelSpec:
    """One model: where it comes from and what it does where a request does not say.

    `sources`: Hub ids in order of preference, or one absolute path of a diffusers folder or a
    single .safetensors file.
    """

    name: str
    family: Family
    sources: tuple[str, ...]
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str | None  # None: the model's own scheduler
    memory_gb: float  # weights and activations in fp16
    latent_rgb: LatentRGB = ()  # [5, 3]: one row a latent channel, then the bias; () the family's
    prediction_type: PredictionType | None = None  # None: as the scheduler's configuration says
    zero_snr: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.latent_rgb:
            rows = _document()["families"][self.family]["latent_rgb"]
            object.__setattr__(self, "latent_rgb", _matrix(rows))

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


class Catalog:
    """All models that can be named. Thread-safe: one lock guards what the Hub has told."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known = {
            name.casefold(): spec for spec in catalogued() for name in (*spec.names, *spec.sources)
        }
        self._from_hub: dict[str, ModelSpec] = {}
        self._lock = threading.Lock()

    def known(self, name: str) -> ModelSpec | None:
        """A model of the catalogue, or one that the Hub has told of before; never blocks."""
        with self._lock:
            return self._known.get(name.casefold()) or self._from_hub.get(name)

    def resolve(self, name: str) -> ModelSpec:
        """The model of that name. Blocking: may read local files or small ones from the Hub.

        Raises UnknownModel, naming the nearest names, UnsupportedModel, or what keeps the Hub from
        being asked.
        """
        try:
            spec = self._look_up(name)
        except SDBentoError:
            raise
        except Exception as exc:
            error = classify(exc)
            raise type(error)(f"model {name}: {error.message}", param="model") from exc
        if spec is None:
            raise self._unknown(name)
        return spec

    def list(self) -> list[ModelSpec]:
        """The catalogue, the models folder and the default, as far as this machine knows it."""
        specs = {spec.name: spec for spec in catalogued()}
        for name in [*self._models_dir(), self._settings.sd_model]:
            try:
                spec = self._look_up(name, offline=True)
            except Exception as exc:
                log.info("model %s is not listed: %s", name, classify(exc).message)
                continue
            if spec is not None:
                specs.setdefault(spec.name, spec)
        return [*specs.values()]

    def _look_up(self, name: str, offline: bool | None = None) -> ModelSpec | None:
        families.refuse_pickles(name)
        if (known := self.known(name)) is not None:
            return known
        if (path := self._models_dir().get(name)) is not None:
            return _local(name, path)
        if not (self._settings.allow_any_model or name == self._settings.sd_model):
            return None
        if _is_model(path := Path(name)):
            return _local(name, path.absolute())
        if _HUB_ID.fullmatch(name):
            return self._ask_hub(name, self._settings.offline if offline is None else offline)
        return None

    def _ask_hub(self, name: str, offline: bool) -> ModelSpec:
        spec = _spec(name, name, _configured(name, name, offline))
        with self._lock:
            if len(self._from_hub) >= MAX_CACHED:
                self._from_hub.pop(next(iter(self._from_hub)))
            self._from_hub[name] = spec
        return spec

    def _models_dir(self) -> dict[str, Path]:
        """Names and paths of the models folder; a name never becomes part of a path."""
        folder = self._settings.models_dir
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        return {
            entry.stem if entry.is_file() else entry.name: entry.absolute()
            for entry in entries
            if _is_model(entry)
        }

    def _unknown(self, name: str) -> UnknownModel:
        names = [n for spec in catalogued() for n in spec.names]
        names += [*self._models_dir(), self._settings.sd_model]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
        hint = f"the nearest: {', '.join(dict.fromkeys(near))}"
        if not self._settings.allow_any_model:
            hint += "; this server serves only the models of its list (GET /models)"
        return UnknownModel(f"there is no model {name!r}; {hint}", param="model")


@cache
def catalogued() -> tuple[ModelSpec, ...]:
    """The models of configs/models.yaml."""
    return tuple(_entry(**entry) for entry in _document()["models"])


def family_configs(family: Family) -> ModelSpec:
    """The model with whose configurations single files of that family are read."""
    name = _document()["families"][family]["configs"]
    return next(spec for spec in catalogued() if spec.name == name)


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(CATALOG_FILE.read_text(encoding="utf-8"))
    return document


def _entry(
    *, family: str, sources: list[str], aliases: tuple[str, ...] = (), **fields: Any
) -> ModelSpec:
    if "latent_rgb" in fields:
        fields["latent_rgb"] = _matrix(fields["latent_rgb"])
    return ModelSpec(
        family=Family(family),
        sources=tuple(_locate(source) for source in sources),
        aliases=tuple(aliases),
        **{**_defaults(Family(family)), **fields},
    )


def _defaults(family: Family) -> dict[str, Any]:
    given = _document()["families"][family]
    chosen = ("num_inference_steps", "guidance_scale", "memory_gb")
    return {"sampler": None, **{field: given[field] for field in chosen}}


def _locate(source: str) -> str:
    """`bundled:NAME` lies in the package; anything else is a Hub id."""
    name = source.removeprefix(BUNDLED)
    return source if name == source else str(PACKAGE / "models" / name)


def _matrix(rows: list[list[float]]) -> LatentRGB:
    return tuple((float(r), float(g), float(b)) for r, g, b in rows)


def _is_model(path: Path) -> bool:
    """Whether something lies there that can be looked into: a diffusers folder, a single file."""
    try:
        if path.suffix == ".safetensors" and path.is_file():
            return True
        return (path / hub.INDEX).is_file()
    except OSError:  # not a path at all: too long, unreadable
        return False


def _local(name: str, path: Path) -> ModelSpec:
    """A diffusers folder or a single file on this machine."""
    marker = path if path.is_file() else path / hub.INDEX
    return _read_local(name, path, marker.stat().st_mtime_ns)


@lru_cache(maxsize=MAX_CACHED)
def _read_local(name: str, path: Path, _changed: int) -> ModelSpec:
    if path.is_file():
        return _spec(name, str(path), families.from_checkpoint(name, path))
    traits = _configured(name, str(path), offline=True)
    index = hub.read_json(str(path), hub.INDEX, offline=True)
    files = hub.needed_weights(name, hub.local_files(path), index, half=False)
    headers = [families.read_header(name, path / f) for f in files if f.endswith(".safetensors")]
    num_parameters = sum(map(families.count_parameters, headers))
    return _spec(name, str(path), replace(traits, num_parameters=num_parameters))


def _configured(name: str, source: str, offline: bool) -> Traits:
    """Traits of a model in diffusers' layout, on the Hub or on this machine."""
    index = hub.read_json(source, hub.INDEX, offline)
    unet = hub.read_json(source, "unet/config.json", offline)
    return families.from_configs(name, index, unet)


def _spec(name: str, source: str, traits: Traits) -> ModelSpec:
    defaults = _defaults(traits.family)
    if traits.num_parameters is not None:
        weights = traits.num_parameters * BYTES_HALF
        defaults["memory_gb"] = round(ACTIVATIONS * weights / 1e9, 2) or 0.01
    return ModelSpec(
        name=name,
        family=traits.family,
        sources=(source,),
        width=traits.side,
        height=traits.side,
        prediction_type=traits.prediction_type,
        zero_snr=traits.zero_snr,
        **defaults,
    )
