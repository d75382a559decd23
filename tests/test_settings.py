"""The settings class itself: defaults, bounds, immutable values."""

from __future__ import annotations

import pytest

from sdbento.settings import Settings


def test_defaults_are_those_of_the_runpod_worker() -> None:
    settings = Settings()
    assert settings.sd_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert settings.precision == "fp16"
    assert settings.enable_xformers is True
    assert settings.max_queue_size == 100
    assert settings.max_batch_size == 4
    assert settings.changed() == []


def test_settings_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().max_batch_size = 8  # type: ignore[misc]


def test_settings_themselves_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_BATCH_SIZE", "6")
    assert Settings().max_batch_size == 4
