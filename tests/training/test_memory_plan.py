"""The plan against the measured memory of a model, its optimizer and a step, and against published figures."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import MISTRAL_7B
from tiny_families import make_family

import train
from nanoft import UserError, kernels
from nanoft.config import Config, LoRAConfig, QuantizationConfig, TrainingConfig
from nanoft.generation import decode
from nanoft.generation.decode import Decoding
from nanoft.lora import inject_lora, linears_of
from nanoft.loss import token_nll
from nanoft.models.families import decoder_config
from nanoft.models.model_files import ModelFiles
from nanoft.models.weights import load_model
from nanoft.nf4 import packed_bytes
from nanoft.objectives.reference import Reference
from nanoft.optim import build_optimizer
from nanoft.runtime.device import Machine
from nanoft.training import memory_plan
from nanoft.training.memory_plan import (
    Plan,
    Planner,
    choose_recompute,
    choose_rows,
    count_parameters,
    decide_dequantize,
    estimate_memory,
    explained_out_of_memory,
    suggest_savings,
)
from nanoft.training.plan import gflop_per_token
from nanoft.training.state import optimizer_tensors
from tiny_models import make_chat_model, make_reference, write_records

CPU = torch.device("cpu")
QLORA = Config(quantization=QuantizationConfig(bits=4))


def mistral_7b(length: int, keep: Any, config: Config = QLORA) -> Plan:
    decoder = decoder_config(MISTRAL_7B)
    counts = count_parameters(decoder, config)
    return estimate_memory(decoder, counts, config, "cuda", torch.bfloat16, 1, length, [keep] * 32, 0.0)


@pytest.mark.parametrize(("length", "keep", "gb"), [(2048, "input", 6.1), (4096, "input", 7.1), (4096, "all", 17.9)])
def test_the_peaks_of_a_7b_on_a_gpu_are_the_known_ones(length: int, keep: str, gb: float) -> None:
    """Static 4.81 GB: codes 3.49, scales 0.11, head and embedding 0.54, adapters with their optimizer 0.67."""
    plan = mistral_7b(length, keep)
    static = sum(plan.parts[n] for n in ("linears", "head, embedding", "adapters", "gradients", "optimizer"))
    assert static == pytest.approx(4.81e9, rel=0.01)
    assert plan.peak == pytest.approx(gb * 1e9, rel=0.1)


def test_split_over_ranks_each_holds_its_part_and_two_blocks() -> None:
    """7.25 billion weights in bfloat16 and 42 million adapter numbers in 16 bytes, over 4 ranks."""
    alone = mistral_7b(2048, "input", Config())
    split = mistral_7b(2048, "input", Config().override({"training.sharding": "full", "system.ranks": 4}))
    for name in ("linears", "adapters", "gradients", "optimizer"):
        assert split.parts[name] == pytest.approx(alone.parts[name] / 4)
    head, norms = 2 * 32768 * 4096, 2 * 65 * 4096  # bytes; the head is whole
    assert split.parts["head, embedding"] == pytest.approx(head + (head + norms) / 4)
    block = 2 * 218_103_808  # q, k, v, o: 41.9 million; gate, up, down: 176.2 million
    assert split.parts["gathered"] == pytest.approx(2 * block + norms)
    assert alone.parts["gathered"] == 0
    less = 0.75 * (14.5e9 - head + 16 * 41.9e6) - split.parts["gathered"]
    assert alone.peak - split.peak == pytest.approx(less, rel=0.01)


@pytest.mark.parametrize(("system_gb", "code"), [(25.7, 0), (24, 2)])
def test_a_70b_in_4_bits_on_two_cards_of_24_gib(
    system_gb: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """25.7 * 10^9 bytes. Linears 68.45 * 10^9 weights, 0.516 bytes each, over 2 cards; head 2.1 GB, embedding half."""
    base = tmp_path / "llama"
    base.mkdir()
    fields = {**MISTRAL_7B, "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672}
    fields |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 80, "num_attention_heads": 64}
    (base / "config.json").write_text(json.dumps(fields))
    words = [f"model.name={base}", "model.max_seq_length=1024", "model.dtype=bfloat16", "quantization.bits=4"]
    words += ["training.sharding=full", "system.ranks=2", "system.device=cuda", f"system.memory_gb={system_gb}"]
    words += ["lora.rank=8", "lora.target_modules=attention", "training.checkpointing=offload"]
    words += ["training.micro_batch_size=1"]
    assert train.main(["configs/tiny.py", "--plan", *words]) == code
    found = {line[:16].strip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    assert float(found["linears"][0]) == pytest.approx(68.45 * (0.5 + 1 / 64 + 1 / 64 / 64) / 2, rel=1e-3)
    assert float(found["head, embedding"][0]) == pytest.approx(2.101 * 1.5, rel=1e-3)
    assert float(found["gathered"][0]) == pytest.approx(2 * 68.45 / 80 * 0.516, rel=0.01)
    assert float(found["peak"][0]) == pytest.approx(23.1, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "memory_gb", "host_gb", "chosen"),
    [
        ({}, 8, 64, "host"),  # 14 GB of linears
        ({}, 24, 64, "auto"),
        ({}, 8, 12, "auto"),
        ({"quantization.bits": 4}, 8, 64, "auto"),
        ({"training.checkpointing": "none"}, 8, 64, "auto"),
    ],
)
def test_a_base_that_does_not_fit_stays_on_the_host(
    settings: dict[str, Any], memory_gb: float, host_gb: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of 436 MB on the device; pinned memory takes 512 MiB for each of 32; 60 copies a micro-batch."""
    monkeypatch.setattr(memory_plan, "available_host_bytes", lambda: host_gb * 1e9)
    config = Config().override({"training.gradient_accumulation_steps": 4, **settings})
    machine = Machine(torch.device("cuda"), torch.bfloat16, memory_gb * 1e9, present=False)
    planner = Planner.of(config, machine, decoder_config(MISTRAL_7B))
    config = memory_plan.resolve_base_device(planner)
    assert config.model.base_device == chosen
    if chosen == "host":
        planner = replace(planner, config=config)
        plan = planner.choose_activations(1, 2048)
        assert plan.parts["linears"] == 4 * 218_103_808
        assert plan.keep == ["input"] * 31 + ["all"]
        assert plan.peak < 0.9 * memory_gb * 1e9
        assert memory_plan.describe_streaming(planner).split()[0] == f"{32 * 2**29 / 1e9:.3f}"
        assert f"{4 * 60 * 2 * 218_103_808 / 1e9:.1f} GB copied" in memory_plan.describe_streaming(planner)


def test_the_work_of_a_token_is_the_known_one() -> None:
    """Linears 13.96 GFLOP forward and as much backward, head 0.27 twice, LoRA, causal attention 1.07 forward."""
    decoder, config = decoder_config(MISTRAL_7B), Config()
    counts = count_parameters(decoder, config)
    assert (counts.linears, counts.trained) == (6_979_321_856, 41_943_040)
    assert gflop_per_token(decoder, counts, config, 4096, 0.0) == pytest.approx(32.5, rel=0.02)
    assert gflop_per_token(decoder, counts, config, 4096, 1.0) == pytest.approx(47.6, rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantization": QuantizationConfig(bits=4)},
        {"quantization": QuantizationConfig(bits=4, double=False)},
        {"quantization": QuantizationConfig(bits=8)},
        {"lora": LoRAConfig(rank=4, dora=True, target_modules=("attention",))},
        {"training": TrainingConfig(optimizer="adamw_8bit"), "lora": LoRAConfig(rank=64)},
        {"training": TrainingConfig(optimizer="sgd")},
        {"training": TrainingConfig(method="full")},
    ],
    ids=str,
)
def test_static_parts_are_the_bytes_of_a_real_model_and_its_optimizer(settings: dict[str, Any], tmp_path: Path) -> None:
    make_reference("mistral", tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    config, decoder = Config(**settings), ModelFiles.read(tmp_path).decoder
    bits, full = config.quantization.bits, config.training.method == "full"
    form = {4: ("nf4", config.quantization.double), 8: ("int8", False)}.get(bits)
    model = load_model(tmp_path, CPU, torch.float32 if full else torch.bfloat16, form)
    linears = sum(packed_bytes(linear) for linear in linears_of(model).values())
    plan = estimate_memory(
        decoder, count_parameters(decoder, config), config, "cpu", torch.bfloat16, 1, 16, ["all"] * 3, 0.0
    )
    others = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "proj" not in n)
    if not full:
        inject_lora(model, config.lora, 0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, config.training)
    # bitsandbytes keeps maps of 256 values with each tensor; they are shared on the CPU
    state = {n: t for n, t in optimizer_tensors(optimizer, trained).items() if "qmap" not in n}
    expected = {
        "linears": linears,
        "head, embedding": others,
        "gradients": sum(p.numel() * 4 for _, p in trained),
        "optimizer": sum(t.numel() * t.element_size() for t in state.values()),
    }
    for name, size in expected.items():
        assert plan.parts[name] == pytest.approx(size, rel=0.04, abs=2000), name


def test_a_preference_run_that_continues_an_adapter_holds_a_copy_of_it(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    decoder, model = ModelFiles.read(tmp_path).decoder, load_model(tmp_path, CPU, torch.float32)
    for objective, start, copies in (("dpo", "adapter", 1), ("kto", "", 0), ("sft", "adapter", 0)):
        config = Config().override({"training.objective": objective, "lora.start_from": start})
        counts = count_parameters(decoder, config)
        plan = estimate_memory(decoder, counts, config, "cpu", torch.float32, 1, 16, ["all"] * 3, 0.0)
        assert plan.parts["reference"] == copies * plan.parts["gradients"]
        if copies:
            held = Reference(config, inject_lora(model, config.lora, 0)).start
            assert plan.parts["reference"] == sum(before.nbytes for _, before in held)


def test_in_float16_weights_and_activations_take_half_the_bytes_of_float32() -> None:
    decoder = decoder_config(MISTRAL_7B)
    counts = count_parameters(decoder, Config())
    wide, half = (
        estimate_memory(decoder, counts, Config(), "cuda", dtype, 1, 2048, ["all"] * 32, 0.0).parts
        for dtype in (torch.float32, torch.float16)
    )
    for name in ("linears", "head, embedding", "activations"):
        assert half[name] == wide[name] / 2
    for name in ("adapters", "gradients", "optimizer"):
        assert half[name] == wide[name]


def test_in_float16_each_head_of_a_gpu_keeps_a_copy_of_its_keys_and_values() -> None:
    """Which Mistral shares between 4 heads; before Ampere, no kernel does. With a window, attention is in chunks."""

    def activations(device: str, dtype: torch.dtype, window: int | None = None) -> float:
        decoder = replace(decoder_config(MISTRAL_7B), windows=(window,) * 32)
        sizes = 1, 2048, ["all"] * 32, 0.0
        return estimate_memory(decoder, counts, Config(), device, dtype, *sizes).parts["activations"]

    counts, copies = count_parameters(decoder_config(MISTRAL_7B), Config()), 2 * (32 - 8) * 128 * 2048 * 32
    shared = activations("cuda", torch.bfloat16)
    assert activations("cuda", torch.float16) == shared + 2 * copies
    assert activations("cuda", torch.float16, 1024) == activations("mps", torch.float16) == shared
    assert activations("cuda", torch.float32) == activations("cpu", torch.float32) + 4 * copies


@pytest.mark.parametrize("keep", ["all", "input"])
def test_activations_are_the_bytes_that_autograd_keeps(keep: Any, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path, hidden_size=128, intermediate_size=320, num_attention_heads=4)
    config, decoder = Config(), ModelFiles.read(tmp_path).decoder
    model = load_model(tmp_path, CPU, torch.bfloat16)
    inject_lora(model, config.lora, 0)
    assert kernels.apply(model) == ""
    model.activation_policy = [keep] * 3
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 199, (2, 256))
    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or note(t), lambda t: t):
        hidden = model(ids)
    final_norm = 2 * 256 * 128 * (4 + 4)  # at most: what PyTorch's norm keeps, in float32
    plan = estimate_memory(
        decoder, count_parameters(decoder, config), config, "cpu", torch.bfloat16, 2, 256, [keep] * 3, 0.0
    )
    assert hidden.requires_grad
    assert -0.03 < sum(kept.values()) / plan.parts["activations"] - 1 < 0.03 + final_norm / plan.parts["activations"]


def test_full_training_keeps_weights_cast_for_the_products(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path, hidden_size=256, intermediate_size=640, num_attention_heads=4)
    config, decoder = Config(training=TrainingConfig(method="full")), ModelFiles.read(tmp_path).decoder
    model = load_model(tmp_path, CPU, torch.float32)
    shapes = {shape for m in linears_of(model).values() for shape in (m.weight.shape, m.weight.T.shape)}
    cast: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape in shapes and tensor.dtype == torch.bfloat16:
            cast[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(0, 199, (2, 77)))
    plan = estimate_memory(
        decoder, count_parameters(decoder, config), config, "cpu", torch.bfloat16, 2, 77, ["all"] * 3, 0.0
    )
    assert plan.parts["cast weights"] == sum(tensor.untyped_storage().nbytes() for tensor in cast.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_training_holds_the_gradient_of_the_head_in_the_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path, vocab_size=16384, hidden_size=256)
    config, decoder = Config(training=TrainingConfig(method="full")), ModelFiles.read(tmp_path).decoder
    counts = count_parameters(decoder, config)
    plan = estimate_memory(decoder, counts, config, "cpu", dtype, 1, 16, ["all"] * 3, 0.0)
    hidden, head = (torch.randn(size, 256).requires_grad_() for size in (16, 16384))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total = token_nll(hidden, head, torch.arange(16)).sum()
        total.backward()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert max(itertools.accumulate(changes)) == pytest.approx(plan.parts["loss"], rel=0.1)


def test_a_base_that_is_kept_unpacked_counts_as_one() -> None:
    cached = Config(quantization=QuantizationConfig(bits=4, dequantize="cached"))
    assert mistral_7b(4096, "input", cached).peak == mistral_7b(4096, "input", Config()).peak


@pytest.mark.parametrize(("memory_gb", "unpacked"), [(80, True), (48, True), (24, False)])
def test_the_base_is_planned_unpacked_where_loading_will_unpack_it(memory_gb: float, unpacked: bool) -> None:
    """10.36 GB more, which is a third of what is left beside the packed base and the embeddings, or not."""
    machine = Machine(torch.device("cuda"), torch.bfloat16, memory_gb * 1e9, present=False)
    decided = decide_dequantize(QLORA, count_parameters(decoder_config(MISTRAL_7B), QLORA), machine)
    assert decided.quantization.dequantize == ("cached" if unpacked else "per_use")


def test_blocks_are_computed_again_only_as_far_as_memory_asks_for_it() -> None:
    def peak(keep: list[Any]) -> float:
        return 10 + 3 * keep.count("all") + keep.count("input")

    for room in range(8, 30):
        keep = choose_recompute(peak, 4, room)
        fitting = [n for n in range(4) if peak(["input"] * n + ["all"] * (4 - n)) <= room]
        assert keep == ["input"] * min(fitting, default=3) + ["all"] * (4 - min(fitting, default=3))


def test_a_balance_loss_keeps_a_slope_for_each_expert_and_computes_the_last_block_everywhere(tmp_path: Path) -> None:
    make_family("qwen3_moe", tmp_path)
    decoder, tokens, parts = ModelFiles.read(tmp_path).decoder, 2 * 64, []
    for alpha, share in ((0.0, 0.5), (0.1, 0.5), (0.0, 1.0)):
        config = Config().override({"training.balance_loss": alpha})
        given = decoder, count_parameters(decoder, config), config, "cpu", torch.float32
        parts.append(estimate_memory(*given, 2, 64, ["all"] * decoder.num_layers, 0.0, share).parts)
    plain, balanced, everywhere = parts
    assert decoder.routing
    slopes = 4 * tokens * decoder.routing.experts * sum(decoder.routing.layers)
    assert balanced["activations"] - plain["activations"] == pytest.approx(slopes)
    assert balanced["loss"] == everywhere["loss"] > plain["loss"]


def test_a_recomputed_block_takes_the_place_of_what_later_blocks_kept() -> None:
    decoder, config = decoder_config(MISTRAL_7B), Config()
    counts = count_parameters(decoder, config)

    def parts(keep: list[Any]) -> dict[str, float]:
        return estimate_memory(decoder, counts, config, "cuda", torch.bfloat16, 1, 2048, keep, 0.0).parts

    kept, last, all_again = (parts(["input"] * n + ["all"] * (32 - n)) for n in (0, 31, 32))
    block, waiting = kept["activations"] / 32, all_again["activations"] / 32
    assert last["activations"] == pytest.approx(31 * waiting + block)
    assert last["backward"] == pytest.approx(kept["backward"])  # what the last block kept is free by then
    assert all_again["backward"] == pytest.approx(kept["backward"] + block)
    first_kept = parts(["all"] + ["input"] * 31)
    assert first_kept["backward"] == pytest.approx(kept["backward"] + block)


def test_the_micro_batch_is_the_largest_divisor_that_fits() -> None:
    assert choose_rows(lambda rows: 10.0 * rows, 12, 59) == 4
    assert choose_rows(lambda rows: 10.0 * rows, 12, 60) == 6
    assert choose_rows(lambda rows: 10.0 * rows, 7, 60) == 1
    with pytest.raises(UserError, match=r"^model.max_seq_length: one sequence takes 0.00 GB, but only"):
        choose_rows(lambda rows: 10.0 * rows, 12, 9)


@pytest.mark.slow
def test_the_plan_of_a_step_is_near_what_a_process_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import plan as bench_plan

    try:
        assert abs(bench_plan.compare("--seq 512 --bs 1")["error"]) < 0.1
    finally:
        for name in ("plan", "step", "contender"):
            sys.modules.pop(name, None)


WHOLE_RUN = Path(__file__).parents[1] / "whole_run.py"
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "head_dim": 64, "vocab_size": 32768}
SAMPLED = {"rl.reward": "max_words:99", "rl.prompts": 8, "rl.group_size": 16, "rl.max_new_tokens": 48}
SAMPLED |= {"training.gradient_accumulation_steps": 4}
TAUGHT = {"distill.teacher_bits": 16, "distill.max_new_tokens": 48, "training.gradient_accumulation_steps": 1}
RUNS: dict[str, dict[str, Any]] = {
    "grpo": SAMPLED,
    "distill": TAUGHT,
    "distill, answers of the data": {**TAUGHT, "distill.on_policy": False},
    "dpo, KL of an evaluation": {"training.gradient_accumulation_steps": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_the_plan_of_a_whole_run_is_near_the_peak_of_a_process(case: str, tmp_path: Path) -> None:
    """What it samples, a teacher, and evaluations included; on one thread, because each has a heap of its own."""
    make_chat_model(tmp_path / "base", "qwen3", **SIZES)
    said = {f"Say {n} please.": (f"{n}, " * 16, f"{n}. " * 16) for n in range(40)}
    pairs = [{"prompt": text, "chosen": good, "rejected": bad} for text, (good, bad) in said.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    settings = {
        "model.name": tmp_path / "base",
        "model.max_seq_length": 256,
        "data.train_file": tmp_path / "pairs.jsonl",
    }
    settings |= {"training.objective": case.partition(",")[0], "training.micro_batch_size": 4, "training.max_steps": 1}
    settings |= {"training.eval_steps": 1, "data.validation_size": 16, "evaluation.prompts": 0, "system.threads": 1}
    settings |= {"output.dir": tmp_path / "run", "logging.progress_bar": False, **RUNS[case]}
    if "distill" in case:
        make_chat_model(tmp_path / "teacher", "qwen3", seed=5, **{**SIZES, "num_hidden_layers": 6})
        settings["distill.teacher"] = tmp_path / "teacher"
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, WHOLE_RUN, "configs/tiny.py", *(f"{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, env=alone, cwd=WHOLE_RUN.parents[1], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.85 < found["planned"] / found["measured"] < 1.15, found
    assert ("sampling" in found["parts"] and found["parts"]["sampling"] > 0) == (case == "grpo"), "more than a step"


@torch.no_grad()
def test_sampling_holds_each_prompt_of_a_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "WORTH_SHARING", 0)
    make_reference("qwen3", tmp_path)
    rl = {"reward": ("exact_match",), "prompts": 2, "group_size": 4, "max_new_tokens": 6}
    config = Config().override(rl=rl, training={"objective": "grpo"})
    planner = Planner.of(config, Machine(CPU, torch.float32, 1e9), ModelFiles.read(tmp_path).decoder)
    decoding = Decoding(load_model(tmp_path, CPU, torch.float32))
    decoding.join([[3, 1, 4, 1, 5]] * 4 + [[9, 2, 6, 5, 3]] * 4, 6)
    caches = decoding.keys, decoding.values, decoding.shared.keys, decoding.shared.values
    measured = sum(tensor.untyped_storage().nbytes() for cache in caches for tensor in cache.values())
    logits = 8 * planner.decoder.vocab_size * 16
    assert planner.sampling_bytes(5 + 6, config, room=0.0) == measured + logits


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("plan")
    make_chat_model(root / "base")
    records = write_records(root / "data.jsonl")
    settings = {"model": {"name": str(root / "base"), "max_seq_length": 256}, "data": {"train_file": str(records)}}
    (root / "mine.json").write_text(json.dumps({**settings, "system": {"device": "cpu"}}))
    return [str(root / "mine.json"), f"output.dir={root / 'run'}", "logging.progress_bar=false", "logging.plots=none"]


def test_plan_warns_of_what_the_base_does_not_have(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    doubtful = ["model.max_seq_length=257", "lora.rank=33", "lora.target_modules=q_proj,k_proj"]
    assert train.main([*arguments, "--plan", *doubtful, "training.learning_rate=4e-4", "training.warmup_steps=0"]) == 0
    said = capsys.readouterr().out
    assert "model.max_seq_length: samples have up to 257 tokens, but the base knows 256 positions" in said
    assert "lora.rank: 33 is more than 32, the full rank of model.layers.0.self_attn.q_proj (64 x 32)" in said
    assert "as for 4 of 4 adapters" in said
    assert "training.learning_rate=0.0004: high for a run without warm-up" in said
    for steps, is_said in ((10, True), (20, False)):  # a warm-up of 0.3 and of 0.6 steps
        assert train.main([*arguments, "--plan", "training.learning_rate=3e-4", f"training.max_steps={steps}"]) == 0
        assert ("for a run without warm-up" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("training.learning_rate=0", "training.learning_rate: 0.0 is out of range: it must be between 1e-12 and 1.0"),
        ("training.learning_rate=2", "training.learning_rate: 2.0 is out of range: it must be between 1e-12 and 1.0"),
        ("training.warmup_steps=9", "training.warmup_steps: 9: the run has 8 steps"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(
    setting: str, says: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--plan", "--preflight"):
        assert train.main([*arguments, option, "training.max_steps=8", setting]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("positions", "rope", "known"),
    [
        (None, None, math.inf),
        (4096, None, 4096),
        (4096, {"rope_type": "linear", "factor": 4.0}, 16384),
        (131072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    ],
)
def test_the_positions_that_a_base_knows(positions: int | None, rope: Any, known: float, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    files = ModelFiles.read(tmp_path / "base")
    ropes = tuple(replace(own, parameters=rope or {}) for own in files.decoder.ropes if own)
    decoder = replace(files.decoder, ropes=ropes)
    config = {**files.config, "max_position_embeddings": positions}
    assert replace(files, config=config, decoder=decoder).context_length == known


def test_a_compiler_that_fails_is_one_line() -> None:
    class TorchDynamoException(RuntimeError):
        """As PyTorch's, which is known by its name."""

    message = "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'x')"
    for text in (message, "LoweringException: x\ntarget: y"):
        first_line = re.escape(text.partition("\n")[0])
        expected = pytest.raises(
            UserError, match=rf"^training\.compile: {first_line}: .* or set training\.compile=false$"
        )
        with expected, explained_out_of_memory(None):  # type: ignore[arg-type]
            raise TorchDynamoException(text)


def test_what_cannot_fit_is_one_line_with_the_fix(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*arguments, "--plan", "model.max_seq_length=100000000"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training.micro_batch_size: 4 sequences of 100000000 tokens take" in error
    assert "are available: set model.max_seq_length=50000000 (saves about " in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_what_would_help_is_weighed_with_the_same_blocks_computed_again(tmp_path: Path) -> None:
    """In 4 bits, a weight takes 0.516 bytes instead of 2; room that this makes is not filled with activations again."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    config = Config().override({"model.name": str(tmp_path), "system.device": "cuda", "system.memory_gb": 14})
    planner = Planner.of(config, Machine.detect_or_describe(config), decoder_config(MISTRAL_7B))
    said = suggest_savings(planner, 1, 2048)
    saved = 6_979_321_856 * (2 - 0.5 - (1 + 4 / 256) / 64) - 4096 * 14336 * 2  # less one weight unpacked
    assert said.startswith(f"quantization.bits=4 (saves about {saved / 1e9:.3g} GB), or model.max_seq_length=1024 ")


def test_auto_keeps_the_rows_of_a_step_and_a_run_goes_on_with_what_was_decided(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = ["training.micro_batch_size=auto", "training.gradient_accumulation_steps=6", "evaluation.prompts=0"]
    run = Path(arguments[1].removeprefix("output.dir="))
    assert train.main([*arguments, *auto, "training.max_steps=1"]) == 0
    decided = json.loads((run / "config.json").read_text())["training"]
    assert (decided["micro_batch_size"], decided["gradient_accumulation_steps"]) == (6, 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line["event"] == "memory")["predicted_gb"].keys() >= {"linears", "loss"}
    monkeypatch.setattr("nanoft.runtime.device.memory_limit_bytes", lambda device: 1.0)  # less memory than before
    more = ["training.max_steps=2", "training.checkpointing=none", "--force", "room"]
    assert train.main([*arguments, *auto, *more]) == 0
    assert json.loads((run / "config.json").read_text())["training"]["micro_batch_size"] == 6
    capsys.readouterr()
    for changed in (["training.gradient_accumulation_steps=12"], ["training.gradient_accumulation_steps=1"]):
        assert train.main([*arguments, *auto, *more, *changed]) == 2
        sequences = changed[0].partition("=")[2]
        expected = f"training.micro_batch_size x gradient_accumulation_steps: 6 -> {sequences}; "
        assert expected in capsys.readouterr().err
    explicit = ["training.micro_batch_size=2", "training.gradient_accumulation_steps=3", "evaluation.prompts=0"]
    assert train.main([*arguments, *explicit, *more, "training.max_steps=3"]) == 0
