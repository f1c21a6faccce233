"""The identity law in every family, and transfers between any two of them"""
import warnings
from functools import cache
import pytest, torch
from models import effect, effect_error, error, largest_drift, logits, random_adapter, random_decoder, tokens
from test_laws import enlarge
from lorasuite.core.adapter import Adapter
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align, warn_of_limits
from lorasuite.stages.card import skipped_by_reason
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.transfer import transfer
from lorasuite.training.finetune import init_adapter
from lorasuite.lab.refit import refit
from lorasuite.forecast.inspection import preview_transfer
from lorasuite.lab.oracle import grow
from lorasuite.lab.zoo import new_tokenizer

FAMILIES = dict(
    llama={}, mistral={}, qwen2={}, qwen3={}, gemma2={}, gemma3_text={}, phi3={}, olmo2={}, gpt_neox={},
    sequential_neox=dict(family='gpt_neox', use_parallel_residual=False),
    bloom={}, gpt2={}, opt={}, falcon=dict(multi_query=True),
    falcon_rw=dict(family='falcon', multi_query=False, parallel_attn=False, alibi=True, bias=True),
    falcon_40b=dict(family='falcon', new_decoder_architecture=True, num_kv_heads=2))
NAMES = [*FAMILIES]
PAIRS = [(a, NAMES[(i + far) % len(NAMES)]) for i, a in enumerate(NAMES) for far in (1, 5, 8)]
FEW = probe_texts()[:16]

@pytest.fixture(scope='module')
def model(tokenizer):
    @cache
    def get(name): return random_decoder(tokenizer, layers=2, **dict(family=name) | FAMILIES[name])
    return get

@pytest.fixture(scope='module')
def trained(model): return cache(lambda name: random_adapter(init_adapter(model(name), 4)))

def only(adapter, decoder, role):
    "The updates of the modules that hold one role"
    module = decoder.architecture.modules[role]
    updates = {p: ab for p, ab in adapter.updates.items() if p.endswith(module)}
    return Adapter(updates, adapter.base, adapter.layers)

def ranks(adapter): return {p: len(A) for p, (A, _) in adapter.updates.items()}

@pytest.fixture
def quiet():
    "Warnings of limits between families are not what is tested"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

@pytest.mark.parametrize('name', FAMILIES)
def test_identity(name, model, trained):
    d, adapter = model(name), trained(name)
    a = align(d, d, FEW)
    assert a.layers == [(l, l) for l in range(d.layers)]
    for maps in a.blocks:
        assert maps.heads.tolist() == list(range(d.heads))
        assert maps.neurons.tolist() == list(range(d.intermediate))
    carried = transfer(adapter, a)
    assert ranks(carried) == ranks(adapter)
    assert effect_error(d, adapter, d, carried) <= 1e-4
    assert effect_error(d, adapter, d, refit(adapter, a, d, d, FEW)) <= 1e-4
    for role in d.roles:
        part = only(adapter, d, role)
        assert effect_error(d, part, d, transfer(part, a)) <= 1e-4, role

@pytest.mark.parametrize('old, new', PAIRS)
def test_between_families(old, new, model, trained, quiet):
    a, b = model(old), model(new)
    carried = transfer(trained(old), align(a, b, FEW))
    roles = [r for r in b.roles if r in a.roles]
    assert carried.updates.keys() == {b.path(l, r) for l in range(b.layers) for r in roles}
    done = effect(b, tokens(), carried)
    assert done.isfinite().all() and done.norm() > 0

# what each family allows to grow: heads are numbered where there is ALiBi;
# BLOOM normalises its embeddings and fixes the size of its MLP
GROWTHS = dict(bloom=dict(layers=4), falcon_rw=dict(layers=4, intermediate=320))

def wider(d): return dict(hidden=96, heads=6, kv_heads=max(1, 6*d.kv_heads//4))

@pytest.fixture(scope='module')
def grown(model):
    @cache
    def get(name):
        d = model(name)
        sizes = GROWTHS.get(name, wider(d) | dict(layers=4, intermediate=320))
        bigger, truth = grow(d, **sizes, seed=3)
        return Decoder(bigger, d.tokenizer, 'random/grown'), truth
    return get

@pytest.mark.parametrize('name', FAMILIES)
def test_oracle(name, model, trained, grown):
    d, adapter, (new, truth) = model(name), trained(name), grown(name)
    assert error(logits(new, tokens()), logits(d, tokens())) <= 1e-4
    there = align(d, new, FEW)
    assert there.layers == list(enumerate(truth.layers))
    for maps, heads, neurons in zip(there.blocks, truth.heads, truth.neurons):
        assert maps.heads[heads].tolist() == list(range(d.heads))
        assert maps.neurons[neurons].tolist() == list(range(d.intermediate))
    carried = transfer(adapter, there)
    assert effect_error(d, adapter, new, carried) <= 1e-3
    assert largest_drift(carried, there, d, new) <= 1e-3
    assert effect_error(d, adapter, new, refit(adapter, there, d, new, FEW)) <= 1e-3
    for role in d.roles:
        part = only(adapter, d, role)
        assert effect_error(d, part, new, transfer(part, there)) <= 1e-3, role

@pytest.mark.parametrize('name', FAMILIES)
def test_embeddings(name, model):
    d, g = model(name), torch.Generator().manual_seed(0)
    def randn(*shape): return torch.randn(*shape, generator=g)
    paths = d.embedding_paths()
    new, _, new_id = enlarge(d, words=True, **GROWTHS.get(name, wider(d)))
    alignment = align(d, new, FEW)
    head = Adapter({paths['head']: (randn(3, d.hidden), .1*randn(d.vocab, 3))})
    assert effect_error(d, head, new, transfer(head, alignment), new_id=new_id) <= 1e-3
    assert effect_error(d, head, d, transfer(head, align(d, d, FEW))) <= 1e-4
    if name == 'bloom': return # its embeddings are normalised before they enter the stream
    table = Adapter({}, embeddings={paths['embedding']: (randn(3, d.vocab), .1*randn(d.hidden, 3))})
    assert effect_error(d, table, new, transfer(table, alignment), new_id=new_id) <= 1e-3
    assert effect_error(d, table, d, transfer(table, align(d, d, FEW))) <= 1e-4

def test_embeddings_without_a_place_are_skipped(model, quiet):
    a, b = model('llama'), model('bloom')
    update = {a.path(0, 'q'): (torch.ones(1, a.hidden), torch.ones(a.hidden, 1))}
    table = {'model.embed_tokens': (torch.ones(1, a.vocab), torch.ones(a.hidden, 1))}
    carried = transfer(Adapter(update, embeddings=table), align(a, b, FEW))
    why = 'the new model does more to its embeddings than a linear map'
    assert carried.skipped['model.embed_tokens'] == why and why in carried.card

@pytest.mark.parametrize('name', FAMILIES)
def test_shrinking_is_exact(name, model, trained, grown):
    d, adapter, (big, truth) = model(name), trained(name), grown(name)
    back = align(big, d, FEW)
    assert back.layers == [(b, a) for a, b in enumerate(truth.layers)]
    assert effect_error(d, adapter, d, transfer(transfer(adapter, align(d, big, FEW)), back)) <= 1e-3

def test_two_families_with_other_tokenizers_and_head_sizes(tokenizer, tmp_path):
    "As from SmolLM2 to Gemma 3: other tokens, head sizes, norms of queries and keys, scaled and tied embeddings"
    a = random_decoder(tokenizer, layers=3, tie_word_embeddings=True)
    sizes = dict(hidden=96, layers=5, heads=2, kv_heads=1, head_dim=40, intermediate=160)
    b = random_decoder(new_tokenizer(700, seed=5), 'gemma3_text', tie_word_embeddings=True, **sizes)
    with pytest.warns(UserWarning, match='head sizes differ'): alignment = align(a, b, FEW)
    adapter = random_adapter(init_adapter(a, 4))
    adapter.updates[a.embedding_paths()['head']] = torch.randn(2, a.hidden), .1*torch.randn(a.vocab, 2)
    carried = transfer(adapter, alignment)
    assert carried.updates.keys() == {b.path(l, r) for l in range(5) for r in b.roles} | {'lm_head'}
    assert not carried.skipped
    assert 0 < effect(b, tokens(b.vocab), carried).norm() < torch.inf
    carried.save(tmp_path/'carried')
    again = Adapter.load(tmp_path/'carried')
    assert error(effect(b, tokens(b.vocab), again), effect(b, tokens(b.vocab), carried)) <= 1e-5

@pytest.mark.parametrize('old, new', [('gemma2', 'gpt2'), ('llama', 'bloom'), ('gpt2', 'qwen3')])
def test_inspect_foretells_what_is_skipped(old, new, model, trained, quiet):
    a, b = model(old), model(new)
    table = {a.embedding_paths()['embedding']: (torch.ones(1, a.vocab), torch.ones(a.hidden, 1))}
    adapter = Adapter(trained(old).updates, layers=a.layers, embeddings=table)
    carried = transfer(adapter, align(a, b, FEW))
    assert preview_transfer(adapter, a, b)['skipped'] == skipped_by_reason(carried)

def test_a_model_in_training_is_read_alike_and_left_in_training(tokenizer):
    model = random_decoder(tokenizer, 'gpt2', layers=2).model.train()
    same = random_decoder(tokenizer, 'gpt2', layers=2)
    assert Decoder(model, tokenizer).architecture.runs() == same.architecture.runs()
    assert model.training

@pytest.mark.parametrize('family, rotates', [('llama', True), ('gpt_neox', True), ('bloom', False), ('gpt2', False)])
def test_head_sizes_matter_where_heads_are_rotated(family, rotates, tokenizer):
    a, b = (random_decoder(tokenizer, family=family, layers=1, heads=n, kv_heads=n) for n in (4, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        warn_of_limits(a, b, a.vocab)
    assert any('rotary' in str(w.message) for w in caught) == rotates
