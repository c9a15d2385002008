"""Settings: what is accepted, what is refused in one line, and which source wins."""

from __future__ import annotations

import dataclasses
import json
import os
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
    ModelConfig,
    OutputConfig,
    QuantizationConfig,
    SystemConfig,
    TrainingConfig,
)
from nanoft.config.loading import load_config, load_file, run_name
from nanoft.config.resume import check_same_run, first_difference
from nanoft.config.settings import config_warnings

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


# --- values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora.rank": 4.0}, "lora.rank: 4.0 is not a whole number"),
        ({"lora.rank": True}, "lora.rank: True is not a whole number"),
        ({"training.learning_rate": True}, "training.learning_rate: True is not a finite number"),
        ({"training.learning_rate": float("nan")}, "nan is not a finite number"),
        ({"training.learning_rate": float("inf")}, "inf is not a finite number"),
        ({"training.learning_rate": 10**400}, "is not a finite number"),
        ({"training.learning_rate": "nan"}, "nan is not a finite number"),
        ({"training.learning_rate": "fast"}, "'fast' is not a finite number"),
        ({"data.packing": 1}, "data.packing: 1 is not true or false"),
        ({"data.packing": "yes"}, "'yes' is not true or false"),
        ({"model.name": None}, "model.name: None is not a text"),
        ({"model.dtype": "float16"}, "'float16' is not one of auto, float32, bfloat16"),
        ({"quantization.bits": 3}, "quantization.bits: 3 is not one of 4, 8, 16"),
        ({"quantization.bits": 4.0}, "quantization.bits: 4.0 is not one of 4, 8, 16"),
        ({"lora.target_modules": ["q_proj", 1]}, "is not a list of names"),
        ({"training.max_steps": "1.5"}, "'1.5' is not a whole number or none"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(change: dict[str, Any], message: str) -> None:
    refused(lambda: Config().override(change), message)


def test_a_section_checks_itself_when_it_is_made() -> None:
    refused(lambda: LoRAConfig(rank="8"), "lora.rank: '8' is not a whole number")  # type: ignore[arg-type]
    refused(lambda: LoRAConfig(target_modules=["q_proj"]), "is not a list of names")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lora.rank = 4  # type: ignore[misc]


def test_a_whole_number_is_a_number() -> None:
    assert Config().override({"lora.alpha": 8}).lora.alpha == 8


@pytest.mark.parametrize(
    ("name", "low", "high", "step"),
    [
        ("lora.rank", 1, 4096, 1),
        ("lora.dropout", 0.0, 0.99, 0.001),
        ("data.validation_split", 0.0, 0.9, 0.001),
        ("training.warmup_ratio", 0.0, 1.0, 0.001),
        ("training.beta2", 0.0, 0.99999, 0.00001),
        ("system.seed", 0, 2**32 - 1, 1),
    ],
)
def test_both_ends_of_a_range_are_in_it_and_nothing_beyond(name: str, low: float, high: float, step: float) -> None:
    for value in (low, high):
        Config().override({name: value})
    for value in (low - step, high + step):
        refused(lambda value=value: Config().override({name: value}), f"{name}: {value} is out of range")


def test_a_range_without_an_upper_end_says_so() -> None:
    refused(lambda: Config().override({"training.max_steps": 0}), "it must be >= 1")
    assert Config().override({"training.max_steps": None}).training.max_steps is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.learning_rat", "did you mean training.learning_rate?"),
        ("trainig.max_steps", "trainig.max_steps: no such section: did you mean training?"),
        ("learning_rate", "did you mean training.learning_rate?"),
        ("lora.zzzz", "no such field: there are rank, alpha, dropout, target_modules"),
        ("zzzz.rank", "no such section: there are model, lora,"),
        ("lora.rank.x", "lora.rank.x: no such field"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(key: str, message: str) -> None:
    refused(lambda: Config().override({key: "1"}), message)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.learning_rate", "2e-4", 2e-4),
        ("training.max_steps", "20", 20),
        ("training.max_steps", "none", None),
        ("data.validation_file", "", None),
        ("data.packing", "True", True),
        ("quantization.bits", "4", 4),
        ("lora.target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("lora.target_modules", "[q_proj,v_proj]", ("q_proj", "v_proj")),
        ("lora.target_modules", "attention", ("attention",)),
        ("lora.target_modules", "all-linear", Config().lora.target_modules),
        ("lora.target_modules", r".*\.(q|v)_proj", (r".*\.(q|v)_proj",)),
        ("lora.target_modules", "[qv]_proj", ("[qv]_proj",)),
        ("lora.target_modules", r"layers\.\d{1,2}\.mlp\..*", (r"layers\.\d{1,2}\.mlp\..*",)),
        ("lora.rank_pattern", "{q_proj: 8, 'layers.0.*': 4}", {"q_proj": 8, "layers.0.*": 4}),
        ("lora.alpha_pattern", "{q_proj: 8.5}", {"q_proj": 8.5}),
        ("model.name", "none", "none"),  # a text that may not be missing is taken as it stands
    ],
)
def test_a_text_is_read_as_the_type_of_its_field(key: str, text: str, value: Any) -> None:
    section, name = key.split(".")
    config = Config().override({"data.packing": False, "training.max_steps": 3, "data.validation_file": "v", key: text})
    found = getattr(getattr(config, section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.method": "full", "quantization.bits": 4}, "quantization.bits: 4 needs a frozen base"),
        ({"model.random_init": True}, "model.random_init: adapters cannot train random weights"),
        (
            {"training.method": "full", "training.lora_plus_ratio": 4.0},
            "training.lora_plus_ratio: lora_plus_ratio needs training.method=lora",
        ),
        ({"lora.target_modules": ()}, "lora.target_modules: empty"),
        ({"lora.target_modules": ""}, "lora.target_modules: empty"),
        ({"lora.target_modules": r".*\.(q_proj"}, "lora.target_modules: '.*\\\\.(q_proj' is not a regular expression"),
        ({"lora.rank_pattern": {"q_proj": 0}}, "lora.rank_pattern: 0 is out of range: it must be between 1 and 4096"),
        ({"lora.rank_pattern": {"q_proj": 2.0}}, "lora.rank_pattern: {'q_proj': 2.0} is not a table"),
        ({"lora.rank_pattern": {1: 2}}, "lora.rank_pattern: {1: 2} is not a table"),
        ({"lora.alpha_pattern": {"q_proj": 0}}, "lora.alpha_pattern: 0 is out of range: it must be >= 1e-06"),
        ({"lora.alpha_pattern": {"*": 1}}, "lora.alpha_pattern: '*' is not a regular expression"),
        ({"lora.init": "pissa", "lora.rank": 2049}, "lora.init: pissa is saved as LoRA of twice the rank"),
        ({"lora.init": "pissa", "lora.rank_pattern": {"q": 4000}}, "lora.init: pissa is saved as LoRA of twice the"),
        (
            {"data.train_file": "a.jsonl", "data.validation_file": "a.jsonl"},
            "data.validation_file: equals data.train_file",
        ),
    ],
)
def test_sections_that_cannot_work_together_are_refused(changes: dict[str, Any], message: str) -> None:
    refused(lambda: Config().override(changes), message)


def test_both_halves_of_a_rule_may_change_at_once() -> None:
    config = Config(quantization=QuantizationConfig(bits=4))
    changed = config.override({"training.method": "full", "quantization.bits": 16, "model.random_init": True})
    assert (changed.training.method, changed.quantization.bits) == ("full", 16)
    assert config.training.method == "lora"  # the original is untouched


def test_the_effective_batch_is_rows_times_micro_batches() -> None:
    training = TrainingConfig(micro_batch_size=3, gradient_accumulation_steps=5)
    assert Config(training=training).effective_batch_size() == 15


# --- files


def test_to_dict_survives_json_and_comes_back_equal() -> None:
    config = Config().override(DIFFERENT)
    tree = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(tree) == config
    defaults = Config().to_dict()
    assert all(tree[section] != defaults[section] for section in tree)
    assert Config.from_dict({}) == Config()


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
    "nothing.py": ("x = 1", "defines no `config`"),
    "table.py": ("config = {'lora': {'rank': 4}}", "defines no `config`"),
    "import.py": ("import no_such_module_at_all", "ModuleNotFoundError"),
    "name.py": ("config = Confg()", "NameError"),
    "field.py": ("from nanoft.config import *\nconfig = Config(lora=LoRAConfig(rnk=4))", "rnk"),
    "value.py": (
        "from nanoft.config import *\nconfig = Config(lora=LoRAConfig(rank=0))",
        "lora.rank: 0 is out of range",
    ),
    "key.py": ("import os\nconfig = os.environ['NO_SUCH_VARIABLE']", "KeyError: 'NO_SUCH_VARIABLE'"),
    "lines.py": ("raise ValueError('first\\nsecond')", "ValueError: first second"),
    "bad.yaml": ("model: [1", "not valid YAML"),
    "tabs.yaml": ("model:\n\tname: x", "not valid YAML"),
    "list.yaml": ("- 1", "expected a table of sections"),
    "empty.yaml": ("", "expected a table of sections"),
    "section.yaml": ("lora: 4", "lora: 4 is not a table of fields"),
    "typo.yaml": ("lorra: {rank: 4}", "did you mean lora?"),
    "number.yaml": ("1: {rank: 4}", "1: no such section"),
    "field_number.yaml": ("lora: {1: 4}", "lora.1: no such field"),
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
    refused(lambda: load_file(tmp_path / "c.yaml"), str(tmp_path / "c.yaml"), "not valid YAML")
    refused(lambda: load_file(tmp_path / "d.yaml"), str(tmp_path / "d.yaml"), "no such config file")
    refused(lambda: load_file(tmp_path), str(tmp_path), "no such config file")


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


def test_the_environment_of_the_process_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "lora: {rank: 4}")
    code = f"from nanoft.config.loading import load_config; print(load_config({str(file)!r}).lora.rank)"
    environment = {**os.environ, "NANOFT_LORA__RANK": "5"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "5"


def test_mistakes_in_overrides_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "lora: {rank: 4}")
    refused(lambda: load_config(file, ["lora.rank"], {}), "'lora.rank' is not section.field=value")
    refused(lambda: load_config(file, ["=3"], {}), "no such section")
    refused(lambda: load_config(file, [], {"NANOFT_LORA__RNK": "3"}), "lora.rnk", "did you mean lora.rank?")
    refused(lambda: load_config(file, [], {"NANOFT_LORA_RANK": "3"}), "NANOFT_LORA_RANK", "two underscores")
    assert load_config(file, ["model.name=a=b"], {}).model.name == "a=b"


def test_the_run_directory_is_named_after_the_config_and_the_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "lora: {rank: 4}")
    assert load_config(file, [], {}).output.dir == "runs/mine"
    changed = load_config(file, ["lora.rank=8"], {}).output.dir
    assert changed.startswith("runs/mine-")
    assert changed == load_config(file, [], {"NANOFT_LORA__RANK": "8"}).output.dir  # wherever it came from
    assert changed != load_config(file, ["lora.rank=9"], {}).output.dir
    assert load_config(file, ["lora.rank=8", "output.dir=there"], {}).output.dir == "there"


def test_a_run_name_depends_on_what_changes_the_result_only() -> None:
    assert run_name("a/b.py", {}) == "b"
    assert run_name("a/b.py", {"logging.progress_bar": "false", "output.dir": "x"}) == "b"
    one, two = {"lora.rank": "8", "system.seed": "1"}, {"system.seed": "1", "lora.rank": "8"}
    assert run_name("b.py", one) == run_name("b.py", two) == run_name("b.py", {**one, "logging.show_example": "true"})
    assert run_name("b.py", one) != run_name("b.py", {"lora.rank": "8"})


# --- going on with a run


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("training.learning_rate", 1e-3, "training.learning_rate: 0.0002 -> 0.001"),
        ("system.seed", 1, "system.seed: 0 -> 1"),
        ("lora.target_modules", ("q_proj",), "lora.target_modules"),
        ("training.optimizer", "sgd", "training.optimizer: adamw -> sgd"),
        ("training.momentum", 0.5, "training.momentum: 0.9 -> 0.5"),
        ("training.lora_plus_ratio", 16.0, "training.lora_plus_ratio: 1.0 -> 16.0"),
        ("training.lr_power", 2.0, "training.lr_power: 1.0 -> 2.0"),
        ("training.max_steps", 9, None),
        ("training.num_epochs", 9, None),
        ("quantization.dequantize", "cached", None),
        ("training.save_steps", 9, None),
        ("output.dir", "elsewhere", None),
        ("evaluation.prompts", 9, None),
        ("evaluation.max_samples", 9, "evaluation.max_samples: None -> 9; the best loss so far"),
        ("logging.progress_bar", False, None),
    ],
)
def test_only_what_leaves_the_steps_taken_as_they_are_may_change(key: str, value: Any, difference: str | None) -> None:
    found = first_difference(Config(), Config().override({key: value}))
    assert found is None if difference is None else found is not None and found.startswith(difference)


def test_another_run_is_refused_by_its_first_difference() -> None:
    config, provenance = Config(output=OutputConfig(dir="d")), {"data_sha256": "1", "base_sha256": "2"}
    recorded = {**config.to_dict(), "provenance": {**provenance, "versions": {"torch": "1"}}}
    check_same_run(recorded, config, {**provenance, "versions": {"torch": "2"}}, "d")  # raises nothing
    other = Config(system=SystemConfig(seed=3), output=OutputConfig(dir="d"))
    refused(lambda: check_same_run(recorded, other, provenance, "d"), "output.dir: d: ", "system.seed: 0 -> 3")
    for key, what in (("data_sha256", "the data changed"), ("base_sha256", "the base model changed")):
        refused(lambda key=key: check_same_run(recorded, config, {**provenance, key: "9"}, "d"), what)
    refused(lambda: check_same_run(config.to_dict(), config, provenance, "d"), "the data changed")


# --- warnings


@pytest.mark.parametrize(
    ("fine", "doubtful", "message"),
    [
        ({"training.warmup_ratio": 0.2}, {"training.warmup_ratio": 0.21}, "warmup_ratio=0.21"),
        (
            {"training.warmup_steps": 20, "training.max_steps": 100},
            {"training.warmup_steps": 21, "training.max_steps": 100},
            "warmup_steps=21",
        ),
        (
            {"training.micro_batch_size": 2, "training.gradient_accumulation_steps": 2},
            {"training.micro_batch_size": 3, "training.gradient_accumulation_steps": 1},
            "effective batch size 3",
        ),
        ({"training.learning_rate": 5e-4}, {"training.learning_rate": 6e-4}, "learning_rate=0.0006"),
        (
            {"training.method": "full", "training.learning_rate": 1e-4},
            {"training.method": "full", "training.learning_rate": 2e-4},
            "learning_rate=0.0002",
        ),
    ],
)
def test_what_is_probably_not_meant_is_said(fine: dict[str, Any], doubtful: dict[str, Any], message: str) -> None:
    assert config_warnings(Config().override(fine)) == []
    (warning,) = config_warnings(Config().override(doubtful))
    assert message in warning


def test_a_setting_that_has_no_effect_is_not_warned_about() -> None:
    ratio_is_beaten = TrainingConfig(warmup_ratio=0.9, warmup_steps=0)
    from_scratch = TrainingConfig(method="full", learning_rate=2e-3)
    assert config_warnings(Config(training=ratio_is_beaten)) == []
    assert config_warnings(Config(training=TrainingConfig(optimizer="sgd", learning_rate=0.5))) == []
    assert config_warnings(Config(training=from_scratch, model=ModelConfig(random_init=True))) == []


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
            refused(lambda path=path: load_file(path), str(path), f"evaluation.metrics: {name}: would run code")
        else:
            assert load_file(path).evaluation.metrics == (name, "bleu")
    path = write(tmp_path / "config.json", json.dumps({**tree, "provenance": {}}))  # of a run: it goes on without
    assert load_file(path).evaluation.metrics == (("bleu",) if function else (name, "bleu"))
    given = load_config(path, [f"evaluation.metrics={name},bleu"], {"NANOFT_EVALUATION__METRICS": "other"})
    assert given.evaluation.metrics == (name, "bleu")


def test_windows_that_do_not_overlap_are_refused() -> None:
    change = {"evaluation.stride": 64, "model.max_seq_length": 64}
    refused(lambda: Config().override(change), "evaluation.stride: 64: windows of model.max_seq_length=64")
    assert Config().override({**change, "evaluation.stride": 63}).evaluation.stride == 63
