"A private JupyterLab and a headless Chromium. Without one of them the tests are skipped, or fail where CI is set."
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

ARTIFACTS = pathlib.Path(__file__).parents[1]/"artifacts"


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


@pytest.fixture(scope="session", params=["perCommTarget", "disabled"])
def jupyter(request, browser, tmp_path_factory):
    "JupyterLab on a loopback port, with widget messages on subshells and without; all it writes stays in a temporary folder."
    if subprocess.run([sys.executable, "-m", "jupyterlab", "--version"], capture_output=True).returncode: missing("jupyterlab is not installed")
    root = tmp_path_factory.mktemp("lab")
    work, cfg = root/"work", root/"cfg"/"labconfig"
    work.mkdir(); cfg.mkdir(parents=True)
    (cfg/"default_setting_overrides.json").write_text(json.dumps({
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
        "@jupyterlab/apputils-extension:kernels-settings": {"commsOverSubshells": request.param}}))
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(root/"cfg"), JUPYTER_DATA_DIR=str(root/"data"), JUPYTER_RUNTIME_DIR=str(root/"rt"), IPYTHONDIR=str(root/"ipy"),
               MPLBACKEND="module://matplotlib_inline.backend_inline", HF_HUB_OFFLINE="1")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with open(root/"lab.log", "w") as log:
        p = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
            "--IdentityProvider.token=t", f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"],
            env=env, stdout=log, stderr=subprocess.STDOUT)
    url, t0 = f"http://127.0.0.1:{port}", time.time()
    try:
        while True:
            try: urllib.request.urlopen(url + "/api/status?token=t", timeout=1); break
            except OSError:
                assert p.poll() is None and time.time() - t0 < 120, (root/"lab.log").read_text()
                time.sleep(.2)
        yield dict(url=url, work=work, mode=request.param)
    finally: p.terminate(); p.wait(15)


@pytest.fixture
def open_notebook(jupyter, browser):
    "open_notebook(name, *cells) writes a notebook, opens it alone in a page and runs it."
    contexts = []
    def f(name, *cells, timeout=120_000):
        cs = [dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(cells)]
        nb = dict(cells=cs, metadata=dict(kernelspec=dict(display_name="Python 3", language="python", name="python3")), nbformat=4, nbformat_minor=5)
        (jupyter["work"]/name).write_text(json.dumps(nb))
        contexts.append(browser.new_context(viewport=dict(width=1280, height=1700)))
        page = contexts[-1].new_page()
        page.set_default_timeout(timeout)
        page.goto(f"{jupyter['url']}/doc/tree/{name}?token=t&reset", wait_until="domcontentloaded")
        page.wait_for_function("window.jupyterapp !== undefined")
        page.evaluate("window.jupyterapp.restored.then(() => true)")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        return page
    yield f
    for c in contexts: c.close()


@pytest.fixture
def artifact(jupyter):
    "Where a screenshot goes; looked at by people, compared with nothing."
    ARTIFACTS.mkdir(exist_ok=True)
    return lambda name: str(ARTIFACTS/f"{name}-{jupyter['mode']}.png")
