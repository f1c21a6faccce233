"""The runs of `make minutes`, on a tiny pair with few questions and steps"""
import sys
from pathlib import Path
import pytest

@pytest.fixture
def minutes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'benchmarks')
    import minutes
    pair = (1e-3, {16: (1, 5)}, {16: 1, None: 2}, (1e-3, 3e-3))
    monkeypatch.setattr(minutes, 'CACHE', tmp_path)
    monkeypatch.setattr(minutes, 'PAIRS', dict.fromkeys(('new-far', 'stranger'), pair))
    monkeypatch.setattr(minutes, 'WRITTEN', 4)
    monkeypatch.setattr(minutes, 'WRITTEN_STEPS', (1,))
    monkeypatch.setattr(minutes, 'SEEDS', range(1))
    yield minutes
    for name in ('minutes', 'hop', 'real'): sys.modules.pop(name, None)

def few(minutes, name):
    "A pair with few questions"
    pair = minutes.Pair(name)
    pair.data = {split: rows[:80] for split, rows in pair.data.items()}
    return pair

def test_every_way_on_a_related_pair(minutes):
    pair, rows = few(minutes, 'new-far'), []
    for way, split, questions, *rest in minutes.runs_of(pair, rows):
        if way not in ('rounds', 'refitted'): rows.append(pair.row(way, split, questions, *rest))
    test = {(r['way'], r['questions'], r['steps']): r for r in rows if r['split'] == 'test'}
    assert [way for way, *_ in test][:4] == ['specialist', 'base', 'carried', 'drift']
    assert {way for way, *_ in test} == {
        'specialist', 'base', 'carried', 'drift', 'refreshed', 'drift refreshed', 'written', 'labels'}
    assert test['drift refreshed', 16, 5]['lr'] == 1e-3/3 and ('drift refreshed', 16, 1) not in test
    assert test['drift', 0, 0]['before'] > 0 == test['carried', 0, 0]['before']
    assert test['drift refreshed', 16, 5]['before'] > test['refreshed', 16, 5]['before']
    assert test['drift', 0, 0]['accuracy'] >= test['carried', 0, 0]['accuracy'] > .7 > test['base', 0, 0]['accuracy']
    tried = [r for r in rows if r['split'] == 'validation' and r['questions'] == 16]
    best = max(tried, key=lambda row: row['accuracy'])['lr']
    assert [r['lr'] for r in tried] == [1e-3, 3e-3] and test['labels', 16, 1]['lr'] == best

def test_ways_that_need_a_related_pair(minutes):
    rows = [dict(pair='stranger', way='labels', split='validation', questions=n, accuracy=0., lr=1e-3)
            for n in (16, None)]
    ways = {way for way, *_ in minutes.runs_of(few(minutes, 'stranger'), rows)}
    assert not ways & {'carried', 'drift', 'drift refreshed', 'refitted'} and 'refreshed' in ways

def test_refreshes_of_the_real_pair_have_the_best_rates(minutes, monkeypatch):
    "From either start its own; of equal ones the lowest"
    monkeypatch.setattr(minutes, 'TUNED', 'new-far')
    rows, best = [], {'refreshed': (3e-4, 1e-3), 'drift refreshed': (1e-4,)}
    for way, split, questions, steps, lr, _ in minutes.runs_of(few(minutes, 'new-far'), rows):
        accuracy = .9 if lr in best.get(way, ()) else .5
        rows.append(dict(pair='new-far', way=way, split=split, questions=questions, steps=steps, lr=lr,
                         accuracy=accuracy))
    rates = {way: {r['lr'] for r in rows if (r['way'], r['split']) == (way, 'test')} for way in
             ('refreshed', 'drift refreshed', 'rounds', 'seeded', 'written')}
    assert rates == {'refreshed': {3e-4}, 'drift refreshed': {1e-4}, 'rounds': {3e-4}, 'seeded': {3e-4},
                     'written': {3e-4}}
