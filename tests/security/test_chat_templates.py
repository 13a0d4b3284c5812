"""Hostile chat templates end in an error, in bounded time and memory, and never reach Python."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.chat_template import BoundedFormatter, TemplateError, TemplateProcess, bounded_templates

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess(limit_s=2.0, most_characters=100_000, memory_bytes=512 << 20)
    yield made
    made.close()


def render(process: TemplateProcess, template: str, **more: Any) -> str:
    return process.render(template, {"messages": MESSAGES, **more})


def test_what_templates_need(process: TemplateProcess) -> None:
    text = "{%- for m in messages %}{{ m.role }}:{{ m['content'] | trim }}{% if loop.last %}!{% endif %}{% endfor %}"
    assert render(process, text) == "user:hello!"
    assert render(process, "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}") == "1"
    assert render(process, "{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render(process, "{% generation %}said{% endgeneration %}") == "said"
    assert render(process, "{{ strftime_now('%Y') }}") >= "2024"
    counted = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    assert render(process, counted) == "1"
    with pytest.raises(TemplateError, match="no system prompts"):
        render(process, "{{ raise_exception('no system prompts here') }}")


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",  # computed while the template is compiled
    "{% set x = 10 %}{{ x ** (9 ** 9) }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set a = 'x' * 100000000 %}{{ a.replace('x', a) | length }}",
    "{{ 'x' * 10000000000 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ [1] * 10000000000 }}",
    "{{ 'x' | center(10000000000) }}",
    "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'much output ' }}{{ 'more' }}{% endfor %}",
)


@pytest.mark.parametrize("template", ENDLESS)
def test_endless_and_huge(process: TemplateProcess, template: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError):
        render(process, template)
    assert time.monotonic() - start < 60  # no measurement: without limits these take hours
    assert render(process, "{{ 1 }}") == "1"  # and the next conversation is rendered


WALKS = (
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'].system('true') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '%s'.__mod__.__self__.__class__ }}",
    "{% import 'os' as os %}{{ os.environ }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from 'subprocess' import run %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
)


@pytest.mark.parametrize("template", WALKS)
def test_walks_out_of_the_sandbox(process: TemplateProcess, template: str) -> None:
    """Refused, or nothing: an undefined value is an empty text."""
    try:
        text = render(process, template)
    except TemplateError:
        return
    assert text in ("", "None", "[]", "()"), text


def test_arguments_stay_as_they_were(process: TemplateProcess) -> None:
    messages = [{"role": "user", "content": "{{ 9 ** 9 ** 9 }}"}]
    formatter = BoundedFormatter(process, "{{ messages[0].content }}", eos_token="</s>", bos_token="<s>")
    answer = formatter(messages=messages)
    assert answer.prompt == "{{ 9 ** 9 ** 9 }}" and answer.stop == ["</s>"]
    assert messages == [{"role": "user", "content": "{{ 9 ** 9 ** 9 }}"}]


def test_the_package_compiles_no_template_of_the_model(process: TemplateProcess) -> None:
    """While a model is loaded, by this thread; what other threads do is theirs."""
    import threading

    from llama_cpp import llama_chat_format

    original = llama_chat_format.Jinja2ChatFormatter
    made: list[Any] = []

    def make() -> None:
        made.append(llama_chat_format.Jinja2ChatFormatter("{{ 1 }}", eos_token="", bos_token=""))

    with bounded_templates(process):
        endless = llama_chat_format.Jinja2ChatFormatter("{{ 9 ** (9 ** 9) }}", eos_token="", bos_token="")
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    assert isinstance(endless, BoundedFormatter) and llama_chat_format.Jinja2ChatFormatter is original
    assert isinstance(made[0], original) and made[0](messages=[]).prompt == "1"


def test_a_hostile_model_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By chat, run and serve alike: the engine checks the template when it has loaded the model."""
    import gguf

    from hybrimoe.engine import Engine, EngineOptions
    from hybrimoe.errors import ModelError

    path = tmp_path / "hostile.gguf"
    source = gguf.GGUFReader(tiny_model("mixtral", "Q4_0"))
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in source.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "tokenizer.chat_template")):
            kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], kind)
    writer.add_chat_template("{{ 9 ** (9 ** 9) }}")
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setitem(TemplateProcess.__init__.__kwdefaults__, "limit_s", 2.0)  # as the other tests: 10 is long
    with pytest.raises(ModelError, match="chat template of 'hostile") as caught:
        Engine(path, EngineOptions(n_ctx=64, warmup=False))
    assert caught.value.exit_code == 3 and caught.value.hint


def test_a_malformed_template_is_named(process: TemplateProcess) -> None:
    with pytest.raises(TemplateError, match="end of"):
        process.check("{% for x in y %}")
    with pytest.raises(TemplateError):
        process.check("{% if " * 5000)


def test_a_child_that_is_gone_is_started_again() -> None:
    process = TemplateProcess()
    assert render(process, "{{ 1 }}") == "1"
    child = process._process
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert render(process, "{{ 2 }}") == "2"
    process.close()
    assert child.poll() is not None
    process.close()


def test_the_child_ends_with_its_parent() -> None:
    process = TemplateProcess()
    assert render(process, "{{ 1 }}") == "1"
    child = process._process
    assert child is not None and child.stdin is not None
    child.stdin.close()  # as the kernel does when this process ends
    assert child.wait(30) == 0
    process.close()
