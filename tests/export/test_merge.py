"""Merged models against PEFT, transformers, bitsandbytes and arithmetic in float64; what fails leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from adapters import LORA, make_adapter, randomize_b
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoft import UserError
from nanoft.config import Config, LoRAConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export import merge as merging
from nanoft.export.merge import merge, save_result
from nanoft.io.atomic import new_directory
from nanoft.lora import LoRALinear, inject_lora
from nanoft.models import weights
from nanoft.models.open import LoadedModel, open_model
from nanoft.models.weights import load_model
from tiny_models import delta, make_chat_model, make_packed

RANK, ALPHA = LORA.rank, LORA.alpha

CPU = torch.device("cpu")


IDS = torch.arange(5, 60)[None]


CASES = ["llama", "llama-bias", "mistral", "qwen2", "qwen3"]


def make(
    root: Path, case: str = "mistral", original_base: bool = False, lora: LoRAConfig = LORA, **note: Any
) -> LoadedModel:
    """Base and adapter, opened as merge.py opens them."""
    make_chat_model(root / "base", case)
    return reopen(make_adapter(root / "base", root / "adapter", lora=lora, **note), original_base)


def reopen(adapter: Path, original_base: bool = False) -> LoadedModel:
    return open_model(str(adapter), CPU, torch.float32, original_base)


def merged(
    opened: LoadedModel, out: Path, dtype: torch.dtype = torch.float32, onto: Any = "original", **settings: Any
) -> Path:
    out.mkdir()
    merge(opened, dtype, onto, out, **settings)
    return out


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, through its index if it has one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {name: load_file(directory / name) for name in set(weight_map.values())}
    assert sum(len(shard) for shard in shards.values()) == len(weight_map)
    return {name: shards[file][name] for name, file in weight_map.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits if hasattr(model, "generate") else model.logits(model(IDS))
    return result


# --- the arithmetic


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("case", CASES)
def test_merged_in_transformers_says_what_base_and_adapter_say_here(case: str, shard_size: str, tmp_path: Path) -> None:
    opened = make(tmp_path, case)
    out = merged(opened, tmp_path / "out", shard_size=shard_size)
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert (logits(theirs) - logits(opened.model)).abs().max() < 1e-4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    assert (logits(theirs) - logits(base)).abs().max() > 0.1  # the adapter says something
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    if shard_size == "1GB":
        assert shards == ["model.safetensors"]
        return
    index = json.loads((out / "model.safetensors.index.json").read_text())
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    for shard in shards:
        sizes = [tensor.nbytes for tensor in load_file(out / shard).values()]
        assert sum(sizes) <= 40_000 or len(sizes) == 1


@pytest.mark.parametrize("case", CASES)
def test_every_merged_tensor_equals_what_peft_merges(case: str, tmp_path: Path) -> None:
    opened = make(tmp_path, case)
    ours = tensors_of(merged(opened, tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    if case == "qwen2":  # tied: the head is the embedding
        assert torch.equal(theirs.pop("lm_head.weight"), theirs["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-6, name


def test_onto_a_packed_base_is_its_unpacked_weight_plus_the_change(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "source")
    make_packed(tmp_path / "source", tmp_path / "base", load_in_4bit=True)
    opened = reopen(make_adapter(tmp_path / "base", tmp_path / "adapter"))
    assert opened.quantization == ("fp4", False)
    out, base = merged(opened, tmp_path / "out"), load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        adapter = opened.adapters.get(name.removesuffix(".weight"))
        wanted = base[name] if adapter is None else adapter.base.dequantize() + delta(adapter)
        assert (tensor - wanted).abs().max() < 1e-6, name
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert (logits(theirs) - logits(opened.model)).abs().max() < 1e-4


def test_onto_8_bits_is_the_unpacked_weight_plus_the_change(tmp_path: Path) -> None:
    opened = make(tmp_path, original_base=True, quantization={"type": "int8", "double": False})
    assert opened.quantization == ("int8", False)
    base, out = load_file(tmp_path / "base" / "model.safetensors"), merged(opened, tmp_path / "out", onto="nf4")
    for name, tensor in load_file(out / "model.safetensors").items():
        adapter = opened.adapters.get(name.removesuffix(".weight"))
        if adapter is None:
            assert torch.equal(tensor, base[name]), name
            continue
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(base[name])
        unpacked = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
        assert (tensor - (unpacked + delta(adapter))).abs().max() < 1e-6, name
        assert (tensor - (base[name] + delta(adapter))).abs().max() > 1e-4, name


def test_tensors_that_follow_from_others_are_left_out(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base", "qwen2")
    stored = load_file(tmp_path / "base/model.safetensors")
    stored |= {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    stored |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(stored, tmp_path / "base/model.safetensors")
    opened = reopen(make_adapter(tmp_path / "base", tmp_path / "adapter"))
    out = merged(opened, tmp_path / "out")
    assert stored.keys() - tensors_of(out).keys() == {
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert (logits(theirs) - logits(opened.model)).abs().max() < 1e-4


MEASURE = """
    import sys, torch
    from pathlib import Path
    from nanoft.export.merge import merge
    from nanoft.models.open import open_model

    def resident(field):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    torch.set_num_threads(1)
    opened = open_model(sys.argv[1], torch.device("cpu"), torch.bfloat16)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS")
    Path(sys.argv[2]).mkdir()
    merge(opened, torch.bfloat16, "original", Path(sys.argv[2]))
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")
def test_merging_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": 4}
    make_chat_model(tmp_path / "base", **sizes, num_attention_heads=8, dtype=torch.bfloat16)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "adapter"), str(tmp_path / "out")],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},  # what is freed is given back, so that it counts
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    written = (tmp_path / "out/model.safetensors").stat().st_size
    assert written > 110e6
    # Of 4 million numbers at a time, all of the largest tensor: itself, and in float32 the weight and the sum.
    assert 8e6 < int(said.stdout) < 65e6 < written


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out: needs 4e\+09 GB, but only [\d.e+-]+ GB are free"):
        merging.check_room(tmp_path, 4 * 10**18)


# --- the files


def test_the_tokenizer_is_the_bases_byte_for_byte_and_nothing_else_is_there(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    extra = {
        "special_tokens_map.json": b'{"eos_token": "<|im_end|>"}',
        "added_tokens.json": b"{}\n",
        "tokenizer.model": bytes(range(256)),
        "vocab.json": b"{} ",
        "merges.txt": b"#\r\n",
    }
    for name, content in extra.items():
        (tmp_path / "base" / name).write_bytes(content)
    for name in ("modeling_evil.py", "pytorch_model.bin", "README.md", "optimizer.pt"):
        (tmp_path / "base" / name).write_text("not ours")
    out = merged(reopen(make_adapter(tmp_path / "base", tmp_path / "adapter")), tmp_path / "out")
    expected = {*extra, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == {*expected, "config.json", "model.safetensors"}
    for name in expected:
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes(), name
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~umask}


def test_the_template_that_it_was_trained_with_goes_along(tmp_path: Path) -> None:
    opened = make(tmp_path)
    shutil.copy(tmp_path / "base/tokenizer.json", tmp_path / "adapter")
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages[0].content }} é", encoding="utf-8")
    out = merged(reopen(tmp_path / "adapter"), tmp_path / "out")
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages[0].content }} é"
    assert not (merged(opened, tmp_path / "other") / "chat_template.jinja").exists()


def test_a_base_without_a_template_gets_the_one_that_was_rendered_with(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    settings = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(settings))
    out = merged(reopen(make_adapter(tmp_path / "base", tmp_path / "adapter")), tmp_path / "out")
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    theirs = AutoTokenizer.from_pretrained(out)
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == ChatTokenizer(tmp_path / "base").encode_prompt(messages)


# --- all or nothing


def everything(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() if p.is_file() else "" for p in sorted(root.rglob("*"))}


def test_a_new_directory_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with new_directory(out) as aside:
        (aside / "file").write_text("x")
        assert not out.exists()
    assert everything(tmp_path) == {"a": "", "a/b": "", "a/b/out": "", "a/b/out/file": "x"}


@pytest.mark.parametrize("error", [UserError("no"), ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_what_fails_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    expected = UserError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with new_directory(tmp_path / "a" / "b" / "c" / "out") as aside:
            (aside / "deep").mkdir()
            (aside / "deep" / "file").write_text("x")
            raise error

    with pytest.raises(expected) as raised:
        fail()
    assert everything(tmp_path) == {"a": "", "a/b": "", "a/b/c": ""}
    if isinstance(error, OSError):
        assert "--out" in str(raised.value)
        assert "No space left" in str(raised.value)


@pytest.mark.parametrize("kind", ["directory", "full directory", "file", "dangling link"])
def test_what_exists_is_not_overwritten(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("kept")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "full directory":
            (out / "file").write_text("kept")
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r"--out: .*out: already exists: choose another name"), new_directory(out):
        pytest.fail("entered")
    assert everything(tmp_path) == before
    assert out.is_symlink() == (kind == "dangling link")


@pytest.mark.parametrize("place", ["/proc/nowhere/out", "file/out"])
def test_a_place_that_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=f"{place}: cannot be written"), new_directory(tmp_path / place):
        pytest.fail("entered")
    assert everything(tmp_path) == {"file": "kept"}


# --- what a run ends with


def run_config(base: Path, **changes: Any) -> Config:
    named = {"model.name": str(base), "lora.rank": RANK, "lora.alpha": ALPHA, **changes}
    return Config().override(named)


def tuned(base: Path, std: float = 0.1) -> tuple[Any, dict[str, LoRALinear]]:
    model = load_model(base, CPU, torch.float32)
    adapters = inject_lora(model, LORA, seed=1)
    randomize_b(adapters, std)
    return model.eval(), adapters


def test_a_result_loads_in_peft_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    config, run = run_config(tmp_path / "base"), tmp_path / "run"
    (run / ".tmp-adapter-1").mkdir(parents=True)  # of a process that was killed
    for step, std in ((3, 0.1), (5, 0.2)):
        model, adapters = tuned(tmp_path / "base", std)
        place = save_result(run, model, adapters, tmp_path / "base", config, step, torch.float32)
        assert place == run / "adapter"
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), place)
        assert (logits(theirs) - logits(model)).abs().max() < 1e-5
        assert json.loads((place / "nanoft.json").read_text())["step"] == step
    assert [path.name for path in run.iterdir()] == ["adapter"]
    assert (place / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()


def test_a_full_result_loads_in_transformers(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base", "qwen2")
    model = load_model(tmp_path / "base", CPU, torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    config = run_config(tmp_path / "base", **{"training.method": "full"})
    for dtype, allowed in ((torch.bfloat16, 0.2), (torch.float32, 1e-4)):
        stored = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**stored, "dtype": str(dtype).split(".")[1]}))
        place = save_result(tmp_path, model, {}, tmp_path / "base", config, 3, torch.float32)
        assert place == tmp_path / "model"
        theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager")
        assert (logits(theirs) - logits(model)).abs().max() < allowed
        assert {tensor.dtype for tensor in tensors_of(place).values()} == {dtype}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model"}


@pytest.mark.parametrize("full", [False, True])
def test_a_result_that_cannot_be_written_leaves_the_earlier_one(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chat_model(tmp_path / "base")
    model, adapters = tuned(tmp_path / "base")
    config, run = run_config(tmp_path / "base"), tmp_path / "run"
    run.mkdir()
    arguments = (run, load_model(tmp_path / "base", CPU, torch.float32) if full else model, {} if full else adapters)
    place = save_result(*arguments, tmp_path / "base", config, 3, torch.float32)
    before = {path.name: path.read_bytes() for path in place.iterdir()}

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging if not full else weights, "copy_companions", full_disk)
    with pytest.raises(UserError, match=f"{place.name}: cannot be written: No space left"):
        save_result(*arguments, tmp_path / "base", config, 4, torch.float32)
    assert [path.name for path in run.iterdir()] == [place.name]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
