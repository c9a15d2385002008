"""README against the program: its commands run, its config loads, its field names and files exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanoft.config import SECTION_TYPES, Config, load_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
TEXTS = README + TOUR + DATA + EVALUATION + (ROOT / "docs" / "metal.md").read_text(encoding="utf-8")
PROGRAM = [*(ROOT / "nanoft").glob("*.py"), *ROOT.glob("*.py"), *(ROOT / "configs").glob("**/*.py")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("sh")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("python")]


def run(command: str, directory: Path, *more: str) -> str:
    """Run one of README's commands in another directory, as a user of this interpreter would."""
    words = shlex.split(command)
    assert words[0] == "python"
    placed = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words[1:]]
    done = subprocess.run([sys.executable, *placed, *more], cwd=directory, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), command
    return done.stdout


def test_the_commands_run(tmp_path: Path) -> None:
    few = ["data.max_samples=60", "training.max_steps=2", "evaluation.prompts=3", "logging.progress_bar=false"]
    run("python train.py configs/tiny.py", tmp_path, "output.dir=runs/tiny", *few)
    known = {
        "train.py": lambda command: run(command, tmp_path, *few),
        "eval.py": lambda command: run(command, tmp_path),
        "merge.py": lambda command: run(command, tmp_path),
        "-m": lambda command: run(command, tmp_path),
    }
    seen = set()
    for command in commands():
        kind = command.split()[1]
        seen.add(kind)
        assert known[kind](command).strip(), command
    assert seen == known.keys()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_config_in_the_text_loads(tmp_path: Path) -> None:
    (block,) = blocks("python")
    (tmp_path / "mine.py").write_text(block)
    config = load_file(tmp_path / "mine.py")
    assert config.quantization.bits == 4
    assert config.data.train_file == "chats.jsonl"


@pytest.mark.parametrize("place", ["the documents", "the program"])
def test_every_field_that_is_mentioned_exists(place: str) -> None:
    program = "\n".join(path.read_text(encoding="utf-8") for path in PROGRAM)
    text = TEXTS if place == "the documents" else program
    fields = {f"{section}.{item.name}" for section, kind in SECTION_TYPES.items() for item in dataclasses.fields(kind)}
    sections = "|".join(SECTION_TYPES)
    mentioned = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+)(?==[\w.]|`)", text))
    assert len(mentioned) > 5
    assert mentioned - fields == set()


def test_the_defaults_in_the_table_are_the_defaults() -> None:
    defaults = Config()
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| ([^|]+) \|", README, re.MULTILINE)
    assert len(rows) >= 3
    for section, name, shown in rows:
        value = getattr(getattr(defaults, section), name)
        if (section, name) != ("output", "dir"):
            assert shown.strip(" `").lower() == str(value).lower(), f"{section}.{name}"


def test_every_file_that_is_mentioned_exists() -> None:
    names = set(re.findall(r"`((?:nanoft|tests|configs|docs|bench)/[\w/.]+)`", TEXTS))
    assert len(names) > 12
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_shapes_of_the_data_document_are_those_of_the_program() -> None:
    from nanoft.records import SHAPES

    rows = re.findall(r"^\| `(\w+)` \| (`.*) \|$", DATA, re.MULTILINE)
    shown = {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows if name in SHAPES}
    assert shown.keys() == SHAPES.keys()
    for name, (required, known, _) in SHAPES.items():
        assert {*required, *known} <= shown[name], name


def test_every_metric_is_in_the_document_and_every_one_there_is_a_metric() -> None:
    from nanoft.scores import CONSTRAINTS, ROUGE, SCORES

    table = EVALUATION[EVALUATION.index("## Metrics of the answers") : EVALUATION.index("## How to read it")]
    named = set(re.findall(r"`(\w+)[`:]", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    assert named == {*SCORES, *ROUGE, *CONSTRAINTS, "bleu"} - {"exact_match"}


def test_the_example_of_the_tour_has_the_tokens_that_it_says() -> None:
    from nanoft.chat import ChatTokenizer

    question = re.search(r'"user", "content": "(.*?)"', TOUR)
    assert question
    answer = '{"name": "convert_money", "arguments": {"amount": 55, "from": "euros", "to": "pesos"}}'
    messages = [{"role": "user", "content": question[1]}, {"role": "assistant", "content": answer}]
    chat = ChatTokenizer.from_directory(ROOT / "configs" / "tiny" / "base")
    (sample,) = chat.encode(iter(chat.render_samples(messages, 0)))
    assert f"{len(sample.ids)} tokens, {sample.is_target.sum()} of them targets" in TOUR


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150
