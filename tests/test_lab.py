"""The laboratory: what it plans, what it keeps, and that it goes on where it was interrupted"""
import importlib, json, random
from concurrent.futures import Future
import pytest, torch
from lorasuite.core.files import read_json

lab = importlib.import_module('lorasuite.lab')

@pytest.fixture
def cell(tmp_path): return lab.Cell('new', 'questions', tmp_path)

def pretended(cell, score):
    "The plan of a cell whose runs are not made: `score` is their accuracy"
    rows = []
    def do(name, way, *how): rows.append(dict(zip(lab.RUN, (name, *how))) | dict(accuracy=score(name, *how)))
    lab.plan(cell, do, rows, rows)
    return rows

@pytest.fixture
def no_starts(monkeypatch):
    "Nothing is aligned or carried"
    monkeypatch.setattr(lab, 'STARTS', dict.fromkeys(lab.STARTS, lambda cell, seed: None))
    monkeypatch.setattr(lab, 'ALIGNED', ())

def test_every_way_is_tuned_before_it_is_tested(no_starts, tmp_path):
    best = {name: random.Random(name).choice(lab.grid(way)) for name, way in lab.WAYS.items() if way.trained}
    rows = pretended(lab.Cell(lab.FIRST, 'questions', tmp_path), lambda name, split, steps, lr, seed: float((steps, lr) == best.get(name)))
    for name, setting in best.items():
        mine = [r for r in rows if r['way'] == name]
        tried, tested = ([(r['steps'], r['lr']) for r in mine if r['split'] == s] for s in ('validation', 'test'))
        enough = lab.WAYS[name].start and setting[0] # no longer one is needed
        assert tried == [s for s in lab.grid(lab.WAYS[name]) if not enough or s[0] <= enough] and tested == [setting]*len(lab.SEEDS)
        assert [r['split'] for r in mine] == sorted((r['split'] for r in mine), reverse=True)
    assert not {r['seed'] for r in rows if r['split'] == 'validation'} & {r['seed'] for r in rows if r['split'] == 'test'}

def test_zero_steps_are_in_the_grid_of_every_carried_start():
    for name, way in lab.WAYS.items():
        if way.few: assert ((0, 0.) in lab.grid(way)) == bool(way.start), name

def test_what_is_retrained_is_trained_as_long_as_a_specialist():
    "And a hundred labels are not learned longer than lessons, whatever it starts from"
    last = {name: lab.grid(way)[-1] for name, way in lab.WAYS.items() if way.trained}
    assert last['lora-all'] == lab.LONG and max(last.values()) == lab.LONG
    assert {steps for name, (steps, _) in last.items() if lab.WAYS[name].few} == {lab.STEPS[1]} and last['refresh'] == last['refitted+refresh'] == last['union']

def test_the_curve_uses_the_settings_of_its_neighbours(no_starts, tmp_path):
    rows = pretended(lab.Cell(lab.FIRST, 'labels', tmp_path), lambda name, split, steps, lr, seed: 10*lr)
    setting = lambda name: {(r['steps'], r['lr']) for r in rows if r['way'] == name and r['split'] == 'test'}
    assert setting('lora-10') == setting('lora-30') == setting('lora-100') == {(lab.STEPS[0], lab.RATES[-1])}
    assert setting('refresh-100') == setting('lora-100') != setting('refresh') == {(lab.STEPS[0], lab.RATES[4])} and setting('refitted+refresh-100') == setting('refitted+refresh')
    assert setting('refitted+300') == setting('refitted+all') != setting('lora-300') == setting('lora-all')
    assert len([r for r in rows if r['way'] == 'lora-300']) == 3

def test_other_hops_take_the_settings_of_the_first(no_starts, tmp_path):
    first = [dict(way=w, split='validation', steps=7, lr=.5, accuracy=.5) for w in lab.WAYS]
    def planned(hop):
        rows = []
        def do(name, way, *how): rows.append(dict(zip(lab.RUN, (name, *how)), accuracy=.5))
        lab.plan(lab.Cell(hop, 'labels', tmp_path), do, rows, first)
        return [r for r in rows if r['way'] not in lab.WAYS or lab.WAYS[r['way']].trained]
    carried, longer = {'refitted+100', 'refitted+refresh'}, [(7, .5)] + [(n, lab.RATES[3]) for n in lab.STEPS]
    for hop, ways in dict(back=carried | {'lora-100', 'lora-all'}, far_back=carried, strange_back=carried, short=set(), itself=set(), enlarged=set()).items():
        rows = planned(hop)
        tested, tuned = [r for r in rows if r['split'] == 'test'], [r for r in rows if r['split'] == 'validation']
        assert {r['way'] for r in tested} == ways and len(tested) == len(ways)*len(lab.SEEDS)
        for way in ways:
            tried = [(r['steps'], r['lr']) for r in tuned if r['way'] == way]
            assert tried == ([] if lab.WAYS[way].few else longer)
            assert {(r['steps'], r['lr']) for r in tested if r['way'] == way} == {longer[-1] if way == 'lora-all' else (7, .5)}
    for hop in lab.TUNED:
        rows = planned(hop)
        for way in {r['way'] for r in rows} & {*lab.WAYS}:
            assert [(r['steps'], r['lr']) for r in rows if r['way'] == way and r['split'] == 'validation'] == (longer if hop not in lab.OWN.get(way, lab.TUNED) else lab.grid(lab.WAYS[way])), (hop, way)

def test_nothing_is_tried_where_no_training_is_longer():
    assert lab.lengthened(lab.LONG) == lab.lengthened((lab.STEPS[-1], lab.RATES[3])) == [] and lab.lengthened((400, 1e-3)) == [(400, 1e-3), (800, lab.RATES[3])]

@pytest.mark.parametrize('way', ['refresh', 'refitted+refresh', 'lora-all', 'lora-100', 'refitted+100'])
def test_a_longer_training_of_what_was_carried_is_tried_only_where_it_can_gain(way):
    "And a laboratory that goes on with longer ones already recorded tries the same; a fresh LoRA tries all"
    grid = lab.grid(lab.WAYS[way])
    def tried(accuracy, recorded=()):
        rows, gone = [*recorded], []
        def go(steps, lr):
            gone.append((steps, lr))
            rows.append(dict(way=way, split='validation', steps=steps, lr=lr, accuracy=accuracy(steps, lr)))
        lab.tune(go, rows, way, lab.WAYS[way], grid)
        return gone, rows
    short, last = [s for s in grid if s[0] in (0, lab.STEPS[0])], grid[-1][0]
    assert tried(lambda steps, lr: .5)[0] == grid != short
    assert tried(lambda steps, lr: float((steps, lr) == short[1]))[0] == (short if lab.WAYS[way].start else grid)
    assert tried(lambda steps, lr: 0. if steps else 1.)[0] == grid # zero steps are no training
    assert tried(lambda steps, lr: 1 - lab.EQUAL if steps == grid[-2][0] else 0.)[0] == (grid[:-1] if lab.WAYS[way].start else grid)
    gone, rows = tried(lambda steps, lr: steps/last)
    assert gone == grid == tried(lambda steps, lr: steps/last, rows)[0]

def test_the_gentlest_of_equal_settings_is_chosen():
    row = lambda steps, lr, accuracy, split='validation': dict(way='w', split=split, steps=steps, lr=lr, accuracy=accuracy)
    best = lambda *rows, start='carried': lab.best_setting(rows, 'w', lab.Way(start, 100))
    assert best(row(160, 1e-3, .5), row(160, 1e-4, .5), row(0, 0., .4)) == (160, 1e-4)
    assert best(row(160, 1e-3, .5), row(0, 0., .495)) == (0, 0.)
    assert best(row(160, 1e-3, .9), row(160, 1e-3, .1), row(0, 0., .6)) == (0, 0.)
    assert best(row(160, 1e-3, .9, 'test'), row(0, 0., .1)) == (0, 0.)
    assert best(row(160, 1e-3, .5), row(160, 1e-4, .49), start=None) == best(row(160, 1e-3, .5), row(160, 1e-4, .5), start=None) == (160, 1e-3) # a fresh LoRA loses nothing
    assert best(row(160, 1e-3, .5), row(400, 1e-4, .49), start=None) == (400, 1e-4) and best(row(160, 1e-3, .5), row(400, 1e-4, .4), start=None) == (160, 1e-3)

def test_hops_between_strangers_have_settings_of_strangers(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(lab, 'record', lambda cell, file, plan: plan(cell, None, ['mine']))
    monkeypatch.setattr(lab, 'plan', lambda cell, do, rows, like: asked.update({cell.hop: like}))
    monkeypatch.setattr(lab, 'read_json', lambda file: file.name)
    for hop in lab.HOPS: lab.work(hop, 'sums', tmp_path)
    assert asked == {hop: f'{lab.FIRST}-sums.jsonl' for hop in lab.HOPS} | {lab.FIRST: ['mine'], 'strange_back': 'stranger-sums.jsonl'}

def test_an_interrupted_cell_goes_on(monkeypatch, tmp_path):
    made, few = [], {n: lab.WAYS[n] for n in ('base', 'carried', 'lora-100')}
    monkeypatch.setattr(lab, 'WAYS', few)
    monkeypatch.setattr(lab, 'grid', lambda *_: [(1, 1e-3)])
    monkeypatch.setattr(lab, 'SEEDS', range(1))
    really = lab.run
    def run(*args):
        if len(made) == 2: raise KeyboardInterrupt
        made.append(args[1:])
        return really(*args)
    monkeypatch.setattr(lab, 'run', run)
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/f'{lab.FIRST}-questions.jsonl').write_text('')
    with pytest.raises(KeyboardInterrupt): lab.work('new', 'questions', tmp_path)
    file = tmp_path/'runs'/'new-questions.jsonl'
    kept = file.read_text()
    assert [r['way'] for r in read_json(file)] == ['signs', 'base', 'carried']
    made.append(None)
    lab.work('new', 'questions', tmp_path)
    rows = read_json(file)
    assert file.read_text().startswith(kept) and [r['way'] for r in rows] == ['signs', 'base', 'carried', 'lora-100', 'lora-100'] and len(made) == 5
    signs = rows[0]
    assert .1 < signs['drift'] < .25 and signs['r2'] > .99 and signs['agreement_carried'] > .85 > .2 > signs['agreement_base']
    assert rows[2]['accuracy'] > .85 and rows[2]['before'] > 0 and rows[3]['trained'] == 184320 and rows[4]['losses']

def test_results_are_kept_with_what_made_them(tmp_path):
    lab.collect([dict(hop=hop, accuracy=.5) for hop in 'ab'], tmp_path/'lab.json', 'make experiments')
    kept = json.loads((tmp_path/'lab.json').read_text())
    assert kept['command'] == 'make experiments' and kept['versions'].keys() == {*lab.PACKAGES} and [r['hop'] for r in kept['runs']] == ['a', 'b']
    assert [p.name for p in tmp_path.iterdir() if p.suffix == '.part'] == []

def test_specialists_are_made_once_for_all_cells(tmp_path):
    adapters = [what for make, *what in lab.shared(tmp_path) if make is lab.specialist]
    assert len(adapters) == len({*map(tuple, adapters)})
    needed = {(lab.HOPS[hop][0], task, tmp_path, 0) for hop, task in lab.CELLS}
    assert needed <= {*map(tuple, adapters)} and {seed for name, *_, seed in adapters if name == 'zoo/old'} == {*lab.SEEDS} and {seed for name, *_, seed in adapters if name != 'zoo/old'} == {0}
    models = [name for make, name, *_ in lab.shared(tmp_path) if make is lab.base]
    assert sorted(models) == sorted({name for pair in lab.HOPS.values() for name in pair})

def test_what_is_retrained_is_a_specialist_of_the_new_model(monkeypatch, tmp_path):
    "One training serves both, and is known with its losses and its cost; one that was broken off is made again"
    monkeypatch.setattr(lab, 'LONG', (3, 3e-3))
    made, really = [], lab.finetune
    monkeypatch.setattr(lab, 'finetune', lambda *args, **how: made.append(how) or really(*args, **how))
    def broken_off(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(lab.Adapter, 'save', broken_off)
        with pytest.raises(KeyboardInterrupt): lab.specialist('zoo/new', 'questions', tmp_path, 1)
    cell = lab.Cell('new', 'questions', tmp_path)
    kept = lab.specialist('zoo/new', 'questions', tmp_path, 1)
    adapter, learned = lab.learn(cell, lab.WAYS['lora-all'], *lab.LONG, 1)
    assert len(made) == 2 and len(learned) == 3 and learned.seconds > 0 and learned.trained == 184320
    fresh, run = really(cell.new, cell.data['train'], steps=3, lr=3e-3, rank=lab.RANK, seed=1)
    assert [*learned] == [*run]
    for at, pair in fresh.updates.items():
        for other in (adapter, kept): assert all(torch.equal(x, y) for x, y in zip(other.updates[at], pair, strict=True))
    lab.learn(cell, lab.WAYS['lora-all'], 2, 3e-3, 1)
    (tmp_path/'zoo-new-questions-1.json').unlink() # as earlier versions left it
    assert [*lab.trained('zoo/new', 'questions', tmp_path, 1)[1]] == [*run]
    assert len(made) == 4 and sorted(p.name for p in tmp_path.iterdir()) == ['zoo-new-questions-1', 'zoo-new-questions-1.json']

def test_all_cells_are_gone_each_after_the_one_that_it_is_like(monkeypatch, tmp_path):
    order = []
    class Here(lab.ProcessPoolExecutor):
        "Does the work at once"
        def __init__(self, *args, **kwargs): pass
        def submit(self, f, *what):
            done = Future()
            done.set_result(f(*what))
            return done
        def shutdown(self, *args, **kwargs): pass
    def work(hop, task, place):
        order.append((hop, task))
        (place/'runs').mkdir(exist_ok=True)
        (place/'runs'/f'{hop}-{task}.jsonl').write_text(json.dumps(dict(hop=hop, task=task)))
    monkeypatch.setattr(lab, 'ProcessPoolExecutor', Here)
    monkeypatch.setattr(lab, 'shared', lambda place: [])
    monkeypatch.setattr(lab, 'work', work)
    monkeypatch.setattr(lab, 'RESULTS', tmp_path/'lab.json')
    lab.experiments(tmp_path)
    assert sorted(order) == sorted(lab.CELLS) and all(order.index((lab.LIKE[h], t)) < order.index((h, t)) for h, t in lab.CELLS if h in lab.LIKE)
    assert [(r['hop'], r['task']) for r in json.loads((tmp_path/'lab.json').read_text())['runs']] == lab.CELLS

def test_hops_are_as_far_as_they_say(tmp_path):
    drift = {hop: lab.Cell(hop, 'labels', tmp_path).drift for hop in ('itself', 'stranger', 'new', 'far', 'far_back')}
    assert drift['itself'] == 0 and drift['stranger'] is None
    assert .1 < drift['new'] < drift['far'] < .4 and drift['far_back'] == pytest.approx(drift['far'], rel=.1)

def test_the_demo_has_recorded_every_run():
    from lorasuite.demo import ARMS, runs, sweep, village
    for hop in ('new', 'far', 'stranger'):
        planned = []
        sweep(village(hop), lambda name, way, *how: planned.append((name, *how)), runs(hop))
        assert sorted(tuple(r[k] for k in lab.RUN) for r in runs(hop) if r['way'] != 'signs') == sorted(planned)
        assert {r['way'] for r in runs(hop)} == {'signs'} | {name for name, way in ARMS.items() if way and way.trained}
