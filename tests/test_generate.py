"""Answers against transformers' generate, alone and in a batch; sampling against the distribution by hand."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from models import make_chat_model, make_reference, train_run, write_records
from nanoft import generate
from nanoft.chat import ChatTokenizer
from nanoft.generate import Answer, answer
from nanoft.model import Decoder
from nanoft.weights import load_model

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [42], [7, 7, 7, 100, 30, 20]]
CASES = ["llama3-rope", "mistral-window", "qwen2-window", "qwen3"]


def model_and_reference(case: str, directory: Path) -> tuple[Decoder, PreTrainedModel]:
    reference = make_reference(case, directory)
    return load_model(directory, CPU, torch.float32).eval(), reference


def ids_of(answers: list[Answer]) -> list[list[int]]:
    return [said.ids for said in answers]


@torch.no_grad()
def reference_answer(reference: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


@torch.no_grad()
def without_cache(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Every token from a forward pass over all that came before it."""
    ids = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor([ids]))
        ids.append(int(model.logits(hidden[:, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_equal_transformers_alone_in_a_batch_and_without_the_cache(case: str, tmp_path: Path) -> None:
    model, reference = model_and_reference(case, tmp_path)
    expected = [reference_answer(reference, prompt, 64) for prompt in PROMPTS]
    together = generate.generate(model, PROMPTS, (), 64)
    assert ids_of(together) == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)  # the prompts matter
    assert not any(said.stopped for said in together)
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert ids_of(generate.generate(model, [prompt], (), 64)) == [ids]
    assert without_cache(model, PROMPTS[1], 64) == expected[1]


@pytest.mark.parametrize("pad_id", [0, 3, 198])
def test_padding_of_any_id_changes_nothing(pad_id: int, tmp_path: Path) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    alone = [generate.generate(model, [prompt], (), 12)[0] for prompt in PROMPTS]
    for order in itertools.permutations(range(4)):
        together = generate.generate(model, [PROMPTS[i] for i in order], (), 12, pad_id)
        assert together == [alone[i] for i in order]


def test_an_answer_ends_before_the_first_stop_id_and_the_others_go_on(tmp_path: Path) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    free = ids_of(generate.generate(model, PROMPTS, (), 24))
    stop = free[1][5]
    first = [ids.index(stop) if stop in ids else None for ids in free]
    assert None in first  # one that never stops
    expected = [Answer(ids[:at], at is not None) for ids, at in zip(free, first, strict=True)]
    assert generate.generate(model, PROMPTS, [stop, free[1][9]], 24)[1] == expected[1]
    assert generate.generate(model, PROMPTS, [stop], 24) == expected


class Scripted(torch.nn.Module):
    """A model whose answers are written down: row r says script[r][n] at its n-th turn; counts its turns."""

    def __init__(self, script: list[list[int]], vocab: int = 20):
        super().__init__()
        self.script, self.vocab, self.turn = script, vocab, 0
        self.config = type("Shape", (), {"num_kv_heads": 1, "head_dim": 2, "num_layers": 1})()
        self.head = torch.zeros(vocab, 2)

    def forward(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.turn += 1
        return torch.zeros(*ids.shape, 2)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor([row[self.turn - 1] for row in self.script])
        return torch.nn.functional.one_hot(wanted, self.vocab).float()


def test_nothing_is_computed_after_the_last_answer_has_ended() -> None:
    model = Scripted([[7, 2, 5, 5, 5], [7, 8, 9, 2, 5], [2, 6, 6, 6, 6]])
    answers = generate.generate(model, [[1], [1, 1], [1]], [2], 5)  # type: ignore[arg-type]
    assert answers == [Answer([7], True), Answer([7, 8, 9], True), Answer([], True)]
    assert model.turn == 4


def test_the_last_token_may_be_the_stop_and_none_may_be_asked_for() -> None:
    script = [[7, 8, 2]]
    assert generate.generate(Scripted(script), [[1]], [2], 3) == [Answer([7, 8], True)]  # type: ignore[arg-type]
    assert generate.generate(Scripted(script), [[1]], [2], 2) == [Answer([7, 8], False)]  # type: ignore[arg-type]
    assert generate.generate(Scripted(script), [[1]], [2], 0) == [Answer([], False)]  # type: ignore[arg-type]


# --- sampling

PROBABILITIES = torch.tensor([0.05, 0.4, 0.02, 0.25, 0.15, 0.1, 0.03])
DRAWS = 40_000


def nucleus(temperature: float, top_p: float) -> dict[int, float]:
    """The smallest set of the likeliest tokens with probability top_p, in plain Python; renormalised."""
    heated = [p ** (1 / temperature) for p in PROBABILITIES.tolist()]
    heated = [p / sum(heated) for p in heated]
    kept: dict[int, float] = {}
    for token in sorted(range(len(heated)), key=lambda token: -heated[token]):
        if sum(kept.values()) < top_p:
            kept[token] = heated[token]
    return {token: p / sum(kept.values()) for token, p in kept.items()}


def draw(temperature: float, top_p: float, seed: int = 0, count: int = DRAWS) -> list[int]:
    logits = (PROBABILITIES.log() + 3.0).expand(count, -1)  # a constant changes nothing
    generator = torch.Generator().manual_seed(seed)
    return generate._choose(logits, temperature, top_p, generator).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_p", "at_temperature_1"), [(1.0, 7), (0.79, 3), (0.5, 2), (0.3, 1), (0.001, 1)])
def test_samples_are_drawn_from_the_nucleus(temperature: float, top_p: float, at_temperature_1: int) -> None:
    expected = nucleus(temperature, top_p)
    if temperature == 1.0:
        assert len(expected) == at_temperature_1
    counts = Counter(draw(temperature, top_p))
    assert counts.keys() == expected.keys()
    for token, p in expected.items():
        deviation = (p * (1 - p) / DRAWS) ** 0.5
        assert abs(counts[token] / DRAWS - p) < 4.5 * deviation + 1e-9, token


def test_a_seed_repeats_and_another_differs() -> None:
    assert draw(1.0, 1.0, seed=1, count=50) == draw(1.0, 1.0, seed=1, count=50)
    assert draw(1.0, 1.0, seed=1, count=50) != draw(1.0, 1.0, seed=2, count=50)
    assert set(draw(0.0, 1.0, count=50)) == {1}  # temperature 0: the likeliest


def test_sampling_goes_through_generation(tmp_path: Path) -> None:
    model, _ = model_and_reference("llama", tmp_path)

    def sampled(seed: int, **settings: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return ids_of(generate.generate(model, PROMPTS, (), 16, generator=generator, **settings))

    greedy = ids_of(generate.generate(model, PROMPTS, (), 16))
    assert sampled(1, temperature=1.0) == sampled(1, temperature=1.0) != sampled(2, temperature=1.0)
    assert sampled(1, temperature=1.0, top_p=1e-6) == greedy  # a nucleus of one


# --- the command


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "model"
    make_chat_model(directory)
    return directory


def test_an_answer_is_what_transformers_says_to_the_rendered_prompt(model_directory: Path) -> None:
    chat = ChatTokenizer.from_directory(model_directory)
    model = load_model(model_directory, CPU, torch.float32).eval()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 4 please."}]
    theirs = AutoTokenizer.from_pretrained(model_directory)
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = without_cache(model, prompt, 12)
    for place, token in enumerate(expected):
        if token in chat.stop_ids:
            expected = expected[:place]
            break
    said = answer(model, chat, messages, 12)
    assert said == theirs.decode(expected, skip_special_tokens=True)


def run(arguments: list[str], typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanoft.generate", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True)


def test_the_command_answers_a_prompt_and_stops(model_directory: Path) -> None:
    chat = ChatTokenizer.from_directory(model_directory)
    model = load_model(model_directory, CPU, torch.float32).eval()
    expected = answer(model, chat, [{"role": "user", "content": "Say 4 please."}], 9)
    done = run([str(model_directory), "--prompt", "Say 4 please.", "--max-new-tokens", "9"])
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_without_a_prompt_the_command_remembers_the_talk(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[dict[str, str]]] = []

    def remember(_model: Any, _chat: Any, messages: Sequence[dict[str, str]], limit: int) -> str:
        asked.append([dict(message) for message in messages])
        return f"answer {len(asked)} of {limit}"

    monkeypatch.setattr(generate, "answer", remember)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n two \n\nnever read\n"))
    assert generate.main([str(model_directory), "--system", "S", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == "answer 1 of 5\nanswer 2 of 5\n"
    system, one, two = (
        {"role": role, "content": text} for role, text in (("system", "S"), ("user", "one"), ("user", "two"))
    )
    assert asked == [[system, one], [system, one, {"role": "assistant", "content": "answer 1 of 5"}, two]]


def test_a_chat_ends_with_its_input(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert generate.main([str(model_directory), "--max-new-tokens", "1"]) == 0


def test_an_interrupt_ends_without_a_traceback(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "answer", interrupt)
    assert generate.main([str(model_directory), "--prompt", "x"]) == 130


def test_a_run_answers_with_its_adapter(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train_run(tmp_path / "run", model_directory, write_records(tmp_path / "data.jsonl"))
    said = []
    for source in (model_directory, trained, trained / "adapter"):
        capsys.readouterr()
        assert generate.main([str(source), "--prompt", "Say 4 please.", "--max-new-tokens", "16"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1] == said[2]


REFUSING = "{{ raise_exception('first line\\nsecond line') }}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "/no/such/model: no such directory"),
        ([""], "empty"),
        (["MODEL", "--max-new-tokens", "0"], "--max-new-tokens: 0 is out of range"),
        (["MODEL", "--system", "S"], "the chat template refuses these messages: first line second line"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_chat_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(REFUSING)
    arguments = [str(tmp_path) if part == "MODEL" else part for part in arguments]
    assert generate.main([*arguments, "--prompt", "hi"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    done = run([str(tmp_path), "--prompt", "hi"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/tokenizer.json: no such file: a model needs its tokenizer.json\n"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        generate.main(["--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "python -m nanoft.generate runs/tiny --prompt" in said
