"""Four-bit linears against bitsandbytes' own layer and against the published code book."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from nanoft import UserError
from nanoft.nf4 import Linear4bit, packed_bytes

# QLoRA (Dettmers et al. 2023), appendix E: the 16 values of NF4.
NF4_VALUES = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def weight(rows: int = 96, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def test_dequantised_nf4_is_the_nearest_code_point_times_absmax() -> None:
    w = weight()
    layer = Linear4bit(w, None, "nf4", False, torch.float32)
    blocks = w.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(NF4_VALUES)
    nearest = codes[(blocks / scale)[..., None].sub(codes).abs().argmin(-1)] * scale
    assert (layer.dequantize().reshape(-1, 64) - nearest).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_input_gradient_equal_bitsandbytes(kind: str, double: bool, dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    ours = Linear4bit(w, None, kind, double, dtype)
    theirs = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type=kind)
    theirs.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, compress_statistics=double, quant_type=kind)
    theirs = theirs.to("cpu")
    x = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert torch.allclose(ours(a), theirs(b), atol=tolerance)
    ours(a).square().sum().backward()
    theirs(b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad, atol=tolerance, rtol=tolerance)


def test_backward_keeps_the_packed_weight_only() -> None:
    layer = Linear4bit(weight(), None, "nf4", True, torch.float32)
    x = torch.randn(3, 128, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() for t in saved) == 0
    assert packed_bytes(layer) < 96 * 128 * 0.53 + 2048  # 4.13 bits a weight and two small code books


def test_bias_is_added_and_nothing_trains() -> None:
    bias = torch.arange(96.0)
    with_bias, without = (Linear4bit(weight(), b, "nf4", True, torch.float32) for b in (bias, None))
    x = torch.randn(2, 128)
    assert torch.equal(with_bias(x), without(x) + bias)
    assert not any(p.requires_grad for p in with_bias.parameters())


def test_a_weight_that_does_not_fill_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 64"):
        Linear4bit(torch.randn(3, 5), None, "nf4", True, torch.float32)
