"""An adapter and its base become one model that any engine loads.

Merging is  W' = W + s B A  (in DoRA with rows of length m), and trained biases in the place of the old ones. It is done
in float32, a few rows at a time, straight from the base's shards to the new ones; the result is rounded once, at the
end. An adapter that was trained on a 4-bit base learned to correct that base, so there are two honest choices for W:
the original weights, or the 4-bit weights unpacked. Either way the result is proven before it gets its name: its logits
are compared with those of base and adapter on real prompts. No model is in memory for any of this; see
nanoft/stream.py.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanoft import UserError
from nanoft.config import Config
from nanoft.export.streaming import StreamedDecoder, Weights, open_rows
from nanoft.io.atomic import hash_file, replace_file, sync_directory, write_file
from nanoft.io.tensor_files import Specs, encode_safetensors
from nanoft.io.untrusted import read_json
from nanoft.lora import LoRALinear
from nanoft.model import Decoder
from nanoft.models.adapter_files import NOTE, read_adapter, save_adapter, select_modules, sum_adapters
from nanoft.models.hub import TOKENIZER_FILES
from nanoft.models.open import LoadedModel, TrainedAdapter, attach_adapter
from nanoft.models.weights import copy_companions, quantization_of, save_model, stored_dtype, write_config

EXPORT_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# How far merged logits may be from adapter logits, as a share of the logits' standard deviation: rounding every weight
# to 8 (bf16) or 11 (f16) significant bits moves the logits by about this much; a wrong merge moves them by whole units.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
SHARD_BYTES = 5 * 10**9
PROGRESS = ".finished.json"  # beside shards that are finished: size and SHA-256 of each


@contextmanager
def new_directory(out: Path, key: str = "", place: Callable[[Path, Path], None] = os.rename) -> Iterator[Path]:
    """Write into a directory aside that gets its name at the end, or vanishes if anything fails.

    Args:
        key: of what is being made. When that is interrupted (Ctrl-C, a signal, power), the shards that `PROGRESS` names
            stay, and the next call with this key goes on with them; a call with another key removes them.
        place: moves what is in the directory aside to `out`.
    Raises:
        UserError: `out` exists, or cannot be made, or another process is making it.
    """
    if os.path.lexists(out):
        raise UserError(f"--out: {out}: exists already: choose another name or remove it")
    made = [parent for parent in out.parents if not parent.exists()]
    aside = out.with_name(f".tmp-{out.name}-{key or 'new'}")
    kept = False
    try:
        for other in out.parent.glob(".tmp-*"):
            if other.name.rpartition("-")[0] == f".tmp-{out.name}" and other != aside:
                with _claimed(other, out):
                    shutil.rmtree(other, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
        with _claimed(aside, out):
            try:
                _keep_finished(aside)
                yield aside
                (aside / PROGRESS).unlink(missing_ok=True)
                sync_directory(aside)
                place(aside, out)
                sync_directory(out.parent)
            except KeyboardInterrupt:
                kept = (aside / PROGRESS).exists()
                raise
            finally:
                if not kept:
                    shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or f"{error}: is the disk full?"  # NumPy says how many numbers it wrote, not why
        raise UserError(f"--out: {out}: cannot be written: {reason}") from None
    finally:
        if not out.exists():
            with suppress(OSError):
                for parent in made:
                    parent.rmdir()  # only if it is empty


@contextmanager
def _claimed(directory: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a directory aside; the kernel lets go of it when its process ends, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: {out}: another process is writing it: wait for it, or choose another") from None
        yield
    finally:
        os.close(descriptor)


def _keep_finished(aside: Path) -> None:
    """Remove what an interrupted call left but the shards that it finished."""
    finished = _finished(aside / PROGRESS)
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in finished and path.name != PROGRESS:
            path.unlink()


def _finished(progress: Path | None) -> dict[str, Any]:
    """Size and SHA-256 of each finished shard; a file that is not readable names none."""
    try:
        found = json.loads(progress.read_bytes()) if progress else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


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


def weights_of(opened: LoadedModel, onto: Literal["original", "nf4"]) -> Weights:
    """The base's weights: as they are stored, or the quantized ones that the adapter was trained on, unpacked."""
    return open_rows(opened.base_directory, opened.quantization if onto == "nf4" else None, opened.dtype)


def merge(
    opened: LoadedModel,
    dtype: torch.dtype,
    onto: Literal["original", "nf4"],
    out: Path,
    shard_bytes: int | None = None,
    progress: Path | None = None,
) -> dict[str, Any]:
    """Write base + adapter as a Hugging Face directory: shards, index, config, tokenizer, generation_config.

    Args:
        opened: the adapter on its base; only the adapter and the base's path are used.
        dtype: of the merged weights.
        onto: the base's original weights, or the quantized ones that the adapter was trained against, unpacked.
        out: an existing directory, empty but for shards that `progress` names.
        shard_bytes: how large a shard may be; None: `SHARD_BYTES`.
        progress: a file that names the shards as they are finished; those that it names already, and whose hash is
            still theirs, are not written again.
    Returns:
        Size in bytes and SHA-256 of each shard.
    Raises:
        UserError: the disk has no room for it.
    """
    weights = replace(weights_of(opened, onto), adapters=opened.adapters, dtype=dtype)
    shards = _plan_shards(weights, shard_bytes or SHARD_BYTES)
    finished = {name: was for name, was in _finished(progress).items() if name in shards and _is(out / name, was)}
    check_room(out, sum(_bytes(specs) for name, specs in shards.items() if name not in finished))
    for name, specs in shards.items():
        if name not in finished:
            (out / name).unlink(missing_ok=True)
            finished[name] = write_file(out / name, encode_safetensors(specs, weights.rows))
            if progress:
                replace_file(progress, json.dumps(finished).encode())
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


def _is(path: Path, was: Any) -> bool:
    return path.is_file() and hash_file(path) == was


def check_room(out: Path, needed: int) -> None:
    """Find out before the work that so many bytes will fill the disk."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"--out: needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there: make room")


# --- which adapter


def combined(
    adapters: Sequence[TrainedAdapter], weights: Sequence[float], only: Sequence[str], base: Path | None = None
) -> TrainedAdapter:
    """One adapter that does what several do together, each with its weight; or a part of it.

    Args:
        only: modules, in the words of lora.target_modules; empty: all.
        base: another base than their own.
    Raises:
        UserError: they have different bases, or are of a kind that cannot be added, or `only` names nothing.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if other.base.resolve() != first.base.resolve():
            raise UserError(f"{other.place}: its base is {other.base_name}, not {first.base_name}: no sum of the two")
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


def open_adapter(adapter: TrainedAdapter, onto: Literal["original", "nf4"]) -> LoadedModel:
    """An adapter on its base, which stays on the disk.

    Raises:
        UserError: the adapter does not fit the base.
    """
    quantization = adapter.quantization if onto == "nf4" else None
    opened = attach_adapter(adapter, StreamedDecoder(open_rows(adapter.base, quantization, adapter.dtype)))
    return replace(opened, step=adapter.step)


# --- what a run ends with, and adapters


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
            write_adapter(aside, model, adapters, base, config, step, dtype, _base_hash(out))
        else:
            save_model(model, base, aside, stored_dtype(base))
    return place


def _base_hash(run: Path) -> str | None:
    """What the run's config.json says of its base's files."""
    with suppress(UserError, AttributeError):
        return read_json(run / "config.json").get("provenance", {}).get("base_sha256")
    return None


def write_adapter(
    out: Path,
    model: Decoder,
    adapters: dict[str, LoRALinear],
    base: Path,
    config: Config,
    step: int,
    dtype: torch.dtype,
    base_sha256: str | None,
) -> None:
    """The adapter of a run in PEFT's format, with the tokenizer; see `save_result`."""
    note = _note(quantization_of(config), dtype, step, base_sha256)
    save_adapter(out, model, adapters, config.lora, config.model.name, note)
    copy_companions(base, out)


def _note(
    form: tuple[str, bool] | None, dtype: torch.dtype, step: int | None, base_sha256: str | None
) -> dict[str, Any]:
    """What PEFT's format has no place for; see nanoft/adapter.py."""
    return {
        "quantization": dict(zip(("type", "double"), form, strict=True)) if form else None,
        "dtype": str(dtype).removeprefix("torch."),
        **({} if step is None else {"step": step}),
        **({"base_sha256": base_sha256} if base_sha256 else {}),
    }


def write_peft(out: Path, opened: LoadedModel, adapter: TrainedAdapter) -> None:
    """An adapter that is open in PEFT's format, with the tokenizer."""
    note = _note(adapter.quantization, adapter.dtype, adapter.step, adapter.base_sha256)
    save_adapter(out, opened.model, opened.adapters, adapter.lora, adapter.base_name, note)
    copy_tokenizer(opened, out)


def copy_adapter(source: Path, out: Path) -> None:
    """An adapter directory as it is, for it is in PEFT's format already; checked, and without what else lies there."""
    read_adapter(source)
    for name in ("adapter_model.safetensors", "adapter_config.json", NOTE, *TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
