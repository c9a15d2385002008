"""Weights that bitsandbytes packed and transformers saved: the tensors in a file, and the linear of these tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nanoft import UserError
from nanoft.io.untrusted import parse_json
from nanoft.nf4 import BLOCK, CODES, NESTED, Linear4bit, Linear8bit

MAX_NOTE = 4096  # bytes of the JSON that bitsandbytes stores beside a weight; it needs 200


def stored_tensors(
    shape: tuple[int, ...], quantization: tuple[str, bool]
) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """What a file holds of a packed linear: name after the module's -> number format and shape (None: any)."""
    (kind, double), weights = quantization, math.prod(shape)
    if kind == "int8":
        return {"weight": ("I8", shape), "SCB": ("F32", shape[:1])}
    blocks = weights // BLOCK
    tensors: dict[str, tuple[str, tuple[int, ...] | None]] = {
        "weight": ("U8", (weights // 2, 1)),
        "weight.absmax": ("U8" if double else "F32", (blocks,)),
        "weight.quant_map": ("F32", (16,)),
        f"weight.quant_state.bitsandbytes__{kind}": ("U8", None),  # JSON
    }
    if double:
        tensors["weight.nested_absmax"] = ("F32", (math.ceil(blocks / NESTED),))
        tensors["weight.nested_quant_map"] = ("F32", (256,))
    return tensors


def read_stored(
    tensors: dict[str, Tensor], shape: tuple[int, ...], quantization: tuple[str, bool], dtype: torch.dtype
) -> Linear4bit | Linear8bit:
    """The linear, (out, in), of the tensors that `stored_tensors` names; for 8 bits, a `weight_format` as well."""
    kind, double = quantization
    if kind == "int8":
        if (tensors.get("weight_format", torch.tensor(0)) != 0).any():
            raise UserError("weight_format: not in rows: save the model again with bitsandbytes 0.45 or newer")
        return Linear8bit.of_parts([tensors["weight"], tensors["SCB"]], shape, kind, dtype)
    offset = _check_note(tensors[f"weight.quant_state.bitsandbytes__{kind}"], shape, quantization)
    if not torch.allclose(tensors["weight.quant_map"].cpu(), torch.tensor(CODES[kind]), atol=1e-4):
        raise UserError(f"weight.quant_map: not the code points of {kind}")
    scales = [tensors["weight.absmax"]]
    if double:
        scales += [tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"]]
        scales += [torch.tensor(offset, dtype=torch.float32, device=scales[0].device)]
    return Linear4bit.of_parts([tensors["weight"], *scales], shape, kind, dtype)


def _check_note(note: Tensor, shape: tuple[int, ...], quantization: tuple[str, bool]) -> float:
    """The mean that was taken from the scales, out of the note beside a 4-bit weight."""
    try:
        said = parse_json(note[:MAX_NOTE].cpu().numpy().tobytes())
    except ValueError:
        raise UserError("weight.quant_state: damaged: fetch or copy the model again") from None
    (kind, double), said = quantization, said if isinstance(said, dict) else {}
    expected: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "shape": list(shape)}
    if double:
        expected |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
    for name, wanted in expected.items():
        if said.get(name) != wanted:
            raise UserError(f"weight.quant_state: {name} is {said.get(name)!r:.60} instead of {wanted!r}")
    offset: Any = said.get("nested_offset") if double else 0.0
    if type(offset) not in (int, float) or not abs(offset) < torch.finfo(torch.float32).max:
        raise UserError(f"weight.quant_state: nested_offset: {offset!r:.60} is no number")
    return float(offset)
