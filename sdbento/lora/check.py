"""What is wrong with a request's LoRAs, as far as that can be told without loading a model.

That a name means something, that the settings allow it, and that the catalogue has it for the
model's family. Whether a file's layers fit the model is known only with both in memory: `layers`.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdbento.catalog.specs import ModelSpec
from sdbento.lora.layers import check_family
from sdbento.lora.lookup import LoraSource, Url, locate
from sdbento.outbound.urls import check_fetch
from sdbento.settings import Settings


def locate_loras(names: Iterable[str], spec: ModelSpec, settings: Settings) -> list[LoraSource]:
    """Where the LoRAs of these names are, if they are for any model like `spec`.

    Blocking: looks at this machine's disk, but asks neither the Hub nor a URL's host. Raises
    InvalidParameter for a name that is unknown, ambiguous or forbidden, UnsupportedModel for a
    pickled file or a LoRA of another family, and ModelLoadFailed for a file that cannot be read.
    """
    sources = [locate(name, settings) for name in names]
    for source in sources:
        check_family(source, spec)
        if isinstance(source.place, Url):
            check_fetch(source.place.address, settings, param="lora")
    return sources
