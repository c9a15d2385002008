"""Control tokens spelled out in the data: as characters, as tokens, and how each is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from templates import STYLES, save
from tokenizers import AddedToken, Tokenizer

from nanoft import UserError
from nanoft.config import Config, DataConfig
from nanoft.data.chat_template import TemplateRefusal
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets, describe_data
from nanoft.data.inspection import preview


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], ChatTokenizer]:
    made = {}
    for style in ("mistral", "chatml"):
        directory = save(tmp_path_factory.mktemp(style), STYLES[style])
        for choice in ("text", "parse"):
            config = Config().override({"data.control_tokens": choice})
            made[style, choice] = ChatTokenizer.from_config(directory, config)
    return made


def build(chat: ChatTokenizer, path: Path, records: list[Any], **changes: Any) -> PreparedDataset:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return build_datasets(DataConfig(str(path), **{"validation_split": 0.0, **changes}), chat, 512, 0, print)


def ids_of(chat: ChatTokenizer, rendered: str) -> list[int]:
    """The ids that the tokenizers library gives for a text with control tokens."""
    return chat.tokenizer.encode(rendered, add_special_tokens=False).ids


TEMPLATED = [{"text": f"<s>[INST] Say {n} [/INST] It is {n}. </s>"} for n in range(4)]
CHATML = [{"text": f"<|im_start|>user\nSay {n}<|im_end|>\n<|im_start|>assistant\nIt.<|im_end|>\n"} for n in range(4)]
BY_HAND = [{"instruction": f"Say {n}", "input": "", "output": f"It is {n}.</s>"} for n in range(4)]


@pytest.mark.parametrize(
    ("style", "records", "token"),
    [("mistral", TEMPLATED, "<s>"), ("mistral", BY_HAND, "</s>"), ("chatml", CHATML, "<|")],
)
def test_where_most_texts_have_some_the_user_chooses(
    chats: dict[tuple[str, str], ChatTokenizer], tmp_path: Path, style: str, records: list[Any], token: str
) -> None:
    chat = chats[style, "text"]
    with pytest.raises(
        UserError, match=r"d\.jsonl:1: '.* is a control token of this tokenizer, as in 4 of 4 records: set"
    ):
        build(chat, tmp_path / "d.jsonl", records)
    found = build(chat, tmp_path / "d.jsonl", records, control_tokens="text")
    said = "\n".join(describe_data(found.report))
    assert (
        f"a control token of this tokenizer is encoded as text (data.control_tokens): 4 records, first {tmp_path}"
        in said
    )
    shown = preview(found, chat, seed=0)
    assert f"\\{token}" in shown.replace("⟦", "")
    assert len(build(chat, tmp_path / "d.jsonl", [*records, {"text": "a", **dict.fromkeys(records[0], "plain")}] * 5,
                     deduplicate=False, control_tokens="text").training) == 25  # fmt: skip


def test_a_few_or_those_in_a_chat_are_text_and_counted(
    chats: dict[tuple[str, str], ChatTokenizer], tmp_path: Path
) -> None:
    chat = chats["mistral", "text"]
    few = build(chat, tmp_path / "a.jsonl", [*TEMPLATED, *({"text": f"plain {n}"} for n in range(5))])
    assert [note[1] for note in few.report["notes"]] == [4]
    talk = [{"role": "user", "content": "</s>?"}, {"role": "assistant", "content": "yes</s>"}]
    (sample,) = build(chat, tmp_path / "b.jsonl", [{"messages": talk}]).training
    assert sample.ids.tolist().count(chat.eos_id) == 1


def test_parsed_texts_are_what_the_tokenizer_makes_of_them(
    chats: dict[tuple[str, str], ChatTokenizer], tmp_path: Path
) -> None:
    for style, records, end in (("mistral", TEMPLATED, ""), ("chatml", CHATML, "\n")):
        chat = chats[style, "parse"]
        found = build(chat, tmp_path / f"{style}.jsonl", records, control_tokens="parse")
        expected = [ids_of(chat, record["text"].removesuffix(end)) for record in records]  # ends in its stop token
        assert [sample.ids.tolist() for sample in found.training] == expected
        assert all(sample.is_target[1:].all() for sample in found.training)
        assert "\\" not in preview(found, chat, seed=0)
    chat = chats["mistral", "parse"]
    rendered = chat.text_sample("<s>[INST] a [/INST] b", 0)
    assert rendered.text == "<s>[INST] a [/INST] b</s>"  # no end of its own
    raw = {"prompt": "<s>[INST] a [/INST]", "completion": " b</s>"}
    (sample,) = build(
        chat, tmp_path / "raw.jsonl", [raw], format="raw_prompt_completion", control_tokens="parse"
    ).training
    assert sample.ids.tolist() == ids_of(chat, "<s>[INST] a [/INST] b</s>")
    assert sample.ids[sample.is_target].tolist() == ids_of(chat, " b</s>")


@pytest.mark.parametrize("special", [True, False])
def test_a_token_for_an_image_is_refused_where_it_would_be_one(tmp_path: Path, special: bool) -> None:
    """As Mistral's and Gemma's tokenizers have them: as special tokens, whose characters are text unless parsed."""
    directory = save(tmp_path, STYLES["mistral"])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("[IMG]", special=special)])
    tokenizer.save(str(directory / "tokenizer.json"))
    number = tokenizer.token_to_id("[IMG]")
    records = [
        {"prompt": "What is in [IMG]?", "completion": "A cat"},
        {"prompt": "An <img> tag?", "completion": "HTML"},
    ]
    for choice in ("text", "parse"):
        chat = ChatTokenizer.from_config(directory, Config().override({"data.control_tokens": choice}))
        found = build(chat, tmp_path / "d.jsonl", records, control_tokens=choice, max_bad_records=1)
        is_refused = choice == "parse" or not special
        assert len(found.training) == 2 - is_refused
        assert not any(number in sample.ids for sample in found.training)
        said = f"{tmp_path / 'd.jsonl'}:1: [IMG] stands for an image: only text is supported"
        assert (said in "\n".join(describe_data(found.report))) == is_refused
    with pytest.raises(UserError, match=r"d\.jsonl:1: \[IMG\] stands for an image"):
        build(chat, tmp_path / "d.jsonl", records, control_tokens="parse")


def test_the_end_of_an_answer_is_there_once(chats: dict[tuple[str, str], ChatTokenizer], tmp_path: Path) -> None:
    chat, plain = chats["mistral", "parse"], chats["mistral", "text"]
    found = build(chat, tmp_path / "a.jsonl", BY_HAND, control_tokens="parse")
    without = [{**record, "output": record["output"].removesuffix("</s>")} for record in BY_HAND]
    other = build(plain, tmp_path / "b.jsonl", without)
    assert [sample.ids.tolist() for sample in found.training] == [sample.ids.tolist() for sample in other.training]
    assert chat.control.remove("It is 0.</s> ") == "It is 0."  # as its answer is decoded
    assert plain.control.remove("It is 0.</s> ") == "It is 0.</s> "


def test_a_text_that_was_rendered_is_not_rendered_again(chats: dict[tuple[str, str], ChatTokenizer]) -> None:
    asked = {"role": "user", "content": "<s>[INST] a [/INST]"}
    with pytest.raises(
        TemplateRefusal, match=r"^a message contains <s>, which the chat template writes: set data\.format=raw"
    ):
        chats["mistral", "parse"].render_samples([asked, {"role": "assistant", "content": "b"}], 0)


def test_chat_tokenizers_that_differ_in_this_have_their_own_cache_entries(
    chats: dict[tuple[str, str], ChatTokenizer],
) -> None:
    assert chats["mistral", "text"].fingerprint() != chats["mistral", "parse"].fingerprint()
