from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sdbento.runner import launched
from sdbento.runner.launched import on_device


@pytest.mark.parametrize("tokens", [300, 4096, 5000])
def test_a_long_call_pauses_and_makes_the_same(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launched, "PAUSE_EVERY", 0.0)
    monkeypatch.setattr(launched, "PRODUCTS", 1.0)
    query, key, value = (torch.randn(2, 3, tokens, 16) for _ in range(3))
    expected = scaled_dot_product_attention(query, key, value)
    made, pauses = [], []

    def work() -> launched.Finish:
        made.append(scaled_dot_product_attention(query, key, value, attn_mask=None))
        return dict

    on_device(torch.device("cpu"), work, lambda: pauses.append(1)).wait()
    assert torch.allclose(made[0], expected, atol=1e-6)
    assert len(pauses) >= -(-tokens // launched.QUERIES)


def test_what_a_pause_raises_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "PAUSE_EVERY", 0.0)

    def work() -> launched.Finish:
        torch.zeros(1).add(1)
        return dict

    def stop() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        on_device(torch.device("cpu"), work, stop)
