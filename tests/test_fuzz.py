"""Whatever is in the files of an adapter or an alignment, it is read as something that can be carried, or refused"""
import json, math
from contextlib import contextmanager
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save
from lorasuite.core.adapter import Adapter
from lorasuite.core.formats.peft import PREFIX
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.transfer import transfer

FILE, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
SOURCE = Adapter.load('zoo/adapter')
fuzz = settings(max_examples=200, deadline=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A small adapter"
    path = tmp_path_factory.mktemp('fuzz')/'adapter'
    paths = [f'model.layers.{l}.self_attn.{p}_proj' for l in range(2) for p in 'qv']
    Adapter({p: (torch.randn(2, 6), torch.randn(4, 2)) for p in paths}, 'base').save(path)
    return path

@contextmanager
def holding(file, content):
    "A file with other content for a while"
    before = file.read_bytes()
    file.write_bytes(content)
    try: yield
    finally: file.write_bytes(before)

def check_adapter(folder):
    "It is read, or refused by the name of one of its files"
    try: adapter = Adapter.load(folder)
    except (ValueError, OSError) as e:
        assert f'{folder}/{FILE}' in str(e) or f'{folder}/{CONFIG}' in str(e)
        return
    assert adapter.updates and isinstance(adapter.base, str)
    for A, B in adapter.updates.values():
        assert A.shape[0] == B.shape[1] > 0
        assert A.isfinite().all() and B.isfinite().all()
        assert A.dtype == B.dtype == torch.float32

@st.composite
def damaged(draw, content):
    "Some bytes flipped, cut off or put in"
    content = bytearray(content)
    places = st.integers(0, len(content)-1) | st.integers(0, 300)
    flips = st.lists(st.tuples(places, st.integers(1, 255)), max_size=3)
    for at, flip in draw(flips): content[at % len(content)] ^= flip
    start, end = draw(st.one_of(st.just((0, 0)), st.tuples(*[st.integers(0, len(content))]*2)))
    content[start:end] = draw(st.binary(max_size=9))
    return bytes(content)

@fuzz
@given(st.data())
def test_damaged_bytes(folder, data):
    file = folder/data.draw(st.sampled_from([FILE, CONFIG]))
    content = data.draw(damaged(file.read_bytes()) | st.binary(max_size=60))
    with holding(file, content): check_adapter(folder)

KINDS = dict(F64=8, F32=4, F16=2, BF16=2, F8_E4M3=1, F8_E5M2=1, F8_E8M0=1, F4=.5, C64=8, I64=8, I32=4, I16=2, I8=1,
             U8=1, U64=8, BOOL=1, NONE=1)
FACTORS = dict(A=[2, 3], B=[3, 2])
VALID = {f'{PREFIX}v.{l}.lora_{side}.weight': ('F32', shape) for l in range(2) for side, shape in FACTORS.items()}
starts, paths = st.sampled_from([PREFIX, '']), st.sampled_from(['v.0', 'v.1', ''])
marks = ['.lora_A', '.lora_B', '.lora_E', '.bias', '.lora_embedding_A', '.lora_magnitude_vector']
endings = st.sampled_from(['.weight', '', '.default.weight'])
made = st.tuples(starts, paths, st.sampled_from(marks), endings).map(''.join)
names = st.sampled_from([*VALID, *VALID]) | made | st.text(max_size=9)
shapes = st.sampled_from([[2, 3], [3, 2], [2, 1], [0, 3], [3, 0], [0], [], [6], [1, 2, 3],
                          [2**31, 2**31, 0], [2**40, 0], [0, 2**40]])
numbers = st.sampled_from([b'\0\0\x80?', b'@@']) | st.binary(min_size=1, max_size=16)

def safetensors(tensors, values):
    "A file of tensors of given types and shapes, with the given bytes over and over"
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(KINDS[dtype]*math.prod(shape))
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[end, end + size])
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + (values*end)[:end]

kinds = st.sampled_from(['LORA', 'LORA', 'ADALORA'])
other = st.dictionaries(names, st.none() | st.tuples(st.sampled_from([*KINDS]), shapes), max_size=4)

@fuzz
@given(other, numbers, kinds)
def test_other_tensors(folder, changes, values, kind):
    tensors = {k: t for k, t in (VALID | changes).items() if t}
    config = dict(peft_type=kind, r=2, init_r=2, target_r=1, total_step=9, lora_alpha=3)
    file = safetensors(tensors, values)
    with holding(folder/FILE, file), holding(folder/CONFIG, json.dumps(config).encode()): check_adapter(folder)

FIELDS = ('r', 'lora_alpha', 'target_modules', 'rank_pattern', 'alpha_pattern', 'use_rslora', 'peft_type',
          'init_lora_weights', 'base_model_name_or_path', 'init_r', 'total_step', 'bias', 'modules_to_save',
          'use_dora', 'lora_bias', 'layers_to_transform', 'layers_pattern', 'eva_config', 'loftq_config',
          'corda_config', 'megatron_config', 'runtime_config', 'auto_mapping', 'task_type', 'revision',
          'layer_replication', 'unheard_of')
known = st.sampled_from(['LORA', 'ADALORA', 'IA3', 'LOHA', 'pissa', 'loftq', 'eva', '(', '.*', 'q_proj', 10**400, 1e38,
                         -1])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | known
keys = st.sampled_from(['q_proj', '(', 'v.*']) | st.text(max_size=5)

def nested(x): return st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3)

values = st.recursive(leaves, nested, max_leaves=5)

@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3), st.none() | values)
def test_other_settings(folder, changes, instead):
    config = json.loads((folder/CONFIG).read_text()) | changes if instead is None else instead
    with holding(folder/CONFIG, json.dumps(config).encode()): check_adapter(folder)

DIGITS = b'{"peft_type": "LORA", "r": ' + b'9'*5000 + b'}'
HARD = [b'['*100_000, DIGITS, b'\xef\xbb\xbf{}', b'\xff']

@pytest.mark.parametrize('content', HARD)
def test_settings_that_are_hard_to_read(folder, content):
    message = f'{CONFIG} is not readable .*: save the adapter again'
    with holding(folder/CONFIG, content), pytest.raises(ValueError, match=message): Adapter.load(folder)

@pytest.mark.parametrize('content', [b'[]', b'null', b'1', b'"LORA"'])
def test_settings_that_are_no_table(folder, content):
    message = f'{CONFIG} is no table of settings: save the adapter again'
    with holding(folder/CONFIG, content), pytest.raises(ValueError, match=message): Adapter.load(folder)

def test_a_kind_that_is_no_name(folder):
    message = fr'{CONFIG}: peft_type=\[\] is no kind of adapter that PEFT .*: correct it there'
    with holding(folder/CONFIG, b'{"peft_type": []}'), pytest.raises(ValueError, match=message): Adapter.load(folder)

# ---- alignments

@pytest.fixture(scope='module', params=['exact', 'paper'])
def alignment(request, tmp_path_factory):
    path = tmp_path_factory.mktemp('fuzz')/'alignment'
    align('zoo/old', 'zoo/new', ['Ann keeps a cat.']*5, request.param).save(path)
    return path

def check_alignment(path):
    "It carries an adapter, or is refused by its name"
    try: alignment = Alignment.load(path)
    except ValueError as e:
        assert f'{path} is not a readable alignment' in str(e)
        return
    assert repr(alignment)
    carried = transfer(SOURCE, alignment)
    assert carried.card and all(t.isfinite().all() for ab in carried.updates.values() for t in ab)

@st.composite
def changed(draw, x):
    "A JSON value with one part replaced, taken out or put in"
    if not draw(st.integers(0, 3)) or not isinstance(x, dict|list) or not x: return draw(values)
    keys = sorted(x) if isinstance(x, dict) else range(len(x))
    k, x = draw(st.sampled_from(keys)), x.copy()
    if draw(st.integers(0, 4)): x[k] = draw(changed(x[k]))
    else: del x[k]
    return x

@settings(fuzz, max_examples=100)
@given(st.data())
def test_damaged_head(alignment, data):
    file = alignment/'alignment.json'
    content = file.read_bytes()
    edited = changed(json.loads(content)).map(lambda x: json.dumps(x).encode())
    with holding(file, data.draw(edited | damaged(content))): check_alignment(alignment)

CHANGES = dict(
    drop=lambda t: None,
    flat=lambda t: t.flatten(),
    turned=lambda t: t.mT if t.ndim > 1 else t[None],
    shorter=lambda t: torch.atleast_1d(t)[:-1],
    empty=lambda t: torch.atleast_1d(t)[:0],
    longer=lambda t: torch.cat([torch.atleast_1d(t)]*2),
    number=lambda t: t.sum(),
    infinite=lambda t: t*torch.inf,
    truth=lambda t: t > 0,
    whole=lambda t: t.long(),
    half=lambda t: t.half(),
    large=lambda t: t + 1000)

@settings(fuzz, max_examples=100)
@given(st.data())
def test_damaged_maps(alignment, data):
    file = alignment/'alignment.safetensors'
    tensors = load_file(file)
    key = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from([*CHANGES.values()]))
    t = change(tensors.pop(key))
    places = [key, key, *tensors, '9.q', 'x.q', '.', '0.', 'other', '-1.k']
    if t is not None: tensors[data.draw(st.sampled_from(places))] = t.contiguous()
    with holding(file, save(tensors)): check_alignment(alignment)
