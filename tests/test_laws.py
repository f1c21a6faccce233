"""The laws of a transfer, with real forward passes: nothing is lost where nothing, or only the coordinates, changed"""
import json, re
from functools import cache
import pytest, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from models import effect, effect_error, error, logits, only, random_adapter, random_decoder, tokens, whole
from lorasuite.core.adapter import Adapter
from lorasuite.core import block as block_module
from lorasuite.core.architecture import ROLES
from lorasuite.core.block import read_block
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.alignment_files import _checksum
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.transfer import transfer
from lorasuite.training.finetune import init_adapter
from lorasuite.lab.oracle import extend_tokenizer, grow
from lorasuite.lab.world import corpus, NEW_WORDS
from lorasuite.lab.zoo import new_tokenizer

LEAVES = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
PARTS = ['', *LEAVES]                       # '' is the adapter as a whole
IDENTITY, ORACLE = 1e-4, 1e-3

FEW = probe_texts()[:24]

MODELS = dict(mha=dict(kv_heads=4), gqa=dict(kv_heads=2), mqa=dict(kv_heads=1), mistral=dict(family='mistral'),
              qwen2=dict(family='qwen2'), tied=dict(tie_word_embeddings=True), wide_heads=dict(head_dim=32))

@pytest.fixture(scope='module')
def model(tokenizer): return cache(lambda name: random_decoder(tokenizer, **MODELS[name]))

@pytest.fixture(scope='module')
def trained(model): return cache(lambda name: random_adapter(init_adapter(model(name), 4)))

# ---- identity: from a model to itself

@pytest.fixture(scope='module')
def to_itself(model): return cache(lambda name: align(model(name), model(name)))

@pytest.mark.parametrize('name', MODELS)
def test_maps_to_itself(name, model, to_itself):
    d, a = model(name), to_itself(name)
    assert a.layers == [(l, l) for l in range(d.layers)]
    for maps in a.blocks:
        assert maps.heads.tolist() == list(range(d.heads))
        assert maps.neurons.tolist() == list(range(d.intermediate))

@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('name', MODELS)
def test_identity(name, part, model, trained, to_itself):
    adapter = only(trained(name), part)
    assert effect_error(model(name), adapter, model(name), transfer(adapter, to_itself(name))) <= IDENTITY

def test_identity_of_a_peft_adapter_with_patterns(decoder, tmp_path):
    config = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=LEAVES,
                        rank_pattern={'q_proj': 2, r'layers\.1\.mlp\.up_proj': 6},
                        alpha_pattern={'down_proj': 3, r'layers\.2\.self_attn\.v_proj': 5}, task_type='CAUSAL_LM')
    peft, ids = get_peft_model(decoder.model, config), tokens()
    torch.manual_seed(0)
    for name, p in peft.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.05)
    with torch.no_grad(): changed = peft(ids).logits
    peft.save_pretrained(tmp_path/'peft')
    peft.unload()
    true, adapter = changed - logits(decoder, ids), Adapter.load(tmp_path/'peft')
    assert error(effect(decoder, ids, adapter), true) <= IDENTITY
    carried = transfer(adapter, align(decoder, decoder))
    carried.save(tmp_path/'carried')
    again = Adapter.load(tmp_path/'carried')
    ranks = lambda a: {path: len(A) for path, (A, _) in a.updates.items()}
    assert ranks(again) == ranks(adapter)
    assert error(effect(decoder, ids, again), true) <= IDENTITY

@pytest.mark.parametrize('rank', [1, 24, 100])
def test_identity_for_ranks_beyond_a_weight(rank, model, to_itself):
    start = init_adapter(model('mqa'), 1)
    torch.manual_seed(0)
    made = lambda A, B: (torch.randn(rank, A.shape[1])/8, B.new_zeros(len(B), rank))
    updates = {path: made(*pair) for path, pair in start.updates.items()}
    adapter = random_adapter(Adapter(updates, start.base, start.layers))
    assert effect_error(model('mqa'), adapter, model('mqa'), transfer(adapter, to_itself('mqa'))) <= IDENTITY

@pytest.mark.parametrize('axis', ['layers', 'heads', 'intermediate', 'all'])
def test_identity_of_a_model_with_idle_parts(axis, grown):
    new = grown('gqa', axis)[0]
    adapter = random_adapter(init_adapter(new, 4))
    assert effect_error(new, adapter, new, transfer(adapter, align(new, new, FEW))) <= IDENTITY

def test_identity_of_an_adapter_of_some_layers(decoder, adapter):
    some = Adapter({p: ab for p, ab in adapter.updates.items() if '.1.' in p or ('.3.' in p and 'mlp' in p)})
    carried = transfer(some, align(decoder, decoder))
    assert carried.updates.keys() == some.updates.keys()
    assert effect_error(decoder, some, decoder, carried) <= IDENTITY

def test_identity_with_fewer_tokens_than_hidden_directions():
    small = random_decoder(new_tokenizer(260, seed=1), hidden=320, layers=2, heads=4, intermediate=96)
    adapter = random_adapter(init_adapter(small, 4))
    with pytest.warns(UserWarning, match='share 260 tokens, fewer than the hidden size 320'): a = align(small, small)
    assert effect_error(small, adapter, small, transfer(adapter, a)) <= IDENTITY

def test_identity_without_a_padding_token(tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | dict(padding=None)
    unpadded = Tokenizer.from_str(json.dumps(backend))
    bare = random_decoder(PreTrainedTokenizerFast(tokenizer_object=unpadded, eos_token='<eos>'))
    adapter = random_adapter(init_adapter(bare, 4))
    assert effect_error(bare, adapter, bare, transfer(adapter, align(bare, bare, FEW))) <= IDENTITY

def test_the_published_formula_breaks_the_identity_law(decoder, adapter):
    assert effect_error(decoder, adapter, decoder, transfer(adapter, align(decoder, decoder, method='paper'))) > .1

# ---- oracle: from a model to a function-preserving enlargement

ALL = dict(hidden=96, layers=6, heads=8, kv_heads=4, intermediate=150)
AXES = dict(vocabulary=dict(words=True), hidden=dict(hidden=96), layers=dict(layers=6), heads=dict(heads=8, kv_heads=4),
            attention=dict(heads=4, kv_heads=4), intermediate=dict(intermediate=150), all=dict(words=True, **ALL))
OTHERS = [('mqa', 'attention')] + [(name, 'all') for name in ('mha', 'mqa', 'mistral', 'tied', 'wide_heads')]
GROWTHS = [('gqa', axis) for axis in AXES] + OTHERS

def enlarge(old, words=False, seed=2, **sizes):
    "The enlargement, the true maps, and the new id of every old token"
    longer, pieces = extend_tokenizer(old.tokenizer, NEW_WORDS if words else [], seed=3)
    model, truth = grow(old, **sizes, pieces=pieces, seed=seed)
    before, after = old.tokenizer.get_vocab(), longer.get_vocab()
    new_id = torch.tensor([after[t] for t in sorted(before, key=before.get)])
    return Decoder(model, longer, 'random/grown'), truth, new_id

def check_maps(alignment, truth, old):
    "Every layer, head and neuron must be where the enlargement put it"
    assert alignment.layers == list(enumerate(truth.layers))
    for maps, heads, neurons in zip(alignment.blocks, truth.heads, truth.neurons):
        assert maps.heads[heads].tolist() == list(range(old.heads))
        assert maps.neurons[neurons].tolist() == list(range(old.intermediate))

@pytest.fixture(scope='module')
def grown(model):
    @cache
    def get(name, axis):
        new, truth, new_id = enlarge(model(name), **AXES[axis])
        return new, truth, new_id, align(model(name), new)
    return get

def test_longer_tokenizer(tokenizer):
    longer, pieces = extend_tokenizer(tokenizer, NEW_WORDS, seed=3)
    assert len(pieces) == len(tokenizer) + len(NEW_WORDS)
    assert sorted(longer.get_vocab().values()) == list(range(len(pieces)))
    for text in corpus(200, seed=5, news=.3):
        ids = longer(text).input_ids
        assert [p for i in ids for p in pieces[i]] == tokenizer(text).input_ids
        assert longer.decode(ids, skip_special_tokens=True).strip() == text

@pytest.mark.parametrize('name, axis', GROWTHS)
def test_maps_to_an_enlargement(name, axis, model, grown):
    new, truth, new_id, alignment = grown(name, axis)
    ids = tokens()
    assert error(logits(new, new_id[ids])[..., new_id], logits(model(name), ids)) <= IDENTITY
    check_maps(alignment, truth, model(name))

@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('name, axis', GROWTHS)
def test_oracle(name, axis, part, model, trained, grown):
    (new, _, new_id, alignment), adapter = grown(name, axis), only(trained(name), part)
    carried = transfer(adapter, alignment)
    assert effect_error(model(name), adapter, new, carried, new_id=new_id) <= ORACLE
    if part == '': assert len(carried.updates) == new.layers*len(ROLES)

@settings(max_examples=6, deadline=None, derandomize=True)
@given(layers=st.integers(4, 6), hidden=st.integers(64, 100), groups=st.integers(2, 5),
       intermediate=st.integers(96, 130), seed=st.integers(0, 99))
def test_oracle_for_any_sizes(decoder, adapter, layers, hidden, groups, intermediate, seed):
    sizes = dict(layers=layers, hidden=hidden, heads=2*groups, kv_heads=groups, intermediate=intermediate)
    new, truth, new_id = enlarge(decoder, **sizes, seed=seed)
    alignment = align(decoder, new, FEW)
    check_maps(alignment, truth, decoder)
    assert effect_error(decoder, adapter, new, transfer(adapter, alignment), new_id=new_id) <= ORACLE

def rotations(angle):
    "(kv heads, head size, head size) turns that commute with the rotary embedding"
    cos, sin = torch.diag_embed(angle.cos()), torch.diag_embed(angle.sin())
    return torch.cat([torch.cat([cos, -sin], 2), torch.cat([sin, cos], 2)], 1)

def mix_rows(W, M):
    "Multiply the rows of every head of W by the matrix of its key-value head"
    h = M.shape[-1]
    heads = W.view(-1, h, W.shape[1])
    W.copy_((M.repeat_interleave(len(heads)//len(M), 0)@heads).view_as(W))

@torch.no_grad()
def rebase(decoder, seed=0):
    "Turn the axes inside every head and rescale every neuron, without changing what the model computes"
    g, h, kv, n = torch.Generator().manual_seed(seed), decoder.head_size, decoder.kv_heads, decoder.heads
    for l in range(decoder.layers):
        q, k, v, o, up, down = (decoder.module(l, r).weight for r in ('q', 'k', 'v', 'o', 'up', 'down'))
        turn = rotations(6*torch.rand(kv, h//2, generator=g))
        c = .5 + torch.rand(kv, generator=g)[:, None, None]
        mix = torch.eye(h) + .1*torch.randn(kv, h, h, generator=g)
        mix_rows(q, c*turn)
        mix_rows(k, turn/c)
        mix_rows(v, mix)
        columns = o.view(-1, n, h).transpose(0, 1)@mix.inverse().repeat_interleave(n//kv, 0)
        o.copy_(columns.transpose(0, 1).reshape_as(o))
        size = .5 + torch.rand(decoder.intermediate, generator=g)
        scale = size*(torch.rand(decoder.intermediate, generator=g) - .5).sign()
        up.mul_(scale[:, None])
        down.div_(scale)

@pytest.mark.parametrize('name', ['mha', 'gqa', 'mqa'])
def test_oracle_with_other_axes_inside_heads_and_neurons(name, model, trained):
    new, truth, new_id = enlarge(model(name), **ALL)
    rebase(new)
    ids, alignment = tokens(), align(model(name), new, FEW)
    assert error(logits(new, new_id[ids])[..., new_id], logits(model(name), ids)) <= IDENTITY
    check_maps(alignment, truth, model(name))
    for part in PARTS:
        adapter = only(trained(name), part)
        assert effect_error(model(name), adapter, new, transfer(adapter, alignment), new_id=new_id) <= ORACLE, part

def test_grow_refuses_what_it_cannot_keep(model):
    with pytest.raises(ValueError, match='cannot have head_size=16'): grow(model('qwen2'), hidden=96)
    with pytest.raises(ValueError, match='smaller than the old'): grow(model('gqa'), hidden=48)
    with pytest.raises(ValueError, match='do not fit'): grow(model('mha'), heads=4, kv_heads=2)
    falcon = random_decoder(model('gqa').tokenizer, 'falcon', alibi=True)
    with pytest.raises(ValueError, match='cannot be enlarged so'): grow(falcon, heads=4, kv_heads=1)

# ---- saving, linearity, scale, composition

def test_a_saved_alignment_carries_the_same(trained, grown, tmp_path):
    alignment = grown('gqa', 'all')[-1]
    alignment.save(tmp_path/'alignment')
    again = Alignment.load(tmp_path/'alignment')
    assert again.layers == alignment.layers and again.fit == alignment.fit and again.old == alignment.old
    assert error(whole(transfer(trained('gqa'), again)), whole(transfer(trained('gqa'), alignment))) <= 1e-5

def test_alignments_that_cannot_be_read(grown, tmp_path):
    with pytest.raises(FileNotFoundError, match='no such alignment: .*: make it with'): Alignment.load(tmp_path/'none')
    grown('gqa', 'all')[-1].save(tmp_path/'alignment')
    with pytest.raises(FileExistsError, match='exists already'): grown('gqa', 'all')[-1].save(tmp_path/'alignment')
    tensors = tmp_path/'alignment'/'alignment.safetensors'
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(ValueError, match='not a readable alignment'): Alignment.load(tmp_path/'alignment')

def combine(a, b, c=1.):
    "The adapter whose updates are a + c b"
    updates = {}
    for path, (A, B) in a.updates.items():
        A2, B2 = b.updates[path]
        updates[path] = torch.cat([A, A2]), torch.cat([B, c*B2], 1)
    return Adapter(updates, a.base, a.layers)

@pytest.mark.parametrize('method', ['exact', 'paper'])
def test_linear(method, model, trained, grown):
    alignment = align(model('gqa'), grown('gqa', 'all')[0], method=method)
    a, b = trained('gqa'), random_adapter(trained('gqa'), seed=1)
    summed = whole(transfer(combine(a, b, 3.), alignment))
    assert error(summed, whole(transfer(a, alignment)) + 3*whole(transfer(b, alignment))) <= 1e-5

def test_composition(model, trained, grown):
    near, adapter = grown('gqa', 'all')[0], trained('gqa')
    far, *_ = enlarge(near, hidden=128, layers=8, heads=12, kv_heads=6, intermediate=200, seed=5)
    twice = transfer(transfer(adapter, grown('gqa', 'all')[-1]), align(near, far, FEW))
    once = transfer(adapter, align(model('gqa'), far, FEW))
    assert error(whole(twice), whole(once)) <= ORACLE

# ---- smaller models, other head sizes: no law, but nothing may break

def test_to_a_smaller_model(trained, model, grown):
    big, sizes = grown('gqa', 'all')[0], dict(hidden=48, layers=3, heads=2, kv_heads=1, intermediate=64, head_dim=16)
    small = random_decoder(model('gqa').tokenizer, **sizes)
    alignment = align(big, small, FEW)
    carried = transfer(random_adapter(init_adapter(big, 4)), alignment)
    assert effect(small, tokens(), carried).isfinite().all() and len(carried.updates) == 3*len(ROLES)
    assert [b for _, b in alignment.layers] == [0, 1, 2]

def test_other_head_sizes_warn(model, trained):
    other = random_decoder(model('gqa').tokenizer, head_dim=32)
    with pytest.warns(UserWarning, match='head sizes differ'): alignment = align(model('gqa'), other)
    assert effect(other, tokens(), transfer(trained('gqa'), alignment)).isfinite().all()

def test_wrong_adapter_for_an_alignment(grown, model):
    alignment = grown('gqa', 'all')[-1]
    other, wide = init_adapter(grown('gqa', 'all')[0], 4), init_adapter(model('wide_heads'), 4)
    with pytest.raises(ValueError, match='was it trained on another model'): transfer(other, alignment)
    with pytest.raises(ValueError, match='k_proj is 64×64, the weight of .* is 32×64'): transfer(wide, alignment)
    with pytest.raises(ValueError, match='choose one of exact, paper'): align(model('gqa'), model('gqa'), method='best')

# ---- weights that stay in their files

def test_a_directory_in_shards_is_aligned_like_a_loaded_model(model, grown, trained, tmp_path):
    old, new = model('gqa'), grown('gqa', 'all')[0]
    for name, d in dict(old=old, new=new).items():
        d.model.save_pretrained(tmp_path/name, max_shard_size='100KB')
        d.tokenizer.save_pretrained(tmp_path/name)
        assert len([*(tmp_path/name).glob('model-*.safetensors')]) > 2
        lazy = load_model(tmp_path/name, lazy=True)
        assert all(p.device.type == 'meta' for p in lazy.model.parameters())
        block, block2 = read_block(lazy, 1), read_block(d, 1)
        assert all(torch.equal(block.weight(role), block2.weight(role)) for role in d.roles)
        assert torch.equal(lazy.embeddings, d.embeddings)
        assert error(logits(lazy, tokens()), logits(d, tokens())) <= 1e-6
    loaded, in_files = align(old, new, FEW), align(tmp_path/'old', tmp_path/'new', FEW)
    assert loaded.layers == in_files.layers
    for a, b in zip(loaded.blocks, in_files.blocks):
        assert all(torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())
    assert error(whole(transfer(trained('gqa'), in_files)), whole(transfer(trained('gqa'), loaded))) <= 1e-6

def test_an_untrained_adapter_can_still_learn_after_it_was_carried(model, grown):
    carried = transfer(init_adapter(model('gqa'), 4), grown('gqa', 'all')[-1])
    assert all(not B.any() and A.abs().sum(1).min() > 0 for A, B in carried.updates.values())

# ---- how the work is done

def test_each_weight_is_read_once(monkeypatch):
    "Seven weights of four blocks of both models of the tiny pair: 56 reads"
    read, stored = [], block_module._stored_matrix
    monkeypatch.setattr(block_module, '_stored_matrix', lambda module: read.append(module) or stored(module))
    align('zoo/old', 'zoo/new', FEW)
    assert len(read) == len({*map(id, read)}) == 2*4*7

def test_a_module_that_plays_several_roles_is_read_once(tokenizer, monkeypatch):
    phi, read, stored = random_decoder(tokenizer, 'phi3'), [], block_module._stored_matrix
    monkeypatch.setattr(block_module, '_stored_matrix', lambda module: read.append(module) or stored(module))
    block = read_block(phi, 0)
    assert len(block.roles) == 7 and len(read) == 4

def as_first_version(folder):
    "Rewrite an alignment as version 0.1 wrote it: one description for all blocks, names of tensors without a kind"
    head = json.loads((folder/'alignment.json').read_text())
    for side in ('old', 'new'):
        model = head[side]
        (block,), layers = model.pop('kinds'), model.pop('blocks')
        for added in ('outside', 'outside_stacks', 'outside_stored'): del model[added]
        sizes = {size: block['shapes'][role][0] for size, role in (('intermediate', 'up'), ('q', 'q'))}
        model |= dict(modules=block['modules'], rows=block['rows'], intermediate=sizes['intermediate'],
                      layers=len(layers), heads=block['heads'], kv_heads=block['kv_heads'],
                      head_size=sizes['q']//block['heads'])
    for added in ('unmatched', 'same_outside', 'checksum', 'format', 'lorasuite', 'feed_forward'): del head[added]
    tensors, repeats = {}, head.pop('repeats')
    for name, t in load_file(folder/'alignment.safetensors').items():
        dtype = torch.float32 if t.is_floating_point() else torch.int64
        whole = (t.expand(repeats[name], *t.shape[1:]) if name in repeats else t).to(dtype)
        tensors[re.sub(r'^(\d+)\.(partners|maps|norms)\.', r'\1.', name)] = whole.contiguous()
    save_file(tensors, folder/'alignment.safetensors')
    head['checksum'] = _checksum(head, (folder/'alignment.safetensors').read_bytes())
    (folder/'alignment.json').write_text(json.dumps(head))
    return head, tensors

def test_an_alignment_of_the_first_version_loads(tmp_path):
    "Names, keys and shapes as version 0.1 wrote them"
    alignment = align('zoo/old', 'zoo/new', FEW)
    alignment.save(tmp_path/'alignment')
    head, tensors = as_first_version(tmp_path/'alignment')
    sizes = {'vocab', 'hidden', 'intermediate', 'layers', 'heads', 'kv_heads', 'head_size'}
    model = sizes | {'name', 'stack', 'modules', 'rows', 'ends', 'tied', 'revision', 'sha256'}
    assert head.keys() == {'method', 'old', 'new', 'layers', 'fit', 'checksum'}
    assert head['old'].keys() == head['new'].keys() == model
    norms = {f'{part}_{what}{n}' for part in ('attention', 'mlp') for what in ('gain', 'offset') for n in ('', '2')}
    norms |= {f'{role}_gain{n}' for role in ('o', 'down') for n in ('', '2')}
    assert {k[2:] for k in tensors if k.startswith('0.')} == {'heads', 'neurons', *ROLES, *norms}
    ends = {'ids', 'ids2', 'scale', 'scale2', *(f'head_{what}{n}' for what in ('gain', 'offset') for n in ('', '2'))}
    assert {k[5:] for k in tensors if k.startswith('ends.')} == ends
    assert {k for k in tensors if '.' not in k} == {'read', 'write', 'cka'}
    adapter, again = Adapter.load('zoo/adapter'), Alignment.load(tmp_path/'alignment')
    assert error(whole(transfer(adapter, again)), whole(transfer(adapter, alignment))) <= 1e-5
