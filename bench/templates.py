"""Chat templates of other projects, rendered by nanoft's sandbox and by transformers.

    python bench/templates.py DIR...        DIR: a directory with .jinja files; writes bench/templates.md

Each template renders the conversations below, as a finished conversation and as a prompt, in both; the texts must be
equal, or both must refuse. A difference is listed with its reason, which `REASONS` names. Then nanoft makes samples of
each conversation and the promise of docs/data.md is verified on their token ids: what stands before each trained answer
is the prompt in use, and the last target is a token that ends an answer. No template is part of this repository.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.io.tables import markdown_table

HERE = Path(__file__).parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


ASKED, ANSWERED = say("user", "What is 2+2?"), say("assistant", "It is four.")
AGAIN = [say("user", "And one more?"), say("assistant", "Five.")]
CALLED = [
    say("user", "Is it raining in Zürich?"),
    say("assistant", "", tool_calls=[call("Zürich")]),
    say("tool", "18 degrees", name="get_weather", tool_call_id="abcdefghi"),
    say("assistant", "It is dry."),
]
CASES: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "single": ([ASKED, ANSWERED], None),
    "several turns": ([ASKED, ANSWERED, *AGAIN], None),
    "system": ([say("system", "Be brief."), ASKED, ANSWERED, *AGAIN], None),
    "thoughts": ([ASKED, {**ANSWERED, "reasoning_content": "Two and two."}, *AGAIN], None),
    "thought in content": ([ASKED, say("assistant", "<think>\nTwo and two.\n</think>\n\nIt is four.")], None),
    "tools": (CALLED, [WEATHER]),
    "call at the end": (CALLED[:2], [WEATHER]),
}
REASONS = {
    "thought name": "the template reads the thought as `thinking`; nanoft gives it that name",
    "generator": "transformers fails to write a generator as JSON; nanoft writes its values",
    "JSON arguments": "transformers shows arguments as Python does ({'city': ...}), or fails; nanoft gives JSON text",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=HERE / "templates.md")
    args = parser.parse_args()
    rows: list[list[str]] = []
    notes: dict[str, dict[str, None]] = {}  # what was said -> the templates
    for directory in args.directories:
        counts: Counter[str] = Counter()
        for path in sorted(directory.glob("*.jinja")):
            for outcome, said in check(path):
                counts[outcome] += 1
                if said:
                    notes.setdefault(f"{outcome}: {said}", {})[f"{directory.name}/{path.stem}"] = None
        rows.append([directory.name, str(len([*directory.glob("*.jinja")])), *(str(counts[name]) for name in COLUMNS)])
    table = markdown_table(["templates of", "files", *COLUMNS], rows)
    head = "# Chat templates of other projects\n\nRendered by nanoft's sandbox and by transformers "
    head += f"{transformers.__version__}: {len(CASES)} conversations, finished and as a prompt.\n"
    lines = [f"- {said} ({len(names)}: {', '.join(names)})" for said, names in sorted(notes.items())]
    args.out.write_text("\n".join([head, table, "", *lines, ""]), encoding="utf-8")
    print(table, *lines, sep="\n")


COLUMNS = ["equal", "both refuse", "explained", "DIFFERENT", "trained", "not trained", "WRONG SAMPLES"]


def check(path: Path) -> list[tuple[str, str]]:
    """(column, what to list) for each rendering and each conversation."""
    source = path.read_text(encoding="utf-8")
    try:
        chat = read(source)
    except UserError as error:
        return [("DIFFERENT", f"not compiled: {str(error).rpartition('not valid: ')[2]}")]
    return [outcome for case in CASES for outcome in (*compare(chat, source, case), samples(chat, case))]


def read(source: str) -> ChatTokenizer:
    """The template with a tokenizer of bytes, and whatever looks like a control token in the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {*SPECIAL.values(), *re.findall(r"<[|｜][^<>{}' ]+[|｜]>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]", source)}
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sorted(names)])
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL), encoding="utf-8")
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops(tokenizer)}))
        (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
        return ChatTokenizer(directory)


def stops(tokenizer: Tokenizer) -> list[int]:
    """What generation_config.json of these families lists: the tokens that end a turn, GLM's roles among them."""
    ends = r"\|(user|observation|END_OF_TURN_TOKEN|return|call|eom_id|end▁of▁sentence|endofturn|end|im_end|eot_id)\|"
    ends += r"|end▁of▁sentence|\[e~\[|<turn\|>|<\|assistant_end\|>"
    return [number for token, number in tokenizer.get_vocab().items() if re.search(ends, token)]


def compare(chat: ChatTokenizer, source: str, case: str) -> list[tuple[str, str]]:
    messages, tools = CASES[case]
    outcomes = []
    for given, is_prompt in ((messages, False), (messages[:-1], True)):
        theirs, failure = transformers_text(source, given, is_prompt, tools)
        try:
            ours = chat.render(given, is_prompt, tools)
        except UserError:
            ours = None
        if ours == theirs:
            outcomes.append(("both refuse" if ours is None else "equal", ""))
            continue
        changed = {name: change(copy.deepcopy(given)) for name, change in CHANGES.items()}
        reason = next((n for n, c in changed.items() if transformers_text(source, c, is_prompt, tools)[0] == ours), "")
        reason = "generator" if "generator is not JSON" in failure else reason
        said = REASONS.get(reason, f"DIFFERENT: {ours!r:.300} / {theirs!r:.300} {failure}")
        where = f"{case}, {'prompt' if is_prompt else 'finished'}"
        outcomes.append(("explained" if reason else "DIFFERENT", said if reason else f"{where}: {said}"))
    return outcomes


def renamed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{("thinking" if k == "reasoning_content" else k): v for k, v in m.items()} for m in messages]


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for made in (made for message in messages for made in message.get("tool_calls", ())):
        made["function"]["arguments"] = '{"city": "Zürich"}'
    return messages


CHANGES = {"thought name": renamed, "JSON arguments": with_text_arguments}


def transformers_text(source: str, messages: Any, is_prompt: bool, tools: Any) -> tuple[str | None, str]:
    """The text that apply_chat_template makes, or None and why there is none."""
    more: dict[str, Any] = {"add_generation_prompt": is_prompt, **SPECIAL}
    try:
        rendered: Any = render_jinja_template(conversations=[messages], tools=tools, chat_template=source, **more)
        return str(rendered[0][0]), ""
    except Exception as error:  # whatever a template raises
        return None, str(error)


def samples(chat: ChatTokenizer, case: str) -> tuple[str, str]:
    """Whether nanoft's samples of a conversation keep its promise, or why there are none."""
    messages, tools = CASES[case]
    try:
        rendered = chat.render_samples(messages, 0, tools)
    except UserError as error:
        return "not trained", str(error).partition(": choose")[0]
    turns = iter([index for index, message in enumerate(messages) if message["role"] == "assistant"])
    for sample in chat.encode_now(rendered):
        edges = [at for at in range(1, len(sample.ids)) if sample.is_target[at] and not sample.is_target[at - 1]]
        for start in edges:
            turn = next(turns)
            if sample.ids[:start].tolist() != chat.encode_prompt(messages[:turn], tools):
                return "WRONG SAMPLES", f"{case}: turn {turn}: another prompt in training: {rendered[0].text!r:.600}"
            if (
                messages[turn].get("reasoning_content")
                and "Two and two." not in rendered[0].text[slice(*rendered[0].spans[0])]
            ):
                return "WRONG SAMPLES", f"{case}: turn {turn}: the thought is not learned"
        if sample.ids[sample.is_target][-1] not in chat.stop_ids:
            return "trained", f"{case}: no token that is known to end an answer"
    return "trained", ""


if __name__ == "__main__":
    main()
