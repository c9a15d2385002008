"""Windows and ropes of the layers, against transformers' reading of the same fields."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3TextConfig, Olmo3Config, SmolLM3Config

from nanoft import UserError
from nanoft.blocks.rope import Rope
from nanoft.models.layer_fields import (
    is_positive,
    read_rope,
    read_windows,
    refuse_wrong_types,
    rope_in_some,
    window_but_every,
)


@pytest.mark.parametrize(
    ("config", "every"), [(Gemma3TextConfig(num_hidden_layers=13), 6), (Olmo3Config(num_hidden_layers=10), 4)], ids=str
)
def test_every_layer_has_the_window_that_transformers_gives_it(config: Any, every: int) -> None:
    hf = {"num_hidden_layers": config.num_hidden_layers, "sliding_window": config.sliding_window}
    expected = tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
    assert window_but_every(every, hf, 7) == expected
    assert read_windows({**hf, "layer_types": config.layer_types}, config.sliding_window) == expected


def test_the_layers_that_rotate_are_those_of_transformers() -> None:
    config, rope = SmolLM3Config(num_hidden_layers=9), read_rope({"rope_theta": 5e6})
    assert rope == Rope(5e6, "default", {}, 0, 1.0, 0.0)
    assert [own is not None for own in rope_in_some(rope, config.no_rope_layers)] == [
        bool(rotates) for rotates in config.no_rope_layers
    ]
    with pytest.raises(UserError, match="at least one"):
        rope_in_some(rope, [0, 0])


@pytest.mark.parametrize("value", [0, -1, True, "1", None, float("inf"), float("nan")])
def test_what_is_no_positive_number_is_refused_by_its_field(value: Any) -> None:
    assert not is_positive(value)
    with pytest.raises(UserError, match=r"^residual_multiplier: .* is not a positive number"):
        refuse_wrong_types({"residual_multiplier": value})
