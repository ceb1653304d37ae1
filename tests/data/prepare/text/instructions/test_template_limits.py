"""A chat template is a program from elsewhere: so much time, memory and output, and no more."""

import datetime
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.data.prepare.text.instructions.templates import user
from toolkit.data.prepare.text.instructions import template_process
from toolkit.data.prepare.text.instructions.template import ChatTemplate
from toolkit.errors import DataError


def render(text: str, content: str = "hi") -> str:
    template = ChatTemplate(text, control_tokens=[], variables={})
    return template.render([user(content)]).text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**10 }}", "takes more than 1024 MB of memory"),
        ("{{ '%999999999999d' % 1 }}", "takes more than 1024 MB of memory"),
        ("{{ 'a' * 20000000 }}", "writes more than 10 MB"),
        ("{{ 'é' * 6000000 }}", "writes more than 10 MB"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ raise_exception('no\\nway') }}", "no$"),
    ],
)
def test_a_template_has_so_much_memory_and_output(template: str, message: str) -> None:
    with pytest.raises(DataError, match=f"the chat template cannot render it: .*{message}"):
        render(template)


def test_a_template_without_end_is_ended_also_in_a_thread() -> None:
    # Only where there are messages: making the template renders none.
    loop = (
        "{% if messages %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}"
    )
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(render, loop)
        with pytest.raises(DataError, match="cannot render it: it takes more than 2 s"):
            job.result()
    assert render("{{ messages[0].content }}") == "hi"


def test_threads_get_their_own_answers() -> None:
    with ThreadPoolExecutor(4) as pool:
        texts = [str(number) for number in range(100)]
        assert (
            list(pool.map(lambda text: render("{{ messages[0].content }}", text), texts)) == texts
        )


def test_text_that_is_no_unicode_and_values_that_are_no_json_are_as_in_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    text = "{{ messages[0].content }} {{ messages[0].at }}"
    message = {**user("\ud800"), "at": datetime.date(2026, 1, 2)}
    theirs, _ = render_jinja_template(conversations=[[message]], chat_template=text)
    template = ChatTemplate(text, control_tokens=[], variables={})
    assert template.render([message]).text == theirs[0]


def test_the_process_of_templates_knows_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden-value")
    monkeypatch.setenv("SOME_FOLDER", "shown")
    child = template_process._start()
    try:
        request = {"conversations": [], "chat_template": ""}
        assert template_process._ask(child, request).endswith(b"\n")
        environ = Path(f"/proc/{child.pid}/environ").read_bytes()
    finally:
        child.kill()
        child.communicate()
    assert b"SOME_FOLDER=shown" in environ
    assert b"hidden-value" not in environ
