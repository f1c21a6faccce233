"""Adapters as other programs leave them: under other names, in other places, with whole weights, or contradictory"""
import copy, json, shutil, warnings
from collections import Counter
from fnmatch import fnmatch
import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner
from models import as_phi, effect_error, error, logits, only, random_adapter, random_decoder, tokens
from test_laws import enlarge
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.containers import SETTINGS
from lorasuite.core.files import data_dir
from lorasuite.core.keys import PREFIX, unquantised_name
from lorasuite.core.loading import load_model
from lorasuite.core.model import model_info
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.stages.whole_weights import weights_to_updates
from lorasuite.training.finetune import finetune, init_adapter

FILE, ZOO = 'adapter_model.safetensors', data_dir()/'zoo'
FEW = ['Who lives in the old mill by the river?']*8
SOURCE = Adapter.load('zoo/adapter')

@pytest.fixture
def folder(tmp_path):
    "A copy of the shipped adapter"
    return shutil.copytree(ZOO/'adapter', tmp_path/'adapter')

def rename(folder, change):
    "Change the keys of an adapter; `change` returns new keys for one"
    tensors = load_file(folder/FILE)
    save_file({new: t.clone() for key, t in tensors.items() for new in change(key)}, folder/FILE)
    return folder

def settings(folder, **changes):
    "Change the settings of an adapter; a value of `...` removes one"
    said = json.loads((folder/SETTINGS).read_text()) | changes
    (folder/SETTINGS).write_text(json.dumps({key: x for key, x in said.items() if x is not ...}))
    return folder

def check_same(adapter):
    "It has the updates of the shipped adapter"
    assert adapter.updates.keys() == SOURCE.updates.keys()
    assert all(adapter.delta(path).equal(SOURCE.delta(path)) for path in SOURCE.updates)

def train(decoder, path, std=.05, **config):
    "Let PEFT make an adapter with changes everywhere and save it; returns its logits"
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(decoder.model), LoraConfig(r=4, task_type='CAUSAL_LM', **config))
    for name, p in model.named_parameters():
        if p.requires_grad and 'lora_A' not in name: p.data += std*torch.randn_like(p)
    model.save_pretrained(path)
    with torch.no_grad(): return model(tokens()).logits

# ---- names of tensors

NAMES = dict(
    module=lambda key: f'module.{key}',
    inner_module=lambda key: key.replace(PREFIX, f'{PREFIX}module.'),
    compiled=lambda key: f'_orig_mod.{key}',
    compiled_inside=lambda key: key.replace(PREFIX, f'{PREFIX}_orig_mod.'),
    doubled=lambda key: PREFIX + key,
    without=lambda key: key.removeprefix(PREFIX),
    fsdp=lambda key: '_fsdp_wrapped_module.' + key.replace('.self_attn', '._fsdp_wrapped_module.self_attn'),
    checkpointed=lambda key: key.replace('.mlp', '._checkpoint_wrapped_module.mlp'),
    default=lambda key: key.replace('.weight', '.default.weight'),
    all_at_once=lambda key: 'module._orig_mod.' + PREFIX + key.replace('.weight', '.sql.weight'),
)

@pytest.mark.parametrize('name', NAMES)
def test_names_of_other_programs(folder, name):
    rename(folder, lambda key: [NAMES[name](key)])
    with pytest.warns(UserWarning, match='the names of its tensors are read with') as caught:
        check_same(Adapter.load(folder))
    assert len(caught) == 1 and '\n' not in str(caught[0].message)

def test_the_wrapper_of_whole_modules_is_said(folder):
    tensors = load_file(folder/FILE)
    tensors[f'{PREFIX}lm_head.modules_to_save.weight'] = torch.ones(512, 64)
    save_file(tensors, folder/FILE)
    with pytest.warns(UserWarning, match='read without `.modules_to_save`'): found = Adapter.load(folder)
    assert [*found.weights] == ['lm_head.weight']

def test_plain_names_are_read_without_a_word(folder):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_same(Adapter.load(folder))

def both(key): return [key, f'module.{key}']
def some(key): return [f'module.{key}' if 'q_proj' in key else key]
def two(key): return [key.replace('.weight', f'.{name}.weight') for name in ('sql', 'chat')]

@pytest.mark.filterwarnings('ignore')
def test_contradictory_names(folder, tmp_path):
    check_same(Adapter.load(rename(shutil.copytree(folder, tmp_path/'some'), some)))
    with pytest.raises(ValueError, match=r'base_model\S+ and module\.\S+ are names of the same tensor'):
        Adapter.load(rename(folder, both))

@pytest.mark.filterwarnings('ignore')
def test_several_adapters_in_a_file(folder):
    rename(folder, two)
    with pytest.raises(ValueError, match=r'holds 2 adapters \(chat, sql\): choose one by --adapter-name'):
        Adapter.load(folder)
    check_same(Adapter.load(folder, adapter_name='chat'))
    with pytest.raises(ValueError, match="has no adapter 'poem': it holds chat, sql"):
        Adapter.load(folder, adapter_name='poem')

# ---- places and files

def test_adapters_in_folders(tmp_path):
    shutil.copytree(ZOO/'adapter', tmp_path/'run'/'checkpoint-9')
    check_same(Adapter.load(tmp_path/'run'))
    shutil.copytree(ZOO/'adapter', tmp_path/'run'/'final'/'sql')
    with pytest.raises(ValueError, match=r'holds 2 adapters \(checkpoint-9, final/sql\)'): Adapter.load(tmp_path/'run')
    for name in ('sql', 'final/sql'): check_same(Adapter.load(tmp_path/'run', adapter_name=name))
    shutil.copy(ZOO/'adapter'/SETTINGS, tmp_path/'run')
    shutil.copy(ZOO/'adapter'/FILE, tmp_path/'run')
    check_same(Adapter.load(tmp_path/'run'))
    check_same(Adapter.load(tmp_path/'run'/FILE))
    with pytest.raises(ValueError, match="has no adapter 'poem'"): Adapter.load(tmp_path/'run', adapter_name='poem')

COMMANDS = dict(
    inspect=lambda p: ['inspect', 'zoo/old', 'zoo/new', p],
    evaluate=lambda p: ['evaluate', 'zoo/old', '--adapter', p, '--data', str(p) + '.jsonl'])

@pytest.mark.parametrize('name', COMMANDS)
def test_commands_choose_an_adapter(tmp_path, name):
    for which in ('sql', 'chat'): shutil.copytree(ZOO/'adapter', tmp_path/'two'/which)
    row = dict(instruction='Who?', input='', output='Ann', answer='Ann')
    (tmp_path/'two.jsonl').write_text(json.dumps(row))
    args = [str(a) for a in COMMANDS[name](tmp_path/'two')]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and '(chat, sql): choose one by --adapter-name' in result.stderr
    result = CliRunner().invoke(app, args + ['--adapter-name', 'sql'])
    assert result.exit_code == 0, result.output

def test_a_hub_repository_with_folders(tmp_path, monkeypatch):
    repository, fetched = tmp_path/'repository', []
    for name in ('sql', 'chat'): shutil.copytree(ZOO/'adapter', repository/name)
    def fetch(name, allow_patterns):
        fetched.extend(allow_patterns)
        return str(repository)
    monkeypatch.setattr('lorasuite.core.files.hub_fault', str)
    monkeypatch.setattr('lorasuite.core.containers.snapshot_download', fetch)
    with pytest.raises(ValueError, match=r'org/two holds 2 adapters \(chat, sql\)'): Adapter.load('org/two')
    check_same(Adapter.load('org/two', adapter_name='chat'))
    assert fetched[-1] == 'chat/adapter_model*' and not any(p == '*.safetensors' for p in fetched)

def as_bin(folder):
    torch.save(load_file(folder/FILE), folder/'adapter_model.bin')
    (folder/FILE).unlink()

def as_other(format):
    def make(folder):
        Adapter.load(folder).save(folder.with_name('made'), format=format)
        shutil.rmtree(folder)
        folder.with_name('made').rename(folder)
    return make

REPOSITORIES = dict(peft=lambda folder: None, bin=as_bin, mlx=as_other('mlx'), gguf=as_other('gguf'))

@pytest.mark.parametrize('kind', REPOSITORIES)
def test_the_format_of_a_hub_repository(tmp_path, monkeypatch, kind):
    repository = shutil.copytree(ZOO/'adapter', tmp_path/'repository')
    REPOSITORIES[kind](repository)
    asked = []
    def fetch(name, allow_patterns):
        asked.append(name)
        return str(repository)
    for module in ('containers', 'formats.mlx', 'formats.gguf'):
        monkeypatch.setattr(f'lorasuite.core.{module}.snapshot_download', fetch)
    monkeypatch.setattr('lorasuite.core.files.hub_fault', str)
    names = [path.name for path in repository.iterdir()]
    monkeypatch.setattr('lorasuite.core.containers.list_repo_files', lambda name: names)
    check_same(Adapter.load('org/mine'))
    assert {*asked} == {'org/mine'}

def pretended_hub(monkeypatch, tmp_path, repository):
    "A Hub with one revision, v1, of which only what is asked for comes; the patterns that were asked for"
    asked, here = [], tmp_path/'cache'
    here.mkdir()
    def fetch(name, revision=None, allow_patterns=None, ignore_patterns=None, local_files_only=False):
        if (name, revision) != ('org/mine', 'v1'): raise OSError(f'{name} has no revision {revision}')
        asked.extend(allow_patterns)
        for file in repository.iterdir():
            if any(fnmatch(file.name, p) for p in allow_patterns): shutil.copy(file, here)
        return str(here)
    def names(name, revision=None):
        if (name, revision) != ('org/mine', 'v1'): raise OSError(f'{name} has no revision {revision}')
        return [path.name for path in repository.iterdir()]
    monkeypatch.setattr('huggingface_hub.snapshot_download', fetch)
    monkeypatch.setattr('lorasuite.core.files.hub_fault', str)
    monkeypatch.setattr('lorasuite.core.containers.list_repo_files', names)
    return asked

@pytest.mark.parametrize('kind', REPOSITORIES)
def test_an_adapter_of_any_format_at_a_revision(tmp_path, monkeypatch, kind):
    if kind == 'gguf': pytest.importorskip('gguf')
    repository = shutil.copytree(ZOO/'adapter', tmp_path/'repository')
    REPOSITORIES[kind](repository)
    asked = pretended_hub(monkeypatch, tmp_path, repository)
    check_same(Adapter.load('org/mine@v1'))
    assert ('*.gguf' in asked) == (kind == 'gguf') # a repository of a model may hold many of them
    with pytest.raises(FileNotFoundError, match='no revision v2 of org/mine'): Adapter.load('org/mine@v2')

def test_a_file_of_torchtune_at_a_revision(tmp_path, monkeypatch):
    from lorasuite.core.formats.torchtune import _find
    repository = tmp_path/'repository'
    repository.mkdir()
    (repository/'adapter_0.pt').touch()
    pretended_hub(monkeypatch, tmp_path, repository)
    assert _find('org/mine@v1') == tmp_path/'cache'/'adapter_0.pt' and _find('org/mine@v1').is_file()

def cut(folder, suffix):
    "Cut the tensors into two files with an index"
    tensors = load_file(folder/FILE)
    (folder/FILE).unlink()
    names = [f'adapter_model-0000{n}-of-00002.{suffix}' for n in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: t for key, t in tensors.items() if where[key] == name}
        save_file(part, folder/name) if suffix == 'safetensors' else torch.save(part, folder/name)
    index = folder/f'adapter_model.{suffix}.index.json'
    index.write_text(json.dumps(dict(weight_map=where)))
    return index

def pickled(folder):
    torch.save(load_file(folder/FILE), folder/'adapter_model.bin')
    (folder/FILE).unlink()

FILES = dict(bin=pickled, shards=lambda folder: cut(folder, 'safetensors'),
             bin_shards=lambda folder: cut(folder, 'bin'),
             other_name=lambda folder: (folder/FILE).rename(folder/'lora.safetensors'))

@pytest.mark.parametrize('name', FILES)
def test_other_files(folder, name):
    FILES[name](folder)
    check_same(Adapter.load(folder))

def test_a_pickle_with_more_than_tensors(folder):
    (folder/FILE).unlink()
    for found in (dict(epoch=3), [torch.ones(1)], {3: torch.ones(1)}):
        torch.save(found, folder/'adapter_model.bin')
        with pytest.raises(ValueError, match='adapter_model.bin holds more than tensors'): Adapter.load(folder)
    (folder/'adapter_model.bin').write_bytes((folder/'adapter_model.bin').read_bytes()[:200])
    with pytest.raises(ValueError, match='adapter_model.bin (is not readable|holds more)'): Adapter.load(folder)

@pytest.mark.parametrize('name', ['../outside.safetensors', '/etc/passwd', '', 3, None, ['x'], 'away.safetensors'])
def test_an_index_that_leads_elsewhere(folder, name):
    index = cut(folder, 'safetensors')
    (folder.parent/'outside.safetensors').write_bytes(b'')
    said = json.loads(index.read_text())
    said['weight_map'] |= {'x': name}
    index.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r'index\.json (names|is not readable)'): Adapter.load(folder)

def test_models_and_adapters_in_each_others_place(tmp_path, folder):
    with pytest.raises(OSError, match='it is a whole model, not an adapter. Check the order of the arguments'):
        Adapter.load('zoo/old')
    message = r'zoo/adapter is an adapter, not a model: give the model that it was trained on \(zoo/old\)'
    with pytest.raises(ValueError, match=message): load_model('zoo/adapter')
    shutil.copy(ZOO/'old'/'config.json', folder)
    with pytest.raises(ValueError, match='is an adapter, not a model'): load_model(folder)
    result = CliRunner().invoke(app, ['inspect', 'zoo/adapter', 'zoo/new'])
    assert result.exit_code == 2 and 'is an adapter, not a model' in result.stderr

def test_files_of_other_formats_are_named(tmp_path, folder):
    (tmp_path/'lora.gguf').write_bytes(b'GGUF')
    with pytest.raises(ValueError, match='lora.gguf is a GGUF file'): Adapter.load(tmp_path/'lora.gguf', format='peft')
    (folder/SETTINGS).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}')
    with pytest.raises(ValueError, match='no peft_type, they are those of an MLX adapter'):
        Adapter.load(folder, format='peft')

# ---- contents that contradict the settings

Q0 = 'model.layers.0.self_attn.q_proj'

@pytest.mark.parametrize('r', [0, -1, '16', 4, 64, 8, 16.5, [16]])
def test_a_rank_that_the_tensors_contradict(folder, r):
    with pytest.raises(ValueError, match=r'adapter_config\.json: the rank of .* is .*, but its lora_A has 16 rows'):
        Adapter.load(settings(folder, r=r))

def test_patterns_that_lie(folder):
    settings(folder, rank_pattern={Q0: 3})
    with pytest.raises(ValueError, match=f'the rank of {Q0} is 3, but its lora_A has 16 rows'): Adapter.load(folder)
    with pytest.raises(ValueError, match='adapter_config.json'):
        Adapter.load(settings(folder, rank_pattern={}, alpha_pattern={Q0: 'two'}))

def test_settings_that_are_silent(folder):
    alpha = json.loads((folder/SETTINGS).read_text())['lora_alpha']
    check_same(Adapter.load(settings(folder, r=...)))
    eighth = Adapter.load(settings(folder, lora_alpha=...))
    assert torch.allclose(eighth.delta(Q0), SOURCE.delta(Q0)*8/alpha, atol=1e-7)

def test_dora_without_magnitudes(folder):
    with pytest.raises(ValueError, match='use_dora is set, but there is no lora_magnitude_vector'):
        Adapter.load(settings(folder, use_dora=True))

def test_empty_tensors_of_zero3(folder):
    tensors = {key: torch.ones(0) for key in load_file(folder/FILE)}
    save_file(tensors, folder/FILE)
    with pytest.raises(ValueError, match='is empty, as DeepSpeed ZeRO-3 .*zero_to_fp32.py'): Adapter.load(folder)

def test_an_adapter_that_changes_nothing(folder):
    save_file({key: t*('lora_A' in key) for key, t in load_file(folder/FILE).items()}, folder/FILE)
    with pytest.warns(UserWarning, match='the adapter changes nothing'): Adapter.load(folder)

def test_grouped_convolutions_of_peft_02(folder):
    tensors = {f'{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight': torch.ones(16, 96),
               f'{PREFIX}transformer.h.0.attn.c_attn.lora_B.weight': torch.ones(192, 8, 1)}
    save_file(tensors, folder/FILE)
    settings(folder, enable_lora=[True, False, True], merge_weights=False)
    message = r'is a grouped convolution \(enable_lora\), an old format'
    with pytest.raises(ValueError, match=message): Adapter.load(folder)

def test_names_of_quantised_bases(folder):
    assert unquantised_name('unsloth/llama-3-8b-bnb-4bit') == 'unsloth/llama-3-8b'
    named = Adapter.load(settings(folder, base_model_name_or_path='unsloth/llama-3-8b-bnb-4bit'))
    assert named.base == 'unsloth/llama-3-8b-bnb-4bit'

# ---- fused and split projections

FUSED = ['q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj']

@pytest.mark.parametrize('targets', [[*FUSED, 'o_proj'], ['k_proj', 'up_proj']])
def test_split_projections_on_a_fused_model(decoder, tmp_path, targets):
    phi, ids = as_phi(decoder), tokens()
    assert error(logits(phi, ids), logits(decoder, ids)) <= 1e-5
    true = train(decoder, tmp_path/'a', target_modules=targets)
    adapter = Adapter.load(tmp_path/'a')
    assert error(logits(phi, ids, adapter), true) <= 1e-5 and error(true, logits(decoder, ids)) > .01
    carried = transfer(adapter, align(phi, decoder, FEW))
    assert not carried.skipped and error(logits(decoder, ids, carried), true) <= 1e-3

def test_fused_projections_on_a_split_model(decoder, tmp_path):
    phi, ids = as_phi(decoder), tokens()
    true = train(phi, tmp_path/'a', target_modules=['qkv_proj', 'gate_up_proj'])
    adapter = Adapter.load(tmp_path/'a')
    assert error(logits(decoder, ids, adapter), true) <= 1e-5
    named = adapter.named_for(align(decoder, decoder, FEW).old)
    assert {len(A) for A, _ in named.updates.values()} == {4} and len(named.updates) == 5*decoder.layers
    again = Adapter(named.updates)
    assert error(logits(phi, ids, again), true) <= 1e-5

# ---- whole weights, task heads, resized embeddings

WHOLE = dict(head=dict(modules_to_save=['lm_head']), both=dict(modules_to_save=['embed_tokens', 'lm_head']),
             norm=dict(modules_to_save=['norm']))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('name', WHOLE)
def test_whole_weights_on_the_old_model(tokenizer, tmp_path, name, tied):
    old, ids = random_decoder(tokenizer, tie_word_embeddings=tied), tokens()
    before, state = logits(old, ids), copy.deepcopy(old.model.state_dict())
    true = train(old, tmp_path/'a', target_modules=['q_proj'], **WHOLE[name])
    adapter = Adapter.load(tmp_path/'a')
    assert error(logits(old, ids, adapter), true) <= 1e-6 and error(true, before) > .01
    assert all(t.equal(state[key]) for key, t in old.model.state_dict().items())
    tuned, _ = finetune(old, [dict(instruction='Who?', output='Ann')]*2, adapter, steps=1, lr=0.)
    assert tuned.weights.keys() == adapter.weights.keys()
    tuned.save(tmp_path/'tuned')
    model = PeftModel.from_pretrained(copy.deepcopy(old.model), str(tmp_path/'tuned'))
    with torch.no_grad(): assert error(model(ids).logits, true) <= 1e-6
    carried = transfer(adapter, align(old, random_decoder(tokenizer, seed=1), FEW))
    assert {*carried.skipped} >= {*adapter.weights} and not carried.weights

@pytest.mark.filterwarnings('ignore')
def test_trained_biases_on_the_old_model(tokenizer, tmp_path):
    old, ids = random_decoder(tokenizer, attention_bias=True), tokens()
    true = train(old, tmp_path/'a', target_modules=['q_proj'], bias='all')
    adapter = Adapter.load(tmp_path/'a')
    assert f'{Q0}.bias' in adapter.weights and error(logits(old, ids, adapter), true) <= 1e-6
    adapter.save(tmp_path/'b')
    assert error(logits(old, ids, Adapter.load(tmp_path/'b')), true) <= 1e-6

def test_heads_of_tasks(decoder, tmp_path):
    config = LlamaConfig(**decoder.model.config.to_dict() | dict(num_labels=3))
    model = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(r=4, task_type='SEQ_CLS'))
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_()
    model.save_pretrained(tmp_path/'a')
    with pytest.warns(UserWarning, match='left out: score.weight: it belongs to the head of a task'):
        adapter = Adapter.load(tmp_path/'a')
    assert [*adapter.skipped] == ['score.weight'] and not adapter.weights
    assert error(logits(decoder, tokens(), adapter), logits(decoder, tokens())) > 0

@pytest.mark.filterwarnings('ignore')
def test_resized_embeddings_name_the_model_to_resize(tokenizer, tmp_path):
    old = random_decoder(tokenizer)
    more = copy.deepcopy(old)
    more.model.resize_token_embeddings(len(tokenizer) + 2)
    resize = 'trained with 514 tokens, random/llama has 512: resize random/llama first'
    for name, targets in (('linear', ['q_proj']), ('head', ['q_proj', 'lm_head'])):
        true = train(more, tmp_path/name, target_modules=targets, modules_to_save=['embed_tokens'])
        adapter = Adapter.load(tmp_path/name)
        with pytest.raises(ValueError, match=resize): logits(old, tokens(), adapter)
        again = copy.deepcopy(old)
        again.model.resize_token_embeddings(len(tokenizer) + 2)
        again.vocab = len(tokenizer) + 2
        assert error(logits(again, tokens(), adapter)[..., :512], true[..., :512]) <= 1e-5
    alignment = align(old, old, FEW)
    with pytest.raises(ValueError, match=resize): transfer(adapter, alignment)
    rows = Adapter(adapter.updates, rows={'model.embed_tokens': (torch.tensor([513]), torch.ones(1, 64))})
    del rows.updates['lm_head']
    assert resize in transfer(rows, alignment).skipped['model.embed_tokens, token 513']

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('rank', [64, 8])
def test_whole_matrices_are_carried_as_updates(tokenizer, tmp_path, rank):
    old = random_decoder(tokenizer)
    train(old, tmp_path/'a', target_modules=['q_proj', 'embed_tokens'], modules_to_save=['lm_head'])
    tensors = load_file(tmp_path/'a'/FILE)
    tensors[f'{PREFIX}model.embed_tokens.base_layer.weight'] = old.model.model.embed_tokens.weight + .02
    save_file(tensors, tmp_path/'a'/FILE)
    adapter = Adapter.load(tmp_path/'a')
    new, _, new_id = enlarge(old, hidden=96, heads=6, kv_heads=3)
    source = weights_to_updates(adapter, old, rank)
    assert not source.weights and len(source.updates['lm_head'][0]) == rank
    carried = transfer(source, align(old, new))
    left = effect_error(old, adapter, new, carried, new_id=new_id)
    if rank == 64: assert left <= 1e-3 and not carried.skipped
    else: assert .1 < left < 1 and 'the rest is carried in rank 8' in carried.card

def test_nemo_is_named(folder, tmp_path):
    rename(folder, lambda key: [key.replace('q_proj.lora_A', 'linear_qkv.adapter.linear_in')])
    with pytest.raises(ValueError, match=r'linear_qkv\.adapter\.linear_in\.weight is a name of NeMo or Megatron'):
        Adapter.load(folder)
    (tmp_path/'nemo'/'weights').mkdir(parents=True)
    (tmp_path/'nemo'/'weights'/'__0_0.distcp').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match='a checkpoint of NeMo or Megatron. Export the adapter as PEFT first'):
        Adapter.load(tmp_path/'nemo')

def test_the_converted_adapter_of_llama_factory_is_named(folder):
    settings(folder, init_lora_weights='pissa_niter_16') # LLaMA-Factory 0.9.5 with pissa_convert
    (folder/'pissa_converted').mkdir()
    with pytest.raises(ValueError, match='changes the base weights.*give .*/pissa_converted, which is the same'):
        Adapter.load(folder)

@pytest.mark.parametrize('family', ['gpt_neox', 'bloom', 'falcon'])
def test_separate_projections_join_where_rows_alternate_by_head(tokenizer, family):
    base = random_decoder(tokenizer, family, layers=1)
    path, roles = next((path, roles) for path, roles in model_info(base).roles_of_modules().items() if 'q' in roles)
    numbers = {role: [i for run in runs for i in range(*run)] for role, runs in roles.items()}
    pairs = {role: (torch.randn(2, 64), .1*torch.randn(len(rows), 2)) for role, rows in numbers.items()}
    owner = path.rpartition('.')[0]
    adapter = Adapter({f'{owner}.{role}_proj': pair for role, pair in pairs.items()})
    found, merged = logits(base, tokens(), adapter), copy.deepcopy(base)
    weight = merged.model.get_submodule(path).weight
    with torch.no_grad():
        for role, (A, B) in pairs.items(): weight[numbers[role]] += B@A
    assert path.endswith('query_key_value') and error(found, logits(merged, tokens())) <= 1e-5
    heads = numbers['q'] != [*range(len(numbers['q']))]
    assert heads == (family != 'falcon') # of which a new decoder has groups

PHI_NAMES = dict(
    transformer='model', gpt_neox='model', h='layers', word_embeddings='embed_tokens', embed_in='embed_tokens',
    ln_f='final_layernorm', final_layer_norm='final_layernorm', ln_attn='input_layernorm', self_attention='self_attn',
    attention='self_attn', dense_h_to_4h='fc1', dense_4h_to_h='fc2')
FUSED_MODELS = dict( # groups of heads, query heads in each, share of a head that is rotated, settings
    gpt_neox=(4, 1, .5, dict(rotary_pct=.5, hidden_act='gelu')),
    falcon=(2, 2, 1., dict(new_decoder_architecture=True, num_kv_heads=2, bias=True, ffn_hidden_size=96)))

def twins(tokenizer, family):
    "A model with query_key_value, and a Phi that computes the same by separate projections"
    groups, queries, rotated, config = FUSED_MODELS[family]
    fused = random_decoder(tokenizer, family, layers=2, **config)
    config = dict(layers=2, kv_heads=groups, hidden_act='gelu', partial_rotary_factor=rotated)
    apart = random_decoder(tokenizer, 'phi', **config)
    state, norms = apart.model.state_dict(), dict(post_attention_layernorm='input_layernorm', ln_mlp='ln_attn')
    state['lm_head.bias'].zero_()
    for name, W in fused.model.state_dict().items():
        for second, first in norms.items():
            if second in name: W.copy_(fused.model.state_dict()[name.replace(second, first)])
        path = '.'.join(PHI_NAMES.get(part, part) for part in name.split('.'))
        if 'query_key_value' in path:
            for role, part in zip('qkv', W.unflatten(0, (groups, queries + 2, 16)).split([queries, 1, 1], 1)):
                state[path.replace('query_key_value', f'{role}_proj')].copy_(part.flatten(0, 2))
        elif path in state: state[path].copy_(W)
    assert error(logits(apart, tokens()), logits(fused, tokens())) <= 1e-6
    return fused, apart

@pytest.mark.parametrize('family', FUSED_MODELS)
def test_query_key_value_is_carried_to_separate_projections_and_back(tokenizer, family):
    fused, apart = twins(tokenizer, family)
    adapter = only(random_adapter(init_adapter(fused, 2)), 'query_key_value')
    carried = transfer(adapter, align(fused, apart, FEW))
    leaves = Counter(path.rpartition('.')[2] for path in carried.updates)
    assert leaves == dict(q_proj=2, k_proj=2, v_proj=2) and not carried.skipped
    assert effect_error(fused, adapter, apart, carried) <= 1e-4
    separate = random_adapter(init_adapter(apart, 2))
    back = transfer(separate, align(apart, fused, FEW))
    assert not back.skipped and effect_error(apart, separate, fused, back) <= 1e-4

def test_query_key_value_for_separate_projections_is_refused_with_the_remedy(tokenizer):
    base = random_decoder(tokenizer, layers=1)
    adapter = Adapter({'model.layers.0.self_attn.query_key_value': (torch.ones(1, 64), torch.ones(128, 1))})
    with pytest.raises(ValueError, match='give that model as OLD, and this one as NEW'): logits(base, tokens(), adapter)
    with pytest.raises(ValueError, match='give that model as OLD, and this one as NEW'):
        transfer(adapter, align(base, base, FEW))

@pytest.mark.filterwarnings('ignore')
def test_whole_matrices_that_are_stored_transposed(tokenizer, tmp_path):
    old, ids = random_decoder(tokenizer, 'gpt2', layers=2), tokens()
    true = train(old, tmp_path/'a', target_modules=['c_attn'], modules_to_save=['mlp.c_fc', 'attn.c_proj'])
    adapter = Adapter.load(tmp_path/'a')
    assert error(logits(old, ids, adapter), true) <= 1e-5
    for name in [name for name in adapter.weights if name.endswith('bias')]: # they are named, and have no place
        assert name in transfer(weights_to_updates(adapter, old, 96), align(old, old, FEW)).skipped
        del adapter.weights[name]
    true = logits(old, ids, adapter)
    source = weights_to_updates(adapter, old, 96)
    assert not source.weights and {A.shape[1] for A, _ in source.updates.values()} == {64}
    carried = transfer(source, align(old, old, FEW))
    assert error(logits(old, ids, carried), true) <= 1e-4

def test_commands_carry_whole_matrices(tmp_path):
    old = load_model('zoo/old')
    train(old, tmp_path/'a', target_modules=['q_proj'], modules_to_save=['lm_head', 'norm'])
    result = CliRunner().invoke(app, ['inspect', 'zoo/old', 'zoo/new', str(tmp_path/'a')])
    assert result.exit_code == 0 and 'carried by `upgrade` and `transfer`, as an update of rank 64' in result.output
    align(old, 'zoo/new', FEW).save(tmp_path/'maps')
    result = CliRunner().invoke(app, ['transfer', str(tmp_path/'a'), str(tmp_path/'maps'), '-o', str(tmp_path/'out')])
    assert result.exit_code == 0, result.output
    assert 'model.norm.weight' in result.output and 'lm_head.weight' not in result.output
    assert len(Adapter.load(tmp_path/'out').updates['lm_head'][0]) == old.hidden == 64

@pytest.mark.filterwarnings('ignore')
def test_the_whole_state_of_a_peft_model(decoder, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type='CAUSAL_LM', target_modules=['q_proj'], modules_to_save=['lm_head'])
    model = get_peft_model(copy.deepcopy(decoder.model), config)
    for name, p in model.named_parameters():
        if p.requires_grad and 'lora_A' not in name: p.data += .05*torch.randn_like(p)
    model.save_pretrained(tmp_path/'a')
    (tmp_path/'a'/FILE).unlink()
    torch.save(model.state_dict(), tmp_path/'a'/'adapter_model.bin')
    adapter = Adapter.load(tmp_path/'a')
    with torch.no_grad(): assert error(logits(decoder, tokens(), adapter), model(tokens()).logits) <= 1e-6
    source = weights_to_updates(adapter, decoder)
    assert source.updates.keys() == adapter.updates.keys() | {'lm_head'} and not source.embeddings

def test_the_card_of_a_tuned_adapter_does_not_miss_what_it_has(tmp_path):
    "Whole weights are trained with the adapter, so nothing is left out"
    train(load_model('zoo/old'), tmp_path/'a', target_modules=['q_proj'], modules_to_save=['norm'])
    args = ['finetune', 'zoo/old', str(tmp_path/'a'), '--data', 'zoo/validation.jsonl', '--steps', '1']
    result = CliRunner().invoke(app, [*args, '-o', str(tmp_path/'out')])
    assert result.exit_code == 0, result.output
    assert 'model.norm.weight' in Adapter.load(tmp_path/'out').weights
    assert 'skipped' not in (tmp_path/'out'/'README.md').read_text() and 'skipped' not in result.stdout
