"""Random models of every entry of FAMILIES, made by transformers, with everything in which families differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from templates import STYLES, save
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nanoft.models.families import FAMILIES
from tiny_models import LLAMA3, SMALL, YARN

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
PARTS = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
LONGROPE = {**PARTS, "short_factor": [1 + i / 9 for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}
MINISTRAL = {**YARN, "factor": 16.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 8}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 3}
GPT2 = {**dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), "n_inner": 128}
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
GEMMA4 = {
    "sliding_window": 8, "global_head_dim": 32, "final_logit_softcapping": 3.0,
    "num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL] * 2,
}  # fmt: skip
QWEN3_5 = {"linear_num_key_heads": 2, "linear_key_head_dim": 24, "linear_value_head_dim": 32}
GRANITE4 = {
    **GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0, "layer_types": [FULL] * 3, "mamba_n_heads": 16,
    "shared_intermediate_size": 128, "position_embedding_type": "rope",
}  # fmt: skip

# The first shape of each family stands in the default run, the others in the slow one. Windows and contexts of
# pre-training are shorter than the tests' inputs; layers of both kinds, and both ropes, are there.
SHAPES: dict[str, list[dict[str, Any]]] = {
    "llama": [{"rope_parameters": LLAMA3, "head_dim": 20}, {"attention_bias": True, "mlp_bias": True}],
    "mistral": [{"sliding_window": 16}, {"sliding_window": None, "head_dim": 24}],
    "ministral3": [
        {"rope_parameters": {**MINISTRAL, "llama_4_scaling_beta": 0.3}},
        {"head_dim": 24, "tie_word_embeddings": True, "rope_parameters": {**MINISTRAL, "llama_4_scaling_beta": 0.1}},
    ],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1, "tie_word_embeddings": True},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "rope_parameters": YARN},
    ],
    "qwen3": [{"head_dim": 20}, {"head_dim": 40, "attention_bias": True, "tie_word_embeddings": True}],
    "qwen3_moe": [
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
        {
            "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "decoder_sparse_step": 2,
            "num_hidden_layers": 4, "mlp_only_layers": [3], "head_dim": 20, "tie_word_embeddings": True,
        },
    ],
    "gpt_oss": [
        {
            "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8, "intermediate_size": 64,
            "rope_parameters": {**YARN, "factor": 32.0, "truncate": False},
        },
    ],
    "gemma2": [
        {**GEMMA, "head_dim": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {**GEMMA, "head_dim": 40, "tie_word_embeddings": False},
    ],
    "gemma3_text": [
        {
            **GEMMA, "head_dim": 24, "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {SLIDING: PLAIN, FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        },
        {**GEMMA, "num_hidden_layers": 7, "head_dim": 20},
        {**GEMMA, "num_hidden_layers": 4, "sliding_window_pattern": 3, "final_logit_softcapping": 3.0, "head_dim": 40},
    ],
    "gemma4_text": [
        {**GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 64},
        {**GEMMA4, "hidden_size_per_layer_input": 0, "num_hidden_layers": 7, "layer_types": None},
        {
            **GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
            "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 64,
            "num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL],
        },
    ],
    "gemma4_unified_text": [
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {**GEMMA4, "num_kv_shared_layers": 3, "use_bidirectional_attention": None},
    ],
    "phi3": [
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40, "tie_word_embeddings": True},
        {"sliding_window": 8, "head_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}},
    ],
    "olmo2": [{}, {"head_dim": 24, "attention_bias": True, "num_key_value_heads": 4}],
    "olmo3": [
        {
            "sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {SLIDING: {**PLAIN, "rope_theta": 5e5}, FULL: {**YARN, "rope_theta": 5e5}},
        },
        {"sliding_window": 8, "num_hidden_layers": 5, "head_dim": 24},
    ],
    "smollm3": [
        {"num_hidden_layers": 4},
        {"no_rope_layers": [0, 1, 1], "head_dim": 20, "tie_word_embeddings": False, "attention_bias": True},
    ],
    "granite": [GRANITE, {**GRANITE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "exaone4": [
        {"sliding_window": None, "layer_types": [FULL] * 3, "rope_parameters": LLAMA3},
        {"sliding_window": 8, "num_hidden_layers": 5, "head_dim": 24, "tie_word_embeddings": True},
    ],
    "gpt2": [GPT2, {**GPT2, "n_inner": 192, "num_attention_heads": 2, "tie_word_embeddings": False}],
    "gpt_neox": [
        {},
        {
            "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new",
            "tie_word_embeddings": True, "rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0},
        },
    ],
    "qwen3_5_text": [
        {**QWEN3_5, "layer_types": [LINEAR, FULL, LINEAR], "linear_num_value_heads": 4},
        {**QWEN3_5, "num_hidden_layers": 4, "linear_num_value_heads": 2, "tie_word_embeddings": True, "head_dim": 40},
    ],
    "lfm2": [
        {"layer_types": ["conv", FULL, "conv"]},
        {"full_attn_idxs": [0, 2], "block_multiple_of": 32, "conv_L_cache": 4, "tie_word_embeddings": False},
    ],
    "granitemoehybrid": [GRANITE4, {**GRANITE4, "position_embedding_type": None, "tie_word_embeddings": True}],
    "seed_oss": [{}, {"head_dim": 40, "attention_out_bias": True, "mlp_bias": True}],
}  # fmt: skip
CASES = [(name, number) for name in FAMILIES for number in range(len(SHAPES.get(name, [{}])))]
WITH_EXPERTS = [("qwen3_moe", 0), ("gpt_oss", 0), ("gemma4_text", 2)]
FIRST = [case for case in CASES if case[1] == 0 or case in WITH_EXPERTS]
NO_DROPOUT = dict.fromkeys(("attention_dropout", "residual_dropout"), 0.0)  # some families have some by default
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_family(name: str, directory: Path, shape: int = 0, **changes: Any) -> PreTrainedModel:
    """One shape of a family with a tokenizer and chat template, saved by transformers in float32."""
    save(directory, STYLES["chatml"])
    vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(0)
    sizes = {**SMALL, "head_dim": 16, "vocab_size": vocabulary, **TOKENS, **NO_DROPOUT}
    sizes |= {"vocab_size_per_layer_input": vocabulary} if name == "gemma4_text" else {}
    config = AutoConfig.for_model(name, **{**sizes, **SHAPES.get(name, [{}])[shape], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        scalars = [buffer for place, buffer in model.named_buffers() if place.endswith("layer_scalar")]
        for parameter in [*model.parameters(), *scalars]:  # norms and biases too: a wrong detail shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    return model


def split_experts(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Stacked experts of transformers as linears, (out, in) each; gate and up are one but in Qwen3-MoE."""
    interleaved = family == "gpt_oss"
    found = dict[str, Tensor]()
    for name, stacked in tensors.items():
        place, dot, leaf = name.partition(".experts.")
        if not dot or stacked.dim() < 2 or leaf[0].isdigit():
            found[name] = stacked
            continue
        part, bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
        for number, own in enumerate(stacked):
            own = own.t() if interleaved and not bias else own  # (out, in), or (out,)
            parts = {part: own}
            if part == "gate_up_proj" and family == "qwen3_moe":
                parts = dict(zip(("gate_proj", "up_proj"), own.chunk(2), strict=True))
            for each, tensor in parts.items():
                found[f"{place}.experts.{number}.{each}.{'bias' if bias else 'weight'}"] = tensor
    return found
