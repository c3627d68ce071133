"A private JupyterLab and a headless Chromium. Without one of them the tests are skipped, or fail where CI is set."
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ARTIFACTS = ROOT/"tests"/"artifacts"
MODES = ["perCommTarget", "disabled"]   # widget messages on subshells, which is the default, and without


def missing(what):
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{what}: the browser tests need it")


@pytest.fixture(scope="session")
def browser():
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing("playwright is not installed (pip install playwright)")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path or not os.path.exists(path): missing("no Chromium found (apt-get install chromium, or set CHROMIUM)")
    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        yield b
        b.close()


@contextlib.contextmanager
def server(package, root, alive, *args):
    "A server on a loopback port; all it writes stays in a temporary folder. Gives its address."
    if subprocess.run([sys.executable, "-m", package, "--version"], capture_output=True).returncode: missing(f"{package} is not installed")
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(root/"cfg"), JUPYTER_DATA_DIR=str(root/"data"), JUPYTER_RUNTIME_DIR=str(root/"rt"), IPYTHONDIR=str(root/"ipy"),
               MPLBACKEND="module://matplotlib_inline.backend_inline", HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    log = root/f"{package}.log"
    with open(log, "w") as f: p = subprocess.Popen([sys.executable, "-m", package, "--no-browser", f"--port={port}", *args], env=env, stdout=f, stderr=subprocess.STDOUT, cwd=root)
    url, t0 = f"http://127.0.0.1:{port}", time.time()
    try:
        while True:
            try: urllib.request.urlopen(url + alive, timeout=60); break
            except urllib.error.HTTPError: break                  # it answers
            except OSError:
                assert p.poll() is None and time.time() - t0 < 120, log.read_text()
                time.sleep(.2)
        yield url
    finally:
        p.terminate()
        try: p.wait(15)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


@pytest.fixture(scope="session", params=MODES)
def jupyter(request, browser, tmp_path_factory):
    "JupyterLab, with widget messages on subshells and without."
    root = tmp_path_factory.mktemp("lab")
    work, cfg = root/"work", root/"cfg"/"labconfig"
    work.mkdir(); cfg.mkdir(parents=True)
    (cfg/"default_setting_overrides.json").write_text(json.dumps({
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
        "@jupyterlab/apputils-extension:kernels-settings": {"commsOverSubshells": request.param},
        "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}))
    with server("jupyterlab", root, "/api/status?token=t", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=t",
                f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly") as url:
        yield dict(url=url, work=work, mode=request.param)


class Notebook:
    "A notebook, open alone in a page of JupyterLab."
    size = dict(width=1280, height=1700)

    def __init__(self, jupyter, browser, name, source, timeout=1000*int(os.environ.get("CURVTOOLS_BROWSER_TIMEOUT", "120"))):   # more, where the machine is busy
        (jupyter["work"]/name).write_text(source if isinstance(source, str) else json.dumps(source))
        self.context = browser.new_context(viewport=self.size)
        self.page, self.dialogs = self.context.new_page(), []
        self.page.on("dialog", lambda d: (self.dialogs.append(d.message), d.dismiss()))
        self.page.set_default_timeout(timeout)
        self.page.goto(f"{jupyter['url']}/doc/tree/{name}?token=t&reset", wait_until="domcontentloaded")
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.page.evaluate("window.jupyterapp.restored.then(() => true)")
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        self.idle()

    def idle(self): self.page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")

    def run_all(self): self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def outputs(self): return self.page.locator(".jp-Cell-outputArea").filter(has=self.page.locator(".jupyter-widgets"))

    def run(self, source):
        "Put a cell at the end and run it; gives its output."
        k = self.page.evaluate("""async source => {
            const nb = window.jupyterapp.shell.currentWidget.content
            nb.model.sharedModel.addCell({cell_type: 'code', source})
            nb.activeCellIndex = nb.widgets.length - 1
            const k = nb.activeCellIndex
            window.jupyterapp.commands.execute('notebook:run-cell')
            return k }""", source)
        return self.page.locator(".jp-Notebook .jp-Cell").nth(k).locator(".jp-Cell-outputArea")

    def theme(self, name, light):
        self.page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
        self.page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=light)

    def problems(self): return self.page.locator("[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']").all_inner_texts() + self.dialogs


@pytest.fixture(scope="session")
def tutorial(jupyter, browser):
    "The first tutorial as `curvtools lab` opens it, run from top to bottom; one page for all tests of a mode. In the second mode up to its Lab, with less text."
    source = json.loads((ROOT/"curvtools"/"static"/"1_see_it_happen.ipynb").read_text(encoding="utf-8"))
    if jupyter["mode"] != MODES[0]:
        at = next(i for i, c in enumerate(source["cells"]) if c["id"] == "lab00004")
        source["cells"] = source["cells"][:at + 1]
        source["cells"][at]["source"] = "".join(source["cells"][at]["source"]).replace("Lab(pg)", "Lab(pg, collect_on=25_600)")
    nb = Notebook(jupyter, browser, "lab.ipynb", source)
    nb.run_all()
    nb.outputs().first.get_by_role("status").filter(has_text="curvature: done").wait_for()
    yield nb
    nb.context.close()


@pytest.fixture
def artifact(jupyter):
    "Where a screenshot goes; looked at by people, compared with nothing."
    ARTIFACTS.mkdir(exist_ok=True)
    return lambda name: str(ARTIFACTS/f"{name}-{jupyter['mode']}.png")
