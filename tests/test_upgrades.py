"""Upgrades as people make them, on tiny stand-ins of both architectures: every update is carried or named"""
import sys, warnings
from collections import Counter
from functools import cache
from pathlib import Path
import pytest, torch
from models import effect
from lorasuite.core.adapter import Adapter, update_energy
from lorasuite.core.loading import load_model, load_skeleton
from lorasuite.core.model import model_info
from lorasuite.forecast.inspection import inspect, preview_transfer
from lorasuite.lab.zoo import new_tokenizer
from lorasuite.stages.alignment import align
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.transfer import split_by_role, transfer
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
from census_models import tiny_model, TOKENS

FEW = probe_texts()[:16]
UPGRADES = { # what people call it: model type of the old model, of the new one
    'Qwen2.5 to Qwen3': ('qwen2', 'qwen3'),
    'Qwen3 to Qwen3.5': ('qwen3', 'qwen3_5_text'),
    'Qwen3 to a Qwen3.5 that reads images': ('qwen3', 'multimodal/qwen3_5'),
    'Qwen3-30B-A3B to Qwen3.5-35B-A3B': ('qwen3_moe', 'qwen3_5_moe_text'),
    'Llama 3 to Llama 4': ('llama', 'llama4_text'),
    'Gemma 2 to Gemma 3': ('gemma2', 'gemma3_text'),
    'Gemma 2 to a Gemma 3 that reads images': ('gemma2', 'gemma3'),
    'Gemma 3 to Gemma 4': ('gemma3_text', 'gemma4_text'),
    'Mistral to Ministral 3': ('mistral', 'ministral3'),
    'Mixtral to Ministral 3': ('mixtral', 'ministral3'),
    'Phi-3 to Phi-4 multimodal': ('phi3', 'phi4_multimodal'),
    'Granite 3 to Granite 4': ('granite', 'granitemoehybrid'),
    'OLMo 2 to OLMo 3': ('olmo2', 'olmo3'),
    'OLMo 3 to OLMo Hybrid': ('olmo3', 'olmo_hybrid'),
    'SmolLM2 to SmolLM3': ('llama', 'smollm3'),
    'LFM2 to LFM3': ('lfm2', 'lfm3'),
    'DeepSeek V2 Lite to V3': ('deepseek_v2', 'deepseek_v3'),
    'GLM-4 to GLM-4.5': ('glm4', 'glm4_moe'),
    'Falcon to Falcon H1': ('falcon', 'falcon_h1')}

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A tiny model of a type, saved with its tokenizer"
    tokenizer = new_tokenizer(TOKENS, seed=1)
    @cache
    def save(key, size):
        folder = tmp_path_factory.mktemp(key.replace('/', '-'))
        tiny_model(key, {}, size).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    return save

def random_updates(decoder):
    "An adapter of every module that plays a role in a block"
    g, updates, info = torch.Generator().manual_seed(0), {}, model_info(decoder)
    for layer, block in enumerate(info.blocks):
        for module in dict.fromkeys(block.modules.values()):
            rows = block.fused_rows(module)
            out, inputs = sum(map(len, rows.values())), block.shapes[next(iter(rows))][1]
            A, B = torch.randn(2, inputs, generator=g)/inputs**.5, .2*torch.randn(out, 2, generator=g)
            updates[f'{info.stack}.{layer}.{module}'] = A, B
    return Adapter(updates, layers=info.layers)

@pytest.fixture(scope='module')
def carried(saved):
    "Old and new model, an adapter of all that the old one has, and what came of it"
    @cache
    def carry(name):
        old, new = (saved(key, size) for key, size in zip(UPGRADES[name], ('old', 'other')))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            old, new = load_model(old), load_model(new)
            adapter = random_updates(old)
            return old, new, adapter, transfer(adapter, align(old, new, FEW))
    return carry

@pytest.mark.parametrize('name', UPGRADES)
def test_every_role_is_carried_or_named(name, carried):
    old, new, adapter, found = carried(name)
    info = model_info(old)
    updates, outside = split_by_role(adapter.named_for(info), info)
    named = {f'{info.path(layer, role)} ({role})': (layer, role) for layer, role in updates}
    skipped = {named[what] for what in found.skipped if what in named}
    assert outside.keys() <= found.skipped.keys() and all(found.skipped.values())
    assert {*updates} - skipped
    info2 = model_info(new)
    updates2 = split_by_role(found, info2)[0]
    kinds = lambda places: Counter(role.partition('.')[0] if role.startswith('experts') else role for _, role in places)
    assert kinds({*updates} - skipped).keys() <= kinds(updates2).keys()
    assert all(torch.isfinite(t).all() for ab in found.updates.values() for t in ab)

@pytest.mark.parametrize('name', UPGRADES)
def test_what_comes_of_it_runs_in_PEFT(name, carried, tmp_path):
    old, new, adapter, found = carried(name)
    found.save(tmp_path/'carried')
    assert effect(new, torch.arange(2, 26)[None], Adapter.load(tmp_path/'carried')).norm() > 0

@pytest.mark.parametrize('name', UPGRADES)
def test_inspect_foretells_the_energy_that_is_carried(name, carried, saved):
    old, new, adapter, found = carried(name)
    report = inspect(*(saved(key, size) for key, size in zip(UPGRADES[name], ('old', 'other'))))
    skeletons = [load_skeleton(saved(key, size)) for key, size in zip(UPGRADES[name], ('old', 'other'))]
    told = preview_transfer(adapter, *skeletons)
    info = model_info(old)
    updates, outside = split_by_role(adapter.named_for(info), info)
    energy = {f'{info.path(layer, role)} ({role})': update_energy(*ab) for (layer, role), ab in updates.items()}
    energy |= {path: adapter.norm(path)**2 for path in outside}
    kept = sum(size for what, size in energy.items() if what not in found.skipped)/sum(energy.values())
    undecided = {what for what in energy if what in found.skipped and found.skipped[what].startswith('its inner')}
    share = kept + sum(energy[what] for what in undecided)/sum(energy.values())
    least, most = told['energy_range']
    assert least - 1e-6 <= share <= most + 1e-6 and least - 1e-6 <= told['energy'] <= most + 1e-6
    alike = len({*info.blocks[0].mixers} ^ {*model_info(new).blocks[0].mixers}) == 0
    settled = len({id(block) for i in (info, model_info(new)) for block in i.blocks}) == 2 and alike
    if settled: assert least == pytest.approx(most, abs=1e-6)
    assert report['sizes']['layers'] == (old.layers, new.layers)

@pytest.mark.parametrize('name', sorted({key for pair in UPGRADES.values() for key in pair}))
def test_to_itself_all_of_an_adapter_is_foretold_and_carried(name, saved):
    old = load_skeleton(saved(name, 'old'))
    told = preview_transfer(random_updates(load_model(saved(name, 'old'))), old, old)
    refused = bool(told['skipped']) # the output projection of Falcon H1's Mamba, by PEFT
    assert (told['energy'] == pytest.approx(1, abs=1e-6)) is not refused and refused is (name == 'falcon_h1')
