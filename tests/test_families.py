"""The identity law in every family, and transfers between any two of them"""
import warnings
from functools import cache
import pytest, torch
from models import effect, effect_error, error, logits, random_adapter, random_decoder, tokens
from test_laws import enlarge
from lorasuite.core.adapter import Adapter
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align, warn_of_limits
from lorasuite.stages.card import skipped_by_reason
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.transfer import transfer
from lorasuite.training.finetune import init_adapter
from lorasuite.training.refit import refit
from lorasuite.forecast.inspection import outlook
from lorasuite.lab.oracle import grow
from lorasuite.lab.zoo import new_tokenizer

FAMILIES = dict(llama={}, mistral={}, qwen2={}, qwen3={}, gemma2={}, gemma3_text={}, phi3={}, olmo2={}, gpt_neox={}, sequential_neox=dict(family='gpt_neox', use_parallel_residual=False),
                bloom={}, gpt2={}, opt={}, falcon=dict(multi_query=True), falcon_rw=dict(family='falcon', multi_query=False, parallel_attn=False, alibi=True, bias=True),
                falcon_40b=dict(family='falcon', new_decoder_architecture=True, num_kv_heads=2))
PAIRS = [(a, b) for i, a in enumerate(FAMILIES) for j, b in enumerate(FAMILIES) if (j - i) % len(FAMILIES) in (1, 5, 8)]
FEW = probe_texts()[:16]

@pytest.fixture(scope='module')
def model(tokenizer): return cache(lambda name: random_decoder(tokenizer, layers=2, **dict(family=name) | FAMILIES[name]))

@pytest.fixture(scope='module')
def trained(model): return cache(lambda name: random_adapter(init_adapter(model(name), 4)))

def only(adapter, decoder, role):
    "The updates of the modules that hold one role"
    return Adapter({p: ab for p, ab in adapter.updates.items() if p.endswith(decoder.architecture.modules[role])}, adapter.base, adapter.layers)

@pytest.mark.parametrize('name', FAMILIES)
def test_identity(name, model, trained):
    d, adapter = model(name), trained(name)
    a = align(d, d, FEW)
    assert a.layers == [(l, l) for l in range(d.layers)]
    for maps in a.blocks: assert maps['heads'].tolist() == list(range(d.heads)) and maps['neurons'].tolist() == list(range(d.intermediate))
    carried = transfer(adapter, a)
    assert {p: len(A) for p, (A, _) in carried.updates.items()} == {p: len(A) for p, (A, _) in adapter.updates.items()}
    assert effect_error(d, adapter, d, carried) <= 1e-4 and effect_error(d, adapter, d, refit(adapter, a, d, d, FEW)) <= 1e-4
    for role in d.roles: assert effect_error(d, only(adapter, d, role), d, transfer(only(adapter, d, role), a)) <= 1e-4, role

@pytest.mark.parametrize('old, new', PAIRS)
def test_between_families(old, new, model, trained):
    a, b = model(old), model(new)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        carried = transfer(trained(old), align(a, b, FEW))
    roles = [r for r in b.roles if r in a.roles]
    assert carried.updates.keys() == {b.path(l, r) for l in range(b.layers) for r in roles}
    done = effect(b, tokens(), carried)
    assert done.isfinite().all() and done.norm() > 0

# what each family allows to grow: heads are numbered where there is ALiBi; BLOOM normalises its embeddings and fixes the size of its MLP
GROWTHS = dict(bloom=dict(layers=4), falcon_rw=dict(layers=4, intermediate=320))

@pytest.fixture(scope='module')
def grown(model):
    @cache
    def get(name):
        d = model(name)
        bigger, truth = grow(d, **GROWTHS.get(name, dict(hidden=96, layers=4, heads=6, kv_heads=max(1, 6*d.kv_heads//4), intermediate=320)), seed=3)
        return Decoder(bigger, d.tokenizer, 'random/grown'), truth
    return get

@pytest.mark.parametrize('name', FAMILIES)
def test_oracle(name, model, trained, grown):
    d, adapter, (new, truth) = model(name), trained(name), grown(name)
    assert error(logits(new, tokens()), logits(d, tokens())) <= 1e-4
    there = align(d, new, FEW)
    assert there.layers == list(enumerate(truth.layers))
    for maps, heads, neurons in zip(there.blocks, truth.heads, truth.neurons):
        assert maps['heads'][heads].tolist() == list(range(d.heads)) and maps['neurons'][neurons].tolist() == list(range(d.intermediate))
    assert effect_error(d, adapter, new, transfer(adapter, there)) <= 1e-3 and effect_error(d, adapter, new, refit(adapter, there, d, new, FEW)) <= 1e-3
    for role in d.roles: assert effect_error(d, only(adapter, d, role), new, transfer(only(adapter, d, role), there)) <= 1e-3, role

@pytest.mark.parametrize('name', FAMILIES)
def test_embeddings(name, model):
    d = model(name)
    ends, g = d.embedding_paths(), torch.Generator().manual_seed(0)
    new, _, new_id = enlarge(d, words=True, **GROWTHS.get(name, dict(hidden=96, heads=6, kv_heads=max(1, 6*d.kv_heads//4))))
    alignment, randn = align(d, new, FEW), lambda *shape: torch.randn(*shape, generator=g)
    head = Adapter({ends['head']: (randn(3, d.hidden), .1*randn(d.vocab, 3))})
    assert effect_error(d, head, new, transfer(head, alignment), new_id=new_id) <= 1e-3
    assert effect_error(d, head, d, transfer(head, align(d, d, FEW))) <= 1e-4
    if name == 'bloom': return # its embeddings are normalised before they enter the stream
    table = Adapter({}, embeddings={ends['embedding']: (randn(3, d.vocab), .1*randn(d.hidden, 3))})
    assert effect_error(d, table, new, transfer(table, alignment), new_id=new_id) <= 1e-3
    assert effect_error(d, table, d, transfer(table, align(d, d, FEW))) <= 1e-4

def test_embeddings_without_a_place_are_skipped(model):
    a, b = model('llama'), model('bloom')
    table = Adapter({a.path(0, 'q'): (torch.ones(1, a.hidden), torch.ones(a.hidden, 1))}, embeddings={'model.embed_tokens': (torch.ones(1, a.vocab), torch.ones(a.hidden, 1))})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        carried = transfer(table, align(a, b, FEW))
    assert carried.skipped['model.embed_tokens'] == 'the new model does more to its embeddings than a linear map' and carried.skipped['model.embed_tokens'] in carried.card

@pytest.mark.parametrize('name', FAMILIES)
def test_shrinking_is_exact(name, model, trained, grown):
    d, adapter, (big, truth) = model(name), trained(name), grown(name)
    back = align(big, d, FEW)
    assert back.layers == [(b, a) for a, b in enumerate(truth.layers)]
    assert effect_error(d, adapter, d, transfer(transfer(adapter, align(d, big, FEW)), back)) <= 1e-3

def test_two_families_with_other_tokenizers_and_head_sizes(tokenizer, tmp_path):
    "As from SmolLM2 to Gemma 3: other tokens, head sizes, norms of queries and keys, scaled and tied embeddings"
    a = random_decoder(tokenizer, layers=3, tie_word_embeddings=True)
    b = random_decoder(new_tokenizer(700, seed=5), 'gemma3_text', hidden=96, layers=5, heads=2, kv_heads=1, head_dim=40, intermediate=160, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match='head sizes differ'): alignment = align(a, b, FEW)
    adapter = random_adapter(init_adapter(a, 4))
    adapter.updates[a.embedding_paths()['head']] = torch.randn(2, a.hidden), .1*torch.randn(a.vocab, 2)
    carried = transfer(adapter, alignment)
    assert carried.updates.keys() == {b.path(l, r) for l in range(5) for r in b.roles} | {'lm_head'} and not carried.skipped
    assert 0 < effect(b, tokens(b.vocab), carried).norm() < torch.inf
    carried.save(tmp_path/'carried')
    again = Adapter.load(tmp_path/'carried')
    assert error(effect(b, tokens(b.vocab), again), effect(b, tokens(b.vocab), carried)) <= 1e-5

@pytest.mark.parametrize('old, new', [('gemma2', 'gpt2'), ('llama', 'bloom'), ('gpt2', 'qwen3')])
def test_inspect_foretells_what_is_skipped(old, new, model, trained):
    a, b = model(old), model(new)
    table = {a.embedding_paths()['embedding']: (torch.ones(1, a.vocab), torch.ones(a.hidden, 1))}
    adapter = Adapter(trained(old).updates, layers=a.layers, embeddings=table)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        carried = transfer(adapter, align(a, b, FEW))
    assert outlook(adapter, a, b)['skipped'] == skipped_by_reason(carried)

def test_a_model_in_training_is_read_alike_and_left_in_training(tokenizer):
    model = random_decoder(tokenizer, 'gpt2', layers=2).model.train()
    assert Decoder(model, tokenizer).architecture.runs() == random_decoder(tokenizer, 'gpt2', layers=2).architecture.runs() and model.training

@pytest.mark.parametrize('family, turns', [('llama', True), ('gpt_neox', True), ('bloom', False), ('gpt2', False)])
def test_head_sizes_matter_where_heads_are_rotated(family, turns, tokenizer):
    a, b = (random_decoder(tokenizer, family=family, layers=1, heads=n, kv_heads=n) for n in (4, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        warn_of_limits(a, b, a.vocab)
    assert any('rotary' in str(w.message) for w in caught) == turns
