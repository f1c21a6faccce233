"""Each block is fetched once for all texts; wide models are computed in 32 and 16 bits with the same maps"""
import threading
from pathlib import Path
import pytest, torch
from models import effect_error, error
from lorasuite.core import block, streaming
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.core.streaming import fast_dtype, FileWeights, holding, layer_by_layer, stored_weight
from lorasuite.stages import block_maps
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.cka import cka_table, paired_batches, probe_texts
from lorasuite.stages.head_mapping import certain_pairs, match, match_neurons, neuron_similarity
from lorasuite.stages.transfer import transfer

FEW = probe_texts()[:40]

@pytest.fixture
def wide(monkeypatch):
    "Models of any size are computed like wide ones on a processor with a unit for 16 bits"
    monkeypatch.setattr(streaming, '_WIDE', 0)
    monkeypatch.setattr(block_maps, 'fast_dtype', lambda *_: torch.bfloat16)

def count_fetches(decoder, monkeypatch):
    "Names of modules in blocks, one for each time that their weights are fetched"
    fetched = []
    for layer, part in enumerate(decoder.blocks):
        for name, module in part.named_modules():
            hook = getattr(module, '_hf_hook', None)
            if not getattr(hook, 'offload', False): continue
            def fetch(module, *args, hook=hook, original=hook.pre_forward, name=f'{layer}.{name}', **kwargs):
                if hook.offload: fetched.append(name)
                return original(module, *args, **kwargs)
            monkeypatch.setattr(hook, 'pre_forward', fetch)
    return fetched

def test_each_block_is_fetched_once_for_all_texts(monkeypatch):
    old, new = (load_model(name, torch.device('cpu'), lazy=True) for name in ('zoo/old', 'zoo/new'))
    assert len(paired_batches(old, new, FEW, batch_size=8)[0]) == 5
    fetched = count_fetches(old, monkeypatch)
    cka_table(old, new, FEW, batch_size=8)
    assert len(fetched) == len({*fetched}) >= 7*old.layers
    assert all(p.device.type == 'meta' for p in old.blocks.parameters())

def test_weights_are_dropped_after_an_error():
    old = load_model('zoo/old', torch.device('cpu'), lazy=True)
    with pytest.raises(ZeroDivisionError), holding(old.blocks[0]): 1/0
    assert all(p.device.type == 'meta' for p in old.blocks.parameters())

def test_a_reading_that_is_given_up_leaves_nothing():
    old, before = load_model('zoo/old'), threading.active_count()
    ids = torch.ones(2, 4, dtype=torch.long)
    for layer, i in layer_by_layer(old, [ids, ids, ids]):
        if (layer, i) == (1, 1): break
    assert threading.active_count() == before
    assert not any(part._forward_pre_hooks for part in old.blocks)
    assert len([*layer_by_layer(old, [ids])]) == old.layers

@pytest.mark.parametrize('new', ['zoo/new', 'zoo/new-far', 'zoo/stranger'])
def test_wide_models_have_the_same_partners(new, request):
    exact, adapter, model = align('zoo/old', new, FEW), Adapter.load('zoo/adapter'), load_model(new)
    carried = transfer(adapter, exact)
    request.getfixturevalue('wide')
    found = align('zoo/old', new, FEW)
    assert found.layers == exact.layers
    assert found.blocks[0].maps['q'].dtype == torch.float32 and found.read.dtype == torch.float64
    if new == 'zoo/stranger': return # whose neurons are no more alike than by chance
    for a, b in zip(exact.blocks, found.blocks):
        assert torch.equal(a.heads, b.heads) and torch.equal(a.neurons, b.neurons)
    assert effect_error(model, carried, model, transfer(adapter, found)) <= 1e-4

def test_identity_of_a_wide_model(wide, tmp_path):
    old, adapter = load_model('zoo/old'), Adapter.load('zoo/adapter')
    alignment = align(old, old, FEW)
    alignment.save(tmp_path/'alignment')
    for found in (alignment, Alignment.load(tmp_path/'alignment')):
        assert effect_error(old, adapter, old, transfer(adapter, found)) <= 1e-5

def test_numbers_of_a_wide_model_are_not_rounded(wide, monkeypatch):
    "Gains and weights are read as they are stored, whatever type the model computes in"
    exact = load_model('zoo/old', torch.device('cpu'))
    lazy = load_model('zoo/old', torch.device('cpu'), torch.bfloat16, lazy=True)
    assert lazy.module(0, 'q').weight.dtype == torch.bfloat16
    for role in exact.roles:
        assert torch.equal(block.read_block(lazy, 0).weight(role), block.read_block(exact, 0).weight(role))

def drawn(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize('n, n2', [(60, 60), (60, 90), (90, 60)])
def test_what_16_bits_leave_open_is_computed_again(n, n2):
    "Twins that only 32 bits tell apart"
    rows = {kind: drawn(n, 64, i) for i, kind in enumerate(('gate', 'up', 'down'))}
    for X in rows.values(): X[1::2] = X[::2] + .02*X[1::2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    rows2 = {kind: torch.cat([X[order], drawn(n2, 64, 9)])[:n2] for kind, X in rows.items()}
    kept = min(n, n2)
    assert match_neurons(rows, rows2, torch.bfloat16)[:kept].tolist() == order[:kept].tolist()
    assert match(neuron_similarity(rows, rows2, torch.bfloat16))[:kept].tolist() != order[:kept].tolist()

def test_equal_rivals_are_not_certain():
    assert len(certain_pairs(torch.tensor([[.5, .5]]))[0]) == 0
    assert len(certain_pairs(torch.tensor([[.5], [.5]]).T)[0]) == 0
    assert certain_pairs(torch.tensor([[.5]]))[0].tolist() == [0]

def test_weights_are_mapped_from_files_that_were_there(tmp_path):
    "One by one, and a file that is replaced meanwhile changes nothing"
    decoder = load_model('zoo/new', torch.device('cpu'))
    decoder.model.save_pretrained(tmp_path/'model')
    decoder.tokenizer.save_pretrained(tmp_path/'model')
    lazy = load_model(tmp_path/'model', torch.device('cpu'), lazy=True)
    (tmp_path/'model'/'model.safetensors').rename(tmp_path/'other')
    (tmp_path/'model'/'model.safetensors').write_bytes(bytes(1000))
    found = stored_weight(lazy.module(2, 'up'))
    assert torch.equal(found, decoder.module(2, 'up').weight)
    assert found.data_ptr() != stored_weight(lazy.module(2, 'up')).data_ptr()
    weights = FileWeights(dict(up=decoder.module(0, 'up').weight.detach(), here=torch.ones(3)))
    assert {*weights} == {'up', 'here'}
    assert weights['here'].tolist() == [1, 1, 1]

def test_a_file_of_many_weights_is_opened_once(monkeypatch):
    mapped = load_model('zoo/new', torch.device('cpu'), lazy=True)
    weights, opened, open_ = {role: stored_weight(mapped.module(0, role)) for role in 'qkvo'}, [], Path.open
    monkeypatch.setattr(Path, 'open', lambda path, *args, **how: opened.append(path.name) or open_(path, *args, **how))
    found = FileWeights(weights)
    assert len(found.places) == len(weights) and opened.count('model.safetensors') == 1

def test_only_what_is_compared_is_read():
    old, new = (load_model(name) for name in ('zoo/old', 'zoo/new'))
    for (ids, at), (ids2, at2) in zip(*paired_batches(old, new, probe_texts())):
        assert len(at) == len(at2) <= 512
        for some, places in ((ids, at), (ids2, at2)):
            rows, columns = places//some.shape[1], places % some.shape[1]
            assert rows.max() == len(some) - 1 and columns.max() == some.shape[1] - 1

def test_blocks_compute_in_16_bits_what_they_compute_in_32(wide):
    exact = load_model('zoo/new', torch.device('cpu'))
    fast = load_model('zoo/new', torch.device('cpu'), lazy=True)
    ids = torch.arange(60)[None]
    assert fast.model.get_input_embeddings().weight.dtype == torch.float32
    assert fast.module(0, 'q').weight.dtype == fast_dtype(exact.hidden, torch.device('cpu'))
    with torch.no_grad(): found, true = (d.model(ids).logits.float() for d in (fast, exact))
    assert error(found, true) <= .02
    assert torch.equal(fast.stream(ids[0]), exact.stream(ids[0]))
