"""Chat templates: rendered as transformers renders them; a hostile one ends soon."""

from __future__ import annotations

import time

import pytest

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.runtime.chat import ChatTemplate, find_template

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # noqa: E501

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""  # noqa: E501

TOOLS = """{{- bos_token }}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}
    {{- 'Tools: ' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- ',\\n' if not loop.last else '\\n' }}
    {%- endfor %}
{%- endif %}
{%- macro show(m, n) %}
{{- m.role | upper ~ '#' ~ n ~ ': ' ~ (m.content | trim) }}
{%- endmacro %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {{- show(m, loop.index) }}
    {% if loop.index0 == ns.last %}
 <- last
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start>' }}{% endif %}
"""

GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}
A: {{ message.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
U: {{ message.content }}
{% endif %}
{% endfor %}
"""

UNTRIMMED = """
{%- for message in messages -%}
    {{- message.role }}: {{ message.content }}
    {%- if not loop.last %}

{% endif %}
{%- endfor %}
   {# a comment #}
  {% if documents %}{{ documents | length }}{% endif %}

{{ messages | map(attribute='role') | unique | join(', ') }} {{ 7 // 2 }} {{ 2 ** 3 }}
{{ '%s!' % 'x' }} {{ '<&>' }}
{%- set d = dict(a=1) %}{{ d.a }}{{ messages[-1].get('name', 'nobody') }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "tools": TOOLS,
    "generation": GENERATION,
    "untrimmed": UNTRIMMED,
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is <b>naïve</b>? {{ 7*7 }} "},
    {"role": "assistant", "content": "A word."},
    {"role": "user", "content": '漢字 "quoted" it\'s'},
]
WEATHER = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"city": "Zürich", "a": [1, {"b": None}]}},
    }
]


@pytest.fixture(scope="module")
def oracle(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, WEATHER])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:2]])
def test_rendering_equals_that_of_transformers(oracle, name, generation_prompt, tools, chat):
    expected = oracle.apply_chat_template(
        chat,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=generation_prompt,
        tools=tools,
    )
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    assert template.render(chat, add_generation_prompt=generation_prompt, tools=tools) == expected


def test_the_artifacts_own_template(q4_model, oracle):
    ids = oracle.apply_chat_template(CHAT[1:], add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    assert q4_model.chat_tokens(CHAT[1:]) == ids


def test_strftime_now_gives_todays_date():
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(CHAT) == time.strftime("%Y-%m-%d")


def test_the_templates_own_complaint_reaches_the_user():
    with pytest.raises(InvalidInputError, match="must alternate"):
        ChatTemplate(LLAMA2, {"bos_token": "", "eos_token": ""}).render([CHAT[1], CHAT[1]])


LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set ns = namespace(s='xxxx') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xxxx') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set n = namespace(s='xx') %}{% for a in range(9) %}{% set n.s = n.s.replace('x', n.s) %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ [0] * 999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ 'x' | center(999999999) }}",
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
]


@pytest.mark.parametrize("source", LOOPS)
def test_a_template_without_end_is_stopped(source):
    start = time.perf_counter()
    with pytest.raises(InvalidInputError, match="chat template"):
        ChatTemplate(source, max_seconds=0.3).render(CHAT)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ namespace(a=1).__class__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(source):
    try:
        text = ChatTemplate(source).render(CHAT)
    except (InvalidInputError, ArtifactError):
        return
    assert "class" not in text  # an undefined value renders as nothing


@pytest.mark.parametrize("source", ["{% for %}", "{{ ", "{% endfor %}", "x" * (2 << 20), None])
def test_what_is_no_template_is_refused(source):
    with pytest.raises(ArtifactError, match="chat template"):
        ChatTemplate(source)


@pytest.mark.parametrize("messages", [[], None, "hi", [{"content": "x"}], ["x"], [{"role": 3}]])
def test_malformed_messages_are_refused(messages):
    with pytest.raises(InvalidInputError, match="message"):
        ChatTemplate(CHATML).render(messages)


def test_where_a_template_is_looked_for():
    assert find_template({"chat_template": "a"}, None) == "a"
    assert find_template({"chat_template": "a"}, "b") == "b"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert find_template({"chat_template": named}, None) == "d"
    assert find_template({}, None) is None
    assert find_template(None, None) is None
