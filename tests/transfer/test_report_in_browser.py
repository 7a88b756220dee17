"""Opens the report in a headless Chromium, over the DevTools protocol, at the widths of a laptop and of a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transfer.compare.report import Cell, EncoderRow, Results, write_results
from transfer.report import Curve, Picture, Report, TaskResult, write_report

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync --remote-debugging-port=0"
).split()
START_SECONDS, REPLY_SECONDS = 60, 30


class Page:
    """One tab of a headless Chromium: sends DevTools commands and keeps every event."""

    def __init__(self, port: int) -> None:
        websocket = pytest.importorskip("websocket", reason="the DevTools protocol needs websocket-client")
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with local.open(f"http://127.0.0.1:{port}/json/list", timeout=REPLY_SECONDS) as reply:
            address = next(tab["webSocketDebuggerUrl"] for tab in json.load(reply) if tab["type"] == "page")
        self._socket = websocket.create_connection(
            address, timeout=REPLY_SECONDS, suppress_origin=True, http_no_proxy=["127.0.0.1"]
        )
        self._last = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result; events that arrive meanwhile are kept."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def open(self, url: str, width: int, height: int, mobile: bool, dark: bool = False) -> None:
        """Open ``url`` in a window of the given size (CSS pixels) and wait until it has loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not self.named("Page.loadEventFired"):
            self.events.append(json.loads(self._socket.recv()))
        # Errors and requests that a page causes after loading would arrive within this time.
        time.sleep(0.3)
        self.evaluate("0")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression, awaited where it is a promise."""
        reply = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def named(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of all events of that name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: none of chromium, chromium-browser and google-chrome is on PATH")
    profile = tmp_path_factory.mktemp("chromium")
    log = (profile / "log.txt").open("wb")
    browser = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=subprocess.STDOUT
    )
    tab = None
    try:
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + START_SECONDS
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert browser.poll() is None, (
                f"Chromium ended: {(profile / 'log.txt').read_text(errors='replace')[-2000:]}"
            )
            assert time.monotonic() < deadline, f"Chromium did not open its port within {START_SECONDS} s"
            time.sleep(0.1)
        tab = Page(int(port_file.read_text().split()[0]))
        yield tab
    finally:
        if tab is not None:
            tab.close()
        browser.terminate()
        try:
            browser.wait(timeout=20)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
        log.close()


@pytest.fixture(scope="module")
def report_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with what real ones have: wide and small pictures, long commands, long values, long numbers."""
    folder = tmp_path_factory.mktemp("report")
    pictures = []
    for name, size in (("strip", (1200, 150)), ("scene", (96, 96)), ("maps", (390, 260))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{name}.png")
        pictures.append(
            Picture(name, "Input, truth, prediction from scratch, prediction pre-trained.", folder / f"{name}.png")
        )
    points = [(float(step), 1.0 / (1 + step)) for step in range(0, 500, 5)]
    tasks = {
        name: TaskResult(
            f"{name} quality (%)", [41.5, 42.5, 43.5], [61.5, 62.5, 63.5], "120 images, 300 steps, both arms"
        )
        for name in ("classification", "detection", "segmentation")
    }
    report = Report(
        title="Report under test",
        seconds=372.0,
        tasks=tasks,
        curves=[Curve(name, "loss", {"pre-trained, seed 0": points, "scratch, seed 0": points[::2]}) for name in tasks],
        pictures=pictures,
        timings={"pre-training": 120.0, "a stage with a long name that has to break somewhere": 252.0},
        environment={"system": "x" * 120, "torch": "2.8.0"},
        commands=[("Pre-train", "mae pretrain configs/pretrain/vit_tiny.yaml " + "data.folder=/a/long/path " * 6)],
        loading_reports="loaded " + "blocks.0.attn.qkv.weight " * 12,
    )
    return write_report(report, folder).as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "mobile"), [(1280, 800, False), (390, 844, True)], ids=["1280", "390"])
def test_report_opens_cleanly(page: Page, report_url: str, width: int, height: int, mobile: bool, dark: bool) -> None:
    page.open(report_url, width, height, mobile, dark)

    problems = [entry["entry"] for entry in page.named("Log.entryAdded")]
    problems += page.named("Runtime.exceptionThrown") + page.named("Runtime.consoleAPICalled")
    assert not problems
    requests = [event["request"]["url"] for event in page.named("Network.requestWillBeSent")]
    assert report_url in requests, "the page's own request is missing, so the list proves nothing"
    assert [url[:80] for url in requests if url != report_url and not url.startswith("data:")] == []

    pictures = page.evaluate("[...document.images].map(i => [i.alt, i.complete, i.naturalWidth])")
    assert [name for name, _, _ in pictures] == ["strip", "scene", "maps"]
    assert all(complete and natural_width > 0 for _, complete, natural_width in pictures)
    assert page.evaluate("document.querySelectorAll('.chart svg[role=img] .series').length") == 6

    assert page.evaluate("window.innerWidth") == width, "something made the page wider than the window"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td, th, dd, figcaption, li, code, .row span')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12, "text too small to read"
    answer_bottom = page.evaluate("document.querySelector('h1').getBoundingClientRect().bottom")
    assert 0 < answer_bottom < height, "the answer is not on the first screen"


@pytest.mark.parametrize(("width", "height", "mobile"), [(1280, 800, False), (390, 844, True)], ids=["1280", "390"])
def test_a_comparison_opens_cleanly(page: Page, tmp_path: Path, width: int, height: int, mobile: bool) -> None:
    tasks = {"photos": "top-1 accuracy (%)", "microscope images with a long name": "COCO AP (%)"}
    names = ("shipped MAE", "continued on these photos", "timm:vit_small_patch14_reg4_dinov2", "random")
    curve = [(float(step), 1.0 / step) for step in range(1, 50)]
    cells = [
        Cell(task, metric, name, 1.0, 500, [40.0 + place, 42.5 + place], {"rate": 2.0, "decay": 0.75}, curve=curve)
        for task, metric in tasks.items()
        for place, name in enumerate(names)
    ]
    rows = [EncoderRow(name, f"{name}.safetensors", "CC BY-NC 4.0", 5_400_000, 10**9, 99.0, (96, 96)) for name in names]
    url = write_results(Results("Which?", rows, cells, 9.0, 8, 2, 0.25, {"processor": "x" * 90}), tmp_path).as_uri()
    page.open(url, width, height, mobile)
    assert not page.named("Log.entryAdded") + page.named("Runtime.exceptionThrown")
    requests = [event["request"]["url"] for event in page.named("Network.requestWillBeSent")]
    assert url in requests and not [each for each in requests if each != url and not each.startswith("data:")]
    assert (
        page.evaluate("window.innerWidth") == width and page.evaluate("document.documentElement.scrollWidth") <= width
    )
    assert page.evaluate("document.querySelectorAll('.ranking .row').length") == 8
    assert 0 < page.evaluate("document.querySelector('h1').getBoundingClientRect().bottom") < height


def test_report_follows_the_colour_scheme(page: Page, report_url: str) -> None:
    backgrounds = []
    for dark in (False, True):
        page.open(report_url, 1280, 800, mobile=False, dark=dark)
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark_one = (sum(map(int, text.removeprefix("rgb(").removesuffix(")").split(","))) for text in backgrounds)
    assert light > 600 and dark_one < 150
