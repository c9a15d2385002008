"""Setup and resuming: what may change in between, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs import BASE, ROOT, Capture, Patch, equal, events, in_the_loop, losses, quick, result, steps_are_all_there
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge
import train
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.io import untrusted
from nanoft.model import Decoder
from nanoft.models import model_files
from nanoft.models.open import open_model
from tiny_models import make_chat_model, train_run, write_records


def test_another_split_of_the_same_rows_may_go_on(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    constant = {"training__lr_scheduler": "constant", "training__learning_rate": 1e-3, "lora__dropout": 0.0}
    assert train.main(quick(whole, **constant)) == 0
    assert train.main(quick(other, **constant, training__max_steps=4)) == 0
    split = {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 8}
    assert train.main(quick(other, **constant, **split)) == 0
    assert [loss for _, loss in losses(other)] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-6)


def test_a_run_goes_on_wherever_its_base_is_if_that_is_the_same(tmp_path: Path, capsys: Capture) -> None:
    """Twice, so that the second time config.json already names the new place; and a run recorded before that was so."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    constant = {"training__lr_scheduler": "constant"}
    assert train.main(quick(whole, **constant)) == 0
    assert train.main(quick(moved, **constant, training__max_steps=4)) == 0
    recorded = json.loads((moved / "config.json").read_text())
    recorded["provenance"].pop("config_sha256")
    (moved / "config.json").write_text(json.dumps(recorded))
    for place, steps in (("a", 6), ("b", 8)):
        shutil.copytree(BASE, tmp_path / place)
        capsys.readouterr()
        command = quick(moved, **constant, model__name=str(tmp_path / place), training__max_steps=steps)
        assert train.main(command) == 0
        assert f"resuming  after step {steps - 2} of {steps}" in capsys.readouterr().out
    assert [loss for _, loss in losses(moved)] == [loss for _, loss in losses(whole)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora__rank": 4}, "lora.rank: 16 -> 4; the shape, scale or initialization of the adapter"),
        ({"training__micro_batch_size": 1}, "gradient_accumulation_steps: 8 -> 2; the steps already taken"),
        ({"system__seed": 5}, "system.seed: 0 -> 5; data order, dropout"),
        ({"data__packing": True}, "data.packing: False -> True; the samples or their order would differ"),
    ],
)
def test_what_may_not_change_is_said_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: Capture
) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
    capsys.readouterr()
    assert train.main(quick(tmp_path / "run", **changes)) == 2
    assert reason in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path, capsys: Capture) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert train.main(quick(mine, training__max_steps=3)) == 0
    assert train.main(quick(other, training__max_steps=6, training__learning_rate=1e-5)) == 0
    os.rename(other / "checkpoints" / "step-000006", mine / "checkpoints" / "step-000006")
    capsys.readouterr()
    assert train.main(quick(mine)) == 0
    said = capsys.readouterr().out
    assert "step-000006: belongs to another run: its config differs: using an earlier checkpoint" in said
    assert "resuming  after step 3 of 8" in said


def test_going_back_by_hand_and_killed_the_later_steps_are_gone(tmp_path: Path, monkeypatch: Patch) -> None:
    """What was done after step 2 is done again: nothing of it may be taken for this run's, not even its report."""
    directory = tmp_path / "run"
    changes = {"training__save_steps": 2, "training__keep_checkpoints": 100}
    assert train.main(quick(directory, **changes)) == 0

    class Killed(BaseException):
        pass

    def dying(number: int, real: Any, *args: Any) -> Any:
        if number == 2:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        in_the_loop(patch, "accumulate", dying)
        with pytest.raises(Killed):
            train.main([*quick(directory, **changes), "--resume", str(directory / "checkpoints" / "step-000002")])
    assert [step for step, _ in losses(directory)] == [1, 2, 3]
    assert train.main(quick(directory, **changes)) == 0
    steps_are_all_there(directory, 8)
    assert [line["step"] for line in events(directory, "done")] == [8]


def test_an_older_report_does_not_stand_for_a_run_that_was_done_again(tmp_path: Path, monkeypatch: Patch) -> None:
    directory = tmp_path / "run"
    changes = {"training__save_steps": 2, "training__keep_checkpoints": 100}
    assert train.main(quick(directory, **changes)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "finalize", lambda *_: os.kill(os.getpid(), 15) or train.STOPPED_BY_SIGNAL)
        earlier = str(directory / "checkpoints" / "step-000002")
        assert train.main([*quick(directory, **changes), "--resume", earlier]) == train.STOPPED_BY_SIGNAL
    assert train.main(quick(directory, **changes)) == 0
    assert len(events(directory, "done")) == 1


@pytest.mark.parametrize("damage", [{"provenance": 5}, {"provenance": {"date": "yesterday"}}, {"lora": {}}, 7])
def test_a_damaged_config_of_a_run_is_one_line(damage: Any, tmp_path: Path, capsys: Capture) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for name, text in (("config.json", json.dumps(damage)), ("metrics.jsonl", ""), (".lock", "")):
        (directory / name).write_text(text)
    assert train.main(quick(directory)) == 2
    assert "config.json: corrupted: remove the directory" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"rng": {}}, {"meter": 3}, {"guard": None}, {"surprise": 1}])
def test_a_sealed_state_that_is_none_is_one_line(change: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
    """As an attacker would write it: all hashes are right."""
    directory = tmp_path / "run"
    assert train.main(quick(directory, training__max_steps=1)) == 0
    (directory / "report.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "step-000000")
    path = directory / "checkpoints" / "step-000001"
    state = json.dumps({**json.loads((path / "state.json").read_text()), **change}).encode()
    (path / "state.json").write_bytes(state)
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["files"]["state.json"] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    text = json.dumps(body, indent=1, sort_keys=True).encode()
    sealed = {"body": body, "sha256": hashlib.sha256(text).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(sealed))
    capsys.readouterr()
    assert train.main(quick(directory, training__max_steps=1)) == 2
    captured = capsys.readouterr()
    assert "state.json: " in captured.err
    assert captured.err.count("\n") == 1


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    base = tmp_path / "base"
    make_chat_model(base, vocab_size=64)
    changes = {"model__name": base, "data__train_file": write_records(tmp_path / "data.jsonl")}
    assert train.main(quick(tmp_path / "run", **changes)) == 2
    assert "its vocabulary has 64 tokens, but its tokenizer gives the id " in capsys.readouterr().err


def test_the_model_is_looked_up_once_and_built_on_meta_twice(tmp_path: Path, monkeypatch: Patch) -> None:
    """Once to count its parameters, once to load it."""
    looked_up, read, built = [], [], []
    find, read_json, build = model_files.find_model, untrusted.read_json, Decoder.__init__

    def reading(path: Path, *args: Any) -> Any:
        read.append(str(path))
        return read_json(path, *args)

    def building(self: Decoder, config: Any) -> None:
        build(self, config)
        built.append(self.head.device.type)

    monkeypatch.setattr(model_files, "find_model", lambda name, *a, **o: looked_up.append(name) or find(name, *a, **o))
    for module in [m for m in sys.modules.values() if getattr(m, "read_json", None) is read_json]:
        monkeypatch.setattr(module, "read_json", reading)
    monkeypatch.setattr(Decoder, "__init__", building)
    assert train.main(quick(tmp_path / "run", training__max_steps=2)) == 0
    assert looked_up == [str(BASE)]
    assert read.count(str(BASE / "config.json")) == 1
    assert built.count("meta") == 2


def test_threads_are_decided_in_the_first_session(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
        torch.set_num_threads(before + 1)
        assert train.main(quick(tmp_path / "run", training__max_steps=2)) == 0
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_another_number_of_threads_is_warned_of(tmp_path: Path, capsys: Capture) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1, system__threads=1)) == 0
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    recorded["provenance"]["threads"] = 7
    path.write_text(json.dumps(recorded))
    capsys.readouterr()
    assert train.main(quick(tmp_path / "run", training__max_steps=2, system__threads=1)) == 0
    warning = "warning: system.threads: 1 instead of 7: from here on the run is not bit-identical"
    assert warning in capsys.readouterr().out


def test_a_run_whose_directory_base_and_data_were_copied_goes_on_bit_for_bit(tmp_path: Path, capsys: Capture) -> None:
    make_chat_model(tmp_path / "base")
    first = {"model__name": tmp_path / "base", "data__train_file": write_records(tmp_path / "a.jsonl")}
    first["training__lr_scheduler"] = "constant"
    assert train.main(quick(tmp_path / "whole", **first, training__max_steps=6)) == 0
    assert train.main(quick(tmp_path / "run", **first, training__max_steps=3)) == 0
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere" / "base")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    (tmp_path / "copy" / "checkpoints" / "step-000003" / ".DS_Store").touch()  # of a Mac
    capsys.readouterr()
    moved = {**first, "model__name": tmp_path / "elsewhere" / "base", "data__train_file": tmp_path / "b.jsonl"}
    for steps in (4, 6):  # from a checkpoint of the first place, and from one of the second
        assert train.main(quick(tmp_path / "copy", **moved, training__max_steps=steps)) == 0
        assert "resuming  after step" in capsys.readouterr().out
    assert losses(tmp_path / "copy") == losses(tmp_path / "whole")
    assert equal(result(tmp_path / "copy"), result(tmp_path / "whole"))
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write((tmp_path / "a.jsonl").read_text().splitlines()[0] + "\n")
    assert train.main(quick(tmp_path / "copy", **{**first, "data__train_file": tmp_path / "b.jsonl"})) == 2
    assert "the data changed since that run began" in capsys.readouterr().err


def test_preflight_of_a_finished_run_does_its_work(tmp_path: Path, capsys: Capture) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
    report = (tmp_path / "run" / "report.json").read_bytes()
    capsys.readouterr()
    assert train.main([*quick(tmp_path / "run", training__max_steps=1), "--preflight"]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"preflight {name:9} ok") for name in ("stop", "batch", "disk")] == [1, 1, 1]
    assert all(len(line) <= 80 for line in said.splitlines() if line.startswith(("preflight", "|", "         ")))
    assert (tmp_path / "run" / "report.json").read_bytes() == report


def test_a_changed_source_is_warned_of(tmp_path: Path, capsys: Capture) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    assert re.fullmatch("[0-9a-f]{64}", recorded["provenance"]["source_sha256"])
    recorded["provenance"]["source_sha256"] = "0" * 64
    path.write_text(json.dumps(recorded))
    capsys.readouterr()
    assert train.main(quick(tmp_path / "run", training__max_steps=2)) == 0
    assert "warning: nanoft's source has changed since the run began" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--help", "--version", "--no-such-option"])
def test_help_version_and_mistakes_do_not_import_torch(option: str) -> None:
    run = "    runpy.run_path('train.py', run_name='__main__')"
    code = f"import runpy, sys\ntry:\n{run}\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, option], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
    assert done.returncode == (2 if option == "--no-such-option" else 0)


def test_the_log_says_when_data_came_from_the_cache(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for is_cached in (False, True):
        assert train.main([*quick(tmp_path / "run"), "--show-batch"]) == 0
        assert ("data      from the cache: " in capsys.readouterr().out) is is_cached


# --- what lora.start_from, model.add_tokens and lora.modules_to_save change


TOKENS = ("<|go|>", "<|a|>")
TRAINED: dict[str, dict[str, Any]] = {
    "tokens": {"model__add_tokens": TOKENS},
    "copies": {"lora__modules_to_save": ("lm_head", "norm"), "lora__target_modules": ("q_proj", "embed_tokens")},
    "head": {"lora__target_modules": ("q_proj", "lm_head"), "lora__dora": True, "model__dtype": "bfloat16"},
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # its own head, a tied one
def tokens_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokens")
    make_chat_model(place / "base", request.param)
    write_records(place / "data.jsonl")
    turn = "<|im_start|>{{ m.role }}\n<|go|>{{ m.content }}<|a|><|im_end|>\n"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n<|go|>{% endif %}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}"
    (place / "base" / "chat_template.jinja").write_text(template)
    return place


@pytest.mark.parametrize("what", TRAINED)
def test_all_that_is_trained_resumes_bit_for_bit_and_is_what_peft_reads(
    what: str, tokens_base: Path, tmp_path: Path
) -> None:
    base, data = tokens_base / "base", tokens_base / "data.jsonl"
    train_run(tmp_path / "whole", base, data, **TRAINED[what], training__lr_scheduler="constant")
    changes = {**TRAINED[what], "training__lr_scheduler": "constant"}
    train_run(tmp_path / "half", base, data, **changes, training__max_steps=2)
    train_run(tmp_path / "half", base, data, **changes)
    whole, half = (
        load_file(tmp_path / name / "checkpoints" / "step-000004" / "adapter.safetensors") for name in ("whole", "half")
    )
    assert whole.keys() == half.keys()
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
    start = load_file(tmp_path / "whole" / "checkpoints" / "step-000002" / "adapter.safetensors")
    assert all(not torch.equal(tensor, start[name]) for name, tensor in whole.items())
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    opened = open_model(str(tmp_path / "whole"), torch.device("cpu"), torch.float32).model.eval()
    if opened.config.vocab_size > reference.config.vocab_size:
        reference.resize_token_embeddings(opened.config.vocab_size, mean_resizing=False)
    theirs = PeftModel.from_pretrained(reference, tmp_path / "whole" / "adapter").eval()
    ids = torch.tensor([[3, 9, opened.config.vocab_size - 1, opened.config.vocab_size - 2, 5]])
    with torch.no_grad():
        assert (opened.logits(opened(ids)) - theirs(ids).logits).abs().max() < 1e-4
    out = tmp_path / "merged"
    assert merge.main([str(tmp_path / "whole"), "--out", str(out), "--dtype", "f32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    with torch.no_grad():
        assert (merged(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    if what == "tokens":
        for directory in (tmp_path / "whole" / "adapter", out):
            tokenizer = AutoTokenizer.from_pretrained(directory)
            found = tokenizer("x<|a|>y", add_special_tokens=False)["input_ids"]
            assert found[1] == tokenizer.convert_tokens_to_ids("<|a|>") == opened.config.vocab_size - 1
            assert tokenizer.decode(found, skip_special_tokens=True) == "xy"


def test_training_continues_from_an_adapter_with_its_shape(tmp_path: Path, capsys: Capture) -> None:
    make_chat_model(tmp_path / "base", "llama")
    data = write_records(tmp_path / "data.jsonl")
    first = train_run(tmp_path / "first", tmp_path / "base", data, model__add_tokens=TOKENS, lora__rank=3)
    adapter = load_file(first / "adapter" / "adapter_model.safetensors")
    again = {"lora__start_from": str(first), "lora__rank": 16, "lora__alpha": 32.0}  # 16 and 32 are the defaults
    second = train_run(tmp_path / "second", tmp_path / "base", data, **again, training__max_steps=1)
    begun = load_file(second / "checkpoints" / "step-000001" / "adapter.safetensors")
    config = json.loads((second / "config.json").read_text())
    assert config["lora"]["rank"] == 3
    assert ChatTokenizer(second / "adapter").tokenizer.token_to_id("<|a|>") is not None
    assert re.fullmatch("[0-9a-f]{64}", config["provenance"]["start_sha256"])
    rows = next(name for name in adapter if "embed_tokens" in name)
    assert begun.keys() == adapter.keys()
    # After one step of AdamW each number is at most about its learning rate away.
    assert all((begun[name] - tensor).abs().max() < 0.02 for name, tensor in adapter.items())
    assert adapter[rows].shape == (2, 32)
    capsys.readouterr()
    for changes, said in [
        ({"lora__rank": 4}, f"lora.rank: 4: {first} has 3, which cannot be changed: remove lora.rank"),
        ({"lora__init": "pissa"}, "lora.init: pissa: conflicts with lora.start_from="),
        ({"model__add_tokens": ("<|b|>",)}, f"model.add_tokens: {first} has its own tokens"),
        ({"training__method": "full"}, "needs training.method=lora"),
    ]:
        with pytest.raises(AssertionError):
            train_run(tmp_path / "third", tmp_path / "base", data, **{**again, **changes})
        assert said in capsys.readouterr().err
    make_chat_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(AssertionError):
        train_run(tmp_path / "third", tmp_path / "other", data, **again)
    assert "was not trained on" in capsys.readouterr().err
