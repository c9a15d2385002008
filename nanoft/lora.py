"""LoRA (Hu et al. 2021): freeze W, learn a low-rank correction beside it.

    y = W x + (alpha / r) * B A x,    A: (r, in) ~ Kaiming uniform,    B: (out, r) = 0

B starts at zero, so a fresh adapter changes nothing, and only r * (in + out) numbers per matrix are trained. A and
B are kept in float32 whatever the base's number format, because updates of 1e-5 vanish when they are added in bfloat16.

The adapter is saved in the layout of the PEFT library, so that other tools read it and theirs are read here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nanoft import UserError
from nanoft.checkpoint import write_tensors
from nanoft.nf4 import Linear4bit

NOTE = "nanoft.json"  # a file of its own: PEFT warns at keys of adapter_config.json that it does not know
PEFT_PREFIX = "base_model.model."
# Settings of a PEFT adapter that change the mathematics, with the only value understood here.
PEFT_EXPECTED = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
}


class LoRALinear(nn.Module):
    """A frozen linear with a low-rank correction; see the module's formula."""

    def __init__(
        self, base: nn.Linear | Linear4bit, rank: int, alpha: float, dropout: float, generator: torch.Generator
    ):
        super().__init__()
        device = next(t.device for t in (*base.parameters(), *base.buffers()))
        self.base, self.scaling, self.dropout = base, alpha / rank, dropout
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # U(-1/sqrt(in), 1/sqrt(in))
        self.lora_A = nn.Parameter(a.to(device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))  # (out, r)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)  # (b, s, out)
        if not self.enabled:
            return y
        x = F.dropout(x, self.dropout, self.training)
        small = F.linear(x, self.lora_A.to(x.dtype))  # (b, s, r)
        return y + self.scaling * F.linear(small, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """(alpha / r) * B A, the change of the weight, (out, in) float32."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


def inject_lora(
    model: nn.Module, target_modules: tuple[str, ...], rank: int, alpha: float, dropout: float, seed: int
) -> dict[str, LoRALinear]:
    """Freeze the model and put an adapter beside every linear whose name ends in one of `target_modules`.

    Returns:
        The adapters by module name, in the model's order.
    Raises:
        UserError: a target that names no linear.
    """
    model.requires_grad_(False)
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in target_modules and isinstance(module, (nn.Linear, Linear4bit))
    }
    _check_targets(model, target_modules, list(found))
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, base in found.items():
        parent, _, last = name.rpartition(".")
        adapters[name] = LoRALinear(base, rank, alpha, dropout, generator)
        setattr(model.get_submodule(parent), last, adapters[name])
    return adapters


def _check_targets(model: nn.Module, target_modules: tuple[str, ...], found: list[str]) -> None:
    hit = {name.rpartition(".")[2] for name in found}
    linears = (n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Linear4bit)) and n != "lm_head")
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
    for target in target_modules:
        if target not in hit or target == "lm_head":
            raise UserError(
                f"lora.target_modules: {target!r} names no linear of this model: there are {', '.join(known)}"
            )


@contextmanager
def disabled(adapters: dict[str, LoRALinear]) -> Iterator[None]:
    """Inside the block the model is its base: one copy of the weights serves both."""
    for adapter in adapters.values():
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.enabled = True


def adapter_tensors(adapters: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{name}.lora_{part}.weight": getattr(adapter, f"lora_{part}").detach()
        for name, adapter in adapters.items()
        for part in ("A", "B")
    }


@torch.no_grad()
def load_adapter_tensors(adapters: dict[str, LoRALinear], tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors with PEFT's names into the adapters; every one must be there and fit, and no other.

    Raises:
        UserError: missing, unexpected or mis-shaped tensors, by name.
    """
    expected = adapter_tensors(adapters)
    if odd := sorted(expected.keys() ^ tensors.keys()):
        what = "missing" if odd[0] in expected else "unexpected"
        raise UserError(f"{source}: {len(odd)} tensors do not fit this model, first {odd[0]} ({what}): is it its base?")
    for name, own in expected.items():
        if own.shape != tensors[name].shape:
            have, want = tuple(tensors[name].shape), tuple(own.shape)
            raise UserError(f"{source}: {name} is {have}, but this model and rank need {want}")
        own.copy_(tensors[name])


def save_adapter(
    directory: Path, adapters: dict[str, LoRALinear], settings: dict[str, Any], note: dict[str, Any]
) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT expects them.

    Args:
        settings: base_model_name_or_path, r, lora_alpha, lora_dropout, target_modules.
        note: what PEFT's format has no place for: how the base was quantised, what training computed in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model.safetensors").unlink(missing_ok=True)
    write_tensors(directory / "adapter_model.safetensors", adapter_tensors(adapters))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **settings,
        "target_modules": sorted(settings["target_modules"]),
    }
    for name, content in (("adapter_config.json", config), (NOTE, note)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read adapter_config.json, adapter_model.safetensors and nanoft's note (empty if another tool wrote the adapter).

    Raises:
        UserError: a file is missing or damaged, or the adapter is of a kind that is not supported.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "adapter_model.safetensors")
        note = json.loads((directory / NOTE).read_text(encoding="utf-8")) if (directory / NOTE).is_file() else {}
    except FileNotFoundError as error:
        raise UserError(f"{directory}: no adapter here: {Path(error.filename or str(error)).name} is missing") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{directory}: the adapter is damaged: {error}") from None
    for key, wanted in PEFT_EXPECTED.items():
        if config.get(key, wanted) != wanted and config[key]:
            raise UserError(f"{directory}/adapter_config.json: {key}: {config[key]!r} is not supported")
    for key in ("r", "target_modules"):
        if not config.get(key):
            raise UserError(f"{directory}/adapter_config.json: the field {key} is missing")
    return config, tensors, note
