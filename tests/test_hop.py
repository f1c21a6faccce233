"""The hop of a real model, its parts on tiny ones"""
import sys
from pathlib import Path
import pytest
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import read_json
from lorasuite.core.loading import load_model
from lorasuite.lab.experiments import record
from lorasuite.lab.world import TASKS

@pytest.fixture
def hop(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'benchmarks')
    import hop
    return hop

def test_sums_are_disjoint_and_right(hop):
    rows = hop.sums()
    asked = {split: {e['instruction'] for e in examples} for split, examples in rows.items()}
    assert {split: len(e) for split, e in rows.items()} == dict(train=640, validation=60, inputs=300, test=200)
    for split in ('validation', 'inputs', 'test'):
        assert len(asked[split]) == len(rows[split]) and not any(asked[split] & asked[o] for o in asked if o != split)
    for e in rows['test']: assert sum(int(w) for w in e['instruction'].rstrip('?').split() if w.isdigit()) == int(e['answer'])

def test_documents_are_held_out(hop):
    texts, held_out = hop.documents()
    assert len(held_out) == 60 and not {*texts} & {*held_out} and sum(map(len, texts)) > hop.STEPS*hop.BATCH*hop.LENGTH*2

def test_all_ways_of_the_real_hop(hop, monkeypatch, tmp_path):
    people = TASKS['questions']()
    for name, value in dict(old=load_model('zoo/old'), new=load_model('zoo/new'), source=Adapter.load('zoo/adapter'), drift=.1,
                            data=dict(train=people['train'][:120], inputs=people['train'][200:230], validation=people['validation'][:20], test=people['test'][:40])).items():
        monkeypatch.setattr(hop.RealCell, name, value)
    monkeypatch.setattr(hop, 'SEEDS', range(2))
    monkeypatch.setattr(hop, 'GRIDS', {name: [(1, lr) for _, lr in grid[-2:]] for name, grid in hop.GRIDS.items()})
    record(hop.RealCell('harsh', 'additions', tmp_path), tmp_path/'some.jsonl', hop.plan)
    assert [r['way'] for r in read_json(tmp_path/'some.jsonl')] == ['signs', *hop.SOME]
    record(hop.RealCell(hop.FIRST, 'additions', tmp_path), tmp_path/'runs.jsonl', hop.plan)
    rows = read_json(tmp_path/'runs.jsonl')
    tested = {r['way']: r['accuracy'] for r in rows if r['split'] == 'test'}
    assert {*tested} == {*hop.UNTRAINED, *hop.GRIDS} and tested['carried'] > .7 > .2 > tested['base']
    assert [r['seed'] for r in rows if (r['way'], r['split']) == ('lora-100', 'test')] == [0, 1] and rows[0]['agreement_carried'] > .7
