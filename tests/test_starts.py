"""The recorded comparison of starts: whole, and resumable"""
import json
import pytest
from lorasuite.lab import starts
from lorasuite.lab.starts import best_rate, RATES, record_runs, recorded, RECORDS, SEEDS, STEPS
from lorasuite.tuners.qr_start import LORA_STARTS

def test_the_records_are_whole():
    head = json.loads(RECORDS.read_text().splitlines()[0])
    assert head['command'] == 'python -m lorasuite.olora' and head['versions'].keys() >= {'torch', 'peft', 'transformers'}
    rows = recorded()
    for task in ('labels', 'questions'):
        for start in LORA_STARTS:
            tried, counted = ([r for r in rows if (r['task'], r['start'], r['split']) == (task, start, split)] for split in ('validation', 'test'))
            assert sorted({r['lr'] for r in tried}) == sorted(RATES) and not {r['seed'] for r in tried} & {*SEEDS}
            assert [r['seed'] for r in counted] == [*SEEDS] and {r['lr'] for r in counted} == {best_rate(rows, task, start)} and all(len(r['losses']) == STEPS for r in counted)

def test_an_interrupted_recording_goes_on(tmp_path, monkeypatch):
    done = []
    def fake(decoder, task, start, split, lr, seed):
        done.append((task, start, split, lr, seed))
        if len(done) == 7: raise KeyboardInterrupt
        return dict(zip(starts.RUN, done[-1])) | dict(accuracy=lr if start == 'default' else -lr, seconds=0., losses=[]), None
    monkeypatch.setattr(starts, 'one_run', fake)
    with pytest.raises(KeyboardInterrupt): record_runs(tmp_path/'runs', ['labels'])
    record_runs(tmp_path/'runs', ['labels'])
    rows = [json.loads(line) for line in (tmp_path/'runs').read_text().splitlines()[1:]]
    keys = [tuple(r[k] for k in starts.RUN) for r in rows]
    assert len(keys) == len({*keys}) == len(done) - 1 == len(LORA_STARTS)*(len(RATES)*len(starts.DRAWS) + len(SEEDS))
    assert best_rate(rows, 'labels', 'default') == max(RATES) and best_rate(rows, 'labels', 'olora') == min(RATES)
    assert {r['lr'] for r in rows if r['split'] == 'test' and r['start'] == 'olora'} == {min(RATES)}
