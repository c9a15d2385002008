"""LoRA (Hu et al. 2021): freeze W, and learn a low-rank correction.

    y = W x + s B A x + b,    A: (r, in) ~ Kaiming uniform,    B: (out, r) = 0,    s = alpha / r

B starts at zero, so a fresh adapter changes nothing, and only r * (in + out) numbers per matrix are trained. A and B
are float32 whatever the base's dtype, because updates of 1e-5 vanish when they are added in bfloat16.

Variants:

- rsLoRA (Kalajdzievski 2023): s = alpha / sqrt(r), because alpha / r makes updates with a high rank too small.
- LoRA-FA (Zhang et al. 2023): A keeps its random initial values; only B is trained.
- DoRA (Liu et al. 2024): the norm of each row of W + s B A is a separate parameter, m.
- PiSSA (Meng et al. 2024): A and B start as the r largest singular directions A0, B0 of W, which are removed from W:
  y = (W - s B0 A0) x + s B A x. Here W stays unchanged, and the change is written as
  B A - B0 A0 = (B - B0) A + B0 (A - A0): a LoRA of rank 2r, exactly zero at first, whose small differences are computed
  in float32. So W may be quantized, and the adapter fits it (unlike QPiSSA, which quantizes W - s B0 A0).
- Biases can be trained too, in float32; for whole modules and rows of tokens see nanoft/blocks/trained.py.

A new variant is a subclass of `LoRALinear` that overrides `make_factors` (what is trained), `plain_factors` (A and B of
the change, in the forward pass and in export as plain LoRA) or `apply_magnitude_and_bias`, and an entry of `VARIANTS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import UserError
from nanoft.blocks.moe import Router
from nanoft.blocks.trained import Adapter, TrainedCopy, TrainedRows, copied_modules, is_linear, token_rows
from nanoft.config import LoRAConfig
from nanoft.io.untrusted import time_limit
from nanoft.nf4 import Frozen, PackedLinear, matmul
from nanoft.runtime.distributed import gathered

WORDS = {"all-linear": "[.]layers[.]|_model_proj", "attention": "[.]self_attn[.]", "mlp": "[.]mlp[.]"}  # of names
MATCHING_SECONDS = 5.0  # limit for regular expressions, which may be untrusted: `(.+)+!` never ends
EXACT_SVD = 1024  # for larger matrices, the largest singular vectors are found by iteration
SMALLEST = torch.finfo(torch.float32).tiny  # so that a row of zeros can be divided by its norm


class LoRALinear(Adapter):
    """A frozen linear with a low-rank correction: y = W x + s B A d(x) + b, with dropout d on the correction only."""

    NAMES: ClassVar[dict[str, str]] = {"lora_magnitude_vector": "lora_magnitude_vector", "bias": "base_layer.bias"}
    FACTORS: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")  # the tensors that determine A and B, in checkpoints
    TRAINED: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")  # those of FACTORS that train without lora.freeze_a
    RANKS: ClassVar[int] = 1  # the rank of the change, in units of lora.rank
    NEEDS_FULL_RANK: ClassVar[bool] = False  # whether W must have at least `rank` singular values

    lora_A: nn.Parameter  # (r, in)
    lora_B: nn.Parameter  # (out, r)
    lora_magnitude_vector: nn.Parameter | None  # m: (out,), for DoRA only
    bias: nn.Parameter | None  # b': (out,), if it is trained

    def __init__(self, base: Frozen, lora: LoRAConfig, generator: torch.Generator):
        super().__init__(base, lora.dropout)
        self.scaling = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        a, b = self.make_factors(lora.rank, generator)
        self.lora_A = nn.Parameter(a.to(device), requires_grad=not lora.freeze_a)
        self.lora_B = nn.Parameter(b.to(device))
        self.register_parameter("lora_magnitude_vector", None)
        self.register_parameter("bias", None)
        if lora.bias != "none" and getattr(base, "bias", None) is not None:
            self.bias = nn.Parameter(self.base.bias.detach().to(torch.float32, copy=True))

    def make_factors(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        a, b = torch.empty(rank, self.base.in_features), torch.zeros(self.base.out_features, rank)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # U(-1/sqrt(in), 1/sqrt(in))
        return a, b

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        a, b = self.factors()
        u = F.linear(F.dropout(x, self.dropout, self.training), a.to(x.dtype))  # (..., r)
        return self.apply_magnitude_and_bias(y + self.scaling * F.linear(u, b.to(x.dtype)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (RANKS r, in), and B, (out, RANKS r), of the change s B A."""
        return self.plain_factors(*(getattr(self, name) for name in self.FACTORS))

    @staticmethod
    def plain_factors(a: Tensor, b: Tensor, *starts: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the tensors of FACTORS."""
        return a, b

    def apply_magnitude_and_bias(self, y: Tensor) -> Tensor:
        """c (y - b) + b' for y = W x + s B A x + b, with DoRA's c (eq. 5) and the trained bias b', (..., out).

        Computed as c y + (b' - c b), which equals y bit for bit as long as c = 1 and b' = b.
        """
        c, b = self.magnitude_ratio(y.dtype), self.base.bias
        if c is None and self.bias is None:
            return y
        wide = y if c is None else c * y  # float32
        if b is not None:
            wide = wide + ((b if self.bias is None else self.bias) - (b if c is None else c * b))
        return wide.to(y.dtype)

    def magnitude_ratio(self, dtype: torch.dtype) -> Tensor | None:
        """DoRA's c = m / |W + s B A|, (out,) float32; None: 1."""
        return None

    def widen(self, x: Tensor) -> Tensor:
        """[x, A d(x)], (..., in + r), whose product with `weight` is W x + s B A d(x)."""
        if not self.enabled:
            return x
        return torch.cat((x, F.linear(F.dropout(x, self.dropout, self.training), self.factors()[0].to(x.dtype))), -1)

    @property
    def weight(self) -> Tensor:
        """c [W, s B], (out, in + r): s B is not added to W, because small numbers would vanish in bfloat16."""
        weight = weight_of(self.base)
        if not self.enabled:
            return weight
        wide = torch.cat((weight, self.scaling * self.factors()[1].to(weight.dtype)), 1)
        c = self.magnitude_ratio(weight.dtype)
        return wide if c is None else (c[:, None] * wide).to(weight.dtype)

    def merged(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """W + s B A, (out, in), or some rows of it."""
        a, b = (factor.detach().float().to(weight.device) for factor in self.factors())
        return torch.addmm(weight, b[rows], a, alpha=self.scaling)


class DoRALinear(LoRALinear):
    """DoRA: y = m (W + s B A) x / |W + s B A| + b, where |.| are the norms of the rows."""

    squares: Tensor  # |W|^2 of each row, (out,)
    lora_magnitude_vector: nn.Parameter

    def __init__(self, base: Frozen, lora: LoRAConfig, generator: torch.Generator):
        super().__init__(base, lora, generator)
        self.register_buffer("squares", torch.empty(0), persistent=False)
        self.measure_base()
        self.lora_magnitude_vector = nn.Parameter(self.norm(torch.float32))

    def measure_base(self) -> None:
        """Compute the norms of W's rows; call it again if the base is replaced."""
        self.norm_kept: Tensor | None = None
        self.squares = torch.linalg.vector_norm(weight_of(self.base), dim=1, dtype=torch.float32).square()

    def magnitude_ratio(self, dtype: torch.dtype) -> Tensor:
        return self.lora_magnitude_vector / self.norm(dtype)

    def norm(self, dtype: torch.dtype) -> Tensor:
        """|w + s b A| for each row w of W and b of B, (out,), from |w|^2 + 2 s b (A w) + s^2 b A A^T b^T.

        W + s B A itself, (out, in), is not formed; A W^T is computed in `dtype`. In backward, the norm is a constant
        (DoRA, section 4.3). In inference, when A and B no longer change, it is computed once.
        """
        in_use = not self.training and not torch.is_grad_enabled()
        if in_use and self.norm_kept is not None:
            return self.norm_kept
        with torch.no_grad():
            a, b = (factor.float() for factor in self.factors())
            aw = matmul(self.base, a.to(dtype)).float().T  # (out, r)
            squares = self.squares + (self.scaling * b * (2 * aw + self.scaling * (b @ (a @ a.T)))).sum(1)
            norm = squares.clamp(min=SMALLEST).sqrt()
        self.norm_kept = norm if in_use else None
        return norm

    def train(self, mode: bool = True) -> Self:
        self.norm_kept = None
        return super().train(mode)

    def merged(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        merged = super().merged(weight, rows)
        norms = torch.linalg.vector_norm(merged, dim=1).clamp(min=SMALLEST)
        return merged.mul_((self.lora_magnitude_vector.detach()[rows].to(weight.device) / norms)[:, None])


class PiSSALinear(LoRALinear):
    """PiSSA: y = (W - s B0 A0) x + s B A x + b, from the largest singular directions of W."""

    FACTORS = ("lora_A", "lora_B", "lora_A0", "lora_B0")
    RANKS, NEEDS_FULL_RANK = 2, True
    lora_A0: Tensor  # initial values of A and B
    lora_B0: Tensor

    def __init__(self, base: Frozen, lora: LoRAConfig, generator: torch.Generator):
        super().__init__(base, lora, generator)
        self.register_buffer("lora_A0", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("lora_B0", self.lora_B.detach().clone(), persistent=False)

    def make_factors(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        b, a = (part / math.sqrt(self.scaling) for part in top_singular_factors(weight_of(self.base), rank, generator))
        return a, b

    @staticmethod
    def plain_factors(a: Tensor, b: Tensor, *starts: Tensor) -> tuple[Tensor, Tensor]:
        """B A - B0 A0 as one product: B' = [B - B0, B0] and A' = [A; A - A0]."""
        a0, b0 = starts
        return torch.cat((a, a - a0)), torch.cat((b - b0, b0), dim=1)


class PiSSADoRALinear(DoRALinear, PiSSALinear):
    """DoRA's magnitudes over PiSSA's factors."""


class LoRAEmbedding(LoRALinear):
    """An embedding with a low-rank correction: y = W[i] + s B A[:, i], A: (r, vocab) = 0, B: (hidden, r) ~ N(0, 1)."""

    NAMES: ClassVar[dict[str, str]] = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

    def make_factors(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        vocab, hidden = self.base.weight.shape
        return torch.zeros(rank, vocab), torch.randn(hidden, rank, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base(ids)
        if not self.enabled:
            return y
        b_t, a_t = self.factors()
        return y + self.scaling * (F.embedding(ids, a_t.to(y.dtype)) @ b_t.to(y.dtype))

    @staticmethod
    def plain_factors(a: Tensor, b: Tensor, *starts: Tensor) -> tuple[Tensor, Tensor]:
        """W is (vocab, hidden) here, so its change is s A^T B^T."""
        return b.T, a.T


VARIANTS: dict[tuple[str, bool], type[LoRALinear]] = {  # by lora.init and lora.dora
    ("default", False): LoRALinear,
    ("default", True): DoRALinear,
    ("pissa", False): PiSSALinear,
    ("pissa", True): PiSSADoRALinear,
}


def variant_of(lora: LoRAConfig) -> type[LoRALinear]:
    return VARIANTS[lora.init, lora.dora]


def weight_of(base: Frozen) -> Tensor:
    """W, (out, in); for a quantized linear, its dequantized weight."""
    return base.dequantize() if isinstance(base, PackedLinear) else base.weight.detach()


def top_singular_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """U sqrt(S), (out, rank), and sqrt(S) V^T, (rank, in), of the largest singular values of the weight.

    For a large matrix, an approximation: subspace iterations turn 2 * rank random directions towards the largest
    singular vectors (Halko et al. 2011, algorithm 4.4), and an SVD within that subspace gives the factors.
    """
    weight = weight.float()
    if weight.device.type == "mps":  # which has no such decompositions before PyTorch 2.9, and slow ones since
        weight = weight.cpu()
    if min(weight.shape) <= EXACT_SVD:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        basis = torch.randn(weight.shape[1], min(2 * rank, *weight.shape), generator=generator).to(weight.device)
        for _ in range(8):
            basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis).Q).Q  # (in, 2 rank), orthonormal
        u, s, vt = torch.linalg.svd(weight @ basis, full_matrices=False)
        vt = vt @ basis.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def make_lora(name: str, base: Any, lora: LoRAConfig, generator: torch.Generator) -> LoRALinear:
    """The low-rank adapter of one linear or embedding; `lora` has its own rank and alpha."""
    variant = variant_of(lora)
    if isinstance(base, nn.Embedding):
        if variant is not LoRALinear or lora.freeze_a:
            raise UserError(f"lora.target_modules: {name}: embeddings take plain LoRA only: use lora.modules_to_save")
        return LoRAEmbedding(base, lora, generator)  # type: ignore[arg-type]
    most = min(base.in_features, base.out_features)
    if variant.NEEDS_FULL_RANK and lora.rank > most:
        raise UserError(f"lora.rank: {lora.rank}: {name} has only {most} singular values: set lora.rank={most}")
    with gathered(base):  # if it is sharded already
        return variant(base, lora, generator)


def inject_lora(model: nn.Module, lora: LoRAConfig, seed: int, make: Any = make_lora) -> dict[str, Adapter]:
    """Freeze the model and add adapters to the modules that the settings name; return them by module name.

    Raises a UserError for a target that matches nothing, a pattern that matches no adapter, or unsuitable settings.
    """
    model.requires_grad_(False)
    generator, modules = torch.Generator().manual_seed(seed), list(targets_of(model))
    with time_limit(MATCHING_SECONDS, "lora.target_modules, lora.rank_pattern, lora.alpha_pattern"):
        whole = {*modules} & {*lora.target_modules}  # names of files with experts are many thousands
        parts = [target for target in lora.target_modules if target not in whole]
        targets = [name for name in modules if name in whole or any(matches_target(name, part) for part in parts)]
        copies = copied_modules(model, lora, set(targets))
        low_rank = [name for name in targets if "weight" not in copies.get(name, ())]
        unmatched = (t for t in parts if not any(matches_target(name, t) for name in low_rank))
        if unused := next(chain(sorted(whole - {*low_rank}), unmatched), None):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
            raise UserError(
                f"lora.target_modules: {unused!r} matches no linear of this model, which has {known} "
                "(norms: lora.modules_to_save; everything: training.method=full)"
            )
        settings = _settings_by_name(low_rank, lora)
    rows = token_rows(model, lora, {*settings, *copies})
    if {*settings, *copies} & {"lm_head", "model.embed_tokens"}:
        model.untie()  # type: ignore[operator]
    module = model.get_submodule
    adapters: dict[str, Adapter] = {n: make(n, module(n), own, generator) for n, own in settings.items()}
    adapters |= {name: TrainedCopy(module(name), parts) for name, parts in copies.items()}
    adapters |= {name: TrainedRows(module(name), ids) for name, ids in rows.items()}
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter)
    return adapters


def _settings_by_name(names: list[str], lora: LoRAConfig) -> dict[str, LoRAConfig]:
    """The settings of each low-rank adapter, with its own rank and alpha, by module name."""
    for field, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        if unused := next((key for key in pattern if not any(by_pattern({key: 1}, n, 0) for n in names)), None):
            raise UserError(f"lora.{field}: {unused!r} matches no adapter (such as {names[0]})")
    ranks = {name: by_pattern(lora.rank_pattern, name, lora.rank) for name in names}
    alphas = {name: by_pattern(lora.alpha_pattern, name, lora.alpha) for name in names}
    own = {pair: replace(lora, rank=pair[0], alpha=pair[1]) for pair in {(ranks[n], alphas[n]) for n in names}}
    return {name: own[ranks[name], alphas[name]] for name in names}


def linears_of(model: nn.Module) -> dict[str, Frozen]:
    """Every linear of the blocks but the routers of experts."""
    found = targets_of(model).items()
    return {name: m for name, m in found if matches_target(name, "all-linear") and not isinstance(m, Router)}


def targets_of(model: nn.Module) -> dict[str, Any]:
    """Modules that can have a low-rank adapter: the embedding, every linear of the blocks, the head."""
    found = {name: m for name, m in model.named_modules() if is_linear(m) or isinstance(m, nn.Embedding)}
    if "model.embed_tokens" in found:
        found.setdefault("lm_head", found["model.embed_tokens"])
    return found


def matches_target(name: str, target: str) -> bool:
    """Whether a target is a word of WORDS, the end of the name, or a regular expression that matches all of it."""
    if target in WORDS:
        return bool(re.search(WORDS[target], f".{name}")) and ".router" not in name  # adapted if named itself
    return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None


def by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first regular expression that matches the module's name, as in PEFT."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


@contextmanager
def disabled(adapters: dict[str, Adapter]) -> Iterator[None]:
    """Disable the adapters, so that the model is its base, for the duration of a `with` block."""
    for adapter in adapters.values():
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.enabled = True
