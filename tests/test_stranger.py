"""The runs of `make stranger`, on a tiny pair with few questions and steps"""
import sys
from pathlib import Path
import pytest
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.lab.store import RunLog, select_runs
from lorasuite.training.examples import load_data

@pytest.fixture
def stranger(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'benchmarks')
    import stranger
    data = {split: [*load_data(f'zoo/{file}.jsonl')][:40] for split, file in
            dict(train='train', inputs='train', validation='test', test='test').items()}
    models = dict(old=load_model('zoo/old'), new=load_model('zoo/stranger'))
    parts = models | dict(source=Adapter.load('zoo/adapter'), data=data)
    for name, value in parts.items(): monkeypatch.setattr(stranger.Stranger, name, value)
    monkeypatch.setattr(stranger, 'CACHE', tmp_path)
    monkeypatch.setattr(stranger, 'SEEDS', range(1))
    monkeypatch.setattr(stranger, 'TAUGHT', 12)
    monkeypatch.setattr(stranger, 'LABELS', {'labels': 8, 'published': 8, 'all labels': None})
    monkeypatch.setattr(stranger, 'GRIDS', {way: grid[:1] for way, grid in stranger.GRIDS.items()})
    yield stranger
    for name in ('stranger', 'attribution', 'minutes', 'hop', 'real'): sys.modules.pop(name, None)

def test_all_ways_to_a_stranger(stranger, tmp_path):
    log = RunLog(tmp_path/'runs.jsonl', stranger.KEY)
    stranger.make_runs('sums', log)
    tested = {row['way']: row for row in select_runs(log.rows, split='test')}
    assert [*tested] == [*stranger.UNTRAINED, *stranger.GRIDS, *stranger.LIKE]
    assert tested['specialist']['accuracy'] > .8 > .3 > tested['carried']['accuracy']
    assert tested['seeded']['lr'] == tested['written']['lr'] == tested['refreshed']['lr']
    assert tested['seeded']['shown'] and tested['refreshed']['lessons'] == 12 > 0 == tested['labels']['lessons']
    kept = len(log.rows)
    stranger.make_runs('sums', RunLog(tmp_path/'runs.jsonl', stranger.KEY)) # nothing is made again
    assert len(RunLog(tmp_path/'runs.jsonl', stranger.KEY).rows) == kept
