"""Each check on right and wrong data, templates and heads; and what a run prints, tries and refuses first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import NO_EVALUATION, Capture, Patch, copy_base, in_the_loop, nan_in, no_memory, quick, refused
from templates import CONTROL

import train
from nanoft import batches
from nanoft.config import DataConfig
from nanoft.config.loading import load_file
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets
from nanoft.models.model_files import ModelFiles
from nanoft.models.weights import load_model
from nanoft.runtime.device import Machine
from nanoft.training import preflight
from nanoft.training.memory_plan import Planner
from nanoft.training.preflight import check_disk, check_head, check_room, rehearse_save
from tiny_models import make_chat_model, write_records

ROOT = Path(__file__).parents[2]


def build(path: Path, chat: ChatTokenizer, count: int = 20, limit: int = 512, **settings: Any) -> PreparedDataset:
    records = [{"prompt": f"Question {n} {'x ' * n}", "completion": f"Answer {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return build_datasets(DataConfig(train_file=str(path), validation_split=0.0, **settings), chat, limit, 0, print)


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (0.0, False), (0.05, False), (30.0, False), (0.5, True)])
def test_the_row_of_the_stop_token(tmp_path: Path, factor: float, passed: bool) -> None:
    make_chat_model(tmp_path / "model")
    model = load_model(tmp_path / "model", torch.device("cpu"), torch.float32).requires_grad_(False)
    chat = ChatTokenizer(tmp_path / "model")
    corpus = build(tmp_path / "d.jsonl", chat)
    row = CONTROL.index("<|im_end|>")
    with torch.no_grad():
        others = model.head.norm(dim=1).median()
        model.head[row] *= factor * others / model.head[row].norm()
    check = check_head(model, chat, corpus.training)
    assert check.passed is passed
    assert f"'<|im_end|>': {factor:.2f}" in check.found
    assert check_head(model.requires_grad_(), chat, corpus.training).passed  # a head that trains can learn to stop


def test_rows_that_only_fill_up_the_vocabulary_do_not_count(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "model")
    model = load_model(tmp_path / "model", torch.device("cpu"), torch.float32).requires_grad_(False)
    chat = ChatTokenizer(tmp_path / "model")
    corpus = build(tmp_path / "d.jsonl", chat)
    with torch.no_grad():
        model.head[len(model.head) // 2 :] = 0  # not the row of the stop token
        median = model.head[: len(model.head) // 2].norm(dim=1).median()
    row = model.head[CONTROL.index("<|im_end|>")].norm()
    assert f"'<|im_end|>': {row / median:.2f}" in check_head(model, chat, corpus.training).found


def test_room_on_the_disk(tmp_path: Path) -> None:
    assert check_disk(tmp_path, 1000, 3).passed
    check = check_disk(tmp_path, 10**15, 3)
    assert not check.passed
    assert "5000000.00 GB more for 5 checkpoints" in check.found
    (tmp_path / "checkpoint").write_bytes(bytes(4_000_000))
    assert "0.00 GB more for 5 checkpoints" in check_disk(tmp_path, 800_000, 3).found


def test_a_rehearsed_save_counts_the_weights_and_the_state_of_the_optimizer(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(1_000_000)}  # 4 MB
    moments = {"w.state1": torch.zeros(1_000_000, dtype=torch.uint8), "w.absmax1": torch.zeros(500_000)}  # 3 MB
    assert "0.02 GB more for 4 checkpoints" in rehearse_save(tmp_path, weights, {}, 2).found
    assert "0.03 GB more for 4 checkpoints" in rehearse_save(tmp_path, weights, moments, 2).found
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_has_no_room_is_refused_before_its_weights_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of 10^12 parameters that consists of config.json only."""
    make_chat_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    path = tmp_path / "base" / "config.json"
    large = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 20}
    path.write_text(json.dumps({**json.loads(path.read_text()), **large}))
    records = write_records(tmp_path / "data.jsonl")
    own = [f"model.name={path.parent}", f"data.train_file={records}", f"output.dir={tmp_path / 'run'}"]
    arguments = [str(ROOT / "configs" / "tiny.py"), "system.device=cpu", "lora.rank=1", *own]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.match(
        r"error: preflight: room: the model alone takes at least [\d.]+ GB, and [\d.]+ GB are available", error
    )
    assert ": set quantization.bits=4 (saves about " in error
    assert error.endswith("(or --force room)\n")
    assert not (tmp_path / "run").exists()
    for more in (["--force", "room"], ["--show-batch"]):  # the latter loads none
        assert train.main([*arguments, *more]) == 2
        assert "no weights here" in capsys.readouterr().err


def test_a_row_that_has_no_room_is_refused() -> None:
    config = load_file(ROOT / "configs" / "tiny.py").override({"system.device": "cpu", "model.max_seq_length": 10**9})
    planner = Planner.of(config, Machine.detect(config), ModelFiles.find(config.model.name).decoder)
    assert check_room(planner).passed
    assert check_room(planner, 1024).passed
    check = check_room(planner, 10**9)
    assert not check.passed
    assert check.found.startswith("the model and a sequence of 1,000,000,000 tokens take ")
    assert check.fix.startswith("set model.max_seq_length=500000000 (saves about ")


# --- in a run


def test_show_batch_prints_the_first_window_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*quick(tmp_path / "run"), "--show-batch"]) == 0
    out = capsys.readouterr().out
    assert "micro-batch 1: 4x" in out
    assert "micro-batch 2: 4x" in out
    assert out.count("[INST]") >= 8
    assert out.count("conversations.jsonl:") >= 8  # where each of them stands
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train.main(quick(tmp_path / "run")) == 0  # and is no obstacle to the run itself


def test_show_step_names_the_records_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the loop itself: a window whose loss is not finite says which records it had."""
    arguments = quick(tmp_path / "run", training__max_steps=6)
    assert train.main(arguments) == 0
    seen: list[list[int]] = []
    step = batches.Batches.next_window

    def watch(*args: Any) -> batches.Window:
        window = step(*args)
        seen.append(sorted(record for batch in window for record in batch.records))
        return window

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.Batches, "next_window", watch)
        assert train.main(quick(tmp_path / "again", training__max_steps=6)) == 0
    for number in (1, 5, 6):  # the fifth window is the first of the second epoch, with 36 records in windows of 8
        capsys.readouterr()
        assert train.main([*arguments, "--show-step", str(number)]) == 0
        out = capsys.readouterr().out
        places = sorted(int(line) - 1 for line in re.findall(r"conversations\.jsonl:(\d+), ", out))
        assert places == seen[number - 1]
    refused([*arguments, "--show-step", "0"], ["--show-step: 0"], capsys)


def test_windows_that_were_left_out_do_not_count_in_show_step(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Windows 5 to 7 are bad; from the checkpoint of step 3 it goes on with 3 and 4, then 8: of what is step 6 made?"""
    in_the_loop(monkeypatch, "accumulate", nan_in(6, 7, 8))
    changes = {"guard__max_skips": 3, "training__lr_scheduler": "constant"}
    arguments = quick(tmp_path / "run", **NO_EVALUATION, **changes)
    assert train.main(arguments) == 0
    assert "rolled back from step 5 to the checkpoint of step 3" in capsys.readouterr().out
    for step, window in ((4, 3), (5, 4), (6, 8), (8, 10)):
        assert train.main([*arguments, "--show-step", str(step)]) == 0
        place = f"step {step}: window {window % 5 + 1} of 5 in epoch {window // 5 + 1}"
        assert place in capsys.readouterr().out


def test_in_how_many_pairs_the_chosen_answer_is_the_likelier_one(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """Compared with log-softmax over all logits of each sample; and no random number is drawn."""
    ends = [("!", "."), (".", "!"), (" now.", ".")]
    answers = [[f"Play Moon {n}{end}" for end in ends[n % 3]] for n in range(30)]
    made = [
        json.dumps({"prompt": f"Play {n}.", "chosen": good, "rejected": bad}) for n, (good, bad) in enumerate(answers)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(made))
    check, seen = preflight.check_preferences, []

    def checked(ctx: Any) -> Any:
        before = torch.get_rng_state()
        found = check(ctx)
        assert torch.equal(torch.get_rng_state(), before)
        likelihoods = []
        for sample in ctx.corpus.training:
            ids = torch.from_numpy(sample.ids).long()
            with torch.no_grad():
                hidden = ctx.model(ids[None], None, None, torch.arange(len(ids)))
            logps = (hidden.reshape(len(ids), -1) @ ctx.model.head.T).log_softmax(-1)
            each = logps[:-1].gather(1, ids[1:, None])[:, 0]
            likelihoods.append(each[torch.from_numpy(sample.is_target)[1:]].sum().item())
        seen.append(
            (sum(a > b for a, b in zip(likelihoods[::2], likelihoods[1::2], strict=True)), len(likelihoods) // 2)
        )
        return found

    monkeypatch.setattr(preflight, "check_preferences", checked)
    data = {"data__train_file": tmp_path / "pairs.jsonl", "data__validation_split": 0, "evaluation__batch_size": 4}
    assert train.main([*quick(tmp_path / "run", training__objective="dpo", **data), "--preflight"]) == 0
    ((right, count),) = seen
    assert 0 < right < count == 30
    out = capsys.readouterr().out
    said = f"before training, the chosen answer is more likely in {right} of {count} pairs"
    assert re.search(rf"preflight pairs +ok +{said}", " ".join(out.split()))


def test_preflight_alone_trains_nothing_and_shows_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = quick(tmp_path / "run")
    assert train.main([*arguments, "--preflight"]) == 0
    out = capsys.readouterr().out
    names = re.findall(r"^preflight (\w+) +ok ", out, re.MULTILINE)
    assert names == ["stop", "bos", "targets", "head", "batch", "eval", "disk"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    shown = (tmp_path / "run" / "preview.txt").read_text()
    assert re.findall(r"^==== (\w+): ", shown, re.MULTILINE) == ["shortest", "longest", *["random"] * 3]
    assert train.main(quick(tmp_path / "run", lora__rank=2)) == 0  # what took no step can still be changed


def test_a_check_that_fails_stops_the_run_unless_it_is_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(base: Path) -> None:
        settings = json.loads((base / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
        (base / "tokenizer_config.json").write_text(json.dumps(settings))

    arguments = quick(tmp_path / "run", model__name=copy_base(tmp_path, endless), training__max_steps=1)
    refused(arguments, ["preflight: stop: 0 of ", "eos_token_id", "--force stop"], capsys)
    assert not (tmp_path / "run").exists()
    assert train.main([*arguments, "--force", "stop"]) == 0
    assert "preflight stop      FAIL" in capsys.readouterr().out


def test_out_of_memory_at_the_rehearsal_halves_too(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    rehearse, calls = preflight.rehearse, [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        return no_memory() if calls[0] == 1 else rehearse(*args)

    monkeypatch.setattr(preflight, "rehearse", failing)
    assert train.main(quick(tmp_path / "run")) == 0
    assert "with micro-batch size 4: retrying with 2" in capsys.readouterr().out
