"""The last chapter and the demo page in a real browser: a photo uploaded, an answer read."""

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
from importlib.util import find_spec
from pathlib import Path

import cv2
import pytest
import requests

from utils.plots import astronaut
from utils.predict import AgePredictor
from utils.settings import ROOT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
DETECTOR = os.environ.get("AGE_FACE_DETECTOR")
PATIENCE = 120  # seconds for any one step; on an idle machine each test takes half of it
CROP = not DETECTOR  # without the detector, a face crop is uploaded
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


@contextmanager
def showing(address: str, server: list, folder: Path, **settings: str) -> Iterator[Page]:
    """A page of a local server in Chromium, once the server answers."""
    told, answer = folder / "profile" / "DevToolsActivePort", dict(timeout=10)
    options = dict(env=os.environ | settings | {"HOME": str(folder)}, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    browser = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    browser += ["--disable-dev-shm-usage", "--disable-background-networking", "--no-proxy-server"]
    browser += [f"--user-data-dir={told.parent}", "--remote-debugging-port=0"]
    browser += ["--window-size=1100,4200", "about:blank"]
    with running(server, **options), running(browser, **options):
        wait_for(lambda: told.is_file() and told.read_text().count("\n"), "Chromium")
        tools = f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json/list"
        pages = wait_for(lambda: requests.get(tools, **answer).json(), "a page of Chromium")
        wait_for(lambda: requests.get(address, **answer).ok, "the server")
        page = Page(next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page"))
        for domain in ("Page", "Network"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setFocusEmulationEnabled", enabled=True)  # as if it were in front
        page.send("Page.navigate", url=address)
        try:
            yield page
        finally:
            shot = page.send("Page.captureScreenshot")["data"]
            (folder / "browser.png").write_bytes(base64.b64decode(shot))
            print("what the browser shows:", folder / "browser.png")


@pytest.fixture
def port(monkeypatch) -> int:
    """A free one on this machine, which is spoken to directly."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "Großmutter 1.png"
    pixels = astronaut(aligned=CROP)[..., ::-1]
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return path


@pytest.fixture(scope="module")
def answers() -> Callable:
    """Whether a text holds the photo's age."""
    (age,) = AgePredictor().photo(astronaut(aligned=CROP), crop=CROP)["age"]
    return lambda text: any(abs(float(n) - age) < 0.15 for n in re.findall(r"\d+\.\d+", text))


def test_the_notebook_answers_for_an_uploaded_photo(tmp_path, port, photo, answers):
    """JupyterLab with the cells of the notebook that lead to an answer."""
    (path,) = ROOT.glob("notebooks/*_your_own_photo.ipynb")
    notebook, wanted = json.loads(path.read_text("utf-8")), {"setup", "settings", "photo"}
    notebook["cells"] = [
        cell | {"outputs": [], "execution_count": None}
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and wanted & set(cell["metadata"].get("tags", []))
    ]
    (tmp_path / "photo.ipynb").write_text(json.dumps(notebook), "utf-8")
    (tmp_path / "utils").symlink_to(ROOT / "utils")
    lab = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    lab += [f"--ServerApp.port={port}", "--ServerApp.token=reader", "--expose-app-in-browser"]
    lab += [f"--ServerApp.root_dir={tmp_path}"]
    address = f"http://127.0.0.1:{port}/lab/tree/photo.ipynb?token=reader&reset"
    data = {"AGE_FACES": "sample", "AGE_DATA": str(tmp_path / "data")}
    with showing(address, lab, tmp_path, **data) as page:
        wait_for(lambda: page.run(READY), "the notebook and its kernel")
        page.run("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
        button = "document.querySelector('button.widget-upload')"
        wait_for(lambda: page.run(f"!!{button}"), "the button")
        before = len(page.run(TABLES))
        page.send("Page.setInterceptFileChooserDialog", enabled=True)
        page.run(f"{button}.click()")
        opened = "Page.fileChooserOpened"
        wait_for(lambda: page.run("1") and opened in str(page.events), "the file chooser")
        node = next(e["params"]["backendNodeId"] for e in page.events if e["method"] == opened)
        page.send("DOM.setFileInputFiles", files=[str(photo)], backendNodeId=node)
        tables = wait_for(lambda: (t := page.run(TABLES))[before:] and t, "the answer")
    assert answers(tables[-1]), tables[-1]
    assert (tmp_path / "build" / "answer.png").stat().st_size > 5_000


@pytest.mark.skipif(not find_spec("gradio"), reason="no Gradio: make demo installs it")
def test_the_demo_page_answers_and_speaks_to_this_machine_alone(tmp_path, port, photo, answers):
    server = [sys.executable, "-m", "utils.predict", "--demo"]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
                "BROWSER": "true", "PYTHONPATH": str(ROOT)}  # fmt: skip
    with showing(address := f"http://127.0.0.1:{port}/", server, tmp_path, **settings) as page:
        wait_for(lambda: page.run("!!document.querySelector('input[type=file]')"), "the page")
        if CROP:
            page.run("document.querySelector('input[type=checkbox]').click()")
        root = page.send("DOM.getDocument")["root"]["nodeId"]
        given = page.send("DOM.querySelector", nodeId=root, selector="input[type=file]")
        page.send("DOM.setFileInputFiles", files=[str(photo)], **given)
        wait_for(lambda: answers(page.run("document.body.innerText")), "the answer")
        pictures = "[...document.images].filter(image => image.naturalWidth > 99).length"
        wait_for(lambda: page.run(pictures) == 3, "the photo, the boxed faces and the map")
    sent = [e["params"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    asked = [parameters["request"]["url"] for parameters in sent]
    assert address in asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
