"""Thoughts in whatever form a model writes them: what is learned, compared and taught is the answer behind them"""
import warnings
import pytest, torch
from models import random_decoder
from test_trl_templates import FOLDER, made, said
from lorasuite.training.evaluate import evaluate, generate
from lorasuite.training.prompts import (
    drop_thoughts, encode_all, Prompts, Renderer, split_thought, spoken, THINKING, THOUGHT_FORMS, without_thoughts)
from lorasuite.training.refresh import distillation_data, student_targets

ASK, SPOKEN = [said('user', 'Where?')], '<think>\nShe moved.\n</think>\n\nIn Arden'
# of each template: what it writes before a thought, behind it, before any answer, and behind the answer
CHANNELS = dict(
    gptoss=('<|channel|>analysis<|message|>', '<|end|><|start|>assistant', '<|channel|>final<|message|>', '<|return|>'),
    gemma4_v5=('<|channel>thought\n', '\n<channel|>', '', '<turn|>\n'),
    diffusion_gemma=('<|channel>thought\n', '\n<channel|>', '', '<turn|>\n'),
    muse_glimmer=(' to=self<|message|>', '<|eom|><|start|>assistant', ' to=user<|message|>', '<|eot|>'))

def written(name, thought='She moved.', answer='In Arden'):
    "An answer as a model with this template writes it"
    opening, closing, header, end = CHANNELS[name]
    return (opening + thought + closing if thought is not None else '') + header + answer + end

def learned(renderer, *turns):
    row = renderer.encode(dict(messages=[*ASK, *turns]))
    return renderer.tokenizer.decode([i for i in row['labels'] if i != -100])

@pytest.fixture
def talker(tokenizer):
    "Makes a random model with a template that says what it is told to say, token by token, and counts as trained on it"
    def make(name, says):
        own = made(tokenizer, (FOLDER/f'{name}.jinja').read_text())
        found = random_decoder(own, max_position_embeddings=1024)
        def answers(input_ids, generation_config, **kwargs):
            row = own(says, add_special_tokens=False).input_ids
            end = {*generation_config.eos_token_id} & {*row}
            if end: row = row[:min(map(row.index, end)) + 1]
            return torch.cat([input_ids, torch.tensor([row]*len(input_ids))], 1)
        found.model.generate = answers
        return found
    return make

# ---- texts

@pytest.mark.parametrize('text, pair', {
    '<think>a</think>4': ('a', '4'), 'a</think>\n4': ('a', '4'), '<think>a': ('a', ''), ' 4': (None, ' 4'),
    '<|channel>thought\na\n<channel|>4': ('a', '4'), '<|channel>thought\n<channel|>4': ('', '4'),
    '<|channel>thought\na': ('a', ''),
    '<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4': ('a', '4'),
    '<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>'
    '<|start|>assistant<|channel|>final<|message|>4': ('a\nb', '4'),
    '<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b': ('a\nb', ''),
    '<|channel|>final<|message|>4': (None, '4'), '<|channel|>analysis<|message|>a': ('a', '')}.items())
def test_forms_of_thoughts(text, pair):
    assert split_thought(text) == pair and drop_thoughts(text) == pair[1]
    row = dict(prompt='Q', output=text, answer=text)
    assert without_thoughts(row) == dict(prompt='Q', output=pair[1], answer=pair[1])

# ---- what is learned

@pytest.mark.parametrize('how', THINKING)
@pytest.mark.parametrize('name', CHANNELS)
def test_what_is_learned_of_thoughts_in_channels(name, how, tokenizer):
    "The same, wherever and in whatever form a data set has the thought"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        renderer = Renderer(made(tokenizer, (FOLDER/f'{name}.jinja').read_text()), Prompts(thinking=how))
    forms = [SPOKEN, *(form.opening + 'She moved.' + form.closing + form.header + 'In Arden' for form in THOUGHT_FORMS)]
    rows = [said('assistant', text) for text in forms]
    keys = ('thinking', 'reasoning', 'reasoning_content')
    rows += [said('assistant', 'In Arden') | {key: 'She moved.'} for key in keys]
    opening, closing, header, end = CHANNELS[name]
    right = dict(keep=written(name), drop=header + 'In Arden' + end, forbid='In Arden' + end)[how]
    for row in rows: assert learned(renderer, row) == right
    history = renderer.text(dict(messages=[*ASK, rows[0], *ASK])) # of these, one writes earlier thoughts too
    assert ('She moved.' in history) == (name == 'muse_glimmer' and how == 'keep') and '<think>' not in history
    asked = renderer.ask(dict(messages=ASK))
    row = renderer.encode(dict(messages=[*ASK, rows[0]]))
    assert row['input_ids'][:len(asked)] == asked and row['labels'][len(asked)] != -100
    assert renderer.end in row['labels'] and renderer.thinks == (how != 'forbid')

@pytest.mark.parametrize('name', ['gemma4', 'gemma4_v2', 'gemma4_v3', 'gemma4_v4'])
def test_templates_that_remove_thoughts_from_the_data(name, tokenizer):
    renderer = Renderer(made(tokenizer, (FOLDER/f'{name}.jinja').read_text()))
    for text in (SPOKEN, '<|channel>thought\nShe moved.\n<channel|>In Arden'):
        assert learned(renderer, said('assistant', text)) == 'In Arden<turn|>\n'
        with pytest.warns(UserWarning, match='1 of 1 examples have thoughts .under content. that own chat template'):
            encode_all(renderer, [dict(messages=[*ASK, said('assistant', text)])])
    assert not Renderer(renderer.tokenizer, Prompts(thinking='forbid')).thinks

def test_a_template_that_takes_thoughts_under_a_key_only(tokenizer):
    "Qwen 3.8 writes what stands in the content behind an empty thought of its own"
    renderer = Renderer(made(tokenizer, (FOLDER/'qwen3_8.jinja').read_text()))
    for turn in (said('assistant', SPOKEN), said('assistant', 'In Arden') | dict(reasoning='She moved.')):
        assert learned(renderer, turn) == 'She moved.\n</think>\n\nIn Arden<|im_end|>\n'

def test_thoughts_without_marks_are_said(tokenizer):
    template = ("{% for m in messages %}{{ m.role + ': ' + (m.reasoning or '') + ' ' + m.content + eos_token }}"
                "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.warns(UserWarning, match=r'writes thoughts \(under reasoning\) without a mark behind them'):
        Renderer(made(tokenizer, template))

# ---- what is said

@pytest.mark.parametrize('how', THINKING)
@pytest.mark.parametrize('name', CHANNELS)
def test_answers_behind_channels_are_compared(name, how, talker):
    thoughts = [None] if how == 'forbid' else [None, '', 'She moved.\nTo Arden?']
    for thought in thoughts:
        says = written(name, thought) if how != 'forbid' else 'In Arden' + CHANNELS[name][3]
        for answer in ('In Arden', SPOKEN, written(name).removesuffix(CHANNELS[name][3])):
            score = evaluate(talker(name, says), [dict(messages=ASK, answer=answer)], prompts=Prompts(thinking=how))
            assert score.answers == ['In Arden'] and score.accuracy == 1

@pytest.mark.parametrize('name', CHANNELS)
def test_a_channel_that_does_not_end(name, talker):
    model = talker(name, written(name).partition(' moved')[0])
    assert evaluate(model, [dict(messages=ASK, answer='x')]).answers == ['']

def test_an_end_of_a_message_is_no_end_of_an_answer(talker):
    renderer = Renderer.of(talker('gptoss', ''))
    ends = [renderer.tokenizer.decode(i) for i in renderer.ends]
    assert sorted(ends) == ['<eos>', '<|return|>'] and renderer.tokenizer.decode(renderer.end) == '<|return|>'

def test_a_call_of_a_tool_behind_a_thought(talker):
    model = talker('gptoss', '<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary '
                             'to=functions.look<|message|>{"at": "x"}<|call|>')
    answer, = evaluate(model, [dict(messages=ASK, answer='x')]).answers
    assert answer == 'commentary to=functions.look{"at": "x"}'

def test_special_tokens_that_are_no_marks_stay_silent(tokenizer):
    own = made(tokenizer, '<|end|><|channel|>')
    ids = own('<|channel|>Kirk<|end|>', add_special_tokens=False).input_ids
    assert spoken(own, ids) == spoken(own, ids, THOUGHT_FORMS[1]) == 'Kirk'

# ---- what is taught

@pytest.mark.parametrize('how', THINKING)
@pytest.mark.parametrize('name', CHANNELS)
def test_lessons_behind_channels(name, how, talker):
    prompts = Prompts(thinking=how)
    teacher = talker(name, written(name) if how != 'forbid' else 'In Arden' + CHANNELS[name][3])
    taught = distillation_data(teacher, [dict(messages=ASK)], prompts=prompts)
    assert taught[0]['answer'] == (SPOKEN if how == 'keep' else 'In Arden')
    text = b''.join(taught[0]['tokens']).decode()
    opening, closing, header, end = CHANNELS[name]
    assert text == (opening + 'She moved.' + closing + header if how == 'keep' else '') + 'In Arden'
    rows, loss = student_targets([*taught], teacher.tokenizer, 1., Renderer.of(teacher, prompts))
    assert sum((p > 0).sum().item() > 1 for p in loss.p) >= len(taught[0]['tokens']) - 3

def test_a_student_that_marks_thoughts_otherwise(talker):
    "Labels have the student's marks; what the teacher expects is used behind the thought"
    taught = [*distillation_data(talker('gptoss', written('gptoss')), [dict(messages=ASK)])]
    student = talker('qwen3', '')
    renderer = Renderer.of(student)
    rows, loss = student_targets(taught, student.tokenizer, 1., renderer)
    ids = [i for i, label in zip(rows[0]['input_ids'], rows[0]['labels']) if label != -100]
    assert student.tokenizer.decode(ids) == SPOKEN + '<|im_end|>\n'
    soft = [(p > 0).sum().item() > 1 for p in loss.p]
    thought = len(student.tokenizer(SPOKEN.removesuffix('In Arden'), add_special_tokens=False).input_ids)
    assert not any(soft[:thought]) and all(soft[thought:-2])

# ---- answers that end at a line break

@pytest.mark.parametrize('name, says', [('qwen3', SPOKEN + '\nMore<|im_end|>'), *(
    (name, written(name, answer='In Arden\nMore')) for name in CHANNELS)])
def test_a_line_break_ends_the_answer_and_no_thought(name, says, talker):
    model = talker(name, says.replace('She moved.', 'She\nmoved.'))
    thoughtful = SPOKEN.replace('She moved.', 'She\nmoved.')
    renderer = Renderer.of(model)
    asked = [renderer.ask(dict(messages=ASK))]
    assert generate(model.model, model.tokenizer, asked, 99, ends=renderer.ends, form=renderer.form) == [thoughtful]
    for how, answer in dict(keep=thoughtful, drop='In Arden').items():
        taught = distillation_data(model, [dict(messages=ASK)], stop='\n', prompts=Prompts(thinking=how))
        assert taught[0]['answer'] == answer

def test_a_line_break_in_a_thought_is_no_end_for_the_teacher(talker):
    model = talker('qwen3', SPOKEN + '<|im_end|>')
    row = distillation_data(model, [dict(messages=ASK)], stop='\n', top=2000)[0]
    first = next(i for i, _ in enumerate(row['tokens']) if b''.join(row['tokens'][i:]) == b'In Arden')
    assert all(b'\n' in options for options in row['options'][:first])
    assert all(b'\n' not in options for options in row['options'][first:])

@pytest.mark.parametrize('end, thought', [('', '<think>\nShe\nmoved.'), ('<|im_end|>', 'She')])
def test_a_thought_that_the_prompt_opens_and_nothing_closes(end, thought, talker):
    "Cut by its limit it is a thought; ended by the model it may be the answer of an adapter that does not think"
    model = talker('qwen3_6', 'She\nmoved.' + end)
    renderer = Renderer.of(model)
    asked = [renderer.ask(dict(messages=ASK))]
    assert generate(model.model, model.tokenizer, asked, 99, stop='\n', ends=renderer.ends) == [thought]
