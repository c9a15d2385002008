"""An adapter merged into its base, as a model that any engine loads.

W' = W + scaling B A (with DoRA, rows rescaled to length m), and trained biases replace the old ones. The arithmetic is
float32, a few rows at a time, straight from the base's shards to the new ones; the result is rounded once, at the end.
An adapter that was trained on a 4-bit base learned to correct that base, so there are two honest choices for W: the
original weights, or the dequantized 4-bit weights. No model is in memory for any of this: nanoft/export/streaming.py.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from nanoft import UserError
from nanoft.export.staging import PROGRESS, read_progress
from nanoft.export.streaming import Weights, open_rows
from nanoft.io.atomic import hash_file, replace_file, write_file
from nanoft.io.tensor_files import Specs, encode_safetensors
from nanoft.models.open import LoadedModel
from nanoft.models.weights import copy_companions, write_config

Onto = Literal["original", "nf4"]  # the base's original weights, or those of training, dequantized
EXPORT_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHARD_BYTES = 5 * 10**9
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def weights_of(opened: LoadedModel, onto: Onto) -> Weights:
    """The base's weights: as they are stored, or the quantized ones that the adapter was trained on, dequantized."""
    return open_rows(opened.base_directory, opened.quantization if onto == "nf4" else None, opened.dtype)


def merge(
    opened: LoadedModel,
    dtype: torch.dtype,
    onto: Onto,
    out: Path,
    shard_bytes: int | None = None,
    resumable: bool = False,
) -> dict[str, Any]:
    """Write base + adapter as a Hugging Face directory: shards, index, config, tokenizer, generation_config.

    Args:
        opened: the adapter on its base; only the adapter and the base's path are used.
        dtype: of the merged weights.
        out: an existing directory, empty except for finished shards.
        shard_bytes: maximum size of a shard; None: `SHARD_BYTES`.
        resumable: record finished shards in `PROGRESS`, and skip those recorded there whose hash agrees.
    Returns:
        Size in bytes and SHA-256 of each shard.
    Raises:
        UserError: not enough disk space.
    """
    weights = replace(weights_of(opened, onto), adapters=opened.adapters, dtype=dtype)
    shards = _plan_shards(weights, shard_bytes or SHARD_BYTES)
    finished = {
        name: recorded
        for name, recorded in (read_progress(out) if resumable else {}).items()
        if name in shards and (out / name).is_file() and hash_file(out / name) == recorded
    }
    check_room(out, sum(_bytes(specs) for name, specs in shards.items() if name not in finished))
    for name in [name for name in shards if name not in finished]:
        (out / name).unlink(missing_ok=True)
        finished[name] = write_file(out / name, encode_safetensors(shards[name], weights.rows))
        if resumable:
            replace_file(out / PROGRESS, json.dumps(finished).encode())
    if len(shards) > 1:
        total = sum(_bytes(specs) for specs in shards.values())
        weight_map = {tensor: name for name, specs in shards.items() for tensor in specs}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(out / "model.safetensors.index.json", [(json.dumps(index, indent=2) + "\n").encode()])
    write_config(opened.base_directory, out, dtype)
    copy_tokenizer(opened, out)
    return finished


def copy_tokenizer(opened: LoadedModel, out: Path) -> None:
    """The base's tokenizer and generation_config, and the template that the adapter was trained with."""
    copy_companions(opened.base_directory, out)
    template = opened.tokenizer_directory / "chat_template.jinja"
    if template.is_file():
        shutil.copyfile(template, out / "chat_template.jinja")


def _plan_shards(weights: Weights, shard_bytes: int) -> dict[str, Specs]:
    """Which weights go into which new file, in the order of the old ones."""
    shards: list[Specs] = [{}]
    for name, shape in weights.shapes.items():
        added: Specs = {name: (weights.dtype, shape)}
        if shards[-1] and _bytes(shards[-1]) + _bytes(added) > shard_bytes:
            shards.append({})
        shards[-1].update(added)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": specs for i, specs in enumerate(shards, start=1)}


def _bytes(specs: Specs) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


def check_room(out: Path, needed: int) -> None:
    """Refuse before the work what will not fit on the disk."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"--out: needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there: make room")


def parse_size(text: str) -> int:
    """Bytes of 500MB or 5GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip().upper())
    if not found or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise UserError(f"--shard-size: {text!r:.40} is not a size: write one like 500MB or 5GB")
    return size
