"""Feed-forward parts are carried apart from mixers where layers mix tokens in other ways"""
import sys, warnings
from functools import cache
from pathlib import Path
import pytest, torch
from models import effect_error, error, logits, tokens
from lorasuite.core.adapter import Adapter, update_energy
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder, model_info
from lorasuite.forecast.inspection import preview_transfer
from lorasuite.lab.zoo import new_tokenizer
from lorasuite.stages.alignment import align, Alignment, MIXES_OTHERWISE
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.transfer import split_by_role, transfer
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
from census_models import tiny_model, TOKENS
from test_upgrades import random_updates

FEW = probe_texts()[:16]
RECURRENT, FULL = 'linear_attention', 'full_attention'
MIXED, SHORT = ([RECURRENT, RECURRENT, FULL, RECURRENT], [RECURRENT, FULL, RECURRENT])
WAYS = { # old model type and settings, new model type and settings
    'attention to latent attention': ('llama', dict(num_hidden_layers=3), 'deepseek_v3',
                                      dict(num_hidden_layers=3, first_k_dense_replace=3)),
    'attention to recurrences': ('qwen3', dict(num_hidden_layers=4), 'qwen3_5_text',
                                 dict(num_hidden_layers=4, layer_types=MIXED)),
    'recurrences to attention': ('qwen3_5_text', dict(num_hidden_layers=3, layer_types=SHORT), 'llama',
                                 dict(num_hidden_layers=5))}

def mute(block):
    "Let the mixer of a block add nothing"
    for name, module in block.named_modules():
        if name.endswith(('o_proj', 'out_proj')): module.weight.data.zero_()

def copy_norm(norm, norm2):
    "Give a norm the gain of another one; Qwen3.5 keeps its gains less 1"
    less, less2 = (int('Qwen3_5' in type(one).__name__) for one in (norm, norm2))
    norm2.weight.data = norm.weight.data + less - less2

def take_over(old, new, order):
    "Give a new MLP the weights of an old one, its neurons in another order"
    for leaf in ('gate_proj', 'up_proj'):
        getattr(new.mlp, leaf).weight.data = getattr(old.mlp, leaf).weight.data[order].clone()
    new.mlp.down_proj.weight.data = old.mlp.down_proj.weight.data[:, order].clone()
    copy_norm(old.post_attention_layernorm, new.post_attention_layernorm)

@cache
def twins(way):
    "Two models of unlike mixers that add nothing: their MLPs are the same, so they compute the same"
    key, settings, key2, settings2 = WAYS[way]
    old, new = tiny_model(key, settings, 'old'), tiny_model(key2, settings2, 'old')
    wide = old.model.layers[0].mlp.up_proj.out_features
    assert wide == new.model.layers[0].mlp.up_proj.out_features
    for model in (old, new):
        for block in model.model.layers: mute(block)
    g = torch.Generator().manual_seed(1)
    for block, block2 in zip(old.model.layers, new.model.layers):
        take_over(block, block2, torch.randperm(wide, generator=g))
    for block in new.model.layers[len(old.model.layers):]: block.mlp.down_proj.weight.data.zero_()
    new.model.embed_tokens.weight.data = old.model.embed_tokens.weight.data.clone()
    new.lm_head.weight.data = old.lm_head.weight.data.clone()
    copy_norm(old.model.norm, new.model.norm)
    tokenizer = new_tokenizer(TOKENS, seed=1)
    return Decoder(old.eval(), tokenizer, 'random/old'), Decoder(new.eval(), tokenizer, 'random/new')

@cache
def upgrade(way):
    "The twins, an adapter of all that the old one has, their alignment and what came of it"
    old, new = twins(way)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        adapter, alignment = random_updates(old), align(old, new, FEW)
        return old, new, adapter, alignment, transfer(adapter, alignment)

def mlps(adapter):
    "The updates of MLPs alone"
    updates = {path: ab for path, ab in adapter.updates.items() if '.mlp.' in path}
    return Adapter(updates, adapter.base, adapter.layers)

@pytest.mark.parametrize('way', WAYS)
def test_MLPs_behind_unlike_mixers_are_carried_exactly(way):
    old, new, adapter, alignment, carried = upgrade(way)
    ids = tokens(TOKENS)
    assert error(logits(new, ids), logits(old, ids)) < 1e-5
    assert len(alignment.layers + alignment.feed_forward) == old.layers > len(alignment.layers)
    assert {*alignment.layers + alignment.feed_forward} == {(l, l) for l in range(old.layers)}
    assert effect_error(old, mlps(adapter), new, mlps(carried), ids) < 1e-4

@pytest.mark.parametrize('way', WAYS)
def test_what_mixes_is_named(way):
    old, new, adapter, alignment, carried = upgrade(way)
    info, halves = model_info(old), {l for l, _ in alignment.feed_forward}
    updates = split_by_role(adapter.named_for(info), info)[0]
    mixing = [(l, role) for l, role in updates if l in halves and '.mlp.' not in info.path(l, role)]
    alone = {f'{info.path(l, role)} ({role})' for l, role in mixing}
    assert alone and alone == {what for what, why in carried.skipped.items() if why == MIXES_OTHERWISE}
    assert not any('.mlp.' in what for what in carried.skipped)

@pytest.mark.parametrize('way', WAYS)
def test_the_energy_is_foretold(way):
    old, new, adapter, alignment, carried = upgrade(way)
    told, info = preview_transfer(adapter, old, new), model_info(old)
    updates = split_by_role(adapter.named_for(info), info)[0]
    sizes = {f'{info.path(l, role)} ({role})': update_energy(*ab) for (l, role), ab in updates.items()}
    kept = sum(size for what, size in sizes.items() if what not in carried.skipped)/sum(sizes.values())
    assert told['energy_range'][0] - 1e-6 <= kept <= told['energy_range'][1] + 1e-6
    if not alignment.layers: assert told['energy_range'] == pytest.approx((kept, kept))

def test_it_is_kept_in_files_and_in_cards(tmp_path):
    old, new, adapter, alignment, carried = upgrade('attention to recurrences')
    alignment.save(tmp_path/'a')
    again = Alignment.load(tmp_path/'a')
    assert again.layers == alignment.layers and again.feed_forward == alignment.feed_forward
    for kept, found in zip(again.blocks, alignment.blocks, strict=True): assert kept.unmatched == found.unmatched
    second = transfer(adapter, again)
    assert second.skipped == carried.skipped and second.updates.keys() == carried.updates.keys()
    arrows = ', '.join(f'{l}→{l2}' for l, l2 in alignment.feed_forward)
    assert f'feed-forward parts alone: {arrows}' in carried.card

def test_models_whose_layers_are_alike_have_no_such_pairs():
    old, new = load_model('zoo/old'), load_model('zoo/new')
    assert align(old, new, FEW).feed_forward == align(new, old, FEW).feed_forward == []

def test_without_any_like_part_it_is_refused():
    old, tokenizer = twins('attention to latent attention')[0], new_tokenizer(TOKENS, seed=1)
    new = Decoder(tiny_model('mamba', {}, 'old'), tokenizer, 'random/mamba')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        match = 'no feed-forward part is of the same kind.*lorasuite refresh'
        with pytest.raises(ValueError, match=match): align(old, new, FEW)

def test_the_MLP_of_a_layer_that_only_mixes_moves_on():
    "From layers with both to Nemotron H's, which only mix or only think"
    tokenizer = new_tokenizer(TOKENS, seed=1)
    old = Decoder(tiny_model('nemotron', dict(num_hidden_layers=2), 'old'), tokenizer, 'random/nemotron')
    layout = dict(layers_block_type=['attention', 'mlp', 'attention', 'mlp'], num_hidden_layers=4)
    new = Decoder(tiny_model('nemotron_h', layout, 'old'), tokenizer, 'random/nemotron_h')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        alignment = align(old, new, FEW)
        carried = transfer(random_updates(old), alignment)
    assert alignment.layers == [(0, 0), (1, 2)] and alignment.feed_forward == [(0, 1), (1, 3)]
    assert not carried.skipped

def test_biases_go_with_the_part_that_they_belong_to():
    "A layer whose mixer has one partner and whose MLP another"
    tokenizer = new_tokenizer(TOKENS, seed=1)
    old = Decoder(tiny_model('nemotron', dict(num_hidden_layers=2), 'old'), tokenizer, 'random/nemotron')
    layout = dict(layers_block_type=['attention', 'mlp', 'attention', 'mlp'], num_hidden_layers=4)
    new = Decoder(tiny_model('nemotron_h', layout, 'old'), tokenizer, 'random/nemotron_h')
    adapter = random_updates(old)
    g = torch.Generator().manual_seed(0)
    adapter.biases = {path: torch.randn(len(B), generator=g) for path, (_, B) in adapter.updates.items()}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        carried = transfer(adapter, align(old, new, FEW))
    assert not carried.skipped and carried.biases.keys() == carried.updates.keys()
    assert len(carried.biases) == len(adapter.biases) and all(b.any() for b in carried.biases.values())
