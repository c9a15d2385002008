"""Chat templates of well-known models, rewritten: shorter than the originals, with the same output.

Each `Hub` says what a template is written for: its special tokens, and how an answer stands in it. What the originals
render is in golden_templates.json, with where each of them was read. Left out is what no test renders: content that is
a list of parts, variables that nanoft does not pass (Llama 3.1's `builtin_tools`), and two habits of Mistral: version 3
writes a tool's result that is a number without quotes, its template on the Hub does not escape quotes in tools.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hub:
    """A model's template, and the tokens that it is written for."""

    template: str
    bos: str | None
    eos: str
    control: tuple[str, ...]  # special tokens besides bos and eos
    end: str  # what the model is to write after an answer; the last token of it ends the turn
    lead: str = ""  # a space before the answer, which the model writes
    strips: bool = False  # whether the template strips an answer
    words: tuple[str, ...] = ()  # added tokens that are not special: text that is one token


# Mistral's system text is a turn of its own from version 7 on; it stands in the first user turn in version 1, in the
# last one in version 3. Consecutive turns of one role are joined.
_MISTRAL_TURNS = r"""{{- bos_token }}
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') %}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- if turns and turns[0].role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}"""

MISTRAL_1 = (
    _MISTRAL_TURNS
    + r"""
{%- for turn in turns %}
    {%- set continues = not loop.first and loop.previtem.role == turn.role %}
    {%- set continued = not loop.last and loop.nextitem.role == turn.role %}
    {%- if turn.role == 'user' %}
        {{- '\n\n' if continues else ' [INST] ' }}
        {{- system + '\n\n' if system and loop.first }}
        {{- turn.content }}
        {{- ' [/INST]' if not continued }}
    {%- elif turn.role == 'assistant' and turn.content %}
        {{- '\n\n' if continues else ' ' }}
        {{- turn.content }}
        {{- eos_token if not continued }}
    {%- else %}
        {{- raise_exception('only users and assistants speak, and with words') }}
    {%- endif %}
{%- endfor %}"""
)

# The index of the last user turn, counted from its first message: there stand the tools.
_MISTRAL_LAST = r"""
{%- set ns = namespace(last=-1) %}
{%- for turn in turns %}
    {%- set begins = loop.first or loop.previtem.role != 'user' %}
    {%- if turn.role == 'user' and begins %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}"""
_MISTRAL_TOOLS = r"""
        {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools and loop.index0 == ns.last }}"""
_MISTRAL_CALLS = r"""
            {{- '[TOOL_CALLS] [' }}
            {%- for call in turn.tool_calls %}
                {%- if call.id | length != 9 %}{{ raise_exception('an id of 9 characters') }}{% endif %}
                {%- set given = call.function.arguments %}
                {{- ', ' if not loop.first }}
                {{- '{"name": "' + call.function.name + '", "arguments": ' }}
                {{- given if given is string else given | tojson }}
                {{- ', "id": "' + call.id + '"}' }}
            {%- endfor %}
            {{- ']' }}"""

MISTRAL_3 = (
    _MISTRAL_TURNS
    + _MISTRAL_LAST
    + r"""
{%- for turn in turns %}
    {%- set continues = not loop.first and loop.previtem.role == turn.role %}
    {%- set continued = not loop.last and loop.nextitem.role == turn.role %}
    {%- if turn.role == 'user' %}"""
    + _MISTRAL_TOOLS
    + r"""
        {{- '\n\n' if continues else '[INST] ' }}
        {{- system + '\n\n' if system and loop.index0 == ns.last }}
        {{- turn.content }}
        {{- '[/INST]' if not continued }}
    {%- elif turn.role == 'assistant' and turn.content and turn.tool_calls %}
        {{- raise_exception('either words or calls') }}
    {%- elif turn.role == 'assistant' and (turn.content or turn.tool_calls) %}
        {%- if turn.tool_calls %}"""
    + _MISTRAL_CALLS
    + r"""
        {%- else %}
            {{- '\n\n' if continues else ' ' }}
            {{- turn.content }}
        {%- endif %}
        {{- eos_token if not continued }}
    {%- elif turn.role == 'tool' and turn.tool_call_id | length == 9 and loop.previtem.role != 'user' %}
        {{- '[TOOL_RESULTS] ' + {'content': turn.content, 'call_id': turn.tool_call_id} | tojson + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('nobody speaks like this: ' + turn.role) }}
    {%- endif %}
{%- endfor %}"""
)

MISTRAL_7 = (
    r"""{{- bos_token }}
{%- set turns = messages %}
{%- if turns[0].role not in ['user', 'system'] %}{{ raise_exception('a user speaks first') }}{% endif %}"""
    + _MISTRAL_LAST
    + r"""
{%- for turn in turns %}
    {%- set continues = not loop.first and loop.previtem.role == turn.role %}
    {%- set continued = not loop.last and loop.nextitem.role == turn.role %}
    {%- if turn.role == 'system' %}
        {{- '[SYSTEM_PROMPT] ' + turn.content + '[/SYSTEM_PROMPT]' }}
    {%- elif turn.role == 'user' %}"""
    + _MISTRAL_TOOLS
    + r"""
        {{- '\n\n' if continues else '[INST] ' }}
        {{- turn.content }}
        {{- '[/INST]' if not continued }}
    {%- elif turn.role == 'assistant' and (turn.content or turn.tool_calls) %}
        {%- if turn.content %}
            {{- '\n\n' if continues else ' ' }}
            {{- turn.content }}
        {%- endif %}
        {%- if turn.tool_calls %}"""
    + _MISTRAL_CALLS
    + r"""
        {%- endif %}
        {{- eos_token if not continued }}
    {%- elif turn.role == 'tool' and turn.tool_call_id | length == 9 and loop.previtem.role in ['assistant', 'tool'] %}
        {{- '[TOOL_RESULTS] ' + turn.tool_call_id + '[TOOL_CONTENT] ' + turn.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('nobody speaks like this: ' + turn.role) }}
    {%- endif %}
{%- endfor %}"""
)

# As it lies in the model's directory: the system text is there only while the user has the last word.
MISTRAL_3_HUB = (
    r"""{%- set system = messages[0].content if messages[0].role == 'system' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- set spoken = turns | rejectattr('role', 'equalto', 'tool') | rejectattr('tool_calls', 'defined') | list %}
{%- for turn in spoken %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {%- if tools and turn == asked[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- ', ' if not loop.first }}
                {{- '{"type": "function", "function": ' + tool.function | tojson + '}' }}
            {%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {{- system + '\n\n' if loop.last and system is string }}
        {{- turn.content + '[/INST]' }}
    {%- elif turn.tool_calls %}"""
    + _MISTRAL_CALLS
    + r"""
        {{- eos_token }}
    {%- elif turn.role == 'assistant' %}
        {{- ' ' + turn.content | trim + eos_token }}
    {%- elif turn.role == 'tool' and turn.tool_call_id | length == 9 %}
        {{- '[TOOL_RESULTS] {"content": ' + turn.content + ', "call_id": "' + turn.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('nobody speaks like this: ' + turn.role) }}
    {%- endif %}
{%- endfor %}"""
)

LLAMA_2 = r"""{%- set system = messages[0].content if messages[0].role == 'system' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if turn.role == 'user' and loop.first and system is string %}
        {{- bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' + turn.content) | trim + ' [/INST]' }}
    {%- elif turn.role == 'user' %}
        {{- bos_token + '[INST] ' + turn.content | trim + ' [/INST]' }}
    {%- elif turn.role == 'assistant' %}
        {{- ' ' + turn.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA_3 = r"""{%- for turn in messages %}
    {{- bos_token if loop.first }}
    {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + turn.content | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"""

# The tools stand in the first user turn.
LLAMA_31 = r"""{%- macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
{{- bos_token + header('system') }}
{{- 'Environment: ipython\n' if tools }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string | default('26 Jul 2024') + '\n\n' }}
{{- messages[0].content | trim if messages[0].role == 'system' }}
{{- '<|eot_id|>' }}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- if tools and not turns %}{{ raise_exception('no user turn for the tools') }}{% endif %}
{%- for turn in turns %}
    {%- if tools and loop.first %}
        {{- header('user') }}
        {{- 'Given the following functions, please respond with a JSON for a function call ' }}
        {{- 'with its proper arguments that best answers the given prompt.\n\n' }}
        {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
        {{- 'Do not use variables.\n\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
        {{- turn.content | trim }}
    {%- elif turn.tool_calls is defined %}
        {%- if turn.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set called = turn.tool_calls[0].function %}
        {{- header('assistant') }}
        {{- '{"name": "' + called.name + '", "parameters": ' + called.arguments | tojson + '}' }}
    {%- elif turn.role in ['tool', 'ipython'] %}
        {{- header('ipython') + turn.content | tojson }}
    {%- else %}
        {{- header(turn.role) + turn.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{{- header('assistant') if add_generation_prompt }}"""

CHATML = r"""{%- for turn in messages %}
    {{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""


def _qwen(system: str, before_turns: str, answer: str, arguments: str, prompt: str) -> str:
    """What the two Qwens share: the tools in the system turn, calls in JSON, results in a user turn.

    Args:
        system: sets `system`, or does not.
        before_turns: what is found out about the whole conversation.
        answer: renders the words of an assistant turn, and sets `words` if it has some.
        arguments: a call's arguments as JSON.
        prompt: what follows the prompt of a generation.
    """
    return (
        system
        + r"""
{%- if tools or system is defined %}
    {{- '<|im_start|>system\n' }}
    {{- system if system is defined }}
    {%- if tools %}
        {{- '\n\n' if system is defined }}
        {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
        {%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
        {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
        {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}"""
        + before_turns
        + r"""
{%- for turn in messages %}
    {%- if turn.role == 'user' or (turn.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}
    {%- elif turn.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}"""
        + answer
        + r"""
        {%- for call in turn.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\n' if words or not loop.first }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + """
        + arguments
        + r""" + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif turn.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' + turn.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}"""
        + prompt
        + r"""
{%- endif %}"""
    )


QWEN_25 = _qwen(
    system=r"""{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- set system = messages[0].content if messages[0].role == 'system' else default %}""",
    before_turns="",
    answer=r"""{%- set words = turn.content %}{{ words }}""",
    arguments="call.arguments | tojson",
    prompt="",
)

# An answer after the last question shows its thought, the very last one an empty thought if need be; thoughts before
# the last question are dropped. Results of tools are no questions, even where a user wrote them.
QWEN_3 = _qwen(
    system=r"""{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}""",
    before_turns=r"""
{%- set ns = namespace(question=messages | length - 1) %}
{%- for turn in messages %}
    {%- set is_result = turn.content.startswith('<tool_response>') and turn.content.endswith('</tool_response>') %}
    {%- if turn.role == 'user' and not is_result %}{% set ns.question = loop.index0 %}{% endif %}
{%- endfor %}""",
    answer=r"""
        {%- set thought, words = turn.reasoning_content or '', turn.content %}
        {%- if turn.reasoning_content is not string and '</think>' in words %}
            {%- set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set words = words.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + words.lstrip('\n') }}
        {%- else %}
            {{- words }}
        {%- endif %}""",
    arguments="(call.arguments if call.arguments is string else call.arguments | tojson)",
    prompt=r"""
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}""",
)

GEMMA = r"""{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for turn in messages %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}
    {{- turn.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}"""

# As Gemma 2, but the system text, with its spaces, opens the first user turn.
GEMMA_3 = r"""{{- bos_token }}
{%- set is_told = messages[0].role == 'system' %}
{%- set turns = messages[1:] if is_told else messages %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}
    {{- messages[0].content + '\n\n' if is_told and loop.first }}
    {{- turn.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}"""

# The reasoning models have a long system text by default; here there is none.
PHI_4 = r"""{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] %}
    {{- '<|im_start|>' + turn.role + '<|im_sep|>' + turn.content + '<|im_end|>' }}
{%- endfor %}
{{- '<|im_start|>assistant<|im_sep|>' if add_generation_prompt }}"""

GRANITE_4 = r"""{%- if messages[0].role != 'system' %}
    {{- '<|start_of_role|>system<|end_of_role|>You are a helpful assistant. ' }}
    {{- 'Please ensure responses are professional, accurate, and safe.<|end_of_text|>\n' }}
{%- endif %}
{%- for turn in messages %}
    {{- '<|start_of_role|>' + turn.role + '<|end_of_role|>' + turn.content + '<|end_of_text|>\n' }}
{%- endfor %}
{{- '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt }}"""

# Every turn begins with BOS and ends with EOS.
SEED_OSS = r"""{%- for turn in messages %}
    {%- set words = turn.content | trim if turn.role == 'assistant' else turn.content %}
    {{- '<seed:bos>' + turn.role + '\n' + words + '<seed:eos>' }}
{%- endfor %}
{{- '<seed:bos>assistant\n' if add_generation_prompt }}"""

# As Unsloth renders it, without today's date; the long system text by default is shortened.
SMOLLM_3 = r"""{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: /think\n\n' }}
{{- '## Custom Instructions\n\n' }}
{{- messages[0].content.rstrip() if messages[0].role == 'system' else 'You are SmolLM.' }}{{ '\n\n<|im_end|>\n' }}
{%- for turn in messages if turn.role != 'system' %}
    {%- set words = turn.content.lstrip('\n') if turn.role == 'assistant' else turn.content %}
    {{- '<|im_start|>' + turn.role + '\n' + words + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""

# Here, too, the default system text is shortened.
MINISTRAL_3 = r"""{{- bos_token + '[SYSTEM_PROMPT]' }}
{%- set is_told = messages[0].role == 'system' %}
{{- (messages[0].content if is_told else 'First think.') + '[/SYSTEM_PROMPT]' }}
{%- set turns = messages[1:] if is_told else messages %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '[INST]' + turn.content + '[/INST]' if turn.role == 'user' else turn.content + eos_token }}
{%- endfor %}"""

# A finished conversation ends with the end of the text.
PHI_3 = r"""{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] %}
    {{- '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' if turn.content or turn.role != 'system' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

# Roles are plain text; only the end of a turn is a token.
ZEPHYR = r"""{%- for turn in messages if turn.role in ['system', 'user', 'assistant'] %}
    {{- '<|' + turn.role + '|>\n' + turn.content + eos_token + '\n' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt and messages }}"""

ALPACA = r"""{{- bos_token }}
{{- messages[0].content | trim + '\n\n' if messages[0].role == 'system' }}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if turn.role == 'user' %}{{ '### Instruction:\n' + turn.content | trim + '\n\n' }}
    {%- elif turn.role == 'assistant' %}{{ '### Response:\n' + turn.content | trim + eos_token + '\n\n' }}
    {%- endif %}
{%- endfor %}
{{- '### Response:\n' if add_generation_prompt }}"""

_INST = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_RESULTS = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>")
_CALL = ("<tool_call>", "</tool_call>")
_THINK = ("<think>", "</think>", "<tool_response>", "</tool_response>")

HUB = {
    "mistral-v1": Hub(MISTRAL_1, "<s>", "</s>", (), "</s>", lead=" "),
    "mistral-v3": Hub(MISTRAL_3, "<s>", "</s>", (*_INST, *_RESULTS), "</s>", lead=" "),
    "mistral-v3-hub": Hub(MISTRAL_3_HUB, "<s>", "</s>", (*_INST, *_RESULTS), "</s>", lead=" ", strips=True),
    "mistral-v7": Hub(MISTRAL_7, "<s>", "</s>", (*_INST, *_RESULTS, *_SYSTEM), "</s>", lead=" "),
    "llama-2": Hub(LLAMA_2, "<s>", "</s>", (), " </s>", lead=" ", strips=True),
    "llama-3": Hub(LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", _HEADERS, "<|eot_id|>", strips=True),
    "llama-3.1": Hub(LLAMA_31, "<|begin_of_text|>", "<|eot_id|>", _HEADERS, "<|eot_id|>", strips=True),
    "chatml": Hub(CHATML, "<s>", "<|im_end|>", ("<|im_start|>",), "<|im_end|>"),
    "qwen2.5": Hub(QWEN_25, None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "<|im_end|>", words=_CALL),
    "qwen3": Hub(QWEN_3, None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "<|im_end|>", words=(*_CALL, *_THINK)),
    "gemma": Hub(GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", strips=True),
    "gemma-3": Hub(GEMMA_3, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", strips=True),
    "phi-4": Hub(PHI_4, "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>"), "<|im_end|>"),
    "granite-4": Hub(GRANITE_4, None, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>"),
    "seed-oss": Hub(SEED_OSS, None, "<seed:eos>", ("<seed:bos>",), "<seed:eos>", strips=True),
    "smollm3": Hub(SMOLLM_3, None, "<|im_end|>", ("<|im_start|>",), "<|im_end|>"),
    "ministral-3": Hub(MINISTRAL_3, "<s>", "</s>", (*_INST, *_RESULTS, *_SYSTEM), "</s>"),
    "phi-3": Hub(PHI_3, "<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
    "zephyr": Hub(ZEPHYR, "<s>", "</s>", (), "</s>"),
    "alpaca": Hub(ALPACA, "<s>", "</s>", (), "</s>", strips=True),
}
