"""Models that were evicted from a GPU are offloaded to pinned host memory, while there is room.

Coming back from there takes about a second, loading from files up to a minute. On a CPU nothing is
offloaded. Changed by one thread only, the cache's loader.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace

import torch

from sdbento.errors import is_sick
from sdbento.metrics.definitions import memory_bytes
from sdbento.models.device import host_memory
from sdbento.models.memory.transfer import free_pinned, move
from sdbento.models.pipeline import Resident, networks

log = logging.getLogger(__name__)

HOST_RESERVE = 0.25  # share of the machine's memory that stays free


class Offloaded:
    """What has been offloaded, by key. When memory is short, the oldest is dropped first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._offloaded: OrderedDict[str, Resident] = OrderedDict()

    def put(self, resident: Resident) -> None:
        """Move `resident` off the GPU. Where host memory has no room for it, it is dropped.

        Raises what a GPU that has failed reports.
        """
        if self._device.type == "cpu":
            return
        if not self._make_room(resident.nbytes):
            log.info("%s is dropped: no room in host memory", resident.spec)
            return
        try:
            self._offloaded[resident.spec.key] = to_host(resident)
            self._measure()
        except RuntimeError as error:  # no more memory can be pinned; it will be loaded from files
            if is_sick(error):
                raise
            log.warning("%s is dropped: %s", resident.spec, error)

    def take(self, key: str) -> Resident | None:
        """What was offloaded under `key`, moved back to the GPU; None if it is not here."""
        offloaded = self._offloaded.pop(key, None)
        self._measure()
        return None if offloaded is None else to_device(offloaded, self._device)

    def __contains__(self, key: str) -> bool:
        return key in self._offloaded

    def clear(self) -> None:
        self._offloaded.clear()
        self._measure()

    def _measure(self) -> None:
        nbytes = sum(resident.nbytes for resident in self._offloaded.values())
        memory_bytes.set(nbytes, "offloaded")

    def _make_room(self, nbytes: int) -> bool:
        """Whether the host has room for `nbytes`, after the oldest have made room."""
        if not has_room(nbytes):
            free_pinned()
        while not has_room(nbytes) and self._offloaded:
            self._offloaded.popitem(last=False)
            free_pinned()
        return has_room(nbytes)


def has_room(nbytes: int) -> bool:
    """Whether the host can hold `nbytes` more and still keep its reserve."""
    total, available = host_memory()
    return available - nbytes >= HOST_RESERVE * total


def to_host(resident: Resident) -> Resident:
    """Move all tensors to pinned host memory.

    Returns a new object. With the old one go the caches that are keyed by it, such as the prompt
    encoder's, whose tensors would otherwise stay on the GPU.
    """
    move(networks(resident), torch.device("cpu"))
    return replace(resident, device=torch.device("cpu"))


def to_device(resident: Resident, device: torch.device) -> Resident:
    """Move all tensors to `device`, a GPU; waits until they are there. Returns a new object."""
    move(networks(resident), device)
    return replace(resident, device=device)
