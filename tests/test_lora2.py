"""LoRA² and ALoRA: on any model with a LoRA, the same logits before, between and after, and under their budgets"""
from functools import partial
import pytest, torch
from models import error, logits, random_adapter, random_decoder, tokens, whole
from peft import LoraConfig, PeftModel, get_peft_model
from test_families import FAMILIES
from test_finetune import ROWS
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from typer.testing import CliRunner
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.training.examples import encode
from lorasuite.training.finetune import finetune, init_adapter
from lorasuite.training.trainer import fit
from lorasuite.tuners.alora import ALoRA, batch_of, GatedB, reallocate
from lorasuite.tuners.lora2 import (
    _random_orthonormal, add_orthogonality_grad, cubic_budget, direction_scores, Importance, LoRA2, low_rank_svd,
    orthogonality_loss, prune_directions, two_scale_factors, TwoScaleA
)
from lorasuite.cli import app

METHODS = {
    'lora2': lambda model, batch: LoRA2(model, target=2),
    'alora': lambda model, batch: ALoRA(model, batch, rounds=2),
}
ENOUGH = dict(steps=12, lr=3e-3, batch_size=8)

@pytest.fixture
def batch(tokenizer): return batch_of(ROWS[:6], tokenizer)

def ranks_of(adapter): return {p: len(A) for p, (A, _) in adapter.updates.items()}
def at_least_one(ranks): return {p: max(1, r) for p, r in ranks.items()}
def numbers_of(adapter): return [t for ab in adapter.updates.values() for t in ab]

def method_of(kind, batch, made=None):
    "For `finetune`; what it makes is put into a list"
    def method(model):
        made.append(METHODS[kind](model, batch))
        return made[-1]
    made = [] if made is None else made
    return method

# ---- the same function

@pytest.mark.parametrize('kind', METHODS)
@pytest.mark.parametrize('name', FAMILIES)
def test_nothing_changes_by_taking_apart_and_settling(name, kind, tokenizer, batch):
    decoder = random_decoder(tokenizer, layers=2, **dict(family=name) | FAMILIES[name])
    adapter, ids = random_adapter(init_adapter(decoder, 4)), tokens()
    with adapter.on(decoder, trainable=True) as model, torch.no_grad():
        before = model(ids).logits
        made = METHODS[kind](model, batch)
        apart = model(ids).logits
        made.finish()
        after = model(ids).logits
    base = logits(decoder, ids)
    assert (before - base).norm() > .01*base.norm()
    assert error(apart - base, before - base) < 1e-4 and error(after - base, before - base) < 1e-4

@pytest.mark.parametrize('kind', METHODS)
@pytest.mark.parametrize('rslora', [False, True])
def test_what_is_exported_is_a_plain_lora(kind, rslora, decoder, rows, batch, tmp_path):
    ids = tokens()
    roles = ['q_proj', 'v_proj', 'down_proj']
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=roles, task_type='CAUSAL_LM')
    model = get_peft_model(decoder.model, config)
    try:
        made = METHODS[kind](model, batch)
        fit(model, rows, decoder.tokenizer, **ENOUGH, callbacks=[made])
        ranks = made.ranks()
        with torch.no_grad(): two = model.eval()(ids).logits
        made.finish()
        with torch.no_grad(): assert error(model(ids).logits, two) < 1e-5
        model.save_pretrained(tmp_path/'out')
    finally: model.unload()
    found = Adapter.load(tmp_path/'out')
    assert ranks_of(found) == at_least_one(ranks) and sum(ranks.values()) == {'lora2': 2, 'alora': 4}[kind]*len(ranks)
    loaded = PeftModel.from_pretrained(decoder.model, tmp_path/'out')
    try:
        assert loaded.peft_config['default'].rank_pattern == at_least_one(ranks)
        with torch.no_grad(): assert error(loaded(ids).logits, two) < 1e-5
    finally: loaded.unload()
    assert error(logits(decoder, ids, found), two) < 1e-5 and error(logits(decoder, ids), two) > 1e-4
    carried = transfer(found, align(decoder, decoder))
    assert error(whole(carried), whole(found)) < 1e-3

@pytest.fixture
def rows(tokenizer): return [encode(e, tokenizer) for e in ROWS]

@pytest.mark.parametrize('kind', METHODS)
def test_an_encoder_with_a_head_of_its_own(kind, tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    base = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=32)).eval()
    roles = ['query', 'value', 'output.dense']
    model = get_peft_model(base, LoraConfig(r=3, target_modules=roles, task_type='SEQ_CLS'))
    x, y = torch.randint(0, 100, (32, 9)), torch.arange(32)%2
    made = METHODS[kind](model, dict(input_ids=x[:8], attention_mask=torch.ones_like(x[:8]), labels=y[:8]))
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, learning_rate=1e-2, per_device_train_batch_size=8, report_to=[],
        save_strategy='no', disable_tqdm=True, use_cpu=True,
    )
    rows = [dict(input_ids=a, labels=b) for a, b in zip(x, y)]
    Trainer(model, args, train_dataset=rows, callbacks=[made]).train()
    made.finish()
    with torch.no_grad(): expected = model.eval()(x).logits
    model.save_pretrained(tmp_path/'out')
    torch.manual_seed(0)
    fresh_base = BertForSequenceClassification(base.config).eval()
    with torch.no_grad():
        assert (fresh_base(x).logits - expected).abs().max() > 1e-2
        assert torch.allclose(PeftModel.from_pretrained(fresh_base, tmp_path/'out')(x).logits, expected, atol=1e-5)

@pytest.mark.parametrize('kind', METHODS)
def test_peft_warns_of_nothing(kind, decoder, rows, batch, tmp_path, recwarn):
    with init_adapter(decoder, 3).on(decoder, trainable=True) as model:
        callbacks = [METHODS[kind](model, batch)]
        fit(model, rows, decoder.tokenizer, 10, 1e-3, batch_size=8, checkpoints=tmp_path/'c', callbacks=callbacks)
    assert not [w for w in recwarn if 'invalid shape' in str(w.message)]
    assert [*(tmp_path/'c').glob('checkpoint-*')]

@pytest.mark.parametrize('kind', METHODS)
def test_bf16(kind, tokenizer, batch):
    decoder = random_decoder(tokenizer)
    decoder.model.to(torch.bfloat16)
    made = []
    method = method_of(kind, batch, made)
    tuned, run = finetune(decoder, ROWS, rank=3, steps=30, lr=2e-2, batch_size=8, method=method)
    assert sum(run[-5:]) < sum(run[:5]) - 1 and all(torch.isfinite(t).all() for t in numbers_of(tuned))
    assert sum(made[0].ranks().values()) == {'lora2': 2, 'alora': 3}[kind]*28

@pytest.mark.parametrize('kind', METHODS)
def test_the_base_stays_as_it_was(kind, decoder, batch):
    base = {n: p.clone() for n, p in decoder.model.named_parameters()}
    flags = [p.requires_grad for p in decoder.model.parameters()]
    finetune(decoder, ROWS, rank=3, **ENOUGH, method=method_of(kind, batch))
    assert all(p.equal(base[n]) for n, p in decoder.model.named_parameters())
    assert flags == [p.requires_grad for p in decoder.model.parameters()]

# ---- LoRA²

def test_singular_values_are_what_is_lost():
    torch.manual_seed(0)
    A, B = torch.randn(4, 9, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    V, Ut, e = low_rank_svd(A, B)
    assert torch.allclose(Ut.T@e.diag()@V, B@A)
    for j in range(4):
        without = Ut.T@e.masked_fill(torch.arange(4) == j, 0).diag()@V
        assert torch.allclose((B@A - without).norm(), e[j])
    low = low_rank_svd(A, B[:, :1]@torch.ones(1, 4, dtype=torch.float64)) # rank one
    assert (low[2] > 1e-9).sum() == 1 and all(orthogonality_loss(rows) < 1e-20 for rows in low[:2])

@pytest.mark.parametrize('r, n, k', [(1, 5, 1), (3, 8, 3), (3, 8, 6), (4, 4, 4)])
def test_planes(r, n, k):
    rows = _random_orthonormal(r, n, torch.empty(0, dtype=torch.float64))
    outer, inner = two_scale_factors(rows, k)
    assert outer.shape == (k, n) and inner.shape == (r, k) and torch.allclose(inner@outer, rows)
    assert orthogonality_loss(outer) < 1e-20 and orthogonality_loss(inner) < 1e-20

@pytest.mark.parametrize('k', [2, 9])
def test_planes_that_do_not_fit(k):
    rows = _random_orthonormal(3, 8, torch.empty(0))
    with pytest.raises(ValueError, match=f'has 3 to 8, not {k}'): two_scale_factors(rows, k)

def test_importance_is_smoothed_as_it_is_written():
    importance = Importance(torch.zeros(3), (.5, .25))
    w = torch.nn.Parameter(torch.tensor([1., -2., 0.]))
    sensitivity = uncertainty = torch.zeros(3)
    for grad in ([1., 1., 1.], [-3., 0., 2.], [.5, 4., 1.]):
        w.grad = torch.tensor(grad)
        importance.watch(w)
        now = (w*w.grad).abs().detach()
        sensitivity = .5*sensitivity + .5*now
        uncertainty = .25*uncertainty + .75*(now - sensitivity).abs()
    assert torch.allclose(importance.sensitivity, sensitivity)
    assert torch.allclose(importance.score, sensitivity*uncertainty) and importance.score[2] == 0

def test_the_orthogonality_gradient_makes_orthonormal():
    torch.manual_seed(0)
    plane = TwoScaleA(_random_orthonormal(3, 8, torch.empty(0)), 5)
    with torch.no_grad():
        for p in (plane.outer, plane.inner): p.add_(.2*torch.randn_like(p))
    before = orthogonality_loss(plane.rows).item()
    for _ in range(200):
        plane.outer.grad, plane.inner.grad = (torch.zeros_like(p) for p in (plane.outer, plane.inner))
        add_orthogonality_grad(plane, 1.)
        with torch.no_grad():
            for p in (plane.outer, plane.inner): p.sub_(.02*p.grad)
    after = [orthogonality_loss(M).item() for M in (plane.rows, plane.outer, plane.inner)]
    assert before > .1 and max(after) < 1e-5

def test_the_budget_falls_and_ends():
    spent = [cubic_budget(s, 100, 20, 10, 60) for s in range(100)]
    assert spent == sorted(spent, reverse=True) and spent[10] == 100 and spent[11] < 100
    assert spent[60:] == [20]*40 and spent[59] >= 20
    assert cubic_budget(0, 10, 10, 0, 1) == 10

def test_what_was_cut_last_stays_zero(decoder, monkeypatch):
    seen = []
    class Watched(LoRA2):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([(left.e != 0).sum().item() for _, left in self.pairs])
    adapter = random_adapter(init_adapter(decoder, 4)) # nothing is zero by itself
    made = []
    def method(model):
        made.append(Watched(model, 1.5, phases=(.1, .5), every=5))
        return made[0]
    finetune(decoder, ROWS, adapter, steps=40, lr=1e-3, batch_size=8, method=method)
    sums = [sum(s) for s in seen]
    assert sums[:4] == [4*28]*4 and sums[19:] == [42]*21 and len({tuple(s) for s in seen[19:]}) == 1
    assert any(b > a for a, b in zip(sums, sums[1:])) # until then a direction may come back
    assert sorted(seen[-1]) == sorted(made[0].ranks().values())

def test_a_step_that_overflowed_is_passed_over(decoder, rows):
    with random_adapter(init_adapter(decoder, 3)).on(decoder, trainable=True) as model:
        made, watched, left = LoRA2(model, target=2), [], [*model.parameters()]
        for value in (1., float('inf'), float('nan'), 1.):
            for p in left:
                if p.requires_grad: p.grad = torch.full_like(p, value)
            unused = made.pairs[0][0]
            unused.inner.grad = unused.outer.grad = None
            before = [q.inner.grad.clone() for q in made.pairs[1]]
            made.on_pre_optimizer_step(None, None, None)
            watched.append(direction_scores(made.pairs))
            if value == 1: continue
            for q, b in zip(made.pairs[1], before): assert q.inner.grad.isfinite().all() == b.isfinite().all()
        same = [all(map(torch.equal, watched[0], later)) for later in watched[1:]]
        assert same == [True, True, False]
        assert all(s.isfinite().all() for s in watched[3])

def test_the_least_important_is_cut(decoder):
    with random_adapter(init_adapter(decoder, 4)).on(decoder, trainable=True) as model:
        made = LoRA2(model, target=2)
        for i, (right, left) in enumerate(made.pairs):
            left.importance_e.sensitivity.copy_(torch.tensor([[3., 1., 4., 2.]]) + 10*(i == 0))
            left.importance_e.uncertainty.fill_(1)
        prune_directions(made.pairs, 2*28)
        ranks = [*made.ranks().values()]
        assert ranks[0] == 4 and sum(ranks) == 2*28 # the first layer outranks all others
        for _, left in made.pairs[1:]:
            kept = left.kept[0]
            assert kept[2] >= kept[0] >= kept[3] >= kept[1] and (left.e != 0).equal(left.kept)

def test_an_interrupted_training_goes_on(decoder, rows, tmp_path):
    def trained(steps_until=None, checkpoints=None):
        class Stopping(LoRA2):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == steps_until: raise KeyboardInterrupt
        torch.manual_seed(0)
        with init_adapter(decoder, 4).on(decoder, trainable=True) as model:
            made = Stopping(model, 2, phases=(.1, .5), every=5)
            fit(model, rows, decoder.tokenizer, 40, 3e-3, batch_size=8, checkpoints=checkpoints, callbacks=[made])
            made.finish()
            return Adapter.from_peft(model)
    whole_run = trained()
    for stop in (13, 30): # before the last cut, and after it
        with pytest.raises(KeyboardInterrupt): trained(stop, tmp_path/str(stop))
        again = trained(checkpoints=tmp_path/str(stop))
        assert ranks_of(again) == ranks_of(whole_run) and error(whole(again), whole(whole_run)) < 1e-3

@pytest.mark.parametrize('steps', [1, 2, 6])
@pytest.mark.parametrize('kind', METHODS)
def test_very_short_trainings(kind, steps, decoder, batch):
    made = []
    def method(model):
        if kind == 'lora2': made.append(LoRA2(model, target=2, phases=(.1, .2)))
        else: made.append(ALoRA(model, batch, rounds=2, phases=(0., 1.)))
        return made[0]
    moves = []
    if kind == 'alora':
        inner = method
        def method(model):
            made_one = inner(model)
            move, made_one.move = made_one.move, lambda: moves.append(1) or move()
            return made_one
    adapter = random_adapter(init_adapter(decoder, 3))
    finetune(decoder, ROWS, adapter, steps=steps, lr=1e-3, batch_size=8, method=method)
    assert sum(made[0].ranks().values()) == {'lora2': 2, 'alora': 3}[kind]*28
    assert len(moves) == {'lora2': 0, 'alora': min(2, steps - 1)}[kind]

def test_a_training_that_ends_early_is_exported_as_it_is(decoder, rows):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 12
    with random_adapter(init_adapter(decoder, 4)).on(decoder, trainable=True) as model:
        made, ids = LoRA2(model, target=1, phases=(.1, .9), every=5), tokens()
        fit(model, rows, decoder.tokenizer, 40, 3e-3, batch_size=8, callbacks=[made, Stop()])
        with torch.no_grad():
            two = model.eval()(ids).logits
            made.finish()
            assert error(model(ids).logits, two) < 1e-5 and sum(made.ranks().values()) > 28

def test_micro_batches_make_no_difference(decoder, rows):
    def tuned(micro):
        torch.manual_seed(0)
        adapter = random_adapter(init_adapter(decoder, 3))
        method = partial(LoRA2, target=2, strength=.1, phases=(0., .5))
        how = dict(steps=8, lr=1e-3, batch_size=8, micro_batch=micro)
        return finetune(decoder, ROWS, adapter, **how, method=method)[0]
    torch.manual_seed(0)
    one = tuned(8)
    torch.manual_seed(0)
    assert error(whole(tuned(2)), whole(one)) < 1e-3

@pytest.mark.parametrize('config, message', [
    (dict(use_dora=True), 'no plain LoRA of a linear map'), (dict(lora_bias=True), 'no plain LoRA'),
    (dict(target_modules=['embed_tokens', 'q_proj']), 'model.embed_tokens has no plain LoRA'),
])
@pytest.mark.parametrize('kind', METHODS)
def test_what_is_no_plain_lora_is_refused(config, message, kind, tokenizer, batch):
    model = get_peft_model(random_decoder(tokenizer).model, LoraConfig(**(dict(target_modules=['q_proj']) | config)))
    with pytest.raises(ValueError, match=message): METHODS[kind](model, batch)

@pytest.mark.parametrize('how, message', [
    (dict(target=5), '5 directions of a module are to be left of 4'), (dict(target=0), '0 directions'),
    (dict(phases=(.5, .2)), 'phases'),
    (dict(outer=3), r'model\.layers\.0.*: a subspace for 4 directions in 64 dimensions has 4 to 64, not 3'),
])
def test_settings_that_cannot_be(how, message, decoder):
    with init_adapter(decoder, 4).on(decoder, trainable=True) as model:
        with pytest.raises(ValueError, match=message): LoRA2(model, **dict(target=2) | how)
        with torch.no_grad(): model(tokens()) # the model still runs
        factors = [m for n, m in model.named_modules() if n.endswith('lora_A.default')]
        assert all(isinstance(m, torch.nn.Linear) for m in factors)

def test_a_layer_that_is_too_small_is_named(tokenizer):
    config = LoraConfig(r=20, target_modules=['q_proj', 'k_proj'])
    model = get_peft_model(random_decoder(tokenizer, heads=4, kv_heads=1).model, config)
    message = r'k_proj: 20 directions are more than its 16 dimensions'
    with pytest.raises(ValueError, match=message): LoRA2(model, target=4)

# ---- ALoRA

@pytest.mark.parametrize('how, message', [(dict(room=.5), 'room for the rank'), (dict(phases=(.5, .5)), 'phases')])
def test_settings_of_alora_that_cannot_be(how, message, decoder, batch):
    with init_adapter(decoder, 2).on(decoder, trainable=True) as model:
        with pytest.raises(ValueError, match=message): ALoRA(model, batch, **how)

def test_importance_is_what_the_formula_says(decoder, batch):
    with random_adapter(init_adapter(decoder, 2)).on(decoder, trainable=True) as model:
        made = ALoRA(model, batch)
        gated, score = made.gated, made.ablation.score
        whole_score, found = score(), made.ablation.importance()
        assert [[*f] for f in found] == [[0, 1]]*28
        assert score() == whole_score and all(l.open == [0, 1] for l in gated)
        gated[3].gate[0, 1] = 0
        without = score()
        for l in gated: l.gate.zero_()
        gated[3].gate[0, 1] = 1
        alone = score()
        assert found[3][1] == pytest.approx(whole_score - without + alone, abs=1e-6)

def test_directions_move_and_their_number_stays(decoder, batch):
    made = []
    def method(model):
        made.append(ALoRA(model, batch, rounds=3, share=.1))
        return made[0]
    tuned, run = finetune(decoder, ROWS, rank=3, steps=20, lr=3e-3, batch_size=8, method=method)
    ranks = made[0].ranks()
    assert sum(ranks.values()) == 3*28 and len({*ranks.values()}) > 1 and max(ranks.values()) <= 6
    assert ranks_of(tuned) == at_least_one(ranks)

def test_a_direction_that_opens_changes_nothing_at_first(decoder, batch):
    torch.manual_seed(0)
    with random_adapter(init_adapter(decoder, 2)).on(decoder, trainable=True) as model:
        made = ALoRA(model, batch)
        full = [l.full.clone() for l in made.gated]
        made.move()
        for l, f in zip(made.gated, full):
            for j in l.open: assert l.full[:, j].equal(f[:, j] if j < 2 else torch.zeros_like(f[:, j]))
        assert sum(made.ranks().values()) == 2*28 and {*made.ranks().values()} == {1, 2, 3}

def test_who_gets_and_who_loses():
    worths = [{0: 5., 1: 4.}, {0: 3., 1: -1.}, {0: 2., 1: 1.}, {}]
    assert reallocate(worths, [4]*4, 1) == ([(1, 1)], [0])
    assert reallocate(worths, [2, 4, 4, 4], 1) == ([(1, 1)], [2])
    assert reallocate(worths, [4]*4, 3) == ([(1, 1)], [0]) # three would close in two layers, one is left to get
    assert reallocate(worths, [2]*4, 1) == ([], []) and reallocate(worths, [4]*4, 0) == ([], [])

def test_closed_gates_learn_nothing():
    layer = GatedB(torch.randn(4, 2), 5)
    layer(torch.randn(3, 5)).square().sum().backward()
    assert layer.full.grad[:, :2].abs().min() > 0 and not layer.full.grad[:, 2:].any()

# ---- the command

def test_the_command_prunes(tmp_path):
    data = str(data_dir()/'zoo'/'train.jsonl')
    def run(out, *more):
        common = ['--data', data, '-o', str(tmp_path/out), '--steps', '10', '--rank', '4', '--json']
        return CliRunner().invoke(app, ['finetune', 'zoo/old', *common, *more])
    assert run('pruned', '--prune', '1.5').exit_code == 0
    adapter = Adapter.load(tmp_path/'pruned')
    assert sum(len(A)*bool(B.any()) for A, B in adapter.updates.values()) == 42
    assert {*ranks_of(adapter).values()} > {1}
    for bad, said in (('0', '0 directions of a module are to be left of 4'), ('5', '5 directions')):
        failed = run(f'bad{bad}', '--prune', bad)
        assert failed.exit_code == 2 and said in failed.stderr and not (tmp_path/f'bad{bad}').exists()
