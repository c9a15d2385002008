"""LoRA (Hu et al. 2021): freeze W, learn a low-rank correction beside it.

    y = W x + (alpha / r) * B A x,    A: (r, in) ~ Kaiming uniform,    B: (out, r) = 0

B starts at zero, so a fresh adapter changes nothing, and only r * (in + out) numbers per matrix are trained. A and
B are kept in float32 whatever the base's number format, because updates of 1e-5 vanish when they are added in bfloat16.

Nothing but A and B gets a gradient, so backward needs little: x for dA, x A^T (r numbers a token) for dB, and W, which
is there anyway, to hand the gradient on. `_Adapted` keeps exactly that, for all the linears of one input together; and
where that input is a cheap function of something that is kept anyway (a norm of the residual stream, silu(gate) * up),
it is not kept, either, but computed again.

The adapter is saved in the layout of the PEFT library, so that other tools read it and theirs are read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanoft import UserError
from nanoft.checkpoint import write_file, write_tensors
from nanoft.nf4 import Frozen, Linear4bit, Linear8bit, gradient, product

Prepare = Callable[..., Tensor]  # from what is kept to the linears' input

NOTE = "nanoft.json"  # a file of its own: PEFT warns at keys of adapter_config.json that it does not know
PEFT_PREFIX = "base_model.model."
# Fields of adapter_config.json that are read here or say nothing about the result ...
PEFT_FIELDS = frozenset(
    """
    base_model_name_or_path r lora_alpha lora_dropout target_modules task_type auto_mapping peft_version inference_mode
    megatron_core qalora_group_size runtime_config ensure_weight_tying
    """.split()  # noqa: SIM905
)
# ... and fields that change it, with the only values understood here. Any other field must be unset.
PEFT_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # these leave the base's weights as they are
    "revision": ("main",),
}


def identity(x: Tensor) -> Tensor:
    return x


class LoRALinear(nn.Module):
    """A frozen linear with a low-rank correction; see the module's formula."""

    def __init__(self, base: Frozen, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__()
        device = next(t.device for t in (*base.parameters(), *base.buffers()))
        self.base, self.scaling, self.dropout = base, alpha / rank, dropout
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # U(-1/sqrt(in), 1/sqrt(in))
        self.lora_A = nn.Parameter(a.to(device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))  # (out, r)
        self.enabled = True

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
        outputs = _Adapted.apply(group, *inputs, *group.weights())
        return [y if base.bias is None else y + base.bias for y, base in zip(outputs, group.bases, strict=True)]

    def plain(self, x: Tensor) -> Tensor:
        """The module's formula as it stands there."""
        y = self.base(x)
        if not self.enabled:
            return y
        small = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (b, s, r)
        return y + self.scaling * F.linear(small, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        """(alpha / r) * B A, the change of the weight, (out, in) float32."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


class Group:
    """Linears of one input x = prepare(*inputs); one without an adapter has an adapter of rank 0."""

    def __init__(self, prepare: Prepare, inputs: int, linears: Sequence[Frozen | LoRALinear], dropout: float):
        self.prepare, self.inputs, self.dropout, self.linears = prepare, inputs, dropout, linears
        self.bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in linears]
        self.scalings = [linear.scaling if isinstance(linear, LoRALinear) else 0.0 for linear in linears]

    def weights(self) -> list[Tensor]:
        """A_1, B_1, A_2, B_2, ..."""
        pairs: list[Tensor] = []
        for linear, base in zip(self.linears, self.bases, strict=True):
            if isinstance(linear, LoRALinear):
                pairs += [linear.lora_A, linear.lora_B]
            else:
                pairs += [torch.empty(0, base.in_features), torch.empty(base.out_features, 0)]
        return pairs


class _Adapted(torch.autograd.Function):
    """Frozen linears of one input with their adapters. With the A_i one above another as A, and s_i the scalings:

        u = d(x) A^T,   y_i = x W_i^T + s_i u_i B_i^T
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
            y = product(base, rows)  # (n, out)
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
        da = (du.T @ _masked(x.detach().flatten(0, -2), mask)).split([len(a_i) for a_i in a])
        if x.requires_grad:
            dx = _masked(du @ torch.cat(a).to(du.dtype), mask)
            for base, g_i in zip(group.bases, g, strict=True):
                dx += gradient(base, g_i)
            x.backward(dx.view_as(x))  # on to the inputs, and to parameters of `prepare` if they are trained
        d_weights = [d.to(a[0].dtype) for pair in zip(da, db, strict=True) for d in pair]
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


def inject_lora(
    model: nn.Module, target_modules: tuple[str, ...], rank: int, alpha: float, dropout: float, seed: int
) -> dict[str, LoRALinear]:
    """Freeze the model and put an adapter beside every linear whose name ends in one of `target_modules`.

    Args:
        target_modules: ends of dotted names: `q_proj`, `self_attn.q_proj`, or the whole name for one layer only.
    Returns:
        The adapters by module name, in the model's order.
    Raises:
        UserError: a target that names no linear.
    """
    model.requires_grad_(False)
    linears = _linears(model)
    for target in target_modules:
        if not any(_ends_in(name, target) for name in linears):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            raise UserError(f"lora.target_modules: {target!r} names no linear of this model: there are {known}")
    found = {name: linear for name, linear in linears.items() if any(_ends_in(name, t) for t in target_modules)}
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, base in found.items():
        parent, _, last = name.rpartition(".")
        adapters[name] = LoRALinear(base, rank, alpha, dropout, generator)
        setattr(model.get_submodule(parent), last, adapters[name])
    return adapters


def _linears(model: nn.Module) -> dict[str, Frozen]:
    """What can have an adapter: every linear of the blocks; not the head."""
    kinds = (nn.Linear, Linear4bit, Linear8bit)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and name != "lm_head"}


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def match_targets(model: nn.Module, target_modules: str | list[str]) -> tuple[str, ...]:
    """The field of PEFT's name as `inject_lora` takes it: a list of names, "all-linear", or a regular expression.

    Raises:
        UserError: an expression that is not valid, or that matches nothing.
    """
    if isinstance(target_modules, list):
        return tuple(target_modules)
    names = tuple(_linears(model))
    if target_modules == "all-linear":
        return names
    try:
        matched = tuple(name for name in names if re.fullmatch(target_modules, name))
    except re.error as error:
        raise UserError(f"target_modules: {target_modules!r} is not a regular expression: {error}") from None
    if not matched:
        raise UserError(f"target_modules: {target_modules!r} matches no linear of this model, such as {names[0]}")
    return matched


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
    if whole := sorted(n for n in tensors if n.startswith(PEFT_PREFIX) and ".lora_" not in n):
        raise UserError(f"{source}: {whole[0]}: layers that are trained whole beside an adapter are not supported")
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
        directory: made if it is missing; holds no adapter yet.
        settings: base_model_name_or_path, r, lora_alpha, lora_dropout, target_modules.
        note: what PEFT's format has no place for: how the base was quantised, what training computed in.
    """
    directory.mkdir(parents=True, exist_ok=True)
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
        write_file(directory / name, [(json.dumps(content, indent=2) + "\n").encode()])


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read adapter_config.json, adapter_model.safetensors and nanoft's note (empty if another tool wrote the adapter).

    Raises:
        UserError: a file is missing or damaged, or the adapter is of a kind that is not supported.
    """
    config = read_json(directory / "adapter_config.json")
    note = read_json(directory / NOTE) if (directory / NOTE).is_file() else {}
    try:
        _check_peft_config(config)
    except UserError as error:
        raise UserError(f"{directory / 'adapter_config.json'}: {error}") from None
    weights = directory / "adapter_model.safetensors"
    try:
        tensors = load_file(weights)
    except FileNotFoundError:
        raise UserError(f"{directory}: {weights.name} is missing: copy the whole adapter directory") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: damaged ({error}): copy it again") from None
    for name, tensor in tensors.items():
        if ".lora_A." in name and tensor.shape[0] != config["r"]:
            raise UserError(f"{weights}: {name} has rank {tensor.shape[0]}, but adapter_config.json says {config['r']}")
    return config, tensors, note


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {value!r:.40}")
    return value


def _check_peft_config(config: dict[str, Any]) -> None:
    """Only what is understood may pass: every other field could change what the adapter does."""
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
    names = targets if isinstance(targets, list) else [targets]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"target_modules: {targets!r:.60} is not a list of module names")
