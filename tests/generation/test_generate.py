"""Answers against transformers' generate, alone and in a batch, and the command that gives them."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import traceback
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import rest_is_slow
from transformers import AutoTokenizer, PreTrainedModel

from nanoft import kernels
from nanoft.__main__ import main
from nanoft.data.chat_tokenizer import ChatTokenizer, Message
from nanoft.generation import generate
from nanoft.generation.decode import Decoding
from nanoft.generation.generate import Answer
from nanoft.generation.sampling import Sampling, completion_noise
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from tiny_models import make_chat_model, make_reference, train_run, write_records

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [42], [7, 7, 7, 100, 30, 20]]
CASES = ["llama", "llama3-rope", "mistral-window", "qwen2", "qwen2-window", "qwen3"]


def model_and_reference(case: str, directory: Path) -> tuple[Decoder, PreTrainedModel]:
    reference = make_reference(case, directory)
    return load_model(directory, CPU, torch.float32).eval(), reference


def ids_of(answers: list[Answer]) -> list[list[int]]:
    return [said.ids for said in answers]


@torch.no_grad()
def reference_answer(reference: PreTrainedModel, prompt: Sequence[int], count: int, **more: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **more}
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


@pytest.mark.parametrize("case", ["llama-tied", "mistral-window", "qwen2-window"])
def test_a_padded_batch_of_transformers_says_the_same(case: str, tmp_path: Path) -> None:
    model, reference = model_and_reference(case, tmp_path)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    with torch.no_grad():
        expected = reference.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=0)
    assert ids_of(generate.generate(model, PROMPTS, (), 48)) == expected[:, width:].tolist()


def test_the_order_of_prompts_changes_nothing(tmp_path: Path) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    alone = [generate.generate(model, [prompt], (), 12)[0] for prompt in PROMPTS]
    for order in itertools.permutations(range(4)):
        together = generate.generate(model, [PROMPTS[i] for i in order], (), 12)
        assert together == [alone[i] for i in order]


@pytest.mark.parametrize("case", rest_is_slow(["mistral", "mistral-window", "qwen2-window"], "mistral-window"))
@pytest.mark.parametrize("refill", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("batch_size", [None, 3, 2, 1])
def test_rows_that_leave_or_come_later_change_nothing_for_the_others(
    case: str, refill: float, batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never, when half have ended, at once; the longest prompt goes early, and with it the others' empty slots."""
    monkeypatch.setattr(generate, "REFILL", refill)
    model, _ = model_and_reference(case, tmp_path)
    free = [ids_of(generate.generate(model, [prompt], (), 40))[0] for prompt in PROMPTS]
    stops = [free[1][2], free[0][9], free[3][20]]
    expected = []
    for ids in free:
        end = next((at for at, token in enumerate(ids) if token in stops), None)
        expected.append(Answer(ids[:end], None if end is None else ids[end]))
    assert len({len(said.ids) for said in expected}) > 2
    assert generate.generate(model, PROMPTS, stops, 40, batch_size=batch_size) == expected
    order = [2, 0, 3, 1]  # a prompt longer than all that is there joins
    together = generate.generate(model, [PROMPTS[row] for row in order], stops, 40, batch_size=batch_size)
    assert together == [expected[row] for row in order]


def rows_of_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """A list to which every step from now on adds its number of rows."""
    widths: list[int] = []
    step = Decoding.step

    def counted(decoding: Decoding, newest: torch.Tensor) -> torch.Tensor:
        widths.append(len(newest))
        return step(decoding, newest)

    patch.setattr(Decoding, "step", counted)
    return widths


def test_places_are_taken_again_when_answers_end_and_the_batch_is_never_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    prompts = [[1 + number, 2 * number] for number in range(24)]
    free = ids_of(generate.generate(model, prompts, (), 30))
    stops = [ids[3] for ids in free[:8]]
    expected = generate.generate(model, prompts, stops, 30)
    lengths = [len(said.ids) + said.stopped for said in expected]
    assert min(lengths) < 5
    assert max(lengths) == 30
    widths = rows_of_steps(monkeypatch)
    assert generate.generate(model, prompts, stops, 30, batch_size=8) == expected
    assert max(widths) == 8
    one_by_one = sum(max(lengths[at : at + 8]) for at in range(0, 24, 8))  # steps, if batches waited for their longest
    assert len(widths) < one_by_one


def test_an_answer_ends_before_the_first_stop_id_and_the_others_go_on(tmp_path: Path) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    free = ids_of(generate.generate(model, PROMPTS, (), 24))
    stop = free[1][5]
    first = [ids.index(stop) if stop in ids else None for ids in free]
    assert None in first  # one that never stops
    expected = [Answer(ids[:at], None if at is None else stop) for ids, at in zip(free, first, strict=True)]
    assert generate.generate(model, PROMPTS, [stop, free[1][9]], 24)[1] == expected[1]
    assert generate.generate(model, PROMPTS, [stop], 24) == expected


def test_nothing_is_computed_after_the_last_answer_and_little_for_those_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    free = ids_of(generate.generate(model, PROMPTS, (), 24))
    stops = sorted({ids[3] for ids in free[:3]} | {free[3][5]})
    longest = max(next(at for at, token in enumerate(ids) if token in stops) for ids in free)
    widths = rows_of_steps(monkeypatch)
    answers = generate.generate(model, PROMPTS, stops, 24)
    assert all(said.stopped for said in answers)
    assert len(widths) == longest
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < len(PROMPTS)


def test_the_last_token_may_be_the_stop_and_none_may_be_asked_for(tmp_path: Path) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    (ids,) = ids_of(generate.generate(model, [[42]], (), 9))
    place = next(at for at in range(2, 9) if ids[at] not in ids[:at])
    stop = [ids[place]]
    assert generate.generate(model, [[42]], stop, place + 1) == [Answer(ids[:place], ids[place])]
    assert generate.generate(model, [[42]], stop, place) == [Answer(ids[:place])]
    assert generate.generate(model, [[42]], stop, 0) == [Answer([])]


def test_steps_tell_each_token_as_it_comes(tmp_path: Path) -> None:
    model, _ = model_and_reference("mistral", tmp_path)
    free = ids_of(generate.generate(model, PROMPTS, (), 8))
    told = [[said[:2] for said in step] for step in generate.stream(model, PROMPTS, (), 8)]
    assert told == [[(row, ids[step]) for row, ids in enumerate(free)] for step in range(8)]


# --- sampling through generation; the draws themselves are in test_sampling.py


def sampled(
    model: Decoder, prompts: list[list[int]], seed: int, batch_size: int | None = None, **settings: Any
) -> list[list[int]]:
    noise = completion_noise([[seed, number] for number in range(len(prompts))], 16)
    return ids_of(generate.generate(model, prompts, (), 16, Sampling(**settings), noise, batch_size))


def test_a_seed_gives_the_same_answers_and_each_row_its_own(tmp_path: Path) -> None:
    model, _ = model_and_reference("llama", tmp_path)
    greedy = ids_of(generate.generate(model, PROMPTS, (), 16))
    settings = {"temperature": 5.0}
    first = sampled(model, PROMPTS, 1, **settings)
    assert first == sampled(model, PROMPTS, 1, **settings) != sampled(model, PROMPTS, 2, **settings)
    assert first[:1] == sampled(model, PROMPTS[:1], 1, **settings)  # the first row's draws, whoever is there
    assert first == sampled(model, PROMPTS, 1, batch_size=2, **settings)
    noise, some = completion_noise([[1, 3], [1, 1]], 16), [PROMPTS[3], PROMPTS[1]]
    assert ids_of(generate.generate(model, some, (), 16, Sampling(**settings), noise)) == [first[3], first[1]]
    assert len({tuple(ids) for ids in sampled(model, [PROMPTS[0]] * 4, 1, **settings)}) == 4
    for narrow in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        assert sampled(model, PROMPTS, 1, **settings, **narrow) == greedy


def test_with_noise_of_its_own_a_completion_is_the_same_in_every_batch(tmp_path: Path) -> None:
    model, _ = model_and_reference("llama", tmp_path)
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[3]] * 3
    seeds = [[7, group, number] for group in (0, 1) for number in range(3)]
    sampling = Sampling(3.0, log_probs=True)

    def completions(rows: Sequence[int], batch_size: int | None = None) -> list[Answer]:
        noise = completion_noise([seeds[row] for row in rows], 12)
        return generate.generate(model, [prompts[row] for row in rows], (), 12, sampling, noise, batch_size)

    expected = completions(range(6))
    assert len({tuple(said.ids) for said in expected}) == 6
    order = [4, 0, 5, 1]
    for rows, batch_size in ((range(6), 4), (range(6), 1), (order, None), (order, 3)):
        for found, row in zip(completions(rows, batch_size), rows, strict=True):
            assert found.ids == expected[row].ids
            assert found.logps == pytest.approx(expected[row].logps, abs=1e-5)
    assert ids_of(completions([2])) == [expected[2].ids]


@pytest.mark.parametrize("fast", [False, True])
def test_a_prompt_that_occurs_several_times_is_read_once(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_and_reference("qwen2-window", tmp_path)
    if fast:
        assert kernels.apply(model) == ""
    lengths, embed, order = [], model.embed, [1, 0, 1, 1, 3, 0]
    monkeypatch.setattr(model, "embed", lambda ids, *at: (lengths.append(ids.numel()), embed(ids, *at))[1])
    noise = completion_noise([[row] for row in range(6)], 20)
    sampling = Sampling(3.0, log_probs=True)
    for batch_size in (None, 3):
        lengths.clear()
        found = generate.generate(model, [PROMPTS[row] for row in order], (), 20, sampling, noise, batch_size)
        assert lengths[0] == sum(len(PROMPTS[row]) for row in set(order[:batch_size]))
        for number, said in enumerate(found):
            own = noise[number : number + 1]
            (alone,) = generate.generate(model, [PROMPTS[order[number]]], (), 20, sampling, noise=own)
            assert said.ids == alone.ids
            assert said.logps == pytest.approx(alone.logps, abs=1e-5)


def test_a_stream_that_is_left_or_runs_out_of_memory_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = model_and_reference("llama", tmp_path)
    assert kernels.apply(model) == ""
    expected = generate.generate(model, PROMPTS, (), 8)
    made, step = list[Any](), Decoding.step

    class Observed(Decoding):
        def __init__(self, model: Decoder):
            super().__init__(model)
            made.append(weakref.ref(self))

    def fails(self: Decoding, newest: torch.Tensor) -> torch.Tensor:
        if self.length > max(map(len, PROMPTS)) + 2:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, newest)

    monkeypatch.setattr(generate, "Decoding", Observed)
    gc.disable()  # nothing waits for the collector
    try:
        for number, _ in enumerate(generate.stream(model, PROMPTS, (), 8)):
            assert not torch.is_inference_mode_enabled()
            if number == 3:
                break
        with monkeypatch.context() as patch:
            patch.setattr(Decoding, "step", fails)
            with pytest.raises(torch.OutOfMemoryError) as caught:
                generate.generate(model, PROMPTS, (), 8)
        traceback.clear_frames(caught.value.__traceback__)
        assert [decoding() for decoding in made] == [None, None]
    finally:
        gc.enable()
    assert not torch.is_inference_mode_enabled()
    assert generate.generate(model, PROMPTS, (), 8) == expected
    model.train()(torch.tensor([PROMPTS[1]])).sum().backward()  # no weight became one of inference


def test_a_repetition_penalty_is_that_of_transformers_generate(tmp_path: Path) -> None:
    model, reference = model_and_reference("llama", tmp_path)
    own = ids_of(generate.generate(model, PROMPTS, (), 32, Sampling(repetition_penalty=1.3)))
    for prompt, ids in zip(PROMPTS, own, strict=True):
        assert ids == reference_answer(reference, prompt, 32, repetition_penalty=1.3)
    assert own != ids_of(generate.generate(model, PROMPTS, (), 32))


# --- the command


def answer(model: Decoder, chat: ChatTokenizer, messages: list[Message], limit: int) -> str:
    """The greedy answer to a conversation."""
    return chat.decode(generate.generate(model, [chat.encode_prompt(messages)], chat.stop_ids, limit)[0].ids)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "model"
    make_chat_model(directory)
    return directory


def test_an_answer_is_what_transformers_says_to_the_rendered_prompt(model_directory: Path) -> None:
    chat = ChatTokenizer(model_directory)
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
    command = [sys.executable, "-m", "nanoft", "chat", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True)


def test_the_command_answers_a_prompt_and_stops(model_directory: Path) -> None:
    chat = ChatTokenizer(model_directory)
    model = load_model(model_directory, CPU, torch.float32).eval()
    expected = answer(model, chat, [{"role": "user", "content": "Say 4 please."}], 9)
    done = run([str(model_directory), "--prompt", "Say 4 please.", "--max-new-tokens", "9"])
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_a_run_answers_with_its_adapter(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train_run(tmp_path / "run", model_directory, write_records(tmp_path / "data.jsonl"))
    said = []
    for source in (model_directory, trained, trained / "adapter"):
        capsys.readouterr()
        assert main(["chat", str(source), "--prompt", "Say 4 please.", "--max-new-tokens", "16"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1] == said[2]
    capsys.readouterr()
    assert main(["chat", str(trained), "--compare", "--prompt", "Say 4 please.", "--max-new-tokens", "16"]) == 0
    assert capsys.readouterr().out == f"tuned: {said[1]}base: {said[0]}"


REFUSING = "{{ raise_exception('first line\\nsecond line') }}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/model"], "/no/such/model: no such directory"),
        ([""], "empty"),
        (["MODEL", "--max-new-tokens", "0"], "--max-new-tokens: 0 is out of range: it must be >= 1"),
        (["MODEL", "--temperature", "-1"], "--temperature: -1.0 is out of range: it must be >= 0"),
        (["MODEL", "--temperature", "nan"], "--temperature: nan is not a finite number"),
        (["MODEL", "--top-k", "-1"], "--top-k: -1 is out of range"),
        (["MODEL", "--top-p", "0"], "--top-p: 0.0 is out of range: it must be between 1e-06 and 1"),
        (["MODEL", "--min-p", "1.5"], "--min-p: 1.5 is out of range"),
        (["MODEL", "--repetition-penalty", "0"], "--repetition-penalty: 0.0 is out of range"),
        (["MODEL", "--seed", "-3"], "--seed: -3 is out of range"),
        (["MODEL", "--top-p", "0.9"], "--top-p: no effect at temperature 0: add --temperature 0.7"),
        (["MODEL", "--compare"], "has no adapter to disable"),
        (["MODEL", "--system", "\udcff"], "--system: not UTF-8"),
        (["MODEL", "--system", "S"], "the chat template refuses these messages: first line second line"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_chat_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(REFUSING)
    arguments = [str(tmp_path) if part == "MODEL" else part for part in arguments]
    assert main(["chat", *arguments, "--prompt", "hi"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    done = run([str(tmp_path), "--prompt", "hi"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/tokenizer.json: no such file: copy the model's tokenizer.json there\n"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["chat", "--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "python -m nanoft chat runs/tiny --prompt" in said
