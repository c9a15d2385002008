"""The numbers of every family against transformers and PEFT: logits, gradients, answers, and one step of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapters import CPU, peft_model, peft_name, randomize
from peft import PeftModel
from tiers import rest_is_slow
from tiny_families import CASES, FIRST, LONGROPE, NO_DROPOUT, SHAPES, WITH_EXPERTS, make_family, split_experts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from nanoft import kernels
from nanoft.attention import Documents
from nanoft.batches import Sample, TokenDataset, Window, collate
from nanoft.config import Config, LoRAConfig
from nanoft.generation.generate import generate
from nanoft.generation.sampling import Sampling, completion_noise
from nanoft.kernels import decode as decode_kernels
from nanoft.kernels.block import FastBlock
from nanoft.lora import LoRALinear, inject_lora
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors, name_in_peft, save_adapter
from nanoft.models.families import FAMILIES
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import open_model, read_trained_adapter
from nanoft.models.weights import load_model, save_model
from nanoft.nf4 import PackedLinear
from nanoft.objectives import build_objective
from nanoft.training.memory_plan import count_parameters, estimate_memory
from tiny_models import make_packed

every_family = pytest.mark.parametrize(
    "case", rest_is_slow([(case,) for case in CASES], *[(c,) for c in FIRST]), ids=str
)
IDS = torch.randint(3, 199, (2, 90), generator=torch.Generator().manual_seed(3))
LENGTHS = (30, 60, 12, 78)  # two rows; with windows of 8 to 16, and contexts of pre-training of 16 to 64
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, 90)
DOCUMENTS = Documents(LENGTHS, torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0).int())
LORA = LoRAConfig(rank=4, alpha=10.0, target_modules=("all-linear",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, int]], Path]:
    """The directory of a case."""
    found: dict[tuple[str, int], Path] = {}

    def of(case: tuple[str, int]) -> Path:
        if case not in found:
            found[case] = tmp_path_factory.mktemp(case[0]) / "base"
            make_family(case[0], found[case], case[1])
        return found[case]

    return of


Saved = Callable[[tuple[str, int]], Path]
Differs = Callable[[str, Any, float], None]


def reference(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=dtype).eval()


def opened(base: Path, fast: bool, form: Any = None, dtype: torch.dtype = torch.float32) -> Decoder:
    model = load_model(base, CPU, dtype, form).eval()
    if fast:
        assert kernels.apply(model) == ""
        assert all(type(block) is FastBlock for block in model.model.layers)
    return model


def mean_loss(model: Decoder, ids: Tensor = IDS) -> Tensor:
    """Of every token but the first of each row, as transformers defines it."""
    rows, length = ids.shape
    places = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    hidden = model(ids, target_positions=places)
    return token_nll(hidden, model.head, ids[:, 1:].flatten(), cap=model.config.logit_cap).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    """Under transformers' names, of weights as (out, in), of experts each its own."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, Decoder):
        return {name_in_peft(model.config, name): gradient for name, gradient in found.items()}
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    found = {name: gradient.t() if name in turned else gradient for name, gradient in found.items()}
    return split_experts(found, model.config.model_type)


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest share of its norm by which a tensor differs."""
    assert found.keys() == wanted.keys() != set()
    scale = max(float(tensor.norm()) for tensor in wanted.values())
    # some are zero: keys that are not rotated need no bias
    return max(float((found[name] - one).norm() / (one.norm() + scale / 100)) for name, one in wanted.items())


@torch.no_grad()
@every_family
@pytest.mark.parametrize("fast", [False, True])
def test_logits_equal_transformers_on_short_and_long_inputs(
    case: tuple[str, int], fast: bool, saved: Saved, differs: Differs
) -> None:
    theirs, ours = reference(saved(case)), opened(saved(case), fast)
    assert ours.config.family == case[0]
    for ids in (IDS[:, :12], IDS, IDS[:1, :41]):
        expected = theirs(ids).logits
        differs("logits", (ours.logits(ours(ids)) - expected).abs().max(), 1e-4)
        assert expected.std() > 0.1  # logits that say something


@every_family
def test_gradients_of_all_parameters_equal_transformers(case: tuple[str, int], saved: Saved, differs: Differs) -> None:
    theirs = reference(saved(case))
    expected = theirs(input_ids=IDS, labels=IDS).loss
    expected.backward()
    wanted = gradients(theirs)
    for fast in (False, True):
        ours = opened(saved(case), fast)
        loss = mean_loss(ours)
        loss.backward()
        assert abs(loss - expected) < 1e-5
        differs("gradients", apart(gradients(ours), wanted), 1e-4)


@torch.no_grad()
@every_family
def test_64_greedy_tokens_are_those_of_transformers_with_and_without_a_cache(
    case: tuple[str, int], saved: Saved
) -> None:
    """Prompts of 24 tokens: the answers leave windows and contexts of pre-training behind."""
    theirs, prompts = reference(saved(case)), IDS[:, :24]
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)[:, 24:].tolist()
    plain = opened(saved(case), False)
    whole = prompts
    for _ in range(64):
        whole = torch.cat((whole, plain.logits(plain(whole)[:, -1]).argmax(-1, keepdim=True)), dim=1)
    assert whole[:, 24:].tolist() == expected
    for model in (plain, opened(saved(case), True)):
        assert [answer.ids for answer in generate(model, prompts.tolist(), (), 64)] == expected
    alone = generate(plain, [prompts[1, :9].tolist(), prompts[0].tolist()], (), 64)  # of different lengths
    assert alone[1].ids == expected[0]
    assert alone[0] == generate(plain, [prompts[1, :9].tolist()], (), 64)[0]


@torch.no_grad()
@every_family
@pytest.mark.parametrize("path", ["plain", "fast", "prepacked"])
def test_log_probs_of_sampled_tokens_are_those_of_a_forward_pass_of_training(
    case: tuple[str, int], path: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature T: token_nll of hidden / T, where a soft cap becomes cap / T.

    Within the context of pre-training: beyond it, some ropes turn all positions of a longer sequence otherwise.
    """
    monkeypatch.setattr(decode_kernels, "CACHED_BYTES", 0 if path == "prepacked" else 16e6)
    model, prompts = opened(saved(case), path != "plain"), [IDS[0, :24].tolist(), IDS[1, :7].tolist()] * 2
    sampling = Sampling(0.7, top_k=20, top_p=0.95, log_probs=True)
    noise = completion_noise([[5, number] for number in range(4)], 16)
    stop = generate(model, prompts[1:2], (), 16, sampling, noise=noise[1:2])[0].ids[9]
    answers = generate(model, prompts, (stop,), 16, sampling, noise=noise)
    assert answers[1].stop_id == stop
    for prompt, answer in zip(prompts, answers, strict=True):
        said = answer.ids + ([] if answer.stop_id is None else [answer.stop_id])
        places = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(said))
        hidden = model(torch.tensor([prompt + said]), target_positions=places) / 0.7
        cap = model.config.logit_cap and model.config.logit_cap / 0.7
        expected = -token_nll(hidden, model.head, torch.tensor(said), cap=cap)
        torch.testing.assert_close(torch.tensor(answer.logps), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@every_family
@pytest.mark.parametrize("fast", [False, True])
def test_packed_documents_equal_the_same_documents_alone(
    case: tuple[str, int], fast: bool, saved: Saved, differs: Differs
) -> None:
    model = opened(saved(case), fast)
    packed = model(IDS, POSITIONS, DOCUMENTS).flatten(0, 1).split(LENGTHS)
    for document, ids in zip(packed, IDS.flatten().split(LENGTHS), strict=True):
        differs("packed", (document - model(ids[None])[0]).abs().max(), 2e-5)


def adapted(base: Path, fast: bool, form: Any = None) -> tuple[Decoder, dict[str, LoRALinear]]:
    model = load_model(base, CPU, torch.float32, form)
    adapters: Any = inject_lora(model, LORA, seed=1)
    randomize(adapters)
    if fast:
        assert kernels.apply(model, LORA) == ""
    return model, adapters


def packed_step(model: Decoder, policy: Any) -> dict[str, Tensor]:
    """The gradients of a step on packed documents."""
    model.activation_policy = [policy] * len(model.model.layers)
    targets = torch.tensor([3, 4, 29, 60, 89, 95, 130, 178])
    hidden = model(IDS, POSITIONS, DOCUMENTS, target_positions=targets)
    token_nll(hidden, model.head, IDS.flatten()[targets + 1], cap=model.config.logit_cap).mean().backward()
    return gradients(model)


@every_family
@pytest.mark.parametrize("form", [None, ("nf4", True)])
def test_recomputed_gradients_are_the_kept_ones_and_those_of_the_core(
    case: tuple[str, int], form: Any, saved: Saved, differs: Differs
) -> None:
    wanted = packed_step(adapted(saved(case), False, form)[0], "all")
    kept, recomputed, offloaded = (
        packed_step(adapted(saved(case), True, form)[0], policy) for policy in ("all", "input", "offloaded")
    )
    differs("recomputed", apart(kept, wanted), 1e-4)
    for again in (recomputed, offloaded):
        assert all(torch.equal(again[name], kept[name]) for name in kept)


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
@every_family
@pytest.mark.parametrize("form", [None, ("nf4", True)], ids=["lora", "qlora"])
def test_a_step_with_adapters_is_that_of_peft(
    case: tuple[str, int], form: Any, saved: Saved, tmp_path: Path, differs: Differs
) -> None:
    base = saved(case)
    if case in WITH_EXPERTS or case[0] == "qwen3_moe":
        pytest.skip("PEFT has stacked experts: a test of their own")
    if form:  # bitsandbytes takes wrong scales on a CPU for rows that are no multiple of 64 (tests/test_nf4.py)
        make_family(case[0], base := tmp_path / "base", case[1], head_dim=16, num_attention_heads=4)
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        make_packed(base, tmp_path / "packed", load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    theirs = peft_model(
        tmp_path / "packed" if form else base, LORA
    ).train()  # in evaluation, bitsandbytes rounds to bfloat16
    model, adapters = adapted(base, True, form)
    parameters = dict(theirs.named_parameters())
    tensors = {name_in_peft(model.config, key): tensor for key, tensor in adapter_tensors(adapters).items()}
    assert {peft_name(key) for key in tensors} == {name for name, p in parameters.items() if p.requires_grad}
    with torch.no_grad():
        for key, tensor in tensors.items():
            parameters[peft_name(key)].copy_(tensor)
    expected, loss = theirs(input_ids=IDS, labels=IDS).loss, mean_loss(model)
    assert abs(loss - expected) < 1e-5
    for value, module in ((expected, theirs), (loss, model)):
        value.backward()
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()
    for key, tensor in tensors.items():
        differs("QLoRA" if form else "LoRA", (tensor - parameters[peft_name(key)]).abs().max(), 1e-5)


# PEFT says that it ignores rank_pattern, which it applies to parameters
experts_in_peft = pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")


@experts_in_peft
@pytest.mark.parametrize("form", [None, ("nf4", True)], ids=["lora", "qlora"])
@pytest.mark.parametrize("case", WITH_EXPERTS, ids=str)
def test_a_step_with_adapters_of_experts_is_that_of_peft(
    case: tuple[str, int], form: Any, saved: Saved, tmp_path: Path, differs: Differs
) -> None:
    """bitsandbytes leaves stacked experts in 16 bits: the reference has the weights that were packed here."""
    base = saved(case)
    model, adapters = adapted(base, True, form)
    save_adapter(tmp_path / "ours", model, adapters, LORA, str(base), {})
    reference_base = base
    if form:
        plain = load_model(base, CPU, torch.float32)
        modules = load_model(base, CPU, torch.float32, form).named_modules()
        packed = {key: module for key, module in modules if isinstance(module, PackedLinear)}
        assert len(packed) == sum(key.endswith("_proj.weight") for key, _ in plain.named_parameters())
        for key, linear in packed.items():
            plain.get_submodule(key).weight.data = linear.dequantize()
        (reference_base := tmp_path / "rounded").mkdir()
        save_model(plain, base, reference_base, torch.float32)
    theirs = PeftModel.from_pretrained(reference(reference_base), tmp_path / "ours", is_trainable=True).train()
    expected, loss = theirs(input_ids=IDS, labels=IDS).loss, mean_loss(model)
    assert abs(loss - expected) < 1e-5
    expected.backward()
    loss.backward()
    stacked = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    for key, p in stacked.items():  # in B, gate and up have blocks of their own
        if "lora_B" in key and p.grad is not None:
            p.grad *= p != 0
    theirs.save_pretrained(tmp_path / "before")
    for module in (model, theirs):
        torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()
    theirs.save_pretrained(tmp_path / "after")
    found, wanted = adapter_tensors(adapters), read_trained_adapter(str(tmp_path / "after"), str(base)).tensors
    before = read_trained_adapter(str(tmp_path / "before"), str(base)).tensors
    assert found.keys() == wanted.keys()
    assert any((wanted[key] - before[key]).abs().max() > 1e-3 for key in found if ".experts." in key)
    for key, tensor in found.items():
        differs("QLoRA" if form else "LoRA", (tensor - wanted[key]).abs().max(), 1e-5)


def balance_by_hand(recorded: Tensor, chosen: int) -> Tensor:
    """N sum_i (share of the choices that are i) (mean probability of i), in loops over the tokens of a document."""
    tokens, experts = recorded.shape
    is_probability = bool((recorded.sum(-1) - 1).abs().max() < 1e-5)  # what some models record
    probabilities = recorded if is_probability else recorded.exp() / recorded.exp().sum(-1, keepdim=True)
    counts = [0] * experts
    for row in recorded.tolist():
        for i in sorted(range(experts), key=lambda i: -row[i])[:chosen]:
            counts[i] += 1
    return sum(experts * counts[i] / (chosen * tokens) * probabilities[:, i].mean() for i in range(experts))  # type: ignore[return-value]


EXPERTS_OF_A_TOKEN = "num_experts_per_tok", "top_k_experts"
BALANCED = [case for case in CASES if any(SHAPES.get(case[0], [{}])[case[1]].get(name) for name in EXPERTS_OF_A_TOKEN)]


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("way", ["alone", "padded", "packed", "recomputed"])
@pytest.mark.parametrize("case", BALANCED, ids=str)
def test_the_balance_loss_is_that_of_every_document(
    case: tuple[str, int], way: str, fast: bool, saved: Saved, differs: Differs
) -> None:
    chance, lengths = np.random.default_rng(0), (5, 9, 3, 12, 7, 8)
    made = [Sample(chance.integers(3, 199, n, np.int32), chance.random(n) < 0.5, i) for i, n in enumerate(lengths)]
    data, model, theirs = TokenDataset.of(made), opened(saved(case), fast).train(), reference(saved(case))
    rows = [np.arange(6)[:3], np.arange(6)[3:]] if way in ("packed", "recomputed") else list(np.arange(6)[:, None])
    pieces = [[row] for row in rows] if way == "alone" else [rows]
    window = Window([collate(data, piece, 0, pad_to_multiple_of=4) for piece in pieces], [0, 0], [0, 1])
    if way == "recomputed":
        layers = model.config.num_layers
        model.activation_policy = (["input", "all", "offloaded"] * layers)[:layers]
    objective = build_objective(Config().override({"training.balance_loss": 0.7}), {})
    found, wanted, balances = 0.0, torch.zeros(()), []
    for batch in window:
        loss = objective.loss(model, batch) / objective.count(window)
        loss.backward()
        found += loss.item()
    routing = model.config.routing
    assert routing is not None
    for sample in made:
        ids, is_target = torch.from_numpy(sample.ids).long(), torch.from_numpy(sample.is_target[1:])
        out = theirs(ids[None], output_router_logits=True)
        nll = F.cross_entropy(out.logits[0, :-1], ids[1:], reduction="none")[is_target].sum()
        assert len(out.router_logits) == sum(routing.layers)
        own = [balance_by_hand(recorded, routing.chosen) for recorded in out.router_logits]
        balances += [sum(own).item() / len(own)] * int(is_target.sum())
        wanted = wanted + nll + 0.7 * is_target.sum() * sum(own) / len(own)
    wanted = wanted / objective.count(window)
    wanted.backward()
    differs("balance loss", abs(found - wanted.item()), 1e-4)
    differs("balance gradients", apart(gradients(model), gradients(theirs)), 1e-4)
    assert objective.figures() == pytest.approx({"balance_loss": np.mean(balances)}, rel=1e-5)


@experts_in_peft
@torch.no_grad()
@every_family
def test_adapters_go_to_peft_and_come_from_there(
    case: tuple[str, int], saved: Saved, tmp_path: Path, differs: Differs
) -> None:
    base = saved(case)
    if case == ("qwen3_moe", 1):
        pytest.skip("PEFT takes what is trained of dense layers for experts")
    model, adapters = adapted(base, False)
    model.eval()
    expected = model.logits(model(IDS))
    save_adapter(tmp_path / "ours", model, adapters, LORA, str(base), {})
    theirs = PeftModel.from_pretrained(reference(base), tmp_path / "ours").eval()
    differs("PEFT", (theirs(IDS).logits - expected).abs().max(), 1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = open_model(str(tmp_path / "theirs"), CPU, torch.float32).model.eval()
    differs("PEFT", (again.logits(again(IDS)) - expected).abs().max(), 1e-4)
    assert (expected - reference(base)(IDS).logits).abs().max() > 0.1


@torch.no_grad()
@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_logits_are_as_near_as_those_of_transformers(
    case: tuple[str, int], dtype: torch.dtype, saved: Saved
) -> None:
    exact = reference(saved(case))(IDS).logits

    def noise(logits: Tensor) -> Tensor:
        """Of the median token: in a few, two experts are so near that either may be chosen, which others see a bit."""
        return (logits.float() - exact).norm(dim=-1).median()

    allowed = noise(reference(saved(case), dtype)(IDS).logits)
    for fast in (False, True):
        ours = opened(saved(case), fast, dtype=dtype)
        assert noise(ours.logits(ours(IDS))) < (1.2 if ours.config.routing is None else 1.5) * allowed


def test_random_deltanets_remember_and_forget(saved: Saved) -> None:
    """In pre-training: every part of a new model gets a gradient, and its heads forget at different rates."""
    model = load_model(saved(("qwen3_5_text", 0)), CPU, torch.float32, random_seed=0)
    mean_loss(model).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    rates = model.get_parameter("model.layers.0.linear_attn.A_log").exp()
    assert rates.unique().numel() == len(rates)
    assert rates.min() > 0.01
    assert rates.max() < 16


# --- memory

WHOLE_STEP = Path(__file__).parents[1] / "whole_step.py"
WHOLE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32768, "max_position_embeddings": 2048,
}  # fmt: skip
SIZES = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}


def resized(case: tuple[str, int], directory: Path, sizes: dict[str, int], **changes: Any) -> Path:
    """A model of other sizes; longrope has as many factors as its heads have pairs."""
    pairs = int(sizes["head_dim"] * 0.75) // 2
    rope = {**LONGROPE, "short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    own = {"rope_parameters": rope} if case == ("phi3", 0) else {}
    make_family(case[0], directory, case[1], **sizes, **own, **changes)
    return directory


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_those_of_the_plan(case: tuple[str, int], dtype: torch.dtype, tmp_path: Path) -> None:
    base, config = resized(case, tmp_path, SIZES), Config()
    model, decoder = load_model(base, CPU, dtype), ModelFiles.read(base).decoder
    keep: list[Any] = ["all"] * decoder.num_layers
    inject_lora(model, config.lora, 0)
    assert kernels.apply(model) == ""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model(torch.randint(0, 199, (2, 256)))
    assert hidden.requires_grad
    final_norm = 2 * 256 * 128 * 8  # at most
    plan = estimate_memory(decoder, count_parameters(decoder, config), config, "cpu", dtype, 2, 256, keep, 0.0)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 0.93 * plan.parts["activations"] < found < 1.03 * plan.parts["activations"] + final_norm


@pytest.fixture(scope="module")
def whole_step() -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a step in a process of its own, on one thread, because each has a heap of its own."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe, command = subprocess.PIPE, [sys.executable, WHOLE_STEP]
    with subprocess.Popen(command, env=alone, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        assert process.stdin
        assert process.stdout

        def run(*arguments: Any) -> dict[str, Any]:
            print(json.dumps(arguments), file=process.stdin)
            found: dict[str, Any] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            return found

        yield run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", rest_is_slow(["float32", "bfloat16"], "bfloat16"))
def test_the_plan_of_a_whole_step_is_near_the_peak_of_a_process(
    family: str, dtype: str, whole_step: Callable[..., dict[str, Any]], tmp_path: Path, record_property: Any
) -> None:
    """Windows are shorter than the sequences."""
    shape, pairs = {**NO_DROPOUT, **SHAPES.get(family, [{}])[0], **WHOLE}, int(WHOLE["head_dim"] * 0.75) // 2
    for name in ("layer_types", "no_rope_layers"):
        if shape.get(name):
            shape[name] = (shape[name] * 2)[: WHOLE["num_hidden_layers"]]
    if shape.get("sliding_window"):
        shape["sliding_window"] = 128
    if family == "phi3":
        shape["rope_parameters"] = {**LONGROPE, "short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    for name in {"n_inner", "shared_intermediate_size"} & shape.keys():
        shape[name] = WHOLE["intermediate_size"]
    if family == "gemma4_text":
        shape["vocab_size_per_layer_input"] = WHOLE["vocab_size"]
    config = AutoConfig.for_model(family, **shape, architectures=[FAMILIES[family].architecture])
    config.save_pretrained(tmp_path)
    found = whole_step(str(tmp_path / "config.json"), dtype, 2, 512, "all")
    error = found["planned"] / found["measured"] - 1
    record_property(f"plan {dtype}", error)
    assert abs(error) < 0.1, found
