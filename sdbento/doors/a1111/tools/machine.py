"""What AUTOMATIC1111's clients ask about the installation: scripts, flags, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from sdbento.doors.http.routing import TheApp, door
from sdbento.request.schema import MAX_CONTROLNETS

if TYPE_CHECKING:
    import torch

    from sdbento.app import App

router = door("AUTOMATIC1111")

SCRIPT = "controlnet"
# By this name webuiapi knows that there is ControlNet; the extension lists it as well. Without it,
# each later call of webuiapi would send the units of an earlier one again.
SIGN_OF_IT = "controlnet m2m"
SEVERAL = {"error": "each GPU has an engine process of its own, which alone may ask for it"}


class Scripts(BaseModel):
    txt2img: list[str]
    img2img: list[str]


class ScriptArg(BaseModel):
    label: str
    value: Any = None
    minimum: Any = None
    maximum: Any = None
    step: Any = None
    choices: list[str] | None = None


class ScriptInfo(BaseModel):
    name: str
    is_alwayson: bool
    is_img2img: bool
    args: list[ScriptArg]


class Memory(BaseModel):
    """In bytes."""

    ram: dict[str, int] = Field(description="free, used and total, of the machine or container")
    cuda: dict[str, Any] = Field(description="Of the GPU; an `error` where there is none")


@router.get("/sdapi/v1/scripts")
async def scripts() -> Scripts:
    """The script that `alwayson_scripts` may name, and one that only tells clients of it."""
    names = [SCRIPT, SIGN_OF_IT]
    return Scripts(txt2img=names, img2img=names)


@router.get("/sdapi/v1/script-info")
async def script_info() -> list[ScriptInfo]:
    """The scripts with their arguments: each of ControlNet's is one unit."""
    args = [ScriptArg(label=f"ControlNet unit {i}") for i in range(MAX_CONTROLNETS)]
    return [
        ScriptInfo(name=SCRIPT, is_alwayson=True, is_img2img=is_img2img, args=args)
        for is_img2img in (False, True)
    ]


@router.get("/sdapi/v1/cmd-flags")
async def cmd_flags() -> dict[str, bool]:
    """The web UI's flags, as far as they mean something here."""
    return {"api": True, "nowebui": True}


@router.get("/sdapi/v1/memory")
async def memory(app: TheApp) -> Memory:
    """How much memory there is."""
    return await run_in_threadpool(_memory, app)


def _memory(app: App) -> Memory:
    from sdbento.models.device import choose_device, host_memory

    total, available = host_memory()
    free = max(0, available)
    return Memory(
        ram={"free": free, "used": total - free, "total": total},
        cuda=_cuda(choose_device(app.settings)) if app.num_devices == 1 else SEVERAL,
    )


def _cuda(device: torch.device) -> dict[str, Any]:
    """As the web UI has it: what the driver says, then what torch's allocator counts."""
    if device.type != "cuda":
        return {"error": "unavailable"}
    import torch

    free, total = torch.cuda.mem_get_info(device)
    counts = torch.cuda.memory_stats(device)
    kinds = {"active": "active", "allocated": "allocated", "reserved": "reserved"}
    kinds["inactive"] = "inactive_split"
    return {
        "system": {"free": free, "used": total - free, "total": total},
        **{
            kind: {when: counts[f"{name}_bytes.all.{when}"] for when in ("current", "peak")}
            for kind, name in kinds.items()
        },
        "events": {"retries": counts["num_alloc_retries"], "oom": counts["num_ooms"]},
    }
