"lora_bias: read, put on its model, carried, joined and written as PEFT means it"
import copy, json
from dataclasses import replace
import pytest, torch
from models import effect, effect_error, error, logits, random_decoder, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_laws import enlarge
from lorasuite.core.adapter import Adapter
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer

FILE, SETTINGS = 'adapter_model.safetensors', 'adapter_config.json'
ALL = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj', 'lm_head']
FEW = ['Who lives in the old mill by the river?']*8
pytestmark = pytest.mark.filterwarnings('ignore')

@torch.no_grad()
def made(decoder, folder, **config):
    "Files of PEFT with random biases, and the logits that PEFT computes with them"
    torch.manual_seed(0)
    settings = dict(r=2, lora_alpha=6, lora_bias=True, target_modules=ALL, task_type='CAUSAL_LM') | config
    model = get_peft_model(copy.deepcopy(decoder.model), LoraConfig(**settings)).eval()
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return Adapter.load(folder), model(tokens()).logits

@pytest.fixture(scope='module')
def old(tokenizer): return random_decoder(tokenizer, layers=2)

@pytest.fixture(scope='module')
def biased(old, tmp_path_factory):
    return made(old, tmp_path_factory.mktemp('biases')/'a', alpha_pattern={'q_proj': 1}, use_rslora=True)

def test_it_is_read_and_written_as_PEFT_runs_it(old, biased, tmp_path):
    adapter, true = biased
    assert adapter.biases.keys() == adapter.updates.keys() and len(adapter.biases) == 15
    assert error(logits(old, tokens(), adapter), true) <= 1e-5
    assert error(logits(old, tokens(), replace(adapter, biases={})), true) > .01
    one = 'model.layers.0.self_attn.q_proj'
    some = replace(adapter, biases={path: b for path, b in adapter.biases.items() if path != one})
    for compact in (False, True):
        some.save(tmp_path/f'{compact}', compact=compact)
        assert json.loads((tmp_path/f'{compact}'/SETTINGS).read_text())['lora_bias'] is True
        again = Adapter.load(tmp_path/f'{compact}')
        assert again.biases.keys() == some.biases.keys()
        assert all(torch.allclose(again.biases[path], b, atol=1e-6) for path, b in some.biases.items())

def test_the_laws(old, biased):
    adapter, _ = biased
    to_itself = transfer(adapter, align(old, old, FEW))
    assert not to_itself.skipped and effect_error(old, adapter, old, to_itself) <= 1e-4
    new, _, new_id = enlarge(old, hidden=96, heads=6, kv_heads=3, layers=3, intermediate=130)
    carried = transfer(adapter, align(old, new))
    assert effect_error(old, adapter, new, carried, new_id=new_id) <= 1e-3

def test_it_is_merged_where_the_base_has_biases(tokenizer, tmp_path):
    old = random_decoder(tokenizer, 'qwen2', layers=2)
    adapter, true = made(old, tmp_path/'a', target_modules=['q_proj', 'v_proj'])
    transfer(adapter, align(old, old, FEW)).save(tmp_path/'b')
    model = PeftModel.from_pretrained(copy.deepcopy(old.model), str(tmp_path/'b')).merge_and_unload()
    with torch.no_grad(): assert error(model(tokens()).logits, true) <= 1e-5

PARTS = dict(qkv_proj=('q_proj', 'k_proj', 'v_proj'), gate_up_proj=('gate_proj', 'up_proj'))

def fused(llama):
    "The same model as Phi-3: one matrix for q, k and v, and one for gate and up"
    phi = random_decoder(llama.tokenizer, 'phi3', layers=2, rms_norm_eps=llama.model.config.rms_norm_eps).model
    own = llama.model.state_dict()
    for name in [*own]:
        for part, (first, *rest) in PARTS.items():
            if first in name:
                whole = [own.pop(name)] + [own.pop(name.replace(first, other)) for other in rest]
                own[name.replace(first, part)] = torch.cat(whole)
    phi.load_state_dict(own)
    return Decoder(phi, llama.tokenizer, 'random/fused')

def test_biases_of_joined_and_split_projections(old, biased):
    adapter, true = biased
    phi = fused(old)
    assert error(logits(phi, tokens()), logits(old, tokens())) <= 1e-5
    assert error(logits(phi, tokens(), adapter), true) <= 1e-5
    carried = transfer(adapter, align(old, phi, FEW))
    assert 'model.layers.0.self_attn.qkv_proj' in carried.biases
    assert effect_error(old, adapter, phi, carried) <= 1e-4
    assert error(effect(old, tokens(), carried), effect(phi, tokens(), carried)) <= 1e-4

@pytest.mark.parametrize('change, message', [
    (lambda s, t: s.update(lora_bias=False), 'does not set lora_bias, so that PEFT leaves it out'),
    (lambda s, t: [t.pop(key) for key in [*t] if key.endswith('q_proj.lora_B.bias')], 'no lora_B.bias for .*q_proj'),
    (lambda s, t: t.update({k: b[1:].clone() for k, b in t.items() if '.bias' in k}), 'one finite lora_B.bias for')])
def test_biases_that_settings_or_tensors_contradict(old, tmp_path, change, message):
    made(old, tmp_path/'a', target_modules=['q_proj', 'v_proj'])
    said, tensors = json.loads((tmp_path/'a'/SETTINGS).read_text()), load_file(tmp_path/'a'/FILE)
    change(said, tensors)
    (tmp_path/'a'/SETTINGS).write_text(json.dumps(said))
    save_file(tensors, tmp_path/'a'/FILE)
    with pytest.raises(ValueError, match=message): Adapter.load(tmp_path/'a')

def test_files_that_cannot_hold_them(old, biased, tmp_path):
    adapter = replace(biased[0], base='zoo/old')
    for format in ('mlx', 'gguf'):
        with pytest.raises(ValueError, match='has no place for .*lora_bias: give --format peft'):
            adapter.save(tmp_path/format, format=format)
        assert not (tmp_path/format).exists()

def test_beside_an_update_of_the_embedding_they_are_named(old, biased):
    adapter = replace(biased[0], embeddings={'model.embed_tokens': (torch.randn(2, 512), torch.randn(64, 2))})
    carried = transfer(adapter, align(old, old, FEW))
    assert not carried.biases and 'has no lora_bias beside' in carried.card
    assert carried.skipped.keys() == {f'{path}.lora_B.bias' for path in adapter.biases}
