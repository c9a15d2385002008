"""Double quantization (QLoRA, section 3): the scales of 4-bit blocks, in 8 bits, as bitsandbytes stores them.

The scales, less their mean, are cut into blocks of 256. Each block is divided by its largest magnitude, and every value
is replaced by the nearest of 256 values of a dynamic map.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

NESTED = 256  # scales that share a scale of their own


def pack_scales(absmax: Tensor) -> list[Tensor]:
    """Double quantization: absmax less its mean, in blocks of 256, as 8-bit codes of a dynamic map.

    Returns:
        codes (blocks,) uint8, their blocks' scales (blocks / 256,), the map (256,), the mean ().
    """
    device, absmax = absmax.device, absmax.cpu()  # on other devices the mean differs in its last bit
    offset = absmax.mean()
    values = F.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    nested = values.abs().amax(1)
    scaled = (values * (1 / nested.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    table = _nearest_dynamic()
    codes = table[((scaled + 1) * 0.5 * (len(table) - 1) + 0.5).int()]  # nearest, up to the grid's rounding
    codes = (codes * (nested > 0)[:, None]).flatten()[: len(absmax)]
    return [part.to(device) for part in (codes, nested, dynamic_map(), offset)]


def unpack_scales(codes: Tensor, nested: Tensor, values: Tensor, offset: Tensor) -> Tensor:
    """The inverse, (..., blocks) float32, with a mean and nested scales for each of several weights, and one map."""
    scales = nested.repeat_interleave(NESTED, dim=-1)[..., : codes.shape[-1]]
    return torch.index_select(values, 0, codes.flatten().int()).view_as(codes) * scales + offset[..., None]


@functools.cache
def dynamic_map() -> Tensor:
    """256 values in [-1, 1] with more digits near one, more range near zero (Dettmers 2015, 8-bit Approximations)."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [means, -means]
    return torch.cat(values).sort().values


@functools.cache
def _nearest_dynamic() -> Tensor:
    """The code of the nearest value of the dynamic map for each of 65,536 points from -1 to 1."""
    points, values = -1 + 2 * torch.arange(65536) / 65535, dynamic_map()
    return torch.bucketize(points, (values[:-1] + values[1:]) * 0.5).to(torch.uint8)
