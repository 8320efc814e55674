"""The sandboxed chat template: same text as transformers, and no template or message gets away."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from longshore.errors import ConfigError, InvalidRequestError
from longshore_server.chat_template import ChatTemplate

MESSAGES = [{"role": "system", "content": "Be {{ brief }}."}, {"role": "user", "content": "hi\n<b>&"}]

LLAMA_LIKE = """{{- bos_token }}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
        {{- '<<SYS>>' + message['content'] | trim + '<</SYS>>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '[' ~ message['role'] ~ ']' ~ (message | tojson) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[assistant]' }}
{%- endif %}
"""


def test_it_renders_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=LLAMA_LIKE, add_generation_prompt=True, bos_token="<s>"
    )
    template = ChatTemplate(LLAMA_LIKE, {"bos_token": "<s>"})
    assert [template.render(MESSAGES)] == expected


def test_a_message_is_data_and_never_a_template() -> None:
    assert ChatTemplate("{{ messages[0].content }}", {}).render(MESSAGES) == "Be {{ brief }}."


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{{ range(10 ** 10) | list }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str) -> None:
    template = ChatTemplate(source, {}, timeout_s=0.2)
    begin_s = time.monotonic()
    with pytest.raises(InvalidRequestError) as caught:
        template.render(MESSAGES)
    assert time.monotonic() - begin_s < 2
    assert caught.value.param == "messages"
    assert sys.gettrace() is None or "coverage" in str(sys.gettrace())


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_a_template_must_not_do_is_a_typed_error(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render(MESSAGES)


def test_where_a_folder_keeps_its_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"chat_template": [{"name": "tool", "template": "no"},'
        ' {"name": "default", "template": "{{ eos_token }}"}], "eos_token": {"content": "</s>"}}'
    )
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(MESSAGES) == "</s>"
    (tmp_path / "chat_template.jinja").write_text("newer")
    loaded = ChatTemplate.load(tmp_path)
    assert loaded is not None
    assert loaded.render(MESSAGES) == "newer"


@pytest.mark.parametrize(
    ("name", "text"), [("chat_template.jinja", "{% for %}"), ("tokenizer_config.json", "{")]
)
def test_a_broken_folder_stops_the_start_in_one_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        ChatTemplate.load(tmp_path)
    assert "\n" not in caught.value.message
