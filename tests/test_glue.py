"""The GLUE tutorial, cell by cell, on small encoders that are read from files as the real ones are"""
import json
from pathlib import Path
import matplotlib
import numpy as np
import pytest, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from lorasuite.lab.world import corpus

matplotlib.use('Agg')
NOTEBOOK = Path(__file__).parents[1]/'nbs'/'tutorials'/'glue.ipynb'
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
        exec(compile(cell, 'glue.ipynb', 'exec'), names)
        names.update({k: v for k, v in parameters.items() if k in names})
        if until in names: break
    matplotlib.pyplot.close('all')
    return names

PLAIN = execute(until='village_tokenizer')  # the notebook's own tables and metrics

def save_encoder(path, family, **config):
    "A random encoder without a head, in float16 as DeBERTa-v3 seems to be published"
    tokenizer = PLAIN['village_tokenizer']()
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=140, pad_token_id=0, initializer_range=.2)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(family, **sizes | config)).half().save_pretrained(path)
    tokenizer.save_pretrained(path)

def save_data(path, name, task, seed=0):
    "A directory that `load_dataset` reads as it reads GLUE: a configuration with two splits"
    rng, texts = np.random.default_rng(seed), corpus(200, seed)
    def label(): return float(rng.uniform(0, 5)) if task.labels == 1 else int(rng.integers(task.labels))
    path.mkdir()
    for split, n in (('train', 40), (task.test, 16)):
        rows = [{c: str(rng.choice(texts)) for c in task.columns} | dict(label=label(), idx=i) for i in range(n)]
        (path/f'{split}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    files = ''.join(f'  - split: {split}\n    path: {split}.jsonl\n' for split in ('train', task.test))
    (path/'README.md').write_text(f'---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n')

SETTINGS = ('relative_attention', 'position_buckets', 'norm_rel_ebd', 'share_att_key', 'pos_att_type',
            'type_vocab_size', 'position_biased_input')
DEBERTA = {k: v for k, v in PLAIN['BASE'].to_diff_dict().items() if k in SETTINGS}
CASES = dict(mrpc=('deberta-v2', DEBERTA | dict(pooler_hidden_size=24), ['classifier', 'pooler'], 2),
             stsb=('deberta-v2', DEBERTA | dict(pooler_hidden_size=24), ['classifier', 'pooler'], 1),
             mnli=('roberta', dict(type_vocab_size=2), ['classifier'], 1))

@pytest.mark.filterwarnings('ignore:Adapter .* invalid shape') # AdaLoRA keeps no direction of a module
@pytest.mark.parametrize('name', CASES)
def test_tutorial(name, tmp_path, capsys):
    family, config, head, seeds = CASES[name]
    save_encoder(tmp_path/'encoder', family, **config)
    save_data(tmp_path/'data', name, PLAIN['TASKS'][name])
    files = dict(MODEL=str(tmp_path/'encoder'), DATA=str(tmp_path/'data'), OUT=tmp_path/'out')
    budget = dict(START=3, TARGET=2, EVERY=2, CHOOSE=8, MEASURE=4)
    ran = execute(TASK=name, **files, **budget, RATES=(1e-2,), SEEDS=seeds, EPOCHS=3, BATCH=8)
    assert ran['head'] == head and ran['layers'] == 2 and len(ran['roles']) == 6
    assert {p.dtype for p in ran['model'].parameters()} == {torch.float32}
    check_adapter(ran, tmp_path)
    check_comparison(ran)
    printed = capsys.readouterr().out
    assert 'largest difference' in printed and f'this run: {name} with ' in printed and 'stand-in' not in printed

def check_adapter(ran, path):
    "Budget and ranks, head and logits, with nothing but PEFT and the files"
    ranks, model = ran['run'].ranks, ran['run'].model
    assert sum(ranks.values()) == 2*12 and len({*ranks.values()}) > 1
    config = json.loads((path/'out'/'adapter'/'adapter_config.json').read_text())
    assert config['rank_pattern'] == {p: max(1, r) for p, r in ranks.items()}
    assert {*ran['head']} <= {*config['modules_to_save']}
    tensors = load_file(path/'out'/'adapter'/'adapter_model.safetensors')
    paths = {k.removeprefix('base_model.model.'): t for k, t in tensors.items()}
    stored = {k.removesuffix('.lora_A.weight'): len(t) for k, t in paths.items() if 'lora_A' in k}
    assert stored == config['rank_pattern']
    assert {k.split('.')[0] for k in paths if 'lora_' not in k} == {*ran['head']}
    torch.manual_seed(5)
    how = dict(num_labels=ran['task'].labels, dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(path/'encoder', **how)
    batch = ran['collate'](ran['test'].remove_columns('labels').to_list())
    with torch.no_grad():
        plain = base.eval()(**batch).logits
        expected = model.eval()(**batch).logits
        found = PeftModel.from_pretrained(base, path/'out'/'adapter').eval()(**batch).logits
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, plain, atol=1e-2)

def check_comparison(ran):
    "All kinds, all seeds, the same budget"
    runs, summary = ran['runs'], ran['summary']
    assert len(runs) == len(ran['ARMS'])*ran['SEEDS'] and {*summary.index} == {*ran['ARMS']}
    assert all(sum(r.values()) == 2*12 for r in runs.ranks) and np.isfinite(runs.test).all()
    assert all({*r.values()} == {2} for r in runs[runs.arm.isin(['LoRA', 'DoRA'])].ranks)
    constant, shrinking = ['LoRA', 'DoRA', 'ALoRA'], ['AdaLoRA', 'LoRA²']
    assert (summary.kept[constant] <= summary.trained[constant]).all()
    assert (summary.kept[shrinking] < summary.trained[shrinking]).all()

def test_without_the_pooler(tmp_path):
    "What the tutorial warns of: a pooler that is not saved is another one on loading"
    save_encoder(tmp_path/'encoder', 'deberta-v2', **DEBERTA | dict(pooler_hidden_size=24))
    ran = execute(until='Run', MODEL=str(tmp_path/'encoder'), RATES=(1e-2,), EPOCHS=1, OUT=tmp_path/'out')
    model, fresh = (ran['load'](seed)[0] for seed in (0, 1))
    assert not torch.equal(model.pooler.dense.weight, fresh.pooler.dense.weight)
    ran['head'].remove('pooler')
    ran['ARMS']['LoRA'](model)[0].save_pretrained(tmp_path/'adapter')
    assert not [k for k in load_file(tmp_path/'adapter'/'adapter_model.safetensors') if 'pooler' in k]

def test_metrics():
    "As scikit-learn has them, and zero instead of nothing where all answers are alike"
    metrics = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(0)
    for _ in range(20):
        said, true = rng.integers(0, 2, (2, 30))
        assert PLAIN['accuracy'](said, true) == pytest.approx(metrics.accuracy_score(true, said))
        assert PLAIN['f1'](said, true) == pytest.approx(metrics.f1_score(true, said))
        assert PLAIN['matthews'](said, true) == pytest.approx(metrics.matthews_corrcoef(true, said))
    same = np.ones(30)
    assert [PLAIN[m](same, true) for m in ('matthews', 'pearson', 'spearman')] == [0, 0, 0]
    assert PLAIN['f1'](0*same, 0*same) == 0

def test_estimates():
    "More to do takes longer, and a faster GPU does not"
    for name, task in PLAIN['TASKS'].items():
        slow, fast = (PLAIN['hours'](gpu, task) for gpu in ('T4', 'A100'))
        assert all(s >= f > 0 for s, f in zip(slow, fast)) and .7 < PLAIN['gigabytes'](task) < 16
    five, one = (PLAIN['hours']('T4', PLAIN['TASKS']['rte'], arms=arms)[0] for arms in (5, 1))
    assert five > one
