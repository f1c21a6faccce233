"""Other ways to get an adapter onto a new base: what they keep, what they name, and that PEFT reads the result"""
from dataclasses import replace
import pytest, torch
from models import effect, effect_error, error, random_adapter, random_decoder, tokens, whole
from test_families import FAMILIES, PAIRS, model, trained
from test_laws import combine
from lorasuite.core.adapter import Adapter
from lorasuite.core.block import read_block
from lorasuite.core.model import Decoder, model_info
from lorasuite.stages.alignment import align
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.direct_copy import direct_copy
from lorasuite.stages.transfer import split_by_role, transfer, transfer_updates
from lorasuite.training.finetune import init_adapter
from lorasuite.lab.baselines import cross_lora, match_norm, published, published_rescaled, random_like
from lorasuite.lab.oracle import grow

def projected(d, l, role, delta, rank=10**6):
    "What Cross-LoRA must make of a dense update that stays on its model: a projection to the directions of the weight"
    W = read_block(d, l).weight(role, fold=False)
    U, _, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank]@(U[:, :rank].T@delta@Vt[:rank].T)@Vt[:rank]

def by_role(adapter, d):
    "Dense updates by layer and role"
    return {k: (B@A).double() for k, (A, B) in split_by_role(adapter, model_info(d))[0].items()}

# ---- direct copy

@pytest.mark.parametrize('name', FAMILIES)
def test_a_copy_to_the_same_model_is_exact(name, model, trained):
    d, adapter = model(name), trained(name)
    copied = direct_copy(adapter, d, d)
    assert copied.updates.keys() == adapter.updates.keys() and not copied.skipped
    assert {p: len(A) for p, (A, _) in copied.updates.items()} == {p: len(A) for p, (A, _) in adapter.updates.items()}
    assert error(whole(copied), whole(adapter)) <= 1e-6 and effect_error(d, adapter, d, copied) <= 1e-5

@pytest.mark.parametrize('old, new', PAIRS)
def test_a_copy_between_families_copies_or_names_every_update(old, new, model, trained):
    a, b = model(old), model(new)
    before, copied = by_role(trained(old), a), direct_copy(trained(old), a, b)
    # roles that share a module have zeros for those that were left out
    after = {k: delta for k, delta in by_role(copied, b).items() if delta.any()}
    assert len(after) + len(copied.skipped) == len(before)
    for k, delta in after.items(): assert error(delta, before[k]) <= 1e-5
    for path, why in copied.skipped.items(): assert 'against' in why or 'has no' in why, path

def test_a_copy_to_another_seed_of_the_same_shape(model, trained, tokenizer):
    other = random_decoder(tokenizer, layers=2, seed=7)
    assert torch.equal(whole(direct_copy(trained('llama'), model('llama'), other)), whole(trained('llama')))

def test_a_copy_names_layers_roles_and_shapes(model, trained, tokenizer):
    a, adapter, plain = model('llama'), trained('llama'), model('opt')
    one = random_decoder(tokenizer, layers=1)
    wide, wider = (random_decoder(tokenizer, layers=2, **size) for size in (dict(intermediate=150), dict(hidden=80)))
    assert {*direct_copy(adapter, a, one).skipped.values()} == {'the new model has no layer 1'}
    assert direct_copy(adapter, a, wide).skipped['model.layers.1.mlp.down_proj (down)'] == '64×96 against 64×150'
    assert direct_copy(adapter, a, plain).skipped['model.layers.0.mlp.gate_proj (gate)'] == 'the new model has no gate'
    with pytest.raises(ValueError, match='nothing of the adapter has a place .* 64×64 against 80×80'):
        direct_copy(adapter, a, wider)
    with pytest.raises(ValueError, match='was it trained on another model'): direct_copy(trained('opt'), a, plain)

def with_ends(d):
    "Updates of both embeddings and a whole row of one token"
    ends, g = d.embedding_paths(), torch.Generator().manual_seed(0)
    pair = lambda m, n: (torch.randn(2, n, generator=g), torch.randn(m, 2, generator=g))
    head, table = {ends['head']: pair(d.vocab, d.hidden)}, {ends['embedding']: pair(d.hidden, d.vocab)}
    row = torch.tensor([7]), torch.randn(1, d.hidden, generator=g)
    return Adapter(head, embeddings=table, rows={ends['embedding']: row})

def test_a_copy_of_embeddings(model, tokenizer):
    a, neox = model('llama'), model('gpt_neox')
    adapter, ends = with_ends(a), neox.embedding_paths()
    copied = direct_copy(adapter, a, neox)
    assert torch.equal(copied.delta(ends['head']), adapter.delta('lm_head'))
    assert torch.equal(copied.rows[ends['embedding']][1], adapter.rows['model.embed_tokens'][1])
    assert torch.equal(copied.delta(ends['embedding']), adapter.delta('model.embed_tokens'))
    assert not copied.skipped
    wider = random_decoder(tokenizer, layers=2, hidden=80)
    with pytest.raises(ValueError, match='512×64 against 512×80'): direct_copy(adapter, a, wider)
    with pytest.raises(ValueError, match='projections of the blocks only'): cross_lora(adapter, a, wider)

# ---- Cross-LoRA

@pytest.mark.parametrize('rank', [320, 20])
@pytest.mark.parametrize('name', FAMILIES)
def test_cross_lora_to_the_same_model_projects(name, rank, model, trained):
    d = model(name)
    before, carried = by_role(trained(name), d), cross_lora(trained(name), d, d, rank)
    for (l, role), delta in by_role(carried, d).items():
        assert error(delta, projected(d, l, role, before[l, role], rank)) <= 1e-4
        if rank == 320 and len(set(delta.shape)) == 1: assert error(delta, before[l, role]) <= 1e-4
    assert error(whole(cross_lora(carried, d, d, rank)), whole(carried)) <= 1e-4

def test_cross_lora_to_itself_is_exact_where_all_weights_are_square(tokenizer):
    d = random_decoder(tokenizer, kv_heads=4, intermediate=64)
    adapter = random_adapter(init_adapter(d, 4))
    assert effect_error(d, adapter, d, cross_lora(adapter, d, d)) <= 1e-4
    assert effect_error(d, adapter, d, cross_lora(adapter, d, d, rank=16)) > .3

@pytest.mark.parametrize('old, new', PAIRS)
def test_cross_lora_between_families(old, new, model, trained):
    a, b = model(old), model(new)
    carried = cross_lora(trained(old), a, b)
    assert carried.updates.keys() == {b.path(l, r) for l in range(b.layers) for r in b.roles if r in a.roles}
    assert effect(b, tokens(), carried).isfinite().all()
    assert {*carried.skipped.values()} <= {'the new model has no gate'}

@pytest.fixture(scope='module')
def bigger(model):
    grown, _ = grow(model('llama'), hidden=96, layers=4, heads=6, kv_heads=3, intermediate=150, seed=3)
    return Decoder(grown, model('llama').tokenizer, 'random/grown')

def test_cross_lora_is_linear_and_keeps_the_rank(model, trained, bigger):
    a, b = trained('llama'), random_adapter(trained('llama'), seed=1)
    one, two, both = (cross_lora(x, model('llama'), bigger) for x in (a, b, combine(a, b, 3.)))
    assert error(whole(both), whole(one) + 3*whole(two)) <= 1e-5
    assert all(len(A) == 4 for A, _ in one.updates.values()) and len(one.updates) == len(a.updates)

def test_cross_lora_to_a_shallower_model(model, trained, bigger):
    back = cross_lora(random_adapter(init_adapter(bigger, 4)), bigger, model('llama'))
    assert {*back.skipped.values()} == {'the new model has no layer 2', 'the new model has no layer 3'}
    assert effect(model('llama'), tokens(), back).isfinite().all()

def test_cross_lora_does_not_depend_on_signs(model, trained, bigger, monkeypatch):
    plain, svd = cross_lora(trained('llama'), model('llama'), bigger), torch.linalg.svd
    def flipped(W, **kw):
        U, S, Vt = svd(W, **kw)
        sign = (torch.rand(len(S), generator=torch.Generator().manual_seed(len(W))) - .5).sign().to(W.dtype)
        return U*sign, S, Vt*sign[:, None]
    monkeypatch.setattr('lorasuite.lab.baselines.torch.linalg.svd', flipped)
    assert error(whole(cross_lora(trained('llama'), model('llama'), bigger)), whole(plain)) <= 1e-5

# ---- controls, the published formula, and PEFT

def test_random_and_rescaled_updates_have_the_norms(model, trained, bigger):
    a, ours = model('llama'), align(model('llama'), bigger, probe_texts()[:16])
    carried = transfer(trained('llama'), ours)
    paper, rescaled = published(trained('llama'), a, bigger), published_rescaled(trained('llama'), a, bigger, ours)
    for p in carried.updates:
        for x in (random_like(carried), match_norm(paper, carried), rescaled):
            assert x.norm(p) == pytest.approx(carried.norm(p), rel=1e-4, abs=1e-8)
    third = whole(random_like(carried, 3))
    assert torch.equal(whole(random_like(carried, 3)), third)
    assert not torch.equal(whole(random_like(carried)), third)
    theirs = align(a, bigger, method='paper', maps=ours)
    path = bigger.path(ours.layers[0][1], 'q')
    A, B = (t.double() for t in trained('llama').updates[a.path(ours.layers[0][0], 'q')])
    A2, B2 = transfer_updates(dict(q=(A, B)), theirs.pairs[0])['q']
    cosine = torch.cosine_similarity((B2@A2).flatten(), rescaled.delta(path).double().flatten(), 0)
    assert cosine == pytest.approx(1, abs=1e-5)

def test_controls_take_embeddings_along(model):
    adapter = with_ends(model('llama'))
    doubled = lambda updates: {p: (A, 2*B) for p, (A, B) in updates.items()}
    double = replace(adapter, updates=doubled(adapter.updates), embeddings=doubled(adapter.embeddings))
    back, noise = match_norm(double, adapter), random_like(adapter, 1)
    for p in adapter.updates | adapter.embeddings:
        assert error(back.delta(p), adapter.delta(p)) <= 1e-5
        assert noise.norm(p) == pytest.approx(adapter.norm(p), rel=1e-4) and error(noise.delta(p), adapter.delta(p)) > 1
    assert back.rows is adapter.rows and not noise.rows

@pytest.mark.parametrize('name', ['llama', 'phi3', 'gpt_neox', 'gpt2'])
def test_results_load_in_peft(name, model, trained, tmp_path):
    d, adapter = model(name), trained(name)
    made = direct_copy(adapter, d, d), cross_lora(adapter, d, d), random_like(adapter), published(adapter, d, d)
    for i, a in enumerate(made):
        a.save(tmp_path/str(i))
        again = Adapter.load(tmp_path/str(i))
        assert error(effect(d, tokens(), again), effect(d, tokens(), a)) <= 1e-5
