"""The command line, end to end, on the models that the package ships"""
import json, subprocess, sys, time
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner
from lorasuite.core.architecture import ROLES
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.lab.demo import ARMS
from lorasuite.cli import app

ZOO = data_dir()/'zoo'

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def report(*args):
    "The JSON object that a command prints, which must be all that it prints on stdout"
    result = run(*args, '--json')
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)

@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('cli')

@pytest.fixture(scope='module')
def hundred(work):
    (work/'hundred.jsonl').write_text(''.join((ZOO/'train.jsonl').read_text().splitlines(keepends=True)[:100]))
    return work/'hundred.jsonl'

@pytest.fixture(scope='module')
def alignment(work):
    said = report('align', 'zoo/old', 'zoo/new', '-o', work/'alignment')
    assert len(said['layers']) == 4 and said['fit']['shared'] == 512
    return work/'alignment'

@pytest.fixture(scope='module')
def carried(work, alignment):
    report('transfer', 'zoo/adapter', alignment, '-o', work/'carried')
    return work/'carried'

def test_demo(tmp_path):
    begin = time.perf_counter()
    done = subprocess.run([Path(sys.executable).with_name('lorasuite'), 'demo', '-o', tmp_path/'demo'], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    arms = {a['arm']: a for a in json.loads((tmp_path/'demo'/'results.json').read_text())['arms']}
    assert [*arms] == [*ARMS] and all(name in done.stdout for name in ARMS)
    for a in arms.values(): assert {'arm', 'accuracy', 'seconds', 'labelled_examples', 'trainable_parameters'} <= a.keys()
    assert {p.name for p in (tmp_path/'demo').glob('*.png')} == {'cka.png', 'head_map.png', 'transfer_matrix.png', 'finetuning.png', 'arms.png'}
    gain = lambda name: (arms[name]['accuracy'] - arms['base']['accuracy'])/(arms['lora-all']['accuracy'] - arms['base']['accuracy'])
    assert gain('carried+100') >= gain('carried') >= .9
    assert .3 <= gain('lora-100') <= .7
    assert max(arms[a]['accuracy'] for a in ('paper', 'random')) < arms['carried']['accuracy']/2
    assert seconds < 240, f'{seconds:.0f} s: twice what the demo may take on two free cores'
    loads(tmp_path/'demo'/'adapter')

def loads(path):
    "PEFT must find exactly the file's tensors on `zoo/new`"
    new = load_model('zoo/new')
    model = PeftModel.from_pretrained(new.model, str(path))
    wanted = {k.replace('.default', '') for k in model.state_dict() if 'lora_' in k}
    assert wanted == set(load_file(path/'adapter_model.safetensors'))

def test_upgrade_is_align_and_transfer(work, carried):
    report('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '-o', work/'upgraded')
    a, b = (load_file(p/'adapter_model.safetensors') for p in (work/'upgraded', carried))
    assert a.keys() == b.keys() and all((a[k] - b[k]).norm() <= 1e-3*b[k].norm() for k in a)
    loads(carried)

def test_questions_refit_what_is_carried(work):
    asked = work/'asked.jsonl'
    asked.write_text(''.join(json.dumps(dict(instruction=json.loads(l)['instruction'])) + '\n' for l in (ZOO/'test.jsonl').read_text().splitlines()[:240]))
    report('align', 'zoo/old', 'zoo/new-far', '-o', work/'far') # what drifted this far can be mended a little
    report('transfer', 'zoo/adapter', work/'far', '-o', work/'far-carried')
    report('transfer', 'zoo/adapter', work/'far', '-o', work/'refitted', '--inputs', asked)
    report('upgrade', 'zoo/old', 'zoo/new-far', 'zoo/adapter', '-o', work/'upgraded-refitted', '--inputs', asked)
    plain, again, at_once = (load_file(work/p/'adapter_model.safetensors') for p in ('far-carried', 'refitted', 'upgraded-refitted'))
    update = lambda w, k: w[k.replace('lora_A', 'lora_B')]@w[k]
    moved = [((update(again, k) - update(plain, k)).norm()/update(plain, k).norm()).item() for k in plain if 'lora_A' in k and update(plain, k).any()]
    assert all(1e-3 < x < 1 for x in moved) and 'refitted on 80 texts' in (work/'refitted'/'README.md').read_text() # chosen by agreement
    assert all((again[k] - at_once[k]).norm() <= 1e-2*again[k].norm() for k in again)

def test_finetune_and_evaluate(work, carried, hundred):
    said = report('finetune', 'zoo/new', carried, '--data', hundred, '-o', work/'tuned', '--steps', 3)
    assert said['steps'] == 3 and not list(work.glob('.tuned*'))
    base, tuned = (report('evaluate', 'zoo/new', '--data', hundred, *a) for a in ([], ['--adapter', work/'tuned']))
    assert tuned['interval'][0] > base['interval'][1]

def test_refresh(work, carried, hundred):
    rows = [json.loads(l) for l in hundred.read_text().splitlines()]
    asked = work/'asked.jsonl'
    asked.write_text(''.join(json.dumps(dict(instruction=r['instruction'])) + '\n' for r in rows))
    few = work/'few.jsonl'
    few.write_text(''.join(json.dumps(r) + '\n' for r in rows[:10]))
    said = report('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', asked, '--start', carried, '--data', few, '-o', work/'refreshed', '--steps', 3)
    assert said['steps'] == 3 and said['inputs'] == said['answered'] == 100 and said['labelled'] == 10 and not list(work.glob('.refreshed*'))
    base, refreshed = (report('evaluate', 'zoo/new', '--data', hundred, *a) for a in ([], ['--adapter', work/'refreshed']))
    assert refreshed['interval'][0] > base['interval'][1]
    assert '90 answers of the old specialist and 10 labelled' in (work/'refreshed'/'README.md').read_text()
    loads(work/'refreshed')

def test_inspect(hundred):
    said = report('inspect', 'zoo/old', 'zoo/new', 'zoo/adapter')
    assert said['sizes']['attention'] == ['MHA', 'GQA'] and said['shared_tokens'] == 512 and not said['notes'] and 'deep' not in said
    assert said['adapter'] == dict(updates=28, ranks=[16], roles={r: 4 for r in ROLES}, layers_without_partner=0, skipped={})
    back = run('inspect', 'zoo/new', 'zoo/old', '--deep')
    assert back.exit_code == 0 and 'note: 2 of 6 old layers will find no partner' in back.stdout and 'layers: 0→0, 1→1, 3→2, 5→3' in back.stdout and 'advice: ' in back.stdout
    deep = report('inspect', 'zoo/old', 'zoo/new', 'zoo/adapter', '--deep', '--inputs', hundred)['deep']
    assert deep['agreement_carried'] > .85 > .2 > deep['agreement_base'] and 'agreement_copy' not in deep
    assert deep['advice']['sign'] == 'agreement' and deep['advice']['keeps'][deep['advice']['recommendation']] > .8

def test_text_output(alignment):
    result = run('evaluate', 'zoo/old', '--data', ZOO/'validation.jsonl', '--adapter', 'zoo/adapter')
    assert result.exit_code == 0 and 'accuracy: ' in result.stdout

def test_bad_input(work, carried, alignment, hundred):
    broken = work/'broken.jsonl'
    broken.write_text('{"instruction": "a", "output"')
    out = work/'out'
    for args, word in [(['transfer', 'zoo/adapter', alignment, '-o', carried], 'exists already'),
                       (['inspect', 'zoo/new', 'zoo/old', 'zoo/adapter'], 'another model'),
                       (['inspect', work/'nowhere', 'zoo/old'], 'nowhere'),
                       (['inspect', 'zoo/old', 'zoo/new', '--deep', '--inputs', hundred], 'give an adapter'),
                       (['transfer', 'zoo/adapter', work/'nowhere', '-o', out], 'lorasuite align'),
                       (['transfer', carried, alignment, '-o', out], 'another model'),
                       (['transfer', 'zoo/adapter', alignment, '-o', out, '--inputs', work/'nowhere.jsonl'], 'nowhere.jsonl'),
                       (['transfer', work/'nowhere', alignment, '-o', out], 'nowhere'),
                       (['align', work/'nowhere', 'zoo/new', '-o', out], 'nowhere'),
                       (['align', 'zoo/old', 'zoo/new', '--method', 'magic', '-o', out], 'magic'),
                       (['align', 'zoo/old', 'zoo/new', '--texts', work/'nowhere', '-o', out], 'nowhere'),
                       (['finetune', 'zoo/new', carried, '--data', broken, '-o', out], 'line 1'),
                       (['finetune', 'zoo/old', carried, '--data', hundred, '-o', out], 'another model'),
                       (['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--data', work/'nowhere.jsonl', '-o', out], 'nowhere'),
                       (['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', work/'nowhere.jsonl', '-o', out], 'nowhere'),
                       (['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', broken, '-o', out], 'line 1'),
                       (['refresh', 'zoo/old', carried, 'zoo/new', '--inputs', hundred, '-o', out], 'another model'),
                       (['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', hundred, '--start', 'zoo/adapter', '-o', out], 'another model'),
                       (['refresh', 'zoo/old', 'zoo/adapter', work/'nowhere', '--inputs', hundred, '-o', out], 'nowhere'),
                       (['evaluate', 'zoo/new', '--data', ZOO/'held_out.txt'], 'held_out.txt')]:
        result = run(*args)
        assert result.exit_code == 2 and word in result.stderr, (args, result.output)
        assert not out.exists()
