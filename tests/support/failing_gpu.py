"""The service on a GPU that fails for good at the first request with the seed FATAL_SEED.

`bentoml serve tests.support.failing_gpu:StableDiffusion`
"""

from __future__ import annotations

from collections.abc import Callable

import sdbento.app
from sdbento.engine.trajectory import Launched, StepPlan
from sdbento.process import replacement
from sdbento.runner.torch_runner import TorchRunner
from service import StableDiffusion as StableDiffusion
from tests.support.device_errors import FATAL_SEED, AcceleratorError


class FailingRunner(TorchRunner):
    """After the first failure every later call fails in the same way, as CUDA's do."""

    failed = False

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        self.failed |= any(t.seed == FATAL_SEED for t in plan.trajectories)
        if self.failed:
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().launch(plan, pause)


vars(sdbento.app)["TorchRunner"] = FailingRunner
vars(replacement).update(LINGER=600.0, LIMIT=600)  # for as long as the test looks
