"""Open a run, an adapter or a model that a user names as a decoder that is ready to use.

A run stands for its result: adapter/ on the base it was trained on (quantized as in training), or model/ after full
fine-tuning; without a result, for its best checkpoint. Adapters, models and Hub names are loaded unchanged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from nanoft import UserError, kernels
from nanoft.blocks.trained import Adapter, is_inside
from nanoft.checkpoint import Checkpoint, CheckpointCorrupted, CheckpointManager, verify
from nanoft.config import LoRAConfig
from nanoft.config.loading import load_config, load_file
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.tokenizer_files import TEMPLATE_FILE
from nanoft.io.hub import use_cache
from nanoft.io.tensor_files import load_tensors
from nanoft.io.untrusted import read_json
from nanoft.lora import inject_lora, make_lora
from nanoft.model import Decoder
from nanoft.models.adapter_files import (
    NOTE,
    as_plain_lora,
    fit_experts,
    load_adapter_tensors,
    make_views,
    read_adapter,
    vocabulary_of,
)
from nanoft.models.model_files import ModelFiles, Quantization, find_model, quantization_of
from nanoft.models.weights import add_score, grow_vocabulary, load_model
from nanoft.runtime.device import DTYPES


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter read from an adapter directory or from a checkpoint."""

    place: Path  # of its tensors, for messages
    base: Path
    base_name: str  # a directory or a Hub name, from the run's config or the adapter
    tokenizer: Path
    lora: LoRAConfig
    tensors: dict[str, Tensor]
    quantization: Quantization | None  # of the base in training
    dtype: torch.dtype  # of training
    base_sha256: str | None = None  # of the base's files in training, if known
    step: int | None = None  # of the checkpoint, if the run has no result yet
    add_tokens: tuple[str, ...] = ()  # tokens that `tokenizer` does not have yet


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to use, and how its adapter was trained."""

    model: Decoder
    adapters: dict[str, Adapter]  # empty for a plain model
    base_directory: Path
    tokenizer_directory: Path
    quantization: Quantization | None = None  # of the base in training
    dtype: torch.dtype = torch.float32  # of training
    step: int | None = None  # of the checkpoint, if the run has no result yet
    add_tokens: tuple[str, ...] = ()  # tokens that the tokenizer's directory does not have yet


def open_chat_tokenizer(source: str, opened: LoadedModel, as_trained: bool = False) -> ChatTokenizer:
    """A model's tokenizer and template, with the arguments of its run and, with `as_trained`, the run's date."""
    if not is_run(source):
        return ChatTokenizer(opened.tokenizer_directory)
    path, own = Path(source) / "config.json", Path(source) / TEMPLATE_FILE
    config = load_file(path)
    if own.is_file():  # as model.chat_template was when the run began
        config = config.override(model={"chat_template": str(own)})
    chat = ChatTokenizer.from_config(opened.tokenizer_directory, config)
    date = read_json(path).get("provenance", {}).get("date")
    if as_trained and date is not None:
        try:
            chat.date = datetime.fromisoformat(date)
        except (TypeError, ValueError):
            raise UserError(f"{path}: provenance.date: {date!r:.60} is not a date: the file is corrupted") from None
    return chat


def open_model(
    source: str, device: torch.device, dtype: torch.dtype, original_base: bool = False, plain: bool = False
) -> LoadedModel:
    """Load what a RUN, ADAPTER or MODEL argument names; `original_base`: not quantized; `plain`: without kernels."""
    if not source:
        raise UserError("RUN|MODEL: empty: give a run directory, a model directory or a Hub name")
    run, lora, path, config = Path(source), None, find_adapter(source), None
    if path is None and is_run(source) and not (run / "model").is_dir():
        config = load_file(run / "config.json")
    if path is not None or (config is not None and config.training.method != "full"):
        adapter = read_trained_adapter(source)
        quantization = None if original_base else adapter.quantization
        model = load_model(adapter.base, device, dtype, quantization, unpacked_dtype=adapter.dtype)
        opened, lora = attach_adapter(adapter, model), adapter.lora
    elif config is not None:  # a checkpoint of full fine-tuning has all weights
        saved, base = best_checkpoint(run), find_model(config.model.reference)
        model = load_model(base, device, dtype, files=[saved.path / "model.safetensors"]).eval()
        opened = LoadedModel(model, {}, base, base, dtype=dtype, step=checkpoint_step(saved))
    else:
        base = find_model(str(run / "model") if is_run(source) else source, "RUN|MODEL")
        opened = LoadedModel(load_model(base, device, dtype).eval(), {}, base, base, dtype=dtype)
    warnings = [None if plain else kernels.apply(opened.model, lora), *ModelFiles.read(opened.base_directory).notes]
    for warning in filter(None, warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return opened


def use_cache_of(source: str) -> None:
    """Download into the cache of a run (its model.cache_dir), if `source` is a run or the adapter in one."""
    run = run_of(source)
    use_cache(load_config(run / "config.json").model.cache_dir if run else "")


def run_of(source: str) -> Path | None:
    """The run directory that is `source` or contains the adapter `source`; None if there is none."""
    return next((place for place in (Path(source), Path(source).parent) if is_run(place)), None)


def is_run(source: str | Path) -> bool:
    """Whether a directory is a run directory: it has checkpoints/ and a config.json that is not a model's."""
    path = Path(source) / "config.json"
    if not path.is_file() or not (path.parent / "checkpoints").is_dir():
        return False
    with suppress(UserError):  # damage is reported where the file is read
        return not {"architectures", "model_type"} & read_json(path).keys()
    return True


def find_adapter(source: str) -> Path | None:
    """The adapter directory that a RUN or ADAPTER argument names, or None."""
    path = Path(source)
    candidates = [path / "adapter", path] if is_run(path) else [path]
    return next((c for c in candidates if os.path.isfile(c / "adapter_config.json")), None)


def best_checkpoint(run: Path) -> Checkpoint:
    """The checkpoint in best.json, or without one the newest valid one, all hashes verified; else a UserError."""
    best = run / "best.json"
    if not best.is_file():
        newest, _ = CheckpointManager(run / "checkpoints", keep=0, owner=False).newest()
        if newest is None:
            raise UserError(f"{run}: this run has no checkpoint yet: run its train.py command again")
        return newest
    try:
        return verify(run / "checkpoints" / Path(str(read_json(best).get("checkpoint"))).name)
    except (CheckpointCorrupted, OSError) as reason:
        raise UserError(f"{reason}: remove {best} to use the newest valid checkpoint") from None


def checkpoint_step(saved: Checkpoint) -> int:
    """The optimizer step of a checkpoint."""
    step = saved.state.get("step")
    if type(step) is not int:
        raise UserError(f"{saved.path / 'state.json'}: step: {step!r:.60} is not an integer: train again")
    return step


def read_trained_adapter(source: str, base: str | None = None) -> TrainedAdapter:
    """The adapter that a RUN or ADAPTER argument names: a run's result or best checkpoint, or an adapter directory.

    `base` replaces the base that it names.
    """
    path = find_adapter(source)
    return _read_checkpoint(Path(source), base) if path is None else _read_adapter_directory(path, base)


def with_added_tokens(lora: LoRAConfig, ids: Sequence[int], tied: bool) -> LoRAConfig:
    """Also train the rows of these tokens, unless the whole embedding or head is trained anyway."""
    rows = {name: list(own) for name, own in lora.trainable_token_indices.items()}
    for name in ("embed_tokens",) if tied or "score" in lora.modules_to_save else ("embed_tokens", "lm_head"):
        if ids and not any(is_inside(f"model.{name}", saved) for saved in lora.modules_to_save):
            rows[name] = list(dict.fromkeys([*rows.get(name, []), *ids]))
    return replace(lora, trainable_token_indices=rows)


def _read_checkpoint(run: Path, other_base: str | None) -> TrainedAdapter:
    config, saved = load_file(run / "config.json"), best_checkpoint(run)
    try:
        provenance = read_json(run / "config.json")["provenance"]
        trained_in, base_sha256 = DTYPES[provenance["dtype"]], provenance.get("base_sha256")
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run / 'config.json'}: provenance.dtype is missing or invalid: train again") from None
    path, step = saved.path / "adapter.safetensors", checkpoint_step(saved)
    try:
        lora, tensors = as_plain_lora(config.lora, load_tensors(path))
    except (KeyError, RuntimeError):  # one of A, B, A0, B0 is missing, or has another shape
        raise UserError(f"{path}: not the tensors of an adapter with lora.init={config.lora.init}") from None
    name, quantization, tokens = other_base or config.model.reference, quantization_of(config), config.model.add_tokens
    base = find_model(name)
    tokenizer = base
    if config.lora.start_from:
        start = read_trained_adapter(config.lora.start_from, name)
        tokenizer, tokens = start.tokenizer, start.add_tokens
    chat = ChatTokenizer(tokenizer, add_tokens=tokens)
    lora = with_added_tokens(lora, chat.added_ids, ModelFiles.read(base).decoder.tied)
    return TrainedAdapter(
        saved.path, base, name, tokenizer, lora, tensors, quantization, trained_in, base_sha256, step, tokens
    )


def _read_adapter_directory(path: Path, other_base: str | None) -> TrainedAdapter:
    """An adapter in PEFT's format; nanoft.json says how the base was quantized."""
    lora, base_name, tensors, note = read_adapter(path)
    base_name = other_base or base_name
    base = find_model(base_name, f"{path / 'adapter_config.json'}: base_model_name_or_path")
    lora, tensors = fit_experts(ModelFiles.read(base).decoder, lora, tensors)
    tokenizer = path if (path / "tokenizer.json").is_file() else base
    q = note.get("quantization")
    try:
        quantization = ({"nf4": "nf4", "fp4": "fp4", "int8": "int8"}[q["type"]], bool(q["double"])) if q else None
        trained_in = DTYPES[note.get("dtype", "float32")]
    except (KeyError, TypeError):
        raise UserError(f"{path / NOTE}: corrupted: copy the adapter again") from None
    base_sha256 = note.get("base_sha256")
    return TrainedAdapter(path, base, base_name, tokenizer, lora, tensors, quantization, trained_in, base_sha256)


def attach_adapter(adapter: TrainedAdapter, model: Decoder, views: bool = False) -> LoadedModel:
    """Add an adapter to a model, in place; a UserError if it does not match; `views`: its A and B, not copies."""
    try:
        grow_vocabulary(model, vocabulary_of(adapter.lora, adapter.tensors))
        if "score" in adapter.lora.modules_to_save:
            add_score(model)
        make = make_views(adapter.tensors) if views else make_lora
        adapters = inject_lora(model, adapter.lora, 0, make)
    except UserError as error:
        raise UserError(f"{adapter.place}: {error}") from None
    load_adapter_tensors(adapters, adapter.tensors, str(adapter.place))
    form = adapter.quantization or ModelFiles.read(adapter.base).quantization
    return LoadedModel(
        model.eval(), adapters, adapter.base, adapter.tokenizer, form, adapter.dtype, adapter.step, adapter.add_tokens
    )
