"""Models and ControlNets that the catalogue does not list, described from their own files.

A source is a Hub id or an absolute path: of a diffusers folder, or of a single .safetensors file.
Only configurations and the headers of weights are read. Knows nothing of how names are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdbento.catalog import families, hub
from sdbento.catalog.families import Traits
from sdbento.catalog.folder import list_files
from sdbento.catalog.layout import INDEX, UNET, Layout, controlnet_layout, model_layout
from sdbento.catalog.specs import ControlNetSpec, ModelSpec, catalogued_controlnets, defaults

SUFFIX = ".safetensors"
MAX_CACHED = 256  # local models
BYTES_HALF = 2
ACTIVATIONS = 1.4  # memory of a running model over that of its weights


def describe_model(name: str, source: str, offline: bool) -> ModelSpec:
    """Raises UnsupportedModel, ModelLoadFailed, or what keeps the Hub from being asked."""
    path = Path(source)
    if not path.is_absolute():
        return _model_spec(name, source, _read_traits(name, source, offline))
    marker = path if path.is_file() else path / INDEX
    return _describe_local(name, path, marker.stat().st_mtime_ns)


def describe_controlnet(name: str, source: str, config: Mapping[str, Any]) -> ControlNetSpec:
    """`config` is what its config.json says. Raises UnsupportedModel or ModelLoadFailed."""
    family = families.controlnet_family(name, config)
    if Path(source).is_absolute():
        memory_gb = _memory_gb(count_parameters(controlnet_layout(name), Path(source)))
    else:
        memory_gb = max(spec.memory_gb for spec in catalogued_controlnets()[family].values())
    return ControlNetSpec(name, family, (source,), memory_gb)


@lru_cache(maxsize=MAX_CACHED)
def _describe_local(name: str, path: Path, _modified: int) -> ModelSpec:
    if path.is_file():
        return _model_spec(name, str(path), families.from_checkpoint(name, path))
    traits = _read_traits(name, str(path), offline=True)
    layout = model_layout(name, hub.read_json(name, str(path), INDEX, offline=True))
    traits = replace(traits, num_parameters=count_parameters(layout, path))
    return _model_spec(name, str(path), traits)


def _read_traits(name: str, source: str, offline: bool) -> Traits:
    """Of a model in diffusers' layout."""
    index = hub.read_json(name, source, INDEX, offline)
    return families.from_configs(name, index, hub.read_json(name, source, UNET, offline))


def count_parameters(layout: Layout, folder: Path, half: bool = False) -> int:
    """Of all networks, by the headers of their files. Raises UnsupportedModel."""
    files = layout.weights(list_files(folder), half)
    headers = (
        families.read_header(layout.name, folder / file) for file in files if file.endswith(SUFFIX)
    )
    return sum(header.num_parameters for header in headers)


def _memory_gb(num_parameters: int) -> float:
    return round(ACTIVATIONS * num_parameters * BYTES_HALF / 1e9, 2) or 0.01


def _model_spec(name: str, source: str, traits: Traits) -> ModelSpec:
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
