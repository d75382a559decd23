"""The service on a GPU that hangs in a step of a request with the seed HANGING_SEED, and fails for
good at the first one with FATAL_SEED.

It hangs for as long as the process lives, and only if the file `hang` lies in the folder of the
state; the file is removed first, so that the next process works.

`bentoml serve tests.support.faulty_gpu:StableDiffusion`
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sdbento.backend import local
from sdbento.engine import loop
from sdbento.engine.trajectory import Launched, Stage, StepPlan
from sdbento.environment import load_settings
from sdbento.process import replacement
from sdbento.runner.torch_runner import TorchRunner
from service import StableDiffusion as StableDiffusion
from tests.support.device_errors import FATAL_SEED, HANGING_SEED, AcceleratorError


class FaultyRunner(TorchRunner):
    """After the first failure every later call fails in the same way, as CUDA's do."""

    failed = False

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        seeds = {trajectory.seed for trajectory in plan.trajectories}
        trigger = load_settings().state_dir / "hang"
        if plan.stage is Stage.STEP and HANGING_SEED in seeds and trigger.exists():
            trigger.unlink()
            threading.Event().wait()
        self.failed |= FATAL_SEED in seeds
        if self.failed:
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().launch(plan, pause)


vars(local)["TorchRunner"] = FaultyRunner
vars(loop).update(UNTIMED=2.0)  # the first call of a kind hangs after less time
vars(replacement).update(LINGER=5.0, LIMIT=8)  # seconds for the test to look
