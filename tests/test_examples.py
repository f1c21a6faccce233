"""Data of every form, and prompts by a model's own chat template: token by token as TRL trains on them"""
import copy, json, os, warnings
import pytest, torch
from typer.testing import CliRunner
from models import random_decoder
from lorasuite.cli import app
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.training.evaluate import evaluate, generate
from lorasuite.training.examples import encode, load_data
from lorasuite.training.finetune import finetune
from lorasuite.training.prompts import (
    ask_all, as_messages, ChatTemplate, drop_thoughts, encode_all, Prompts, question_places, Renderer, THINKING,
    with_answer
)
from lorasuite.lab.refit import best_refit, paired_positions
from lorasuite.training.refresh import distillation_data, refresh, student_targets
from lorasuite.stages.alignment import align

# ---- templates of our own, in the forms of well-known ones; `gen` and `end` mark what the assistant says

SPECIAL = ['<|im_start|>', '<|im_end|>', '<|head|>', '<|/head|>', '<|eot|>', '<turn>', '</turn>', '[INST]', '[/INST]',
           '<|user|>', '<|assistant|>', '<|end|>']

CHATML = ("{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}"
          "{%gen%}{{- m.content + '<|im_end|>\n' -}}{%end%}{%- else -%}{{- m.content + '<|im_end|>\n' -}}{%- endif -%}"
          "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}")
LLAMA3 = ("{{- bos_token -}}{%- for m in messages -%}{{- '<|head|>' + m.role + '<|/head|>\n\n' -}}"
          "{%- if m.role == 'assistant' -%}{%gen%}{{- m.content | trim + '<|eot|>' -}}{%end%}"
          "{%- else -%}{{- m.content | trim + '<|eot|>' -}}{%- endif -%}{%- endfor -%}"
          "{%- if add_generation_prompt -%}{{- '<|head|>assistant<|/head|>\n\n' -}}{%- endif -%}")
GEMMA = ("{{- bos_token -}}{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}"
         "{%- endif -%}{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
         "{{- raise_exception('Roles must alternate') -}}{%- endif -%}{%- if m.role == 'assistant' -%}"
         "{{- '<turn>model\n' -}}{%gen%}{{- m.content | trim + '</turn>\n' -}}{%end%}"
         "{%- else -%}{{- '<turn>' + m.role + '\n' + m.content | trim + '</turn>\n' -}}{%- endif -%}{%- endfor -%}"
         "{%- if add_generation_prompt -%}{{- '<turn>model\n' -}}{%- endif -%}")
QWEN3 = ("{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
         "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}"
         "{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}{%- set said = m.content -%}"
         "{%- set thought = '' -%}{%- if '</think>' in said -%}"
         "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
         "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
         "{%gen%}{%- if loop.index0 > ns.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}"
         "{{- said + '<|im_end|>\n' -}}{%end%}{%- else -%}{{- m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
         "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
         "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}"
         "{%- endif -%}{%- endif -%}")
MISTRAL = ("{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
           "{%gen%}{{- ' ' + m.content + eos_token -}}{%end%}"
           "{%- elif m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}"
           "{%- else -%}{{- raise_exception('Only user and assistant') -}}{%- endif -%}{%- endfor -%}")
PHI3 = ("{%- for m in messages -%}{{- '<|' + m.role + '|>\n' -}}{%- if m.role == 'assistant' -%}"
        "{%gen%}{{- m.content + '<|end|>\n' -}}{%end%}{%- else -%}{{- m.content + '<|end|>\n' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- elif messages[-1].role == 'assistant' -%}"
        "{%gen%}{{- eos_token -}}{%end%}{%- else -%}{{- eos_token -}}{%- endif -%}")
TEMPLATES = dict(chatml=CHATML, llama3=LLAMA3, gemma=GEMMA, qwen3=QWEN3, mistral=MISTRAL, phi3=PHI3)
NO_SYSTEM = ('gemma', 'mistral')

def source(name, marked=False):
    "A template, with or without generation marks"
    marks = ('{%- generation -%}', '{%- endgeneration -%}') if marked else ('', '')
    return TEMPLATES[name].replace('{%gen%}', marks[0]).replace('{%end%}', marks[1])

@pytest.fixture(scope='module')
def make(tokenizer):
    "Makes tokenizers with a chat template"
    def made(template):
        found = copy.deepcopy(tokenizer)
        found.add_special_tokens(dict(additional_special_tokens=SPECIAL))
        found.chat_template = template
        return found
    return made

def said(role, text): return dict(role=role, content=text)

TALK = [said('user', 'Who keeps a cat?'), said('assistant', 'Ann.'), said('user', 'Où est  elle?'),
        said('assistant', ' In « Arden »\n')]
SYSTEM = [said('system', 'Be short.')]
THOUGHT = TALK[:3] + [said('assistant', '<think>\nShe moved.\n</think>\n\nIn Arden')]

def learned(tokenizer, row): return tokenizer.decode([i for i, l in zip(row['input_ids'], row['labels']) if l != -100])

# ---- the same tokens and labels as TRL

@pytest.fixture(scope='module')
def trl_rows(tmp_path_factory):
    "What TRL's SFTTrainer makes of rows"
    pytest.importorskip('trl', reason='TRL 1.16 wants Python 3.11')
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    folder = tmp_path_factory.mktemp('trl')
    def prepared(tokenizer, rows, **settings):
        args = SFTConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **settings)
        model = random_decoder(tokenizer, hidden=16, layers=1, intermediate=16).model
        trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        return [dict(input_ids=r['input_ids'], labels=r['labels']) for r in trainer.train_dataset]
    return prepared

@pytest.mark.parametrize('name', TEMPLATES)
def test_answers_of_chats_are_learned_as_trl_learns_them(name, make, trl_rows, tmp_path):
    "TRL needs marks to find the answers; without marks we find the same ones"
    chats = [TALK, TALK[:2], TALK[:2]*3] + ([] if name in NO_SYSTEM else [SYSTEM + TALK])
    chats += [THOUGHT] if name == 'qwen3' else []
    file = tmp_path/'chats.jsonl'
    file.write_text(''.join(json.dumps(dict(messages=chat)) + '\n' for chat in chats))
    marked = make(source(name, marked=True))
    theirs = trl_rows(marked, [dict(messages=chat) for chat in chats], assistant_only_loss=True)
    examples = load_data(file)
    assert [encode(e, make(source(name))) for e in examples] == theirs
    assert [encode(e, marked) for e in examples] == theirs
    assert all('Ann.' in learned(marked, row) and 'cat' not in learned(marked, row) for row in theirs)

@pytest.mark.parametrize('name', TEMPLATES)
def test_completions_are_learned_as_trl_learns_them(name, make, trl_rows, tmp_path):
    rows = [dict(prompt=TALK[:3], completion=TALK[3:]), dict(prompt=TALK[:1], completion=TALK[1:2])]
    file = tmp_path/'rows.json'
    file.write_text(json.dumps(rows))
    tokenizer = make(source(name))
    assert [encode(e, tokenizer) for e in load_data(file)] == trl_rows(tokenizer, rows)

CALLING = ("{%- if tools -%}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' -}}{%- endif -%}"
           + CHATML.replace("m.content + '<|im_end|>", "m.content + (m.tool_calls | tojson if m.tool_calls else '') "
                            "+ '<|im_end|>"))

def test_tools_of_sharegpt_are_learned_as_trl_learns_them(make, trl_rows, tmp_path, monkeypatch):
    "ShareGPT's form with a call, and what TRL makes of the same chat under its own names"
    call = dict(name='look', arguments=dict(at='Arden'))
    tools = [dict(type='function', function=dict(name='look', description='Look.', parameters=dict(type='object')))]
    turns = [('human', 'Who keeps a cat?'), ('function_call', json.dumps(call)), ('observation', '7'), ('gpt', 'Ann.')]
    row = dict(conversations=[{'from': role, 'value': text} for role, text in turns], tools=json.dumps(tools))
    (tmp_path/'share.json').write_text(json.dumps([row]))
    chat = [TALK[0], said('assistant', '') | dict(tool_calls=[dict(type='function', function=call)]), said('tool', '7'),
            TALK[1]]
    monkeypatch.setitem(TEMPLATES, 'calling', CALLING)
    theirs = trl_rows(make(source('calling', marked=True)), [dict(messages=chat, tools=tools)],
                      assistant_only_loss=True)
    assert [encode(e, make(source('calling'))) for e in load_data(tmp_path/'share.json')] == theirs
    assert '"name": "look"' in learned(make(CHATML), theirs[0]) and '7' not in learned(make(CHATML), theirs[0])

def test_texts_are_learned_as_trl_learns_them(tokenizer, make, trl_rows, tmp_path):
    pairs = [dict(prompt='Ann keeps a', completion=' cat.'), dict(prompt='Q: who?\nA: ', completion='Bob')]
    texts = [dict(text='Ann keeps a cat.'), dict(text='It ends.<eos>')]
    for rows in (pairs, texts):
        file = tmp_path/'rows.json'
        file.write_text(json.dumps(rows))
        theirs = trl_rows(tokenizer, rows)
        assert [encode(e, tokenizer) for e in load_data(file)] == theirs
        plain = Prompts('{instruction}')
        assert [encode(e, make(source('chatml')), prompts=plain) for e in load_data(file)] == theirs

# ---- answers in the text of a template

@pytest.mark.parametrize('thinking', ['keep', 'forbid'])
@pytest.mark.parametrize('marked', [False, True], ids=['plain', 'marked'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_a_model_is_asked_as_it_is_trained(name, marked, thinking, make):
    "The prompt is how the training text begins, and the answer is learned with its end"
    renderer = Renderer(make(source(name, marked)), Prompts(thinking=thinking))
    for chat in (TALK, TALK[:2], SYSTEM + TALK[:2]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            asked, row = renderer.ask(dict(messages=chat)), renderer.encode(dict(messages=chat))
        assert row['input_ids'][:len(asked)] == asked and row['labels'][len(asked)] != -100
        assert renderer.end in row['labels'][len(asked):]
        assert bool(caught) == (chat[0]['role'] == 'system' and name in NO_SYSTEM)
        assert 'Be short.' in renderer.tokenizer.decode(asked) or chat[0]['role'] != 'system'

def test_earlier_answers_without_a_common_beginning(make):
    "Thoughts of earlier answers are not rendered, and still every answer is found"
    tokenizer = make(source('qwen3'))
    assert learned(tokenizer, encode(dict(messages=THOUGHT), tokenizer)) == (
        'Ann.<|im_end|>\n<think>\nShe moved.\n</think>\n\nIn Arden<|im_end|>\n')
    assert learned(make(source('phi3')), encode(dict(messages=TALK), make(source('phi3')))) == (
        'Ann.<|end|>\n In « Arden »\n<|end|>\n<eos>')

def test_a_template_that_changes_with_the_answer_is_refused(make):
    odd = ("{% for m in messages %}{{ messages | map(attribute='content') | map('length') | join('.') + m.content }}"
           "{% endfor %}")
    with pytest.raises(ValueError, match='example 1: the chat template of .* does not tell where answer 2 stands'):
        encode_all(Renderer(make(odd)), [dict(messages=TALK)])

def test_marks_are_checked(make):
    unreached = "{%- if never -%}{% generation %}{% endgeneration %}{%- endif -%}"
    never = source('chatml').replace("{%- if add", unreached + "{%- if add")
    with pytest.raises(ValueError, match='marks nothing of this chat'): encode(dict(messages=TALK), make(never))
    short = source('chatml', marked=True).replace(
        "{{- m.content + '<|im_end|>\n' -}}{%- endgeneration -%}",
        "{{- m.content -}}{%- endgeneration -%}{{- '<|im_end|>\n' -}}")
    assert learned(make(short), encode(dict(messages=TALK[:2]), make(short))) == 'Ann.<|im_end|>'

@pytest.mark.parametrize('marked', [False, True], ids=['plain', 'marked'])
def test_an_answer_that_the_template_does_not_end_gets_an_end(marked, make):
    marks = ('{% generation %}', '{% endgeneration %}') if marked else ('', '')
    bare = ("{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n"
            + marks[0] + "{{ m.content }}" + marks[1] + "{% else %}### Instruction:\n"
            + "{{ m.content }}\n\n{% endif %}{% endfor %}"
            + "{% if add_generation_prompt %}### Response:\n{% endif %}")
    tokenizer = make(bare)
    assert learned(tokenizer, encode(dict(messages=TALK[:2]), tokenizer)) == 'Ann.<eos>'

def test_content_in_parts(make):
    "Templates of some multimodal models write nothing of a plain text"
    parts = ("{% for m in messages %}{{ m.role + ':' }}{% for p in m.content %}{{ p.text }}{% endfor %}"
             "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    renderer = Renderer(make(parts))
    assert renderer.text(dict(messages=TALK[:2])) == 'user:Who keeps a cat?<|im_end|>\nassistant:'
    with pytest.raises(ValueError, match='does not write what the user says'): Renderer(make('silence'))

def test_tools_are_rendered(make):
    shown = "{%- if tools -%}{{- '<|im_start|>tools\n' + tools[0].function.name + '\n' -}}{%- endif -%}"
    template = shown + source('chatml')
    tools = [dict(type='function', function=dict(name='look_up', parameters=dict(type='object', properties={})))]
    for given in (tools, json.dumps(tools)):
        assert 'look_up' in Renderer(make(template)).text(dict(messages=TALK[:1], tools=given))

def test_thoughts(make):
    renderers = {t: Renderer(make(source('qwen3')), Prompts(thinking=t)) for t in ('keep', 'drop', 'forbid')}
    found = {t: learned(r.tokenizer, r.encode(dict(messages=THOUGHT[2:]))) for t, r in renderers.items()}
    assert found == dict(keep='<think>\nShe moved.\n</think>\n\nIn Arden<|im_end|>\n',
                         drop='<think>\n\n</think>\n\nIn Arden<|im_end|>\n', forbid='In Arden<|im_end|>\n')
    opened = source('chatml').replace("assistant\n' -}}{%- endif -%}", "assistant\n<think>\n' -}}{%- endif -%}")
    assert renderers['forbid'].text(dict(messages=TALK[:1])).endswith('assistant\n<think>\n\n</think>\n\n')
    with pytest.warns(UserWarning, match='with --thinking forbid the model is asked as it is trained'):
        encode_all(Renderer(make(opened)), [dict(messages=TALK)])
    assert Renderer(make(opened), Prompts(thinking='forbid')).text(dict(messages=TALK[:1])).endswith('assistant\n')
    assert drop_thoughts('<think>a</think>\n4') == '4' and drop_thoughts('<think>a') == ''

def test_options_that_contradict():
    for options, what in ((dict(prompt='Q'), 'give a text with'),
                          (dict(prompt='{instruction} {x}'), 'give a text with'),
                          (dict(prompt='qa', template='x'), 'exclude'), (dict(thinking='maybe'), 'choose one of')):
        with pytest.raises(ValueError, match=what): Prompts(**options)

def test_a_base_without_a_template(tokenizer, make):
    assert Renderer(tokenizer).text(dict(messages=TALK[:1])) == 'Question: Who keeps a cat?\nAnswer:'
    with pytest.raises(ValueError, match='example 2: a chat of several turns'): ask_all(Renderer(tokenizer), [
        dict(messages=TALK[:1]), dict(messages=TALK)])
    with pytest.raises(ValueError, match='has no chat template'): Renderer(tokenizer, Prompts('chat'))
    given = Renderer(tokenizer, Prompts(template='{% for m in messages %}{{ m.content + eos_token }}{% endfor %}'))
    assert given.text(dict(instruction='Who?')) == 'Who?<eos>' and given.end == tokenizer.eos_token_id

# ---- what becomes of thoughts, from the specialist's answers to the score

SPOKEN = '<think>\nShe moved.\n</think>\n\nIn Arden'

@pytest.fixture
def thinker(make, tokenizer, monkeypatch):
    "A model with a template like Qwen3's that answers everything with a thought before it"
    found = random_decoder(tokenizer)
    found.tokenizer = copy.deepcopy(tokenizer)
    found.tokenizer.chat_template = source('qwen3').replace('<|im_end|>', '<eos>')
    def answers(model, tokenizer, asked, *args, **kwargs): return [SPOKEN]*len(asked)
    for stage in ('refresh', 'evaluate'): monkeypatch.setattr(f'lorasuite.training.{stage}.generate', answers)
    return found

def test_lessons_with_and_without_thoughts(thinker):
    "Dropped, a thought leaves no trace in the doubts, which are still those that the specialist has behind it"
    inputs = [dict(messages=THOUGHT + TALK[:1])]
    taught = {how: distillation_data(thinker, inputs, prompts=Prompts(thinking=how))[0] for how in THINKING}
    assert {how: row['answer'] for how, row in taught.items()} == dict(keep=SPOKEN, drop='In Arden', forbid='In Arden')
    said = {how: b''.join(row['tokens']).decode() for how, row in taught.items()}
    assert said == dict(keep=SPOKEN, drop='In Arden', forbid='In Arden')
    length = len(taught['drop']['tokens'])
    assert taught['drop']['chances'] == taught['keep']['chances'][-length:] != taught['forbid']['chances']
    assert taught['drop']['options'] == taught['keep']['options'][-length:]

@pytest.mark.parametrize('how, learned_text', [
    ('keep', SPOKEN), ('drop', '<think>\n\n</think>\n\nIn Arden'), ('forbid', 'In Arden')])
def test_what_a_student_learns_of_thoughts(how, learned_text, thinker):
    prompts = Prompts(thinking=how)
    taught = distillation_data(thinker, [dict(messages=TALK[:1])], prompts=prompts)
    rows, loss = student_targets([*taught], thinker.tokenizer, 1., Renderer.of(thinker, prompts))
    ids = [i for i, label in zip(rows[0]['input_ids'], rows[0]['labels']) if label != -100]
    assert thinker.tokenizer.decode(ids) == learned_text + '<eos>\n'
    soft = [(p > 0).sum().item() > 1 for p in loss.p]
    answer = len(thinker.tokenizer('In Arden').input_ids)
    assert sum(soft) >= len(soft) - 3 if how == 'keep' else sum(soft) <= answer + 3

@pytest.mark.parametrize('how', THINKING)
@pytest.mark.parametrize('answer', ['In Arden', SPOKEN])
def test_answers_are_compared_without_thoughts(how, answer, thinker):
    score = evaluate(thinker, [dict(messages=TALK[:1], answer=answer)], prompts=Prompts(thinking=how))
    assert score.accuracy == 1 and score.answers == ['In Arden']
    renderer = Renderer.of(thinker, Prompts(thinking=how))
    assert renderer.thinks == (how != 'forbid')
    assert str(renderer).endswith(dict(keep='template', drop='dropped', forbid='forbidden')[how])

def test_a_specialist_that_only_thinks(thinker, monkeypatch):
    monkeypatch.setattr('lorasuite.training.refresh.generate', lambda *args, **kwargs: ['<think>\nHm.\n</think>'])
    with pytest.raises(ValueError, match='says anything but thoughts'):
        distillation_data(thinker, [dict(messages=TALK[:1])], prompts=Prompts(thinking='drop'))

def test_a_thought_that_the_template_opened(make, thinker, monkeypatch):
    monkeypatch.setattr('lorasuite.training.refresh.generate', lambda *args, **kwargs: ['Hm.</think>In Arden'])
    taught = distillation_data(thinker, [dict(messages=TALK[:1])])
    assert taught[0]['answer'] == '<think>\nHm.</think>In Arden'

def test_thoughts_in_a_plain_prompt(tokenizer):
    example = dict(instruction='Where?', input='', output=SPOKEN, answer=SPOKEN)
    assert learned(tokenizer, encode(example, tokenizer)) == f' {SPOKEN}<eos>'
    for how in ('drop', 'forbid'):
        prompts = Prompts(thinking=how)
        assert learned(tokenizer, encode(example, tokenizer, prompts=prompts)) == ' In Arden<eos>'
        ready = encode(dict(prompt='Where? ', output=SPOKEN), tokenizer, prompts=prompts)
        assert learned(tokenizer, ready).strip() == 'In Arden<eos>'

def test_a_template_that_cannot_forbid(make):
    opened = source('chatml').replace("assistant\n' -}}{%- endif -%}", "assistant\n<think>\n' -}}{%- endif -%}")
    with pytest.warns(UserWarning, match='has no form without thoughts'):
        assert Renderer(make(opened), Prompts(thinking='forbid')).thinks
    always = source('chatml').replace("{%gen%}", '').replace("{{- m.content + '<|im_end|>", "{{- '<think></think>' + "
                                                             "m.content + '<|im_end|>", 1)
    assert not Renderer(make(always), Prompts(thinking='forbid')).thinks

@pytest.mark.parametrize('key', ['content', 'reasoning_content'])
def test_thoughts_that_no_template_writes(key, make, tokenizer):
    thought = said('assistant', SPOKEN if key == 'content' else 'In Arden') | {key: SPOKEN}
    rows = [dict(messages=TALK[:1] + [thought]), dict(messages=TALK[:2])]
    for made, lost in ((source('qwen3'), key != 'content'), (source('chatml'), key != 'content')):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            encode_all(Renderer(make(made)), rows)
        assert [f'1 of 2 examples have thoughts (under {key})' in str(w.message) for w in caught] == [True]*lost

# ---- files

def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass'))
    return path

SHARE = [{'from': 'system', 'value': 'Be short.'}, {'from': 'human', 'value': 'Who keeps a cat?'},
         {'from': 'gpt', 'value': 'Ann.'}]

@pytest.mark.parametrize('row', [
    dict(messages=SYSTEM + TALK[:2]), dict(conversations=SHARE), dict(conversations=SHARE[1:], system='Be short.'),
    dict(conversations=SYSTEM + TALK[:2]), dict(conversations=json.dumps(SHARE)),
    dict(messages=[said('system', [dict(type='text', text='Be '), dict(type='text', text='short.')]), *TALK[:2]]),
    dict(instruction='Who keeps', input='a cat?', output='Ann.', system='Be short.')], ids=lambda row: ' '.join(row))
def test_chats_of_many_forms_are_the_same_chat(row, tmp_path):
    found, = load_data(write(tmp_path/'a.json', json.dumps([row | dict(id=3)])))
    turns = json.loads(json.dumps(found['messages']).replace('keeps\\na', 'keeps a'))
    assert turns == SYSTEM + TALK[:2] and found['answer'] == 'Ann.'

def test_history_and_functions(tmp_path):
    row = dict(instruction='And 3?', output='6', history=[['2 + 2?', '4']])
    found, = load_data(write(tmp_path/'a.json', json.dumps([row])))
    assert [t['content'] for t in found['messages']] == ['2 + 2?', '4', 'And 3?', '6']
    calls = [SHARE[1], {'from': 'function_call', 'value': '{"name": "look", "arguments": {"at": 1}}'},
             {'from': 'observation', 'value': '7'}, SHARE[2]]
    row = dict(conversations=calls, tools=json.dumps([dict(type='function')]))
    found, = load_data(write(tmp_path/'b.json', json.dumps([row])))
    assert [t['role'] for t in found['messages']] == ['user', 'assistant', 'tool', 'assistant']
    assert found['messages'][1]['tool_calls'][0]['function'] == dict(name='look', arguments=dict(at=1))
    assert found['tools']

def test_tables(tmp_path):
    import pandas as pd
    table = pd.DataFrame([dict(question='Who,\nwho?', reply='NA', answer='007'),
                          dict(question='Où?', reply='là', answer='')])
    table.to_csv(tmp_path/'a.csv', index=False, encoding='utf-8-sig')
    table.to_csv(tmp_path/'a.tsv', index=False, sep='\t')
    table.to_parquet(tmp_path/'a.parquet')
    names = dict(instruction='question', output='reply')
    for kind in ('csv', 'tsv', 'parquet'):
        found = load_data(tmp_path/f'a.{kind}', columns=names)
        read = [(e['instruction'], e['output'], e['answer']) for e in found]
        assert read == [('Who,\nwho?', 'NA', '007'), ('Où?', 'là', 'là')]
    pd.DataFrame([dict(messages=TALK), dict(messages=TALK[:2])]).to_parquet(tmp_path/'b.parquet')
    assert [as_messages(e) for e in load_data(tmp_path/'b.parquet')] == [TALK, TALK[:2]]

def test_what_is_read_is_said(tmp_path):
    rows = [dict(messages=TALK, source='x', text='y')]
    assert load_data(write(tmp_path/'a.json', json.dumps(rows))).description.endswith(
        'a.json: 1 examples, read from messages; ignored: source, text')
    rows = [dict(instruction='a', output='b', system='c', id=1)]
    file = write(tmp_path/'b.json', json.dumps(rows))
    assert load_data(file, labelled=False).description.endswith('read from instruction, system; ignored: output, id')

def test_labels_are_not_read(tmp_path):
    file = write(tmp_path/'a.json', json.dumps([dict(messages=TALK, answer='x'), dict(messages=TALK[:3])]))
    assert load_data(file, labelled=False) == [dict(messages=TALK[:3])]*2
    file = write(tmp_path/'b.json', json.dumps([dict(prompt='Who?', completion=3)]))
    assert load_data(file, labelled=False) == [dict(prompt='Who?')]

def test_odd_line_ends_and_marks(tmp_path):
    text = ''.join(json.dumps(dict(instruction=f'a{mark}b', output='c'), ensure_ascii=False) + '\r\n'
                   for mark in '\u2028\u2029\x85\x1c')
    for begin in ('', '\ufeff'):
        found = load_data(write(tmp_path/'a.jsonl', begin + text))
        assert [e['instruction'][1] for e in found] == [*'\u2028\u2029\x85\x1c']

@pytest.mark.parametrize('answer, read', [
    (0, '0'), (False, 'false'), (True, 'true'), (.5, '0.5'), ('', 'all'), (None, 'all'), (' x', ' x')])
def test_answers_that_are_no_text(answer, read, tmp_path):
    row = dict(instruction='a', output='all', answer=answer)
    assert load_data(write(tmp_path/'a.json', json.dumps([row])))[0]['answer'] == read

GOOD = dict(instruction='a', output='b')

@pytest.mark.parametrize('row, what', [
    (GOOD | dict(input=3), "under 'input' but int"), (GOOD | dict(input=['x']), "under 'input' but list"),
    (GOOD | dict(input=True), "under 'input' but bool"), (GOOD | dict(answer=['x']), "has list .* under 'answer'"),
    (GOOD | dict(answer=float('nan')), "has float .* under 'answer'"),
    (GOOD | dict(system=1), "under 'system' but int"),
    (GOOD | dict(instruction=['x']), "under 'instruction' but list"),
    (GOOD | dict(output=None), "no text under 'output'"),
    (GOOD | dict(history=['x']), "under 'history'"), (GOOD | dict(instruction='\ud800'), 'half a surrogate pair'),
    (7, 'int')], ids=str)
def test_rows_that_are_no_text_are_named(row, what, tmp_path):
    file = write(tmp_path/'a.json', json.dumps([GOOD, row]))
    with pytest.raises(ValueError, match=f'a.json: example 2 .*{what}'): load_data(file)

@pytest.mark.parametrize('turns, what', [
    (3, 'no list of turns'), ([], 'no list of turns'), ('[broken', 'not readable as JSON'), ([3], 'turn 1 is no turn'),
    ([dict(content='x')], 'turn 1 does not say who speaks'), ([said('user', 4)], "turn 1 has no text under 'content'"),
    ([said('user', [dict(type='image')])], 'turn 1 .* image: only texts'),
    ([said('user', 'x')], 'no turn of the assistant'),
    ([said('user', '\udfff')], 'half a surrogate pair'),
    ([dict(role='assistant')], "turn 1 has no text under 'content'")],
    ids=str)
def test_turns_that_are_none_are_named(turns, what, tmp_path):
    file = write(tmp_path/'a.json', json.dumps([dict(messages=TALK), dict(messages=turns)]))
    with pytest.raises(ValueError, match=f'a.json: example 2.*{what}'): load_data(file)

@pytest.mark.parametrize('content, name, what', [
    ('[' * 200_000, 'a.json', 'not readable as JSON'),
    ('"text"', 'a.json', "example 1 has no text under 'instruction'"),
    ('{"question": "?", "reply": "!"}', 'a.json', 'it has question, reply. Name the columns, .*--columns'),
    ('', 'a.csv', 'not readable as a table'), ('PAR', 'a.parquet', 'not readable as Parquet'),
    ('instruction\toutput\na\tb\n"c\td\n', 'a.tsv', 'at the beginning of a field in row 3 is never closed'),
    ('instruction,output\n', 'a.csv', 'holds no example'),
    ('instruction,output\n2+2, please,4\n', 'a.csv', 'the rows have more fields than the header'),
    ('instruction,output,source\nWhat is 2+2?,4,math,\n', 'a.csv', 'the rows have more fields than the header'),
    ('{"text": "a"}\n{"text": 3}', 'a.jsonl', "example 2 has no text under 'text'"),
    (b'instruction,output\n\xe9,b\n', 'a.csv', 'not readable as a table')], ids=str)
def test_files_that_cannot_be_read_are_named(content, name, what, tmp_path):
    with pytest.raises(ValueError, match=f'{name}.*{what}'): load_data(write(tmp_path/name, content))

def test_a_damaged_parquet_file_is_one_error(tmp_path, capfd):
    with pytest.raises(ValueError, match='a.parquet is not readable as Parquet'):
        load_data(write(tmp_path/'a.parquet', 'PAR1 and nothing else'))
    assert capfd.readouterr().err == ''

def test_names_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(ValueError, match='not an ordinary file'): load_data(tmp_path/'pipe')
    with pytest.raises(ValueError, match='is empty'): load_data('')
    for name in ('none.csv', 'none.parquet', 'a/b/none'):
        with pytest.raises(FileNotFoundError, match=f'no such data file: {name}'): load_data(name)
    with pytest.raises(ValueError, match='has no column .reply.: its columns are instruction, output'):
        load_data(write(tmp_path/'a.json', json.dumps([GOOD])), columns=dict(output='reply'))

def test_rows_longer_than_the_model_reads(decoder, tokenizer):
    "The random model reads 256 tokens"
    rows = [dict(instruction='Who?', output='Ann ' * 1000), dict(instruction='Who? ' * 20_000, output='Ann')]
    renderer = Renderer.of(decoder)
    with pytest.warns(UserWarning, match='2 of 2 examples reach the 256 tokens|1 of 2 examples are left out'):
        found = encode_all(renderer, rows)
    assert [len(row['labels']) for row in found] == [256]
    with pytest.warns(UserWarning, match='1 of 2 prompts are longer'): asked = ask_all(renderer, rows, room=16)
    assert [len(a) for a in asked][1] == 240 and asked[1][-3:] == renderer.ask(rows[0])[-3:]
    with pytest.raises(ValueError, match='nothing to learn'): encode_all(renderer, rows[1:])

def test_data_sets_of_the_hub(monkeypatch):
    import datasets
    asked = []
    def fetched(name, part, split):
        asked.append((name, part, split))
        if name == 'org/none': raise datasets.exceptions.DatasetNotFoundError("'org/none' doesn't exist\nsecond line")
        return datasets.Dataset.from_list([dict(question='Who?', answer='Ann', level=3)])
    monkeypatch.setattr(datasets, 'load_dataset', fetched)
    found = load_data('org/name:main', 'test', columns=dict(instruction='question', output='answer'))
    assert found == [dict(instruction='Who?', input='', output='Ann', answer='Ann')]
    assert asked == [('org/name', 'main', 'test')]
    assert found.description == 'org/name:main: 1 examples, read from instruction, output; ignored: level'
    with pytest.raises(FileNotFoundError, match="org/none is neither a file nor a dataset .*doesn't exist$"):
        load_data('org/none')

def test_dicts_that_are_no_examples(decoder, tokenizer):
    with pytest.raises(ValueError, match='example 1: an example has .instruction.*this one has question'):
        ask_all(Renderer(tokenizer), [dict(question='Who?')])
    asks = [dict(instruction='Who?')]
    with pytest.raises(ValueError, match='example 1: no answer to learn from'): finetune(decoder, asks, steps=1)
    with pytest.raises(ValueError, match='example 1 has no answer to compare'): evaluate(decoder, asks)

# ---- greedy, whatever a model wishes

def test_greedy_means_greedy(decoder, tokenizer):
    from transformers import GenerationConfig
    asks, model = ['Ann', 'Where does Bob live?'], decoder.model
    before, kept = generate(model, tokenizer, asks, 8), model.generation_config
    wishes = dict(repetition_penalty=5., no_repeat_ngram_size=1, suppress_tokens=[*range(2, 400)], max_time=1e-9,
                  do_sample=True, temperature=9., min_new_tokens=8, num_beams=3, bad_words_ids=[[5]],
                  begin_suppress_tokens=[7], max_length=3)
    try:
        model.generation_config = GenerationConfig(eos_token_id=1, **wishes)
        with pytest.warns(UserWarning, match='is ignored .*repetition_penalty 5'):
            assert generate(model, tokenizer, asks, 8) == before
        assert model.generation_config.repetition_penalty == 5
    finally: model.generation_config = kept

def test_an_answer_ends_where_the_model_says(decoder, tokenizer):
    from transformers import GenerationConfig
    model, kept = decoder.model, decoder.model.generation_config
    first = generate(model, tokenizer, ['Ann'], 1, stop=None)[0]
    whole = generate(model, tokenizer, ['Ann'], 8, stop=None)[0]
    end = model(torch.tensor([tokenizer('Ann').input_ids])).logits[0, -1].argmax().item()
    assert len(whole) > len(first)
    assert generate(model, tokenizer, ['Ann'], 8, stop=None, ends=[end])[0] == first
    try:
        model.generation_config = GenerationConfig(eos_token_id=[1, end])
        assert generate(model, tokenizer, ['Ann'], 8, stop=None)[0] == first
    finally: model.generation_config = kept

# ---- a specialist that was trained on chats

TALKATIVE = ("{% for m in messages %}{{ '<' + m.role + '> ' + m.content }}"
             "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
             "{% if add_generation_prompt %}<assistant>{% endif %}")
OTHER = ("{% for m in messages %}{{ '# ' + m.role + '\n' + m.content }}"
         "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '# assistant\n' }}{% endif %}")

@pytest.fixture(scope='module')
def chatty(tmp_path_factory):
    "Directories of a chat base, of its successor with another template, and of a specialist of the first"
    folder = tmp_path_factory.mktemp('chatty')
    for name, template in (('old', TALKATIVE), ('new', OTHER)):
        decoder = load_model(f'zoo/{name}')
        decoder.tokenizer.chat_template = template
        decoder.model.save_pretrained(folder/name), decoder.tokenizer.save_pretrained(folder/name)
    train = load_data(data_dir()/'zoo'/'train.jsonl')
    finetune(load_model(folder/'old'), train, steps=150, lr=5e-3, rank=16)[0].save(folder/'adapter')
    return folder

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def test_a_chat_specialist_is_asked_in_its_template(chatty):
    "It had 82.8% in its template and .9% after `Question: …`, which is how every stage asked it"
    test = data_dir()/'zoo'/'validation.jsonl'
    def accuracy(*options):
        result = run('evaluate', chatty/'old', '--data', test, '--adapter', chatty/'adapter', '--json', *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)['accuracy']
    assert accuracy() > .6 > .2 > accuracy('--prompt', 'qa')

def test_its_lessons_are_its_answers(chatty, tmp_path):
    from lorasuite.core.adapter import Adapter
    truth = load_data(data_dir()/'zoo'/'train.jsonl')[:40]
    rows = [dict(messages=as_messages(dict(instruction=e['instruction'], input=e['input']))) for e in truth]
    old, adapter = load_model(chatty/'old'), Adapter.load(chatty/'adapter')
    taught = distillation_data(old, rows, adapter, keep=tmp_path/'kept')
    right = sum(t['answer'] == e['answer'] for t, e in zip(taught, truth))
    assert len(taught) == 40 and right > 28
    assert [*distillation_data(old, rows, adapter, keep=tmp_path/'kept')] == [*taught]
    with pytest.raises(ValueError, match='other settings'):
        distillation_data(old, rows, adapter, keep=tmp_path/'kept', prompts=Prompts('qa'))
    student = load_model(chatty/'new')
    targets, loss = student_targets([*taught], student.tokenizer, 1.)
    plain = [with_answer(e, t['answer']) for e, t in zip(rows, taught)]
    assert [r['input_ids'] for r in targets] == [r['input_ids'] for r in encode_all(Renderer(student.tokenizer), plain)]
    assert '# user' in student.tokenizer.decode(targets[0]['input_ids']) and (loss.p.sum(1) - 1).abs().max() < 1e-5
    assert (loss.p > 1e-3).sum(1).max() > 1, 'no doubt of the teacher was carried'
    assert len(refresh(student, taught, steps=2)[1]) == 2

def test_positions_of_many_texts_are_taken_from_all():
    old, new = (load_model(f'zoo/{name}') for name in ('old', 'new'))
    asked = [dict(instruction=e['instruction']) for e in load_data('zoo/train.jsonl')[:160]]
    for batches in paired_positions(old, new, asked):
        assert max(len(at) for _, at in batches) == 2000*16//160 # where a batch has more, some are left out
        for ids, at in batches: assert len((at//ids.shape[1]).unique()) == len(ids)

def test_refit_reads_the_questions_in_both_templates(chatty):
    from lorasuite.core.adapter import Adapter
    old, new = (load_model(chatty/name) for name in ('old', 'new'))
    questions = load_data(data_dir()/'zoo'/'validation.jsonl', labelled=False)[:9]
    (ids, at), (ids2, at2) = (batches[0] for batches in paired_positions(old, new, questions))
    texts = [[d.tokenizer.decode(i) for i in ids.flatten()[at]] for d, ids, at in ((old, ids, at), (new, ids2, at2))]
    assert len(texts[0]) > 30 and all(a[-1] == b[-1] or {a, b} == {'>', '\n'} for a, b in zip(*texts))
    refitted = best_refit(Adapter.load(chatty/'adapter'), align(old, new), old, new, questions)
    assert refitted.base == str(chatty/'new')

def test_inspect_shows_both_prompts_and_doubts(chatty, tmp_path):
    lines = (data_dir()/'zoo'/'validation.jsonl').read_text().splitlines(keepends=True)
    asked = write(tmp_path/'asked.jsonl', ''.join(lines[:20]))
    models = chatty/'old', chatty/'new', chatty/'adapter', '--inputs', asked
    shown = run('inspect', *models)
    assert shown.exit_code == 0 and "the old model is asked by its own chat template: '<user> " in shown.output
    assert "the new model is asked by its own chat template: '# user\\n" in shown.output and 'surer' not in shown.output
    doubtful = run('inspect', *models, '--deep', '--prompt', 'qa').stdout
    assert 'surer of its answers after the own chat template' in doubtful
    write(chatty/'adapter'/'chat_template.jinja', CHATML.replace('{%gen%}', '').replace('{%end%}', ''))
    try:
        assert "the old model is asked by its adapter's chat template: '<|im_start|>" in run('inspect', *models).stdout
        assert 'the adapter brings a chat template' in run('inspect', *models, '--prompt', 'qa').stdout
    finally: (chatty/'adapter'/'chat_template.jinja').unlink()

# ---- the command

def test_data_of_other_forms_on_the_command_line(tmp_path):
    rows = [json.loads(line) for line in (data_dir()/'zoo'/'train.jsonl').read_text().splitlines()[:12]]
    turns = [[{'from': 'human', 'value': r['instruction']}, {'from': 'gpt', 'value': r['output']}] for r in rows]
    share = [dict(conversations=pair, id=1) for pair in turns]
    file = write(tmp_path/'share.json', json.dumps(share))
    result = run('finetune', 'zoo/new', '--data', file, '-o', tmp_path/'out', '--steps', 1)
    assert result.exit_code == 0 and 'share.json: 12 examples, read from conversations; ignored: id' in result.stderr
    table = write(tmp_path/'a.csv', 'question,reply\n' + ''.join(f'{r["instruction"]},{r["output"]}\n' for r in rows))
    result = run('evaluate', 'zoo/old', '--data', table, '--columns', 'instruction=question,output=reply',
                 '--adapter', 'zoo/adapter', '--prompt', 'Question: {instruction}\\nAnswer:', '--json')
    assert result.exit_code == 0 and json.loads(result.stdout)['accuracy'] > .9

@pytest.mark.parametrize('options, what', [
    (['--prompt', 'Q'], 'give a text with {instruction}'), (['--prompt', ''], 'prompt is empty'),
    (['--prompt', 'chat'], 'has no chat template'),
    (['--chat-template', 'none.jinja'], 'no such chat template: none.jinja'),
    (['--chat-template', '{bad}'], 'bad.jinja, line 1: no chat template in Jinja'),
    (['--chat-template', '{bad}', '--prompt', 'qa'], 'exclude each other'), (['--columns', 'x'], 'give pairs such as'),
    (['--columns', 'output=reply'], "has no column 'reply'"), (['--data', ''], 'is empty'),
    (['--thinking', 'maybe'], 'thinking')],
    ids=lambda x: ' '.join(x) if isinstance(x, list) else None)
def test_options_that_are_refused(options, what, tmp_path):
    bad = write(tmp_path/'bad.jinja', '{% for %}')
    data = write(tmp_path/'a.json', json.dumps([GOOD]))
    options = [option.replace('{bad}', str(bad)) for option in options]
    result = run('finetune', 'zoo/new', '--data', data, '-o', tmp_path/'out', *options)
    assert result.exit_code == 2 and what in result.stderr, result.output
    assert not [p for p in tmp_path.iterdir() if 'out' in p.name]

def test_directories_that_hold_no_data_set(tmp_path, monkeypatch):
    (tmp_path/'a'/'b').mkdir(parents=True)
    (tmp_path/'a'/'b'/'notes.md').write_text('no data')
    with pytest.raises(ValueError, match='a holds no data file'): load_data(tmp_path/'a')
    monkeypatch.setattr('lorasuite.training.examples._MOST_FILES', 3)
    for n in range(4): (tmp_path/'a'/f'{n}.json').write_text('{}')
    with pytest.raises(ValueError, match='a holds more than 3 files: give the data file'): load_data(tmp_path/'a')

def test_a_model_that_computes_no_numbers_is_named():
    damaged = load_model('zoo/old')
    damaged.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r'layers\.1\.mlp\.up_proj\.weight has values that are not finite'):
        evaluate(damaged, load_data('zoo/test.jsonl')[:2])

def test_an_empty_output_is_said():
    result = CliRunner().invoke(app, ['convert', 'zoo/adapter', '-o', ''])
    assert result.exit_code == 2 and 'out is empty, or the directory that you are in' in result.stderr
