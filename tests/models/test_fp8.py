"""Weights in FP8: each code times the scale of its block, against the formula written out with loops."""

from __future__ import annotations

import pytest
import torch

from nanoft import UserError
from nanoft.models.fp8 import dequantize, grid, read_block, shared_by


@pytest.mark.parametrize("scales", [(2, 3), (5, 1), (1, 1), ()], ids=["blocks", "rows", "one", "scalar"])
@pytest.mark.parametrize("rows", [slice(0, 5), slice(2, 4)])
def test_a_weight_is_its_codes_times_their_scales(scales: tuple[int, ...], rows: slice) -> None:
    """A weight of 5 x 8 in blocks of 3 x 3: those at the ends are smaller."""
    generator = torch.Generator().manual_seed(0)
    codes = (100 * torch.randn(5, 8, generator=generator)).to(torch.float8_e4m3fn)
    scale, block = torch.rand(scales, generator=generator), (3, 3)
    expected = torch.empty(5, 8)
    for i in range(5):
        for j in range(8):
            own = {(2, 3): (i // 3, j // 3), (5, 1): (i, 0), (1, 1): (0, 0), (): ()}[scales]
            expected[i, j] = float(codes[i, j]) * float(scale[own])
    assert grid((5, 8), scales, block) == scales
    found = dequantize(codes[rows], scale, shared_by((5, 8), scales, block), rows.start)
    assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("block", [5, [128], [128, 0], ["a", 1], [128, True]])
def test_a_block_is_two_sizes(block: object) -> None:
    assert read_block({}) == (128, 128)
    with pytest.raises(UserError, match=r"^quantization_config: weight_block_size: .* is not two sizes"):
        read_block({"weight_block_size": block})
