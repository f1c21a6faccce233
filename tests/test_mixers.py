"""Oracles for kinds of parts: the changes keep what a model computes, and adapters are carried to the changed model"""
import re, warnings
from copy import deepcopy
from functools import cache
import pytest, torch
from mixers import (KINDS, effect, effect_error, expert_parameters, merged_by_hand, peft_updates, random_adapter,
                    random_updates, without_skipped)
from models import error, largest_drift, random_decoder, tokens
from torch import nn
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder, model_info
from lorasuite.stages.alignment import align
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.transfer import transfer

FEW = probe_texts()[:16]

@pytest.fixture(scope='module')
def pair(): return cache(lambda name: KINDS[name].pair())

@pytest.mark.parametrize('name', KINDS)
def test_a_changed_model_computes_the_same(name, pair):
    old, new, truth = pair(name)
    with torch.no_grad(): assert error(new(tokens()).logits, old(tokens()).logits) <= 2e-5
    P = truth['stream']
    assert P.shape == (new.config.hidden_size, old.config.hidden_size)
    assert ((P.T@P - torch.eye(P.shape[1])).abs() < 1e-9).all()

@pytest.mark.parametrize('name', KINDS)
def test_units_took_new_places(name, pair):
    truth = pair(name)[2]
    orders = [t for place, t in truth.items() if place not in ('stream', 'layers') and t.dtype == torch.long]
    assert len(orders) >= 3
    for order in orders:
        for row in order.view(-1, order.shape[-1]):
            units = row[row >= 0].tolist()
            assert sorted(units) == [*range(len(units))]
    assert any(order.tolist() != sorted(order.tolist()) for order in orders)

@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss', 'llama4', 'qwen3_next', 'falcon_h1', 'jamba'])
def test_what_PEFT_adds_is_what_a_merge_by_hand_adds(name, pair, tmp_path):
    old = pair(name)[0]
    folder = random_adapter(old, tmp_path/'adapter')
    updates = peft_updates(old, folder)
    assert {p.partition('[')[0] for p in updates} >= {*expert_parameters(old)}
    with torch.no_grad(): found = merged_by_hand(old, updates)(tokens()).logits - old(tokens()).logits
    assert error(found, effect(old, folder, tokens())) <= 1e-4

def align_saved(old, new, tokenizer, folder):
    "Save both models with a tokenizer, and align what was saved"
    for model, name in ((old, 'old'), (new, 'new')):
        model.save_pretrained(folder/name)
        tokenizer.save_pretrained(folder/name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return align(folder/'old', folder/'new', FEW)

SKIPPED = dict( # kind: what is skipped by name, by the end of its path; everything else is carried
    jamba={'mamba.dt_proj'}, # its weight is read past the module, so that an adapter has no effect until it is merged
    falcon_h1={'mamba.out_proj'}, # PEFT refuses it
    gemma4={'per_layer_model_projection'}) # outside the blocks: what it computes enters every block

def check_skipped(name, found, adapter):
    "Only what is expected is skipped, and with a reason"
    ends = {re.sub(r'.*layers\.\d+\.|^model\.', '', what.partition(' (')[0]) for what in found}
    updated = ' '.join(adapter.updates)
    assert ends == {end for end in SKIPPED.get(name, set()) if end in updated} # PEFT adapts not all of them
    assert all(found.values())

@pytest.mark.parametrize('name', KINDS)
def test_every_update_is_carried_to_a_changed_model(name, pair, tokenizer, tmp_path):
    old, new, _ = pair(name)
    adapter = random_updates(old)
    alignment = align_saved(old, new, tokenizer, tmp_path)
    carried = transfer(adapter, alignment)
    check_skipped(name, carried.skipped, adapter)
    kept = without_skipped(adapter, carried.skipped)
    assert effect_error(old, new, kept, carried, tokens()) <= 1e-3
    assert largest_drift(carried, alignment, *map(load_model, (tmp_path/'old', tmp_path/'new'))) <= 1e-3

@pytest.mark.parametrize('name', KINDS)
def test_adapters_of_PEFT_are_read_carried_and_written(name, pair, tokenizer, tmp_path):
    old, new, _ = pair(name)
    folder = random_adapter(old, tmp_path/'adapter')
    adapter, true = Adapter.load(folder).named_for(model_info(Decoder(old))), peft_updates(old, folder)
    assert adapter.updates.keys() | adapter.skipped.keys() == true.keys()
    for path in adapter.updates: assert error(adapter.delta(path), true[path]) <= 1e-5
    carried = transfer(adapter, align_saved(old, new, tokenizer, tmp_path))
    check_skipped(name, {path: why for path, why in carried.skipped.items() if path not in adapter.skipped}, adapter)
    kept = without_skipped(adapter, carried.skipped)
    carried.save(tmp_path/'carried')
    assert effect_error(old, new, kept, tmp_path/'carried', tokens()) <= 1e-3

class SeparateExperts(nn.Module):
    "Experts that are modules of their own, of which each token passes one"
    def __init__(self, mlp, experts=3):
        super().__init__()
        self.gate = nn.Linear(mlp.hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(deepcopy(mlp) for _ in range(experts))
        for p in self.experts.parameters(): nn.init.normal_(p, std=.1)

    def forward(self, x):
        scores, choice = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for n, expert in enumerate(self.experts): out[choice == n] = expert(x[choice == n])
        return scores[..., None]*out

def test_experts_that_are_modules_of_their_own_are_skipped_by_name(tokenizer):
    old = random_decoder(tokenizer, layers=2)
    old.model.model.layers[1].mlp = SeparateExperts(old.model.model.layers[1].mlp)
    old = Decoder(old.model, tokenizer, 'separate')
    adapter = random_updates(old.model)
    carried = transfer(adapter, align(old, old, FEW))
    experts = [path for path in adapter.updates if '.experts.' in path]
    assert len(experts) == 9 and carried.skipped.keys() == {*experts} == adapter.updates.keys() - carried.updates.keys()
    assert all('is part of an expert that is a module of its own' in why for why in carried.skipped.values())
    kept = without_skipped(adapter, carried.skipped)
    assert effect_error(old.model, old.model, kept, carried, tokens()) <= 1e-3
