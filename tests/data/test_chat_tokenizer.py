"""Rendering, masks and ids against transformers and against the texts of the conversation."""

from __future__ import annotations

import datetime
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CHATML, CONTROL, STYLES, TINY, Style, byte_fallback, byte_level, save
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import BREAK, ChatTokenizer, Message, TemplateRefusal

SINGLE = [("user", "Hello, how are you?"), ("assistant", "Fine.")]
TALK = [*SINGLE, ("user", "And 2 + 2?"), ("assistant", "It is\n\n4"), ("user", "Bye"), ("assistant", "Bye bye")]
CONVERSATIONS = {
    "single": SINGLE,
    "multi": TALK,
    "system": [("system", "Be brief."), *SINGLE],
    "emoji": [("user", "👩🏽‍🚀é"), ("assistant", "😀 ok 😀"), ("user", "日本"), ("assistant", "語é")],
}
TOKENIZERS: dict[str, Callable[[], str] | None] = {"bytes": None, "fallback": byte_fallback}


def conversation(turns: list[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def one_turn(user: str, assistant: str = "yes") -> list[Message]:
    return conversation([("user", user), ("assistant", assistant)])


def samples_of(chat: ChatTokenizer, messages: list[Message]) -> list[Sample]:
    return list(chat.encode(chat.render_samples(messages, 0)))


def target_texts(chat: ChatTokenizer, sample: Sample) -> list[str]:
    """The text of each run of target tokens, control tokens shown."""
    runs: list[list[int]] = [[]]
    for token, is_target in zip(sample.ids.tolist(), sample.is_target, strict=True):
        if is_target:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [chat.decode(run, keep_special=True) for run in runs if run]


def read(directory: Path, style: Style, template_args: Any = None, **settings: Any) -> ChatTokenizer:
    return ChatTokenizer(save(directory, style, **settings), template_args)


def with_template(directory: Path, template: str) -> ChatTokenizer:
    return read(directory, replace(STYLES["chatml"], template=template))


@pytest.fixture(scope="module", params=[*STYLES, "tiny"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTokenizer, Any]:
    """One directory, read by nanoft and by transformers."""
    directory = TINY
    if request.param != "tiny":
        directory = save(tmp_path_factory.mktemp(request.param), STYLES[request.param])
    return ChatTokenizer(directory), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def tiny() -> ChatTokenizer:
    return ChatTokenizer(TINY)


@pytest.fixture(scope="module")
def tiny_conversations() -> list[list[Message]]:
    lines = (TINY.parent / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in random.Random(5).sample(lines, 40)]


# ---- Rendering


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_renders_and_encodes_like_transformers(both: tuple[ChatTokenizer, Any], name: str) -> None:
    chat, reference = both
    messages = conversation(CONVERSATIONS[name])
    assert chat.render(messages) == reference.apply_chat_template(messages, tokenize=False)
    prompt = messages[:-1]
    expected = reference.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert chat.render_prompt(prompt) == expected
    assert (
        chat.tokenizer.encode(expected, add_special_tokens=False).ids
        == (reference.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    )


HELPERS = {
    "tojson keeps characters and does not escape HTML": "{{ messages | tojson }}{{ {'é<': '😀'} | tojson }}",
    "tojson options": "{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}"
    "{{ [1, 2] | tojson(ensure_ascii=false, separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}"
    "{% endfor %}",
    "trimmed and stripped blocks": "a\n  {% if true %}\n  b\n  {% endif %}\nc\n   {# nothing #}\n  {{ 'd' }}\n\n",
    "generation": "x\n{% generation %}\n  {{ messages[1].content }}\n{% endgeneration %}\ny",
    "absent values": "{{ tools is none }}{{ documents is none }}{{ bos_token is defined }}{{ eos_token }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("template", HELPERS.values(), ids=list(HELPERS))
def test_template_helpers_like_transformers(tmp_path: Path, template: str) -> None:
    chat = with_template(tmp_path, template)
    messages = one_turn("é <b> 'q'", "ja")
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    assert chat.render(messages) == expected


def test_absent_fields_are_not_defined(tmp_path: Path) -> None:
    chat = with_template(tmp_path, "{{ messages[0].name is defined }}{{ messages[0].role is defined }}")
    assert chat.render([{"role": "user", "content": "a", "name": None}]) == "FalseTrue"


def test_date_is_that_of_the_run(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["llama"])
    chat.date = datetime.datetime(2024, 2, 29)
    assert "Today Date: 29 Feb 2024\n" in chat.render(one_turn("a"))


def test_template_refuses_with_its_own_words(tmp_path: Path, tiny: ChatTokenizer) -> None:
    for chat in (tiny, read(tmp_path, STYLES["mistral"])):
        with pytest.raises(UserError, match="roles must alternate"):
            chat.render(conversation([("user", "a"), ("user", "b")]))


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_template_args_cannot_replace_what_every_template_is_given(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.template_args: {name}: "):
        read(tmp_path, STYLES["qwen"], {name: 1})


# ---- Where the template comes from


def test_template_file_beats_the_configuration(tmp_path: Path) -> None:
    save(tmp_path, STYLES["chatml"])
    (tmp_path / "chat_template.jinja").write_text("é{{ messages[0].content }}", encoding="utf-8")
    assert ChatTokenizer(tmp_path).render(one_turn("a")) == "éa"


def test_named_templates(tmp_path: Path) -> None:
    forms = [{"name": "rag", "template": "RAG"}, {"name": "default", "template": "DEFAULT"}]
    for number, (stored, expected) in enumerate([(forms, "DEFAULT"), (forms[:1], "RAG")]):
        chat = read(tmp_path / str(number), STYLES["chatml"], chat_template=stored)
        assert chat.render(one_turn("a")) == expected


def test_without_a_template_turns_end_with_eos(tmp_path: Path) -> None:
    chat = read(tmp_path, Style(None, "<s>", "</s>", "</s>"))
    assert not chat.has_own_template
    (sample,) = samples_of(chat, conversation(TALK))
    assert target_texts(chat, sample) == [text + "</s>" for role, text in TALK if role == "assistant"]
    assert sample.ids.tolist().count(chat.bos_id) == 1


def test_stop_ids_come_from_both_files(tmp_path: Path) -> None:
    directory = save(tmp_path, STYLES["chatml"])
    eos, other = CONTROL.index("<|im_end|>"), CONTROL.index("<|endoftext|>")
    for stored, expected in [(other, {eos, other}), ([eos, other], {eos, other}), (None, {eos})]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
        assert set(ChatTokenizer(directory).stop_ids) == expected


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["llama"], bos_token={"content": "<|begin_of_text|>", "special": True})
    assert chat.bos_id == CONTROL.index("<|begin_of_text|>")
    assert chat.render(one_turn("a")).startswith("<|begin_of_text|>")


# ---- Targets


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("style", ["chatml", "marked", "llama", "zephyr", "alpaca"])
def test_targets_are_the_replies_and_what_ends_them(tmp_path: Path, style: str, name: str, tokenizer: str) -> None:
    make = TOKENIZERS[tokenizer]
    chat = read(tmp_path, STYLES[style], tokenizer_json=make and make())
    turns = CONVERSATIONS[name]
    (sample,) = samples_of(chat, conversation(turns))
    assert target_texts(chat, sample) == [text + STYLES[style].end for role, text in turns if role == "assistant"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_targets_like_the_mask_of_transformers(tmp_path: Path, name: str) -> None:
    """Its mask holds for a template with {% generation %} whose marked text ends in one token."""
    chat = read(tmp_path, STYLES["marked"])
    messages = conversation(CONVERSATIONS[name])
    reference: Any = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    (sample,) = samples_of(chat, messages)
    assert sample.ids.tolist() == reference["input_ids"]
    assert sample.is_target.tolist() == [bool(value) for value in reference["assistant_masks"]]
    assert 0 < sample.is_target.sum() < len(sample.ids)


def test_emoji_at_the_very_ends_of_a_span(tmp_path: Path) -> None:
    """No token stands between the marked text and its neighbors, and nothing but bytes spells it."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (sample,) = samples_of(with_template(tmp_path, template), one_turn("😀😀", "😁😁"))
    assert sample.is_target.tolist() == [False] * 8 + [True] * 8


def test_pad_token_that_is_eos_stays_a_target(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["mistral"])
    (sample,) = samples_of(chat, conversation(SINGLE))
    assert sample.ids[-1] == chat.eos_id
    assert sample.is_target[-1]


def test_a_pad_token_may_be_beyond_the_embedding(tmp_path: Path) -> None:
    """Some add a pad token without resizing the model; nothing sees padding, so an id that every model has is used."""
    save(tmp_path, STYLES["chatml"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stored, "pad_token": "<pad>"}))
    assert ChatTokenizer(tmp_path).pad_id < size


def test_turn_end_that_is_not_eos(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["marked"])
    (sample,) = samples_of(chat, conversation(SINGLE))
    targets = sample.ids[sample.is_target].tolist()
    assert targets[-1] == CONTROL.index("<|im_end|>") != chat.eos_id


def test_plain_text_is_all_target_and_ends(tiny: ChatTokenizer) -> None:
    (sample,) = tiny.encode([tiny.text_sample("Hello </s> you", 7)])
    assert sample.record == 7
    assert sample.ids[0] == tiny.bos_id
    assert sample.is_target.tolist() == [False] + [True] * (len(sample.ids) - 1)
    assert sample.ids.tolist().count(tiny.eos_id) == 1
    assert tiny.decode(sample.ids.tolist()) == "Hello </s> you"


def test_plain_text_without_bos_has_nothing_to_predict_its_first_token(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["chatml"])
    (sample,) = chat.encode([chat.text_sample("Hello there", 0)])
    assert sample.is_target.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_mark_shows_targets(tiny: ChatTokenizer) -> None:
    (sample,) = samples_of(tiny, one_turn("Go?", "Yes."))
    assert tiny.highlight_targets(sample, color=False) == "<s>[INST]Go?[/INST]⟦Yes.</s>⟧"
    assert tiny.highlight_targets(sample, color=True) == "\033[2m<s>[INST]Go?[/INST]\033[0m\033[32mYes.</s>\033[0m"


# ---- The first token


@pytest.mark.parametrize("tokenizer_writes_it", [True, False])
@pytest.mark.parametrize("template_writes_it", [True, False])
def test_exactly_one_bos(tmp_path: Path, template_writes_it: bool, tokenizer_writes_it: bool) -> None:
    template = ("{{ bos_token }}" if template_writes_it else "") + CHATML
    style = Style(template, "<s>", "<|im_end|>", "<|im_end|>")
    chat = read(tmp_path, style, adds_bos=tokenizer_writes_it)
    expected = int(template_writes_it or tokenizer_writes_it)
    (sample,) = samples_of(chat, conversation(TALK))
    for ids in (sample.ids.tolist(), chat.encode_prompt(conversation(TALK[:1]))):
        assert ids.count(CONTROL.index("<s>")) == expected
        assert (ids[0] == chat.bos_id) == bool(expected)
    assert target_texts(chat, sample) == [text + "<|im_end|>" for role, text in TALK if role == "assistant"]


# ---- Training sees what use sees


@pytest.mark.parametrize("name", [*STYLES, "tiny"])
def test_prompt_is_a_prefix_of_the_training_ids(
    tmp_path: Path, name: str, tiny_conversations: list[list[Message]]
) -> None:
    """For every assistant turn, the ids given in use are those before its targets in training."""
    directory = TINY if name == "tiny" else save(tmp_path, STYLES[name])
    chat = ChatTokenizer(directory, {"enable_thinking": False})
    for messages in tiny_conversations:
        samples = samples_of(chat, messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        starts = [
            (sample, at)
            for sample in samples
            for at in range(1, len(sample.ids))
            if sample.is_target[at] and not sample.is_target[at - 1]
        ]
        assert len(starts) == len(turns)
        for turn, (sample, at) in zip(turns, starts, strict=True):
            assert chat.encode_prompt(messages[:turn]) == sample.ids[:at].tolist()


@pytest.mark.parametrize(("name", "style"), [("system+", "mistral")])
def test_rewritten_history_gives_a_sample_for_each_turn(tmp_path: Path, name: str, style: str) -> None:
    chat = read(tmp_path, STYLES[style])
    messages = conversation([("system", "Be brief."), *TALK] if name == "system+" else CONVERSATIONS[name])
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    samples = samples_of(chat, messages)
    assert len(samples) == len(turns) > 1
    for turn, sample in zip(turns, samples, strict=True):
        assert chat.decode(sample.ids.tolist(), keep_special=True) == chat.render(messages[: turn + 1])
        (answer,) = target_texts(chat, sample)
        assert answer.lstrip() == messages[turn]["content"] + STYLES[style].end


def test_earlier_thinking_is_context_only_as_rendered(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["qwen"])
    thought = "<think>\nhm\n</think>\n\nOne"
    turns = [("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", "Two")]
    first, second = samples_of(chat, conversation(turns))
    assert target_texts(chat, first) == [thought + "<|im_end|>"]
    assert target_texts(chat, second) == ["Two<|im_end|>"]
    assert chat.decode(second.ids.tolist()).endswith("b\nassistant\nTwo\n")  # without an empty thought, as in use
    assert "hm" not in chat.decode(second.ids.tolist())


def test_an_empty_thought_that_the_data_has_is_learned(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["qwen"])
    (sample,) = samples_of(chat, one_turn("a", "<think>\n\n</think>\n\nOne"))
    assert target_texts(chat, sample) == ["<think>\n\n</think>\n\nOne<|im_end|>"]


def test_template_args_reach_the_template(tmp_path: Path) -> None:
    prompts = [read(tmp_path, STYLES["qwen"], {"enable_thinking": on}).render_prompt(one_turn("a")) for on in (1, 0)]
    assert prompts[0] + "<think>\n\n</think>\n\n" == prompts[1]


def test_template_that_changes_the_prompt_when_answered(tmp_path: Path) -> None:
    """What the model is given in use counts; how a call would stand there is not known, so it is refused."""
    counted = "message.role + (' of ' ~ messages | length) + '\\n'"
    chat = with_template(tmp_path / "text", CHATML.replace("message.role + '\\n'", counted))
    (sample,) = samples_of(chat, one_turn("a"))
    prompt = "<|im_start|>user of 1\na<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(sample.ids.tolist(), keep_special=True) == prompt + "yes<|im_end|>\n"
    assert target_texts(chat, sample) == ["yes<|im_end|>"]
    chat = with_template(tmp_path / "calls", WITH_TOOLS.replace("message.role + '\\n'", counted))
    with pytest.raises(UserError, match="does not start with its prompt"):
        chat.render_samples(TOOLED[:2], 0)


# ---- Control tokens that a user wrote


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("style", [name for name in STYLES if name != "qwen"])
def test_control_tokens_in_content_stay_text(tmp_path: Path, style: str, tokenizer: str) -> None:
    make = TOKENIZERS[tokenizer]
    chat = read(tmp_path, STYLES[style], tokenizer_json=make and make())
    plain = one_turn("the /s> or |im_end|> you", "x /s> y")
    hostile = one_turn("the </s> or <|im_end|> you", "x </s> y<s>😀<|eot_id|>")
    (expected,), (sample,) = samples_of(chat, plain), samples_of(chat, hostile)

    def control(ids: list[int]) -> list[int]:
        return [token for token in ids if token < len(CONTROL)]

    assert control(sample.ids.tolist()) == control(expected.ids.tolist())
    assert chat.decode(sample.ids.tolist(), keep_special=True) == (
        chat.decode(expected.ids.tolist(), keep_special=True)
        .replace("the /s> or |im_end|> you", hostile[0]["content"])
        .replace("x /s> y", hostile[1]["content"])
    )
    (answer,) = target_texts(chat, sample)
    assert answer.lstrip() == hostile[1]["content"] + STYLES[style].end
    assert chat.encode_prompt(hostile[:1]) == sample.ids[: sample.is_target.argmax()].tolist()


def test_control_tokens_in_pieces_do_not_join(tiny: ChatTokenizer) -> None:
    """Content cannot be crafted so that its pieces form a control token."""
    for content in ["<" + BREAK + "/s>", "<</s>/s>", "</s></s>", "<" + BREAK * 2 + "/s>", "[[INST]INST]"]:
        (sample,) = samples_of(tiny, one_turn(content))
        assert sorted(token for token in sample.ids.tolist() if token < 6) == [1, 2, 4, 5]  # one of each, from template
        assert f"[INST]{content.replace(BREAK, '')}[/INST]" in tiny.decode(sample.ids.tolist(), keep_special=True)


# ---- What a tokenizer's file may say


@pytest.mark.parametrize("kind", ["truncation", "padding"])
def test_a_tokenizer_file_neither_cuts_nor_pads(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.from_str(byte_level())
    if kind == "truncation":
        tokenizer.enable_truncation(12)
    else:
        tokenizer.enable_padding(pad_token="<s>", length=100)
    plain, other = (
        read(tmp_path / name, STYLES["chatml"], tokenizer_json=text)
        for name, text in (("plain", None), ("other", tokenizer.to_str()))
    )
    for messages in (conversation(SINGLE), conversation(TALK)):
        for expected, found in zip(samples_of(plain, messages), samples_of(other, messages), strict=True):
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.is_target.tolist() == expected.is_target.tolist()
        assert other.encode_prompt(messages[:1]) == plain.encode_prompt(messages[:1])


def test_a_pre_tokenizer_that_drops_characters(tmp_path: Path) -> None:
    """The widths of the tokens do not give their positions then, so the library's offsets are used."""
    tokenizer = Tokenizer.from_str(byte_level())
    drop = pre_tokenizers.Split("\r", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([drop, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    chat = read(tmp_path, STYLES["chatml"], tokenizer_json=tokenizer.to_str())
    (sample,) = samples_of(chat, one_turn("a\r\nb\r\nc", "the answer"))
    assert target_texts(chat, sample) == ["the answer<|im_end|>"]


def test_a_turn_that_a_rewritten_history_does_not_show_cannot_be_left_out(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["qwen"])
    messages = [{**m, "weight": int(i != 1)} for i, m in enumerate(conversation(TALK))]
    messages[1]["content"] = "<think>\nhm\n</think>\n\nFine."
    with pytest.raises(TemplateRefusal, match=r"rewrites earlier turns: use data\.train_on=assistant"):
        chat.render_samples(messages, 0, train_on="all")


# ---- Any conversation


@pytest.fixture(scope="module")
def all_styles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    root = tmp_path_factory.mktemp("styles")
    without_thoughts = {"enable_thinking": False}
    return {name: read(root / name, style, without_thoughts) for name, style in STYLES.items()}


pieces = st.sampled_from([*"ab é😀語\n\t<>[]|/", *CONTROL])
said = st.lists(pieces, min_size=1, max_size=12).map("".join).filter(str.strip)


@settings(deadline=None, max_examples=150)
@given(
    style=st.sampled_from(sorted(STYLES)),
    turns=st.lists(st.tuples(said, said, st.booleans()), min_size=1, max_size=3),
    system=st.none() | said,
)
def test_whatever_is_said(
    all_styles: dict[str, ChatTokenizer], style: str, turns: list[tuple[str, str, bool]], system: str | None
) -> None:
    """Exactly the trained answers and their ends are targets, and each stands behind exactly its prompt of use."""
    chat = all_styles[style]
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer, trained in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "train": trained}]
    expected = [answer.strip() for _, answer, trained in turns if trained]
    samples = samples_of(chat, messages) if expected else []
    texts = [text for sample in samples for text in target_texts(chat, sample)]
    assert [text.removesuffix(STYLES[style].end).strip() for text in texts] == expected
    assert all(text.endswith(STYLES[style].end) for text in texts)
    indices = iter(i for i, m in enumerate(messages) if m.get("train"))
    for sample in samples:
        first = np.flatnonzero(np.diff(sample.is_target.astype(int)) == 1) + 1
        for at in first:
            assert sample.ids[:at].tolist() == chat.encode_prompt(messages[: next(indices)])
        if chat.bos_id is not None:
            assert sample.ids.tolist().count(chat.bos_id) == 1


# ---- Whose turn it is


@pytest.mark.parametrize("style", ["chatml", "marked", "mistral", "qwen", "alpaca"])
@pytest.mark.parametrize(
    ("train_on", "fields", "expected"),
    [
        ("assistant", {}, [1, 3, 5]),
        ("last_assistant", {}, [5]),
        ("assistant", {3: {"weight": 0}, 1: {"weight": 1}}, [1, 5]),
        ("assistant", {1: {"train": False}, 3: {"train": True}}, [3, 5]),
        ("last_assistant", {5: {"train": False}}, []),
    ],
)
def test_which_turns_are_learned(
    tmp_path: Path, style: str, train_on: str, fields: dict[int, Any], expected: list[int]
) -> None:
    chat = read(tmp_path, STYLES[style])
    messages = [{**message, **fields.get(index, {})} for index, message in enumerate(conversation(TALK))]
    samples = list(chat.encode(chat.render_samples(messages, 0, train_on=train_on)))
    answers = [text.lstrip() for sample in samples for text in target_texts(chat, sample)]
    assert answers == [TALK[index][1] + STYLES[style].end for index in expected]


def test_everything_may_be_learned(tmp_path: Path) -> None:
    chat = read(tmp_path, STYLES["chatml"])
    messages = conversation(TALK)
    (sample,) = chat.encode(chat.render_samples(messages, 0, train_on="all"))
    assert sample.is_target.tolist() == [False] + [True] * (len(sample.ids) - 1)
    messages[3]["weight"] = 0
    (sample,) = chat.encode(chat.render_samples(messages, 0, train_on="all"))
    assert chat.decode(sample.ids[1:][~sample.is_target[1:]].tolist(), keep_special=True) == "It is\n\n4<|im_end|>"


# ---- Where a turn begins and ends


@pytest.mark.parametrize("answer", ["\nYes", "\n\n\nYes", " Yes", "Yes\n"])
def test_a_token_that_would_join_prompt_and_answer(tmp_path: Path, answer: str) -> None:
    """The prompt ends in a newline and so the answer may begin: in use, the prompt's ids stand alone."""
    tokenizer = json.loads(byte_level())
    newline = "Ċ"
    size = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] |= {newline * 2: size, newline * 4: size + 1}
    tokenizer["model"]["merges"][:0] = [[newline, newline], [newline * 2, newline * 2]]
    chat = read(tmp_path, STYLES["alpaca"], tokenizer_json=json.dumps(tokenizer))
    messages = conversation([("user", "a"), ("assistant", answer), ("user", "b"), ("assistant", answer)])
    samples = samples_of(chat, messages)
    assert len(samples) == (2 if answer.startswith("\n\n") else 1)
    assert [text for sample in samples for text in target_texts(chat, sample)] == [answer + "</s>"] * 2
    for sample, turn in zip(samples, (1, 3), strict=False):
        first = int(sample.is_target.argmax())
        assert sample.ids[:first].tolist() == chat.encode_prompt(messages[:turn])
        assert chat.decode(sample.ids[first:].tolist(), keep_special=True).startswith(answer + "</s>")


AROUND = {
    "a mark within the turn": ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", "", "X<|im_end|>"),
    "a mark with the header": ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n", "", "X<|im_end|>"),
    "a mark too long": ("{% generation %}{{ m.content }}<|im_end|>\n\n{% endgeneration %}", "", "X<|im_end|>"),
    "two ends": ("{{ m.content }}<|im_end|>\n<|endoftext|>", "", "X<|im_end|>"),
    "a header that is always there": ("{{ m.content }}<|im_end|>\n<|im_start|>assistant\n", "", "X<|im_end|>"),
    "a line between": ("{{ m.content }}\n<|im_end|>\n", "", "X\n<|im_end|>"),
    "something before every answer": ("<think></think>{{ m.content }}<|im_end|>\n", "", "X<|im_end|>"),
    "white space before the answer": (" {{ m.content }}<|im_end|>\n", "", " X<|im_end|>"),
    "the prompt says it": ("<think></think>{{ m.content }}<|im_end|>\n", "<think></think>", "X<|im_end|>"),
    "no token ends it": ("{{ m.content }}\n", "", "X"),
    "words end it": ("{{ m.content }} END\n", "", "X END"),
}


@pytest.mark.parametrize(("answered", "prompted", "expected"), AROUND.values(), ids=list(AROUND))
def test_targets_are_what_the_model_must_say(tmp_path: Path, answered: str, prompted: str, expected: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>assistant\n' }}" + answered + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + prompted + "' }}{% endif %}"
    )
    chat = with_template(tmp_path, template)
    for messages in (one_turn("a", "X"), conversation([("user", "a"), ("assistant", "X")] * 2)):
        texts = [text for sample in samples_of(chat, messages) for text in target_texts(chat, sample)]
        assert texts == [expected] * (len(messages) // 2)


def test_the_end_of_the_templates_turn_stops_an_answer(tmp_path: Path) -> None:
    chat = read(tmp_path, Style(CHATML, None, "<|endoftext|>", "<|im_end|>"))
    assert chat.stop_ids == sorted([CONTROL.index("<|endoftext|>"), CONTROL.index("<|im_end|>")])


# ---- Tools

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "</s>"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "<|im_end|>", "parameters": {}}}
TOOLED: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look_up", "content": "found <|im_start|>"},
    {"role": "assistant", "content": "b"},
]
WITH_TOOLS = r"""{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def test_tool_calls_are_learned_and_tools_are_seen(tmp_path: Path) -> None:
    chat = with_template(tmp_path, WITH_TOOLS)
    (sample,) = chat.encode(chat.render_samples(TOOLED, 0, [TOOL]))
    call = json.dumps(CALL["function"])
    assert target_texts(chat, sample) == [call + "<|im_end|>", "b<|im_end|>"]
    assert "look_up" in chat.decode(sample.ids[: sample.is_target.argmax()].tolist())
    controls = [token for token in sample.ids.tolist() if token < len(CONTROL)]
    assert len(controls) == 2 * 5  # system, user, assistant, tool, assistant; none from within a text
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TOOLED, tools=[TOOL], tokenize=False)
    assert chat.decode(sample.ids.tolist(), keep_special=True) == expected
    assert chat.encode_prompt(TOOLED[:1], [TOOL]) == sample.ids[: sample.is_target.argmax()].tolist()


@pytest.mark.parametrize(("tools", "what"), [([TOOL], "tools"), (None, "tool_calls")])
def test_templates_that_leave_tools_out_are_refused(tmp_path: Path, tools: Any, what: str) -> None:
    chat = read(tmp_path, STYLES["chatml"])
    with pytest.raises(TemplateRefusal, match=f"omits {what}:"):
        chat.render_samples(TOOLED if tools is None else one_turn("a"), 0, tools)


# ---- Files that must not be trusted

BROKEN = {
    "no tokenizer": ("tokenizer.json", None, "tokenizer.json"),
    "tokenizer cut off": ("tokenizer.json", b'{"version": "1.0", "mod', "tokenizer.json"),
    "tokenizer of another kind": ("tokenizer.json", b"{}", "tokenizer.json"),
    "tokenizer with bytes": ("tokenizer.json", b"\xff\xfe\x00", "tokenizer.json"),
    "configuration cut off": ("tokenizer_config.json", b'{"eos', "tokenizer_config.json"),
    "configuration as a list": ("tokenizer_config.json", b"[]", "tokenizer_config.json"),
    "configuration with bytes": ("tokenizer_config.json", b'{"a": "\xff"}', "tokenizer_config.json"),
    "configuration nested": ("tokenizer_config.json", b'{"a": ' + b"[" * 100_000, "tokenizer_config.json"),
    "template as a number": ("tokenizer_config.json", b'{"chat_template": 5}', "tokenizer_config.json"),
    "templates without text": ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}, 3]}', "chat_template"),
    "template syntax": ("chat_template.jinja", b"{% for m in %}", "chat template"),
    "template unknown filter": ("chat_template.jinja", b"{{ 1 | nothing }}", "chat template"),
    "template with bytes": ("chat_template.jinja", b"caf\xe9", "chat_template.jinja"),
    "generation cut off": ("generation_config.json", b"{", "generation_config.json"),
    "stop token as a word": ("generation_config.json", b'{"eos_token_id": "</s>"}', "generation_config.json"),
    "token as a number": ("tokenizer_config.json", b'{"eos_token": 2}', "tokenizer_config.json"),
}


@pytest.mark.parametrize(("name", "content", "named"), BROKEN.values(), ids=list(BROKEN))
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes | None, named: str) -> None:
    save(tmp_path, STYLES["chatml"])
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        ChatTokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert named in str(caught.value)


def test_the_tiny_tokenizer_needs_nothing_but_its_files(tmp_path: Path, tiny: ChatTokenizer) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    copied = ChatTokenizer(tmp_path)
    assert copied.encode_prompt(one_turn("a")[:1]) == tiny.encode_prompt(one_turn("a")[:1])
    assert copied.stop_ids == tiny.stop_ids == [2]
