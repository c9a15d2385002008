"""Between a Hugging Face directory on disk and a decoder in memory.

The weights of a model can be larger than what is left of the memory once the model itself is there, so they are
streamed: one tensor is read, converted (and, for QLoRA, quantised), put in its place, and forgotten before the next one
is read. The decoder is first built on the `meta` device, which has shapes but no storage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanoft import UserError
from nanoft.checkpoint import Specs, encode, write_file
from nanoft.lora import LoRALinear, inject_lora, load_adapter_tensors, read_adapter
from nanoft.model import Decoder, DecoderConfig, initialise
from nanoft.nf4 import Linear4bit

# What is fetched from the Hub: data only, never code, never pickles.
HUB_FILES = ["*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]


def find_model(name: str) -> Path:
    """A local directory, or a Hub name fetched into the Hub's cache.

    Raises:
        UserError: neither a directory nor a model on the Hub that can be had.
    """
    if not name:
        raise UserError("model.name: empty: give a directory in the Hugging Face layout or a Hub name")
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.name: {name}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES + TOKENIZER_FILES))
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, gated, bad name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.name: {name}: no such directory, and the Hub says: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_shape(directory: Path) -> DecoderConfig:
    """The decoder's shape from the directory's config.json."""
    try:
        return DecoderConfig.from_hf(read_json(directory / "config.json"))
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(directory)) else f"{directory}/{message}") from None


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a model, from its index if it has one.

    Raises:
        UserError: no weights, or an index that points outside the directory or to a missing file.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        raise UserError(f"{directory}: no weights here: expected model.safetensors or model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty: fetch the file again")
    for name in sorted(set(weight_map.values())):
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: weight_map: {name!r} leaves the model's directory: refused")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: named in the index, but missing: fetch the model again")
    return [directory / name for name in sorted(set(weight_map.values()))]


def stream_tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, one at a time.

    Raises:
        UserError: a file that is truncated or otherwise not whole.
    """
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}): fetch or copy it again") from None


def load_model(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: tuple[str, bool] | None = None,
    random_seed: int | None = None,
) -> Decoder:
    """Build the decoder of a Hugging Face directory and fill it.

    Args:
        dtype: of every weight that is not quantised.
        quantization: (nf4|fp4, double): pack the linears of the blocks in 4 bits as they arrive.
        random_seed: ignore the files' weights and draw random ones.
    Raises:
        UserError: missing, unexpected or mis-shaped tensors, all of them listed; damaged files; unknown architecture.
    """
    config = read_shape(directory)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    if random_seed is not None:
        model.to_empty(device=device)
        for module in model.modules():  # norms to 1, biases to 0: the constructor's values were lost on `meta`
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:  # type: ignore
                nn.init.ones_(module.weight)  # type: ignore[arg-type]
        initialise(model, random_seed)
        return model
    paths = shard_paths(directory)
    _check_names(directory, model, paths)
    for name, tensor in stream_tensors(paths):
        if not _is_spare(name, config):
            _place(model, name, tensor.to(device=device, dtype=dtype), quantization, dtype)
    return model


def _is_spare(name: str, config: DecoderConfig) -> bool:
    """Tensors that some files carry although they follow from others: a tied head, old rotary buffers."""
    return (config.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


def _check_names(directory: Path, model: Decoder, paths: list[Path]) -> None:
    """Compare the headers of all files with the model before the first tensor is read."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}): fetch or copy it again") from None
    found = {name: shape for name, shape in found.items() if not _is_spare(name, model.config)}
    faults = [f"missing {name}" for name in expected.keys() - found.keys()]
    faults += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    both = expected.keys() & found.keys()
    faults += [f"{n} is {found[n]} instead of {expected[n]}" for n in both if found[n] != expected[n]]
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(f"{directory}: {len(faults)} tensors do not fit config.json: {shown}")


def _place(
    model: Decoder, name: str, tensor: Tensor, quantization: tuple[str, bool] | None, dtype: torch.dtype
) -> None:
    """Put one tensor where its name says; a block's linear becomes a 4-bit one on the way, if asked."""
    module_name, _, leaf = name.rpartition(".")
    parent_name, _, last = module_name.rpartition(".")
    module = model.get_submodule(module_name)
    inside_block = module_name.startswith("model.layers.")
    if quantization and inside_block and leaf == "weight" and isinstance(module, nn.Linear):
        kind, double = quantization
        packed = Linear4bit(tensor, None, kind, double, dtype)
        packed.bias = module.bias  # arrived already, or still to come
        setattr(model.get_submodule(parent_name), last, packed)
        return
    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=True)


def save_model(model: Decoder, source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a full model as a Hugging Face directory: weights in `dtype`, and the source's config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.safetensors").unlink(missing_ok=True)
    parameters = dict(model.named_parameters())
    specs: Specs = {name: (dtype, tuple(p.shape)) for name, p in parameters.items()}
    write_file(out / "model.safetensors", encode(specs, lambda name: parameters[name].to(dtype)))
    write_config(source, out, dtype)
    copy_companions(source, out)


def write_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """The source's config.json with the new dtype, and with both forms of the dtype and rope fields.

    Readers of transformers 4 know `torch_dtype`, `rope_theta`, `rope_scaling`; version 5 writes `dtype` and
    `rope_parameters`. With one form only, the other reader silently takes a default.
    """
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = DecoderConfig.from_hf(config).rope
    scaling = {key: value for key, value in rope.parameters.items() if key not in ("type", "rope_type", "rope_theta")}
    config["rope_theta"] = rope.theta
    config["rope_parameters"] = {"rope_type": rope.kind, "rope_theta": rope.theta, **scaling}
    config["rope_scaling"] = None if rope.kind == "default" else {**config["rope_parameters"], "type": rope.kind}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, out: Path) -> None:
    """The tokenizer's files and generation_config.json, byte for byte."""
    for name in [*TOKENIZER_FILES, "generation_config.json"]:
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())


def hash_files(paths: list[Path]) -> str:
    """One SHA-256 over names and contents, so that a run can tell whether its base or its data changed."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Opened:
    """A model ready to be asked, and what is known of how its adapter was trained."""

    model: Decoder
    adapters: dict[str, LoRALinear]  # empty for a plain model
    base_directory: Path
    tokenizer_directory: Path
    quantization: tuple[str, bool] | None = None  # the 4-bit form (kind, double) of the base in training
    dtype: torch.dtype = torch.float32  # what training computed in


def open_model(source: str, device: torch.device, dtype: torch.dtype, original_base: bool = False) -> Opened:
    """Load what a RUN, ADAPTER or MODEL argument names: a run directory, an adapter, a model directory, a Hub name.

    A run means its result: adapter/ on the base it was trained on (quantised if it was), or model/ for full training.

    Args:
        original_base: put an adapter on the unquantised base, whatever it was trained on.
    Raises:
        UserError: none of these, or something in it does not fit.
    """
    path = find_adapter(source)
    if path is not None:
        return _open_adapter(path, device, dtype, original_base)
    path = Path(source)
    if is_run(path):
        if not (path / "model").is_dir():
            raise UserError(f"{path}: this run has no result yet: let it finish (run its train.py command again)")
        path = path / "model"
    directory = find_model(str(path) if path.is_dir() else source)
    return Opened(load_model(directory, device, dtype).eval(), {}, directory, directory, dtype=dtype)


def is_run(path: Path) -> bool:
    """Whether a directory is a run's: it has the run's config and its checkpoints."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def find_adapter(source: str) -> Path | None:
    """The adapter directory that a RUN or ADAPTER argument means; None if it means none."""
    path = Path(source)
    candidates = [path / "adapter", path] if is_run(path) else [path]
    return next((c for c in candidates if (c / "adapter_config.json").is_file()), None)


def _open_adapter(path: Path, device: torch.device, dtype: torch.dtype, original_base: bool) -> Opened:
    """Base and adapter, put together as they were in training."""
    config, tensors, note = read_adapter(path)
    base = find_model(config.get("base_model_name_or_path") or "")
    quantization = (note["quantization"]["type"], note["quantization"]["double"]) if note.get("quantization") else None
    model = load_model(base, device, dtype, None if original_base else quantization).eval()
    adapters = inject_lora(model, tuple(config["target_modules"]), config["r"], config.get("lora_alpha", 8), 0.0, 0)
    load_adapter_tensors(adapters, tensors, str(path / "adapter_model.safetensors"))
    model.eval()  # the adapters, too
    tokenizer = path if (path / "tokenizer.json").is_file() else base
    trained_in = torch.bfloat16 if note.get("dtype") == "bfloat16" else torch.float32
    return Opened(model, adapters, base, tokenizer, quantization, trained_in)
