"""README and docs against the program: commands parse, one of each kind runs, and every name and message exists.

A failure names the document and the words that are wrong, and says what to write instead. A new command, field,
message or file in a document is checked without being listed here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from nanoft.config import Config
from nanoft.config.loading import load_config, load_file
from nanoft.config.schemas import MLX_NAMES
from nanoft.config.settings import SECTION_TYPES
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import SHAPES
from nanoft.metrics.answers import METRICS
from nanoft.models.families import FAMILIES
from nanoft.optim import OPTIMIZERS, SCHEDULES
from nanoft.runtime.command import Arguments

ROOT = Path(__file__).parent.parent
TEXTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / f"{name}.md" for name in ("README", "SECURITY", "CONTRIBUTING")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
NOTEBOOKS = {
    path.name: "\n\n".join(
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
    )
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
TEXTS = NOTEBOOKS | TEXTS
README, TOUR, DATA, EVALUATION = (TEXTS[name] for name in ("README.md", "tour.md", "data.md", "evaluation.md"))
CONFIGS, CONTRIBUTING = TEXTS["configs.md"], TEXTS["CONTRIBUTING.md"]
TROUBLES = TEXTS["troubleshooting.md"]
PACKAGES = sorted(path.parent.name for path in (ROOT / "nanoft").glob("*/__init__.py"))
PROGRAM = [path for folder in ("nanoft", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]
PROGRAM += sorted(ROOT.glob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in PROGRAM}
TREES = {path: ast.parse(text) for path, text in SOURCES.items()}

FEW = [
    "data.max_samples=60",
    "training.max_steps=2",
    "evaluation.prompts=3",
    "logging.progress_bar=false",
    "logging.plots=none",
]
PLACEHOLDERS = {
    "CONFIG": "configs/tiny.py",
    "RUN": "runs/tiny",
    "MODEL": "configs/tiny/base",
    "FILE": "questions.jsonl",
}
ENGINES = ("lm-eval", "ollama", "llama-cli", "llama-server", "llama-quantize", "llama-perplexity")
TOOLS = ("python", "pip", "pytest", "torchrun", "hf", "tensorboard", "wandb", "nvidia-smi", "iconv", *ENGINES)
# Commands that no test of this file runs, and why. Those of nanoft are parsed all the same.
NOT_RUN = {
    r"pip install|(python -m )?pytest": ".ci/run installs and tests in a clean environment, with README's own lines",
    r"torchrun": "several processes: tests/runtime/test_distributed.py",
    r"hf |iconv |nvidia-smi|tensorboard|wandb|cd |git |export ": "another program's command",
    r"lm-eval|ollama|llama-": "these are not installed: tests/test_harness.py, tests/export/test_gguf.py",
    r"python train.py auto|python .*configs/(?!tiny)": "needs the Hub or a GPU: tests/test_configs.py plans all",
    r"python train.py (auto|mine.py|my.yaml)": "the user's own files",
    r"python eval.py merged": "needs a merged model: tests/test_eval_command.py",
    r"python merge.py BASE": "the user's own model: tests/export/test_gguf.py",
    r"python bench/": "minutes, or a GPU: tests/test_bench.py runs small ones",
    r"python configs/tiny/language.py build": "pre-trains the demo's base for minutes: tests/test_demo.py",
    r"python docs/solutions/": "tests/test_exercises.py",
    r"python nanoft/nano.py": "tests/test_nano.py",
    r"python tests/fuzz.py": "runs as long as you like: tests/test_hostile.py has a short form",
    r"python .*--follow": "waits for a run that trains: tests/tracking/test_compare.py",
    r"python .*--base nf4": "needs a run in 4 bits: tests/test_merge_command.py",
    r"python .*--selftest": "tests/training/test_self_test.py",
    r"python .*--dtype q[456]_.*": "needs llama.cpp's quantizer: tests/export/test_gguf.py",
    r"python .*data.train_file=(FILE|...)|python .*model.name=MODEL": "runs as with the demo's own data and model",
}


def blocks(language: str, text: str) -> list[str]:
    """The fenced code blocks of a language; "": of none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def commands(text: str) -> list[str]:
    """Commands in shell blocks, and in backticks within the text."""
    shell = [
        re.split(r"(?:^|\s)#\s", line)[0].strip()
        for block in [*blocks("sh", text), *blocks("bash", text), *blocks("", text)]
        for line in block.replace("\\\n", " ").splitlines()
    ]
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", plain)]
    lines = [re.sub(r"^([A-Z_]+=\S+ )+", "", part) for line in [*shell, *inline] for part in line.split(" && ")]
    return [line for line in lines if line.startswith(tuple(f"{tool} " for tool in TOOLS)) or line == "pytest"]


COMMANDS = [(name, command) for name, text in TEXTS.items() for command in commands(text)]


def reason_not_to_run(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), None)


def words_of(command: str) -> list[str]:
    """The words that a user would type: placeholders replaced, files of this project with their full path."""
    words = [PLACEHOLDERS.get(word.partition("=")[2] or word, word) for word in shlex.split(command)]
    return [str(ROOT / word) if word.startswith(("configs/", "bench/", "docs/", "tests/")) else word for word in words]


def main_of(words: list[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    """The function behind `python train.py ...` or `python -m nanoft chat ...`, and its arguments."""
    assert words[0] == "python"
    if words[1] == "-m":
        return importlib.import_module("nanoft.__main__").main, words[3:]
    return importlib.import_module(words[1].removesuffix(".py")).main, words[2:]


def is_ours(command: str) -> bool:
    return re.match(r"python (-m nanoft |train.py|eval.py|merge.py)", command) is not None


def all_exist(found: Iterable[str], fix: str) -> None:
    """Fail with the words that do not exist, and what to do about it."""
    wrong = sorted(found)
    assert not wrong, f"{', '.join(wrong)}: {fix}"


# --- Commands


class Parsed(BaseException):
    """The arguments were parsed; stop here."""


def alone(command: str) -> str:
    """The command that each process of a torchrun runs."""
    return re.sub(r"^torchrun .*?(?=\w+\.py)", "python ", command)


@pytest.mark.parametrize("command", sorted({alone(c) for _, c in COMMANDS if is_ours(alone(c))}))
def test_a_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser knows its options; its settings exist and have valid values."""

    original = Arguments.parse

    def parse_and_stop(self: Arguments, argv: list[str]) -> None:
        original(self, argv)
        raise Parsed

    monkeypatch.setattr(Arguments, "parse", parse_and_stop)
    main, arguments = main_of(words_of(command))
    with pytest.raises(Parsed):
        main(arguments)
    settings = [word for word in arguments if re.match(r"[a-z]+\.[a-z_0-9]+=", word)]
    load_config(ROOT / "configs" / "tiny.py", settings, {})


def test_pytest_is_given_files_that_exist() -> None:
    named = {word for _, c in COMMANDS if "pytest" in c for word in c.split() if word.startswith("tests/")}
    all_exist((word for word in named if not (ROOT / word).exists()), "no such test: write its path as in tests/")


def test_the_other_scripts_have_the_options_that_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}
    for command in sorted({c for _, c in COMMANDS if re.match(r"python (?!-m|nanoft/nano.py)", c) and not is_ours(c)}):
        _, script, *arguments = words_of(command)
        if script not in seen:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            monkeypatch.syspath_prepend(str(Path(script).parent))
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(script, run_name="__main__")
            seen[script] = capsys.readouterr().out
        unknown = (word for word in arguments if word.startswith("--") and word not in seen[script])
        all_exist(unknown, f"not in the --help of {command!r}: write one of its options")
    assert len(seen) >= 5


def family(command: str) -> tuple[str, ...]:
    """Commands of one family differ in values only: one of them is run."""
    words = shlex.split(command)
    what = words[words.index("--format") + 1] if "--format" in words else ""
    options = sorted({word for word in words if word.startswith("--") and word != "--format"})
    fields = sorted({word.split("=")[0] for word in words if word.startswith(("evaluation.", "quantization."))})
    return (" ".join(words[1:4] if words[1] == "-m" else words[1:2]), what, *options, *fields)


TO_RUN = {family(c): c for _, c in COMMANDS if is_ours(c) and reason_not_to_run(c) is None}


def test_every_command_is_run_or_there_is_a_reason() -> None:
    odd = (f"{name}: {c}" for name, c in COMMANDS if not is_ours(c) and reason_not_to_run(c) is None)
    all_exist(odd, "not a command of nanoft: correct it, or add it to NOT_RUN with the reason")
    assert {script for script, *_ in TO_RUN} >= {"train.py", "eval.py", "merge.py", "-m nanoft chat"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's first command, with a few steps, as a user runs it."""
    place = tmp_path_factory.mktemp("docs")
    (first,) = [c for c in commands(README) if c == "python train.py configs/tiny.py"]
    words = [sys.executable, str(ROOT / "train.py"), *words_of(first)[2:], "output.dir=runs/tiny", *FEW]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return place


def ready(demo: Path, place: Path) -> None:
    """Fill a directory with the demo's run, and with the files that the documents name."""
    shutil.copytree(demo / "runs", place / "runs")
    for other in ("a", "b"):
        (place / "runs" / other).symlink_to(place / "runs" / "tiny")
    lines = (ROOT / "configs" / "tiny" / "conversations.jsonl").read_text().splitlines()[-12:]
    records = [json.dumps({**json.loads(line), "topic": number % 2}) for number, line in enumerate(lines)]
    (place / "questions.jsonl").write_text("\n".join(records))
    (place / "wikitext.txt").write_text("The harbour is small. " * 30)


@pytest.mark.parametrize("name", sorted(TO_RUN), ids=" ".join)
def test_a_command_of_each_family_runs(
    name: tuple[str, ...],
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ready(demo, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    main, arguments = main_of(words_of(TO_RUN[name]))
    if name[0] == "train.py":
        arguments += ["output.dir=runs/other", *FEW]
    assert main(arguments) == 0, capfd.readouterr().err
    assert capfd.readouterr().out.strip() or name[0] == "-m nanoft chat"  # without a question


# --- Troubleshooting


def rows(text: str) -> list[list[str]]:
    """The cells of its tables, without their headings."""
    lines = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] != "symptom" and not row[0].startswith("---")]


def test_each_trouble_has_a_symptom_a_cause_a_check_and_a_fix() -> None:
    found = rows(TROUBLES)
    assert len(found) >= 40
    for row in found:
        assert len(row) == 4, f"troubleshooting.md: write | symptom | cause | check | fix |: {row}"
        assert all(row), f"troubleshooting.md: a cell is empty: {row}"
        check = re.match(r"`(.*?)`", row[2])
        assert check, f"troubleshooting.md: begin the check with a command in backticks: {row}"
        assert is_ours(check[1]), f"troubleshooting.md: the check is not a command of nanoft: {row}"


# Quoted messages, and the command that makes the program print each. The others are compared with its source.
ERRORS = {
    "no such field: did you mean lora.rank?": "train.py CONFIG lora.rnk=8",
    "settings are written section.field=value": "train.py CONFIG --lr 1e-4",
    "its records fit 2 shapes": "train.py CONFIG data.train_file=twofold.jsonl",
    "unknown shape: its first record has the fields q, a": "train.py CONFIG data.train_file=odd.jsonl",
    "records are malformed, more than data.max_bad_records": "train.py CONFIG data.train_file=bad.jsonl",
    "none of its messages is a target": "train.py CONFIG data.train_file=unlearned.jsonl",
    "quantization.bits: 4 needs a frozen base": "train.py CONFIG quantization.bits=4 training.method=full",
    "adamw_paged runs on cuda": "train.py CONFIG training.optimizer=adamw_paged system.device=cpu",
    "this model brings Python code of its own": "train.py CONFIG --plan model.name=code",
    "is not supported": "train.py CONFIG --plan model.name=architecture",
    "are not read": "train.py CONFIG model.name=pickle",
    "its tokenizer gives the id": "train.py CONFIG model.name=vocabulary",
    "remove {{ bos_token }} from the chat template": "train.py CONFIG --preflight model.name=doubled",
    "holds another run (lora.rank: 16 -> 8; ": "train.py CONFIG lora.rank=8 output.dir=runs/tiny",
    "this run has no checkpoint yet": "eval.py runs/empty",
    "already exists": "merge.py RUN --out runs",
    "its files are not those that": "merge.py adapter --out merged",
}


def write_bad_files(place: Path) -> None:
    """Data files and models, each named after what is wrong with it."""
    good = [{"prompt": f"Say {n}.", "completion": "yes"} for n in range(20)]
    unlearned = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    twofold = {"prompt": "a", "completion": "b", "question": "a", "answer": "b"}
    data = {"odd": [{"q": "a", "a": "b"}], "bad": [*good, {"prompt": ""}, {}]}
    data |= {"unlearned": [unlearned], "twofold": [twofold]}
    for name, records in data.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    changes: dict[str, tuple[str, str, str]] = {  # a file, a text in it, and its replacement
        "code": ("config.json", "{", '{"auto_map": {"AutoModel": "a.B"},'),
        "architecture": ("config.json", "MistralForCausalLM", "PhiForCausalLM"),
        "vocabulary": ("config.json", '"vocab_size": 1212', '"vocab_size": 100'),
        "doubled": ("tokenizer_config.json", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"),
    }
    for name in ("other", "pickle"):  # changed below
        changes[name] = ("config.json", "{", "{")
    base = ROOT / "configs" / "tiny" / "base"
    for name, (file, old, new) in changes.items():
        shutil.copytree(base, place / name)
        text = (base / file).read_text()
        assert old in text, name
        (place / name / file).write_text(text.replace(old, new, 1))
    (place / "pickle" / "model.safetensors").rename(place / "pickle" / "pytorch_model.bin")
    weights = (base / "model.safetensors").read_bytes()
    (place / "other" / "model.safetensors").write_bytes(weights[:-2] + bytes(2))  # the last weight differs
    shutil.copytree(place / "runs" / "tiny" / "adapter", place / "adapter")
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "other"}))
    (place / "runs" / "empty" / "checkpoints").mkdir(parents=True)
    shutil.copy(place / "runs" / "tiny" / "config.json", place / "runs" / "empty")


@pytest.mark.parametrize("said", ERRORS)
def test_a_symptom_is_what_the_program_says(
    said: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in TROUBLES.replace("`", ""), f"ERRORS: {said!r}: not quoted in troubleshooting.md: quote or remove it"
    ready(demo, tmp_path)
    write_bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    main, arguments = main_of(["python", *words_of(ERRORS[said])])
    given = [word for word in arguments if word.startswith("output.dir=")]
    if ERRORS[said].startswith("train.py"):
        arguments += [*FEW, *(given or ["output.dir=runs/other"])]
    assert main(arguments) == 2
    message = capfd.readouterr().err
    assert said in message, f"troubleshooting.md: {said!r}: the program says {message!r}: quote that, also in ERRORS"
    assert message.count("\n") == 1


def strings_of_the_program() -> str:
    """The texts in its source, except docstrings: one per line, with \\0 for the values in f-strings."""
    found, docstrings = [], set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr):
                docstrings.add(node.value)
            elif node in docstrings:
                continue
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted_messages() -> list[str]:
    """Of several words, in the column of symptoms."""
    quoted = [text.replace("\\|", "|") for row in rows(TROUBLES) for text in re.findall(r"`(.+?)`", row[0])]
    return [text for text in quoted if " " in text.strip() and not any(said in text for said in ERRORS)]


@pytest.mark.parametrize("quoted", quoted_messages())
def test_a_quoted_message_is_in_the_source(quoted: str) -> None:
    """Its parts between `...`, of which each stands for a value."""
    said = strings_of_the_program()
    parts = (part.strip(" :,") for part in quoted.split("..."))
    fix = f"troubleshooting.md: {quoted!r}: no message has it: quote what the program says, with ... for values"
    all_exist((part for part in parts if part not in said), fix)


# --- Names


def test_the_config_in_the_text_loads(tmp_path: Path) -> None:
    (block,) = blocks("python", README)
    (tmp_path / "mine.py").write_text(block)
    config = load_file(tmp_path / "mine.py")
    assert config.quantization.bits == 4
    assert config.data.train_file == "chats.jsonl"


@pytest.mark.parametrize("place", [*TEXTS, "CHANGELOG.md", "the program"])
def test_every_field_that_is_mentioned_exists(place: str) -> None:
    if place == "the program":
        text = "\n".join(SOURCES.values())
    else:
        text = TEXTS.get(place) or (ROOT / place).read_text(encoding="utf-8")
    fields = {f"{section}.{item.name}" for section, kind in SECTION_TYPES.items() for item in dataclasses.fields(kind)}
    fields |= MLX_NAMES.keys()
    sections = "|".join(SECTION_TYPES)
    mentioned = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+)(?==[\w.]|`)", text))
    mentioned = {name for name in mentioned if name.split(".")[1] not in ("py", "safetensors")}
    all_exist(mentioned - fields, f"{place}: no such field: write one of nanoft/config/settings.py")


def test_the_defaults_in_the_table_are_the_defaults() -> None:
    defaults = Config()
    table = CONFIGS[CONFIGS.index("## Settings that are changed") : CONFIGS.index("## Building on another")]
    found = re.findall(r"^\| `(\w+)\.(\w+)` \| ([^|]+) \|", table, re.MULTILINE)
    assert len(found) >= 3
    for section, name, shown in found:
        value = getattr(getattr(defaults, section), name)
        if (section, name) != ("output", "dir"):
            assert shown.strip(" `").lower() == str(value).lower(), f"configs.md: {section}.{name}: write {value}"


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_that_is_mentioned_exists(name: str) -> None:
    text = TEXTS[name]
    mentioned = set(re.findall(r"`((?:nanoft|tests|configs|docs|bench)/[\w/.]+)`", text))
    mentioned |= {f"{place}/{page}" for place, page in re.findall(r"\]\((docs|bench)/([\w.]+)\)", text)}
    written = {file for file in mentioned if re.fullmatch(r"bench/\w+\.(md|json)", file) or file == "bench/gpu_"}
    missing = {file for file in mentioned - written if not (ROOT / file).exists()}
    missing |= {file for file in written if not (ROOT / f"bench/{re.split('[._]', file[6:])[0]}.py").is_file()}
    all_exist(missing, f"{name}: no such file: write its present path")


def test_the_core_is_in_the_readme_and_every_package_in_the_contributing_guide() -> None:
    reading = README[README.index("## Where to read") :]
    core = {path.name for path in (ROOT / "nanoft").glob("*.py") if "renamed(" not in SOURCES[path]} - {"nano.py"}
    named = set(re.findall(r"`nanoft/(\w+\.py)`", reading))
    fix = "README.md, Where to read: add it to the core, or move it into a package"
    all_exist(core - named - {"__init__.py", "__main__.py"}, fix)
    (tree,) = blocks("", CONTRIBUTING)
    listed = re.findall(r"^  (\w+)/", tree, re.MULTILINE)
    all_exist(set(PACKAGES) ^ set(listed), "CONTRIBUTING.md: list exactly the packages of nanoft/")


def names_of_the_program() -> set[str]:
    """What is defined: functions, classes, methods, fields, constants; and fields of the config."""
    names = {item.name for kind in SECTION_TYPES.values() for item in dataclasses.fields(kind)}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_name_on_the_tour_exists() -> None:
    plain = re.sub(r"```.*?```", "", TOUR, flags=re.DOTALL)
    named = {code for code in re.findall(r"`([^`\n]+)`", plain) if re.fullmatch(r"[A-Za-z_][\w.]*", code)}
    named = {code for code in named if not code.endswith((".py", ".jsonl", ".md"))}
    named = {code for code in named if code.split(".")[0] not in SECTION_TYPES}
    assert len(named) >= 30
    known = names_of_the_program()
    fix = "tour.md: the program has no such function, class or table: write its present name"
    all_exist((code for code in named if not set(code.split(".")) <= known), fix)


@pytest.mark.parametrize("name", TEXTS)
def test_every_name_with_an_underscore_is_somewhere_in_the_program(name: str) -> None:
    words = {code for code in re.findall(r"`(\w+)`", TEXTS[name]) if "_" in code.strip("_")}
    bench = (path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    known = set(re.findall(r"\w+", "\n".join([*SOURCES.values(), *bench])))
    known |= METRICS.keys()  # some are composed of parts
    all_exist(words - known, f"{name}: nowhere in the program: write the present name")


# --- What the documents say of the program


def test_the_shapes_of_the_data_document_are_those_of_the_program() -> None:
    found = re.findall(r"^\| `(\w+)` \| (`.*) \|$", DATA, re.MULTILINE)
    shown = {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in found if name in SHAPES}
    for name, shape in SHAPES.items():
        assert name in shown, f"docs/data.md: add a row | `{name}` | `field`, ... | to the table of shapes"
        missing = {*shape.required, *shape.fields} - shown[name]
        assert not missing, f"docs/data.md, row of {name}: add the fields {', '.join(sorted(missing))}"


def test_every_metric_is_in_the_document_and_every_one_there_is_a_metric() -> None:
    table = EVALUATION[EVALUATION.index("## Metrics of the answers") : EVALUATION.index("## How to read it")]
    named = set(re.findall(r"`(\w+)[`:]", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    missing, unknown = METRICS.keys() - {"exact_match"} - named, named - METRICS.keys()
    assert not missing, f"docs/evaluation.md, Metrics of the answers: add a row for {', '.join(sorted(missing))}"
    assert not unknown, f"docs/evaluation.md, Metrics of the answers: no such metric: {', '.join(sorted(unknown))}"


def test_every_family_is_in_the_document_with_its_name_in_llama_cpp() -> None:
    table, _, _ = TEXTS["families.md"].partition("## Templates")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `?([\w-]+)`? \|", table, re.MULTILINE)
    assert dict(rows) == {name: family.gguf or "no" for name, family in FAMILIES.items()}


@pytest.mark.parametrize("table", [SCHEDULES, OPTIMIZERS], ids=["schedules", "optimizers"])
def test_the_settings_name_every_schedule_and_optimizer(table: dict[str, object]) -> None:
    missing = (name for name in table if f"`{name}`" not in CONFIGS)
    all_exist(missing, "docs/configs.md: add it to the row of training.lr_scheduler or training.optimizer")


def test_the_example_of_the_tour_has_the_tokens_that_it_says() -> None:
    question = re.search(r'"user", "content": "(.*?)"', TOUR)
    assert question
    answer = '{"name": "convert_money", "arguments": {"amount": 55, "from": "euros", "to": "pesos"}}'
    messages = [{"role": "user", "content": question[1]}, {"role": "assistant", "content": answer}]
    chat = ChatTokenizer(ROOT / "configs" / "tiny" / "base")
    (sample,) = chat.encode(iter(chat.render_samples(messages, 0)))
    said = f"{len(sample.ids)} tokens, {sample.is_target.sum()} of them targets"
    assert said in TOUR, f"docs/tour.md, section 2: write: {said}"
