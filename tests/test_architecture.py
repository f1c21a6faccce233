"What is found in the blocks of every kind of model: roles, mixers, heads, refusals; no weight is read"
import re
from functools import cache
import pytest, torch
from accelerate import init_empty_weights
from mixers import KINDS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from test_wrappers import tiny, WRAPPERS
from lorasuite.core.architecture import block_kind, detect_architectures, find_blocks, ROLES
from lorasuite.core.dry_run import is_experts, is_linear

ATTENTION, MLP = 'q k v o', 'gate up down'
EXPERTS = 'experts.N.gate experts.N.up experts.N.down router'
SHARED = f'shared.gate shared.up shared.down {EXPERTS}'
GATED = f'{SHARED} mlp.shared_expert_gate'
LATENT = 'self_attn.kv_a_proj_with_mqa self_attn.kv_a_proj_with_mqa.latent self_attn.kv_b_proj self_attn.o_proj'
DIRECT, COMPRESSED = f'self_attn.q_proj {LATENT}', f'self_attn.q_a_proj self_attn.q_b_proj {LATENT}'
DELTA = ' '.join(f'linear_attn.{name}' for name in ('in_proj_qkvz', 'in_proj_ba', 'out_proj'))
DELTA5 = ' '.join(f'linear_attn.{name}' for name in ('in_proj_qkv', 'in_proj_z', 'in_proj_b', 'in_proj_a', 'out_proj'))
MAMBA1, MAMBA2 = 'mamba.in_proj mamba.x_proj mamba.out_proj', 'mamba.in_proj mamba.out_proj'
CONV = 'conv.in_proj conv.out_proj'
DIFF = 'self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj'
PER_LAYER = f'{MLP} per_layer_projection.up per_layer_projection.down'
OTHER_LAYER = f'self_attn.q_proj self_attn.o_proj {PER_LAYER}'

SOFTMAX, LATENTS, ELSEWHERE = {'attention'}, {'latent attention'}, {'attention to another layer'}
DELTA_NET, SSM1, SSM2, CONVOLUTION = {'gated delta net'}, {'Mamba'}, {'Mamba 2'}, {'short convolution'}
DIFFERENTIAL = {'differential attention'}

# ---- kind of model: for each kind of layer, the layers, its roles, its mixers

EXPECTED = dict(
    mixtral=[([0, 1, 2], f'{ATTENTION} {EXPERTS}', SOFTMAX)],
    qwen2_moe=[([0, 1, 2], f'{ATTENTION} {GATED}', SOFTMAX)],
    qwen3_moe=[([0, 2], f'{ATTENTION} {EXPERTS}', SOFTMAX), ([1], f'{ATTENTION} {MLP}', SOFTMAX)],
    gpt_oss=[([0, 1, 2], f'{ATTENTION} {EXPERTS}', SOFTMAX)],
    llama4=[([0, 2], f'{ATTENTION} {MLP}', SOFTMAX), ([1, 3], f'{ATTENTION} {SHARED}', SOFTMAX)],
    deepseek_v2=[([0], f'{DIRECT} {MLP}', LATENTS), ([1, 2], f'{DIRECT} {SHARED}', LATENTS)],
    deepseek_v3=[([0], f'{COMPRESSED} {MLP}', LATENTS), ([1, 2], f'{COMPRESSED} {SHARED}', LATENTS)],
    qwen3_next=[([0, 1, 2], f'{DELTA} {GATED}', DELTA_NET), ([3], f'{ATTENTION} g {GATED}', SOFTMAX)],
    qwen3_5=[([0, 1, 2], f'{DELTA5} {MLP}', DELTA_NET), ([3], f'{ATTENTION} g {MLP}', SOFTMAX)],
    qwen3_5_moe=[([0, 1, 2], f'{DELTA5} {GATED}', DELTA_NET), ([3], f'{ATTENTION} g {GATED}', SOFTMAX)],
    bamba=[([0, 2], f'{MAMBA2} {MLP}', SSM2), ([1], f'{ATTENTION} {MLP}', SOFTMAX)],
    falcon_h1=[([0, 1, 2], f'{ATTENTION} {MAMBA2} {MLP}', SSM2 | SOFTMAX)],
    granite4=[([0, 2], f'{MAMBA2} {SHARED}', SSM2), ([1], f'{ATTENTION} {SHARED}', SOFTMAX)],
    jamba=[([0, 2], f'{MAMBA1} {MLP}', SSM1), ([1], f'{ATTENTION} {EXPERTS}', SOFTMAX)],
    lfm2=[([0, 2], f'{CONV} {MLP}', CONVOLUTION), ([1], f'{ATTENTION} {MLP}', SOFTMAX)],
    afmoe=[([0], f'{ATTENTION} g {MLP}', SOFTMAX), ([1, 2, 3], f'{ATTENTION} g {SHARED}', SOFTMAX)],
    olmo2=[([0, 1, 2], f'{ATTENTION} {MLP}', SOFTMAX)],
    diffllama=[([0, 1, 2], f'{DIFF} {MLP}', DIFFERENTIAL)],
    gemma4=[([0, 2], f'{ATTENTION} {PER_LAYER}', SOFTMAX), ([1], f'{ATTENTION} {PER_LAYER}', SOFTMAX),
            ([3], OTHER_LAYER, ELSEWHERE), ([4], OTHER_LAYER, ELSEWHERE)])

@cache
def read(name):
    "A tiny model of a kind, and what is found in its layers"
    model = KINDS[name].pair(0)[0]
    return model, detect_architectures(model)

def collapsed(found):
    "Roles, experts by one name"
    return {re.sub(r'^experts\.\d+', 'experts.N', role) for role in found.modules}

def shapes(found, roles): return {role: tuple(found.rows[role].shape) for role in roles}

def test_every_kind_is_expected(): assert EXPECTED.keys() == KINDS.keys()

@pytest.mark.parametrize('name', EXPECTED)
def test_roles_and_mixers_of_each_layer(name):
    _, layers = read(name)
    assert sorted(layer for some, *_ in EXPECTED[name] for layer in some) == [*range(len(layers))]
    for some, roles, mixers in EXPECTED[name]:
        for layer in some:
            assert collapsed(layers[layer]) == {*roles.split()}
            assert layers[layer].mixers == mixers
            assert layers[layer] is layers[some[0]]

@pytest.mark.parametrize('name', EXPECTED)
def test_every_map_has_a_role_or_a_reason(name):
    model, layers = read(name)
    for block, found in zip(find_blocks(model)[1], layers):
        known = {module.partition('[')[0] for module in found.modules.values()} | found.unknown.keys()
        experts = [n for n, m in block.named_modules() if is_experts(m)]
        maps = {n for n, m in block.named_modules() if is_linear(m)}
        assert {n for n in maps if not n.startswith(tuple(f'{e}.' for e in experts))} <= known
        assert all(any(path.startswith(f'{e}.') for path in known) for e in experts)

@pytest.mark.parametrize('name', EXPECTED)
def test_nothing_is_unknown_but_what_is_not_called(name):
    reasons = {module: why for found in read(name)[1] for module, why in found.unknown.items()}
    assert reasons == (dict({'mamba.dt_proj': 'is not called when a text is read'}) if name == 'jamba' else {})

@pytest.mark.parametrize('name', [name for name in EXPECTED if any(found.attends for found in read(name)[1])])
def test_heads(name):
    for found in [found for found in read(name)[1] if found.attends]:
        sizes = dict(gemma4={8, 12}).get(name, {8})
        assert (found.heads, found.kv_heads) == (4, 2) and found.head_size in sizes
        assert shapes(found, 'qk') == dict(q=(4, found.head_size), k=(2, found.head_size))
        assert len(found.rows['v']) == 2
        assert {found.spaces[role] for role in 'kv'} == {('stream', 'kv_heads')}

@pytest.mark.parametrize('name', ['qwen3_next', 'qwen3_5', 'qwen3_5_moe'])
def test_a_doubled_query_holds_a_query_and_a_gate_for_each_head(name):
    found = read(name)[1][3]
    assert found.modules['g'] == found.modules['q'] == 'self_attn.q_proj'
    assert found.runs()['q'] == [[0, 8], [16, 24], [32, 40], [48, 56]]
    assert found.runs()['g'] == [[8, 16], [24, 32], [40, 48], [56, 64]]

def test_a_gate_may_have_a_map_of_its_own():
    assert shapes(read('afmoe')[1][0], 'qg') == dict(q=(4, 8), g=(4, 8))
    assert read('afmoe')[1][0].modules['g'] == 'self_attn.gate_proj'

@pytest.mark.parametrize('name', [name for name, layers in EXPECTED.items() if EXPERTS in layers[-1][1]])
def test_experts(name):
    found = next(found for found in read(name)[1] if found.experts)
    gate, up, down = (found.modules[f'experts.3.{role}'] for role in ('gate', 'up', 'down'))
    assert found.experts == 4 and gate == up and gate.endswith('experts.gate_up_proj[3]')
    assert down.endswith('experts.down_proj[3]')
    rows = found.runs()
    assert rows['router'] == [[0, 4]] and found.spaces['router'] == ('stream', 'experts')
    width = len(found.rows['experts.3.up'])
    assert rows['experts.3.up'][-1][-1] == 2*width
    if name == 'gpt_oss': assert found.rows['experts.3.gate'].tolist() == [*range(0, 2*width, 2)]
    else: assert rows['experts.3.gate'] == [[0, width]]
    assert found.spaces['experts.3.down'] == ('experts.3.neurons', 'stream')

def test_experts_that_are_as_many_as_another_map_has_outputs_do_not_make_it_a_router():
    "DeepSeek's shared key with rotation has as many numbers as there are experts"
    config = KINDS['deepseek_v3'].config | dict(n_routed_experts=4, qk_rope_head_dim=4)
    found = detect_architectures(skeleton('deepseek_v3', **config))[1]
    assert found.modules['router'] == 'mlp.gate' and found.runs()['self_attn.kv_a_proj_with_mqa'] == [[16, 20]]

def test_latents():
    found = read('deepseek_v3')[1][0]
    assert found.links == {
        'self_attn.q_b_proj': ('self_attn.q_a_proj', 'self_attn.q_a_layernorm'),
        'self_attn.kv_b_proj': ('self_attn.kv_a_proj_with_mqa.latent', 'self_attn.kv_a_layernorm')}
    assert found.runs()['self_attn.kv_a_proj_with_mqa.latent'] == [[0, 16]]

def test_norms():
    assert read('olmo2')[1][0].before == {}
    assert read('olmo2')[1][0].after == dict(q='self_attn.q_norm', k='self_attn.k_norm', o='post_attention_layernorm',
                                             down='post_feedforward_layernorm')
    assert {read('llama4')[1][0].after[role] for role in 'qk'} == {'self_attn.qk_norm'} # one norm without weights
    assert read('gemma4')[1][0].after['v'] == 'self_attn.v_norm'
    router = read('afmoe')[1][1]
    assert router.before['router'] == router.before['experts.0.up'] == 'pre_mlp_layernorm'

# ---- without weights

def skeleton(family, **config):
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()

def alike(found, other):
    return (found.modules, found.runs(), found.spaces, found.before, found.after, found.links, found.unknown,
            found.mixers) == (other.modules, other.runs(), other.spaces, other.before, other.after, other.links,
                              other.unknown, other.mixers)

@pytest.mark.parametrize('name', EXPECTED)
@pytest.mark.parametrize('buffers', [False, True])
def test_no_weight_is_read(name, buffers):
    "Neither on the device `meta` nor from what is there: not-a-numbers everywhere make no difference"
    model, layers = read(name)
    with init_empty_weights(include_buffers=False) if not buffers else torch.device('meta'):
        empty = type(model)._from_config(model.config).eval()
    assert {p.device.type for p in empty.parameters() if p.ndim > 1} == {'meta'}
    assert all(alike(a, b) for a, b in zip(detect_architectures(empty), layers, strict=True))

def test_not_a_numbers_are_not_read():
    model, layers = KINDS['granite4'].pair(0)[0], read('granite4')[1]
    for p in model.parameters(): p.data.fill_(torch.nan)
    assert all(alike(a, b) for a, b in zip(detect_architectures(model), layers, strict=True))

@pytest.mark.parametrize('name', EXPECTED)
def test_a_model_is_left_as_it_was(name):
    model, layers = read(name)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    model.train()
    modes = {n: m.training for n, m in model.named_modules()}
    try:
        assert all(alike(a, b) for a, b in zip(detect_architectures(model), layers, strict=True))
        assert {n: m.training for n, m in model.named_modules()} == modes
    finally: model.eval()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert not any('forward' in vars(m) or m._forward_pre_hooks for m in model.modules())
    assert 'chunk_size' not in vars(model) and torch.isfinite(model(torch.arange(4)[None]).logits).all()

def test_blocks_of_one_kind_share_what_is_found():
    model, layers = read('qwen3_next')
    kinds = [block_kind(block) for block in find_blocks(model)[1]]
    assert kinds[0] == kinds[1] != kinds[3]
    assert layers[0] is layers[1] is layers[2] is not layers[3]

# ---- plain families of which a part is unusual

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
             vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MOE = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
           moe_topk=2, moe_intermediate_size=24, n_shared_experts=1, n_group=1, topk_group=1)

@pytest.mark.parametrize('family, roles, sizes', [
    ('olmo', ROLES, {}),                                    # norms without weights
    ('smollm3', ROLES, {}),                                 # no rotation in some layers
    ('hunyuan_v1_dense', ROLES, dict(head_dim=16)),         # norms of queries and keys behind the rotation
    ('cohere2', ROLES, {}), ('exaone4', ROLES, {}), ('glm', ROLES, dict(head_dim=16)),
    ('glm4', ROLES, dict(head_dim=16)),
    ('ministral', ROLES, dict(head_dim=16)), ('stablelm', ROLES, {}), ('helium', ROLES, dict(head_dim=16)),
    ('arcee', [*'qkvo', 'up', 'down'], {}), ('apertus', [*'qkvo', 'up', 'down'], {}),
    ('persimmon', [*'qkvo', 'up', 'down'], dict(num_key_value_heads=4)),
    ('xglm', [*'qkvo', 'up', 'down'], dict(d_model=64, attention_heads=4, num_layers=2, ffn_dim=96)),
    ('gptj', [*'qkvo', 'up', 'down'], dict(rotary_dim=8)),
    ('mpt', [*'qkvo', 'up', 'down'], dict(d_model=64, n_heads=4))])
def test_plain_families(family, roles, sizes):
    found = detect_architectures(skeleton(family, **SMALL | sizes))
    assert all(block.roles == [*roles] and not block.unknown and block.mixers == SOFTMAX for block in found)

@pytest.mark.parametrize('family', ['glm4_moe', 'ernie4_5_moe', 'dots1', 'hunyuan_v1_moe', 'minimax', 'phimoe',
                                    'olmoe', 'granitemoe', 'minimax_m2'])
def test_families_with_experts(family):
    found = detect_architectures(skeleton(family, **SMALL | MOE | dict(head_dim=16)))
    assert all(block.attends and not block.unknown for block in found)
    assert found[-1].experts == 4 and {'experts.3.down', 'router'} <= found[-1].modules.keys()

def test_linear_attention_is_told_from_attention():
    found = detect_architectures(skeleton('minimax', **SMALL | MOE | dict(head_dim=16)))
    assert {*map(frozenset, ({'attention'}, {'linear attention'}))} == {block.mixers for block in found}
    assert all(block.attends for block in found)

# ---- wrappers

@pytest.mark.parametrize('kind', WRAPPERS)
def test_the_language_model_inside_a_wrapper_is_read(kind):
    model = tiny(kind)
    path, blocks = find_blocks(model)
    assert re.search(r'(language|text)_model\.(model\.)?layers$', path) and len(blocks) == 2
    found = detect_architectures(model)
    assert found[-1].attends and not any(block.unknown for block in found)
    assert (found[-1].heads, found[-1].kv_heads) == (4, 2)

def test_a_language_model_is_read_where_the_wrapper_wants_pictures():
    from transformers import AutoModelForImageTextToText
    text = dict(model_type='opt', ffn_dim=96, word_embed_proj_dim=64) | SMALL
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model('blip-2', text_config=text, vision_config=vision,
                                  qformer_config=dict(encoder_hidden_size=16, num_hidden_layers=1))
    with init_empty_weights(include_buffers=False): model = AutoModelForImageTextToText.from_config(config)
    assert [found.roles for found in detect_architectures(model)] == [[*'qkvo', 'up', 'down']]*2

# ---- refusals

def refusal(model):
    with pytest.raises(ValueError) as caught: detect_architectures(model)
    assert '\n' not in str(caught.value)
    return str(caught.value)

@pytest.mark.parametrize('family, why', [
    ('gemma3n_text', 'model.layers.0 (Gemma3nTextDecoderLayer) has 4 residual streams'),
    ('hrm_text', 'model.L_module.layers.0 (HrmTextDecoderLayer) runs 6 times in one pass, so that an update acts at'),
    ('doge', 'model.layers.0 (DogeDecoderLayer) does more to the stream than add to it'),
    ('cpmant', 'cpmant.encoder.layers.0 (CpmAntTransformerBlock) is given 34 tokens where a text has 2')])
def test_what_is_not_understood_is_refused_in_one_line(family, why):
    said = refusal(skeleton(family))
    assert said.startswith(why)
    assert said.endswith('lorasuite reads blocks that add what they compute to one residual stream')

def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match='Linear has no stack of transformer blocks'): find_blocks(nn.Linear(2, 2))

def test_layers_that_take_no_part_are_unknown_with_the_reason():
    "The layers of Llama 3.2 Vision that look at pictures"
    found = detect_architectures(skeleton('mllama'))
    seeing = [block for block in found if not block.modules]
    assert len(seeing) == 8 and all(block.attends for block in found if block.modules)
    assert {why for block in seeing for why in block.unknown.values()} == {'takes no part when a text is read'}

def test_modules_of_several_blocks_have_no_role():
    found = detect_architectures(skeleton('zamba'))
    shared = [block for block in found if block.unknown]
    assert len(shared) > 1 and all(block.mixers == shared[0].mixers for block in shared)
    assert {*shared[0].unknown.values()} == {'belongs to several blocks, so that an update acts at several depths'}
    assert all(not name.startswith('shared') for block in found for name in block.modules.values())
