"""The end of a run: the result is saved even if the report fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Capture, Patch, equal, events, in_the_loop, one_line, quick, result, sentences, steps_are_all_there
from safetensors.torch import load_file

import eval as eval_command
import train
from nanoft.config import Config
from nanoft.objectives import OBJECTIVES, trains_score
from nanoft.objectives.preference import Preference
from nanoft.tracking import rank_usage
from nanoft.training import finalize
from tiny_models import make_chat_model, train_run, write_records


def test_a_best_checkpoint_that_was_damaged_is_told_and_the_last_one_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = {"training__early_stopping_threshold": 1e-9, "training__eval_steps": 2, "training__save_steps": 1}
    patience |= {"data__validation_file": sentences(tmp_path), "training__learning_rate": 5e-3}
    real = train.finalize

    def damaging(ctx: Any, state: Any, stop: Any) -> int:
        assert 0 < state.best_step < state.step
        (ctx.checkpoints.path(state.best_step) / "state.json").write_bytes(b"{}")
        return real(ctx, state, stop)

    monkeypatch.setattr(train, "finalize", damaging)
    assert train.main(quick(tmp_path / "run", **patience)) == 0
    assert "the result is the last checkpoint, not the best" in capsys.readouterr().out
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000008" / "adapter.safetensors")
    assert equal(result(tmp_path / "run"), saved)


def test_a_signal_while_the_report_is_made_ends_with_75_and_the_same_command_makes_it(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    measure = finalize.measure

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), 15)
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finalize, "measure", interrupted)
        assert train.main(quick(tmp_path / "run")) == train.STOPPED_BY_SIGNAL
    assert "stopped   by SIGTERM before the report" in capsys.readouterr().out
    assert not (tmp_path / "run" / "report.json").exists()
    before = (tmp_path / "run" / "checkpoints" / "step-000008").stat().st_ino
    assert train.main(quick(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "report.json").exists()
    steps_are_all_there(tmp_path / "run", 8)
    assert (tmp_path / "run" / "checkpoints" / "step-000008").stat().st_ino == before, (
        "what is there is not saved again"
    )


def test_a_last_step_that_diverges_is_no_result(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """No step follows that could be judged."""
    in_the_loop(monkeypatch, "learning_rate", lambda number, real, *args: 1e38 * real(*args))
    changes = {"training__learning_rate": 1.0, "training__max_steps": 1, "training__warmup_ratio": 0.0}
    assert train.main(quick(tmp_path / "run", **changes)) == 3
    assert "is not finite: lower training.learning_rate (1)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_ranks_that_cannot_be_computed_cost_no_report(tmp_path: Path, monkeypatch: Patch) -> None:
    def not_converging(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(rank_usage, "rank_report", not_converging)
    assert train.main(quick(tmp_path / "run")) == 0
    assert [w["what"] for w in events(tmp_path / "run")] == ["the adapters' report failed"]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["steps"] == 8


def test_a_base_that_cannot_be_measured_costs_no_report(tmp_path: Path, monkeypatch: Patch) -> None:
    def gone(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(finalize, "base_model", gone)
    assert train.main(quick(tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "perplexity" in report["tuned"]
    assert "perplexity" not in report.get("base", {})
    assert [w["what"] for w in events(tmp_path / "run")] == ["evaluation of the base failed"]


# --- runs on preferences


def write_pairs(path: Path, count: int = 32) -> Path:
    lines = [{"prompt": f"Say {n}.", "chosen": f"{n}, {n + 1}", "rejected": f"{n}!"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


ON_PREFERENCES = [name for name, objective in OBJECTIVES.items() if issubclass(objective, Preference)]
ON_PREFERENCES = [n for n in ON_PREFERENCES if not trains_score(Config().override({"training.objective": n}))]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a base, and of a run on it that preferences can start from."""
    directory = tmp_path_factory.mktemp("taught")
    make_chat_model(directory / "base", "llama")
    train_run(directory / "sft", directory / "base", write_records(directory / "data.jsonl"))
    return directory


@pytest.mark.parametrize("name", ON_PREFERENCES)
def test_a_run_on_preferences_is_compared_with_what_it_started_from(name: str, taught: Path, tmp_path: Path) -> None:
    """In its report, and by eval.py: as eval.py finds for that adapter on the same answers."""
    held_out = write_pairs(tmp_path / "held_out.jsonl", 8)
    pairs = [json.loads(line) for line in held_out.read_text().splitlines()]
    single = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (tmp_path / "single.jsonl").write_text("".join(json.dumps(line) + "\n" for line in single))
    (tmp_path / "general.txt").write_text("There is more to the world than numbers.")

    data = {"data__validation_file": str(held_out), "data__validation_split": 0.0, "data__leaks": "ignore"}
    data |= {"evaluation__general_file": str(tmp_path / "general.txt"), "lora__start_from": str(taught / "sft")}
    pairs_file = write_pairs(tmp_path / "pairs.jsonl")
    more = {"training__objective": name, "evaluation__metrics": ["token_f1"]}
    run = train_run(tmp_path / "run", taught / "base", pairs_file, **data, **more)
    report = json.loads((run / "report.json").read_text())
    assert {"stop_rate", "response_tokens", "token_f1", "general_perplexity"} <= report["tuned"].keys()
    assert ("pair_accuracy" in report["base"]) == (OBJECTIVES[name].learns == "pairs")
    assert report["answers"]["win_rate"]["low"] <= report["answers"]["win_rate"]["value"]
    (tmp_path / "figures").mkdir()

    def figures(source: Path, *arguments: Any) -> dict[str, Any]:
        out = tmp_path / "figures" / f"{source.name}.json"
        assert eval_command.main([str(source), *map(str, arguments), "--json", str(out)]) == 0
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    start = figures(taught / "sft", "--data", tmp_path / "single.jsonl", "evaluation.prompts=0")["tuned"]
    assert report["base"]["target_tokens"] == start["target_tokens"]
    assert report["base"]["loss"] == pytest.approx(start["loss"], rel=1e-5)
    assert report["tuned"]["loss"] != pytest.approx(start["loss"], rel=1e-3)
    again = figures(run, "--compare-base")
    for which in ("base", "tuned"):
        assert again[which] == pytest.approx(report[which], rel=1e-5)
    last = events(run, "eval")[-1]
    assert ("kl_per_token" in last) == OBJECTIVES[name].uses_reference
    assert last.get("kl_per_token", 1.0) > 0


def test_a_general_file_that_cannot_be_read_is_found_before_training(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    assert train.main(quick(tmp_path / "run", evaluation__general_file=tmp_path / "empty.txt")) == 2
    assert "evaluation.general_file: " in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
