"""What is cut from text before strangers see it, and what is left as it is."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from llmlite.hub.public import leak, places_of, public_json, public_text

TOKEN = "hf_" + "abcdefghijklmnopqrstuv"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/agatha/models/tiny llama", "tiny llama"),
        ("~/models/tiny", "tiny"),
        ("../agatha/chat.jsonl", "chat.jsonl"),
        ("agatha/rows/chat.jsonl, held-out part", "chat.jsonl, held-out part"),
        ("/srv/agatha/chat.jsonl, held-out part", "chat.jsonl, held-out part"),
        (r"C:\Users\agatha\chat.jsonl", "chat.jsonl"),
        ('from_pretrained("/srv/agatha/out", dtype="float32")', 'from_pretrained("out", dtype="float32")'),
        (f"token={TOKEN}", "token=[removed]"),
        ("https://agatha:secret@example.org/x", "https://example.org/x"),
    ],
)
def test_folders_users_and_tokens_are_cut(text: str, public: str) -> None:
    assert public_text(text) == public


@pytest.mark.parametrize(
    "text", ["HuggingFaceTB/SmolLM2-135M-Instruct", "builtin:python-docs", "https://huggingface.co/me/x", "tokens/s", "1 / 2", "and/or", "q_proj"]
)
def test_names_and_addresses_stay(text: str) -> None:
    assert public_text(text) == text


def test_exact_secrets_and_places_are_cut_wherever_they_stand() -> None:
    places = places_of("/srv/agatha")
    assert public_text("a pass-phrase-0 b", secrets=["pass-phrase-0"]) == "a [removed] b"
    assert public_text("look in /srv/agatha/rows now", places=places, quoted=True) == "look in rows now"


def test_the_home_folder_itself_becomes_a_tilde_since_its_name_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/agatha")
    assert public_text("in /home/agatha now", places=places_of(), quoted=True) == "in ~ now"


def test_a_quoted_answer_keeps_its_system_paths() -> None:
    value = {"text": "/usr/lib/python", "sample": {"answer": f"Use /usr/bin/env and {TOKEN}."}}
    assert public_json(value) == {"text": "python", "sample": {"answer": "Use /usr/bin/env and [removed]."}}


def test_added_tokens_that_look_like_folders_stay_and_secrets_among_them_go() -> None:
    assert public_json({"model": {"add_tokens": ["<call>", "</call>", TOKEN]}}) == {"model": {"add_tokens": ["<call>", "</call>", "[removed]"]}}


def test_leaks_are_found_in_escapes_and_in_the_header_of_weights(tmp_path: Path) -> None:
    assert leak("config.json", b'{"x": "pass\\u002dphrase-0"}', ["pass-phrase-0"], []) == "a token or key of this machine"
    assert leak("x.jinja", f"{{# {TOKEN} #}}".encode(), [], []) == "what looks like a token (hf_...)"
    assert leak("config.json", b'{"x": "/srv/agatha/y"}', [], ["/srv/agatha"]) == "a folder of this machine (/srv/agatha)"
    assert leak("config.json", b'{"x": "/srv/agathas/y"}', [], ["/srv/agatha"]) is None
    header = b'{"__metadata__":{"from":"/srv/agatha/y"}}'
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(header)) + header)
    assert leak("model.safetensors", weights, [], ["/srv/agatha"]) == "a folder of this machine (/srv/agatha)"


def test_a_damaged_file_is_searched_as_it_stands(tmp_path: Path) -> None:
    assert leak("config.json", b'{"x": "/srv/agatha/y"', [], ["/srv/agatha"]) == "a folder of this machine (/srv/agatha)"
    assert leak("vocab.json", b"{", ["pass-phrase-0"], []) is None
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert leak("model.safetensors", tmp_path / "model.safetensors", ["pass-phrase-0"], []) is None
