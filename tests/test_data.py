"Windows, passages and image batches: packing against a by-hand construction, round trips, and every refusal."
import itertools
import json
import sys
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from curvtools.data import Passage, Passages, Windows, image_batches, load_passages, save_passages, windows


class Words:
    "A word tokenizer in ten lines: ids by order of appearance, 0 is EOS. Counts how many texts it was given."
    def __init__(self, eos=0): self.vocab, self.eos_token_id, self.calls = {}, eos, 0
    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert add_special_tokens is False   # a BOS in every document would be a silent change of the data
        self.calls += 1
        return dict(input_ids=[self.vocab.setdefault(w, len(self.vocab) + 1) for w in text.split()])


def by_hand(docs, tok, T):
    row = []
    for d in docs:
        ids = tok(d, add_special_tokens=False)["input_ids"]
        if ids: row = row + ([0] if row else []) + ids
    return [row[i:i+T] for i in range(0, len(row) - T + 1, T)]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=9), min_size=1, max_size=8), st.integers(2, 5), st.integers(1, 4))
def test_packing_is_as_by_hand(docs, T, B):
    docs, tok = [" ".join(d) for d in docs], Words()
    expected = by_hand(docs, tok, T)
    if not expected:
        with pytest.raises(ValueError): windows(docs, tok, length=T)
        return
    w = windows(docs, tok, length=T, batch_size=B)
    assert w.ids.tolist() == expected
    batches = list(w)
    assert len(batches) == len(w) and w.tokens == sum(b["input_ids"].numel() for b in batches)
    assert torch.cat([b["input_ids"] for b in batches]).tolist() == expected
    assert all(b["input_ids"].dtype == torch.int64 and set(b) == {"input_ids"} for b in batches)


def test_sources_agree(tmp_path):
    datasets = pytest.importorskip("datasets")
    docs, tok = ["a b c d e", "f g", "", "a c e g b d"], Words()
    w = windows(docs, tok, length=3)
    files = [tmp_path/f"{i}.txt" for i in range(4)]
    for f, d in zip(files, docs): f.write_text(d)
    ds = datasets.Dataset.from_dict(dict(text=docs, n=range(4)))
    for source in (tuple(docs), iter(docs), files, (f for f in files), ds, ds.to_iterable_dataset(), [dict(text=d) for d in docs]):
        assert torch.equal(windows(source, tok, length=3).ids, w.ids)
    assert torch.equal(windows(docs[0], tok, length=3).ids, windows(files[0], tok, length=3).ids)
    assert windows(files[0], tok, length=3).name == "0.txt"


def test_stream_is_read_no_further_than_needed():
    tok, read = Words(), []
    def stream():
        for i in itertools.count(): read.append(i); yield "a b c d"
    w = windows(stream(), tok, length=4, max_tokens=20)
    assert w.tokens == 20 and len(read) == tok.calls == 5   # 4 documents and the 3 EOS between them are 19 tokens; of the fifth, one EOS is kept


def test_stream_is_read_no_further_when_it_is_exact():
    tok, read = Words(), []
    def stream():
        for i in itertools.count(): read.append(i); yield "a b c d"
    assert windows(stream(), tok, length=3, max_tokens=9).ids.tolist() == [[1, 2, 3], [4, 0, 1], [2, 3, 4]] and len(read) == 2


def test_datasets_is_not_imported():
    code = "import sys, curvtools.data; assert not {'datasets', 'transformers'} & set(sys.modules), 'slow import'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shuffle_is_seeded_and_leaves_the_global_generator_alone():
    tok = Words()
    text = " ".join(f"w{i}" for i in range(200))
    state = torch.get_rng_state()
    a, b, c, plain = [windows(text, tok, length=4, seed=s) for s in (0, 0, 1, None)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids) and not torch.equal(a.ids, plain.ids)
    assert sorted(a.ids.tolist()) == sorted(c.ids.tolist()) == sorted(plain.ids.tolist())


def test_loss_mask_follows_its_windows():
    ids = torch.arange(40).view(10, 4)
    w = Windows(ids, loss_mask=ids % 3 == 0, batch_size=3)
    for v in (w, w.shuffle(3), w[2:7], w[[5, 1]], w.batches(4), w[-1]):
        for b in v:
            assert torch.equal(b["labels"], torch.where(b["input_ids"] % 3 == 0, b["input_ids"], -100))
    assert w[-1].ids.tolist() == [[36, 37, 38, 39]] and w[ids[:, 0] > 20].n == 4


@pytest.mark.parametrize("bad, error, says", [
    (dict(ids=[]), ValueError, "empty"),
    (dict(ids=torch.empty(0, 9).long()), ValueError, "empty"),
    (dict(ids=torch.ones(4, 1).long()), ValueError, "one token"),
    (dict(ids=torch.ones(4).long()), ValueError, "shape"),
    (dict(ids=torch.rand(4, 4)), TypeError, "whole numbers"),
    (dict(ids=torch.ones(4, 4).bool()), TypeError, "whole numbers"),
    (dict(ids=torch.full((4, 4), -100)), ValueError, "loss_mask"),
    (dict(ids=torch.ones(4, 4).long(), loss_mask=torch.ones(4, 3)), ValueError, "loss_mask has shape"),
    (dict(ids=torch.ones(4, 4).long(), batch_size=0), ValueError, "batch_size"),
])
def test_bad_windows(bad, error, says):
    with pytest.raises(error, match=says): Windows(**bad)


@pytest.mark.parametrize("source, kw, error, says", [
    ("", {}, ValueError, "empty"),
    ([], {}, ValueError, "empty"),
    (["", " "], {}, ValueError, "empty"),
    ("a b c", {}, ValueError, "3 tokens.*lower length"),
    ("a b c", dict(length=1), ValueError, "two tokens"),
    ("a b c", dict(length=0), ValueError, "two tokens"),
    ("a b c", dict(max_tokens=5), ValueError, "max_tokens=5"),
    (b"a b c", {}, TypeError, "bytes"),
    (7, {}, TypeError, "int"),
    (None, {}, TypeError, "NoneType"),
    ([1, 2, 3], {}, TypeError, "Document 0 is int"),
    (["a", None], {}, TypeError, "Document 1 is NoneType"),
    (torch.ones(4, 4), {}, TypeError, r"Windows\(ids\)"),
    (dict(train=["a"]), {}, TypeError, r"source\['train'\]"),
    ([dict(body="a")], {}, ValueError, "text_field"),
    (Path("no-such-file"), {}, FileNotFoundError, "no-such-file"),
])
def test_bad_sources(source, kw, error, says):
    with pytest.raises(error, match=says): windows(source, Words(), **kw)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="folder"): windows(tmp_path, Words())
    (tmp_path/"latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"): windows(tmp_path/"latin.txt", Words())
    (tmp_path/"empty.txt").touch()
    with pytest.raises(ValueError, match="data is empty.*read from .*empty.txt"): windows(tmp_path/"empty.txt", Words())
    (tmp_path/"a.txt").write_text("a b c")
    with pytest.raises(ValueError, match=r"pass Path\("): windows(str(tmp_path/"a.txt"), Words())   # a str is text, even if it names a file


def test_tokenizer_without_eos():
    docs = ["a b c", "d e f"]
    assert windows(docs[0], Words(eos=None), length=3).ids.tolist() == [[1, 2, 3]]   # one document needs no separator
    with pytest.raises(ValueError, match="no EOS.*separator"): windows(docs, Words(eos=None), length=3)
    assert windows(docs, Words(eos=None), length=3, separator=[]).ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert windows(docs, Words(eos=None), length=3, separator=9).ids.tolist() == [[1, 2, 3], [9, 4, 5]]
    assert windows(docs, Words(), length=4, separator=[8, 9]).ids.tolist() == [[1, 2, 3, 8], [9, 4, 5, 6]]
    with pytest.raises(TypeError, match="tokenizer"): windows(docs, None)


ids = st.lists(st.integers(0, 50000), min_size=1, max_size=9)
passage = st.builds(Passage, ids, ids, source=st.text(), label=st.text(), kind=st.text(), tier=st.integers(0, 256), count=st.integers(0, 256))


@settings(deadline=None, max_examples=50)
@given(st.lists(passage, min_size=1, max_size=5))
def test_passages_round_trip(tmp_path_factory, ps):
    f = save_passages(ps, tmp_path_factory.mktemp("p")/"p.jsonl")
    assert load_passages(f) == ps and [p.name for p in f.parent.iterdir()] == ["p.jsonl"]   # nothing is left beside it


def test_passage_takes_tensors_and_is_hashable():
    a = Passage(torch.tensor([1, 2]), torch.tensor([3]))
    assert a == Passage([1, 2], (3,)) and len({a, Passage((1, 2), [3])}) == 1 and a.ids == (1, 2, 3)


@pytest.mark.parametrize("prefix, suffix, error, says", [
    ([], [1], ValueError, "prefix is empty"), ([1], (), ValueError, "suffix is empty"), ("ab", [1], TypeError, "prefix is text"),
    ([1], [-1], ValueError, "-1"), ([1.5], [1], ValueError, "1.5"), ([True], [1], ValueError, "True"), (["a"], [1], ValueError, "'a'"),
    ([[1, 2]], [1], ValueError, r"\[1, 2\]"),
])
def test_bad_passages(prefix, suffix, error, says):
    with pytest.raises(error, match=says): Passage(prefix, suffix)
    with pytest.raises(TypeError, match="Item 0"): Passages([(prefix, suffix)])


def test_where():
    ps = Passages(Passage([i], [i], kind=k, tier=t) for i, (k, t) in enumerate(itertools.product(("natural", "canary"), (0, 4, 64))))
    assert len(ps.where(kind="canary")) == 3 and len(ps.where(tier=4)) == 2 and len(ps.where(tier=0)) == 2
    assert [p.kind for p in ps.where(kind="natural", min_tier=4)] == ["natural"]*2
    assert "3 natural" in repr(ps) and "4, 64" in repr(ps) and "none" in repr(ps.where(kind="?"))


def write(path, *rows): path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)); return path


def test_text_passages(tmp_path):
    tok = Words()
    f = write(tmp_path/"p.jsonl", dict(text="a b c d e f", tier=4), "", dict(prefix="a b ", suffix="c d"), dict(ids=[1, 2, 3, 4, 5, 6]))
    ps = load_passages(f, tok, prefix=2, suffix=3)
    assert ps == [Passage([1, 2], [3, 4, 5], tier=4), Passage([1, 2], [3, 4]), Passage([1, 2], [3, 4, 5])]


def test_pair_is_encoded_jointly():
    "A byte-pair tokenizer: the ids of the passage are those of the running text, wherever it was cut."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from curvtools.data import _encode_pair
    text = "the theory of the thing and then the other thing " * 3
    bpe = Tokenizer(models.BPE()); bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe)
    whole = tok(text)["input_ids"]
    for cut in range(4, 60):
        a, b = _encode_pair(tok, text[:cut], text[cut:])
        assert a + b == whole and a and b


@pytest.mark.parametrize("row, says", [
    ("{not json", "line 2"), ("[1, 2]", "line 2.*object"), (dict(prefix=[1], suffix=[]), "line 2.*suffix is empty"),
    (dict(prefix=[1]), "line 2.*'prefix' and 'suffix'"), (dict(body="x"), "line 2.*there is"), (dict(prefix="a", suffix=[1]), "line 2.*all text or all"),
    (dict(text="a b c"), "line 2.*3 tokens, too few"), (dict(ids=[1, 2, 3]), "line 2.*3 tokens, too few"), (dict(text=["a"]), "line 2.*too few"),
    (dict(prefix=[1], suffix=["a"]), "line 2.*'a'"), (dict(prefix=[1], suffix=[2], tier="many"), "line 2.*many"), (dict(prefix="a", suffix=""), "line 2.*suffix is empty"),
])
def test_bad_lines_are_named(tmp_path, row, says):
    with pytest.raises(ValueError, match=says): load_passages(write(tmp_path/"p.jsonl", dict(prefix=[1], suffix=[2]), row), Words())


def test_bad_passage_files(tmp_path):
    with pytest.raises(ValueError, match="line 1.*pass a tokenizer"): load_passages(write(tmp_path/"p.jsonl", dict(text="a b c")))
    with pytest.raises(ValueError, match="empty"): load_passages(write(tmp_path/"p.jsonl", ""))
    with pytest.raises(ValueError, match="1 or more"): load_passages(tmp_path/"p.jsonl", prefix=0)
    with pytest.raises(FileNotFoundError): load_passages(tmp_path/"no.jsonl")


def test_failed_save_leaves_the_old_file(tmp_path):
    f = save_passages([Passage([1], [2])], tmp_path/"p.jsonl")
    before = f.read_bytes()
    with pytest.raises(TypeError): save_passages([Passage([1], [2]), "no passage"], f)
    bad = Passage([1], [2], label=object())
    with pytest.raises(TypeError): save_passages([bad], f)
    assert f.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_image_batches():
    x, y = torch.rand(7, 3, 4, 4), torch.arange(7)
    b = image_batches(x, y, batch_size=3)
    for _ in range(2):   # can be iterated again
        assert torch.equal(torch.cat([d["pixel_values"] for d in b]), x) and torch.equal(torch.cat([d["labels"] for d in b]), y)
    assert len(b) == 3 and set(next(iter(image_batches(x)))) == {"pixel_values"}
    for bad in (dict(pixel_values=x[:0]), dict(pixel_values=x[0]), dict(pixel_values=x.long()), dict(pixel_values=x, labels=y[:3]), dict(pixel_values=x, batch_size=0)):
        with pytest.raises(ValueError): image_batches(**bad)


def test_an_interrupted_save_is_not_seen(tmp_path, monkeypatch):
    f = save_passages([Passage([1], [2])], tmp_path/"p.jsonl")
    def crash(*a): raise OSError("no space left on device")
    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="no space"): save_passages([Passage([3], [4])], f)
    assert load_passages(f) == [Passage([1], [2])] and len(list(tmp_path.iterdir())) == 1


def test_passages_of_none():
    with pytest.raises(TypeError, match="Passages are needed.*not NoneType"): Passages(None)
