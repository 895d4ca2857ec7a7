"""Jinja chat templates that render what the prompt builders build, with a video marker in front for each video.

A user turn ends where the answer begins, whether or not ``add_generation_prompt`` asks for it: so do MERV's formats.
"""

from __future__ import annotations

from merv_fast.models.prompts import ASSISTANT, VICUNA

__all__ = ["chat_template"]

_HEAD = """\
{%- macro words(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content if part.type == 'video' -%}{{ VIDEO_TOKEN }}{%- endfor -%}
{%- endfor -%}
{%- set system = namespace(text=SYSTEM, turn=0) -%}
{%- for message in messages if message.role == 'system' -%}{%- set system.text = words(message) -%}{%- endfor -%}
"""

_STRIPPED = "{%- set text = words(message) | replace('<image>', '') | trim -%}"


def _turns(opening: str, prepare: str, user: str, assistant: str) -> str:
    return (
        _HEAD + opening + "{%- for message in messages if message.role != 'system' -%}" + prepare +
        "{%- if message.role == 'user' -%}" + user + "{%- else -%}" + assistant + "{%- endif -%}"
        "{%- set system.turn = system.turn + 1 -%}{%- endfor -%}"
    )  # fmt: skip


_ANSWER = "{{ ' ' + (text or ' ') + '</s>' }}"
_VERBATIM = "{%- set text = words(message) -%}"

_BODIES = {
    "pure": _turns("", _STRIPPED, "{{ 'In: ' + text + '\\nOut:' }}", _ANSWER),
    "llama2-chat": _turns(
        "",
        _STRIPPED,
        "{%- if system.turn == 0 -%}"
        "{{ '[INST] <<SYS>\\n' + (system.text | trim) + '\\n<</SYS>>\\n\\n' + text + ' [/INST]' }}"
        "{%- else -%}{{ '<s>[INST] ' + text + ' [/INST]' }}{%- endif -%}",
        _ANSWER,
    ),
    "vicuna-v15": _turns(
        "",
        _STRIPPED,
        "{%- if system.turn == 0 -%}{{ (system.text | trim) + ' ' }}{%- endif -%}{{ 'USER: ' + text + ' ASSISTANT:' }}",
        _ANSWER,
    ),
    "llama3.1-chat": _turns(
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + system.text + '<|eot_id|>' }}",
        _VERBATIM,
        "{{ '<|start_header_id|>user<|end_header_id|>\\n\\n' + text + '<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        "{{ text + '<|eot_id|>' }}",
    ),
    "qwen2.5": _turns(
        "{{ '<|im_start|>system\\n' + system.text + '<|im_end|>\\n' }}",
        _VERBATIM,
        "{{ '<|im_start|>user\\n' + text + '<|im_end|>\\n<|im_start|>assistant\\n' }}",
        "{{ text + '<|im_end|>' }}",
    ),
}

_SYSTEM = {"pure": "", "vicuna-v15": VICUNA}


def chat_template(prompt_format: str, video_token: str) -> str:
    """The template of a prompt format, for a tokenizer whose video marker is ``video_token``."""
    system = _SYSTEM.get(prompt_format, ASSISTANT)
    body = _BODIES[prompt_format]
    return body.replace("VIDEO_TOKEN", repr(video_token)).replace("SYSTEM", repr(system))
