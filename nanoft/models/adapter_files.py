"""Read and write adapters in the format of the PEFT library, which other tools share.

adapter_config.json describes the adapter; adapter_model.safetensors holds its tensors under PEFT's names. PEFT's format
has no field for the quantization of the base in training, which goes into a separate file, nanoft.json.

A checkpoint also holds tensors that only some variants have, such as PiSSA's A0 and B0, which a decomposition on
another machine would not reproduce exactly.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoft import UserError
from nanoft.blocks.trained import Adapter, TrainedRows, is_inside
from nanoft.config import LoRAConfig
from nanoft.config.settings import check_expressions
from nanoft.data.tokenizer_files import MAX_ID
from nanoft.io.atomic import write_file, write_json
from nanoft.io.tensor_files import encode_safetensors, load_tensors, one_by_one, write_tensors
from nanoft.io.untrusted import read_json, time_limit
from nanoft.lora import (
    MATCHING_SECONDS,
    LoRAEmbedding,
    LoRALinear,
    by_pattern,
    linears_of,
    make_lora,
    matches_target,
    variant_of,
    weight_of,
)
from nanoft.model import Decoder, DecoderConfig
from nanoft.models.expert_files import GATE_UP, split_gate_up, stack_adapter, stack_name, unstack_adapter
from nanoft.models.families import FAMILIES, file_name, module_name, regroup
from nanoft.models.model_files import TOWERS, split_reference, standard_name

NOTE = "nanoft.json"  # a separate file, because PEFT warns about unknown keys in adapter_config.json
PEFT_PREFIX = "base_model.model."
A, B = "lora_A.weight", "lora_B.weight"
A_EMBEDDING = LoRAEmbedding.NAMES["lora_A"]
# The part of a tensor's name after the module.
PART = re.compile(r"\.(lora_\w+(?:\.weight)?|token_adapter\.\w+|(?:base_layer\.)?(?:weight|bias))$")
FACTOR_A = re.compile(r"\.lora_(?:embedding_)?A(?:\.weight)?$")
# Variants of PEFT's names: with the name of the adapter (`.default`), as in a state dict.
SPELLINGS = [
    (r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight"),
    (r"\.(lora_embedding_[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)[\w.]*$", r".\1"),
    (r"\.modules_to_save\.(?:\w+\.)?(weight|bias)$", r".\1"),
]
# Fields of adapter_config.json that are read here or do not change the result ...
PEFT_FIELDS = """
    base_model_name_or_path r lora_alpha lora_dropout target_modules fan_in_fan_out task_type auto_mapping peft_version
    inference_mode revision megatron_core qalora_group_size runtime_config rank_pattern alpha_pattern
    exclude_modules layers_to_transform layers_pattern modules_to_save trainable_token_indices target_parameters
""".split()  # noqa: SIM905
# ... and fields that do change it, with the supported values. Any other field must be unset.
PEFT_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    "use_rslora": (True,),
    "use_dora": (True,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # these leave the base's weights unchanged
}


def adapter_tensors(adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """The tensors of the adapters that a checkpoint stores, under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{name}.{adapter.NAMES.get(part, f'{part}.weight')}": tensor.detach()
        for name, adapter in adapters.items()
        for part, tensor in (*adapter.named_parameters(recurse=False), *adapter.named_buffers(recurse=False))
        if part in adapter.NAMES or part.startswith("lora_")
    }


def as_plain_lora(lora: LoRAConfig, tensors: dict[str, Tensor]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter in a checkpoint as plain LoRA on the same base: PiSSA's has rank 2r (Meng et al. 2024, app. C)."""
    variant = variant_of(lora)
    if variant.FACTORS == LoRALinear.FACTORS:
        return lora, tensors
    more = math.sqrt(variant.RANKS) if lora.rslora else variant.RANKS  # keeps alpha / r, or alpha / sqrt(r)
    ranks = {key: variant.RANKS * rank for key, rank in lora.rank_pattern.items()}
    alphas = {key: more * alpha for key, alpha in lora.alpha_pattern.items()}
    plain = dict(tensors)
    suffixes = tuple(f"{part}.weight" for part in variant.FACTORS)
    for module in dict.fromkeys(name.rpartition(".lora_")[0] + "." for name in tensors if name.endswith(suffixes)):
        factors = [plain.pop(module + suffix) for suffix in suffixes]  # a KeyError if one is missing
        plain[module + A], plain[module + B] = variant.plain_factors(*factors)
    rank, alpha = variant.RANKS * lora.rank, more * lora.alpha
    return replace(lora, init="default", rank=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas), plain


def make_views(tensors: Mapping[str, Tensor]) -> Callable[..., LoRALinear]:
    """A `make_lora` whose A and B are these tensors, if they fit: they may stay in their file, in its dtype."""

    def make(name: str, *settings: Any) -> LoRALinear:
        adapter = make_lora(name, *settings)
        for part, file_part in zip(LoRALinear.FACTORS, (A, B), strict=True):
            factor, stored = getattr(adapter, part), tensors.get(f"{PEFT_PREFIX}{name}.{file_part}")
            if stored is not None and stored.shape == factor.shape and stored.is_floating_point():
                factor.data = stored
        return adapter

    return make


def _are_one(a: Tensor, b: Tensor) -> bool:
    return not hasattr(a, "full_tensor") and a.device == b.device and a.is_set_to(b)  # a shard is a copy


@torch.no_grad()
def load_adapter_tensors(adapters: dict[str, Adapter], tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors with PEFT's names into the adapters; a UserError names the first that does not fit."""
    own = adapter_tensors(adapters)
    views = {name for name, tensor in own.items() if name in tensors and _are_one(tensor, tensors[name])}
    own, tensors = ({name: t for name, t in some.items() if name not in views} for some in (own, tensors))
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, adapter in adapters.items():  # PEFT may store the base's weight with an adapter of the embedding
        stored = tensors.pop(f"{PEFT_PREFIX}{name}.base_layer.weight", None)
        if stored is not None and not torch.equal(stored, weight_of(adapter.base).to(stored)):
            fix = "merge it with PEFT (merge_and_unload) and use the result as a model"
            raise UserError(f"{source}: {name}.base_layer.weight differs from the base: {fix}")
    copy_matching(own, tensors, source, "is it the right base?")
    for adapter in adapters.values():
        adapter.train(adapter.training)  # drops cached norms


@torch.no_grad()
def copy_matching(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str, fix: str) -> None:
    """Copy tensors into those of the same name; a UserError names the first whose name, shape or dtype differs."""

    def describe(tensor: Tensor | None, absent: str) -> str:
        return absent if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"

    for name in sorted(own.keys() | saved.keys()):
        have, want = describe(saved.get(name), "missing"), describe(own.get(name), "none")
        if have != want:
            raise UserError(f"{where}: {name}: {have}, but {want} is needed: {fix}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def save_adapter(
    directory: Path, model: Decoder, adapters: dict[str, Adapter], lora: LoRAConfig, base_name: str,
    note: dict[str, Any],
) -> None:  # fmt: skip
    """Write adapter_model.safetensors, adapter_config.json and nanoft.json, which holds `note`."""
    directory.mkdir(parents=True, exist_ok=True)
    plain, tensors = as_plain_lora(lora, adapter_tensors(adapters))
    family, stored = FAMILIES[model.config.family], {name_in_peft(model.config, name): t for name, t in tensors.items()}
    own_names = model.config.wrapped or family.names or family.stacked
    stored = stack_adapter(stored) if family.stacked else stored
    specs = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in stored.items()}
    encoded = encode_safetensors(specs, lambda name: stored[name].float())
    write_file(directory / "adapter_model.safetensors", encoded)

    def rename(module: str) -> str:
        name = name_in_peft(model.config, module)
        return stack_name(f"{name}.weight").removesuffix(".weight") if family.stacked else name

    if own_names and (plain.rank_pattern or plain.alpha_pattern):  # expressions for the decoder's names
        ranks = ranks_of(tensors)
        alphas = {name: by_pattern(plain.alpha_pattern, name, plain.alpha) for name in ranks}
        plain = _with_ranks(plain, *({rename(name): n for name, n in numbers.items()} for numbers in (ranks, alphas)))
    # PEFT's target_modules: last parts of names, unless modules without an adapter share them.
    low_rank = {rename(name) for name, adapter in adapters.items() if isinstance(adapter, LoRALinear)}
    bare = {name.rpartition(".")[2] for name in map(rename, linears_of(model)) if name not in low_rank}
    bare |= {name.rpartition(".")[2] for name in low_rank if model.config.wrapped}  # those of the other towers
    parameters = {name for name in low_rank if family.stacked and (".experts." in name or name.endswith(".router"))}
    modules = low_rank - parameters
    targets = sorted({name if (last := name.rpartition(".")[2]) in bare else last for name in modules})
    parameters = {f"{name}.weight" if name.endswith(".router") else name for name in parameters}
    saved = [rename(name) for name, adapter in adapters.items() if getattr(adapter, "copy", None) is not None]
    trained = {rename(name): a.ids.tolist() for name, a in adapters.items() if isinstance(a, TrainedRows)}
    rows = {name.rpartition(".")[2]: ids for name, ids in trained.items()}
    base, revision = split_reference(base_name)
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if "score" in adapters else "CAUSAL_LM",
        "base_model_name_or_path": base, "revision": revision,
        "r": plain.rank, "lora_alpha": plain.alpha,
        "rank_pattern": plain.rank_pattern, "alpha_pattern": plain.alpha_pattern,
        "lora_dropout": 0.0 if model.config.routing else plain.dropout,  # PEFT refuses another one for experts
        "target_modules": targets,
        "use_rslora": plain.rslora, "use_dora": plain.dora, "bias": plain.bias,
        "fan_in_fan_out": FAMILIES[model.config.family].transposed, "inference_mode": True, "init_lora_weights": True,
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        **({"modules_to_save": saved} if saved else {}), **({"trainable_token_indices": rows} if rows else {}),
    }  # fmt: skip
    write_json(directory / "adapter_config.json", config)
    write_json(directory / NOTE, note)


def name_in_peft(config: DecoderConfig, name: str) -> str:
    """The name in transformers of a part of the decoder, or in PEFT of a part of its adapter."""
    prefix, place = PEFT_PREFIX * name.startswith(PEFT_PREFIX), name.removeprefix(PEFT_PREFIX)
    if config.wrapped:
        place = re.sub(r"^model\.", "model.language_model.", place)
    return prefix + (place if place.startswith("lm_head.") else file_name(config.family, place))


def select_modules(
    lora: LoRAConfig, tensors: dict[str, Tensor], only: Sequence[str]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The low-rank adapters of the modules that `only` names, in the syntax of lora.target_modules; each must match."""
    ranks = ranks_of(tensors)
    for word in only:
        try:
            re.compile(word)
        except re.error as error:
            raise UserError(f"--only: {word!r:.60} is neither a name nor a regular expression: {error}") from None
        if not any(matches_target(name, word) for name in ranks):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in ranks))
            raise UserError(f"--only: {word!r} matches no module of this adapter, which has {known}")
    ranks = {name: rank for name, rank in ranks.items() if any(matches_target(name, word) for word in only)}
    alphas = {name: by_pattern(lora.alpha_pattern, name, lora.alpha) for name in ranks}
    bias: Any = "none" if lora.bias == "none" else "lora_only"
    lora = replace(lora, bias=bias, modules_to_save=(), trainable_token_indices={})
    return _with_ranks(lora, ranks, alphas), {key: t for key, t in tensors.items() if _split(key)[0] in ranks}


def sum_adapters(
    parts: Sequence[tuple[LoRAConfig, dict[str, Tensor]]],  # in PEFT's format, see `as_plain_lora`
    weights: Sequence[float],
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The weighted sum of adapters of one base, w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ..., as one adapter, exactly.

    It is the product of [w_1 s_1 B_1, w_2 s_2 B_2, ...] and [A_1; A_2; ...], so the ranks add up. DoRA's
    m (W + s B A) / |W + s B A| is not such a sum.
    """
    if any(lora.dora for lora, _ in parts):
        raise UserError("--weights: DoRA adapters cannot be summed: merge them one at a time")
    combined: dict[str, Tensor] = {}
    for (lora, tensors), weight in zip(parts, weights, strict=True):
        for place, stored in tensors.items():
            (name, part), tensor = _split(place), stored.float()
            if part == "base_layer.weight":  # of the base
                continue
            if not part.startswith("lora_"):
                raise UserError(f"--weights: {name}: only low-rank adapters can be summed: merge them one at a time")
            axis = 1 if "_B" in part else 0
            tensor = tensor * (weight * _scaling(lora, name)) if axis else tensor
            combined[place] = torch.cat((combined[place], tensor), axis) if place in combined else tensor
    ranks = ranks_of(combined)
    return _with_ranks(LoRAConfig(), ranks, dict(ranks)), combined  # alpha / r = 1


def fold_patterns(lora: LoRAConfig, tensors: dict[str, Tensor]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The same adapter with one rank and one alpha: smaller ranks are padded with zeros, scalings folded into B."""
    ranks, scale, folded = ranks_of(tensors), _scaling(lora, ""), dict(tensors)
    rank = max(ranks.values())
    for name, tensor in tensors.items():
        module, part = _split(name)
        if FACTOR_A.search(name):
            folded[name] = F.pad(tensor.float(), (0, 0, 0, rank - len(tensor)))
        elif part.startswith("lora_") and "_B" in part:
            folded[name] = F.pad(tensor.float() * (_scaling(lora, module) / scale), (0, rank - ranks[module]))
    return replace(lora, rank=rank, alpha=scale * rank, rank_pattern={}, alpha_pattern={}, rslora=False), folded


def fit_experts(
    config: DecoderConfig, lora: LoRAConfig, tensors: dict[str, Tensor]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter for a decoder whose experts may be beside an MLP, or have gate and up apart, unlike PEFT's files."""
    stored = {regroup(config, name): name for name in tensors}
    fitted = {name: tensors[own] for name, own in stored.items()}
    if config.mlp == "gated" and any(f".experts.0.{GATE_UP}." in name for name in tensors):
        fitted = split_gate_up(fitted)
    if fitted.keys() == tensors.keys():
        return lora, tensors
    ranks, alphas = ranks_of(fitted), dict[str, float]()
    places = {_split(name)[0]: _split(own)[0] for name, own in stored.items()}
    for name, rank in ranks.items():  # their scaling is as it was
        together = re.sub(r"(\.experts\.\d+)\.(gate|up)_proj$", rf"\1.{GATE_UP}", name)
        alphas[name] = _scaling(lora, places.get(name) or places[together]) * (math.sqrt(rank) if lora.rslora else rank)
    return _with_ranks(lora, ranks, alphas), fitted


def _scaling(lora: LoRAConfig, name: str) -> float:
    """s of a module: alpha / r, or alpha / sqrt(r)."""
    rank, alpha = by_pattern(lora.rank_pattern, name, lora.rank), by_pattern(lora.alpha_pattern, name, lora.alpha)
    return alpha / (math.sqrt(rank) if lora.rslora else rank)


def ranks_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The rank of each low-rank adapter by its module: the number of rows of A."""
    found = {_split(name)[0]: tensor for name, tensor in tensors.items() if FACTOR_A.search(name)}
    return {module: len(a) if a.dim() else 0 for module, a in found.items()}


def _split(name: str) -> tuple[str, str]:
    """The module of a tensor, and PEFT's name of the part."""
    found = PART.search(name)
    if found is None:
        raise UserError(f"{name}: not a tensor of an adapter: copy the adapter again")
    return name[: found.start()].removeprefix(PEFT_PREFIX), found[1]


def _with_ranks(lora: LoRAConfig, ranks: dict[str, int], alphas: dict[str, float]) -> LoRAConfig:
    """Settings with a rank and an alpha for each module; the most common ones become the defaults."""
    rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    rank_pattern = {name: value for name, value in ranks.items() if value != rank}
    alpha_pattern = {name: value for name, value in alphas.items() if value != alpha}
    plain = replace(lora, rank=rank, alpha=alpha, target_modules=tuple(ranks))
    return replace(plain, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and values, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in one_by_one(dict(sorted(tensors.items()))):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def only_linears(adapters: dict[str, Adapter], whose: str, fix: str) -> dict[str, LoRALinear]:
    """Adapters for a format that has low-rank adapters of linears only; others are refused."""
    linears = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LoRALinear)}
    for name, adapter in adapters.items():
        if name not in linears or isinstance(adapter, LoRAEmbedding):
            raise UserError(f"{whose} adapters cannot store the trained {name}: {fix}")
        if adapter.bias is not None:
            raise UserError(f"{whose} adapters cannot store the trained bias of {name}: {fix}")
    return linears


def save_mlx(
    directory: Path, adapters: dict[str, Adapter], lora: LoRAConfig, shape: DecoderConfig, base_name: str
) -> None:
    """Write adapters.safetensors and adapter_config.json in the format of mlx-lm.

    There A and B are transposed, lora_a (in, r) and lora_b (r, out), and all modules share one rank and one scale:
    smaller ranks are padded with zeros, and other scales folded into lora_b. Trained biases are refused.
    """
    fix = "merge the adapter with --format hf"
    if shape.routing and any(".experts." in name for name in adapters):
        raise UserError(f"--format mlx: mlx-lm has stacks of experts, which are not written here: {fix}")
    if shape.family == "qwen3_5_text" and not shape.wrapped:
        raise UserError(f"--format mlx: mlx-lm loads Qwen3.5 only with its images' tower: {fix}")
    linears = only_linears(adapters, "--format mlx: mlx-lm", fix)
    plain, stored = fold_patterns(*as_plain_lora(lora, adapter_tensors(adapters)))
    parts = {A: "lora_a", B: "lora_b", "lora_magnitude_vector": "m"}
    tensors = dict[str, Tensor]()
    for name, tensor in stored.items():
        module, part = _split(name)
        names = _mlx_names(module, shape.family)
        rows = [tensor] * len(names) if part == A else tensor.chunk(len(names))
        for new_name, some in zip(names, rows, strict=True):
            tensors[f"{'language_model.' * shape.wrapped}{new_name}.{parts[part]}"] = some.t().contiguous()
    write_tensors(directory / "adapters.safetensors", tensors)
    places = [new_name for name in linears for new_name in _mlx_names(name, shape.family)]
    keys = sorted({re.sub(r"^model\.(layers|h)\.\d+\.", "", place) for place in places})
    kind = "dora" if any(name.endswith(".m") for name in tensors) else "lora"
    parameters = {"rank": plain.rank, "scale": plain.alpha / plain.rank, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": kind, "num_layers": shape.num_layers, "lora_parameters": parameters, "model": base_name}
    write_json(directory / "adapter_config.json", config)


def _mlx_names(module: str, family: str) -> list[str]:
    """The names of a module in mlx-lm: two if gate and up are separate linears there."""
    if family == "granitemoehybrid":
        return [module.replace("gate_up", part) for part in ("gate", "up")] if "gate_up" in module else [module]
    return [re.sub(r"^(transformer\.h|gpt_neox\.layers)\.", "model.h.", file_name(family, module))]


def read_adapter(directory: Path) -> tuple[LoRAConfig, str, dict[str, Tensor], dict[str, Any]]:
    """Settings, the base's name, tensors, and the content of nanoft.json (empty if another tool wrote the adapter)."""
    path, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    config = read_json(path)
    note = read_json(directory / NOTE) if (directory / NOTE).is_file() else {}
    if (pickle := weights.with_suffix(".bin")).is_file() and not weights.is_file():
        raise UserError(f"{pickle}: pickles can run code and are not read: save the adapter again with a newer PEFT")
    if not weights.is_file():
        raise UserError(f"{directory}: {weights.name} is missing: copy the complete adapter directory")
    tensors = load_tensors(weights)
    try:
        with time_limit(MATCHING_SECONDS, "rank_pattern"):
            tensors = unstack_adapter(config, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors, places = standard_names(tensors, weights)
    if config.get("target_parameters"):  # expressions mean the stacks
        places = {name: re.sub(r"(\.experts)\.\d+(?=\.)", r"\1", place) for name, place in places.items()}
    parts = [_split(name) for name in tensors]
    with_a, with_b = ({module for module, part in parts if part == factor} for factor in (A, B))
    if (incomplete := sorted(with_a ^ with_b)) or not any(part.startswith("lora_") for _, part in parts):
        who = incomplete[0] if incomplete else "the adapter"
        raise UserError(f"{weights}: {who} has no lora_A or no lora_B: copy the complete adapter directory")
    try:
        with time_limit(MATCHING_SECONDS, "target_modules, rank_pattern, alpha_pattern"):
            lora = _settings(config, tensors, places)
            for module, have in ranks_of(tensors).items():  # before memory for these ranks is allocated
                if have != (rank := by_pattern(lora.rank_pattern, module, lora.rank)):
                    raise UserError(f"{module} has rank {have}, but adapter_config.json says {rank}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    return lora, base if revision in (None, "main") else f"{base}@{revision}", tensors, note


def _settings(config: dict[str, Any], tensors: dict[str, Tensor], places: dict[str, str]) -> LoRAConfig:
    """adapter_config.json as settings; an unknown field could change the result and is refused.

    Some settings depend on the tensors. `places`: the modules' names in the file, which its expressions match.
    """
    for key, value in config.items():
        if value and key not in PEFT_FIELDS and value not in PEFT_VALUES.get(key, ()):
            raise UserError(f"{key}: {value!r:.60} is not supported")
    if not isinstance(config.get("base_model_name_or_path") or "", str):
        raise UserError(f"base_model_name_or_path: {config['base_model_name_or_path']!r:.60} is not a name")
    copies = tuple(module for module, part in map(_split, tensors) if part == "weight")
    parameters = config.get("target_parameters")
    targets = config.get("target_modules") or (list(places) if parameters else [])
    rows = config.get("trainable_token_indices") or {}
    rows = {module_name(name): ids for name, ids in rows.items()} if isinstance(rows, dict) else rows
    lora = LoRAConfig(
        rank=config.get("r"), alpha=config.get("lora_alpha", 8), bias=config.get("bias") or "none",  # type: ignore
        target_modules=tuple(targets) if targets and isinstance(targets, list) else (targets,),  # type: ignore
        rank_pattern=config.get("rank_pattern") or {}, alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")), dora=bool(config.get("use_dora")), modules_to_save=copies,
        trainable_token_indices={"embed_tokens": rows} if isinstance(rows, list) else rows,
    )  # fmt: skip
    check_expressions(lora)
    if wrong := [i for ids in lora.trainable_token_indices.values() for i in ids if not 0 <= i < MAX_ID]:
        raise UserError(f"trainable_token_indices: {wrong[0]} is not the id of a token")
    for saved in config.get("modules_to_save") or ():
        if not any(is_inside(name, module_name(saved)) for name in copies):
            raise UserError(f"modules_to_save: {saved!r:.60} has no tensors: copy the adapter again")
    narrowed = parameters or config.get("exclude_modules") or config.get("layers_to_transform") is not None
    keys = (*lora.rank_pattern, *lora.alpha_pattern)
    has_idle_key = not all(any(by_pattern({key: 1}, place, 0) for place in places.values()) for key in keys)
    if narrowed or has_idle_key or any(place != name for name, place in places.items()):
        # The tensors determine the modules with adapters; the patterns determine their ranks and alphas.
        ranks = {name: by_pattern(lora.rank_pattern, place, lora.rank) for name, place in places.items()}
        alphas = {name: by_pattern(lora.alpha_pattern, place, lora.alpha) for name, place in places.items()}
        lora = _with_ranks(lora, ranks, alphas)
    return lora


def standard_names(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under PEFT's current names, whatever wrapped the model or named the adapter.

    Also the name in the file of each module with a low-rank adapter, which the expressions in its config match.
    """
    found, places = dict[str, Tensor](), dict[str, str]()
    for stored, tensor in tensors.items():
        if ".original_module." in stored or ".token_adapter.base_layer." in stored:
            continue  # of the base
        place, dot, part = stored.removeprefix(PEFT_PREFIX).partition(".lora_")
        if re.match(TOWERS, place):  # PEFT adapts these too; training on text leaves B = 0
            if part.startswith("B") and tensor.any():
                raise UserError(f"{path}: {stored}: was trained on images, which are not supported: train on text")
            continue
        name = PEFT_PREFIX + standard_name(stored).removeprefix(PEFT_PREFIX)
        for pattern, standard in SPELLINGS:
            name = re.sub(pattern, standard, name)
        if name in found and not torch.equal(found[name], tensor):
            raise UserError(f"{path}: {stored}: a second tensor for {name}: save a single adapter")
        found[name] = tensor
        if dot:
            places[_split(name)[0]] = place
    return found, places


def vocabulary_of(lora: LoRAConfig, tensors: dict[str, Tensor]) -> int:
    """The smallest vocabulary that a model must have for this adapter, as far as its tensors tell."""
    axes = {f"embed_tokens.{A_EMBEDDING}": 1, "embed_tokens.weight": 0, "lm_head.weight": 0, f"lm_head.{B}": 0}
    sizes = [max(ids) + 1 for ids in lora.trainable_token_indices.values() if ids]
    for end, axis in axes.items():
        sizes += [t.shape[axis] for name, t in tensors.items() if name.endswith(end) and t.dim() == 2]
    return max(sizes, default=0)
