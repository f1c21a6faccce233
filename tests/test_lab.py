"""The laboratory: what it plans, what it keeps, and that it goes on where it was interrupted"""
import importlib, json, random, statistics
import pytest, torch
from lorasuite.finetune import read_json

lab = importlib.import_module('lorasuite.lab')

@pytest.fixture
def cell(tmp_path): return lab.Cell('new', 'questions', tmp_path)

def pretended(cell, score):
    "The plan of a cell whose runs are not made: `score` is their accuracy"
    rows = []
    def do(name, way, *how): rows.append(dict(zip(lab.RUN, (name, *how))) | dict(accuracy=score(name, *how)))
    lab.plan(cell, do, rows)
    return rows

def test_every_way_is_tuned_before_it_is_tested(cell, monkeypatch):
    monkeypatch.setattr(lab, 'STARTS', dict.fromkeys(lab.STARTS, lambda cell, seed: None))
    monkeypatch.setattr(lab, 'ALIGNED', ())
    best = {name: random.Random(name).choice(lab.grid(way)) for name, way in lab.WAYS.items() if way.trained}
    rows = pretended(cell, lambda name, split, steps, lr, seed: float((steps, lr) == best.get(name)))
    for name, setting in best.items():
        if name == 'refitted+all': continue # of the hops with a curve only
        mine = [r for r in rows if r['way'] == name]
        tried, tested = ([(r['steps'], r['lr']) for r in mine if r['split'] == s] for s in ('validation', 'test'))
        assert tried == lab.grid(lab.WAYS[name]) and tested == [setting]*len(lab.SEEDS)
        assert [r['split'] for r in mine] == sorted((r['split'] for r in mine), reverse=True)
    assert not {r['seed'] for r in rows if r['split'] == 'validation'} & {r['seed'] for r in rows if r['split'] == 'test'}

def test_zero_steps_are_in_the_grid_of_every_carried_start():
    for name, way in lab.WAYS.items():
        if way.few: assert ((0, 0.) in lab.grid(way)) == bool(way.start), name

def test_the_curve_uses_the_settings_of_its_neighbours(monkeypatch, tmp_path):
    cell = lab.Cell('far', 'labels', tmp_path)
    monkeypatch.setattr(lab, 'STARTS', dict.fromkeys(lab.STARTS, lambda cell, seed: None))
    monkeypatch.setattr(lab, 'ALIGNED', ())
    rows = pretended(cell, lambda name, split, steps, lr, seed: lr)
    setting = lambda name: {(r['steps'], r['lr']) for r in rows if r['way'] == name and r['split'] == 'test'}
    assert setting('lora-10') == setting('lora-30') == setting('lora-100') == {(lab.STEPS['few'], lab.RATES[-1])}
    assert setting('refitted+300') == setting('refitted+1000') == setting('refitted+all')
    assert len([r for r in rows if r['way'] == 'lora-1000']) == 3

def test_the_gentlest_of_equal_settings_is_chosen():
    row = lambda steps, lr, accuracy, split='validation': dict(way='w', split=split, steps=steps, lr=lr, accuracy=accuracy)
    assert lab.best_setting([row(160, 1e-3, .5), row(160, 1e-4, .5), row(0, 0., .4)], 'w') == (160, 1e-4)
    assert lab.best_setting([row(160, 1e-3, .9), row(160, 1e-3, .1), row(0, 0., .6)], 'w') == (0, 0.)
    assert lab.best_setting([row(160, 1e-3, .9, 'test'), row(0, 0., .1)], 'w') == (0, 0.)

def test_an_interrupted_cell_goes_on(monkeypatch, tmp_path):
    made, few = [], {n: lab.WAYS[n] for n in ('base', 'carried', 'lora-100')}
    monkeypatch.setattr(lab, 'WAYS', few)
    monkeypatch.setattr(lab, 'STEPS', dict(few=1, many=1))
    monkeypatch.setattr(lab, 'RATES', (1e-4, 1e-3))
    monkeypatch.setattr(lab, 'SEEDS', range(1))
    really = lab.run
    def run(*args):
        if len(made) == 2: raise KeyboardInterrupt
        made.append(args[1:])
        return really(*args)
    monkeypatch.setattr(lab, 'run', run)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt): lab.work('new', 'questions', tmp_path)
        file = tmp_path/'runs'/'new-questions.jsonl'
        kept = file.read_text()
        assert [r['way'] for r in read_json(file)] == ['signs', 'base', 'carried']
        made.append(None)
        lab.work('new', 'questions', tmp_path)
    finally: torch.set_num_threads(threads)
    rows = read_json(file)
    assert file.read_text().startswith(kept) and [r['way'] for r in rows] == ['signs', 'base', 'carried', 'lora-100', 'lora-100'] and len(made) == 5
    signs = rows[0]
    assert .1 < signs['drift'] < .25 and signs['r2'] > .99 and signs['agreement_carried'] > .85 > .2 > signs['agreement_base']
    assert rows[2]['accuracy'] > .85 and rows[2]['before'] > 0 and rows[3]['trained'] == 184320 and rows[4]['losses']

def test_results_are_kept_with_what_made_them(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, 'CELLS', [('a', 'x'), ('b', 'x')])
    (tmp_path/'runs').mkdir()
    for hop in 'ab': (tmp_path/'runs'/f'{hop}-x.jsonl').write_text(json.dumps(dict(hop=hop, accuracy=.5)) + '\n')
    lab.collect(tmp_path, tmp_path/'lab.json')
    kept = json.loads((tmp_path/'lab.json').read_text())
    assert kept['command'] == 'make experiments' and kept['versions'].keys() == {*lab.PACKAGES} and [r['hop'] for r in kept['runs']] == ['a', 'b']
    assert [p.name for p in tmp_path.iterdir() if p.suffix == '.part'] == []

def test_hops_are_as_far_as_they_say(tmp_path):
    assert lab.drift('itself', tmp_path) == 0 and lab.drift('stranger', tmp_path) is None
    assert .1 < lab.drift('new', tmp_path) < lab.drift('far', tmp_path) < .4 and lab.drift('far_back', tmp_path) == lab.drift('far', tmp_path)
