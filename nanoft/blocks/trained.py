"""Trained parts besides low-rank adapters, under the names that PEFT uses.

`modules_to_save` trains a copy of a whole module; `trainable_token_indices` trains some rows of the embedding and the
head, such as those of new tokens; `bias=all` trains the biases of linears without an adapter. Each is an `Adapter`,
like LoRA's (nanoft/lora.py): the frozen module stays, and the trained values are float32 whatever the base's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import UserError
from nanoft.config import LoRAConfig
from nanoft.nf4 import PackedLinear


class Adapter(nn.Module):
    """A frozen module `base`, with trained parameters that add to or replace its own while `enabled`."""

    NAMES: ClassVar[dict[str, str]]  # attribute -> its name in PEFT's files; of others, NAME.weight
    base: Any
    enabled: bool
    dropout: float
    bias: nn.Parameter | None

    def __init__(self, base: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.base, self.dropout, self.enabled = base, dropout, True

    def merged(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The weight of an equivalent single module, float32, from the base's W or some of its rows, in float32."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """Like `merged`, but differentiable: the weight that a head applies to `widen(input)`."""
        raise NotImplementedError

    def widen(self, x: Tensor) -> Tensor:
        return x


def apply(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a linear, an embedding or a norm with the given parameters."""
    if is_linear(module):
        return F.linear(x, weight, bias)
    own = (weight,) if bias is None else (weight, bias)
    return F.embedding(x, weight) if isinstance(module, nn.Embedding) else module.formula(x, *own)


class TrainedCopy(Adapter):
    """A module with a trained copy of its parameters, or of its bias only: y = f(x; W', b')."""

    NAMES: ClassVar[dict[str, str]] = {"copy": "weight", "bias": "bias"}
    copy: nn.Parameter | None

    def __init__(self, base: nn.Module, parts: tuple[str, ...] = ("weight", "bias")):
        super().__init__(base)
        for attribute, part in self.NAMES.items():
            own = getattr(base, part, None) if part in parts else None
            copy = None if own is None else nn.Parameter(own.detach().to(torch.float32, copy=True))
            self.register_parameter(attribute, copy)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if self.copy is None:  # only the bias
            y = self.base(x)
            return (y + (self.bias - self.base.bias)).to(y.dtype)
        dtype = self.base.weight.dtype
        return apply(self.base, x, self.copy.to(dtype), None if self.bias is None else self.bias.to(dtype))

    @property
    def weight(self) -> Tensor:
        return self.copy if self.enabled and self.copy is not None else self.base.weight

    def merged(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        return weight if self.copy is None else self.copy.detach()[rows].to(weight.device)


class TrainedRows(Adapter):
    """An embedding or a head in which the rows of some tokens are trained: W'[ids] = R, (n, hidden)."""

    # PEFT's name, although R holds the rows themselves
    NAMES: ClassVar[dict[str, str]] = {"rows": "token_adapter.trainable_tokens_delta"}
    ids: Tensor

    def __init__(self, base: nn.Module, ids: Sequence[int]):
        super().__init__(base)
        stored = self.base.weight[list(ids)]
        self.register_parameter("bias", None)
        self.rows = nn.Parameter(stored.detach().to(torch.float32, copy=True))
        self.register_buffer("ids", torch.tensor(ids, device=stored.device), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base(tokens)
        if not self.enabled:
            return y
        is_own = tokens[..., None] == self.ids  # (b, q, n)
        rows = F.embedding(is_own.int().argmax(-1), self.rows).to(y.dtype)
        return torch.where(is_own.any(-1, keepdim=True), rows, y)

    @property
    def weight(self) -> Tensor:
        stored = self.base.weight
        return stored.index_copy(0, self.ids, self.rows.to(stored.dtype)) if self.enabled else stored

    def merged(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        ids = self.ids.to(weight.device) - (rows.start or 0)
        inside = (ids >= 0) & (ids < len(weight))
        return weight.index_copy(0, ids[inside], self.rows.detach().to(weight.device)[inside])


def copied_modules(model: nn.Module, lora: LoRAConfig, targets: set[str]) -> dict[str, tuple[str, ...]]:
    """Modules with own parameters to train as copies -> which parameters, in the model's order."""
    leaves = {name: m for name, m in model.named_modules() if has_weight(m)}
    if "lm_head" in lora.modules_to_save and "lm_head" not in leaves:  # it is tied to the embedding: see Decoder.untie
        leaves["lm_head"] = model.get_submodule("model.embed_tokens")
    copies: dict[str, tuple[str, ...]] = {}
    for name, leaf in leaves.items():
        if any(is_inside(name, saved) for saved in lora.modules_to_save):
            copies[name] = ("weight", "bias")
            if isinstance(leaf, PackedLinear):
                raise UserError(f"lora.modules_to_save: {name} is quantized: set quantization.bits=16 or target it")
        elif lora.bias == "all" and getattr(leaf, "bias", None) is not None and name not in targets:
            copies[name] = ("bias",)
    if unknown := next((s for s in lora.modules_to_save if not any(is_inside(name, s) for name in leaves)), None):
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in leaves))
        raise UserError(f"lora.modules_to_save: {unknown!r:.60} matches no module of this model, which has {known}")
    return copies


def is_inside(name: str, saved: str) -> bool:
    """Whether a module is, or is inside, one that `modules_to_save` names by the end of its name, as in PEFT."""
    return any(f"{name}."[: place.end() - 1].endswith(saved) for place in re.finditer(r"\.", f"{name}."))


def token_rows(model: nn.Module, lora: LoRAConfig, others: set[str]) -> dict[str, tuple[int, ...]]:
    """Module name -> ids of the tokens whose rows are trained in it; `others`: modules with another adapter."""
    rows, names = dict[str, tuple[int, ...]](), {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    for key, ids in lora.trainable_token_indices.items():
        name, field = names.get(key.rpartition(".")[2], ""), f"lora.trainable_token_indices: {key}"
        if not name or getattr(model, name.rpartition(".")[2], model) is None:
            why = "the head of this model is its embedding: remove it" if name else "use embed_tokens and lm_head"
            raise UserError(f"{field}: {why}")
        if name in others:
            raise UserError(f"{field}: already trained by another setting: remove one of the two")
        vocab = len(model.get_submodule("model.embed_tokens").weight)  # type: ignore[arg-type]
        if wrong := next((i for i in ids if not 0 <= i < vocab or ids.count(i) > 1), None):
            raise UserError(f"{field}: {wrong}: ids must be below {vocab:,}, without duplicates")
        rows[name] = tuple(ids)
    return rows


def has_weight(module: nn.Module) -> bool:
    """Whether it has a weight, which is not read: a merge reads those of linears and embeddings from files."""
    return is_linear(module) or isinstance(module, nn.Embedding) or getattr(module, "weight", None) is not None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, PackedLinear))
