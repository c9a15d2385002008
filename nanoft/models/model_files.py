"""A model's directory as it lies on disk or on the Hub: looked up once, its config.json read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanoft import UserError
from nanoft.config import Config
from nanoft.io.untrusted import read_json, resolve_file
from nanoft.model import DecoderConfig
from nanoft.models.families import parse_shape
from nanoft.models.hub import find_model
from nanoft.nf4 import CODES

Quantization = tuple[str, bool]  # the form of packed weights: (nf4 | fp4 | int8, double)
PICKLES = ("pytorch_model*.bin", "model*.bin", "*.pt", "*.pth", "*.ckpt")  # weights that can run code when read


@dataclass(frozen=True)
class ModelFiles:
    """A model in the Hugging Face layout."""

    name: str  # a directory or a name on the Hub
    directory: Path  # also of the tokenizer
    config: dict[str, Any]  # config.json
    decoder: DecoderConfig
    quantization: Quantization | None  # in which bitsandbytes packed the stored weights

    @classmethod
    def read(cls, directory: Path, name: str = "") -> ModelFiles:
        """Read config.json of a local directory.

        Raises:
            UserError: it is missing or damaged, or the model is not supported.
        """
        path = directory / "config.json"
        config = read_json(path)
        return cls(name or str(directory), directory, config, parse_shape(config, path), _quantization(config, path))

    @classmethod
    def find(cls, name: str) -> ModelFiles:
        """Look up a directory or a name on the Hub, of which only config.json is fetched.

        Raises:
            UserError: there is no such model, or it is not supported.
        """
        return cls.read(find_model(name, files=["config.json"]), name)

    def fetch(self) -> ModelFiles:
        """The same with the weights and the tokenizer of a Hub name downloaded."""
        return self if str(self.directory) == self.name else replace(self, directory=find_model(self.name))

    def shards(self) -> list[Path]:
        """The safetensors files; see `shard_paths`."""
        return shard_paths(self.directory)

    def dtype(self) -> torch.dtype:
        """The number format that config.json says the weights are stored in; bfloat16 if it does not say."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


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


def quantization_of(config: Config) -> Quantization | None:
    """The form (nf4 | fp4 | int8, double) that the settings ask for; None for weights that are not quantized."""
    q = config.quantization
    return {4: (q.type, q.double), 8: ("int8", False), 16: None}[q.bits]


def _quantization(config: dict[str, Any], path: Path) -> Quantization | None:
    """The form in which bitsandbytes packed the model; None if it did not."""
    q = config.get("quantization_config")
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


def check_quantization(base: ModelFiles, wanted: Quantization | None) -> None:
    """Refuse settings that are not what the model is, if it was packed before.

    Raises:
        UserError: with the settings that are.
    """
    if base.quantization in (None, wanted):
        return
    kind, double = base.quantization
    fields = "bits=8" if kind == "int8" else f"bits=4 quantization.type={kind} quantization.double={double}".lower()
    raise UserError(
        f"quantization.bits: {base.directory} is stored in {kind} and can only be trained on like that: "
        f"set quantization.{fields}, or name the original model"
    )


def stored_quantization(directory: Path) -> Quantization | None:
    """The form in which bitsandbytes packed the model of a directory; None if it did not."""
    return ModelFiles.read(directory).quantization


def stored_dtype(directory: Path) -> torch.dtype:
    """The number format that a model's config.json says its weights are stored in."""
    return ModelFiles.read(directory).dtype()


def base_files(directory: Path) -> list[Path]:
    """The files of a model that decide what an adapter was trained on: config, tokenizer, weights."""
    return [*described_files(directory), *shard_paths(directory)]


def described_files(directory: Path) -> list[Path]:
    """The files besides the weights that decide what is computed."""
    return [path for name in ("config.json", "tokenizer.json") if (path := directory / name).is_file()]
