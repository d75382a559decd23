"""Where models wait that were evicted from a GPU: pinned host memory, as long as there is room.

From there a model is back in a second; loading it takes a minute. Used by one thread, the loader's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sdbento.weights import Pipeline, host_memory, modules

log = logging.getLogger(__name__)

HOST_RESERVE = 0.25  # of the machine's memory stays free


class Parking:
    """Models by name, the least recently parked dropped first. On a CPU it takes none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parked: OrderedDict[str, Pipeline] = OrderedDict()

    def names(self) -> list[str]:
        return list(self._parked)

    def put(self, pipeline: Pipeline) -> None:
        """Take `pipeline` off the GPU; where there is no room for it, it is dropped."""
        if self._device.type == "cpu":
            return
        while not has_room(pipeline.nbytes):
            if not self._parked:
                log.info("model %s is dropped: no room in host memory", pipeline.spec.name)
                return
            self._parked.popitem(last=False)
        try:
            self._parked[pipeline.spec.name] = to_host(pipeline)
        except RuntimeError as error:  # no more memory can be pinned; the model loads again
            log.warning("model %s is dropped: %s", pipeline.spec.name, error)

    def take(self, name: str) -> Pipeline | None:
        """The model of that name, back on the GPU, if it was parked."""
        parked = self._parked.pop(name, None)
        return None if parked is None else to_device(parked, self._device)

    def clear(self) -> None:
        self._parked.clear()


def has_room(nbytes: int) -> bool:
    total, available = host_memory()
    return available - nbytes >= HOST_RESERVE * total


def to_host(pipeline: Pipeline) -> Pipeline:
    """A new Pipeline: what others remember of the old one, such as embeddings, lies on the GPU."""
    _move(pipeline.pipe, lambda tensor: tensor.cpu().pin_memory())
    return replace(pipeline, device=torch.device("cpu"))


def to_device(pipeline: Pipeline, device: torch.device) -> Pipeline:
    _move(pipeline.pipe, lambda tensor: tensor.to(device, non_blocking=True))
    torch.cuda.synchronize(device)
    return replace(pipeline, device=device)


def _move(pipe: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for module in modules(pipe):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = move(tensor.data)
