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
from nanoft.blocks.trained import Adapter, TrainedRows, is_inside
from nanoft.config import LoRAConfig
from nanoft.config.settings import check_expressions
from nanoft.data.tokenizer_files import MAX_ID
from nanoft.io.atomic import write_json
from nanoft.io.tensor_files import load_tensors, write_tensors
from nanoft.io.untrusted import read_json, time_limit
from nanoft.lora import (
    MATCHING_SECONDS,
    LoRAEmbedding,
    LoRALinear,
    by_pattern,
    linears_of,
    matches_target,
    variant_of,
    weight_of,
)
from nanoft.models.model_files import split_reference

NOTE = "nanoft.json"  # a separate file, because PEFT warns about unknown keys in adapter_config.json
PEFT_PREFIX = "base_model.model."
A, B, BIAS = "lora_A.weight", "lora_B.weight", LoRALinear.NAMES["bias"]
A_EMBEDDING, ROWS = LoRAEmbedding.NAMES["lora_A"], TrainedRows.NAMES["rows"]
# What follows the module's name, in this order: with the name of an adapter (`.default`), as a state dict has it.
PART = re.compile(
    r"\.(?:(?P<factor>lora_[AB]|lora_[AB]0)(?:\.\w+)?\.weight|(?P<whole>lora_embedding_[AB]|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)(?:\.\w+)?(?:\.weight)?|modules_to_save\.(?:\w+\.)?(?P<saved>weight|bias)"
    r"|(?P<other>(?:base_layer\.|original_module\.|token_adapter\.base_layer\.)?(?:weight|bias)|lora_\w+(?:\.weight)?))$"
)
WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|module)\.")  # of FSDP, torch.compile, DDP
OUTER = re.compile(r"^(?:(?:base_model|model|language_model)\.)*(?=(layers\.\d+|embed_tokens|norm|lm_head)\.)")
# Fields of adapter_config.json that are read here or do not change the result ...
PEFT_FIELDS = """
    base_model_name_or_path r lora_alpha lora_dropout target_modules task_type auto_mapping peft_version inference_mode
    revision megatron_core qalora_group_size runtime_config rank_pattern alpha_pattern
    exclude_modules layers_to_transform layers_pattern modules_to_save trainable_token_indices
""".split()  # noqa: SIM905
# ... and fields that do, with the supported values. Any other field must be unset.
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


@torch.no_grad()
def load_adapter_tensors(adapters: dict[str, Adapter], tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors with PEFT's names into the adapters; a UserError names those that do not fit."""
    expected, tensors = adapter_tensors(adapters), dict(tensors)
    for name, adapter in adapters.items():  # PEFT may store the base's weight beside an adapter of the embedding
        stored = tensors.pop(f"{PEFT_PREFIX}{name}.base_layer.weight", None)
        if stored is not None and not torch.equal(stored, weight_of(adapter.base).to(stored)):
            fix = "merge it with PEFT (merge_and_unload) and use the result as a model"
            raise UserError(f"{source}: {name}.base_layer.weight is not the base's: {fix}")
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
    directory: Path, model: nn.Module, adapters: dict[str, Adapter], lora: LoRAConfig, base_name: str,
    note: dict[str, Any],
) -> None:  # fmt: skip
    """Write adapter_model.safetensors, adapter_config.json and nanoft.json, which holds `note`."""
    directory.mkdir(parents=True, exist_ok=True)
    plain, tensors = as_plain_lora(lora, adapter_tensors(adapters))
    write_tensors(directory / "adapter_model.safetensors", tensors)
    # PEFT's target_modules: last parts of names, unless modules without an adapter share them.
    low_rank = {name for name, adapter in adapters.items() if isinstance(adapter, LoRALinear)}
    bare = {name.rpartition(".")[2] for name in linears_of(model) if name not in low_rank}
    targets = sorted({name if (last := name.rpartition(".")[2]) in bare else last for name in low_rank})
    saved = [name for name, adapter in adapters.items() if getattr(adapter, "copy", None) is not None]
    rows = {name.rpartition(".")[2]: a.ids.tolist() for name, a in adapters.items() if isinstance(a, TrainedRows)}
    base, revision = split_reference(base_name)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "r": plain.rank, "lora_alpha": plain.alpha,
        "rank_pattern": plain.rank_pattern, "alpha_pattern": plain.alpha_pattern,
        "lora_dropout": plain.dropout, "target_modules": targets,
        "use_rslora": plain.rslora, "use_dora": plain.dora, "bias": plain.bias,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        **({"modules_to_save": saved} if saved else {}), **({"trainable_token_indices": rows} if rows else {}),
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
    tokens = {name: ids for name, ids in _by_name(lora.trainable_token_indices).items() if name in kept}
    low_rank = [name for name in kept if any(part.startswith("lora_") for part in modules[name])]
    if not low_rank:
        raise UserError(f"--only: {','.join(only):.60}: PEFT's format needs a module with a low-rank adapter: name one")
    ranks = {name: by_pattern(lora.rank_pattern, name, lora.rank) for name in low_rank}
    alphas = {name: by_pattern(lora.alpha_pattern, name, lora.alpha) for name in low_rank}
    copies = tuple(name for name in kept if "weight" in modules[name])
    bias: Any = "all" if any("bias" in modules[n] for n in kept) else "lora_only"
    has_bias = any({BIAS, "bias"} & modules[name].keys() for name in kept)
    chosen = replace(lora, bias=bias if has_bias else "none", modules_to_save=copies, trainable_token_indices=tokens)
    return _with_ranks(chosen, ranks, alphas), tensors


def sum_adapters(
    parts: Sequence[tuple[LoRAConfig, dict[str, Tensor]]],  # in PEFT's format, see `as_plain_lora`
    weights: Sequence[float],
    base: Callable[[str], Tensor | None],  # of a parameter's name
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The weighted sum of adapters of one base, w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ..., as one adapter, exactly.

    It is the product of [w_1 s_1 B_1, w_2 s_2 B_2, ...] and [A_1; A_2; ...], so the ranks add up. What replaces a
    parameter p, a trained bias for example, becomes p + w_1 (p_1 - p) + w_2 (p_2 - p) + ... DoRA's
    m (W + s B A) / |W + s B A| is not such a sum, and is refused.
    """
    if any(lora.dora for lora, _ in parts):
        raise UserError("--weights: DoRA adapters cannot be summed: merge them one at a time")
    tokens = [_by_name(lora.trainable_token_indices) for lora, _ in parts]
    if any(one != tokens[0] for one in tokens):
        raise UserError("--weights: the adapters train the rows of different tokens: merge them one at a time")
    modules = [_by_module(tensors) for _, tensors in parts]
    combined: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in dict.fromkeys(name for part in modules for name in part):
        prefix, stacked = f"{PEFT_PREFIX}{name}.", dict[str, list[Tensor]]()
        for (lora, _), part, weight in zip(parts, modules, weights, strict=True):
            scaling = _scaling(lora, name)
            for key, tensor in part.get(name, {}).items():
                if key.startswith("lora_"):
                    factor = weight * scaling if "_B" in key else 1.0
                    stacked.setdefault(key, []).append(tensor.float() * factor)
                elif key != "base_layer.weight":
                    own = _replaced(base, name, key, tokens[0])
                    own = tensor.float() if own is None else own
                    combined[prefix + key] = combined.get(prefix + key, own) + weight * (tensor.float() - own)
        for key, tensors in stacked.items():
            combined[prefix + key] = torch.cat(tensors, dim=1 if "_B" in key else 0)
            ranks[name] = sum(len(t) for t in tensors) if "_A" in key else ranks.get(name, 0)
        own = base(f"{name}.bias") if any(lora.bias != "none" for lora, _ in parts) else None
        if own is not None and name in ranks:  # each has one, if any has
            combined.setdefault(prefix + BIAS, own)
    copies = tuple(name for part in modules for name, keys in part.items() if "weight" in keys)
    if mixed := ranks.keys() & set(copies):
        raise UserError(f"--weights: {min(mixed)} is a trained copy in one adapter, low-rank in another: not summed")
    biases = {lora.bias for lora, _ in parts} - {"none"}
    bias: Any = "all" if "all" in biases else next(iter(biases), "none")
    plain = LoRAConfig(bias=bias, modules_to_save=tuple(dict.fromkeys(copies)), trainable_token_indices=tokens[0])
    return _with_ranks(plain, ranks, dict(ranks)), combined  # alpha / r = 1


def fold_patterns(lora: LoRAConfig, tensors: dict[str, Tensor]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The same adapter with one rank and one alpha: smaller ranks padded with zeros, other scalings put into B."""
    ranks = {key: len(t) for key, t in tensors.items() if re.search(r"\.lora_(embedding_)?A(\.weight)?$", key)}
    rank, scale, folded = max(ranks.values()), _scaling(lora, ""), dict(tensors)
    for a, own in ranks.items():
        head, tail = a.rsplit("A", 1)
        module = a[: a.index(".lora_")].removeprefix(PEFT_PREFIX)
        folded[a] = F.pad(tensors[a], (0, 0, 0, rank - own))
        folded[f"{head}B{tail}"] = F.pad(tensors[f"{head}B{tail}"] * (_scaling(lora, module) / scale), (0, rank - own))
    return replace(lora, rank=rank, alpha=scale * rank, rank_pattern={}, alpha_pattern={}, rslora=False), folded


def _scaling(lora: LoRAConfig, name: str) -> float:
    """s of a module: alpha / r, or alpha / sqrt(r)."""
    rank, alpha = by_pattern(lora.rank_pattern, name, lora.rank), by_pattern(lora.alpha_pattern, name, lora.alpha)
    return alpha / (math.sqrt(rank) if lora.rslora else rank)


def _replaced(base: Callable[[str], Tensor | None], name: str, key: str, tokens: dict[str, list[int]]) -> Tensor | None:
    """What a tensor of an adapter replaces in the base."""
    own = base(f"{name}.{'bias' if key.endswith('bias') else 'weight'}")
    return own[tokens[name]] if own is not None and key == ROWS else own


def _by_name(indices: dict[str, list[int]]) -> dict[str, list[int]]:
    """`trainable_token_indices` by the module's full name."""
    names = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    return {names.get(key.rpartition(".")[2], key): list(ids) for key, ids in indices.items()}


def _by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """module -> PEFT's name of the part -> tensor."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = PART.search(name)
        if found is None:
            raise UserError(f"{name}: not a tensor of an adapter: copy the adapter again")
        modules.setdefault(name[: found.start()].removeprefix(PEFT_PREFIX), {})[found[0][1:]] = tensor
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


def only_linears(adapters: dict[str, Adapter], whose: str, fix: str) -> dict[str, LoRALinear]:
    """Adapters for a format that has low-rank adapters of linears only; others are refused."""
    linears = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LoRALinear)}
    for name, adapter in adapters.items():
        if name not in linears or isinstance(adapter, LoRAEmbedding):
            raise UserError(f"{whose} adapters cannot hold what was trained of {name}: {fix}")
        if adapter.bias is not None:
            raise UserError(f"{whose} has no trained biases: {name}: {fix}")
    return linears


def save_mlx(directory: Path, adapters: dict[str, Adapter], layers: int, base_name: str) -> None:
    """Write adapters.safetensors and adapter_config.json in the format of mlx-lm.

    There A and B are transposed, lora_a (in, r) and lora_b (r, out), and all modules share one rank and one scale: a
    smaller rank is padded with zeros, another scale goes into lora_b. Trained biases are refused.
    """
    linears = only_linears(adapters, "--format mlx: mlx-lm", "merge the adapter with --format hf")
    rank = max(len(adapter.factors()[0]) for adapter in linears.values())
    scale = next(iter(linears.values())).scaling
    tensors: dict[str, Tensor] = {}
    for name, adapter in linears.items():
        a, b = (factor.detach() for factor in adapter.factors())
        more = rank - len(a)
        tensors[f"{name}.lora_a"] = F.pad(a, (0, 0, 0, more)).T.contiguous()  # (in, r)
        tensors[f"{name}.lora_b"] = F.pad(b * (adapter.scaling / scale), (0, more)).T.contiguous()  # (r, out)
        if adapter.lora_magnitude_vector is not None:
            tensors[f"{name}.m"] = adapter.lora_magnitude_vector.detach()
    write_tensors(directory / "adapters.safetensors", tensors)
    keys = sorted({re.sub(r"^model\.layers\.\d+\.", "", name) for name in linears})
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
    stored = load_tensors(weights)
    tensors = standard_names(stored, weights)
    with_a, with_b = ({n.removesuffix(f".{part}") for n in tensors if n.endswith(f".{part}")} for part in (A, B))
    some = any(".lora_" in name for name in tensors)
    if incomplete := sorted(with_a ^ with_b) if some else ["the adapter"]:
        raise UserError(f"{weights}: {incomplete[0]} lacks lora_A or lora_B: copy the complete adapter directory")
    with time_limit(MATCHING_SECONDS, f"{path}: target_modules, rank_pattern, alpha_pattern"):
        lora = _fit_to_tensors(lora, config, tensors, path, renamed=stored.keys() != tensors.keys())
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
        modules_to_save=tuple(config.get("modules_to_save") or ()), trainable_token_indices=_token_indices(config),
    )  # fmt: skip
    check_expressions(lora)
    return lora


def standard_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors under the names that PEFT gives them now, whatever wrapped the model or named the adapter."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, part = WRAPPERS.sub("", name), ""
        if match := PART.search(module):
            factor = match["factor"] and f"{match['factor']}.weight"
            module, part = module[: match.start()], "." + (factor or match["whole"] or match["saved"] or match["other"])
        if part.startswith((".original_module.", ".token_adapter.base_layer.")):
            continue  # the base's, in a dump of all tensors
        outer = OUTER.match(f"{module}.")
        if outer:
            inner = module[outer.end() :]
            module = PEFT_PREFIX + (inner if inner == "lm_head" else f"model.{inner}")
        if module + part in found and not torch.equal(found[module + part], tensor):
            raise UserError(f"{path}: {name}: a second tensor for {module + part}: save one adapter alone")
        found[module + part] = tensor
    has_lora = {name.removesuffix(A) for name in found if name.endswith(A)}
    return {
        f"{place}.{BIAS}" if last == "bias" and f"{place}." in has_lora else name: tensor
        for name, tensor in found.items()
        for place, _, last in [name.rpartition(".")]
    }


def _token_indices(config: dict[str, Any]) -> dict[str, list[int]]:
    """`trainable_token_indices`: a list is of the embedding; a table names modules."""
    given = config.get("trainable_token_indices") or {}
    given = {"embed_tokens": given} if isinstance(given, list) else given
    wrong = [i for ids in given.values() for i in ids if type(i) is not int or not 0 <= i < MAX_ID]
    if wrong:
        raise UserError(f"trainable_token_indices: {wrong[0]!r:.60} is not the id of a token")
    return given


def _fit_to_tensors(
    lora: LoRAConfig, config: dict[str, Any], tensors: dict[str, Tensor], path: Path, renamed: bool
) -> LoRAConfig:
    """The settings with PEFT's further rules: which modules its file has, and what its fields say about them."""
    modules = _by_module(tensors)
    low_rank = [name for name, parts in modules.items() if any(part.startswith("lora_") for part in parts)]
    copies = [name for name, parts in modules.items() if "weight" in parts]
    if missing := next((s for s in lora.modules_to_save if not any(is_inside(name, s) for name in copies)), None):
        raise UserError(f"{path}: modules_to_save: {missing!r:.60} has no tensors: copy the adapter again")
    targets = lora.target_modules
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        targets = (_target_rule(config),)
    is_foreign = renamed and isinstance(config["target_modules"], str)
    if is_foreign and not any(matches_target(name, targets[0]) for name in low_rank):
        targets = tuple(low_rank)  # an expression for names with another tool's prefix

    def used(pattern: dict[str, Any]) -> dict[str, Any]:  # a key that no adapter has is without effect in PEFT, too
        return {key: value for key, value in pattern.items() if any(by_pattern({key: 1}, n, 0) for n in low_rank)}

    lora = replace(lora, rank_pattern=used(lora.rank_pattern), alpha_pattern=used(lora.alpha_pattern))
    return replace(lora, target_modules=targets, modules_to_save=tuple(copies))


def _target_rule(config: dict[str, Any]) -> str:
    """One regular expression for target_modules with layers_to_transform and exclude_modules (PEFT's tuners_utils)."""

    def end(names: Any) -> str:
        return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})" if isinstance(names, list) else f"(?:{names})"

    targets, excluded, layers = (config.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform"))
    rule = end(r".*\.layers\..*" if targets == "all-linear" else targets)
    if layers not in (None, []):
        patterns = config.get("layers_pattern") or r"[^.]*"
        numbers = "|".join(str(layer) for layer in (layers if isinstance(layers, list) else [layers]))
        where = patterns if isinstance(patterns, str) else "|".join(patterns)
        rule = rf"(?=(?:.*?\.)?(?:{where})\.(?:{numbers})\.)" + rule
    return f"(?!{end(excluded)}$)" + rule if excluded else rule


def vocabulary_of(lora: LoRAConfig, tensors: dict[str, Tensor]) -> int:
    """How many tokens a model must have for this adapter, as far as the adapter knows."""
    axes = {f"embed_tokens.{A_EMBEDDING}": 1, "embed_tokens.weight": 0, "lm_head.weight": 0, f"lm_head.{B}": 0}
    sizes = [max(ids) + 1 for ids in lora.trainable_token_indices.values() if ids]
    for end, axis in axes.items():
        sizes += [t.shape[axis] for name, t in tensors.items() if name.endswith(end) and t.dim() == 2]
    return max(sizes, default=0)
