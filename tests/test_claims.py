"Numbers in the README and in the pages: each stands in an output of the notebook that measured it, or is named as no measurement. See claims.py; the list is claims.json."
import re

import pytest
from claims import ROOT, claimed, found, ledger, numbers, of, sentences, source

REASONS = {"says what is meant, measures nothing", "the name of a paper", "when the sources were read", "read in another library's source", "a rule for versions"}


@pytest.mark.parametrize("page, sentence", claimed(), ids=lambda x: re.sub(r"\W+", "-", x)[:40])
def test_every_number_has_a_source(page, sentence):
    "Rounded as it is printed; a percentage may stand as a share, and a rise of 2.3 % as a factor of 1.023."
    mine = of(page, sentence)
    assert len(mine) == 1, f"“{sentence}” has {len(mine)} entries in claims.json; `python tests/claims.py` lists what is missing"
    if "why" in mine[0]: assert mine[0]["why"] in REASONS; return
    lost = [n for n in numbers(sentence) if not found(n, source(mine[0]))]
    assert not lost, f"{lost} of “{sentence}” are not in {mine[0].get('cells') or mine[0]['test']}"


def test_no_entry_is_left_over():
    have = claimed()
    for c in ledger(): assert sum(p == c["page"] and c["says"] in s for p, s in have) == 1, c


def test_a_wrong_number_is_found():
    "The comparison can fail: one digit more or less is not in the source."
    c = next(c for c in ledger() if "87.7" in c["says"])
    assert found("87.7", source(c)) and not found("87.8", source(c)) and not found("97.7", source(c))
    assert found("2.3", "perplexity x 1.023") and not found("2.4", "perplexity x 1.023")


def test_tables_and_lists_are_read():
    pages = {p: list(sentences(p)) for p in ("README.md", "nbs/pages/limits.md")}
    assert any("78 %" in s for s in pages["README.md"]) and any(s.startswith("| sums") for s in pages["nbs/pages/limits.md"])
    assert (ROOT/"tests"/"claims.json").exists()
