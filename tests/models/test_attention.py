"""The attention implementation that networks compute with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0

from tests.support.loading import load, resolve, settings
from tests.support.tiny import save_tiny


def test_attention_is_torchs_own_where_there_is_no_gpu(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    pipeline = load(resolve(save_tiny("sd15", tmp_path / "mine")), settings())
    assert {type(p) for p in pipeline.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert "attention by SDPA" in caplog.text
