"Every figure in README.md is one that was recorded, or is measured here"
import json, re
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
from safetensors import safe_open

from lorasuite import align, evaluate, load_model, transfer
from lorasuite.core.files import data_dir
from lorasuite.core.adapter import Adapter
from lorasuite.training.examples import load_data

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')
TASKS = 'labels', 'sums' # facts, skill
TINY = {
    'new model alone': 'base', 'published formula': 'paper',
    'published formula between our layers and heads, at our norm': 'rescaled', 'carried': 'carried',
    'fresh LoRA 100': 'lora-100', 'published formula + light fine-tuning': 'paper+100',
    'refitted + light fine-tuning': 'refitted+100', 'refresh (distillation from the old model)': 'refresh',
    'refitted + refresh': 'refitted+refresh', 'fresh LoRA all': 'lora-all'}
REAL = 'enlarged', 'gentle', 'harsh'
REAL_ROWS = { # of the real model
    'new model alone': 'base', 'published formula': 'paper',
    'published formula between our layers and heads, at our norm': 'rescaled', 'carried': 'carried',
    'carried, 8 ranks of the drift taken back': 'drift', 'carried, 64 ranks of the drift taken back': 'drift-64',
    'fresh LoRA 100': 'lora-100', 'published formula + light fine-tuning': 'paper+100',
    'carried + light fine-tuning': 'carried+100', 'carried + refresh': 'carried+refresh', 'fresh LoRA all': 'lora-all'}

@cache
def recorded(file): return json.loads((ROOT/file).read_text(encoding='utf-8'))['runs']

def found(file, upgrade, task, method):
    "Accuracies on the test questions, one a draw"
    key = upgrade, task, method, 'test'
    return [r['accuracy'] for r in recorded(file) if (r['hop'], r['task'], r['way'], r['split']) == key]

def percent(accuracies): return f'{100*mean(accuracies):.1f}'

def lab(upgrade, task, method): return percent(found('lorasuite/data/lab.json', upgrade, task, method))

def real(upgrade, method):
    "The recorded accuracy on the real model; nothing where the method was not tried"
    accuracies = found('lorasuite/data/hop.json', upgrade, 'additions', method)
    return percent(accuracies) if accuracies else ''

def old_specialist(file, upgrade, task):
    key = upgrade, task, 'signs'
    row = next(r for r in recorded(file) if (r['hop'], r['task'], r['way']) == key)
    return f'{100*row["old"]:.1f}'

def table(heading):
    "The rows of the table below `heading`: name of the method, and of a fresh LoRA its labels: the figures"
    lines = README.split(heading, 1)[1].split('| method |', 1)[1].split('\n\n')[0].splitlines()[2:]
    rows = [[cell.strip(' *') for cell in line.strip('|').split('|')] for line in lines]
    return {f'{name} {labels}' if name == 'fresh LoRA' else name: figures for name, labels, *figures in rows}

def test_the_tiny_models():
    rows = table('**Tiny models.**')
    file = 'lorasuite/data/lab.json'
    assert rows.pop('old model with its adapter') == [old_specialist(file, 'far', task) for task in TASKS]
    assert rows == {name: [lab('far', task, method) for task in TASKS] for name, method in TINY.items()}

def test_the_real_model():
    rows = table('**One real model.**')
    file = 'lorasuite/data/hop.json'
    assert rows.pop('old model with its adapter') == [old_specialist(file, u, 'additions') for u in REAL]
    assert rows == {name: [real(upgrade, method) for upgrade in REAL] for name, method in REAL_ROWS.items()}

MINUTES = { # row: way, questions or labels, steps
    'old model with its adapter': ('specialist', 0, 0), 'carried': ('carried', 0, 0),
    'drift taken back': ('drift', 0, 0), 'carried, refreshed for 20 steps': ('refreshed', 64, 20),
    'drift taken back, refreshed for 20 steps': ('drift refreshed', 64, 20),
    'carried, refreshed in rounds': ('rounds', 300, 0), 'fresh LoRA on labels': ('labels', 100, None)}

def minutes(pair, row):
    "Accuracy in percent and CPU seconds of a way, as the README has them"
    way, questions, steps = MINUTES[row]
    runs = [r for r in recorded('lorasuite/data/minutes.json') if (r['pair'], r['way'], r['split'], r['questions']) ==
            (pair, way, 'test', questions) and steps in (None, r['steps'])]
    seconds = mean(r['before'] + r['seconds'] for r in runs)
    return [percent([r['accuracy'] for r in runs]), '' if way in ('specialist', 'carried') else f'{seconds:.0f}']

def test_what_to_do_first():
    lines = README.split('**What to do first.**', 1)[1].split('| way |', 1)[1].split('\n\n')[0].splitlines()[2:]
    rows = [[cell.strip(' *') for cell in line.strip('|').split('|')] for line in lines]
    assert [name for name, *_ in rows] == [*MINUTES]
    for name, asked, *figures in rows:
        assert asked == str(MINUTES[name][1] or '–') and figures == minutes('new-far', name) + minutes('gentle', name)
    old, carried, mended = (float(minutes('gentle', row)[0]) for row in [*MINUTES][:3])
    assert mended > .95*old > carried # nearly all of the skill

def gain(task):
    "How far ours is above the published pipeline, both tuned on a hundred labels"
    means = [mean(found('lorasuite/data/lab.json', 'far', task, m)) for m in ('refitted+100', 'paper+100')]
    return f'{100*(means[0] - means[1]):.1f}'

def test_sentences():
    said = re.sub(r'\s+', ' ', README)
    assert f'ours is better by {gain("labels")} points on facts and {gain("sums")} points on the skill' in said
    leads = [mean(found('lorasuite/data/lab.json', 'far', task, 'refitted+refresh'))
             - mean(found('lorasuite/data/lab.json', 'far', task, 'refresh')) for task in TASKS]
    assert f'comes within {100*leads[0]:.1f} (facts) and {100*leads[1]:.1f} points (skill)' in said
    tuned = [r for r in recorded('lorasuite/data/lab.json')
             if (r['hop'], r['task'], r['way'], r['split']) == ('far', 'labels', 'refitted+100', 'test')]
    assert {r['steps'] for r in tuned} == {0} # validation chose not to train
    facts, skill = (lab('stranger', task, 'carried') for task in TASKS)
    assert f'answers {facts}% of the facts and {skill}% of the skill' in said
    facts, skill = (lab('stranger', task, 'refresh') for task in TASKS)
    assert f'there it reaches {facts}% and {skill}%' in said
    carried, refitted = (lab('back', 'sums', method) for method in ('carried', 'refitted'))
    assert f'{carried}% of the skill arrive, {refitted}% after a refit' in said
    assert f'± {196*(.6*.4/200)**.5:.0f} points' in said
    drift = next(r['drift'] for r in recorded('lorasuite/data/lab.json') if (r['hop'], r['way']) == ('far', 'signs'))
    assert f'their weights had moved by {drift:.0%}'.replace('their', 'its') in said

def test_what_is_said_of_ranks_is_so():
    "The order of methods, as the text tells it"
    tiny = {(task, m): float(lab('far', task, m)) for task in TASKS for m in TINY.values()}
    for task in TASKS:
        assert tiny[task, 'paper+100'] > tiny[task, 'lora-100'] and tiny[task, 'refitted+100'] > tiny[task, 'paper+100']
        assert max(tiny[task, m] for m in TINY.values()) == tiny[task, 'lora-all']
    upgrades = {r['hop'] for r in recorded('lorasuite/data/lab.json')}
    assert 'itself' in upgrades and len(upgrades) == 11 and 'on ten upgrades of tiny models' in README
    real = {(u, m): mean(xs) for u in REAL for m in REAL_ROWS.values()
            if (xs := found('lorasuite/data/hop.json', u, 'additions', m))}
    assert max(real, key=real.get) == ('gentle', 'lora-all')
    assert 0 < real['gentle', 'lora-all'] - real['gentle', 'carried+100'] < 1.96*(2*.9*.1/200)**.5
    old = float(old_specialist('lorasuite/data/hop.json', 'gentle', 'additions'))/100
    assert real['enlarged', 'carried'] == old > .62*old > real['gentle', 'carried'] > .55*old
    assert real['harsh', 'carried'] == 0 and min(real[u, 'drift-64'] for u in REAL) > .95*old
    assert abs(real['gentle', 'carried+100'] - real['gentle', 'paper+100']) < .02
    assert abs(real['gentle', 'carried+100'] - real['gentle', 'drift-64']) < .02

def parameters(name):
    "The number of parameters of a shipped model"
    with safe_open(data_dir()/'zoo'/name/'model.safetensors', 'pt') as file:
        sizes = [file.get_slice(key).get_shape() for key in file.keys()]
    return sum(shape[0]*(shape[1] if len(shape) > 1 else 1) for shape in sizes)

def test_sizes():
    old, new = (f'{parameters(name)/1e6:.2f}M' for name in ('old', 'new-far'))
    assert f'{old} and {new} parameters' in README
    assert f'the new model ({new} parameters) is an enlargement of the old one ({old})' in README

def test_the_demo():
    "What the first page promises, by the calls that it shows"
    test = load_data(data_dir()/'zoo'/'test.jsonl')
    old, new = load_model('zoo/old'), load_model('zoo/new')
    before = f'{100*evaluate(old, test, Adapter.load("zoo/adapter")).accuracy:.1f}'
    base = f'{100*evaluate(new, test).accuracy:.1f}'
    carried = f'{100*evaluate(new, test, transfer("zoo/adapter", align(old, new))).accuracy:.1f}'
    assert f'answers {before}% of {len(test)} test questions' in README
    assert f'without an adapter {base}%' in README and f'carried adapter **{carried}%**' in README

@pytest.mark.parametrize('link', sorted({x for x in re.findall(r'\]\(([^)#\s]+)', README) if '://' not in x}))
def test_links(link): assert (ROOT/link).exists()
