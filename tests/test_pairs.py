"""The right pair and the same run: what a command refuses, warns of, or resumes, told by hashes and not by shapes"""
import hashlib, json, os, shutil
from dataclasses import replace
import pytest, torch
import yaml
from models import error, random_decoder
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir, own_directory
from lorasuite.core.loading import load_model, same_weights, weight_hashes
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.card import recorded_base
from lorasuite.stages.pairing import base_doubt, pair_fault
from lorasuite.stages.transfer import transfer
from lorasuite.training import trainer
from lorasuite.training.examples import load_data
from lorasuite.training.finetune import finetune
from lorasuite.training.trainer import LightTrainer
from lorasuite.cli import app

ZOO = data_dir()/'zoo'
PICKLE = b'cos\nsystem\n(S"touch %s"\ntR.'

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def change(folder):
    "Reverse the rows of one matrix of each layer: the same names and shapes, another model"
    t = load_file(folder/'model.safetensors')
    t |= {k: x.flip(0).contiguous() for k, x in t.items() if 'down_proj' in k}
    save_file(t, folder/'model.safetensors', metadata={'format': 'pt'})

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A copy of the new model, a sibling of the old one, data, and alignments"
    work = tmp_path_factory.mktemp('pairs')
    for name, copy in (('new', 'new'), ('old', 'sibling')): shutil.copytree(ZOO/name, work/copy)
    change(work/'sibling')
    (work/'data.jsonl').write_text(''.join((ZOO/'train.jsonl').read_text().splitlines(keepends=True)[:16]))
    (work/'texts').write_text(''.join((ZOO/'held_out.txt').read_text().splitlines(keepends=True)[:30]))
    for old, new, out in (('zoo/old', work/'new', 'there'), (work/'new', 'zoo/old', 'back'),
                          (work/'sibling', 'zoo/new', 'other')):
        assert run('align', old, new, '--texts', work/'texts', '-o', work/out).exit_code == 0
    tensors = load_file(ZOO/'adapter'/'adapter_model.safetensors')
    shutil.copytree(ZOO/'adapter', work/'with-head')
    head = {'base_model.model.score.weight': torch.ones(1, 64)}
    save_file(tensors | head, work/'with-head'/'adapter_model.safetensors', metadata={'format': 'pt'})
    (work/'with-head'/'README.md').unlink(missing_ok=True)
    return work

# ---- the right pair

@pytest.mark.parametrize('alignment, message', [('back', 'other way round with `lorasuite align '),
                                                ('other', 'whose weights differ: make one with `lorasuite align')])
def test_an_alignment_of_another_pair_is_refused(work, tmp_path, alignment, message):
    result = run('transfer', 'zoo/adapter', work/alignment, '-o', tmp_path/'out')
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert '--force' in result.stderr and not any(tmp_path.iterdir())

def saved_again(folder, kind):
    "The shipped old model in other files"
    shutil.copytree(ZOO/'old', folder)
    if kind == 'pickle': return as_pickle(folder)
    (folder/'model.safetensors').unlink()
    load_model('zoo/old', dtype=torch.float16).model.save_pretrained(folder, max_shard_size='100KB')

@pytest.mark.parametrize('kind', ['shards', 'pickle'])
def test_the_same_weights_saved_again_are_the_same_model(work, tmp_path, kind):
    saved_again(tmp_path/'again', kind)
    adapter = Adapter.load('zoo/adapter')
    assert base_doubt(adapter, tmp_path/'again') is None
    assert 'WRONG BASE' in base_doubt(adapter, work/'sibling') and 'again' not in base_doubt(adapter, work/'sibling')
    assert same_weights('zoo/old', str(tmp_path/'again')) and same_weights('zoo/old', str(work/'sibling')) is False
    maps = Alignment.load(work/'other')
    maps.old = replace(maps.old, name=str(tmp_path/'again'), sha256=weight_hashes(str(tmp_path/'again')))
    assert pair_fault(adapter, maps) is None
    maps.old.sha256['model.safetensors'] = '0'*64
    assert pair_fault(adapter, maps).startswith(f'the weight files of {tmp_path/"again"} have changed')

def as_pickle(folder):
    "Keep the weights as older models have them"
    torch.save(load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
    (folder/'model.safetensors').unlink()

def other_heads(folder):
    "Divide the same weights into twice as many heads"
    config = json.loads((folder/'config.json').read_text())
    heads = {k: 2*config[k] for k in ('num_attention_heads', 'num_key_value_heads')}
    size = config['hidden_size']//config['num_attention_heads']//2
    (folder/'config.json').write_text(json.dumps(config | heads | dict(head_dim=size)))

def other_tokens(folder):
    "Give two tokens each other's ids"
    tokenizer = json.loads((folder/'tokenizer.json').read_text())
    vocabulary = tokenizer['model']['vocab']
    a, b = [token for token, i in vocabulary.items() if i in (40, 41)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder/'tokenizer.json').write_text(json.dumps(tokenizer))

@pytest.mark.parametrize('edit, message', [(other_heads, 'the configuration of '), (other_tokens, 'the tokenizer of ')])
def test_an_alignment_of_a_model_that_reads_otherwise_is_refused(work, tmp_path, edit, message):
    shutil.copytree(work/'new', tmp_path/'new')
    assert run('align', 'zoo/old', tmp_path/'new', '--texts', work/'texts', '-o', tmp_path/'maps').exit_code == 0
    edit(tmp_path/'new')
    result = run('transfer', 'zoo/adapter', tmp_path/'maps', '-o', tmp_path/'out')
    assert result.exit_code == 2 and message in result.stderr
    assert 'changed since the alignment was made' in result.stderr

def test_weights_in_a_pickle_are_compared_too(work, tmp_path):
    shutil.copytree(work/'new', tmp_path/'new')
    as_pickle(tmp_path/'new')
    assert run('align', 'zoo/old', tmp_path/'new', '--texts', work/'texts', '-o', tmp_path/'maps').exit_code == 0
    file = tmp_path/'new'/'pytorch_model.bin'
    torch.save({k: t.flip(0) if 'down_proj' in k else t for k, t in torch.load(file).items()}, file)
    result = run('transfer', 'zoo/adapter', tmp_path/'maps', '-o', tmp_path/'out')
    assert result.exit_code == 2 and 'have changed since' in result.stderr

def test_other_files_beside_the_weights_change_nothing(work, tmp_path):
    shutil.copytree(work/'new', tmp_path/'new')
    assert run('align', 'zoo/old', tmp_path/'new', '--texts', work/'texts', '-o', tmp_path/'maps').exit_code == 0
    save_file({'note': torch.ones(2)}, tmp_path/'new'/'note.safetensors')
    assert run('transfer', 'zoo/adapter', tmp_path/'maps', '-o', tmp_path/'out').exit_code == 0

def test_convert_warns_of_another_base(work, tmp_path):
    result = run('convert', 'zoo/adapter', '--base', work/'sibling', '-o', tmp_path/'out')
    assert result.exit_code == 0 and 'WRONG BASE?' in result.stderr

def test_a_stale_alignment_is_refused_unless_forced(work, tmp_path):
    shutil.copytree(work/'new', tmp_path/'new')
    assert run('align', 'zoo/old', tmp_path/'new', '--texts', work/'texts', '-o', tmp_path/'maps').exit_code == 0
    transfer = ['transfer', 'zoo/adapter', tmp_path/'maps', '-o']
    measure = f'lorasuite evaluate {tmp_path/"new"} --adapter {tmp_path/"fresh"} --data FILE'
    said = f'how many answers are right was not measured: {measure}'
    done = run(*transfer, tmp_path/'fresh')
    assert done.stdout.splitlines()[-1] == said and not done.stderr # no warning
    change(tmp_path/'new')
    result = run(*transfer, tmp_path/'out')
    assert result.exit_code == 2 and f'{tmp_path/"new"} have changed since' in result.stderr
    forced = run(*transfer, tmp_path/'out', '--force')
    assert forced.exit_code == 0 and 'warning: the weight files of' in forced.stderr
    worn = run('evaluate', tmp_path/'new', '--adapter', tmp_path/'fresh', '--data', work/'data.jsonl')
    assert worn.exit_code == 0 and 'WRONG BASE?' in worn.stderr # its card knows the hash of the base

@pytest.mark.parametrize('args', [
    'evaluate BASE --adapter zoo/adapter --data DATA', 'finetune BASE zoo/adapter --data DATA --steps 1 -o OUT',
    'refresh BASE zoo/adapter zoo/new --inputs DATA --steps 1 -o OUT',
    'upgrade BASE zoo/new zoo/adapter --texts TEXTS -o OUT', 'inspect BASE zoo/new zoo/adapter'])
def test_an_adapter_on_another_base_is_warned_of(work, tmp_path, args):
    words = dict(DATA=work/'data.jsonl', TEXTS=work/'texts', OUT=tmp_path/'out')
    for base, doubted in ((work/'sibling', True), ('zoo/old', False)):
        result = run(*[(words | dict(BASE=base)).get(word, word) for word in args.split()])
        assert ('warning: WRONG BASE? the weight files of' in result.output) == doubted, result.output
        shutil.rmtree(tmp_path/'out', ignore_errors=True)

def test_every_command_names_what_it_skips(work, tmp_path):
    data, worn = ['--data', work/'data.jsonl'], work/'with-head'
    refresh = ['refresh', 'zoo/old', worn, 'zoo/new', '--inputs', work/'data.jsonl', '--steps', 1, '-o', tmp_path/'b']
    for command in (['evaluate', 'zoo/old', '--adapter', worn, *data],
                    ['finetune', 'zoo/old', worn, *data, '--steps', 1, '-o', tmp_path/'a'], refresh):
        result = run(*command)
        assert result.exit_code == 0 and 'score.weight' in result.stdout, (command, result.output)
    assert '`score.weight`' in (tmp_path/'a'/'README.md').read_text()

def fetched(cache, name, folder, commit, branch):
    "Put a folder into a cache as the Hub's library keeps what it fetched"
    home = cache/f'models--{name.replace("/", "--")}'
    (home/'refs').mkdir(parents=True, exist_ok=True)
    (home/'refs'/branch).write_text(commit)
    shutil.copytree(folder, home/'snapshots'/commit)

def test_models_and_revisions_of_the_hub(work, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    places = (('org/old', ZOO/'old', 'a', 'v1'), ('org/old', work/'sibling', 'b', 'main'),
              ('org/new', ZOO/'new', 'c', 'main'))
    for name, folder, letter, branch in places: fetched(tmp_path/'hub', name, folder, letter*40, branch)
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    file = tmp_path/'adapter'/'adapter_config.json'
    settings = json.loads(file.read_text()) | dict(base_model_name_or_path='org/old')
    for revision, doubt in (('v1', 'are not those of org/old (revision v1)'), ('main', None),
                            ('v2', 'trained on the revision v2 of org/old'), (None, None)):
        file.write_text(json.dumps(settings | dict(revision=revision)))
        said = base_doubt(Adapter.load(tmp_path/'adapter'), 'org/old')
        assert (said is None) if doubt is None else doubt in said
    assert 'WRONG BASE? the weight files of org/new' in base_doubt(Adapter.load(tmp_path/'adapter'), 'org/new')
    alignment = align('org/old', 'org/new', ['Ann keeps a cat.']*5)
    assert (alignment.old.revision, alignment.new.revision) == ('b'*40, 'c'*40)
    assert alignment.old.sha256 == weight_hashes(str(work/'sibling'))

def test_a_revision_is_part_of_a_name(work, tmp_path, monkeypatch):
    "org/name@revision, of models and of adapters; what is written names both as PEFT does"
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    places = (('org/old', ZOO/'old', 'a', 'v1'), ('org/old', work/'sibling', 'b', 'main'),
              ('org/new', ZOO/'new', 'c', 'main'), ('org/adapter', ZOO/'adapter', 'd', 'v2'))
    for name, folder, letter, branch in places: fetched(tmp_path/'hub', name, folder, letter*40, branch)
    assert weight_hashes('org/old@v1') == weight_hashes('zoo/old') != weight_hashes('org/old')
    assert weight_hashes('org/old@' + 'a'*40) == weight_hashes('zoo/old')
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    file = tmp_path/'adapter'/'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(base_model_name_or_path='org/old', revision='v1')))
    adapter = Adapter.load(tmp_path/'adapter')
    assert 'give org/old@v1' in base_doubt(adapter, 'org/old') and base_doubt(adapter, 'org/old@v1') is None
    same = Adapter.load('org/adapter@v2')
    assert same.updates.keys() == adapter.updates.keys() and same.source['name'] == 'org/adapter@v2'
    maps = align('org/old@v1', 'org/new@main', ['Ann keeps a cat.']*5)
    assert (maps.old.revision, maps.new.revision) == ('a'*40, 'c'*40)
    assert pair_fault(adapter, maps) is None
    transfer(adapter, maps).save(tmp_path/'carried')
    said = json.loads((tmp_path/'carried'/'adapter_config.json').read_text())
    assert (said['base_model_name_or_path'], said['revision']) == ('org/new', 'main')
    assert 'base_model: org/new\n' in (tmp_path/'carried'/'README.md').read_text()
    assert base_doubt(Adapter.load(tmp_path/'carried'), 'org/new@main') is None
    transfer(adapter, maps).save(tmp_path/'mlx', format='mlx')
    said = json.loads((tmp_path/'mlx'/'adapter_config.json').read_text())
    assert (said['model'], said['revision']) == ('org/new', 'main') # mlx-lm looks for `model` as it stands
    again = Adapter.load(tmp_path/'mlx')
    assert (again.base, again.source['base_revision']) == ('org/new', 'main')
    assert base_doubt(again, 'org/new@main') is None
    for name in ('org/old@v9', 'org/none@v1'):
        with pytest.raises(FileNotFoundError, match=f'no revision {name[-2:]} of {name[:-3]}.*HF_HUB_OFFLINE'):
            load_model(name)

@pytest.mark.parametrize('args', [['evaluate', 'zoo/adapter', '--data', 'DATA'], ['align', 'zoo/adapter', 'zoo/new'],
                                  ['inspect', 'zoo/adapter', 'zoo/new'], ['finetune', 'zoo/adapter', '--data', 'DATA']])
def test_an_adapter_is_no_model(work, tmp_path, args):
    args = [work/'data.jsonl' if a == 'DATA' else a for a in args]
    out = ['-o', tmp_path/'out'] if args[0] in ('align', 'finetune') else []
    result = run(*args, *out)
    told = [line for line in result.stderr.splitlines() if ' examples, read from ' not in line]
    assert result.exit_code == 2 and len(told) == 1
    assert 'zoo/adapter is an adapter, not a model: give the model' in result.stderr and '(zoo/old)' in result.stderr

def head_of(folder): return yaml.safe_load((folder/'README.md').read_text().split('---\n')[1])

def test_cards_are_begun_kept_and_extended(work, tmp_path):
    assert run('transfer', 'zoo/adapter', work/'there', '-o', tmp_path/'carried').exit_code == 0
    card = (tmp_path/'carried'/'README.md').read_text()
    checksum = json.loads((work/'there'/'alignment.json').read_text())['checksum']
    assert checksum in card and 'adapter: `zoo/adapter`, SHA-256' in card and head_of(tmp_path/'carried')['lorasuite']
    data = ['--data', work/'data.jsonl', '--steps', 1]
    assert run('finetune', work/'new', tmp_path/'carried', *data, '-o', tmp_path/'tuned').exit_code == 0
    tuned = (tmp_path/'tuned'/'README.md').read_text()
    assert tuned.startswith(card) and 'Tuned afterwards on 16' in tuned and f'the start: `{tmp_path}/carried`' in tuned
    again = ['refresh', 'zoo/old', 'zoo/adapter', work/'new', '--inputs', work/'data.jsonl', '--steps', 1]
    assert run(*again, '--start', tmp_path/'tuned', '-o', tmp_path/'taught').exit_code == 0
    assert (tmp_path/'taught'/'README.md').read_text().startswith(tuned)
    assert run('finetune', 'zoo/old', work/'with-head', *data, '-o', tmp_path/'begun').exit_code == 0
    assert head_of(tmp_path/'begun')['base_model'] == 'zoo/old'

@pytest.mark.parametrize('name', ['a: b', '#1', 'x\n---\ny', 'yes', '123', '<b>`x`</b>'])
def test_names_do_not_break_the_card(work, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ZOO/'new', tmp_path/name)
    result = run('upgrade', 'zoo/old', name, 'zoo/adapter', '--texts', work/'texts', '-o', 'out')
    assert result.exit_code == 0, result.output
    card = (tmp_path/'out'/'README.md').read_text()
    assert yaml.safe_load(card.split('\n---\n')[0].removeprefix('---\n'))['base_model'] == name
    assert '\n---\n' not in card.split('\n---\n', 1)[1] and Adapter.load('out').base == name

# ---- what is refused before anything is written

@pytest.mark.parametrize('wrong, message', [
    (['--lr', 'nan'], 'lr=nan'), (['--lr', '-1e-4'], 'lr=-0.0001'), (['--seed', '-1'], 'seed=-1'),
    (['--steps', 2**70], 'steps='), (['--epochs', 'inf'], 'epochs=inf'), (['--rank', 10**9], 'rank='),
    (['--schedule', 'cosine_with_min_lr'], 'needs min_lr'),
    (['--rank', 4, 'zoo/adapter'], '--rank cannot apply beside'),
    (['--roles', 'q', 'zoo/adapter'], '--roles cannot apply'), (['--epochs', 1, '--steps', 2], '--epochs cannot apply'),
    ([''], 'adapter is empty'), (['--roles', ''], 'roles is empty')])
def test_a_wrong_option_leaves_nothing_in_the_way(work, tmp_path, wrong, message):
    result = run('finetune', 'zoo/old', '--data', work/'data.jsonl', '-o', tmp_path/'out', *wrong)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.output
    assert not any(tmp_path.iterdir())

def test_options_without_effect(work, tmp_path):
    for args in (['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '-o', tmp_path/'out', '--lr', .1],
                 ['evaluate', 'zoo/new', '--tasks', 'boolq', '--match', 'number']):
        result = run(*args)
        assert result.exit_code == 2 and 'cannot apply without --data' in result.stderr

def test_the_home_directory_is_expanded(work, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(work/'cache'))
    shutil.copytree(ZOO/'adapter', tmp_path/'mine')
    assert run('transfer', '~/mine', work/'there', '--out=~/deep/out').exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['deep', 'mine']
    assert [p.name for p in (tmp_path/'deep').iterdir()] == ['out']

# ---- the same run, or none

def cut(monkeypatch, command, saves=2):
    "Interrupt a command when it has saved some checkpoints"
    save, count = LightTrainer._save_checkpoint, []
    def saving(self, *args, **kwargs):
        save(self, *args, **kwargs)
        count.append(1)
        if len(count) == saves: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(LightTrainer, '_save_checkpoint', saving)
        stopped = run(*command)
    out = command[command.index('-o') + 1]
    assert stopped.exit_code == 130 and stopped.stderr.splitlines()[-1] == (
        'lorasuite: interrupted; start the same command again to resume '
        f'(checkpoints in {out.with_name(f".{out.name}-checkpoints")})')

@pytest.fixture
def interrupted(work, tmp_path, monkeypatch):
    "A training that was interrupted after 4 of 10 steps"
    shutil.copytree(ZOO/'old', tmp_path/'base')
    command = ['finetune', tmp_path/'base', 'zoo/adapter', '--data', work/'data.jsonl', '--steps', 10, '--lr', 1e-3,
               '--batch-size', 8, '--json', '-o']
    whole = run(*command, tmp_path/'whole')
    cut(monkeypatch, [*command, tmp_path/'out'])
    return command, json.loads(whole.stdout)

def test_another_run_does_not_resume(work, tmp_path, interrupted):
    command, _ = interrupted
    for more, message in ((['--steps', 20], 'steps (10, now 20)'), (['--lr', 1e-4], 'lr (0.001, now'),
                          (['--seed', 1], 'seed (0, now 1)'), (['--whole'], 'the data: '),
                          (['--schedule', 'cosine'], 'the schedule (linear, now cosine)'),
                          (['--prompt', '{instruction} '], 'the prompt: ')):
        result = run(*command, tmp_path/'out', *more)
        assert result.exit_code == 2, result.output
        assert f'interrupted run that differs from this one in {message}' in result.stderr
    change(tmp_path/'base')
    result = run(*command, tmp_path/'out')
    assert result.exit_code == 2 and 'differs from this one in the base model: ' in result.stderr
    kept = sorted(p.name for p in (tmp_path/'.out-checkpoints').glob('checkpoint-*'))
    assert kept == ['checkpoint-2', 'checkpoint-4']

def test_before_the_first_checkpoint_there_is_no_run_to_differ_from(tmp_path, monkeypatch, tokenizer):
    "Killed there, the corrected settings are taken at once"
    decoder, rows, kept = random_decoder(tokenizer), load_data('zoo/train.jsonl')[:8], tmp_path/'checkpoints'
    with monkeypatch.context() as m:
        m.setattr(trainer, '_timed_run', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): finetune(decoder, rows, steps=2, lr=9., checkpoints=kept)
    assert json.loads((kept/'run.json').read_text())['lr'] == '9.0'
    _, losses = finetune(decoder, rows, steps=2, lr=1e-3, checkpoints=kept)
    assert len(losses) == 2 and json.loads((kept/'run.json').read_text())['lr'] == '0.001'

def test_an_upgrade_with_other_settings_is_refused_before_the_alignment(tmp_path, monkeypatch):
    kept = tmp_path/'.out-checkpoints'
    own_directory(kept)
    (kept/'checkpoint-8').mkdir()
    (kept/'run.json').write_text(json.dumps(dict(steps='40', lr='0.0003')))
    monkeypatch.setattr('lorasuite.training.upgrade.align', lambda *args, **kwargs: pytest.fail('it aligned'))
    command = ['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--inputs', 'zoo/test.jsonl', '-o', tmp_path/'out']
    result = run(*command, '--steps', 10)
    assert result.exit_code == 2 and 'differs from this one in steps (40, now 10)' in result.stderr
    result = run(*command, '--lr', '1e-5')
    assert result.exit_code == 2 and 'differs from this one in lr (0.0003, now 1e-05)' in result.stderr
    assert (kept/'checkpoint-8').is_dir() and not (tmp_path/'out').exists()

def test_another_upgrade_is_refused_before_the_alignment_and_says_what_differs(work, tmp_path, monkeypatch):
    (tmp_path/'few.jsonl').write_text('{"instruction": "Who?", "output": "Kirk"}\n')
    command = ['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--texts', work/'texts', '--inputs', work/'data.jsonl',
               '--steps', 5, '--drift-rank', 4, '-o', tmp_path/'out']
    cut(monkeypatch, command, saves=1)
    with monkeypatch.context() as m:
        m.setattr('lorasuite.training.upgrade.align', lambda *args, **kwargs: pytest.fail('it aligned'))
        for more, message in ((['--drift-rank', 2], 'drift_rank (4, now 2)'),
                              (['--longest', 32], 'longest (64, now 32)'),
                              (['--first-line'], 'first_line (False, now True)'),
                              (['--seed', 1], 'seed (0, now 1)'),
                              (['--inputs', tmp_path/'few.jsonl'], 'the questions'),
                              (['--data', tmp_path/'few.jsonl'], 'the labelled examples'),
                              (['--prompt', '{instruction} '], 'the form of the prompts'),
                              (['--texts', tmp_path/'few.jsonl'], 'the texts'),
                              (['--steps', 3], 'the length of the training (5 steps, now 3 steps)')):
            result = run(*command, *more)
            assert result.exit_code == 2, result.output
            assert f'differs from this one in {message}: repeat that run' in result.stderr
        other = [work/'sibling' if word == 'zoo/old' else word for word in command]
        result = run(*other)
        assert result.exit_code == 2 and 'differs from this one in the old model: ' in result.stderr
    result = run(*command)
    assert result.exit_code == 0 and 'resumed at step 1' in result.stderr

def test_a_damaged_checkpoint_is_passed_over(tmp_path, interrupted):
    command, whole = interrupted
    last = tmp_path/'.out-checkpoints'/'checkpoint-4'
    (last/'optimizer.pt').write_bytes((last/'optimizer.pt').read_bytes()[:-100])
    (tmp_path/'.out-checkpoints'/'checkpoint-6').mkdir() # was never complete
    resumed = run(*command, tmp_path/'out')
    assert resumed.exit_code == 0 and 'checkpoint-4 is damaged: the run goes on from' in resumed.stderr
    assert resumed.stderr.splitlines().count('resumed at step 2') == 1
    assert json.loads(resumed.stdout)['loss'] == whole['loss']
    a, b = (load_file(tmp_path/name/'adapter_model.safetensors') for name in ('whole', 'out'))
    assert all(a[k].equal(b[k]) for k in a)

def test_planted_pickles_run_nothing(tmp_path, interrupted):
    command, whole = interrupted
    last = tmp_path/'.out-checkpoints'/'checkpoint-4'
    for name in ('optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'training_args.bin', 'adapter_model.bin',
                 'pytorch_model.bin', 'scaler.pt'):
        (last/name).write_bytes(PICKLE % os.fsencode(tmp_path/'was_here'))
    seal = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in last.iterdir()}
    seal.pop('sealed.json')
    (last/'sealed.json').write_text(json.dumps(seal)) # as somebody would who knows how
    result = run(*command, tmp_path/'out')
    assert result.exit_code == 2 and 'checkpoint-4 holds more than tensors' in result.stderr
    assert not (tmp_path/'was_here').exists()

def test_another_number_of_threads_resumes(work, tmp_path, monkeypatch):
    command = ['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--texts', work/'texts', '--data', work/'data.jsonl',
               '--steps', 5, '--json', '-o']
    whole = json.loads(run(*command, tmp_path/'whole').stdout)
    cut(monkeypatch, [*command, tmp_path/'out'])
    torch.set_num_threads(2)
    try: resumed = run(*command, tmp_path/'out')
    finally: torch.set_num_threads(1)
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)['loss'] == pytest.approx(whole['loss'], rel=1e-2)
    a, b = (load_file(tmp_path/name/'adapter_model.safetensors') for name in ('whole', 'out'))
    assert all(error(a[k].double(), b[k].double()) < 1e-2 or a[k].equal(b[k]) for k in a)

def test_teacher_data_belong_to_the_weights_of_the_teacher(work, tmp_path, monkeypatch):
    shutil.copytree(ZOO/'old', tmp_path/'teacher')
    command = ['refresh', tmp_path/'teacher', 'zoo/adapter', 'zoo/new', '--inputs', work/'data.jsonl', '--steps', 5,
               '-o', tmp_path/'out']
    cut(monkeypatch, command, saves=1)
    change(tmp_path/'teacher')
    result = run(*command)
    assert result.exit_code == 2 and 'lessons holds teacher data of another specialist' in result.stderr
    state = tmp_path/'.out-checkpoints'/'lessons'/'state.json'
    state.write_text(state.read_text()[:20])
    result = run(*command)
    assert result.exit_code == 2 and 'lessons holds damaged teacher data' in result.stderr

def test_a_result_of_force_says_so_in_its_card(work, tmp_path):
    shutil.copytree(ZOO/'new', tmp_path/'new')
    align('zoo/old', tmp_path/'new', ['Ann keeps a cat.']*5).save(tmp_path/'maps')
    weights = load_file(tmp_path/'new/model.safetensors')
    weights['model.norm.weight'] *= 2
    save_file(weights, tmp_path/'new/model.safetensors', metadata=dict(format='pt'))
    for adapters, out in ((['zoo/adapter'], ''), (['zoo/adapter', ZOO/'adapter'], '/adapter')):
        target = tmp_path/f'out{len(adapters)}'
        result = run('transfer', *adapters, tmp_path/'maps', '--force', '-o', target)
        assert result.exit_code == 0, result.output
        card = next(target.rglob('README.md')).read_text()
        assert 'made by force (`--force`), although the weight files of' in card

def test_the_card_of_a_refresh_names_the_specialist(work, tmp_path):
    (tmp_path/'q.json').write_text('[{"instruction": "Where does Mamus live?"}]')
    result = run('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', tmp_path/'q.json', '--steps', 1,
                 '-o', tmp_path/'out')
    assert result.exit_code == 0, result.output
    card = (tmp_path/'out/README.md').read_text()
    assert '- the old specialist: `zoo/adapter`, SHA-256 `' in card and '- its base: `zoo/old`, `model.safeten' in card

def test_another_method_is_said_as_such(work, tmp_path):
    from lorasuite.training.trainer import _differences
    said = _differences(['base model', 'start', 'method'], dict(method='a'), {})
    assert said == 'the way of training (a, now none)'

def saved_as(folder, dtype):
    "The shipped old model in another type"
    shutil.copytree(ZOO/'old', folder)
    load_model('zoo/old', dtype=dtype).model.save_pretrained(folder)
    return folder

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_the_same_weights_in_another_type_are_the_same_model(tmp_path, dtype):
    folder, adapter = saved_as(tmp_path/'other', dtype), Adapter.load('zoo/adapter')
    assert weight_hashes(str(folder)) != weight_hashes('zoo/old') and base_doubt(adapter, folder) is None
    assert same_weights(str(folder), 'zoo/old') and same_weights('zoo/old', str(folder))

def test_the_card_names_the_base_of_the_last_training(tmp_path):
    "Tuned on other weights under the same name, and on another model: both are its base from then on"
    base, few = tmp_path/'base', ('--data', 'zoo/test.jsonl', '--steps', 1)
    shutil.copytree(ZOO/'new', base)
    assert run('upgrade', 'zoo/old', base, 'zoo/adapter', '-o', tmp_path/'carried').exit_code == 0
    shutil.copy(ZOO/'new-far'/'model.safetensors', base)
    for name in (base, 'zoo/new-far'):
        done = run('finetune', name, tmp_path/'carried', *few, '-o', tmp_path/'tuned')
        assert done.exit_code == 0 and 'WRONG BASE' in done.stderr
        tuned = Adapter.load(tmp_path/'tuned')
        known = recorded_base(tuned.card)
        assert known == dict(name=str(name), sha256=weight_hashes('zoo/new-far')) and tuned.base == str(name)
        assert f'\nbase_model: {name}\n' in tuned.card and f'- trained on: `{name}`' in tuned.card
        assert base_doubt(tuned, name) is None and 'WRONG BASE' in base_doubt(tuned, 'zoo/new')
        shutil.rmtree(tmp_path/'tuned')
