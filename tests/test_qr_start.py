"""Starts from the base weights: PEFT's own, undone bit for bit, converted to plain updates"""
import json, re
from pathlib import Path
import pytest, torch
from models import error, logits, random_decoder, tokens, whole
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from lorasuite.core.adapter import Adapter, balance
from lorasuite.core.loading import load_model
from lorasuite.lab.world import TASKS
from lorasuite.training.evaluate import evaluate
from lorasuite.tuners import qr_start as qr_module
from lorasuite.tuners.qr_start import (
    attach_start, captured_share, check_start, convert_to_plain, first_step, linear_modules, LORA_STARTS,
    MODIFIES_BASE, qr_start, residual_weight, train_from
)

PEOPLE, PLACES = 'Ann Bob Cid Dan'.split(), 'Arden Birch Colm Dover'.split()
ROWS = [dict(instruction=f'{q} {n}?', input='', output=v, answer=v)
        for n, v in zip(PEOPLE, PLACES) for q in ('Where does', 'Who is')]
FAMILIES = [dict(family='llama', kv_heads=1), dict(family='gpt_neox'), dict(family='gpt2'), dict(family='phi3')]

def state(decoder): return {n: p.clone() for n, p in decoder.model.state_dict().items()}
def places(decoder): return {n: p.data_ptr() for n, p in decoder.model.named_parameters()}
def flags(decoder): return [p.requires_grad for p in decoder.model.parameters()]
def same(a, b): return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].equal(b[n]) for n in a)
def starts(family): return [s for s in LORA_STARTS if not (family == 'gpt2' and s == 'olora')]

def disturb(model):
    "As if it had been trained"
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if 'lora_' in n: p.data += .05*torch.randn_like(p)

# ---- the start

def peft_layer(W, start, rank, alpha):
    linear = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype))
    linear[0].weight.data = W.clone()
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=start, target_modules=['0'])
    return get_peft_model(linear, config).base_model.model[0]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rank, alpha', [(4, 4), (4, 16), (3, 1), (12, 12)])
@pytest.mark.parametrize('shape', [(12, 20), (20, 12), (12, 12)])
def test_the_start_is_that_of_peft(shape, rank, alpha, dtype):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = peft_layer(W, 'olora', rank, alpha)
    A, B = qr_start(W, rank)
    assert A.dtype == B.dtype == torch.float32 and A.is_contiguous() and B.is_contiguous()
    assert layer.lora_A['default'].weight.equal(A.to(dtype).float())
    assert layer.lora_B['default'].weight.equal(B.to(dtype).float())
    left = residual_weight(W, A, B, layer.scaling['default'])
    assert left.dtype == dtype and layer.base_layer.weight.equal(left)

def test_the_first_columns_are_held_whole():
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = qr_start(W, 5)
    assert torch.allclose(B.T@B, torch.eye(5), atol=1e-5)
    assert torch.allclose((B@A)[:, :5], W[:, :5].float(), atol=1e-5)
    assert torch.allclose(B@A, B@B.T@W.float(), atol=1e-5) # of the others, what lies in their span

@pytest.mark.parametrize('shape', [(12, 20), (20, 12)])
def test_captured_share(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qr, svd = captured_share(W)
    assert len(qr) == len(svd) == 12 and qr[-1].item() == pytest.approx(1) == svd[-1].item()
    assert (svd >= qr - 1e-9).all()
    for r in (1, 5):
        A, B = qr_start(W, r)
        assert ((B@A).norm()/W.norm()).item()**2 == pytest.approx(qr[r-1].item(), rel=1e-4)

def test_first_step_is_a_small_step():
    torch.manual_seed(0)
    A, B, G = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5), (4, 2), (4, 5)))
    moved = (B - 1e-7*G@A.T)@(A - 1e-7*B.T@G) - B@A
    assert error(moved, -1e-7*first_step(A, B, G)) < 1e-5

# ---- on a model

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('sizes', FAMILIES, ids=lambda s: s['family'])
def test_nothing_remains_of_a_start(tokenizer, sizes, dtype):
    d, ids = random_decoder(tokenizer, layers=2, **sizes), tokens()
    d.model.to(dtype)
    before, where, plain = state(d), places(d), logits(d, ids)
    next(d.model.parameters()).requires_grad_(False)
    trainable = flags(d)
    for start in starts(sizes['family']):
        with attach_start(d, start, 4, 2.) as model:
            with torch.no_grad(): found = model(ids).logits
            assert error(found.float(), plain.float()) < (1e-4 if dtype == torch.float32 else .1), start
            assert any('lora_A' in n for n, _ in model.named_parameters()) and same(state(d), before) is False
            disturb(model)
        assert same(state(d), before) and places(d) == where and flags(d) == trainable and not d.model.training

def test_nothing_remains_when_it_fails(decoder):
    before = state(decoder)
    for start in LORA_STARTS:
        with pytest.raises(ZeroDivisionError), attach_start(decoder, start, 4): 1/0
        assert same(state(decoder), before)

@pytest.mark.parametrize('start', MODIFIES_BASE)
@pytest.mark.parametrize('scale', [1., .5, 3.])
@pytest.mark.parametrize('sizes', FAMILIES, ids=lambda s: s['family'])
def test_the_converted_update_is_what_was_trained(tokenizer, sizes, scale, start, tmp_path):
    if start not in starts(sizes['family']): pytest.skip('refused')
    d, ids = random_decoder(tokenizer, layers=2, **sizes), tokens()
    plain = logits(d, ids)
    with attach_start(d, start, 4, scale) as model:
        model.save_pretrained(tmp_path/'begin', save_embedding_layers=False)
        assert whole(convert_to_plain(model, tmp_path/'begin')).abs().max() < 1e-4
        disturb(model)
        with torch.no_grad(): trained = model(ids).logits
        adapter = convert_to_plain(model, tmp_path/'begin')
    assert {len(A) for A, _ in adapter.updates.values()} == {8}
    assert error(logits(d, ids, adapter) - plain, trained - plain) < 1e-3

@pytest.mark.parametrize('start', LORA_STARTS)
def test_training(decoder, start, tmp_path):
    before, doubled = state(decoder), start in MODIFIES_BASE
    (a, run), (b, again) = (train_from(decoder, ROWS, start, 4, 1e-3, 4, seed=1, batch_size=4) for _ in range(2))
    assert same(state(decoder), before) and run == again and len(run) == 4
    assert whole(a).equal(whole(b)) and a.base == decoder.name and a.layers == 4
    assert {len(A) for A, _ in a.updates.values()} == {8 if doubled else 4}
    assert run.trained == sum(t.numel() for ab in a.updates.values() for t in ab)//(1 + doubled)
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
    losses = [train_from(decoder, ROWS, s, 1, 1e-3, 4, batch_size=8)[1][0] for s in LORA_STARTS]
    assert losses == pytest.approx([losses[0]]*len(LORA_STARTS), rel=1e-4)

# ---- refused

def test_refused_before_anything_is_changed(decoder, tokenizer, monkeypatch):
    gpt2, before = random_decoder(tokenizer, 'gpt2', layers=2), state(decoder)
    refused = [
        (decoder, 'qr', 4, 'choose one of default, orthogonal'), (decoder, 'orthogonal', 3, 'odd'),
        (decoder, 'olora', 33, 'has 32'), (decoder, 'pissa', 65, 'too large'), (gpt2, 'olora', 4, 'transposed'),
    ]
    for d, start, rank, message in refused:
        with pytest.raises(ValueError, match=message): train_from(d, ROWS, start, 1, rank=rank)
        assert not any('lora' in n for n, _ in d.model.named_parameters())
    for d, start, rank in ((decoder, 'olora', 32), (decoder, 'default', 99), (gpt2, 'pissa', 4)):
        check_start(d, start, rank)
    monkeypatch.setattr(decoder.model, 'is_quantized', True, raising=False)
    with pytest.raises(ValueError, match='quantised'): check_start(decoder, 'pissa', 4)
    monkeypatch.undo()
    assert same(state(decoder), before)

@pytest.mark.parametrize('start', MODIFIES_BASE)
def test_unconverted_is_refused_by_name(decoder, start, tmp_path):
    with attach_start(decoder, start, 4) as model: model.save_pretrained(tmp_path, save_embedding_layers=False)
    message = f"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"
    with pytest.raises(ValueError, match=message): Adapter.load(tmp_path)

def test_fused_maps_are_counted_once(tokenizer):
    d = random_decoder(tokenizer, 'phi3', layers=2)
    assert len(linear_modules(d)) == 2*len({*d.architecture.modules.values()}) < 2*len(d.roles)

# ---- the exercise

def test_the_solution_runs(capsys):
    path = Path(__file__).parents[1]/'nbs'/'course'/'22_qr_start.ipynb'
    cells = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    text = next(c for c in cells if '<summary>Solution</summary>' in c)
    old, task = load_model('zoo/old', dtype=torch.float32), TASKS['labels']()
    adapters = {s: train_from(old, task['train'][:64], s, 10, 5e-3)[0] for s in MODIFIES_BASE}
    names = vars(qr_module) | dict(balance=balance, evaluate=evaluate, old=old, adapters=adapters, RANK=8,
                                   test=task['test'][:40])
    exec(re.search(r'```python\n(.*?)```', text, re.S)[1], names)
    printed = capsys.readouterr().out
    assert all(s in printed for s in MODIFIES_BASE)
    assert {len(A) for A, _ in names['cut'](adapters['olora'], 8).updates.values()} == {8}
