"""Two specialists, question by question"""
import json, shutil
import pytest
from test_cli import report, run, ZOO
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.training.evaluate import evaluate, Score
from lorasuite.training.examples import load_data
from lorasuite.training.flips import compare_specialists, flipped_items, Flips, flips_line

SIXTY = 60

@pytest.fixture(scope='module')
def few(tmp_path_factory):
    file = tmp_path_factory.mktemp('few')/'few.jsonl'
    file.write_text(''.join((ZOO/'test.jsonl').read_text().splitlines(keepends=True)[:SIXTY]))
    return file

@pytest.fixture(scope='module')
def carried(tmp_path_factory):
    adapter = transfer(Adapter.load('zoo/adapter'), align('zoo/old', 'zoo/new-far'))
    adapter.save(tmp_path_factory.mktemp('carried')/'out')
    return adapter

@pytest.fixture
def out(carried, tmp_path):
    carried.save(tmp_path/'out')
    return tmp_path/'out'

def flips(old, new):
    "Flips of questions that were answered rightly so"
    scores = [Score(['yes' if right else 'no' for right in some], some, 0.) for some in (old, new)]
    return Flips([dict(instruction=f'{i}?', answer='yes') for i in range(len(old))], *scores)

def test_kinds_of_questions():
    found = flips([True, True, False, False, True], [True, False, True, False, False])
    assert found.lost == [1, 4] and found.gained == [2] and found.agreement == .4
    assert [(item['kind'], item['example'], item['question']) for item in flipped_items(found)] == [
        ('lost', 2, '1?'), ('lost', 5, '4?'), ('gained', 3, '2?')]
    assert '60.0% → 40.0% right of 5' in flips_line(found) and '2 lost, 1 gained' in flips_line(found)
    with pytest.raises(ValueError): flips([True], [True, False]).lost

@pytest.mark.parametrize('lost, gained, p', [(0, 0, 1.), (1, 0, 1.), (5, 1, 14/64), (1, 5, 14/64), (8, 0, 2/256)])
def test_mcnemar(lost, gained, p):
    found = flips([True]*lost + [False]*gained + [True], [False]*lost + [True]*gained + [True])
    assert found.p_value == pytest.approx(p)

def test_the_command_is_the_function(few, carried, out):
    rows = load_data(few)
    old, new = load_model('zoo/old'), load_model('zoo/new-far')
    found = compare_specialists(old, Adapter.load('zoo/adapter'), new, Adapter.load(out), rows)
    assert found.old.right == evaluate(old, rows, Adapter.load('zoo/adapter')).right
    said = report('evaluate', 'zoo/old', 'zoo/adapter', 'zoo/new-far', out, '--data', few)
    assert said['comparison'] == json.loads(json.dumps(found.report()))
    assert said['flipped'] == [*flipped_items(found)] and said['comparison']['lost'] == len(found.lost) > 0
    lines = run('evaluate', 'zoo/old', 'zoo/adapter', 'zoo/new-far', out, '--data', few).stdout.splitlines()
    assert flips_line(found) in lines and sum(line.startswith(('lost, ', 'gained, ')) for line in lines) <= 3

def test_each_specialist_is_asked_in_its_own_form(few, out, tmp_path):
    "What is said of the forms is how they are asked; a question that one cannot be asked is found before"
    template = "{{ bos_token }}{% for m in messages %}Question: {{ m['content'] }}\\nAnswer:{% endfor %}"
    shutil.copytree(ZOO/'old', tmp_path/'talking')
    (tmp_path/'talking'/'chat_template.jinja').write_text(template)
    said = report('evaluate', tmp_path/'talking', 'zoo/adapter', 'zoo/new-far', out, '--data', few)
    assert said['prompts']['old'] == 'own chat template' and said['prompts']['new'].startswith('plain prompt')
    alone = report('evaluate', 'zoo/new-far', '--adapter', out, '--data', few)
    assert said['comparison']['accuracy_new'] == alone['accuracy'] and alone['prompt'] == said['prompts']['new']
    (tmp_path/'text.jsonl').write_text('{"text": "Ann keeps a cat."}')
    done = run('evaluate', 'zoo/old', 'zoo/adapter', 'zoo/new-far', out, '--data', tmp_path/'text.jsonl')
    assert done.exit_code == 2 and 'fault of lorasuite' not in done.stderr

def test_the_card_carries_it(few, out):
    before = (out/'README.md').read_text()
    command = ('evaluate', 'zoo/old', 'zoo/adapter', 'zoo/new-far', out, '--data', few)
    assert run(*command).exit_code == 0 and (out/'README.md').read_text() == before
    assert run(*command, '--card').exit_code == 0
    after = (out/'README.md').read_text()
    assert after.startswith(before.rstrip()) and after.count('- beside the old specialist on 60 questions: ') == 1
    assert Adapter.load(out).card == after and sorted(p.name for p in out.iterdir()) == [
        'README.md', 'adapter_config.json', 'adapter_model.safetensors']

def test_bad_calls(few, out, tmp_path):
    old, more = ('evaluate', 'zoo/old'), ('zoo/adapter', 'zoo/new-far', out)
    bare = tmp_path/'bare'
    shutil.copytree(out, bare)
    (bare/'README.md').unlink()
    for command, message in (
        ((*old, 'zoo/adapter', '--data', few), '2 names: give OLD ADAPTER NEW OUT'),
        ((*old, *more, 'x', '--data', few), '5 names: give OLD ADAPTER NEW OUT'),
        ((*old, *more), 'what to evaluate on? give --data FILE'),
        ((*old, *more, '--data', few, '--adapter', 'zoo/adapter'), '--adapter cannot apply beside'),
        ((*old, *more, '--tasks', 'boolq'), '--tasks cannot apply beside'),
        ((*old, '--data', few, '--card'), '--card needs two specialists to compare'),
        ((*old, *more[:2], bare, '--data', few, '--card'), 'has no README.md on this machine: leave --card out'),
        ((*old, 'zoo/adapter', 'zoo/new-far', 'zoo/adapter', '--data', few), 'zoo/new-far')):
        done = run(*command)
        assert done.exit_code == 2 and message in done.stderr and 'fault of lorasuite' not in done.stderr, done.stderr
