"""merge.py as a user runs it: verified models in every format, and nothing on disk if something is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs import run_merge
from safetensors.torch import load_file, save_file
from tiers import rest_is_slow
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge as command
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export import merge, verify
from nanoft.generation.generate import generate
from nanoft.io.atomic import new_directory
from nanoft.lora import disabled
from nanoft.model import Decoder
from nanoft.models.open import open_chat_tokenizer, open_model
from tiny_models import make_chat_model, make_packed, train_run, write_records

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
IDS = torch.arange(5, 60)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.logits(model(IDS)) if isinstance(model, Decoder) else model(IDS).logits
    return result


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


TOLD = {"README.md", "parity.json", "provenance.json"}  # of every export, beside what its format has


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize(("name", "base"), [("lora", "original"), ("qlora", "original"), ("qlora", "nf4")])
def test_a_run_becomes_a_model_that_transformers_loads(
    name: str, base: str, dtype: str | None, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run_merge(runs / name, "--out", out, "--base", base, *(["--dtype", dtype] if dtype else [])) == 0
    said = capsys.readouterr().out
    assert names(tmp_path) == {"merged"}
    companions = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names(out) == {*companions, *TOLD, "config.json", "model.safetensors"}
    for file in companions:
        assert (out / file).read_bytes() == (runs / "base" / file).read_bytes()
    stored = DTYPES[dtype or "f32"]  # without --dtype, the base's
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {stored}
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    ours = open_model(str(runs / name), CPU, torch.float32, original_base=base == "original").model
    difference = (logits(theirs) - logits(ours)).abs().max()
    assert difference < {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}[stored]
    for part in (f"merged onto the {base} weights in {str(stored).removeprefix('torch.')}", "verified", "allowed"):
        assert part in said
    assert ("recommended: onto the " in said) == (name == "qlora")


def test_a_run_on_a_packed_base_merges_onto_that(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_packed(runs / "base", tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(AssertionError):
        train_run(tmp_path / "run", tmp_path / "base", runs / "data.jsonl")
    fields = "quantization.bits=4 quantization.type=nf4 quantization.double=false"
    assert f"{tmp_path / 'base'} is stored in nf4" in (said := capsys.readouterr().err)
    assert f"set {fields}, or name the original model" in said
    shutil.rmtree(tmp_path / "run", ignore_errors=True)

    settings = {"quantization__bits": 4, "quantization__double": False}
    run = train_run(tmp_path / "run", tmp_path / "base", runs / "data.jsonl", **settings)
    assert "base in NF4" in capsys.readouterr().out
    tensors = []
    for base in ("original", "nf4"):
        assert run_merge(run, "--out", tmp_path / base, "--base", base, "--dtype", "f32") == 0
        said = capsys.readouterr().out
        assert "merged onto the nf4 weights" in said
        assert "the base is stored in nf4 only: there are no original weights" in said
        tensors.append(load_file(tmp_path / base / "model.safetensors"))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "original", attn_implementation="eager")
    ours = open_model(str(run), CPU, torch.float32)
    assert (logits(theirs) - logits(ours.model)).abs().max() < 1e-4
    with disabled(ours.adapters):
        assert (logits(theirs) - logits(ours.model)).abs().max() > 1e-3


def test_the_merged_model_answers_as_the_run_does(runs: Path, tmp_path: Path) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "merged", "--dtype", "f32") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    messages = [{"role": "user", "content": "Say 4 please."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :].tolist()
    opened = open_model(str(runs / "lora"), CPU, torch.float32)
    prompt = ChatTokenizer(opened.tokenizer_directory).encode_prompt(messages)
    assert prompt == ids["input_ids"][0].tolist()
    assert generate(opened.model, [prompt], (), 24)[0].ids == expected


def test_the_proof_is_made_on_the_runs_own_conversations(runs: Path) -> None:
    opened = open_model(str(runs / "lora"), CPU, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(runs / "base")

    def prompts(source: Path) -> list[list[int]]:
        chat = open_chat_tokenizer(str(source), opened, as_trained=True)
        return verify.proof_prompts(chat, verify.held_out(str(source), chat)[0])

    texts = [tokenizer.decode(ids) for ids in prompts(runs / "lora")]
    chats = [text for text in texts if "<|im_start|>" in text]
    assert len(chats) == 6  # a quarter of 24 records is held out
    assert all("<|im_start|>assistant\n" in text and text.endswith("<|im_end|>\n") for text in chats)
    alone = prompts(runs / "lora" / "adapter")
    assert [tokenizer.decode(ids) for ids in alone] == [text for text in texts if "<|im_start|>" not in text]
    assert len(alone) >= 3


@pytest.mark.parametrize("gone", ["data.jsonl", "damaged data"])
def test_without_its_data_a_run_is_proven_on_plain_text(gone: str, runs: Path, tmp_path: Path) -> None:
    records = write_records(tmp_path / "data.jsonl")
    run = train_run(tmp_path / "run", runs / "base", records)
    if gone == "data.jsonl":
        records.unlink()
    else:
        records.write_text("garbage")
    assert run_merge(run, "--out", tmp_path / "merged") == 0


def test_an_adapter_directory_merges_like_its_run(runs: Path, tmp_path: Path) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "a") == 0
    assert run_merge(runs / "lora" / "adapter", "--out", tmp_path / "b") == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def unfinished(run: Path, out: Path) -> Path:
    shutil.copytree(run, out)
    shutil.rmtree(out / "adapter")
    return out


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_run_that_has_not_ended_is_its_best_checkpoint(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(runs / name, tmp_path / "run")
    (tmp_path / "out").mkdir()
    for form in ("hf", "peft"):
        assert run_merge(runs / name, "--out", tmp_path / "out" / f"{form}-whole", "--format", form) == 0
        capsys.readouterr()
        assert run_merge(run, "--out", tmp_path / "out" / f"{form}-best", "--format", form) == 0
        assert "best checkpoint, after step 4" in capsys.readouterr().out
        whole, best = tmp_path / "out" / f"{form}-whole", tmp_path / "out" / f"{form}-best"
        assert names(whole) == names(best)
        told = json.loads((best / "parity.json").read_text())["weights"]
        base = "nf4" if name == "qlora" else "its own number format"
        assert told.startswith("those of this export" if form == "hf" else f"the adapter on its base in {base};")
        for file in names(whole) - TOLD:  # which say where it is from
            assert (whole / file).read_bytes() == (best / file).read_bytes(), file


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__init": "pissa", "lora__dora": True, "lora__bias": "lora_only", "quantization__bits": 4},
        {"lora__init": "pissa", "lora__rslora": True, "lora__rank_pattern": {"q_proj": 2}, "lora__freeze_a": True},
    ],
)
def test_a_run_with_variations_is_the_same_in_every_form(
    changes: dict[str, Any], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_chat_model(tmp_path / "base", "qwen2")
    finished = train_run(tmp_path / "run", tmp_path / "base", runs / "data.jsonl", **changes)
    said = capsys.readouterr().out
    assert re.search(r"\n          k_proj: .*rank 4", said)
    assert "\n| perplexity " in said
    run = unfinished(finished, tmp_path / "unfinished")
    for source in (finished, run):
        assert run_merge(source, "--out", tmp_path / f"{source.name}-peft", "--format", "peft") == 0
        assert run_merge(source, "--out", tmp_path / f"{source.name}-hf") == 0
    for form in ("peft", "hf"):
        for file in names(tmp_path / f"run-{form}") - TOLD:
            assert (tmp_path / f"run-{form}" / file).read_bytes() == (
                tmp_path / f"unfinished-{form}" / file
            ).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "run-peft")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-hf", attn_implementation="eager")
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    if "quantization__bits" in changes:
        assert run_merge(run, "--out", tmp_path / "nf4", "--base", "nf4") == 0


def test_peft_loads_what_is_handed_out(runs: Path, tmp_path: Path) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "adapter", "--format", "peft") == 0
    base = AutoModelForCausalLM.from_pretrained(runs / "base", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = open_model(str(runs / "lora"), CPU, torch.float32).model
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-5
    assert names(tmp_path) == {"adapter"}


def test_the_command_in_a_process_of_its_own(runs: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "merge.py"), str(runs / "lora"), "--out"]
    done = subprocess.run([*line, str(tmp_path / "a" / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/a/out: merged onto the original weights in float32")
    again = subprocess.run([*line, str(tmp_path / "a" / "out")], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: --out: {tmp_path}/a/out: already exists: choose another name or remove it\n"


# --- parts, sums, and back


@pytest.fixture(scope="module")
def second(runs: Path) -> Path:
    """Another run on the same base."""
    settings = {"system__seed": 5, "lora__rslora": True, "lora__rank": 2}
    return train_run(runs / "second", runs / "base", runs / "data.jsonl", **settings)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_only_a_part_is_merged(runs: Path, tmp_path: Path) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "all") == 0
    assert run_merge(runs / "lora", "--out", tmp_path / "part", "--only", "attention,.*1.*down_proj") == 0
    base, whole, part = (weights(place) for place in (runs / "base", tmp_path / "all", tmp_path / "part"))
    for name, tensor in part.items():
        meant = "self_attn" in name or "1.mlp.down_proj" in name
        assert torch.equal(tensor, (whole if meant else base)[name]), name
    assert run_merge(runs / "lora", "--out", tmp_path / "peft", "--format", "peft", "--only", "mlp") == 0
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "base"), tmp_path / "peft")
    changed = {name.rpartition(".")[2] for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert changed == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_several_runs_add_up(form: str, runs: Path, second: Path, tmp_path: Path) -> None:
    line = (runs / "lora", second, "--weights", "0.7,0.3", "--format", form, "--out")
    assert run_merge(*line, tmp_path / "sum") == 0
    base = AutoModelForCausalLM.from_pretrained(runs / "base", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, runs / "lora" / "adapter", adapter_name="one")
    theirs.load_adapter(second / "adapter", adapter_name="two")
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    wanted = logits(theirs)
    theirs.set_adapter("one")
    assert (logits(theirs) - wanted).abs().max() > 0.01
    if form == "hf":
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "sum", attn_implementation="eager")
    else:
        ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "base"), tmp_path / "sum")
    assert (logits(ours) - wanted).abs().max() < 1e-4
    said = json.loads((tmp_path / "sum" / "provenance.json").read_text())["adapters"]
    assert [item["weight"] for item in said] == [0.7, 0.3]


def test_what_was_merged_can_be_taken_out_again(
    runs: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "merged") == 0
    assert run_merge(runs / "lora", "--unmerge", tmp_path / "merged", "--out", tmp_path / "back") == 0
    said = capsys.readouterr().out
    assert "subtracted from" in said
    base, back = weights(runs / "base"), weights(tmp_path / "back")
    assert base.keys() == back.keys()
    assert all((back[name] - tensor).abs().max() < 1e-6 for name, tensor in base.items())
    assert not torch.equal(back[name := "model.layers.0.mlp.up_proj.weight"], weights(tmp_path / "merged")[name])

    assert run_merge(runs / "lora", "--out", tmp_path / "half", "--dtype", "bf16") == 0
    line = ("--unmerge", tmp_path / "half", "--dtype", "f32", "--out", tmp_path / "nearly")
    assert run_merge(runs / "lora", *line) == 0
    merged, nearly = weights(tmp_path / "merged"), weights(tmp_path / "nearly")
    for name, tensor in base.items():  # rounding moved the merged weight by at most half a step of 8 bits
        allowed = merged[name].abs() * 2.0**-8 + 1e-6
        assert ((nearly[name] - tensor).abs() <= allowed).all(), name

    assert run_merge(second, "--unmerge", tmp_path / "merged", "--out", tmp_path / "x") == 2
    assert "was not merged from" in capsys.readouterr().err
    assert run_merge(runs / "lora", "--unmerge", tmp_path / "none", "--out", tmp_path / "x") == 2
    assert "--unmerge: " in capsys.readouterr().err


def test_what_cannot_be_taken_out_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chat_model(tmp_path / "base", "qwen2")
    for name, changes, message in (
        ("dora", {"lora__dora": True}, "DoRA adapters cannot be summed"),
        ("bias", {"lora__bias": "lora_only"}, "replaced biases"),
    ):
        run = train_run(tmp_path / name, tmp_path / "base", runs / "data.jsonl", **changes)
        assert run_merge(run, "--out", tmp_path / f"{name}-merged") == 0
        capsys.readouterr()
        assert run_merge(run, "--unmerge", tmp_path / f"{name}-merged", "--out", tmp_path / "x") == 2
        assert message in capsys.readouterr().err
    assert run_merge(tmp_path / "dora", tmp_path / "bias", "--out", tmp_path / "x") == 2
    assert "merge them one at a time" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# --- both bases, measured


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_verify_measures_what_transformers_measures(
    dtype: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for base in ("original", "nf4"):
        line = ("--base", base, "--dtype", dtype, "--verify", "--out", tmp_path / base)
        assert run_merge(runs / "qlora", *line) == 0
    shown = capsys.readouterr().out
    said = json.loads((tmp_path / "original" / "provenance.json").read_text())["verify"]
    assert json.loads((tmp_path / "nf4" / "provenance.json").read_text())["verify"] == said

    opened = open_model(str(runs / "qlora"), CPU, torch.float32)
    chat = open_chat_tokenizer(str(runs / "qlora"), opened, as_trained=True)
    samples, _ = verify.held_out(str(runs / "qlora"), chat)
    assert said["tokens"] == sum(len(sample.ids) for sample in samples)
    for base in ("original", "nf4"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / base, dtype=torch.float32, attn_implementation="eager")
        divergence, nats, count, same = 0.0, 0.0, 0, 0
        with torch.no_grad():
            for sample in samples:
                ids = torch.tensor(sample.ids.tolist())[None]
                wanted = opened.model.logits(opened.model(ids))[0].double().log_softmax(-1)
                found = theirs(ids).logits[0].double().log_softmax(-1)
                divergence += torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True).item()
                same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
                targets = torch.tensor(sample.is_target.tolist())[1:]
                nats -= found[:-1].gather(1, ids[0, 1:, None])[targets].sum().item()
                count += int(targets.sum())
        assert said[base]["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        assert said[base]["divergence"] == pytest.approx(divergence / said["tokens"], rel=0.02, abs=1e-7)
        assert said[base]["same_top_token"] == pytest.approx(same / said["tokens"], abs=0.01)
    assert said["nf4"]["divergence"] < said["original"]["divergence"]
    best = verify.recommend_base({name: verify.Agreement(**said[name]) for name in ("original", "nf4")})
    assert f"recommended: onto the {best} weights" in shown


def test_the_lower_perplexity_is_recommended_and_of_two_alike_the_nearer() -> None:
    def said(perplexity: float, divergence: float) -> verify.Agreement:
        return verify.Agreement(0.1, 1.0, 1.0, divergence, perplexity, 5.0)

    assert verify.recommend_base({"original": said(4.9, 0.1), "nf4": said(5.0, 0.0)}) == "original"
    assert verify.recommend_base({"original": said(4.999, 0.1), "nf4": said(5.0, 0.0)}) == "nf4"
    assert verify.recommend_base({"original": said(5.1, 0.1), "nf4": said(5.0, 0.2)}) == "nf4"
    assert verify.recommend_base({"original": said(math.inf, math.nan), "nf4": said(math.inf, math.nan)}) in (
        "original",
        "nf4",
    )


def test_an_adapter_for_mlx(runs: Path, tmp_path: Path) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--format", "mlx") == 0
    mine = {"adapters.safetensors", "adapter_config.json"}
    companions = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names(tmp_path / "out") == {*mine, *companions, *TOLD}


# --- the proof, and what is left when it fails


def corrupt(out: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= -1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_model_is_not_kept(
    dtype: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = command.merge

    def merge_wrongly(
        opened: Any, number_format: torch.dtype, onto: Any, out: Path, *more: Any, **options: Any
    ) -> None:
        merge(opened, number_format, onto, out, *more, **options)
        corrupt(out)

    monkeypatch.setattr(command, "merge", merge_wrongly)
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--dtype", dtype) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: --out: {tmp_path}/out: the merged model is not base + adapter")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_are_not_kept(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 1e6  # beyond float16
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    line = (tmp_path / "adapter", "--out", tmp_path / "out", "--dtype")
    assert run_merge(*line, "f16") == 2
    said = capsys.readouterr().err
    assert "its files are not those that" in said
    assert "--any-base" in said
    assert run_merge(*line, "f16", "--any-base") == 2
    assert "up_proj.weight overflow float16: use bf16 or f32" in capsys.readouterr().err
    assert names(tmp_path) == {"base", "adapter"}
    assert run_merge(*line, "bf16", "--any-base") == 0


def test_an_adapter_that_rounding_may_drown_is_mentioned(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    weak = {name: tensor * 1e-4 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(weak, tmp_path / "adapter/adapter_model.safetensors", {"format": "pt"})
    for dtype, drowned in (("bf16", True), ("f32", False)):
        assert run_merge(tmp_path / "adapter", "--out", tmp_path / dtype, "--dtype", dtype) == 0
        assert ("may erase an adapter this weak" in capsys.readouterr().out) == drowned


FULL = """
    import resource, sys
    import merge
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for there in (0, 100, 60_000):  # bytes that a file may have
        resource.setrlimit(resource.RLIMIT_FSIZE, (there, most))
        print(merge.main(sys.argv[1:]), flush=True)
"""


@pytest.mark.parametrize("form", rest_is_slow(["hf", "gguf"], "hf"))
def test_a_disk_that_is_full_leaves_nothing(form: str, runs: Path, tmp_path: Path) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    line = [sys.executable, "-c", textwrap.dedent(FULL), str(runs / "lora"), "--out", str(tmp_path / "out")]
    line += ["--format", form]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2", "2"]
    said = done.stderr.splitlines()
    assert len(said) == 3
    assert all(text.startswith(f"error: --out: {tmp_path}/out: cannot be written: ") for text in said)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_interrupted_goes_on_with_the_shards_that_it_finished(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (runs / "lora", "--shard-size", "20KB", "--out")
    assert run_merge(*line, tmp_path / "whole") == 0
    shards = sorted(path.name for path in (tmp_path / "whole").glob("model-*.safetensors"))
    assert len(shards) > 4
    write_file, written = merge.atomic.write_file, []

    def interrupt(path: Path, pieces: Any) -> Any:
        if path.name.endswith(".safetensors"):
            written.append(path.name)
            if len(written) == 3:
                path.write_bytes(b"half")
                raise KeyboardInterrupt
        return write_file(path, pieces)

    monkeypatch.setattr(merge.atomic, "write_file", interrupt)
    assert run_merge(*line, tmp_path / "out") == 130
    assert capsys.readouterr().err == "interrupted\n"
    (aside,) = tmp_path.glob(".tmp-out-*")
    (aside / shards[1]).write_bytes(b"damaged meanwhile")
    written += ["not to be interrupted again"]
    assert run_merge(*line, tmp_path / "out") == 0
    assert written[4:] == shards[1:]  # the first one was whole
    assert names(tmp_path) == {"whole", "out"}
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name

    written.clear()
    assert run_merge(*line, tmp_path / "other") == 130
    assert run_merge(runs / "lora", "--out", tmp_path / "other") == 0  # another command does not want them
    assert names(tmp_path) == {"whole", "out", "other"}


def test_two_processes_do_not_write_one_directory(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_directory(tmp_path / "out"):
        assert run_merge(runs / "lora", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said == f"error: --out: {tmp_path}/out: another process is writing it: wait, or choose another name\n"
    assert names(tmp_path) == {"out"}


# --- mistakes


def damaged(runs: Path, out: Path, damage: str) -> Path:
    """A damaged copy of the adapter."""
    shutil.copytree(runs / "lora" / "adapter", out)
    weights, config = out / "adapter_model.safetensors", out / "adapter_config.json"
    settings = json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "gone":
        weights.unlink()
    elif damage == "infinite":
        save_file({name: tensor / 0 for name, tensor in load_file(weights).items()}, weights)
    elif damage == "list":
        config.write_text("[]")
    elif damage == "other":
        make_chat_model(out.parent / "other", hidden_size=64)
        config.write_text(json.dumps({**settings, "base_model_name_or_path": str(out.parent / "other")}))
    elif damage in ("changed", "shard"):
        model = AutoModelForCausalLM.from_pretrained(runs / "base")
        model.model.norm.weight.data[0] += 0.001
        model.save_pretrained(out.parent / "other", max_shard_size="100KB" if damage == "shard" else "1GB")
        shutil.copy(runs / "base" / "tokenizer.json", out.parent / "other")
        if damage == "shard":
            (out.parent / "other" / "model-00002-of-00002.safetensors").unlink()
        config.write_text(json.dumps({**settings, "base_model_name_or_path": str(out.parent / "other")}))
    elif damage == "moved":
        config.write_text(json.dumps({**settings, "base_model_name_or_path": "/no/such/base"}))
    return out


MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing there": (["/no/such"], "/no/such: no adapter here"),
    "empty": ([""], "no adapter here"),
    "a plain model": (["ROOT/base"], "base: no adapter here"),
    "a full run": (["ROOT/full"], "trained every parameter"),
    "a full run as an adapter": (["ROOT/full", "--format", "peft"], "trained every parameter"),
    "not quantized": (["ROOT/lora", "--base", "nf4"], "--base nf4: "),
    "truncated": (["ADAPTER"], "adapter_model.safetensors: corrupted"),
    "truncated peft": (["ADAPTER", "--format", "peft"], "adapter_model.safetensors: corrupted"),
    "infinite": (["ADAPTER", "--format", "mlx"], "lora_A.weight contains NaN or infinity"),
    "infinite gguf": (["ADAPTER", "--format", "gguf-lora"], "lora_A.weight contains NaN or infinity"),
    "gone": (["ADAPTER"], "adapter_model.safetensors is missing"),
    "list": (["ADAPTER", "--format", "peft"], "adapter_config.json: expected a JSON object"),
    "other": (["ADAPTER"], "(32, 4) torch.float32, but (64, 4) torch.float32 is needed: is it the right base?"),
    "moved": (["ADAPTER"], "base_model_name_or_path: /no/such/base: no such directory"),
    "changed base": (["ADAPTER"], "its files are not those that"),
    "shard gone": (["ADAPTER"], "model-00002-of-00002.safetensors: one of 2 files, but missing"),
    "onnx": (["ROOT/lora", "--format", "onnx"], "optimum-cli export onnx --model "),
    "tensorrt": (["ROOT/lora", "--format", "tensorrt"], "trtllm-serve "),
    "no size": (["ROOT/lora", "--shard-size", "big"], "--shard-size: 'big' is not a size: write one like 500MB"),
    "one weight": (["ROOT/lora", "ROOT/lora", "--weights", "1"], "give 2 numbers, one for each adapter"),
    "weight is text": (["ROOT/lora", "--weights", "half"], "give 1 numbers, one for each adapter"),
    "no expression": (["ROOT/lora", "--only", "(q"], "--only: '(q' is neither a name nor a regular expression"),
    "no module": (["ROOT/lora", "--only", "w_proj"], "--only: 'w_proj' matches no module"),
    "other base": (["ROOT/lora", "ADAPTER"], "sum adapters of one base only"),
    "dtype of an adapter": (["ROOT/lora", "--format", "mlx", "--dtype", "f32"], "--dtype: needs --format hf"),
    "verify of a file": (["ROOT/lora", "--format", "gguf", "--verify"], "--verify: needs --format hf"),
    "a second of one": (["ROOT/full", "ROOT/lora", "--format", "gguf"], "lora: ROOT/full has no adapter: remove it"),
    "answers below none": (["ROOT/lora", "--parity-tokens", "-1"], "--parity-tokens: -1 is out of range"),
    "nf4 of an unmerge": (["ROOT/qlora", "--unmerge", "x", "--base", "nf4"], "remove --base and --verify"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    mistake: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    adapter = damaged(runs, tmp_path / "adapter", mistake.partition(" ")[0]) if "ADAPTER" in arguments else tmp_path
    message = message.replace("ROOT", str(runs))
    arguments = [part.replace("ROOT", str(runs)).replace("ADAPTER", str(adapter)) for part in arguments]
    before = set(tmp_path.rglob("*")) | set(runs.rglob("*"))
    assert run_merge(*arguments, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert captured.out == ""
    assert set(tmp_path.rglob("*")) | set(runs.rglob("*")) == before


@pytest.mark.parametrize("name", ["out", "file/out", ""])
def test_an_out_that_cannot_be_is_refused_before_any_work(
    name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(merge, "open_adapter", lambda *_, **__: pytest.fail("loaded"))
    assert run_merge(runs / "lora", "--out", tmp_path / name if name else "") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --out: ")
    assert captured.err.count("\n") == 1
    assert names(tmp_path) == {"out", "file"}


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    assert left.value.code == 0
    assert "python merge.py runs/tiny --out merged" in " ".join(capsys.readouterr().out.split())


# --- an adapter with a tokenizer of its own, a base elsewhere, patterns


@pytest.mark.parametrize("form", ["hf", "mlx", "peft"])
def test_the_tokenizer_of_training_is_exported(form: str, runs: Path, tmp_path: Path) -> None:
    """Another tool's adapter, trained with a template and a turn end that the base does not have."""
    adapter = shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    (adapter / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    text = json.loads((adapter / "tokenizer.json").read_text())
    new = len(ChatTokenizer(adapter).tokenizer.get_vocab())
    text["added_tokens"].append({**text["added_tokens"][-1], "id": new, "content": "<|done|>", "special": True})
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|done|>{% endfor %}"
    (adapter / "tokenizer.json").write_text(json.dumps(text))
    (adapter / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    out, sum_of_one = tmp_path / "out", ["--weights", "0.5"] if form == "peft" else []
    assert run_merge(adapter, "--out", out, "--format", form, *sum_of_one) == 0
    chat, trained = ChatTokenizer(out), ChatTokenizer(adapter)
    assert (chat.template, chat.stop_ids) == (template, trained.stop_ids)
    assert new in chat.stop_ids
    assert (out / "tokenizer.json").read_text() == (adapter / "tokenizer.json").read_text()
    answers = json.loads((out / "parity.json").read_text())
    assert all("<|done|>" in record["text"] for record in answers["prompts"])


def test_a_base_that_moved_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    gone = {**config, "base_model_name_or_path": str(tmp_path / "gone")}
    (adapter / "adapter_config.json").write_text(json.dumps(gone))
    base = shutil.copytree(runs / "base", tmp_path / "base")
    assert run_merge(adapter, "--out", tmp_path / "out") == 2
    assert "no such directory" in capsys.readouterr().err
    assert run_merge(adapter, "--out", tmp_path / "out", "--base-model", base) == 0
    expected = open_model(str(runs / "lora"), CPU, torch.float32).model
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert (logits(merged) - logits(expected)).abs().max() < 1e-4
    make_chat_model(tmp_path / "another", seed=3)
    assert run_merge(adapter, "--out", tmp_path / "no", "--base-model", tmp_path / "another") == 2
    assert "SHA-256 differs" in capsys.readouterr().err


def test_patterns_are_folded_for_engines_that_ignore_them(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patterns = {"lora__rank_pattern": {"q_proj": 2}, "lora__alpha_pattern": {"v_proj": 3.0}}
    run = train_run(tmp_path / "run", runs / "base", write_records(tmp_path / "data.jsonl"), **patterns)
    capsys.readouterr()
    assert run_merge(run, "--out", tmp_path / "plain", "--format", "peft") == 0
    assert "vLLM scales all modules by the file's alpha / r and ignores patterns: add --fold" in capsys.readouterr().out
    assert run_merge(run, "--out", tmp_path / "folded", "--format", "peft", "--fold") == 0
    assert "vLLM" not in capsys.readouterr().out
    config = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "folded" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}
    found = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "base"), tmp_path / name)
        for name in ("plain", "folded")
    ]
    assert (logits(found[0]) - logits(found[1])).abs().max() < 1e-5
    assert run_merge(run, "--out", tmp_path / "no", "--fold") == 2
    assert "--fold: needs --format peft" in capsys.readouterr().err
