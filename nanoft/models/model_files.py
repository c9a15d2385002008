"""Find a model's directory, local or downloaded from the Hub into its cache, and read its config.json once."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from nanoft import UserError
from nanoft.config import Config
from nanoft.io.hub import download
from nanoft.io.tensor_files import TensorHeader, read_header
from nanoft.io.untrusted import read_json, resolve_file
from nanoft.model import DecoderConfig
from nanoft.models.expert_files import MXFP4, expert_headers
from nanoft.models.families import FAMILIES, decoder_config, file_name, main_rope, module_name, regroup, standard_fields
from nanoft.nf4 import CODES

Quantization = tuple[str, bool]  # the form of packed weights: (nf4 | fp4 | int8, double)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of plain weights
HEAD, EMBEDDING, SCORE = "lm_head.weight", "model.embed_tokens.weight", "score.weight"
BNB = "bitsandbytes"  # quant_method in quantization_config; missing in old files of bitsandbytes
# Variants of the decoder's names: with parts inserted by DDP, torch.compile, FSDP or activation checkpointing, with
# outer modules, or without the decoder's own.
OUTER = r"^(?:(?:base_model|model|language_model)\.)*"
SPELLINGS = [
    (r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),
    (OUTER + r"(?=lm_head\.)", ""),
    (OUTER + r"(?=(?:layers\.\d+|embed_tokens\w*|embed_positions|norm|per_layer_\w+)\.)", "model."),
]
# Of a wrapper besides text: never loaded.
TOWERS = r"(model\.)?(vision_tower|multi_modal_projector|audio_tower|embed_vision|embed_audio|visual|mtp)\."
MTP = r"mtp\."  # layers that predict a second token (Qwen3.5), which are not loaded either
# A directory or repository without a model's files: a file in it -> what it is, and what to name instead.
INSTEAD = {
    "adapter_config.json": "is an adapter, not a model: set model.name to its base, and lora.start_from={place} to "
    "train it further",
    "*.gguf": "has its weights in GGUF, which is for inference: name the original model in safetensors",
    "checkpoint-*": "has no model itself, only checkpoints of a Trainer: name one of them, such as {place}/{newest}",
    **dict.fromkeys(
        ("pytorch_model*.bin", "model*.bin", "*.pt", "*.pth", "*.ckpt"),
        "has its weights in pickles, such as {newest}, which can run code and are not read: use a copy of the model in "
        "safetensors, or convert it once (torch.load with weights_only=True, safetensors.torch.save_file)",
    ),
}
# Files that are downloaded: data, never code or pickles. The pattern for the weights excludes the second copy that some
# models have in consolidated.safetensors.
HUB_FILES = ["model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "additional_chat_templates/*.jinja",
]  # fmt: skip
PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json"]  # for images; other tools require them
ALL_FILES = (*HUB_FILES, *TOKENIZER_FILES, *PROCESSOR_FILES)


@dataclass(frozen=True)
class ModelFiles:
    """A model in the Hugging Face layout."""

    name: str  # a directory or a name on the Hub
    directory: Path  # of the model and its tokenizer
    config: dict[str, Any]  # config.json
    decoder: DecoderConfig
    quantization: Quantization | None  # form in which bitsandbytes packed the stored weights
    notes: tuple[str, ...] = ()  # where the weights contradict config.json
    towers: dict[str, TensorHeader] = field(default_factory=dict)  # a wrapper's tensors besides text, unchanged

    @classmethod
    def read(cls, directory: Path, name: str = "") -> ModelFiles:
        """Read config.json of a local directory; a UserError if it is damaged or the model is not supported."""
        path = directory / "config.json"
        if not os.path.lexists(path) and (instead := explain_missing(directory)):
            raise UserError(instead)
        config = read_json(path)
        if {"provenance", "model", "training"} <= config.keys():
            instead = "its model/" if (directory / "model").is_dir() else f"its base, and lora.start_from={directory}"
            raise UserError(f"{directory}: a run, not a model: set model.name to {instead}")
        try:
            shape, quantization = decoder_config(config), _quantization(standard_fields(config))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            what = f"a field is missing or has the wrong type ({error})"
            raise UserError(f"{path}: {what}: download the file again") from None
        files = cls(name or str(directory), directory, config, shape, quantization)
        with suppress(UserError):  # weights that are missing or damaged are reported when they are read
            return files.as_stored()
        return files

    @classmethod
    def find(cls, name: str) -> ModelFiles:
        """Look up a directory or a name on the Hub, of which only config.json is fetched."""
        return cls.read(find_model(name, files=["config.json"]), name)

    def fetch(self) -> ModelFiles:
        """The same with the weights and the tokenizer of a Hub name downloaded."""
        return self if str(self.directory) == self.name else ModelFiles.read(find_model(self.name), self.name)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of config.json for the text tower."""
        return standard_fields(self.config)

    @property
    def description(self) -> str:
        """Family and size; for a text tower, also its wrapper."""
        whole = f", the text of {self.config['architectures'][0]}" if self.decoder.wrapped else ""
        return f"{self.decoder.family}{whole}, {self.decoder.num_layers} layers of {self.decoder.hidden_size}"

    @property
    def context_length(self) -> float:
        """The number of positions that the model supports, with its rope's scaling; infinite if unspecified."""
        length = self.fields.get("max_position_embeddings") or math.inf
        rope = main_rope(self.decoder).parameters
        return max(length, (rope.get("original_max_position_embeddings") or length) * (rope.get("factor") or 1))

    def shards(self) -> list[Path]:
        """The safetensors files, listed by the index if there is one; a UserError if one is missing or outside."""
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        sharded = _indexed_shards(index) if os.path.lexists(index) else _numbered_shards(self.directory)
        if os.path.lexists(single) and sharded != [single]:
            is_whole = sharded and all(shard.is_file() for shard in sharded)
            if is_whole and not _same_weights(single, tuple(sharded)):
                raise UserError(f"{single}: differs from the shards next to it: remove the outdated weights")
            sharded = [single]  # incomplete shards are leftovers
        if not sharded:
            wanted = f"no weights here: expected {single.name} or {index.name}"
            raise UserError(explain_missing(self.directory) or f"{self.directory}: {wanted}")
        for shard in sharded:
            if not os.path.lexists(shard) or shard.is_dir():
                raise UserError(f"{shard}: one of {len(sharded)} files, but missing: download the model again")
            resolve_file(shard)
        return sharded

    def dtype(self) -> torch.dtype:
        """The dtype of the weights according to config.json, or else that of the largest stored weight."""
        name = str(self.fields.get("dtype") or self.fields.get("torch_dtype")).removeprefix("torch.")
        if found := [dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{name}"]:
            return found[0]
        with suppress(UserError):
            plain = [header for header in read_headers(self.shards()).values() if header.form in DTYPES]
            return DTYPES[max(plain, key=lambda header: math.prod(header.shape)).form] if plain else torch.bfloat16
        return torch.float32  # there are no weights: training began with random ones, in float32

    def as_stored(self, paths: Sequence[Path] | None = None) -> ModelFiles:
        """Corrected by the stored weights, which take precedence over config.json; differences become notes.

        A head that is stored and differs from the embedding is not tied to it, as in transformers 5.
        """
        headers = read_headers(paths or self.shards())
        tied, quantization, notes = self.decoder.tied, self.quantization, []
        head, embedding = headers.get(HEAD), headers.get(EMBEDDING)
        is_tied = head is None or (tied and embedding is not None and _same_tensor(head, embedding))
        if is_tied != tied and embedding:
            why = "lm_head.weight differs from the embedding: it is used"
            why = "there is no lm_head.weight: the head is the embedding" if is_tied else why
            notes.append(f"tie_word_embeddings is {str(tied).lower()}, but {why}")
            tied = is_tied
        if quantization and not any(is_packed(headers, name) for name in headers):
            notes.append("quantization_config is ignored: the weights are not quantized")
            quantization = None
        said = tuple(f"{self.directory / 'config.json'}: {note}" for note in notes)
        unread = TOWERS if self.decoder.wrapped else MTP
        towers = {own.name: own for own in headers.values() if re.match(unread, own.name)}
        decoder = replace(self.decoder, tied=tied, has_score=SCORE in headers)
        return replace(self, decoder=decoder, quantization=quantization, notes=said, towers=towers)

    def stored_name(self, name: str) -> str:
        """The name of a decoder's weight in a directory with this config.json."""
        name = file_name(self.decoder.family, name)
        if any(tower.startswith("model.") for tower in self.towers):
            return re.sub("^model", "model.language_model", name)
        return f"language_model.{name}" if self.decoder.wrapped else name

    def is_transposed(self, name: str) -> bool:
        """Whether a decoder's weight is stored as (in, out) in such a directory."""
        family = FAMILIES[self.decoder.family]
        turned = family.transposed or (family.stacked == "in, out" and ".experts." in name)
        return turned and is_block_linear(name)

    def headers(self, paths: Sequence[Path] | None = None) -> dict[str, TensorHeader]:
        """The result of `read_headers` for the model's files, or for `paths`, with the decoder's shapes."""
        found = read_headers(paths or self.shards())
        if self.decoder.routing:
            apart = self.decoder.mlp == "gated"
            found = {regroup(self.decoder, name): own for name, own in expert_headers(found, apart).items()}
        for name, own in found.items():  # packed weights are (out, in)
            if self.is_transposed(name) and own.form != MXFP4 and not is_packed(found, name):
                found[name] = replace(own, shape=own.shape[::-1], transposed=True)
        return found


def is_block_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear in a block, which is what quantization applies to."""
    of_layers = r"model\.(layers\..+_(proj(_\w+)?|gate|projection)|per_layer_model_projection)\.weight"
    return re.fullmatch(of_layers, name) is not None


def read_headers(paths: Sequence[Path]) -> dict[str, TensorHeader]:
    """The stored tensors under the decoder's names, in the files' order."""
    headers: dict[str, TensorHeader] = {}
    for path in paths:
        for stored, header in read_header(path).items():
            name = standard_name(stored)
            if name in headers:
                where = "in two files" if headers[name].path != path else "stored twice"
                raise UserError(f"{path}: {name} is {where}: download the model again")
            headers[name] = header
    return headers


def standard_name(name: str) -> str:
    """The decoder's name of a stored tensor."""
    name = module_name(name)
    for pattern, standard in SPELLINGS:
        name = re.sub(pattern, standard, name)
    return name


def is_packed(headers: dict[str, TensorHeader], name: str) -> bool:
    """Whether bitsandbytes packed this weight: it consists of bytes, or has scales."""
    return name in headers and (headers[name].form in ("U8", "I8") or f"{name}.absmax" in headers)


def _indexed_shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty: download the file again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or len(name) > 255:
            raise UserError(f"{index}: weight_map: {name!r:.60} leaves the model's directory: download the file again")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _numbered_shards(directory: Path) -> list[Path]:
    """Shards without an index, model-00001-of-00003.safetensors and so on, as many as the first one says."""
    digits = "[0-9]" * 5
    first = min(directory.glob(f"model-{digits}-of-{digits}.safetensors"), default=None)
    count = first.stem.rpartition("-")[2] if first else "0"
    return [directory / f"model-{n:05d}-of-{count}.safetensors" for n in range(1, int(count) + 1)]


def _same_tensor(a: TensorHeader, b: TensorHeader) -> bool:
    return (a.form, a.shape) == (b.form, b.shape) and torch.equal(a.read(), b.read())


@functools.cache
def _same_weights(single: Path, shards: tuple[Path, ...]) -> bool:
    one, many = read_headers([single]), read_headers(shards)
    return one.keys() == many.keys() and all(_same_tensor(one[name], many[name]) for name in one)


def explain_missing(directory: Path) -> str | None:
    """Explain what a directory without a model's files is, and the fix; None if unknown.

    For a snapshot in the Hub's cache, the repository is described, as only some of its files were downloaded.
    """
    place, names = str(directory), [path.name for path in directory.glob("*")]
    repository = re.fullmatch(r"models--(.+)", directory.parent.parent.name)
    if repository and directory.parent.name == "snapshots":
        from huggingface_hub import HfApi

        place = repository[1].replace("--", "/")
        with suppress(Exception):  # no network: only the downloaded files are known
            files = HfApi().model_info(place, revision=directory.name, timeout=10).siblings or []
            names += [file.rfilename.split("/")[0] for file in files]
    for pattern, text in INSTEAD.items():
        if found := [name for name in names if fnmatch(name, pattern)]:
            newest = max(found, key=lambda name: (len(name), name))  # checkpoint-1000 is newer than checkpoint-500
            return f"{place}: {text.format(place=place, newest=newest)}"
    return None


def find_model(name: str, field: str = "model.name", files: Sequence[str] = ALL_FILES) -> Path:
    """The directory of a model; for a Hub name, download the files that match the patterns `files`."""
    if not name:
        raise UserError(f"{field}: empty: give a directory in the Hugging Face layout or a Hub name")
    path, (repository, revision) = Path(os.path.expanduser(name)), split_reference(name)
    if os.path.isdir(path):
        return path
    fault = ""
    if os.path.islink(path):
        fault = f"a link to {os.readlink(path)}, which is missing: name the model's directory"
    elif os.path.exists(path):
        fault = "a file: name the directory of a model in safetensors"
    elif os.path.isdir(os.path.expanduser(repository)):
        fault = f"{repository} is a directory, which has no revisions: remove @{revision}"
    elif name.startswith((".", "/", "~")) or repository.count("/") > 1:
        fault = "no such directory: give a model's directory or its name on the Hub"
    if fault:
        raise UserError(f"{field}: {name}: {fault}")
    where = f"{field}: {name}: no such directory, and"
    return download(repository, where, revision=revision, allow_patterns=list(files))


def split_reference(name: str) -> tuple[str, str | None]:
    """Split NAME@REVISION; for a name without a revision, or a directory, the revision is None."""
    repository, _, revision = name.rpartition("@")
    return (repository, revision) if repository and not os.path.isdir(name) else (name, None)


def quantization_of(config: Config) -> Quantization | None:
    """The form (nf4 | fp4 | int8, double) that the settings ask for; None for weights that are not quantized."""
    q = config.quantization
    return {4: (q.type, q.double), 8: ("int8", False), 16: None}[q.bits]


def _quantization(config: dict[str, Any]) -> Quantization | None:
    """The form in which bitsandbytes packed the model; None if it did not."""
    q = config.get("quantization_config") or {}
    by_bnb = isinstance(q, dict) and ("load_in_4bit" in q or "load_in_8bit" in q or q.get("quant_method") == BNB)
    if q and not by_bnb and (not isinstance(q, dict) or q.get("quant_method") != "mxfp4"):
        fix = "name the original model (of one in FP8 its twin, with -BF16 or without -FP8 in its name)"
        fix += "; if the weights are not quantized, remove the field"
        raise UserError(f"quantization_config: only bitsandbytes and MXFP4 are supported: {fix}")
    if not by_bnb:
        return None
    if q.get("load_in_8bit"):
        return "int8", False
    kind = str(q.get("bnb_4bit_quant_type", "fp4"))
    if kind not in CODES:
        raise UserError(f"quantization_config: bnb_4bit_quant_type: {kind!r:.60} is neither nf4 nor fp4")
    return (kind, bool(q.get("bnb_4bit_use_double_quant"))) if q.get("load_in_4bit") else None


def check_quantization(base: ModelFiles, wanted: Quantization | None) -> None:
    """For a model whose stored weights are packed, refuse a quantization that differs from theirs."""
    if base.quantization in (None, wanted):
        return
    kind, double = base.quantization
    fields = "bits=8" if kind == "int8" else f"bits=4 quantization.type={kind} quantization.double={double}".lower()
    fix = f"set quantization.{fields}, or name the original model"
    raise UserError(f"quantization.bits: {base.directory} is stored in {kind}, which cannot be changed: {fix}")


def base_files(directory: Path) -> list[Path]:
    """The files that identify the base of an adapter: config, tokenizer, weights."""
    return [*described_files(directory), *ModelFiles.read(directory).shards()]


def described_files(directory: Path) -> list[Path]:
    """The files besides the weights that determine the model: config and tokenizer."""
    return [path for name in ("config.json", "tokenizer.json") if (path := directory / name).is_file()]
