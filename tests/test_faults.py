"""Damaged models and impossible requests: each ends with a message that names what is wrong, and nothing is written"""
import json, os, shutil
import pytest, torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.cli import app

ZOO = data_dir()/'zoo'
PICKLE = b'cos\nsystem\n(S"touch %s"\ntR.'
ADAPTER = 'adapter_model.safetensors'
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARDS = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
UP = 'model.layers.1.mlp.up_proj.weight'

def tensors(change):
    "What changes the tensors of a model"
    def damage(folder):
        t = load_file(folder/WEIGHTS)
        save_file(t | change(t), folder/WEIGHTS, metadata={'format': 'pt'})
    return damage

def config(**settings):
    "What changes the configuration of a model"
    def damage(folder):
        file = folder/'config.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return damage

def shards(names, written):
    "What cuts the weights into two files, of which some are written"
    def damage(folder):
        t = load_file(folder/WEIGHTS)
        (folder/WEIGHTS).unlink()
        where = {k: names[i%2] for i, k in enumerate(sorted(t))}
        for name in written: save_file({k: t[k] for k in t if where[k] == name}, folder/name, metadata={'format': 'pt'})
        (folder/INDEX).write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return damage

def text(name, content):
    "What replaces a file"
    return lambda folder: (folder/name).write_bytes(content)

def remove(*names):
    "What removes files"
    return lambda folder: [(folder/n).unlink() for n in names]

def both(*changes):
    "Several damages"
    return lambda folder: [change(folder) for change in changes]

def pickled_weights(folder):
    "The weights as a pickle of tensors"
    torch.save(load_file(folder/WEIGHTS), folder/'pytorch_model.bin')
    (folder/WEIGHTS).unlink()

def pickled(folder):
    "A pickle that would run a command, in place of the weights"
    (folder/WEIGHTS).unlink()
    (folder/'pytorch_model.bin').write_bytes(PICKLE % os.fsencode(folder/'was_here'))

def in_place_of(name, make):
    "What puts something else where a file was"
    def damage(folder):
        (folder/name).unlink(missing_ok=True)
        make(folder/name)
    return damage

def dangling(path): path.symlink_to(path.parent/'nowhere')

def shard_directories(folder):
    "An index that names directories"
    shards(SHARDS, [])(folder)
    for name in SHARDS: (folder/name).mkdir()

def tokenizer(change):
    "What changes the tokenizer: a function of token and id"
    def damage(folder):
        state = json.loads((folder/'tokenizer.json').read_text())
        state['model'] |= dict(vocab=dict(change(*t) for t in state['model']['vocab'].items()), merges=[])
        (folder/'tokenizer.json').write_text(json.dumps(state | dict(added_tokens=[])))
    return damage

MODELS = dict(
    truncated=(lambda folder: os.truncate(folder/WEIGHTS, 50_000), f'{WEIGHTS} is damaged.*fetch'),
    empty=(text(WEIGHTS, b''), f'{WEIGHTS} is damaged.*fetch'),
    no_weights=(remove(WEIGHTS), 'cannot load.*model.safetensors'),
    not_finite=(tensors(lambda t: {UP: t[UP]*torch.inf}), f'{UP} has values that are not finite'),
    integers=(tensors(lambda t: {UP: t[UP].int()}), f'{WEIGHTS}: {UP} is of type I32.*quantised'),
    missing_weight=(tensors(lambda t: {UP: torch.ones(0)}), UP),
    other_shape=(tensors(lambda t: {UP: torch.ones(3, 3)}), f'{UP} is 3×3, its configuration asks for 288×96'),
    unknown_weight=(tensors(lambda t: {'model.layers.0.mlp.extra.weight': torch.ones(3)}),
                    'first model.layers.0.mlp.extra.weight.*no place for'),
    missing_shard=(shards(SHARDS, SHARDS[:1]), f'{INDEX} names {SHARDS[1]}, which is not there'),
    shard_outside=(shards(['../outside.safetensors', SHARDS[1]], ['../outside.safetensors', SHARDS[1]]),
                   r'names \.\./outside.safetensors, which is not in its directory'),
    dangling_weights=(in_place_of(WEIGHTS, dangling), f'{WEIGHTS} is damaged.*fetch'),
    weights_a_directory=(in_place_of(WEIGHTS, os.mkdir), f'{WEIGHTS} is damaged.*fetch'),
    shards_are_directories=(shard_directories, f'{INDEX} names {SHARDS[0]}, which is not there'),
    index_unreadable=(text(INDEX, b'{"weight_map": '), f'{INDEX} is not a readable index'),
    index_without_map=(text(INDEX, b'{}'), f'{INDEX} is not a readable index'),
    index_a_list=(text(INDEX, b'[]'), f'{INDEX} is not a readable index'),
    deeper_by_config=(config(num_hidden_layers=8), r'lacks weights \(18 in all, first model.layers.6'),
    shallower_by_config=(config(num_hidden_layers=4), r'holds weights \(18 in all, first model.layers.4'),
    heads_by_config=(config(num_attention_heads=6),
                     r'layers.0.self_attn.o_proj.weight is 96×128, its configuration asks for 96×96'),
    hidden_by_config=(config(hidden_size=100), 'hidden size.*100'),
    vocabulary_by_config=(config(vocab_size=100), 'cannot load'),
    config_unreadable=(text('config.json', b'{"model_type": '), 'config.json.*not a valid JSON'),
    no_config=(remove('config.json'), 'model_type'),
    unknown_type=(config(model_type='nonsense'), 'nonsense'),
    custom_code=(config(model_type='nonsense', auto_map=dict(AutoConfig='evil.Config', AutoModelForCausalLM='evil.M')),
                 'trust_remote_code'),
    pickle=(pickled, 'cannot load.*weights_only'),
    no_tokenizer=(remove('tokenizer.json', 'tokenizer_config.json'), 'tokenizer'),
    ids_beyond_the_table=(tokenizer(lambda t, i: (t, i + 300)),
                          'ids up to 847, its embedding table 548 rows: is the tokenizer another'),
    tokenizer_unreadable=(text('tokenizer.json', b'{'), 'cannot load a model and its tokenizer'),
)

@pytest.mark.parametrize('name', MODELS)
def test_damaged_model(tmp_path, name):
    damage, message = MODELS[name]
    folder = tmp_path/'model'
    shutil.copytree(ZOO/'new', folder)
    damage(folder)
    with pytest.raises((ValueError, OSError), match=f'(?s){message}') as caught: load_model(folder)
    assert 'model' in str(caught.value) and not (folder/'was_here').exists()

INSPECTED = ('hidden_by_config', 'vocabulary_by_config', 'config_unreadable', 'custom_code', 'no_tokenizer')

@pytest.mark.parametrize('name', INSPECTED)
def test_inspect_names_a_damaged_model(tmp_path, name):
    folder = tmp_path/'model'
    shutil.copytree(ZOO/'new', folder)
    MODELS[name][0](folder)
    result = CliRunner().invoke(app, ['inspect', 'zoo/old', str(folder)])
    assert result.exit_code == 2 and str(folder) in result.stderr

def test_sharded_model(tmp_path):
    shutil.copytree(ZOO/'new', tmp_path/'model')
    shards(SHARDS, SHARDS)(tmp_path/'model')
    a, b = load_model(tmp_path/'model').model.state_dict(), load_model('zoo/new').model.state_dict()
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)

# ---- requests that cannot be met

def file(folder, name, content):
    "A small file"
    (folder/name).write_bytes(content)
    return folder/name

def copy(folder, name, damage):
    "A model or an adapter of the zoo, damaged"
    shutil.copytree(ZOO/name, folder/name)
    damage(folder/name)
    return folder/name

def adapter(damage): return lambda w: ['upgrade', 'zoo/old', 'zoo/new', copy(w, 'adapter', damage)]

def keys(change):
    "What renames the tensors of an adapter, or adds to them"
    def damage(folder):
        t = load_file(folder/ADAPTER)
        save_file({name: x.clone() for k, x in t.items() for name in change(k)}, folder/ADAPTER)
    return damage

def renamed_module(folder):
    "Another name of a module, in tensors and settings"
    keys(lambda k: [k.replace('up_proj', 'upper')])(folder)
    file = folder/'adapter_config.json'
    file.write_text(file.read_text().replace('up_proj', 'upper'))

def pickled_adapter(folder):
    "A pickle that would run a command, in place of the adapter"
    (folder/ADAPTER).unlink()
    (folder/'adapter_model.bin').write_bytes(PICKLE % os.fsencode(folder.parent/'was_here'))

def two(folder):
    "Two adapters below a directory"
    for name in ('first', 'second'): shutil.copytree(ZOO/'adapter', folder/name)
    for f in folder.glob('adapter_*'): f.unlink()

def twice(key):
    "The names of a tensor in a file that holds two adapters"
    return [key.replace('.weight', f'.{name}.weight') for name in ('first', 'second')]

REQUESTS = dict(
    no_texts=(lambda w: ['align', 'zoo/old', 'zoo/new', '--texts', file(w, 'texts', b'')],
              'holds no text to compare layers on'),
    blank_texts=(lambda w: ['align', 'zoo/old', 'zoo/new', '--texts', file(w, 'texts', b'\n \n')],
                 'holds no text to compare layers on'),
    one_word=(lambda w: ['align', 'zoo/old', 'zoo/new', '--texts', file(w, 'texts', b'a')], 'fewer than 4 positions'),
    texts_not_text=(lambda w: ['align', 'zoo/old', 'zoo/new', '--texts', file(w, 'texts', b'\xff\xfe\x00')], 'texts'),
    out_is_a_file=(lambda w: ['align', 'zoo/old', 'zoo/new', '-o', file(w, 'here', b'')], 'exists already'),
    out_below_a_file=(lambda w: ['align', 'zoo/old', 'zoo/new', '-o', file(w, 'here', b'')/'out'], 'here'),
    data_empty=(lambda w: ['evaluate', 'zoo/new', '--data', file(w, 'data.jsonl', b'')], 'holds no example'),
    data_not_text=(lambda w: ['evaluate', 'zoo/new', '--data', file(w, 'data.jsonl', b'\xff\xfe\x00')], 'data.jsonl'),
    data_a_number=(lambda w: ['evaluate', 'zoo/new', '--data', file(w, 'data.jsonl', b'3')],
                   "example 1 has no text under 'instruction'"),
    data_without_answer=(lambda w: ['evaluate', 'zoo/new', '--data', file(w, 'data.jsonl', b'{"instruction": "Who?"}')],
                         "no text under 'output'"),
    adapter_is_a_model=(lambda w: ['upgrade', 'zoo/old', 'zoo/new', 'zoo/old'], 'adapter_config.json'),
    model_is_an_adapter=(lambda w: ['upgrade', 'zoo/adapter', 'zoo/new', 'zoo/adapter'], 'zoo/adapter'),
    alignment_is_a_model=(lambda w: ['transfer', 'zoo/adapter', ZOO/'old'], 'lorasuite align'),
    no_shared_token=(lambda w: ['align', 'zoo/old', copy(w, 'new', tokenizer(lambda t, i: (f'{t}~~', i)))],
                     'share no token'),
    too_deep=(adapter(keys(lambda k: [k.replace('layers.3', 'layers.9')])), 'updates model.layers.9'),
    unknown_module=(adapter(renamed_module), 'mlp.upper, which zoo/old does not have'),
    unknown_key=(adapter(keys(lambda k: [k.replace('lora_', 'lara_')])), 'is not a LoRA update'),
    two_adapters_in_a_file=(adapter(keys(twice)), 'holds 2 adapters (first, second): choose one by --adapter-name'),
    two_adapters=(adapter(two), 'holds 2 adapters (first, second): choose one by --adapter-name'),
    adapter_unreadable=(adapter(text('adapter_config.json', b'{')), 'adapter_config.json is not readable'),
    adapter_a_pickle=(adapter(pickled_adapter), 'adapter_model.bin holds more than tensors, and no code of a file '
                                                'is run: save the adapter again as safetensors'),
    adapter_dangling=(adapter(in_place_of(ADAPTER, dangling)), 'has no adapter_model.safetensors'),
    texts_a_directory=(lambda w: ['align', 'zoo/old', 'zoo/new', '--texts', w], 'Is a directory'),
    wrong_way_round=(lambda w: ['upgrade', 'zoo/new', 'zoo/old', 'zoo/adapter'], 'another model'),
)

@pytest.mark.parametrize('name', REQUESTS)
def test_impossible_request(tmp_path, name):
    make, message = REQUESTS[name]
    args, before = [str(a) for a in make(tmp_path)], sorted(tmp_path.iterdir())
    if args[0] != 'evaluate' and '-o' not in args: args += ['-o', str(tmp_path/'out')]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
