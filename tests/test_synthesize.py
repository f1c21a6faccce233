"""Questions that a specialist writes: where they begin and end, the same ones again, and after an interruption"""
import json
import pytest, torch
from transformers import GenerationConfig
from typer.testing import CliRunner
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.training import synthesize as module
from lorasuite.training.prompts import Prompts, Renderer
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

@pytest.mark.parametrize('form, end', [('Q: {instruction}\nA:', '\nA:'), ('[INST] {instruction} [/INST]', ' [/INST]'),
                                       ('{instruction}', '\n')])
def test_a_plain_question_ends_where_the_prompt_goes_on(old, form, end):
    assert question_end(old.tokenizer, question_frame(Renderer.of(old, Prompts(form)))[1]) == (end, None)

def test_a_form_that_cannot_be_continued_is_refused(old, monkeypatch):
    renderer = Renderer.of(old, Prompts('{instruction}'))
    monkeypatch.setattr(renderer, 'ids', lambda text: [])
    with pytest.raises(ValueError, match='nothing stands in front of a question in the prompt of zoo/old'):
        question_frame(renderer)
    monkeypatch.setattr(renderer, 'text', lambda example: 'Tell me a joke.')
    with pytest.raises(ValueError, match='the prompt of zoo/old does not show the question'): question_frame(renderer)

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

def test_too_few_are_said(old, specialist, monkeypatch):
    monkeypatch.setattr(module, '_draw', lambda *args: ['Who?', 'who?', None, ''])
    with pytest.warns(UserWarning, match='1 different questions in 20 draws, where 2 were asked for'):
        found, counts = synthesize(old, specialist, 2)
    assert len(found) == 1 and counts == dict(drawn=20, unfinished=5, empty=5, repeated=9)
    monkeypatch.setattr(module, '_draw', lambda *args: [None]*8)
    with pytest.raises(ValueError, match='zoo/old wrote no question in 24 draws: give some'): synthesize(old, None, 2)

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
    (tmp_path/'kept'/'drawn.json').write_text('{')
    with pytest.raises(ValueError, match='drawn.json is damaged'):
        synthesize(old, specialist, keep=tmp_path/'kept', **HOW)

# ---- the command

COMMAND = ['synthesize', 'zoo/old', 'zoo/adapter', '-n', 12, '--longest', 16, '-o']

def test_questions_for_an_upgrade(tmp_path):
    out = tmp_path/'questions.jsonl'
    made = run(*COMMAND, out)
    assert made.exit_code == 0 and 'questions: 12' in made.stdout and 'such as: ' in made.stdout, made.output
    assert [p.name for p in tmp_path.iterdir()] == ['questions.jsonl']
    done = run('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '--inputs', out, '--steps', 2, '-o', tmp_path/'up')
    assert done.exit_code == 0 and 'inputs: 12' in done.stdout, done.output
    again = run(*COMMAND, out)
    assert again.exit_code == 2 and 'exists already' in again.stderr

def test_an_interrupted_command_goes_on(tmp_path, monkeypatch):
    assert run(*COMMAND, tmp_path/'whole.jsonl').exit_code == 0
    with monkeypatch.context() as m:
        read, times = module._sort_out, []
        def cut(batches, number):
            times.append(1)
            if len(times) == 2: raise KeyboardInterrupt
            return read(batches, number)
        m.setattr(module, '_sort_out', cut)
        stopped = run(*COMMAND, tmp_path/'cut.jsonl')
    assert stopped.exit_code == 130 and 'start the same command again to resume' in stopped.stderr
    monkeypatch.setattr(module, '_draw', lambda *args: pytest.fail('it was drawn already'))
    assert run(*COMMAND, tmp_path/'cut.jsonl').exit_code == 0
    assert (tmp_path/'cut.jsonl').read_bytes() == (tmp_path/'whole.jsonl').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cut.jsonl', 'whole.jsonl']

@pytest.mark.parametrize('args, message', [
    (['zoo/new', 'zoo/adapter'], 'zoo/old'), (['zoo/old', 'zoo/adapter', '-n', 0], "'-n'"),
    (['zoo/old', 'zoo/adapter', '--prompt', 'chat'], 'has no chat template')])
def test_bad_input_leaves_nothing(tmp_path, args, message):
    found = run('synthesize', *args, '-o', tmp_path/'out.jsonl')
    assert found.exit_code == 2 and message in found.stderr and not [*tmp_path.iterdir()], found.output
