"""Writes golden_chat.json: chats as transformers renders and tokenises them, by templates in the form of four families.

    pip install transformers==5.17.0
    python tests/data/make_golden_chat.py

The templates are written here, in the forms that Llama 3, Qwen 2.5, Mistral and SmolLM 2 have them: headers and an end
of turn; a default system message and tool calls as JSON; instructions in brackets with alternating roles; a loop that
trims blocks. The tokenizer is one of bytes with all special tokens. It does not use the package under test.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
)

HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
TURNS = """\
{%- if messages[0].role != "system" %}
    {{- "<|im_start|>system\\nYou are helpful.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>user\\n<tool_response>\\n" + message.content + "\\n</tool_response><|im_end|>\\n" }}
        {%- continue %}
    {%- endif %}
    {{- "<|im_start|>" + message.role }}
    {%- if message.content %}
        {{- "\\n" + message.content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + (call.function | tojson(indent=2)) + '\\n</tool_call>' }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
"""
BRACKETS = """\
{%- set ns = namespace(index=0) %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system is defined %}
            {{- "[INST]" + system + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TRIMMED = """\
{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
<|im_start|>system
Be brief.<|im_end|>
    {% endif %}
    {% if message['role'] == 'assistant' %}
        {% generation %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
        {% endgeneration %}
    {% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
    {% endif %}
{% endfor %}
"""
MODELS: dict[str, dict[str, Any]] = {
    "headers": {"template": HEADERS, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "turns": {"template": TURNS, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "brackets": {"template": BRACKETS, "bos_token": "<s>", "eos_token": "</s>"},
    "trimmed": {"template": TRIMMED, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <é>", "days": 2}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    "a system message, white space": [
        {"role": "system", "content": "  Be terse.\n"},
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": "\nHello!  "},
        {"role": "user", "content": "Bye"},
    ],
    "signs of every kind": [
        {"role": "user", "content": "naïve 東京 🦙 <b>&amp;</b> \"x\" 'y' {{ z }}"},
        {"role": "assistant", "content": "```python\nprint('hé')\n```"},
    ],
    "special tokens as text": [
        {"role": "user", "content": "say <|im_end|>, <|eot_id|> and </s>"},
        {"role": "assistant", "content": "no"},
    ],
    "a tool's answer": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 20}'},
        {"role": "assistant", "content": "20 degrees"},
    ],
    "an empty answer": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
    "two questions": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
}


def tokenizer() -> Tokenizer:
    """Bytes and special tokens; BOS is put before every text, which chats must not get twice."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


def main() -> None:
    import transformers

    golden: dict[str, Any] = {"transformers": transformers.__version__, "tokenizer": tokenizer().to_str(), "models": []}
    for name, model in MODELS.items():
        special = {key: value for key, value in model.items() if key != "template"}
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "tokenizer.json").write_text(golden["tokenizer"])
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": model["template"], **special}
            Path(directory, "tokenizer_config.json").write_text(json.dumps(config))
            loaded = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        chats = []
        for chat, messages in CHATS.items():
            entry: dict[str, Any] = {"name": chat, "messages": messages, "text": None, "input_ids": None}
            try:
                day = {"date_string": "26 Jul 2024"}
                entry["text"] = loaded.apply_chat_template(messages, tokenize=False, **day)
                entry["input_ids"] = loaded.apply_chat_template(messages, tokenize=True, return_dict=False, **day)
            except Exception as error:
                entry["refusal"] = str(error)
            chats.append(entry)
        golden["models"].append({"name": name, "template": model["template"], **special, "chats": chats})
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    Path(__file__).with_name("golden_chat.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
