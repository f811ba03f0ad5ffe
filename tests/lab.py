"""A real JupyterLab in a real Chromium, for the tests marked `browser` and for `benchmarks/session_memory.py`.

    with Lab(folder) as lab, Browser() as browser:
        page = browser.open(lab, lab.add("00_start_here"))
        page.run_all()

Every wait is on a condition of the page or the kernel, none on a length of time. All that is private to the run
(configuration, settings, workspaces, runtime files, the notebooks themselves) lies in `folder`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
TOKEN = "a-token-for-the-tests"
START, RUN, STEP = 90, 150, 30  # seconds: until a server or a page is up, a notebook has run, a click has its effect
BADGE = "https://mybinder.org/badge_logo.svg"  # the one picture that notebooks have from elsewhere
STAND_IN = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="109" height="20"><rect width="109" height="20" fill="#999"/></svg>'
)


def chromium() -> str | None:
    """The browser: the environment variable CHROMIUM, else what is installed."""
    named = os.environ.get("CHROMIUM")
    names = ("chromium", "chromium-browser", "google-chrome")
    return named if named and os.access(named, os.X_OK) else next(filter(None, map(shutil.which, names)), None)


def why_not() -> str:
    """Why no browser test can run here, and what to do; empty if they can."""
    if importlib.util.find_spec("playwright") is None:
        return 'no playwright: pip install -c constraints.txt "eas_kit[browser]"'
    if chromium() is None:
        return "no chromium: apt-get install chromium fonts-dejavu-core, or set CHROMIUM to the browser's path"
    return ""


def copy_notebook(name: str, path: Path, parameters: dict[str, Any] | None = None) -> None:
    """A copy of a notebook, with parameters as `Lab.add` has them."""
    import yaml

    if parameters is None:
        parameters = yaml.safe_load((NOTEBOOKS / "params" / "test.yaml").read_text()).get(name) or {}
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    unknown = [key for key in parameters if f"\n{key} =" not in f"\n{cell.source}"]
    assert not unknown, f"{name} has no parameters {unknown}"
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


class Lab:
    """A JupyterLab server on a free port, with nothing of the user's own in it. Use it with `with`.

    Raises RuntimeError, with the end of the server's log, if it does not come up.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = Path(folder), Path(folder) / "root"
        self.url, self.log = "", Path(folder) / "server.log"
        self.process: subprocess.Popen | None = None

    def add(self, name: str, parameters: dict[str, Any] | None = None, as_name: str | None = None) -> str:
        """Copies a notebook below the server's root; returns its path there. JupyterLab saves, so never the source.

        `parameters` are written below the defaults of the parameters cell; None: the notebook's own of
        notebooks/params/test.yaml.
        """
        path = self.root / "notebooks" / f"{as_name or name}.ipynb"
        copy_notebook(name, path, parameters)
        return f"notebooks/{path.name}"

    def __enter__(self) -> Lab:
        self.root.mkdir(parents=True, exist_ok=True)
        private = {name: self.folder / name.lower() for name in ("CONFIG", "DATA", "RUNTIME")}
        config = private["CONFIG"] / "labconfig"
        config.mkdir(parents=True)
        # no pop-up with Jupyter's news over the page
        off = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
        (config / "page_config.json").write_text(json.dumps(off))
        environment = os.environ | {f"JUPYTER_{name}_DIR": str(path) for name, path in private.items()}
        environment |= {
            "JUPYTERLAB_SETTINGS_DIR": str(self.folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.folder / "workspaces"),
            "IPYTHONDIR": str(self.folder / "ipython"),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            # a download would fail at once: port 9 takes no connections
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
            **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
            "HF_HUB_OFFLINE": "0",  # so that a download would be tried
        }
        environment.pop("EAS_KIT_DISPLAY", None)
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
        command += ["--ServerApp.port=0", f"--ServerApp.root_dir={self.root}", f"--IdentityProvider.token={TOKEN}"]
        command += ["--LabApp.expose_app_in_browser=True"]
        command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + START
        while not self.url and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.1)
            for file in private["RUNTIME"].glob("jpserver-*.json"):
                with contextlib.suppress(OSError, ValueError):
                    self.url = json.loads(file.read_text())["url"]
                    self.ask("api/status")
        if not self.url:
            self.__exit__()
            raise RuntimeError(f"JupyterLab did not start: {self.log.read_text()[-2000:]}")
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()  # the server ends its kernels
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def ask(self, path: str, method: str = "GET") -> Any:
        """The server's own answer, from JSON."""
        headers = {"Authorization": f"token {TOKEN}"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self.url + path, headers=headers, method=method), timeout=20) as answer:
            return json.loads(answer.read() or b"null")

    def end_kernels(self) -> None:
        """Ends all kernels, as "Shut Down All" does."""
        for session in self.ask("api/sessions"):
            self.ask(f"api/sessions/{session['id']}", "DELETE")


def voila() -> str:
    """Why voila cannot be tested here, and what to do; empty if it can."""
    if importlib.util.find_spec("voila") is None:
        return 'no voila: pip install -c constraints.txt "eas_kit[voila]"'
    return why_not()


@contextlib.contextmanager
def served(command: list[str], log: Path) -> Iterator[str]:
    """A server that another command starts, such as voila, on a free port of this machine; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    private = {f"JUPYTER_{name}_DIR": str(log.parent / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = os.environ | private | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment.pop("EAS_KIT_DISPLAY", None)
    with log.open("w") as out:
        process = subprocess.Popen([*command, f"--port={port}"], env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                yield f"http://127.0.0.1:{port}/"
                return
            time.sleep(0.1)
        raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")
    finally:
        process.terminate()  # the server ends its kernels
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


class Browser:
    """A headless Chromium. Use it with `with`."""

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]  # for root, and for small containers
        self._chromium = self._playwright.chromium.launch(executable_path=chromium(), headless=True, args=arguments)
        return self

    def __exit__(self, *exc: object) -> None:
        self._chromium.close()
        self._playwright.stop()

    def page(self, width: int = 1280, height: int = 900) -> Any:
        """A new, empty page of playwright's."""
        return self._chromium.new_page(viewport={"width": width, "height": height})

    def open(self, lab: Lab, path: str, width: int = 1280, height: int = 900) -> NotebookPage:
        """A new page with a notebook, its kernel ready."""
        page = NotebookPage(self.page(width, height), lab)
        page.goto(path)
        return page


# The current notebook, as JupyterLab holds it.
PANEL = "window.jupyterapp.shell.currentWidget"
# The toolbar's "idle" mark comes earlier than the kernel, and a Run All then does nothing, without an error.
READY = f"""() => {{
  const panel = window.jupyterapp && {PANEL}, session = panel && panel.sessionContext;
  const kernel = session && session.session && session.session.kernel;
  return !!(kernel && session.isReady && panel.context.isReady && panel.content.widgets.length
            && kernel.connectionStatus === 'connected' && kernel.status === 'idle');
}}"""
CELLS = f"""() => Array.from({PANEL}.content.model.sharedModel.cells).map((cell, index) => ({{
  index, type: cell.cell_type, source: cell.getSource(), count: cell.execution_count,
  errors: cell.cell_type === 'code' ? cell.getOutputs().filter(o => o.output_type === 'error')
    .map(o => o.ename + ': ' + o.evalue) : []}}))"""
ASK = f"""async code => {{
  const kernel = {PANEL}.sessionContext.session.kernel;
  const asked = kernel.requestExecute({{code: '', silent: true, store_history: false, user_expressions: {{it: code}}}});
  const it = (await asked.done).content.user_expressions.it;
  return it.status === 'ok' ? it.data['text/plain'] : it.ename + ': ' + it.evalue;
}}"""
WATCH = """([index, every]) => {
  window.picturesSeen = window.picturesSeen || new Set();
  clearInterval(window.pictureWatch);
  window.pictureWatch = setInterval(() => {
    const cell = document.querySelector(`.jp-Cell[data-windowed-list-index="${index}"]`);
    for (const picture of cell ? cell.querySelectorAll('.jp-OutputArea-output img') : [])
      if (picture.src && picture.complete && picture.naturalWidth) window.picturesSeen.add(picture.src);
  }, every);
}"""


class NotebookPage:
    """One notebook in JupyterLab. `problems` collects the page's errors, `outside` what it asked of other machines."""

    def __init__(self, page: Any, lab: Lab) -> None:
        self.page, self.lab = page, lab
        self.problems: list[str] = []
        self.outside: set[str] = set()
        page.set_default_timeout(STEP * 1000)
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("console", lambda m: m.type == "error" and self.problems.append(f"console: {m.text} {m.location}"))
        page.route(lambda url: not url.startswith((lab.url, "data:", "blob:")), self._refuse)

    def _refuse(self, route: Any) -> None:
        self.outside.add(route.request.url)
        route.fulfill(status=200, content_type="image/svg+xml", body=STAND_IN)

    def goto(self, path: str) -> None:
        self.page.goto(f"{self.lab.url}lab/tree/{path}?reset&token={TOKEN}", wait_until="domcontentloaded")
        self.ready(START)

    def ready(self, seconds: float = RUN) -> None:
        """Until the notebook is there and its kernel is connected and idle."""
        self.wait(READY, seconds=seconds)

    def wait(self, condition: str, argument: Any = None, seconds: float = STEP) -> None:
        """Until the condition, a JavaScript function of one argument, is true."""
        self.page.wait_for_function(condition, arg=argument, timeout=seconds * 1000)

    def command(self, name: str) -> None:
        """A command of JupyterLab, waited for."""
        self.page.evaluate("async name => { await window.jupyterapp.commands.execute(name); }", name)

    def begin(self, name: str) -> None:
        """A command of JupyterLab, not waited for."""
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)

    # -- cells -------------------------------------------------------------------
    def cells(self) -> list[dict]:
        """index, type, source, count (executions), errors of each cell."""
        return self.page.evaluate(CELLS)

    def cell_with(self, text: str) -> int:
        """The number of the first code cell whose source holds `text`."""
        cells = [cell["index"] for cell in self.cells() if cell["type"] == "code" and text in cell["source"]]
        assert cells, f"no code cell holds {text!r}"
        return cells[0]

    def show_cell(self, index: int) -> Any:
        """Scrolls to a cell (JupyterLab may leave out of the page what is far away); returns its locator."""
        cell = self.page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{index}"]')
        self.page.evaluate(f"async index => {{ await {PANEL}.content.scrollToItem(index, 'start'); }}", index)
        cell.wait_for(state="visible")
        return cell

    def run_all(self) -> list[dict]:
        """Runs all cells; asserts that each has run, without an error."""
        self.begin("notebook:run-all-cells")
        return self.all_have_run()

    def begin_until(self, index: int) -> None:
        """Runs the cells up to this one, not waited for."""
        self.page.evaluate(f"index => {{ {PANEL}.content.activeCellIndex = index + 1; }}", index)
        self.begin("notebook:run-all-above")
        self.show_cell(index)

    def write(self, index: int, source: str) -> None:
        """Puts this into a cell, in place of what stands there."""
        cell = f"{PANEL}.content.model.sharedModel.cells[index]"
        self.page.evaluate(f"([index, source]) => {{ {cell}.setSource(source); }}", [index, source])

    def run_cell(self, index: int) -> None:
        """Runs one cell, waited for."""
        self.page.evaluate(f"index => {{ {PANEL}.content.activeCellIndex = index; }}", index)
        self.command("notebook:run-cell")

    def all_have_run(self) -> list[dict]:
        ended = f"""() => {{ const cells = ({CELLS})().filter(cell => cell.type === 'code' && cell.source.trim());
          return cells.every(cell => cell.count) || cells.some(cell => cell.errors.length); }}"""
        self.wait(ended, seconds=RUN)
        self.ready()
        cells = [cell for cell in self.cells() if cell["type"] == "code"]
        for cell in cells:
            assert not cell["errors"], f"{cell['errors']} in the cell\n{cell['source']}"
        assert cells and all(cell["count"] for cell in cells)
        return cells

    def watch_pictures(self, index: int) -> None:
        """From now on, notes every picture that the cell's output shows."""
        self.page.evaluate(WATCH, [index, 40])

    def pictures(self) -> int:
        """How many different ones there were."""
        return self.page.evaluate("() => window.picturesSeen.size")

    # -- kernel ------------------------------------------------------------------
    def ask(self, expression: str) -> str:
        """What a Python expression is worth in the kernel: its repr."""
        return self.page.evaluate(ASK, expression)

    def until(self, expression: str, wanted: str) -> None:
        """Until a Python expression in the kernel has the wanted repr."""
        self.wait(f"async ([code, wanted]) => (await ({ASK})(code)) === wanted", [expression, wanted])

    def saved(self) -> Path:
        """Saves the notebook; its file."""
        self.command("docmanager:save")
        return self.lab.root / self.page.evaluate(f"() => {PANEL}.context.path")

    def screenshot(self, folder: Path, name: str, index: int, widths: tuple[int, ...] = (1280, 1920)) -> None:
        """A picture of the window, scrolled to a cell's output, for each width; the first width stays."""
        for width in (*widths[1:], widths[0]):
            self.page.set_viewport_size({"width": width, "height": width * 9 // 16 + 180})
            output = self.show_cell(index).locator(".jp-OutputArea-output").first
            if output.count():
                output.evaluate("node => node.scrollIntoView({block: 'start'})")
            self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            self.page.screenshot(path=folder / f"{name}_{width}.png")

    def close_and_shut_down(self) -> None:
        """File, Close and Shut Down Notebook: ends this notebook's kernel alone."""
        before = len(self.lab.ask("api/kernels"))
        self.begin("notebook:close-and-shutdown")
        self.page.locator(".jp-Dialog-button.jp-mod-warn, .jp-Dialog-button.jp-mod-accept").last.click()
        end = time.monotonic() + STEP
        while len(self.lab.ask("api/kernels")) == before:
            assert time.monotonic() < end, "the kernel goes on"
            time.sleep(0.1)
        self.page.close()

    def close(self) -> None:
        """Closes the page and ends the kernels of all pages."""
        self.page.close()
        self.lab.end_kernels()


if __name__ == "__main__":  # make test-browser asks first
    sys.exit(why_not() or 0)
