"""Loading the weights of a Hugging Face directory into a decoder, and writing a decoder as such a directory.

Weights are streamed: the decoder is built on the `meta` device, which has shapes but no storage; then each tensor is
read, converted (for QLoRA quantized) and placed before the next one. Peak memory is the model plus one tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoft import UserError
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.tokenizer_files import MAX_TOKENIZER
from nanoft.io.atomic import write_file, write_json
from nanoft.io.tensor_files import Specs, TensorHeader, encode_safetensors, read_header
from nanoft.io.untrusted import read_bytes, read_json, resolve_file
from nanoft.model import Decoder, DecoderConfig, initialize
from nanoft.models.bnb_format import read_stored, stored_tensors
from nanoft.models.families import FAMILIES, find_family, read_shape
from nanoft.models.hub import TOKENIZER_FILES
from nanoft.nf4 import CODES, Linear4bit, Linear8bit, quantize

FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes of plain weights, in safetensors' names
FORMAT = "weight_format"  # a number that bitsandbytes may store beside weights in 8 bits
PICKLES = (
    "pytorch_model*.bin",
    "model*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
)  # weights that can run code when read


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a model, from its index if it has one.

    Raises:
        UserError: no weights, or an index that points outside the directory or to a missing file.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            resolve_file(single)
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
        resolve_file(shard)
    return shards


def read_headers(paths: list[Path]) -> dict[str, TensorHeader]:
    """The tensors of all files by name; a UserError if a file is invalid or a name is in two files."""
    headers: dict[str, TensorHeader] = {}
    for path in paths:
        for name, header in read_header(path).items():
            if name in headers:
                raise UserError(f"{path}: {name} is in two files: fetch the model again")
            headers[name] = header
    return headers


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model as they are stored: plain, or packed by bitsandbytes in several tensors per linear."""

    headers: dict[str, TensorHeader]
    shapes: dict[str, tuple[int, ...]]  # of every weight, in the files' order
    stored: tuple[str, bool] | None  # (nf4 | fp4 | int8, double) of those that are packed

    def is_packed(self, name: str) -> bool:
        found = self.headers.get(name)
        return bool(self.stored and found and found.form in ("U8", "I8") and is_block_linear(name))

    def read(self, name: str) -> Tensor:
        """A plain weight, as a view of its file."""
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
    """Validate the headers of a model's files against the decoder, before any tensor is read.

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
        elif not is_redundant(name, model.config):
            faults.append(f"unexpected {name}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(f"{directory}: {len(faults)} tensors do not fit config.json: {shown}")
    return files


def is_redundant(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor may be in the files but is not needed: a tied head, old rotary buffers, a format number."""
    return (config.tied and name == "lm_head.weight") or name.endswith(("rotary_emb.inv_freq", f"_proj.{FORMAT}"))


def is_block_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear in a block, which is what quantization applies to."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def quantization_of(config: Config) -> tuple[str, bool] | None:
    """The form (nf4 | fp4 | int8, double) that the settings ask for; None for weights that are not quantized."""
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
    """Build the decoder of a Hugging Face directory and load its weights.

    Args:
        dtype: of every weight that is not quantized.
        quantization: (nf4 | fp4 | int8, double): quantize the linears of the blocks while loading; None: do not.
        random_seed: initialize the weights randomly instead of reading them.
        unpacked_dtype: dtype of dequantized weights; None: `dtype`.
        files: read the weights from these files instead of the directory's.
    Raises:
        UserError: missing, unexpected or mis-shaped tensors, all listed; corrupted files; unknown architecture.
    """
    config = read_shape(directory)
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    if random_seed is not None:
        model.to_empty(device=device)
        for module in model.modules():  # norms 1, biases 0: the constructor's values were lost on `meta`
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:  # type: ignore
                nn.init.ones_(module.weight)  # type: ignore[arg-type]
        initialize(model, random_seed)
        return model
    if quantization:
        check_quantization(directory, quantization)
    weights = open_weights(directory, model, files)
    for name in weights.shapes:
        if weights.is_packed(name):
            _replace(model, name, weights.read_packed(name, unpacked_dtype or dtype, device))
            continue
        tensor = weights.read(name).to(device=device, dtype=dtype, copy=True)  # a view would follow changes of the file
        if quantization and not weights.stored and is_block_linear(name):
            _replace(model, name, quantize(tensor, quantization, unpacked_dtype or dtype))
            continue
        place, _, leaf = name.rpartition(".")
        model.get_submodule(place)._parameters[leaf] = nn.Parameter(tensor, requires_grad=True)
    return model


def _replace(model: Decoder, name: str, linear: nn.Module) -> None:
    """Replace the linear whose weight has this name by a quantized one, which takes over its bias."""
    place, _, last = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(place)
    linear.register_parameter("bias", getattr(parent, last).bias)
    setattr(parent, last, linear)


def save_model(model: Decoder, source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a full model into an empty directory: weights in `dtype`, with the source's config and tokenizer."""
    parameters = dict(model.named_parameters())
    specs: Specs = {name: (dtype, tuple(p.shape)) for name, p in parameters.items()}
    write_file(out / "model.safetensors", encode_safetensors(specs, lambda name: parameters[name].to(dtype)))
    write_config(source, out, dtype)
    copy_companions(source, out)


def stored_dtype(directory: Path) -> torch.dtype:
    """The number format that config.json says the weights are stored in; bfloat16 if it does not say."""
    config = read_json(directory / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype"))
    return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def write_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the config.json of an exported model: the source's, as its family exports it, in a dtype, not quantized.

    transformers 4 reads `torch_dtype`, version 5 `dtype`; both are written.
    """
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config = FAMILIES[find_family(config)].export(config)
    write_file(out / "config.json", [(json.dumps(config, indent=2) + "\n").encode()])


def copy_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer's files and generation_config.json.

    If the source has no chat template, the default one that training used is added; if generation_config.json lacks a
    token that ends a turn, that is added, so that other tools render and stop as nanoft does.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_file(out / name, [read_bytes(source / name, MAX_TOKENIZER)])
    path = source / "generation_config.json"
    stop_ids: list[int] = []
    settings = read_json(path) if path.is_file() else {}
    if (source / "tokenizer.json").is_file():
        chat = ChatTokenizer.from_directory(source)
        stop_ids = chat.stop_ids
        if not chat.has_own_template:
            write_file(out / "chat_template.jinja", [chat.template.encode()])
    known = settings.get("eos_token_id", [])
    if not set(stop_ids) <= set(known if isinstance(known, list) else [known]):
        write_json(out / path.name, {**settings, "eos_token_id": stop_ids})
    elif path.is_file():
        write_file(out / path.name, [read_bytes(path)])


def base_files(directory: Path) -> list[Path]:
    """The files of a model that decide what an adapter was trained on: config, tokenizer, weights."""
    described = [directory / name for name in ("config.json", "tokenizer.json") if (directory / name).is_file()]
    return [*described, *shard_paths(directory)]
