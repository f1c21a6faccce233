"""A dozen of the census: one architecture for each kind of part"""
import sys, warnings
from pathlib import Path
import pytest
import transformers
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import census
from census import examine
from census_models import architectures, chosen_layers, class_names, kind_of, tiny_model

PARTS = dict( # architecture: what it stands for
    llama='one kind of block', cohere2='parallel branches and absent rotary', gpt2='fused and transposed maps',
    qwen3='norms of queries and keys', gemma3_text='sliding layers and norms on both sides',
    mixtral='experts', gpt_oss='sinks and biased experts', qwen3_next='gated delta nets beside gated attention',
    deepseek_v3='latent attention and dense first layers', granitemoehybrid='Mamba 2 beside attention',
    lfm2='short convolutions', diffllama='differential attention', gemma3='a multimodal wrapper')

@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

@pytest.mark.parametrize('name', PARTS)
def test_adapter_comes_through(name, tmp_path):
    entry = examine(name, tmp_path)
    assert entry['verdict'] in ('exact', 'exact_named'), entry
    assert entry['updates'] and not entry['lost']
    assert .05 < entry['effect'] < 1 and entry['error'] <= 1e-5
    assert entry['other_size'] == 'ok'

def test_a_wrong_transfer_is_found_out(tmp_path, monkeypatch):
    right = census.transfer
    def wrong(adapter, alignment):
        carried = right(adapter, alignment)
        path = next(iter(carried.updates))
        A, B = carried.updates[path]
        carried.updates[path] = A, 1.01*B
        return carried
    monkeypatch.setattr(census, 'transfer', wrong)
    assert examine('llama', tmp_path)['verdict'] == 'wrong'

def test_a_lost_update_is_found_out(tmp_path, monkeypatch):
    right = census.transfer
    def careless(adapter, alignment):
        carried = right(adapter, alignment)
        carried.updates.popitem()
        return carried
    monkeypatch.setattr(census, 'transfer', careless)
    entry = examine('llama', tmp_path)
    assert entry['verdict'] == 'lost' and len(entry['lost']) == 1

def test_what_is_named_as_skipped_is_no_error(tmp_path, monkeypatch):
    right = census.transfer
    def honest(adapter, alignment):
        carried = right(adapter, alignment)
        path, _ = carried.updates.popitem()
        carried.skipped[path] = f'{path} has no partner'
        return carried
    monkeypatch.setattr(census, 'transfer', honest)
    entry = examine('llama', tmp_path)
    assert entry['verdict'] == 'exact_named' and [*entry['skipped']] == ['… has no partner']

def test_every_key_is_in_the_census():
    names = {*architectures()}
    for table in ('CAUSAL_LM', 'IMAGE_TEXT_TO_TEXT'):
        keys = getattr(transformers.models.auto.modeling_auto, f'MODEL_FOR_{table}_MAPPING_NAMES')
        assert {*keys} <= {name.removeprefix('multimodal/') for name in names}
    assert names > {*class_names()}

def test_every_kind_of_layer_is_kept():
    kinds = ['a']*5 + ['b'] + ['a']*5 + ['c']
    assert chosen_layers(dict(kinds=kinds), len(kinds), 4) == [0, 1, 5, 11]

@pytest.mark.parametrize('key, kinds', [
    ('qwen3_5_text', {'linear_attention', 'full_attention'}), ('lfm2', {'conv', 'full_attention'}),
    ('granitemoehybrid', {'linear_attention', 'full_attention'}), ('cohere2', {'sliding_attention', 'full_attention'})])
def test_hybrids_are_hybrid(key, kinds): assert {*tiny_model(key, {}).config.layer_types} == kinds

def test_models_are_random_in_every_gain_and_bias():
    params = dict(tiny_model('qwen2', {}).named_parameters())
    vectors = {name: p for name, p in params.items() if p.ndim == 1}
    assert any('norm' in name for name in vectors) and any(name.endswith('bias') for name in vectors)
    assert all(p.std() > .01 for p in vectors.values())

def test_kinds():
    assert {k: kind_of(k) for k in ('llama', 'bert', 'bart', 'xlnet')} == dict(
        llama='decoder', bert='encoder', bart='encoder-decoder', xlnet='other')
