"""The Lab in a real JupyterLab, driven as by hand, with widget messages on subshells and without.

The tests of a mode share one page and run in order; each leaves the original weights behind."""
import re

import pytest

pytestmark = pytest.mark.e2e
PANELS = ["Explorer", "Probe", "Editor", "Spectrum", "Lens"]
CONTROLS = "button combobox spinbutton textbox checkbox listbox tab slider radio link searchbox switch".split()
EVIL = ("<script>window.pwned = 1; alert(1)</script> <img src=x onerror=\"window.pwned = 2; alert(2)\"> </pre></div></textarea><svg onload=alert(3)> "
        "\" onmouseover=alert(4) x=\" &lt;b&gt; javascript:alert(5) \u202egnp.exe\u202c \u2066hidden\u2069 \u200b\ufeff \x07\x1b[31m and then some plain words")


@pytest.fixture
def lab(tutorial):
    "The Lab of the tutorial with the original weights; no cell may have complained afterwards."
    hands = Hands(tutorial, tutorial.outputs().first).tab("Editor")
    hands.weights(""); hands.says("done|failed|cancelled")        # drawn, and its buttons say what can be done
    if hands.role("button", "Reset").is_enabled(): hands.press("Reset"); hands.weights("original")
    yield hands.tab("Explorer")
    assert tutorial.problems() == []


class Hands:
    "What a person does with the panels in an output, and sees."
    def __init__(self, notebook, out): self.nb, self.page, self.out = notebook, notebook.page, out
    def role(self, kind, name, exact=True): return self.out.get_by_role(kind, name=name, exact=exact)
    def tab(self, name):
        self.role("tab", name).click()
        self.role("tab", name).and_(self.out.locator('[aria-selected="true"]')).wait_for()
        return self
    def press(self, name): self.role("button", name).click()
    def says(self, text): self.out.get_by_role("status").filter(has_text=re.compile(text)).wait_for()
    def picture(self, text): self.out.locator(f'img[alt*="{text}"]').wait_for()
    def has(self, text): self.out.get_by_text(re.compile(text)).first.wait_for()
    def row(self, name): return self.out.get_by_role("row").filter(has=self.page.get_by_role("rowheader", name=name)).get_by_role("cell")
    def checksum(self): return self.out.locator("code").first.inner_text()
    def weights(self, text): self.out.get_by_text(re.compile(f"Weights: {text}")).wait_for()
    def type(self, box, text): box.fill(text); box.press("Tab")


def test_look_at_matrices_by_keyboard(lab):
    pictures = ("Spectra of", "Energy of", "Mass curve of", "Kept pairs of")
    def shown(block, projection="q"):
        for p in pictures: lab.picture(f"{p} model.layers.{block}.self_attn.{projection}_proj")
    block = lab.role("spinbutton", "Block")
    shown(2)
    block.focus(); lab.page.keyboard.press("ArrowUp")            # the box: one block up, and all pictures follow
    shown(3)
    for _ in range(2): lab.page.keyboard.press("ArrowDown")
    shown(1)
    lab.role("button", "Previous block").focus(); lab.page.keyboard.press("Enter")
    shown(0)
    lab.press("Previous block"); lab.says("Block 0: there is no more")   # it stays
    assert block.input_value() == "0"
    lab.press("Next block"); shown(1)
    lab.role("combobox", "Projection").select_option("v"); shown(1, "v")
    lab.type(lab.role("combobox", "Find"), "layers.2.self_attn.o"); shown(2, "o")
    assert block.input_value() == "2"

    slider = lab.out.get_by_role("slider").first
    slider.focus()
    for _ in range(3): lab.page.keyboard.press("ArrowLeft")       # rho by keyboard: the number box and the pictures follow
    lab.picture("at rho 0.83:")
    assert lab.role("spinbutton", "rho, typed").input_value() == "0.83"
    lab.type(lab.role("spinbutton", "rho, typed"), "0.5"); lab.picture("at rho 0.5:")
    lab.has("At rho 0.5: ")
    lab.role("combobox", "Order by").select_option("|coefficient|"); lab.has("ordered by .coefficient.")
    lab.tab("Editor").weights("original")                         # looking changes nothing
    lab.has("bit for bit the original")
    lab.tab("Explorer")


@pytest.mark.parametrize("panel", PANELS)
def test_every_control_has_a_name(lab, panel):
    tree = lab.tab(panel).out.aria_snapshot()
    found = re.findall(rf"^\s*- '?({'|'.join(CONTROLS)})\b(.*)$", tree, re.M)
    nameless = [kind for kind, rest in found if not re.match(r' "[^"]', rest)]
    sliders = nameless.count("slider")                            # ipywidgets gives a slider no name: a box of the same number stands beside it
    assert set(nameless) <= {"slider"} and len(re.findall('spinbutton "[^"]+, typed"', tree)) == sliders, nameless
    assert len(found) > 6
    lab.tab("Explorer")


@pytest.mark.parametrize("panel, box", [("Probe", "Your text"), ("Lens", "Text")])
def test_pasted_text_is_inert(lab, panel, box):
    lab.tab(panel); lab.says(": done"); before = lab.out.locator("script, img, svg, iframe, [onerror], [onload], [onmouseover]").count()
    lab.type(lab.role("textbox", box), EVIL)
    strips = lab.out.get_by_role("group")
    strips.filter(has_text="script").first.wait_for()             # it is there, as text
    lab.says("(your text|score): done")
    assert lab.out.locator("script, img, svg, iframe, [onerror], [onload], [onmouseover]").count() == before
    seen = "".join(strips.all_inner_texts()) + lab.out.get_by_role("status").inner_text()
    assert "<img" in seen.replace("·", "") and not re.search("[\u202a-\u202e\u2066-\u2069\u200b\ufeff\x00-\x08\x0b\x0e-\x1f]", seen)
    assert lab.page.evaluate("window.pwned === undefined") and lab.nb.dialogs == []
    lab.type(lab.role("textbox", box), ""); lab.says("(your text|score): done")
    if panel == "Probe": lab.role("combobox", "Passages").select_option("memorised"); lab.has("Passage 1 of")
    lab.tab("Explorer"); lab.type(lab.role("combobox", "Find"), EVIL)
    lab.says("find failed"); assert lab.page.evaluate("window.pwned === undefined")
    lab.type(lab.role("combobox", "Find"), ""); lab.says("find: done")


def test_apply_read_undo_redo_reset(lab, artifact, jupyter):
    lab.tab("Editor").weights("original"); original = lab.checksum()
    strict = lab.row("strict recitation, memorised").first.inner_text()
    assert all(lab.role("button", n).is_disabled() for n in ("Undo", "Redo", "Reset", "Cancel"))
    lab.press("Apply"); lab.says("measuring the control"); assert lab.role("button", "Cancel").is_enabled()
    lab.weights("edited"); lab.says("apply and measure: done")
    edited = lab.checksum(); assert edited != original
    for name, n in (("strict recitation, memorised", 80), ("perplexity", 32), ("closed-book", 60), ("arithmetic", 60), ("logic", 60)):
        cells = lab.row(name).all_inner_texts()
        assert len(cells) == 3 and all(re.search(r"\d( %)?\s+\[", c) for c in cells), cells      # original, now, control, each with an interval
        assert lab.out.get_by_role("rowheader", name=f"(n = {n}").count() and cells[1] != cells[0]
    number = lambda cell: float(re.match(r"[\d.]+", cell)[0])
    now = {k: [number(c) for c in lab.row(k).all_inner_texts()] for k in ("strict recitation, memorised", "perplexity")}
    assert now["strict recitation, memorised"][0] > 90 and now["strict recitation, memorised"][1] < 5
    assert now["perplexity"][1] < 1.05*now["perplexity"][0] and now["perplexity"][2] > 1.2*now["perplexity"][0]
    history = lab.role("listbox", "History").get_by_role("option")
    assert history.count() == 2 and history.nth(1).inner_text().replace("\xa0", " ") == "1: K-FAC, rho 0.845, blocks 1, 2, q k v o"

    lab.tab("Probe").has("Passage 1 of"); lab.out.get_by_role("group", name="edited").wait_for()       # both continuations
    assert lab.out.get_by_role("group", name="original").count() == 1
    lab.press("Next passage"); lab.has("Passage 2 of"); assert lab.role("spinbutton", "Number").input_value() == "2"
    lab.says("passage: done"); lab.press("Next that is still recited"); lab.says("look for the next(: done| failed)")   # refused while the passage is drawn
    lab.tab("Spectrum").picture("Share kept of each behaviour"); lab.says(": done")    # a button that is pressed before that is refused as busy
    if jupyter["mode"] == "perCommTarget": pictures(lab, artifact)

    lab.tab("Editor"); lab.press("Undo"); lab.weights("original"); lab.says("undo: done")
    assert lab.checksum() == original and lab.row("strict recitation, memorised").all_inner_texts() == [strict]
    lab.tab("Probe").has("Passage"); lab.out.get_by_role("group", name="edited").wait_for(state="detached"); lab.says(": done")
    lab.tab("Editor"); lab.press("Redo"); lab.weights("edited"); lab.says("redo: done"); assert lab.checksum() == edited
    lab.press("Reset"); lab.weights("original"); lab.says("reset: done"); assert lab.checksum() == original
    lab.role("listbox", "History").select_option(index=1); lab.weights("edited"); lab.says("visit: done")
    assert lab.checksum() == edited
    lab.press("Reset"); lab.weights("original"); lab.says("reset: done"); assert lab.checksum() == original
    lab.tab("Explorer")


def pictures(lab, artifact):
    "Each panel, light, dark and in a narrow window, where nothing may be wider than the page."
    lab.press("Measure bands"); lab.picture("Activation energy by band"); lab.says("bands: done")
    lab.tab("Probe"); lab.role("combobox", "Seen").select_option("256 times"); lab.type(lab.role("spinbutton", "Number"), "1"); lab.has("Passage 1 of 32"); lab.says(": done")
    text = "".join(lab.out.get_by_role("group", name=n).inner_text().replace("⏎", "") for n in ("prefix", "true suffix"))
    lab.tab("Lens"); lab.says(": done"); lab.type(lab.role("textbox", "Text"), f"{text} And after that we went home, and she made tea for all of us, as it had begun to rain."); lab.says("score: done")
    lab.tab("Explorer"); lab.role("combobox", "Order by").select_option("curvature"); lab.has("ordered by curvature")
    try:
        lab.page.set_viewport_size(dict(width=1280, height=2700))
        for theme, light in (("JupyterLab Dark", "false"), ("JupyterLab Light", "true")):
            lab.nb.theme(theme, light)
            for p in PANELS:
                lab.tab(p).page.wait_for_timeout(300)
                lab.out.screenshot(path=artifact(f"{p.lower()}-{'light' if light == 'true' else 'dark'}"))
        lab.page.set_viewport_size(dict(width=360, height=5200))
        for p in PANELS:
            lab.tab(p).page.wait_for_timeout(300); lab.out.screenshot(path=artifact(f"{p.lower()}-narrow"))
            wide = lab.out.evaluate("""out => [...out.querySelectorAll('*')].filter(e => e.getClientRects().length && e.getBoundingClientRect().right > window.innerWidth + 1)
                .filter(e => { for (let p = e.parentElement; p && p !== out; p = p.parentElement) if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX) && p.getBoundingClientRect().right <= window.innerWidth + 1) return false; return true })
                .map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))""")
            assert not wide and lab.out.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), (p, wide[:5])
    finally: lab.page.set_viewport_size(lab.nb.size)


def test_two_panels_of_one_session(lab):
    look = Hands(lab.nb, lab.nb.run("look = Explorer(lab.session)\nlook")); edit = Hands(lab.nb, lab.nb.run("edit = Editor(lab.session)\nedit"))
    look.picture("Kept pairs"); edit.weights("original"); original = edit.checksum()
    edit.role("checkbox", "measure the control in random directions too").uncheck()
    edit.role("checkbox", "ask the questions of all families too").uncheck()
    edit.type(edit.role("spinbutton", "Strength, typed"), "0.9"); edit.has(r"9\d\.\d% of the curvature mass")
    edit.press("Apply"); edit.weights("edited"); edit.says("apply and measure: done")
    assert len(edit.row("strict recitation, memorised").all()) == 2
    lab.tab("Editor").weights("edited"); assert lab.checksum() == edit.checksum() != original           # the Lab of the same session knows
    look.role("spinbutton", "Block").focus(); lab.page.keyboard.press("ArrowUp"); look.picture("Spectra of model.layers.3.")  # and the other panel lives
    lab.press("Undo"); lab.weights("original"); edit.weights("original")
    assert edit.checksum() == original and edit.role("button", "Redo").is_enabled()
    lab.tab("Explorer"); lab.nb.run("look.close(); edit.close()"); lab.nb.idle()


def test_cancel_a_long_job(lab):
    long = Hands(lab.nb, lab.nb.run("long = Lab(pg, collect_on=10**6)\nlong"))
    long.says("collecting curvature, batch [2-9]"); long.press("Cancel")
    long.out.get_by_role("status").filter(has_text="curvature: cancelled").wait_for(timeout=8000)      # soon, not when all is done
    assert long.role("button", "Cancel").is_disabled()
    lab.page.wait_for_timeout(200)
    lab.tab("Editor").weights("original"); lab.tab("Probe"); lab.type(lab.role("spinbutton", "Number"), "1"); lab.has("Passage 1 of"); lab.press("Next passage"); lab.has("Passage 2 of")
    assert lab.out.get_by_role("group", name="original").inner_text()                                   # the model works on
    lab.tab("Explorer"); lab.nb.run("long.close()"); lab.nb.idle()


def test_a_lab_from_its_state(lab):
    lab.tab("Probe"); lab.role("combobox", "Seen").select_option("64 times"); lab.has(r"Passage \d+ of .*seen 64 times")
    lab.tab("Editor"); lab.press("Reset") if lab.role("button", "Reset").is_enabled() else None; lab.weights("original"); original = lab.checksum()
    states = lab.role("listbox", "History").get_by_role("option").all_inner_texts()
    again = Hands(lab.nb, lab.nb.run("import json\nstate = json.loads(json.dumps(lab.state | dict(at=1)))\nagain = Lab.from_state(state, pg, factors=lab.session.factors)\nagain"))
    again.weights("edited")                                      # the tab that was in front, the history, and where in it
    assert again.role("listbox", "History").get_by_role("option").all_inner_texts() == states and again.checksum() != original
    again.tab("Probe").has(r"Passage \d+ of .*seen 64 times")
    again.tab("Editor"); again.press("Reset"); again.weights("original"); assert again.checksum() == original
    lab.tab("Explorer")


def test_a_second_lab_on_an_edited_model(lab):
    lab.tab("Editor"); lab.role("listbox", "History").select_option(index=1); lab.weights("edited"); lab.says("visit: done"); edited = lab.checksum()
    two = Hands(lab.nb, lab.nb.run("two = Lab(pg, collect_on=4096)\ntwo"))
    two.says("curvature: done. The model held an edit already.*rho=0.845")
    two.tab("Editor").weights("as this Lab found them, with an edit in place already: .*rho=0.845"); assert two.checksum() == edited
    assert two.out.get_by_text("bit for bit").count() == 0 and two.out.get_by_role("columnheader", name="found weights").count() == 1
    lab.press("Reset"); lab.weights("original"); lab.says("reset: done")
    lab.tab("Explorer"); lab.nb.run("two.close()"); lab.nb.idle()
