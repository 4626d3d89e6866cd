from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.conftest import CHATML, build_tokenizer

CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3: the turn after the last question gets an empty thought, earlier ones do not.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1].strip() + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like DeepSeek-R1: the generation prompt opens a thought that finished turns do not show.
OPENS_THOUGHT = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# Like Llama 2: BOS and EOS written by the template, no headers.
WITH_BOS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_TEXT = ["What does the function do?", "It returns the answer to the question.", "user assistant system", "The capital of France is Paris. 서울은 한국의 수도."]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`build_tokenizer` on text of two languages, with a template of one's own, and with BOS before every text where asked."""

    def make(template: str | None = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
        tokenizer = build_tokenizer(_TEXT, template, additional_special_tokens=["<|im_start|>"])
        if adds_bos:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        return tokenizer

    return make


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return {
        "chatml": CHATML, "marked": CHATML_MARKED, "thinking": THINKING, "opens_thought": OPENS_THOUGHT, "with_bos": WITH_BOS,
        "no_system": NO_SYSTEM, "no_end": NO_END,
    }  # fmt: skip
