"""The templates of well-known models: rendered text, targets, and Mistral's own token ids.

golden_templates.json has what the originals give for some conversations: rendered by transformers from each model's own
template, and tokenized by mistral-common. The templates under test (hub_templates.py) are nanoft's own words for the
same; rendered by nanoft they must give the same characters. What is learned of each conversation is spelled out here.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
from hub_templates import HUB, Hub
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from templates import Style, save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import ChatTokenizer, Message

GOLDEN = json.loads((Path(__file__).parent / "golden_templates.json").read_text(encoding="utf-8"))
CONVERSATIONS = GOLDEN["conversations"]
QUIET = "qwen3, enable_thinking=false"
RENDERINGS = [(name, case) for name, golden in GOLDEN["templates"].items() for case in golden["renderings"]]
MISTRAL_FILES = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
}

Read = Callable[[str], ChatTokenizer]


def byte_tokens(hub: Hub) -> str:
    """A tokenizer with the template's own tokens, and one token for each byte of everything else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token in (hub.bos, hub.eos, *hub.control) if token]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in hub.words])
    return tokenizer.to_str()


def style(hub: Hub) -> Style:
    return Style(hub.template, hub.bos, hub.eos, hub.end)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """A template by its name, with a tokenizer of bytes."""

    @functools.cache
    def read_once(name: str) -> ChatTokenizer:
        hub = HUB[name.split(",")[0]]
        directory = save(tmp_path_factory.mktemp("hub"), style(hub), tokenizer_json=byte_tokens(hub))
        if name == QUIET:
            return ChatTokenizer(directory, template_args={"enable_thinking": False})
        return ChatTokenizer(directory)

    return read_once


def runs(chat: ChatTokenizer, sample: Sample) -> Iterator[tuple[int, str]]:
    """Each run of targets: where it begins, and its text with control tokens shown."""
    ids, is_target = sample.ids.tolist(), sample.is_target.tolist()
    for start in range(1, len(ids)):
        if is_target[start] and not is_target[start - 1]:
            end = next((at for at in range(start, len(ids)) if not is_target[at]), len(ids))
            yield start, chat.decode(ids[start:end], keep_special=True)


def learned(chat: ChatTokenizer, messages: list[Message]) -> list[list[str]]:
    """The texts of all runs of targets, sample by sample."""
    samples = chat.encode(chat.render_samples(messages, 0))
    return [[text for _, text in runs(chat, sample)] for sample in samples]


# ---- What they render


def rendered(chat: ChatTokenizer, messages: list[Message], add_generation_prompt: bool, tools: Any) -> str:
    try:
        return chat.render(messages, add_generation_prompt, tools)
    except UserError:
        return "refused"


@pytest.mark.parametrize(("name", "case"), RENDERINGS)
def test_renders_what_the_original_renders(read: Read, name: str, case: str) -> None:
    """The finished conversation, and the prompt for its last answer, character for character; or refused, both."""
    conversation, expected = CONVERSATIONS[case], GOLDEN["templates"][name]["renderings"][case]
    messages, tools = conversation["messages"], conversation.get("tools")
    assert rendered(read(name), messages, False, tools) == expected["finished"]
    assert rendered(read(name), messages[:-1], True, tools) == expected["prompt"]


def test_every_template_has_an_original() -> None:
    assert {name.split(",")[0] for name in GOLDEN["templates"]} == set(HUB)
    assert all(golden["source"] for golden in [*GOLDEN["templates"].values(), *GOLDEN["tokens"].values()])


# ---- What is learned


PLAIN = ["single", "multi", "system", "system, multi", "spaces", "spaced system", "unicode", "newlines"]
# Where an answer changes what stood before it: each answer is a sample of its own.
REWRITTEN = {
    ("mistral-v3", "system, multi"),
    ("mistral-v3-hub", "system, multi"),
    ("qwen3", "newlines"),
    *((QUIET, case) for case in ("multi", "system, multi", "spaces", "unicode", "newlines")),
}
# The original drops the system text as soon as it is answered: plain answers are learned behind the prompt in use.
UNTRAINABLE = {("mistral-v3-hub", "tools, system")}
REFUSED = {("gemma", case) for case in ("system", "system, multi", "spaced system")}


def answer(name: str, content: str) -> str:
    """What the model is to write for an answer of this content: the content as rendered and what ends the turn."""
    hub = HUB[name.split(",")[0]]
    words = content.strip() if hub.strips else content
    if name.startswith(("qwen3", "smollm3")):
        words = words.lstrip("\n")
    return hub.lead + words + hub.end


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("name", [*HUB, QUIET])
def test_answers_and_their_ends_are_learned(read: Read, name: str, case: str) -> None:
    """Nothing but the assistant's content and the token that ends its turn; never an injected empty thought."""
    chat, messages = read(name), CONVERSATIONS[case]["messages"]
    if (name, case) in UNTRAINABLE | REFUSED:
        with pytest.raises(UserError, match="chat template"):
            chat.render_samples(messages, 0)
        return
    answers = [answer(name, message["content"]) for message in messages if message["role"] == "assistant"]
    is_rewritten = (name, case) in REWRITTEN
    assert learned(chat, messages) == ([[text] for text in answers] if is_rewritten else [answers])


ENDS = {
    **dict.fromkeys(["mistral-v1", "mistral-v3", "mistral-v3-hub", "mistral-v7"], " Fine.</s>"),
    **dict.fromkeys(["llama-3", "llama-3.1"], "Fine.<|eot_id|>"),
    **dict.fromkeys(["chatml", "qwen2.5", "qwen3", QUIET], "Fine.<|im_end|>"),
    **dict.fromkeys(["zephyr", "alpaca"], "Fine.</s>"),
    "llama-2": " Fine. </s>",
    **dict.fromkeys(["gemma", "gemma-3"], "Fine.<end_of_turn>"),
    **dict.fromkeys(["phi-4", "smollm3"], "Fine.<|im_end|>"),
    "granite-4": "Fine.<|end_of_text|>",
    "seed-oss": "Fine.<seed:eos>",
    "ministral-3": "Fine.</s>",
    "phi-3": "Fine.<|end|>",
}


@pytest.mark.parametrize("name", [*HUB, QUIET])
@pytest.mark.parametrize("said", ["", " \n"])
def test_an_empty_answer_is_the_end_of_its_turn_even_where_the_template_refuses_it(
    read: Read, name: str, said: str
) -> None:
    chat, asked = read(name), CONVERSATIONS["single"]["messages"][:1]
    rendered = chat.render_samples([*asked, {"role": "assistant", "content": said}], 0)
    (sample,) = chat.encode(rendered)
    answered = next(chat.encode(chat.render_samples([*asked, {"role": "assistant", "content": "Fine."}], 0)))
    prompt, ids = chat.encode_prompt(asked), sample.ids.tolist()
    assert ids[: len(prompt)] == prompt
    targets = sample.ids[sample.is_target].tolist()
    assert targets == answered.ids[answered.is_target].tolist()[-len(targets) :]
    assert targets[-1] in chat.stop_ids
    after = len(prompt) + len(targets)
    assert ids[after:] == answered.ids.tolist()[len(answered.ids) - len(ids) + after :], "as after any answer"


@pytest.mark.parametrize("name", [*HUB, QUIET])
def test_generation_stops_where_an_answer_ends(read: Read, name: str) -> None:
    """The last target is one token, and one of those that end a generation."""
    chat = read(name)
    (sample,) = chat.encode(chat.render_samples(CONVERSATIONS["single"]["messages"], 0))
    ((_, text),) = runs(chat, sample)
    assert text == ENDS[name]
    assert sample.ids[sample.is_target][-1] in chat.stop_ids


# What is learned where calls and thoughts are: every sample, every run.
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
MISTRAL_CALL = '{"name": "weather", "arguments": {"city": "%s"}, "id": "%s"}'
LEARNED = {
    ("mistral-v3", "two calls"): [
        [
            f"[TOOL_CALLS] [{MISTRAL_CALL % ('Genève', 'abcdefgh3')}, {MISTRAL_CALL % ('Bern', 'abcdefgh4')}]</s>",
            " Genève.</s>",
        ]
    ],
    ("mistral-v3", "tools, system"): [[f"[TOOL_CALLS] [{MISTRAL_CALL % ('Bern', 'abcdefgh2')}]</s>", " Rain.</s>"]],
    ("mistral-v7", "call with words"): [
        [f" Let me see.[TOOL_CALLS] [{MISTRAL_CALL % ('Bern', 'abcdefgh5')}]</s>", " Rain.</s>"]
    ],
    ("llama-3.1", "tools"): [
        [
            '{"name": "weather", "parameters": {"city": "Genève"}}<|eot_id|>',
            "Sunny.<|eot_id|>",
            "I cannot know.<|eot_id|>",
        ]
    ],
    ("qwen2.5", "tools"): [[CALL % "Genève" + "<|im_end|>", "Sunny.<|im_end|>", "I cannot know.<|im_end|>"]],
    ("qwen2.5", "two calls"): [[CALL % "Genève" + "\n" + CALL % "Bern" + "<|im_end|>", "Genève.<|im_end|>"]],
    ("qwen2.5", "call with words"): [["Let me see.\n" + CALL % "Bern" + "<|im_end|>", "Rain.<|im_end|>"]],
    ("qwen3", "tools, system"): [[CALL % "Bern" + "<|im_end|>", "Rain.<|im_end|>"]],
    ("qwen3", "thinking"): [
        ["<think>\nTwo and two.\nFour.\n</think>\n\n4<|im_end|>"],
        ["<think>\nOne more.\n</think>\n\n5<|im_end|>"],
    ],
    ("qwen3", "thinking in content"): [
        ["<think>\nTwo and two.\n</think>\n\n4<|im_end|>"],
        ["<think>\nOne more.\n</think>\n\n5<|im_end|>"],
    ],
    ("qwen3", "thinking, tools"): [
        [
            "<think>\nI need the weather.\n</think>\n\n" + CALL % "Bern" + "<|im_end|>",
            "<think>\nIt rains.\n</think>\n\nRain.<|im_end|>",
        ]
    ],
}


@pytest.mark.parametrize(("name", "case"), LEARNED)
def test_calls_and_thoughts_are_learned(read: Read, name: str, case: str) -> None:
    assert learned(read(name), CONVERSATIONS[case]["messages"]) == LEARNED[name, case]


def test_earlier_thoughts_are_not_there(read: Read) -> None:
    """Each answer is learned behind what the model will see then: the earlier answer without its thought."""
    chat = read("qwen3")
    first, second = chat.render_samples(CONVERSATIONS["thinking"]["messages"], 0)
    assert "Two and two." in first.text
    assert "Two and two." not in second.text
    assert "<|im_start|>assistant\n4<|im_end|>" in second.text


# ---- Training sees what use sees


WORDS = [*"abc \n\t<[", "Hello", "é", "😀", "  ", "日本", "'", '"', "{{", "ﬁ", "\u00a0"]
CONTROL = ["</s>", "<s>", "<|im_end|>", "[INST]", "[/INST]", "<|eot_id|>", "<end_of_turn>", "<|end|>"]


def random_conversation(rng: random.Random, name: str, words: list[str]) -> list[Message]:
    """Questions and answers, perhaps below a system text; in Qwen3 always with a thought, unless it does not think."""

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randint(0, 8))) + rng.choice("xyz") + rng.choice(["", " ", "\n"])

    messages: list[Message] = []
    if name not in ("gemma", "mistral-v3-hub") and rng.random() < 0.5:
        messages.append({"role": "system", "content": text()})
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        messages.append({"role": "assistant", "content": text()})
        if name == "qwen3":
            messages[-1]["reasoning_content"] = text()
    return messages


def given_and_used(chat: ChatTokenizer, messages: list[Message], tools: Any = None) -> tuple[Any, Any]:
    """For each answer, the ids before its first target in training, and those that the model is given in use."""
    samples = chat.encode(chat.render_samples(messages, 0, tools))
    trained = [sample.ids[:start].tolist() for sample in samples for start, _ in runs(chat, sample)]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return trained, [chat.encode_prompt(messages[:turn], tools) for turn in turns]


@pytest.mark.parametrize("name", [*HUB, QUIET])
def test_a_prompt_is_what_stands_before_the_answer(read: Read, name: str) -> None:
    """To the last id, in random conversations whose texts contain control tokens."""
    chat, rng = read(name), random.Random(name)
    for _ in range(40):
        trained, used = given_and_used(chat, random_conversation(rng, name, [*WORDS, *CONTROL]))
        assert trained == used


CALLS = {case for case in CONVERSATIONS if any("tool_calls" in turn for turn in CONVERSATIONS[case]["messages"])}
THOUGHTS = {case for case in CONVERSATIONS if case.startswith("thinking")}
OMITTED = {("mistral-v3-hub", "call with words"), ("llama-3.1", "call with words")}  # the words beside a call
WITH_CALLS = [
    (name, case)
    for name, case in RENDERINGS
    if case in (CALLS | THOUGHTS if name == "qwen3" else CALLS - THOUGHTS)
    and GOLDEN["templates"][name]["renderings"][case]["finished"] != "refused"
    and (name, case) not in UNTRAINABLE | OMITTED
]


@pytest.mark.parametrize(("name", "case"), WITH_CALLS)
def test_a_prompt_with_calls_is_what_stands_before_the_answer(read: Read, name: str, case: str) -> None:
    conversation = CONVERSATIONS[case]
    trained, used = given_and_used(read(name), conversation["messages"], conversation.get("tools"))
    assert trained == used


@pytest.mark.parametrize(("name", "case"), sorted(OMITTED))
def test_words_beside_a_call_that_the_original_omits_are_refused(read: Read, name: str, case: str) -> None:
    conversation = CONVERSATIONS[case]
    with pytest.raises(UserError, match="omits the text beside tool calls"):
        read(name).render_samples(conversation["messages"], 0, conversation.get("tools"))


def test_a_thought_where_none_is_to_be_is_refused(read: Read) -> None:
    """Told not to think, the model is given an empty thought; an answer with a thought does not continue that."""
    with pytest.raises(UserError, match="the answer has a thought, but the prompt ends with a closed one"):
        read(QUIET).render_samples(CONVERSATIONS["thinking"]["messages"], 0)


# ---- Mistral's own tokens


def mistral_file(name: str) -> str:
    return str(Path(mistral_common.__file__).parent / "data" / MISTRAL_FILES[name])


def from_pieces(path: str) -> str:
    """A SentencePiece model as a tokenizers one: two pieces merge where a piece is, the best score first."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    names = [pieces.id_to_piece(number) for number in range(pieces.vocab_size())]
    ids = {name: number for number, name in enumerate(names)}
    special = [name for name, i in ids.items() if pieces.is_control(i) or pieces.is_unknown(i)]
    merges = [
        (-pieces.get_score(ids[name]), ids[name[:at]], ids[name[at:]])
        for name in names
        for at in range(1, len(name))
        if not pieces.is_byte(ids[name]) and name[:at] in ids and name[at:] in ids
    ]
    pairs = [(names[left], names[right]) for _, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer.to_str()


@pytest.fixture(scope="module", params=MISTRAL_FILES)
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatTokenizer]:
    """(name, own template over the pieces of mistral-common's tokenizer)."""
    name: str = request.param
    hub = replace(HUB[name], control=())
    directory = save(tmp_path_factory.mktemp("mistral"), style(hub), tokenizer_json=from_pieces(mistral_file(name)))
    return name, ChatTokenizer(directory)


def taken(name: str, messages: list[Message]) -> list[Message]:
    """As mistral-common takes an answer after version 1: without trailing spaces, which its own templates keep."""
    return [
        message | {"content": message["content"].rstrip(" ")}
        if message["role"] == "assistant" and name != "mistral-v1"
        else message
        for message in messages
    ]


def reference(name: str, mode: ValidationMode, messages: list[Message], tools: Any) -> list[int]:
    """The ids that mistral-common gives; it wants a call's arguments as JSON text."""
    spelled = json.loads(json.dumps(messages))
    for call in [call for message in spelled for call in message.get("tool_calls", [])]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    request: Any = ChatCompletionRequest(messages=spelled, tools=tools)
    return MistralTokenizer.from_file(mistral_file(name), mode=mode).encode_chat_completion(request).tokens


def test_token_for_token_like_mistral_common(mistral: tuple[str, ChatTokenizer]) -> None:
    """Finished conversations and prompts, against the ids in the file and those of the installed package."""
    name, chat = mistral
    for case, expected in GOLDEN["tokens"][name]["ids"].items():
        conversation = CONVERSATIONS[case]
        messages, tools = taken(name, conversation["messages"]), conversation.get("tools")
        *_, finished = chat.encode(chat.render_samples(messages, 0, tools))
        prompt = chat.encode_prompt(messages[:-1], tools)
        assert finished.ids.tolist() == expected["finished"], case
        assert prompt == expected["prompt"], case
        assert reference(name, ValidationMode.finetuning, messages, tools) == expected["finished"], case
        assert reference(name, ValidationMode.test, messages[:-1], tools) == expected["prompt"], case


def test_random_conversations_like_mistral_common(mistral: tuple[str, ChatTokenizer]) -> None:
    """Each answer's sample holds the ids that mistral-common gives for the conversation up to that answer."""
    name, chat = mistral
    rng = random.Random(name)
    for _ in range(30):
        messages = taken(name, random_conversation(rng, name, WORDS))
        *_, last = chat.encode(chat.render_samples(messages, 0))
        assert last.ids.tolist() == reference(name, ValidationMode.finetuning, messages, None)


def test_control_tokens_in_text_like_mistral_common(mistral: tuple[str, ChatTokenizer]) -> None:
    """They stay text there, too: the same control ids in the same order, and the same text between them."""
    name, chat = mistral
    rng = random.Random(name)
    for _ in range(30):
        messages = taken(name, random_conversation(rng, name, [*WORDS, *CONTROL]))
        *_, last = chat.encode(chat.render_samples(messages, 0))
        ids, expected = last.ids.tolist(), reference(name, ValidationMode.finetuning, messages, None)
        special = {i for i, token in chat.tokenizer.get_added_tokens_decoder().items() if token.special}
        assert [i for i in ids if i in special] == [i for i in expected if i in special]
        assert chat.decode(ids, keep_special=True) == chat.decode(expected, keep_special=True)
