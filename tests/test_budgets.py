"""The comparison at equal budgets: what is recorded, how settings are chosen, and that every method keeps its budget"""
import pytest
from models import error, logits, random_decoder, tokens
from test_finetune import ROWS
from lorasuite.lab.budgets import (
    BUDGET_JOBS, BUDGET_KEY, BUDGET_METHODS, BUDGET_RECORDS, job_file, job_search, kept_ranks, record_job,
    train_under_budget, TUNING_JOBS
)
from lorasuite.lab import budgets
from lorasuite.lab.search import best_setting, DRAW, finalists, Search, SEEDS
from lorasuite.lab.store import read_records, select_runs

JOBS = BUDGET_JOBS + TUNING_JOBS
RUNOFF = Search({}, columns=('strength', 'lr'), runoff=(DRAW + 1,))

def trial(strength, lr, accuracy, seed=DRAW, split='validation'):
    return dict(split=split, strength=strength, lr=lr, seed=seed, accuracy=accuracy)

def again(*accuracies):
    "The finalists of the test below on a second draw"
    return [trial(None, lr, accuracy, DRAW + 1) for lr, accuracy in zip((.03, .003), accuracies)]

def test_two_settings_meet_again():
    rows = [trial(None, .1, .2), trial(None, .03, .9), trial(None, .01, .8), trial(None, .003, .8)]
    assert finalists(RUNOFF, rows) == [(None, .03), (None, .003)]
    assert best_setting(RUNOFF, rows + again(.1, .6)) == (None, .003)
    assert best_setting(RUNOFF, rows + again(.8, .8)) == (None, .03)
    assert best_setting(RUNOFF, rows + again(.5, .6)) == (None, .03) # a tie goes to the better one of the first draw
    assert finalists(RUNOFF, rows + [trial(.5, .03, 1., split='test')])[0] == (None, .03)

def keys(rows, **columns): return [(r['strength'], r['lr'], r['seed']) for r in select_runs(rows, **columns)]

@pytest.mark.parametrize('job', JOBS, ids=str)
def test_records_hold_what_is_planned_and_nothing_else(job):
    search = job_search(job)
    rows = select_runs(read_records(BUDGET_RECORDS)['runs'], **search.runs)
    assert len(rows) == len(search.settings) + 2 + len(SEEDS)
    assert {*keys(rows, split='validation', seed=DRAW)} == {(*setting, DRAW) for setting in search.settings}
    assert {*keys(rows, split='validation', seed=DRAW + 1)} == {(*s, DRAW + 1) for s in finalists(search, rows)}
    assert keys(rows, split='test') == [(*best_setting(search, rows), seed) for seed in SEEDS]

def test_there_are_no_other_records():
    jobs = {(r['task'], r['budget'], r['method']) for r in read_records(BUDGET_RECORDS)['runs']}
    assert jobs == {*JOBS}

def test_budgets_are_kept_in_the_records():
    for row in read_records(BUDGET_RECORDS)['runs']:
        if not row.get('ranks'): continue
        budget, total = row['budget']*len(row['ranks']), sum(row['ranks'].values())
        near = row['method'] == 'adalora' and abs(total - 28*row['budget']) <= 28*.05*row['budget']
        assert total == budget or near, (row['method'], row['budget'])

@pytest.mark.parametrize('method', BUDGET_METHODS)
def test_every_method_keeps_its_budget_and_leaves_the_model(method, tokenizer):
    decoder, ids = random_decoder(tokenizer), tokens()
    before, base = logits(decoder, ids), {n: p.clone() for n, p in decoder.model.named_parameters()}
    flags = [p.requires_grad for p in decoder.model.parameters()]
    strength = BUDGET_METHODS[method][0]
    accuracy, run, adapter = train_under_budget(method, 2, strength, decoder, ROWS*3, ROWS[:4], 1e-2, 0, steps=20)
    assert 0 <= accuracy <= 1 and len(run) == 20 and run.trained > 0
    assert (adapter is None) == (method == 'dora')
    if adapter:
        assert sum(kept_ranks(adapter).values()) == 2*28
        assert error(logits(decoder, ids, adapter), before) > 1e-4
    assert logits(decoder, ids).equal(before)
    assert all(p.equal(base[n]) for n, p in decoder.model.named_parameters())
    assert flags == [p.requires_grad for p in decoder.model.parameters()]

@pytest.mark.parametrize('job', [BUDGET_JOBS[0], TUNING_JOBS[0]], ids=str)
def test_an_interrupted_job_goes_on(job, monkeypatch, tmp_path):
    made, search = [], job_search(job)
    def run(job, *how, **place):
        if len(made) == 3: raise KeyboardInterrupt
        made.append(how)
        return dict(zip(('task', 'budget', 'method'), job)) | dict(zip(BUDGET_KEY, how), accuracy=how[2])
    for name in ('budget_run', 'tuning_run'): monkeypatch.setattr(budgets, name, run)
    with pytest.raises(KeyboardInterrupt): record_job(job, tmp_path)
    made.append(None)
    record_job(job, tmp_path)
    rows = read_records(job_file(job, tmp_path))['runs']
    assert len(rows) == len(made) - 1 == len(search.settings) + 2 + len(SEEDS)
    assert keys(rows, split='test') == [(*search.settings[-1], seed) for seed in SEEDS] # the highest rate is best here
