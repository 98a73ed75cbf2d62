"""Drives Chromium without a window over its debugging pipe: opens pages, runs scripts in them, tells of complaints.

with Browser(width=1200) as browser:
    browser.open(path)
    assert browser.run("document.title") == "..." and browser.complaints == []
"""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


class Browser:
    """A browser with one page.

    Attributes:
      complaints: texts of errors, warnings and blocked loads since the page was opened.
      requests: addresses that the page has asked for.
    """

    def __init__(self, width: int = 1200, height: int = 900):
        self.size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.number, self.session = 0, None

    def __enter__(self):
        read, self.out = os.pipe()
        self.into, write = os.pipe()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = f"exec {CHROMIUM} {' '.join(FLAGS)} --user-data-dir={self.profile.name} 3<&{read} 4>&{write}"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read), os.close(write)
        self.unread = b""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", **self.size)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out), os.close(self.into)
        self.profile.cleanup()

    def send(self, method: str, **parameters):
        """Returns the result of a command of the DevTools protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def receive(self):
        while b"\0" not in self.unread:
            part = os.read(self.into, 1 << 20)
            assert part, "the browser ended"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def note(self, event):
        told = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(str(told["args"]))
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def open(self, path: pathlib.Path | str, fragment: str = ""):
        """Opens a file or, of a text, an address."""
        self.send("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri() + fragment)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str):
        """Returns the value of an expression in the page."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 20):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def screenshot(self, path: pathlib.Path, full: bool = False):
        made = self.send("Page.captureScreenshot", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(made["data"]))
