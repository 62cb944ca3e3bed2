"""Notebook 9 in a real browser: JupyterLab, headless Chromium, a photo uploaded, an answer read."""

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
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests

from utils.photo import get_crops, read_photo
from utils.predict import load_predictor
from utils.settings import CHECKPOINT, ROOT
from utils.synthetic import draw_face, get_person

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DETECTOR = os.environ.get("AGE_FACE_DETECTOR")
NOTEBOOK = ROOT / "notebooks" / "09_your_own_photo.ipynb"
PATIENCE = 120  # seconds for any one step; on an idle machine the whole test takes half of it

pytestmark = [
    pytest.mark.skipif(not BROWSER, reason=f"needs a browser: none of {', '.join(NAMES)}"),
    pytest.mark.skipif(not CHECKPOINT.is_file(), reason="needs the published weights"),
]


def wait_for(look: Callable, what: str):
    """The first true answer of `look`."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if answer := look():
            return answer
        time.sleep(0.2)
    raise TimeoutError(f"waited {PATIENCE} s for {what}")


@contextmanager
def running(command: list, **options) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Page:
    """One page of Chromium, spoken to by the DevTools protocol."""

    def __init__(self, address: str) -> None:
        websocket = pytest.importorskip("websocket")  # comes with JupyterLab
        self.socket = websocket.create_connection(address, PATIENCE, suppress_origin=True)
        self.numbers, self.events = itertools.count(1), []

    def send(self, method: str, **parameters) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def run(self, script: str):
        """The value of a JavaScript expression, as if the reader had clicked."""
        options = dict(awaitPromise=True, returnByValue=True, userGesture=True)
        answer = self.send("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def event(self, method: str) -> dict:
        def look():
            self.run("1")  # receives what has arrived
            return next((e["params"] for e in self.events if e.get("method") == method), None)

        return wait_for(look, method)


def course_in(home: Path) -> None:
    """A folder with `utils` and the cells of notebook 9 that lead to an answer."""
    (home / "notebooks").mkdir()
    (home / "utils").symlink_to(ROOT / "utils")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    kept = {"setup", "settings", "photo"}
    notebook["cells"] = [
        cell | {"outputs": [], "execution_count": None}
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and kept & set(cell["metadata"].get("tags", []))
    ]
    (home / "notebooks" / "photo.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture
def page(tmp_path, monkeypatch) -> Iterator[Page]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    course_in(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"AGE_FACES": "sample", "AGE_DATA": str(tmp_path / "data"), "HOME": str(tmp_path)}
    options = dict(env=os.environ | settings, stdout=subprocess.DEVNULL, cwd=tmp_path)
    lab = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    lab += [f"--ServerApp.port={port}", "--ServerApp.token=reader", "--expose-app-in-browser"]
    browser = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    browser += ["--disable-dev-shm-usage", "--disable-background-networking", "--no-proxy-server"]
    browser += [f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0"]
    browser += ["--window-size=1100,4200", "about:blank"]
    with (
        (tmp_path / "lab.log").open("wb") as log,
        running(lab, stderr=log, **options),
        running(browser, stderr=subprocess.DEVNULL, **options),
    ):
        told = tmp_path / "profile" / "DevToolsActivePort"
        wait_for(lambda: told.is_file() and told.read_text().count("\n"), "Chromium")
        devtools = f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json/list"
        pages = wait_for(
            lambda: [p for p in requests.get(devtools, timeout=10).json() if p["type"] == "page"],
            "a page of Chromium",
        )
        address = f"http://127.0.0.1:{port}/lab/tree/notebooks/photo.ipynb?token=reader&reset"
        wait_for(lambda: answers(address), "JupyterLab's server")
        page = Page(pages[0]["webSocketDebuggerUrl"])
        page.send("Page.enable")
        page.send("Emulation.setFocusEmulationEnabled", enabled=True)  # as if it were in front
        page.send("Page.navigate", url=address)
        yield page


def answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=10).ok
    except requests.RequestException:
        return False


def photo_file(folder: Path) -> Path:
    """A drawn face, in a scene where there is a detector, else as the crop that it needs."""
    face = draw_face(get_person(0, 32, gap=False))[0]
    picture = face
    if DETECTOR:
        picture = np.full((500, 800, 3), (176, 196, 206), np.uint8)
        picture[100:400, 300:600] = cv2.resize(face, (300, 300))
    path = folder / "Großvater 1.png"
    path.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
    return path


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


def test_a_photo_is_uploaded_and_answered(page, tmp_path):
    wait_for(lambda: page.run(READY), "the notebook and its kernel")
    page.run("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
    wait_for(lambda: page.run("!!document.querySelector('button.widget-upload')"), "the button")
    before = len(page.run(TABLES))
    page.send("Page.setInterceptFileChooserDialog", enabled=True)
    page.run("document.querySelector('button.widget-upload').click()")
    chooser = page.event("Page.fileChooserOpened")
    path = photo_file(tmp_path)
    page.send("DOM.setFileInputFiles", files=[str(path)], backendNodeId=chooser["backendNodeId"])
    try:
        tables = wait_for(lambda: (t := page.run(TABLES))[before:] and t, "the answer")
    finally:
        picture = page.send("Page.captureScreenshot")["data"]
        (tmp_path / "browser.png").write_bytes(base64.b64decode(picture))
        print("what the browser shows:", tmp_path / "browser.png")
    predictor = load_predictor()
    crops = get_crops(read_photo(path), crop=not DETECTOR)
    age = predictor.ages(crops)["age"].round(1).tolist()
    assert len(age) == 1
    shown = [float(number) for number in re.findall(r"\d+\.\d+", tables[-1])]
    assert any(abs(number - age[0]) < 0.15 for number in shown), (tables[-1], age)
    assert (tmp_path / "build" / "answer.png").stat().st_size > 5_000
