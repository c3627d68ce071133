"The text that the bundled model was trained on, its questions, and how they are scored: against counts, brute force, and greedy generation."
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import curvtools.tasks as tasks
from curvtools.recite import wilson
from curvtools.tasks import (RELATIONS, Fact, Item, Items, Responses, Score, Scores, answers, ask, askable, bootstrap_ratio, closed_book, fact_texts, families, few_shot,
                             invented_facts, invented_names, load_items, logic, open_book, open_book_texts, respond, retention, save_items, sums, to_lm_eval, world_items)


@pytest.fixture(scope="module")
def all_of_it():
    "Documents, their lines, items, facts: as the bundled model has them."
    docs, items = families(0)
    return docs, "\n".join(docs).split("\n"), items, invented_facts()


# the text

def test_the_text_of_the_shipped_weights(all_of_it):
    "The bundled weights were trained on exactly this text and are asked exactly these questions: a change here needs new weights."
    docs, _, items, _ = all_of_it
    short = lambda s: hashlib.sha256(s.encode()).hexdigest()[:16]
    assert (len(docs), short("\0".join(docs))) == (48483, "286c27388b91e760")
    assert (len(items), short(repr(list(items)))) == (2595, "41fa87e1e267a60c")


def test_no_question_is_in_the_text_with_its_answer(all_of_it):
    docs, lines, items, _ = all_of_it
    text, lines = "\n".join(docs), set(lines)
    for it in items:
        known = "trained" in it.stratum or it.family == "closed-book" and it.tier > 0
        if it.family == "arithmetic": assert (it.prompt + it.answer in lines) <= known       # a substring of 13+4=17. may be another sum
        else: assert (it.prompt + it.answer in text) <= known, it                            # not even inside another line
        if it.family == "closed-book": assert (it.prompt + it.answer in lines) == known
    for it in items:                                                                         # nor a sum with its operands exchanged
        if it.family == "arithmetic" and "+" in it.prompt and "trained" not in it.stratum:
            a, b = it.prompt[:-1].split("+")
            assert f"{b}+{a}={it.answer}" not in lines and f"{a}+{b}={it.answer}" not in lines


def test_all_trained_one_digit_sums_are_in_the_text(all_of_it):
    _, lines, items, _ = all_of_it
    lines, trained = set(lines), [it for it in items if "trained" in it.stratum]
    assert len(trained) == 83 + 38 and all(it.prompt + it.answer in lines for it in trained)
    one = Counter("trained" in it.stratum for it in items if it.stratum.startswith("1-digit"))
    assert sum(one.values()) == 100 + 55                                                     # every one-digit sum is asked


def test_a_fact_is_told_as_often_as_its_tier_says(all_of_it):
    _, lines, items, facts = all_of_it
    n = Counter(lines)
    assert Counter(f.tier for f in facts) == {t: 80 for t in (0, 4, 16, 48, 128, 512)}
    for f, it in zip(facts, items.where("closed-book")):
        statement, question = RELATIONS[f.relation][0].format(e=f.entity, v=f.value), it.prompt + it.answer
        assert n[statement] == n[question] == f.tier//2 and it.tier == f.tier and it.answer == f" {f.value}."
    odd = Fact("Zirgem", "keeps", "cat", 7)
    assert Counter("\n".join(fact_texts([odd])).split("\n")) == {"Question: Which animal does Zirgem keep? Answer: cat.": 4, "Zirgem keeps a cat.": 3}


def test_people_with_facts_appear_nowhere_else(all_of_it):
    _, lines, _, facts = all_of_it
    by, other = {f.entity: f for f in facts}, []
    for line in lines:
        for w in set(re.findall(r"\w+", line)) & by.keys():
            if line not in (by[w].statement, f"{closed_book([by[w]])[0].prompt} {by[w].value}."): other.append((by[w], line))
    assert not other


def test_open_book_names_are_new_and_come_once():
    docs = open_book_texts(500, avoid=(avoid := invented_names(500, 1)), seed=0)              # the lot that would have been drawn
    names = [re.match(r"(\w+)", line).group() for line in "\n".join(docs).split("\n")]
    assert len(set(names)) == 500 and not set(names) & set(avoid)


# the items

def test_answers_are_among_the_choices(all_of_it):
    for it in all_of_it[2]:
        assert it.answer.endswith(".")
        assert not it.choices if it.family == "arithmetic" else it.answer in it.choices and len(set(it.choices)) == len(it.choices) >= 2


def test_open_book_pairs():
    facts = invented_facts(per_tier=20, seed=3)
    items = open_book(facts)
    for f, true, false in zip(facts, items[::2], items[1::2]):
        assert (true.stratum, false.stratum) == ("true", "counterfactual")
        assert true.answer == f" {f.value}." != false.answer and true.prompt.startswith(f.statement) and f.value not in false.prompt.split("Question")[0].split()
        assert true.prompt.split("Question")[1] == false.prompt.split("Question")[1]
        for it in (true, false): assert it.answer[1:] == it.prompt.split(" Question:")[0].split()[-1]


def test_sums_and_their_strata_by_counting(all_of_it):
    for it in all_of_it[2].where("arithmetic"):
        a, op, b = re.fullmatch(r"(\d\d)([+-])(\d\d)=", it.prompt).groups(); x, y = int(a), int(b)
        assert re.fullmatch(r"\d\d\d\.", it.answer) and int(it.answer[:3]) == (x + y if op == "+" else x - y) >= 0
        ones = len(range(x % 10)) + len(range(y % 10)) >= 10 if op == "+" else len(range(x % 10)) < len(range(y % 10))
        digits = max(len(str(x)), len(str(y)))
        assert it.stratum.removesuffix(" trained") == f"{digits}-digit {op}" + (" carry" if ones and digits == 2 else "")


def test_each_sum_of_the_text_is_right(all_of_it):
    found = [re.fullmatch(r"(\d\d)([+-])(\d\d)=(\d\d\d)\.", l) for l in all_of_it[1] if "=" in l]
    assert len(found) == 200_000 and all(int(r) == (int(a) + int(b) if op == "+" else int(a) - int(b)) for a, op, b, r in {m.groups() for m in found})


def test_booleans_by_python(all_of_it):
    _, lines, items, _ = all_of_it
    asked = [it.prompt + it.answer for it in items.where("logic", "boolean")]
    found = {l for l in lines if re.fullmatch(r"[()\w ]+ is (True|False)\.", l)}
    for l in found | set(asked):
        text, value = re.fullmatch(r"(.*) is (True|False)\.", l).groups()
        assert eval(text) is (value == "True"), l
    assert min(len(l.split(" is ")[0].split()) for l in asked) >= 4 and len(set(asked)) == 200
    assert {"not True is False.", "True and False is False."} <= found                       # depth 1 is trained on


def deduce(text):
    "Yes or No from the rules as written."
    rules = {trade: (colour, how == "Every") for how, trade, colour in re.findall(r"(Every|No) (\w+) wears (\w+)\.", text)}
    name, trade = re.search(r"(\w+) works as a (\w+)\.", text).groups()
    asked, colour = re.search(r"Does (\w+) wear (\w+)\?", text).groups()
    assert asked == name and len(rules) in (1, 2) and rules[trade][0] == colour
    return "Yes" if rules[trade][1] else "No"


def test_deductions_by_a_solver(all_of_it):
    _, lines, items, _ = all_of_it
    asked = [it.prompt + it.answer for it in items.where("logic") if it.stratum != "boolean"]
    found = [l for l in lines if l.startswith(("Every ", "No "))]
    assert len(found) > 27_900 and all(l.endswith(f"Answer: {deduce(l)}.") for l in found + asked)


def test_logic_is_balanced_and_position_tells_nothing(all_of_it):
    items = all_of_it[2].where("logic")
    assert Counter((it.stratum, it.answer) for it in items) == {(s, a): 100 for s, aa in (("boolean", (" True.", " False.")), ("one rule", (" Yes.", " No.")), ("two rules", (" Yes.", " No."))) for a in aa}
    first = [it.prompt.startswith("Every") == (it.answer == " Yes.") for it in items.where(stratum="two rules")]
    assert .35 < sum(first)/len(first) < .65                                                 # 200 fair coins: 0.5 within 4 sd is .36 to .64


def test_seeds_and_scale():
    a, b, c = families(0, .02), families(0, .02), families(1, .02)
    assert a == b and a[0] != c[0] and len(a[0]) < 2000
    assert {(it.family, it.stratum) for it in a[1]} >= {("closed-book", "seen 512"), ("logic", "two rules"), ("arithmetic", "1-digit + trained")}


# what is refused

@pytest.mark.parametrize("call, says", [
    (lambda: invented_names(3_000_000), "n=3000000 names besides 0 to avoid"),
    (lambda: invented_names(-1), "n=-1"),
    (lambda: invented_facts(per_tier=-1), "per_tier=-1"),
    (lambda: invented_facts(tiers=(2, -4)), "tier=-4|tiers"),
    (lambda: invented_facts(tiers=(2.5,)), "2.5"),
    (lambda: sums(-5), "n=-5"),
    (lambda: sums(share=1), "share=1"),
    (lambda: sums(share=float("nan")), "share=nan"),
    (lambda: sums(per_stratum=-1), "per_stratum=-1"),
    (lambda: logic((-1, 5, 5)), "expressions=-1"),
    (lambda: logic(held=-2), "held=-2"),
    (lambda: families(scale=0), "scale=0"),
    (lambda: families(scale=float("nan")), "scale=nan"),
    (lambda: fact_texts([], together=0), "together=0"),
    (lambda: Fact("A", "eats", "fish", 1), "no relation 'eats'"),
    (lambda: Fact("A", "keeps", "rome", 1), "none of the values"),
    (lambda: Item("a", "b", "", "x."), "The prompt is ''"),
    (lambda: Item("a", "b", "x", "  "), "The answer is '  '"),
    (lambda: Item("a", "b", "x", None), "The answer is None"),
    (lambda: Item("a", "b", "x", " y.", (" z.",)), "not among the choices"),
    (lambda: Item("a", "b", "x", "y.", tier=-1), "tier=-1"),
])
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says): call()


# Items, and their file

def test_items_are_a_list(tmp_path):
    items = closed_book(invented_facts((0, 2), 3)) + [Item("arithmetic", "1-digit +", "3+4=", "7.")]
    assert isinstance(items, Items) and isinstance(items[1:3], Items) and isinstance(items[0], Item) and len(items[::2]) == 4
    assert [len(items.where(*a)) for a in ((), ("closed-book",), (None, "seen 2"), (None, None, 0), ("none",))] == [7, 6, 3, 4, 0]
    assert repr(items).splitlines()[0] == "Items: 7" and len(repr(items).splitlines()) == 4 and repr(Items()) == "Items: 0"
    assert save_items(items, tmp_path/"q.jsonl") == tmp_path/"q.jsonl"
    assert load_items(tmp_path/"q.jsonl") == items and isinstance(load_items(str(tmp_path/"q.jsonl"))[0].choices, tuple)
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]


@pytest.mark.parametrize("line", ["no json", "[1, 2]", "{}", '"text"', '{"family": "a", "stratum": "b", "prompt": "x", "answer": ""}',
                                  '{"family": "a", "stratum": "b", "prompt": "x", "answer": "y.", "colour": "red"}'])
def test_a_broken_line_is_named(tmp_path, line):
    good = json.dumps(dict(family="a", stratum="b", prompt="x", answer="y."))
    (tmp_path/"q.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match="line 3 is no item"): load_items(tmp_path/"q.jsonl")


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    f = tmp_path/"q.jsonl"; items = Items([Item("a", "b", "x", "y.")]); save_items(items, f)
    with pytest.raises(TypeError): save_items([items[0], "text"], f)
    assert load_items(f) == items
    with pytest.raises(FileNotFoundError): load_items(tmp_path/"none.jsonl")


# asking

def byte_tokenizer(text, **kw): return dict(input_ids=list(text.encode()))


def llama(**kw):
    torch.manual_seed(0)
    kw = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=48, bos_token_id=None, eos_token_id=None, pad_token_id=None) | kw
    return LlamaForCausalLM(LlamaConfig(**kw)).eval()


def gpt2(max_position_embeddings=48):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=max_position_embeddings, bos_token_id=None, eos_token_id=None, resid_pdrop=.5, initializer_range=.1)).eval()


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def taught(request):
    "A model that has been shown 20 of 30 sums, and the sums."
    rng = np.random.default_rng(0)
    pairs = [divmod(int(k), 100) for k in rng.choice(10_000, 30, replace=False)]
    items = Items(Item("arithmetic", "shown" if i < 20 else "not", f"{a}+{b}=", f"{a + b}.") for i, (a, b) in enumerate(pairs))
    rows = [torch.tensor(byte_tokenizer(it.prompt + it.answer)["input_ids"]) for it in items[:20]]
    x = torch.nn.utils.rnn.pad_sequence(rows, True, 0); y = torch.nn.utils.rnn.pad_sequence(rows, True, -100)
    model = request.param(); opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80): model(x, labels=y).loss.backward(); opt.step(); opt.zero_grad()
    return model, items


def generated(model, it):
    "What the model writes, token by token."
    ids, n = byte_tokenizer(it.prompt)["input_ids"], len(it.answer)
    with torch.no_grad():
        for _ in range(n): ids = ids + [int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return bytes(ids[-n:]).decode(errors="replace")


def test_answers_are_those_of_greedy_generation(taught):
    model, items = taught
    want = [generated(model, it) == it.answer for it in items]
    assert 5 < sum(want) < 30                                                                # some right, some wrong
    assert answers(model, byte_tokenizer, items).tolist() == want
    for b in (1, 2, 7): assert answers(model, byte_tokenizer, items, batch_size=b).tolist() == want
    back = answers(model, byte_tokenizer, items[::-1]).flip(0)
    assert back.tolist() == want


def test_short_rows_beside_long_ones(taught):
    "Right padding: a question is answered alike beside one that is four times as long, whose answer is four times as long."
    model, items = taught
    long = Item("a", "long", "12+34=12+34=12+34=", "46464646464646464646.")
    alone = answers(model, byte_tokenizer, items)
    assert torch.equal(answers(model, byte_tokenizer, items + [long])[:-1], alone)
    assert torch.equal(answers(model, byte_tokenizer, [long] + items, batch_size=100)[1:], alone)


def test_the_model_is_left_as_found(taught):
    model, items = taught
    want = answers(model, byte_tokenizer, items)
    model.train(); model.lm_head.training = False
    try:
        assert torch.equal(answers(model, byte_tokenizer, items), want)                      # measured in eval mode
        assert model.training and not model.lm_head.training
    finally: model.eval()
    assert not answers(model, byte_tokenizer, items).requires_grad and all(p.requires_grad for p in model.parameters())


def test_the_answer_has_no_special_tokens(taught):
    "A tokenizer that begins every text with a BOS must not put one between question and answer."
    model, items = taught
    def with_bos(text, add_special_tokens=True, **kw): return dict(input_ids=[1]*add_special_tokens + list(text.encode()))
    want = []
    for it in items:
        ids = [1] + list(it.prompt.encode())
        for _ in it.answer: ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        want.append(bytes(ids[-len(it.answer):]) == it.answer.encode())
    assert answers(model, with_bos, items).tolist() == want


def test_scores(taught):
    model, items = taught
    ok, t = answers(model, byte_tokenizer, items), ask(model, byte_tokenizer, items)
    assert [(s.stratum, s.n, s.right) for s in t] == [("shown", 20, int(ok[:20].sum())), ("not", 10, int(ok[20:].sum()))]
    assert t.family("arithmetic").right == int(ok.sum()) and t.family("arithmetic").n == 30
    assert all(s.interval == wilson(s.right, s.n) and s.interval[0] <= s.accuracy <= s.interval[1] for s in t)
    assert len(repr(t).splitlines()) == 2 and t.to_dicts()[0]["accuracy"] == t[0].accuracy
    assert ask(model, byte_tokenizer, items[0])[0].n == 1                                    # one question will do


def test_a_stratum_is_not_mixed_with_those_whose_names_begin_alike():
    t = Scores([Score("arithmetic", "2-digit +", 10, 9), Score("arithmetic", "2-digit + carry", 10, 1), Score("logic", "boolean", 4, 2)])
    assert t.family("arithmetic", "2-digit +").right == 9 and t.family("arithmetic", "2-digit").right == 10 and t.family("arithmetic").n == 20
    with pytest.raises(ValueError, match="no 'logic' 'deduction'"): t.family("logic", "deduction")


def test_intervals_of_wilson():
    assert Score("a", "b", 10, 0).interval == pytest.approx((0, .27753), abs=1e-5)           # Newcombe 1998 gives .2775 for 0 of 10
    assert Score("a", "b", 60, 60).interval == pytest.approx((.93982, 1), abs=1e-5)          # 60/(60 + z^2)


def test_what_cannot_be_asked():
    model, it = llama(), Item("a", "b", "3+4=", "7.")
    with pytest.raises(ValueError, match="no questions"): ask(model, byte_tokenizer, [])
    assert answers(model, byte_tokenizer, []).shape == (0,)
    with pytest.raises(TypeError, match="Question 1 is str"): answers(model, byte_tokenizer, [it, "3+4="])
    with pytest.raises(ValueError, match=r"Question 1 .*prompt 47 \+ answer 2 = 49 tokens.*context is 48"): answers(model, byte_tokenizer, [it, Item("a", "b", "9"*47, "7.")])
    with pytest.raises(ValueError, match="id 195 is beyond the model's vocabulary of 128"): answers(model, byte_tokenizer, [Item("a", "b", "é=", "7.")])
    with pytest.raises(ValueError, match="id 195 is beyond"): answers(model, byte_tokenizer, [Item("a", "b", "e=", "é.")])
    with pytest.raises(ValueError, match="no token for the answer '7.'"): answers(model, lambda s, **kw: dict(input_ids=[5]*min(len(s), 4)), [it])
    with pytest.raises(ValueError, match="no token for the prompt '3"): answers(model, lambda s, **kw: dict(input_ids=[5]*(len(s) == 2)), [it])
    with pytest.raises(ValueError, match="batch_size=0"): answers(model, byte_tokenizer, [it], batch_size=0)
    with pytest.raises(TypeError, match="tokenizer is needed"): answers(model, "gpt2", [it])
    with pytest.raises(TypeError, match="loaded model"): answers("gpt2", byte_tokenizer, [it])
    with torch.no_grad(): model.lm_head.weight[7] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"): answers(model, byte_tokenizer, [it])


# loss and ranked choice

class Bytes:
    "A tokenizer of bytes, with what a transformers tokenizer may do: a BOS in front, an EOS behind, and, where asked, tokens that go over the border."
    unk_token_id = None
    def __init__(self, bos=(), eos=(), merges=None): self.bos, self.eos, self.merges = list(bos), list(eos), merges or {}
    def __call__(self, text, add_special_tokens=True, **kw):
        ids = list(text.encode())
        for pair, new in self.merges.items():
            out = []
            for i in ids: out = out[:-1] + [new] if out and (out[-1], i) == pair else out + [i]
            ids = out
        return dict(input_ids=self.bos*add_special_tokens + ids + self.eos*add_special_tokens)


def logp_of(model, ids, start):
    "Sum of log-probabilities of ids[start:], one row, no cache."
    with torch.no_grad(): x = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(x[k - 1, ids[k]].item() for k in range(start, len(ids)))


def quiz(header=""):
    "Questions with several answers of different lengths, some of them asked twice, one without choices."
    cs = ("7.", "12.", "a lot.", "1.")
    its = [Item("arithmetic", "two" if a % 2 else "one", f"{header}{a}+{b}=", cs[(a + b) % 4], cs, a) for a in (1, 2, 13) for b in (4, 5)]
    return Items(its + its[:1] + [Item("arithmetic", "none", f"{header}8+9=", "17.")])


def best(it, scores): return float(it.choices[int(np.argmax(scores))] == it.answer)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("header", ["", "1+2=3.\n5+5=10.\n7+7=14.\n8+1=9.\n6+2=8.\n3+6=9.\n4+4=8.\n"], ids=["short", "long"])
def test_respond_against_one_row_at_a_time(make, header):
    torch.manual_seed(6)                                                                              # one at which the three rankings differ
    model = make(max_position_embeddings=128)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4 if p.ndim == 2 else 1)                                  # far from uniform
    tok, items = Bytes(bos=[1], eos=[2]), quiz(header)
    assert (len(header) > 48) == bool(header)
    logp = lambda prompt, a: logp_of(model, [1, *(prompt + a).encode()], 1 + len(prompt))
    r = respond(model, tok, items, unconditional="A:", progress=False)
    assert r.loss.tolist() == pytest.approx([-logp(it.prompt, it.answer) for it in items], abs=1e-4) and r.tokens.tolist() == [len(it.answer) for it in items]
    assert r.loss.dtype == torch.float64 and r.right.dtype == torch.bool and r.chance.tolist() == [.25]*7 + [0]
    for k, it in enumerate(items[:-1]):
        own, bare = (np.array([logp(p, c) for c in it.choices]) for p in (it.prompt, "A:"))
        want = dict(sum=best(it, own), char=best(it, own/[len(c) for c in it.choices]), pmi=best(it, own - bare))
        assert {n: v[k].item() for n, v in r.ranked.items()} == want, it
    assert all(v[-1].isnan() for v in r.ranked.values())
    for b in (1, 3):
        other = respond(model, tok, items[::-1], batch_size=b, unconditional="A:", progress=False)
        assert other.right.flip(0).tolist() == r.right.tolist() and other.loss.flip(0).tolist() == pytest.approx(r.loss.tolist(), abs=1e-4)
        assert all(torch.equal(other.ranked[n].flip(0)[:-1], r.ranked[n][:-1]) for n in r.ranked)
    assert respond(model, tok, items, choices=False, progress=False).loss.tolist() == pytest.approx(r.loss.tolist(), abs=1e-4)


def test_a_model_without_a_cache_to_share(monkeypatch):
    model, items = llama(max_position_embeddings=128), quiz("1+2=3.\n"*8)
    want = respond(model, Bytes(), items, progress=False)
    monkeypatch.setattr(tasks, "_reusable", lambda cache: False)
    r = respond(model, Bytes(), items, progress=False)
    assert r.loss.tolist() == pytest.approx(want.loss.tolist(), abs=1e-4) and json.dumps(r.to_dict()["ranked"]) == json.dumps(want.to_dict()["ranked"])


def test_each_question_is_read_once(monkeypatch):
    model, fed = llama(max_position_embeddings=128), []
    step = tasks._step
    monkeypatch.setattr(tasks, "_step", lambda m, ids, *a, **kw: fed.append(ids.numel()) or step(m, ids, *a, **kw))
    items = quiz("1+2=3.\n"*8)
    respond(model, Bytes(), items, choices=False, progress=False)
    head = len("1+2=3.\n"*8)
    assert fed[0] == head and sum(fed) < head + 8*12, "the header goes through once"


def test_tokens_that_go_over_the_border():
    "'=7' is one token: the whole text's own tokens are scored, for all answers from the same place."
    model, tok = llama(), Bytes(merges={(ord("="), ord("7")): 3})
    it = Item("a", "b", "3+4=", "7.", ("7.", "8."))
    r = respond(model, tok, [it], progress=False, unconditional="A:")
    three, eight = [*b"3+4", 3, ord(".")], [*b"3+4=8."]
    assert r.loss.item() == pytest.approx(-logp_of(model, three, 3), abs=1e-4) and r.tokens.item() == 2
    assert r.ranked["sum"].item() == float(logp_of(model, three, 3) > logp_of(model, eight, 3))


def test_equal_scores_share_the_point():
    it = Item("a", "b", "x", " 1.", (" 1.", " 2.", " 3.", " 4."))
    assert [tasks._ranked(it, s) for s in ([-1, -2, -3, -4], [-2, -1, -3, -4], [-1, -1, -3, -4], [-1]*4)] == [1, 0, .5, .25]


def test_the_three_ways_to_rank():
    it, cs = Item("a", "b", "x", " a long one.", (" a long one.", " no.", " yes.")), {" a long one.": (1,), " no.": (2,), " yes.": (3,)}
    told = {((0,), c): (l, False) for c, l in zip(cs.values(), (-6., -3., -4.))} | {((9,), c): (l, False) for c, l in zip(cs.values(), (-7., -3., -8.))}
    assert tasks._ranks(it, ((0,), cs), ((9,), cs), told) == (0, 1, 0)                       # sums -6 -3 -4; a character -.55 -1 -1; gains 1 0 4
    assert tasks._ranks(replace(it, answer=" yes."), ((0,), cs), ((9,), cs), told) == (0, 0, 1) and np.isnan(tasks._ranks(it, ((0,), cs), None, told)).all()


def test_responses_travel_as_json():
    r = respond(llama(), byte_tokenizer, quiz(), progress=False)
    back = Responses.from_dict(json.loads(json.dumps(r.to_dict(), allow_nan=False)))
    assert back.to_dict() == r.to_dict() and back.where(stratum="one").to_dict() == r.where(stratum="one").to_dict() and len(r.where("arithmetic", tier=13)) == 2
    assert [d["n"] for d in r.to_dicts()] == [5, 2, 1] and r.to_dicts()[-1]["sum"] is None and len(repr(r).splitlines()) == 4 and "<table>" in r._repr_html_()
    assert r.to_dicts()[0]["loss_per_token"] == pytest.approx((r.loss[r.where(stratum="two").tokens.new_tensor([0, 1, 4, 5, 6])].sum()/r.tokens[[0, 1, 4, 5, 6]].sum()).item())
    assert repr(respond(llama(), byte_tokenizer, [], progress=False)) == "Responses: no questions"
    with pytest.raises(ValueError, match="loss missing"): Responses.from_dict({k: v for k, v in r.to_dict().items() if k != "loss"})
    with pytest.raises(ValueError, match="different lengths"): Responses.from_dict(r.to_dict() | dict(tier=[1]))


# retention

def made(right, loss=None, choices=4, family="f", stratum="s", **ranked):
    n = len(right)
    return Responses.from_dict(dict(items=[str(i) for i in range(n)], family=[family]*n, stratum=[stratum]*n, tier=[0]*n, right=list(right), loss=list(loss if loss is not None else np.ones(n)),
                                    tokens=[1]*n, chance=[1/choices if choices else 0.]*n, ranked=ranked))


def test_retention_by_hand():
    b, a = [True]*8 + [False]*2, [True]*5 + [False]*5
    k = retention(made(b, np.full(10, .5)), made(a, np.linspace(.5, 1.4, 10)))[0]
    assert k.share == pytest.approx((.5 - .25)/(.8 - .25)) and (k.before, k.after, k.chance, k.n) == (.8, .5, .25, 10) and k.low < k.share < k.high and k.measurable
    assert k.loss_change == pytest.approx(.45) and k.loss_low < .45 < k.loss_high
    assert retention(made(b, choices=0), made(a, choices=0))[0].share == pytest.approx(5/8)
    same = retention(made(b), made(b))[0]
    assert (same.share, same.low, same.high) == (1, 1, 1), "the same answers: no doubt, since both are resampled together"
    t = retention(made(b, sum=[1.]*9 + [None]), made(a, sum=[1.]*6 + [0.]*3 + [None]), score="sum")
    assert t[0].n == 9 and t[0].share == pytest.approx((6/9 - .25)/.75) and "highest log-probability;" in repr(t) and "<table>" in t._repr_html_()
    assert t.family("f") is t[0] and json.dumps(t.to_dicts()) and t.to_dicts()[0]["share"] == t[0].share


def test_bootstrap_by_brute_force():
    rng = np.random.default_rng(0); b = rng.random(60) < .8; a = b & (rng.random(60) < .6)
    _, low, high = bootstrap_ratio(a - .25, b - .25, draws=4000)
    many = [(a[i] - .25).sum()/(b[i] - .25).sum() for i in (rng.integers(60, size=60) for _ in range(4000))]
    assert (low, high) == pytest.approx(np.quantile(many, [.025, .975]), abs=.02)
    assert bootstrap_ratio(a, b) == bootstrap_ratio(a, b) != bootstrap_ratio(a, b, seed=1)
    assert bootstrap_ratio([1., 1.], [1., -1.])[2] == np.inf, "where the whole may be nothing the share has no upper end"
    assert np.isnan(bootstrap_ratio([0, 0], [0, 0])).all()
    for bad in (([], []), ([1.], [1., 2.])):
        with pytest.raises(ValueError, match="bootstrap_ratio needs"): bootstrap_ratio(*bad)
    with pytest.raises(ValueError, match="level=1"): bootstrap_ratio([1.], [1.], level=1)


@pytest.mark.parametrize("n, known, kept, c", [(120, .6, .7, .25), (200, .4, .9, .5), (80, .9, .5, 0)])
def test_coverage(n, known, kept, c):
    "300 experiments with a known truth: 95 % of the intervals hold it, within 3 standard errors (.038)."
    rng, hits = np.random.default_rng(1), []
    for k in range(300):
        knows = rng.random(n) < known; still = knows & (rng.random(n) < kept)
        low, high = bootstrap_ratio((still | (rng.random(n) < c)) - c, (knows | (rng.random(n) < c)) - c, draws=400, seed=k)[1:]
        hits.append(low <= kept <= high)
    assert .912 <= np.mean(hits) <= .988


def test_what_is_not_measurable():
    coin = [True, False]*50
    k = retention(made(coin, choices=2), made(coin, choices=2))[0]
    assert not k.measurable and (k.share, k.low, k.high) == (None,)*3 and "within 2 SE (0.10" in k.why and k.before == .5 and "not measurable" in repr(retention(made(coin, choices=2), made(coin, choices=2)))
    assert retention(made([True]*65 + [False]*35, choices=2), made(coin, choices=2))[0].measurable
    assert not retention(made([False]*9, choices=0), made([False]*9, choices=0))[0].measurable
    assert "1 question" in retention(made([True]), made([True]))[0].why
    none = retention(made(coin, sum=[None]*100), made(coin, sum=[None]*100), score="sum")[0]
    assert none.why == "not measurable: no choices to rank" and none.n == 0 and none.before is None and none.loss_change == 0


def test_retention_refuses():
    r = made([True, False])
    with pytest.raises(ValueError, match=r"different questions \(2 and 3\)"): retention(r, made([True]*3))
    with pytest.raises(ValueError, match="different questions"): retention(r, r._pick([1, 0]))
    with pytest.raises(ValueError, match="by='tier'"): retention(r, r, by="tier")
    with pytest.raises(ValueError, match="score='sum' must be"): retention(r, r, score="sum")
    with pytest.raises(ValueError, match="no 'g'"): retention(r, r).family("g")
    assert repr(retention(made([]), made([]))) == "Retention: no questions"
    two = closed_book(invented_facts((0,), 2)); other = closed_book(invented_facts((0,), 2, seed=1))
    long = llama(max_position_embeddings=128)
    with pytest.raises(ValueError, match="different questions"): retention(*(respond(long, byte_tokenizer, x, choices=False) for x in (two, other)))


# examples, and facts of the world

def test_few_shot():
    items = closed_book(invented_facts((0, 4), 16))
    shown = few_shot(items, items, n=3, by="choices", seed=1)
    heads = {}
    for it, s in zip(items, shown):
        *shots, last = s.prompt.split("\n")
        assert last == it.prompt and len(shots) == 3 and not any(x.startswith(it.prompt) for x in shots) and (s.answer, s.choices, s.stratum) == (it.answer, it.choices, it.stratum)
        assert len({x.split()[-1] for x in shots}) == 3, "no answer twice while there are others"
        heads.setdefault(it.choices, []).append(tuple(shots))
    for h in heads.values(): assert len(set(h)) <= 4 and max(Counter(h).values()) == 5, "8 questions: the 3 examples have another in their place"
    assert few_shot(items, items, n=3, seed=1) == few_shot(items, items, n=3, seed=1) != few_shot(items, items, n=3, seed=2)
    assert few_shot(items, [], n=0) == items
    with pytest.raises(ValueError, match="5 examples are wanted .* only 3"): few_shot(items[:1], items[:4], n=5)
    with pytest.raises(ValueError, match="only 0"): few_shot(items, logic((0, 0, 0), held=20)[1])
    with pytest.raises(ValueError, match="n=-1"): few_shot(items, items, n=-1)


def test_world_items():
    items = world_items(3, n=12, shots=2)
    assert items == world_items(3, n=12, shots=2) != world_items(4, n=12, shots=2) and len({it.prompt for it in items}) == len(items) == 18*12
    assert Counter((it.family, it.stratum) for it in items).values() and set(Counter((it.family, it.stratum) for it in items).values()) == {12}
    for it in items:
        assert it.answer.startswith(" ") and it.answer.endswith("\n") and not it.prompt[-1].isspace()
        last = it.prompt.split("\n")
        if it.family == "open-book":
            said = re.fullmatch(r"The (?:capital|chemical symbol|author|language) of .* is (.*)\.", last[-3]).group(1)
            assert it.answer == f" {said}\n"
        if it.family in ("closed-book", "open-book"): assert it.answer in it.choices and len(it.choices) == len(set(it.choices)) >= 35
        if it.family == "arithmetic":
            a, op, b = re.fullmatch(r"(\d+) ([+-]) (\d+) =", last[-1]).groups(); a_, b_ = int(a), int(b)
            assert int(it.answer) == (a_ + b_ if op == "+" else a_ - b_) >= 0 and it.stratum.startswith(f"{max(len(a), len(b))}-digit {op}") and not it.choices
            pairs = list(zip(reversed(a), reversed(b)))
            carry = any(int(x) + int(y) + 0 > 9 for x, y in pairs) if op == "+" else any(int(x) < int(y) for x, y in pairs)
            if it.stratum[0] != "1" and not it.stratum.endswith("carry"): assert not carry
            if it.stratum.endswith("carry"): assert carry
    true, false = items.where(stratum="true"), items.where(stratum="counterfactual")
    for a, b in zip(true, false): assert a.prompt.split("\n")[-2:] == b.prompt.split("\n")[-2:] and a.answer != b.answer and a.prompt.split("\n")[:-3] == b.prompt.split("\n")[:-3]
    assert len(world_items(n=64).where("closed-book")) == 192 == len(world_items(n=999, shots=0).where("closed-book"))
    for kw in (dict(n=0), dict(shots=9), dict(n=2.5)):
        with pytest.raises(ValueError): world_items(**kw)


def test_facts_of_the_world_are_facts():
    for name in tasks._world:
        rows = tasks._facts(name); subjects = [s for row in rows for s, _ in row]
        assert [len(r) for r in rows] == [16, 16, 16, 8] and len(set(subjects)) == 56 and all(s.strip() == s and v.strip() == v and s and v for row in rows for s, v in row)
    symbols = dict(f for row in tasks._facts("symbol") for f in row)
    assert symbols["tungsten"] == "W" and all(re.fullmatch("[A-Z][a-z]?", v) for v in symbols.values()) and len(set(symbols.values())) == 56


# who cannot be asked

class Broken(Bytes):
    "Decodes; and loses what it is told to."
    unk_token, unk_token_id = "<unk>", 4
    def __init__(self, drop="", unk=""): super().__init__(); self.drop, self.unk = drop, unk
    def one(self, text): return [4 if c in self.unk else b for c in text if c not in self.drop for b in c.encode()]
    def __call__(self, text, **kw): return dict(input_ids=[self.one(t) for t in text] if isinstance(text, list) else self.one(text))
    def decode(self, ids, **kw): return bytes(ids).decode()
    def batch_decode(self, rows): return [self.decode(r) for r in rows]


def test_askable():
    model, items = llama(), Items([Item("arithmetic", "1-digit +", "3+4=", "7."), Item("logic", "boolean", "not True is", " False.", (" True.", " False."))])
    assert askable(model, Broken(), items).items == items and askable(None, Broken(), items).refused == []
    assert respond(model, Broken(), items, progress=False).right.shape == (2,)
    found = askable(model, Broken(unk="0123456789"), items)
    assert found.items == items[1:] and found.refused[0]["index"] == 0 and "no token for part of '3+4=7.'" in found.refused[0]["reason"] and "arithmetic, 1-digit +: 1 cannot" in repr(found)
    with pytest.raises(ValueError, match=r"Question 0 \(arithmetic.*'<unk>' instead.*askable"): respond(model, Broken(unk="4"), items)
    with pytest.raises(ValueError, match=r"Question 1 \(logic.*writes 'not True is False.' as 'not Tre is False.'"): respond(model, Broken(drop="u"), items)
    same = Item("logic", "b", "x", " a.", (" a.", " b."))
    with pytest.raises(ValueError, match="two of the choices .* alike"): respond(model, Bytes(merges={(32, ord("a")): 3, (32, ord("b")): 3}), [same])
    assert len(askable(model, Broken(), [Item("a", "long", "9"*60, "1.")]).refused) == 1 and "context is 48" in askable(model, Broken(), [Item("a", "long", "9"*60, "1.")]).refused[0]["reason"]
    with pytest.raises(TypeError, match="Question 0 is str"): askable(None, Broken(), ["x"])


# lm-evaluation-harness

@pytest.fixture(scope="module")
def pg():
    from curvtools.zoo import playground
    return playground()


def test_lm_eval_sees_the_live_model(pg):
    from lm_eval.api.instance import Instance
    before = pg.tokenizer.pad_token
    lm = to_lm_eval(pg.model, pg.tokenizer, batch_size=4)
    assert lm.model is pg.model and pg.tokenizer.pad_token == before and lm.tokenizer is not pg.tokenizer
    items = pg.tasks[::301]
    ask_them = lambda: lm.loglikelihood([Instance("loglikelihood", {}, (it.prompt, it.answer), 0) for it in items], disable_tqdm=True)
    for _ in range(2):
        r = respond(pg.model, pg.tokenizer, items, choices=False, progress=False)
        assert [l for l, _ in ask_them()] == pytest.approx((-r.loss).tolist(), abs=1e-4) and [g for _, g in ask_them()] == r.right.tolist()
        with torch.no_grad(): pg.model.model.layers[0].mlp.down_proj.weight.mul_(-1)                  # an edit, and back
    assert abs(r.loss - respond(pg.model, pg.tokenizer, items, choices=False, progress=False).loss).max() > .1


def test_lm_eval_missing(pg, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match=r'pip install "curvtools\[lm-eval\]"'): to_lm_eval(pg.model, pg.tokenizer)
    with pytest.raises(TypeError, match="loaded model"): to_lm_eval("gpt2", pg.tokenizer)
    with pytest.raises(TypeError, match="tokenizer of transformers"): to_lm_eval(pg.model, byte_tokenizer)


def test_a_tokenizer_of_another_model():
    "Its ids may all exist in the model, and mean something else there; a vocabulary of less than half gives it away."
    model = llama()
    size = model.get_input_embeddings().weight.shape[0]
    class Small:
        def __len__(self): return size//2 - 1
    with pytest.raises(ValueError, match="another model's"): respond(model, Small(), [Item("f", "s", "q", "a")], progress=False)


def test_a_score_that_one_side_lacks_is_refused():
    items = [Item("arithmetic", "sums", "1+1=", "2", choices=("2", "3"))]
    a = Responses.__new__(Responses); b = Responses.__new__(Responses)
    a.items = b.items = items; a.ranked, b.ranked = {"sum": None}, {}
    with pytest.raises(ValueError, match="both responses have choices"): retention(a, b, score="sum")
