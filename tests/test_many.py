"Many adapters in one command: names, results that stay, failures, killed processes, Ray"
import filecmp, functools, json, os, shutil, signal, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import dying, psutil, pytest, torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from lorasuite.cli import app
from lorasuite.core.files import data_dir
from lorasuite.stages import many
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.many import adapter_names, Job, Options, output_names, transfer_many

os.environ.update(many._ON_RAY) # Ray reads them when it is imported, which a test does before the command

ADAPTER = data_dir()/'zoo'/'adapter'

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def copies(folder, count):
    "Copies of the tiny adapter with other numbers"
    tensors = load_file(ADAPTER/'adapter_model.safetensors')
    for i in range(count):
        shutil.copytree(ADAPTER, folder/f'a{i}')
        changed = {key: t*(1 + i/8) for key, t in tensors.items()}
        save_file(changed, folder/f'a{i}'/'adapter_model.safetensors', metadata={'format': 'pt'})
    return [str(folder/f'a{i}') for i in range(count)]

def tree(folder):
    "The bytes of every file"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def results(out):
    "The bytes of every result, without the report and the claims"
    return {name: x for name, x in tree(out).items() if name != 'report.json' and not name.startswith('.claims')}

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    home = tmp_path_factory.mktemp('many')
    align('zoo/old', 'zoo/new').save(home/'alignment')
    copies(home/'adapters', 3)
    return home

@pytest.fixture(scope='module')
def maps(work): return Alignment.load(work/'alignment')

@pytest.fixture
def here(monkeypatch, maps):
    "Do the work in this process, which is quicker than to start others"
    def engine(todo, path, jobs): yield from ((job, many.carry_one(job, maps)) for job in todo)
    monkeypatch.setitem(many.ENGINES, 'processes', engine)

def counts(report): return report['carried'], report['kept'], report['failed']

def test_names(tmp_path):
    assert output_names(['a/x', 'b/x', 'org/y', 'y/y/x']) == ['a--x', 'b--x', 'y', 'y--x']
    assert output_names(['org/a', 'org/.b', '/']) == ['a', 'b', 'adapter']
    for name in ('b', 'a'): (tmp_path/name).mkdir()
    (tmp_path/'list').write_text(f'# ours\n\n{tmp_path}/a\norg/hub\n{tmp_path}/[b]\n')
    found = adapter_names([f'{tmp_path}/?'], tmp_path/'list')
    assert found == [f'{tmp_path}/a', f'{tmp_path}/b', 'org/hub']
    for names, listed, what in (([], None, 'no adapter is named'), ([f'{tmp_path}/x*'], None, 'no adapter matches'),
                                (['a'], tmp_path/'lost', 'no such list'), ([], os.devnull, 'no such list')):
        with pytest.raises((ValueError, OSError), match=what): adapter_names(names, listed)

def test_a_user_of_the_hub(monkeypatch, work, tmp_path, here):
    "The Hub is asked for the adapters of the alignment's old model, and they are carried as if they were named"
    asked = []
    def stub(self, author, filter):
        asked.append((author, filter))
        return [SimpleNamespace(id=str(work/'adapters'/name)) for name in ('a1', 'a0')]
    monkeypatch.setattr('huggingface_hub.HfApi.list_models', stub)
    assert [Path(x).name for x in many.hub_adapters('carol', 'org/old')] == ['a0', 'a1']
    assert asked == [('carol', 'base_model:adapter:org/old')]
    assert 'no Hub id' in run('transfer', '--hub-user', 'carol', work/'alignment', '-o', tmp_path/'out').output
    monkeypatch.setattr(many, 'hub_adapters', lambda user, base: [str(work/'adapters'/'a0')])
    assert run('transfer', '--hub-user', 'carol', work/'alignment', '-o', tmp_path/'out').exit_code == 0
    assert (tmp_path/'out'/'a0'/'adapter_config.json').is_file()

def test_the_hub_does_not_answer():
    with pytest.raises(OSError, match='cannot be listed .*name them instead'): many.hub_adapters('carol', 'org/old')

def test_one_adapter_is_as_before(work, tmp_path):
    "The same bytes as among many, in a directory that is the adapter itself"
    assert run('transfer', work/'adapters'/'a1', work/'alignment', '-o', tmp_path/'one').exit_code == 0
    assert sorted(p.name for p in (tmp_path/'one').iterdir()) == [
        'README.md', 'adapter_config.json', 'adapter_model.safetensors']
    again = run('transfer', work/'adapters'/'a1', work/'alignment', '-o', tmp_path/'one')
    assert again.exit_code == 2 and 'exists already' in again.output

def test_processes(work, tmp_path):
    "Two workers, a damaged adapter, a missing one: the rest is carried, as by single commands; the next run keeps it"
    names = copies(tmp_path/'in', 3)
    (tmp_path/'in'/'a1'/'adapter_model.safetensors').write_bytes(b'cut off')
    args = ['transfer', f'{tmp_path}/in/*', tmp_path/'gone', work/'alignment', '-o', tmp_path/'out', '--jobs', 2]
    done = run(*args, '--json')
    report = json.loads(done.stdout)
    assert done.exit_code == 1 and '2 of 4 adapters failed' in done.stderr and 'gone' in done.stderr
    assert counts(report) == (2, 0, 2) and report == json.loads((tmp_path/'out'/'report.json').read_text())
    rows = {Path(row['adapter']).name: row for row in report['adapters']}
    assert [*rows] == ['a0', 'a1', 'a2', 'gone']
    assert rows['a0']['carried'] == 42 and rows['a0']['energy'] == 1 and rows['a0']['seconds'] > 0
    assert 'not readable' in rows['a1']['error'] and 'no such directory' in rows['gone']['error']
    assert {p.name for p in (tmp_path/'out').iterdir()} == {'a0', 'a2', '.claims', 'report.json'}
    assert run('transfer', names[2], work/'alignment', '-o', tmp_path/'single').exit_code == 0
    assert tree(tmp_path/'single') == tree(tmp_path/'out'/'a2')
    before = results(tmp_path/'out')
    shutil.copy(ADAPTER/'adapter_model.safetensors', tmp_path/'in'/'a1')
    again = run(*args[:-1], 1)
    assert again.exit_code == 1 and '1 carried, 2 kept, 1 failed' in again.stdout
    assert before.items() <= results(tmp_path/'out').items()

def test_the_error_of_cut_ranks_is_in_the_table(here, work, tmp_path):
    names = copies(tmp_path/'in', 1) + [str(tmp_path/'gone')]
    report = transfer_many(names, work/'alignment', tmp_path/'out', Options(max_rank=4))
    head, first, second, _ = many.report_lines(report)
    at, error = head.index('rank error'), report['adapters'][0]['rank_error']
    assert .05 < error < 1 and first[at:].startswith(f'{error:.2%} ') and second[at:].startswith(' ')
    assert 'rank error' not in many.report_lines(transfer_many(names, work/'alignment', tmp_path/'whole'))[0]

def test_what_is_done_again(here, work, tmp_path):
    "Only what is missing, incomplete, or was made from another adapter; results of other options stay"
    names, out, al = copies(tmp_path/'in', 2), tmp_path/'out', work/'alignment'
    assert counts(transfer_many(names, al, out)) == (2, 0, 0)
    assert counts(transfer_many(names, al, out)) == (0, 2, 0)
    (out/'a0'/'adapter_model.safetensors').unlink()
    assert counts(transfer_many(names, al, out)) == (1, 1, 0)
    settings = tmp_path/'in'/'a1'/'adapter_config.json'
    settings.write_text(settings.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    assert counts(transfer_many(names, al, out)) == (1, 1, 0)
    before = results(out)
    report = transfer_many(names, al, out, Options(max_rank=4))
    assert counts(report) == (0, 0, 2) and before.items() <= results(out).items()
    assert 'holds the result of another run (other options)' in report['adapters'][0]['error']
    assert counts(transfer_many(names, al, out)) == (0, 2, 0)

def test_another_alignment_is_another_result(monkeypatch, tmp_path, maps):
    job = Job('zoo/adapter', tmp_path/'out'/'a0', Options())
    assert many.carry_one(job, maps)['status'] == 'carried'
    assert many.carry_one(job, maps)['status'] == 'kept'
    monkeypatch.setattr(maps, 'checksum', 'f'*64)
    assert '(other alignment)' in many.carry_one(job, maps)['error']

@pytest.mark.parametrize('harm', ['changed', 'added', 'theirs'])
def test_what_others_put_there_stays(here, work, tmp_path, harm):
    "A result that was changed, and a directory of somebody else, are errors of their adapters"
    names, out, al = copies(tmp_path/'in', 2), tmp_path/'out', work/'alignment'
    transfer_many(names[:1], al, out)
    if harm == 'changed': (out/'a0'/'README.md').write_text('mine')
    elif harm == 'added': (out/'a0'/'notes.txt').write_text('mine')
    else:
        (out/'a1').mkdir()
        (out/'a1'/'notes.txt').write_text('mine')
    before = results(out)
    report = transfer_many(names, al, out)
    assert report['failed'] == 1 and before.items() <= results(out).items()
    error = next(row['error'] for row in report['adapters'] if row['status'] == 'failed')
    assert 'move it away' in error and ('not made by' if harm == 'theirs' else 'changed after') in error

def test_a_directory_of_other_things_is_refused(here, work, tmp_path):
    (tmp_path/'mine').write_text('notes')
    with pytest.raises(FileExistsError, match='something else'):
        transfer_many(['zoo/adapter'], work/'alignment', tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['mine']
    with many.own_results(tmp_path/'out'), pytest.raises(BlockingIOError, match='in use'):
        transfer_many(['zoo/adapter'], work/'alignment', tmp_path/'out')

def test_what_is_wrong_for_all_is_said_before_any_work(here, work, tmp_path):
    out = tmp_path/'out'
    for args, what in ((['a', 'b', work/'nowhere'], 'lorasuite align'), ([work/'alignment'], 'which adapter'),
                       (['a', 'b', work/'alignment', '--format', 'gif'], 'no format'),
                       (['a', 'b', work/'alignment', '--engine', 'magic'], 'choose one of'),
                       (['a', 'b', work/'alignment', '--inputs', 'zoo/test.jsonl'], 'No such option'),
                       (['a', '', work/'alignment'], 'empty'),
                       (['x/a', 'report.json', work/'alignment'], 'rename one')):
        done = run('transfer', *args, '-o', out)
        assert done.exit_code == 2 and what in done.output, (args, done.output)
    assert not out.exists()

def test_faults_of_ours_have_a_traceback(monkeypatch, maps, tmp_path):
    monkeypatch.setattr(many, 'carry_whole', lambda *args: 1/0)
    row = many.carry_one(Job('zoo/adapter', tmp_path/'a', Options()), maps)
    assert 'please report' in row['error'] and 'ZeroDivisionError' in row['traceback']
    assert not any((tmp_path/'.claims').iterdir())

def test_warnings_are_in_the_report(here, work, tmp_path):
    shutil.copytree(ADAPTER, tmp_path/'a')
    settings = tmp_path/'a'/'adapter_config.json'
    found = json.loads(settings.read_text())
    settings.write_text(json.dumps(found | dict(base_model_name_or_path='org/other')))
    report = transfer_many([str(tmp_path/'a')], work/'alignment', tmp_path/'out')
    assert any('org/other' in said for said in report['adapters'][0]['warnings'])
    assert '1 with warnings' in '\n'.join(many.report_lines(report))

def test_an_adapter_whose_process_is_killed_is_tried_once_more(monkeypatch, tmp_path):
    monkeypatch.setattr(many, '_carry_in_worker', dying.carry)
    monkeypatch.setattr(many, '_start_worker', dying.start)
    todo = [SimpleNamespace(adapter=name, out=tmp_path/name) for name in ('always', 'once', 'more')]
    found = [row for _, row in many.run_in_processes(todo, str(tmp_path), 2)]
    assert {row['adapter']: row['status'] for row in found} == dict(always='failed', once='carried', more='carried')
    assert 'killed twice' in next(row['error'] for row in found if row['status'] == 'failed')

def test_a_process_that_is_killed_while_it_starts_is_started_again(monkeypatch, tmp_path):
    "That is no attempt at the adapter"
    monkeypatch.setattr(many, '_carry_in_worker', dying.carry)
    monkeypatch.setattr(many, '_start_worker', functools.partial(dying.start_third, tmp_path))
    job = SimpleNamespace(adapter='once', out=tmp_path/'once')
    assert [row['status'] for _, row in many.run_in_processes([job], str(tmp_path), 1)] == ['carried']

def wait_for(what, seconds=120):
    "Wait until a condition holds"
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(.02)

def test_a_killed_command_leaves_no_process_and_is_continued(here, work, tmp_path):
    "SIGKILL in the middle; the next run makes the rest, and all results are those of single commands"
    names, out = copies(tmp_path/'in', 12), tmp_path/'out'
    args = [sys.executable, '-m', 'lorasuite.cli', 'transfer', *names, work/'alignment', '-o', out, '--jobs', '1']
    running = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len([*out.glob('a*')]) >= 3)
    workers = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert not (out/'report.json').exists()
    found = json.loads(run('transfer', *names, work/'alignment', '-o', out, '--jobs', 1, '--json').stdout)
    assert found['kept'] >= 2 and found['kept'] + found['carried'] == 12
    assert {p.name for p in out.iterdir()} == {f'a{i}' for i in range(12)} | {'.claims', 'report.json'}
    maps = Alignment.load(work/'alignment')
    for i in (0, 3, 11):
        assert many.carry_one(Job(names[i], tmp_path/'again'/f'a{i}', Options()), maps)['status'] == 'carried'
        assert not filecmp.dircmp(out/f'a{i}', tmp_path/'again'/f'a{i}').diff_files

def test_a_cluster_that_cannot_be_reached(monkeypatch, work, tmp_path):
    ray = pytest.importorskip('ray')
    def refuse(**settings): raise ConnectionError('no answer')
    monkeypatch.setattr(ray, 'init', refuse)
    done = run('transfer', 'a', 'b', work/'alignment', '-o', tmp_path/'out', '--engine', 'ray')
    assert done.exit_code == 2 and 'no answer' in done.output and '--engine processes' in done.output

def test_without_ray(monkeypatch, work, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    done = run('transfer', 'a', 'b', work/'alignment', '-o', tmp_path/'out', '--engine', 'ray')
    assert done.exit_code == 2 and 'lorasuite[ray]' in done.output

def start_ray(stack):
    "Ray 2.60 gives itself 30 s to start, whatever the machine is busy with, so try again"
    for left in (2, 1, 0):
        try: return stack.enter_context(many._open_ray())
        except OSError:
            sys.modules['ray'].shutdown()
            if not left: raise

def test_a_local_cluster(work, tmp_path, monkeypatch):
    "Ray gives the same bytes, keeps what is there, and maps tensors instead of copying them"
    pytest.importorskip('ray')
    def where(t): # a function inside of this one goes to the workers as it is: they cannot import a test
        for line in open('/proc/self/maps'):
            low, high = (int(x, 16) for x in line.split()[0].split('-'))
            if low <= t.data_ptr() < high: return line
    names = copies(tmp_path/'in', 3)
    (tmp_path/'in'/'a1'/'adapter_model.safetensors').write_bytes(b'cut off')
    assert many.carry_one(Job(names[2], tmp_path/'here'/'a2', Options()), Alignment.load(work/'alignment'))
    with ExitStack() as stack:
        ray = start_ray(stack)
        report = transfer_many(names, work/'alignment', tmp_path/'out', engine='ray', jobs=2)
        again = transfer_many(names, work/'alignment', tmp_path/'out', engine='ray')
        assert 'plasma' in ray.get(ray.remote(where).remote(ray.put(torch.ones(100_000))))
        monkeypatch.setattr(many, '_carry_on_ray', lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        killed = [row for _, row in many.run_on_ray([Job('x', tmp_path/'x', Options())], str(work/'alignment'), 1)]
    assert counts(report) == (2, 0, 1) and counts(again) == (0, 2, 1)
    assert tree(tmp_path/'out'/'a2') == tree(tmp_path/'here'/'a2')
    assert killed[0]['status'] == 'failed' and 'killed twice' in killed[0]['error']
