"""Families with experts: what their config.json says of them, for nanoft/models/families.py."""

from __future__ import annotations

from typing import Any

from nanoft import UserError
from nanoft.blocks.moe import Routing
from nanoft.models.layer_fields import Fields, read_rope, read_windows, window_but_every

SIZES_OF_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "top_k_experts"), 1 << 12)
SIZES_OF_EXPERTS["moe_intermediate_size"] = 1 << 20
# Fields that are read, besides those of all families.
MOE = "attention_bias sliding_window num_experts num_local_experts num_experts_per_tok router_aux_loss_coef".split()  # noqa: SIM905
QWEN3_MOE = (*MOE, "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
             "use_sliding_window", "max_window_layers")  # fmt: skip
GPT_OSS = (*MOE, "layer_types", "experts_per_token", "initial_context_length")
# This auxiliary loss is a product of means over a forward pass, not a sum over documents as training.balance_loss.
NO_AUXILIARY_LOSS: dict[str, tuple[Any, ...]] = {"output_router_logits": (False,)}
GPT_OSS_ONLY = {**NO_AUXILIARY_LOSS, "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)}
ROUTER = (("mlp.gate", "mlp.router"),)  # its name in files of Qwen3-MoE


def read_routing(
    hf: Fields, layers: tuple[bool, ...], experts: int, chosen: int, width: int, over_chosen: bool,
    beside_mlp: bool = False,
) -> Routing | None:  # fmt: skip
    """The experts of the layers that have some; `experts` in each, of which `chosen`, if the file does not say."""
    experts = hf.get("num_experts") or hf.get("num_local_experts") or experts
    chosen = hf.get("num_experts_per_tok") or chosen
    if chosen > experts:
        name = "top_k_experts" if beside_mlp else "num_experts_per_tok"
        raise UserError(f"{name}: {chosen} of {experts} experts: choose fewer")
    return Routing(layers, experts, chosen, width, over_chosen, beside_mlp) if any(layers) else None


def qwen3_moe(hf: Fields) -> dict[str, Any]:
    """Qwen3 with experts in every n-th layer that is not in a list of others."""
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise UserError(f"decoder_sparse_step: {step!r:.60} is not a number of layers")
    if not isinstance(dense, list):
        raise UserError(f"mlp_only_layers: {dense!r:.60} is not a list of layers")
    sparse = tuple((layer + 1) % step == 0 and layer not in dense for layer in range(hf["num_hidden_layers"]))
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    width, normed = hf.get("moe_intermediate_size", 768), bool(hf.get("norm_topk_prob", False))
    return {
        **dict.fromkeys(("qkv_bias", "o_bias"), bool(hf.get("attention_bias", False))), "qk_norm": "head",
        "windows": read_windows(hf, window), "routing": read_routing(hf, sparse, 128, 8, width, normed),
    }  # fmt: skip


def gpt_oss(hf: Fields) -> dict[str, Any]:
    """Experts with biases, sinks, and a window in every second layer from the first on."""
    if not (hf.get("rope_parameters") or hf.get("rope_scaling")):  # transformers' default stretches positions
        raise UserError("rope_parameters: missing: download the file again")
    layers, bias, eps = hf["num_hidden_layers"], hf.get("attention_bias", True), hf.get("rms_norm_eps", 1e-5)
    return {
        **dict.fromkeys(("qkv_bias", "o_bias"), bias), "mlp_bias": True, "mlp": "interleaved", "mlp_limit": 7.0,
        "sinks": True, "head_dim": hf.get("head_dim") or 64, "windows": window_but_every(2, hf, 128), "norm_eps": eps,
        "ropes": (read_rope({"rope_theta": 150_000.0, **hf}),) * layers,
        "routing": read_routing(hf, (True,) * layers, 128, 4, hf["intermediate_size"], True),
    }  # fmt: skip
