"""The last chapter in a real browser: JupyterLab, Chromium, a photo uploaded, an answer read."""

import base64
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import cv2
import pytest
import requests

from utils.plots import astronaut
from utils.predict import AgePredictor
from utils.settings import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DETECTOR = os.environ.get("AGE_FACE_DETECTOR")
PATIENCE = 120  # seconds for any one step; on an idle machine the whole test takes half of it
TABLES = "[...document.querySelectorAll('.jp-OutputArea-output table')].map(t => t.innerText)"
READY = """
(() => {
  const app = window.jupyterapp;
  const panel = app && [...app.shell.widgets('main')].find(widget => widget.sessionContext);
  if (!panel?.sessionContext.session?.kernel || panel.content.widgets.length <= 3) return false;
  app.shell.activateById(panel.id);
  return app.shell.currentWidget === panel;
})()
"""
pytestmark = pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(NAMES)}")


def wait_for(look: Callable, what: str):
    """The first true answer of `look`."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(requests.RequestException):
            if answer := look():
                return answer
        time.sleep(0.2)
    raise TimeoutError(f"waited {PATIENCE} s for {what}")


@contextmanager
def running(command: list, **options) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    try:
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


class Page:
    """One page of Chromium, spoken to by the DevTools protocol."""

    def __init__(self, address: str) -> None:
        websocket = pytest.importorskip("websocket")  # comes with JupyterLab
        self.socket = websocket.create_connection(address, PATIENCE, suppress_origin=True)
        self.numbers, self.events = itertools.count(1), []

    def send(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def run(self, script: str):
        """The value of a JavaScript expression, as if the reader had clicked."""
        options = dict(awaitPromise=True, returnByValue=True, userGesture=True)
        answer = self.send("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@pytest.fixture
def page(tmp_path, monkeypatch) -> Iterator[Page]:
    """JupyterLab with the cells of the notebook that lead to an answer."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (path,) = ROOT.glob("notebooks/*_your_own_photo.ipynb")
    notebook, wanted = json.loads(path.read_text("utf-8")), {"setup", "settings", "photo"}
    notebook["cells"] = [
        cell | {"outputs": [], "execution_count": None}
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and wanted & set(cell["metadata"].get("tags", []))
    ]
    (tmp_path / "photo.ipynb").write_text(json.dumps(notebook), "utf-8")
    (tmp_path / "utils").symlink_to(ROOT / "utils")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"AGE_FACES": "sample", "AGE_DATA": str(tmp_path / "data"), "HOME": str(tmp_path)}
    options = dict(env=os.environ | settings, stdout=subprocess.DEVNULL, cwd=tmp_path,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    lab = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    lab += [f"--ServerApp.port={port}", "--ServerApp.token=reader", "--expose-app-in-browser"]
    browser = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    browser += ["--disable-dev-shm-usage", "--disable-background-networking", "--no-proxy-server"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0"]
    browser += ["--window-size=1100,4200", "about:blank"]
    with running(lab, **options), running(browser, **options):
        told = tmp_path / "profile" / "DevToolsActivePort"
        wait_for(lambda: told.is_file() and told.read_text().count("\n"), "Chromium")
        tools = f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json/list"
        pages = wait_for(lambda: requests.get(tools, timeout=10).json(), "a page of Chromium")
        address = f"http://127.0.0.1:{port}/lab/tree/photo.ipynb?token=reader&reset"
        wait_for(lambda: requests.get(address, timeout=10).ok, "JupyterLab's server")
        page = Page(next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page"))
        page.send("Page.enable")
        page.send("Emulation.setFocusEmulationEnabled", enabled=True)  # as if it were in front
        page.send("Page.navigate", url=address)
        yield page


def test_a_photo_is_uploaded_and_answered(page, tmp_path):
    photo, path = astronaut(aligned=not DETECTOR), tmp_path / "Großmutter 1.png"
    path.write_bytes(cv2.imencode(".png", photo[..., ::-1])[1].tobytes())
    wait_for(lambda: page.run(READY), "the notebook and its kernel")
    page.run("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
    wait_for(lambda: page.run("!!document.querySelector('button.widget-upload')"), "the button")
    before = len(page.run(TABLES))
    page.send("Page.setInterceptFileChooserDialog", enabled=True)
    page.run("document.querySelector('button.widget-upload').click()")
    wait_for(lambda: page.run("1") and "fileChooserOpened" in str(page.events), "the file chooser")
    node = next(e["params"]["backendNodeId"] for e in page.events if "Chooser" in e["method"])
    page.send("DOM.setFileInputFiles", files=[str(path)], backendNodeId=node)
    try:
        tables = wait_for(lambda: (t := page.run(TABLES))[before:] and t, "the answer")
    finally:
        shot = page.send("Page.captureScreenshot")["data"]
        (tmp_path / "browser.png").write_bytes(base64.b64decode(shot))
        print("what the browser shows:", tmp_path / "browser.png")
    (age,) = AgePredictor().photo(photo, crop=not DETECTOR)["age"]
    shown = [float(number) for number in re.findall(r"\d+\.\d+", tables[-1])]
    assert any(abs(number - age) < 0.15 for number in shown), (tables[-1], age)
    assert (tmp_path / "build" / "answer.png").stat().st_size > 5_000
