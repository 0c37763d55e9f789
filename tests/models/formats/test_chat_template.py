"""Chat templates: what the assistant wrote is found, also where a template rewrites, and nothing said is left out."""

import pytest

from models.errors import UserError
from models.formats.chat_template import ChatTemplate

# Qwen3's own, without its system texts: thinking is shown in the turns after the last question alone.
THINKING = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=messages|length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.looking and message.role == "user" %}
        {%- set ns.looking = false %}{%- set ns.last = messages|length - loop.index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role in ("user", "system") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content, reasoning = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if content or not loop.first }}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, {"bos_token": "<s>", "eos_token": "<|im_end|>"}, ["<|im_end|>"])


def turns(*contents: str, **last) -> list[dict]:
    """User and assistant by turns; `last` are more fields of the last turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [*messages[:-1], {**messages[-1], **last}]


def learnt(text: str, messages: list[dict], tools=None) -> list[str]:
    whole, spans = template(text).spans(messages, tools)
    assert whole == template(text).render(messages, False, tools)
    return [whole[start:stop] for start, stop in spans]


def test_earlier_thinking_may_be_dropped():
    empty = "<think>\n\n</think>\n\n"
    chat = turns("q1", "a1", "q2", "a2", "q3", "a3")
    assert learnt(THINKING, chat) == ["a1<|im_end|>", "a2<|im_end|>", f"{empty}a3<|im_end|>"]
    chat = turns("q", "<think>\nhm\n</think>\n\na", "q", "<think>\noh\n</think>\n\na")
    assert learnt(THINKING, chat) == ["a<|im_end|>", "<think>\noh\n</think>\n\na<|im_end|>"]
    chat = turns("q", "a", "q", "a", reasoning_content="since")
    chat[1]["reasoning_content"] = "so"
    assert learnt(THINKING, chat) == ["a<|im_end|>", "<think>\nsince\n</think>\n\na<|im_end|>"]


def test_calls_and_their_results():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chat = [
        *turns("q", "", tool_calls=[call]),
        {"role": "tool", "content": "4 C"},
        {"role": "assistant", "content": "It is 4 C."},
        *turns("thanks", "welcome"),
    ]
    called = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>'
    found = learnt(THINKING, chat, tools=[{"name": "weather"}])
    assert found == [called, "It is 4 C.<|im_end|>", "<think>\n\n</think>\n\nwelcome<|im_end|>"]


@pytest.mark.parametrize("content", ["", " ", "a", "<|im_end|>", "assistant", "[assistant] a", "\n\na\n\n", "<think>"])
def test_turns_are_found_whatever_they_hold(content):
    for text in (PLAIN, THINKING):
        for chat in (turns("a", content, "a", "a"), turns("a", "a", content or "b", content, "a", "a")):
            found = learnt(text, chat)
            assert len(found) == sum(m["role"] == "assistant" for m in chat)
            for piece, message in zip(found, chat[1::2], strict=True):
                assert message["content"].strip() in piece and piece.endswith("<|im_end|>")


def test_what_changes_with_its_place_is_found_by_its_content():
    rewriting = "{% for m in messages %}{{ 'last ' if loop.last else '' }}{{ m.content }}{% endfor %}"
    assert learnt(rewriting, turns("q", "a", "q", "a")) == ["a", "a"]
    opens = (  # The prompt opens a thought that the history does not keep.
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    assert learnt(opens, turns("q", "hm</think>a", "q", "b")) == ["a<|im_end|>", "b<|im_end|>"]
    strict = "{% if messages[-1].role == 'user' and not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    assert learnt(strict + PLAIN, turns("q", "a", "q", "b")) == ["a<|im_end|>", "b<|im_end|>"]


def test_turns_that_cannot_be_told_apart():
    twice = "{% for m in messages %}{{ loop.length }}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="assistant turn 2 so that its tokens cannot be told apart"):
        template(twice).spans(turns("q", "a", "q", "a"))


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        (turns("q", "a", tool_calls=[{"function": {}}]), None, "does not show 'tool_calls' of turn 2"),
        (turns("q", "a", reasoning_content="x"), None, "does not show 'reasoning_content' of turn 2"),
        (turns("q", "a"), [{"name": "weather"}], "does not show 'tools'"),
        (turns("q", "a\ufdd0"), None, "noncharacters"),
    ],
)
def test_nothing_vanishes(messages, tools, message):
    with pytest.raises(UserError, match=message):
        template(PLAIN).spans(messages, tools)


def test_a_turn_that_a_template_leaves_out():
    with pytest.raises(UserError, match="leaves out turn 1, of the role 'developer'"):
        template(THINKING).spans([{"role": "developer", "content": "a"}, *turns("a", "a")])
    calling = "{% for m in messages %}{{ m.tool_calls if m.tool_calls else m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="leaves out turn 2, of the role 'assistant'"):
        template(calling).spans(turns("q", "let me see", tool_calls=["x"]))
