"""The comparison at equal budgets: what is recorded, how settings are chosen, and that every method keeps its budget"""
import importlib, json
import pytest, torch
from models import error, logits, random_decoder, tokens
from test_finetune import ROWS
from lorasuite.core.files import read_json
from lorasuite.lab.store import kept_runs

budgets = importlib.import_module('lorasuite.budgets')

def row(strength, lr, accuracy, seed=budgets.DRAW, split='validation'): return dict(split=split, strength=strength, lr=lr, seed=seed, accuracy=accuracy)

def test_two_settings_meet_again():
    rows = [row(None, .1, .2), row(None, .03, .9), row(None, .01, .8), row(None, .003, .8)]
    assert budgets.finalists(rows) == [(None, .03), (None, .003)]
    assert budgets.best(rows + [row(None, .03, .1, budgets.DRAW + 1), row(None, .003, .6, budgets.DRAW + 1)]) == (None, .003)
    assert budgets.best(rows + [row(None, .03, .8, budgets.DRAW + 1), row(None, .003, .8, budgets.DRAW + 1)]) == (None, .03)
    assert budgets.finalists(rows + [row(.5, .03, 1., split='test')])[0] == (None, .03)

def test_records_hold_what_is_planned_and_nothing_else():
    kept = json.loads(budgets.RESULTS.read_text())['runs']
    jobs = [(job, budgets.METHODS[job[2]], budgets.RATES) for job in budgets.JOBS] + [(('labels', None, f'carried+{m}'), (None,), (0., *budgets.TUNING[1])) for m in budgets.TUNED]
    assert len(kept) == sum(len(strengths)*len(rates) + 2 + len(budgets.SEEDS) for _, strengths, rates in jobs)
    for job, strengths, rates in jobs:
        rows = [r for r in kept if (r['task'], r['budget'], r['method']) == job]
        first = {(r['strength'], r['lr']) for r in rows if (r['split'], r['seed']) == ('validation', budgets.DRAW)}
        again = {(r['strength'], r['lr']) for r in rows if (r['split'], r['seed']) == ('validation', budgets.DRAW + 1)}
        tested = [(r['strength'], r['lr'], r['seed']) for r in rows if r['split'] == 'test']
        assert first == {(s, lr) for s in strengths for lr in rates} and again == {*budgets.finalists(rows)}, job
        assert tested == [(*budgets.best(rows), seed) for seed in budgets.SEEDS], job

def test_budgets_are_kept_in_the_records():
    for r in json.loads(budgets.RESULTS.read_text())['runs']:
        if r.get('ranks'): assert sum(r['ranks'].values()) == r['budget']*len(r['ranks']) or r['method'] == 'adalora' and abs(sum(r['ranks'].values()) - 28*r['budget']) <= 28*.05*r['budget'], (r['method'], r['budget'])

@pytest.mark.parametrize('method', budgets.METHODS)
def test_every_method_keeps_its_budget_and_leaves_the_model(method, tokenizer, monkeypatch):
    monkeypatch.setattr(budgets, 'STEPS', 20)
    decoder, ids = random_decoder(tokenizer), tokens()
    before, base = logits(decoder, ids), {n: p.clone() for n, p in decoder.model.named_parameters()}
    flags = [p.requires_grad for p in decoder.model.parameters()]
    accuracy, run, adapter = budgets.learn(method, 2, budgets.METHODS[method][0], decoder, ROWS*3, 1e-2, 0, ROWS[:4])
    assert 0 <= accuracy <= 1 and len(run) == 20 and run.trained > 0
    assert (adapter is None) == (method == 'dora')
    if adapter: assert sum(budgets.ranks_of(adapter).values()) == 2*28 and error(logits(decoder, ids, adapter), before) > 1e-4
    assert logits(decoder, ids).equal(before) and all(p.equal(base[n]) for n, p in decoder.model.named_parameters()) and flags == [p.requires_grad for p in decoder.model.parameters()]

def test_runs_that_are_kept_are_not_made_again(tmp_path):
    made, file = [], tmp_path/'deep'/'runs.jsonl'
    def go(do, *how): do(how, lambda: made.append(how) or dict(zip(budgets.KEY, how), accuracy=.5))
    with pytest.raises(KeyboardInterrupt), kept_runs(file, budgets.KEY) as (do, rows):
        go(do, 'validation', None, .1, 0)
        raise KeyboardInterrupt
    with kept_runs(file, budgets.KEY) as (do, rows):
        for lr in (.1, .2): go(do, 'validation', None, lr, 0)
        assert len(rows) == 2
    assert [how[2] for how in made] == [.1, .2] and [r['lr'] for r in read_json(file)] == [.1, .2]
