"""Starts from the base weights: PEFT's own, given back bit for bit, converted to plain updates"""
import json, re
from pathlib import Path
import pytest, torch
from models import error, logits, random_decoder, tokens, whole
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from lorasuite import olora
from lorasuite.core.adapter import Adapter, balance
from lorasuite.core.loading import load_model
from lorasuite.training.evaluate import evaluate
from lorasuite.tuners.qr_start import (
    base_left, captured, check_start, converted, first_move, MOVED, qr_start, started, STARTS, targets, train_from
)
from lorasuite.lab.starts import best_rate, one_run, RANK, RATES, record_runs, recorded, RECORDS, SEEDS, STEPS

ROWS = [dict(instruction=f'{q} {n}?', input='', output=v, answer=v) for n, v in zip('Ann Bob Cid Dan'.split(), 'Arden Birch Colm Dover'.split()) for q in ('Where does', 'Who is')]
FAMILIES = [dict(family='llama', kv_heads=1), dict(family='gpt_neox'), dict(family='gpt2'), dict(family='phi3')]

def state(decoder): return {n: p.clone() for n, p in decoder.model.state_dict().items()}
def places(decoder): return {n: p.data_ptr() for n, p in decoder.model.named_parameters()}
def same(a, b): return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].equal(b[n]) for n in a)
def starts(family): return [s for s in STARTS if not (family == 'gpt2' and s == 'olora')]

def disturb(model):
    "As if it had been trained"
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if 'lora_' in n: p.data += .05*torch.randn_like(p)

# ---- the start

def peft_layer(W, start, rank, alpha):
    linear = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype))
    linear[0].weight.data = W.clone()
    return get_peft_model(linear, LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=start, target_modules=['0'])).base_model.model[0]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rank, alpha', [(4, 4), (4, 16), (3, 1), (12, 12)])
@pytest.mark.parametrize('shape', [(12, 20), (20, 12), (12, 12)])
def test_the_start_is_that_of_peft(shape, rank, alpha, dtype):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer, (A, B) = peft_layer(W, 'olora', rank, alpha), qr_start(W, rank)
    assert A.dtype == B.dtype == torch.float32 and A.is_contiguous() and B.is_contiguous()
    assert layer.lora_A['default'].weight.equal(A.to(dtype).float()) and layer.lora_B['default'].weight.equal(B.to(dtype).float())
    left = base_left(W, A, B, layer.scaling['default'])
    assert left.dtype == dtype and layer.base_layer.weight.equal(left)

def test_the_first_columns_are_held_whole():
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = qr_start(W, 5)
    assert torch.allclose(B.T@B, torch.eye(5), atol=1e-5) and torch.allclose((B@A)[:, :5], W[:, :5].float(), atol=1e-5)
    assert torch.allclose(B@A, B@B.T@W.float(), atol=1e-5) # of the others, what lies in their span

@pytest.mark.parametrize('shape', [(12, 20), (20, 12)])
def test_captured(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qr, svd = captured(W)
    assert len(qr) == len(svd) == 12 and qr[-1].item() == pytest.approx(1) == svd[-1].item() and (svd >= qr - 1e-9).all()
    for r in (1, 5):
        A, B = qr_start(W, r)
        assert ((B@A).norm()/W.norm()).item()**2 == pytest.approx(qr[r-1].item(), rel=1e-4)

def test_first_move_is_a_small_step():
    torch.manual_seed(0)
    A, B, G = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5), (4, 2), (4, 5)))
    moved = (B - 1e-7*G@A.T)@(A - 1e-7*B.T@G) - B@A
    assert error(moved, -1e-7*first_move(A, B, G)) < 1e-5

# ---- on a model

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('sizes', FAMILIES, ids=lambda s: s['family'])
def test_nothing_remains_of_a_start(tokenizer, sizes, dtype):
    d, ids = random_decoder(tokenizer, layers=2, **sizes), tokens()
    d.model.to(dtype)
    before, where, plain = state(d), places(d), logits(d, ids)
    next(d.model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in d.model.parameters()]
    for start in starts(sizes['family']):
        with started(d, start, 4, 2.) as model:
            with torch.no_grad(): assert error(model(ids).logits.float(), plain.float()) < (1e-4 if dtype == torch.float32 else .1), start
            assert any('lora_A' in n for n, _ in model.named_parameters()) and same(state(d), before) is False
            disturb(model)
        assert same(state(d), before) and places(d) == where and flags == [p.requires_grad for p in d.model.parameters()] and not d.model.training

def test_nothing_remains_when_it_fails(decoder):
    before = state(decoder)
    for start in STARTS:
        with pytest.raises(ZeroDivisionError), started(decoder, start, 4) as model: 1/0
        assert same(state(decoder), before)

@pytest.mark.parametrize('start', MOVED)
@pytest.mark.parametrize('scale', [1., .5, 3.])
@pytest.mark.parametrize('sizes', FAMILIES, ids=lambda s: s['family'])
def test_the_converted_update_is_what_was_trained(tokenizer, sizes, scale, start, tmp_path):
    if start not in starts(sizes['family']): pytest.skip('refused')
    d, ids = random_decoder(tokenizer, layers=2, **sizes), tokens()
    plain = logits(d, ids)
    with started(d, start, 4, scale) as model:
        model.save_pretrained(tmp_path/'begin', save_embedding_layers=False)
        assert whole(converted(model, tmp_path/'begin')).abs().max() < 1e-4
        disturb(model)
        with torch.no_grad(): trained = model(ids).logits
        adapter = converted(model, tmp_path/'begin')
    assert {len(A) for A, _ in adapter.updates.values()} == {8}
    assert error(logits(d, ids, adapter) - plain, trained - plain) < 1e-3

@pytest.mark.parametrize('start', STARTS)
def test_training(decoder, start, tmp_path):
    before = state(decoder)
    (a, run), (b, again) = (train_from(decoder, ROWS, start, 4, 1e-3, 4, seed=1, batch_size=4) for _ in range(2))
    assert same(state(decoder), before) and run == again and len(run) == 4 and whole(a).equal(whole(b)) and a.base == decoder.name and a.layers == 4
    assert {len(A) for A, _ in a.updates.values()} == {8 if start in MOVED else 4} and run.trained == sum(t.numel() for ab in a.updates.values() for t in ab)//(1 + (start in MOVED))
    other, _ = train_from(decoder, ROWS, start, 4, 1e-3, 4, seed=2, batch_size=4)
    assert error(whole(other), whole(a)) > 1e-3
    nothing, run = train_from(decoder, ROWS, start, 0, rank=4)
    assert run == [] and whole(nothing).abs().max() < 1e-5 < whole(a).abs().max()
    a.save(tmp_path/'a')
    assert whole(Adapter.load(tmp_path/'a')).equal(whole(a))
    ids = tokens()
    found = PeftModel.from_pretrained(decoder.model, str(tmp_path/'a'))
    with torch.no_grad(): through = found(ids).logits
    found.unload()
    assert error(through, logits(decoder, ids, a)) < 1e-6 and same(state(decoder), before)

def test_the_first_loss_is_that_of_the_model(decoder):
    losses = [train_from(decoder, ROWS, s, 1, 1e-3, 4, batch_size=8)[1][0] for s in STARTS]
    assert losses == pytest.approx([losses[0]]*len(STARTS), rel=1e-4)

# ---- refused

def test_refused_before_anything_is_changed(decoder, tokenizer, monkeypatch):
    gpt2, before = random_decoder(tokenizer, 'gpt2', layers=2), state(decoder)
    for d, start, rank, message in ((decoder, 'qr', 4, 'choose one of default, orthogonal'), (decoder, 'orthogonal', 3, 'odd'), (decoder, 'olora', 33, 'has 32'), (decoder, 'pissa', 65, 'too large'), (gpt2, 'olora', 4, 'transposed')):
        with pytest.raises(ValueError, match=message): train_from(d, ROWS, start, 1, rank=rank)
        assert not any('lora' in n for n, _ in d.model.named_parameters())
    check_start(decoder, 'olora', 32), check_start(decoder, 'default', 99), check_start(gpt2, 'pissa', 4)
    monkeypatch.setattr(decoder.model, 'is_quantized', True, raising=False)
    with pytest.raises(ValueError, match='quantised'): check_start(decoder, 'pissa', 4)
    monkeypatch.undo()
    assert same(state(decoder), before)

@pytest.mark.parametrize('start', MOVED)
def test_unconverted_is_refused_by_name(decoder, start, tmp_path):
    with started(decoder, start, 4) as model: model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"): Adapter.load(tmp_path)

def test_fused_maps_are_counted_once(tokenizer):
    d = random_decoder(tokenizer, 'phi3', layers=2)
    assert len(targets(d)) == 2*len({*d.architecture.modules.values()}) < 2*len(d.roles)

# ---- the records

def test_the_records_are_whole():
    head = json.loads(RECORDS.read_text().splitlines()[0])
    assert head['command'] == 'python -m lorasuite.olora' and head['versions'].keys() >= {'torch', 'peft', 'transformers'}
    rows = recorded()
    for task in ('labels', 'questions'):
        for start in STARTS:
            tried, counted = ([r for r in rows if (r['task'], r['start'], r['split']) == (task, start, split)] for split in ('validation', 'test'))
            assert sorted({r['lr'] for r in tried}) == sorted(RATES) and not {r['seed'] for r in tried} & {*SEEDS}
            assert [r['seed'] for r in counted] == [*SEEDS] and {r['lr'] for r in counted} == {best_rate(rows, task, start)} and all(len(r['losses']) == STEPS for r in counted)

def test_an_interrupted_recording_goes_on(tmp_path, monkeypatch):
    done = []
    def fake(decoder, task, start, split, lr, seed):
        done.append((task, start, split, lr, seed))
        if len(done) == 7: raise KeyboardInterrupt
        return dict(zip(olora.RUN, done[-1])) | dict(accuracy=lr if start == 'default' else -lr, seconds=0., losses=[]), None
    monkeypatch.setattr(olora, 'one_run', fake)
    with pytest.raises(KeyboardInterrupt): record_runs(tmp_path/'runs', ['labels'])
    record_runs(tmp_path/'runs', ['labels'])
    rows = [json.loads(line) for line in (tmp_path/'runs').read_text().splitlines()[1:]]
    keys = [tuple(r[k] for k in olora.RUN) for r in rows]
    assert len(keys) == len({*keys}) == len(done) - 1 == len(STARTS)*(len(RATES)*len(olora.DRAWS) + len(SEEDS))
    assert best_rate(rows, 'labels', 'default') == max(RATES) and best_rate(rows, 'labels', 'olora') == min(RATES)
    assert {r['lr'] for r in rows if r['split'] == 'test' and r['start'] == 'olora'} == {min(RATES)}

# ---- the exercise

def test_the_solution_runs(capsys):
    notebook = json.loads((Path(__file__).parents[1]/'nbs'/'23_olora.ipynb').read_text(encoding='utf-8'))
    text = next(''.join(c['source']) for c in notebook['cells'] if '<summary>Solution</summary>' in ''.join(c['source']))
    old = load_model('zoo/old', dtype=torch.float32)
    names = vars(olora) | dict(balance=balance, evaluate=evaluate, old=old, adapters={s: train_from(old, olora.TASKS['labels']()['train'][:64], s, 10, 5e-3)[0] for s in MOVED}, test=olora.TASKS['labels']()['test'][:40])
    exec(re.search(r'```python\n(.*?)```', text, re.S)[1], names)
    printed = capsys.readouterr().out
    assert all(s in printed for s in MOVED) and {len(A) for A, _ in names['cut'](names['adapters']['olora'], RANK).updates.values()} == {RANK}
