"""Benchmarks through lm-eval, run on local tasks and compared with a direct computation; kinds of answers"""
import json, sys
import pytest, torch
from typer.testing import CliRunner
from lorasuite.training import evaluate as module
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.training.evaluate import (
    benchmark, check_tasks, COMMONSENSE, evaluate, generate, last_number, same_choice, same_letter, same_number,
    _task_index
)
from lorasuite.training.examples import load_data, prompt
from lorasuite.cli import app

ZOO = data_dir()/'zoo'

@pytest.fixture(scope='module')
def old(): return load_model('zoo/old')

@pytest.fixture(scope='module')
def specialist(): return Adapter.load('zoo/adapter')

@pytest.fixture(scope='module')
def questions():
    return [e for e in load_data(ZOO/'test.jsonl') if 'eat' in e['instruction'] or 'for money' in e['instruction']]

@pytest.fixture(scope='module')
def file(questions, tmp_path_factory):
    "The questions with four choices of unequal length each"
    answers = sorted({e['answer'] for e in questions})
    rows = []
    for i, e in enumerate(questions):
        others = [a for a in answers if a != e['answer']][i%5:][:3]
        rows.append(dict(ask=prompt(e), answer=e['answer'], choices=[e['answer'], *others]))
    path = tmp_path_factory.mktemp('tasks')/'village.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    return path

def task(name, file, metrics, **more):
    return dict(task=name, dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(file))), test_split='test',
                doc_to_text='{{ask}}',
                metric_list=[dict(metric=m, aggregation='mean', higher_is_better=True) for m in metrics], **more)

def choosing(file):
    return task('village_choice', file, ('acc', 'acc_norm'), output_type='multiple_choice',
                doc_to_choice='{{choices}}', doc_to_target=0)

def writing(file):
    generation = dict(until=['\n'], max_gen_toks=16, do_sample=False)
    stripped = dict(name='stripped', filter=[dict(function='remove_whitespace'), dict(function='take_first')])
    return task('village_words', file, ('exact_match',), output_type='generate_until', doc_to_target='{{answer}}',
                generation_kwargs=generation, filter_list=[stripped])

@torch.no_grad()
def likelihood(model, tokenizer, ask, choice):
    "log p(choice | ask)"
    n, ids = len(tokenizer(ask).input_ids), tokenizer(f'{ask} {choice}', return_tensors='pt').input_ids
    return model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[n-1:].sum().item()

def directly(model, tokenizer, file):
    "acc and acc_norm, by hand"
    rows = [json.loads(l) for l in file.read_text().splitlines()]
    tables = [{c: likelihood(model, tokenizer, r['ask'], c) for c in r['choices']} for r in rows]
    def best(score):
        chosen = [max(t, key=lambda c: score(t[c], c)) for t in tables]
        return sum(c == r['answer'] for c, r in zip(chosen, rows))/len(rows)
    return best(lambda l, c: l), best(lambda l, c: l/len(c))

def values(rows): return {(r['task'], r['metric']): r['value'] for r in rows}

@pytest.fixture(scope='module')
def runs(old, specialist, file):
    tasks = [choosing(file), writing(file)]
    return {a: benchmark(old, tasks, adapter) for a, adapter in (('without', None), ('with', specialist))}

def test_likelihoods_are_compared(runs, old, specialist, file):
    found = {a: values(rows) for a, rows in runs.items()}
    with specialist.on(old) as model: expected = directly(model, old.tokenizer, file)
    for a, by_hand in (('with', expected), ('without', directly(old.model, old.tokenizer, file))):
        accuracies = found[a]['village_choice', 'acc'], found[a]['village_choice', 'acc_norm']
        assert accuracies == pytest.approx(by_hand, abs=1e-9)
    assert found['with']['village_choice', 'acc'] > found['without']['village_choice', 'acc'] + .3

def test_answers_are_written(runs, old, specialist, questions):
    for a, adapter in (('with', specialist), ('without', None)):
        direct = evaluate(old, questions, adapter).accuracy
        assert values(runs[a])['village_words', 'exact_match (stripped)'] == pytest.approx(direct, abs=1e-9)

def test_standard_errors(runs, questions):
    for row in runs['with']:
        assert row.keys() == {'task', 'metric', 'value', 'error'}
        assert row['error'] == pytest.approx((row['value']*(1 - row['value'])/(len(questions) - 1))**.5, abs=1e-6)

def test_the_base_is_left_as_it_was(runs, old, questions):
    assert evaluate(old, questions).accuracy < .2

def test_a_limit_is_passed_on(old, file):
    assert benchmark(old, [choosing(file)], limit=3)[0]['value'] in (0, 1/3, 2/3, 1)

def test_names_are_checked_first():
    with pytest.raises(ValueError, match="no task 'social_i_qa'.*social_iqa"): check_tasks(['social_i_qa'])
    with pytest.raises(ValueError, match='no name is near'): check_tasks(['§§§'])
    assert {*COMMONSENSE} <= {*_task_index().all_tasks}

def test_an_unknown_task_is_refused_before_all_are_listed(monkeypatch):
    "The list of lm-eval takes a quarter of a minute"
    def listed(named): raise AssertionError('the list was made')
    monkeypatch.setattr('lorasuite.training.evaluate._task_index', listed)
    with pytest.raises(ValueError, match="lm-eval has no task 'boolqq': boolq"): check_tasks(['piqa', 'boolqq'])
    with pytest.raises(AssertionError, match='the list was made'): check_tasks(['piqa'])

def test_without_lm_eval(monkeypatch, old, file):
    _task_index.cache_clear()
    monkeypatch.setitem(sys.modules, 'lm_eval.tasks', None)
    with pytest.raises(ImportError, match=r'pip install "lorasuite\[eval\]"'): benchmark(old, [choosing(file)])
    result = CliRunner().invoke(app, ['evaluate', 'zoo/old', '--tasks', 'boolq'])
    assert result.exit_code == 2 and 'lorasuite[eval]' in result.stderr
    _task_index.cache_clear()

def test_command(monkeypatch, file, tmp_path):
    from lm_eval.tasks import TaskManager
    (tmp_path/'words.yaml').write_text(json.dumps(writing(file)))
    local = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(module, '_task_index', lambda named: local)
    monkeypatch.setattr(module, '_task_texts', list) # of lm-eval's own tasks
    run = lambda *args: CliRunner().invoke(app, ['evaluate', 'zoo/old', '--adapter', 'zoo/adapter', *args])
    rows = json.loads(run('--tasks', 'village_words', '--json').stdout)['benchmarks']
    assert values(rows)['village_words', 'exact_match (stripped)'] > .8
    unknown = ['--data', str(ZOO/'test.jsonl'), '--match', 'near'], 'exact, number, letter, choice'
    for wrong, message in ((['--tasks', 'village_word'], 'village_words'), ([], '--data FILE, or --tasks'), unknown):
        result = run(*wrong)
        assert result.exit_code == 2 and message in result.stderr

def test_command_counts_numbers(tmp_path, old, specialist):
    ages = [e for e in load_data(ZOO/'test.jsonl') if e['instruction'].startswith('How old')]
    ages = [dict(e, answer=[float(e['answer'])]) for e in ages]
    (tmp_path/'ages.json').write_text(json.dumps(ages)) # answers as in LLM-Adapters' files: [22.0]
    asked = ['evaluate', 'zoo/old', '--adapter', 'zoo/adapter', '--data', str(tmp_path/'ages.json'), '--json']
    said = [json.loads(CliRunner().invoke(app, asked + m).stdout) for m in ([], ['--match', 'number'])]
    assert said[0]['accuracy'] == 0 and said[1]['accuracy'] > .8

LAST_NUMBERS = [
    ('The answer is 1,234.', 1234), ('1,234.0', 1234), ('-5', -5), ('from 10-5', 5), ('3 - 7 = -4', -4),
    ('$2.50!', 2.5), ('3/4 of it', .75), ('40%', 40), ('.5', .5), ('1/0', 1), ('12,34', 34), ('12, 13', 13),
    ('[22.0]', 22), ('in 2 steps:\n\n7\n', 7), ('10,000,000', 10**7)]

@pytest.mark.parametrize('text, value', LAST_NUMBERS)
def test_last_number(text, value): assert last_number(text) == pytest.approx(value)

def test_grading():
    assert same_number('so it is 1,234.0.', '1234') and same_number('0.3333', '1/3')
    assert not same_number('none', 'none') and not same_number('', '0')
    assert same_letter('The answer is (B).', "['B']") and not same_letter('A cat. The answer is (B).', 'A')
    assert not same_letter('DEAD', 'D') and not same_letter('', '')
    assert same_choice('the correct answer is solution2', 'solution2') and same_choice('true or false', 'true')
    assert not same_choice('answer12', 'answer2') and not same_choice('', '')

def test_long_answers_are_kept(old):
    asks = [f'Question: {n} plus' for n in range(8)]
    cut = generate(old.model, old.tokenizer, asks, max_new_tokens=20)
    whole = generate(old.model, old.tokenizer, asks, max_new_tokens=20, stop=None)
    assert all('\n' in a for a in whole) and [a.split('\n')[0].strip() for a in whole] == cut
    assert [a.split(' ')[0] for a in whole] == generate(old.model, old.tokenizer, asks, max_new_tokens=20, stop=' ')
