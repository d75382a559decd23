"""Looks up the names of models and ControlNets: what each stands for, where it comes from.

A model's name is looked up in the catalogue (configs/models.yaml), in the models folder, then among
local paths and Hub ids, as far as the settings allow them (`permission`); the default model may be
either. A ControlNet's name is a type that the catalogue has for the model, or, by the same rule,
a path or Hub id. Reads small files only, never weights. Knows nothing of loading or devices.
"""

from __future__ import annotations

import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from cachetools import LRUCache

from sdbento.access.caller import current_caller
from sdbento.catalog import families, hub
from sdbento.catalog.families import Kind
from sdbento.catalog.folder import is_file, list_files
from sdbento.catalog.layout import CONFIG, INDEX, UNET
from sdbento.catalog.permission import explain_models, models_allowed, paths_allowed
from sdbento.catalog.specs import (
    ControlNetSpec,
    ModelSpec,
    Spec,
    catalogued,
    catalogued_controlnets,
    controlnets_for,
)
from sdbento.catalog.unlisted import SUFFIX, describe_controlnet, describe_model
from sdbento.errors import InvalidParameter, SDBentoError, UnknownModel, classify, nearest_names
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MAX_CACHED = 256  # names that the Hub has been asked about
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

S = TypeVar("S", bound=Spec)


class Names(ABC, Generic[S]):
    """What names of one kind stand for. Thread-safe."""

    kind: Kind
    param: str  # the request field that the name comes from

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._from_hub: LRUCache[str, S] = LRUCache(MAX_CACHED)
        self._lock = threading.Lock()  # guards `_from_hub`

    def known(self, name: str) -> S | None:
        """What `name` stands for, if no file and no Hub need be asked; never blocks."""
        if (spec := self._catalogued(name)) is not None:
            return spec
        with self._lock:
            return self._from_hub.get(name)

    def resolve(self, name: str) -> S:
        """What `name` stands for. Blocking: may read local files, or small ones from the Hub.

        For a name that is not known, raises UnknownModel or, of a ControlNet, InvalidParameter,
        with the nearest names in the message; else UnsupportedModel, or what keeps the Hub from
        being asked.
        """
        try:
            spec = self._find(name, self._settings.offline)
        except Exception as exc:
            raise self._explain(name, exc) from exc
        if spec is None:
            raise self._unknown(name)
        return spec

    def find_local(self, name: str) -> S | None:
        """As `resolve`, but asks no Hub: None where nothing on this machine has that name."""
        try:
            return self._find_local(name)
        except Exception as exc:
            raise self._explain(name, exc) from exc

    def _find(self, name: str, offline: bool) -> S | None:
        if (spec := self._find_local(name)) is not None:
            return spec
        if not self.may_be_on_hub(name):
            return None
        spec = self._describe(name, name, offline)
        with self._lock:
            self._from_hub[name] = spec
        return spec

    def _find_local(self, name: str) -> S | None:
        families.refuse_pickles(name, self.kind)
        if (spec := self.known(name) or self._find_listed(name)) is not None:
            return spec
        if self._may_be_path(name) and self._is_source(path := Path(name)):
            return self._describe(name, str(path.absolute()), offline=True)
        return None

    def may_be_on_hub(self, name: str) -> bool:
        """Whether the Hub may be asked for `name`."""
        if not _HUB_ID.fullmatch(name):
            return False
        return self._is_default(name) or models_allowed(name, self._settings)

    def _may_be_path(self, name: str) -> bool:
        return self._is_default(name) or paths_allowed(self._settings)

    def _explain(self, name: str, exc: Exception) -> SDBentoError:
        """`exc` as an error of the tree that says which name it is about."""
        if isinstance(exc, SDBentoError):
            return exc
        error = classify(exc)
        return type(error)(f"{self.kind} {name}: {error.message}", param=self.param)

    @abstractmethod
    def _catalogued(self, name: str) -> S | None:
        """An entry of the catalogue that needs no further check; never blocks."""

    @abstractmethod
    def _find_listed(self, name: str) -> S | None:
        """What else this server has of its own under that name."""

    @abstractmethod
    def _is_default(self, name: str) -> bool:
        """Whether the operator has named it."""

    @abstractmethod
    def _is_source(self, path: Path) -> bool:
        """Whether there is something of this kind at `path`."""

    @abstractmethod
    def _describe(self, name: str, source: str, offline: bool) -> S:
        """What lies at `source`, an absolute path or a Hub id."""

    @abstractmethod
    def _unknown(self, name: str) -> SDBentoError:
        """The error for a name that stands for nothing."""


class Catalog(Names[ModelSpec]):
    """The models, and for each model its ControlNets."""

    kind = "model"
    param = ModelSpec.param

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._by_name = {
            name.casefold(): spec for spec in catalogued() for name in (*spec.names, *spec.sources)
        }
        self._controlnets: LRUCache[ModelSpec, ControlNets] = LRUCache(MAX_CACHED)
        self._default_names = self._names_of_default()

    def controlnets(self, model: ModelSpec) -> ControlNets:
        """The names of ControlNets that fit `model`."""
        with self._lock:
            if model not in self._controlnets:
                self._controlnets[model] = ControlNets(self._settings, model)
            return self._controlnets[model]

    def is_allowed(self, name: str) -> bool:
        """Whether the present caller's key allows the model of that name; never blocks.

        The names that a key allows mean what they mean in requests.
        """
        allowed = current_caller().allowance.models
        names = self._default_names if name in self._default_names else (name,)
        if allowed is None or not allowed.isdisjoint(names):
            return True
        spec = self.known(name)
        return spec is not None and any(self.known(other) == spec for other in allowed)

    def list(self) -> list[ModelSpec]:
        """The catalogue, the models folder and the default, as far as this machine knows it."""
        specs = {spec.name: spec for spec in catalogued()}
        for name in [*self._models_dir(), self._settings.sd_model]:
            try:
                spec = self._find(name, offline=True)
            except Exception as exc:
                log.info("model %s is not listed: %s", name, classify(exc).message)
                continue
            if spec is not None:
                specs.setdefault(spec.name, spec)
        return [*specs.values()]

    def _catalogued(self, name: str) -> ModelSpec | None:
        return self._by_name.get(name.casefold())

    def _find_listed(self, name: str) -> ModelSpec | None:
        if name in self._default_names[:-1]:
            path: Path | None = Path(self._settings.sd_model).absolute()
        else:
            path = self._models_dir().get(name)
        return None if path is None else self._describe(name, str(path), offline=True)

    def _is_default(self, name: str) -> bool:
        return name == self._settings.sd_model

    def _names_of_default(self) -> tuple[str, ...]:
        """The default model's, best first. The best of a path is its last part, which does not tell
        callers of the folders of this machine; a model that is called so anyway keeps the name."""
        name = self._settings.sd_model
        path = Path(name).absolute()
        is_taken = self._catalogued(path.name) is not None or path.name in self._models_dir()
        if is_taken or self._catalogued(name) is not None or not self._is_source(path):
            return (name,)
        return tuple(dict.fromkeys((path.name, name)))

    def _is_source(self, path: Path) -> bool:
        return (path.suffix == SUFFIX and is_file(path)) or is_file(path / INDEX)

    def _describe(self, name: str, source: str, offline: bool) -> ModelSpec:
        spec = describe_model(name, source, offline)
        if name not in self._default_names:
            return spec
        best, *others = self._default_names
        return replace(spec, name=best, aliases=tuple(others))

    def _models_dir(self) -> dict[str, Path]:
        """The diffusers folders and single files of the models folder, by name."""
        root = self._settings.models_dir
        files = list_files(root, (SUFFIX, INDEX), max_depth=1).values()
        entries = [file.parent for file in files if file.name == INDEX]
        entries += [file for file in files if file.suffix == SUFFIX]
        return {
            entry.stem if entry.is_file() else entry.name: entry.absolute()
            for entry in sorted(entries)
            if entry.parent == root
        }

    def _unknown(self, name: str) -> UnknownModel:
        names = [n for spec in catalogued() for n in spec.names]
        names += [*self._models_dir(), *self._default_names]
        # The default model itself may be the missing one; its folder is nobody's business.
        names = [n for n in names if n != name and not Path(n).is_absolute() and self.is_allowed(n)]
        near = nearest_names(name, names) or names
        hint = f"the nearest: {', '.join(dict.fromkeys(near)) or 'none that this key allows'}"
        hint += f"; GET /models lists all that this server has{explain_models(self._settings)}"
        return UnknownModel(f"there is no model {name!r}; {hint}", param=self.param)


class ControlNets(Names[ControlNetSpec]):
    """The ControlNets that fit one model. Resolving another raises InvalidParameter."""

    kind = "ControlNet"
    param = ControlNetSpec.param

    def __init__(self, settings: Settings, model: ModelSpec) -> None:
        super().__init__(settings)
        self._model = model
        self._by_type = controlnets_for(model)
        self._by_name = {
            name.casefold(): spec
            for specs in catalogued_controlnets().values()
            for spec in specs.values()
            for name in (spec.name, *spec.sources)
        }

    def _catalogued(self, name: str) -> ControlNetSpec | None:
        # A local model may have widths of its own: its files must be read to see what fits.
        return None if _is_local(self._model) else self._by_type.get(name.casefold())

    def _find_listed(self, name: str) -> ControlNetSpec | None:
        key = name.casefold()
        spec = self._by_type.get(key) or self._by_name.get(key)
        if spec is not None:
            self._check_fit(spec, _bundled_config(spec))
        return spec

    def _is_default(self, name: str) -> bool:
        return False

    def _is_source(self, path: Path) -> bool:
        return is_file(path / CONFIG)

    def _describe(self, name: str, source: str, offline: bool) -> ControlNetSpec:
        config = hub.read_json(name, source, CONFIG, offline, self.kind)
        spec = describe_controlnet(name, source, config)
        self._check_fit(spec, config)
        return spec

    def _check_fit(self, spec: ControlNetSpec, config: Mapping[str, Any] | None) -> None:
        """Raises InvalidParameter for another family or other widths.

        Where a configuration is not at hand, the family's usual one stands in for it; whether the
        networks do fit is checked again when both have been loaded.
        """
        model = self._model
        wrong: str | None = None
        if spec.family is not model.family:
            wrong = f"it is for {spec.family}, not {model.family}"
        elif config is not None or not _is_local(spec):
            unet = None
            if _is_local(model) and is_file(Path(model.sources[0], UNET)):
                unet = hub.read_json(model.name, model.sources[0], UNET, offline=True)
            wrong = families.misfit(model.family, unet, config)
        if wrong is not None:
            raise InvalidParameter(f"{spec} does not fit {model}: {wrong}", param=self.param)

    def _unknown(self, name: str) -> InvalidParameter:
        types = [*self._by_type]
        hint = f"there are: {', '.join(types)}"
        if near := nearest_names(name.casefold(), types, count=1):
            hint += f"; the nearest: {near[0]}"
        hint += explain_models(self._settings)
        return InvalidParameter(
            f"there is no ControlNet {name!r} for {self._model}; {hint}", param=self.param
        )


def _is_local(spec: Spec) -> bool:
    return any(Path(source).is_absolute() for source in spec.sources)


def _bundled_config(spec: ControlNetSpec) -> dict[str, Any] | None:
    """The configuration of a bundled ControlNet whose files are there."""
    if not _is_local(spec) or not is_file(Path(spec.sources[0], CONFIG)):
        return None
    return hub.read_json(spec.name, spec.sources[0], CONFIG, offline=True, kind="ControlNet")
