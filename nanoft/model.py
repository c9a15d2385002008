"""The decoder: token ids in, hidden states out.

One class serves Llama 2/3, Mistral, Qwen2 and Qwen3, because they differ only in a few switches: a bias on some
projections, a norm on queries and keys, a sliding window, a way of stretching the rotary positions. `DecoderConfig`
reads those switches from a Hugging Face `config.json`, in its classic and its current form, and refuses any field that
it does not know: a setting that is silently ignored is a model that is silently wrong.

Module names equal the names of the tensors in Hugging Face files, so loading is a look-up and an adapter saved here
has the keys that other tools expect.

What makes training fast and small is in two small functions here, `project` (linears of one input share their work, and
the input is computed again in backward instead of being kept) and `run_block` (a block's activations may be computed
again, or wait on the CPU), and in nanoft/attention.py.

Notation in comments: b batch, q and k positions that ask and answer, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from nanoft.attention import Documents, attend, backend, rotate

Keep = Literal["all", "input", "offloaded"]  # what of a block waits for backward: its activations, or its input only


@dataclass(frozen=True)
class Rope:
    """How positions become angles (RoFormer, Su et al. 2021), and how a longer context stretches them."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | llama3 | yarn
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def angles(self, head_dim: int) -> tuple[Tensor, float]:
        """Angular frequencies (head_dim / 2,) in radians per position, and the factor on cos and sin."""
        frequency = self.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        if self.kind == "linear":  # positions are squeezed by `factor` (Chen et al. 2023)
            return frequency / self.parameters["factor"], 1.0
        if self.kind == "llama3":
            return _llama3_frequencies(frequency, self.parameters), 1.0
        if self.kind == "yarn":
            return _yarn_frequencies(frequency, self.theta, head_dim, self.parameters)
        return frequency, 1.0


def _llama3_frequencies(frequency: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, a linear blend between."""
    old_context = p["original_max_position_embeddings"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = old_context * frequency / (2 * math.pi)  # full turns over the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, 1: fast
    return (1 - blend) * frequency / p["factor"] + blend * frequency


def _yarn_frequencies(frequency: Tensor, theta: float, head_dim: int, p: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, section 3.2-3.4): blend by the number of turns, and temper the attention."""
    factor, old_context = p["factor"], p["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:  # which frequency makes so many turns over the original context
        return head_dim * math.log(old_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: keep, 1: divide
    stretched = frequency * (1 - ramp) + frequency / factor * ramp
    return stretched, _yarn_attention_factor(factor, p)


def _yarn_attention_factor(factor: float, p: Mapping[str, Any]) -> float:
    def magnitude(scale: float) -> float:  # YaRN eq. 22: sqrt(1/t) = 0.1 ln(s) + 1
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: what is left of a config.json once every convention is resolved."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    tied: bool  # the head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim on queries and keys (Qwen3)
    windows: tuple[int | None, ...]  # per layer: how far back a position sees; None: all the way
    family: str  # its entry in FAMILIES (nanoft/models/families.py)


@dataclass
class Attention:
    """What the layers of one forward pass share: the rotation of each position and who may see whom."""

    cos: Tensor  # (b or 1, q, 1, d / 2)
    sin: Tensor  # (b or 1, q, 1, d / 2)
    documents: Documents | None  # of a packed batch


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4), in float32 inside; one kernel on CUDA."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def project(linears: Sequence[nn.Module], prepare: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Every linear's output for the same x = prepare(*inputs): a norm, or what stands between two linears.

    Linears with adapters do it together: `_Adapted` in nanoft/lora.py.
    """
    for linear in linears:
        if together := getattr(linear, "project", None):
            return together(linears, prepare, *inputs)
    x = prepare(*inputs)
    return [linear(x) for linear in linears]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return F.silu(gate) * up


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with fewer key/value heads than query heads (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c = config
        self.head_dim, self.window = c.head_dim, c.windows[layer]
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, norm: RMSNorm, attention: Attention, rows: Tensor | None) -> Tensor:
        """Attention over norm(x), (b, q, hidden); of some rows only, (1, n, hidden)."""
        parts = project((self.q_proj, self.k_proj, self.v_proj), norm, x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # (b, q, heads, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, attention.cos, attention.sin), rotate(k, attention.cos, attention.sin)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm's float32 weight has widened them
        y = attend(q, k, v, self.window, attention.documents)
        return self.o_proj(select_rows(y.flatten(2), rows))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """The MLP of norm(x), (b, q, hidden)."""
        gate, up = project((self.gate_proj, self.up_proj), norm, x)
        return project((self.down_proj,), swiglu, gate, up)[0]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms go along, because they are computed twice.

    If only some rows of the result are wanted, the others are left behind as soon as attention has seen them.
    """

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        x = select_rows(x, rows) + self.self_attn(x, self.input_layernorm, attention, rows)
        return x + self.mlp(x, self.post_attention_layernorm)


def select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Positions b * seq + s of x, (b, seq, hidden), as (1, n, hidden); None: x."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)[None]


def embedding_noise(x: Tensor, alpha: float) -> Tensor:
    """Uniform in +-alpha / sqrt(seq * hidden), (b, q, hidden) (NEFTune, Jain et al. 2023, algorithm 1)."""
    bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
    return torch.empty_like(x).uniform_(-bound, bound)


def keep_by_policy(policy: str, every: int, layers: int) -> list[Keep]:
    """What each block keeps under none, every_k, full or offload."""
    again: Keep = "offloaded" if policy == "offload" else "input"
    step = {"auto": layers + 1, "none": layers + 1, "every_k": every, "full": 1, "offload": 1}[policy]
    return [again if (layer + 1) % step == 0 else "all" for layer in range(layers)]


def compile_blocks(model: Decoder) -> None:
    """Fuse what stands between the matrix products, block by block; elementwise results are computed again in backward.

    With the whole budget the compiler keeps them: 145 KiB a token and layer of Mistral-7B instead of 93.
    """
    torch._functorch.config.activation_memory_budget = 0.8
    for block in model.model.layers:
        block.compile()


def run_block(block: nn.Module, x: Tensor, attention: Attention, rows: Tensor | None, keep: Keep) -> Tensor:
    """A block whose activations are kept for backward, or computed again there from x (Chen et al. 2016).

    `offloaded` lets x itself wait on the CPU, too: then no memory of the device grows with the number of layers.
    """
    if keep == "all" or not torch.is_grad_enabled():
        return block(x, attention, rows)
    if not x.requires_grad:  # the first block's, when the embedding is frozen
        x = x.detach().requires_grad_()
    waiting = save_on_cpu(pin_memory=x.is_cuda) if keep == "offloaded" else contextlib.nullcontext()
    twice = with_same_dropout(block) if x.device.type == "mps" else block
    with waiting:
        return checkpoint(twice, x, attention, rows, use_reentrant=True)


def with_same_dropout(block: nn.Module) -> Callable[..., Any]:
    """The block as a function that drops the same when it is called again.

    `checkpoint` sees to that on CUDA and the CPU; Metal's random numbers it leaves alone (PyTorch 2.8 to 2.13).
    """
    first: list[Tensor] = []

    def call(*arguments: Any) -> Any:
        state = torch.mps.get_rng_state()
        if not first:
            first.append(state)
            return block(*arguments)
        torch.mps.set_rng_state(first[0])
        y = block(*arguments)
        torch.mps.set_rng_state(state)
        return y

    return call


class Trunk(nn.Module):
    """Embedding, blocks and final norm; a module of its own because the tensor names say `model.`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A causal language model up to its last hidden state; `head` is the matrix that turns it into logits."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.keep: list[Keep] = ["all"] * config.num_layers  # of each block's activations
        self.neftune_alpha = 0.0

    @property
    def head(self) -> Tensor:
        """The output embedding, (vocab, hidden)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, (batch, seq, hidden); of some rows only, (1, n, hidden).

        Args:
            ids: token ids, (batch, seq).
            positions: of each token in its document, (batch, seq); None: 0, 1, 2, ...
            documents: of a packed batch, which do not see each other. None: one document a row, padded on the right
                if at all (no token sees what comes after it, so such padding needs no mask).
            rows: flat positions b * seq + s that are wanted, (n,); None: all.
        """
        x = self.model.embed_tokens(ids)
        if self.training and self.neftune_alpha:
            x = x + embedding_noise(x, self.neftune_alpha)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        attention = Attention(*self.rotation(positions, x.dtype), documents)
        *earlier, last = zip(self.model.layers, self.keep, strict=True)
        for block, keep in earlier:
            x = run_block(block, x, attention, None, keep)
        x = run_block(last[0], x, attention, rows, last[1])
        return self.model.norm(x)

    def attention_backend(self, dtype: torch.dtype, length: int, packed: bool) -> str:
        """What computes attention over rows of so many tokens here, of each kind of layer that the model has."""
        c = self.config
        q = torch.empty(1, length, c.num_heads, c.head_dim, dtype=dtype, device=self.head.device)
        windows = dict.fromkeys(None if w is None or w >= length else w for w in c.windows)
        return "; ".join(dict.fromkeys(backend(q, window, packed) for window in windows))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ head^T in float32, (..., vocab): for generation; the loss never builds all of them."""
        return F.linear(hidden, self.head).float()

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of position * frequency, (b, q, 1, d / 2); angles in float32 whatever the model's dtype."""
        frequency, factor = self.config.rope.angles(self.config.head_dim)
        angles = positions[:, :, None, None].float() * frequency.to(positions.device)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Random weights for pre-training: N(0, 0.02), outputs of each block scaled by 1/sqrt(2 layers) (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue  # norms stay 1, biases stay 0
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * model.config.num_layers) if residual else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
