"The tutorial as a page without code, served by Voila."
import shutil

import pytest
from conftest import ROOT, server

pytestmark = pytest.mark.e2e


def test_the_lab_comes_up_and_answers(browser, tmp_path):
    shutil.copy(ROOT/"curvtools"/"static"/"1_see_it_happen.ipynb", tmp_path/"lab.ipynb")
    with server("voila", tmp_path, "/favicon.ico", "--Voila.ip=127.0.0.1", "lab.ipynb") as url:
        context = browser.new_context(viewport=dict(width=1100, height=1400)); page = context.new_page(); dialogs = []
        page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss())); page.set_default_timeout(90_000)
        page.goto(url, wait_until="domcontentloaded")
        page.get_by_role("heading", name="See it happen", exact=True).wait_for()
        page.locator('img[alt*="Kept pairs of model.layers.2."]').wait_for()
        page.get_by_role("status").filter(has_text="curvature: done").wait_for()
        page.get_by_role("button", name="Next block", exact=True).click()
        page.locator('img[alt*="Kept pairs of model.layers.3."]').wait_for()
        page.get_by_role("tab", name="Probe").click(); page.get_by_text("recited: all").first.wait_for()
        assert not page.locator("pre", has_text="Traceback").count() and not dialogs
        context.close()
