"""Pushing with the real client against a loopback Hub: what arrives, what is not sent twice, and what each refusal says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmlite.cli import main
from llmlite.errors import HubError, LoadError, OutputError, PushFailed
from llmlite.hub.client import wait_seconds
from llmlite.hub.preflight import preflight
from llmlite.hub.push import push
from tests.hub.fake_hub import FakeHub


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_is_one_private_commit_and_every_file_arrives(hub: FakeHub, full_model: Path) -> None:
    pushed = push(full_model, "me/tiny")
    repo = hub.repos["me/tiny"]
    assert repo.private
    assert pushed.private
    assert len(repo.commits) == 2  # the empty one, and ours
    arrived = hub.files("me/tiny")
    assert set(arrived) == set(pushed.files) == {*(p.name for p in full_model.iterdir()), "README.md"}
    assert all(arrived[p.name] == p.read_bytes() for p in full_model.iterdir())
    assert "library_name: transformers" in arrived["README.md"].decode()


def test_a_name_without_owner_goes_to_the_token_s_own_namespace(hub: FakeHub, full_model: Path) -> None:
    assert push(full_model, "tiny").repo_id == "me/tiny"


def test_pushing_again_sends_nothing_again(hub: FakeHub, full_model: Path) -> None:
    first = push(full_model, "me/tiny")
    uploads, commits = hub.uploads, hub.count("POST .*/commit/")
    assert uploads > 0
    again = push(full_model, "me/tiny")
    assert (hub.uploads, hub.count("POST .*/commit/")) == (uploads, commits)
    assert again.commit == first.commit


def test_a_rerun_after_a_failed_commit_sends_no_weights_again(hub: FakeHub, full_model: Path) -> None:
    hub.fail("POST", "/commit/", 403, message="nope")
    with pytest.raises(PushFailed):
        push(full_model, "me/tiny")
    uploads = hub.uploads
    push(full_model, "me/tiny")
    assert hub.uploads == uploads
    assert "model.safetensors" in hub.files("me/tiny")


def test_a_commit_is_tried_again_after_429_and_5xx(hub: FakeHub, full_model: Path) -> None:
    hub.fail("POST", "/commit/", 429, Retry_After="0")
    hub.fail("POST", "/commit/", 502, Retry_After="0")
    hub.fail("POST", "/repos/create", 503, Retry_After="0")
    push(full_model, "me/tiny")
    assert hub.count("POST .*/commit/") == 3
    assert len(hub.repos["me/tiny"].commits) == 2


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: FakeHub, full_model: Path) -> None:
    hub.fail("POST", "/commit/", 504, after=True, Retry_After="0")
    pushed = push(full_model, "me/tiny")
    assert len(hub.repos["me/tiny"].commits) == 2
    assert pushed.commit == hub.repos["me/tiny"].branches["main"]


@pytest.mark.parametrize(("headers", "attempt", "seconds"), [({"Retry-After": "7"}, 1, 7), ({}, 1, 1), ({}, 4, 8), ({"retry-after": "soon"}, 2, 2)])
def test_the_wait_is_what_the_hub_asks_else_doubles(headers: dict[str, str], attempt: int, seconds: float) -> None:
    assert wait_seconds(headers, attempt) == seconds


def test_a_date_in_retry_after_is_a_wait_too() -> None:
    assert wait_seconds({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1) == 0
    assert wait_seconds({"Retry-After": "Wed, 21 Oct 2015 07:28:00 -0000"}, 1) == 0
    assert wait_seconds({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, 1) > 1e9


# Each fault: where it strikes, what the Hub says, which exit code, what the person reads.
FAULTS = {
    "401 token": ("GET", "whoami", 401, "", 2, "the token is not valid (401)"),
    "403 role at creation": ("POST", "/repos/create", 403, "You don't have the rights to create a model", 1, "the token may not do this (403)"),
    "403 quota": ("POST", "/commit/", 403, "Private repository storage limit reached", 1, "the token is fine"),
    "404 at commit": ("POST", "/commit/", 404, "", 1, "not there, or hidden from this token (404)"),
    "409": ("POST", "/commit/", 409, "", 1, "somebody else changed the repository at the same time (409)"),
    "412": ("POST", "/commit/", 412, "", 1, "somebody else changed the repository at the same time (412)"),
    "429 for long": ("POST", "/commit/", 429, "", 1, "too many requests (429)"),
    "500 for long": ("POST", "/commit/", 500, "", 1, "the Hub has a problem of its own (500)"),
    "503 at the question": ("GET", "whoami", 503, "", 2, "the Hub has a problem of its own (503)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_ends_in_one_message_an_exit_code_and_the_folder_as_it_was(
    name: str, hub: FakeHub, full_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, path, status, said, code, message = FAULTS[name]
    before = fingerprint(full_model)
    hub.fail(method, path, status, times=99, message=said, Retry_After="0")
    with pytest.raises(SystemExit) as ended:
        main(["push", str(full_model), "me/tiny", "--revision", "main"])
    text = capsys.readouterr().err
    assert ended.value.code == code
    assert message in text
    assert f"llmlite push {full_model} me/tiny --revision main" in text
    assert "Traceback" not in text
    assert fingerprint(full_model) == before
    assert hub.count(f"{method} .*{path}") <= 5


def test_a_very_long_retry_after_is_not_waited_for(hub: FakeHub, full_model: Path) -> None:
    hub.fail("POST", "/commit/", 429, times=9, Retry_After="3600")
    with pytest.raises(PushFailed, match="too many requests"):
        push(full_model, "me/tiny")
    assert hub.count("POST .*/commit/") == 1


def test_a_hub_that_is_not_there_is_one_message(hub: FakeHub, full_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    monkeypatch.setattr("llmlite.hub.client.time.sleep", lambda _: None)
    with pytest.raises(HubError, match="the Hub cannot be reached"):
        push(full_model, "me/tiny")


# Preflight ----------------------------------------------------------------------------------------------------------------------------


def test_an_existing_public_repository_is_never_filled_when_private_was_asked(hub: FakeHub, full_model: Path) -> None:
    hub.add("me/open", private=False)
    with pytest.raises(HubError, match="me/open exists and is public; a private one was asked for"):
        push(full_model, "me/open")
    assert hub.files("me/open") == {}
    assert hub.uploads == 0
    assert not push(full_model, "me/open", private=False).private


def test_an_existing_private_repository_is_not_taken_for_a_public_one(hub: FakeHub) -> None:
    hub.add("me/closed", private=True)
    with pytest.raises(HubError, match="exists and is private; a public one was asked for"):
        preflight("me/closed", private=False)


def test_a_repository_that_becomes_public_in_the_meantime_gets_no_file(hub: FakeHub, full_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = preflight

    def then_public(*arguments: object, **options: object) -> object:
        answer = real(*arguments, **options)  # type: ignore[arg-type]
        hub.add("me/tiny", private=False)
        return answer

    monkeypatch.setattr("llmlite.hub.push.preflight", then_public)
    with pytest.raises(PushFailed, match="No file was sent"):
        push(full_model, "me/tiny")
    assert hub.files("me/tiny") == {}


def test_a_token_that_can_only_read_is_refused(hub: FakeHub) -> None:
    hub.role = "read"
    with pytest.raises(HubError, match="can only read"):
        preflight("me/tiny")


def test_a_fine_grained_token_needs_write_access_to_the_namespace_or_the_repository(hub: FakeHub) -> None:
    def scope(name: str, *permissions: str) -> dict[str, object]:
        return {"entity": {"type": "user", "name": name}, "permissions": list(permissions)}

    hub.fine_grained = {"global": [], "scoped": [scope("me", "repo.content.read"), scope("team", "repo.write")]}
    with pytest.raises(HubError, match=r"no 'repo.write' for 'me'"):
        preflight("me/tiny")
    assert not preflight("team/tiny").exists
    hub.fine_grained = {"scoped": [scope("me/tiny", "repo.write")]}
    assert preflight("me/tiny").repo_id == "me/tiny"


def test_a_namespace_of_others_is_refused_and_the_own_ones_named(hub: FakeHub) -> None:
    with pytest.raises(HubError, match=r"cannot write to 'google'. Namespaces it can write to: me, team, museum"):
        preflight("google/tiny")
    with pytest.raises(HubError, match="may only read in the organisation 'museum'"):
        preflight("museum/tiny")


def test_no_token_is_said_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token for the Hub"):
        preflight("me/tiny")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["/home/somebody/out", "a/b/c", "me/with blank", ""])
def test_what_is_no_repository_name_is_refused_before_any_request(hub: FakeHub, name: str) -> None:
    with pytest.raises(HubError, match="Wanted: owner/name"):
        preflight(name)
    assert hub.requests == []


@pytest.mark.parametrize(("gated", "licence"), [("manual", "mit"), (False, "cc-by-nc-4.0")])
def test_a_gated_or_non_commercial_base_is_not_published_unasked(gated: str | bool, licence: str, hub: FakeHub, full_model: Path) -> None:
    base = hub.add("team/base", private=False)
    base.gated, base.licence = gated, licence
    with pytest.raises(HubError, match=r"the base team/base is .*--accept_license"):
        push(full_model, "me/tiny", private=False, base_model="team/base")
    assert "me/tiny" not in hub.repos
    assert push(full_model, "me/kept", base_model="team/base").private
    assert not push(full_model, "me/tiny", private=False, base_model="team/base", accept_license=True).private


def test_a_base_with_open_terms_or_none_at_all_asks_nothing(hub: FakeHub, full_model: Path) -> None:
    hub.add("team/base", private=False).licence = "apache-2.0"
    assert preflight("me/tiny", private=False, base_model="team/base").base_license == "apache-2.0"
    assert preflight("me/tiny", private=False, base_model="team/absent").base_license is None


# Branches, pull requests, other contents ----------------------------------------------------------------------------------------------


def test_a_branch_is_made_and_the_default_one_left_alone(hub: FakeHub, full_model: Path) -> None:
    push(full_model, "me/tiny", revision="nf4")
    assert hub.files("me/tiny", "main") == {}
    assert "model.safetensors" in hub.files("me/tiny", "nf4")


def test_a_pull_request_goes_to_a_repository_of_others(hub: FakeHub, full_model: Path) -> None:
    hub.add("google/open", private=False)
    with pytest.raises(HubError, match="exists and is public"):  # everybody sees a pull request too
        push(full_model, "google/open", create_pr=True)
    pushed = push(full_model, "google/open", create_pr=True, private=False)
    assert pushed.url.endswith("/google/open/discussions/1")
    assert hub.files("google/open") == {}
    with pytest.raises(HubError, match="create_pr needs a repository that exists"):
        push(full_model, "google/none", create_pr=True)
    with pytest.raises(HubError, match="exclude each other"):
        push(full_model, "google/open", create_pr=True, revision="x")


def test_weights_of_another_result_are_refused_unless_they_may_be_replaced(hub: FakeHub, full_model: Path) -> None:
    hub.add("me/tiny", files={"model-00001-of-00002.safetensors": b"old", "notes.md": b"kept"})
    with pytest.raises(PushFailed, match=r"model-00001-of-00002.safetensors.*--replace"):
        push(full_model, "me/tiny")
    assert set(hub.files("me/tiny")) == {"model-00001-of-00002.safetensors", "notes.md"}
    push(full_model, "me/tiny", replace=True)
    assert "model-00001-of-00002.safetensors" not in hub.files("me/tiny")
    assert "notes.md" in hub.files("me/tiny")


def test_what_arrives_changed_is_noticed(hub: FakeHub, full_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(full_model, "me/tiny")
    repo = hub.repos["me/tiny"]
    files = repo.commits[repo.branches["main"]]
    kind, data = files["model.safetensors"]
    files["model.safetensors"] = (kind, data[:-1] + b"x")
    monkeypatch.setattr("llmlite.hub.push._commit", lambda *_: type("Commit", (), {"oid": repo.branches["main"], "pr_url": None, "commit_url": ""}))
    with pytest.raises(PushFailed, match=r"what arrived is not what was sent: model.safetensors differs"):
        push(full_model, "me/tiny")


@pytest.mark.parametrize(
    ("files", "message"), [({}, "holds no model"), ({"recipe.yaml": "x", "steps/x": "y"}, "is not finished"), ({"report.json": "{"}, "is no JSON")]
)
def test_a_folder_without_a_finished_result_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises((OutputError, LoadError), match=message):
        push(tmp_path, "me/tiny")
