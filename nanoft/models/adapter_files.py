"""An adapter as files, in the format of the PEFT library, so that other tools can read it and theirs can be read here.

adapter_config.json describes the adapter; adapter_model.safetensors holds its tensors under PEFT's names. PEFT's format
has no field for how the base was quantized in training; that goes into a file of its own, nanoft.json.

A checkpoint also holds what only some variants have, such as PiSSA's A0 and B0, which a decomposition repeated on
another machine would not reproduce exactly.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import UserError
from nanoft.config import LoRAConfig
from nanoft.config.settings import check_expressions
from nanoft.io.atomic import write_json
from nanoft.io.tensor_files import load_tensors, write_tensors
from nanoft.io.untrusted import read_json, time_limit
from nanoft.lora import MATCHING_SECONDS, LoRALinear, by_pattern, linears_of, matches_target, variant_of
from nanoft.models.model_files import split_reference

NOTE = "nanoft.json"  # a separate file, because PEFT warns about unknown keys in adapter_config.json
PEFT_PREFIX = "base_model.model."
# Names in PEFT's files: the attribute of LoRALinear and `.weight`, with two exceptions; the trained bias is the base's.
PEFT_NAMES = {"lora_magnitude_vector": "lora_magnitude_vector", "bias": "base_layer.bias"}
A, B, BIAS = "lora_A.weight", "lora_B.weight", PEFT_NAMES["bias"]
# Fields of adapter_config.json that are read here or do not change the result ...
PEFT_FIELDS = """
    base_model_name_or_path r lora_alpha lora_dropout target_modules task_type auto_mapping peft_version inference_mode
    revision megatron_core qalora_group_size runtime_config ensure_weight_tying rank_pattern alpha_pattern
""".split()  # noqa: SIM905
# ... and fields that do, with the supported values. Any other field must be unset.
PEFT_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    "use_rslora": (True,),
    "use_dora": (True,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # these leave the base's weights unchanged
}


def adapter_tensors(adapters: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """The tensors of the adapters that a checkpoint stores, under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{name}.{PEFT_NAMES.get(part, f'{part}.weight')}": tensor.detach()
        for name, adapter in adapters.items()
        for part, tensor in (*adapter.named_parameters(recurse=False), *adapter.named_buffers(recurse=False))
        if part == "bias" or part.startswith("lora_")
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


@torch.no_grad()
def load_adapter_tensors(adapters: dict[str, LoRALinear], tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors with PEFT's names into the adapters; a UserError names those that do not fit."""
    expected = adapter_tensors(adapters)
    known = (".lora_", ".base_layer.bias")
    if full := sorted(n for n in tensors if n.startswith(PEFT_PREFIX) and not any(part in n for part in known)):
        raise UserError(f"{source}: {full[0]}: fully trained layers beside an adapter are not supported")
    if wrong := sorted(expected.keys() ^ tensors.keys()):
        what = "missing" if wrong[0] in expected else "unexpected"
        raise UserError(
            f"{source}: {len(wrong)} tensors do not match this model, first {wrong[0]} ({what}): is it the right base?"
        )
    for name, own in expected.items():
        if own.shape != tensors[name].shape:
            have, want = tuple(tensors[name].shape), tuple(own.shape)
            raise UserError(f"{source}: {name} is {have}, but this model and rank need {want}")
        if not tensors[name].is_floating_point():
            raise UserError(f"{source}: {name} is {tensors[name].dtype}, but weights must be floating-point")
        own.copy_(tensors[name])
    for adapter in adapters.values():
        adapter.train(adapter.training)  # drops cached norms


def save_adapter(
    directory: Path, model: nn.Module, adapters: dict[str, LoRALinear], lora: LoRAConfig, base_name: str,
    note: dict[str, Any],
) -> None:  # fmt: skip
    """Write adapter_model.safetensors, adapter_config.json and nanoft.json, which holds `note`."""
    directory.mkdir(parents=True, exist_ok=True)
    plain, tensors = as_plain_lora(lora, adapter_tensors(adapters))
    write_tensors(directory / "adapter_model.safetensors", tensors)
    # PEFT's target_modules: last parts of names, unless linears without an adapter share them.
    bare = {name.rpartition(".")[2] for name in linears_of(model)}
    base, revision = split_reference(base_name)
    targets = sorted({name if (last := name.rpartition(".")[2]) in bare else last for name in adapters})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "r": plain.rank, "lora_alpha": plain.alpha,
        "rank_pattern": plain.rank_pattern, "alpha_pattern": plain.alpha_pattern,
        "lora_dropout": plain.dropout, "target_modules": targets,
        "use_rslora": plain.rslora, "use_dora": plain.dora, "bias": plain.bias,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
    write_json(directory / "adapter_config.json", config)
    write_json(directory / NOTE, note)


def select_modules(
    lora: LoRAConfig, tensors: dict[str, Tensor], only: Sequence[str]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The modules of an adapter that `only` names, in the syntax of lora.target_modules; each must match."""
    modules = _by_module(tensors)
    for word in only:
        try:
            re.compile(word)
        except re.error as error:
            raise UserError(f"--only: {word!r:.60} is neither a name nor a regular expression: {error}") from None
        if not any(matches_target(name, word) for name in modules):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            raise UserError(f"--only: {word!r} matches no module of this adapter, which has {known}")
    kept = [name for name in modules if any(matches_target(name, word) for word in only)]
    tensors = {f"{PEFT_PREFIX}{name}.{key}": tensor for name in kept for key, tensor in modules[name].items()}
    ranks = {name: by_pattern(lora.rank_pattern, name, lora.rank) for name in kept}
    alphas = {name: by_pattern(lora.alpha_pattern, name, lora.alpha) for name in kept}
    has_bias = any(BIAS in modules[name] for name in kept)
    return _with_ranks(replace(lora, bias="lora_only" if has_bias else "none"), ranks, alphas), tensors


def sum_adapters(
    parts: Sequence[tuple[LoRAConfig, dict[str, Tensor]]],  # in PEFT's format, see `as_plain_lora`
    weights: Sequence[float],
    base_bias: Callable[[str], Tensor | None],  # of a module, (out,)
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The weighted sum of adapters of one base, w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ..., as one adapter, exactly.

    It is the product of [w_1 s_1 B_1, w_2 s_2 B_2, ...] and [A_1; A_2; ...], so the ranks add up. A trained bias is
    b + w_1 (b_1 - b) + w_2 (b_2 - b) + ... DoRA's m (W + s B A) / |W + s B A| is not such a sum, and is refused.
    """
    if any(lora.dora for lora, _ in parts):
        raise UserError("--weights: DoRA adapters cannot be summed: merge them one at a time")
    modules = [_by_module(tensors) for _, tensors in parts]
    with_bias = any(lora.bias != "none" for lora, _ in parts)
    combined: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in dict.fromkeys(name for part in modules for name in part):
        a, b, bias = [], [], base_bias(name) if with_bias else None
        change = 0 if bias is None else torch.zeros_like(bias)
        for (lora, _), part, weight in zip(parts, modules, weights, strict=True):
            if name in part:
                a.append(part[name][A].float())
                rank = by_pattern(lora.rank_pattern, name, lora.rank)
                scaling = by_pattern(lora.alpha_pattern, name, lora.alpha) / (rank**0.5 if lora.rslora else rank)
                b.append(part[name][B].float() * (weight * scaling))
                if bias is not None and BIAS in part[name]:
                    change = change + weight * (part[name][BIAS].float() - bias)
        prefix = f"{PEFT_PREFIX}{name}."
        combined[prefix + A], combined[prefix + B] = torch.cat(a), torch.cat(b, dim=1)
        ranks[name] = len(combined[prefix + A])
        if bias is not None:
            combined[prefix + BIAS] = bias + change
    plain = LoRAConfig(bias="lora_only" if with_bias else "none")
    return _with_ranks(plain, ranks, dict(ranks)), combined  # alpha / r = 1


def _by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by module and by the part of it, as PEFT names it."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.search(r"\.(lora_[AB]\.weight|lora_magnitude_vector|base_layer\.bias)$", name)
        if found is None:
            raise UserError(f"{name}: fully trained layers beside an adapter are not supported")
        modules.setdefault(name[: found.start()].removeprefix(PEFT_PREFIX), {})[found[1]] = tensor
    return modules


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
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_mlx(directory: Path, adapters: dict[str, LoRALinear], layers: int, base_name: str) -> None:
    """Write adapters.safetensors and adapter_config.json in the format of mlx-lm.

    There A and B are transposed, lora_a (in, r) and lora_b (r, out), and all modules share one rank and one scale: a
    smaller rank is padded with zeros, another scale goes into lora_b. Trained biases are refused.
    """
    if any(adapter.bias is not None for adapter in adapters.values()):
        raise UserError("--format mlx: mlx-lm has no trained biases: merge the adapter with --format hf")
    rank = max(len(adapter.factors()[0]) for adapter in adapters.values())
    scale = next(iter(adapters.values())).scaling
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        a, b = (factor.detach() for factor in adapter.factors())
        more = rank - len(a)
        tensors[f"{name}.lora_a"] = F.pad(a, (0, 0, 0, more)).T.contiguous()  # (in, r)
        tensors[f"{name}.lora_b"] = F.pad(b * (adapter.scaling / scale), (0, more)).T.contiguous()  # (r, out)
        if adapter.lora_magnitude_vector is not None:
            tensors[f"{name}.m"] = adapter.lora_magnitude_vector.detach()
    write_tensors(directory / "adapters.safetensors", tensors)
    keys = sorted({name.split(".", 3)[3] for name in adapters})  # without model.layers.N.
    kind = "dora" if any(name.endswith(".m") for name in tensors) else "lora"
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": base_name}
    write_json(directory / "adapter_config.json", config)


def read_adapter(directory: Path) -> tuple[LoRAConfig, str, dict[str, Tensor], dict[str, Any]]:
    """Settings, the base's name, tensors, and the content of nanoft.json (empty if another tool wrote the adapter)."""
    path, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    config = read_json(path)
    note = read_json(directory / NOTE) if (directory / NOTE).is_file() else {}
    try:
        lora = _settings(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if (pickle := weights.with_suffix(".bin")).is_file() and not weights.is_file():
        raise UserError(f"{pickle}: pickles can run code and are not read: save the adapter again with a newer PEFT")
    if not weights.is_file():
        raise UserError(f"{directory}: {weights.name} is missing: copy the complete adapter directory")
    tensors = load_tensors(weights)
    with_a, with_b = ({n.removesuffix(f".{part}") for n in tensors if n.endswith(f".{part}")} for part in (A, B))
    if incomplete := sorted(with_a ^ with_b) if with_a else ["the adapter"]:
        raise UserError(f"{weights}: {incomplete[0]} lacks lora_A or lora_B: copy the complete adapter directory")
    with time_limit(MATCHING_SECONDS, f"{path}: rank_pattern"):
        for name, tensor in tensors.items():  # before memory for the ranks of the settings is allocated
            module, a, _ = name.removeprefix(PEFT_PREFIX).partition(f".{A}")
            have = tensor.shape[0] if tensor.dim() else 0
            if a and have != (rank := by_pattern(lora.rank_pattern, module, lora.rank)):
                raise UserError(f"{weights}: {name} has rank {have}, but adapter_config.json says {rank}")
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    if revision in (None, "main"):
        return lora, base, tensors, note
    if os.path.isdir(base):
        raise UserError(f"{path}: revision: {revision!r:.60}: {base} is a directory, which has none: remove it")
    return lora, f"{base}@{revision}", tensors, note


def _settings(config: dict[str, Any]) -> LoRAConfig:
    """adapter_config.json as settings; a field that is not known here could change the result and is refused."""
    for key, value in config.items():
        if value and key not in PEFT_FIELDS and value not in PEFT_VALUES.get(key, ()):
            raise UserError(f"{key}: {value!r:.60} is not supported")
    if not isinstance(config.get("base_model_name_or_path") or "", str):
        raise UserError(f"base_model_name_or_path: {config['base_model_name_or_path']!r:.60} is not a name")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha", 8), config.get("target_modules")
    if type(rank) is not int or rank < 1:
        raise UserError(f"r: {rank!r:.60} is not a positive integer")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"lora_alpha: {alpha!r:.60} is not a positive number")
    names: list[Any] = targets if isinstance(targets, list) else [targets]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"target_modules: {targets!r:.60} is not a list of module names")
    lora = LoRAConfig(
        rank=rank, alpha=alpha, target_modules=tuple(names), bias=config.get("bias") or "none",
        rank_pattern=config.get("rank_pattern") or {}, alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")), dora=bool(config.get("use_dora")),
    )  # fmt: skip
    check_expressions(lora)
    return lora
