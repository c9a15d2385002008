"""Adapters: which one is exported (a weighted sum, some modules), on which base, and as files in PEFT's format."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoft import UserError, __version__
from nanoft.config import Config
from nanoft.config.loading import load_config
from nanoft.export.merge import Onto, copy_tokenizer
from nanoft.export.staging import replaced_directory
from nanoft.export.streaming import StreamedDecoder, open_rows
from nanoft.io.hashing import hash_named_files
from nanoft.io.untrusted import read_json
from nanoft.lora import LoRALinear
from nanoft.model import Decoder
from nanoft.models.adapter_files import NOTE, hash_tensors, read_adapter, save_adapter, select_modules, sum_adapters
from nanoft.models.hub import TOKENIZER_FILES
from nanoft.models.open import LoadedModel, TrainedAdapter, attach_adapter, find_adapter, is_run, read_trained_adapter
from nanoft.models.weights import (
    base_files,
    copy_companions,
    quantization_of,
    save_model,
    stored_dtype,
    stored_quantization,
)


def is_lora_run(source: str) -> bool:
    return is_run(source) and load_config(Path(source) / "config.json").training.method == "lora"


def require_adapter(source: str) -> None:
    """Refuse a source that cannot have an adapter, before anything is loaded."""
    if find_adapter(source) is None and not is_run(source):
        raise UserError(f"{source}: no adapter here: give a LoRA run or an adapter directory")
    if find_adapter(source) is None and not is_lora_run(source):
        raise UserError(f"{source}: this run trained every parameter: its result is a complete model, in model/")


def choose_adapter(
    sources: Sequence[str], weights: str | None, only: str | None, onto: str, unmerge: str | None
) -> tuple[TrainedAdapter, list[str]]:
    """The adapter that sources, --weights, --only and --unmerge describe; and the hash of each source."""
    adapters = [read_trained_adapter(source) for source in sources]
    for adapter in adapters:  # an adapter that is exported as it is is not verified later
        if broken := next((name for name, tensor in adapter.tensors.items() if not tensor.isfinite().all()), None):
            raise UserError(f"{adapter.place}: {broken} contains NaN or infinity: export an earlier checkpoint")
    factors, modules = parse_weights(weights, len(adapters)), only.split(",") if only else []
    hashes = [hash_tensors(adapter.tensors) for adapter in adapters]
    if unmerge:
        _require_unmergeable(Path(unmerge), adapters, hashes)
        return combine(adapters, [-factor for factor in factors], modules, Path(unmerge)), hashes
    chosen = combine(adapters, factors, modules)
    if onto == "nf4" and chosen.quantization is None and stored_quantization(chosen.base) is None:
        raise UserError(f"--base nf4: {sources[0]} was trained on the original weights: remove --base")
    return chosen, hashes


def parse_weights(text: str | None, count: int) -> list[float]:
    """The numbers of --weights, one for each adapter; 1 each by default."""
    try:
        weights = [float(part) for part in text.split(",")] if text is not None else [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise UserError(f"--weights: {text!r:.60}: give {count} numbers, one for each adapter, such as 0.7,0.3")
    return weights


def require_same_base(adapter: TrainedAdapter) -> None:
    """Refuse a base that the adapter fits, but whose files are not those that it was trained on."""
    if adapter.base_sha256 and hash_named_files(base_files(adapter.base)) != adapter.base_sha256:
        raise UserError(
            f"{adapter.base}: its files are not those that {adapter.place} was trained on (SHA-256 differs): "
            "restore them, or add --any-base"
        )


def fingerprint(asked: dict[str, Any], adapter: TrainedAdapter, hashes: list[str]) -> str:
    """Identifies an export, in 16 hex digits: the same for the same command on the same files."""
    base = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in base_files(adapter.base)]
    text = json.dumps([__version__, asked, hashes, str(adapter.base.resolve()), base])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require_unmergeable(directory: Path, adapters: Sequence[TrainedAdapter], hashes: Sequence[str]) -> None:
    """Refuse to subtract what was not merged, or what cannot be subtracted."""
    if not directory.is_dir():
        raise UserError(f"--unmerge: {directory}: no such directory: give a merged model")
    for adapter in adapters:
        if adapter.lora.bias != "none":
            raise UserError(f"--unmerge: {adapter.place} replaced biases, which only the base has: use the base")
    if (directory / "provenance.json").is_file():
        recorded = json.dumps(read_json(directory / "provenance.json").get("adapters"))
        if not all(digest in recorded for digest in hashes):
            raise UserError(f"--unmerge: {directory} was not merged from {adapters[0].place}: see its provenance.json")


def combine(
    adapters: Sequence[TrainedAdapter], weights: Sequence[float], only: Sequence[str], base: Path | None = None
) -> TrainedAdapter:
    """The weighted sum of adapters, or some modules of it.

    Args:
        only: modules, written like lora.target_modules; empty: all.
        base: another base than their own.
    Raises:
        UserError: they have different bases, or a kind that cannot be summed, or `only` matches nothing.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if other.base.resolve() != first.base.resolve():
            raise UserError(
                f"{other.place}: its base is {other.base_name}, not {first.base_name}: they cannot be summed"
            )
    lora, tensors = first.lora, first.tensors
    if len(adapters) > 1 or weights[0] != 1:
        files = open_rows(base or first.base)

        def base_bias(module: str) -> Tensor | None:
            return files.whole(f"{module}.bias") if f"{module}.bias" in files.shapes else None

        lora, tensors = sum_adapters([(a.lora, a.tensors) for a in adapters], weights, base_bias)
    if only:
        lora, tensors = select_modules(lora, tensors, only)
    same = all((a.quantization, a.dtype) == (first.quantization, first.dtype) for a in adapters)
    quantization = first.quantization if same and base is None else None
    return replace(first, lora=lora, tensors=tensors, quantization=quantization, base=base or first.base)


def open_adapter(adapter: TrainedAdapter, onto: Onto) -> LoadedModel:
    """An adapter on its base, whose weights stay on the disk.

    Raises:
        UserError: the adapter does not fit the base.
    """
    quantization = adapter.quantization if onto == "nf4" else None
    opened = attach_adapter(adapter, StreamedDecoder(open_rows(adapter.base, quantization, adapter.dtype)))
    return replace(opened, step=adapter.step)


# ---- Files


def save_result(
    run: Path,
    model: Decoder,
    adapters: dict[str, LoRALinear],
    base: Path,
    config: Config,
    step: int,
    dtype: torch.dtype,
) -> Path:
    """The result of a run with its tokenizer: `run`/adapter in PEFT's format, or `run`/model in Hugging Face's.

    It replaces an earlier result when it is complete. A full model is stored in its base's dtype.

    Args:
        base: directory of the model that training started from.
        step: of the checkpoint that the weights are from.
        dtype: compute dtype of training, recorded with an adapter.
    """
    out = run / ("adapter" if adapters else "model")
    with replaced_directory(out) as staging:
        if adapters:
            base_sha256 = None
            with suppress(UserError, AttributeError):
                base_sha256 = read_json(run / "config.json").get("provenance", {}).get("base_sha256")
            note = _note(quantization_of(config), dtype, step, base_sha256)
            save_adapter(staging, model, adapters, config.lora, config.model.name, note)
            copy_companions(base, staging)
        else:
            save_model(model, base, staging, stored_dtype(base))
    return out


def write_peft(out: Path, opened: LoadedModel, adapter: TrainedAdapter) -> None:
    """An opened adapter in PEFT's format, with the tokenizer."""
    note = _note(adapter.quantization, adapter.dtype, adapter.step, adapter.base_sha256)
    save_adapter(out, opened.model, opened.adapters, adapter.lora, adapter.base_name, note)
    copy_tokenizer(opened, out)


def _note(
    form: tuple[str, bool] | None, dtype: torch.dtype, step: int | None, base_sha256: str | None
) -> dict[str, Any]:
    """What PEFT's format does not record; see nanoft/models/adapter_files.py."""
    return {
        "quantization": dict(zip(("type", "double"), form, strict=True)) if form else None,
        "dtype": str(dtype).removeprefix("torch."),
        **({} if step is None else {"step": step}),
        **({"base_sha256": base_sha256} if base_sha256 else {}),
    }


def copy_adapter(source: Path, out: Path) -> None:
    """Copy an adapter directory, which is in PEFT's format already: validated, and without unrelated files."""
    read_adapter(source)
    for name in ("adapter_model.safetensors", "adapter_config.json", NOTE, *TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
