"""Files for other programs: one rank for all modules, shorter numbers, mlx-lm's and llama.cpp's formats"""
import copy, json, shutil
from dataclasses import replace
import pytest, torch
from models import error, logits, only, random_adapter, random_decoder, tokens
from peft import get_peft_model, IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PeftModel
from peft import PromptTuningConfig, VeraConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter, detect_format
from lorasuite.core.experts import weight_names
from lorasuite.core.files import data_dir
from lorasuite.core.formats import peft
from lorasuite.core.loading import load_model
from lorasuite.core.ranks import base_dtype, relative_errors, round_to, shrink, truncate
from lorasuite.stages.alignment import align
from lorasuite.stages.card import tuned_card
from lorasuite.stages.pairing import base_doubt
from lorasuite.stages.transfer import transfer

FILE, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'

@pytest.fixture
def mixed(decoder, adapter):
    "An adapter with ranks 1 to 4, of the first and third layer alone, and the modules of its base"
    kept = random_adapter(adapter).updates
    rank = {path: 1 + i%4 for i, path in enumerate(sorted(kept))}
    updates = {p: (A[:rank[p]], B[:, :rank[p]]) for p, (A, B) in kept.items() if '.0.' in p or '.2.' in p}
    return replace(adapter, updates=updates, modules=weight_names(decoder.model).all_modules())

def settings(path): return json.loads((path/CONFIG).read_text())

def same(a, b): return a.keys() == b.keys() and all(t.equal(u) for p in a for t, u in zip(a[p], b[p]))

def by_peft_alone(decoder, path, ids):
    "Logits through PEFT, which must find all that the file has, and nothing less"
    model = PeftModel.from_pretrained(copy.deepcopy(decoder.model), str(path))
    held = {key.replace('.default', '') for key in model.state_dict() if 'lora_' in key}
    assert held == load_file(path/FILE).keys()
    with torch.no_grad(): return model(ids).logits

# ---- one rank for all

def test_one_rank_plain_names_every_layer(decoder, mixed, tmp_path):
    mixed.save(tmp_path/'a')
    config, tensors, ids = settings(tmp_path/'a'), load_file(tmp_path/'a'/FILE), tokens()
    assert config['r'] == config['lora_alpha'] == 4 and not config['use_rslora']
    assert config['rank_pattern'] == config['alpha_pattern'] == {}
    assert config['target_modules'] == sorted({p.rpartition('.')[2] for p in mixed.updates})
    assert {t.shape['lora_B' in key] for key, t in tensors.items()} == {4}
    assert len(tensors) == 2*7*decoder.layers
    assert error(by_peft_alone(decoder, tmp_path/'a', ids), logits(decoder, ids, mixed)) <= 1e-6
    again = Adapter.load(tmp_path/'a')
    assert same(again.updates, mixed.updates) and [again.norm(p) for p in again.updates] == [
        mixed.norm(p) for p in again.updates]

@pytest.mark.parametrize('leaf, written', [('q_proj', {'q_proj', 'k_proj', 'v_proj'}), ('o_proj', {'o_proj'}),
                                           ('up_proj', {'gate_proj', 'up_proj'})])
def test_what_servers_fuse_is_written_together(decoder, mixed, tmp_path, leaf, written):
    some, ids = only(mixed, leaf), tokens()
    some.modules = mixed.modules
    some.save(tmp_path/'a')
    assert {*settings(tmp_path/'a')['target_modules']} == written
    assert len(load_file(tmp_path/'a'/FILE)) == 2*len(written)*decoder.layers
    assert error(by_peft_alone(decoder, tmp_path/'a', ids), logits(decoder, ids, some)) <= 1e-6
    assert same(Adapter.load(tmp_path/'a').updates, some.updates)

def test_whole_paths_where_a_name_means_something_else(mixed):
    one = 'model.layers.0.self_attn.q_proj'
    for other in ('vision_tower.layers.0.self_attn.q_proj', 'gate.q_proj'):
        names = peft.adapter_config(replace(mixed, modules=mixed.modules | {other: None})).target_modules
        assert one in names and 'q_proj' not in names and 'v_proj' in names
        assert f'{one[:13]}1{one[14:]}' in names and other not in names # zeros in all layers, none in the tower
    unknown = peft.adapter_config(replace(mixed, modules={}))
    assert {*unknown.target_modules} == mixed.updates.keys() and unknown.r == 4

def test_compact_files(decoder, mixed, tmp_path):
    mixed.save(tmp_path/'a', compact=True)
    config, tensors, ids = settings(tmp_path/'a'), load_file(tmp_path/'a'/FILE), tokens()
    assert len(tensors) == 2*len(mixed.updates) and config['alpha_pattern'] == config['rank_pattern']
    assert {p: len(A) for p, (A, _) in mixed.updates.items()} == {
        p: config['rank_pattern'].get(p, config['r']) for p in mixed.updates}
    assert error(by_peft_alone(decoder, tmp_path/'a', ids), logits(decoder, ids, mixed)) <= 1e-6
    with pytest.raises(TypeError, match='compact'): mixed.save(tmp_path/'b', format='mlx', compact=True)

def test_ranks_do_not_grow_from_transfer_to_transfer(decoder, tokenizer, mixed, tmp_path):
    other = random_decoder(tokenizer, seed=1, hidden=96, heads=6, kv_heads=3)
    there, back = align(decoder, other), align(other, decoder)
    before = max(len(A) for A, _ in mixed.updates.values())
    for maps in (there, back, there):
        mixed = transfer(mixed, maps)
        mixed.save(tmp_path/'a')
        mixed = Adapter.load(tmp_path/'a')
        assert max(len(A) for A, _ in mixed.updates.values()) <= before
        for file in (tmp_path/'a').iterdir(): file.unlink()
        (tmp_path/'a').rmdir()

def test_carried_to_fused_modules(decoder, tokenizer, adapter, tmp_path):
    "q, k and v become one update of three times the rank; the file has that rank everywhere"
    fused = random_decoder(tokenizer, 'phi3', seed=1)
    carried = transfer(random_adapter(adapter), align(decoder, fused))
    assert sorted({len(A) for A, _ in carried.updates.values()}) == [4, 8, 12]
    carried.save(tmp_path/'a')
    config, ids = settings(tmp_path/'a'), tokens()
    assert config['r'] == 12 and not config['rank_pattern']
    assert config['target_modules'] == ['down_proj', 'gate_up_proj', 'o_proj', 'qkv_proj']
    assert error(by_peft_alone(fused, tmp_path/'a', ids), logits(fused, ids, carried)) <= 1e-6

def test_zeros_alone_are_no_adapter(mixed, tmp_path):
    zeros = {p: (0*A, 0*B) for p, (A, B) in mixed.updates.items()}
    replace(mixed, updates=zeros).save(tmp_path/'a')
    with pytest.raises(ValueError, match='all factors are zero, so the adapter changes nothing'):
        Adapter.load(tmp_path/'a')

# ---- smaller ones, with their errors

def test_errors_are_those_of_dense_matrices(mixed):
    for smaller in (truncate(mixed, 2), round_to(mixed, torch.bfloat16), round_to(mixed, torch.float16)):
        total, each = relative_errors(mixed, smaller)
        dense = {p: (mixed.delta(p).double() - B.double()@A.double()) for p, (A, B) in smaller.updates.items()}
        for p, lost in dense.items():
            assert each[p] == pytest.approx((lost.norm()/mixed.delta(p).norm()).item(), rel=1e-3, abs=1e-7)
        lost, whole = (sum(t.norm()**2 for t in ts)**.5 for ts in (dense.values(), map(mixed.delta, dense)))
        assert total == pytest.approx((lost/whole).item(), rel=1e-3)
    for p in mixed.updates: # no matrix of this rank is nearer
        values = torch.linalg.svdvals(mixed.delta(p).double())
        best = values[2:].norm()/values.norm()
        assert relative_errors(mixed, truncate(mixed, 2))[1][p] == pytest.approx(best.item(), abs=1e-6)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('format', ['peft', 'mlx', 'gguf'])
def test_numbers_of_16_bits(specialist, tmp_path, dtype, format):
    if format == 'gguf': pytest.importorskip('gguf')
    rounded, errors = shrink(specialist, 5, dtype)
    assert 0 < errors['dtype_error'] < 2**-7 and .01 < errors['rank_error'] < .5
    rounded.save(tmp_path/'a', format=format)
    assert same(Adapter.load(tmp_path/'a').updates, {p: [t.float() for t in ab] for p, ab in rounded.updates.items()})
    card = (tmp_path/'a'/'README.md').read_text()
    assert 'cut to rank 5: ‖ΔW − ΔW′‖/‖ΔW‖ is' in card and f'rounded to {str(dtype)[6:]}' in card
    file = next(f for f in (tmp_path/'a').iterdir() if f.suffix in ('.safetensors', '.gguf'))
    if format != 'gguf': assert {t.dtype for t in load_file(file).values()} == {dtype}
    assert file.stat().st_size < 2.2*sum(A.numel() + B.numel() for A, B in rounded.updates.values()) + 20_000

def test_values_beyond_a_type(mixed):
    path = next(iter(mixed.updates))
    mixed.updates[path][1][0, 0] = 1e6
    with pytest.raises(ValueError, match=f'{path} has values that float16 cannot hold'): round_to(mixed, torch.float16)
    assert round_to(mixed, torch.bfloat16).updates[path][1].isfinite().all()

# ---- mlx-lm

@pytest.fixture
def specialist(): return Adapter.load('zoo/adapter')

def mlx_files(path, tensors, **changes):
    "Files as mlx-lm writes them"
    lora = dict(rank=2, scale=20., dropout=0., keys=['self_attn.q_proj'])
    path.mkdir()
    (path/CONFIG).write_text(json.dumps(dict(fine_tune_type='lora', num_layers=4, lora_parameters=lora) | changes))
    save_file(tensors, path/'adapters.safetensors')
    return path

Q = 'model.layers.0.self_attn.q_proj'
PAIR = {f'{Q}.lora_a': torch.ones(64, 2), f'{Q}.lora_b': torch.ones(2, 64)}
WRONG_MLX = dict(
    half=(dict(list(PAIR.items())[:1]), {}, f'{Q} has only lora_a'),
    module=(PAIR, dict(lora_parameters=dict(rank=2, scale=1, keys=['self_attn.q_proj', 'self_attn.v_proj'])),
            'nothing of self_attn.v_proj'),
    rank=(PAIR, dict(lora_parameters=dict(rank=8, scale=1)), 'no update of rank 8'),
    scale=(PAIR, dict(lora_parameters=dict(rank=2, alpha=4)), 'scale in lora_parameters is None'),
    word=(PAIR, dict(lora_parameters=dict(rank='2', scale=1)), "rank in lora_parameters is '2'"),
    dora=(PAIR, dict(fine_tune_type='dora'), 'needs one finite magnitude for each output'),
    full=(PAIR, dict(fine_tune_type='full'), "fine_tune_type 'full' is not carried"),
    magnitude=(PAIR | {f'{Q}.m': torch.ones(64)}, {}, 'has magnitudes of DoRA, but .* does not say dora'),
    weight=(PAIR | {'model.norm.weight': torch.ones(64)}, {}, 'model.norm.weight is not a LoRA update'),
    nan=(PAIR | {f'{Q}.lora_b': torch.full((2, 64), torch.nan)}, {}, 'not finite'),
    number=(PAIR, dict(lora_parameters=dict(rank=2, scale=1, keys=5)), 'keys in lora_parameters is 5, no list of'),
    infinite=(PAIR, dict(lora_parameters=dict(rank=2, scale=float('inf'))), 'scale in lora_parameters is inf'),
    large=(PAIR, dict(lora_parameters=dict(rank=2, scale=1e39)), 'scale 1e.39 makes the update of .* infinite'),
    base=(PAIR, dict(model=['x']), r"model is \['x'\], no name"),
    none=({}, {}, 'holds no LoRA update'))

@pytest.mark.parametrize('name', WRONG_MLX)
def test_wrong_mlx_files(tmp_path, name):
    tensors, changes, message = WRONG_MLX[name]
    with pytest.raises(ValueError, match=message): Adapter.load(mlx_files(tmp_path/'a', tensors, **changes))

def test_mlx_scale_and_sides(tmp_path):
    a, b = torch.randn(64, 2), torch.randn(2, 48)
    read = Adapter.load(mlx_files(tmp_path/'a', {f'{Q}.lora_a': a, f'{Q}.lora_b': b}, model='org/base'))
    assert torch.allclose(read.delta(Q), 20*b.T@a.T, atol=1e-4) and read.base == 'org/base'

def saved(path, decoder):
    "A model with its tokenizer"
    decoder.model.save_pretrained(path)
    decoder.tokenizer.save_pretrained(path)
    return str(path)

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('format', ['mlx', 'gguf'])
def test_embeddings_in_other_formats(tokenizer, tmp_path, format, tied):
    if format == 'gguf': pytest.importorskip('gguf')
    base = saved(tmp_path/'base', random_decoder(tokenizer, tie_word_embeddings=tied))
    table = {'model.embed_tokens': (torch.randn(2, 512), torch.randn(64, 2))}
    head = {'lm_head': (torch.randn(2, 64), torch.randn(512, 2))}
    for i, ends in enumerate((Adapter({}, base, embeddings=table), Adapter(head, base))):
        if tied:
            with pytest.raises(ValueError, match='one matrix for input and output embedding.*--format peft'):
                ends.save(tmp_path/str(i), format=format)
            continue
        ends.save(tmp_path/str(i), format=format)
        again = Adapter.load(tmp_path/str(i))
        assert same(again.updates | again.embeddings, ends.updates | ends.embeddings)

MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1,
           mlp_only_layers=[], norm_topk_prob=True)
EXPERTS = dict(mixtral='block_sparse_moe.switch_mlp', qwen3_moe='mlp.switch_mlp', olmoe='mlp.switch_mlp',
               gpt_oss='mlp.experts')

@pytest.mark.parametrize('family', EXPERTS)
def test_experts_in_mlx(tokenizer, tmp_path, family):
    decoder = random_decoder(tokenizer, family, layers=2, head_dim=16, **MOE)
    base, names = saved(tmp_path/'base', decoder), weight_names(decoder.model)
    torch.manual_seed(0)
    updates = {f'{p}[{n}]': (torch.randn(n + 1, s.in_), torch.randn(s.out, n + 1))
               for p, s in names.stacks.items() for n in (0, 2)}
    Adapter(updates, base, parameters={p: names.stored[p] for p in names.stacks}).save(tmp_path/'a', format='mlx')
    tensors = load_file(tmp_path/'a'/'adapters.safetensors')
    stack = names.stacks['model.layers.0.mlp.experts.down_proj']
    found = f'model.layers.0.{EXPERTS[family]}'
    assert tensors[f'{found}.down_proj.lora_a'].shape == (4, 3, stack.in_)
    assert tensors[f'{found}.up_proj.lora_b'].shape == (4, stack.in_, 3)
    again = Adapter.load(tmp_path/'a').named_for(align_info(decoder))
    assert again.updates.keys() == updates.keys() and not again.skipped
    for p, (A, B) in updates.items():
        assert error(again.delta(p), B@A) < 1e-6 and len(again.updates[p][0]) == len(A)

def align_info(decoder):
    from lorasuite.core.model import model_info
    return model_info(decoder)

# ---- llama.cpp

def gguf_file(path, tensors, **changes):
    "A GGUF adapter, of a strange hand"
    import gguf
    values = dict(architecture='llama', type='adapter', adapter='lora', alpha=8., base='zoo/old') | changes
    writer = gguf.GGUFWriter(path, values['architecture'])
    writer.add_string('general.type', values['type'])
    writer.add_string('adapter.type', values['adapter'])
    writer.add_float32('adapter.lora.alpha', values['alpha'])
    if values['base']: writer.add_string('lorasuite.base_model', values['base'])
    for name, t in tensors.items(): writer.add_tensor(name, t.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

K = 'blk.1.attn_k.weight'
FACTORS = {f'{K}.lora_a': torch.arange(128.).view(2, 64), f'{K}.lora_b': torch.arange(128.).view(64, 2)}
WRONG_GGUF = dict(
    half=(dict(list(FACTORS.items())[:1]), {}, f'{K} has only lora_a'),
    model=(FACTORS, dict(type='model'), 'holds a model, not an adapter'),
    kind=(FACTORS, dict(adapter='control'), "type 'control', not a LoRA"),
    other=(FACTORS, dict(architecture='qwen2'), 'architecture qwen2, zoo/old is llama'),
    nobody=(FACTORS, dict(base=''), 'does not say for which model.*convert .* --base MODEL'),
    deeper=({name.replace('.1.', '.9.'): t for name, t in FACTORS.items()}, {}, 'blk.9.attn_k.weight, which zoo/old'),
    nan=(FACTORS | {f'{K}.lora_b': torch.full((64, 2), torch.nan)}, {}, 'no matrix of finite numbers'),
    alpha=(FACTORS, dict(alpha=float('nan')), 'adapter.lora.alpha is nan, no finite number'),
    gone=(FACTORS, dict(base='/nowhere/old'), 'is for /nowhere/old, which is not here.*convert .* --base MODEL'),
    none=({}, {}, 'holds no LoRA update'))

@pytest.mark.parametrize('name', WRONG_GGUF)
def test_wrong_gguf_files(tmp_path, name):
    pytest.importorskip('gguf')
    tensors, changes, message = WRONG_GGUF[name]
    with pytest.raises((ValueError, OSError), match=message):
        Adapter.load(gguf_file(tmp_path/'a.gguf', tensors, **changes))

@pytest.mark.parametrize('alpha, scale', [(8., 4), (0., 1)])
def test_gguf_scale_and_rows(tmp_path, alpha, scale):
    "α is divided by the rank of the tensor, zero means a scale of one; row 2i of a head was row i, 2i + 1 was i + 8"
    pytest.importorskip('gguf')
    read = Adapter.load(gguf_file(tmp_path/'a.gguf', FACTORS | {'blk.0.attn_norm.weight': torch.ones(64)}, alpha=alpha))
    A, B = read.updates['model.layers.1.self_attn.k_proj']
    assert A.equal(FACTORS[f'{K}.lora_a']) and [*read.skipped] == ['blk.0.attn_norm.weight']
    order = [16*head + 2*(i % 8) + i//8 for head in range(4) for i in range(16)]
    assert B.equal(scale*FACTORS[f'{K}.lora_b'][order])

REFUSED = dict(experts=({'model.layers.0.mlp.experts.down_proj[1]': (torch.ones(1, 3), torch.ones(3, 1))}, 'experts'),
               tower=({'vision.q': (torch.ones(1, 3), torch.ones(3, 1))}, 'vision.q: it belongs to a part for'),
               elsewhere=({'model.other': (torch.ones(1, 3), torch.ones(3, 1))}, 'model.other has no place'))

@pytest.mark.parametrize('format', ['mlx', 'gguf'])
@pytest.mark.parametrize('name', REFUSED)
def test_what_has_no_place_is_refused(tmp_path, format, name):
    if format == 'gguf': pytest.importorskip('gguf')
    updates, message = REFUSED[name]
    with pytest.raises(ValueError, match=message): Adapter(updates, 'zoo/old').save(tmp_path/'a', format=format)
    rows = {'model.embed_tokens': (torch.tensor([3]), torch.ones(1, 64))}
    with pytest.raises(ValueError, match='no place for trained tokens'):
        Adapter({Q: (torch.ones(1, 64), torch.ones(64, 1))}, 'zoo/old', rows=rows).save(tmp_path/'b', format=format)
    assert not [*tmp_path.iterdir()]

def test_families_that_a_format_does_not_know(tokenizer, tmp_path):
    pytest.importorskip('gguf')
    base = saved(tmp_path/'base', random_decoder(tokenizer, 'gpt_neox'))
    for format, message in (('mlx', 'mlx-lm has other names'), ('gguf', 'of the family gpt_neox')):
        result = run('convert', 'zoo/adapter', '--base', base, '-o', tmp_path/'out', '--format', format)
        assert result.exit_code == 2 and 'another model' in result.stderr # what fits is tested first
        update = {'gpt_neox.layers.0.mlp.dense_h_to_4h': (torch.ones(1, 64), torch.ones(96, 1))}
        with pytest.raises(ValueError, match=message): Adapter(update, base).save(tmp_path/'out', format=format)

# ---- the command

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

def test_convert_there_and_back(specialist, tmp_path):
    pytest.importorskip('gguf')
    source = 'zoo/adapter'
    for format in ('mlx', 'gguf', 'peft'):
        done = run('convert', source, '-o', tmp_path/format, '--format', format, '--dtype', 'float32', '--json')
        assert done.exit_code == 0, done.output
        said, source = json.loads(done.stdout), tmp_path/format
        assert said['dtype_error'] == 0 and said['skipped'] == {} and detect_format(source) == format
    again = Adapter.load(tmp_path/'peft')
    assert same(again.updates, specialist.updates) and again.base == 'zoo/old'
    moved = (tmp_path/'gguf'/'adapter.gguf').rename(tmp_path/'mine.gguf')
    done = run('convert', moved, '--base', 'zoo/old', '-o', tmp_path/'more', '--max-rank', 3, '--json')
    said = json.loads(done.stdout)
    assert .1 < said['rank_error'] < 1 and 0 < said['dtype_error'] < 1e-3
    assert settings(tmp_path/'more')['r'] == 3 and base_dtype('zoo/old') == torch.float16
    assert {t.dtype for t in load_file(tmp_path/'more'/FILE).values()} == {torch.float16}

@pytest.mark.parametrize('format', ['mlx', 'gguf'])
def test_the_card_goes_there_and_back(tmp_path, format):
    "With the hash of the base in it, so that another base is noticed by its weights, and a chat template"
    pytest.importorskip('gguf')
    base = tmp_path/'base'
    shutil.copytree(data_dir()/'zoo'/'old', base)
    source = replace(Adapter.load('zoo/adapter'), base=str(base), chat_template='{{ messages[0].content }}\n')
    source.card = tuned_card(Adapter({}), str(base), 'Tuned by hand.')
    source.save(tmp_path/'a')
    for there, back in (('a', format), (format, 'peft')):
        done = run('convert', tmp_path/there, '-o', tmp_path/back, '--format', back, '--dtype', 'float32', '--json')
        assert done.exit_code == 0, done.output
    found = Adapter.load(tmp_path/format)
    assert found.card == source.card.replace('library_name: peft', f'library_name: {format}')
    assert found.source['sha256'] and f'library_name: {format}' in (tmp_path/format/'README.md').read_text()
    again = Adapter.load(tmp_path/'peft')
    assert again.card == source.card and again.chat_template == found.chat_template == source.chat_template
    assert (tmp_path/'peft'/'chat_template.jinja').read_text() == source.chat_template
    assert base_doubt(found, str(base)) is None
    weights = base/'model.safetensors'
    save_file({key: t + 1 for key, t in load_file(weights).items()}, weights)
    for adapter in (found, again): assert 'WRONG BASE?' in base_doubt(adapter, str(base))

WRONG = [(['--format', 'gif'], "no format 'gif'"), (['--dtype', 'int8'], 'choose one of base, float32'),
         (['--format', 'mlx', '--compact'], 'files of the format mlx have one rank'),
         (['--max-rank', '0'], 'greater than or equal'),
         (['--base', 'zoo/new'], 'this is another model. WRONG BASE?')]

@pytest.mark.parametrize('options, message', WRONG)
def test_convert_refuses(tmp_path, options, message):
    result = run('convert', 'zoo/adapter', '-o', tmp_path/'out', *options)
    assert result.exit_code == 2 and message in result.stderr and not [*tmp_path.iterdir()]

def test_transfer_writes_for_others(tmp_path):
    "What is carried, cut and rounded, is what mlx-lm gets; the errors are said"
    align('zoo/old', 'zoo/new').save(tmp_path/'maps')
    done = run('transfer', 'zoo/adapter', tmp_path/'maps', '-o', tmp_path/'out', '--format', 'mlx', '--max-rank', 4,
               '--dtype', 'bfloat16', '--json')
    said = json.loads(done.stdout)
    found = Adapter.load(tmp_path/'out')
    assert {len(A) for A, _ in found.updates.values()} == {4} and found.base == 'zoo/new'
    assert said['adapter'] == str(found)
    carried = transfer('zoo/adapter', align('zoo/old', 'zoo/new'))
    assert relative_errors(carried, found)[0] == pytest.approx(said['rank_error'], rel=.05)
    assert f'{said["rank_error"]:.2%}' in (tmp_path/'out'/'README.md').read_text()

def test_experts_get_one_rank_too(tokenizer, tmp_path):
    "PEFT's own adapter on experts, with a rank of its own for some: written with one, and the same"
    decoder, ids = random_decoder(tokenizer, 'mixtral', layers=2, head_dim=16, **MOE), tokens()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=['q_proj'], target_parameters=['experts.down_proj'],
                        rank_pattern={'q_proj': 3}, task_type='CAUSAL_LM')
    model = get_peft_model(copy.deepcopy(decoder.model), config)
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.1)
    model.save_pretrained(tmp_path/'a')
    with torch.no_grad(): true = model(ids).logits
    adapter = Adapter.load(tmp_path/'a').named_for(align_info(decoder))
    adapter.save(tmp_path/'b')
    assert settings(tmp_path/'b')['r'] == 3 and settings(tmp_path/'b')['rank_pattern'] == {}
    assert {*settings(tmp_path/'b')['target_modules']} == {'q_proj', 'k_proj', 'v_proj'}
    assert error(by_peft_alone(decoder, tmp_path/'b', ids), true) <= 1e-5
    assert same(Adapter.load(tmp_path/'b').named_for(align_info(decoder)).updates, adapter.updates)

# ---- other programs, as `make runtimes` found them

def test_recorded_runtimes():
    "What is written by default is as strong in llama.cpp and mlx-lm as in PEFT; a rank for each module is not"
    rows = json.loads((data_dir()/'runtimes.json').read_text())['rows']
    risky = 'llama.cpp, its converter, compact file'
    assert len(rows) == 15 and all(row['kl'] < 1e-9 for row in rows if row['runtime'] != risky)
    assert all(row['error'] < 1e-5 and abs(row['strength'] - 1) < 1e-5 for row in rows if row['runtime'] != risky)
    assert [row['kl'] > 1 for row in rows if row['runtime'] == risky] == [False, False, True]

# ---- other methods of PEFT

METHODS = dict(loha=LoHaConfig(r=2, target_modules=['q_proj', 'up_proj']),
               ia3=IA3Config(target_modules=['k_proj', 'down_proj'], feedforward_modules=['down_proj']),
               vera=VeraConfig(r=8, target_modules=['q_proj', 'o_proj'])) # its rounding was said as "0.0% left out"

PROMPTS = PromptTuningConfig(num_virtual_tokens=2, task_type='CAUSAL_LM')

@pytest.mark.parametrize('method', METHODS)
def test_other_methods_are_converted_to_the_nearest_LoRA(tmp_path, method):
    model = get_peft_model(load_model('zoo/old').model, METHODS[method])
    for p in model.parameters():
        if p.requires_grad: p.data.add_(.1*torch.randn_like(p))
    model.save_pretrained(tmp_path/'other')
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), model.disable_adapter(): base = model(ids).logits
    with torch.no_grad(): true = model.eval()(ids).logits - base
    with pytest.raises(ValueError, match='adapter, not a LoRA: make one of it with `lorasuite convert ADAPTER --base'):
        Adapter.load(tmp_path/'other')
    args = ['convert', tmp_path/'other', '--base', 'zoo/old', '--dtype', 'float32', '-o', tmp_path/'lora', '--json']
    result = CliRunner().invoke(app, [*map(str, args)])
    assert result.exit_code == 0, result.output
    old = load_model('zoo/old')
    with Adapter.load(tmp_path/'lora').on(old) as found, torch.no_grad(): effect = found(ids).logits - base
    assert error(effect, true) <= 1e-3 and not json.loads(result.stdout)['skipped'] # the tiny model is at most 64 wide

def test_what_a_low_rank_leaves_out_of_another_method_is_said(tmp_path):
    model = get_peft_model(load_model('zoo/old').model, METHODS['ia3'])
    for p in model.parameters():
        if p.requires_grad: p.data.add_(.1*torch.randn_like(p))
    model.save_pretrained(tmp_path/'ia3')
    args = ['convert', tmp_path/'ia3', '--base', 'zoo/old', '--max-rank', 8, '-o', tmp_path/'lora', '--json']
    result = CliRunner().invoke(app, [*map(str, args)])
    said = [why for why in json.loads(result.stdout)['skipped'] if 'of the change of a whole weight' in why]
    assert result.exit_code == 0 and said and all(0 < float(why.partition('%')[0]) < 100 for why in said)

def test_one_of_several_adapters_of_another_method(tmp_path):
    for name, scale in (('a', 2.), ('b', 3.)):
        model = get_peft_model(load_model('zoo/old').model, METHODS['ia3'])
        for p in model.parameters(): p.data *= scale if p.requires_grad else 1
        model.save_pretrained(tmp_path/'run'/name)
    args = ['convert', tmp_path/'run', '--base', 'zoo/old', '-o', tmp_path/'lora', '--max-rank', 96]
    assert 'choose one by --adapter-name' in run(*args).stderr
    assert run(*args, '--adapter-name', 'b').exit_code == 0
    update = Adapter.load(tmp_path/'lora').delta('model.layers.0.self_attn.k_proj')
    weight = load_model('zoo/old').model.get_submodule('model.layers.0.self_attn.k_proj').weight
    assert (update - 2*weight).norm() < .01*weight.norm()

@pytest.mark.parametrize('config', [PROMPTS, LNTuningConfig(target_modules=['norm'], task_type='CAUSAL_LM')])
def test_what_no_lora_can_stand_for(tmp_path, config):
    model = get_peft_model(load_model('zoo/old').model, config)
    for p in model.parameters(): p.data += .1*p.requires_grad
    model.save_pretrained(tmp_path/'a')
    result = CliRunner().invoke(app, [*map(str, ['convert', tmp_path/'a', '--base', 'zoo/old', '-o', tmp_path/'out'])])
    assert result.exit_code == 2 and 'no LoRA can stand for it: train a LoRA' in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path/'out').exists()

# ---- what a format cannot hold is known before any work

def with_part(folder, kind, **config):
    "An adapter of the shipped old model with parts besides updates of two factors"
    settings = LoraConfig(r=2, target_modules=['q_proj'], **config)
    model = get_peft_model(copy.deepcopy(load_model('zoo/old').model), settings)
    for name, p in model.named_parameters():
        if p.requires_grad: p.data += .01
    model.save_pretrained(folder/kind)
    return folder/kind

PARTS = dict(dora=dict(use_dora=True), bias=dict(lora_bias=True),
             rows=dict(trainable_token_indices={'embed_tokens': [7]}))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('format, kind, message', [
    ('gguf', 'dora', 'GGUF holds no DoRA: transfer it with --plain-rank'), ('gguf', 'bias', 'no place for a bias'),
    ('gguf', 'rows', 'no place for trained tokens'), ('mlx', 'bias', 'no place for the biases'),
    ('mlx', 'rows', 'no place for trained tokens'), ('torchtune', 'rows', 'torchtune cannot be written')])
def test_what_a_format_cannot_hold_is_refused_before_any_work(tmp_path, monkeypatch, format, kind, message):
    pytest.importorskip('gguf')
    source = with_part(tmp_path, kind, **PARTS[kind])
    monkeypatch.setattr('lorasuite.training.upgrade.upgrade', lambda *args, **kwargs: pytest.fail('it began'))
    monkeypatch.setattr('lorasuite.training.upgrade.align', lambda *args, **kwargs: pytest.fail('it aligned'))
    done = run('upgrade', 'zoo/old', 'zoo/new', source, '--inputs', 'zoo/test.jsonl', '--format', format, '-o',
               tmp_path/'out')
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert [p.name for p in tmp_path.iterdir()] == [kind]

@pytest.mark.filterwarnings('ignore')
def test_a_dora_becomes_plain_for_a_format_without(tmp_path):
    pytest.importorskip('gguf')
    (tmp_path/'few.jsonl').write_text(''.join((data_dir()/'zoo'/'train.jsonl').read_text().splitlines(True)[:8]))
    source = with_part(tmp_path, 'dora', use_dora=True)
    done = run('upgrade', 'zoo/old', 'zoo/new', source, '--inputs', tmp_path/'few.jsonl', '--steps', 1,
               '--format', 'gguf', '--plain-rank', 4, '-o', tmp_path/'out')
    assert done.exit_code == 0 and detect_format(tmp_path/'out') == 'gguf', done.output

@pytest.mark.filterwarnings('default')
def test_what_PEFT_says_of_checkpoints_is_not_for_people(tmp_path):
    "They are ours alone, and a bias of LoRA is no sign of ZeRO-3"
    (tmp_path/'few.jsonl').write_text(''.join((data_dir()/'zoo'/'train.jsonl').read_text().splitlines(True)[:8]))
    source = with_part(tmp_path, 'bias', lora_bias=True)
    done = run('upgrade', 'zoo/old', 'zoo/new', source, '--inputs', tmp_path/'few.jsonl', '--steps', 1,
               '-o', tmp_path/'o')
    assert done.exit_code == 0 and 'warning' not in done.stderr, done.stderr

@pytest.mark.parametrize('base', ['', '/nowhere/old'])
def test_a_gguf_file_of_no_base_that_is_here(tmp_path, base):
    "Whoever names a model in the command need not convert the file first"
    pytest.importorskip('gguf')
    old, few = gguf_file(tmp_path/'a.gguf', FACTORS, base=base), tmp_path/'few.jsonl'
    few.write_text(''.join((data_dir()/'zoo'/'train.jsonl').read_text().splitlines(True)[:8]))
    maps, data = tmp_path/'maps', ('--data', few)
    align('zoo/old', 'zoo/new').save(maps)
    assert run('inspect', 'zoo/old', 'zoo/new', old).exit_code == 0
    commands = [
        ['upgrade', 'zoo/old', 'zoo/new', old], ['transfer', old, maps], ['transfer', old, 'zoo/adapter', maps],
        ['finetune', 'zoo/old', old, *data, '--steps', 1],
        ['refresh', 'zoo/old', old, 'zoo/new', '--inputs', few, '--steps', 1],
        ['refresh', 'zoo/old', 'zoo/adapter', 'zoo/old', '--inputs', few, '--steps', 1, '--start', old],
        ['refresh', 'zoo/old', old, 'zoo/adapter', 'zoo/new', '--inputs', few, '--steps', 1]]
    for i, command in enumerate(commands):
        done = run(*command, '-o', tmp_path/f'{i}')
        assert done.exit_code == 0, (command, done.output, done.stderr)
    assert Adapter.load(tmp_path/'0').updates
    assert run('evaluate', 'zoo/old', '--adapter', old, *data).exit_code == 0
    with pytest.raises((ValueError, OSError), match='convert it first'): Adapter.load(old)
    named = gguf_file(tmp_path/'b.gguf', FACTORS)
    assert Adapter.load(named, fallback='zoo/new').base == 'zoo/old' # what a file says comes first
