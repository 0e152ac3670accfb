"""Chromium without a window, driven over its pipe by the DevTools protocol; no package is needed."""

import base64
import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT_S = 120


def found_browser():
    """Its path, or None."""
    own = os.environ.get("DISTCLIP_BROWSER")
    return own or next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab. Everything that the page asks for, logs or throws is kept."""

    def __init__(self):
        self._profile = tempfile.mkdtemp(prefix="distclip-browser-")
        (read_in, self._out), (self._in, write_out) = os.pipe(), os.pipe()
        command = [found_browser(), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]

        def to_3_and_4():
            # copies first: one of the two may be 3 or 4 itself
            ends = os.dup(read_in), os.dup(write_out)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            command, pass_fds=(3, 4, read_in, write_out), preexec_fn=to_3_and_4,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_in)
        os.close(write_out)
        self._buffer, self._number, self._session = b"", 0, None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)
        self.requests, self.problems, self.loaded = [], [], False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for end in (self._in, self._out):
            os.close(end)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method, **params):
        """The answer to one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        end = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self, end):
        while b"\0" not in self._buffer:
            assert self._selector.select(max(0, end - time.monotonic())), "the browser is silent"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        self._note(message)
        return message

    def _note(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:2000])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            if "willReadFrequently" not in params["entry"]["text"]:  # of the tests' own reading
                self.problems.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(json.dumps(params["args"])[:2000])
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")
        elif method == "Page.loadEventFired":
            self.loaded = True

    def open(self, path, width=1280, height=900, dark=False):
        """A file, until its figures are drawn."""
        self.requests, self.problems, self.loaded = [], [], False
        self.resize(width, height, dark)
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        end = time.monotonic() + TIMEOUT_S
        while not self.loaded:
            self._next(end)
        self.wait("document.documentElement.dataset.ready === 'yes'")
        self.settle()

    def resize(self, width, height=900, dark=False, media=""):
        scheme = "dark" if dark else "light"
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        features.append({"name": "prefers-reduced-motion", "value": "reduce"})
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def js(self, expression):
        """The value of an expression, as JSON."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition):
        end = time.monotonic() + TIMEOUT_S
        while not self.js(condition):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.02)

    def settle(self):
        """Two frames and what they queued."""
        self.js(
            "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(r, 0))))"
        )

    def mouse(self, kind, x, y, buttons=0, **more):
        names = {
            "move": "mouseMoved",
            "down": "mousePressed",
            "up": "mouseReleased",
            "wheel": "mouseWheel",
        }
        button = "left" if kind in ("down", "up") else "none"
        self.send(
            "Input.dispatchMouseEvent", type=names[kind], x=x, y=y, button=button, buttons=buttons,
            **({"clickCount": 1} if button == "left" else {}), **more,
        )  # fmt: skip

    def click(self, x, y):
        self.mouse("move", x, y)
        self.mouse("down", x, y, 1)
        self.mouse("up", x, y)
        self.settle()

    def drag(self, start, end, y, **more):
        self.mouse("move", start, y, **more)
        self.mouse("down", start, y, 1, **more)
        for part in (0.25, 0.5, 0.75, 1.0):
            self.mouse("move", start + part * (end - start), y, 1, **more)
        self.mouse("up", end, y, **more)
        self.settle()

    def key(self, key, **more):
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **more)
        self.settle()

    def box(self, selector):
        """x, y, width, height in the window."""
        return self.js(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
            "return [b.x, b.y, b.width, b.height]; })()"
        )

    def screenshot(self, path, full=True):
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        Path(path).write_bytes(base64.b64decode(data))
