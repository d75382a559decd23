"""The name of this machine, for tables."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def hardware() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = names[0] if names else platform.processor()
    return f"{os.cpu_count()} CPU cores ({name}), torch {torch.__version__}"
