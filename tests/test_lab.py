"""The laboratory: what it plans, how it chooses, what it keeps, and that it goes on where it was interrupted"""
import json, random
from concurrent.futures import Future
import pytest, torch
from lorasuite.core.files import data_dir
from lorasuite.lab import budgets, demo, experiments, recipes, starts, store, upgrades
from lorasuite.lab.experiments import EXPERIMENTS, MAIN_UPGRADE, plan, SETTINGS_FROM, TUNED_ON, TUNED_UPGRADES
from lorasuite.lab.recipes import Experiment, Method, METHODS, RUN_KEY, run_method
from lorasuite.lab.search import best_setting, EQUAL, grid, method_search, RATES, SEEDS, STEPS, try_settings
from lorasuite.lab.store import read_records, RESULTS, RunLog, select_runs
from lorasuite.lab.upgrades import SPECIALIST_SETTING, UPGRADES

TRAINED = {name: method for name, method in METHODS.items() if method.trained}

def setting_of(row): return row['steps'], row['lr']

def settings(rows, **columns):
    "The settings of some of the runs, in order"
    return [setting_of(row) for row in select_runs(rows, **columns)]

def pretended(experiment, score, others=None):
    "The plan of an experiment whose runs are not made: `score` is their accuracy"
    rows = []
    def do(name, method, *how): rows.append(dict(zip(RUN_KEY, (name, *how))) | dict(accuracy=score(name, *how)))
    plan(experiment, do, rows, rows if others is None else others)
    return rows

@pytest.fixture
def no_starts(monkeypatch):
    "Nothing is aligned or transferred"
    recipes.start_adapter.cache_clear()
    nothing = dict.fromkeys(recipes.START_ADAPTERS, lambda experiment, seed: None)
    monkeypatch.setattr(recipes, 'START_ADAPTERS', nothing)
    monkeypatch.setattr(recipes, 'ALIGNED_STARTS', ())
    yield
    recipes.start_adapter.cache_clear()

# ---- the plan

def test_every_method_is_tuned_before_it_is_tested(no_starts, tmp_path):
    best = {name: random.Random(name).choice(grid(method)) for name, method in TRAINED.items()}
    def score(name, split, steps, lr, seed): return float((steps, lr) == best.get(name))
    rows = pretended(Experiment(MAIN_UPGRADE, 'questions', tmp_path), score)
    for name, setting in best.items():
        tried = settings(rows, way=name, split='validation')
        enough = METHODS[name].start and setting[0] # no longer one is needed
        assert tried == [s for s in grid(METHODS[name]) if not enough or s[0] <= enough]
        assert settings(rows, way=name, split='test') == [setting]*len(SEEDS)
        splits = [row['split'] for row in select_runs(rows, way=name)]
        assert splits == sorted(splits, reverse=True)
    validation, test = ({row['seed'] for row in select_runs(rows, split=split)} for split in ('validation', 'test'))
    assert not validation & test

def test_zero_steps_are_in_the_grid_of_every_start():
    for name, method in METHODS.items():
        if method.few: assert ((0, 0.) in grid(method)) == bool(method.start), name

def test_what_is_retrained_is_trained_as_long_as_a_specialist():
    "And a hundred labels are not learned longer than a teacher's answers, whatever they start from"
    last = {name: grid(method)[-1] for name, method in TRAINED.items()}
    assert last['lora-all'] == SPECIALIST_SETTING and max(last.values()) == SPECIALIST_SETTING
    assert {steps for name, (steps, _) in last.items() if METHODS[name].few} == {STEPS[1]}
    assert last['refresh'] == last['refitted+refresh'] == last['union']

def test_the_curve_uses_the_settings_of_its_neighbours(no_starts, tmp_path):
    experiment = Experiment(MAIN_UPGRADE, 'labels', tmp_path)
    rows = pretended(experiment, lambda name, split, steps, lr, seed: 10*lr)
    def setting(name): return {*settings(rows, way=name, split='test')}
    assert setting('lora-10') == setting('lora-30') == setting('lora-100') == {(STEPS[0], RATES[-1])}
    assert setting('refresh-100') == setting('lora-100') != setting('refresh') == {(STEPS[0], RATES[4])}
    assert setting('refitted+refresh-100') == setting('refitted+refresh')
    assert setting('refitted+300') == setting('refitted+all') != setting('lora-300') == setting('lora-all')
    assert len(select_runs(rows, way='lora-300')) == 3

def taken_over(upgrade, others, place):
    "What an upgrade plans for its trained methods, with the runs of another one"
    rows = pretended(Experiment(upgrade, 'labels', place), lambda *how: .5, others)
    return [row for row in rows if row['way'] not in METHODS or METHODS[row['way']].trained]

OTHER = [dict(way=name, split='validation', steps=7, lr=.5, accuracy=.5) for name in METHODS] # runs of another upgrade
LONGER = [(7, .5)] + [(n, RATES[3]) for n in STEPS]
STARTED = {'refitted+100', 'refitted+refresh'}

@pytest.mark.parametrize('upgrade, names', dict(
    back=STARTED | {'lora-100', 'lora-all'}, far_back=STARTED, strange_back=STARTED, short=set(), itself=set(),
    enlarged=set()).items())
def test_other_upgrades_take_the_settings_of_the_main_one(no_starts, tmp_path, upgrade, names):
    rows = taken_over(upgrade, OTHER, tmp_path)
    tested = select_runs(rows, split='test')
    assert {row['way'] for row in tested} == names and len(tested) == len(names)*len(SEEDS)
    for name in names:
        assert settings(rows, way=name, split='validation') == ([] if METHODS[name].few else LONGER)
        assert {*settings(tested, way=name)} == {LONGER[-1] if name == 'lora-all' else (7, .5)}

@pytest.mark.parametrize('upgrade', TUNED_UPGRADES)
def test_some_upgrades_have_settings_of_their_own(no_starts, tmp_path, upgrade):
    rows = taken_over(upgrade, OTHER, tmp_path)
    for name in {row['way'] for row in rows} & {*METHODS}:
        own = upgrade in TUNED_ON.get(name, TUNED_UPGRADES)
        assert settings(rows, way=name, split='validation') == (grid(METHODS[name]) if own else LONGER), name

def test_nothing_is_tried_where_no_training_is_longer():
    assert experiments.lengthened(SPECIALIST_SETTING) == experiments.lengthened((STEPS[-1], RATES[3])) == []
    assert experiments.lengthened((400, 1e-3)) == [(400, 1e-3), (800, RATES[3])]

def test_upgrades_between_unrelated_models_have_settings_of_their_kind(monkeypatch, tmp_path):
    asked = {}
    def record(experiment, file, plan): plan(experiment, None, ['mine'])
    monkeypatch.setattr(experiments, 'record_experiment', record)
    monkeypatch.setattr(experiments, 'plan', lambda e, do, rows, others: asked.update({e.upgrade: others}))
    monkeypatch.setattr(experiments, 'read_records', lambda file: dict(runs=file.name))
    for upgrade in UPGRADES: experiments.run_experiment(upgrade, 'sums', tmp_path)
    expected = {upgrade: f'{MAIN_UPGRADE}-sums.jsonl' for upgrade in UPGRADES}
    assert asked == expected | {MAIN_UPGRADE: ['mine'], 'strange_back': 'stranger-sums.jsonl'}

# ---- the search

def trial(steps, lr, accuracy, split='validation', **more):
    return dict(way='m', split=split, steps=steps, lr=lr, accuracy=accuracy) | more

def best(*rows, start='carried'): return best_setting(method_search('m', Method(start, 100)), rows)

def test_the_gentlest_of_equal_settings_is_chosen():
    assert best(trial(160, 1e-3, .5), trial(160, 1e-4, .5), trial(0, 0., .4)) == (160, 1e-4)
    assert best(trial(160, 1e-3, .5), trial(0, 0., .495)) == (0, 0.)
    assert best(trial(160, 1e-3, .9), trial(160, 1e-3, .1), trial(0, 0., .6)) == (0, 0.)
    assert best(trial(160, 1e-3, .9, 'test'), trial(0, 0., .1)) == (0, 0.)

def test_of_a_fresh_lora_the_boldest_is_chosen():
    "It has nothing to lose"
    for accuracy in (.49, .5): assert best(trial(160, 1e-3, .5), trial(160, 1e-4, accuracy), start=None) == (160, 1e-3)
    assert best(trial(160, 1e-3, .5), trial(400, 1e-4, .49), start=None) == (400, 1e-4)
    assert best(trial(160, 1e-3, .5), trial(400, 1e-4, .4), start=None) == (160, 1e-3)

def test_without_a_tolerance_the_highest_mean_wins():
    rows = [trial(160, 1e-3, .5), trial(160, 1e-4, .499), trial(0, 0., .5)]
    for start, setting in (('carried', (0, 0.)), (None, (160, 1e-3))):
        assert best_setting(method_search('m', Method(start, 100), equal=0), rows) == setting

@pytest.mark.parametrize('name', ['refresh', 'refitted+refresh', 'lora-all', 'lora-100', 'refitted+100'])
def test_a_longer_training_of_a_start_is_tried_only_where_it_can_gain(name):
    "And a laboratory that goes on with longer ones already recorded tries the same; a fresh LoRA tries all"
    method, tuning = METHODS[name], method_search(name, METHODS[name], grid(METHODS[name]))
    def tried(accuracy, recorded=()):
        rows, made = [*recorded], []
        def go(split, steps, lr, seed):
            made.append((steps, lr))
            rows.append(trial(steps, lr, accuracy(steps, lr), split, way=name))
        try_settings(tuning, go, rows)
        return made, rows
    all_of_them = grid(method)
    short, last = [s for s in all_of_them if s[0] in (0, STEPS[0])], all_of_them[-1][0]
    assert tried(lambda steps, lr: .5)[0] == all_of_them != short
    assert tried(lambda steps, lr: float((steps, lr) == short[1]))[0] == (short if method.start else all_of_them)
    assert tried(lambda steps, lr: 0. if steps else 1.)[0] == all_of_them # zero steps are no training
    enough = tried(lambda steps, lr: 1 - EQUAL if steps == all_of_them[-2][0] else 0.)[0]
    assert enough == (all_of_them[:-1] if method.start else all_of_them)
    made, rows = tried(lambda steps, lr: steps/last)
    assert made == all_of_them == tried(lambda steps, lr: steps/last, rows)[0]

# ---- one search picks what every record has

def settings_tested(rows, tuning):
    "The settings of the recorded test runs of a search"
    runs = select_runs(rows, split='test', **tuning.runs)
    return {tuple(run[column] for column in tuning.columns) for run in runs}

@pytest.mark.parametrize('upgrade, task', EXPERIMENTS)
def test_the_search_picks_what_the_experiments_tested(upgrade, task):
    recorded = read_records(RESULTS)['runs']
    mine = select_runs(recorded, hop=upgrade, task=task)
    others = select_runs(recorded, hop=SETTINGS_FROM.get(upgrade, upgrade), task=task)
    names = {row['way'] for row in mine} & {*TRAINED}
    assert names or not {row['steps'] for row in mine if row['way'] != 'signs'} - {0}
    for name in names:
        tuning = method_search(name, METHODS[name])
        own = bool(select_runs(mine, way=name, split='validation'))
        assert settings_tested(mine, tuning) == {best_setting(tuning, mine if own else others)}, name

def test_the_search_picks_what_the_budgets_tested():
    recorded = read_records(budgets.BUDGET_RECORDS)['runs']
    for job in budgets.BUDGET_JOBS + budgets.TUNING_JOBS:
        tuning = budgets.job_search(job)
        assert settings_tested(recorded, tuning) == {best_setting(tuning, recorded)}, job

def test_the_search_picks_what_the_starts_tested():
    recorded = read_records(starts.START_RECORDS)['runs']
    for task in ('labels', 'questions'):
        for start in starts.LORA_STARTS:
            tuning = starts.start_search(task, start)
            assert settings_tested(recorded, tuning) == {best_setting(tuning, recorded)}, (task, start)

@pytest.mark.parametrize('upgrade, chosen', dict(
    new={'lora-100': (160, .003), 'carried+100': (160, .0001), 'lora-all': (400, .003)},
    far={'lora-100': (160, .003), 'carried+100': (160, .001), 'lora-all': (400, .001)},
    stranger={'lora-100': (160, .003), 'carried+100': (160, .003), 'lora-all': (1200, .003)}).items())
def test_the_demo_has_recorded_every_run_and_chooses_the_same_settings(upgrade, chosen):
    planned, kept = [], demo.demo_runs(upgrade)
    demo.demo_plan(demo.tiny_upgrade(upgrade), lambda name, method, *how: planned.append((name, *how)), kept)
    assert sorted(tuple(row[k] for k in RUN_KEY) for row in kept if row['way'] != 'signs') == sorted(planned)
    trained = {name for name, method in demo.DEMO_METHODS.items() if method and method.trained}
    assert {row['way'] for row in kept} == {'signs'} | trained
    assert {name: demo.chosen_setting(upgrade, name) for name in chosen} == chosen
    for name in (name for name in trained if demo.is_precomputed(upgrade, name)):
        assert settings_tested(kept, demo.demo_search(name)) == {demo.chosen_setting(upgrade, name)}, name

# ---- the store

def test_runs_that_are_kept_are_not_made_again(tmp_path):
    made, file = [], tmp_path/'deep'/'runs.jsonl'
    def make(lr): return made.append(lr) or dict(lr=lr, accuracy=.5)
    def broken(): raise KeyboardInterrupt
    log = RunLog(file, ('lr',), 'a test')
    log.add((.1,), lambda: make(.1))
    with pytest.raises(KeyboardInterrupt): log.add((.2,), broken)
    again = RunLog(file, ('lr',), 'another test')
    for lr in (.1, .2): again.add((lr,), lambda: make(lr))
    assert made == [.1, .2] and [row['lr'] for row in again.rows] == [.1, .2]
    assert read_records(file)['runs'] == again.rows and read_records(file)['command'] == 'a test'

def test_results_are_kept_with_what_made_them(tmp_path):
    rows = [dict(hop=hop, accuracy=.5) for hop in 'ab']
    store.collect(rows, tmp_path/'lab.json', 'make experiments')
    kept = read_records(tmp_path/'lab.json')
    assert kept['command'] == 'make experiments' and kept['runs'] == rows
    assert kept['versions'].keys() == {*store.PACKAGES}
    assert [path.name for path in tmp_path.iterdir()] == ['lab.json']

@pytest.mark.parametrize('file', [RESULTS, budgets.BUDGET_RECORDS], ids=lambda file: file.name)
def test_a_record_is_collected_as_it_was(file, tmp_path, monkeypatch):
    "The format on the disk stays, to the byte"
    kept = read_records(file)
    monkeypatch.setattr(store, 'provenance', lambda command: {k: v for k, v in kept.items() if k != 'runs'})
    store.collect(kept['runs'], tmp_path/file.name, kept['command'])
    assert (tmp_path/file.name).read_bytes() == file.read_bytes()

@pytest.mark.parametrize('file', sorted((data_dir()/'zoo').glob('runs-*.jsonl')), ids=lambda file: file.name)
def test_a_log_is_written_as_it_was(file, tmp_path):
    log = RunLog(tmp_path/file.name, RUN_KEY)
    for row in read_records(file)['runs']: log.add(tuple(row[k] for k in RUN_KEY), lambda: row)
    assert (tmp_path/file.name).read_bytes() == file.read_bytes()

# ---- interrupted, and all at once

def test_an_interrupted_experiment_goes_on(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(experiments, 'METHODS', {name: METHODS[name] for name in ('base', 'carried', 'lora-100')})
    monkeypatch.setattr(experiments, 'grid', lambda *_: [(1, 1e-3)])
    monkeypatch.setattr(experiments, 'SEEDS', range(1))
    really = experiments.run_and_score
    def run(*args):
        if len(made) == 2: raise KeyboardInterrupt
        made.append(args[1:])
        return really(*args)
    monkeypatch.setattr(experiments, 'run_and_score', run)
    (tmp_path/'runs').mkdir()
    experiments.experiment_file(tmp_path, MAIN_UPGRADE, 'questions').write_text('')
    with pytest.raises(KeyboardInterrupt): experiments.run_experiment('new', 'questions', tmp_path)
    file = experiments.experiment_file(tmp_path, 'new', 'questions')
    kept = file.read_text()
    assert [row['way'] for row in read_records(file)['runs']] == ['signs', 'base', 'carried']
    made.append(None)
    experiments.run_experiment('new', 'questions', tmp_path)
    rows = read_records(file)['runs']
    assert file.read_text().startswith(kept) and len(made) == 5
    assert [row['way'] for row in rows] == ['signs', 'base', 'carried', 'lora-100', 'lora-100']
    signs = rows[0]
    assert .1 < signs['drift'] < .25 and signs['r2'] > .99
    assert signs['agreement_carried'] > .85 > .2 > signs['agreement_base']
    assert rows[2]['accuracy'] > .85 and rows[2]['before'] > 0 and rows[3]['trained'] == 184320 and rows[4]['losses']

def test_specialists_are_made_once_for_all_experiments(tmp_path):
    parts = experiments.shared_parts(tmp_path)
    adapters = [tuple(what) for make, *what in parts if make is upgrades.specialist]
    assert len(adapters) == len({*adapters})
    assert {(UPGRADES[upgrade][0], task, tmp_path, 0) for upgrade, task in EXPERIMENTS} <= {*adapters}
    assert {seed for name, *_, seed in adapters if name == 'zoo/old'} == {*SEEDS}
    assert {seed for name, *_, seed in adapters if name != 'zoo/old'} == {0}
    models = [name for make, name, *_ in parts if make is upgrades.base_model]
    assert sorted(models) == sorted({name for pair in UPGRADES.values() for name in pair})

def test_what_is_retrained_is_a_specialist_of_the_new_model(monkeypatch, tmp_path):
    "One training serves both, and is known with its losses and its cost; one that was broken off is made again"
    short = (3, 3e-3)
    for module in (upgrades, recipes): monkeypatch.setattr(module, 'SPECIALIST_SETTING', short)
    made, really = [], upgrades.finetune
    def finetune(*args, **how): return made.append(how) or really(*args, **how)
    for module in (upgrades, recipes): monkeypatch.setattr(module, 'finetune', finetune)
    def broken_off(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(upgrades.Adapter, 'save', broken_off)
        with pytest.raises(KeyboardInterrupt): upgrades.specialist('zoo/new', 'questions', tmp_path, 1)
    experiment = Experiment('new', 'questions', tmp_path)
    kept = upgrades.specialist('zoo/new', 'questions', tmp_path, 1)
    adapter, training = run_method(experiment, METHODS['lora-all'], *short, 1)
    assert len(made) == 2 and len(training) == 3 and training.seconds > 0 and training.trained == 184320
    fresh, run = really(experiment.new, experiment.data['train'], steps=3, lr=3e-3, rank=upgrades.RANK, seed=1)
    assert [*training] == [*run]
    for path, pair in fresh.updates.items():
        for other in (adapter, kept):
            assert all(torch.equal(x, y) for x, y in zip(other.updates[path], pair, strict=True))
    run_method(experiment, METHODS['lora-all'], 2, 3e-3, 1)
    (tmp_path/'zoo-new-questions-1.json').unlink() # as earlier versions left it
    assert [*upgrades.train_specialist('zoo/new', 'questions', tmp_path, 1)[1]] == [*run]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) == 4 and names == ['zoo-new-questions-1', 'zoo-new-questions-1.json']

class Here:
    "A pool that does the work at once"
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def shutdown(self, **kwargs): pass
    def submit(self, f, *what):
        done = Future()
        done.set_result(f(*what))
        return done

def test_all_experiments_run_each_after_the_one_that_it_takes_settings_from(monkeypatch, tmp_path):
    order, calibrated = [], []
    def run_experiment(upgrade, task, place):
        order.append((upgrade, task))
        file = experiments.experiment_file(place, upgrade, task)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dict(hop=upgrade, task=task)))
    monkeypatch.setattr(experiments, 'ProcessPoolExecutor', Here)
    monkeypatch.setattr(experiments, 'shared_parts', lambda place: [])
    monkeypatch.setattr(experiments, 'run_experiment', run_experiment)
    monkeypatch.setattr(experiments, 'RESULTS', tmp_path/'lab.json')
    monkeypatch.setattr('lorasuite.lab.results.write_calibration', lambda: calibrated.append(len(order)))
    experiments.experiments(tmp_path)
    assert sorted(order) == sorted(EXPERIMENTS) and calibrated == [len(EXPERIMENTS)]
    for upgrade, task in EXPERIMENTS:
        if upgrade in SETTINGS_FROM: assert order.index((SETTINGS_FROM[upgrade], task)) < order.index((upgrade, task))
    assert [(row['hop'], row['task']) for row in read_records(tmp_path/'lab.json')['runs']] == EXPERIMENTS

def test_upgrades_are_as_far_as_they_say(tmp_path):
    names = ('itself', 'stranger', 'new', 'far', 'far_back')
    drift = {upgrade: Experiment(upgrade, 'labels', tmp_path).drift for upgrade in names}
    assert drift['itself'] == 0 and drift['stranger'] is None
    assert .1 < drift['new'] < drift['far'] < .4 and drift['far_back'] == pytest.approx(drift['far'], rel=.1)

def test_the_start_of_a_method_is_made_once(monkeypatch, tmp_path):
    made = []
    monkeypatch.setitem(recipes.START_ADAPTERS, 'copy', lambda experiment, seed: made.append(seed))
    experiment = Experiment('new', 'questions', tmp_path)
    for _ in range(2): run_method(experiment, METHODS['copy'], 0, 0., 3)
    assert not experiment.copies and made == [0] # it depends on no seed
