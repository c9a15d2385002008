"""eval.py as a user runs it: the figures of the run's report and of transformers, and one line for each mistake."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from preferences import SAMPLING
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as command
import train
from nanoft.attention import SequenceContext
from nanoft.data.chat_tokenizer import ChatTokenizer
from tiny_models import make_chat_model, train_run, write_records

ROOT = Path(__file__).parent.parent
FEW = ["evaluation.prompts=4", "evaluation.max_new_tokens=8"]


def figures(*arguments: Any, out: Path) -> dict[str, Any]:
    """The content of --json after the command, which must succeed."""
    assert command.main([*map(str, arguments), "--json", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("name", ["lora", "qlora", "full"])
def test_a_run_measures_what_its_report_says(name: str, runs: Path, tmp_path: Path) -> None:
    reported = json.loads((runs / name / "report.json").read_text())
    measured = figures(runs / name, "--compare-base", out=tmp_path / "figures.json")
    for which in ("base", "tuned"):
        assert {"perplexity", "exact_match", "stop_rate"} <= measured[which].keys()
        assert measured[which] == pytest.approx(reported[which], rel=1e-5)
    assert measured["tuned"]["perplexity"] < measured["base"]["perplexity"]
    assert measured["verdict"].split(":")[0] == reported["verdict"].split(":")[0] == "better"
    assert measured["leakage"] == reported["leakage"]
    for key in ("base_sha256", "data_sha256", "date", "settings", "versions"):
        assert measured["provenance"][key] == reported["provenance"][key]
    alone = figures(runs / name, out=tmp_path / "alone.json")
    assert alone["tuned"] == measured["tuned"]
    assert "base" not in alone


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_reference_path_is_taken_for_base_and_tuned_if_asked_for(
    name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the kernels the figures are the same."""
    arguments = (runs / name, "--compare-base", *FEW)
    fast = figures(*arguments, out=tmp_path / "fast.json")
    contexts, measure = [], command.measure

    def recorded(config: Any, loaded: Any, *rest: Any) -> Any:
        contexts.append(loaded.model.context_class)
        return measure(config, loaded, *rest)

    monkeypatch.setattr(command, "measure", recorded)
    plain = figures(*arguments, "system.kernels=plain", out=tmp_path / "plain.json")
    assert contexts == [SequenceContext, SequenceContext]
    for which in ("base", "tuned"):
        assert plain[which] == pytest.approx(fast[which], rel=1e-5)


def test_the_base_of_a_full_run_that_is_gone_is_named_by_its_setting(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "full", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["name"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    assert command.main([str(run), "--compare-base", *FEW]) == 2
    assert capsys.readouterr().err.startswith(f"error: model.name: {tmp_path}/gone: no such directory")


def test_data_that_changed_since_is_noticed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, whole = runs / "data.jsonl", (runs / "data.jsonl").read_text()
    try:
        records.write_text(whole + '{"prompt": "new", "completion": "x"}\n')
        assert command.main([str(runs / "lora")]) == 2
        assert "its data changed after training" in capsys.readouterr().err
    finally:
        records.write_text(whole)
    monkeypatch.setenv("NANOFT_SYSTEM__SEED", "5")
    assert command.main([str(runs / "lora")]) == 2
    assert "another seed or data setting would change the split" in capsys.readouterr().err


def test_all_of_another_file_is_measured_whatever_the_run_left_out(tmp_path: Path, runs: Path) -> None:
    """A run with a label, a group and a limit of records; a file that has none of these."""
    lines = [{"prompt": f"Say {n}", "completion": f"{n}", "label": n % 4 > 0, "user": f"u{n % 7}"} for n in range(30)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"data__label_field": "label", "data__split_group": "user", "data__max_samples": 15}
    train_run(tmp_path / "run", runs / "base", tmp_path / "d.jsonl", **settings)
    plain = write_records(tmp_path / "plain.jsonl", 40)
    measured = figures(tmp_path / "run", "--data", plain, "evaluation.prompts=0", out=tmp_path / "figures.json")
    chat = ChatTokenizer(runs / "base")
    pairs = [json.loads(line) for line in plain.read_text().splitlines()]
    answers = [len(chat.tokenizer.encode(pair["completion"]).ids) + 1 for pair in pairs]
    assert measured["tuned"]["target_tokens"] == sum(answers)


@torch.no_grad()
def perplexity_of_transformers(directory: Path, records: Path) -> float:
    """Over answers and the token that ends them, one record at a time."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    nats = []
    for line in records.read_text().splitlines():
        record = json.loads(line)
        messages = [{"role": "user", "content": record["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{prompt}{record['completion']}<|im_end|>", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, len(head) - 1 : -1]
        nats.append(cross_entropy(logits, torch.tensor(ids[len(head) :]), reduction="none"))
    return math.exp(torch.cat(nats).double().mean())


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_plain_model_has_the_perplexity_of_transformers(batch_size: int, runs: Path, tmp_path: Path) -> None:
    arguments = (runs / "base", "--data", runs / "data.jsonl", f"evaluation.batch_size={batch_size}", *FEW)
    measured = figures(*arguments, out=tmp_path / "figures.json")
    assert "base" not in measured
    assert measured["tuned"]["prompts"] == 4
    assert measured["tuned"]["perplexity"] == pytest.approx(
        perplexity_of_transformers(runs / "base", runs / "data.jsonl"), rel=1e-5
    )


def test_other_data_and_overrides_are_used(runs: Path, tmp_path: Path) -> None:
    other = write_records(tmp_path / "other.jsonl", 7)
    own = figures(runs / "lora", out=tmp_path / "1.json")
    given = figures(runs / "lora", "--data", other, "evaluation.prompts=2", out=tmp_path / "2.json")
    assert (own["tuned"]["prompts"], given["tuned"]["prompts"]) == (4, 2)
    assert own["tuned"]["target_tokens"] != given["tuned"]["target_tokens"]
    none = figures(runs / "lora", "evaluation.prompts=0", out=tmp_path / "3.json")
    assert not {"exact_match", "stop_rate", "prompts"} & none["tuned"].keys()
    fewer = figures(runs / "lora", "evaluation.max_samples=2", out=tmp_path / "4.json")
    assert fewer["tuned"]["target_tokens"] < own["tuned"]["target_tokens"]


def test_answers_are_as_long_as_those_that_a_run_sampled(runs: Path, tmp_path: Path) -> None:
    changes = {**SAMPLING, "training__objective": "grpo", "rl__max_new_tokens": 9, "evaluation__max_new_tokens": 2}
    run = train_run(tmp_path / "run", runs / "base", runs / "data.jsonl", **changes)
    reported = json.loads((run / "report.json").read_text())["tuned"]
    measured = figures(run, out=tmp_path / "figures.json")["tuned"]
    for name in ("exact_match", "stop_rate", "response_tokens"):
        assert measured[name] == reported[name]


@pytest.mark.parametrize("name", ["label", "thumb"])
def test_labeled_answers_of_another_file(name: str, runs: Path, tmp_path: Path) -> None:
    """As a KTO run reads its own data, the field with another name named by data.label_field."""
    lines = [{"prompt": f"Say {n}", "completion": f"{n}", name: n % 3 > 0} for n in range(24)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"training__objective": "kto", "data__label_field": None if name == "label" else name}
    run = train_run(tmp_path / "run", runs / "base", tmp_path / "d.jsonl", **changes)
    measured = figures(run, "--data", tmp_path / "d.jsonl", "evaluation.prompts=24", out=tmp_path / "figures.json")
    assert measured["tuned"]["prompts"] == 16


def test_an_adapter_directory_compares_with_its_base(runs: Path, tmp_path: Path) -> None:
    whole = figures(runs / "lora", "--data", runs / "data.jsonl", "--compare-base", *FEW, out=tmp_path / "1.json")
    adapter = runs / "lora" / "adapter"
    alone = figures(adapter, "--data", runs / "data.jsonl", "--compare-base", *FEW, out=tmp_path / "2.json")
    assert [alone[which] for which in ("base", "tuned", "changes")] == [
        whole[which] for which in ("base", "tuned", "changes")
    ]
    assert "the model's training data is unknown" in alone["leakage"]["said"]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_that_has_not_ended_is_its_best_checkpoint(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = figures(runs / name, out=tmp_path / "1.json")
    shutil.copytree(runs / name, tmp_path / "run")
    for result in ("adapter", "model"):
        shutil.rmtree(tmp_path / "run" / result, ignore_errors=True)
    capsys.readouterr()
    assert figures(tmp_path / "run", out=tmp_path / "2.json")["tuned"] == expected["tuned"]
    assert "best checkpoint, after step 4" in capsys.readouterr().out


def test_the_command_prints_a_table_and_answers(runs: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "eval.py"), str(runs / "lora"), "--compare-base", "evaluation.samples=1"]
    done = subprocess.run([*line, "--json", str(tmp_path / "figures.json")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "| perplexity  ",
        "| exact match  ",
        "| stop rate  ",
        "verdict   ",
        " prompt: ",
        " wanted: ",
        "  tuned: ",
    ):
        assert done.stdout.count(part) == 1, done.stdout
    assert {"base", "tuned"} <= json.loads((tmp_path / "figures.json").read_text()).keys()


def test_an_infinite_perplexity_is_still_json(runs: Path, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "hopeless")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] *= 1e5
    save_file(tensors, tmp_path / "hopeless" / "model.safetensors")
    arguments = (tmp_path / "hopeless", "--data", runs / "data.jsonl", "evaluation.prompts=0")
    measured = figures(*arguments, out=tmp_path / "figures.json")
    assert "Infinity" not in (tmp_path / "figures.json").read_text()
    assert measured["tuned"]["perplexity"] is None
    assert measured["tuned"]["loss"] > 700


def test_the_environment_and_the_command_line_change_a_plain_model(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (runs / "base", "--data", runs / "data.jsonl", "evaluation.max_new_tokens=2")
    monkeypatch.setenv("NANOFT_EVALUATION__PROMPTS", "3")
    assert figures(*arguments, out=tmp_path / "1.json")["tuned"]["prompts"] == 3
    assert figures(*arguments, "evaluation.prompts=5", out=tmp_path / "2.json")["tuned"]["prompts"] == 5


def test_an_interrupt_ends_without_a_traceback(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupt)
    assert command.main([str(runs / "lora")]) == 130
    assert capsys.readouterr().err.count("\n") == 1


# --- breakdowns, forgetting, quantization, leakage, metrics


def perplexity_of(directory: Path, text: str, context: int) -> float:
    """Of the tokens of a plain text and its end, by transformers, through windows that overlap by half."""
    chat = ChatTokenizer(directory)
    (sample,) = chat.encode(iter([chat.text_sample(text, 0)]))
    model, ids = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager"), sample.ids.tolist()
    nats, counted = 0.0, 1
    for start in range(0, len(ids), context // 2):
        piece = torch.tensor([ids[start : start + context]])
        with torch.no_grad():
            nll = cross_entropy(model(piece).logits[0, :-1].double(), piece[0, 1:], reduction="none")
        nats += nll[counted - start - 1 :].sum().item()
        counted = start + len(piece[0])
        if counted == len(ids):
            break
    return math.exp(nats / (len(ids) - 1))


TEXT = "Whales sing. " * 60 + "And dolphins whistle, in the evening."


def test_a_long_text_is_measured_whole(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    arguments = (runs / "base", "--data", tmp_path / "text.jsonl", "model.max_seq_length=64")
    measured = figures(*arguments, out=tmp_path / "figures.json")
    assert measured["tuned"]["perplexity"] == pytest.approx(perplexity_of(runs / "base", TEXT, 64), rel=1e-4)
    other = figures(*arguments, "evaluation.stride=8", out=tmp_path / "8.json")
    assert other["tuned"]["target_tokens"] == measured["tuned"]["target_tokens"]
    assert other["tuned"]["perplexity"] != measured["tuned"]["perplexity"]


def test_windows_are_no_longer_than_the_learned_positions(tmp_path: Path) -> None:
    """Of GPT-2, with the default model.max_seq_length, which is longer."""
    make_family("gpt2", tmp_path / "base", max_position_embeddings=48)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = (tmp_path / "base", "--data", tmp_path / "text.jsonl", "--general", tmp_path / "text.txt")
    found = figures(*arguments, out=tmp_path / "figures.json")["tuned"]
    expected = perplexity_of(tmp_path / "base", TEXT, 48)
    assert [found["perplexity"], found["general_perplexity"]] == pytest.approx([expected] * 2, rel=1e-4)
    strides = ("evaluation.stride=500", "evaluation.stride=47")
    longest, same = (figures(*arguments, stride, out=tmp_path / "figures.json")["tuned"] for stride in strides)
    assert longest == same


def test_forgetting_is_probed_on_a_general_text(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "general.txt").write_text(TEXT)
    measured = figures(runs / "lora", "--general", tmp_path / "general.txt", out=tmp_path / "figures.json")
    expected = perplexity_of(runs / "base", TEXT, 256)
    assert measured["base"]["general_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert measured["tuned"]["general_perplexity"] != measured["base"]["general_perplexity"]
    rise = measured["tuned"]["general_perplexity"] / measured["base"]["general_perplexity"] - 1
    assert (rise > 0.05) == ("the model forgets" in capsys.readouterr().out)
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    again = figures(runs / "base", "--data", runs / "data.jsonl", "--general", tmp_path / "general.jsonl",
                    "model.max_seq_length=256", "evaluation.prompts=0", out=tmp_path / "2.json")  # fmt: skip
    assert again["tuned"]["general_perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_base_and_adapter_on_both_kinds_of_weights(name: str, runs: Path, tmp_path: Path) -> None:
    """The run's own kind must give its own figures; those of the other kind differ, but not by much."""
    own = figures(runs / name, "--compare-base", "evaluation.prompts=0", out=tmp_path / "own.json")
    found = figures(runs / name, "--quantization", out=tmp_path / "both.json")["quantization"]
    assert found.keys() == {"original", "nf4"}
    mine, other = ("original", "nf4") if name == "lora" else ("nf4", "original")
    for which in ("base", "tuned"):
        assert found[mine][which] == pytest.approx(own[which]["perplexity"], rel=1e-6)
        assert found[other][which] != found[mine][which]
        assert found[other][which] == pytest.approx(found[mine][which], rel=0.5)


def test_packing_in_place_is_loading_packed(runs: Path, tmp_path: Path) -> None:
    """Also for DoRA, whose adapters know the lengths of the base's rows."""
    settings = {"lora__dora": True, "model__dtype": "bfloat16"}
    run = train_run(tmp_path / "run", runs / "base", runs / "data.jsonl", quantization__bits=4, **settings)
    own = figures(run, "--compare-base", "evaluation.prompts=0", out=tmp_path / "own.json")
    found = figures(run, "--quantization", out=tmp_path / "both.json")["quantization"]
    assert found["nf4"] == {which: own[which]["perplexity"] for which in ("base", "tuned")}


def write_topics(path: Path, count: int = 24) -> Path:
    pairs = [json.loads(line) for line in write_records(path, count).read_text().splitlines()]
    for n, pair in enumerate(pairs):
        pair |= {"topic": ["odd", "even"][n % 2]} if n else {}
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_perplexity_by_a_field_of_the_records(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_topics(tmp_path / "topics.jsonl")
    few = ("evaluation.prompts=0",)
    whole = figures(runs / "lora", "--data", data, "--by", "topic", *few, out=tmp_path / "1.json")["by"]["topic"]
    assert {name: row["samples"] for name, row in whole.items()} == {"even": 12, "odd": 11, "(none)": 1}
    assert "| even   | 12 " in capsys.readouterr().out
    lines = data.read_text().splitlines()
    (tmp_path / "even.jsonl").write_text("\n".join(line for line in lines if "even" in line) + "\n")
    even = figures(runs / "lora", "--data", tmp_path / "even.jsonl", *few, out=tmp_path / "2.json")["tuned"]
    assert whole["even"]["tuned"] == pytest.approx(even["perplexity"], rel=1e-5)
    capsys.readouterr()
    assert command.main([str(runs / "lora"), "--data", str(data), "--by", "topics"]) == 2
    assert "topics: no record has this field: choose from prompt, completion, topic" in capsys.readouterr().err


def test_a_run_reports_by_field_and_by_the_metrics_of_its_config(runs: Path, tmp_path: Path) -> None:
    data = write_topics(tmp_path / "topics.jsonl")
    metrics = ["token_f1", "rouge_l", "max_words:5"]
    settings = {"evaluation__by_field": "topic", "evaluation__metrics": metrics}
    run = train_run(tmp_path / "run", runs / "base", data, **settings)
    reported = json.loads((run / "report.json").read_text())
    assert {"odd", "even"} <= reported["by"]["topic"].keys()
    assert {*metrics} <= reported["tuned"].keys()
    assert reported["answers"]["metric"] == "token_f1"
    assert "## Perplexity by topic" in (run / "report.md").read_text()
    measured = figures(run, out=tmp_path / "figures.json")
    assert measured["tuned"] == pytest.approx(reported["tuned"], rel=1e-5)
    assert command.main([str(run), "--compare-base", "--report", str(tmp_path / "report.md")]) == 0
    again, first = (
        place.read_text().partition("## Leakage")[0] for place in (tmp_path / "report.md", run / "report.md")
    )
    assert "### Worst answers" in again
    assert again.partition("## Perplexity")[2] == first.partition("## Perplexity")[2]


def test_prompts_that_were_trained_on_are_found(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = figures(runs / "lora", "--data", runs / "data.jsonl", "evaluation.prompts=0", out=tmp_path / "1.json")
    trained = json.loads((runs / "lora" / "report.json").read_text())["data"]["training"]["records"]
    assert (whole["leakage"]["prompts"], whole["leakage"]["exact"]) == (24, trained)
    assert f"of 24 prompts, {trained} occur verbatim in the training data" in capsys.readouterr().out
    fresh = tmp_path / "fresh.jsonl"
    fresh.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "completion": "A number."}) + "\n" for n in range(9))
    )
    found = figures(runs / "lora", "--data", fresh, "evaluation.prompts=0", out=tmp_path / "2.json")
    assert (found["leakage"]["exact"], found["leakage"]["near"]) == (0, 0)
    assert found["provenance"]["data_sha256"] != whole["provenance"]["data_sha256"]
    assert "warnings" not in found


OWN = "def half(answer, reference):\n    open('ran', 'w').close()\n    return 0.5\n"


def test_a_function_of_ones_own_runs_only_for_who_may_ask(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_half.py").write_text(OWN)
    metric = "evaluation.metrics=own_half:half"
    assert figures(runs / "lora", metric, out=tmp_path / "1.json")["tuned"]["own_half:half"] == 0.5
    shutil.copytree(runs / "lora", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    settings["evaluation"]["metrics"] = ["own_half:half", "contains"]
    path.write_text(json.dumps(settings))
    (tmp_path / "ran").unlink()
    measured = figures(tmp_path / "run", out=tmp_path / "2.json")["tuned"]  # a run from elsewhere asks for code
    assert "own_half:half" not in measured
    assert "contains" in measured
    assert not (tmp_path / "ran").exists()
    (tmp_path / "mine.json").write_text(json.dumps({"evaluation": {"metrics": ["own_half:half"]}}))
    capsys.readouterr()
    assert train.main([str(tmp_path / "mine.json")]) == 2
    assert "a data file must not name code to run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_an_unknown_metric_stops_training_before_anything_is_loaded(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model.name=" + str(runs / "base"), "data.train_file=" + str(runs / "data.jsonl")]
    assert train.main([*settings, "evaluation.metrics=blue", f"output.dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == ("error: evaluation.metrics: 'blue': no such metric: did you mean bleu?\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "lm_head.weight contains NaN or infinity"), (3e38, "its logits are inf: the weights are damaged")],
)
def test_a_model_with_broken_weights_is_one_line(
    value: float, message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "base", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["lm_head.weight"][5] = value
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    out = tmp_path / "figures.json"
    assert command.main([str(tmp_path / "broken"), "--data", str(runs / "data.jsonl"), *FEW, "--json", str(out)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


# --- mistakes


def data_without_targets(root: Path) -> Path:
    path = root / "masked.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return path


def empty_file(root: Path) -> Path:
    (root / "empty.jsonl").touch()
    return root / "empty.jsonl"


def broken_tokenizer(root: Path) -> Path:
    make_chat_model(root / "model")
    (root / "model" / "tokenizer.json").unlink()
    return root / "model"


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such run": (["runs/no-such"], "runs/no-such: no such run"),
    "no such directory": (["/no/such", "--data", "DATA"], "/no/such: no such directory"),
    "empty": (["", "--data", "DATA"], "empty"),
    "no data": (["BASE"], "base: a model, not a run, so there is no validation data: give --data FILE"),
    "missing data": (["BASE", "--data", "/no/data.jsonl"], "/no/data.jsonl"),
    "data of no use": (["BASE", "--data", "ROOT/base/config.json"], "config.json"),
    "data missing for a run": (["RUN", "--data", "/no/data.jsonl"], "/no/data.jsonl"),
    "no tokenizer": (["BROKEN", "--data", "DATA"], "tokenizer.json: no such file"),
    "not an override": (["BASE", "prompts", "--data", "DATA"], "'prompts' is not section.field=value"),
    "not an override of a run": (["RUN", "prompts"], "'prompts' is not section.field=value"),
    "unknown field": (["BASE", "evaluation.prompt=3", "--data", "DATA"], "did you mean evaluation.prompts?"),
    "unknown field of a run": (["RUN", "evaluation.prompt=3"], "did you mean evaluation.prompts?"),
    "out of range": (["RUN", "evaluation.batch_size=0"], "evaluation.batch_size: 0 is out of range"),
    "another rank": (["RUN", "lora.rank=3"], "lora.rank=3: cannot be changed here"),
    "another split": (["RUN", "data.validation_split=0.5"], "another seed or data setting would change the split"),
    "a filter of other data": (
        ["RUN", "--data", "DATA", "data.max_samples=3"],
        "data.max_samples=3: has no effect",
    ),
    "a label of other data": (
        ["BASE", "--data", "DATA", "data.label_field=x"],
        "data.label_field=x: has no effect",
    ),
    "another seed": (["RUN", "system.seed=5"], "another seed or data setting would change the split"),
    "another model": (["RUN", "model.name=x"], "model.name=x: cannot be changed here"),
    "json in no directory": (["RUN", "--json", "/no/such/figures.json"], "--json: /no/such/figures.json"),
    "json is a directory": (["RUN", "--json", "ROOT"], "--json: "),
    "no base to compare with": (["BASE", "--data", "DATA", "--compare-base"], "is a plain model"),
    "unknown metric": (["RUN", "evaluation.metrics=exact_matsch"], "did you mean exact_match?"),
    "metric of no module": (["RUN", "evaluation.metrics=no_module:f"], "ModuleNotFoundError"),
    "stride without overlap": (["RUN", "evaluation.stride=256"], "evaluation.stride: 256: windows of"),
    "no such general text": (["RUN", "--general", "/no/text.txt"], "--general: /no/text.txt: no such file"),
    "empty general text": (["RUN", "--general", "EMPTY"], "empty: it needs"),
    "no field": (["RUN", "--by", "topic"], "evaluation.by_field: topic: no record has this field"),
    "no adapter to put on other weights": (["ROOT/full", "--quantization"], "has no adapter"),
    "empty data": (["RUN", "--data", "EMPTY"], "empty: it needs"),
    "no targets": (["RUN", "--data", "MASKED"], "none of its messages is a target"),
    "nothing fits": (["RUN", "model.max_seq_length=8"], "model.max_seq_length"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(
    mistake: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    places = {
        "RUN": runs / "lora",
        "BASE": runs / "base",
        "DATA": runs / "data.jsonl",
        "ROOT": runs,
        "BROKEN": broken_tokenizer(tmp_path) if "BROKEN" in arguments else "",
        "EMPTY": empty_file(tmp_path),
        "MASKED": data_without_targets(tmp_path),
    }
    for name, place in places.items():
        arguments = [part.replace(name, str(place)) if name in part else part for part in arguments]
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert captured.out == ""
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_a_run_from_random_weights_has_no_base(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"training__method": "full", "training__learning_rate": 1e-3, "model__random_init": True}
    run = train_run(tmp_path / "run", runs / "base", runs / "data.jsonl", **changes)
    capsys.readouterr()
    assert command.main([str(run), "--compare-base"]) == 2
    assert "started from random weights" in capsys.readouterr().err
    assert command.main([str(run)]) == 0


def test_a_run_that_held_nothing_out_asks_for_data(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(tmp_path / "run", runs / "base", runs / "data.jsonl", data__validation_split=0.0)
    capsys.readouterr()
    assert command.main([str(run)]) == 2
    assert "has no validation data (data.validation_split=0): give --data FILE" in capsys.readouterr().err


def test_figures_that_cannot_be_written_at_the_end_are_an_error(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "replace_file", full_disk)
    assert command.main([str(runs / "lora"), "--json", str(tmp_path / "figures.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: --json: {tmp_path}/figures.json: cannot be written: No space left on device\n"
    assert "perplexity" in captured.out  # the work is not lost


def test_a_mistake_in_a_process_of_its_own_has_no_traceback(runs: Path) -> None:
    line = [sys.executable, str(ROOT / "eval.py"), str(runs / "base" / "model.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    assert left.value.code == 0
    assert "python eval.py runs/tiny --compare-base" in " ".join(capsys.readouterr().out.split())
