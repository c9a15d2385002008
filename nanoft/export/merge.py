"""Merge an adapter into its base, as a model that any engine loads; the adapter may be a weighted sum, or some modules.

W' = W + scaling B A (with DoRA, rows rescaled to length m), and trained biases replace the old ones. The arithmetic is
float32, a few rows at a time, directly from the base's shards to the new ones; the result is rounded once, at the end.
An adapter that was trained on a 4-bit base has learned to correct that base, so there are two valid choices for W: the
original weights, or the dequantized 4-bit weights. No model is held in memory for this: nanoft/export/streaming.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from nanoft import UserError, __version__
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.config.loading import load_config
from nanoft.data.tokenizer_files import TEMPLATE_FILE
from nanoft.export.streaming import StreamedDecoder, Weights, open_rows
from nanoft.io import atomic
from nanoft.io.bars import track
from nanoft.io.tensor_files import encode_safetensors, one_by_one
from nanoft.io.untrusted import read_json, read_json_or_empty
from nanoft.model import Decoder
from nanoft.models.adapter_files import hash_tensors, save_adapter, select_modules, sum_adapters, vocabulary_of
from nanoft.models.model_files import ModelFiles, Quantization, base_files, quantization_of
from nanoft.models.open import LoadedModel, TrainedAdapter, attach_adapter, find_adapter, is_run, read_trained_adapter
from nanoft.models.weights import copy_companions, describe_score, save_model, with_towers, write_config

Onto = Literal["original", "nf4"]  # the base's original weights, or the dequantized weights of training
EXPORT_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def weights_of(opened: LoadedModel, onto: Onto) -> Weights:
    """The base's weights, as stored or as in the adapter's training."""
    weights = open_rows(opened.base_directory, opened.quantization if onto == "nf4" else None, opened.dtype)
    return replace(weights, config=opened.model.config)


def merge(
    opened: LoadedModel, dtype: torch.dtype, onto: Onto, out: Path, shard_size: str = "5GB", resumable: bool = False
) -> dict[str, Any]:
    """Write base + adapter as a Hugging Face directory: shards, index, config, tokenizer, generation_config.

    `out` is empty except for finished shards; `resumable`: record them in `PROGRESS`, and skip recorded shards whose
    hash matches. Returns size in bytes and SHA-256 of each shard.
    """
    weights = replace(weights_of(opened, onto), adapters=opened.adapters, dtype=dtype)
    tensors, read = with_towers(ModelFiles.read(opened.base_directory), weights.shapes, dtype, weights.rows)
    try:
        split = split_state_dict_into_shards_factory(
            tensors, get_storage_size=_bytes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
        )
    except ValueError:
        raise UserError(f"--shard-size: {shard_size!r:.40} is not a size: write one like 500MB or 5GB") from None
    files = {name: {tensor: tensors[tensor] for tensor in own} for name, own in split.filename_to_tensors.items()}
    finished = {
        name: recorded
        for name, recorded in (read_json_or_empty(out / atomic.PROGRESS) if resumable else {}).items()
        if name in files and (out / name).is_file() and atomic.hash_file(out / name) == recorded
    }
    missing = [name for name in files if name not in finished]
    check_room(out, sum(_bytes(spec) for name in missing for spec in files[name].values()))
    for name in missing:
        (out / name).unlink(missing_ok=True)
        size = sum(_bytes(spec) for spec in files[name].values())
        written = track(encode_safetensors(files[name], read), f"merging {name}", "B", size, len)
        finished[name] = atomic.write_file(out / name, written)
        if resumable:
            atomic.replace_file(out / atomic.PROGRESS, json.dumps(finished).encode())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        atomic.write_json(out / "model.safetensors.index.json", index)
    write_config(opened.base_directory, out, dtype, opened.model.config)
    copy_tokenizer(opened, out)
    describe_score(out, opened.model.config)
    return finished


def copy_tokenizer(opened: LoadedModel, out: Path) -> None:
    """The tokenizer, template and stop ids of training, and the base's other generation settings."""
    copy_companions(opened.tokenizer_directory, out, opened.base_directory, opened.add_tokens)


def _bytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return spec[0].itemsize * math.prod(spec[1])


def check_room(out: Path, needed: int) -> None:
    """Raise a UserError, before the work starts, if the output does not fit on the disk."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"--out: needs {needed / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free: free disk space")


# ---- Which adapter


def is_lora_run(source: str) -> bool:
    return is_run(source) and load_config(Path(source) / "config.json").training.method == "lora"


def require_adapter(source: str) -> None:
    """Refuse a source that cannot have an adapter, before anything is loaded."""
    if find_adapter(source) is not None or is_lora_run(source):
        return
    if not is_run(source):
        raise UserError(f"{source}: no adapter here: give a LoRA run or an adapter directory")
    raise UserError(f"{source}: this run trained every parameter: use its complete model in {source}/model")


def choose_adapter(args: argparse.Namespace) -> tuple[TrainedAdapter, list[dict[str, Any]]]:
    """The adapter that the arguments of merge.py describe; and source, SHA-256 and weight of each term of the sum."""
    adapters = [read_trained_adapter(source, args.base_model) for source in args.sources]
    for adapter in adapters:  # adapters that are not merged are not verified later
        if broken := next((name for name, tensor in one_by_one(adapter.tensors) if not tensor.isfinite().all()), None):
            raise UserError(f"{adapter.place}: {broken} contains NaN or infinity: export an earlier checkpoint")
    factors, modules = parse_weights(args.weights, len(adapters)), args.only.split(",") if args.only else []
    hashes = [hash_tensors(adapter.tensors) for adapter in adapters]
    parts = zip(args.sources, hashes, factors, strict=True)
    summed = [{"source": source, "sha256": digest, "weight": factor} for source, digest, factor in parts]
    if modules and any("score" in adapter.lora.modules_to_save for adapter in adapters):
        raise UserError(f"--only: {args.only}: a reward model needs its scalar head: remove it")
    if args.unmerge:  # the adapter must have been merged, and must be subtractable
        directory = Path(args.unmerge)
        if not directory.is_dir():
            raise UserError(f"--unmerge: {directory}: no such directory: give a merged model")
        if biased := next((adapter.place for adapter in adapters if adapter.lora.bias != "none"), None):
            raise UserError(f"--unmerge: {biased} replaced biases, which cannot be restored: use the base")
        record = directory / "provenance.json"
        recorded = json.dumps(read_json(record).get("adapters")) if record.is_file() else None
        if recorded is not None and not all(digest in recorded for digest in hashes):
            raise UserError(f"--unmerge: {directory} was not merged from {adapters[0].place}: see its provenance.json")
        return combine(adapters, [-factor for factor in factors], modules, directory), summed
    chosen = combine(adapters, factors, modules)
    files = ModelFiles.read(chosen.base)
    for note in files.notes:
        print(f"warning: {note}", file=sys.stderr)
    if args.base == "nf4" and chosen.quantization is None and files.quantization is None:
        raise UserError(f"--base nf4: {args.sources[0]} was trained on the original weights: remove --base")
    return chosen, summed


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
    """Refuse a base that fits the adapter, but whose files differ from those in its training."""
    if adapter.base_sha256 and atomic.hash_files(base_files(adapter.base)) != adapter.base_sha256:
        raise UserError(
            f"{adapter.base}: its files are not those that {adapter.place} was trained on (SHA-256 differs): "
            "restore them, or add --any-base"
        )


def fingerprint(asked: dict[str, Any], adapter: TrainedAdapter, summed: list[dict[str, Any]]) -> str:
    """16 hex digits, the same for the same command on the same files."""
    base = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in base_files(adapter.base)]
    text = json.dumps([__version__, asked, summed, str(adapter.base.resolve()), base])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def combine(
    adapters: Sequence[TrainedAdapter], weights: Sequence[float], only: Sequence[str], base: Path | None = None
) -> TrainedAdapter:
    """The weighted sum of adapters of one base, or only the modules that `only` names; `base`: replaces their base."""
    first = adapters[0]
    for other in adapters[1:]:
        if other.base.resolve() != first.base.resolve():
            raise UserError(
                f"{other.place}: its base is {other.base_name}, not {first.base_name}: sum adapters of one base only"
            )
    lora, tensors = first.lora, first.tensors
    if len(adapters) > 1 or weights[0] != 1:
        lora, tensors = sum_adapters([(a.lora, a.tensors) for a in adapters], weights)
    if only:
        lora, tensors = select_modules(lora, tensors, only)
    same = all((a.quantization, a.dtype) == (first.quantization, first.dtype) for a in adapters)
    quantization = first.quantization if same and base is None else None
    return replace(first, lora=lora, tensors=tensors, quantization=quantization, base=base or first.base)


def open_adapter(adapter: TrainedAdapter, onto: Onto) -> LoadedModel:
    """An adapter on its base, whose weights stay on disk; a UserError if it does not fit."""
    quantization = adapter.quantization if onto == "nf4" else None
    rows = open_rows(adapter.base, quantization, adapter.dtype, vocabulary_of(adapter.lora, adapter.tensors))
    return attach_adapter(adapter, StreamedDecoder(rows), views=True)


def save_result(
    run: Path, model: Decoder, adapters: dict[str, Adapter], base: Path, config: Config, step: int,
    dtype: torch.dtype, tokenizer: Path | None = None,
) -> Path:  # fmt: skip
    """The result of a run with its tokenizer: `run`/adapter in PEFT's format, or `run`/model in Hugging Face's.

    It replaces an earlier result once it is complete. `base`: the model that training started from, in whose dtype a
    full model is stored; `step`: that of the weights; `dtype`: that of training; `tokenizer`: its directory.
    """
    out = run / ("adapter" if adapters else "model")
    with atomic.new_directory(out, replace=True) as staging:
        if adapters:
            base_sha256 = read_json_or_empty(run / "config.json").get("provenance", {}).get("base_sha256")
            note = _note(quantization_of(config), dtype, step, base_sha256)
            save_adapter(staging, model, adapters, config.lora, config.model.reference, note)
            copy_companions(tokenizer or base, staging, base, config.model.add_tokens)
        else:
            save_model(model, base, staging, ModelFiles.read(base).dtype())
        save_template(run, staging)
    return out


def save_template(run: Path, out: Path) -> None:
    """Save the template of model.chat_template, if the run has one, instead of the model's own templates."""
    if is_run(run) and (run / TEMPLATE_FILE).is_file():
        shutil.rmtree(out / "additional_chat_templates", ignore_errors=True)
        shutil.copyfile(run / TEMPLATE_FILE, out / TEMPLATE_FILE)


def write_peft(out: Path, opened: LoadedModel, adapter: TrainedAdapter) -> None:
    """An opened adapter in PEFT's format, with the tokenizer."""
    note = _note(adapter.quantization, adapter.dtype, None, adapter.base_sha256)
    save_adapter(out, opened.model, opened.adapters, adapter.lora, adapter.base_name, note)
    copy_tokenizer(opened, out)


def _note(form: Quantization | None, dtype: torch.dtype, step: int | None, base_sha256: str | None) -> dict[str, Any]:
    """The content of nanoft.json: what PEFT's format does not record."""
    return {
        "quantization": dict(zip(("type", "double"), form, strict=True)) if form else None,
        "dtype": str(dtype).removeprefix("torch."),
        **({} if step is None else {"step": step}),
        **({"base_sha256": base_sha256} if base_sha256 else {}),
    }
