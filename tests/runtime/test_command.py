"""Arguments: order, mistakes, and settings that are spelled as options."""

from __future__ import annotations

import pytest

from nanoft import UserError, __version__
from nanoft.runtime.command import Arguments


@pytest.fixture
def parser() -> Arguments:
    parser = Arguments(prog="x.py")
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--resume")
    return parser


def test_options_may_stand_anywhere(parser: Arguments) -> None:
    for line in ("c.py a=1 b=2 --resume no", "--resume no c.py a=1 b=2", "c.py a=1 --resume no b=2"):
        args = parser.parse(line.split())
        assert (args.config, args.overrides, args.resume) == ("c.py", ["a=1", "b=2"], "no")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c.py --lr 1e-4", "--lr: settings are written section.field=value: training.learning_rate=1e-4"),
        ("--lr=1e-4", "--lr: settings are written section.field=value: training.learning_rate=1e-4"),
        ("--training.learning_rate=1e-4", "section.field=value: training.learning_rate=1e-4"),
        ("--max-steps 5 a=1", "--max-steps: settings are written section.field=value: training.max_steps=5"),
        ("--max_steps -1", "section.field=value: training.max_steps=-1"),
        ("--lora_r --resume no", "section.field=value: lora.rank=VALUE"),
        ("--per_device_train_batch_size=2", "section.field=value: training.micro_batch_size=2"),
        ("--zzzz 3", "unrecognized arguments: --zzzz (see --help)"),
        ("--resume", "argument --resume: expected one argument (see --help)"),
    ],
)
def test_a_setting_spelled_as_an_option_is_explained(line: str, expected: str, parser: Arguments) -> None:
    with pytest.raises(UserError) as refused:
        parser.parse(line.split())
    assert str(refused.value).endswith(expected)


def test_a_parser_without_settings_explains_none() -> None:
    parser = Arguments(prog="x.py")
    parser.add_argument("run")
    with pytest.raises(UserError, match="unrecognized arguments: --lr"):
        parser.parse(["a", "--lr", "3"])


def test_check_ends_the_process_only_for_an_answer(
    parser: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser.check(["c.py"])
    assert capsys.readouterr() == ("", "")
    for line, code, out, err in (("--version", 0, f"nanoft {__version__}\n", ""), ("--resume", 2, "", "error: ")):
        with pytest.raises(SystemExit) as left:
            parser.check([line])
        assert left.value.code == code
        said = capsys.readouterr()
        assert said.out == out
        assert said.err.startswith(err)
    monkeypatch.setenv("RANK", "1")  # torchrun's other processes leave the answer to the first
    with pytest.raises(SystemExit) as left:
        parser.check(["--resume"])
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "")
