"""What templates read, what they omit, and where their turns begin and end; transformers renders the expected texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from templates import CHATML, NEXT_ROLE, STYLES, Style, save
from transformers import AutoTokenizer

from nanoft import UserError
from nanoft.config import DataConfig
from nanoft.data.chat_template import CHATML as REAL_CHATML
from nanoft.data.chat_template import DEFAULT_TEMPLATE
from nanoft.data.chat_tokenizer import ChatTokenizer, Message
from nanoft.data.formats import Conversation, read_file

USER, SPOKEN = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
# A thought is shown only behind the last question.
THINKING = r"""{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
    {%- if m.FIELD and loop.index0 > ns.last %}{{ '<think>' + m.FIELD + '</think>' }}{% endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# The prompt opens a thought; an answered turn shows what follows it.
OPENING = r"""{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
    {{- m.content.split('</think>')[-1].lstrip() + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
CALLING = r"""{%- for t in tools or [] %}{{ t.function.name + ' ' }}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
    {%- for call in m.tool_calls or [] %}{{ call.function.name + ' ' + ARGUMENTS }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def with_template(directory: Path, source: Any, **more: Any) -> ChatTokenizer:
    return ChatTokenizer(save(directory, Style(source, None, "<|im_end|>", "<|im_end|>")), **more)


def learned(chat: ChatTokenizer, messages: list[Message], tools: Any = None, **more: Any) -> list[tuple[str, str]]:
    """(what stands before it, its text) for each run of targets; the former is verified to be the prompt in use."""
    found = []
    for piece in chat.render_samples(messages, 0, tools, **more):
        for turn, (start, end) in zip(piece.turns, piece.spans, strict=True):
            before = chat.render_prompt(messages[:turn], tools, more.get("template_args"))
            assert piece.text[:start] == before
            found.append((before, piece.text[start:end]))
    return found


def called(*names: str, content: str = "", **arguments: Any) -> Message:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name in names]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_of_an_earlier_turn_is_learned_under_the_templates_name(tmp_path: Path, name: str) -> None:
    chat = with_template(tmp_path, THINKING.replace("FIELD", name))
    messages = [USER, {**SPOKEN, "reasoning_content": "two"}, {"role": "user", "content": "+1"},
                {"role": "assistant", "content": "5", "reasoning_content": "one"}]  # fmt: skip
    assert [text for _, text in learned(chat, messages)] == [
        "<think>two</think>4<|im_end|>", "<think>one</think>5<|im_end|>"
    ]  # fmt: skip
    renamed = [{name if key == "reasoning_content" else key: m[key] for key in m} for m in messages]
    assert chat.render(messages) == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(renamed, tokenize=False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"content": "<think>\nTwo.\n</think>\n\n4"}, "Two.\n</think>\n\n4"),
        ({"content": "4", "reasoning_content": "Two."}, "Two.\n</think>\n\n4"),
        ({"content": "Two.\n</think>\n\n4"}, "Two.\n</think>\n\n4"),
        ({"content": "4"}, "\n</think>\n\n4"),  # no thought: it is closed at once
    ],
)
def test_a_prompt_that_opens_a_thought_is_continued(tmp_path: Path, answer: Any, expected: str) -> None:
    chat = with_template(tmp_path, OPENING)
    messages = [USER, {"role": "assistant", **answer}]
    assert learned(chat, [*messages, USER, SPOKEN]) == [
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n", expected + "<|im_end|>"),
        (chat.render_prompt([*messages, USER]), "\n</think>\n\n4<|im_end|>"),
    ]
    assert "generation prompt" in chat.render_samples(messages, 0)[0].notes[0]


def test_thoughts_and_plain_answers_mix_and_a_record_may_choose(tmp_path: Path) -> None:
    chat = ChatTokenizer(save(tmp_path, STYLES["qwen"]))
    thought = {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n4"}
    plain, quiet = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", {"enable_thinking": False}
    assert learned(chat, [USER, thought]) == [(plain, thought["content"] + "<|im_end|>")]
    assert learned(chat, [USER, SPOKEN]) == [(plain, "4<|im_end|>")]
    empty = plain + "<think>\n\n</think>\n\n"
    assert learned(chat, [USER, SPOKEN], template_args=quiet) == [(empty, "4<|im_end|>")]
    with pytest.raises(UserError, match="has a thought, but the prompt ends with a closed one: set enable_thinking"):
        chat.render_samples([USER, thought], 0, template_args=quiet)


OMITTING = {
    "reasoning_content": (CHATML, [USER, {**SPOKEN, "reasoning_content": "4"}]),  # also where it equals the answer
    "tool_calls": (CHATML, [USER, called("f")]),
    "one call of two": (CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), [USER, called("f", "g")]),
    "the text beside tool calls": (
        CALLING.replace("+ m.content", "+ (m.content if not m.tool_calls else '')"),
        [USER, called("f", content="Wait.")]
    ),
    "the system message": (
        CHATML.replace("in messages", "in messages if message.role != 'system'"),
        [{"role": "system", "content": "Be brief."}, USER, SPOKEN],
    ),
    "an answer or its thought": (
        CHATML.replace("message.content", "message.content.split('</think>')[-1]"),
        [USER, {"role": "assistant", "content": "<think>Two.</think>4"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OMITTING)
def test_what_a_template_omits_is_refused_or_counted(tmp_path: Path, what: str) -> None:
    template, messages = OMITTING[what]
    template = template.replace("ARGUMENTS", "call.function.arguments | tojson")
    what = what.replace("one call of two", "tool_calls")
    with pytest.raises(UserError, match=rf"^the chat template omits {what}: .*set data\.unrendered=warn"):
        with_template(tmp_path, template).render_samples(messages, 0)
    if any(message["content"] or "tool_calls" not in message for message in messages[1:]) and what != "tool_calls":
        (sample,) = with_template(tmp_path, template, may_omit=True).render_samples(messages, 0)
        assert sample.notes == (f"the chat template omits {what}",)


def test_a_template_without_the_users_text_is_refused(tmp_path: Path) -> None:
    chat = with_template(tmp_path, CHATML.replace("message.content", "message.content[0].text"), may_omit=True)
    chat = with_template(
        tmp_path, CHATML.replace("in messages", "in messages if message.role != 'user'"), may_omit=True
    )
    with pytest.raises(
        UserError, match=r"^the chat template omits the user's text: choose another with model.chat_templ"
    ):
        chat.render_samples([USER, SPOKEN], 0)


@pytest.mark.parametrize("shown", ["call.function.arguments", "(call.function.arguments ~ '')"])
def test_arguments_as_text_where_a_template_wants_them(tmp_path: Path, shown: str) -> None:
    """Added to a text, an object fails; written out, it would be Python's {'city': 'Zürich'}."""
    chat = with_template(tmp_path, CALLING.replace("ARGUMENTS", shown))
    ((_, text),) = learned(chat, [USER, called("f", city="Zürich")])
    assert text == 'f {"city": "Zürich"}<|im_end|>'


def test_with_tools_the_template_for_tools_is_used(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": CALLING.replace("ARGUMENTS", "call.function.arguments | tojson")},
    ]
    chat, tools = with_template(tmp_path, named), [{"type": "function", "function": {"name": "f"}}]
    messages = [USER, called("f", a=1)]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tools=tools, tokenize=False)
    assert chat.render(messages, tools=tools) == expected
    assert chat.render([USER]) == "<|im_start|>user\n2+2?<|im_end|>\n"
    chosen = with_template(tmp_path, named, template="tool_use")
    assert (
        chosen.render(messages)
        == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n" + 'f {"a": 1}<|im_end|>\n'
    )


def test_a_template_is_chosen_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    model = tmp_path / "model"
    assert with_template(model, CHATML, template=str(tmp_path / "mine.jinja")).render([USER]) == "2+2?!"
    assert with_template(model, CHATML, template="chatml").template == REAL_CHATML
    assert with_template(model, None).template == DEFAULT_TEMPLATE
    with pytest.raises(UserError, match=r"^model\.chat_template: cahtml: neither .* chatml, default"):
        with_template(model, CHATML, template="cahtml")


def test_the_next_roles_token_ends_an_answer(tmp_path: Path) -> None:
    """As in GLM: no token of its own ends a turn, and generation stops at the token of the next role."""
    save(tmp_path, Style(NEXT_ROLE, None, "<|endoftext|>", ""))
    ids = [json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"][name] for name in ("<s>", "[INST]")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    chat = ChatTokenizer(tmp_path)
    messages = [USER, called("f"), {"role": "tool", "content": "r"}, SPOKEN, USER, SPOKEN]
    assert [text for _, text in learned(chat, messages)] == ["f[INST]", "4<s>", "4<s>"]


def test_of_several_end_tokens_the_one_that_stops_ends_the_turn(tmp_path: Path) -> None:
    """As in Cohere's: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, and a header that is always there."""
    template = CHATML.replace(
        "'<|im_end|>' + '\\n'", "('[/INST]' if message.role == 'assistant' else '') + '<|im_end|>'"
    )
    chat = with_template(tmp_path, template)
    assert [text for _, text in learned(chat, [USER, SPOKEN, USER, SPOKEN])] == ["4[/INST]<|im_end|>"] * 2


def test_a_prompt_that_is_rendered_otherwise_once_it_is_answered(tmp_path: Path) -> None:
    """As in Hermes' tools: a line break follows the last message only."""
    template = CHATML.replace("message.content +", "message.content + ('\\n' if not loop.last else '') +")
    chat = with_template(tmp_path, template)
    assert [text for _, text in learned(chat, [USER, SPOKEN, USER, SPOKEN])] == ["4<|im_end|>"] * 2


def read(path: Path, record: dict[str, Any]) -> Any:
    path.write_text(json.dumps(record))
    return list(read_file(path, DataConfig()))[1]


def test_names_of_calls_thoughts_and_targets(tmp_path: Path) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}, "loss": False},
        {"role": "function", "name": "f", "content": {"t": 18}},
        {**SPOKEN, "thinking": "hm", "training": False, "rating": 5, "source": None},
    ]
    record = {"messages": messages, "functions": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": True}}
    found = read(tmp_path / "d.json", record)
    assert isinstance(found, Conversation)
    assert found.messages == [
        USER, called("f", a=1) | {"train": False}, {"role": "tool", "name": "f", "content": '{"t": 18}'},
        {**SPOKEN, "reasoning_content": "hm", "train": False},
    ]  # fmt: skip
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]
    assert found.template_args == {"enable_thinking": True}
    assert found.notes == ("the field 'rating' of a message is not used",)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"weight": 1, "train": False}, "contradict each other"),
        ({"thinking": "a", "reasoning_content": "b"}, "thinking and reasoning_content differ"),
        ({"tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "keep one of them"),
    ],
)
def test_two_names_that_disagree_are_rejected(tmp_path: Path, more: Any, said: str) -> None:
    assert said in read(tmp_path / "d.json", {"messages": [USER, {**SPOKEN, **more}]}).reason
