"""The tutorial, cell by cell, on stand-ins for its seven pairs: the same architectures and ratios, small"""
import copy, json
from dataclasses import replace
from functools import cache
from pathlib import Path
import matplotlib
import pytest, torch
from peft import PeftModel
from safetensors.torch import load_file
from models import random_decoder
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.stages.alignment import Alignment
from lorasuite.lab.zoo import new_tokenizer

matplotlib.use('Agg')
NOTEBOOK = Path(__file__).parents[1]/'nbs'/'tutorials'/'upgrade.ipynb'
ALL_CELLS = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
CELLS = [''.join(c['source']) for c in ALL_CELLS if c['cell_type'] == 'code']

def runs_here(cell):
    "Is it neither for a GPU nor the installation?"
    return not cell.startswith('#| gpu') and '%pip' not in cell

def execute(until=None, **parameters):
    "Run the notebook's cells, with parameters in the place of its own"
    names = {}
    for cell in CELLS:
        if not runs_here(cell): continue
        exec(compile(cell, 'upgrade.ipynb', 'exec'), names)
        names.update({k: v for k, v in parameters.items() if k in names})
        if until in names: break
    matplotlib.pyplot.close('all')
    return names

PLAIN = execute(until='TASKS')  # the notebook's own tables
SHRINK = dict(Pythia=16, BLOOM=16, MiniCPM=16, Qwen=16, Llama=32, SmolLM2=8) | {'Qwen-small': 8}
VOCAB = dict(MiniCPM=(512, 855), Llama=(310, 1240)) # the real ratios; elsewhere both models share the tokenizer
NO_PAD = ('Pythia', 'Llama', 'SmolLM2')

def shrunk(size, by, vocab):
    "An eighth of the layers, narrower by a factor, with all heads"
    narrow = dict(hidden=size.hidden//by, intermediate=size.intermediate//by)
    head_size = size.head_size and size.head_size//by
    return replace(size, **narrow, layers=max(2, size.layers//8), head_size=head_size, vocab=vocab + 8)

def save(size, tokenizer, path, seed, **config):
    "A random model of that size, with rows to spare in its embeddings"
    if size.head_size: config |= dict(head_dim=size.head_size)
    sizes = size.hidden, size.layers, size.heads, size.kv_heads, size.intermediate
    config |= dict(vocab_size=size.vocab, tie_word_embeddings=size.tied)
    decoder = random_decoder(tokenizer, size.family, *sizes, seed, **config)
    decoder.model.save_pretrained(path)
    tokenizer.save_pretrained(path)

@cache
def tokenizer_of(vocab): return new_tokenizer(vocab, seed=vocab)

def without_pad(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    return tokenizer

def as_pickle(path):
    "As OpenBMB publishes MiniCPM in Llama's format: no safetensors, and a configuration that points to code"
    torch.save(load_file(path/'model.safetensors'), path/'pytorch_model.bin')
    (path/'model.safetensors').unlink()
    config = json.loads((path/'config.json').read_text())
    auto_map = dict(AutoConfig='LlamaConfig', AutoModelForCausalLM='LlamaForCausalLM')
    config |= dict(auto_map=auto_map, scale_emb=12, scale_depth=1.4, hidden_act_param=.03)
    (path/'config.json').write_text(json.dumps(config))

def data(folder, kind):
    "Files as LLM-Adapters has them"
    def math(i):
        said = f'{i} + {i+1} = {2*i+1}. The answer is {2*i+1}.'
        return dict(instruction=f'What is {i} plus {i+1}?', input='', output=said, answer=[float(2*i+1)])
    def choice(i):
        asked, answer = f'Is {i} even?\n\nAnswer1: yes Answer2: no\n\nAnswer format: answer1/answer2', f'answer{i%2+1}'
        return dict(instruction=asked, input='', output=f'the correct answer is {answer}', answer=answer)
    rows = [math(i) if kind == 'math' else choice(i) for i in range(24)]
    for name in ('train', 'first', 'second'): (folder/f'{name}.json').write_text(json.dumps(rows))

def local_benchmark(folder):
    rows = [dict(ask=f'Is {i} even?', right=i%2) for i in range(4)]
    (folder/'even.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    files = dict(data_files=dict(test=str(folder/'even.jsonl')))
    metric = dict(metric='acc', aggregation='mean', higher_is_better=True)
    return dict(
        task='even', dataset_path='json', dataset_kwargs=files, test_split='test', output_type='multiple_choice',
        doc_to_text='{{ask}}', doc_to_choice=['yes', 'no'], doc_to_target='right', metric_list=[metric])

@pytest.mark.parametrize('name', [n for n in PLAIN['PAIRS'] if n != 'stand-in'])
def test_pair(name, tmp_path, capsys):
    pair, vocab = PLAIN['PAIRS'][name], VOCAB.get(name, (512, 512))
    old_size, new_size = (shrunk(s, SHRINK[name], v) for s, v in zip((pair.old_size, pair.new_size), vocab))
    for size, v, path, seed in ((old_size, vocab[0], 'old', 1), (new_size, vocab[1], 'new', 2)):
        tokenizer = tokenizer_of(v)
        assert len(tokenizer) == v
        if name in NO_PAD: tokenizer = without_pad(tokenizer)
        config = dict(hidden_act='fatrelu') if name == 'MiniCPM' and path == 'old' else {}
        save(size, tokenizer, tmp_path/path, seed, **config)
        if name == 'MiniCPM': as_pickle(tmp_path/path)
    data(tmp_path, pair.task)
    real = PLAIN['TASKS'][pair.task]
    gradings = [*real.tests.values()]
    task = replace(
        real, train=str(tmp_path/'train.json'), where=str(tmp_path/'{}.json'),
        tests={'first': gradings[0], 'second': gradings[-1]}, generate=real.generate | dict(max_new_tokens=8),
        benchmarks=(local_benchmark(tmp_path),) if real.benchmarks else ())
    small = replace(pair, old=str(tmp_path/'old'), new=str(tmp_path/'new'))
    settings = dict(RANK=4, EXAMPLES=12, FEW=6, VALIDATION=4, GRID=[(3, 1e-3)], EPOCHS=2, QUESTIONS=6, MICRO=4)
    tables = dict(PAIRS=PLAIN['PAIRS'] | {name: small}, TASKS=PLAIN['TASKS'] | {pair.task: task})
    ran = execute(PAIR=name, **tables, **settings, OUT=tmp_path/'out')
    check_models(ran, old_size, new_size)
    check_adapters(ran, tmp_path/'out')
    printed = capsys.readouterr().out
    assert 'LoRA 6' in printed and ('acc ' in printed) == bool(real.benchmarks)
    assert f'this run, {name}: ' in printed and 'this run, stand-in' not in printed

def check_models(ran, old_size, new_size):
    "The stand-ins have the sizes that they should"
    for model, size in ((ran['old'], old_size), (ran['new'], new_size)):
        head_size = size.head_size or size.hidden//size.heads
        same = {n: getattr(size, n) for n in ('vocab', 'hidden', 'intermediate', 'layers', 'heads', 'kv_heads')}
        assert model.sizes() == same | dict(head_size=head_size)
        assert sum(size.weights()) == pytest.approx(sum(p.numel() for p in model.model.parameters()), rel=.05)

def check_adapters(ran, out):
    "Everything has its place, was trained, and is loaded by PEFT"
    old, new, adapter, carried = (ran[k] for k in ('old', 'new', 'adapter', 'carried'))
    def places(decoder): return {decoder.path(l, role) for l in range(decoder.layers) for role in ran['ROLES']}
    assert adapter.updates.keys() == places(old) and all(adapter.norm(p) > 0 for p in adapter.updates)
    assert carried.updates.keys() == places(new) and not [p for p in carried.skipped if p in places(old)]
    matched = {new.path(l, role) for _, l in ran['alignment'].layers for role in ran['ROLES']}
    assert {p for p in carried.updates if carried.norm(p) > 0} == matched
    assert all(ran['lora'].norm(p) > 0 for p in places(new)) and ran['lora'].updates.keys() == places(new)
    assert len(ran['pooled']) == 5 and all(len(s.right) == 12 for s in ran['pooled'].values())
    assert Alignment.load(out/'alignment').layers == ran['alignment'].layers
    files = {'README.md', 'adapter_config.json', 'adapter_model.safetensors'}
    assert {f.name for f in (out/'adapter').iterdir()} == files
    again = Adapter.load(out/'adapter')
    assert again.updates.keys() == ran['tuned'].updates.keys() and again.base == ran['names'][1]
    base = load_model(ran['names'][1])
    ids = base.tokenizer('Is 3 even?', return_tensors='pt').input_ids
    with torch.no_grad():
        plain = base.model(ids).logits
        with ran['tuned'].on(new) as model: expected = model(ids).logits
        found = PeftModel.from_pretrained(base.model, str(out/'adapter'))(ids).logits
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain, atol=1e-4)

def test_sizes_of_the_tables():
    "Number of weights of each real model, in billions, as its publishers state it"
    stated = {
        'SmolLM2': (.135, .362), 'Qwen-small': (.49, .6), 'Pythia': (1.01, 1.41), 'BLOOM': (.559, 1.07),
        'MiniCPM': (1.36 + 73440*1536/1e9, 2.72 + 122753*2304/1e9), 'Qwen': (1.84, 3.09), 'Llama': (6.74, 8.03),
    }
    for name, billions in stated.items():
        pair = PLAIN['PAIRS'][name]
        assert [sum(s.weights())/1e9 for s in (pair.old_size, pair.new_size)] == pytest.approx(billions, rel=.02), name

def test_estimates():
    "Whatever is estimated grows with what it should"
    ran = execute(until='billions', TASKS=PLAIN['TASKS'])
    pairs, tasks, expect = ran['PAIRS'], ran['TASKS'], ran['expect']
    for name, pair in pairs.items():
        task = tasks[pair.task]
        four, sixteen = (ran['memory'](pair, task, bits) for bits in (4, 16))
        slow, quick = (sum(ran['hours'](pair, task, gpu, 16).values()) for gpu in ('T4', 'H100'))
        assert four < sixteen and slow >= quick > 0
        assert sixteen > 2*sum(sum(s.weights()) for s in (pair.old_size, pair.new_size))
    assert expect('Llama', 'T4') == '–'
    assert '16 bits' in expect('SmolLM2', 'T4') and '16 bits' in expect('Llama', 'H100')
    def longest(name):
        found = ran['hours'](pairs[name], tasks[pairs[name].task], 'A100', 16)
        return max(found, key=found.get)
    assert [*map(longest, ('SmolLM2', 'Qwen', 'Llama'))] == ['train', 'test', 'align'] # as the text says
