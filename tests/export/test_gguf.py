"""GGUF files in llama.cpp, in transformers and read back: the same weights, ids and greedy answers as in nanoft."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from adapters import LORA, MERGE_VARIANTS, make_adapter
from peft import PeftModel
from templates import TINY
from tiny_families import FULL, PLAIN, SLIDING, make_family
from transformers import AutoModelForCausalLM

import merge as command
from nanoft import UserError
from nanoft.blocks.moe import Experts
from nanoft.config import LoRAConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export.gguf import (
    K_QUANTS,
    WRITTEN,
    architecture,
    verify_gguf,
    write_gguf,
    write_gguf_lora,
)
from nanoft.export.merge import EXPORT_DTYPES, merge, open_adapter
from nanoft.export.model_card import parity_record
from nanoft.export.verify import held_out
from nanoft.generation.generate import generate
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.models import families
from nanoft.models.open import LoadedModel, open_chat_tokenizer, open_model, read_trained_adapter
from tiny_models import CASES, LLAMA3, YARN, make_chat_model, make_packed

CPU = torch.device("cpu")


IDS = list(range(5, 60))


# As small as llama.cpp takes it, with rows that divide into blocks of 32, or of 256 for K-quants.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {},
    "llama-tied": {},
    "llama3-rope": {},
    "llama-linear": {},
    "llama-yarn": {},
    "mistral": {},
    "qwen2": {"head_dim": 8},
    "qwen3": {"head_dim": 32},
}


FAMILIES = ["llama-bias", "mistral", "qwen2", "qwen3"]


# Of the newer families those shapes that llama.cpp computes; see tests/tiny_families.py. Windows, contexts of
# pre-training and periods of layers are shorter than the inputs.
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
KINDS = [SLIDING, SLIDING, FULL]
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": KINDS},
    "phi3": {"original_max_position_embeddings": 8},
    "olmo3": {"layer_types": KINDS},
    "granite": {"attention_bias": True, "mlp_bias": True},
    "qwen3_5_text": {"linear_key_head_dim": 32},
    "gpt_oss": {"rope_parameters": {**YARN, "factor": 32.0}},
}
GRAPHS = {
    name: CHANGES.get(name, {})
    for name, family in families.FAMILIES.items()
    if family.gguf is not None and name not in SIZES
}
GRAPHS["gemma4_text 2"] = {}  # with experts


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


HELLO = [{"role": "user", "content": "Hello there, how are you today?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Opens a base of some case with a random adapter on it, made once."""
    root, kept = tmp_path_factory.mktemp("gguf"), {}

    def make(case: str, wide: bool = False, lora: LoRAConfig = LORA, **note: Any) -> tuple[LoadedModel, ChatTokenizer]:
        key = f"{case}-{wide}-{abs(hash(str((lora, note))))}"
        if key not in kept:
            base = root / f"{case}-{wide}"
            if not base.exists() and case in GRAPHS:
                family, _, shape = case.partition(" ")
                make_family(family, base, int(shape or 0), **GRAPHS[case])
            elif not base.exists():
                make_chat_model(base, case, **(WIDE if wide else SIZES[case]))
            kept[key] = make_adapter(base, root / key, lora=lora, **note)
        opened = open_model(str(kept[key]), CPU, torch.float32)
        return opened, open_chat_tokenizer(str(kept[key]), opened)

    return make


def write(made_one: tuple[LoadedModel, ChatTokenizer], out: Path, dtype: str = "f32", onto: Any = "original") -> Path:
    write_gguf(*made_one, "a name", dtype, onto, out)
    return out


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def facts(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@torch.no_grad()
def logits(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    """(s, vocab) of our decoder, of transformers' or of llama.cpp's."""
    row = torch.tensor([ids])
    if hasattr(model, "eval") and hasattr(model, "n_ctx"):
        model.reset()
        model.eval(ids)
        return torch.from_numpy(np.array(model.scores[: len(ids)]))
    found: torch.Tensor = model(row).logits if hasattr(model, "generate") else model.logits(model(row))
    return found[0]


def perplexity(model: Any, ids: list[int] = IDS) -> float:
    found = torch.nn.functional.cross_entropy(logits(model, ids)[:-1], torch.tensor(ids[1:]))
    return math.exp(found.item())


def in_llama_cpp(path: Path, **settings: Any) -> Any:
    """The file in llama.cpp, its cache in float32, as ours is."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    plain = {"n_ctx": 256, "logits_all": True, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return llama_cpp.Llama(str(path), type_k=0, type_v=0, **{**plain, **settings})


def greedy(llama: Any, ids: list[int], count: int) -> list[int]:
    """llama.cpp's most likely tokens; a stop token ends them."""
    llama.reset()
    found: list[int] = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(int(token))
        if len(found) == count or token in (llama.token_eos(),):
            break
    return found


def ours(opened: LoadedModel, ids: list[int], count: int, stops: list[int]) -> list[int]:
    answer = generate(opened.model, [ids], stops, count)[0]
    return answer.ids + [stops[0]] * answer.stopped


# --- the tensors


@pytest.mark.parametrize("dtype", EXPORT_DTYPES)
@pytest.mark.parametrize("case", FAMILIES)
def test_tensors_are_the_merged_weights_bit_for_bit(case: str, dtype: str, made: Any, tmp_path: Path) -> None:
    """Against the merged Hugging Face model, its rows put in llama.cpp's order one by one."""
    opened, _ = made(case)
    found = stored(write(made(case), tmp_path / "model.gguf", dtype))
    (tmp_path / "hf").mkdir()
    merge(opened, torch.float32, "original", tmp_path / "hf")
    c = opened.model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture(c).upper()], c.num_layers)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    if c.tied:
        del expected["lm_head.weight"]
    assert found.keys() == {names.get_name(name, (".weight", ".bias")) for name in expected}
    for name, weight in expected.items():
        if case in ("llama-bias", "mistral") and ("q_proj" in name or "k_proj" in name):
            half = c.head_dim // 2
            heads = range(0, len(weight), c.head_dim)
            weight = weight[[head + pair + side * half for head in heads for pair in range(half) for side in (0, 1)]]
        number_format = torch.float32 if weight.dim() == 1 else EXPORT_DTYPES[dtype]
        tensor = found[names.get_name(name, (".weight", ".bias"))]
        assert bytes(tensor.data) == weight.to(number_format).view(torch.uint8).numpy().tobytes(), name
        assert tensor.tensor_type.name == str(number_format).removeprefix("torch.").replace("bfloat", "BF").replace(
            "float", "F"
        )


@pytest.mark.parametrize("dtype", WRITTEN)
@pytest.mark.parametrize("case", ["mistral", "qwen2"])  # of qwen3 it does not read the size of the heads
def test_transformers_reads_the_file(case: str, dtype: str, made: Any, tmp_path: Path) -> None:
    opened, _ = made(case)
    write(made(case), tmp_path / "model.gguf", dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    wanted = logits(opened.model)
    share = {"f32": 1e-4, "f16": 0.01, "bf16": 0.1, "q8_0": 0.1, "q5_0": 0.6, "q4_0": 1.0}[dtype]
    assert (logits(theirs.eval()) - wanted).abs().max() < share * wanted.std()
    proof = verify_gguf(opened, tmp_path / "model.gguf", [IDS], dtype)
    assert proof.holds
    assert proof.max_difference == pytest.approx((logits(theirs) - wanted).abs().max().item(), abs=1e-4)


def test_vectors_stay_exact_and_the_head_keeps_eight_bits(made: Any, tmp_path: Path) -> None:
    forms = {n: t.tensor_type.name for n, t in stored(write(made("mistral"), tmp_path / "a.gguf", "q4_0")).items()}
    assert forms["output.weight"] == "Q8_0"
    assert forms["output_norm.weight"] == "F32"
    assert {form for name, form in forms.items() if "output" not in name and "norm" not in name} == {"Q4_0"}
    tied = stored(write(made("llama-tied"), tmp_path / "b.gguf", "q5_0"))
    assert tied["token_embd.weight"].tensor_type.name == "Q8_0"
    assert "output.weight" not in tied


def test_rows_that_do_not_divide_into_blocks_are_kept_in_f16(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base", "llama", intermediate_size=48)
    opened = open_model(str(tmp_path / "base"), CPU, torch.float32)
    path = write((opened, open_chat_tokenizer(str(tmp_path / "base"), opened)), tmp_path / "model.gguf", "q8_0")
    forms = {name: tensor.tensor_type.name for name, tensor in stored(path).items()}
    assert (forms["blk.0.ffn_down.weight"], forms["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert (logits(in_llama_cpp(path)) - logits(opened.model)).abs().max() < 0.1


@pytest.mark.parametrize("stored_so", [False, True])
def test_onto_the_quantized_base(stored_so: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_chat_model(base, "mistral")
    if stored_so:
        make_packed(base, tmp_path / "packed", load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = tmp_path / "packed"
    note = {"quantization": {"type": "nf4", "double": False}, "dtype": "float32"}
    adapter = str(make_adapter(base, tmp_path / "adapter", **note))
    opened = open_model(adapter, CPU, torch.float32)
    write((opened, open_chat_tokenizer(adapter, opened)), tmp_path / "model.gguf", onto="nf4")
    assert verify_gguf(opened, tmp_path / "model.gguf", [IDS], "f32").holds
    plain = open_model(adapter, CPU, torch.float32, original_base=True)
    if not stored_so:
        assert not verify_gguf(plain, tmp_path / "model.gguf", [IDS], "f32").holds


@pytest.mark.parametrize("variant", MERGE_VARIANTS)
def test_every_kind_of_adapter_is_merged(variant: str, made: Any, tmp_path: Path) -> None:
    one = made("qwen2", lora=LoRAConfig(rank=4, alpha=6.0, **MERGE_VARIANTS[variant]))
    assert verify_gguf(one[0], write(one, tmp_path / "model.gguf"), [IDS], "f32").holds


def test_values_that_float16_lacks_are_refused(made: Any, tmp_path: Path) -> None:
    opened, chat = made("mistral")
    with torch.no_grad():
        opened.adapters["model.layers.0.mlp.up_proj"].lora_B.mul_(1e9)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight has values that overflow float16: use --dtype bf16"):
        write((opened, chat), tmp_path / "model.gguf", "f16")


def test_experts_beside_an_mlp_come_back_under_the_names_of_llama_cpp(made: Any, tmp_path: Path) -> None:
    opened, _ = made("gemma4_text 2")
    path = write(made("gemma4_text 2"), tmp_path / "model.gguf")
    assert verify_gguf(opened, path, [IDS], "f32").holds
    shapes = {name: tuple(map(int, tensor.shape)) for name, tensor in stored(path).items() if "blk.0.ffn_" in name}
    experts = {"gate_up_exps.weight": (64, 128, 6), "down_exps.weight": (64, 64, 6), "down_exps.scale": (6,)}
    router = {"gate_inp.weight": (64, 6), "gate_inp.scale": (64,), "norm.weight": (64,)}
    dense = {"gate.weight": (64, 128), "up.weight": (64, 128), "down.weight": (128, 64)}
    assert shapes == {f"blk.0.ffn_{name}": shape for name, shape in (experts | router | dense).items()}
    known = facts(path)
    assert [known[f"gemma4.expert_{name}"] for name in ("count", "used_count", "feed_forward_length")] == [6, 2, 64]


# --- llama.cpp


def near_ties(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Positions, (n,), at which a router nearly chose another expert, which rounding may change."""
    found = [torch.zeros(len(ids), dtype=torch.bool)]
    experts = [module for module in model.modules() if isinstance(module, Experts)]

    def note(_: Any, __: Any, scores: torch.Tensor, chosen: int) -> None:
        best = scores.topk(chosen + 1).values
        found.append(best[:, -2] - best[:, -1] < 3e-4)

    hooks = [module.router.register_forward_hook(partial(note, chosen=module.chosen)) for module in experts]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).any(0)


@pytest.mark.parametrize("case", [*SIZES, *GRAPHS])
def test_llama_cpp_computes_the_same(case: str, made: Any, tmp_path: Path, differs: Any) -> None:
    opened, chat = made(case)
    llama = in_llama_cpp(write(made(case), tmp_path / "model.gguf"))
    assert verify_gguf(opened, tmp_path / "model.gguf", [IDS], "f32").holds
    rounding = 1e-4 if opened.model.config.activation == "silu" else 4e-3  # llama.cpp's table of GELU is in float16
    rounding *= 8 if opened.model.config.attention_scale == 1 else 1  # unscaled attention magnifies it
    differs("GGUF", (logits(llama) - logits(opened.model)).abs().max(), rounding)
    assert perplexity(llama) == pytest.approx(perplexity(opened.model), rel=rounding / 10)
    long = IDS * 4  # beyond the context that rope scaling stretches
    decided = ~near_ties(opened.model, long)
    assert decided.float().mean() > 0.9
    assert (logits(llama, long) - logits(opened.model, long))[decided].abs().max() < max(rounding, 1e-3)
    prompt = chat.encode_prompt(HELLO)
    assert llama.tokenize(chat.render_prompt(HELLO).encode(), add_bos=False, special=True) == prompt
    assert greedy(llama, prompt, 24) == ours(opened, prompt, 24, [chat.eos_id])


@pytest.mark.parametrize("dtype", [*WRITTEN, *K_QUANTS])
@pytest.mark.parametrize("case", FAMILIES)
def test_llama_cpp_at_every_precision(case: str, dtype: str, made: Any, tmp_path: Path, record_property: Any) -> None:
    """What is lost is rounding alone: llama.cpp's perplexity is that of the file's weights in our decoder, too."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    opened, chat = made(case, wide=True)
    llama = in_llama_cpp(write(made(case, wide=True), tmp_path / "model.gguf", dtype))
    change = perplexity(llama) / perplexity(opened.model) - 1
    record_property("change of perplexity", change)
    assert abs(change) < {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3, "q8_0": 0.01}.get(dtype, 0.25)
    prompt = chat.encode_prompt(HELLO)
    if dtype in ("f32", "f16"):
        assert greedy(llama, prompt, 16) == ours(opened, prompt, 16, [chat.eos_id])
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf"}


def test_within_a_sliding_window_there_is_no_difference(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base", "mistral-window")
    opened = open_model(str(tmp_path / "base"), CPU, torch.float32)
    chat = open_chat_tokenizer(str(tmp_path / "base"), opened)
    (note,) = write_gguf(opened, chat, "x", "f32", "original", tmp_path / "model.gguf")
    assert "no sliding window for this architecture: the file limits the context to 16 tokens" in note
    known = facts(tmp_path / "model.gguf")
    assert (known["llama.context_length"], known["llama.attention.sliding_window"]) == (16, 16)
    llama = in_llama_cpp(tmp_path / "model.gguf")
    assert (logits(llama, IDS[:16]) - logits(opened.model, IDS[:16])).abs().max() < 1e-4
    assert (logits(llama) - logits(opened.model)).abs().max() > 0.1


ADAPTED = [(case, variant) for case in FAMILIES for variant in ("plain", "rslora", "pissa")]


@pytest.mark.parametrize(("case", "variant"), [*ADAPTED, *((case, "plain") for case in GRAPHS)])
def test_an_adapter_file_on_the_base_is_the_merged_model(
    case: str, variant: str, made: Any, tmp_path: Path, differs: Any
) -> None:
    lora = LoRAConfig(rank=4, alpha=6.0, **MERGE_VARIANTS.get(variant, {}))
    opened, chat = made(case, lora=lora)
    if any(".experts." in place or "per_layer_model" in place for place in opened.adapters):
        with pytest.raises(
            UserError, match=r"(experts\.0\.\w+|per_layer_model_projection): llama.cpp applies no adapter"
        ):
            write_gguf_lora(opened, "adapter", "f32", tmp_path / "adapter.gguf")
        return
    write_gguf_lora(opened, "adapter", "f32", tmp_path / "adapter.gguf")
    known = facts(tmp_path / "adapter.gguf")
    assert (known["general.type"], known["adapter.type"]) == ("adapter", "lora")
    base = open_model(str(opened.base_directory), CPU, torch.float32)
    write((base, chat), tmp_path / "base.gguf")
    llama = in_llama_cpp(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf"))
    rounding = 1e-4 if base.model.config.activation == "silu" else 4e-3
    rounding *= 8 if base.model.config.attention_scale == 1 else 1
    differs("GGUF LoRA", (logits(llama) - logits(opened.model)).abs().max(), rounding)
    assert (logits(base.model) - logits(opened.model)).abs().max() > 10 * rounding
    prompt = chat.encode_prompt(HELLO)
    assert greedy(llama, prompt, 16) == ours(opened, prompt, 16, [chat.eos_id])


def test_llama_cpp_renders_the_template_of_training(made: Any, tmp_path: Path) -> None:
    """From the file's metadata alone: text, ids and stop token."""
    opened, chat = made("qwen2")
    llama = in_llama_cpp(write(made("qwen2"), tmp_path / "model.gguf"))
    expected = chat.decode(generate(opened.model, [chat.encode_prompt(HELLO)], chat.stop_ids, 12)[0].ids)
    answer = llama.create_chat_completion(HELLO, temperature=0.0, repeat_penalty=1.0, max_tokens=12)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == len(chat.encode_prompt(HELLO))


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0", "q4_0"])
def test_the_tiny_demos_base_in_llama_cpp(dtype: str, tmp_path: Path) -> None:
    opened = open_model(str(TINY), CPU, torch.float32)
    chat = open_chat_tokenizer(str(TINY), opened)
    write_gguf(opened, chat, "tiny", dtype, "original", tmp_path / "model.gguf")
    llama = in_llama_cpp(tmp_path / "model.gguf")
    text = "List: red, lamps, 14, Rome. Copy: red, lamps, 14, Rome. List: Oslo, 3, blue. Copy: Oslo, 3, blue."
    ids = chat.tokenizer.encode(text).ids
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
    share = {"f32": 1e-5, "f16": 1e-3, "q8_0": 0.01, "q4_0": 0.1}[dtype]
    assert perplexity(llama, ids) == pytest.approx(perplexity(opened.model, ids), rel=share)
    if dtype in ("f32", "f16"):
        assert greedy(llama, ids[:-6], 24) == ours(opened, ids[:-6], 24, [chat.eos_id or 0])


def test_what_the_file_cannot_say_is_told(made: Any, tmp_path: Path) -> None:
    opened, chat = made("mistral")
    more = [chat.tokenizer.token_to_id(token) for token in ("[INST]", "[/INST]")]
    thinking = copy.copy(chat)
    thinking.stop_ids, thinking.template_args = sorted({*chat.stop_ids, *more}), {"enable_thinking": False}
    stops, variables = write_gguf(opened, thinking, "x", "f32", "original", tmp_path / "model.gguf")
    assert stops == f"llama.cpp may not stop on the ids [{max(more)}]: pass their texts as stop strings"
    assert "used with {'enable_thinking': False}" in variables
    assert facts(tmp_path / "model.gguf")["tokenizer.ggml.eom_token_id"] == min(more)


# --- refusals


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("qwen3-bias", {}, "attention_bias: llama.cpp's qwen3 has no biases"),
        ("qwen2", {"head_dim": 16}, "head_dim: llama.cpp's qwen2"),
        ("qwen3", {"rope_parameters": LLAMA3}, "rope type llama3: llama.cpp's qwen3 does not support it"),
        (
            "llama-yarn",
            {"rope_parameters": {**CASES["llama-yarn"][2]["rope_parameters"], "beta_fast": 16}},
            "beta_fast",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    case: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make_chat_model(tmp_path, case, **changes)
    opened = open_model(str(tmp_path), CPU, torch.float32)
    with pytest.raises(UserError, match=f"--format gguf: .*{reason}"):
        write((opened, open_chat_tokenizer(str(tmp_path), opened)), tmp_path / "model.gguf")


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar: llama.cpp's gemma2 computes it from the"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping: llama.cpp's gemma2 always has both caps"),
        ("gemma2", {"layer_types": [FULL, SLIDING, FULL]}, "layer_types: llama.cpp's gemma2 supports only full"),
        ("gemma2", {"layer_types": [FULL] * 3}, "sliding_window: llama.cpp's gemma2 requires layers with a window"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings: llama.cpp's gemma2 has no separate head"),
        ("gemma3_text", {"final_logit_softcapping": 3.0}, "attn_logit_softcapping: llama.cpp's gemma3 has no caps"),
        ("gemma3_text", {"rope_parameters": {SLIDING: SCALED, FULL: SCALED}}, "rope_parameters: llama.cpp's gemma3"),
        ("phi3", {"head_dim": 20, "rope_parameters": PLAIN}, "head_dim: llama.cpp's phi3 requires"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings: llama.cpp's olmo2 needs a separate head"),
        ("olmo3", {"rope_parameters": {SLIDING: PLAIN, FULL: {**PLAIN, "rope_theta": 5e5}}}, "rope_theta: .* one"),
        ("qwen3_5_text", {"linear_key_head_dim": 24}, "linear_value_head_dim: llama.cpp's qwen35 requires linear_key"),
        (
            "exaone4",
            {"sliding_window": 8, "layer_types": KINDS},
            "sliding_window: llama.cpp's exaone4 has a window of 4096 in three",
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers: llama.cpp's smollm3 rotates in all .* fourth"),
        (
            "seed_oss",
            {"attention_out_bias": True},
            "attention_out_bias, mlp_bias: llama.cpp's seed_oss has no such biases",
        ),
        ("gpt_oss", {"layer_types": [FULL, SLIDING, FULL]}, "layer_types: llama.cpp's gpt-oss has a window in every"),
        ("gpt_oss", {"rope_parameters": {**YARN, "beta_slow": 2}}, "rope type yarn: llama.cpp's gpt-oss supports only"),
    ],
)
def test_what_the_graph_of_a_family_does_not_have_is_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make_family(family, tmp_path, **{**GRAPHS[family], **changes})
    config = open_model(str(tmp_path), CPU, torch.float32).model.config
    with pytest.raises(UserError, match=f"--format gguf: {reason}.*: use --format hf"):
        architecture(config)


def test_the_context_of_llama_cpp_chooses_the_factors_of_longrope(tmp_path: Path) -> None:
    """The short ones up to the context of pre-training; here it is each document's length that counts."""
    make_family("phi3", tmp_path, original_max_position_embeddings=256, max_position_embeddings=1024)
    opened = open_model(str(tmp_path), CPU, torch.float32)
    made_one = opened, open_chat_tokenizer(str(tmp_path), opened)
    (note,) = write_gguf(*made_one, "x", "f32", "original", tmp_path / "model.gguf")
    assert "the long factors if its context (-c) exceeds 256 tokens" in note
    short, long = in_llama_cpp(tmp_path / "model.gguf"), in_llama_cpp(tmp_path / "model.gguf", n_ctx=512)
    ids = IDS * 5
    assert (logits(short, IDS) - logits(opened.model, IDS)).abs().max() < 1e-4
    assert (logits(long, ids) - logits(opened.model, ids)).abs().max() < 1e-4
    assert (logits(long, IDS) - logits(opened.model, IDS)).abs().max() > 0.1


def test_llama_cpp_rounds_the_limits_of_gpt_oss(tmp_path: Path) -> None:
    """It computes what the model would with `truncate`; the note says so."""
    for name, truncate in (("real", False), ("rounded", True)):
        rope = {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": truncate}
        make_family("gpt_oss", tmp_path / name, rope_parameters=rope)
    real, rounded = (open_model(str(tmp_path / name), CPU, torch.float32) for name in ("real", "rounded"))
    chat = open_chat_tokenizer(str(tmp_path / "real"), real)
    (note,) = write_gguf(real, chat, "x", "f32", "original", tmp_path / "model.gguf")
    ratio = rounded.model.config.ropes[0].angles(16)[0] / real.model.config.ropes[0].angles(16)[0]  # type: ignore[union-attr]
    assert f"frequencies change by up to {(ratio - 1).abs().max():.0%}" in note
    llama, ids = in_llama_cpp(tmp_path / "model.gguf"), IDS * 4
    assert (logits(llama, ids) - logits(rounded.model, ids)).abs().max() < 1e-3
    assert (logits(llama, ids) - logits(real.model, ids)).abs().max() > 0.01


def test_granite_without_a_rope_does_not_rotate(tmp_path: Path) -> None:
    make_family("granitemoehybrid", tmp_path, shape=1)
    opened = open_model(str(tmp_path), CPU, torch.float32)
    written = write((opened, open_chat_tokenizer(str(tmp_path), opened)), tmp_path / "model.gguf")
    assert (logits(in_llama_cpp(written), IDS) - logits(opened.model, IDS)).abs().max() < 1e-4


def test_64_layers_of_exaone_have_windows(tmp_path: Path) -> None:
    """As in its 32B: of four layers three have a window of 4096, and only they rotate."""
    deep = {"num_hidden_layers": 64, "sliding_window": 4096, "layer_types": None}
    make_family("exaone4", tmp_path, **deep, hidden_size=32, head_dim=8, intermediate_size=32)
    opened = open_model(str(tmp_path), CPU, torch.float32)
    written = write((opened, open_chat_tokenizer(str(tmp_path), opened)), tmp_path / "model.gguf")
    assert (logits(in_llama_cpp(written), IDS) - logits(opened.model, IDS)).abs().max() < 1e-3


def test_a_family_that_llama_cpp_does_not_have_is_refused_in_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(families.FAMILIES, "mistral", replace(families.FAMILIES["mistral"], gguf=None))
    for kind in ("gguf", "gguf-lora"):
        out = tmp_path / kind
        assert command.main([str(runs / "lora"), "--format", kind, "--out", str(out)]) == 2
        error = "error: --format gguf: llama.cpp has no architecture for mistral: use --format hf\n"
        assert capsys.readouterr().err == error
        assert not out.exists()


@pytest.mark.parametrize(
    ("variant", "reason"), [("dora", "not support DoRA"), ("bias", "cannot store the trained bias")]
)
def test_adapters_of_more_than_two_factors_are_refused(variant: str, reason: str, made: Any, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {"dora": {"dora": True}, "bias": {"bias": "lora_only"}}
    opened, _ = made("qwen2", lora=LoRAConfig(rank=4, alpha=6.0, **kinds[variant]))
    with pytest.raises(UserError, match=f"--format gguf-lora: .*{reason}.*: use --format gguf"):
        write_gguf_lora(opened, "x", "f32", tmp_path / "adapter.gguf")


def test_missing_packages_are_named(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"--dtype q4_k_m: needs llama\.cpp's quantizer: pip install"):
        write(made("mistral"), tmp_path / "model.gguf", "q4_k_m")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[gguf\]'"):
        write(made("mistral"), tmp_path / "model.gguf")


# --- what lies beside the file


def test_a_disk_without_room_is_noticed_before_the_work(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = write(made("llama"), tmp_path / "whole.gguf").stat().st_size
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=size // 2))
    with pytest.raises(UserError, match=r"--out: needs .* GB are free: free disk space"):
        write(made("llama"), tmp_path / "again.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


def test_parity_is_what_an_engine_must_give(made: Any, tmp_path: Path) -> None:
    opened, chat = made("qwen3")
    expected = parity_record(opened.model, chat, [Prompt(HELLO, "")], 8, "its own")
    llama = in_llama_cpp(write(made("qwen3"), tmp_path / "model.gguf"))
    assert expected["stop_ids"] == chat.stop_ids
    assert expected["prompts"][0]["messages"] == HELLO
    for case in expected["prompts"]:
        assert llama.tokenize(case["text"].encode(), add_bos=False, special=True) == case["ids"]
        found = greedy(llama, case["ids"], 8)
        assert found == case["answer_ids"] + [chat.eos_id] * case["stopped"]
        assert case["answer"] == llama.detokenize(case["answer_ids"]).decode(errors="replace")


# --- merge.py


def run_merge(*arguments: Any) -> int:
    return command.main([str(argument) for argument in arguments])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("run", "arguments"),
    [("lora", ["--dtype", "q8_0"]), ("qlora", ["--base", "nf4"]), ("full", []), ("base", ["--dtype", "bf16"])],
)
def test_runs_and_models_become_gguf_files(
    run: str, arguments: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_merge(runs / run, "--out", out, "--format", "gguf", *arguments) == 0
    said = capsys.readouterr().out
    assert "read back and compared: largest logit difference" in said
    dtype = arguments[1] if "--dtype" in arguments else "f16"
    assert names(tmp_path) == {"out"}
    assert names(out) == {f"model-{dtype}.gguf", "README.md", "Modelfile", "parity.json"}
    expected = json.loads((out / "parity.json").read_text())
    assert len(expected["prompts"]) > (0 if run == "base" else 3)  # the run's validation prompts, and plain ones
    llama = in_llama_cpp(out / f"model-{dtype}.gguf")
    assert llama.metadata["general.name"] == run
    for case in expected["prompts"]:
        assert llama.tokenize(case["text"].encode(), add_bos=False, special=True) == case["ids"]
        if dtype == "f16":
            found = greedy(llama, case["ids"], 32)
            assert found[: len(case["answer_ids"])] == case["answer_ids"]


@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_k_m"])
def test_the_perplexity_of_the_file_is_beside_that_of_the_run(
    dtype: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same tokens; llama.cpp's from its own tokens' logits, nanoft's as transformers and PEFT compute it."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--format", "gguf", "--dtype", dtype) == 0
    found = json.loads((tmp_path / "out" / "parity.json").read_text())["perplexity"]
    said = f"perplexity on {found['target_tokens']} held-out tokens: {found['llama.cpp']:.5g} in llama.cpp, "
    assert said + f"{found['nanoft']:.5g} of base + adapter in float32" in capsys.readouterr().out

    run, base = str(runs / "lora"), AutoModelForCausalLM.from_pretrained(runs / "base")
    samples, _ = held_out(run, open_chat_tokenizer(run, open_model(run, CPU, torch.float32), as_trained=True))
    reference = PeftModel.from_pretrained(base, runs / "lora" / "adapter")
    llama, nats, count = in_llama_cpp(tmp_path / "out" / f"model-{dtype}.gguf"), [0.0, 0.0], 0
    for sample in samples:
        ids, is_target = torch.tensor(sample.ids).long(), torch.tensor(sample.is_target[1:])
        with torch.no_grad():
            ours = reference(ids[None]).logits[0]
        llama.reset()
        llama.eval(ids.tolist())
        for n, logits in enumerate((torch.tensor(llama.scores[: len(ids)]), ours)):
            nats[n] += torch.nn.functional.cross_entropy(logits[:-1][is_target], ids[1:][is_target], reduction="sum")
        count += int(is_target.sum())
    assert found["target_tokens"] == count
    by_llama, by_peft = (math.exp(total / count) for total in nats)
    assert found["nanoft"] == pytest.approx(by_peft, rel=1e-4)
    assert found["llama.cpp"] == pytest.approx(by_llama, rel=1e-2)  # its cache is in float16, in the test in float32
    assert found["llama.cpp"] == pytest.approx(found["nanoft"], rel={"f32": 1e-2, "q8_0": 2e-2, "q4_k_m": 0.2}[dtype])


def test_without_llama_cpp_the_export_says_how_to_get_a_perplexity(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for run, reason in {"lora": "pip install llama-cpp-python", "base": "it needs a run with held-out"}.items():
        assert run_merge(runs / run, "--out", tmp_path / run, "--format", "gguf") == 0
        assert f"perplexity in llama.cpp: not measured: {reason}" in capsys.readouterr().out
        assert "perplexity" not in json.loads((tmp_path / run / "parity.json").read_text())


def test_an_adapter_file_by_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--format", "gguf-lora") == 0
    assert f"the adapter as GGUF, for a GGUF file of {runs / 'base'}" in capsys.readouterr().out
    assert names(tmp_path / "out") == {"adapter-f32.gguf", "README.md", "Modelfile", "parity.json"}
    assert "ADAPTER ./adapter-f32.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    assert {tensor.tensor_type.name for tensor in stored(tmp_path / "out" / "adapter-f32.gguf").values()} == {"F32"}


@pytest.mark.parametrize(("base", "named"), [("original", "its own number format"), ("nf4", "nf4")])
def test_an_adapter_file_names_the_base_of_its_expected_answers(
    base: Any, named: str, runs: Path, tmp_path: Path
) -> None:
    assert run_merge(runs / "qlora", "--out", tmp_path / "out", "--format", "gguf-lora", "--base", base) == 0
    found = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert found["weights"].startswith(f"the adapter on its base in {named};")
    opened = open_adapter(read_trained_adapter(str(runs / "qlora")), base)
    chat = open_chat_tokenizer(str(runs / "qlora"), opened, as_trained=True)
    prompts = [Prompt(case["messages"], "") for case in found["prompts"] if case["messages"]]
    expected = parity_record(opened.model, chat, prompts, 24, "")["prompts"]
    assert [case["answer_ids"] for case in found["prompts"]] == [case["answer_ids"] for case in expected]


@pytest.mark.parametrize(
    ("run", "arguments", "reason"),
    [
        ("lora", ["--dtype", "q8_0"], "--dtype: q8_0: for --format gguf only"),
        ("lora", ["--format", "gguf-lora", "--dtype", "q4_0"], "--dtype: q4_0: adapters are not quantized"),
        ("lora", ["--format", "gguf", "--base", "nf4"], "was trained on the original weights: remove --base"),
        ("full", ["--format", "gguf-lora"], "this run trained every parameter"),
        ("base", ["--format", "gguf-lora"], "no adapter here"),
    ],
)
def test_mistakes_leave_one_line_and_no_file(
    run: str, arguments: list[str], reason: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_merge(runs / run, "--out", tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert reason in said
    assert names(tmp_path) == set()


def test_what_is_there_is_not_overwritten(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--format", "gguf") == 2
    assert "out: already exists" in capsys.readouterr().err
    assert run_merge(runs / "lora", "--out", tmp_path / "new.gguf", "--format", "gguf") == 2
    assert f"is a directory, for several files: write --out {tmp_path}/new\n" in capsys.readouterr().err
    assert names(tmp_path) == {"out"}
