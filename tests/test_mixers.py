"""Oracles for kinds of parts: the changes keep what a model computes, and adapters are carried to the changed model"""
import warnings
from functools import cache
import pytest, torch
from mixers import (KINDS, effect, effect_error, expert_parameters, merged_by_hand, peft_updates, random_adapter,
                    random_updates, without_skipped)
from models import error, tokens
from lorasuite.core.adapter import Adapter
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

CARRIED = {'olmo2'}
LATER = pytest.mark.xfail(reason='a part of this model is not carried yet', strict=True)
KINDS_SO_FAR = [pytest.param(name, marks=[] if name in CARRIED else LATER) for name in KINDS]

@pytest.mark.parametrize('name', KINDS_SO_FAR)
def test_every_update_is_carried_to_a_changed_model(name, pair, tokenizer, tmp_path):
    old, new, _ = pair(name)
    adapter = random_updates(old)
    carried = transfer(adapter, align_saved(old, new, tokenizer, tmp_path))
    kept = without_skipped(adapter, carried.skipped)
    assert kept.updates.keys() == adapter.updates.keys()
    assert effect_error(old, new, kept, carried, tokens()) <= 1e-3

@pytest.mark.parametrize('name', KINDS_SO_FAR)
def test_adapters_of_PEFT_are_read_carried_and_written(name, pair, tokenizer, tmp_path):
    old, new, _ = pair(name)
    folder = random_adapter(old, tmp_path/'adapter')
    adapter, true = Adapter.load(folder), peft_updates(old, folder)
    assert adapter.updates.keys() | adapter.skipped.keys() == true.keys()
    for path in adapter.updates: assert error(adapter.delta(path), true[path]) <= 1e-5
    carried = transfer(adapter, align_saved(old, new, tokenizer, tmp_path))
    kept = without_skipped(adapter, carried.skipped)
    carried.save(tmp_path/'carried')
    assert effect_error(old, new, kept, tmp_path/'carried', tokens()) <= 1e-3
