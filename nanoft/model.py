"""The decoder: token ids in, hidden states out.

One class serves Llama 2/3, Mistral, Qwen2 and Qwen3, because they differ only in a few switches: a bias on some
projections, a norm on queries and keys, a sliding window, a way of stretching the rotary positions.

    x = embedding[ids]
    in every block:  x = x + attention(norm(x)),  x = x + mlp(norm(x))
    hidden = norm(x),  logits = hidden @ head^T

Every equation stands here once, for training, evaluation and generation. What depends on positions is in the context of
a forward pass (attention.py); kernels/ has optimized forms of the same equations. Module names equal the names of the
tensors in Hugging Face files, so loading is a look-up and an adapter saved here has the keys that other tools expect.

Notation in comments: b batch, q positions, h query heads, g key/value heads, d head size, n target positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft.attention import Documents, SequenceContext
from nanoft.blocks.trained import Adapter
from nanoft.recompute import ActivationPolicy, run_block


@dataclass(frozen=True)
class Rope:
    """How positions become angles (RoFormer, Su et al. 2021), and how a longer context stretches them."""

    theta: float = 10000.0
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn
    parameters: Mapping[str, Any] = field(default_factory=dict)
    context: int = 0  # positions of pre-training; beyond them, dynamic depends on the sequence's length

    def angles(self, head_dim: int, length: int = 0) -> tuple[Tensor, float]:
        """Angular frequencies (head_dim / 2,) in radians per position, and the factor on cos and sin."""
        theta = self.theta
        if self.kind == "dynamic" and length > self.context:  # theta grows with the sequence (dynamic NTK)
            factor = self.parameters["factor"]
            theta *= (factor * length / self.context - (factor - 1)) ** (head_dim / (head_dim - 2))
        frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
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

    def dimension_of(turns: float) -> float:  # the frequency that makes this many turns over the old context
        return head_dim * math.log(old_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(p.get("beta_fast") or 32), dimension_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: keep, 1: divide
    stretched = frequency * (1 - ramp) + frequency / factor * ramp

    def magnitude(scale: float) -> float:  # eq. 22: sqrt(1/t) = 0.1 ln(s) + 1
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.get("attention_factor") is not None:
        return stretched, float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return stretched, magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return stretched, magnitude(1.0)


@dataclass(frozen=True)
class DecoderConfig:
    """The switches and sizes of a decoder, which nanoft/models/families.py reads from a config.json."""

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
    has_score: bool = False  # a reward model: one number for each position instead of logits


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4), in float32 inside."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight)

    def formula(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm as a function of everything that may get a gradient."""
        return F.rms_norm(x, weight.shape, weight, self.eps)


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with fewer key/value heads than query heads (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        c = config
        self.index, self.head_dim, self.window = layer, c.head_dim, c.windows[layer]
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        q, k, v = self.heads(self.q_proj(x), self.k_proj(x), self.v_proj(x), context)
        return self.o_proj(context.attend(q, k, v, self).flatten(2))

    def heads(self, q: Tensor, k: Tensor, v: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor, Tensor]:
        """Projections (b, q, heads * d), split into heads, normed and rotated: (b, q, h or g, d)."""
        shape = (*v.shape[:-1], -1, self.head_dim)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = context.rotate(q, k, self)
        return q.to(v.dtype), k.to(v.dtype), v  # under autocast a norm's float32 weight widens q and k


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.gate_proj(x), self.up_proj(x)))

    @staticmethod
    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a pre-norm transformer block."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: SequenceContext, target_positions: Tensor | None = None) -> Tensor:
        """The residual stream after this block, (b, q, hidden); at some positions only, (1, n, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), context)
        x = select(x, target_positions)  # from here on no position sees another one
        return x + self.mlp(self.post_attention_layernorm(x))


def select(x: Tensor, positions: Tensor | None) -> Tensor:
    """Positions b * seq + s of x, (b, seq, hidden), as (1, n, hidden); None: x."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)[None]


def embedding_noise(x: Tensor, alpha: float) -> Tensor:
    """Uniform in +-alpha / sqrt(seq * hidden), (b, q, hidden) (NEFTune, Jain et al. 2023, algorithm 1)."""
    bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
    return torch.empty_like(x).uniform_(-bound, bound)


class Trunk(nn.Module):
    """Embedding, blocks and final norm: the tensors whose names start with `model.`."""

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
        self.score = nn.Linear(config.hidden_size, 1, bias=False) if config.has_score else None
        self.activation_policy: list[ActivationPolicy] = ["all"] * config.num_layers  # what each block keeps
        self.context_class: type[SequenceContext] = SequenceContext
        self.neftune_alpha = 0.0

    @property
    def output(self) -> nn.Module:
        """The module of the output embedding, which may have an adapter."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def head(self) -> Tensor:
        """The output embedding, (vocab, hidden); with a low-rank adapter wider, as the hidden states are."""
        return self.output.weight  # type: ignore[return-value]

    @property
    def _stored_head(self) -> Tensor:
        output: Any = self.output
        stored: Tensor = getattr(output, "base", output).weight
        return stored

    @property
    def device(self) -> torch.device:
        return self._stored_head.device

    @property
    def dtype(self) -> torch.dtype:
        return self._stored_head.dtype

    def untie(self) -> None:
        """Let the head be a module of its own, with the embedding's weight, so that only one of them has an adapter."""
        if self.lm_head is None:
            self.config = replace(self.config, tied=False)
            self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, device="meta")
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def grow_vocabulary(self, size: int) -> None:
        """Append rows to the embedding and the head, the mean of each, until they have `size` tokens."""
        more = max(0, size - self.config.vocab_size)
        self.config = replace(self.config, vocab_size=self.config.vocab_size + more)
        for module in [self.model.embed_tokens] + ([] if self.lm_head is None else [self.lm_head]) if more else []:
            mean = module.weight.float().mean(0, keepdim=True).to(module.weight.dtype)
            module.weight = nn.Parameter(torch.cat((module.weight, mean.expand(more, -1))))

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        target_positions: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, (batch, seq, hidden); at some positions only, (1, n, hidden).

        Args:
            ids: token ids, (batch, seq).
            positions: of each token in its document, (batch, seq); None: 0, 1, 2, ...
            documents: of a packed batch; None: each sequence is one, padded on the right if at all (no token sees what
                comes after it, so such padding needs no mask).
            target_positions: flat positions b * seq + s whose hidden state is wanted, (n,); None: all.
        """
        x = self.model.embed_tokens(ids)
        if self.training and self.neftune_alpha:
            x = x + embedding_noise(x, self.neftune_alpha)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        context = self.context(positions, x.dtype, documents)
        last = len(self.model.layers) - 1
        for index, (block, policy) in enumerate(zip(self.model.layers, self.activation_policy, strict=True)):
            x = run_block(block, x, context, target_positions if index == last else None, policy)
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """The last hidden states, (..., hidden), of the residual stream; wider with a low-rank adapter on the head."""
        x = self.model.norm(x)
        return self.output.widen(x) if isinstance(self.output, Adapter) else x

    def context(self, positions: Tensor, dtype: torch.dtype, documents: Documents | None = None) -> SequenceContext:
        """What the layers of one forward pass share; positions are (b, q)."""
        return self.context_class(*self.rotation(positions, dtype), documents)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of position * frequency, (b, q, 1, d / 2); angles in float32 whatever the model's dtype."""
        rope = self.config.rope
        length = int(positions.max()) + 1 if rope.kind == "dynamic" else 0
        frequency, factor = rope.angles(self.config.head_dim, length)
        angles = positions[:, :, None, None].float() * frequency.to(positions.device)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ head^T in float32, (..., vocab): for generation; the loss never builds all of them."""
        return F.linear(hidden, self.head.to(hidden.dtype)).float()

    def attention_backend(self, dtype: torch.dtype, length: int, packed: bool) -> str:
        """What computes attention over sequences of this length on this device, for each kind of layer in the model."""
        c = self.config
        q = torch.empty(1, length, c.num_heads, c.head_dim, dtype=dtype, device=self.device)
        windows = dict.fromkeys(None if w is None or w >= length else w for w in c.windows)
        return "; ".join(dict.fromkeys(self.context_class.describe(q, window, packed) for window in windows))


@torch.no_grad()
def initialize(model: Decoder, seed: int) -> None:
    """Random weights for pre-training: N(0, 0.02), outputs of each block scaled by 1/sqrt(2 layers) (GPT-2)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)  # norms are 1
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * model.config.num_layers) if residual else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
