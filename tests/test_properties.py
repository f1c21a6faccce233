"""The laws as properties: for any family, size, seed, coefficient and numbering of tokens"""
import pytest, torch
from hypothesis import given, settings, strategies as st
from models import effect_error, error, logits, random_adapter, random_decoder, tokens, whole
from test_families import FAMILIES, GROWTHS
from test_laws import combine, enlarge
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align
from lorasuite.stages.cka import cka_table, probe_texts
from lorasuite.stages.layer_mapping import layer_map
from lorasuite.stages.transfer import transfer
from lorasuite.training.finetune import init_adapter
from lorasuite.lab.oracle import extend_tokenizer, grow

FEW = probe_texts()[:16]
few = settings(max_examples=8, deadline=None, derandomize=True)
family, seed = st.sampled_from(sorted(FAMILIES)), st.integers(0, 999)

def make(tokenizer, name, **sizes):
    "A random model of a family"
    return random_decoder(tokenizer, **dict(layers=2, family=name) | FAMILIES[name] | sizes)

@few
@given(name=family, groups=st.integers(1, 3), size=st.sampled_from([8, 16, 24]), layers=st.integers(1, 3),
       rank=st.integers(1, 9), seed=seed)
def test_identity(tokenizer, name, groups, size, layers, rank, seed):
    sizes = dict(heads=2*groups, kv_heads=groups, hidden=2*groups*size, layers=layers, seed=seed)
    if name == 'falcon_40b': sizes |= dict(num_kv_heads=groups)
    d = make(tokenizer, name, **sizes)
    adapter = random_adapter(init_adapter(d, rank), seed)
    assert effect_error(d, adapter, d, transfer(adapter, align(d, d, FEW))) <= 1e-4

free_families = st.sampled_from(sorted(FAMILIES.keys() - GROWTHS))
some_axes = st.sets(st.sampled_from(['width', 'layers', 'neurons', 'tokens']), min_size=1)

@few
@given(name=free_families, axes=some_axes, seed=seed)
def test_oracle_on_any_axes(tokenizer, name, axes, seed):
    d = make(tokenizer, name, seed=seed)
    sizes = {}
    if 'width' in axes: sizes |= dict(hidden=96, heads=6, kv_heads=max(1, 6*d.kv_heads//4))
    if 'layers' in axes: sizes |= dict(layers=3)
    if 'neurons' in axes: sizes |= dict(intermediate=300)
    new, truth, new_id = enlarge(d, words='tokens' in axes, seed=seed, **sizes)
    adapter = random_adapter(init_adapter(d, 3), seed)
    assert error(logits(new, new_id[tokens()])[..., new_id], logits(d, tokens())) <= 1e-4
    assert effect_error(d, adapter, new, transfer(adapter, align(d, new, FEW)), new_id=new_id) <= 1e-3

@pytest.fixture(scope='module')
def pair(decoder):
    new, *_ = enlarge(decoder, hidden=80, layers=5, heads=6, kv_heads=3, intermediate=110)
    return decoder, new, align(decoder, new, FEW)

@few
@given(a=seed, b=seed, c=st.floats(-100, 100))
def test_sums_and_scales_are_kept(pair, a, b, c):
    old, new, alignment = pair
    one, two = (random_adapter(init_adapter(old, 4), s) for s in (a, b))
    first, second = (whole(transfer(x, alignment)) for x in (one, two))
    summed = whole(transfer(combine(one, two, c), alignment))
    assert error(summed, first + c*second) <= 1e-5

@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=seed)
def test_two_stages_are_one(pair, seed):
    old, near, alignment = pair
    far, *_ = enlarge(near, hidden=100, layers=6, heads=8, kv_heads=4, intermediate=130, seed=seed)
    adapter = random_adapter(init_adapter(old, 4), seed)
    twice = transfer(transfer(adapter, alignment), align(near, far, FEW))
    once = transfer(adapter, align(old, far, FEW))
    assert error(whole(twice), whole(once)) <= 1e-3

@few
@given(seed=seed)
def test_the_numbering_of_tokens_does_not_matter(decoder, adapter, seed):
    shuffled, pieces = extend_tokenizer(decoder.tokenizer, [], seed=seed)
    new = Decoder(grow(decoder, pieces=pieces, seed=seed)[0], shuffled, 'random/shuffled')
    before, after = decoder.tokenizer.get_vocab(), shuffled.get_vocab()
    new_id = torch.tensor([after[t] for t in sorted(before, key=before.get)])
    assert effect_error(decoder, adapter, new, transfer(adapter, align(decoder, new, FEW)), new_id=new_id) <= 1e-3

@pytest.fixture(scope='module')
def shipped(): return load_model('zoo/old'), load_model('zoo/new'), probe_texts()[:96]

@settings(max_examples=5, deadline=None, derandomize=True)
@given(batch=st.integers(4, 32))
def test_the_batch_size_does_not_matter_to_cka(shipped, batch):
    whole_batch, parts = (cka_table(*shipped, rows=256, batch_size=b) for b in (16, batch))
    assert (whole_batch - parts).abs().max() <= .08
    assert layer_map(whole_batch) == layer_map(parts)
