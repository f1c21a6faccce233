"""The chat templates that TRL ships: what is learned of chats with and without tools, token by token as by TRL"""
import copy, re, warnings
from datetime import datetime
from pathlib import Path
import pytest
from lorasuite.training.prompts import Renderer

trl = pytest.importorskip('trl.chat_template_utils', reason='TRL 1.16 wants Python 3.11')
FOLDER = Path(trl.__file__).parent/'chat_templates'
NAMES = sorted(file.stem.removesuffix('_training') for file in FOLDER.glob('*_training.jinja'))
NAMES += ['lfm2_2_5', 'lfm2_2_5_v2', 'lfm2_2_5_vl'] # which are marked as they stand

def said(role, text): return dict(role=role, content=text)

CALL = dict(type='function', function=dict(name='look', arguments=dict(at='x')))
PARAMETERS = dict(type='object', properties=dict(at=dict(type='string', description='where')), required=['at'])
TOOLS = [dict(type='function', function=dict(name='look', description='Look up.', parameters=PARAMETERS))]
TALK = [said('user', 'Who keeps a cat?'), said('assistant', 'Ann.'), said('user', 'And?'), said('assistant', 'Bob.')]
CALLS = [TALK[0], said('assistant', '') | dict(tool_calls=[CALL]), said('tool', '7') | dict(name='look'), TALK[1]]
CHATS = dict(one=dict(messages=TALK[:2]), two=dict(messages=TALK),
             system=dict(messages=[said('system', 'Be short.')] + TALK[:2]), tools=dict(messages=CALLS, tools=TOOLS),
             call=dict(messages=CALLS[:2], tools=TOOLS), unused=dict(messages=TALK[:2], tools=TOOLS))

# Known differences. These of TRL's marks begin inside of the prompt: the model is trained to write what it is given
IN_PROMPT = ('deepseek', 'gptoss', 'muse_glimmer', 'nemotron', 'qwen2_5', 'qwen3_5', 'qwen3_6', 'qwen3_8')
PLAIN_MARKS = ('qwen2_5_vl',)
# TRL's form of these writes empty thoughts into earlier answers too; the model's own form does not
OTHER_HISTORY = dict(qwen3=('two', 'tools'), qwen3_5_nothink=('two',), qwen3_5_think=('two',), qwen3_6=('two',))
# Gemma stops a call with a token that TRL does not mark; LLaVA's blank behind the end token is learned by us alone
MORE = dict(diffusion_gemma=('tools', 'call'), llava_next=('one', 'two', 'system', 'call', 'unused'))
IMAGES = ('idefics3', 'smolvlm', 'llava_next') # templates that want content in parts, which TRL's collator makes

SPECIAL = re.compile(r'<\|[a-zA-Z_0-9]+\|>|<\|?/?[a-z_]*turn[a-z_]*\|?>|<\|?/?[a-z_]*tool_[a-z]+\|?>|<｜[^｜]+｜>'
                     r'|\[/?INST\]|</?think>|<end_of_utterance>|</s>')
PLAIN = re.compile('think|tool_call>|tool_response>') # added, but said as any word

def made(tokenizer, source):
    "A tokenizer with a template and its tokens"
    found, tokens = copy.deepcopy(tokenizer), sorted({*SPECIAL.findall(source)})
    found.add_special_tokens(dict(additional_special_tokens=[t for t in tokens if not PLAIN.search(t)]))
    found.add_tokens([t for t in tokens if PLAIN.search(t)])
    found.chat_template = source
    return found

class Day:
    "The day that our prompts have"
    @staticmethod
    def now(): return datetime(2024, 7, 26)

def in_parts(turn): return turn | dict(content=[dict(type='text', text=turn['content'])])

def theirs(tokenizer, name, example):
    "Ids and labels as SFTTrainer makes them with `assistant_only_loss`; `None` where the template refuses"
    turns = [in_parts(turn) if name in IMAGES else turn for turn in example['messages']]
    try: found = tokenizer.apply_chat_template(
        turns, tools=example.get('tools'), chat_template=trl.get_training_chat_template(tokenizer), return_dict=True,
        return_assistant_tokens_mask=True)
    except Exception: return None
    labels = [i if m else -100 for i, m in zip(found['input_ids'], found['assistant_masks'])]
    return dict(input_ids=[*found['input_ids']], labels=labels)

def ours(renderer, example):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return renderer.encode(example)

def extra(tokenizer, more, less):
    "The texts that one learns and the other does not"
    marked = ''.join('x' if a != b else '.' for a, b in zip(more['labels'], less['labels']))
    return [tokenizer.decode(more['input_ids'][run.start():run.end()]) for run in re.finditer('x+', marked)]

def learned(row): return {at for at, label in enumerate(row['labels']) if label != -100}

def check(tokenizer, renderer, name, kind):
    "Compare one chat; raises `AssertionError` for a difference that is not known"
    example = CHATS[kind]
    a, b = theirs(tokenizer, name, example), ours(renderer, example)
    if kind in OTHER_HISTORY.get(name, ()):
        text = [tokenizer.decode(row['input_ids']).replace('<think>\n\n</think>\n\n', '') for row in (a, b)]
        assert text[0] == text[1] and a['input_ids'] != b['input_ids']
        return
    assert a['input_ids'] == b['input_ids'], tokenizer.decode(b['input_ids'])
    if kind in MORE.get(name, ()):
        assert learned(a) < learned(b) and all('<|t' in text or text == ' ' for text in extra(tokenizer, b, a))
    elif name.startswith(IN_PROMPT) and name not in PLAIN_MARKS:
        asked = tokenizer.apply_chat_template(example['messages'][:-1], tools=example.get('tools'), tokenize=False,
                                              add_generation_prompt=True) if kind != 'tools' else None
        runs = extra(tokenizer, a, b)
        assert learned(b) < learned(a) and (asked is None or all(text in asked for text in runs)), runs
    else: assert a['labels'] == b['labels'], tokenizer.decode([i for i in b['labels'] if i != -100])

@pytest.mark.parametrize('name', NAMES)
def test_chats_with_and_without_tools_are_learned_as_trl_learns_them(name, tokenizer, monkeypatch):
    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Day)
    own = made(tokenizer, (FOLDER/f'{name}.jinja').read_text())
    renderer, compared = Renderer(own), 0
    for kind, example in CHATS.items():
        if theirs(own, name, example) is None: continue
        check(own, renderer, name, kind)
        compared += 1
    assert compared >= 4

@pytest.mark.parametrize('name', NAMES)
def test_trls_training_templates_are_read_by_their_marks(name, tokenizer, monkeypatch):
    "An adapter of TRL may come with such a template"
    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Day)
    file = FOLDER/f'{name}_training.jinja'
    own = made(tokenizer, (file if file.exists() else FOLDER/f'{name}.jinja').read_text())
    renderer = Renderer(own)
    for example in CHATS.values():
        a = theirs(own, name, example)
        assert a is None or a == ours(renderer, example)
