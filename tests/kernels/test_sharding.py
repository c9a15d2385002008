"""Models that are split over ranks: tests/runtime/test_distributed.py trains them; here is what one process sees."""

from __future__ import annotations

import torch

from nanoft.kernels import sharding


def test_what_is_not_split_is_left_as_it_is() -> None:
    linear = torch.nn.Linear(2, 2)
    assert sharding.unsharded([linear], lambda block: block) is None
    sharding.reshard(linear)
    assert type(linear.weight) is torch.nn.Parameter
