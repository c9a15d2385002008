"""Tests of nanoft/config/loading.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoft import UserError
from nanoft.config import (
    Config,
    DataConfig,
    LoRAConfig,
    TrainingConfig,
)
from nanoft.config.loading import load_config, load_file, run_name

DIFFERENT = {  # something else than the default in every section
    "model.name": "some/model",
    "lora.target_modules": ("q_proj", "v_proj"),
    "lora.alpha": 8.0,
    "quantization.bits": 4,
    "data.validation_file": "held_out.jsonl",
    "data.max_samples": 7,
    "training.learning_rate": 1e-5,
    "guard.max_skips": 2,
    "output.dir": "runs/x",
    "logging.progress_bar": False,
    "system.seed": 2**32 - 1,
    "evaluation.max_samples": 3,
    "evaluation.metrics": ("token_f1", "max_words:3"),
}


def refused(action: Callable[[], Any], *parts: str) -> None:
    """The action raises a UserError of one line that contains every part."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_config_json_of_a_run_loads_back_equal(tmp_path: Path) -> None:
    config = Config().override(DIFFERENT)
    tree = {**config.to_dict(), "provenance": {"data_sha256": "0", "versions": {"torch": "2"}}}
    assert load_config(write(tmp_path / "config.json", json.dumps(tree)), [], {}) == config


@pytest.mark.parametrize("suffix", ["py", "yaml", "yml", "json"])
def test_every_kind_of_file_says_the_same(suffix: str, tmp_path: Path) -> None:
    wanted = Config(
        training=TrainingConfig(learning_rate=2e-4, max_steps=None),
        lora=LoRAConfig(target_modules=("q_proj", "o_proj"), rank=4),
        data=DataConfig(packing=True),
    )
    yaml = """
        training: {learning_rate: 2e-4, max_steps: null}  # YAML 1.1 takes 2e-4 for a text
        lora:
          rank: 4
          target_modules: [q_proj, o_proj]
        data: {packing: true}
    """
    python = """
from nanoft.config import Config
config = Config().override({"training.learning_rate": 2e-4, "lora.rank": 4, "data.packing": True,
                            "lora.target_modules": ["q_proj", "o_proj"]})
"""
    text = {"py": python, "json": json.dumps(wanted.to_dict())}.get(suffix, yaml)
    assert load_file(write(tmp_path / f"c.{suffix}", text)) == wanted


def test_a_list_written_as_one_text_is_a_list(tmp_path: Path) -> None:
    assert load_file(write(tmp_path / "c.yaml", "lora: {target_modules: q_proj}")).lora.target_modules == ("q_proj",)
    assert load_file(write(tmp_path / "d.yaml", "lora: {}")).lora.target_modules == ("all-linear",)


BROKEN = {
    "syntax.py": ("x = 1\nconfig = (\n", "line 2"),
    "null.py": ("config = '\0'", "null bytes"),
    "nothing.py": ("x = 1", "does not define `config`"),
    "table.py": ("config = {'lora': {'rank': 4}}", "does not define `config`"),
    "import.py": ("import no_such_module_at_all", "ModuleNotFoundError"),
    "name.py": ("config = Confg()", "NameError"),
    "field.py": ("from nanoft.config import *\nconfig = Config(lora=LoRAConfig(rnk=4))", "rnk"),
    "value.py": (
        "from nanoft.config import *\nconfig = Config(lora=LoRAConfig(rank=0))",
        "lora.rank: 0 is out of range",
    ),
    "key.py": ("import os\nconfig = os.environ['NO_SUCH_VARIABLE']", "KeyError: 'NO_SUCH_VARIABLE'"),
    "exits.py": ("raise SystemExit(0)", "SystemExit: 0"),
    "many_digits.json": ('{"training": {"max_steps": 1' + "0" * 99 + "}}", "is not an integer (64 bits) or none"),
    "lines.py": ("raise ValueError('first\\nsecond')", "ValueError: first second"),
    "bad.yaml": ("model: [1", "not valid YAML"),
    "tabs.yaml": ("model:\n\tname: x", "not valid YAML"),
    "list.yaml": ("- 1", "expected a mapping of sections"),
    "empty.yaml": ("", "expected a mapping of sections"),
    "section.yaml": ("lora: 4", "lora: 4 is not a mapping of fields"),
    "typo.yaml": ("lorra: {rank: 4}", "did you mean lora?"),
    "number.yaml": ("1: {rank: 4}", "1: no such section"),
    "field_number.yaml": ("lora: {1: 4}", "lora.1: no such field"),
    "twice.yaml": (
        "lora: {rank: 4}\ndata: {}\nlora: {dora: true}",
        "line 3: 'lora' appears a second time, after line 1",
    ),
    "twice.json": ('{"lora": {"rank": 4,\n"rank": 8}}', "line 2: 'rank' appears a second time, after line 1"),
    "clock.yaml": ("training:\n  max_steps: 1:30", "line 2: 1:30 has different meanings in YAML 1.1 and 1.2"),
    "flat.yaml": ("model_name: x\neval_strategy: no", "line 2: no has different meanings in YAML 1.1 and 1.2"),
    "nan.yaml": ("training: {learning_rate: .nan}", "not a finite number"),
    "bomb.yaml": ("[" * 20_000, "not valid YAML"),
    "bad.json": ('{"lora": {"rank": 4},}', "not valid JSON"),
    "nan.json": ('{"training": {"learning_rate": NaN}}', "not a finite number"),
    "huge.json": ('{"lora": {"alpha": 1' + "0" * 400 + "}}", "not a finite number"),
    "bomb.json": ('{"a":' * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    text, message = BROKEN[name]
    refused(lambda: load_config(write(tmp_path / name, text), [], {}), str(tmp_path / name), message)


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: load_file(tmp_path / "c.yaml"), str(tmp_path / "c.yaml"), "not valid YAML", "UTF-16")
    refused(lambda: load_file(tmp_path / "d.yaml"), str(tmp_path / "d.yaml"), "no such config file")
    refused(lambda: load_file(tmp_path), str(tmp_path), "no such config file")


def test_toml_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[model]\nname = "some/model"\n')
    with pytest.raises(UserError) as raised:
        load_file(tmp_path / "c.toml")
    assert str(raised.value).startswith(f"{tmp_path}/c.toml: is TOML: convert it to JSON: python -c ")
    subprocess.run(str(raised.value).partition("JSON: ")[2].replace("python", sys.executable), shell=True, check=True)
    assert load_file(tmp_path / "c.json").model.name == "some/model"


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    text = f"model: !!python/object/apply:os.mkdir ['{proof}']"
    refused(lambda: load_file(write(tmp_path / "c.yaml", text)), "c.yaml", "python/object")
    assert not proof.exists()


# --- sources


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "training: {max_steps: 1, log_steps: 1, eval_steps: 1, save_steps: 1}")
    environment = {
        "NANOFT_TRAINING__LOG_STEPS": "2",
        "NANOFT_TRAINING__EVAL_STEPS": "2",
        "NANOFT_TRAINING__SAVE_STEPS": "2",
        "TRAINING__MAX_STEPS": "9",
    }
    t = load_config(file, ["training.eval_steps=3", " training.save_steps = 3 ", "training.save_steps=4"], environment)
    assert (t.training.max_steps, t.training.log_steps, t.training.eval_steps) == (1, 2, 3)
    assert t.training.save_steps == 4  # the last one


def test_mistakes_in_overrides_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "lora: {rank: 4}")
    refused(lambda: load_config(file, ["lora.rank"], {}), "'lora.rank' is not section.field=value")
    refused(lambda: load_config(file, ["=3"], {}), "no such section")
    refused(lambda: load_config(file, [], {"NANOFT_LORA__RNK": "3"}), "lora.rnk", "did you mean lora.rank?")
    for name in ("NANOFT_LORA_RANK", "NANOFT__RANK"):
        refused(lambda name=name: load_config(file, [], {name: "3"}), name, "two underscores")
    assert load_config(file, ["model.name=a=b"], {}).model.name == "a=b"


def test_the_run_directory_is_named_after_the_config_and_the_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "lora: {rank: 4}")
    assert load_config(file, [], {}).output.dir == "runs/mine"
    changed = load_config(file, ["lora.rank=8"], {}).output.dir
    assert changed.startswith("runs/mine-")
    assert load_config(file, [], {"NANOFT_LORA__RANK": "8"}).output.dir == "runs/mine"  # as on another machine
    assert load_config(file, ["lora.rank=8"], {"NANOFT_SYSTEM__DEVICE": "cpu"}).output.dir == changed
    assert changed != load_config(file, ["lora.rank=9"], {}).output.dir
    assert load_config(file, ["lora.rank=8", "output.dir=there"], {}).output.dir == "there"


@pytest.mark.parametrize("name", ["c.yaml", "c.json", "c.py"])
def test_a_config_may_begin_with_a_byte_order_mark(name: str, tmp_path: Path) -> None:
    python = "from nanoft.config import Config\nconfig = Config().override(lora={'rank': 4})"
    write(tmp_path / name, "\ufeff" + (python if name == "c.py" else '{"lora": {"rank": 4}}'))
    assert load_config(tmp_path / name, [], {}).lora.rank == 4


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "c.yaml", "model: {name: ~/base}\noutput: {dir: ~/run}")
    config = load_config("~/c.yaml", ["data.train_file=~/a.jsonl, ~/b.jsonl,c~d", "data.validation_file=none"], {})
    assert (config.model.name, config.output.dir) == (f"{tmp_path}/base", f"{tmp_path}/run")
    assert config.data.train_file == f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl,c~d"
    assert load_config("~/c.yaml", ["data.train_file=~nobody-of-this-name/a"], {}).data.train_file[0] == "~"


def test_the_config_of_a_copied_run_is_the_copys(tmp_path: Path) -> None:
    text = json.dumps({"output": {"dir": "first"}, "provenance": {}})
    (tmp_path / "copy").mkdir()
    write(tmp_path / "copy" / "metrics.jsonl", "")
    assert load_file(Path(write(tmp_path / "copy" / "config.json", text))).output.dir == str(tmp_path / "copy")
    assert load_file(Path(write(tmp_path / "alone.json", text))).output.dir == "first"


def test_a_run_name_depends_on_what_changes_the_result_only() -> None:
    assert run_name("b.py", {"data.train_file": "caf\udce9"}) != run_name("b.py", {"data.train_file": "cafe"})
    assert run_name("a/b.py", {}) == "b"
    assert run_name("a/b.py", {"logging.progress_bar": "false", "output.dir": "x"}) == "b"
    one, two = {"lora.rank": "8", "system.seed": "1"}, {"system.seed": "1", "lora.rank": "8"}
    assert run_name("b.py", one) == run_name("b.py", two) == run_name("b.py", {**one, "logging.show_example": "true"})
    assert run_name("b.py", one) != run_name("b.py", {"lora.rank": "8"})


def test_a_run_name_tells_base_data_and_method() -> None:
    changes = {"lora.rank": "8", "data.train_file": "~/my chats.jsonl.gz", "model.name": "Qwen/Qwen2.5-3B-Instruct"}
    name = run_name("auto.py", {**changes, "training.objective": "dpo"})
    assert re.fullmatch("auto-Qwen2.5-3B-Instruct-my-chats-dpo-[0-9a-f]{6}", name)
    assert run_name("b.py", {**changes, "data.train_file": "a/my chats.csv"}) != run_name("b.py", changes)
    odd = run_name("b.py", {"model.name": "..", "data.train_file": "data/*.csv,é\udce9/" + 300 * "x"})
    assert re.fullmatch("b-x{24}-[0-9a-f]{6}", odd)


# --- code that a config may ask for


@pytest.mark.parametrize("name", ["own.metric:score", "regex:own", "max_words:3", "own"])
def test_only_a_config_in_python_may_name_a_function(name: str, tmp_path: Path) -> None:
    function = name == "own.metric:score"
    python = f"from nanoft.config import *\nconfig = Config(evaluation=EvaluationConfig(metrics=({name!r},)))"
    assert load_file(write(tmp_path / "c.py", python)).evaluation.metrics == (name,)
    tree = {"evaluation": {"metrics": [name, "bleu"]}}
    for suffix in ("json", "yaml"):
        path = write(tmp_path / f"c.{suffix}", json.dumps(tree))
        if function:
            field = f"evaluation.metrics: {name}: a data file must not name code"
            refused(lambda path=path: load_file(path), str(path), field)
        else:
            assert load_file(path).evaluation.metrics == (name, "bleu")
    path = write(tmp_path / "config.json", json.dumps({**tree, "provenance": {}}))  # of a run: it goes on without
    assert load_file(path).evaluation.metrics == (("bleu",) if function else (name, "bleu"))
    given = load_config(path, [f"evaluation.metrics={name},bleu"], {"NANOFT_EVALUATION__METRICS": "other"})
    assert given.evaluation.metrics == (name, "bleu")
