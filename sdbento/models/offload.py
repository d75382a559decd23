"""Where waits what was evicted from a GPU: pinned host memory, as long as there is room.

From there one is back in a second; loading it takes a minute. Used by one thread, the loader's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch

from sdbento.models.device import host_memory
from sdbento.models.pipeline import Resident, networks

log = logging.getLogger(__name__)

HOST_RESERVE = 0.25  # of the machine's memory stays free


class Parking:
    """By key, the least recently parked dropped first. On a CPU it takes none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parked: OrderedDict[str, Resident] = OrderedDict()

    def names(self) -> list[str]:
        return list(self._parked)

    def put(self, resident: Resident) -> None:
        """Take `resident` off the GPU; where there is no room for it, it is dropped."""
        if self._device.type == "cpu":
            return
        while not has_room(resident.nbytes):
            if not self._parked:
                log.info("%s is dropped: no room in host memory", resident.spec)
                return
            self._parked.popitem(last=False)
        try:
            self._parked[resident.spec.key] = to_host(resident)
        except RuntimeError as error:  # no more memory can be pinned; it loads again
            log.warning("%s is dropped: %s", resident.spec, error)

    def take(self, key: str) -> Resident | None:
        """What has that key, back on the GPU, if it was parked."""
        parked = self._parked.pop(key, None)
        return None if parked is None else to_device(parked, self._device)

    def clear(self) -> None:
        self._parked.clear()


def has_room(nbytes: int) -> bool:
    total, available = host_memory()
    return available - nbytes >= HOST_RESERVE * total


def to_host(resident: Resident) -> Resident:
    """A new one: what others remember of the old, such as embeddings, lies on the GPU."""
    _move(resident, lambda tensor: tensor.cpu().pin_memory())
    return replace(resident, device=torch.device("cpu"))


def to_device(resident: Resident, device: torch.device) -> Resident:
    _move(resident, lambda tensor: tensor.to(device, non_blocking=True))
    torch.cuda.synchronize(device)
    return replace(resident, device=device)


def _move(resident: Resident, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for module in networks(resident):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = move(tensor.data)
