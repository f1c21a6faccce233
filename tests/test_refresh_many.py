"Many specialists teach one new model: what belongs to whom, no trace of one in the next, runs that go on"
import functools, json, os, shutil, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.stages.added_tokens import base_with_tokens
from lorasuite.stages.alignment import align
from lorasuite.stages.many import own_results, transfer_many
from lorasuite.training import refresh as teaching, refresh_many as module
from lorasuite.training.refresh_many import refresh_lines, refresh_many, RefreshOptions
from lorasuite.training.trainer import hash_tensors, LightTrainer

ZOO = data_dir()/'zoo'
NAMES = ('laws', 'facts', 'sums')
STEPS = 5
OPTIONS = RefreshOptions(steps=STEPS, lr=1e-3)

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def result(folder):
    "The bytes of every file of a result"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Three adapters of unlike numbers, each carried, with questions of its own"
    home = tmp_path_factory.mktemp('refresh_many')
    tensors = load_file(ZOO/'adapter'/'adapter_model.safetensors')
    rows = (ZOO/'train.jsonl').read_text().splitlines(keepends=True)
    (home/'questions').mkdir()
    (home/'all.jsonl').write_text(''.join(rows[6:18]))
    for i, name in enumerate(NAMES):
        shutil.copytree(ZOO/'adapter', home/'adapters'/name)
        changed = {key: t*(1 + i/8) for key, t in tensors.items()}
        save_file(changed, home/'adapters'/name/'adapter_model.safetensors', metadata={'format': 'pt'})
        (home/'questions'/f'{name}.jsonl').write_text(''.join(rows[12*i:12*i + 12]))
    align('zoo/old', 'zoo/new-far').save(home/'alignment')
    transfer_many([str(home/'adapters'/name) for name in NAMES], home/'alignment', home/'carried', jobs=1)
    return home

def settings(work, **others):
    "What a run is given"
    return dict(old='zoo/old', adapters=[str(work/'adapters'/name) for name in NAMES], new='zoo/new-far',
                inputs=work/'questions', start=work/'carried', options=OPTIONS) | others

def command(work, out, *more):
    "The same run as a command"
    return ['refresh', 'zoo/old', f'{work}/adapters/*', 'zoo/new-far', '--inputs', work/'questions', '--start',
            work/'carried', '--steps', STEPS, '--lr', 1e-3, '-o', out, *more]

def single(work, name, out, *more):
    "The refresh of one adapter alone"
    return run('refresh', 'zoo/old', work/'adapters'/name, 'zoo/new-far', '--inputs', work/'questions'/f'{name}.jsonl',
               '--start', work/'carried'/name, '--steps', STEPS, '--lr', 1e-3, '-o', out, *more)

def counts(report): return report['refreshed'], report['kept'], report['failed']

@pytest.fixture(scope='module')
def done(work):
    "A run over all of them"
    return refresh_many(**settings(work), out=work/'out')

def test_each_result_is_that_of_a_single_refresh(work, done, tmp_path):
    "Bit for bit, whichever adapters were on the models before; one folder for each, and no checkpoints"
    assert counts(done) == (3, 0, 0) and done == json.loads((work/'out'/'report.json').read_text())
    for name in NAMES:
        assert single(work, name, tmp_path/name).exit_code == 0
        assert result(tmp_path/name) == result(work/'out'/name)
    assert len({result(work/'out'/name)['adapter_model.safetensors'] for name in NAMES}) == 3
    assert {p.name for p in (work/'out').iterdir()} == {*NAMES, '.claims', 'report.json'}
    for row in done['adapters']:
        assert row['inputs'] == row['lessons'] == 12 and row['steps'] == STEPS and row['loss_last'] < row['loss_first']
        assert row['seconds'] > 0 and not row['skipped'] and not row['warnings']

def test_the_models_are_loaded_once_and_stay_as_they_are(work, tmp_path, monkeypatch):
    loaded, hashes = [], []
    def load(name):
        loaded.append(load_model(name))
        hashes.append(hash_tensors(loaded[-1].model.state_dict().values()))
        return loaded[-1]
    monkeypatch.setattr(module, 'load_model', load)
    assert counts(refresh_many(**settings(work, start=None), out=tmp_path/'out')) == (3, 0, 0)
    assert [d.name for d in loaded] == ['zoo/old', 'zoo/new-far']
    assert [hash_tensors(d.model.state_dict().values()) for d in loaded] == hashes
    fresh = [load_model(d.name) for d in loaded]
    for a, b in zip(loaded, fresh):
        assert str(a.model) == str(b.model) and a.model.config == b.model.config and not a.model.training
        assert {**vars(a.model)}.keys() == {**vars(b.model)}.keys()
        assert [p.requires_grad for p in a.model.parameters()] == [p.requires_grad for p in b.model.parameters()]
    assert counts(refresh_many(**settings(work, start=None), out=tmp_path/'out')) == (0, 3, 0)
    assert len(loaded) == 2, 'where all is done no model is loaded'

def test_no_trace_in_16_bits_either(work, tmp_path, monkeypatch):
    "A training in bfloat16 wraps what the model computes"
    monkeypatch.setattr(module, 'load_model', functools.partial(load_model, dtype=torch.bfloat16))
    given = settings(work)
    assert counts(refresh_many(**given, out=tmp_path/'all')) == (3, 0, 0)
    for adapter in given['adapters'][1:]:
        name = Path(adapter).name
        assert counts(refresh_many(**given | dict(adapters=[adapter]), out=tmp_path/f'{name}-alone')) == (1, 0, 0)
        assert result(tmp_path/f'{name}-alone'/name) == result(tmp_path/'all'/name)

def test_tokens_that_were_added_for_one_are_not_there_for_the_next():
    "Such an adapter gets a copy of the model"
    base = load_model('zoo/old')
    tokenizer = load_model('zoo/old').tokenizer
    tokenizer.add_tokens([f'<customer {i}>' for i in range(3)])
    longer = Adapter.load('zoo/adapter')
    longer.tokenizer = lambda: tokenizer
    rows, before = base.vocab, hash_tensors(base.model.state_dict().values())
    worn = base_with_tokens(base, longer)
    assert len(worn.tokenizer) == len(base.tokenizer) + 3 and worn.model is not base.model
    assert base.vocab == rows and hash_tensors(base.model.state_dict().values()) == before
    longer.tokenizer = lambda: base.tokenizer
    assert base_with_tokens(base, longer) is base, 'no copy for a tokenizer without new tokens'

def test_one_that_fails_does_not_stop_the_rest(work, tmp_path):
    "Each for a reason of its own; the failed ones are named, and mended they are all that the next run makes"
    shutil.copytree(work, tmp_path/'work')
    home = tmp_path/'work'
    shutil.rmtree(home/'out', ignore_errors=True)
    (home/'adapters'/'laws'/'adapter_model.safetensors').write_bytes(b'cut off')
    shutil.rmtree(home/'carried'/'facts')
    first = run(*command(home, tmp_path/'out'), '--json')
    report = json.loads(first.stdout)
    rows = {Path(row['adapter']).name: row for row in report['adapters']}
    assert first.exit_code == 1 and counts(report) == (1, 0, 2) and '2 of 3 adapters failed' in first.stderr
    assert 'not readable' in rows['laws']['error'] and 'no adapter facts to start from' in rows['facts']['error']
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'sums', '.claims', 'report.json'}
    for part in ('adapters', 'carried'): shutil.copytree(work/part, home/part, dirs_exist_ok=True)
    again = run(*command(home, tmp_path/'out'))
    assert again.exit_code == 0 and '2 refreshed, 1 kept, 0 failed' in again.stdout

def test_what_is_done_again(work, tmp_path):
    "What was made of another adapter; what was made of other questions, another start or with other settings stays"
    shutil.copytree(work, tmp_path/'work')
    home, out = tmp_path/'work', tmp_path/'out'
    assert counts(refresh_many(**settings(home), out=out)) == (3, 0, 0)
    lines = (home/'questions'/'laws.jsonl').read_text().splitlines(keepends=True)
    shutil.copy(home/'adapters'/'laws'/'adapter_model.safetensors', home/'adapters'/'sums')
    assert counts(refresh_many(**settings(home), out=out)) == (1, 2, 0)
    (home/'questions'/'laws.jsonl').write_text(''.join(lines[1:]))
    shutil.copy(home/'carried'/'laws'/'adapter_model.safetensors', home/'carried'/'facts')
    report = refresh_many(**settings(home), out=out)
    errors = {row['adapter'].rpartition('/')[2]: row.get('error', '') for row in report['adapters']}
    assert counts(report) == (0, 1, 2) and '(other questions)' in errors['laws'] and '(other start)' in errors['facts']
    others = RefreshOptions(steps=STEPS, lr=1e-3, soft=.25)
    assert counts(refresh_many(**settings(home, options=others), out=out)) == (0, 0, 3)

class Stop(BaseException): "As a signal would"

def test_an_interrupted_run_goes_on(work, done, tmp_path, monkeypatch):
    "Stopped in the second training: the first is kept, the second resumes, and all are as if nothing had happened"
    step, steps = LightTrainer.training_step, []
    def count(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == STEPS + 4: raise KeyboardInterrupt
        return step(self, *args, **kwargs)
    monkeypatch.setattr(LightTrainer, 'training_step', count)
    stopped = run(*command(work, tmp_path/'out'))
    assert stopped.exit_code == 130 and stopped.stderr.splitlines()[-1] == (
        'lorasuite: interrupted; start the same command again to do what is left '
        f'(what is done stays in {tmp_path}/out)')
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'facts', '.laws-checkpoints', '.claims'}
    del steps[:]
    monkeypatch.setattr(LightTrainer, 'training_step', lambda *a, **k: steps.append(1) or step(*a, **k))
    answer, asked = teaching.pseudo_label, []
    monkeypatch.setattr(teaching, 'pseudo_label', lambda *a, **k: asked.append(1) or answer(*a, **k))
    resumed = run(*command(work, tmp_path/'out'), '--json')
    again = json.loads(resumed.stdout)
    assert sum(line.startswith('resumed at step ') for line in resumed.stderr.splitlines()) == 1
    assert counts(again) == (2, 1, 0) and len(steps) == 2 + STEPS and len(asked) == 1
    for name in NAMES: assert result(tmp_path/'out'/name) == result(work/'out'/name)
    assert {p.name for p in (tmp_path/'out').iterdir()} == {*NAMES, '.claims', 'report.json'}

def test_a_killed_run_goes_on(work, done, tmp_path):
    out = tmp_path/'out'
    args = [sys.executable, '-m', 'lorasuite.cli', *map(str, command(work, out))]
    one_thread = os.environ | dict(OMP_NUM_THREADS='1') # as here: other numbers of threads round otherwise
    running = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    end = time.monotonic() + 120
    while not (out/'facts').exists():
        assert time.monotonic() < end and running.poll() is None
        time.sleep(.01)
    running.kill()
    running.wait()
    report = json.loads(run(*command(work, out), '--json').stdout)
    assert report['failed'] == 0 and sum(counts(report)) == 3
    for name in NAMES: assert result(out/name) == result(work/'out'/name)

def test_a_result_whose_claim_was_not_finished_costs_no_training(work, done, tmp_path, monkeypatch):
    "Killed between the result and its claim: the last checkpoint is still there"
    monkeypatch.setattr(module, 'remove_directory', None) # what comes after the claim
    write = module.make_once
    def cut(out, claim, make):
        def made():
            make()
            raise Stop
        return write(out, claim, made)
    monkeypatch.setattr(module, 'make_once', cut)
    with pytest.raises(Stop): refresh_many(**settings(work), out=tmp_path/'out')
    monkeypatch.undo()
    assert (tmp_path/'out'/'laws').is_dir() and (tmp_path/'out'/'.laws-checkpoints').is_dir()
    step, steps = LightTrainer.training_step, []
    monkeypatch.setattr(LightTrainer, 'training_step', lambda *a, **k: steps.append(1) or step(*a, **k))
    assert counts(refresh_many(**settings(work), out=tmp_path/'out')) == (3, 0, 0) and len(steps) == 2*STEPS
    for name in NAMES: assert result(tmp_path/'out'/name) == result(work/'out'/name)

def test_what_belongs_to_each(work, tmp_path):
    "A file for all, a directory with one for each, a name with a place for the adapter's"
    for inputs, start in ((work/'all.jsonl', None), (f'{work}/questions/{{name}}.jsonl', f'{work}/carried/{{name}}')):
        shop = module._Workshop('zoo/old', 'zoo/new', str(inputs), start, str(inputs), OPTIONS, {*NAMES})
        shop.check()
        own = str(inputs).replace('{name}', 'sums')
        assert shop.sources('sums') == (own, own, start and f'{work}/carried/sums')
    shutil.copytree(work/'questions', tmp_path/'questions')
    (tmp_path/'questions'/'README.md').write_text('ours')
    find = lambda name: module._own_file(str(tmp_path/'questions'), name, {*NAMES, 'rest'})
    assert find('sums') == f'{tmp_path}/questions/sums.jsonl'
    with pytest.raises(FileNotFoundError, match='no file for rest: put rest.jsonl there'): find('rest')
    (tmp_path/'questions'/'sums.csv').write_text('instruction')
    with pytest.raises(ValueError, match='several files for sums'): find('sums')

def test_labels_of_each_win(work, tmp_path):
    given = settings(work, inputs=work/'all.jsonl', data=work/'questions', start=None)
    report = refresh_many(**given, out=tmp_path/'out')
    assert [row['labelled'] for row in report['adapters']] == [12]*3 and counts(report) == (3, 0, 0)

def test_what_is_wrong_for_all_is_said_before_any_work(work, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'load_model', None)
    (tmp_path/'broken.jsonl').write_text('{"instruction": "a", "output"')
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis').write_text('mine')
    old, adapters, new, out = 'zoo/old', f'{work}/adapters/*', 'zoo/new', tmp_path/'out'
    given = ['--inputs', work/'all.jsonl', '-o', out]
    for args, what in (([old, adapters, tmp_path/'nowhere', *given], 'nowhere'),
                       ([tmp_path/'nowhere', adapters, new, *given], 'nowhere'),
                       ([old, f'{work}/x*', new, *given], 'no adapter matches'),
                       ([old, new, *given], 'which adapter?'),
                       ([old, adapters, new, *given, '--start', work/'adapters'/'sums'], 'to start from'),
                       ([old, adapters, new, '--inputs', tmp_path/'no.jsonl', '-o', out], 'no such data file'),
                       ([old, adapters, new, '--inputs', tmp_path/'broken.jsonl', '-o', out], 'line 1'),
                       ([old, adapters, new, '--inputs', tmp_path/'{name}.jsonl', '-o', out], 'no such data file'),
                       ([old, adapters, new, *given, '--prompt', 'Q: {question}'], 'question'),
                       ([old, adapters, new, '--hub-user', 'carol', *given], 'no Hub id'),
                       ([old, adapters, new, *given, '--data', tmp_path/'no.jsonl'], 'no such data file'),
                       ([old, 'x/report.json', 'y', new, *given], 'rename one'),
                       ([old, adapters, new, '--inputs', work/'all.jsonl', '-o', tmp_path/'mine'], 'something else')):
        found = run('refresh', *args)
        assert found.exit_code == 2 and what in found.output, (args, found.output)
        assert len(found.stderr.splitlines()) == 1
    assert not out.exists() and [p.name for p in (tmp_path/'mine').iterdir()] == ['thesis']

def test_several_processes_are_refused(work, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='one command for each device'):
        refresh_many(**settings(work), out=tmp_path/'out')

def test_one_command_at_a_time(work, tmp_path):
    with own_results(tmp_path/'out'):
        found = run(*command(work, tmp_path/'out'))
    assert found.exit_code == 2 and 'in use by process' in found.stderr

def test_the_report_for_people(done):
    lines = refresh_lines(done)
    assert lines[0].split() == 'adapter status inputs lessons steps loss first last seconds error'.split()
    assert lines[1].split()[1:5] == ['refreshed', '12', '12', str(STEPS)]
    assert '3 refreshed, 0 kept, 0 failed' in lines[-1]

def test_how_models_are_asked_is_said(work, tmp_path):
    "Of both models, in one line where they are asked alike; and how each file was read, once"
    two = [work/'adapters'/name for name in NAMES[:2]]
    args = ['refresh', 'zoo/old', *two, 'zoo/new-far', '--inputs', work/'all.jsonl', '--steps', 1]
    (tmp_path/'chat.jinja').write_text('{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:')
    said = run(*args, '-o', tmp_path/'out', '--chat-template', f',{tmp_path}/chat.jinja')
    lines = said.stdout.splitlines()
    assert lines[0].startswith('prompt of the old model: plain')
    assert lines[1].startswith('prompt of the new model: given')
    assert sum(' examples, read from instruction' in line for line in said.stderr.splitlines()) == 1
    single = run('refresh', 'zoo/old', two[0], *args[4:], '-o', tmp_path/'a')
    assert sum(line.startswith('prompt: plain prompt ') for line in single.stdout.splitlines()) == 1

def test_settings_are_checked():
    for name, value in (('soft', 2), ('steps', -1), ('lr', float('nan')), ('longest', 1)):
        with pytest.raises(ValueError, match=name): RefreshOptions(**{name: value})
    with pytest.raises(TypeError, match='prompts'): RefreshOptions(prompts='chat')

# ---- lessons for several students

def test_the_second_student_does_not_ask_the_teacher(work, tmp_path, monkeypatch):
    "Another new model with another tokenizer: the specialist is not called, and the result is that of a run of its own"
    kept = ['--lessons', tmp_path/'lessons']
    given = ['--inputs', work/'all.jsonl', '--steps', 2]
    teach = lambda new, out, *more: run('refresh', 'zoo/old', 'zoo/adapter', new, *given, '-o', tmp_path/out, *more)
    assert teach('zoo/new', 'first', *kept).exit_code == 0 and teach('zoo/new-far', 'alone').exit_code == 0
    before = result(tmp_path/'lessons')
    for part in ('generate', 'teacher_top_k', 'pseudo_label'): monkeypatch.setattr(teaching, part, None)
    second = teach('zoo/new-far', 'second', *kept)
    assert second.exit_code == 0, second.output
    assert result(tmp_path/'second') == result(tmp_path/'alone') and result(tmp_path/'lessons') == before
    assert {p.name for p in tmp_path.iterdir()} == {'first', 'alone', 'second', 'lessons'}

def test_lessons_of_many_are_shared_too(work, done, tmp_path, monkeypatch):
    kept = dict(lessons=tmp_path/'lessons')
    other = settings(work, new='zoo/new', start=None)
    assert counts(refresh_many(**other, **kept, out=tmp_path/'new')) == (3, 0, 0)
    assert {p.name for p in (tmp_path/'lessons').iterdir()} == {*NAMES}
    monkeypatch.setattr(teaching, 'generate', None)
    assert counts(refresh_many(**settings(work), **kept, out=tmp_path/'far')) == (3, 0, 0)
    for name in NAMES: assert result(tmp_path/'far'/name) == result(work/'out'/name)
    mixed = settings(work, inputs=work/'all.jsonl')
    refused = refresh_many(**mixed, **kept, out=tmp_path/'mixed')
    assert counts(refused) == (0, 0, 3) and 'teacher data of another specialist' in refused['adapters'][0]['error']

def test_lessons_of_somebody_else_are_refused(work, tmp_path, monkeypatch):
    "Another adapter, other questions, another setting; a directory of other things is not called damaged lessons"
    kept = tmp_path/'lessons'
    assert single(work, 'sums', tmp_path/'first', '--lessons', kept).exit_code == 0
    monkeypatch.setattr(teaching, 'generate', None)
    for other in (single(work, 'laws', tmp_path/'out', '--lessons', kept),
                  single(work, 'sums', tmp_path/'out', '--lessons', kept, '--longest', 32)):
        assert other.exit_code == 2 and 'lessons holds teacher data of another specialist' in other.stderr
    monkeypatch.setattr('lorasuite.core.loading.load_model', None)
    (tmp_path/'mine').mkdir()
    other = single(work, 'sums', tmp_path/'out', '--lessons', tmp_path/'mine')
    assert other.exit_code == 2 and 'mine holds no teacher data: name a new directory' in other.stderr
    assert {p.name for p in tmp_path.iterdir()} == {'first', 'lessons', 'mine'}

def test_lessons_that_another_command_is_making(work, tmp_path, monkeypatch):
    "The second is told at once, before it asks anything"
    holder = '''
import sys, time
from lorasuite.core.files import hold_output
with hold_output(sys.argv[1]):
    print('held', flush=True)
    time.sleep(600)
'''
    other = subprocess.Popen([sys.executable, '-c', holder, str(tmp_path/'lessons')], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        monkeypatch.setattr(teaching, 'generate', None)
        found = single(work, 'sums', tmp_path/'out', '--lessons', tmp_path/'lessons')
    finally:
        other.kill()
        other.wait()
    assert found.exit_code == 2 and f'lessons is in use by process {other.pid}' in found.stderr
