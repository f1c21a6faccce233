"""The recorded comparison of starts: whole, and resumable"""
import json
import pytest
from lorasuite.lab import starts
from lorasuite.lab.search import best_setting
from lorasuite.lab.starts import (
    record_starts, START_DRAWS, START_KEY, START_RATES, START_RECORDS, start_search, START_SEEDS, START_STEPS
)
from lorasuite.lab.store import read_records, select_runs
from lorasuite.tuners.qr_start import LORA_STARTS

@pytest.mark.parametrize('task', ['labels', 'questions'])
@pytest.mark.parametrize('start', LORA_STARTS)
def test_the_records_are_whole(task, start):
    rows = read_records(START_RECORDS)['runs']
    tried, tested = (select_runs(rows, task=task, start=start, split=split) for split in ('validation', 'test'))
    assert sorted({r['lr'] for r in tried}) == sorted(START_RATES)
    assert {r['seed'] for r in tried} == {*START_DRAWS} and not {*START_DRAWS} & {*START_SEEDS}
    assert len(tried) == len(START_RATES)*len(START_DRAWS)
    assert [r['seed'] for r in tested] == [*START_SEEDS]
    assert {(r['lr'],) for r in tested} == {best_setting(start_search(task, start), rows)}
    assert all(len(r['losses']) == START_STEPS for r in tested)

def test_the_records_say_what_made_them():
    head = read_records(START_RECORDS)
    assert head['command'] == 'python -m lorasuite.olora' # its name when they were made
    assert head['versions'].keys() >= {'torch', 'peft', 'transformers'}

def test_an_interrupted_recording_goes_on(tmp_path, monkeypatch):
    done, file = [], tmp_path/'runs.jsonl'
    def fake(decoder, task, start, split, lr, seed):
        done.append((task, start, split, lr, seed))
        if len(done) == 7: raise KeyboardInterrupt
        accuracy = lr if start == 'default' else -lr
        return dict(zip(START_KEY, done[-1])) | dict(accuracy=accuracy, seconds=0., losses=[]), None
    monkeypatch.setattr(starts, 'start_run', fake)
    with pytest.raises(KeyboardInterrupt): record_starts(file, ['labels'])
    record_starts(file, ['labels'])
    head, *rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert head['command'] == 'python -m lorasuite.lab.starts' and head['versions']
    keys = [tuple(r[k] for k in START_KEY) for r in rows]
    runs = len(LORA_STARTS)*(len(START_RATES)*len(START_DRAWS) + len(START_SEEDS))
    assert len(keys) == len({*keys}) == len(done) - 1 == runs
    assert best_setting(start_search('labels', 'default'), rows) == (max(START_RATES),)
    assert best_setting(start_search('labels', 'olora'), rows) == (min(START_RATES),)
    assert {r['lr'] for r in select_runs(rows, split='test', start='olora')} == {min(START_RATES)}
