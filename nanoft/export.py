"""An adapter and its base become one model that any engine loads.

Merging is  W' = W + s B A  (in DoRA with rows of length m), and trained biases in the place of the old ones. It is done
in float32, one tensor at a time, straight from the base's shards to the new ones; the result is rounded once, at the
end. An adapter that was trained on a 4-bit base learned to correct that base, so there are two honest choices for W:
the original weights, or the 4-bit weights unpacked. Either way the result is proven before it gets its name: its logits
are compared with those of base and adapter on real prompts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nanoft import UserError
from nanoft.adapter import NOTE, read_adapter, save_adapter
from nanoft.checkpoint import Specs, encode, sync_directory, write_file
from nanoft.config import Config
from nanoft.lora import LoRALinear, disabled
from nanoft.model import Decoder
from nanoft.nf4 import quantize
from nanoft.weights import (
    TOKENIZER_FILES,
    Opened,
    WeightFiles,
    copy_companions,
    is_block_linear,
    load_model,
    open_weights,
    quantization_of,
    save_model,
    stored_dtype,
    write_config,
)

EXPORT_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# How far merged logits may be from adapter logits, as a share of the logits' standard deviation: rounding every weight
# to 8 (bf16) or 11 (f16) significant bits moves the logits by about this much; a wrong merge moves them by whole units.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Proof:
    """Merged against adapter on the same prompts: the largest difference of a logit, and what was allowed."""

    max_difference: float
    allowed: float
    effect: float  # the largest difference that the adapter itself makes, for comparison
    same_top_token: float  # share of positions

    @property
    def holds(self) -> bool:
        return self.max_difference <= self.allowed


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Write into a directory aside that gets its name at the end, or vanishes if anything fails.

    Raises:
        UserError: `out` exists, or cannot be made.
    """
    if os.path.lexists(out):
        raise UserError(f"--out: {out}: exists already: choose another name or remove it")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        with _aside(out) as aside:
            yield aside
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be written: {error}") from None
    finally:
        if not out.exists():
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()  # only if it is empty


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name, and its place, when everything in it is on the disk."""
    aside = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        sync_directory(aside)
        if out.is_dir():
            shutil.rmtree(out)
        os.rename(aside, out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def merge(opened: Opened, dtype: torch.dtype, onto: Literal["original", "nf4"], out: Path) -> None:
    """Write base + adapter as a Hugging Face directory: shards, index, config, tokenizer, generation_config.

    Args:
        opened: the adapter on its base; only the adapter and the base's path are used.
        dtype: of the merged weights.
        onto: the base's original weights, or the quantised ones that the adapter was trained against, unpacked.
        out: an existing, empty directory.
    """
    quantization = opened.quantization if onto == "nf4" else None
    with torch.device("meta"):
        blank = Decoder(opened.model.config)
    files = open_weights(opened.base_directory, blank)
    shards = _plan_shards(files, dtype)
    merged = {f"{name}.weight": adapter.merged for name, adapter in opened.adapters.items()}
    biases = {f"{name}.bias": adapter.bias for name, adapter in opened.adapters.items() if adapter.bias is not None}

    def read(tensor: str) -> Tensor:
        if tensor in biases:
            return biases[tensor].detach().to(dtype)
        weight = _base_weight(files, tensor, quantization, opened.dtype)  # (out, in) float32
        return (merged[tensor](weight) if tensor in merged else weight).to(dtype)

    weight_map = {}
    for number, specs in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(out / name, encode(specs, read))
        weight_map.update(dict.fromkeys(specs, name))
    if len(shards) > 1:
        total = sum(dtype.itemsize * torch.Size(shape).numel() for specs in shards for _, shape in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(out / "model.safetensors.index.json", [(json.dumps(index, indent=2) + "\n").encode()])
    write_config(opened.base_directory, out, dtype)
    copy_companions(opened.base_directory, out)
    template = opened.tokenizer_directory / "chat_template.jinja"
    if template.is_file():  # the one that it was trained with
        shutil.copyfile(template, out / "chat_template.jinja")


def _plan_shards(files: WeightFiles, dtype: torch.dtype) -> list[Specs]:
    """Which weights go into which new file."""
    shards: list[Specs] = [{}]
    size = 0
    for name, shape in files.shapes.items():
        added = torch.Size(shape).numel() * dtype.itemsize
        if size and size + added > SHARD_BYTES:
            shards.append({})
            size = 0
        size += added
        shards[-1][name] = (dtype, shape)
    return shards


def _base_weight(files: WeightFiles, name: str, quantization: tuple[str, bool] | None, compute: torch.dtype) -> Tensor:
    """One weight of the base in float32; a block's linear as its packed form gives it back, if stored so, or asked."""
    if files.is_packed(name):
        return files.read_packed(name, compute, torch.device("cpu")).dequantize().float()
    weight = files.read(name).float()
    if quantization and not files.stored and is_block_linear(name):
        return quantize(weight, quantization, compute).dequantize().float()
    return weight


@torch.no_grad()
def prove(opened: Opened, merged_directory: Path, prompts: list[list[int]], dtype: torch.dtype) -> Proof:
    """Compare the merged model's logits with base + adapter, both computed in float32 on the CPU.

    Args:
        prompts: token ids, none empty, at least one.
    """
    merged = load_model(merged_directory, torch.device("cpu"), torch.float32).eval()
    worst, effect, spread, same, count = 0.0, 0.0, 0.0, 0, 0
    for ids in prompts:
        row = torch.tensor([ids])
        with disabled(opened.adapters):
            base = opened.model.logits(opened.model(row))  # (1, s, vocab)
        wanted, found = opened.model.logits(opened.model(row)), merged.logits(merged(row))
        worst, effect = max(worst, _farthest(found, wanted)), max(effect, _farthest(wanted, base))
        spread, count = max(spread, wanted.std().item()), count + len(ids)
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
    return Proof(worst, TOLERANCE[dtype] * spread, effect, same / count)


def _farthest(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite if a weight became infinite on the way, so that NaN comes out."""
    return (a - b).abs().nan_to_num(nan=math.inf).max().item()


def save_result(
    out: Path,
    model: Decoder,
    adapters: dict[str, LoRALinear],
    base: Path,
    config: Config,
    step: int,
    dtype: torch.dtype,
) -> Path:
    """What a run ends with: `out`/adapter in PEFT's format, or `out`/model in Hugging Face's; with the tokenizer.

    It takes the place of an earlier result when it is complete. A whole model is stored in its base's number format.

    Args:
        base: the directory of the model that training started from.
        step: of the checkpoint that the weights are from.
        dtype: what training computed in; noted with an adapter.
    """
    place = out / ("adapter" if adapters else "model")
    for leftover in out.glob(f".tmp-{place.name}-*"):  # of a process that was killed here
        shutil.rmtree(leftover, ignore_errors=True)
    with _aside(place) as aside:
        if adapters:
            write_adapter(aside, model, adapters, base, config, step, dtype)
        else:
            save_model(model, base, aside, stored_dtype(base))
    return place


def write_adapter(
    out: Path,
    model: Decoder,
    adapters: dict[str, LoRALinear],
    base: Path,
    config: Config,
    step: int,
    dtype: torch.dtype,
) -> None:
    """The adapter of a run in PEFT's format, with the tokenizer; see `save_result`."""
    form = quantization_of(config)
    note = {
        "quantization": dict(zip(("type", "double"), form, strict=True)) if form else None,
        "dtype": str(dtype).removeprefix("torch."),
        "step": step,
    }
    save_adapter(out, model, adapters, config.lora, config.model.name, note)
    copy_companions(base, out)


def copy_adapter(source: Path, out: Path) -> None:
    """An adapter directory as it is, for it is in PEFT's format already; checked, and without what else lies there."""
    read_adapter(source)
    for name in ("adapter_model.safetensors", "adapter_config.json", NOTE, *TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
