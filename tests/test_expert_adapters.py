"Adapters on experts: read from files of several versions, and written for PEFT, always against weights merged by hand"
import copy, warnings
import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from lorasuite.core.adapter import _load_onto, Adapter
from lorasuite.core.experts import expert_stacks, split_expert, Stored, stored_parameters, translate_experts
from lorasuite.core.formats import peft
from lorasuite.core.model import Decoder, model_info

COMMON = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
              tie_word_embeddings=False, initializer_range=.2)
FEW = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, decoder_sparse_step=1)
LATENT = dict(q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
              num_key_value_heads=4)
FAMILIES = dict(
    mixtral=dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    qwen2_moe=FEW | dict(shared_expert_intermediate_size=24),
    qwen3_moe=FEW | dict(head_dim=8, mlp_only_layers=[1]),
    deepseek_v3=LATENT | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, n_shared_experts=1,
                              first_k_dense_replace=1, n_group=1, topk_group=1),
    gpt_oss=dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, head_dim=8), # down_proj is square
    llama4_text=dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size=20, intermediate_size_mlp=40,
                     head_dim=8, moe_layers=[0, 2]),
    deepseek_v2=LATENT | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, n_shared_experts=1,
                              first_k_dense_replace=1, n_group=1, topk_group=1, topk_method='greedy'),
    qwen3_next=FEW | dict(shared_expert_intermediate_size=24, head_dim=8, linear_num_key_heads=2,
                          linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
                          layer_types=['linear_attention', 'full_attention', 'linear_attention']),
    afmoe=FEW | dict(head_dim=8, num_shared_experts=1, num_dense_layers=1),
    laguna=FEW | dict(head_dim=8, shared_expert_intermediate_size=24),
    jamba=dict(num_experts=4, num_experts_per_tok=2, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2,
               expert_layer_offset=1, mamba_d_state=6, mamba_dt_rank=5, mamba_expand=2),
)
IN_OUT = ('gpt_oss', 'llama4_text') # store (experts, in, out)

def model(family, **config):
    "A random model with experts"
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | FAMILIES[family] | config)).eval()
    for p in found.parameters():
        if p.ndim == 1: p.data.uniform_(.5, 1.5)
        else: p.data.normal_(std=.2)
    return found

@torch.no_grad()
def logits(model):
    ids = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(ids).logits

def close(found, true, base):
    "Do two models have the same effect on the logits, which is not small?"
    effect = true - base
    assert effect.norm() > .01*base.norm()
    assert (found - true).norm() < 1e-4*effect.norm()

def merged(base, family, adapter):
    "A copy of the model with every update added to its weight by hand"
    found = copy.deepcopy(base)
    for path in adapter.updates:
        parameter, expert = split_expert(path)
        delta = adapter.delta(path)
        if expert is None: found.get_submodule(parameter).weight.data += delta
        else: found.get_parameter(parameter).data[expert] += delta.T if family in IN_OUT else delta
    return found

def random_pair(out, in_, rank, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rank, in_, generator=random), .2*torch.randn(out, rank, generator=random)

def everywhere(base, family, experts=(0, 2, 3)):
    "Random updates of some experts, with different ranks, and of every other weight that can have one"
    updates = {}
    for path, stack in expert_stacks(base).items():
        for expert in experts:
            updates[f'{path}[{expert}]'] = random_pair(stack.out, stack.in_, 1 + expert, len(updates))
    for path, module in base.named_modules():
        weight = module._parameters.get('weight')
        if weight is None or weight.ndim != 2 or path in ('lm_head', 'model.embed_tokens'): continue
        if path.endswith('mamba.dt_proj'): continue # Jamba reads its weight past any adapter, merged or not
        updates[path] = random_pair(*weight.shape, 2, len(updates))
    return Adapter(updates, parameters=stored_parameters(base))

@pytest.mark.parametrize('family', FAMILIES)
def test_written_adapters_load_in_peft_without_loss(family, tmp_path):
    base = model(family)
    adapter = everywhere(base, family)
    adapter.save(tmp_path/'a')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*missing adapter keys')
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'a')
    close(logits(loaded), logits(merged(base, family, adapter)), logits(base))
    state = {k for k in loaded.state_dict() if 'lora_' in k}
    assert len(state) == len(load_file(tmp_path/'a'/'adapter_model.safetensors'))
    close(logits(loaded.merge_and_unload()), logits(merged(base, family, adapter)), logits(base))

@pytest.mark.parametrize('family', FAMILIES)
def test_written_adapters_are_read_back(family, tmp_path):
    base = model(family)
    adapter = everywhere(base, family)
    adapter.save(tmp_path/'a')
    again = translate_experts(Adapter.load(tmp_path/'a'), base)
    assert again.updates.keys() == adapter.updates.keys() and not again.skipped
    for path, pair in adapter.updates.items():
        assert all(torch.equal(t, u) for t, u in zip(pair, again.updates[path])), path
    assert again.parameters.items() <= adapter.parameters.items()
    twice = translate_experts(again, base)
    assert all(torch.equal(twice.delta(p), adapter.delta(p)) for p in adapter.updates)
    again.save(tmp_path/'b')
    first, second = (load_file(tmp_path/name/'adapter_model.safetensors') for name in 'ab')
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)

@pytest.mark.parametrize('experts', [(1,), (0, 1, 2, 3)])
@pytest.mark.parametrize('leaf', ['gate_up_proj', 'down_proj'])
@pytest.mark.parametrize('family', FAMILIES)
def test_one_parameter_alone(family, leaf, experts, tmp_path):
    base = model(family)
    adapter = everywhere(base, family, experts)
    adapter.updates = {p: ab for p, ab in adapter.updates.items() if split_expert(p)[0].endswith(f'.experts.{leaf}')}
    adapter.save(tmp_path/'a')
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'a')
    close(logits(loaded), logits(merged(base, family, adapter)), logits(base))
    again = translate_experts(Adapter.load(tmp_path/'a'), base)
    assert all(torch.equal(again.delta(p), adapter.delta(p)) for p in adapter.updates)

BY_PEFT = [dict(), dict(use_rslora=True, lora_alpha=16), dict(rank_pattern={r'experts\.down_proj': 5}),
           dict(alpha_pattern={r'layers\.0\..*\.gate_up_proj': 40}), dict(target_modules=['q_proj', 'o_proj'])]

def trained(base, folder, **settings):
    "A LoRA on experts as PEFT trains and writes it"
    settings = dict(r=3, lora_alpha=6, target_modules=[],
                    target_parameters=['experts.gate_up_proj', 'experts.down_proj']) | settings
    found = get_peft_model(copy.deepcopy(base), LoraConfig(task_type='CAUSAL_LM', **settings)).eval()
    torch.manual_seed(1)
    for name, p in found.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.2)
    found.save_pretrained(folder)
    return logits(found)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('settings', BY_PEFT)
@pytest.mark.parametrize('family', FAMILIES)
def test_reads_what_peft_trains(family, settings, tmp_path):
    base = model(family)
    if family == 'deepseek_v3' and 'target_modules' in settings: settings = dict(target_modules=['q_b_proj', 'o_proj'])
    true = trained(base, tmp_path/'a', **settings)
    adapter = translate_experts(Adapter.load(tmp_path/'a'), base)
    close(logits(merged(base, family, adapter)), true, logits(base))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', ['mixtral', 'qwen2_moe', 'qwen3_moe', 'gpt_oss', 'llama4_text'])
def test_reads_routers(family, tmp_path):
    base = model(family)
    true = trained(base, tmp_path/'a', target_parameters=['router.weight' if family in IN_OUT else 'gate.weight'])
    adapter = translate_experts(Adapter.load(tmp_path/'a'), base)
    assert all(p.endswith(('.router', '.gate')) for p in adapter.updates)
    close(logits(merged(base, family, adapter)), true, logits(base))

def test_reads_the_layout_of_peft_before_0_19(tmp_path):
    "It took the first side of every 3-D parameter for the input"
    base, path = model('mixtral'), 'model.layers.0.mlp.experts'
    A, B = torch.randn(2*4, 96), torch.randn(32, 2*4) # in and out of gate_up_proj, changed
    config = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=['experts.gate_up_proj'])
    write_files(tmp_path/'a', config, {path: (A, B)})
    adapter = translate_experts(Adapter.load(tmp_path/'a'), base)
    delta = torch.einsum('ore,eri->eio', B.reshape(32, 2, 4), A.reshape(4, 2, 96)) # as PEFT 0.18.1 computes it
    for n in range(4): torch.testing.assert_close(adapter.delta(f'{path}.gate_up_proj[{n}]'), delta[n])

def test_conv1d_by_parameter(tmp_path):
    "GPT-2 stores (in, out): square matrices show nothing, the class does"
    config = AutoConfig.for_model('gpt2', vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    true = trained(base, tmp_path/'a', target_parameters=['attn.c_proj.weight'])
    adapter = translate_experts(Adapter.load(tmp_path/'a'), base)
    found = copy.deepcopy(base)
    for path in adapter.updates:
        assert isinstance(found.get_submodule(path), Conv1D)
        found.get_submodule(path).weight.data += adapter.delta(path).T
    close(logits(found), true, logits(base))
    adapter.save(tmp_path/'b')
    close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'b')), true, logits(base))

# ---- files of transformers 4, made by hand

def write_files(folder, config, pairs):
    "An adapter's two files, with the names that are given"
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = {f'base_model.model.{p}.lora_{side}.weight': t.contiguous()
               for p, pair in pairs.items() for side, t in zip('AB', pair)}
    save_file(tensors, folder/'adapter_model.safetensors')

class Expert(nn.Module):
    "One expert as transformers 4 had it"
    def __init__(self, gate_up, down, names):
        super().__init__()
        for name, weight in zip(names, (*gate_up.chunk(2), down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            self.add_module(name, linear)

class Experts(nn.ModuleList):
    "The experts of a block as transformers 4 had them, called as transformers 5 calls them"
    def __init__(self, fused, names):
        super().__init__(Expert(g, d, names) for g, d in zip(fused.gate_up_proj.data, fused.down_proj.data))
        self.names, self.act = names, fused.act_fn.forward # no expert, so no module of the list
    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for n, expert in enumerate(self):
            gate, up, down = (getattr(expert, name) for name in self.names)
            share = (weights*(index == n)).sum(-1, keepdim=True).to(x.dtype)
            out = out + share*down(self.act(gate(x))*up(x))
        return out

W, P = ('w1', 'w3', 'w2'), ('gate_proj', 'up_proj', 'down_proj')
OLD = dict(mixtral=W, qwen2_moe=P, qwen3_moe=P, deepseek_v2=P, deepseek_v3=P, qwen3_next=P, afmoe=P, jamba=P)

def as_before(base, family):
    "The same model with an own module for each projection of each expert"
    found = copy.deepcopy(base)
    for path in {p.rpartition('.')[0] for p in expert_stacks(base)}:
        owner = found.get_submodule(path.rpartition('.')[0])
        owner.experts = Experts(owner.experts, OLD[family])
    return found

def test_the_old_model_is_the_new_one():
    for family in OLD:
        base = model(family)
        torch.testing.assert_close(logits(as_before(base, family)), logits(base), rtol=0, atol=1e-4)

KINDS = dict(gate=lambda f: [OLD[f][0]], gate_and_up=lambda f: OLD[f][:2], up_and_down=lambda f: OLD[f][1:],
             all=lambda f: OLD[f])

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('family', OLD)
def test_adapters_of_transformers_4(family, kind, rslora, tmp_path):
    "Targets by leaf, as people wrote them: they meet experts, shared experts and dense blocks alike"
    base, leaves = model(family), [*KINDS[kind](family), 'o_proj']
    before, pairs = as_before(base, family), {}
    for path, module in before.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition('.')[2] in leaves:
            pairs[path] = random_pair(*module.weight.shape, 2, len(pairs))
            scale = 3/(2**.5 if rslora else 2)
            module.weight.data += scale*pairs[path][1]@pairs[path][0]
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=rslora, target_modules=leaves, task_type='CAUSAL_LM')
    rename = 'block_sparse_moe' if family == 'mixtral' else 'mlp'
    pairs = {p.replace('.mlp.', f'.{rename}.'): ab for p, ab in pairs.items()}
    write_files(tmp_path/'a', config, pairs)
    read = Adapter.load(tmp_path/'a')
    assert read.updates.keys() == pairs.keys() # for what they are
    adapter = read.named_for(model_info(Decoder(base)))
    assert not adapter.skipped and adapter.updates.keys() == translate_experts(read, base).updates.keys()
    close(logits(merged(base, family, adapter)), logits(before), logits(base))
    adapter.save(tmp_path/'b')
    close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'b')), logits(before), logits(base))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('rslora', [False, True])
@pytest.mark.parametrize('family', OLD)
def test_ranks_and_scales_of_single_experts(family, rslora, tmp_path):
    "Patterns give some experts, and some projections, a rank or an α of their own"
    base = model(family)
    before, pairs, power = as_before(base, family), {}, .5 if rslora else 1
    up, down = OLD[family][1:]
    ranks = {f'experts.1.{up}': 5, rf'layers\.1\..*\.{down}': 3}
    alphas = {f'experts.2.{down}': 16}
    for path, module in before.named_modules():
        if not isinstance(module, nn.Linear) or path.rpartition('.')[2] not in (*OLD[family], 'o_proj'): continue
        r = 5 if path.endswith(f'experts.1.{up}') else 3 if '.layers.1.' in path and path.endswith(f'.{down}') else 2
        α = 16 if path.endswith(f'experts.2.{down}') else 3
        pairs[path] = random_pair(*module.weight.shape, r, len(pairs))
        module.weight.data += α/r**power*pairs[path][1]@pairs[path][0]
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=rslora, rank_pattern=ranks, alpha_pattern=alphas,
                        target_modules=[*OLD[family], 'o_proj'], task_type='CAUSAL_LM')
    rename = 'block_sparse_moe' if family == 'mixtral' else 'mlp'
    write_files(tmp_path/'a', config, {p.replace('.mlp.', f'.{rename}.'): ab for p, ab in pairs.items()})
    adapter = Adapter.load(tmp_path/'a').named_for(model_info(Decoder(base)))
    close(logits(merged(base, family, adapter)), logits(before), logits(base))
    adapter.save(tmp_path/'b')
    close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'b')), logits(before), logits(base))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', ['llama4_text', 'gpt_oss', 'mixtral'])
def test_square_experts_are_not_turned_by_mistake(family, tmp_path):
    "Where a matrix is square its shape does not say which way round the factors are"
    sizes = dict(hidden_size=32, intermediate_size=32) # down_proj
    if family == 'mixtral': sizes = dict(hidden_size=32, intermediate_size=16) # gate_up_proj
    base = model(family, **sizes)
    leaf = 'gate_up_proj' if family == 'mixtral' else 'down_proj'
    assert {(s.out, s.in_) for p, s in expert_stacks(base).items() if p.endswith(leaf)} == {(32, 32)}
    for number, targets in enumerate([[f'experts.{leaf}'], ['experts.gate_up_proj', 'experts.down_proj']]):
        true = trained(base, tmp_path/f'{number}', target_parameters=targets)
        adapter = Adapter.load(tmp_path/f'{number}').named_for(model_info(Decoder(base)))
        close(logits(merged(base, family, adapter)), true, logits(base))
        before = logits(base)
        with adapter.on(Decoder(base)) as loaded: close(logits(loaded), true, before)

def test_old_router(tmp_path):
    base, old = model('mixtral'), 'model.layers.1.block_sparse_moe.gate'
    pair = random_pair(4, 32, 2, 0)
    write_files(tmp_path/'a', LoraConfig(r=2, lora_alpha=2, target_modules=['gate']), {old: pair})
    adapter = translate_experts(Adapter.load(tmp_path/'a'), base)
    assert [*adapter.updates] == ['model.layers.1.mlp.gate']
    adapter.save(tmp_path/'b')
    loaded = logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'b'))
    close(loaded, logits(merged(base, 'mixtral', adapter)), logits(base))

def test_interleaved_rows():
    "gpt-oss alternates gate and up"
    base = model('gpt_oss')
    path = 'model.layers.0.mlp.experts'
    A, B = random_pair(32, 32, 2, 0)
    adapter = translate_experts(Adapter({f'{path}.1.up_proj': (A, B)}), base)
    whole = adapter.delta(f'{path}.gate_up_proj[1]')
    torch.testing.assert_close(whole[1::2], B@A)
    assert not whole[::2].any()

def test_one_update_of_separate_and_fused_factors():
    base, path = model('mixtral'), 'model.layers.0.mlp.experts.gate_up_proj'
    whole, gate = random_pair(96, 32, 2, 0), random_pair(48, 32, 1, 1)
    old = 'model.layers.0.block_sparse_moe.experts.2.w1'
    adapter = translate_experts(Adapter({f'{path}[2]': whole, old: gate}), base)
    true = whole[1]@whole[0]
    true[:48] += gate[1]@gate[0]
    torch.testing.assert_close(adapter.delta(f'{path}[2]'), true)

# ---- what PEFT loses by itself

def test_names_that_peft_renames(tmp_path):
    "PEFT takes Laguna's shared experts for old names and loses them; ours stand under the names that it makes right"
    base = model('laguna')
    adapter = everywhere(base, 'laguna')
    own = 'model.layers.1.mlp.shared_experts.up_proj'
    assert own in adapter.updates
    adapter.save(tmp_path/'a')
    keys = load_file(tmp_path/'a'/'adapter_model.safetensors').keys()
    assert f'{peft.PREFIX}{own.replace("experts", "expert")}.lora_A.weight' in keys
    read = Adapter.load(tmp_path/'a')
    assert read.updates.keys() == adapter.updates.keys() # the file says what they were
    foreign = Adapter({own.replace('experts', 'expert'): adapter.updates[own]}) # a file that does not
    assert [*foreign.named_for(model_info(Decoder(base))).updates] == [own]

@pytest.mark.filterwarnings('ignore')
def test_dense_blocks_of_a_class_with_experts(tmp_path):
    "A DeepSeek-V3 without experts: PEFT takes its gate_proj for an expert's all the same"
    base = model('deepseek_v3', first_k_dense_replace=3)
    assert not expert_stacks(base)
    adapter = everywhere(base, 'deepseek_v3')
    adapter.save(tmp_path/'a')
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path/'a')
    close(logits(loaded), logits(merged(base, 'deepseek_v3', adapter)), logits(base))

def test_one_adapter_after_another_on_one_model():
    "PEFT leaves a parameter that it adapted behind the others, so the next adapter would be nested the other way round"
    base = model('mixtral')
    adapter = everywhere(base, 'mixtral')
    first = {path: ab for path, ab in adapter.updates.items() if 'gate_up_proj' in path}
    true, before = logits(merged(base, 'mixtral', adapter)), logits(base)
    with Adapter(first).on(Decoder(base)) as loaded: logits(loaded)
    with adapter.on(Decoder(base)) as loaded: close(logits(loaded), true, before)

def test_an_adapter_without_updates_is_not_written(tmp_path):
    with pytest.raises(ValueError, match='updates no module'): Adapter({}).save(tmp_path/'a')

def test_a_loss_in_peft_is_an_error():
    base = model('laguna')
    adapter = everywhere(base, 'laguna')
    path = 'model.layers.1.mlp.shared_experts.up_proj'
    alone = Adapter({path: adapter.updates[path]}, parameters={path: Stored()}) # under its own name
    with pytest.raises(ValueError, match='does not load all updates'): _load_onto(copy.deepcopy(base), alone, False)

def test_what_peft_refuses_is_named():
    sizes = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, head_dim=8)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model('falcon_h1', **COMMON | sizes)).eval()
    held = stored_parameters(base)['model.layers.0.mamba.out_proj']
    assert held.module and 'PEFT does not adapt it' in held.refused
    out = base.model.layers[0].mamba.out_proj
    adapter = Adapter({'model.layers.0.mamba.out_proj': random_pair(*out.weight.shape, 2, 0)})
    with pytest.raises(ValueError, match='mamba.out_proj: PEFT does not adapt it'), adapter.on(Decoder(base)): pass

def test_works_on_the_meta_device():
    base = model('qwen3_moe')
    with torch.device('meta'): meta = AutoModelForCausalLM.from_config(base.config)
    assert stored_parameters(meta) == stored_parameters(base) and expert_stacks(meta) == expert_stacks(base)

def test_what_does_not_fit_is_skipped_by_name():
    base, old = model('mixtral'), 'model.layers.0.block_sparse_moe.experts'
    adapter = Adapter({f'{old}.9.w1': random_pair(48, 32, 2, 0), f'{old}.1.w1': random_pair(50, 32, 2, 0),
                       f'{old}.1.w2': random_pair(32, 40, 2, 0), f'{old}.1.w4': random_pair(32, 40, 2, 0)})
    found = translate_experts(adapter, base)
    assert found.skipped.keys() == {f'{old}.9.w1', f'{old}.1.w1', f'{old}.1.w2'}
    assert found.updates.keys() == {f'{old}.1.w4'} # means nothing: whoever knows the modules must say so
    assert all('does not fit' in why for why in found.skipped.values())

def test_models_without_experts_are_left_alone():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **COMMON))
    assert stored_parameters(base) == {}
    adapter = Adapter({'model.layers.1.mlp.up_proj': random_pair(48, 32, 2, 0), 'h.0.x': random_pair(48, 32, 2, 0)})
    found = translate_experts(adapter, base)
    assert found.updates.keys() == adapter.updates.keys() and not found.skipped and not found.parameters

# ---- what is written

def test_targets_are_whole_paths(tmp_path):
    "A leaf may be a number, or stand elsewhere in the model too"
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.q_proj = nn.Linear(4, 4)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.h, self.vision = nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])
    pairs = {f'h.{n}.{leaf}': random_pair(4, 4, 2, n) for n in (0, 1) for leaf in ('ffn.0', 'q_proj')}
    Adapter(pairs, layers=2).save(tmp_path/'a')
    loaded = PeftModel(Two(), peft.adapter_config(Adapter(pairs, layers=2)))
    hit = {n.removeprefix('base_model.model.') for n, m in loaded.named_modules() if hasattr(m, 'lora_A')}
    assert hit == pairs.keys()

def test_unknown_number_of_experts_is_an_error(tmp_path):
    adapter = Adapter({'model.layers.0.mlp.experts.down_proj[1]': random_pair(4, 4, 2, 0)})
    with pytest.raises(ValueError, match='how many experts.*translate_experts'): adapter.save(tmp_path/'a')

def test_unclear_parameters_are_skipped_by_name(tmp_path):
    path = 'model.layers.0.mlp.experts'
    config = LoraConfig(r=2, target_modules=[], target_parameters=['gate_up_proj', 'down_proj'])
    write_files(tmp_path/'a', config, {path: (torch.ones(8, 4), torch.ones(4, 8)),
                                       f'{path}.base_layer': (torch.ones(8, 4), torch.ones(4, 8)),
                                       'model.layers.1.mlp.experts': (torch.ones(8, 4), torch.ones(4, 8))})
    adapter = Adapter.load(tmp_path/'a')
    assert adapter.parameters.keys() == {f'{path}.gate_up_proj', f'{path}.down_proj'}
    assert [*adapter.skipped] == ['model.layers.1.mlp.experts']

def test_wrong_rank_is_an_error(tmp_path):
    config = LoraConfig(r=3, target_modules=[], target_parameters=['experts.down_proj'])
    write_files(tmp_path/'a', config, {'mlp.experts': (torch.ones(8, 4), torch.ones(4, 8))})
    with pytest.raises(ValueError, match='8 rows for rank 3'): Adapter.load(tmp_path/'a')
