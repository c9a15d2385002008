"""Between a Hugging Face directory on disk and a decoder in memory.

The weights of a model can be larger than what is left of the memory once the model itself is there, so they are
streamed: one tensor is read, converted (and, for QLoRA, quantised), put in its place, and forgotten before the next one
is read. The decoder is first built on the `meta` device, which has shapes but no storage.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoft import UserError
from nanoft.adapter import NOTE, as_plain_lora, load_adapter_tensors, read_adapter
from nanoft.chat import MAX_TOKENIZER, ChatTokenizer
from nanoft.checkpoint import Damaged, Saved, Specs, encode, verify, write_file
from nanoft.config import Config, LoRAConfig, load_file
from nanoft.lora import LoRALinear, inject_lora
from nanoft.model import Decoder, DecoderConfig, initialise
from nanoft.models.bnb_format import read_stored, stored_tensors
from nanoft.nf4 import CODES, Linear4bit, Linear8bit, quantize
from nanoft.runtime import DTYPES
from nanoft.tensorfile import Header, load_tensors, read_header
from nanoft.untrusted import plain_file, read_bytes, read_json, refuse_code

# What is fetched from the Hub: data only, never code, never pickles. The pattern of the weights leaves out the second
# copy of them that some models carry as consolidated.safetensors.
HUB_FILES = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
]  # fmt: skip
FLOATS = {"F64", "F32", "F16", "BF16"}  # number formats, in safetensors' names, that mean what they say without a scale
FORMAT = "weight_format"  # a number that bitsandbytes may store beside weights in 8 bits
PICKLES = (
    "pytorch_model*.bin",
    "model*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
)  # weights that can run code when read
# The most that a config.json may ask for: several times the largest model there is.
MOST = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 13,
}  # fmt: skip
WIDEST_WINDOW = 1 << 31


def find_model(name: str, field: str = "model.name", files: Sequence[str] = (*HUB_FILES, *TOKENIZER_FILES)) -> Path:
    """A local directory, or a Hub name fetched into the Hub's cache.

    Args:
        field: where the name comes from, for the message.
        files: patterns of what is fetched.
    Raises:
        UserError: neither a directory nor a model on the Hub that can be had.
    """
    if not name:
        raise UserError(f"{field}: empty: give a directory in the Hugging Face layout or a Hub name")
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{field}: {name}: no such directory: give a model's directory or its name on the Hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the Hub client raises many kinds: no network, no such model, gated, bad name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field}: {name}: no such directory, and not to be had from the Hub: {reason}") from None


def read_shape(directory: Path) -> DecoderConfig:
    """The decoder's shape from the directory's config.json."""
    path = directory / "config.json"
    stored = read_json(path)
    try:
        refuse_code(stored)
        _check_sizes(stored)
        config = DecoderConfig.from_hf(stored)
        _check_shape(config)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: a field is missing or of the wrong kind ({error}): fetch the file again") from None
    return config


def find_shape(name: str) -> DecoderConfig:
    """The shape of a model by its directory or Hub name; of the latter nothing but config.json is fetched."""
    return read_shape(find_model(name, files=["config.json"]))


def _check_sizes(stored: dict[str, Any]) -> None:
    """Sizes that no model has, found before anything of that size is made."""
    for name, most in MOST.items():
        value = stored.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise UserError(f"{name}: {value!r:.60} is not a whole number from 1 to {most:,}")


def _check_shape(config: DecoderConfig) -> None:
    """Values that no decoder can have, found before they fail deep inside one."""
    if config.num_heads % config.num_kv_heads or config.head_dim % 2 or config.head_dim < 1:
        raise UserError("the heads do not divide: num_attention_heads by num_key_value_heads, and head_dim by 2")
    if type(config.norm_eps) not in (int, float) or not 0 <= config.norm_eps < 1:
        raise UserError(f"rms_norm_eps: {config.norm_eps!r:.60} is not a small number")
    windows = [window for window in config.windows if window is not None]
    wrong = any(type(window) is not int or not 1 <= window <= WIDEST_WINDOW for window in windows)
    if wrong or len(config.windows) != config.num_layers:
        raise UserError(f"sliding_window, layer_types: not a window, or none, for each of {config.num_layers} layers")
    frequencies, factor = config.rope.angles(config.head_dim)
    if not frequencies.isfinite().all() or not math.isfinite(factor):
        raise UserError(f"rope: {config.rope.theta}, {dict(config.rope.parameters)!r:.200} give no finite angles")


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a model, from its index if it has one.

    Raises:
        UserError: no weights, or an index that points outside the directory or to a missing file.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            plain_file(single)
            return [single]
        if pickles := [path for pattern in PICKLES for path in sorted(directory.glob(pattern))]:
            raise UserError(
                f"{pickles[0]}: weights in a pickle, which can run code, are not read: use a copy of the model in "
                "safetensors, or convert it once (torch.load with weights_only=True, safetensors.torch.save_file)"
            )
        raise UserError(f"{directory}: no weights here: expected model.safetensors or model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty: fetch the file again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or len(name) > 255:
            raise UserError(f"{index}: weight_map: {name!r:.60} leaves the model's directory: refused")
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard}: named in the index, but missing: fetch the model again")
        plain_file(shard)
    return shards


def read_headers(paths: list[Path]) -> dict[str, Header]:
    """Every tensor of the files by name, in their order.

    Raises:
        UserError: a file that is truncated or otherwise not whole; a name that is in two files.
    """
    headers: dict[str, Header] = {}
    for path in paths:
        for name, header in read_header(path).items():
            if name in headers:
                raise UserError(f"{path}: {name} is in two files: fetch the model again")
            headers[name] = header
    return headers


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model as its files hold them: plain, or a linear's packed by bitsandbytes in several tensors."""

    headers: dict[str, Header]
    shapes: dict[str, tuple[int, ...]]  # of every weight, in the files' order
    stored: tuple[str, bool] | None  # (nf4 | fp4 | int8, double) of those that are packed

    def is_packed(self, name: str) -> bool:
        found = self.headers.get(name)
        return bool(self.stored and found and found.form in ("U8", "I8") and is_block_linear(name))

    def read(self, name: str) -> Tensor:
        """A plain weight, a view of its file."""
        return self.headers[name].read(name)

    def read_packed(self, name: str, dtype: torch.dtype, device: torch.device) -> Linear4bit | Linear8bit:
        """The linear of a packed weight, without its bias.

        Raises:
            UserError: its tensors are not what they should be.
        """
        assert self.stored is not None
        place = name.removesuffix("weight")
        parts = [*stored_tensors(self.shapes[name], self.stored), FORMAT]
        names = {part: place + part for part in parts if place + part in self.headers}
        tensors = {part: self.headers[n].read(n).to(device, copy=True) for part, n in names.items()}
        try:
            return read_stored(tensors, self.shapes[name], self.stored, dtype)
        except UserError as error:
            raise UserError(f"{self.headers[name].path}: {place}{error}") from None


def open_weights(directory: Path, model: Decoder, paths: list[Path] | None = None) -> WeightFiles:
    """Compare the headers of a model's files with the model, before any tensor is read.

    Args:
        model: on any device, for the names and shapes of its parameters.
        paths: the files; None: the directory's.
    Raises:
        UserError: missing, unexpected or mis-shaped tensors, all of them listed; damaged files.
    """
    headers = read_headers(paths or shard_paths(directory))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    present = {name: shapes[name] for name in headers if name in shapes}
    files = WeightFiles(headers, present, stored_quantization(directory))
    expected: dict[str, tuple[set[str], tuple[int, ...] | None]] = {}
    for name, shape in shapes.items():
        if files.stored and files.is_packed(name):
            place, parts = name.removesuffix("weight"), stored_tensors(shape, files.stored)
            expected |= {place + part: ({form}, of) for part, (form, of) in parts.items()}
        else:
            expected[name] = (FLOATS, shape)
    faults = [f"missing {name}" for name in expected.keys() - headers.keys()]
    for name, found in headers.items():
        if name in expected:
            forms, wanted = expected[name]
            faults += [] if found.form in forms else [f"{name} is of type {found.form}"]
            faults += [] if wanted in (None, found.shape) else [f"{name} is {found.shape} instead of {wanted}"]
        elif not is_spare(name, model.config):
            faults.append(f"unexpected {name}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(f"{directory}: {len(faults)} tensors do not fit config.json: {shown}")
    return files


def is_spare(name: str, config: DecoderConfig) -> bool:
    """Tensors that some files carry although they follow from others (a tied head, old rotary buffers), or describe."""
    return (config.tied and name == "lm_head.weight") or name.endswith(("rotary_emb.inv_freq", f"_proj.{FORMAT}"))


def is_block_linear(name: str) -> bool:
    """Whether a parameter is what quantisation is for: the matrix of a linear in a block."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def quantization_of(config: Config) -> tuple[str, bool] | None:
    """The form (nf4 | fp4 | int8, double) that the settings ask for; None for weights that are not quantised."""
    q = config.quantization
    return {4: (q.type, q.double), 8: ("int8", False), 16: None}[q.bits]


def stored_quantization(directory: Path) -> tuple[str, bool] | None:
    """The form (nf4 | fp4 | int8, double) in which bitsandbytes packed the model; None if it did not.

    Raises:
        UserError: a form that is not supported.
    """
    path = directory / "config.json"
    q = read_json(path).get("quantization_config")
    if not q:
        return None
    if not isinstance(q, dict):
        raise UserError(f"{path}: quantization_config: {q!r:.60} is not a table")
    kind = str(q.get("bnb_4bit_quant_type", "fp4"))
    if q.get("load_in_8bit"):
        return "int8", False
    if not q.get("load_in_4bit") or kind not in CODES or q.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise UserError(f"{path}: quantization_config: neither 8 bits nor nf4 or fp4 stored as uint8: not supported")
    return kind, bool(q.get("bnb_4bit_use_double_quant"))


def check_quantization(directory: Path, asked: tuple[str, bool] | None) -> None:
    """Refuse settings that are not what the model is, if it was packed before.

    Raises:
        UserError: with the settings that are.
    """
    stored = stored_quantization(directory)
    if stored in (None, asked):
        return
    kind, double = stored
    fields = "bits=8" if kind == "int8" else f"bits=4 quantization.type={kind} quantization.double={double}".lower()
    raise UserError(
        f"quantization.bits: {directory} is stored in {kind} and can only be trained on like that: "
        f"set quantization.{fields}, or name the original model"
    )


def load_model(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: tuple[str, bool] | None = None,
    random_seed: int | None = None,
    unpacked_dtype: torch.dtype | None = None,
    files: list[Path] | None = None,
) -> Decoder:
    """Build the decoder of a Hugging Face directory and fill it.

    Args:
        dtype: of every weight that is not quantised.
        quantization: (nf4 | fp4 | int8, double): pack the linears of the blocks as they arrive; None: not now.
        random_seed: ignore the files' weights and draw random ones.
        unpacked_dtype: what packed weights stand for is rounded to this; None: `dtype`.
        files: take the weights from these files instead of the directory's.
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
    if quantization:
        check_quantization(directory, quantization)
    weights = open_weights(directory, model, files)
    for name in weights.shapes:
        if weights.is_packed(name):
            _replace(model, name, weights.read_packed(name, unpacked_dtype or dtype, device))
            continue
        tensor = weights.read(name).to(device=device, dtype=dtype, copy=True)  # no view of a file that may change
        if quantization and not weights.stored and is_block_linear(name):
            _replace(model, name, quantize(tensor, quantization, unpacked_dtype or dtype))
            continue
        place, _, leaf = name.rpartition(".")
        model.get_submodule(place)._parameters[leaf] = nn.Parameter(tensor, requires_grad=True)
    return model


def _replace(model: Decoder, name: str, linear: nn.Module) -> None:
    """Put a packed linear in the place of the one whose weight has this name; the bias arrived, or is still to come."""
    place, _, last = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(place)
    linear.register_parameter("bias", getattr(parent, last).bias)
    setattr(parent, last, linear)


def save_model(model: Decoder, source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a full model into an empty directory: weights in `dtype`, and the source's config and tokenizer."""
    parameters = dict(model.named_parameters())
    specs: Specs = {name: (dtype, tuple(p.shape)) for name, p in parameters.items()}
    write_file(out / "model.safetensors", encode(specs, lambda name: parameters[name].to(dtype)))
    write_config(source, out, dtype)
    copy_companions(source, out)


def stored_dtype(directory: Path) -> torch.dtype:
    """The number format that config.json says the weights are stored in; bfloat16 if it does not say."""
    config = read_json(directory / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype"))
    return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def write_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """The source's config.json with the new dtype, not quantised, and with both forms of the dtype and rope fields.

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
    write_file(out / "config.json", [(json.dumps(config, indent=2) + "\n").encode()])


def copy_companions(source: Path, out: Path) -> None:
    """The tokenizer's files and generation_config.json, byte for byte.

    Where the source has no chat template, the one that nanoft renders with goes along, so that others render alike;
    where generation_config.json lacks the token that ends a turn, it is put there, so that others stop alike.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_file(out / name, [read_bytes(source / name, MAX_TOKENIZER)])
    path = source / "generation_config.json"
    content = read_bytes(path) if path.is_file() else b""
    if (source / "tokenizer.json").is_file():
        chat = ChatTokenizer.from_directory(source)
        if not chat.has_own_template:
            write_file(out / "chat_template.jinja", [chat.template.encode()])
        settings = read_json(path) if content else {}
        known = settings.get("eos_token_id", [])
        if not set(chat.stop_ids) <= set(known if isinstance(known, list) else [known]):
            content = (json.dumps({**settings, "eos_token_id": chat.stop_ids}, indent=2) + "\n").encode()
    if content:
        write_file(out / path.name, [content])


def base_files(directory: Path) -> list[Path]:
    """The files of a model that decide what an adapter was trained on: config, tokenizer, weights."""
    described = [directory / name for name in ("config.json", "tokenizer.json") if (directory / name).is_file()]
    return [*described, *shard_paths(directory)]


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
class TrainedAdapter:
    """An adapter as training left it, read from an adapter directory or from a run's checkpoint."""

    place: Path  # where its tensors are, for messages
    base: Path
    base_name: str  # as the run's config or the adapter has it: a directory or a name on the Hub
    tokenizer: Path
    lora: LoRAConfig
    tensors: dict[str, Tensor]
    quantization: tuple[str, bool] | None  # the form (nf4 | fp4 | int8, double) of the base in training
    dtype: torch.dtype  # what training computed in
    base_sha256: str | None = None  # of the base's files in training, if that is known
    step: int | None = None  # of the checkpoint that it is, for a run that has no result yet


@dataclass(frozen=True)
class Opened:
    """A model ready to be asked, and what is known of how its adapter was trained."""

    model: Decoder
    adapters: dict[str, LoRALinear]  # empty for a plain model
    base_directory: Path
    tokenizer_directory: Path
    quantization: tuple[str, bool] | None = None  # the form (nf4 | fp4 | int8, double) of the base in training
    dtype: torch.dtype = torch.float32  # what training computed in
    step: int | None = None  # of the checkpoint that was opened, for a run that has no result yet


def open_chat(source: str, opened: Opened, as_trained: bool = False) -> ChatTokenizer:
    """The tokenizer and template of an opened model, with the template's variables of the run that trained it.

    Args:
        as_trained: a template that prints the date prints that of the run, not today's.
    """
    if not is_run(source):
        return ChatTokenizer.from_directory(opened.tokenizer_directory)
    path = Path(source) / "config.json"
    chat = ChatTokenizer.from_directory(opened.tokenizer_directory, load_file(path).data.template_args)
    date = read_json(path).get("provenance", {}).get("date")
    if as_trained and date is not None:
        try:
            chat.date = datetime.fromisoformat(date)
        except (TypeError, ValueError):
            raise UserError(f"{path}: provenance.date: {date!r:.60} is not a date: the file is damaged") from None
    return chat


def open_model(source: str, device: torch.device, dtype: torch.dtype, original_base: bool = False) -> Opened:
    """Load what a RUN, ADAPTER or MODEL argument names: a run directory, an adapter, a model directory, a Hub name.

    A run means its result: adapter/ on the base it was trained on (quantised if it was), or model/ for full training.
    A run that has none yet means its best checkpoint.

    Args:
        original_base: put an adapter on the base as it is stored, whatever it was trained on.
    Raises:
        UserError: none of these, or something in it does not fit.
    """
    if not source:
        raise UserError("RUN|MODEL: empty: give a run directory, a model directory or a Hub name")
    path = find_adapter(source)
    if path is not None:
        return _attach(_read_adapter_directory(path), device, dtype, original_base)
    run = Path(source)
    if is_run(source) and not (run / "model").is_dir():
        return _open_checkpoint(run, device, dtype, original_base)
    directory = find_model(str(run / "model") if is_run(source) else source, "RUN|MODEL")
    return Opened(load_model(directory, device, dtype).eval(), {}, directory, directory, dtype=dtype)


def is_run(source: str | Path) -> bool:
    """Whether a directory is a run's: it has the run's config and its checkpoints."""
    return os.path.isfile(Path(source) / "config.json") and os.path.isdir(Path(source) / "checkpoints")


def find_adapter(source: str) -> Path | None:
    """The adapter directory that a RUN or ADAPTER argument means; None if it means none."""
    path = Path(source)
    candidates = [path / "adapter", path] if is_run(path) else [path]
    return next((c for c in candidates if os.path.isfile(c / "adapter_config.json")), None)


def best_checkpoint(run: Path) -> Saved:
    """The checkpoint that best.json names, every byte checked; without best.json, the newest that is whole.

    Raises:
        UserError: there is none yet, or it is damaged.
    """
    best = run / "best.json"
    found = sorted((run / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    if best.is_file():
        found = [run / "checkpoints" / Path(str(read_json(best).get("checkpoint"))).name]
    damage = []
    for path in found:
        try:
            return verify(path)
        except (Damaged, OSError) as reason:
            damage.append(str(reason))
    if damage:
        fix = f"remove {best} to take the newest checkpoint that is whole" if best.is_file() else "train again"
        raise UserError(f"{damage[0]}: {fix}")
    raise UserError(f"{run}: this run has no checkpoint yet: let it train (run its train.py command again)")


def _open_checkpoint(run: Path, device: torch.device, dtype: torch.dtype, original_base: bool) -> Opened:
    """The best checkpoint of a run on its base; after full training it holds every weight itself."""
    config = load_file(run / "config.json")
    if config.training.method != "full":
        adapter = _read_checkpoint(run)
        return replace(_attach(adapter, device, dtype, original_base), step=adapter.step)
    saved, base = best_checkpoint(run), find_model(config.model.name)
    model = load_model(base, device, dtype, files=[saved.path / "model.safetensors"]).eval()
    return Opened(model, {}, base, base, dtype=dtype, step=step_of(saved))


def step_of(saved: Saved) -> int:
    """The optimizer step of a checkpoint.

    Raises:
        UserError: it has none.
    """
    step = saved.state.get("step")
    if type(step) is not int:
        raise UserError(f"{saved.path / 'state.json'}: step: {step!r:.60} is not a step: train again")
    return step


def read_trained(source: str) -> TrainedAdapter:
    """The adapter that a RUN or ADAPTER argument names: the run's result or else its best checkpoint, or a directory.

    Raises:
        UserError: something in it is missing, damaged or not supported.
    """
    path = find_adapter(source)
    return _read_checkpoint(Path(source)) if path is None else _read_adapter_directory(path)


def _read_checkpoint(run: Path) -> TrainedAdapter:
    """The adapter in the best checkpoint of a run."""
    config, saved = load_file(run / "config.json"), best_checkpoint(run)
    try:
        provenance = read_json(run / "config.json")["provenance"]
        trained_in, base_sha256 = DTYPES[provenance["dtype"]], provenance.get("base_sha256")
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run / 'config.json'}: provenance.dtype is missing or damaged: train again") from None
    path, step = saved.path / "adapter.safetensors", step_of(saved)
    try:
        lora, tensors = as_plain_lora(config.lora, load_tensors(path))
    except (KeyError, RuntimeError):  # one of A, B, A0, B0 is missing, or does not fit the others
        raise UserError(f"{path}: not the tensors of an adapter with lora.init={config.lora.init}") from None
    base, name, quantization = find_model(config.model.name), config.model.name, quantization_of(config)
    return TrainedAdapter(saved.path, base, name, base, lora, tensors, quantization, trained_in, base_sha256, step)


def _read_adapter_directory(path: Path) -> TrainedAdapter:
    """An adapter in PEFT's format; what nanoft notes beside it says how the base was quantised."""
    lora, base_name, tensors, note = read_adapter(path)
    base = find_model(base_name, f"{path / 'adapter_config.json'}: base_model_name_or_path")
    tokenizer = path if (path / "tokenizer.json").is_file() else base
    q = note.get("quantization")
    try:
        quantization = ({"nf4": "nf4", "fp4": "fp4", "int8": "int8"}[q["type"]], bool(q["double"])) if q else None
        trained_in = DTYPES[note.get("dtype", "float32")]
    except (KeyError, TypeError):
        raise UserError(f"{path / NOTE}: damaged: copy the adapter again") from None
    base_sha256 = note.get("base_sha256")
    return TrainedAdapter(path, base, base_name, tokenizer, lora, tensors, quantization, trained_in, base_sha256)


def _attach(adapter: TrainedAdapter, device: torch.device, dtype: torch.dtype, original_base: bool) -> Opened:
    """Base and adapter, put together as they were in training; a base that is stored packed is its own original."""
    quantization = None if original_base else adapter.quantization
    return attach(adapter, load_model(adapter.base, device, dtype, quantization, unpacked_dtype=adapter.dtype))


def attach(adapter: TrainedAdapter, model: Decoder) -> Opened:
    """Put an adapter on a model, in place.

    Raises:
        UserError: it does not fit this model.
    """
    try:
        adapters = inject_lora(model, adapter.lora, seed=0)
    except UserError as error:
        raise UserError(f"{adapter.place}: {error}") from None
    load_adapter_tensors(adapters, adapter.tensors, str(adapter.place))
    trained_on = adapter.quantization or stored_quantization(adapter.base)
    return Opened(model.eval(), adapters, adapter.base, adapter.tokenizer, trained_on, adapter.dtype)
