"""Adapters as PEFT writes them: read, written, loaded, refused"""
import copy, json, warnings
import pytest, torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from models import effect, effect_error, error, logits, random_decoder, tokens
from test_laws import enlarge
from lorasuite.core import formats
from lorasuite.core.adapter import Adapter, attach, balance, format_names
from lorasuite.core.architecture import ROLES
from lorasuite.core.files import atomic_directory
from lorasuite.core.formats.peft import PREFIX, READERS
from lorasuite.core.loading import load_model, weight_hashes
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.training.finetune import finetune

SEVEN = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
FILE = 'adapter_model.safetensors'

def by_peft(decoder, path, config=None, **kwargs):
    "Let PEFT make an adapter and save it"
    config = config or LoraConfig(**dict(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM') | kwargs)
    model = get_peft_model(copy.deepcopy(decoder.model), config)
    for name, p in model.named_parameters():
        if 'lora_B' in name or 'lora_embedding_A' in name: p.data.normal_(std=.05)
    model.save_pretrained(path)
    return path

def edit(path, change):
    "Change the tensors of a saved adapter"
    tensors = load_file(path/FILE)
    change(tensors)
    save_file(tensors, path/FILE)
    return path

# ---- reading and writing

READ = [dict(), dict(use_rslora=True, lora_alpha=32), dict(target_modules=SEVEN), dict(layers_to_transform=[1, 3]),
        dict(target_modules=r'.*\.[13]\.mlp\.(up|down)_proj'), dict(rank_pattern={'q_proj': 2}),
        dict(alpha_pattern={r'layers\.1\.self_attn\.q_proj': 2}, rank_pattern={'v_proj': 6}),
        dict(init_lora_weights='gaussian'), dict(target_modules='all-linear'),
        dict(target_modules=['embed_tokens', 'lm_head', 'k_proj']),
        dict(target_modules=['embed_tokens'], use_rslora=True)]

@pytest.mark.parametrize('settings', READ)
@pytest.mark.filterwarnings('ignore')
def test_reads_what_peft_computes(decoder, tmp_path, settings):
    path, ids = by_peft(decoder, tmp_path/'a', **settings), tokens()
    model = PeftModel.from_pretrained(decoder.model, str(path))
    with torch.no_grad(): true = model(ids).logits
    model.unload()
    assert error(logits(decoder, ids, Adapter.load(path)), true) <= 1e-6

def ada(decoder, path, alpha=8):
    "An AdaLoRA with a module that lost some ranks and one that lost all"
    keep = {'q_proj': [True, False, True, True], 'up_proj': [True]*4, 'v_proj': [False]*4}
    config = AdaLoraConfig(init_r=4, lora_alpha=alpha, total_step=10, target_modules=[*keep], task_type='CAUSAL_LM')
    model = get_peft_model(copy.deepcopy(decoder.model), config)
    pattern = {}
    for name, p in model.named_parameters():
        if 'lora_E' not in name: continue
        kept = keep[name.split('.')[-3]]
        p.data.normal_(std=9.)
        p.data *= torch.tensor(kept)[:, None]
        pattern[name.removeprefix(PREFIX)] = kept
    model.peft_config['default'].rank_pattern = pattern
    model.save_pretrained(path)
    return path

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('alpha', [8, 0])
def test_reads_adalora_as_peft_does(decoder, tmp_path, alpha):
    torch.manual_seed(0)
    path, ids = ada(decoder, tmp_path/'a', alpha), tokens()
    model = PeftModel.from_pretrained(decoder.model, str(path))
    with torch.no_grad(): true = model(ids).logits
    model.unload()
    read = Adapter.load(path)
    assert error(logits(decoder, ids, read), true) <= 1e-6
    assert error(true, logits(decoder, ids)) > .01
    assert sorted({len(A) for A, _ in read.updates.values()}) == [3, 4]
    assert not any('v_proj' in p for p in read.updates)
    check = edit(path, lambda t: [t.pop(k) for k in [*t] if 'q_proj.lora_E' in k])
    message = 'q_proj has lora_A and lora_B, but should have lora_A and lora_B and lora_E'
    with pytest.raises(ValueError, match=message): Adapter.load(check)

def test_round_trip(decoder, adapter, tmp_path):
    adapter.save(tmp_path/'a')
    again = Adapter.load(tmp_path/'a')
    assert again.updates.keys() == adapter.updates.keys() and again.base == adapter.base
    for p, (A, B) in adapter.updates.items():
        assert again.updates[p][0].equal(A) and again.updates[p][1].equal(B)
    assert sorted(f.name for f in (tmp_path/'a').iterdir()) == ['README.md', 'adapter_config.json', FILE]
    config = json.loads((tmp_path/'a'/'adapter_config.json').read_text())
    assert config['peft_type'] == 'LORA' and config['r'] == config['lora_alpha'] == 4 and not config['use_rslora']

TOY_FORMAT = """
from pathlib import Path
import torch
from lorasuite.core.adapter import Adapter

def read(name): return Adapter(torch.load(Path(name)/'toy.pt'))
def write(adapter, folder): torch.save(adapter.updates, folder/'toy.pt')
"""

def test_an_output_format_is_one_new_file(adapter, tmp_path, monkeypatch):
    (tmp_path/'formats').mkdir()
    (tmp_path/'formats'/'toy.py').write_text(TOY_FORMAT)
    with pytest.raises(ValueError, match="no format 'toy' for adapters: give one of .*peft"):
        adapter.save(tmp_path/'early', format='toy')
    assert not (tmp_path/'early').exists()
    monkeypatch.setattr(formats, '__path__', [*formats.__path__, str(tmp_path/'formats')])
    assert {'peft', 'toy'} <= {*format_names()}
    adapter.save(tmp_path/'out', format='toy')
    assert [f.name for f in (tmp_path/'out').iterdir()] == ['toy.pt']
    again = Adapter.load(tmp_path/'out', format='toy')
    assert again.updates.keys() == adapter.updates.keys()
    assert all(again.delta(p).equal(adapter.delta(p)) for p in adapter.updates)

def read_loha(tensors, config, file):
    "LoHa: the elementwise product of two products of rank r is a product of rank r²"
    found = Adapter({})
    for key in [k for k in tensors if k.endswith('.hada_w1_a')]:
        B1, A1, B2, A2 = (tensors[key.replace('w1_a', name)] for name in ('w1_a', 'w1_b', 'w2_a', 'w2_b'))
        A, B = (A1[:, None]*A2).flatten(0, 1), (B1[:, :, None]*B2[:, None]).flatten(1)
        found.updates[key.removeprefix(PREFIX).removesuffix('.hada_w1_a')] = A, B*config.alpha/config.r
    return found

def test_a_kind_of_adapter_is_one_reader_in_the_table(decoder, tmp_path, monkeypatch):
    model, ids = copy.deepcopy(decoder.model), tokens()
    model = get_peft_model(model, LoHaConfig(r=2, alpha=4, target_modules=['q_proj', 'up_proj'], task_type='CAUSAL_LM'))
    for name, p in model.named_parameters():
        if 'hada' in name: p.data.normal_(std=.2)
    with torch.no_grad(): true = model(ids).logits
    model.save_pretrained(tmp_path/'a')
    with pytest.raises(ValueError, match='LOHA adapter, not a LoRA'): Adapter.load(tmp_path/'a')
    monkeypatch.setitem(READERS, 'LOHA', read_loha)
    read = Adapter.load(tmp_path/'a')
    assert {len(A) for A, _ in read.updates.values()} == {4} and len(read.updates) == 2*decoder.layers
    assert error(logits(decoder, ids, read), true) <= 1e-5
    assert error(true, logits(decoder, ids)) > .01

def test_an_adapter_shows_itself_in_a_notebook(adapter):
    html = adapter._repr_html_()
    assert f'<code>{adapter.base}</code>' in html
    for leaf in SEVEN: assert f'<td>{leaf}</td><td>{adapter.layers}</td><td>4</td>' in html
    for layer in range(adapter.layers): assert f'<th>layer {layer}</th>' in html
    one = Adapter({'layers.1.up': (torch.ones(1, 2), torch.ones(3, 1))}, base='<a> & <b>', skipped={'<i>': 'why'})
    one.updates['head'] = torch.ones(2, 2), torch.ones(3, 2)
    html = one._repr_html_()
    assert '&lt;a&gt; &amp; &lt;b&gt;' in html and '&lt;i&gt;' in html and '<a>' not in html and '<i>' not in html
    assert '<td>1</td><td>1</td><td>20%</td>' in html and '<td>1</td><td>2</td><td>80%</td>' in html
    assert '<th>layer 1</th><th>elsewhere</th>' in html
    assert '<table>' in Adapter({})._repr_html_()

def test_the_model_is_as_before_without_the_adapter(decoder, adapter):
    ids, before = tokens(), copy.deepcopy(decoder.model.state_dict())
    with pytest.raises(RuntimeError, match='inside'):
        with adapter.on(decoder): raise RuntimeError('inside')
    after = decoder.model.state_dict()
    assert after.keys() == before.keys()
    assert all(t.equal(before[k]) for k, t in after.items())
    assert effect(decoder, ids, adapter).abs().max() > .01

@pytest.mark.parametrize('rank, out, inp', [(4, 16, 24), (24, 16, 24), (40, 16, 24), (40, 24, 16)])
def test_balance(rank, out, inp, monkeypatch):
    "No decomposition is larger than the smaller side"
    torch.manual_seed(0)
    eigh, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, 'eigh', lambda X: sizes.append(len(X)) or eigh(X))
    A, B = torch.randn(rank, inp), torch.randn(out, rank)
    A2, B2 = balance(A, B)
    assert torch.allclose(B2@A2, (B@A).double(), atol=1e-5) and abs(A2.norm() - B2.norm()) < 1e-6
    assert len(A2) == B2.shape[1] == min(rank, out, inp) and {*sizes} == {len(A2)}

# ---- the carried adapter is an ordinary PEFT adapter

def check_loads(path, decoder):
    "PEFT must load the adapter with no missing, unexpected or unused key"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = PeftModel.from_pretrained(decoder.model, str(path))
    minor = FutureWarning, DeprecationWarning
    complaints = [str(w.message) for w in caught if not issubclass(w.category, minor)]
    in_model, in_file = get_peft_model_state_dict(model), load_file(path/FILE)
    model.unload()
    assert complaints == []
    assert in_model.keys() == in_file.keys()
    assert all(in_model[k].float().cpu().equal(in_file[k]) for k in in_file)
    return in_file

def test_carried_adapter_loads_on_the_new_tiny_model(tmp_path):
    new = load_model('zoo/new')
    carried = transfer('zoo/adapter', align('zoo/old', new))
    carried.save(tmp_path/'carried')
    assert len(check_loads(tmp_path/'carried', new)) == 2*len(ROLES)*new.layers
    card = (tmp_path/'carried'/'README.md').read_text()
    assert f'base_model: {new.name}' in card
    assert 'new layers without a partner (updates untrained after the transfer): 2, 4' in card
    for name in ('zoo/old', 'zoo/new'): assert weight_hashes(name)['model.safetensors'] in card
    tuned, _ = finetune(new, [dict(instruction='Who?', output='Ann')]*3, carried, steps=1)
    assert tuned.card.startswith(card) and 'Tuned afterwards on 3 labelled examples' in tuned.card

SOME = [dict(), dict(layers_to_transform=[0, 2]),
        dict(target_modules=['q_proj', 'down_proj'], rank_pattern={r'layers\.3\.mlp\.down_proj': 7})]

@pytest.mark.parametrize('settings', SOME)
def test_carried_adapters_of_some_modules_load(decoder, tokenizer, tmp_path, settings):
    sizes = dict(hidden=96, layers=6, heads=6, kv_heads=3, head_dim=16, intermediate=120)
    other = random_decoder(tokenizer, seed=1, **sizes)
    transfer(by_peft(decoder, tmp_path/'a', **settings), align(decoder, other)).save(tmp_path/'carried')
    check_loads(tmp_path/'carried', other)

# ---- refusals, by name

START = "init_lora_weights='{}'.*path_initial_model_for_weight_conversion"
IA3 = IA3Config(target_modules=['k_proj', 'v_proj', 'down_proj'], feedforward_modules=['down_proj'],
                task_type='CAUSAL_LM')
REFUSED = dict(
    tied=(dict(target_modules=['embed_tokens'], ensure_weight_tying=True), 'ensure_weight_tying is not carried'),
    replicated=(dict(layer_replication=[(0, 2), (1, 3)]), 'layer_replication is not carried'),
    pissa=(dict(init_lora_weights='pissa'), START.format('pissa')),
    pissa_fast=(dict(init_lora_weights='pissa_niter_4'), START.format('pissa_niter_4')),
    olora=(dict(init_lora_weights='olora'), START.format('olora')),
    ia3=(dict(config=IA3), 'IA3 adapter, not a LoRA'),
    activated=(dict(alora_invocation_tokens=[5, 6]), 'alora_invocation_tokens is not carried'),
)

@pytest.fixture(scope='module')
def to_itself(decoder): return align(decoder, decoder)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', REFUSED)
def test_refuses(decoder, to_itself, tmp_path, name):
    settings, message = REFUSED[name]
    path = by_peft(decoder, tmp_path/'a', **settings)
    with pytest.raises(ValueError, match=message): transfer(path, to_itself)

FEW = ['Who lives in the old mill by the river?']*8
SKIPPED = dict(
    full_weights=(dict(modules_to_save=['lm_head']), ['lm_head.weight']),
    biases=(dict(bias='all'), [f'model.layers.0.self_attn.{p}.bias' for p in ('k_proj', 'q_proj.base_layer')]),
)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SKIPPED)
def test_skips_by_name(decoder, tmp_path, name):
    settings, keys = SKIPPED[name]
    model = random_decoder(decoder.tokenizer, attention_bias=True) if name == 'biases' else decoder
    source = Adapter.load(by_peft(model, tmp_path/'a', **settings))
    carried = transfer(source, align(model, model, FEW))
    assert {*keys} <= carried.skipped.keys()
    assert all('full weight' in why for why in carried.skipped.values())
    in_file = {k.removeprefix(PREFIX) for k in load_file(tmp_path/'a'/FILE)}
    updates = {f'{p}.lora_{s}.weight' for p in source.updates for s in 'AB'}
    assert in_file == {*carried.skipped} | updates # every key is accounted for
    assert all(f'`{key}`' in carried.card for key in carried.skipped)
    carried.save(tmp_path/'carried')
    check_loads(tmp_path/'carried', model)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('tied', [True, False])
def test_tokens_trained_or_added_with_the_adapter(tokenizer, tmp_path, tied):
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens(dict(additional_special_tokens=['<call>']))
    call, ids = chat.get_vocab()['<call>'], tokens()
    ids[:, ::5] = call
    old = random_decoder(chat, tie_word_embeddings=tied)
    trained = [call, 7] if tied else {'embed_tokens': [call, 7], 'lm_head': [9, call]}
    config = LoraConfig(r=4, target_modules=['q_proj'], task_type='CAUSAL_LM', trainable_token_indices=trained)
    model = get_peft_model(copy.deepcopy(old.model), config)
    for name, p in model.named_parameters():
        if 'lora_B' in name or 'trainable_tokens_delta' in name: p.data += .1*torch.randn_like(p)
    model.save_pretrained(tmp_path/'a')
    adapter = Adapter.load(tmp_path/'a')
    with torch.no_grad(): assert error(logits(old, ids, adapter), model(ids).logits) <= 1e-6
    new, _, new_id = enlarge(old, words=True, hidden=96, heads=6, kv_heads=3)
    carried = transfer(adapter, align(old, new))
    assert not carried.skipped and [p for p in carried.rows] == [*dict.fromkeys([*adapter.rows, 'lm_head'])]
    assert effect_error(old, adapter, new, carried, ids=ids, new_id=new_id) <= 1e-3
    carried.save(tmp_path/'carried')
    assert effect_error(old, adapter, new, Adapter.load(tmp_path/'carried'), ids=ids, new_id=new_id) <= 1e-3
    joined = transfer(adapter, align(old, random_decoder(chat, tie_word_embeddings=True, seed=1)))
    assert [*joined.rows] == ['model.embed_tokens']
    assert ('lm_head (head)' in joined.skipped) == (not tied)
    narrow = Adapter(adapter.updates, rows={p: (i, X[:, 1:]) for p, (i, X) in adapter.rows.items()})
    with pytest.raises(ValueError, match='is 2×63, the weight of .* is 2×64: was it trained on another model'):
        transfer(narrow, align(old, new))
    unaware = random_decoder(tokenizer, seed=1)
    lost = transfer(adapter, align(old, unaware)).skipped
    assert f'model.embed_tokens, token {call}' in lost
    assert all('add it to the tokenizer, resize' in why for why in lost.values())

def test_layers_without_a_place_are_skipped_by_name(decoder, adapter, tokenizer):
    shallow = random_decoder(tokenizer, layers=3, seed=1)
    alignment = align(decoder, shallow, FEW)
    gone = ({*range(4)} - {l for l, _ in alignment.layers}).pop()
    carried = transfer(adapter, alignment)
    assert {*carried.skipped} == {f'{decoder.path(gone, r)} ({r})' for r in ROLES}
    assert {*carried.skipped.values()} == {'its layer has no partner: the new model is shallower'}
    only = Adapter({p: ab for p, ab in adapter.updates.items() if f'.{gone}.' in p})
    message = 'nothing of the adapter has a place in the new model: its layer has no partner'
    with pytest.raises(ValueError, match=message): transfer(only, alignment)

@pytest.mark.filterwarnings('ignore')
def test_olora_is_read_after_conversion(decoder, tmp_path):
    config = LoraConfig(r=4, init_lora_weights='olora', target_modules=SEVEN, task_type='CAUSAL_LM')
    model = get_peft_model(copy.deepcopy(decoder.model), config)
    model.peft_config['default'].init_lora_weights = True
    model.save_pretrained(tmp_path/'start')
    model.peft_config['default'].init_lora_weights = 'olora'
    for name, p in model.named_parameters():
        if 'lora_' in name: p.data += .02*torch.randn_like(p)
    ids = tokens()
    with torch.no_grad(): true = model(ids).logits
    model.save_pretrained(tmp_path/'a', path_initial_model_for_weight_conversion=str(tmp_path/'start'))
    adapter = Adapter.load(tmp_path/'a')
    assert error(logits(decoder, ids, adapter), true) <= 1e-4
    assert {len(A) for A, _ in adapter.updates.values()} == {8}

ONE_A = f'{PREFIX}model.layers.2.self_attn.v_proj.lora_A'

def nan(tensors): tensors[[*tensors][0]][0, 0] = float('nan')
def half(tensors): del tensors[f'{ONE_A}.weight']
def shape(tensors): tensors[f'{ONE_A}.weight'] = torch.ones(3, 64)
def nothing(tensors): tensors.clear()
def integers(tensors): tensors.update({k: t.to(torch.int8) for k, t in tensors.items()})
def twice(tensors): tensors[ONE_A] = torch.ones(4, 64)

DAMAGES = [(nan, 'not finite'), (shape, 'do not multiply'), (nothing, 'holds no LoRA update'),
           (half, r'layers\.2\.self_attn\.v_proj has lora_B, but should have lora_A and lora_B'),
           (integers, 'is of type torch.int8: give the adapter before it was quantised'),
           (twice, r'layers\.2\.self_attn\.v_proj has two lora_A')]

@pytest.mark.parametrize('damage, message', DAMAGES)
def test_damaged_tensors(decoder, tmp_path, damage, message):
    path = edit(by_peft(decoder, tmp_path/'a'), damage)
    with pytest.raises(ValueError, match=message): Adapter.load(path)

@pytest.mark.parametrize('keep', [0, 5, 500, -1])
def test_truncated_file(decoder, tmp_path, keep):
    file = by_peft(decoder, tmp_path/'a')/FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match='is not readable'): Adapter.load(tmp_path/'a')

def test_missing_or_unreadable_files(decoder, tmp_path):
    with pytest.raises(FileNotFoundError, match='no such directory'): Adapter.load(tmp_path/'none')
    path = by_peft(decoder, tmp_path/'a')
    (path/'adapter_config.json').write_text('{"peft_type": "LORA",')
    with pytest.raises(ValueError, match='adapter_config.json is not readable'): Adapter.load(path)
    (path/FILE).unlink()
    with pytest.raises(FileNotFoundError, match='has no adapter_model.safetensors'): Adapter.load(path)

def test_wrong_model(decoder, adapter, tokenizer):
    shallow = random_decoder(tokenizer, layers=2)
    narrow = random_decoder(tokenizer, hidden=48, head_dim=16)
    with pytest.raises(ValueError, match=r'layers\.2\..*does not have.*another model'):
        with adapter.on(shallow): pass
    message = r'is \d+×\d+, the weight of .* is \d+×\d+: was the adapter trained on another'
    with pytest.raises(ValueError, match=message):
        with adapter.on(narrow): pass

def test_infinite_scale(decoder, tmp_path):
    path = by_peft(decoder, tmp_path/'a', lora_alpha=1e40)
    message = 'adapter_config.json makes the update of .*q_proj infinite'
    with pytest.raises(ValueError, match=message): Adapter.load(path)

# ---- all or nothing

def test_existing_output_is_left_alone(adapter, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'precious').write_text('mine')
    with pytest.raises(FileExistsError, match='out exists already'): adapter.save(tmp_path/'out')
    assert [p.name for p in tmp_path.rglob('*')] == ['out', 'precious']

@pytest.mark.parametrize('what', ['adapter', 'alignment'])
def test_nothing_is_left_of_a_failed_save(adapter, decoder, tmp_path, monkeypatch, what):
    result = adapter if what == 'adapter' else align(decoder, decoder)
    writer = dict(adapter='core.formats.peft.save_file', alignment='stages.alignment_files.save_file')[what]
    def full(*args, **kwargs): raise OSError('No space left on device')
    monkeypatch.setattr(f'lorasuite.{writer}', full)
    with pytest.raises(OSError, match='No space left'): result.save(tmp_path/'deep'/'out')
    assert [*tmp_path.iterdir()] == []

def test_a_directory_made_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OSError):
        with atomic_directory(tmp_path/'out') as tmp:
            (tmp/'ours').write_text('')
            (tmp_path/'out').mkdir()
            (tmp_path/'out'/'theirs').write_text('')
    assert [p.name for p in tmp_path.rglob('*')] == ['out', 'theirs']

# ---- models with adapters on them

def on_model(tokenizer, name='default', **config):
    "A random model with a random LoRA, and its `PeftModel`"
    decoder = random_decoder(tokenizer)
    torch.manual_seed(0)
    model = get_peft_model(decoder.model, LoraConfig(r=2, init_lora_weights=False, **config), adapter_name=name)
    return decoder, model

def test_patterns_count_in_the_order_of_the_model(tokenizer):
    pattern = {'layers.1.mlp.down_proj': 64, 'down_proj': 8}
    decoder, model = on_model(tokenizer, target_modules=['down_proj'], alpha_pattern=pattern)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    true = layer.get_delta_weight('default').detach()
    assert layer.scaling['default'] == 32
    assert error(Adapter.from_peft(model).delta('model.layers.1.mlp.down_proj'), true) < 1e-6

def test_a_file_whose_patterns_disagree_is_warned_of(tokenizer, tmp_path):
    pattern = {'layers.1.mlp.down_proj': 64, 'down_proj': 8}
    _, model = on_model(tokenizer, target_modules=['down_proj'], alpha_pattern=pattern)
    model.save_pretrained(tmp_path/'saved')
    with pytest.warns(UserWarning, match='layers.1.mlp.down_proj: several keys of alpha_pattern fit'):
        Adapter.load(tmp_path/'saved')

def test_adapters_that_PEFT_would_save_in_part_are_refused(tokenizer):
    _, model = on_model(tokenizer, '0', target_modules=['q_proj'])
    assert len(Adapter.from_peft(model).updates) == 4
    model.add_adapter('1', LoraConfig(r=2, target_modules=['q_proj'], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"PEFT does not save .*layers\.1.*of the adapter '0'.*rename"):
        Adapter.from_peft(model)

def test_a_model_is_left_as_it_was_also_by_what_is_trained_whole(tokenizer):
    decoder, ids = random_decoder(tokenizer), tokens()
    before, parts = logits(decoder, ids), [*decoder.model.modules()]
    config = LoraConfig(r=2, target_modules=['q_proj'], modules_to_save=['lm_head'], init_lora_weights=False)
    with attach(decoder, lambda: get_peft_model(decoder.model, config)) as model:
        for name, p in model.named_parameters():
            if 'modules_to_save' in name: p.data.add_(1)
        assert error(model(ids).logits, before) > .1
    assert logits(decoder, ids).equal(before)
    assert all(a is b for a, b in zip(parts, decoder.model.modules(), strict=True))

def test_an_adapter_says_all_that_it_has():
    pair, m = (torch.ones(2, 3), torch.ones(4, 2)), torch.ones(4)
    table, rows = (torch.ones(1, 5), torch.ones(3, 1)), (torch.arange(6), torch.ones(6, 3))
    whole = Adapter(dict(q=pair), 'base', embeddings=dict(e=table), rows=dict(e=rows), magnitudes=dict(q=m),
                    biases=dict(q=m), weights={'norm.weight': torch.ones(3)})
    assert str(whole) == ('Adapter(1 updates of base, rank [1, 2], 1 embeddings, 6 tokens, 4 magnitudes, 1 biases, '
                          '1 whole weights, 51 numbers)')
    assert 'besides: 6 tokens, 4 magnitudes, 1 biases, 1 whole weights' in whole._repr_html_()
    assert str(Adapter(dict(q=pair))) == 'Adapter(1 updates of an unnamed base, rank [2], 14 numbers)'
