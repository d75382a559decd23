"""Scheduler configurations as found in models."""

from __future__ import annotations

from typing import Any

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
EDM = {
    "_class_name": "EDMEulerScheduler",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
}


def config_of(name: str, **options: Any) -> dict[str, Any]:
    base: dict[str, Any] = dict(EDM if name.startswith("EDM") else SD)
    if name.startswith("DPM2"):  # its constructor walks through all training timesteps
        base["num_train_timesteps"] = 200
    return base | options
