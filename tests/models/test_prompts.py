import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from merv_fast.models import prompts
from merv_fast.models.chat_templates import chat_template
from tests.golden_files import GOLDEN

FILE = json.loads((GOLDEN / "prompts.json").read_text())
FORMATS = {builder.__name__: name for name, builder in prompts.PROMPT_BUILDERS.items()}
CASES = [(*key.split("/"), text) for key, text in FILE["prompts"].items()]


@pytest.mark.parametrize(("name", "turns", "expected"), CASES)
def test_prompts_of_the_reference(name, turns, expected):
    builder = getattr(prompts, name)("merv")
    for role, message in FILE["turns"][: int(turns)]:
        builder.add_turn(role=role, message=message)
    assert builder.get_prompt() == expected


@pytest.mark.parametrize(("name", "turns", "expected"), CASES)
def test_chat_templates_render_the_same(name, turns, expected):
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[role], "content": [{"type": "text", "text": message}]}
        for role, message in FILE["turns"][: int(turns)]
    ]
    template = chat_template(FORMATS[name], "<|video_pad|>")
    (text,), _ = render_jinja_template([messages], chat_template=template)
    assert text == expected
    messages[0]["content"].insert(0, {"type": "video", "path": "x.mp4"})
    (text,), _ = render_jinja_template([messages], chat_template=template)
    assert text == "<|video_pad|>" + expected


def test_a_system_message_replaces_the_default():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (text,), _ = render_jinja_template([messages], chat_template=chat_template("vicuna-v15", "<|video_pad|>"))
    builder = prompts.VicunaV15ChatPromptBuilder(system_prompt="Be brief.")
    builder.add_turn("human", "Hi")
    assert text == builder.get_prompt() == "Be brief. USER: Hi ASSISTANT:"


def test_potential_prompt_leaves_the_builder_as_it_is():
    builder = prompts.PurePromptBuilder()
    assert builder.get_potential_prompt("Why? <image>") == "In: Why? <image>\nOut:"
    assert builder.get_prompt() == ""


def test_turns_alternate():
    with pytest.raises(ValueError, match="add_turn: role must be 'human' for turn 0, got 'gpt'"):
        prompts.PurePromptBuilder().add_turn("gpt", "first")
