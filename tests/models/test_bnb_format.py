"""The names, number formats and shapes in which bitsandbytes stores a packed linear."""

from __future__ import annotations

import bitsandbytes.functional
import pytest
import torch

from nanoft.models.weights import read_stored, stored_tensors


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_linear_is_read_from_what_bitsandbytes_writes(kind: str, double: bool) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    tensors = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    formats = {"U8": torch.uint8, "F32": torch.float32}
    expected = stored_tensors((96, 64), (kind, double))
    assert tensors.keys() == expected.keys()
    for name, (number_format, shape) in expected.items():
        assert tensors[name].dtype == formats[number_format], name
        assert shape is None or tensors[name].shape == shape, name
    linear = read_stored(tensors, (96, 64), (kind, double), torch.float32)
    assert torch.equal(linear.dequantize(), bitsandbytes.functional.dequantize_4bit(packed, state))
