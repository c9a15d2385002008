"""Loading the weights of a Hugging Face directory into a decoder, and writing a decoder as such a directory.

The decoder is built on the `meta` device, which has shapes but no storage; then each tensor is read, converted (for
QLoRA quantized) and placed before the next one. Peak memory is the model plus one tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.tokenizer_files import MAX_TOKENIZER
from nanoft.io.atomic import write_file, write_json
from nanoft.io.tensor_files import Specs, TensorHeader, encode_safetensors, read_header
from nanoft.io.untrusted import read_bytes, read_json
from nanoft.model import Decoder, initialize
from nanoft.models.bnb_format import read_stored, stored_tensors
from nanoft.models.families import FAMILIES, find_family
from nanoft.models.model_files import TOKENIZER_FILES, ModelFiles, Quantization, check_quantization
from nanoft.nf4 import Linear4bit, Linear8bit, quantize

FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes of plain weights, in safetensors' names
FORMAT = "weight_format"  # a number that bitsandbytes may store beside weights in 8 bits


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model as they are stored: plain, or packed by bitsandbytes in several tensors per linear."""

    headers: dict[str, TensorHeader]
    shapes: dict[str, tuple[int, ...]]  # of every weight, in the files' order
    stored: Quantization | None  # (nf4 | fp4 | int8, double) of those that are packed

    def is_packed(self, name: str) -> bool:
        found = self.headers.get(name)
        return bool(self.stored and found and found.form in ("U8", "I8") and is_block_linear(name))

    def read(self, name: str) -> Tensor:
        """A plain weight, as a view of its file."""
        return self.headers[name].read(name)

    def read_packed(self, name: str, dtype: torch.dtype, device: torch.device) -> Linear4bit | Linear8bit:
        """The linear of a packed weight, without its bias."""
        assert self.stored is not None
        place = name.removesuffix("weight")
        parts = [*stored_tensors(self.shapes[name], self.stored), FORMAT]
        names = {part: place + part for part in parts if place + part in self.headers}
        tensors = {part: self.headers[n].read(n).to(device, copy=True) for part, n in names.items()}
        try:
            return read_stored(tensors, self.shapes[name], self.stored, dtype)
        except UserError as error:
            raise UserError(f"{self.headers[name].path}: {place}{error}") from None


def open_weights(base: ModelFiles, model: Decoder, paths: list[Path] | None = None) -> WeightFiles:
    """Validate the headers of a model's files, or of `paths`, against the decoder, before any tensor is read.

    Raises:
        UserError: missing, unexpected or mis-shaped tensors, all of them listed; damaged files.
    """
    headers: dict[str, TensorHeader] = {}
    for path in paths or base.shards():
        found = read_header(path)
        if twice := next((name for name in found if name in headers), None):
            raise UserError(f"{path}: {twice} is in two files: fetch the model again")
        headers |= found
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    present = {name: shapes[name] for name in headers if name in shapes}
    files = WeightFiles(headers, present, base.quantization)
    expected: dict[str, tuple[set[str], tuple[int, ...] | None]] = {}
    for name, shape in shapes.items():
        if files.stored and files.is_packed(name):
            place, parts = name.removesuffix("weight"), stored_tensors(shape, files.stored)
            expected |= {place + part: ({form}, of) for part, (form, of) in parts.items()}
        else:
            expected[name] = (FLOATS, shape)
    faults = [f"missing {name}" for name in expected.keys() - headers.keys()]
    tied = model.config.tied
    for name, header in headers.items():
        if name in expected:
            forms, wanted = expected[name]
            faults += [] if header.form in forms else [f"{name} is of type {header.form}"]
            faults += [] if wanted in (None, header.shape) else [f"{name} is {header.shape} instead of {wanted}"]
        # May be there, but is not needed: a tied head, old rotary buffers, a format number.
        elif not (tied and name == "lm_head.weight") and not name.endswith(("rotary_emb.inv_freq", f"_proj.{FORMAT}")):
            faults.append(f"unexpected {name}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(f"{base.directory}: {len(faults)} tensors do not fit config.json: {shown}")
    return files


def is_block_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear in a block, which is what quantization applies to."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def load_model(
    base: Path | ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    random_seed: int | None = None,
    unpacked_dtype: torch.dtype | None = None,
    files: list[Path] | None = None,
) -> Decoder:
    """Build the decoder of a Hugging Face directory and load its weights; raises what `open_weights` does.

    Args:
        dtype: of every weight that is not quantized.
        quantization: the form in which the linears of the blocks are quantized while loading; None: not.
        random_seed: initialize the weights randomly instead of reading them.
        unpacked_dtype: dtype of dequantized weights; None: `dtype`.
        files: read the weights from these files instead of the directory's.
    """
    base = base if isinstance(base, ModelFiles) else ModelFiles.read(base)
    with torch.device("meta"):
        model = Decoder(base.decoder).to(dtype)
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
        check_quantization(base, quantization)
    weights = open_weights(base, model, files)
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
    """Copy the tokenizer's files and generation_config.json, so that other tools render and stop as nanoft does.

    A missing chat template becomes the default one that training used; missing tokens that end a turn are added.
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
