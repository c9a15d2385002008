"""LoRA (Hu et al. 2021): freeze W, learn a low-rank correction beside it.

    y = W x + s B A x + b,    A: (r, in) ~ Kaiming uniform,    B: (out, r) = 0,    s = alpha / r

B starts at zero, so a fresh adapter changes nothing, and only r * (in + out) numbers per matrix are trained. A and
B are kept in float32 whatever the base's number format, because updates of 1e-5 vanish when they are added in bfloat16.

Variations, each a line or two below:

- rsLoRA (Kalajdzievski 2023): s = alpha / sqrt(r), because alpha / r makes updates of a high rank too small.
- LoRA-FA (Zhang et al. 2023): A stays as it was drawn; only B is trained.
- DoRA (Liu et al. 2024): the length of each row of W + s B A is a parameter of its own, m.
- PiSSA (Meng et al. 2024): A and B start as the r largest singular directions A0, B0 of W, which are taken out of W:
  y = (W - s B0 A0) x + s B A x. Here W stays as it is, and the change is written as
  B A - B0 A0 = (B - B0) A + B0 (A - A0): a LoRA of rank 2r, exactly zero at first, whose small differences are taken
  in float32. So the base is still there to compare with, the adapter fits it, and it may be quantised (W is then what
  it really multiplies by; QPiSSA, which quantises W - s B0 A0, is something else).
- Biases can be trained, too, in float32.

Nothing but A and B gets a gradient, so backward needs little: x for dA, x A^T (r numbers a token) for dB, and W, which
is there anyway, to hand the gradient on. `_Adapted` keeps exactly that, for all the linears of one input together; and
where that input is a cheap function of something that is kept anyway (a norm of the residual stream, silu(gate) * up),
it is not kept, either, but computed again. (DoRA keeps each output, too, for the gradient of m.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanoft import UserError
from nanoft.config import LoRAConfig
from nanoft.io.untrusted import time_limit
from nanoft.nf4 import Frozen, Linear4bit, Linear8bit, gradient, product

Prepare = Callable[..., Tensor]  # from what is kept to the linears' input
WORDS = {"all-linear": ".", "attention": ".self_attn.", "mlp": ".mlp."}  # for target_modules: part of the name
MATCHING_SECONDS = 5.0  # for regular expressions, which may be a stranger's: `(.+)+!` would take for ever
EXACT_SVD = 1024  # a larger matrix is decomposed approximately
SUBSPACE_ITERATIONS = 8
SMALLEST = torch.finfo(torch.float32).tiny  # so that a row of zeros can be divided by its length


def identity(x: Tensor) -> Tensor:
    return x


class LoRALinear(nn.Module):
    """A frozen linear with a low-rank correction; see the module's formula."""

    def __init__(self, base: Frozen, lora: LoRAConfig, generator: torch.Generator):
        """Put a fresh adapter beside `base`.

        Args:
            lora: with the rank and the alpha of this linear.
        """
        super().__init__()
        device = next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        self.base, self.dropout, self.enabled = base, lora.dropout, True
        self.scaling = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
        pissa = lora.init == "pissa"
        if pissa:
            b, a = (part / math.sqrt(self.scaling) for part in principal(weight_of(base), lora.rank, generator))
        else:
            a, b = torch.empty(lora.rank, base.in_features), torch.zeros(base.out_features, lora.rank)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # U(-1/sqrt(in), 1/sqrt(in))
        self.lora_A = nn.Parameter(a.to(device), requires_grad=not lora.freeze_a)  # (r, in)
        self.lora_B = nn.Parameter(b.to(device))  # (out, r)
        self.lora_A0: Tensor | None
        self.lora_B0: Tensor | None
        self.register_buffer("lora_A0", self.lora_A.detach().clone() if pissa else None, persistent=False)
        self.register_buffer("lora_B0", self.lora_B.detach().clone() if pissa else None, persistent=False)
        self.bias: nn.Parameter | None = None
        if lora.bias != "none" and base.bias is not None:
            self.bias = nn.Parameter(base.bias.detach().to(torch.float32, copy=True))  # b': (out,)
        self.norm_kept: Tensor | None = None
        self.lora_magnitude_vector: nn.Parameter | None = None
        if lora.dora:
            self.squares: Tensor  # |W|^2 of each row, (out,)
            lengths = torch.linalg.vector_norm(weight_of(base), dim=1, dtype=torch.float32)
            self.register_buffer("squares", lengths.square(), persistent=False)
            self.lora_magnitude_vector = nn.Parameter(self.norm(torch.float32))  # m: (out,)

    def forward(self, x: Tensor) -> Tensor:
        return self.project((self,), identity, x)[0]

    @staticmethod
    def project(linears: Sequence[Frozen | LoRALinear], prepare: Prepare, *inputs: Tensor) -> list[Tensor]:
        """The outputs of linears of one input prepare(*inputs), some or all of them with adapters."""
        adapters = [linear for linear in linears if isinstance(linear, LoRALinear)]
        if torch.compiler.is_compiling() or not adapters[0].enabled:  # the compiler chooses what to fuse and to keep
            x = prepare(*inputs)
            return [linear.plain(x) if isinstance(linear, LoRALinear) else linear(x) for linear in linears]
        group = Group(prepare, len(inputs), linears, adapters[0].dropout if adapters[0].training else 0.0)
        outputs = zip(linears, _Adapted.apply(group, *inputs, *group.weights()), strict=True)
        return [linear.finish(y) if isinstance(linear, LoRALinear) else y for linear, y in outputs]

    def plain(self, x: Tensor) -> Tensor:
        """The module's formula as it stands there."""
        y = self.base(x)
        if not self.enabled:
            return y
        a, b = self.factors()
        small = F.linear(F.dropout(x, self.dropout, self.training), a.to(x.dtype))  # (b, s, r)
        return self.finish(y + self.scaling * F.linear(small, b.to(x.dtype)))

    def finish(self, y: Tensor) -> Tensor:
        """c (y - b) + b' of y = W x + s B A x + b, with c = m / |W + s B A| (DoRA, eq. 5) and the trained bias b'.

        Written as c y + (b' - c b), which is y, bit for bit, as long as c = 1 and b' = b.
        """
        m, b = self.lora_magnitude_vector, self.base.bias
        if m is None and self.bias is None:
            return y
        c = None if m is None else m / self.norm(y.dtype)  # (out,)
        wide = y if c is None else c * y  # float32
        if b is not None:
            wide = wide + ((b if self.bias is None else self.bias) - (b if c is None else c * b))
        return wide.to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the change s B A, in PiSSA of rank 2r."""
        if self.lora_A0 is None or self.lora_B0 is None:
            return self.lora_A, self.lora_B
        return widen(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)

    def norm(self, dtype: torch.dtype) -> Tensor:
        """|w + s b A| for each row w of W and b of B, (out,), from |w|^2 + 2 s b (A w) + s^2 b A A^T b^T.

        W + s B A itself, (out, in), is not formed; A W^T is computed in `dtype`. To backward, the norm is a constant
        (DoRA, section 4.3). In use, when A and B do not change any more, it is computed once.
        """
        in_use = not self.training and not torch.is_grad_enabled()
        if in_use and self.norm_kept is not None:
            return self.norm_kept
        with torch.no_grad():
            a, b = self.factors()
            aw = product(self.base, a.to(dtype)).float().T  # (out, r)
            squares = self.squares + (self.scaling * b * (2 * aw + self.scaling * (b @ (a @ a.T)))).sum(1)
            norm = squares.clamp(min=SMALLEST).sqrt()
        self.norm_kept = norm if in_use else None
        return norm

    def train(self, mode: bool = True) -> Self:
        self.norm_kept = None
        return super().train(mode)

    def merged(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The weight of one linear that does the same: W + s B A, in DoRA with rows of length m; (out, in) float32.

        Args:
            weight: W, (out, in) float32, on any device; or some of its rows.
            rows: which they are; each is merged by itself.
        """
        a, b = (factor.detach().float().to(weight.device) for factor in self.factors())
        merged = torch.addmm(weight, b[rows], a, alpha=self.scaling)
        if self.lora_magnitude_vector is None:
            return merged
        lengths = torch.linalg.vector_norm(merged, dim=1).clamp(min=SMALLEST)
        return merged.mul_((self.lora_magnitude_vector.detach()[rows].to(weight.device) / lengths)[:, None])


class Group:
    """Linears of one input x = prepare(*inputs); one without an adapter has an adapter of rank 0."""

    def __init__(self, prepare: Prepare, inputs: int, linears: Sequence[Frozen | LoRALinear], dropout: float):
        self.prepare, self.inputs, self.dropout, self.linears = prepare, inputs, dropout, linears
        self.bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
        self.scalings = [linear.scaling if isinstance(linear, LoRALinear) else 0.0 for linear in linears]

    def weights(self) -> list[Tensor]:
        """A_1, B_1, A_2, B_2, ..."""
        like = next(linear.lora_A for linear in self.linears if isinstance(linear, LoRALinear))
        pairs: list[Tensor] = []
        for linear in self.linears:
            if isinstance(linear, LoRALinear):
                pairs += linear.factors()
            else:
                pairs += [like.new_empty(0, linear.in_features), like.new_empty(linear.out_features, 0)]
        return pairs


class _Adapted(torch.autograd.Function):
    """Frozen linears of one input with their adapters. With the A_i one above another as A, and s_i the scalings:

        u = d(x) A^T,   y_i = x W_i^T + b_i + s_i u_i B_i^T
        g_i = dL/dy_i,  du_i = s_i g_i B_i,  dB_i = s_i g_i^T u_i,  dA = du^T d(x),  dx = sum_i g_i W_i + d(du A)

    d is the dropout of the adapters' input: multiplication by a mask of 0 and 1 / (1 - p), one for the group.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, a, b = _parted(group, tensors)
        x = group.prepare(*inputs)
        rows = x.flatten(0, -2)  # (n, in)
        mask = _dropout_mask(rows, group.dropout)
        u = _masked(rows, mask) @ torch.cat(a).to(x.dtype).T  # (n, sum of ranks)
        outputs = []
        for base, scaling, u_i, b_i in zip(group.bases, group.scalings, _by_rank(u, a), b, strict=True):
            y = base(rows)  # (n, out)
            y.addmm_(u_i, b_i.to(y.dtype).T, alpha=scaling)
            outputs.append(y.unflatten(0, x.shape[:-1]))
        ctx.group = group
        ctx.save_for_backward(u, mask, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        u, mask, *tensors = ctx.saved_tensors
        inputs, a, b = _parted(group, tensors)
        g = [gradient.flatten(0, -2) for gradient in gradients]  # (n, out) each
        du = torch.cat([s * (g_i @ b_i.to(g_i.dtype)) for g_i, b_i, s in zip(g, b, group.scalings, strict=True)], 1)
        db = [s * (g_i.T @ u_i) for g_i, u_i, s in zip(g, _by_rank(u, a), group.scalings, strict=True)]
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        with torch.enable_grad():
            x = group.prepare(*inputs)
        da: Sequence[Tensor | None] = [None] * len(a)
        if any(ctx.needs_input_grad[1 + group.inputs :: 2]):
            da = (du.T @ _masked(x.detach().flatten(0, -2), mask)).split([len(a_i) for a_i in a])
        if x.requires_grad:
            dx = _masked(du @ torch.cat(a).to(du.dtype), mask)
            for base, g_i in zip(group.bases, g, strict=True):
                dx += gradient(base, g_i)
            x.backward(dx.view_as(x))  # on to the inputs, and to parameters of `prepare` if they are trained
        d_weights = [None if d is None else d.to(a[0].dtype) for pair in zip(da, db, strict=True) for d in pair]
        return (None, *(tensor.grad for tensor in inputs), *d_weights)


def _parted(group: Group, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The inputs, the A_i and the B_i."""
    weights = list(tensors[group.inputs :])
    return list(tensors[: group.inputs]), weights[::2], weights[1::2]


def _by_rank(u: Tensor, a: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return u.split([len(a_i) for a_i in a], dim=1)


def _dropout_mask(rows: Tensor, p: float) -> Tensor | None:
    return F.dropout(torch.ones_like(rows), p) if p else None


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask


def weight_of(base: Frozen) -> Tensor:
    """W, (out, in): of a quantised linear, what it really multiplies by."""
    return base.weight.detach() if isinstance(base, nn.Linear) else base.dequantize()


def principal(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """U sqrt(S), (out, rank), and sqrt(S) V^T, (rank, in), of the largest singular values of the weight.

    Of a large matrix, approximately: by iterations that turn 2 * rank random directions towards the largest ones (Halko
    et al. 2011, algorithm 4.4), and the decomposition of what the matrix does to those.
    """
    weight = weight.float()
    if weight.device.type == "mps":  # which has no such decompositions, or since lately slow ones
        weight = weight.cpu()
    if min(weight.shape) <= EXACT_SVD:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        basis = torch.randn(weight.shape[1], min(2 * rank, *weight.shape), generator=generator).to(weight.device)
        for _ in range(SUBSPACE_ITERATIONS):
            basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis).Q).Q  # (in, 2 rank), orthonormal
        u, s, vt = torch.linalg.svd(weight @ basis, full_matrices=False)
        vt = vt @ basis.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def widen(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """PiSSA's B A - B0 A0 as the product of two: [B - B0, B0] and [A; A - A0]."""
    return torch.cat((a, a - a0)), torch.cat((b - b0, b0), dim=1)


def inject_lora(model: nn.Module, lora: LoRAConfig, seed: int) -> dict[str, LoRALinear]:
    """Freeze the model and put an adapter beside every linear that `lora.target_modules` names.

    Args:
        seed: of the random A.
    Returns:
        The adapters by module name, in the model's order.
    Raises:
        UserError: a target that names no linear, a pattern that fits no adapter, a rank that PiSSA cannot have, a bias
            that is to be trained and has no adapter.
    """
    model.requires_grad_(False)
    linears = linears_of(model)
    with time_limit(MATCHING_SECONDS, "lora.target_modules, lora.rank_pattern, lora.alpha_pattern"):
        settings = _settings_by_name(linears, lora)
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, own in settings.items():
        base = linears[name]
        most = min(base.in_features, base.out_features)
        if own.init == "pissa" and own.rank > most:
            raise UserError(
                f"lora.rank: {own.rank}: {name} has {most} singular values to begin with: set lora.rank={most}"
            )
        parent, _, last = name.rpartition(".")
        adapters[name] = LoRALinear(base, own, generator)
        setattr(model.get_submodule(parent), last, adapters[name])
    return adapters


def _settings_by_name(linears: dict[str, Frozen], lora: LoRAConfig) -> dict[str, LoRAConfig]:
    """The settings of each adapter, with its own rank and alpha, by the name of its linear."""
    for target in lora.target_modules:
        if not any(is_meant(name, target) for name in linears):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise UserError(
                f"lora.target_modules: {target!r} names no linear of this model: there are {known} "
                "(head, embeddings and norms: training.method=full)"
            )
    found = {name: linear for name, linear in linears.items() if any(is_meant(name, t) for t in lora.target_modules)}
    for field, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for key in pattern:
            if not any(_fits(key, name) for name in found):
                raise UserError(f"lora.{field}: {key!r} fits no adapter (such as {next(iter(found))})")
    if lora.bias == "all" and (bare := [n for n, m in linears.items() if m.bias is not None and n not in found]):
        raise UserError(f"lora.bias: all: {bare[0]} has a bias, but no adapter: target it or set lora.bias=lora_only")
    ranks = {name: by_pattern(lora.rank_pattern, name, lora.rank) for name in found}
    alphas = {name: by_pattern(lora.alpha_pattern, name, lora.alpha) for name in found}
    return {name: replace(lora, rank=ranks[name], alpha=alphas[name]) for name in found}


def linears_of(model: nn.Module) -> dict[str, Frozen]:
    """What can have an adapter: every linear of the blocks; not the head, whose matrix the loss takes by itself."""
    kinds = (nn.Linear, Linear4bit, Linear8bit)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and name != "lm_head"}


def is_meant(name: str, target: str) -> bool:
    """Whether a module is meant by a word of WORDS, the end of its name, or an expression for all of its name."""
    if target in WORDS:
        return WORDS[target] in f".{name}"
    return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None


def by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first expression that fits the module's name, as in PEFT."""
    return next((value for key, value in pattern.items() if _fits(key, name)), default)


def _fits(expression: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({expression})$", name) is not None


def describe_adapters(adapters: dict[str, LoRALinear]) -> list[str]:
    """One line for each type of linear: how many there are, their shape, their rank, how many numbers are trained."""
    trained: dict[tuple[str, str, str], list[int]] = {}
    for name, adapter in adapters.items():
        shape, rank = f"({adapter.base.in_features} -> {adapter.base.out_features})", f"rank {len(adapter.lora_A)}"
        numbers = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        trained.setdefault((name.rpartition(".")[2], shape, rank), []).append(numbers)
    lines = [(kind, f"{len(n)} x {shape}", rank, f"{sum(n):,}") for (kind, shape, rank), n in trained.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


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
