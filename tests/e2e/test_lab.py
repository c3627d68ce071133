"The Lab in a real JupyterLab, driven as by hand, with widget messages on subshells and without."
import re

import pytest

pytestmark = pytest.mark.e2e
SOURCE = "from curvtools.all import *\nlab = Lab(playground())\nlab"


def test_look_edit_measure_undo(open_notebook, artifact):
    page = open_notebook("lab.ipynb", SOURCE)
    out = page.locator(".jp-OutputArea-output").filter(has=page.get_by_role("button", name="Apply")).first
    has = lambda text: out.filter(has_text=re.compile(text)).wait_for()
    row = lambda name: out.locator("tr").filter(has_text=name).locator("td")
    checksum = lambda: re.search("checksum ([0-9a-f]{12})", out.inner_text())[1]

    has("curvature: done")                                       # collected in a worker; then the panel is ready
    assert out.get_by_role("button", name="Cancel").is_disabled() and out.get_by_role("button", name="Undo").is_disabled()
    original, strict = checksum(), row("strict, memorised").first.inner_text()
    blocks = out.get_by_label("Block", exact=True).locator("option").count()

    out.get_by_role("button", name="Previous block").click()     # another matrix: all three pictures follow
    for picture in ("Spectra", "Mass curve", "Kept pairs"): out.locator(f'img[alt*="{picture} of model.layers.{blocks - 2}."]').wait_for()
    out.get_by_label("Projection", exact=True).select_option("down")
    out.locator(f'img[alt*="Kept pairs of model.layers.{blocks - 2}.mlp.down_proj at rho 0.9:"]').wait_for()

    before = out.get_by_text("Would keep").inner_text()
    out.get_by_role("slider").focus()
    for _ in range(3): page.keyboard.press("ArrowLeft")          # rho by keyboard; the number box and the pictures follow
    out.locator('img[alt*="at rho 0.87:"]').wait_for()
    assert out.get_by_label("rho, typed").input_value() == "0.87"
    has("rho=0.87")
    assert out.get_by_text("Would keep").inner_text() != before
    assert checksum() == original                                # a plan changes nothing

    out.get_by_role("button", name="Apply").click()
    has("Weights: edited")
    has("edited: rho 0.87")
    has("apply and measure: done")
    edited = row("strict, memorised").nth(1).inner_text()
    assert row("strict, memorised").first.inner_text() == strict and re.search(r"\d %\s+\[", edited)
    assert row("strict, memorised").count() == row("perplexity").count() == 3   # original, edited, control in random bases
    assert row("perplexity").nth(1).inner_text() != row("perplexity").first.inner_text()
    assert checksum() != original
    assert out.get_by_text("original: ").count() >= 1 and out.get_by_role("group", name="edited").count() == 1   # both continuations
    out.screenshot(path=artifact("lab"))

    out.get_by_role("button", name="Next passage").click()
    has("Passage 2 of")
    out.get_by_role("button", name="Undo").click()
    has("Weights: original")
    has("undo: done")
    assert checksum() == original                                # bit for bit
    assert out.get_by_role("group", name="edited").count() == 0
    assert "⚠" not in out.inner_text()
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0

    page.set_viewport_size(dict(width=420, height=3200))
    assert out.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "wider than a narrow page"
    out.screenshot(path=artifact("lab-narrow"))
    page.set_viewport_size(dict(width=1280, height=1700))
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    out.screenshot(path=artifact("lab-dark"))
