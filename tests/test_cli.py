"""The command line, end to end, on the models that the package ships"""
import gc, json, os, pty, re, shlex, subprocess, sys, time, weakref
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner
from lorasuite.core.adapter import Adapter
from lorasuite.core.architecture import ROLES
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.lab.demo import DEMO_METHODS
from lorasuite import __version__, cli
from lorasuite.cli import app

ZOO = data_dir()/'zoo'

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def report(*args):
    "The JSON object that a command prints, which must be all that it prints on stdout"
    result = run(*args, '--json')
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)

def questions_of(file, n):
    "The first questions of a file as JSON lines, without their answers"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:n]]
    return ''.join(json.dumps(dict(instruction=r['instruction'])) + '\n' for r in rows)

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
    lorasuite = Path(sys.executable).with_name('lorasuite')
    done = subprocess.run([lorasuite, 'demo', '-o', tmp_path/'demo'], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    arms = {a['arm']: a for a in json.loads((tmp_path/'demo'/'results.json').read_text())['arms']}
    assert [*arms] == [*DEMO_METHODS] and all(name in done.stdout for name in DEMO_METHODS)
    keys = {'arm', 'accuracy', 'seconds', 'labelled_examples', 'trainable_parameters'}
    assert all(keys <= a.keys() for a in arms.values())
    plots = ('cka.png', 'head_map.png', 'transfer_matrix.png', 'finetuning.png', 'arms.png')
    assert {p.name for p in (tmp_path/'demo').glob('*.png')} == {*plots}
    accuracy = {name: a['accuracy'] for name, a in arms.items()}
    gain = lambda name: (accuracy[name] - accuracy['base'])/(accuracy['lora-all'] - accuracy['base'])
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

def bytes_of(out): return (out/'adapter_model.safetensors').read_bytes()

def test_questions_refresh_what_is_carried(work, hundred):
    "The specialist answers, and what was carried learns: as the two commands do, one after the other"
    asked, plain = work/'asked-at-once.jsonl', work/'far-carried'
    asked.write_text(questions_of(hundred, 60))
    exact, steps = ('--dtype', 'float32'), ('--steps', 6)
    upgrade = ('upgrade', 'zoo/old', 'zoo/new-far', 'zoo/adapter')
    report(*upgrade, '-o', plain, *exact)
    report('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new-far', '--inputs', asked, '--start', plain, *steps,
           '-o', work/'in-two')
    said = report(*upgrade, '--inputs', asked, *steps, '-o', work/'at-once', *exact)
    assert bytes_of(work/'at-once') == bytes_of(work/'in-two') != bytes_of(plain)
    assert said['steps'] == 6 and said['inputs'] == 60 and said['labelled'] == 0
    card = (work/'at-once'/'README.md').read_text()
    assert 'carried from `zoo/old` to `zoo/new-far`' in card and 'old layer → new layer: 0→0' in card
    assert 'Refreshed on 60 answers of the old specialist and 0 labelled examples: 6 steps.' in card
    report('align', 'zoo/old', 'zoo/new-far', '-o', work/'far') # an alignment in files is rounded
    report('transfer', 'zoo/adapter', work/'far', '-o', work/'by-files', *exact)
    report('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new-far', '--inputs', asked, '--start', work/'by-files', *steps,
           '-o', work/'in-three')
    a, b = (load_file(work/name/'adapter_model.safetensors') for name in ('at-once', 'in-three'))
    assert a.keys() == b.keys() and all((a[k] - b[k]).norm() <= 1e-3*b[k].norm() for k in a)

def test_labels_win_over_the_answers_of_an_upgrade(work, hundred):
    "Without questions, three passes at the rate of a tuning; with them, a refresh in which known answers are not asked"
    asked, few = work/'asked-too.jsonl', work/'few-too.jsonl'
    asked.write_text(questions_of(hundred, 40))
    few.write_text(''.join(hundred.read_text().splitlines(keepends=True)[:10]))
    upgrade = ('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--data', few)
    said = report(*upgrade, '--inputs', asked, '--epochs', 1, '-o', work/'both')
    assert said['steps'] == 3 and said['labelled'] == 10
    assert '30 answers of the old specialist and 10 labelled' in (work/'both'/'README.md').read_text()
    said = report(*upgrade, '-o', work/'labels-alone')
    assert said['steps'] == 2 and 'inputs' not in said # 3*10/16
    assert '2 steps at a learning rate of 0.0001' in (work/'labels-alone'/'README.md').read_text()

def test_an_upgrade_within_a_budget(work, hundred):
    done = run('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--inputs', hundred, '--budget', '8s',
               '-o', work/'in-time', '--json')
    assert done.exit_code == 0 and json.loads(done.stdout)['steps'] >= 8, done.output
    lines = done.stderr.splitlines()
    assert any(line.startswith('100 lessons from 100 questions after ') for line in lines)
    assert any(re.match(r'after 8 steps, \d+ s: chance of the old answers ', line) for line in lines)
    assert '; the last round: ' in lines[-1] and 'lessons kept aside' in (work/'in-time'/'README.md').read_text()
    refresh = ('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', hundred)
    judged = run(*refresh, '--budget', '1s', '-o', work/'in-a-second').stdout
    assert ' lessons kept aside, the mean chance of an answer ' in judged
    again = run(*refresh, '--start', work/'in-a-second', '--steps', 1, '-o', work/'one-more')
    assert again.exit_code == 0 and 'kept aside' not in again.stdout # it was not measured again

def test_a_killed_upgrade_goes_on(work, hundred, monkeypatch):
    "Killed in its training, it asks nobody again, and the result is that of a run that was not"
    command = ['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--inputs', hundred, '--steps', 60, '-o']
    report(*command, work/'whole')
    code = 'import torch; torch.set_num_threads(1); from lorasuite.cli import app; app()'
    running = subprocess.Popen([sys.executable, '-c', code, *map(str, [*command, work/'killed'])],
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    checkpoints, end = work/'.killed-checkpoints', time.time() + 120
    while not [*checkpoints.glob('checkpoint-*/sealed.json')] and running.poll() is None and time.time() < end:
        time.sleep(.02)
    running.kill()
    running.communicate()
    assert running.returncode == -9 and (checkpoints/'lessons').is_dir() and not (work/'killed').exists()
    monkeypatch.setattr('lorasuite.training.refresh.generate', lambda *args, **kwargs: pytest.fail('it asked again'))
    assert report(*command, work/'killed')['steps'] == 60
    assert bytes_of(work/'killed') == bytes_of(work/'whole') and not checkpoints.exists()

def test_the_old_model_is_let_go_before_the_training(work, hundred, monkeypatch):
    from lorasuite.stages import added_tokens
    from lorasuite.training import upgrade as module
    load, learn, seen = added_tokens.load_model, module.learn_lessons, []
    def loading(name, *args, **kwargs):
        found = load(name, *args, **kwargs)
        if name == 'zoo/old' and not kwargs.get('lazy'): seen.append(weakref.ref(found.model))
        return found
    def learning(*args, **kwargs):
        gc.collect()
        assert seen and not any(ref() for ref in seen)
        return learn(*args, **kwargs)
    monkeypatch.setattr(added_tokens, 'load_model', loading)
    monkeypatch.setattr(module, 'learn_lessons', learning)
    report('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--inputs', hundred, '--steps', 1, '-o', work/'let-go')
    assert len(seen) == 1

def test_finetune_and_evaluate(work, carried, hundred):
    said = report('finetune', 'zoo/new', carried, '--data', hundred, '-o', work/'tuned', '--steps', 3)
    assert said['steps'] == 3 and not list(work.glob('.tuned*'))
    base, tuned = (report('evaluate', 'zoo/new', '--data', hundred, *a) for a in ([], ['--adapter', work/'tuned']))
    assert tuned['interval'][0] > base['interval'][1]

def test_refresh(work, carried, hundred):
    asked, few, out = work/'asked.jsonl', work/'few.jsonl', work/'refreshed'
    asked.write_text(questions_of(hundred, 100))
    few.write_text(''.join(hundred.read_text().splitlines(keepends=True)[:10]))
    said = report('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', asked, '--start', carried, '--data', few,
                  '-o', out, '--steps', 3)
    assert said['steps'] == 3 and said['inputs'] == said['answered'] == 100 and said['labelled'] == 10
    assert not list(work.glob('.refreshed*'))
    base, refreshed = (report('evaluate', 'zoo/new', '--data', hundred, *a) for a in ([], ['--adapter', out]))
    assert refreshed['interval'][0] > base['interval'][1]
    assert '90 answers of the old specialist and 10 labelled' in (work/'refreshed'/'README.md').read_text()
    loads(work/'refreshed')

def test_inspect(hundred):
    said = report('inspect', 'zoo/old', 'zoo/new', 'zoo/adapter')
    assert said['sizes']['attention'] == ['MHA', 'GQA'] and said['shared_tokens'] == 512
    assert not said['notes'] and 'deep' not in said
    roles = {r: 4 for r in ROLES}
    assert said['adapter'] == dict(updates=28, ranks=[16], roles=roles, energy=1.0, energy_range=[1.0, 1.0],
                                   depends_on_weights=[], notes=[], skipped={})
    assert said['exact']
    back = run('inspect', 'zoo/new', 'zoo/old', '--deep')
    assert back.exit_code == 0 and 'note: 2 of 6 old layers will find no partner' in back.stdout
    assert 'layers: 0→0, 1→1, 3→2, 5→3' in back.stdout and 'advice: ' in back.stdout
    deep = report('inspect', 'zoo/old', 'zoo/new', 'zoo/adapter', '--deep', '--inputs', hundred)['deep']
    assert deep['agreement_carried'] > .85 > .2 > deep['agreement_base'] and 'agreement_copy' not in deep
    assert deep['advice']['sign'] == 'agreement' and deep['advice']['keeps'][deep['advice']['recommendation']] > .8

def test_text_output(alignment):
    result = run('evaluate', 'zoo/old', '--data', ZOO/'validation.jsonl', '--adapter', 'zoo/adapter')
    assert result.exit_code == 0 and re.search(r'^accuracy: \d+\.\d% \(95% interval \d+–\d+%\)$', result.stdout, re.M)
    assert not re.search(r'[\[{]\d|\d\.\d{5}', result.stdout)

def test_wrong_answers_are_shown(tmp_path):
    "Of questions in any form the first three, in JSON all"
    rows = [json.loads(line) for line in (ZOO/'test.jsonl').read_text().splitlines()[:6]]
    chats = [dict(messages=[dict(role='user', content=r['instruction']), dict(role='assistant', content='no answer')])
             for r in rows]
    (tmp_path/'chats.jsonl').write_text(''.join(json.dumps(chat) + '\n' for chat in chats))
    command = ['evaluate', 'zoo/old', '--data', tmp_path/'chats.jsonl', '--adapter', 'zoo/adapter']
    lines = [line for line in run(*command).stdout.splitlines() if line.startswith('wrong, example ')]
    wrong = report(*command)['wrong']
    assert len(lines) == 3 and [w['example'] for w in wrong] == [1, 2, 3, 4, 5, 6]
    assert lines[0] == f"wrong, example 1: {wrong[0]['said']!r}, expected 'no answer'"

def test_an_adapter_is_converted_by_its_name(tmp_path):
    "One of many in a directory; other formats hold one, and say so"
    for name in ('a', 'b'): Adapter.load('zoo/adapter').save(tmp_path/'two'/name)
    assert 'choose one by --adapter-name' in run('convert', tmp_path/'two', '-o', tmp_path/'out').stderr
    one = report('convert', tmp_path/'two', '--adapter-name', 'b', '-o', tmp_path/'out', '--format', 'gguf')
    assert one['adapter'].startswith('Adapter(28 updates')
    for command in (['convert', tmp_path/'out', '-o', tmp_path/'x'], ['inspect', 'zoo/old', 'zoo/new', tmp_path/'out']):
        refused = run(*command, '--adapter-name', 'b')
        assert refused.exit_code == 2 and "single adapter, which is not chosen by name: leave 'b' out" in refused.stderr

def test_version():
    assert run('--version').stdout == f'lorasuite {__version__}\n'

def test_what_was_not_measured_is_said(work, hundred):
    "The last line names the command that counts right answers"
    upgrade = ['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter']
    for name, more in {'unmeasured': (), 'one-step': ('--data', hundred, '--steps', 1)}.items():
        said = run(*upgrade, *more, '-o', work/name).stdout.splitlines()
        assert said[-1].endswith(f'not measured: lorasuite evaluate zoo/new --adapter {work/name} --data FILE')
        assert ('steps: 1' in said) == bool(more) and 'steps: 0' not in said

def test_the_command_that_measures_asks_as_the_training_did(work, hundred):
    "With the same prompt, in a line that a shell takes as it stands"
    out, form = work/'with a space', ('--prompt', 'Question: {instruction}\\nAnswer:')
    made = report('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--inputs', hundred, '--steps', 1, *form, '-o', out)
    words = shlex.split(made['measure'].replace('FILE', str(hundred)))[1:]
    assert report(*words)['prompt'] == "plain prompt 'Question: {instruction}\\nAnswer:'"
    assert '\n' not in made['measure']
    refresh = ('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', hundred, '--steps', 1)
    assert '--prompt=' not in report(*refresh, '-o', work/'own-form')['measure']
    said = report(*refresh, *form, '--thinking', 'drop', '-o', work/'named-form')['measure']
    assert "'--prompt=Question: {instruction}\\nAnswer:' --thinking=drop --data FILE" in said

def test_results_are_for_people(tmp_path):
    "No tuple, dict or number of ten digits; `--json` keeps them"
    align = ['align', 'zoo/old', 'zoo/new']
    lines = run(*align, '-o', tmp_path/'maps').stdout.splitlines()
    assert 'layers: 0→0, 1→1, 2→3, 3→5' in lines
    assert lines[-1] == 'fit of the transfer matrix: shared tokens 512, R² 0.998, condition 3.2'
    few = tmp_path/'few.jsonl'
    few.write_text(''.join((ZOO/'train.jsonl').read_text().splitlines(keepends=True)[:4]))
    args = ['finetune', 'zoo/new', '--data', few, '--steps', 2]
    said = run(*args, '-o', tmp_path/'tuned').stdout
    for pattern in (r'adapter: 42 updates of zoo/new, rank 8, 92,160 numbers', r'loss: \d\.\d\d?',
                    r'time: \d+\.\d s', r'trained parameters: 92,160',
                    r'peak memory of the training: (\d+ MB|\d+\.\d GB)'):
        assert re.search(f'^{pattern}$', said, re.M), said
    raw = report(*args, '-o', tmp_path/'again')
    assert raw['adapter'].startswith('Adapter(42 updates') and isinstance(raw['peak_bytes'], int)
    assert len(str(raw['loss'])) > 6 and raw['trained'] == 92_160

def test_bad_input(work, carried, alignment, hundred):
    broken, nowhere, out = work/'broken.jsonl', work/'nowhere', work/'out'
    missing = work/'nowhere.jsonl'
    broken.write_text('{"instruction": "a", "output"')
    old, new, adapter = 'zoo/old', 'zoo/new', 'zoo/adapter'
    refresh = ['refresh', old, adapter, new, '-o', out, '--inputs']
    for args, word in [(['transfer', adapter, alignment, '-o', carried], 'exists already'),
                       (['inspect', new, old, adapter], 'another model'),
                       (['inspect', nowhere, old], 'nowhere'),
                       (['inspect', old, new, '--deep', '--inputs', hundred], 'give an adapter'),
                       (['transfer', adapter, nowhere, '-o', out], 'lorasuite align'),
                       (['transfer', carried, alignment, '-o', out], 'another model'),
                       (['upgrade', old, new, adapter, '-o', out, '--inputs', missing], 'nowhere.jsonl'),
                       (['transfer', nowhere, alignment, '-o', out], 'nowhere'),
                       (['align', nowhere, new, '-o', out], 'nowhere'),
                       (['align', old, new, '--method', 'magic', '-o', out], 'magic'),
                       (['align', old, new, '--texts', nowhere, '-o', out], 'nowhere'),
                       (['finetune', new, carried, '--data', broken, '-o', out], 'line 1'),
                       (['finetune', old, carried, '--data', hundred, '-o', out], 'another model'),
                       (['upgrade', old, new, adapter, '--data', missing, '-o', out], 'nowhere'),
                       ([*refresh, missing], 'nowhere'),
                       ([*refresh, broken], 'line 1'),
                       (['refresh', old, carried, new, '--inputs', hundred, '-o', out], 'another model'),
                       ([*refresh, hundred, '--start', adapter], 'another model'),
                       (['refresh', old, adapter, nowhere, '--inputs', hundred, '-o', out], 'nowhere'),
                       (['evaluate', new, '--data', ZOO/'held_out.txt'], 'held_out.txt'),
                       (['evaluate', new, '--data', hundred, '--match', 'nearly'], 'one of exact, number, letter'),
                       (['evaluate', new], 'what to evaluate on?')]:
        result = run(*args)
        assert result.exit_code == 2 and word in result.stderr, (args, result.output)
        assert not out.exists()

def test_transfer_says_what_it_did(tmp_path):
    result = CliRunner().invoke(app, ['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '-o', str(tmp_path/'out')])
    lines = result.stdout.splitlines()
    assert 'old layer → new layer: 0→0, 1→1, 2→3, 3→5' in lines and 'lora' not in lines
    assert 'energy of the adapter (Σ‖ΔW‖²) that has a place in the new model: 100.0%' in lines
    assert not any('None' in line or '{' in line for line in lines)

def test_questions_are_evaluated_without_lm_eval(tmp_path):
    code = "import sys; sys.modules['lm_eval'] = None; from lorasuite.cli import app; app()"
    command = [sys.executable, '-c', code, 'evaluate', 'zoo/new', '--data', 'zoo/validation.jsonl', '--json']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)['questions'] > 100, done.stderr
    done = subprocess.run(command[:-3] + ['--tasks', 'piqa'], capture_output=True, text=True)
    assert done.returncode == 2 and 'lorasuite[eval]' in done.stderr

# ---- unrelated models, and a person who can stop there

UNRELATED = dict(align=['align', 'zoo/old', 'zoo/stranger'],
                 upgrade=['upgrade', 'zoo/old', 'zoo/stranger', 'zoo/adapter'])

def answer(text, command, out, *more):
    "Run a command before a pretended terminal at which somebody types `text`"
    return CliRunner().invoke(app, [*command, '-o', str(out), *more], input=text)

@pytest.mark.parametrize('command', UNRELATED)
@pytest.mark.parametrize('text', ['\n', 'n\n', 'what?\n', ''])
def test_no_is_an_answer(tmp_path, monkeypatch, command, text):
    "The question comes before the layers are compared; anything but yes stops, and nothing is written"
    monkeypatch.setattr('lorasuite.cli._is_watched', lambda: True)
    monkeypatch.setattr('lorasuite.stages.alignment.cka_table', None)
    said = answer(text, UNRELATED[command], tmp_path/'out')
    assert said.exit_code == 2 and not [*tmp_path.iterdir()]
    warning, question = said.stderr.splitlines()[-2:]
    assert 'hardly correspond' in warning and 'go on? [y/N] lorasuite: stopped' in question and '--yes' in question

@pytest.mark.parametrize('command', UNRELATED)
def test_yes_is_an_answer(tmp_path, monkeypatch, command):
    monkeypatch.setattr('lorasuite.cli._is_watched', lambda: True)
    asked = answer('Y\n', UNRELATED[command], tmp_path/'asked', '--json')
    assert asked.exit_code == 0 and 'go on? [y/N]' in asked.stderr and json.loads(asked.stdout)

@pytest.mark.parametrize('watched, new, more', [
    (True, 'stranger', ['--yes']), (False, 'stranger', []), (True, 'new', [])])
def test_who_is_not_asked(tmp_path, monkeypatch, watched, new, more):
    "Who said yes in advance, a script, and who aligns related models"
    if watched: monkeypatch.setattr('lorasuite.cli._is_watched', lambda: True)
    said = answer('n\n', ['align', 'zoo/old', f'zoo/{new}'], tmp_path/'out', *more)
    assert said.exit_code == 0 and 'go on?' not in said.stderr
    assert ('hardly correspond' in said.stderr) == (new == 'stranger')

def test_a_real_terminal(tmp_path, monkeypatch):
    "And none where there is no input at all, or where several processes wait for one another"
    code = 'import sys; from lorasuite.cli import _is_watched; print(_is_watched())'
    def watched(stdin, **variables):
        done = subprocess.run([sys.executable, '-c', code], stdin=stdin, capture_output=True, text=True,
                              env={**os.environ, **variables})
        return done.stdout.strip()
    theirs, ours = pty.openpty()
    try:
        assert watched(ours) == 'True' and watched(ours, WORLD_SIZE='2') == 'False'
        assert watched(subprocess.DEVNULL) == 'False'
    finally:
        for end in (theirs, ours): os.close(end)
    monkeypatch.setattr('sys.stdin', None)
    assert not cli._is_watched()
