"""The upgrades of a real model, their parts on tiny ones"""
import sys
from pathlib import Path
import pytest
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.lab.experiments import record_experiment
from lorasuite.lab.search import best_setting, method_search
from lorasuite.lab.store import read_records, select_runs
from lorasuite.lab.world import TASKS

@pytest.fixture
def hop(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'benchmarks')
    import hop
    yield hop
    for name in ('hop', 'real'): sys.modules.pop(name, None)

def numbers(question): return [int(word) for word in question.rstrip('?').split() if word.isdigit()]

def test_sums_are_disjoint_and_right(hop):
    rows = hop.sums()
    asked = {split: {e['instruction'] for e in examples} for split, examples in rows.items()}
    assert {split: len(e) for split, e in rows.items()} == dict(train=640, validation=60, inputs=300, test=200)
    for split in ('validation', 'inputs', 'test'):
        assert len(asked[split]) == len(rows[split])
        assert not any(asked[split] & asked[other] for other in asked if other != split)
    for e in rows['test']: assert sum(numbers(e['instruction'])) == int(e['answer'])

def test_documents_are_held_out(hop):
    texts, held_out = hop.documents()
    assert len(held_out) == 60 and not {*texts} & {*held_out}
    assert sum(map(len, texts)) > hop.STEPS*hop.BATCH*hop.LENGTH*2

@pytest.fixture
def tiny(hop, monkeypatch):
    "The real experiment with tiny models, short grids and few questions"
    people = TASKS['questions']()
    data = dict(train=people['train'][:120], inputs=people['train'][200:230], validation=people['validation'][:20],
                test=people['test'][:40])
    parts = dict(old=load_model('zoo/old'), new=load_model('zoo/new'), source=Adapter.load('zoo/adapter'), drift=.1,
                 data=data)
    for name, value in parts.items(): monkeypatch.setattr(hop.RealExperiment, name, value)
    monkeypatch.setattr(hop, 'SEEDS', range(2))
    short = {name: [(1, lr) for _, lr in grid[-2:]] for name, grid in hop.GRIDS.items()}
    monkeypatch.setattr(hop, 'GRIDS', short)
    return hop

def record(hop, upgrade, file):
    "All runs of an upgrade"
    record_experiment(hop.RealExperiment(upgrade, 'additions', file.parent), file, hop.plan)
    return read_records(file)['runs']

def test_all_methods_of_the_real_upgrade(tiny, tmp_path):
    assert [r['way'] for r in record(tiny, 'harsh', tmp_path/'some.jsonl')] == ['signs', *tiny.SOME]
    rows = record(tiny, tiny.FIRST, tmp_path/'runs.jsonl')
    tested = {r['way']: r['accuracy'] for r in select_runs(rows, split='test')}
    assert {*tested} == {*tiny.UNTRAINED, *tiny.GRIDS} and tested['carried'] > .7 > .2 > tested['base']
    assert [r['seed'] for r in select_runs(rows, way='lora-100', split='test')] == [0, 1]
    assert rows[0]['agreement_carried'] > .7

def test_the_record_is_what_the_plan_makes(hop):
    "All methods, each at the setting that the search picks"
    recorded = read_records(data_dir()/'hop.json')['runs']
    for upgrade in hop.RATES:
        tested = {row['way'] for row in select_runs(recorded, hop=upgrade, split='test')}
        assert tested == ({*hop.UNTRAINED, *hop.GRIDS} if upgrade == hop.FIRST else {*hop.SOME})
    gentle = select_runs(recorded, hop=hop.FIRST)
    for name, grid in hop.GRIDS.items():
        tuning = method_search(name, hop.TRIED[name], grid)
        tests = select_runs(gentle, way=name, split='test')
        assert {(row['steps'], row['lr']) for row in tests} == {best_setting(tuning, gentle)}, name
        assert [row['seed'] for row in tests] == [*hop.SEEDS]
