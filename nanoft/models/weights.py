"""Load the weights of a Hugging Face directory into a decoder, and write a decoder as such a directory.

The decoder is built on the `meta` device, which has shapes but no storage; then each tensor is read, converted (for
QLoRA quantized) and placed before the next one. Peak memory is the model plus one tensor. Weights that bitsandbytes
packed stay packed; `cache_weights` dequantizes weights once, for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanoft import UserError
from nanoft.blocks.double_quantization import NESTED
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.tokenizer_files import MAX_TOKENIZER
from nanoft.io.atomic import write_file, write_json
from nanoft.io.bars import track
from nanoft.io.tensor_files import Specs, TensorHeader, encode_safetensors
from nanoft.io.untrusted import parse_json, read_bytes, read_json
from nanoft.model import Decoder, DecoderConfig
from nanoft.models.expert_files import GROUP, MXFP4, MXFP4_SCALE, dequantize_mxfp4, stack_name
from nanoft.models.families import FAMILIES, score_architecture, text_fields, with_both_rope_forms
from nanoft.models.model_files import (
    DTYPES,
    HEAD,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    ModelFiles,
    Quantization,
    check_quantization,
    is_block_linear,
    is_packed,
)
from nanoft.nf4 import BLOCK, CODES, PackedLinear, packed_bytes, quantize
from nanoft.runtime import distributed
from nanoft.runtime.memory import available_bytes

FLOATS = {"F64", *DTYPES}  # dtypes of plain weights, in safetensors' names
Stored = dict[str, tuple[set[str], tuple[int, ...] | None]]  # tensor -> its possible dtypes, and its shape (None: any)
ReadTensor = Callable[[str], Tensor | Iterable[Tensor]]  # by its name
FORMAT = "weight_format"  # a number that bitsandbytes may store with 8-bit weights
MAX_NOTE = 4096  # bytes of the JSON that bitsandbytes stores with a weight, which needs 200


@dataclass(frozen=True)
class WeightFiles:
    """The stored weights of a model: plain, or packed by bitsandbytes in several tensors per linear."""

    headers: dict[str, TensorHeader]
    shapes: dict[str, tuple[int, ...]]  # of every weight, in the files' order
    stored: Quantization | None  # (nf4 | fp4 | int8, double) of those that are packed

    def is_packed(self, name: str) -> bool:
        return bool(self.stored) and (is_block_linear(name) or name == HEAD) and is_packed(self.headers, name)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A plain tensor or rows of it, as a view of its file; a UserError if a number is not finite."""
        header = self.headers[name]
        tensor = header.read(rows)
        if header.form == MXFP4:
            tensor = dequantize_mxfp4(tensor, self.headers[name + MXFP4_SCALE].read(rows))
        if not is_finite(tensor):
            raise UserError(f"{header.path}: {header.name} contains NaN or infinity: download the model again")
        return tensor

    def read_packed(self, name: str, dtype: torch.dtype, device: torch.device) -> PackedLinear:
        """The linear of a packed weight, without its bias."""
        assert self.stored is not None
        place = name.removesuffix("weight")
        parts = [*stored_tensors(self.shapes[name], self.stored), FORMAT]
        names = {part: place + part for part in parts if place + part in self.headers}
        tensors = {part: self.read(n).to(device, copy=True) for part, n in names.items() if part != "weight"}
        codes = self.headers[name].read()
        if self.stored[0] != "int8":  # bytes, which may be stored with another dtype
            codes = codes.view(torch.uint8).view(-1, 1)
        tensors["weight"] = codes.to(device, copy=True)
        try:
            return read_stored(tensors, self.shapes[name], self.stored, dtype)
        except UserError as error:
            raise UserError(f"{self.headers[name].path}: {place}{error}") from None


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or all(math.isfinite(end) for end in tensor.aminmax())


def open_weights(base: ModelFiles, model: Decoder, paths: list[Path] | None = None) -> WeightFiles:
    """Validate the headers of a model's files, or of `paths`; a UserError lists all tensors that do not fit."""
    headers = base.headers(paths)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    present = {name: shapes[name] for name in headers if name in shapes}
    files = WeightFiles(headers, present, base.quantization)
    expected: Stored = {}
    for name, shape in shapes.items():
        if files.stored and files.is_packed(name):
            place, parts = name.removesuffix("weight"), stored_tensors(shape, files.stored)
            expected |= {place + part: stored for part, stored in parts.items()}
            if (form := headers[name].form) in FLOATS:  # bnb_4bit_quant_storage
                expected[name] = ({form}, (math.prod(shape) // 2 // DTYPES[form].itemsize, 1))
        elif name in headers and headers[name].form == MXFP4:
            expected |= {name: ({MXFP4}, shape), name + MXFP4_SCALE: ({"U8"}, (shape[0], shape[1] // GROUP))}
        else:
            expected[name] = (FLOATS, shape)
    faults = [f"missing {name}" for name in expected.keys() - headers.keys()]
    tied = model.config.tied
    masks = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
    shared = [f"model.layers.{layer}.self_attn" for layer, own in enumerate(model.config.layers) if "source" in own]
    unused = [f"{place}.{part}.weight" for place in shared for part in ("k_proj", "v_proj", "k_norm")]
    ignored = (*masks, "rotary_emb.inv_freq", f".{FORMAT}", *unused)
    for name, header in headers.items():
        if name in expected:
            forms, wanted = expected[name]
            faults += [] if header.form in forms else [f"{name} is of type {header.form}"]
            faults += [] if wanted in (None, header.shape) else [f"{name} is {header.shape} instead of {wanted}"]
        # Ignored: a copy of the tied head, masks and rotary buffers of old files, the number of bitsandbytes' format.
        elif not (tied and name == HEAD) and not name.endswith(ignored) and header.name not in base.towers:
            faults.append(f"unexpected {name}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(f"{base.directory}: {len(faults)} tensors do not fit config.json: {shown}")
    return files


def load_model(
    base: Path | ModelFiles,
    device: torch.device,
    dtype: torch.dtype,  # of every weight that is not quantized
    quantization: Quantization | None = None,  # in which the linears of the blocks are quantized while loading
    random_seed: int | None = None,  # initialize the weights randomly instead of reading them
    unpacked_dtype: torch.dtype | None = None,  # of dequantized weights; None: `dtype`
    files: list[Path] | None = None,  # to read instead of the directory's
    store: Callable[[nn.Module], None] | None = None,  # where to keep what was loaded of a module of a block
) -> Decoder:
    """Build the decoder of a Hugging Face directory and load its weights; raises what `open_weights` does."""
    base = base if isinstance(base, ModelFiles) else ModelFiles.read(base)
    if files:
        base = base.as_stored(files)
    with torch.device("meta"):
        model = Decoder(base.decoder).to(dtype)
    if random_seed is not None:
        model.to_empty(device=device)
        initialize(model, random_seed)
        return model
    if quantization:
        check_quantization(base, quantization)
    weights = open_weights(base, model, files)
    what = "quantizing" if quantization and not weights.stored else "loading"
    for name in track(weights.shapes, what, "weights"):
        packed, is_linear = None, is_block_linear(name)
        if weights.is_packed(name):
            packed = weights.read_packed(name, unpacked_dtype or dtype, device)
        else:
            tensor = weights.read(name).to(device=device, dtype=dtype, copy=True)  # a view would change with the file
            if quantization and is_linear and not weights.stored:
                packed = quantize(tensor, quantization, unpacked_dtype or dtype)
        if packed is not None and is_linear:
            _replace(model, name.removesuffix(".weight"), packed)
        else:
            value = tensor if packed is None else packed.dequantize().to(dtype)  # packed: a head
            distributed.set_parameter(model, name, nn.Parameter(value, model.get_parameter(name).requires_grad))
        if store and name.startswith("model.layers."):
            store(model.get_submodule(name.rpartition(".")[0]))
    return model


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Random weights for pre-training: N(0, 0.02), outputs of each block scaled by 1/sqrt(2 layers) (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".A_log"):  # how fast a DeltaNet forgets: from hardly to at once
            parameter.copy_(torch.empty(len(parameter)).uniform_(0.01, 16, generator=generator).log())
            continue
        if parameter.dim() < 2:  # norms are 1, and of a DeltaNet dt_bias, too
            is_zero = name.endswith((".bias", ".sinks")) or (model.config.norm_offset and ".linear_attn." not in name)
            nn.init.constant_(parameter, 0.0 if is_zero else 1.0)
            continue
        residual = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * model.config.num_layers) if residual else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@torch.no_grad()
def grow_vocabulary(model: Decoder, size: int) -> None:
    """Append rows to the embedding and the head, each the mean of the old rows, up to `size` tokens."""
    more = max(0, size - model.config.vocab_size)
    if more and model.config.per_layer_size:
        raise UserError(f"model.add_tokens: {model.config.family} has per-layer embeddings, to which none can be added")
    model.config = replace(model.config, vocab_size=model.config.vocab_size + more)
    for module in [model.model.embed_tokens] + ([] if model.lm_head is None else [model.lm_head]) if more else []:
        mean = module.weight.float().mean(0, keepdim=True).to(module.weight.dtype)
        module.weight = nn.Parameter(torch.cat((module.weight, mean.expand(more, -1))))


def add_score(model: Decoder, seed: int = 0) -> None:
    """Replace the head by a scalar head, (1, hidden) float32 ~ N(0, 1/(hidden + 1)), unless there is one.

    Rewards then start with a variance near 1 (Stiennon et al. 2020, app. B); a head of zeros would pass no gradient.
    """
    if model.config.wrapped:
        raise UserError("training.objective: a reward model cannot be a text tower: name a text-only model")
    if model.score is None:
        model.config, model.lm_head = replace(model.config, tied=True, has_score=True), None
        weight = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        model.score = nn.Linear(model.config.hidden_size, 1, bias=False, device="meta")
        model.score.weight = nn.Parameter((weight / math.sqrt(model.config.hidden_size + 1)).to(model.device))


def _replace(model: nn.Module, name: str, linear: nn.Module) -> None:
    """Replace a linear by another one, which takes over its bias."""
    linear.register_parameter("bias", model.get_submodule(name).bias)  # type: ignore[arg-type]
    model.set_submodule(name, linear)


# ---- Weights that bitsandbytes packed and transformers saved


def stored_tensors(shape: tuple[int, ...], quantization: Quantization) -> Stored:
    """The tensors of a packed linear, by the name after the module's."""
    (kind, double), weights = quantization, math.prod(shape)
    if kind == "int8":
        return {"weight": ({"I8"}, shape), "SCB": ({"F32"}, shape[:1])}
    blocks = weights // BLOCK
    tensors: Stored = {
        "weight": ({"U8"}, (weights // 2, 1)),
        "weight.absmax": ({"U8" if double else "F32"}, (blocks,)),
        "weight.quant_map": ({"F32"}, (16,)),
        f"weight.quant_state.bitsandbytes__{kind}": ({"U8"}, None),  # JSON
    }
    if double:
        tensors["weight.nested_absmax"] = ({"F32"}, (math.ceil(blocks / NESTED),))
        tensors["weight.nested_quant_map"] = ({"F32"}, (256,))
    return tensors


def read_stored(
    tensors: dict[str, Tensor], shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype
) -> PackedLinear:
    """The linear, (out, in), of the tensors that `stored_tensors` names; for 8 bits, a `weight_format` as well."""
    kind, double = quantization
    if kind == "int8":
        if (tensors.get("weight_format", torch.tensor(0)) != 0).any():
            raise UserError("weight_format: not row-major: save the model again with bitsandbytes 0.45 or newer")
        return PackedLinear([tensors["weight"], tensors["SCB"]], shape, kind, None, dtype)
    offset = _read_offset(tensors[f"weight.quant_state.bitsandbytes__{kind}"], shape, quantization)
    if not torch.allclose(tensors["weight.quant_map"].cpu(), torch.tensor(CODES[kind]), atol=1e-4):
        raise UserError(f"weight.quant_map: not the code points of {kind}")
    scales = [tensors["weight.absmax"]]
    if double:
        scales += [tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"]]
        scales += [torch.tensor(offset, dtype=torch.float32, device=scales[0].device)]
    return PackedLinear([tensors["weight"], *scales], shape, kind, None, dtype)


def _read_offset(note: Tensor, shape: tuple[int, ...], quantization: Quantization) -> float:
    """The mean subtracted from the scales, from the JSON beside a 4-bit weight, all of whose fields are checked."""
    try:
        state = parse_json(note[:MAX_NOTE].cpu().numpy().tobytes())
    except ValueError:
        raise UserError("weight.quant_state: corrupted: download or copy the model again") from None
    (kind, double), state = quantization, state if isinstance(state, dict) else {}
    expected: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "shape": list(shape)}
    if double:
        expected |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
    for name, wanted in expected.items():
        if state.get(name) != wanted:
            raise UserError(f"weight.quant_state: {name} is {state.get(name)!r:.60} instead of {wanted!r}")
    offset: Any = state.get("nested_offset") if double else 0.0
    if type(offset) not in (int, float) or not abs(offset) < torch.finfo(torch.float32).max:
        raise UserError(f"weight.quant_state: nested_offset: {offset!r:.60} is not a finite number")
    return float(offset)


# ---- Dequantized once instead of at every use: memory for speed


def choose_dequantize(policy: str, device_type: str, extra_bytes: int, free_bytes: int) -> Literal["per_use", "cached"]:
    """quantization.dequantize=auto caches on CUDA if that takes at most a third of the free memory.

    The rest helps activations more. `extra_bytes`: how much larger the model is with dequantized weights.
    """
    has_room = device_type == "cuda" and 3 * extra_bytes <= free_bytes
    return "cached" if policy == "cached" or (policy == "auto" and has_room) else "per_use"


def cache_weights(model: nn.Module, policy: str, dtype: torch.dtype | None = None) -> Literal["per_use", "cached"]:
    """Dequantize every weight if the policy says so: its linear becomes a frozen nn.Linear. Returns the choice.

    `dtype`: the model's, if it differs from the dtype of its dequantized weights.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]
    if not layers:
        return "per_use"
    codes = layers[0][1].parts[0]
    extra = sum(q.out_features * q.in_features * q.dtype.itemsize - packed_bytes(q) for _, q in layers)
    chosen = choose_dequantize(policy, codes.device.type, extra, int(available_bytes(codes.device)))
    if hasattr(codes, "full_tensor") and distributed.all_reduce_any(chosen == "per_use"):
        chosen = "per_use"  # on every rank: unpacking gathers the shards of all
    while chosen == "cached" and layers:
        name, layer = layers.pop()  # the packed weight is gone before the next one is unpacked
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        with distributed.gathered(layer) as parts:
            linear.weight = nn.Parameter(layer.dequantize().to(dtype or layer.dtype), requires_grad=False)
        if parts:
            distributed.keep_shard(linear)
        _replace(model, name, linear)
    return chosen


# ---- Writing


def save_model(model: Decoder, source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a full model into an empty directory: weights in `dtype`, with the source's config and tokenizer.

    Other towers are copied from the source.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    specs, read = with_towers(ModelFiles.read(source), shapes, dtype, lambda name: parameters[name].to(dtype))
    write_file(out / "model.safetensors", encode_safetensors(specs, read))
    write_config(source, out, dtype, model.config)
    copy_companions(source, out)
    describe_score(out, model.config)


def with_towers(
    base: ModelFiles, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: ReadTensor
) -> tuple[Specs, ReadTensor]:
    """The tensors of an exported model, and a function that reads each: the decoder's, of the given shapes, under the
    names of its base, and then the base's other towers, unchanged."""
    family, groups = FAMILIES[base.decoder.family], dict[str, list[str]]()
    for name in shapes:  # the decoder's tensors in each of the file: one, or those of all experts
        new = base.stored_name(name)
        groups.setdefault(stack_name(new) if family.stacked else new, []).append(name)
    if packed := [header for header in base.towers.values() if header.form not in DTYPES]:
        raise UserError(f"{packed[0].path}: {packed[0].name} is quantized ({packed[0].form}): name the original model")
    specs: Specs = {}
    for new, own in groups.items():
        shape = shapes[own[0]][:: -1 if base.is_transposed(own[0]) else 1]
        specs[new] = (dtype, shape if new == base.stored_name(own[0]) else (len(own), *shape))
    specs |= {name: (DTYPES[header.form], header.shape) for name, header in base.towers.items()}

    def stored(new: str) -> Iterator[Tensor]:
        if new in base.towers:
            yield base.towers[new].read()
        for name in groups.get(new, ()):
            found = read(name)
            parts = [found] if isinstance(found, Tensor) else found
            yield from [torch.cat([*parts]).t()] if base.is_transposed(name) else parts

    return specs, stored


def write_config(source: Path, out: Path, dtype: torch.dtype, decoder: DecoderConfig | None = None) -> None:
    """Write the config.json of an exported model: the source's, with the new dtype and without quantization."""
    base = ModelFiles.read(source)
    decoder = decoder or base.decoder
    name, is_tied = str(dtype).removeprefix("torch."), decoder.tied or decoder.has_score
    outer = {"tie_word_embeddings": is_tied, "dtype": name, "torch_dtype": name}  # for transformers 5, and for 4
    fields = text_fields(base.config)
    config = text = with_both_rope_forms({**fields, **outer, "vocab_size": decoder.vocab_size})
    if decoder.wrapped:
        config = {**base.config, **outer, "text_config": text}
        del text["architectures"]  # belongs to the wrapper
    for fields in (config, text):
        fields.pop("quantization_config", None)
    write_json(out / "config.json", config)


def describe_score(out: Path, decoder: DecoderConfig) -> None:
    """Let transformers load a reward model as AutoModelForSequenceClassification; other models stay unchanged.

    The reward is read at the last token that is not padding, so the pad token must not end answers.
    """
    if not decoder.has_score:
        return
    chat = ChatTokenizer(out)
    names = [chat.special.get(name, "") for name in ("pad_token", "unk_token", "bos_token")]
    ids = [*(chat.tokenizer.token_to_id(name) for name in names if name), *range(len(chat.stop_ids) + 1)]
    pad = next(i for i in ids if i is not None and i not in chat.stop_ids)
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"architectures": [score_architecture(decoder.family)], "pad_token_id": pad, **labels},
        "tokenizer_config.json": {"pad_token": chat.tokenizer.id_to_token(pad)},
    }
    for path in (out / name for name in changes):
        settings = {**(read_json(path) if path.is_file() else {}), **changes[path.name]}
        path.unlink(missing_ok=True)
        write_json(path, settings)


def copy_companions(source: Path, out: Path, base: Path | None = None, add_tokens: Sequence[str] = ()) -> None:
    """Copy the tokenizer's files and generation_config.json, so that other tools render and stop as nanoft does.

    If the model has no chat template, the default template used in training is written; missing stop tokens are added.
    """
    files = [(source, file) for name in TOKENIZER_FILES for file in source.glob(name)]
    files += [(base or source, (base or source) / name) for name in PROCESSOR_FILES]
    for place, file in [found for found in files if found[1].is_file()]:
        if add_tokens and file.name == "tokenizer.json":
            continue  # written below
        copied = out / file.relative_to(place)
        copied.parent.mkdir(exist_ok=True)
        write_file(copied, [read_bytes(file, MAX_TOKENIZER)])
    path = source / "generation_config.json"
    if not path.is_file() and base is not None:
        path = base / path.name
    stop_ids: list[int] = []
    settings = read_json(path) if path.is_file() else {}
    if (source / "tokenizer.json").is_file():
        chat = ChatTokenizer(source, add_tokens=add_tokens)
        stop_ids = chat.stop_ids
        if add_tokens:
            write_file(out / "tokenizer.json", [chat.tokenizer.to_str(pretty=True).encode()])
        if not chat.has_own_template:
            write_file(out / "chat_template.jinja", [chat.template.encode()])
    known = settings.get("eos_token_id", [])
    if stop_ids and {*stop_ids} != {*(known if isinstance(known, list) else [known])}:
        write_json(out / path.name, {**settings, "eos_token_id": stop_ids})
    elif path.is_file():
        write_file(out / path.name, [read_bytes(path)])
