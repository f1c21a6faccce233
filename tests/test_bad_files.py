"""Files and names that are wrong: each ends with one line that names the file and what is wrong, and nothing is left"""
import json, os, re, shutil, time, warnings
from dataclasses import replace
import pytest, torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save, save_file
from test_faults import both, config, pickled_weights, tensors, text, UP, WEIGHTS
from typer.testing import CliRunner
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.ranks import round_to
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.alignment_files import _checksum
from lorasuite.stages.card import tuned_card
from lorasuite.stages.transfer import transfer
from lorasuite.cli import app

ZOO = data_dir()/'zoo'
ADAPTER, SETTINGS = 'adapter_model.safetensors', 'adapter_config.json'
ESCAPE = '\x1b[31mred'
SLOW = r'(([a-z_]|[0-9.])+)+X'

@pytest.fixture(scope='module')
def maps_folder(tmp_path_factory):
    "An alignment of the tiny pair"
    path = tmp_path_factory.mktemp('maps')/'maps'
    align('zoo/old', 'zoo/new', ['Ann keeps a cat.']*5).save(path)
    return path

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def refused(result, *words):
    "Status 2, and a last line on stderr with all words and no escape sequence"
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith('lorasuite: ') and '\x1b' not in result.output
    for word in words: assert word in last, last
    return last

def edit(name, **changes):
    "What changes a JSON file"
    def damage(folder):
        file = folder/name
        said = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: x for key, x in said.items() if x is not ...}))
    return damage

# ---- models

PICKLE_INDEX, INDEX = 'pytorch_model.bin.index.json', 'model.safetensors.index.json'

def indexed(kind, name):
    "Weights in one file with an index that says another name for one weight, or for all"
    def damage(folder):
        found = load_file(folder/WEIGHTS)
        first = 'model-1.safetensors' if kind == INDEX else 'pytorch_model-1.bin'
        (folder/WEIGHTS).rename(folder/'model-1.safetensors')
        if kind == PICKLE_INDEX:
            (folder/'model-1.safetensors').unlink()
            torch.save(found, folder/first)
            torch.save(found, folder.parent/'outside.bin')
        named = str(folder.parent/'outside.bin') if name == 'absolute' else name
        places = named if isinstance(named, dict) else dict(weight_map=dict.fromkeys(found, first) | {UP: named})
        (folder/kind).write_text(json.dumps(places))
    return damage

INDICES = dict(
    absolute=('absolute', 'is not in its directory: do not trust'), above=('../outside.bin', 'is not in its directory'),
    number=(3, f'names 3 for {UP}'), null=(None, f'names None for {UP}'), list=([], f'names [] for {UP}'),
    empty_name=('', f"names '' for {UP}"), missing=('elsewhere', 'names elsewhere, which is not there: fetch'),
    escape=(ESCAPE, 'names \\x1b[31mred, which is not there'),
    no_table=(dict(weight_map=[]), 'is not a readable index'),
    no_map=({}, 'is not a readable index'), no_file=(dict(weight_map={}), 'names no file'),
    metadata=(dict(weight_map={UP: 'x'}, metadata=3), 'metadata is no table'))

@pytest.mark.parametrize('kind', [INDEX, PICKLE_INDEX])
@pytest.mark.parametrize('name', INDICES)
def test_index_of_a_model(tmp_path, kind, name):
    said, message = INDICES[name]
    shutil.copytree(ZOO/'new', tmp_path/'model')
    indexed(kind, said)(tmp_path/'model')
    before = {p.name for p in tmp_path.iterdir()}
    refused(run('upgrade', 'zoo/old', tmp_path/'model', 'zoo/adapter', '-o', tmp_path/'out'), kind, message)
    refused(run('inspect', 'zoo/old', tmp_path/'model'), kind, message)
    assert {p.name for p in tmp_path.iterdir()} == before

def cast(dtype, end='proj.weight'):
    "What turns weights into another type"
    return tensors(lambda t: {k: (10*x.float()).to(dtype) for k, x in t.items() if k.endswith(end)})

def quantised(said): return both(cast(torch.int8), edit('config.json', quantization_config=said))
def added(**roles):
    "One more token than the embeddings have, perhaps with a role"
    def damage(folder):
        state = json.loads((folder/'tokenizer.json').read_text())
        no = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
        more = dict(id=548, content='<new>', special=True) | no
        (folder/'tokenizer.json').write_text(json.dumps(state | dict(added_tokens=state['added_tokens'] + [more])))
        edit('tokenizer_config.json', **roles)(folder)
    return damage

FIRST = 'model.layers.0.mlp.down_proj.weight is of type'
GENERATION = 'generation_config.json'
MODELS = {f'{dtype}'.removeprefix('torch.'): (cast(dtype), f'{WEIGHTS}: {FIRST}') for dtype in (
    torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)} | dict(
    pickled_int8=(both(cast(torch.int8), pickled_weights), 'pytorch_model.bin: model.layers.0'),
    unknown_method=(quantised(dict(quant_method='mine')), f'{FIRST} I8: give the model before it was quantised'),
    no_method=(quantised({}), f'{FIRST} I8'), null=(quantised(None), f'{FIRST} I8'),
    method_a_number=(quantised(dict(quant_method=3)), f'{FIRST} I8'),
    integers_called_fp8=(quantised(dict(quant_method='fp8')), 'q_proj.weight is of type torch.int8'),
    method_a_list=(quantised([1]), 'quantization_config=[1] is no table of settings'),
    nan_in_the_settings=(config(rms_norm_eps=float('nan')), 'rms_norm_eps in its config.json is not a number'),
    million_layers=(config(num_hidden_layers=10**6), 'num_hidden_layers in its config.json is 1,000,000'),
    class_a_number=(config(architectures=[99]), 'architectures=[99] is no list of names'),
    type_a_number=(config(dtype=99), 'dtype=99 is no name of a type'),
    type_unknown=(config(dtype='float7'), "dtype='float7' is no name of a type"),
    no_layers=(config(num_hidden_layers=0), 'num_hidden_layers in its config.json is 0'),
    vast=(config(vocab_size=10**12), 'need more memory than this machine has'),
    generation_not_json=(text(GENERATION, b'{'), f'{GENERATION} is not readable'),
    generation_not_text=(text(GENERATION, b'\xff\xfe'), f'{GENERATION} is not readable'),
    generation_a_list=(text(GENERATION, b'[1]'), f'{GENERATION} is no table'),
    generation_null=(text(GENERATION, b'null'), f'{GENERATION} is no table'),
    generation_end=(edit(GENERATION, eos_token_id='end'), "eos_token_id='end' is not the number of a token"),
    tokenizer_settings=(text('tokenizer_config.json', b'{'), 'tokenizer_config.json is not a valid JSON'),
    tokenizer_settings_a_list=(text('tokenizer_config.json', b'[]'), 'tokenizer_config.json is no table'))

@pytest.mark.parametrize('name', MODELS)
def test_model(tmp_path, name):
    damage, message = MODELS[name]
    shutil.copytree(ZOO/'new', tmp_path/'model')
    damage(tmp_path/'model')
    start = time.monotonic()
    refused(run('upgrade', 'zoo/old', tmp_path/'model', 'zoo/adapter', '-o', tmp_path/'out'), message, str(tmp_path))
    assert time.monotonic() - start < 10 and [p.name for p in tmp_path.iterdir()] == ['model']
    with pytest.raises((ValueError, OSError), match=re.escape(message)): load_model(tmp_path/'model')

def test_inspect_answers_in_seconds(tmp_path):
    shutil.copytree(ZOO/'new', tmp_path/'model')
    config(num_hidden_layers=10**6)(tmp_path/'model')
    start = time.monotonic()
    refused(run('inspect', 'zoo/old', tmp_path/'model'), '1,000,000')
    assert time.monotonic() - start < 5

def test_activations_that_are_no_numbers(tmp_path):
    "A negative epsilon: each weight is fine, and the forward pass gives NaN"
    shutil.copytree(ZOO/'new', tmp_path/'model')
    config(rms_norm_eps=-1e3)(tmp_path/'model')
    for command in (['align', 'zoo/old', tmp_path/'model'], ['upgrade', 'zoo/old', tmp_path/'model', 'zoo/adapter']):
        refused(run(*command, '-o', tmp_path/'out'), f'{tmp_path}/model: layer 0 answers probe texts', 'not finite')
    assert [p.name for p in tmp_path.iterdir()] == ['model']

def test_numbers_that_are_not_finite_are_not_saved(maps_folder, tmp_path):
    path, (A, B) = next(iter((good := Adapter.load('zoo/adapter')).updates.items()))
    bad = replace(good, updates=good.updates | {path: (A, B*torch.nan)})
    with pytest.raises(ValueError, match=f'{path} has numbers that are not finite'): bad.save(tmp_path/'a')
    maps = Alignment.load(maps_folder)
    with pytest.raises(ValueError, match='read has numbers that are not finite'):
        replace(maps, read=maps.read*torch.nan).save(tmp_path/'b')
    assert not [*tmp_path.iterdir()]

def test_tokens_beyond_the_table(tmp_path):
    "They do no harm until a text has one"
    shutil.copytree(ZOO/'new', tmp_path/'model')
    added(pad_token='<new>')(tmp_path/'model')
    rows = [dict(instruction='Who is here?', output='Ann'), dict(instruction='Who?', output='Ann and Bob')]
    (tmp_path/'fine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (tmp_path/'odd.jsonl').write_text(json.dumps(dict(instruction='Who is <new>?', output='Ann')))
    (tmp_path/'texts').write_text('Ann <new> keeps a cat.\n'*5)
    model, what = tmp_path/'model', "no embedding for the token '<new>' (number 548, 548 rows)"
    assert run('evaluate', model, '--data', tmp_path/'fine.jsonl').exit_code == 0
    out = ['-o', tmp_path/'out']
    refused(run('evaluate', model, '--data', tmp_path/'odd.jsonl'), 'example 1', what)
    refused(run('finetune', model, '--data', tmp_path/'odd.jsonl', *out), 'example 1', what)
    refused(run('align', 'zoo/old', model, '--texts', tmp_path/'texts', *out), what)
    added(eos_token='<new>')(model)
    refused(run('evaluate', model, '--data', tmp_path/'fine.jsonl'), what)
    refused(run('finetune', model, '--data', tmp_path/'fine.jsonl', *out), what)
    assert not (tmp_path/'out').exists()

def test_no_end_token(tmp_path):
    shutil.copytree(ZOO/'new', tmp_path/'model')
    none = dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), ...)
    edit('tokenizer_config.json', **none)(tmp_path/'model')
    (tmp_path/'data.jsonl').write_text(json.dumps(dict(instruction='Who?', output='Ann')))
    result = run('finetune', tmp_path/'model', '--data', tmp_path/'data.jsonl', '-o', tmp_path/'out')
    refused(result, 'no token for the end of a text', 'set eos_token')
    assert {p.name for p in tmp_path.iterdir()} == {'model', 'data.jsonl'}

# ---- adapters

def factors(change):
    "What changes the tensors of an adapter"
    def damage(folder):
        t = load_file(folder/ADAPTER)
        save_file({k: x.contiguous() for k, x in (t | change(t)).items()}, folder/ADAPTER)
    return damage

def sharded(places):
    "One file with an index that says where tensors are"
    def damage(folder):
        (folder/ADAPTER).rename(folder/'part.safetensors')
        (folder/f'{ADAPTER}.index.json').write_text(json.dumps(places))
    return damage

KEY = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
PATH = KEY[17:-14]
ADAPTERS = dict(
    nan=(factors(lambda t: {KEY: t[KEY]*torch.nan}), f'{PATH} has values that are not finite'),
    infinite=(factors(lambda t: {KEY: t[KEY]/0}), f'{PATH} has values that are not finite'),
    integers=(factors(lambda t: {KEY: t[KEY].to(torch.int8)}), f'{KEY} is of type torch.int8'),
    truths=(factors(lambda t: {KEY: t[KEY] > 0}), f'{KEY} is of type torch.bool'),
    huge=(factors(lambda t: {k: 1e25*x for k, x in t.items()}), 'is too large for numbers of 32 bits'),
    escape=(factors(lambda t: {f'base_model.model.{ESCAPE}.lora_A.weight': torch.ones(3, 4)}),
            '\\x1b[31mred has lora_A'),
    index_above=(sharded(dict(weight_map={KEY: '../x'})), 'names ../x, which is not in its directory'),
    index_number=(sharded(dict(weight_map={KEY: 3})), f'names 3 for {KEY}'),
    index_null=(sharded(dict(weight_map={KEY: None})), f'names None for {KEY}'),
    index_list=(sharded([1]), 'is not a readable index'), index_missing=(
        sharded(dict(weight_map={KEY: 'gone'})), 'names gone, which is not there'),
    rank_0=(edit(SETTINGS, r=0), 'is 0, but its lora_A has 16 rows'),
    rank_negative=(edit(SETTINGS, r=-1), 'is -1, but its lora_A has 16 rows'),
    rank_text=(edit(SETTINGS, r='16'), "is '16', but its lora_A has 16 rows"),
    no_magnitudes=(edit(SETTINGS, use_dora=True), 'there is no lora_magnitude_vector for model.layers.0.mlp.down_proj'),
    pattern_a_number=(edit(SETTINGS, rank_pattern=3), 'rank_pattern=3 is no table of patterns'),
    alpha_text=(edit(SETTINGS, lora_alpha='16'), "lora_alpha='16' is not a finite number"),
    alpha_infinite=(edit(SETTINGS, lora_alpha=float('inf')), 'lora_alpha=inf is not a finite number'))
ADAPTERS |= {f'slow_{field}': (edit(SETTINGS, **{field: SLOW}), f'at {field}') for field in (
    'target_modules', 'exclude_modules')}
ADAPTERS |= {f'slow_{field}': (edit(SETTINGS, **{field: {SLOW: 8}}), f'at {field}') for field in (
    'rank_pattern', 'alpha_pattern')}
ADAPTERS['slow_in_another_method'] = edit(SETTINGS, peft_type='LOHA', target_modules=SLOW), 'at target_modules'
ADAPTERS['number_for_names'] = edit(SETTINGS, target_modules=5), 'target_modules=5 is no name and no list of names'
OTHER_TYPES = (
    ('use_rslora', 'maybe', 'true or false'), ('use_dora', 'false', 'true or false'), ('bias', True, 'one of none'),
    ('modules_to_save', 'lm_head', 'a list of names'), ('layers_to_transform', '3', 'a number or a list of them'),
    ('alpha_pattern', dict(q_proj='16'), 'a table of numbers'), ('lora_dropout', [0], 'a finite number'))
ADAPTERS |= {f'{name}_of_another_type': (edit(SETTINGS, **{name: x}), f'{name}={x!r} is not {form}')
             for name, x, form in OTHER_TYPES}
ADAPTERS['unknown_kind'] = edit(SETTINGS, peft_type='LORAX'), "peft_type='LORAX' is no kind of adapter"
ADAPTERS['layers_left_out'] = (edit(SETTINGS, layers_to_transform=[1]), 'leaves out model.layers.')
ADAPTERS['thousands'] = (edit(SETTINGS, rank_pattern={f'layers.{n}.gate': 8 for n in range(90_000)}),
                         '90,000 patterns for 28 modules are more than any adapter needs')

@pytest.mark.parametrize('name', ADAPTERS)
def test_adapter(tmp_path, monkeypatch, name):
    monkeypatch.setattr('lorasuite.core.formats.peft._PATIENCE', .5)
    damage, message = ADAPTERS[name]
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    damage(tmp_path/'adapter')
    start = time.monotonic()
    refused(run('upgrade', 'zoo/old', 'zoo/new', tmp_path/'adapter', '-o', tmp_path/'out'), message, str(tmp_path))
    assert time.monotonic() - start < 10 and [p.name for p in tmp_path.iterdir()] == ['adapter']

@pytest.mark.parametrize('targets', [r'.*\.(q|v)_proj', [f'm{n}' for n in range(9999)]])
def test_patterns_that_are_quick(tmp_path, targets):
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    edit(SETTINGS, target_modules=targets)(tmp_path/'adapter')
    with warnings.catch_warnings(record=True) as caught: found = Adapter.load(tmp_path/'adapter')
    assert len(found.updates) == 28
    assert isinstance(targets, str) or 'm0, m1, m10, m100, m1000, m1001 and 9,993 more' in str(caught[0].message)

def test_rank_above_the_width(tmp_path):
    "The product stays, in as many components as a weight of its size can have"
    good = Adapter.load('zoo/adapter')
    def higher(A, B): return torch.cat([A, A.new_ones(400, A.shape[1])]), torch.cat([B, B.new_zeros(len(B), 400)], 1)
    replace(good, updates={p: higher(*ab) for p, ab in good.updates.items()}).save(tmp_path/'high', compact=True)
    with pytest.warns(UserWarning, match='rank 416 of .* is more than a weight of its size can have .64.*28 modules'):
        found = Adapter.load(tmp_path/'high')
    for path in good.updates:
        assert len(found.updates[path][0]) == 64
        assert torch.allclose(found.delta(path), good.delta(path), atol=1e-5)

def test_overflow_on_writing(maps_folder, tmp_path):
    "Too large for 16 bits: refused with the remedy, which works"
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    edit(SETTINGS, lora_alpha=1e32)(tmp_path/'adapter')
    carry = ['transfer', tmp_path/'adapter', maps_folder, '-o', tmp_path/'out', '--dtype']
    refused(run(*carry, 'float16'), 'has values that float16 cannot hold', '--dtype')
    assert not (tmp_path/'out').exists()
    assert run(*carry, 'bfloat16').exit_code == 0
    assert all(t.isfinite().all() for t in load_file(tmp_path/'out'/ADAPTER).values())

@pytest.mark.parametrize('command', ['inspect', 'transfer', 'evaluate', 'finetune', 'convert'])
def test_every_command_says_that_an_adapter_changes_nothing(maps_folder, tmp_path, command):
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    factors(lambda t: {k: 0*x for k, x in t.items() if 'lora_B' in k})(tmp_path/'adapter')
    (tmp_path/'data.jsonl').write_text(json.dumps(dict(instruction='Who?', output='Ann')))
    adapter, out, data = tmp_path/'adapter', ['-o', tmp_path/'out'], ['--data', tmp_path/'data.jsonl']
    args = dict(inspect=['zoo/old', 'zoo/new', adapter], transfer=[adapter, maps_folder, *out],
                evaluate=['zoo/old', *data, '--adapter', adapter],
                finetune=['zoo/old', adapter, *data, '--steps', 1, *out], convert=[adapter, *out])
    result = run(command, *args[command])
    assert result.exit_code == 0 and 'the adapter changes nothing' in result.stderr, result.output

# ---- names

NAMES = ['a: b', 'a #b', 'a\nb: c', 'a\n---\nb', '---', 'yes', '123', '1e3', 'null', '~', '{a: b}', '- x', '@x',
         '%x', '*x', '!!python/object/apply:os.system [x]', '"', "it's", '`a`', '🦙', 'a\x85b', 'a\u2028b', ESCAPE,
         '<img src=x>']

@pytest.mark.parametrize('name', NAMES)
def test_names_of_models_in_cards(maps_folder, tmp_path, name):
    "The head of a card stays YAML with the name in it, and the text shows it as code"
    maps, given = Alignment.load(maps_folder), Adapter.load('zoo/adapter')
    maps = replace(maps, old=replace(maps.old, name=name), new=replace(maps.new, name=name))
    transfer(replace(given, source=dict(name=name, sha256='0')), maps).save(tmp_path/'out')
    check_card(tmp_path/'out'/'README.md', name)
    tuned = tuned_card(replace(given, card='', source=dict(name=name, sha256='0')), name, 'tuned')
    (tmp_path/'tuned.md').write_text(tuned)
    check_card(tmp_path/'tuned.md', name)

def check_card(file, name):
    "The name in the head is the model's, and outside of code the text has nothing of it that means something"
    card, outside = ModelCard.load(file), re.sub(r'(`+).+?\1', '', ModelCard.load(file).text)
    assert card.data.base_model == name and card.data.to_dict()['lorasuite']['base']['name'] == name
    assert '<img' not in outside and 'python/object' not in outside
    assert not re.search(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028]', file.read_text())

ODD = [ESCAPE, '<img src=x onerror=alert(1)>', '`a`](http://x)\n\n---\n', '\u202eright']

def test_names_of_tensors(maps_folder, tmp_path):
    "Neither the terminal nor the card gets them raw"
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    factors(lambda t: {f'base_model.model.{key}.weight': torch.ones(3) for key in ODD})(tmp_path/'adapter')
    inspected = run('inspect', 'zoo/old', 'zoo/new', tmp_path/'adapter')
    result = run('transfer', tmp_path/'adapter', maps_folder, '-o', tmp_path/'out')
    card = (tmp_path/'out'/'README.md').read_text()
    assert inspected.exit_code == result.exit_code == 0 and ModelCard(card).data.base_model == 'zoo/new'
    for printed in (inspected.output, result.output, card):
        assert 'right' in printed and not {*'\x1b\u202e'} & {*printed}
    assert '<img' not in re.sub(r'(`+).+?\1', '', card)

def test_a_base_of_half_characters(tmp_path):
    "A lone surrogate is legal in JSON and cannot be printed"
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    edit(SETTINGS, base_model_name_or_path='\ud800x')(tmp_path/'adapter')
    result = run('inspect', 'zoo/old', 'zoo/new', tmp_path/'adapter')
    assert result.exit_code == 0 and '\\ud800x' in result.stdout

# ---- alignments, behind the checksum

@pytest.fixture
def maps(maps_folder):
    "An alignment as its two files hold it"
    head = json.loads((maps_folder/'alignment.json').read_text())
    return {key: x for key, x in head.items() if key != 'checksum'}, load_file(maps_folder/'alignment.safetensors')

def write(folder, head, found):
    "Both files with a checksum that is right"
    weights = save({k: t.contiguous() for k, t in found.items()})
    (folder/'alignment.safetensors').write_bytes(weights)
    whole = head | dict(checksum=_checksum(head, weights)) if isinstance(head, dict) else head
    (folder/'alignment.json').write_text(json.dumps(whole))

def is_refused(folder, *fields):
    "One line that names the directory and the field"
    with pytest.raises(ValueError, match=re.escape(f'{folder} is not a readable alignment')) as caught:
        Alignment.load(folder)
    said = str(caught.value)
    assert any(field in said for field in fields) and len(said.splitlines()) == 1

VALUES = [None, -1, 10**12, 3.5, float('nan'), 'x', [], [[]], {}, ...]
FIELDS = ['method', 'layers', 'fit', 'unmatched', 'old', 'new', ('layers', 0), ('layers', 0, 1), ('fit', 'r2'),
          ('old', 'vocab'), ('new', 'hidden'), ('old', 'blocks', 0), ('new', 'kinds', 0, 'heads'),
          ('old', 'kinds', 0, 'shapes', 'q'),
          ('new', 'kinds', 0, 'shapes', 'down', 0), ('old', 'kinds', 0, 'spaces', 'o'), ('new', 'ends', 'head')]

@pytest.mark.parametrize('place', FIELDS, ids=str)
def test_fields_of_an_alignment(maps, tmp_path, place):
    "Every value of another kind is refused by the name of the field, or does no harm"
    place, source = (place,) if isinstance(place, str) else place, Adapter.load('zoo/adapter')
    for value in VALUES:
        head = json.loads(json.dumps(maps[0]))
        *owners, last = place
        part = head
        for key in owners: part = part[key]
        if value is ...: del part[last]
        else: part[last] = value
        write(tmp_path, head, maps[1])
        try: alignment = Alignment.load(tmp_path)
        except ValueError:
            is_refused(tmp_path, place[0], 'layers')
            continue
        carried = transfer(source, alignment)
        assert carried.card and all(t.isfinite().all() for ab in carried.updates.values() for t in ab)

def other(name, t):
    "What a tensor of an alignment must not be: what it is called, the tensor"
    yield 'missing', None
    yield 'longer', torch.cat([torch.atleast_1d(t)]*2)
    yield 'shorter', torch.atleast_1d(t)[:-1]
    yield 'truths', t > 0
    if t.is_floating_point():
        yield 'integers', t.long()
        for value in (torch.nan, torch.inf):
            yield f'with {value}', t.flatten().index_fill(0, torch.tensor(0), value).view_as(t)
        return
    yield 'floats', t.float()
    for value in (-2, 10**6, 2**60): yield f'with {value}', t.long().index_fill(0, torch.tensor(0), value)
    yield 'twice', t.clone().index_fill(0, torch.tensor([0, 1]), t.max().item())

TENSORS = ['read', 'write', 'cka', 'ends.ids', 'ends.ids2', 'ends.scale', 'ends.head_gain', '0.partners.heads',
           '0.partners.neurons', '0.maps.q', '0.maps.down', '0.norms.attention_gain', '3.partners.neurons', '3.maps.v']

@pytest.mark.parametrize('name', TENSORS)
def test_tensors_of_an_alignment(maps, tmp_path, name):
    field = dict(ends='ends').get(name.partition('.')[0], '')
    for _, t in other(name, maps[1][name]):
        found = {k: x for k, x in maps[1].items() if k != name} | ({} if t is None else {name: t})
        write(tmp_path, maps[0], found)
        is_refused(tmp_path, field)

@pytest.mark.parametrize('name', ['read', 'write'])
def test_a_map_of_zeros_is_no_map(maps, tmp_path, name):
    write(tmp_path, maps[0], maps[1] | {name: torch.zeros_like(maps[1][name])})
    is_refused(tmp_path, f'{name} has no number but zero): make it with `lorasuite align`')

@pytest.mark.parametrize('name', ['0.partners.heads', '0.maps.k', '3.maps.up_out', '3.maps.down_in'])
def test_tensors_of_the_published_maps(tmp_path, name):
    align('zoo/old', 'zoo/new', ['Ann keeps a cat.']*5, 'paper').save(tmp_path/'a')
    head = json.loads((tmp_path/'a'/'alignment.json').read_text())
    found = load_file(tmp_path/'a'/'alignment.safetensors')
    del head['checksum']
    (tmp_path/'b').mkdir()
    for _, t in other(name, found[name]):
        write(tmp_path/'b', head, {k: x for k, x in found.items() if k != name} | ({} if t is None else {name: t}))
        is_refused(tmp_path/'b', '')

def test_an_alignment_that_is_right_is_read(maps, tmp_path):
    write(tmp_path, *maps)
    assert Alignment.load(tmp_path).layers == [tuple(pair) for pair in maps[0]['layers']]

def test_rounding_says_the_option():
    good = Adapter.load('zoo/adapter')
    large = replace(good, updates={p: (A, 1e8*B) for p, (A, B) in good.updates.items()})
    with pytest.raises(ValueError, match='float16 cannot hold.*--dtype'): round_to(large, torch.float16)

# ---- what a further hundred of inputs found

def one(change, **settings):
    "An adapter with some tensors more or changed, and other settings"
    return both(factors(change), edit(SETTINGS, **settings))

ROWS = 'base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta'
HEAD, TABLE = 'base_model.model.lm_head.weight', 'base_model.model.model.embed_tokens.weight'
MORE = dict(
    head_of_integers=(one(lambda t: {HEAD: torch.ones(512, 64, dtype=torch.int8)}),
                      'lm_head.weight is of type torch.int8'),
    head_not_finite=(one(lambda t: {HEAD: torch.full((512, 64), torch.nan)}), 'lm_head.weight has values that are not'),
    narrow_table=(one(lambda t: {TABLE: torch.ones(512, 32)}), 'model.embed_tokens is 512×32, the weight of zoo/old'),
    rank_of_nothing=(one(lambda t: {KEY: t[KEY][:0], KEY.replace('_A', '_B'): t[KEY.replace('_A', '_B')][:, :0]}),
                     f'{PATH} has rank 0'),
    rank_a_float=(edit(SETTINGS, r=16.0), 'is 16.0, but its lora_A has 16 rows: set that number there'),
    settings_null=(text(SETTINGS, b'null'), f'{SETTINGS} is no table of settings'),
    rows_without_tokens=(one(lambda t: {ROWS: torch.ones(3, 64)}),
                         'has no finite row for each of 0 trained tokens'),
    other_layer=(one(lambda t: {KEY.replace('.0.', '.99.').replace('_A', s): x for s, x in (
        ('_A', torch.ones(16, 64)), ('_B', torch.ones(64, 16)))}), 'model.layers.99.self_attn.q_proj, which zoo/old'),
    other_shape=(one(lambda t: {KEY: torch.ones(16, 63)}), f'{PATH} is 64×63, the weight of zoo/old is 64×64'))

@pytest.mark.parametrize('name', MORE)
def test_adapter_before_any_long_work(tmp_path, monkeypatch, name):
    damage, message = MORE[name]
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    damage(tmp_path/'adapter')
    monkeypatch.setattr('lorasuite.training.upgrade.align', lambda *args, **kwargs: pytest.fail('it aligned'))
    result = run('upgrade', 'zoo/old', 'zoo/new', tmp_path/'adapter', '-o', tmp_path/'out')
    assert refused(result, message).count(str(tmp_path)) <= 1 and len(result.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['adapter']

def test_another_base_is_named_before_any_long_work(tmp_path, monkeypatch):
    monkeypatch.setattr('lorasuite.training.upgrade.align', lambda *args, **kwargs: pytest.fail('it aligned'))
    result = run('upgrade', 'zoo/stranger', 'zoo/new', 'zoo/adapter', '-o', tmp_path/'out')
    refused(result, 'is 64×192, the weight of zoo/stranger is 96×288')
    assert 'WRONG BASE? the weight files of zoo/stranger' in result.stderr
    assert result.stderr.startswith('lorasuite: zoo/adapter: ') and result.stderr.rstrip().endswith('give zoo/old')

QUESTIONS = ['--inputs', 'zoo/test.jsonl']
MISFITS = dict( # command with an adapter of another base: how its message ends
    upgrade=(['upgrade', 'zoo/new', 'zoo/old', 'zoo/adapter'], 'are OLD and NEW swapped?'),
    inspect=(['inspect', 'zoo/new', 'zoo/old', 'zoo/adapter'], 'are OLD and NEW swapped?'),
    refresh=(['refresh', 'zoo/new', 'zoo/adapter', 'zoo/old', *QUESTIONS], 'are OLD and NEW swapped?'),
    start=(['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--start', 'zoo/adapter', *QUESTIONS], 'give zoo/old'),
    finetune=(['finetune', 'zoo/new', 'zoo/adapter', '--data', 'zoo/test.jsonl'], 'give zoo/old'),
    evaluate=(['evaluate', 'zoo/new', '--adapter', 'zoo/adapter', '--data', 'zoo/test.jsonl'], 'give zoo/old'),
    convert=(['convert', 'zoo/adapter', '--base', 'zoo/new'], 'give zoo/old'))

@pytest.mark.parametrize('name', MISFITS)
def test_an_adapter_of_another_base(tmp_path, monkeypatch, name):
    "One line names the adapter, the module, the sizes and the base to give; no weight is read"
    monkeypatch.setattr('lorasuite.core.loading.load_model', lambda *args, **kwargs: pytest.fail('it read weights'))
    args, end = MISFITS[name]
    result = run(*args, *(() if args[0] in ('inspect', 'evaluate') else ('-o', tmp_path/'out')))
    line = refused(result, 'the weight of zoo/new is 96×288')
    assert line.startswith('lorasuite: zoo/adapter: ') and line.endswith(end), line
    assert 'layers.0.mlp.down_proj is 64×192' in line and 'WRONG BASE? the weight files of zoo/new' in line
    assert 'warning' not in result.stderr and not [*tmp_path.iterdir()]

def test_many_of_another_base(tmp_path, monkeypatch):
    monkeypatch.setattr('lorasuite.training.refresh_many.load_model', lambda *args: pytest.fail('it read weights'))
    for name in ('a', 'b'): shutil.copytree(ZOO/'adapter', tmp_path/name)
    args = ['refresh', 'zoo/new', tmp_path/'a', tmp_path/'b', 'zoo/old', *QUESTIONS, '-o', tmp_path/'out', '--json']
    rows = json.loads(run(*args).stdout)['adapters']
    for row in rows: assert row['error'].startswith(row['adapter']) and row['error'].endswith('OLD and NEW swapped?')

def test_a_base_that_only_its_name_or_shapes_betray(tmp_path):
    "Without hashes the new model tells by its shapes; where all fits, there is one warning"
    (tmp_path/'few.jsonl').write_text(''.join((ZOO/'test.jsonl').read_text().splitlines(keepends=True)[:3]))
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    edit(SETTINGS, base_model_name_or_path='org/unknown')(tmp_path/'adapter')
    line = refused(run('inspect', 'zoo/new', 'zoo/old', tmp_path/'adapter'), 'which may be another model than zoo/new')
    assert line.endswith('are OLD and NEW swapped?')
    line = refused(run('inspect', 'zoo/new', 'zoo/stranger', tmp_path/'adapter'), 'give org/unknown')
    result = run('evaluate', 'zoo/old', '--adapter', tmp_path/'adapter', '--data', tmp_path/'few.jsonl')
    assert result.exit_code == 0 and result.stderr.count('warning: ') == 1
    assert 'trained on org/unknown, which may be another model than zoo/old' in result.stderr

@pytest.mark.parametrize('name', ['config.json', SETTINGS, 'tokenizer.json'])
def test_a_pipe_in_a_directory_is_not_waited_for(tmp_path, name):
    kind = 'adapter' if name == SETTINGS else 'old'
    shutil.copytree(ZOO/kind, tmp_path/kind)
    (tmp_path/kind/name).unlink(missing_ok=True)
    os.mkfifo(tmp_path/kind/name)
    adapter, old = (tmp_path/kind, 'zoo/old') if kind == 'adapter' else ('zoo/adapter', tmp_path/kind)
    refused(run('upgrade', old, 'zoo/new', adapter, '-o', tmp_path/'out'), f'{name} is not an ordinary file')

@pytest.mark.parametrize('setting', [dict(modules_to_save=['lm_head']), dict(trainable_token_indices=[3]),
                                     dict(target_parameters=['mlp.gate_proj.weight'])])
def test_settings_that_say_more_than_the_file_has(tmp_path, setting):
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    edit(SETTINGS, **setting)(tmp_path/'adapter')
    with pytest.warns(UserWarning, match=f'{next(iter(setting))} names .* the file has no tensor for it: what was'):
        Adapter.load(tmp_path/'adapter')

def test_a_classifier_saves_one_of_two_names(tmp_path):
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    both(edit(SETTINGS, modules_to_save=['classifier', 'score'], task_type='SEQ_CLS'),
         factors(lambda t: {'base_model.model.score.weight': torch.ones(2, 64)}))(tmp_path/'adapter')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*modules_to_save')
        Adapter.load(tmp_path/'adapter')

def test_a_weight_that_the_model_lacks_is_not_said_to_be_on_it(tmp_path):
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    odd = {'base_model.model.model.fog\nlight.weight': torch.ones(3), HEAD: torch.ones(512, 64)}
    factors(lambda t: odd)(tmp_path/'adapter')
    (tmp_path/'q.json').write_text('[{"instruction": "Who?", "output": "Ann"}]')
    said = run('evaluate', 'zoo/old', '--adapter', tmp_path/'adapter', '--data', tmp_path/'q.json').stdout.splitlines()
    assert [line for line in said if line.startswith('whole')] == [
        'whole weights, put on the model as they are: lm_head.weight']
    assert any(line.startswith('skipped, ') and line.endswith('model.fog light.weight') for line in said)

def test_numbers_and_names_of_libraries_in_a_configuration(tmp_path):
    for change, message in ((dict(hidden_act='nope'), "'nope' is missing in its config.json, or unknown to transf"),
                            (dict(num_attention_heads=0), 'a size in its config.json is 0')):
        shutil.copytree(ZOO/'old', tmp_path/'model')
        config(**change)(tmp_path/'model')
        refused(run('inspect', tmp_path/'model', 'zoo/new'), message)
        shutil.rmtree(tmp_path/'model')

def test_a_model_without_an_end(tmp_path):
    shutil.copytree(ZOO/'old', tmp_path/'old')
    for file in ('config.json', 'generation_config.json'): edit(file, eos_token_id=None)(tmp_path/'old')
    edit('tokenizer_config.json', eos_token=None)(tmp_path/'old')
    (tmp_path/'q.json').write_text('[{"instruction": "Who?", "output": "Ann"}]')
    result = run('evaluate', tmp_path/'old', '--data', tmp_path/'q.json')
    assert result.exit_code == 0 and 'no token for the end of an answer' in result.stderr

def test_alignments_behind_their_checksum(tmp_path, maps_folder):
    def saved(change_head=None, change=None):
        folder = tmp_path/'maps'
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(maps_folder, folder)
        head, found = json.loads((folder/'alignment.json').read_text()), load_file(folder/'alignment.safetensors')
        if change_head: change_head(head)
        if change: change(found)
        save_file(found, folder/'alignment.safetensors')
        del head['checksum']
        head['checksum'] = _checksum(head, (folder/'alignment.safetensors').read_bytes())
        (folder/'alignment.json').write_text(json.dumps(head))
        return folder
    def short(name): return lambda t: t.update({name: t[name][:-1].clone()})
    cases = [(saved, lambda h: h['old'].update(name=' '), None, 'old.name is empty'),
             (saved, lambda h: h.update(format=0), None, 'format is 0'),
             (saved, lambda h: h.update(format=-3), None, 'format is -3'),
             (saved, None, short('ends.head_offset'), 'ends.head_offset is 63, not 64'),
             (saved, None, lambda t: t.update({'ends.scale': torch.ones(2)}), 'ends.scale is not one number')]
    assert Alignment.load(saved()).layers
    for make, head, change, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)): Alignment.load(make(head, change))

@pytest.mark.parametrize('sha256', ['abc', '[1]', '{model.safetensors: 5}', '3'])
def test_a_card_of_ours_that_somebody_changed(tmp_path, sha256):
    "What it says of the base is not believed, and nothing stumbles over it"
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    head = f'---\nlorasuite:\n  base:\n    name: zoo/old\n    sha256: {sha256}\n---\n# Mine\n'
    (tmp_path/'adapter'/'README.md').write_text(head)
    result = run('convert', tmp_path/'adapter', '-o', tmp_path/'out')
    assert result.exit_code == 0 and result.stderr == '', result.output

def test_biases_that_lack_are_named_in_a_few_words(tmp_path):
    shutil.copytree(ZOO/'adapter', tmp_path/'adapter')
    edit(SETTINGS, lora_bias=True)(tmp_path/'adapter')
    with pytest.raises(ValueError, match='no lora_B.bias for model.layers.0.mlp.down_proj, .* and 22 more: the file'):
        Adapter.load(tmp_path/'adapter')
