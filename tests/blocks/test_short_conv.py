"""A short convolution of LFM2 against that of transformers, with the same weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from nanoft.attention import SequenceContext
from nanoft.blocks.short_conv import ShortConv


@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_output_is_that_of_transformers(kernel: int) -> None:
    torch.manual_seed(0)
    theirs = Lfm2ShortConv(Lfm2Config(hidden_size=16, conv_L_cache=kernel, conv_bias=False), 0)
    ours = ShortConv(SimpleNamespace(hidden_size=16, conv_kernel=kernel), 0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(x, SequenceContext([])), theirs(x), rtol=1e-5, atol=1e-6)
