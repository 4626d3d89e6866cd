"""One log, one bar, one download, one save, one push: two processes that each have a terminal of their own, from the loopback Hub and back to it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import save_tiny
from tests.hub.fake_hub import FakeHub

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback as CI has it")

RECIPE = """
model: team/base
data: {{train: team/rows, max_length: 64, evaluation_rows: 6, max_train_rows: 18, calibration: "0.5*self + 0.5*team/rows", calibration_sequences: 4}}
steps:
  - {{step: prune.ffn, keep: 0.5, multiple_of: 16}}
  - {{step: distill.whitebox, max_steps: 2, save_steps: 1, logging_steps: 1, per_device_train_batch_size: 2}}
push_to_hub: true
hub_model_id: me/small
output_dir: {out}
"""
# The command line, with bars from the first moment on; in FOLDER each process notes what it opens to write or renames below FOLDER/out.
SCRIPT = """
import os, sys
from pathlib import Path
import tqdm.std

folder, command = sys.argv[1], sys.argv[2:]
make = tqdm.std.tqdm.__init__
tqdm.std.tqdm.__init__ = lambda self, *args, **options: make(self, *args, **{**options, "delay": 0})

notes = os.open(f"{folder}/written-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, found):
    kept = event == "os.rename" or event == "open" and isinstance(found[2], int) and found[2] & (os.O_WRONLY | os.O_RDWR)
    if kept and isinstance(found[0], (str, Path)) and str(found[0]).startswith(f"{folder}/out"):
        os.write(notes, f"{event} {found[0]}\\n".encode())
sys.addaudithook(note)

from llmlite.cli import main
main(command)
"""


@dataclass(frozen=True)
class Launch:
    """What a launch of two processes left: its exit code, what stands on the terminal of each, what the launcher said, and what each process wrote."""

    code: int
    terminals: tuple[str, str]
    launcher: str
    written: tuple[list[str], list[str]]


def launched_on_terminals(folder: Path, *command: str) -> Launch:
    """Run the command line of llmlite on two processes, each of which speaks to a terminal of its own."""
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    pairs = [pty.openpty() for _ in range(2)]
    for _, own in pairs:
        fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # a terminal without columns would show no bars
    said: list[list[bytes]] = [[], []]

    def listen(rank: int) -> None:
        while True:
            try:
                found = os.read(pairs[rank][0], 65536)
            except OSError:  # nobody speaks any more
                return
            said[rank].append(found)

    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment |= {f"TERMINAL{rank}": os.ttyname(own) for rank, (_, own) in enumerate(pairs)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
    speaking = ["sh", "-c", 'eval "exec >\\$TERMINAL$RANK 2>&1"; exec "$0" "$@"', sys.executable]
    listeners = [threading.Thread(target=listen, args=(rank,), daemon=True) for rank in range(2)]
    for listener in listeners:
        listener.start()
    done = subprocess.run(
        [*torchrun, *speaking, str(folder / "script.py"), str(folder), *command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    for _, own in pairs:
        os.close(own)
    for listener in listeners:
        listener.join(10)
    for terminal, _ in pairs:
        os.close(terminal)
    terminals = tuple(b"".join(each).decode() for each in said)
    written = tuple((folder / f"written-{rank}").read_text().splitlines() for rank in range(2))
    return Launch(done.returncode, terminals, done.stdout + done.stderr, written)  # type: ignore[arg-type]


def bars(terminal: str) -> Counter[str]:
    """How often each bar began, by its name; the Trainer's has none."""
    return Counter(name.strip() for name in re.findall(r"[\r\n]([^\r\n]*?):? *\b0%\|[^\r\n]*?\| 0/\d+", terminal))


def test_two_processes_have_one_log_one_bar_one_download_one_save_and_one_push(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "base")
    small = hub.add("team/base", private=False, files={file.name: file.read_bytes() for file in base.iterdir()})
    rows: list[dict[str, Any]] = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(200)]
    hub.add("team/rows", private=False, files={"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("LLMLITE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(out=tmp_path / "out"), encoding="utf-8")
    done = launched_on_terminals(tmp_path, "run", str(tmp_path / "recipe.yaml"))
    main, other = done.terminals
    assert done.code == 0, main[-3000:] + other[-3000:] + done.launcher[-2000:]

    # one log: the other process says nothing at all
    assert other == ""
    assert main.count("The plan") == main.count("step 1 of 2: prune.ffn\r\n") == main.count("base: loading") == main.count("uploaded to") == 1

    # one bar for each thing that may take long
    found = bars(main)
    assert {name: found[name] for name in ("measuring", "Tokenising calibration", "Tokenising train", "")} == {
        "measuring": 3,  # the base and two steps
        "Tokenising calibration": 1,
        "Tokenising train": 1,
        "": 1,  # the Trainer's
    }

    # one download of each file, of the model as of the rows
    fetched = Counter(route for method, route in hub.requests if method == "GET" and "/resolve/" in route and "/team/" in route)
    assert {route.rpartition("/")[2] for route in fetched} >= {"config.json", "model.safetensors", "tokenizer.json", "train.jsonl"}
    assert set(fetched.values()) == {1}, fetched

    # one save: what the other process works out again for itself lies apart, in the scratch folder of the step
    saved = [Counter(re.findall(r"os.rename \S+/steps/\.(0\d-[a-z.]+)-\w+$", "\n".join(lines), re.MULTILINE)) for lines in done.written]
    assert saved == [{"00-base": 1, "01-prune.ffn": 1, "02-distill.whitebox": 1}, {}]
    assert [line for line in done.written[1] if "/01-prune.ffn.work/process-1/" not in line] == []

    # one push
    assert hub.count("POST .*/repos/create") == 1
    assert hub.count("POST /api/models/me/small/commit/") == 1
    assert len(hub.repos["me/small"].commits) == 2  # the empty one, and ours
    sent = Counter(route for method, route in hub.requests if method == "PUT")
    assert any("/large/me/small/" in route for route in sent)
    assert set(sent.values()) == {1}
    assert len(small.commits) == 1
