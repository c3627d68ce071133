"Figures hold the numbers they were given; text from models and data stays text."
import html as H
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure

from curvtools.data import Passage
from curvtools.decompose import Eigen, staircase
from curvtools.plots import band_energy, bars, block_map, diff_html, forest, frontier, img, kept_region, mass_curve, overlap, png, side_by_side, spectrum, token_marks, token_strip, token_texts, tradeoff
from curvtools.targets import Target


def toy(lam, mu, name="m.layers.0.mlp.up_proj"):
    lam, mu = (torch.tensor(x, dtype=torch.float64) for x in (lam, mu))
    t = Target(name=name, block=0, projection="up", role="mlp", d_out=len(lam), d_in=len(mu), layout="linear", parts=(), bias=False)
    return Eigen(t, torch.eye(len(lam)), torch.eye(len(mu)), lam, mu)


SHARED = [dict(side=s, band=b, overlap=.9, chance=.1, single=.5, single_chance=.3) for s in "AG" for b in ("top 10 %", "bottom 90 %")]
PARTS = [dict(band=1, lo=0, hi=.01, mass=.6, energy=.2), dict(band=2, lo=.01, hi=1, mass=.4, energy=.8)]
E = toy([4., 2., 1., .5, 0.], [8., 2., 1.])


class Spans(HTMLParser):
    "Collects tags, attributes and text of a piece of HTML."
    def __init__(self, s): super().__init__(convert_charrefs=True); self.tags, self.attrs, self.text = [], [], []; self.feed(s)
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attrs.append(dict(attrs))
    def handle_data(self, d): self.text.append(d)


def is_png(b):
    from PIL import Image
    return Image.open(io.BytesIO(b)).convert("RGB")


@pytest.mark.parametrize("fig", [lambda: spectrum(E), lambda: mass_curve(E), lambda: mass_curve(E, E.mask(rho=.8)), lambda: kept_region(E, E.mask(rho=.8)),
    lambda: tradeoff([dict(method="baseline", strict=.9, ppl=10.)]),
    lambda: overlap(SHARED), lambda: band_energy(PARTS)], ids=["spectrum", "mass", "mass+staircase", "kept", "tradeoff", "overlap", "band_energy"])
def test_every_figure_has_labels_and_renders(fig):
    f = fig()
    assert isinstance(f, Figure)
    ax = f.axes[0]
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title()
    assert f.legends
    im = is_png(png(f))
    assert im.size == tuple(int(x * 100) for x in f.get_size_inches())
    assert len(im.getcolors(1 << 20)) > 10                       # something is drawn
    assert len(png(f)) < 60_000
    w, h = im.size                                               # nothing is cut off: the rim is background
    rim = [im.getpixel((x, y)) for x in range(w) for y in (0, h - 1)] + [im.getpixel((x, y)) for y in range(h) for x in (0, w - 1)]
    assert set(rim) == {(255, 255, 255)}


def test_spectrum_draws_the_eigenvalues():
    g, a = spectrum(E).axes[0].lines
    assert g.get_ydata()[:4].tolist() == [1, .5, .25, .125] and g.get_ydata()[4] != g.get_ydata()[4]   # the zero is not drawn ...
    assert a.get_ydata().tolist() == [1, .25, .125]
    labels = [t.get_text() for t in spectrum(E).legends[0].get_texts()]
    assert "1 zero" in labels[0] and "zero" not in labels[1]     # ... but counted
    assert g.get_linestyle() != a.get_linestyle()                # not by colour alone


@pytest.mark.parametrize("e", [toy([0.], [0.]), toy([0., 0.], [1., 0.]), toy([1e-150], [1e150]), toy([1.] * 50, [1.])], ids=["zero", "half", "extreme", "flat"])
def test_degenerate_spectra_can_be_drawn(e):
    for f in (spectrum(e), mass_curve(e, e.mask(rho=.5)), kept_region(e, e.mask(rho=0)), kept_region(e, e.mask(rho=1))): is_png(png(f))


def test_marks_carry_the_staircases_own_numbers():
    s = E.mask(rho=.8)
    point = mass_curve(E, s).axes[0].lines[-1]
    assert point.get_xdata()[0] == s.fraction and point.get_ydata()[0] == E.mass_share(s) >= .8
    assert f"kept {s.kept:,} of {s.total:,}" in kept_region(E, s).axes[0].get_title()


def test_kept_region_is_the_mask():
    s = E.mask(fraction=.4)
    path = kept_region(E, s).axes[0].patches[0].get_path()
    for i in range(5):
        for j in range(3): assert path.contains_point((j + 1, i + 1)) == bool(s.dense()[i, j])


def test_a_figure_is_drawn_on_again():
    f = spectrum(E)
    for _ in range(5): assert spectrum(E, f) is f and mass_curve(E, fig=f) is f
    assert len(f.axes) == 1 and len(f.legends) == 1 and len(f.axes[0].lines) == 2


def test_transparent_reads_on_both_themes():
    from PIL import Image
    im = Image.open(io.BytesIO(png(spectrum(E), transparent=True)))
    assert im.mode == "RGBA" and im.getpixel((0, 0))[3] == 0


def test_no_pyplot():
    code = "import sys, curvtools.plots as p; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tradeoff_shows_ratio_interval_and_missing_control():
    rows = [dict(method="baseline", strict=.9, ppl=50., n=30), dict(method="svd", strict=.1, ppl=60., strict_interval=(.02, .3), ppl_interval=(55., 65.)), dict(method="random bases", strict=0, ppl=75.)]
    f = tradeoff(rows, gate=(.02, 1.02)); ax = f.axes[0]
    got = {l.get_label(): (list(l.get_xdata()), list(l.get_ydata())) for l in ax.lines if l.get_label() in ("baseline", "svd", "random bases")}
    assert got == {"baseline": ([90], [1]), "svd": ([10], [1.2]), "random bases": ([0], [1.5])}
    assert "30 passages" in ax.get_xlabel() and "control" not in ax.get_title()
    assert "no random-basis control" in tradeoff(rows[:2]).axes[0].get_title()
    assert len({l.get_marker() for l in ax.lines if l.get_label() in got}) == 3
    with pytest.raises(ValueError, match="'baseline'.*svd"): tradeoff(rows[1:])


def test_image_is_self_contained_and_named():
    tag = Spans(img(spectrum(E), 'spectra of "<G>"'))
    assert tag.tags == ["img"] and tag.attrs[0]["alt"] == 'spectra of "<G>"' and tag.attrs[0]["src"].startswith("data:image/png;base64,")


EVIL = ["<script>alert(1)</script>", '<img src=x onerror="alert(1)">', "\u202egnp.exe", "a\0b\x1b[31m", "' onmouseover='x", '" autofocus onfocus="x', "&lt;", "\ud800", "\u2028"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.sampled_from(EVIL), st.text(st.characters())), max_size=6), st.lists(st.text(st.characters()), max_size=2))
def test_text_stays_text(tokens, extra):
    s = token_strip(tokens, titles=(tokens + extra)[:len(tokens)], label=" ".join(tokens + extra))
    got = Spans(s)
    assert got.tags == ["div"] + ["span", "bdi"] * len(tokens)
    for a in got.attrs: assert set(a) <= {"role", "aria-label", "style", "tabindex", "title"}
    assert not re.search("[\0-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "".join(got.text))
    s.encode("utf-8")                                            # can be written to a file


def test_strip_marks_without_colour():
    s = token_strip(["a", "b", "c"], ["match", "divergence", "mismatch"])
    styles = [a["style"] for a in Spans(s).attrs if "tabindex" in a]
    assert [re.search("border-bottom:[^#]*", x)[0].split()[1] for x in styles] == ["solid", "double", "dotted"]
    assert [a["title"] for a in Spans(s).attrs if "tabindex" in a] == ["same as the true token", "the first that differs", "differs from the true token"]
    with pytest.raises(ValueError, match="wrong"): token_strip(["a"], ["wrong"])
    with pytest.raises(ValueError, match="2 tokens, 1 marks"): token_strip(["a", "b"], ["match"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_marks_are_as_by_hand(suffix, generated):
    m = token_marks(suffix, generated)
    equal = [k < len(suffix) and suffix[k] == g for k, g in enumerate(generated)]
    assert len(m) == len(generated) and [x == "match" for x in m] == equal
    assert m.count("divergence") == (not all(equal)) and ("divergence" not in m or m.index("divergence") == equal.index(False))


class Words:
    "Decodes like SentencePiece: no space before the first word."
    def __init__(self, words): self.words = words
    def decode(self, ids): return " ".join(self.words[i] for i in ids)


def test_tokens_keep_their_spaces():
    assert token_texts(Words(["to", "be", "or"]), torch.tensor([0, 1, 2, 0])) == ["to", " be", " or", " to"]
    assert token_texts(Words(["to", "be"]), []) == []


def test_side_by_side_tells_before_from_after():
    tok, p = Words(["<b>", "be", "or", "not"]), Passage((0, 1), (2, 3, 0))
    s = side_by_side(tok, p, (2, 3, 0), (2, 1, 0))
    assert "recited: all 3 tokens" in s and "2 of 3 tokens right, first differs at token 2" in s
    assert "<b>" not in s and H.escape("<b>") in s
    assert "true: &#x27; not&#x27;" in s                         # what it should have been, on hover and focus
    assert side_by_side(tok, p, (2, 3, 0)).count("tabindex") == 8 and diff_html(tok, p, (2,)).count("tabindex") == 1


def sweep_rows():
    cell = lambda m, c, k, s, p: {"method": m, "strength": .9, "control": c, "change": k, "s.strict": s, "s.strict_low": s - .01, "s.strict_high": s + .01, "w.ppl_ratio": p, "w.ppl_ratio_low": p - .01, "w.ppl_ratio_high": p + .01}
    return [dict(cell("unedited", False, 0, .9, 1.), strength=None), cell("K-FAC", False, 2, .1, 1.1), cell("K-FAC", False, 1, .5, 1.02), cell("SVD", False, 1, .6, 1.2), cell("chance", True, 1, .2, 1.5)]

def test_frontier_draws_each_method_in_the_order_of_its_change_and_the_reference_everywhere():
    fig = frontier(sweep_rows(), "s.strict", "w.ppl_ratio")
    a, b = fig.axes
    own = [next(l for l in ax.lines if l.get_label() == "K-FAC") for ax in (a, b)]
    assert [list(l.get_xdata()) for l in own] == [[.5, .1]]*2 and list(own[0].get_ydata()) == [1.02, 1.1]
    assert "chance (control)" in [l.get_label() for l in b.lines] and "SVD" not in [l.get_label() for l in b.lines]
    assert a.get_xlabel() == "strict recitation, s" and "perplexity" in a.get_ylabel() and len(png(fig)) < 120_000

def test_forest_shows_values_intervals_and_what_was_not_reached():
    nan = float("nan")
    fig = forest([dict(method="K-FAC", control=False, x=(1., .9, 1.2)), dict(method="chance", control=True, x=(nan, nan, nan))])
    ax, = fig.axes
    assert any(list(l.get_xdata()) == [.9, 1.2] for l in ax.lines) and [t.get_text() for t in ax.texts] == ["not reached"]
    with pytest.raises(ValueError, match="nothing to draw"): forest([])

def test_block_map_writes_its_numbers():
    fig = block_map([dict(block=b, projection=p, ratio=b + .5) for b in (0, 3) for p in ("q", "up")])
    assert [t.get_text() for t in fig.axes[0].texts] == ["0.5", "0.5", "3.5", "3.5"] and len(png(fig)) < 60_000


def test_overlap_and_energy_draw_the_rows():
    for ax in overlap(SHARED).axes:
        assert [b.get_height() for b in ax.patches] == [.9, .9, .5, .5] and len({b.get_hatch() for b in ax.patches}) == 2      # not by colour alone
        assert [c.get_segments()[0][0][1] for c in ax.collections] == [.1, .3]
    ax = band_energy(PARTS).axes[0]
    assert [b.get_height() for b in ax.patches] == [.6, .4, .2, .8] and ax.lines[0].get_ydata().tolist() == [.01, .99]
    f = overlap(SHARED)
    assert overlap(SHARED[:2], f) is f and len(f.axes) == 1 and band_energy(PARTS, f) is f and len(f.axes) == 1 and len(f.legends) == 1
    for draw in (overlap, band_energy):
        with pytest.raises(ValueError, match="no rows"): draw([])


def test_the_token_that_is_read_is_marked():
    a, b = [x for x in Spans(token_strip(["a", "b"], ["", "here"])).attrs if "tabindex" in x]
    assert "outline" in b["style"] and b["title"] == "the token that is read" and "style" not in a


def test_bars_are_drawn_alike_twice():
    "A mark that is not there must not push the legend down, further each time."
    fig = bars([dict(label=l, group=g, value=.5, low=.4, high=.7, n=9) for l in "abcd" for g in "xy"])
    def height(): fig.canvas.draw(); return fig.axes[0].get_position().height
    assert abs(height() - height()) < 1e-6 and height() > .7
