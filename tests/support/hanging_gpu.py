"""The service on a GPU that hangs, once, in a step of a request with the seed HANGING_SEED.

It hangs for as long as the process lives, and only if the file `hang` lies in the folder of the
state; the file is removed first, so that the next process works.

`bentoml serve tests.support.hanging_gpu:StableDiffusion`
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import sdbento.app
from sdbento.engine.trajectory import Launched, Stage, StepPlan
from sdbento.environment import load_settings
from sdbento.process import replacement
from sdbento.runner.torch_runner import TorchRunner
from service import StableDiffusion as StableDiffusion
from tests.support.device_errors import HANGING_SEED


class HangingRunner(TorchRunner):
    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        trigger = load_settings().state_dir / "hang"
        seeds = {trajectory.seed for trajectory in plan.trajectories}
        if plan.stage is Stage.STEP and HANGING_SEED in seeds and trigger.exists():
            trigger.unlink()
            threading.Event().wait()
        return super().launch(plan, pause)


vars(sdbento.app)["TorchRunner"] = HangingRunner
vars(replacement).update(LINGER=10.0)  # seconds for the test to look
