"""Questions that a specialist writes: where they begin and end, the same ones again, and after an interruption"""
import json
import pytest, torch
from transformers import GenerationConfig
from typer.testing import CliRunner
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import own_directory
from lorasuite.core.loading import load_model
from lorasuite.training import synthesize as module
from lorasuite.training.examples import load_data
from lorasuite.training.prompts import as_messages, Prompts, Renderer, with_answer
from lorasuite.training.synthesize import _sampling, question_end, question_frame, synthesize

HOW = dict(longest=16, batch_size=8)
CHAT = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")

@pytest.fixture(scope='module')
def old(): return load_model('zoo/old')

@pytest.fixture(scope='module')
def specialist(): return Adapter.load('zoo/adapter')

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

# ---- the frame

def test_the_turn_of_a_user_is_left_open(old):
    renderer = Renderer.of(old, Prompts(template=CHAT))
    ids, after = question_frame(renderer)
    whole = renderer.ask(dict(instruction='Who?', input=''))
    assert whole[:len(ids)] == ids and after.startswith(old.tokenizer.eos_token)
    assert question_end(old.tokenizer, after) == (old.tokenizer.eos_token, old.tokenizer.eos_token_id)
    config = _sampling(old.tokenizer, after, renderer.ends, 9)
    assert config.stop_strings is None and config.eos_token_id == [old.tokenizer.eos_token_id]

@pytest.mark.parametrize('form, end', [('Q: {instruction}\nA:', '\n'), ('[INST] {instruction} [/INST]', '[/INST]'),
                                       ('{instruction}', '\n'), ('Q: {instruction} {input}\n\nA:', '\n')])
def test_a_plain_question_ends_where_the_prompt_goes_on(old, form, end):
    assert question_end(old.tokenizer, question_frame(Renderer.of(old, Prompts(form)))[1]) == (end, None)

def test_a_form_that_cannot_be_continued_is_refused(old, monkeypatch):
    renderer = Renderer.of(old, Prompts('{instruction}'))
    monkeypatch.setattr(renderer, 'ids', lambda text: [])
    with pytest.raises(ValueError, match='nothing stands in front of a question in the prompt of zoo/old'):
        question_frame(renderer)
    monkeypatch.setattr(renderer, 'text', lambda example: 'Tell me a joke.')
    with pytest.raises(ValueError, match='the prompt of zoo/old does not show the question'): question_frame(renderer)
    twice = Renderer.of(old, Prompts('Q: {instruction}\nAgain: {instruction}\nA:'))
    with pytest.raises(ValueError, match='the prompt of zoo/old shows the question more than once'):
        question_frame(twice)

# ---- the draw

def test_the_same_questions_whatever_the_model_asks_for(old, specialist):
    "A generation config and the state of the generator have no part in it, and are left as they were"
    first, kept = synthesize(old, specialist, 12, **HOW), old.model.generation_config
    old.model.generation_config = wishes = GenerationConfig(suppress_tokens=[*range(2, 400)], temperature=9., top_k=1)
    try:
        assert synthesize(old, specialist, 12, **HOW) == first
        assert old.model.generation_config is wishes
    finally: old.model.generation_config = kept
    state = torch.get_rng_state()
    synthesize(old, None, 4, **HOW)
    assert torch.get_rng_state().equal(state)
    assert synthesize(old, specialist, 12, seed=1, **HOW) != first
    texts = [e['instruction'].casefold() for e in first[0]]
    assert len({*texts}) == 12 and all(texts)

def test_the_adapter_has_a_part_in_it(old, specialist):
    with_it, without = (synthesize(old, a, 20, **HOW)[0] for a in (specialist, None))
    sums = [sum(' plus ' in e['instruction'] for e in questions) for questions in (with_it, without)]
    assert sums[0] == 0 and sums[1] > 15 # the base was trained on sums too

def test_no_question_brings_its_answer_along(old):
    "Whatever blanks an empty input leaves between the question and what stands behind it"
    for form in ('Question: {instruction} {input}\nAnswer:', 'Question: {instruction}\n\n{input}\nAnswer:'):
        texts = [e['instruction'] for e in synthesize(old, None, 20, Prompts(form), **HOW)[0]]
        assert not any('\n' in text or 'Answer' in text for text in texts) and len(texts) == 20

def test_the_end_is_not_counted(old):
    "A question may have as many tokens as it says, and its end besides"
    texts, counts = synthesize(old, None, 40, longest=9, batch_size=40)
    assert len(texts) == 40 and counts['unfinished'] < counts['drawn']/4

def test_half_characters_are_no_questions(old):
    config = _sampling(old.tokenizer, '\nAnswer:', [old.tokenizer.eos_token_id], 9)
    half = old.tokenizer('ß', add_special_tokens=False).input_ids[:1]
    assert module._finished([*half, old.tokenizer.eos_token_id], old.tokenizer, config) is None

def test_too_few_are_said(old, specialist, monkeypatch):
    monkeypatch.setattr(module, '_draw', lambda *args: ['Who?', 'who?', None, ''])
    with pytest.warns(UserWarning, match='1 different questions in 20 draws, where 2 were asked for'):
        found, counts = synthesize(old, specialist, 2)
    assert len(found) == 1 and counts == dict(drawn=20, unfinished=5, empty=5, repeated=9)
    monkeypatch.setattr(module, '_draw', lambda *args: [None]*8)
    with pytest.raises(ValueError, match='no question in 24 draws, of which 24 did not end within 64 tokens: allow'):
        synthesize(old, None, 2)

def test_an_interrupted_run_goes_on(old, specialist, monkeypatch, tmp_path):
    whole, draw, drawn = synthesize(old, specialist, 30, **HOW), module._draw, []
    def cut(*args):
        drawn.append(1)
        if len(drawn) == 3: raise KeyboardInterrupt
        return draw(*args)
    monkeypatch.setattr(module, '_draw', cut)
    with pytest.raises(KeyboardInterrupt): synthesize(old, specialist, 30, keep=tmp_path/'kept', **HOW)
    assert len(json.loads((tmp_path/'kept'/'drawn.json').read_text())['batches']) == 2
    assert synthesize(old, specialist, 30, keep=tmp_path/'kept', **HOW) == whole
    with pytest.raises(ValueError, match='drawn.json holds questions of another specialist, or drawn in another way'):
        synthesize(old, None, 30, keep=tmp_path/'kept', **HOW)
    for damaged in ('{', '[]', '{"key": "a", "batches": 3}', '{"key": "a", "batches": [3]}'):
        (tmp_path/'kept'/'drawn.json').write_text(damaged)
        with pytest.raises(ValueError, match='drawn.json is damaged'): synthesize(old, keep=tmp_path/'kept', **HOW)

# ---- seeds

SEEDS = [dict(instruction=f'What does Fide {verb}?', input='') for verb in ('eat', 'play')]

def test_the_base_goes_on_from_what_the_specialist_answered(old, specialist, monkeypatch):
    shown = []
    def draw(model, tokenizer, ids, *args):
        shown.append((tokenizer.decode(ids, skip_special_tokens=True), model is old.model))
        return ['What does  fide eat?', f'Who is {len(shown)}?']
    monkeypatch.setattr(module, '_draw', draw)
    found, counts = synthesize(old, specialist, 8, seeds=SEEDS, batch_size=2)
    both = ['Question: What does Fide eat?\nAnswer: bread', 'Question: What does Fide play?\nAnswer: lute']
    texts = {text for text, _ in shown}
    assert texts == {'\n\n'.join([*order, 'Question:']) for order in (both, both[::-1])}
    assert all(base for _, base in shown) and counts['repeated'] == 8 # a seed is no new question
    assert [e['instruction'] for e in found] == [f'Who is {i}?' for i in range(1, 9)]

def test_a_chat_of_seeds_alternates(old, specialist, monkeypatch):
    "And its instructions go to the new questions"
    told = [dict(messages=[dict(role='system', content='Be brief.'), dict(role='user', content=e['instruction'])])
            for e in SEEDS]
    renderer = Renderer.of(old, Prompts(template=CHAT))
    answered = [with_answer(e, 'x') for e in told]
    ids, _ = question_frame(renderer, answered)
    roles = [turn.split('>')[0] for turn in old.tokenizer.decode(ids).split('<')[1:]]
    assert [r for r in roles if r in ('system', 'user', 'assistant')] == ['system', *['user', 'assistant']*2, 'user']
    monkeypatch.setattr(module, 'pseudo_label', lambda *args, **how: answered)
    monkeypatch.setattr(module, '_draw', lambda *args: ['Who?'])
    found, _ = synthesize(old, specialist, 1, Prompts(template=CHAT), seeds=told, **HOW)
    assert [turn['role'] for turn in found[0]['messages']] == ['system', 'user']

def test_other_seeds_are_another_run(old, specialist, tmp_path):
    whole = synthesize(old, specialist, 10, keep=tmp_path/'kept', seeds=SEEDS, **HOW)
    assert synthesize(old, specialist, 10, keep=tmp_path/'kept', seeds=SEEDS, **HOW) == whole
    many = [dict(instruction=f'What does Fide eat at {i}?', input='') for i in range(12)]
    shown = module.random.Random(0).sample(range(12), 5)
    other = [e | dict(input='' if i in shown else 'please') for i, e in enumerate(many)]
    synthesize(old, specialist, 10, keep=tmp_path/'many', seeds=many, **HOW)
    with pytest.raises(ValueError, match='drawn in another way'): # the first batch shows five of them
        synthesize(old, specialist, 10, keep=tmp_path/'many', seeds=other, **HOW)
    for seeds in (SEEDS[:1], ()):
        with pytest.raises(ValueError, match='drawn in another way'):
            synthesize(old, specialist, 10, keep=tmp_path/'kept', seeds=seeds, **HOW)

def test_questions_of_several_lines_are_kept_whole(old, specialist, monkeypatch):
    "And instructions that all seeds share are no part of a question, in a plain prompt neither"
    def told(*texts):
        return [dict(messages=[dict(role='system', content=text), dict(role='user', content=e['instruction'])])
                for text, e in zip(texts, SEEDS)]
    marks, shown = [], []
    def draw(model, tokenizer, ids, config, *args):
        marks.append(config.stop_strings)
        shown.append(tokenizer.decode(ids))
        return [f'Who is {len(marks)}?']
    monkeypatch.setattr(module, '_draw', draw)
    for seeds in (SEEDS, told('Be brief.', 'Be brief.'), told('Be brief.', 'Be kind.')):
        synthesize(old, specialist, 1, seeds=seeds, batch_size=1)
    assert marks == [['\n'], ['\n'], ['\nAnswer:']]
    assert [text.endswith('Question: Be brief.\n') for text in shown] == [False, True, False]

@pytest.mark.parametrize('seed, form, message', [
    (dict(prompt='Question: Who?\nAnswer:'), None, 'seeds under `prompt` are asked as they stand'),
    (SEEDS[0], '{instruction}', 'nothing stands between a question and its answer in the prompt of zoo/old')])
def test_seeds_without_an_end_are_refused(old, seed, form, message):
    with pytest.raises(ValueError, match=message): synthesize(old, None, 1, Prompts(form), seeds=[seed])

def test_unanswered_seeds_are_told_by_what_the_command_has(old, specialist):
    with pytest.raises(ValueError, match='an answer to none of 1 seeds within 2 tokens: give other seeds') as found:
        synthesize(old, specialist, 1, longest=2, seeds=SEEDS[:1])
    assert '--first-line' not in str(found.value)

def test_room_is_made_for_whatever_is_shown(old, monkeypatch):
    "Before the first batch, though a later one shows the longest seeds"
    many = [dict(instruction=f'Who is {i}?', input='') for i in range(40)]
    many += [dict(instruction=f'Who is {i} ' + 'and he '*70, input='') for i in range(2)]
    monkeypatch.setattr(module, 'pseudo_label', lambda model, tokenizer, seeds, *args, **how: [
        with_answer(e, 'x') for e in seeds])
    monkeypatch.setattr(module, '_draw', lambda *args: pytest.fail('something was drawn'))
    with pytest.raises(ValueError, match='5 seeds with their answers take'): synthesize(old, None, 1, seeds=many)
    with pytest.raises(ValueError, match='give a smaller --longest'): synthesize(old, None, 1, longest=600)

# ---- the command

COMMAND = ['synthesize', 'zoo/old', 'zoo/adapter', '-n', 12, '--longest', 16, '-o']

def test_questions_for_an_upgrade(tmp_path):
    out = tmp_path/'questions.jsonl'
    made = run(*COMMAND, out)
    assert made.exit_code == 0 and 'questions: 12' in made.stdout and 'such as: ' in made.stdout, made.output
    assert [p.name for p in tmp_path.iterdir()] == ['questions.jsonl']
    done = run('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--inputs', out, '--steps', 2, '-o', tmp_path/'up')
    assert done.exit_code == 0 and 'inputs: 12' in done.stdout, done.output
    for name in ('q.csv', 'q.tsv', 'q.PARQUET'):
        table = run(*COMMAND, tmp_path/name)
        assert table.exit_code == 2 and 'questions are JSON lines: name it .jsonl' in table.stderr
    again = run(*COMMAND, out)
    assert again.exit_code == 2 and 'exists already' in again.stderr

def test_seeds_stand_first(tmp_path):
    seeds = tmp_path/'seeds.jsonl'
    seeds.write_text(''.join(json.dumps(e | dict(output='not read')) + '\n' for e in SEEDS))
    made = run(*COMMAND, tmp_path/'q.jsonl', '--seeds', seeds)
    rows = [json.loads(line) for line in (tmp_path/'q.jsonl').read_text().splitlines()]
    assert made.exit_code == 0 and rows[:2] == SEEDS and len(rows) == 14, made.output
    idle = run(*COMMAND, tmp_path/'none.jsonl', '--columns', 'instruction=q')
    assert idle.exit_code == 2 and '--columns cannot apply without --seeds' in idle.stderr
    long = run(*COMMAND[:-2], 600, '-o', tmp_path/'none.jsonl', '--seeds', seeds)
    assert long.exit_code == 2 and 'give shorter seeds (--seeds), or fewer' in long.stderr

CHATS = [[dict(role=role, content=text) for role, text in pair.items()] for pair in (
    dict(system='Be brief.', user='What does Fide eat?'), dict(system='Be kind.', user='What does Fide play?'))]

@pytest.mark.parametrize('rows, options', [
    ([dict(messages=turns) for turns in CHATS], []),
    ([dict(conversations=[{'from': 'human', 'value': 'What does Fide eat?'}, {'from': 'gpt', 'value': 'me'}])], []),
    ([dict(instruction='Who?', system='Be brief.'), dict(instruction='What does Fide eat?')], []),
    ([dict(prompt='What does Fide eat?', completion='me')], ['--prompt', 'qa'])])
def test_seeds_of_any_form_make_one_file(tmp_path, rows, options):
    "Which an upgrade reads, and asks as the seeds were asked"
    (tmp_path/'seeds.json').write_text(json.dumps(rows))
    made = run(*COMMAND[:3], '-n', 2, '--longest', 16, *options, '--seeds', tmp_path/'seeds.json',
               '-o', tmp_path/'q.jsonl')
    assert made.exit_code == 0, made.output
    read = load_data(tmp_path/'q.jsonl', labelled=False)
    given = load_data(tmp_path/'seeds.json', labelled=False)
    assert len(read) == len(rows) + 2 and [*map(as_messages, read)][:len(rows)] == [*map(as_messages, given)]

def test_the_next_command_names_the_adapter(tmp_path):
    Adapter.load('zoo/adapter').save(tmp_path/'several'/'one')
    made = run('synthesize', 'zoo/old', tmp_path/'several', '--adapter-name', 'one', '-n', 2, '-o', tmp_path/'q.jsonl')
    assert made.exit_code == 0 and '--adapter-name=one' in made.stdout, made.output

def test_an_interrupted_command_goes_on(tmp_path, monkeypatch):
    assert run(*COMMAND, tmp_path/'whole.jsonl').exit_code == 0
    with monkeypatch.context() as m:
        read, times = module._sort_out, []
        def cut(*args):
            times.append(1)
            if len(times) == 2: raise KeyboardInterrupt
            return read(*args)
        m.setattr(module, '_sort_out', cut)
        stopped = run(*COMMAND, tmp_path/'cut.jsonl')
    assert stopped.exit_code == 130 and 'start the same command again to resume' in stopped.stderr
    monkeypatch.setattr(module, '_draw', lambda *args: pytest.fail('it was drawn already'))
    assert run(*COMMAND, tmp_path/'cut.jsonl').exit_code == 0
    assert (tmp_path/'cut.jsonl').read_bytes() == (tmp_path/'whole.jsonl').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cut.jsonl', 'whole.jsonl']

def test_files_of_others_are_left_alone(tmp_path, monkeypatch):
    "A file that came meanwhile, a link of the name of a temporary file, checkpoints of another command"
    (tmp_path/'victim').write_text('mine')
    (tmp_path/'.q.jsonl.part').symlink_to(tmp_path/'victim')
    folder = tmp_path/'.q.jsonl-checkpoints'
    own_directory(folder)
    (folder/'checkpoint-8').mkdir()
    assert run(*COMMAND, tmp_path/'q.jsonl').exit_code == 0
    assert (tmp_path/'victim').read_text() == 'mine' and (folder/'checkpoint-8').is_dir()
    draw = module._draw
    def meanwhile(*args):
        (tmp_path/'late.jsonl').write_text('mine')
        return draw(*args)
    monkeypatch.setattr(module, '_draw', meanwhile)
    found = run(*COMMAND, tmp_path/'late.jsonl')
    assert found.exit_code == 2 and 'late.jsonl exists already' in found.stderr
    assert (tmp_path/'late.jsonl').read_text() == 'mine'

def test_nothing_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_draw', lambda *args: [None]*64)
    found = run(*COMMAND, tmp_path/'q.jsonl')
    assert found.exit_code == 2 and 'did not end within 16 tokens' in found.stderr and not [*tmp_path.iterdir()]

@pytest.mark.parametrize('args, message', [
    (['zoo/new', 'zoo/adapter'], 'zoo/old'), (['zoo/old', 'zoo/adapter', '-n', 0], "'-n'"),
    (['zoo/old', 'zoo/adapter', '--prompt', 'chat'], 'has no chat template'),
    (['zoo/old', 'zoo/adapter', '--prompt', '{instruction} or {instruction}'], 'shows the question more than once')])
def test_bad_input_leaves_nothing(tmp_path, monkeypatch, args, message):
    monkeypatch.setattr('lorasuite.core.loading.load_model', lambda *args: pytest.fail('weights were read'))
    found = run('synthesize', *args, '-o', tmp_path/'out.jsonl')
    assert found.exit_code == 2 and message in found.stderr and not [*tmp_path.iterdir()], found.output
