"""All doors of the server, and how each tells of errors. BentoML's own endpoints are in service.py.

A new door is added here; nothing else needs to know of it.
"""

from __future__ import annotations

from sdbento.doors.a1111 import every as a1111
from sdbento.doors.a1111 import failures as a1111_failures
from sdbento.doors.docs import reference
from sdbento.doors.http import listings, ping
from sdbento.doors.live import api as live
from sdbento.doors.live import stats
from sdbento.doors.openai import api as openai
from sdbento.doors.openai import failures as openai_failures
from sdbento.doors.openai import files as openai_files
from sdbento.doors.openai import models as openai_models
from sdbento.doors.runpod import api as runpod
from sdbento.doors.web import page as web

ROUTERS = (
    listings.router,
    live.router,
    stats.router,
    ping.router,
    runpod.router,
    openai.router,
    openai_models.router,
    *a1111.ROUTERS,
    reference.router,
    web.router,
)
ERROR_SHAPES = {  # by the beginning of a path
    "/v1/": openai_failures.ERRORS,
    "/sdapi/": a1111_failures.ERRORS,
    "/controlnet/": a1111_failures.ERRORS,
}
# Those that ask for images, by POST, beside BentoML's own endpoints.
IMAGE_ROUTES = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/run",
    "/runsync",
)
# Below which nothing needs a key.
OPEN_PREFIXES = (openai_files.PUBLIC_PREFIX, *web.PUBLIC_PREFIXES)
