"""A headless Chromium that tests drive over a pipe: one process for all pages, with any width, colour scheme and medium.

Source: the Chrome DevTools Protocol, chromedevtools.github.io/devtools-protocol; messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60.0
# the browser reads commands from descriptor 3 and answers on 4
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):
    os.dup2(end, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str:
    """Where Chromium is. Without one a test is skipped on a developer's machine, and fails where the environment says CI."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium here, so nobody would look at the pages. Install Debian's chromium.")
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


@dataclass
class Page:
    """The page that is open."""

    browser: Browser
    session: str

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol and wait for its answer."""
        return self.browser.ask(method, self.session, **parameters)

    def show(self, width: int, *, dark: bool = False, paper: bool = False) -> None:
        """Lay the page out anew.

        Args:
            width: of the window, CSS pixels.
            dark: whether the reader prefers dark colours.
            paper: as for printing; A4 between margins of 12 mm is 702 wide.
        """
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=[scheme])

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, file: Path | None = None) -> Image.Image:
        """The whole page, as long as it is; also written to a file where one is named."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
        if file is not None:
            file.write_bytes(data)
        return Image.open(io.BytesIO(data)).convert("RGB")

    def pdf(self) -> bytes:
        """As it would be printed on A4."""
        return base64.b64decode(self.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)["data"])


class Browser:
    """The process. Use `running_browser`."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.numbers = itertools.count(1)
        self.waiting, self.events = b"", list[dict[str, Any]]()
        self.tab: Page | None = None

    def open(self, file: Path) -> Page:
        """Load a page; `Page.show` says how it is looked at. There is one tab: those in the background are not drawn, and the one before is left."""
        if self.tab is None:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self.tab = Page(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
            self.tab.ask("Page.enable")
        self.events.clear()
        self.tab.ask("Page.navigate", url=file.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        return self.tab

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        message = {"id": next(self.numbers), "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != message["id"]:
            if "method" in answer:
                self.events.append(answer)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self.waiting:
            ready, *_ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self.answers, 1 << 20) if ready else b""
            assert part, "the browser has ended or says nothing"
            self.waiting += part
        message, _, self.waiting = self.waiting.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextlib.contextmanager
def running_browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, ended afterwards."""
    place = find_browser()
    command_end, commands = os.pipe()
    answers, answer_end = os.pipe()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _LAUNCH, str(command_end), str(answer_end), place, *flags, "about:blank"],
        pass_fds=(command_end, answer_end),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_end)
    os.close(answer_end)
    try:
        browser = Browser(commands, answers)
        yield browser
        browser.ask("Browser.close")
        process.wait(timeout=20)
    finally:
        os.close(commands)
        os.close(answers)
        if process.poll() is None:
            process.kill()
            process.wait()
