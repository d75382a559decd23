"""Names of models and ControlNets become specs: what each stands for, where it comes from.

A model's name is looked up in the catalogue (configs/models.yaml), in the models folder, then among
local paths and Hub ids; where SDBENTO_ALLOW_ANY_MODEL is off, only the default model's may be one
of the latter. A ControlNet's name is a type that the catalogue has for the model, or, by the same
rule, a path or Hub id. Reads small files only, never weights. Knows nothing of loading or devices.
"""

from __future__ import annotations

import difflib
import logging
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from sdbento.catalog import families, hub
from sdbento.catalog.families import Traits
from sdbento.catalog.folder import list_files
from sdbento.catalog.specs import (
    ControlNetSpec,
    ModelSpec,
    catalogued,
    catalogued_controlnets,
    controlnets_for,
    defaults,
)
from sdbento.errors import InvalidParameter, SDBentoError, UnknownModel, classify
from sdbento.settings import Settings

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MAX_CACHED = 256  # models that are neither catalogued nor resident; ControlNets likewise
BYTES_HALF = 2
ACTIVATIONS = 1.4  # memory of a running model over that of its weights
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

K = TypeVar("K")
V = TypeVar("V")


class Catalog:
    """All that can be named. Thread-safe: one lock guards what the Hub has told."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known = {
            name.casefold(): spec for spec in catalogued() for name in (*spec.names, *spec.sources)
        }
        self._from_hub: dict[str, ModelSpec] = {}
        self._controlnets = {
            name.casefold(): spec
            for specs in catalogued_controlnets().values()
            for spec in specs.values()
            for name in (spec.name, *spec.sources)
        }
        self._fitting: dict[tuple[str, str], ControlNetSpec] = {}  # by their and the model's name
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
        except Exception as exc:
            raise _named(exc, f"model {name}", ModelSpec.param) from exc
        if spec is None:
            raise self._unknown(name)
        return spec

    def known_controlnet(self, name: str, model: ModelSpec) -> ControlNetSpec | None:
        """As `resolve_controlnet` where no file and no Hub need be asked; never blocks."""
        if not _is_local(model) and (spec := controlnets_for(model).get(name.casefold())):
            return spec
        with self._lock:
            return self._fitting.get((name, model.name))

    def resolve_controlnet(self, name: str, model: ModelSpec) -> ControlNetSpec:
        """The ControlNet that `name`, a type, Hub id or folder, means for `model`. Blocking.

        Raises InvalidParameter for what there is not, naming the types that there are, and for what
        does not fit the model; UnsupportedModel; or what keeps the Hub from being asked.
        """
        try:
            spec = self.known_controlnet(name, model) or self._look_up_controlnet(name, model)
        except Exception as exc:
            raise _named(exc, f"ControlNet {name}", ControlNetSpec.param) from exc
        if spec is None:
            raise self._unknown_controlnet(name, model)
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
            _remember(self._from_hub, name, spec)
        return spec

    def _look_up_controlnet(self, name: str, model: ModelSpec) -> ControlNetSpec | None:
        families.refuse_pickles(name, "ControlNet")
        listed = controlnets_for(model).get(name.casefold())
        if listed := listed or self._controlnets.get(name.casefold()):
            _check_fit(listed, _listed_config(listed), model)
            return listed
        if not self._settings.allow_any_model:
            return None
        if _lies(Path(name, hub.CONFIG)):
            spec, config = _local_controlnet(name, Path(name).absolute())
            _check_fit(spec, config, model)
            return spec
        if not _HUB_ID.fullmatch(name):
            return None
        config = hub.read_json(name, hub.CONFIG, self._settings.offline, "ControlNet")
        family = families.controlnet_family(name, config)
        usual = max(spec.memory_gb for spec in catalogued_controlnets()[family].values())
        spec = ControlNetSpec(name, family, (name,), usual)
        _check_fit(spec, config, model)
        with self._lock:
            _remember(self._fitting, (name, model.name), spec)
        return spec

    def _models_dir(self) -> dict[str, Path]:
        """The diffusers folders and single files of the models folder, by name."""
        root = self._settings.models_dir
        files = list_files(root, (SUFFIX, hub.INDEX), max_depth=1).values()
        entries = [file.parent for file in files if file.name == hub.INDEX]
        entries += [file for file in files if file.suffix == SUFFIX]
        return {
            entry.stem if entry.is_file() else entry.name: entry.absolute()
            for entry in sorted(entries)
            if entry.parent == root
        }

    def _unknown(self, name: str) -> UnknownModel:
        names = [n for spec in catalogued() for n in spec.names]
        names += [*self._models_dir(), self._settings.sd_model]
        names = [n for n in names if n != name]  # it may be the default model that is not there
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
        hint = f"the nearest: {', '.join(dict.fromkeys(near))}"
        if not self._settings.allow_any_model:
            hint += "; this server serves only the models of its list (GET /models)"
        return UnknownModel(f"there is no model {name!r}; {hint}", param=ModelSpec.param)

    def _unknown_controlnet(self, name: str, model: ModelSpec) -> InvalidParameter:
        types = [*controlnets_for(model)]
        hint = f"there are: {', '.join(types)}"
        if near := difflib.get_close_matches(name.casefold(), types, n=1, cutoff=0.5):
            hint += f"; the nearest: {near[0]}"
        if not self._settings.allow_any_model:
            hint += "; this server serves only these"
        return InvalidParameter(
            f"there is no ControlNet {name!r} for {model}; {hint}", param=ControlNetSpec.param
        )


def _named(exc: Exception, what: str, param: str) -> SDBentoError:
    """As an error of the tree that says of what it tells."""
    if isinstance(exc, SDBentoError):
        return exc
    error = classify(exc)
    return type(error)(f"{what}: {error.message}", param=param)


def _remember(known: dict[K, V], key: K, value: V) -> None:
    """Keep a bounded number, the newest."""
    if len(known) >= MAX_CACHED:
        known.pop(next(iter(known)))
    known[key] = value


def _is_model(path: Path) -> bool:
    """Whether something lies there that can be looked into: a diffusers folder, a single file."""
    return (path.suffix == SUFFIX and _lies(path)) or _lies(path / hub.INDEX)


def _lies(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # not a path at all: too long, unreadable
        return False


def _is_local(spec: ModelSpec | ControlNetSpec) -> bool:
    return any(Path(source).is_absolute() for source in spec.sources)


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
    return _spec(name, str(path), replace(traits, num_parameters=_count(name, path, files)))


def _count(name: str, folder: Path, files: Iterable[str]) -> int:
    """The parameters of the safetensors among `files`."""
    weights = [folder / file for file in files if file.endswith(".safetensors")]
    return sum(families.count_parameters(families.read_header(name, file)) for file in weights)


def _memory_gb(num_parameters: int) -> float:
    return round(ACTIVATIONS * num_parameters * BYTES_HALF / 1e9, 2) or 0.01


def _configured(name: str, source: str, offline: bool) -> Traits:
    """Traits of a model in diffusers' layout, on the Hub or on this machine."""
    index = hub.read_json(source, hub.INDEX, offline)
    unet = hub.read_json(source, hub.UNET, offline)
    return families.from_configs(name, index, unet)


def _spec(name: str, source: str, traits: Traits) -> ModelSpec:
    fields = defaults(traits.family)
    if traits.num_parameters is not None:
        fields["memory_gb"] = _memory_gb(traits.num_parameters)
    return ModelSpec(
        name=name,
        family=traits.family,
        sources=(source,),
        width=traits.side,
        height=traits.side,
        prediction_type=traits.prediction_type,
        zero_snr=traits.zero_snr,
        inpaints=traits.inpaints,
        refines=traits.refines,
        **fields,
    )


def _local_controlnet(name: str, path: Path) -> tuple[ControlNetSpec, dict[str, Any]]:
    """With its configuration."""
    config = hub.read_json(str(path), hub.CONFIG, offline=True, kind="ControlNet")
    family = families.controlnet_family(name, config)
    files = hub.controlnet_weights(name, hub.local_files(path), half=False)
    memory_gb = _memory_gb(_count(name, path, files))
    return ControlNetSpec(name, family, (str(path),), memory_gb), config


def _listed_config(spec: ControlNetSpec) -> dict[str, Any] | None:
    """The configuration of a bundled ControlNet that is there."""
    if not _is_local(spec) or not _lies(Path(spec.sources[0], hub.CONFIG)):
        return None
    return hub.read_json(spec.sources[0], hub.CONFIG, offline=True, kind="ControlNet")


def _check_fit(spec: ControlNetSpec, config: Mapping[str, Any] | None, model: ModelSpec) -> None:
    """Raises InvalidParameter for another family or other widths.

    Where a configuration is not at hand, the family's usual one stands in for it; what the networks
    then turn out to be is checked when they have been loaded.
    """
    if spec.family is not model.family:
        wrong: str | None = f"it is for {spec.family}, not {model.family}"
    else:
        own = None
        if _is_local(model) and _lies(Path(model.sources[0], hub.UNET)):
            own = hub.read_json(model.sources[0], hub.UNET, offline=True)
        bundled_elsewhere = config is None and _is_local(spec)
        wrong = None if bundled_elsewhere else families.misfit(model.family, own, config)
    if wrong is not None:
        raise InvalidParameter(f"{spec} does not fit {model}: {wrong}", param=spec.param)
