"""All routes of AUTOMATIC1111's API."""

from __future__ import annotations

from sdbento.doors.a1111 import generation
from sdbento.doors.a1111.tools import controlnet, extras, listings, machine, options, png_info

ROUTERS = (
    generation.router,
    options.router,
    listings.router,
    controlnet.router,
    extras.router,
    machine.router,
    png_info.router,
)
