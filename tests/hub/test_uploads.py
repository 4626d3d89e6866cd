"""Large files: in several parts to addresses of their own, cut in the middle, and what a rerun sends; pull requests and the faults around them."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmlite.cli import main
from llmlite.errors import HubError, PushFailed
from llmlite.hub.preflight import preflight
from llmlite.hub.push import push
from tests.hub.fake_hub import FakeHub

PART = 100_000


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits 1, 2, 4, 8 and 8 seconds between its own tries at a part."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("llmlite.hub.client.time.sleep", lambda _: None)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two weight files of three parts each."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        save_file({"weight": torch.randn(70_000, generator=torch.Generator().manual_seed(number))}, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def parts_sent(hub: FakeHub) -> dict[str, list[int]]:
    """Hash of a file -> numbers of its parts, in the order in which they arrived whole."""
    found: dict[str, list[int]] = {}
    for method, route in hub.requests:
        if method == "PUT" and (match := re.fullmatch(r"/part/.+/([0-9a-f]{64})/(\d+)", route)):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def test_a_large_file_goes_up_in_parts_and_arrives_whole(hub: FakeHub, sharded: Path) -> None:
    hub.part_bytes = PART
    pushed = push(sharded, "me/big")
    assert sorted(parts_sent(hub).values()) == [[1, 2, 3], [1, 2, 3]]
    files = hub.files("me/big")
    assert all(files[path.name] == path.read_bytes() for path in sharded.iterdir())
    assert set(pushed.files) == set(files)
    hub.requests.clear()
    push(sharded, "me/big")
    assert parts_sent(hub) == {}


def test_one_cut_costs_one_part(hub: FakeHub, sharded: Path) -> None:
    hub.part_bytes = PART
    hub.cut("PUT", "/part/.*/2$")
    push(sharded, "me/big")
    assert sorted(parts_sent(hub).values()) == [[1, 2, 3], [1, 2, 3]]
    assert hub.count("CUT PUT") == 1


def test_after_a_lasting_cut_the_rerun_sends_the_unfinished_file_alone(hub: FakeHub, sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.part_bytes = PART
    second = hashlib.sha256((sharded / "model-00002-of-00002.safetensors").read_bytes()).hexdigest()
    before = {path: path.read_bytes() for path in sharded.iterdir()}
    hub.cut("PUT", f"/part/.*{second}/2$", times=99)
    with pytest.raises(SystemExit) as ended:
        main(["push", str(sharded), "me/big"])
    text = capsys.readouterr().err
    assert ended.value.code == 1
    assert "the Hub cannot be reached" in text
    assert f"what has arrived is not sent again. To continue:\n  llmlite push {sharded} me/big" in text
    assert hub.files("me/big") == {}
    assert {path: path.read_bytes() for path in sharded.iterdir()} == before
    hub.faults.clear()
    hub.requests.clear()
    main(["push", str(sharded), "me/big"])
    assert parts_sent(hub) == {second: [1, 2, 3]}  # the client starts an unfinished file again; finished ones stay
    assert hub.files("me/big")["model-00002-of-00002.safetensors"] == (sharded / "model-00002-of-00002.safetensors").read_bytes()


def test_after_a_kill_in_the_middle_of_an_upload_the_same_command_ends_it(hub: FakeHub, sharded: Path) -> None:
    hub.part_bytes = PART
    first, second = (hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(sharded.glob("*.safetensors")))
    hub.cut("PUT", f"/part/.*{second}/2$", times=99)
    process = subprocess.Popen([sys.executable, "-m", "llmlite", "push", str(sharded), "me/big"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (len(parts_sent(hub).get(first, [])) < 3 or not hub.count("CUT PUT")) and process.poll() is None and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    threading.Event().wait(0.3)  # the first file is signed off; the client is trying a part of the second again
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert hub.files("me/big") == {}
    hub.faults.clear()
    hub.requests.clear()
    main(["push", str(sharded), "me/big"])
    assert parts_sent(hub) == {second: [1, 2, 3]}
    assert {name: hub.files("me/big")[name] for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")} == {
        file.name: file.read_bytes() for file in sharded.glob("*.safetensors")
    }


def test_a_single_upload_that_is_cut_is_tried_again(hub: FakeHub, full_model: Path) -> None:
    hub.cut("PUT", "/large/", times=2)
    push(full_model, "me/tiny")
    assert hub.count("CUT PUT") == 2
    assert hub.files("me/tiny")["model.safetensors"] == (full_model / "model.safetensors").read_bytes()


def test_a_cut_commit_is_tried_again_and_made_once(hub: FakeHub, full_model: Path) -> None:
    hub.cut("POST", "/commit/")
    push(full_model, "me/tiny")
    assert len(hub.repos["me/tiny"].commits) == 2


def test_parts_refused_by_the_storage_are_one_message(hub: FakeHub, sharded: Path) -> None:
    hub.part_bytes = PART
    hub.fail("PUT", "/part/", 403, times=99, message="Request has expired")
    with pytest.raises(PushFailed, match=r"the token may not do this \(403\)(?s:.*)llmlite push"):
        push(sharded, "me/big")


# The Hub's refusals at each place where it may refuse: the place, its answer, what the person reads. ------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "said", "message"),
    [
        ("POST", "/preupload/", 401, "Invalid credentials", r"the token is not valid \(401\)"),
        ("POST", "/commit/", 401, "", r"the token is not valid \(401\)"),
        ("POST", "/objects/batch", 403, "Your storage quota is exceeded", r"no room \(403\)(?s:.*)the token is fine"),
        ("POST", "/objects/batch", 404, "", r"not there, or hidden from this token \(404\)"),
        ("POST", "/preupload/", 429, "", r"too many requests \(429\)"),
        ("GET", "/tree/", 500, "", r"the Hub has a problem of its own \(500\)"),
    ],
)
def test_a_refusal_in_the_middle_is_one_message_with_the_command_to_continue(
    method: str, path: str, status: int, said: str, message: str, hub: FakeHub, full_model: Path
) -> None:
    hub.fail(method, path, status, times=99, message=said, Retry_After="0")
    with pytest.raises(PushFailed, match=rf"{message}(?s:.*)To continue:\n  llmlite push .* me/tiny"):
        push(full_model, "me/tiny")
    hub.faults.clear()
    push(full_model, "me/tiny")
    assert "model.safetensors" in hub.files("me/tiny")


# Pull requests --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (403, "Discussions are disabled for this repo", r'the token may not do this \(403\). The Hub says: "Discussions are disabled for this repo"'),
        (412, "", r"somebody else changed the repository at the same time \(412\)"),
        (409, "", r"somebody else changed the repository at the same time \(409\)"),
        (503, "", r"the Hub has a problem of its own \(503\)"),
    ],
)
def test_a_refused_pull_request_is_tried_once_and_its_command_kept(status: int, said: str, message: str, hub: FakeHub, full_model: Path) -> None:
    hub.add("google/open", private=False)
    hub.fail("POST", "/commit/", status, times=99, message=said, Retry_After="0")
    with pytest.raises(PushFailed, match=rf"{message}(?s:.*)llmlite push .* google/open --public --create_pr"):
        push(full_model, "google/open", private=False, create_pr=True)
    assert hub.count("POST .*/commit/") == 1  # after a lost answer a second try would open a second one
    assert hub.files("google/open") == {}


def test_a_pull_request_is_loaded_from_its_own_commit_to_be_verified(hub: FakeHub, full_model: Path) -> None:
    hub.add("google/open", private=False)
    pushed = push(full_model, "google/open", private=False, create_pr=True, verify=True)
    assert pushed.difference == 0.0
    assert hub.repos["google/open"].branches["refs/pr/1"] == pushed.commit


def test_a_fine_grained_token_needs_the_right_to_open_discussions(hub: FakeHub) -> None:
    hub.add("google/open", private=False)
    hub.fine_grained = {"scoped": [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.write"]}]}
    with pytest.raises(HubError, match=r"no 'discussion.write' for 'google'"):
        preflight("google/open", private=False, create_pr=True)
    hub.fine_grained = {"global": ["discussion.write"], "scoped": []}
    assert preflight("google/open", private=False, create_pr=True).create_pr
