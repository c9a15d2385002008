"""Small tokenizers with real-world chat templates (shortened), written to a directory as Hugging Face keeps them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TINY = Path(__file__).parent.parent / "configs" / "tiny" / "base"

CHATML = r"""{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""

# As CHATML, the answers marked as transformers wants them marked.
MARKED = r"""{% for message in messages %}
{% if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# System text goes into the last user turn, so every later turn changes what stood before.
MISTRAL = r"""{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.index0 >= turns | length - 2 and system is defined %}
            {{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system_message }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# As in GLM: no token of its own ends a turn.
NEXT_ROLE = r"""{% for m in messages %}{{ {'user': '<s>', 'tool': '[INST]'}.get(m.role, '</s>') + '\n' + m.content }}
{%- if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '</s>\n' }}{% endif %}"""

# Earlier thinking is dropped; the last answer gets an empty thought if it has none.
QWEN = r"""{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set thought, answer = '', message.content %}
    {%- if '</think>' in message.content %}
        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set answer = message.content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\n' + thought + '\n</think>\n\n' }}
    {%- endif %}
    {{- answer + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

# Roles are plain text here, only the end of a turn is a token.
ZEPHYR = r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

ALPACA = r"""{% for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\n\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n' }}
{%- else %}{{ '### Response:\n' + message.content + eos_token + '\n\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""


@dataclass(frozen=True)
class Style:
    """A template, the tokens that it is written for, and what ends a turn."""

    template: str | None
    bos: str | None
    eos: str
    end: str  # what the model is to write after an answer
    pad: str | None = None


STYLES = {
    "chatml": Style(CHATML, None, "<|im_end|>", "<|im_end|>"),
    "marked": Style(MARKED, None, "<|endoftext|>", "<|im_end|>", "<|endoftext|>"),
    "mistral": Style(MISTRAL, "<s>", "</s>", "</s>", "</s>"),
    "llama": Style(LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "qwen": Style(QWEN, None, "<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    "zephyr": Style(ZEPHYR, "<s>", "</s>", "</s>"),
    "alpaca": Style(ALPACA, "<s>", "</s>", "</s>"),
}
CONTROL = [
    *("<s>", "</s>", "[INST]", "[/INST]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"),
    *("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
]
TEXT = ["### Instruction: Response: user assistant system <think> </think> Hello there, how are you today? "] * 9


@functools.cache
def byte_level() -> str:
    """A byte-level BPE as GPT-2 has it, with every control token of the styles; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    text: str = tokenizer.to_str()
    return text


def byte_fallback() -> str:
    """A SentencePiece-like BPE: a word begins with its space, an unknown character is spelled in bytes."""
    characters = ["▁", "\n", *map(chr, range(33, 127))]
    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "▁t", "▁a", "he", "▁the"]
    merges = [("▁", "t"), ("▁", "a"), ("h", "e"), ("▁t", "he")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    text: str = tokenizer.to_str()
    return text


def save(
    directory: Path, style: Style, adds_bos: bool | None = None, tokenizer_json: str | None = None, **settings: Any
) -> Path:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        adds_bos: whether the tokenizer itself puts BOS first; None: if the style has one.
        settings: more entries of tokenizer_config.json; None takes one out.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json or byte_level())
    if style.bos and adds_bos is not False:
        bos = (style.bos, tokenizer.token_to_id(style.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{style.bos} $A", None, [bos])
    entries = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": style.bos,
        "eos_token": style.eos,
        "pad_token": style.pad,
        "chat_template": style.template,
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    present = {name: value for name, value in entries.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(present), encoding="utf-8")
    return directory
