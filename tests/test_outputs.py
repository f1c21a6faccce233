"""Outputs that cannot be written, commands that are killed: no half is seen, and the same command can be given again"""
import json, multiprocessing, os, resource, shutil, signal, subprocess, sys, time
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
import pytest
import torch
from models import error
from safetensors.torch import load_file
from typer.testing import CliRunner
from lorasuite.core.files import atomic_directory, data_dir, mark_directory, remove_directory, scratch_directory
from lorasuite.core.loading import load_model
from lorasuite.stages.alignment import align
from lorasuite.stages.cka import cka_table
from lorasuite.stages.transfer import transfer
from lorasuite.cli import app

@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    "Every command that writes, but for its output"
    work = tmp_path_factory.mktemp('made')
    maps = align('zoo/old', 'zoo/new')
    maps.save(work/'alignment')
    transfer('zoo/adapter', maps).save(work/'carried')
    first = lambda name, n: ''.join((data_dir()/'zoo'/name).read_text().splitlines(keepends=True)[:n])
    (work/'data.jsonl').write_text(first('train.jsonl', 20))
    (work/'texts').write_text(first('held_out.txt', 30))
    data, carried = str(work/'data.jsonl'), str(work/'carried')
    return dict(align=['align', 'zoo/old', 'zoo/new', '--texts', str(work/'texts')],
                transfer=['transfer', 'zoo/adapter', str(work/'alignment')],
                upgrade=['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter'],
                finetune=['finetune', 'zoo/new', carried, '--data', data, '--steps', '5'],
                refresh=['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', data, '--start', carried,
                         '--steps', '5'])

COMMANDS = ('align', 'transfer', 'finetune', 'refresh', 'upgrade')

def run(command, out): return CliRunner().invoke(app, [*command, '-o', str(out)])

@contextmanager
def disk_full(beyond):
    "No file may grow beyond so many bytes"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beyond, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)

# ---- outputs that cannot be written

def directory(work):
    (work/'here').mkdir()
    return work/'here'

def file(work):
    (work/'here').write_text('mine')
    return work/'here'

def dangling(work):
    (work/'here').symlink_to(work/'nowhere')
    return work/'here'

def below_a_file(work): return file(work)/'deep'/'out'
def read_only(work): return '/proc/lorasuite/out'

# what commands call when they run: none of it may be called
WORK = ('core.adapter.Adapter', 'core.loading.load_model', 'stages.alignment.align', 'stages.alignment.Alignment',
        'stages.transfer.transfer', 'training.examples.load_data', 'training.finetune.finetune',
        'training.refresh.refresh', 'training.upgrade.upgrade')

@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('make, beyond, message', [
    (directory, -1, 'exists already: name another output'),
    (file, -1, 'exists already'),
    (dangling, -1, 'exists already'),
    (below_a_file, -1, 'Not a directory): make room or get permission there'),
    (read_only, -1, '): make room or get permission there'),
    (lambda work: work/'out', 0, 'File too large')])
def test_refused_before_any_work(commands, tmp_path, monkeypatch, command, make, beyond, message):
    modules = [import_module(f'lorasuite.{work.rpartition(".")[0]}') for work in WORK] # first all, which use each other
    for module, work in zip(modules, WORK): monkeypatch.setattr(module, work.rpartition('.')[2], None)
    out = make(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    with disk_full(beyond): result = run(commands[command], out)
    assert result.exit_code == 2 and sorted(tmp_path.rglob('*')) == before
    assert len(result.stderr.splitlines()) == 1 and f'{out} ' in result.stderr and message in result.stderr

@pytest.mark.parametrize('command, beyond', [
    ('align', 100_000), ('transfer', 100_000), ('upgrade', 100_000), ('finetune', 1_000_000), ('refresh', 20_000),
    ('refresh', 1_000_000)])
def test_the_disk_fills_up(commands, tmp_path, monkeypatch, command, beyond):
    table = cka_table(load_model('zoo/old'), load_model('zoo/new')) # its temporary files lie on another disk
    monkeypatch.setattr('lorasuite.stages.alignment.cka_table', lambda *args, **kwargs: table)
    with disk_full(beyond): result = run(commands[command], tmp_path/'out')
    usual = (' examples, read from ', ' lessons from ')
    told = [line for line in result.stderr.splitlines() if not any(words in line for words in usual)]
    assert result.exit_code == 2 and len(told) == 1
    assert f'cannot write {tmp_path}/' in result.stderr and 'make room' in result.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {'.out-checkpoints'}
    assert run(commands[command], tmp_path/'out').exit_code == 0 and [p.name for p in tmp_path.iterdir()] == ['out']

@pytest.mark.parametrize('command', ['align', 'upgrade'])
def test_the_disk_of_temporary_files_fills_up(commands, tmp_path, command):
    with disk_full(100_000): result = run(commands[command], tmp_path/'out')
    usual = (' examples, read from ', ' lessons from ')
    told = [line for line in result.stderr.splitlines() if not any(words in line for words in usual)]
    assert result.exit_code == 2 and len(told) == 1 and not [*tmp_path.iterdir()]
    assert 'cannot write ' in result.stderr and 'or set TMPDIR to a directory with room' in result.stderr

HOLDER = """
import sys, time
from pathlib import Path
from lorasuite.core.files import hold_output
with hold_output(Path(sys.argv[1])) as place:
    (place/'half').write_text('')
    print('ready', flush=True)
    time.sleep(600)
"""

@contextmanager
def holder(out):
    "Another process that makes an output; it is killed at the end"
    other = subprocess.Popen([sys.executable, '-c', HOLDER, out], stdout=subprocess.PIPE, text=True)
    try:
        other.stdout.readline()
        yield other
    finally:
        other.kill()
        other.communicate()

def test_only_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path/'.out-mine').mkdir()
    with holder(tmp_path/'out'): pass
    assert (tmp_path/'.out-lorasuite'/'half').exists()
    with holder(tmp_path/'out-lorasuite'): # another output, whose name begins alike
        with atomic_directory(tmp_path/'out') as tmp:
            assert {p.name for p in tmp_path.iterdir()} == {'.out-mine', '.out-lorasuite', '.out-lorasuite-lorasuite'}
            assert not (tmp_path/'.out-lorasuite'/'half').exists()
    remove_directory(tmp_path/'out')
    assert (tmp_path/'out').is_dir() # an output has no mark: it is the user's
    mark_directory(tmp_path/'out')
    remove_directory(tmp_path/'out')
    assert {p.name for p in tmp_path.iterdir()} == {'.out-mine', '.out-lorasuite-lorasuite'}

@pytest.mark.parametrize('name', ['.out-lorasuite', '.out-checkpoints'])
@pytest.mark.parametrize('command', ['finetune', 'refresh'])
def test_what_the_user_made_is_left_alone(commands, tmp_path, name, command):
    (tmp_path/name).mkdir()
    (tmp_path/name/'thesis').write_text('mine')
    result = run(commands[command], tmp_path/'out')
    assert result.exit_code == 2 and f'{name} is in the way' in result.stderr
    assert [p.name for p in tmp_path.rglob('*')] == [name, 'thesis']

def test_a_second_run_is_told_who_makes_the_output(commands, tmp_path):
    with holder(tmp_path/'out') as other:
        result = run(commands['transfer'], tmp_path/'out')
        assert result.exit_code == 2 and f'out is in use by process {other.pid} on ' in result.stderr
    assert run(commands['transfer'], tmp_path/'out').exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ['out']

@pytest.mark.parametrize('umask', [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(commands, tmp_path, umask):
    before = os.umask(umask)
    try: assert run(commands['transfer'], tmp_path/'deep'/'out').exit_code == 0
    finally: os.umask(before)
    for path in (tmp_path/'deep').rglob('*'):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path

def test_all_files_are_on_the_disk_before_the_name_is_there(commands, tmp_path, monkeypatch):
    flushed, names = [], []
    def fsync(handle): flushed.append(os.readlink(f'/proc/self/fd/{handle}').rpartition('/')[2])
    rename = Path.rename
    def renamed(path, to):
        names.append((Path(to).name, {*flushed}))
        return rename(path, to)
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(Path, 'rename', renamed)
    assert run(commands['transfer'], tmp_path/'out').exit_code == 0
    (name, before), = names
    assert name == 'out' and {'out', 'adapter_config.json', 'adapter_model.safetensors', 'README.md'} <= before
    assert flushed[-1] == tmp_path.name

def test_scratch_of_a_killed_run_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    (tmp_path/'lorasuite-mine').mkdir()
    code = "import os\nfrom lorasuite.core.files import scratch_directory\nwith scratch_directory(): os._exit(9)"
    subprocess.run([sys.executable, '-c', code], env=os.environ | dict(TMPDIR=str(tmp_path)))
    assert len([*tmp_path.iterdir()]) == 2
    with scratch_directory(): assert len([*tmp_path.iterdir()]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ['lorasuite-mine']

def test_the_same_command_gives_the_same_bytes(commands, tmp_path):
    for name in 'ab': assert run(commands['transfer'], tmp_path/name).exit_code == 0
    for file in (tmp_path/'a').iterdir(): assert file.read_bytes() == (tmp_path/'b'/file.name).read_bytes(), file.name
    targets = json.loads((tmp_path/'a'/'adapter_config.json').read_text())['target_modules']
    assert len(targets) == 7 and targets == sorted(targets) # PEFT writes them in the order of a set, which is random

# ---- killed at any moment

WRITES = ('open', 'os.mkdir', 'os.chmod', 'os.rename', 'os.rmdir', 'shutil.rmtree')

def attempt(command, work, writes, last):
    "Run a command in a process that kills itself when it is about to write in `work` for the last time that it may"
    def count(event, values):
        if event not in WRITES or not str(values[0]).startswith(work): return
        writes.value += 1
        if writes.value == last: os.kill(os.getpid(), signal.SIGKILL)
    sys.stdout = open(os.devnull, 'w')
    sys.addaudithook(count)
    app([*command, '-o', f'{work}/out'])

@pytest.fixture(scope='module')
def processes():
    "Processes that need not import everything again, and that share nothing with this one"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['lorasuite.cli', 'lorasuite.training.upgrade', 'lorasuite.training.refresh'])
    def start(command, work, last=0, seconds=None):
        writes, begin = context.RawValue('i', 0), time.perf_counter()
        process = context.Process(target=attempt, args=(command, str(work), writes, last))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode, writes.value, time.perf_counter() - begin
    start(['--help'], '/nowhere') # which waits until everything is imported
    return start

def same(a, b):
    "Do two outputs hold the same files and, up to rounding, the same tensors?"
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    for file in a.glob('*.safetensors'):
        x, y = load_file(file), load_file(b/file.name)
        assert x.keys() == y.keys() and all(error(x[k].double(), y[k].double()) < 1e-5 or x[k].equal(y[k]) for k in x)
    return True

@pytest.mark.parametrize('name, moments', [
    ('align', (.6, -4, -2, -1)), ('transfer', (.6, *range(-10, 0))), ('finetune', (.6, 13, 45, -8, -3, -1)),
    ('refresh', (.6, 5, 12, 30, -8, -1))])
def test_killed_and_started_again(commands, processes, tmp_path, name, moments):
    (tmp_path/'whole').mkdir()
    (tmp_path/'killed').mkdir()
    complete, out = tmp_path/'whole'/'out', tmp_path/'killed'/'out'
    code, writes, seconds = processes(commands[name], complete.parent)
    assert code == 0 and [p.name for p in complete.parent.iterdir()] == ['out']
    for moment in moments:
        stop = dict(seconds=moment*seconds) if isinstance(moment, float) else dict(last=moment % (writes + 1))
        code, *_ = processes(commands[name], out.parent, **stop)
        assert code == -signal.SIGKILL or same(out, complete)
        if out.exists(): assert same(out, complete) and not shutil.rmtree(out)
    assert processes(commands[name], out.parent)[0] == 0 and same(out, complete)
    assert [p.name for p in out.parent.iterdir()] == ['out']
