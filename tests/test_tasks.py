"The text that the bundled model was trained on, its questions, and how they are scored: against counts, brute force, and greedy generation."
import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from curvtools.recite import wilson
from curvtools.tasks import (RELATIONS, Fact, Item, Items, Score, Scores, answers, ask, closed_book, fact_texts, families, invented_facts, invented_names,
                             load_items, logic, open_book, open_book_texts, save_items, sums)


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


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=None, eos_token_id=None, resid_pdrop=.5, initializer_range=.1)).eval()


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
    with pytest.raises(ValueError, match="no token for the answer '7.'"): answers(model, lambda s, **kw: dict(input_ids=[5]*(len(s) - 2)), [it])
    with pytest.raises(ValueError, match="no token for the prompt '3"): answers(model, lambda s, **kw: dict(input_ids=[5]*(len(s) == 2)), [it])
    with pytest.raises(ValueError, match="batch_size=0"): answers(model, byte_tokenizer, [it], batch_size=0)
    with pytest.raises(TypeError, match="tokenizer is needed"): answers(model, "gpt2", [it])
    with pytest.raises(TypeError, match="loaded model"): answers("gpt2", byte_tokenizer, [it])
    with torch.no_grad(): model.lm_head.weight[7] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"): answers(model, byte_tokenizer, [it])
