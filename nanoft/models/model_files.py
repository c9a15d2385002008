"""A model's directory, local or downloaded from the Hub into its cache: looked up once, its config.json read once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanoft import UserError
from nanoft.config import Config
from nanoft.io.untrusted import read_json, resolve_file
from nanoft.model import DecoderConfig
from nanoft.models.families import parse_shape
from nanoft.nf4 import CODES

Quantization = tuple[str, bool]  # the form of packed weights: (nf4 | fp4 | int8, double)
PICKLES = ("pytorch_model*.bin", "model*.bin", "*.pt", "*.pth", "*.ckpt")  # weights that can run code when read
# Files that are downloaded: data, never code or pickles. The pattern of the weights excludes the second copy that some
# models have as consolidated.safetensors.
HUB_FILES = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
]  # fmt: skip


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
        """Read config.json of a local directory; a UserError if it is damaged or the model is not supported."""
        path = directory / "config.json"
        config = read_json(path)
        return cls(name or str(directory), directory, config, parse_shape(config, path), _quantization(config, path))

    @classmethod
    def find(cls, name: str) -> ModelFiles:
        """Look up a directory or a name on the Hub, of which only config.json is fetched."""
        return cls.read(find_model(name, files=["config.json"]), name)

    def fetch(self) -> ModelFiles:
        """The same with the weights and the tokenizer of a Hub name downloaded."""
        return self if str(self.directory) == self.name else replace(self, directory=find_model(self.name))

    def shards(self) -> list[Path]:
        """The safetensors files, from the index if there is one; a UserError if one is missing or outside."""
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index}: weight_map is missing or empty: download the file again")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name or len(name) > 255:
                    raise UserError(f"{index}: weight_map: {name!r:.60} leaves the model's directory: refused")
            shards = [self.directory / name for name in sorted(set(weight_map.values()))]
        elif single.is_file():
            shards = [single]
        elif pickles := [path for pattern in PICKLES for path in sorted(self.directory.glob(pattern))]:
            raise UserError(
                f"{pickles[0]}: weights in a pickle, which can run code, are not read: use a copy of the model in "
                "safetensors, or convert it once (torch.load with weights_only=True, safetensors.torch.save_file)"
            )
        else:
            raise UserError(f"{self.directory}: no weights here: expected {single.name} or {index.name}")
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{shard}: named in the index, but missing: download the model again")
            resolve_file(shard)
        return shards

    def dtype(self) -> torch.dtype:
        """The number format that config.json says the weights are stored in; bfloat16 if it does not say."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def find_model(name: str, field: str = "model.name", files: Sequence[str] = (*HUB_FILES, *TOKENIZER_FILES)) -> Path:
    """The directory of a model; of a Hub name, the files that match the patterns `files` are downloaded."""
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
        raise UserError(
            f"{field}: {name}: no such directory, and could not be downloaded from the Hub: {reason}"
        ) from None


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
    """Refuse another quantization than that of a model whose stored weights are packed."""
    if base.quantization in (None, wanted):
        return
    kind, double = base.quantization
    fields = "bits=8" if kind == "int8" else f"bits=4 quantization.type={kind} quantization.double={double}".lower()
    raise UserError(
        f"quantization.bits: {base.directory} is stored in {kind} and can only be trained in that form: "
        f"set quantization.{fields}, or name the original model"
    )


def base_files(directory: Path) -> list[Path]:
    """The files of a model that decide what an adapter was trained on: config, tokenizer, weights."""
    return [*described_files(directory), *ModelFiles.read(directory).shards()]


def described_files(directory: Path) -> list[Path]:
    """The files besides the weights that determine the model: config and tokenizer."""
    return [path for name in ("config.json", "tokenizer.json") if (path := directory / name).is_file()]
