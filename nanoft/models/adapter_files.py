"""An adapter as files, in the layout of the PEFT library, so that other tools read it and theirs are read here.

adapter_config.json says what the adapter is, adapter_model.safetensors holds its tensors under PEFT's names. PEFT's
format has no place for how the base was quantized in training; that is noted in a file of its own.

A checkpoint holds the same tensors, and PiSSA's A0 and B0 besides: they say what was taken out of the base, exactly,
which a decomposition on another machine would not.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
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
from nanoft.io.atomic import write_file
from nanoft.io.tensor_files import load_tensors, write_tensors
from nanoft.io.untrusted import read_json, time_limit
from nanoft.lora import MATCHING_SECONDS, LoRALinear, by_pattern, linears_of, matches_target, variant_of

NOTE = "nanoft.json"  # a file of its own: PEFT warns at keys of adapter_config.json that it does not know
PEFT_PREFIX = "base_model.model."
# An adapter's tensors here and there. The base's bias is the trained one.
PEFT_NAMES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "bias": "base_layer.bias",
    "lora_A0": "lora_A0.weight",  # in checkpoints only
    "lora_B0": "lora_B0.weight",
}
# Fields of adapter_config.json that are read here or say nothing about the result ...
PEFT_FIELDS = frozenset(
    """
    base_model_name_or_path r lora_alpha lora_dropout target_modules task_type auto_mapping peft_version inference_mode
    megatron_core qalora_group_size runtime_config ensure_weight_tying rank_pattern alpha_pattern
    """.split()  # noqa: SIM905
)
# ... and fields that change it, with the only values understood here. Any other field must be unset.
PEFT_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    "use_rslora": (True,),
    "use_dora": (True,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # these leave the base's weights as they are
    "revision": ("main",),
}


def adapter_tensors(adapters: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """All that a checkpoint needs of the adapters, under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{name}.{key}": tensor.detach()
        for name, adapter in adapters.items()
        for part, key in PEFT_NAMES.items()
        if (tensor := getattr(adapter, part, None)) is not None
    }


def as_plain_lora(lora: LoRAConfig, tensors: dict[str, Tensor]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The same adapter as plain LoRA on the same base: PiSSA's has rank 2r (Meng et al. 2024, appendix C).

    Args:
        lora: what the adapter was trained as.
        tensors: of a checkpoint.
    Returns:
        Settings for the rank of the change with the same scaling, alpha / r or alpha / sqrt(r); tensors as in PEFT's
        files.
    """
    variant = variant_of(lora)
    if variant.FACTORS == LoRALinear.FACTORS:
        return lora, tensors
    more = math.sqrt(variant.RANKS) if lora.rslora else variant.RANKS
    ranks = {key: variant.RANKS * rank for key, rank in lora.rank_pattern.items()}
    alphas = {key: more * alpha for key, alpha in lora.alpha_pattern.items()}
    plain, a_name, b_name = dict(tensors), PEFT_NAMES["lora_A"], PEFT_NAMES["lora_B"]
    for module in [name.removesuffix(a_name) for name in tensors if name.endswith(a_name)]:
        factors = [plain.pop(module + PEFT_NAMES[part]) for part in variant.FACTORS]
        plain[module + a_name], plain[module + b_name] = variant.plain_factors(*factors)
    rank, alpha = variant.RANKS * lora.rank, more * lora.alpha
    return replace(lora, init="default", rank=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas), plain


@torch.no_grad()
def load_adapter_tensors(adapters: dict[str, LoRALinear], tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors with PEFT's names into the adapters; every one must be there and fit, and no other.

    Raises:
        UserError: missing, unexpected or mis-shaped tensors, by name.
    """
    expected = adapter_tensors(adapters)
    known = (".lora_", ".base_layer.bias")
    if whole := sorted(n for n in tensors if n.startswith(PEFT_PREFIX) and not any(part in n for part in known)):
        raise UserError(f"{source}: {whole[0]}: layers that are trained whole beside an adapter are not supported")
    if odd := sorted(expected.keys() ^ tensors.keys()):
        what = "missing" if odd[0] in expected else "unexpected"
        raise UserError(f"{source}: {len(odd)} tensors do not fit this model, first {odd[0]} ({what}): is it its base?")
    for name, own in expected.items():
        if own.shape != tensors[name].shape:
            have, want = tuple(tensors[name].shape), tuple(own.shape)
            raise UserError(f"{source}: {name} is {have}, but this model and rank need {want}")
        if not tensors[name].is_floating_point():
            raise UserError(f"{source}: {name} holds {tensors[name].dtype}, where weights are floating-point numbers")
        own.copy_(tensors[name])
    for adapter in adapters.values():
        adapter.train(adapter.training)  # forgets the norm of what it was


def save_adapter(
    directory: Path,
    model: nn.Module,
    adapters: dict[str, LoRALinear],
    lora: LoRAConfig,
    base_name: str,
    note: dict[str, Any],
) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT expects them.

    Args:
        directory: made if it is missing; holds no adapter yet.
        model: the adapters' own.
        lora: what they were trained as.
        base_name: a directory or a name on the Hub.
        note: what PEFT's format has no place for: how the base was quantized, what training computed in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plain, tensors = as_plain_lora(lora, adapter_tensors(adapters))
    write_tensors(directory / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": plain.rank,
        "lora_alpha": plain.alpha,
        "rank_pattern": plain.rank_pattern,
        "alpha_pattern": plain.alpha_pattern,
        "lora_dropout": plain.dropout,
        "target_modules": _peft_targets(model, adapters),
        "use_rslora": plain.rslora,
        "use_dora": plain.dora,
        "bias": plain.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    for name, content in (("adapter_config.json", config), (NOTE, note)):
        write_file(directory / name, [(json.dumps(content, indent=2) + "\n").encode()])


def select_modules(
    lora: LoRAConfig, tensors: dict[str, Tensor], only: Sequence[str]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """A part of an adapter in PEFT's layout: the modules that `only` means, in the words of lora.target_modules.

    Raises:
        UserError: a word that means no module of the adapter, or is no regular expression.
    """
    modules = _by_module(tensors)
    for word in only:
        try:
            re.compile(word)
        except re.error as error:
            raise UserError(f"--only: {word!r:.60} is neither a name nor a regular expression: {error}") from None
        if not any(matches_target(name, word) for name in modules):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            raise UserError(f"--only: {word!r} names nothing that this adapter changes: it has {known}")
    kept = [name for name in modules if any(matches_target(name, word) for word in only)]
    tensors = {f"{PEFT_PREFIX}{name}.{key}": tensor for name in kept for key, tensor in modules[name].items()}
    ranks = {name: by_pattern(lora.rank_pattern, name, lora.rank) for name in kept}
    alphas = {name: by_pattern(lora.alpha_pattern, name, lora.alpha) for name in kept}
    has_bias = any(PEFT_NAMES["bias"] in modules[name] for name in kept)
    return _by_name(replace(lora, bias="lora_only" if has_bias else "none"), ranks, alphas), tensors


def sum_adapters(
    parts: Sequence[tuple[LoRAConfig, dict[str, Tensor]]],
    weights: Sequence[float],
    base_bias: Callable[[str], Tensor | None],
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The sum of adapters of one base, w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ..., as one adapter, exactly.

    It is the product of [w_1 s_1 B_1, w_2 s_2 B_2, ...] and [A_1; A_2; ...], so that the ranks add up. A trained bias
    is b + w_1 (b_1 - b) + w_2 (b_2 - b) + ... What DoRA does to a weight, m (W + s B A) / |W + s B A|, is no sum.

    Args:
        parts: settings and tensors in PEFT's layout (see `as_plain_lora`).
        base_bias: the base's bias of a module, (out,) or None.
    Raises:
        UserError: one of them is a DoRA.
    """
    if any(lora.dora for lora, _ in parts):
        raise UserError(
            "--weights: DoRA gives each row of W + s B A a length of its own, which is no change that could be added, "
            "weighted or taken away: merge a DoRA by itself"
        )
    modules = [_by_module(tensors) for _, tensors in parts]
    names = list(dict.fromkeys(name for part in modules for name in part))
    with_bias = any(lora.bias != "none" for lora, _ in parts)
    combined: dict[str, Tensor] = {}
    for name in names:
        a, b, bias = [], [], base_bias(name) if with_bias else None
        change = 0 if bias is None else torch.zeros_like(bias)
        for (lora, _), part, weight in zip(parts, modules, weights, strict=True):
            if name in part:
                a.append(part[name][PEFT_NAMES["lora_A"]].float())
                b.append(part[name][PEFT_NAMES["lora_B"]].float() * (weight * _scaling(lora, name)))
                if bias is not None and PEFT_NAMES["bias"] in part[name]:
                    change = change + weight * (part[name][PEFT_NAMES["bias"]].float() - bias)
        place = f"{PEFT_PREFIX}{name}."
        combined[place + PEFT_NAMES["lora_A"]], combined[place + PEFT_NAMES["lora_B"]] = (
            torch.cat(a),
            torch.cat(b, dim=1),
        )
        if bias is not None:
            combined[place + PEFT_NAMES["bias"]] = bias + change
    ranks = {name: len(combined[f"{PEFT_PREFIX}{name}.{PEFT_NAMES['lora_A']}"]) for name in names}
    plain = LoRAConfig(bias="lora_only" if with_bias else "none")
    return _by_name(plain, ranks, dict(ranks)), combined  # alpha / r = 1


def _by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors with PEFT's names by module, and there by the last part of the name."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key = next((key for key in PEFT_NAMES.values() if name.endswith(f".{key}")), None)
        if key is None:
            raise UserError(f"{name}: layers that are trained whole beside an adapter are not supported")
        modules.setdefault(name.removeprefix(PEFT_PREFIX).removesuffix(f".{key}"), {})[key] = tensor
    return modules


def _by_name(lora: LoRAConfig, ranks: dict[str, int], alphas: dict[str, float]) -> LoRAConfig:
    """The settings of an adapter whose modules are told by name; what most of them have is the default."""
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return replace(
        lora,
        rank=rank,
        alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        target_modules=tuple(ranks),
    )


def _scaling(lora: LoRAConfig, name: str) -> float:
    """s of one module: alpha / r, or alpha / sqrt(r)."""
    rank, alpha = by_pattern(lora.rank_pattern, name, lora.rank), by_pattern(lora.alpha_pattern, name, lora.alpha)
    return alpha / (math.sqrt(rank) if lora.rslora else rank)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """One SHA-256 over names and values, whatever file they come from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_mlx(directory: Path, adapters: dict[str, LoRALinear], layers: int, base_name: str) -> None:
    """Write adapters.safetensors and adapter_config.json as mlx-lm expects them.

    There A and B are transposed, lora_a (in, r) and lora_b (r, out), and one rank and one scale serve all modules: a
    smaller rank is filled up with zeros, another scale goes into lora_b.

    Args:
        directory: holds no adapter yet.
        layers: of the model.
        base_name: a directory or a name on the Hub.
    Raises:
        UserError: the adapter trained biases, for which mlx-lm has no place.
    """
    if any(adapter.bias is not None for adapter in adapters.values()):
        raise UserError("--format mlx: an adapter of mlx-lm cannot hold trained biases: merge it with --format hf")
    rank = max(len(adapter.factors()[0]) for adapter in adapters.values())
    scale = next(iter(adapters.values())).scaling
    dora = any(adapter.lora_magnitude_vector is not None for adapter in adapters.values())
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        a, b = (factor.detach() for factor in adapter.factors())
        more = rank - len(a)
        tensors[f"{name}.lora_a"] = F.pad(a, (0, 0, 0, more)).T.contiguous()  # (in, r)
        tensors[f"{name}.lora_b"] = F.pad(b * (adapter.scaling / scale), (0, more)).T.contiguous()  # (r, out)
        if adapter.lora_magnitude_vector is not None:
            tensors[f"{name}.m"] = adapter.lora_magnitude_vector.detach()
    write_tensors(directory / "adapters.safetensors", tensors)
    inside = sorted({name.split(".", 3)[3] for name in adapters})  # without model.layers.N.
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": inside},
        "model": base_name,
    }
    write_file(directory / "adapter_config.json", [(json.dumps(config, indent=2) + "\n").encode()])


def _peft_targets(model: nn.Module, adapters: dict[str, LoRALinear]) -> list[str]:
    """The last parts of the names, as other tools like them; whole names where not all that end so have adapters."""
    bare = {name.rpartition(".")[2] for name in linears_of(model)}
    return sorted({name if (last := name.rpartition(".")[2]) in bare else last for name in adapters})


def read_adapter(directory: Path) -> tuple[LoRAConfig, str, dict[str, Tensor], dict[str, Any]]:
    """What the files say: settings, the base's name, tensors, and nanoft's note (empty if another tool wrote them).

    Raises:
        UserError: a file is missing or damaged, or the adapter is of a kind that is not supported.
    """
    config = read_json(directory / "adapter_config.json")
    note = read_json(directory / NOTE) if (directory / NOTE).is_file() else {}
    try:
        lora = _settings(config)
    except UserError as error:
        raise UserError(f"{directory / 'adapter_config.json'}: {error}") from None
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file() and (directory / "adapter_model.bin").is_file():
        raise UserError(
            f"{directory / 'adapter_model.bin'}: a pickle, which can run code, is not read: "
            "save the adapter again with PEFT, which writes adapter_model.safetensors"
        )
    if not weights.is_file():
        raise UserError(f"{directory}: {weights.name} is missing: copy the whole adapter directory")
    tensors = load_tensors(weights)
    with time_limit(MATCHING_SECONDS, f"{directory / 'adapter_config.json'}: rank_pattern"):
        _check_ranks(lora, tensors, weights)
    return lora, config.get("base_model_name_or_path") or "", tensors, note


def _check_ranks(lora: LoRAConfig, tensors: dict[str, Tensor], weights: Path) -> None:
    """Every A, (rank, in), has the rank that the settings say, before memory is asked for what they say."""
    for name, tensor in tensors.items():
        module, a, _ = name.removeprefix(PEFT_PREFIX).partition(f".{PEFT_NAMES['lora_A']}")
        have = tensor.shape[0] if tensor.dim() else 0
        if a and have != (rank := by_pattern(lora.rank_pattern, module, lora.rank)):
            raise UserError(f"{weights}: {name} has rank {have}, but adapter_config.json says {rank}")


def _settings(config: dict[str, Any]) -> LoRAConfig:
    """The fields of adapter_config.json. Only what is understood may pass: any other could change what it does."""
    for key, value in config.items():
        if value and key not in PEFT_FIELDS and value not in PEFT_VALUES.get(key, ()):
            raise UserError(f"{key}: {value!r:.60} is not supported")
    if not isinstance(config.get("base_model_name_or_path") or "", str):
        raise UserError(f"base_model_name_or_path: {config['base_model_name_or_path']!r:.60} is not a name")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha", 8), config.get("target_modules")
    if type(rank) is not int or rank < 1:
        raise UserError(f"the field r: {rank!r:.60} is not a rank: expected a whole number from 1 on")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"lora_alpha: {alpha!r:.60} is not a positive number")
    names: list[Any] = targets if isinstance(targets, list) else [targets]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"target_modules: {targets!r:.60} is not a list of module names")
    lora = LoRAConfig(
        rank=rank,
        alpha=alpha,
        target_modules=tuple(names),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        bias=config.get("bias") or "none",
    )
    check_expressions(lora)
    return lora
