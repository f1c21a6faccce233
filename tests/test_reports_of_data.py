"""Public reports about chats, data and training: for each a small input of our own, its thread, and the right value"""
import copy, json, shutil
import pandas as pd, pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from test_reports import FILE, ZOO, lora, quiet, refused, warned
from lorasuite.core.loading import load_model
from lorasuite.training.examples import load_data
from lorasuite.training.finetune import finetune
from lorasuite.training.prompts import Prompts, Renderer, encode_all
from lorasuite.training.trainer import _collator

# ---- chats

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<turn_end>\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT = [dict(role='user', content='Who?'), dict(role='assistant', content='Ann.')]

def chat(tokenizer, template=TEMPLATE, **tokens):
    "A tokenizer with a chat template whose turns end in another token than its own end"
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens(dict(additional_special_tokens=['<turn_end>', '<bos>', '<user>', '<assistant>']))
    for name, token in tokens.items(): setattr(made, name, token)
    made.chat_template = template
    return made

def learned(renderer, messages=CHAT, **more):
    "The text that is learned of a chat"
    row = renderer.encode(dict(messages=messages) | more)
    return renderer.tokenizer.decode([i for i in row['labels'] if i != -100])

def test_a_turn_that_ends_in_another_token(tokenizer):
    "axolotl-ai-cloud/axolotl#3754"
    made = chat(tokenizer)
    row = Renderer(made).encode(dict(messages=CHAT + CHAT))
    end = made.convert_tokens_to_ids('<turn_end>')
    labels = [label for label, i in zip(row['labels'], row['input_ids']) if i == end]
    assert labels == [-100, end, -100, end] and made.eos_token_id not in row['input_ids']
    assert learned(Renderer(made), CHAT + CHAT) == 'Ann.<turn_end>\n'*2

def test_answers_end_at_the_end_of_a_turn(tokenizer):
    "unslothai/unsloth#5386, hiyouga/LlamaFactory#9189"
    made = chat(tokenizer)
    assert Renderer(made).ends == sorted([made.eos_token_id, made.convert_tokens_to_ids('<turn_end>')])

def test_a_chat_model_is_asked_and_trained_in_its_template(tokenizer):
    "OpenBMB/MiniCPM-V#141"
    renderer = Renderer(chat(tokenizer))
    asked, row = renderer.ask(dict(instruction='Who?')), renderer.encode(dict(instruction='Who?', output='Ann.'))
    assert renderer.tokenizer.decode(asked) == '<user>Who?<turn_end>\n<assistant>'
    assert row['input_ids'][:len(asked)] == asked

def test_padding_that_is_the_end_token(tokenizer):
    "huggingface/trl#1623, huggingface/trl#3091"
    made = chat(tokenizer, pad_token='<eos>', template=TEMPLATE.replace('<turn_end>', '<eos>'))
    rows = [Renderer(made).encode(dict(messages=turns)) for turns in (CHAT, CHAT + CHAT)]
    batch = _collator(made, False)(rows)
    ends = [(labels == made.eos_token_id).sum().item() for labels in batch['labels']]
    assert ends == [1, 2] and (batch['labels'][batch['attention_mask'] == 0] == -100).all()

@pytest.mark.parametrize('start', ['{{ bos_token }}', ''])
def test_one_beginning_token(tokenizer, start):
    "vllm-project/vllm#27515, huggingface/alignment-handbook#127"
    made = chat(tokenizer, start + TEMPLATE) # whose every text begins with its token
    found = Renderer(made).encode(dict(messages=CHAT))['input_ids'], Renderer(made).ask(dict(messages=CHAT[:1]))
    assert [ids.count(made.bos_token_id) for ids in found] == [bool(start)]*2
    assert Renderer(made).encode(dict(text='Ann.'))['input_ids'].count(made.bos_token_id) == 2 # with the end, the same

@pytest.mark.parametrize('template', [
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}",
    "{% for m in messages %}{{ '[I]' if m['role'] == 'user' else '[/I]' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[/I]{% endif %}"])
def test_a_mark_that_is_cut_otherwise_in_a_text(tokenizer, template):
    "huggingface/trl#1183, huggingface/trl#1920, unslothai/unsloth#1262"
    said = learned(Renderer(chat(tokenizer, template)))
    assert 'Ann.' in said and 'Who' not in said and 'Q' not in said and '/I' not in said

def test_a_prompt_with_an_end_token_of_its_own(tokenizer):
    "tloen/alpaca-lora#306"
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = TemplateProcessing(single='<eos> $A <eos>', special_tokens=[('<eos>', 1)])
    row = Renderer(made).encode(dict(prompt='Q: a\nA:', output=' yes'))
    assert made.decode([i for i in row['labels'] if i != -100]).startswith(' yes')

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE

def test_a_template_without_system_texts(tokenizer):
    "EleutherAI/lm-evaluation-harness#2069"
    renderer = Renderer(chat(tokenizer, NO_SYSTEM))
    with warned('no place for a system text: it is put before the first question'):
        text = renderer.text(dict(messages=[dict(role='system', content='Be short.')] + CHAT[:1]))
    assert text == '<user>Be short.\n\nWho?<turn_end>\n<assistant>'

DATES = ("{{ strftime_now('%d %b %Y') }} ",
         "{% set form = '%d %b %Y' %}{% if strftime_now is defined %}{{ strftime_now(form) }}{% endif %} ",
         "{% macro today(form) %}{{ strftime_now(form) }}{% endmacro %}{{ today('%d %b %Y') }} ")

@pytest.mark.parametrize('date', DATES)
def test_a_template_that_writes_the_date(tokenizer, monkeypatch, date):
    "sgl-project/sglang#3296, unslothai/unsloth#881"
    made = chat(tokenizer, date + TEMPLATE)
    class Clock:
        day = 1
        @classmethod
        def now(cls): return pd.Timestamp(2026, 1, cls.day)
    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Clock)
    renderer = Renderer(made)
    first = renderer.text(dict(messages=CHAT[:1]))
    Clock.day = 2
    assert renderer.text(dict(messages=CHAT[:1])) == first and '26 Jul 2024 <user>' in first
    assert str(renderer) == 'own chat template, dated 26 Jul 2024 on every day'

THINK = ("{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
         "{% set parts = m['content'].split('</think>') %}{% if parts[1:] %}<think>\n"
         "{{ parts[0].split('<think>')[-1] }}</think>{{ parts[-1] }}"
         "{% else %}<think>\n\n</think>\n\n{{ m['content'] }}{% endif %}"
         "{% else %}{{ m['content'] }}{% endif %}<turn_end>\n{% endfor %}"
         "{% if add_generation_prompt %}<assistant>{% endif %}")

def test_an_answer_with_only_a_closing_think_mark(tokenizer):
    "huggingface/trl#6363"
    turns = CHAT[:1] + [dict(role='assistant', content='2+2=4\n</think>\n\n4')]
    said = {how: learned(Renderer(chat(tokenizer, THINK), Prompts(thinking=how)), turns) for how in ('keep', 'drop')}
    assert said['keep'].count('</think>') == 1 and '2+2=4' in said['keep']
    assert '2+2=4' not in said['drop'] and said['drop'].rstrip().endswith('4<turn_end>')

def test_a_template_that_always_ends_in_a_header(tokenizer):
    "unslothai/unsloth#880"
    said = learned(Renderer(chat(tokenizer, TURNS + '<assistant>')))
    assert said == 'Ann.<turn_end>\n'
    assert learned(Renderer(chat(tokenizer, TURNS + '<assistant>')), CHAT + CHAT) == 'Ann.<turn_end>\n'*2
    assert Renderer(chat(tokenizer, TURNS + '<assistant>')).text(dict(messages=CHAT[:1])).endswith('<assistant>')

def test_a_template_in_a_file_of_its_own(tokenizer, tmp_path):
    "huggingface/text-generation-inference#3247, ggml-org/llama.cpp#6484"
    shutil.copytree(ZOO/'old', tmp_path/'old')
    (tmp_path/'old'/'chat_template.jinja').write_text(TEMPLATE)
    said = json.loads((tmp_path/'old'/'tokenizer_config.json').read_text())
    (tmp_path/'old'/'tokenizer_config.json').write_text(json.dumps(said | dict(chat_template='{{ 1 }}')))
    assert load_model(tmp_path/'old').tokenizer.chat_template == TEMPLATE
    made = chat(tokenizer, dict(default=TEMPLATE, tool_use='tools ' + TEMPLATE))
    tools = json.dumps([dict(type='function', function=dict(name='f', description='', parameters={}))])
    assert not Renderer(made).text(dict(messages=CHAT[:1])).startswith('tools')
    assert Renderer(made).text(dict(messages=CHAT[:1], tools=tools)).startswith('tools')

# ---- data

def lines(path, rows, encoding='utf-8'):
    path.write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding=encoding)
    return path

CALL = dict(type='function', function=dict(name='f', arguments=dict(x=1)))
TOOLS = "{% for m in messages %}{{ m | tojson }}<turn_end>{% endfor %}{{ tools | tojson }}"
CALLS = [CHAT[0], dict(role='assistant', content='', tool_calls=[CALL]), dict(role='tool', content='1'), CHAT[1]]

def rendered(tokenizer, data):
    "The token ids of all rows of a file"
    return [row['input_ids'] for row in encode_all(Renderer(chat(tokenizer, TOOLS)), load_data(data))]

@quiet
def test_nulls_for_keys_that_are_missing(tokenizer, tmp_path):
    "huggingface/datasets#7617, huggingface/trl#5118"
    other = copy.deepcopy(CALLS)
    other[1]['tool_calls'][0]['function']['arguments'] = dict(y='b')
    rows = [dict(messages=CALLS), dict(messages=CHAT), dict(messages=other)]
    Dataset.from_list(rows).to_parquet(tmp_path/'a.parquet')
    assert rendered(tokenizer, tmp_path/'a.parquet') == rendered(tokenizer, lines(tmp_path/'a.jsonl', rows))

@pytest.mark.parametrize('kind', ['csv', 'parquet'])
def test_blank_cells_of_a_table(tmp_path, kind):
    "unslothai/unsloth#10813"
    rows = [dict(instruction='Add.', input='3', output='4'), dict(instruction='Who?', input=None, output='Ann')]
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path/'a.csv', index=False), table.to_parquet(tmp_path/'a.parquet')
    assert [row['input'] for row in load_data(tmp_path/f'a.{kind}')] == ['3', '']

def test_arguments_and_tools_as_text(tokenizer, tmp_path):
    "awslabs/hybrid-model-factory#6"
    text = copy.deepcopy(CALLS)
    text[1]['tool_calls'][0]['function']['arguments'] = json.dumps(CALL['function']['arguments'])
    tools = [dict(type='function', function=dict(name='f'))]
    rows = [dict(messages=m, tools=t) for m in (CALLS, text) for t in (tools, json.dumps(tools))]
    ids = rendered(tokenizer, lines(tmp_path/'a.jsonl', rows))
    assert all(row == ids[0] for row in ids)

def test_text_and_a_call_in_one_turn(tmp_path):
    "hiyouga/LlamaFactory#10530, hiyouga/LlamaFactory#2529"
    turns = [{'from': 'human', 'value': 'Who?'}, {'from': 'gpt', 'value': 'I look.'},
             {'from': 'function_call', 'value': json.dumps(CALL['function'])}, {'from': 'observation', 'value': '1'},
             {'from': 'gpt', 'value': 'Ann.'}]
    turns = load_data(lines(tmp_path/'a.jsonl', [dict(conversations=turns)]))[0]['messages']
    assert [turn['role'] for turn in turns] == ['user', 'assistant', 'tool', 'assistant']
    assert turns[1]['content'] == 'I look.' and turns[1]['tool_calls'] == [CALL]

def test_an_unknown_speaker(tmp_path):
    "hiyouga/LlamaFactory#2529"
    rows = [dict(conversations=[{'from': 'narrator', 'value': 'Once'}, {'from': 'gpt', 'value': 'Ann'}])]
    with refused("example 1, turn 1 .*'narrator'"): load_data(lines(tmp_path/'a.jsonl', rows))

SHARE = [{'from': 'human', 'value': 'Who?'}, {'from': 'gpt', 'value': 'Ann.'}]

@pytest.mark.parametrize('rows, count', [([SHARE, SHARE], 2), (SHARE, 1)])
def test_bare_lists_of_turns(tmp_path, rows, count):
    "unslothai/unsloth#337"
    (tmp_path/'a.json').write_text(json.dumps(rows))
    found = load_data(tmp_path/'a.json')
    assert [row['messages'] for row in found] == [CHAT]*count

def test_single_quotes(tmp_path):
    "unslothai/unsloth#337"
    (tmp_path/'a.json').write_text(str([dict(conversations=SHARE)]))
    with refused('not readable as JSON: Expecting property name enclosed in double quotes'):
        load_data(tmp_path/'a.json')

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'gbk', 'utf-16'])
def test_encodings(tmp_path, encoding):
    "xxw1995/chatglm3-finetune#11, aizpy/chatglm-finetune#3, wbolster/jsonlines#53"
    row = dict(instruction='中?\u2028', output='中')
    if encoding == 'gbk': row['instruction'] = '中?'
    file = lines(tmp_path/'a.jsonl', [row], encoding)
    if encoding.startswith('utf-8'): assert load_data(file)[0]['instruction'] == row['instruction']
    else:
        with refused('is not a text in UTF-8 .*at byte'): load_data(file)

def test_forms_of_data(tmp_path):
    "huggingface/trl#2083, ml-explore/mlx-examples#832"
    rows = [dict(messages=CHAT), dict(conversations=SHARE), dict(prompt='Who?', completion='Ann.'),
            dict(instruction='Who?', output='Ann.', system='Be short.', history=[['Hello', 'Hi']])]
    for row in rows:
        found = load_data(lines(tmp_path/'a.jsonl', [row | dict(source='x')]))
        assert found[0]['answer'] == 'Ann.' and found.description.endswith('ignored: source')
    assert [turn['content'] for turn in found[0]['messages']] == ['Be short.', 'Hello', 'Hi', 'Who?', 'Ann.']

def test_answers_that_the_limit_cuts_away(tokenizer):
    "huggingface/trl#3927, huggingface/trl#6668, huggingface/trl#6320"
    renderer = Renderer(tokenizer, context=8)
    long, short = dict(prompt='Who?'*20, output='Ann'), dict(prompt='Who?', output='A')
    with warned('1 of 2 examples are left out'): rows = encode_all(renderer, [long, short])
    assert len(rows) == 1
    with pytest.warns(UserWarning), refused('nothing to learn.* 8 tokens'):
        encode_all(renderer, [long, long])

# ---- going on

QUESTIONS = [dict(instruction=f'Where does {name} live?', output='Arden') for name in ('Ann', 'Bob')]*4

def test_going_on_begins_at_the_adapters_loss(decoder):
    "huggingface/lerobot#3459, axolotl-ai-cloud/axolotl#2568"
    options = dict(lr=1e-2, batch_size=8, lr_scheduler_type='constant')
    first, losses = finetune(decoder, QUESTIONS, steps=4, **options)
    _, more = finetune(decoder, QUESTIONS, first, steps=1, **options)
    assert more[0] < losses[-1] < losses[0] - .05

def test_a_run_that_is_finished_is_not_begun_again(tmp_path):
    "modelscope/ms-swift#3396"
    data = lines(tmp_path/'a.jsonl', QUESTIONS)
    command = ['finetune', 'zoo/old', '--data', data, '--epochs', 1, '-o', tmp_path/'out']
    lora(*command, status=0)
    before = (tmp_path/'out'/FILE).read_bytes()
    assert 'out' in lora(*command) and (tmp_path/'out'/FILE).read_bytes() == before
