"The site: it builds from the notebooks without a warning, every link leads somewhere, every room has its page and its reference."
import collections
import importlib
import importlib.util
import json
import pathlib
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest

ROOT = pathlib.Path(__file__).parents[1]
for name in ("sphinx", "myst_nb", "furo"): pytest.importorskip(name, reason='the site needs pip install -e ".[docs]"')


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_build", ROOT/"nbs"/"_site"/"build.py")
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    return m


@pytest.fixture(scope="module")
def built(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert site.build(folder/"src", folder/"out") == 0, "Sphinx warned; what it said stands above"
    return folder/"out"


class Page(HTMLParser):
    "Where a page leads, and the places in it that can be led to."
    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.fetched = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        to = a.get("href") if tag in ("a", "link") else a.get("src")
        if to: self.links.append(to)
        if to and re.match("(https?:)?//", to) and (tag in ("script", "img", "iframe") or a.get("rel") == "stylesheet"): self.fetched.append(to)


@pytest.fixture(scope="module")
def pages(built): return {p: Page(p) for p in built.rglob("*.html")}


def test_every_link_leads_somewhere(built, pages):
    lost = collections.defaultdict(list)
    for at, page in pages.items():
        for to in page.links:
            if re.match(r"[a-z][a-z+.-]*:|//", to): continue
            file, place = urldefrag(unquote(to))
            target = (at.parent/file.split("?")[0]).resolve() if file else at
            if not target.exists(): lost[str(at.relative_to(built))].append(to)
            elif place and target in pages and place not in pages[target].ids: lost[str(at.relative_to(built))].append(to)
    assert not lost, dict(lost)


def test_nothing_is_fetched_from_elsewhere(pages):
    assert not {x for p in pages.values() for x in p.fetched}


def test_every_notebook_has_a_page_and_every_module_its_reference(site, built):
    for p in [*(ROOT/"nbs").glob("*.ipynb"), *(ROOT/"nbs"/"tutorials").glob("*.ipynb")]:
        assert (built/p.relative_to(ROOT/"nbs")).with_suffix(".html").exists(), p.name
    for m in {m for m in site.rooms().values() if m not in (None, "all")}:
        html, module = (built/"reference"/f"{m}.html").read_text(encoding="utf-8"), importlib.import_module(f"curvtools.{m}")
        own = [n for n in module.__all__ if getattr(getattr(module, n), "__module__", None) == module.__name__]
        assert own and not [n for n in own if f'id="curvtools.{m}.{n}"' not in html], m


def test_reference_has_notes_shapes_and_sources(built):
    html = (built/"reference"/"kfac.html").read_text(encoding="utf-8")
    text = re.sub("<[^>]+>", "", html)
    assert "a transformers model, or the id or folder of a causal one" in text      # the note beside a parameter of `collect`
    assert "[d_in, d_in]" in text and "[source]" in text
    assert "d_out" in (built/"_modules"/"curvtools"/"kfac.html").read_text(encoding="utf-8")


def test_search_finds(built):
    js = (built/"searchindex.js").read_text(encoding="utf-8")
    index = json.loads(js[js.index("(") + 1:js.rindex(")")])
    assert {"pages/glossary", "index", "02_kfac", "gallery"} <= set(index["docnames"])
    assert any(k.startswith("levenshtein") for k in index["terms"]) or any("levenshtein" in k.lower() for k in index["alltitles"])


def test_gallery_shows_all_panels_without_a_kernel(built):
    html = (built/"gallery.html").read_text(encoding="utf-8")
    for panel in ("Explorer", "Probe", "Editor", "Spectrum", "Lens"): assert f"<b>{panel}</b> (static copy)" in html, panel
    assert "widget-view" not in html


def test_a_hidden_cell_and_a_directive_do_not_reach_the_reader(built):
    for p in built.glob("[0-9]*.html"): assert not re.search(r"#\| ?(hide|export|default_exp)", re.sub("<[^>]+>", "", p.read_text(encoding="utf-8"))), p.name
