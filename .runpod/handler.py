"""What the RunPod Hub looks for in a repository: the worker, as `sdbento worker` starts it."""

from __future__ import annotations

from sdbento.doors.runpod.worker import main

if __name__ == "__main__":
    raise SystemExit(main())
