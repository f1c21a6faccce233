"""Public reports about adapters: for each a small input of our own, its thread, and the right value"""
import copy, json, re, shutil, sys, warnings
from pathlib import Path
import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner
from models import as_phi, error, logits, random_decoder, tokens
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.containers import SETTINGS
from lorasuite.core.files import data_dir
from lorasuite.core.keys import PREFIX, unquantised_name
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.forecast.inspection import preview_transfer
from lorasuite.lab.zoo import new_tokenizer
from lorasuite.stages.alignment import align
from lorasuite.stages.pairing import base_doubt
from lorasuite.stages.transfer import transfer
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
from census_models import tiny_model, TOKENS

FILE, ZOO = 'adapter_model.safetensors', data_dir()/'zoo'
Q = 'model.layers.0.self_attn.q_proj'
FEW = ['Who lives in the old mill by the river?']*8

# ---- adapters

def plain(folder, leaves=('q_proj', 'v_proj'), layers=4, rank=2):
    "A plain PEFT adapter of the tiny Llama in two files, of scale 2"
    torch.manual_seed(0)
    outs = dict(q_proj=64, k_proj=32, v_proj=32)
    paths = {f'model.layers.{n}.self_attn.{leaf}': outs[leaf] for n in range(layers) for leaf in leaves}
    shapes = {path: dict(A=(rank, 64), B=(out, rank)) for path, out in paths.items()}
    tensors = {f'{PREFIX}{path}.lora_{side}.weight': torch.randn(sides[side])
               for path, sides in shapes.items() for side in 'AB'}
    return adapter_files(folder, tensors, r=rank, lora_alpha=2*rank, target_modules=[*leaves])

def adapter_files(folder, tensors, **said):
    "An adapter of given tensors and settings"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder/FILE)
    (folder/SETTINGS).write_text(json.dumps(dict(peft_type='LORA', task_type='CAUSAL_LM') | said))
    return folder

def rekey(folder, change):
    "The same adapter under other keys"
    save_file({change(key): t for key, t in load_file(folder/FILE).items()}, folder/FILE)
    return folder

def settings(folder, **changes):
    "The same adapter with other settings"
    (folder/SETTINGS).write_text(json.dumps(json.loads((folder/SETTINGS).read_text()) | changes))
    return folder

def check_same(adapter, right):
    "Both have the same updates of the same modules"
    assert adapter.updates.keys() == right.updates.keys()
    for path in right.updates: assert torch.allclose(adapter.delta(path), right.delta(path), rtol=1e-5, atol=1e-6)

SETTINGS_OF_PEFT = dict(r=2, lora_alpha=4, task_type='CAUSAL_LM', target_modules=['q_proj'])

def trained(model, folder, std=.05, save=True, **config):
    "A PEFT model with random changes everywhere, and its files"
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(model), LoraConfig(**SETTINGS_OF_PEFT | config))
    for name, p in model.named_parameters():
        if p.requires_grad and 'lora_A' not in name: p.data += std*torch.randn_like(p)
    if save: model.save_pretrained(folder)
    return model

@torch.no_grad()
def of_peft(model, ids=tokens()): return model(ids).logits

def lora(*args, status=2):
    "What the command prints"
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return result.output + result.stderr

@pytest.fixture
def folder(tmp_path): return plain(tmp_path/'adapter')

@pytest.fixture
def right(folder): return Adapter.load(folder)

def refused(message): return pytest.raises(ValueError, match=message)
def warned(message): return pytest.warns(UserWarning, match=message)

quiet = pytest.mark.filterwarnings('ignore')

# ---- names of tensors

NAMES = dict( # situation, with its thread: change of a key
    adapter_name_diffusers_11675=lambda k: k.replace('.weight', '.default_0.weight'),
    adapter_name_twice_peft_1579=lambda k: k.replace('.weight', '.default.default.weight'),
    compiled_vllm_17196=lambda k: f'_orig_mod.{k}',
    data_parallel_vllm_17196=lambda k: f'module.{k}',
    doubled_prefix_vllm_17196=lambda k: PREFIX + k,
    without_prefix_vllm_17196=lambda k: k.removeprefix(PREFIX),
    fsdp_vllm_17196=lambda k: k.replace('.self_attn', '._fsdp_wrapped_module.self_attn'))

@pytest.mark.parametrize('name', NAMES)
def test_names_that_other_programs_leave(folder, right, name):
    "huggingface/diffusers#11675, huggingface/peft#1579, vllm-project/vllm#17196"
    rekey(folder, NAMES[name])
    with warned('the names of its tensors are read with'): found = Adapter.load(folder)
    check_same(found, right)

@quiet
def test_a_word_of_the_model_before_the_prefix(folder, right, decoder):
    "NVIDIA-NeMo/Automodel#3595"
    rekey(folder, lambda k: f'thinker.{k}')
    found = Adapter.load(folder)
    assert all(found.delta(f'thinker.{path}').equal(right.delta(path)) for path in right.updates)
    message = 'updates thinker.model.layers.0.self_attn.[qv]_proj, which random/llama does not have'
    with refused(message): logits(decoder, tokens(), found)

@quiet
@pytest.mark.parametrize('changed', [lambda k: True, lambda k: '.layers.0.' in k])
def test_paths_that_the_base_does_not_have(folder, changed):
    "vllm-project/vllm#34186, vllm-project/vllm#48019"
    rekey(folder, lambda k: k.replace('model.layers', 'decoder.blocks') if changed(k) else k)
    said = lora('inspect', 'zoo/old', 'zoo/new', folder)
    assert 'decoder.blocks.0.self_attn.q_proj' in said and 'zoo/old' in said

def test_a_whole_module_named_like_a_factor(tmp_path):
    "huggingface/peft#3433"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.lora_head = nn.Linear(8, 8), nn.Linear(8, 3)
        def forward(self, x): return self.lora_head(self.lin(x))
    trained(Net(), tmp_path/'a', target_modules=['lin'], modules_to_save=['lora_head'], task_type=None)
    adapter = Adapter.load(tmp_path/'a')
    assert [*adapter.updates] == ['lin'] and {*adapter.weights} == {'lora_head.weight', 'lora_head.bias'}

@quiet
def test_a_module_whose_name_holds_the_word_weight(folder, right):
    "huggingface/peft#2772"
    def renamed(text): return text.replace('q_proj', 'weighted_q').replace('v_proj', 'v_proj.weight_norm')
    settings(rekey(folder, renamed), target_modules=['weighted_q', 'weight_norm'])
    found = Adapter.load(folder)
    for path in right.updates: assert found.delta(renamed(path)).equal(right.delta(path))

# ---- files and settings

@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_a_file_without_a_tensor(folder, right, kind):
    "huggingface/peft#286"
    shutil.copytree(folder, folder/'checkpoint-10')
    if kind == 'safetensors': save_file({}, folder/FILE)
    else:
        (folder/FILE).unlink()
        torch.save({}, folder/'adapter_model.bin')
    message = f'adapter_model.{kind} holds no LoRA update, not a single tensor.*others in checkpoint-10'
    with refused(message): Adapter.load(folder)
    check_same(Adapter.load(folder, adapter_name='checkpoint-10'), right)

@quiet
def test_an_adapter_named_like_a_module(decoder, tmp_path):
    "huggingface/peft#3584"
    model = trained(decoder.model, '', save=False, target_modules=['q_proj', 'v_proj'])
    model.add_adapter('q_proj', LoraConfig(r=2, target_modules=['v_proj'], task_type='CAUSAL_LM'))
    model.save_pretrained(tmp_path/'a')
    with warned('target_modules names q_proj.*no tensor'): Adapter.load(tmp_path/'a')

def test_a_model_and_an_adapter_in_one_folder(folder, right):
    "unslothai/unsloth#1061, huggingface/transformers#43781"
    for file in (ZOO/'old').iterdir(): shutil.copy(file, folder)
    check_same(Adapter.load(folder), right)
    with warned('a model and an adapter: the model is read without'): model = load_model(folder)
    own = load_model('zoo/old').model.state_dict()
    assert all(t.equal(own[name]) for name, t in model.model.state_dict().items())

def test_settings_of_another_PEFT(folder, right):
    "oobabooga/textgen#6819, huggingface/peft#2275, InternLM/lmdeploy#1151"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_same(Adapter.load(settings(folder, new_thing=None, enable_lora=None, merge_weights=False)), right)
    with warned('scaling_rule'): Adapter.load(settings(folder, scaling_rule='sqrt'))

@pytest.mark.parametrize('shape', [(192, 8, 1), (192, 2, 1)])
def test_grouped_convolutions_of_an_old_PEFT(folder, shape):
    "huggingface/peft#379, InternLM/lmdeploy#1151"
    adapter_files(folder, {f'{PREFIX}h.0.c_attn.lora_A.weight': torch.ones(16, 96),
                           f'{PREFIX}h.0.c_attn.lora_B.weight': torch.ones(shape)},
                  r=8, enable_lora=[True, False, True])
    with refused('grouped convolution .*an old format'): Adapter.load(folder)

MLX = dict(lora_a=torch.ones(8, 2), lora_b=torch.ones(2, 8))

def mlx(folder, tensors, **lora):
    "An adapter of mlx-lm"
    folder.mkdir()
    save_file({f'model.layers.0.self_attn.q_proj.{k}': t for k, t in tensors.items()}, folder/'adapters.safetensors')
    said = dict(fine_tune_type='lora', num_layers=1, lora_parameters=lora)
    (folder/SETTINGS).write_text(json.dumps(said))
    return folder

@pytest.mark.parametrize('tensors, message', [
    (MLX | dict(lora_typo=torch.ones(1)), 'q_proj.lora_typo is not a LoRA update'),
    (MLX | dict(lora_b=torch.ones(3, 8)), r'lora_a \(8, 2\) and lora_b \(3, 8\)'),
    (dict(lora_a=MLX['lora_a']), 'q_proj has only lora_a')])
def test_tensors_that_MLX_would_ignore(tmp_path, tensors, message):
    "ml-explore/mlx-lm#1725"
    with refused(message): Adapter.load(mlx(tmp_path/'a', tensors, rank=2, scale=3.))

def test_MLX_without_a_scale(tmp_path):
    "ml-explore/mlx-examples#622"
    found = Adapter.load(mlx(tmp_path/'a', MLX, rank=2, scale=3.))
    assert found.delta(Q).equal(torch.full((8, 8), 6.))
    with refused('scale in lora_parameters is None'): Adapter.load(mlx(tmp_path/'b', MLX, rank=2))

@quiet
def test_other_containers(folder, right, tmp_path):
    "ml-explore/mlx-lm#1119, predibase/lorax#546"
    shutil.copytree(folder, tmp_path/'run'/'checkpoint-9')
    check_same(Adapter.load(tmp_path/'run'), right)
    torch.save(load_file(folder/FILE), folder/'adapter_model.bin')
    (folder/FILE).unlink()
    check_same(Adapter.load(folder), right)
    right.base = 'zoo/old'
    right.updates = {path: pair for path, pair in right.updates.items() if 'q_proj' in path} # its v is of another size
    right.save(tmp_path/'gguf', format='gguf')
    check_same(Adapter.load(tmp_path/'gguf'), right)

TUNE = dict(q_proj='attn.q_proj', k_proj='attn.k_proj', v_proj='attn.v_proj', o_proj='attn.output_proj',
            gate_proj='mlp.w1', down_proj='mlp.w2', up_proj='mlp.w3')

def torchtune(folder, base, heads):
    "The files of torchtune for an adapter of PEFT; `heads`: whose rows it moves"
    def moved(leaf, B): return B.view(heads[leaf], 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)
    tensors = {}
    for key, t in load_file(folder/FILE).items():
        n, leaf, side = re.search(r'layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])', key).groups()
        t = moved(leaf, t) if side == 'B' and leaf in heads else t
        tensors[f'layers.{n}.{TUNE[leaf]}.lora_{side.lower()}.weight'] = t
    (folder/FILE).unlink()
    torch.save(tensors, folder/'adapter_model.pt')
    base.config.save_pretrained(folder)

@pytest.mark.parametrize('family, heads', [('llama', dict(q_proj=4, k_proj=2)), ('qwen2', {}), ('phi3', {})])
def test_names_and_rows_of_torchtune(tokenizer, tmp_path, family, heads):
    "pytorch/torchtune#1779, pytorch/torchtune#2025"
    base = random_decoder(tokenizer, family, layers=2)
    split = random_decoder(tokenizer, 'llama', layers=2) if family == 'phi3' else base # whose parts torchtune names
    true = of_peft(trained(split.model, tmp_path/'a', target_modules=[*TUNE], lora_alpha=6))
    right = Adapter.load(tmp_path/'a')
    torchtune(tmp_path/'a', base.model, heads)
    found = Adapter.load(tmp_path/'a')
    check_same(found, right)
    if family == 'phi3': assert len(found.named_for(align(base, base, FEW).old).updates) == 8
    else: assert error(logits(base, tokens(), found), true) <= 1e-5
    tensors = torch.load(tmp_path/'a'/'adapter_model.pt')
    (tmp_path/'b').mkdir()
    shutil.copy(tmp_path/'a'/SETTINGS, tmp_path/'b')
    torch.save(tensors, tmp_path/'b'/'adapter_model.bin')
    with refused('is a name as torchtune has it: rename the file to adapter_model.pt'): Adapter.load(tmp_path/'b')
    (tmp_path/'b'/'adapter_model.bin').rename(tmp_path/'b'/'adapter_0.pt')
    base.model.config.save_pretrained(tmp_path/'b')
    check_same(Adapter.load(tmp_path/'b'), right)
    (tmp_path/'a'/'config.json').unlink()
    with refused('depends on the model, .* lorasuite convert .* --base MODEL'): Adapter.load(tmp_path/'a')
    (tmp_path/'a'/SETTINGS).unlink()
    with refused('does not say r: write them there'): Adapter.load(tmp_path/'a'/'adapter_model.pt')

def test_a_checkpoint_of_a_named_adapter(folder, right, tmp_path):
    "huggingface/transformers#28531, huggingface/peft#718"
    run = tmp_path/'run'
    for step in (2, 4):
        shutil.copytree(folder, run/f'checkpoint-{step}'/'mine')
        (run/f'checkpoint-{step}'/'trainer_state.json').write_text('{}')
    check_same(Adapter.load(run/'checkpoint-4'), right)
    with refused(r'holds 2 adapters \(checkpoint-2/mine, checkpoint-4/mine\): choose one'):
        Adapter.load(run)

def test_weights_in_an_old_and_a_new_file(folder, right):
    "oobabooga/textgen#4963"
    torch.save({k: 2*t for k, t in load_file(folder/FILE).items()}, folder/'adapter_model.bin')
    check_same(Adapter.load(folder), right)
    with warned('adapter_model.bin'): Adapter.load(folder)

# ---- ranks and scales

def test_one_alpha_for_mixed_ranks(decoder, tmp_path):
    "ggml-org/llama.cpp#8332, axolotl-ai-cloud/axolotl#3673"
    mixed = dict(target_modules=['q_proj', 'v_proj'], rank_pattern={'v_proj': 8})
    true = of_peft(trained(decoder.model, tmp_path/'a', **mixed))
    Adapter.load(tmp_path/'a').save(tmp_path/'b')
    said = json.loads((tmp_path/'b'/SETTINGS).read_text())
    assert said['r'] == said['lora_alpha'] == 8 and not said['rank_pattern'] and not said['alpha_pattern']
    assert error(logits(decoder, tokens(), Adapter.load(tmp_path/'b')), true) <= 1e-5

@quiet
def test_one_rank_on_a_fused_model(decoder, tmp_path):
    "ggml-org/llama.cpp#8332: rank 16 of separate projections is rank 32 and 48 of fused ones"
    phi = as_phi(decoder)
    leaves = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    true = of_peft(trained(decoder.model, tmp_path/'a', target_modules=leaves, r=16, lora_alpha=16))
    carried = transfer(Adapter.load(tmp_path/'a'), align(decoder, phi, FEW))
    carried.save(tmp_path/'b')
    said, tensors = json.loads((tmp_path/'b'/SETTINGS).read_text()), load_file(tmp_path/'b'/FILE)
    assert said['r'] == said['lora_alpha'] == 48 and not (said['rank_pattern'] or said['alpha_pattern'])
    assert {t.shape[0 if '.lora_A.' in key else 1] for key, t in tensors.items()} == {48}
    assert error(of_peft(PeftModel.from_pretrained(copy.deepcopy(phi.model), tmp_path/'b').eval()), true) <= 1e-3

@pytest.mark.parametrize('r', [64, 1, 0, -1, '2'])
def test_a_rank_that_the_tensors_contradict(folder, r):
    "ymcui/Chinese-LLaMA-Alpaca#302"
    with refused('the rank of .* but its lora_A has 2 rows'): Adapter.load(settings(folder, r=r))

def test_a_pattern_that_matches_no_module(folder, right):
    "huggingface/peft#3582"
    settings(folder, alpha_pattern={'^q_proj': 100, 'v_prj': 3}, rank_pattern={'nowhere': 64})
    with warned(r'\^q_proj, nowhere, v_prj .*match no module'): found = Adapter.load(folder)
    check_same(found, right)

def test_a_general_rank_beside_a_special_alpha(decoder, tmp_path):
    "huggingface/peft#2194"
    true = of_peft(trained(decoder.model, tmp_path/'a', target_modules=['q_proj', 'v_proj'], r=4, lora_alpha=8,
                           rank_pattern={'q_proj': 2}, alpha_pattern={'layers.0.self_attn.q_proj': 16}))
    tensors, found = load_file(tmp_path/'a'/FILE), Adapter.load(tmp_path/'a')
    for path, scale in ((Q, 8), (Q.replace('0', '1'), 4), (Q.replace('q_', 'v_'), 2)):
        A, B = (tensors[f'{PREFIX}{path}.lora_{side}.weight'] for side in 'AB')
        assert torch.allclose(found.delta(path), scale*B@A, atol=1e-5)
    assert error(logits(decoder, tokens(), found), true) <= 1e-5

def test_alpha_that_is_null(folder):
    "huggingface/peft#2275"
    with refused('lora_alpha is null'): Adapter.load(settings(folder, lora_alpha=None))

@pytest.mark.parametrize('missing', ['', '.v_proj'])
def test_DoRA_without_magnitudes(folder, missing):
    "NVIDIA-NeMo/Megatron-Bridge#6031"
    magnitudes = {k.replace('lora_A.weight', 'lora_magnitude_vector'): torch.ones(64) for k in load_file(folder/FILE)
                  if missing and 'q_proj.lora_A' in k}
    save_file(load_file(folder/FILE) | magnitudes, folder/FILE)
    with refused('no lora_magnitude_vector for .*v_proj'):
        Adapter.load(settings(folder, use_dora=True))

@quiet
def test_empty_tensors_and_a_dead_adapter(folder):
    "huggingface/peft#2500, huggingface/peft#2450"
    save_file({k: t*('lora_A' in k) for k, t in load_file(folder/FILE).items()}, folder/FILE)
    with warned('the adapter changes nothing'): Adapter.load(folder)
    save_file({k: torch.ones(0) for k in load_file(folder/FILE)}, folder/FILE)
    with refused('is empty, as DeepSpeed ZeRO-3 .*zero_to_fp32'): Adapter.load(folder)

# ---- experts

def moe(tokenizer, inner=24):
    "A tiny model whose experts are parameters"
    return random_decoder(tokenizer, 'qwen3_moe', layers=1, num_experts=2, num_experts_per_tok=1, head_dim=16,
                          moe_intermediate_size=inner, decoder_sparse_step=1, mlp_only_layers=[])

def grouped(B, experts=2): return B.view(len(B), -1, experts).transpose(1, 2).reshape(len(B), -1).contiguous()

EXPERTS = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']

@quiet
def test_two_orders_of_the_experts_columns(tokenizer, tmp_path):
    "unslothai/unsloth#6930, unslothai/unsloth-zoo#1269, unslothai/unsloth-zoo#1232"
    base = moe(tokenizer)
    model = trained(base.model, tmp_path/'a', target_modules=[], target_parameters=EXPERTS)
    right = Adapter.load(tmp_path/'a')
    assert error(logits(base, tokens(), right), of_peft(model)) <= 1e-5
    check_same(Adapter.load(settings(tmp_path/'a', lora_B_layout='rank_major')), right)
    tensors = load_file(tmp_path/'a'/FILE)
    save_file({k: grouped(t) if 'lora_B' in k else t for k, t in tensors.items()}, tmp_path/'a'/FILE)
    check_same(Adapter.load(settings(tmp_path/'a', lora_B_layout='grouped_by_expert')), right)
    for layout in ('grouped_by_expert', 'mixed'):
        own = dict(parameters={name.rpartition('.')[2]: dict(lora_B_layout=layout) for name in EXPERTS})
        changed = settings(tmp_path/'a', lora_B_layout=None, unsloth_fused_expert_lora=own)
        if layout == 'mixed':
            with refused('lora_B_layout'): Adapter.load(changed)
        else: check_same(Adapter.load(changed), right)
    settings(tmp_path/'a', unsloth_fused_expert_lora=None)
    (tmp_path/'a'/'README.md').write_text('Made with Unsloth')
    with warned('do not tell the order.*"lora_B_layout": "grouped_by_expert"'):
        Adapter.load(settings(tmp_path/'a', lora_B_layout=None))
    with refused('lora_B_layout'): Adapter.load(settings(tmp_path/'a', lora_B_layout='other'))

@quiet
@pytest.mark.parametrize('inner, experts', [(24, EXPERTS), (32, EXPERTS), (32, EXPERTS[:1])]) # 32: square
def test_factors_of_experts_changed_places(tokenizer, tmp_path, inner, experts):
    "NVIDIA-NeMo/Automodel#3592, vllm-project/vllm#52198"
    base = moe(tokenizer, inner)
    trained(base.model, tmp_path/'a', target_modules=[], target_parameters=experts)
    names = align(base, base, FEW).old
    right, tensors = Adapter.load(tmp_path/'a').named_for(names), load_file(tmp_path/'a'/FILE)
    other = dict(lora_A='lora_B', lora_B='lora_A')
    def turned(key): return next(key.replace(side, other[side]) for side in other if side in key)
    def order(key, t): # rows of A are sorted by expert, columns of B by component
        return t.T.reshape(2, 2, -1).transpose(0, 1).reshape(4, -1).T
    save_file({turned(k): (order(k, t).T if 'lora_B' in k else order(k, t.T)).contiguous() for k, t in tensors.items()},
              tmp_path/'a'/FILE)
    check_same(Adapter.load(settings(tmp_path/'a', peft_version='0.18.1')).named_for(names), right)
    if len(experts) == 2: return
    unknown = Adapter.load(settings(tmp_path/'a', peft_version=None)).named_for(names)
    assert not unknown.updates and all('write that of the training' in why for why in unknown.skipped.values())

@quiet
def test_experts_of_a_4_bit_base(tokenizer, tmp_path):
    "unslothai/unsloth#6936, unslothai/unsloth#3405"
    base = random_decoder(tokenizer, 'gpt_oss', layers=1, num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    torch.manual_seed(0)
    gate, down = (torch.randn(2, 64), torch.randn(192, 2)), (torch.randn(2, 96), torch.randn(64, 2))
    parts = {'gate_up_projs.0': gate, 'down_projs.1': down}
    tensors = {f'{PREFIX}model.layers.0.mlp.experts.{name}.lora_{side}.weight': t
               for name, pair in parts.items() for side, t in zip('AB', pair)}
    adapter_files(tmp_path/'a', tensors, r=2, lora_alpha=4, target_modules=['gate_up_projs.0', 'down_projs.1'])
    named = Adapter.load(tmp_path/'a').named_for(align(base, base, FEW).old)
    assert {*named.updates} == {f'model.layers.0.mlp.experts.{p}' for p in ('gate_up_proj[0]', 'down_proj[1]')}
    assert torch.allclose(named.delta('model.layers.0.mlp.experts.down_proj[1]'), 2*down[1]@down[0])

@quiet
def test_experts_of_a_packed_base(tokenizer, tmp_path):
    "huggingface/gpt-oss-recipes#21"
    base = random_decoder(tokenizer, 'gpt_oss', layers=1, num_local_experts=2, num_experts_per_tok=1, head_dim=16)
    for part in (base.model, tokenizer): part.save_pretrained(tmp_path/'old')
    weights, path = load_file(tmp_path/'old'/'model.safetensors'), 'model.layers.0.mlp.experts'
    for name, out, inner in (('gate_up_proj', 192, 64), ('down_proj', 64, 96)): # each byte: twice the number 1
        del weights[f'{path}.{name}']
        weights[f'{path}.{name}_blocks'] = torch.full((2, out, inner//32, 16), 0x22, dtype=torch.uint8)
        weights[f'{path}.{name}_scales'] = torch.full((2, out, inner//32), 127, dtype=torch.uint8)
    save_file(weights, tmp_path/'old'/'model.safetensors', metadata=dict(format='pt'))
    said = json.loads((tmp_path/'old'/'config.json').read_text())
    (tmp_path/'old'/'config.json').write_text(json.dumps(said | dict(quantization_config=dict(quant_method='mxfp4'))))
    old = load_model(tmp_path/'old')
    down = old.model.get_submodule(path).down_proj
    assert down.shape == (2, 96, 64) and down.is_floating_point() and (down == 1).all()
    model = trained(old.model, tmp_path/'a', target_modules=[], target_parameters=EXPERTS)
    assert error(logits(old, tokens(), Adapter.load(tmp_path/'a')), of_peft(model)) <= 1e-5

# ---- whole weights, embeddings, heads, tokens

@quiet
@pytest.mark.parametrize('bias, named', [('lora_only', 1), ('all', 1), ('lora_only', 0)])
def test_trained_biases(tokenizer, tmp_path, bias, named):
    "huggingface/peft#3306"
    old = random_decoder(tokenizer, attention_bias=True)
    true = of_peft(trained(old.model, tmp_path/'a', bias=bias))
    if named:
        adapter = Adapter.load(tmp_path/'a')
        assert f'{Q}.bias' in adapter.weights and error(logits(old, tokens(), adapter), true) <= 1e-5
        return
    save_file({k: t for k, t in load_file(tmp_path/'a'/FILE).items() if 'bias' not in k}, tmp_path/'a'/FILE)
    with warned("bias='lora_only'.* no bias"): Adapter.load(tmp_path/'a')

@quiet
@pytest.mark.parametrize('tied', [False, True])
def test_whole_embeddings_and_heads(tokenizer, tmp_path, tied):
    "vllm-project/vllm#9280, hiyouga/LLaMA-Factory#2684, huggingface/transformers#45127"
    old = random_decoder(tokenizer, tie_word_embeddings=tied)
    true = of_peft(trained(old.model, tmp_path/'a', modules_to_save=['embed_tokens', 'lm_head']))
    adapter = Adapter.load(tmp_path/'a')
    assert error(logits(old, tokens(), adapter), true) <= 1e-6
    carried = transfer(adapter, align(old, old, FEW))
    assert {*carried.skipped} >= {*adapter.weights} == {'model.embed_tokens.weight', 'lm_head.weight'}

@quiet
def test_norms_and_embeddings_of_an_extracted_LoRA(folder):
    "arcee-ai/mergekit#328, arcee-ai/mergekit#521"
    more = {f'{PREFIX}model.norm.weight': torch.ones(64), f'{PREFIX}model.embed_tokens.weight': torch.ones(512, 64)}
    save_file(load_file(folder/FILE) | more, folder/FILE)
    assert {*Adapter.load(folder).weights} == {'model.norm.weight', 'model.embed_tokens.weight'}

def extracted(folder, base):
    "What mergekit 0.1.5 extracts from a fine-tuned model: factors, and whole norms and embeddings"
    own = load_model(base)
    shapes = {name: p.shape for name, p in own.model.named_parameters()}
    moved = {name: p.detach()*1.01 for name, p in own.model.named_parameters() if 'norm' in name or 'embed' in name}
    torch.manual_seed(0)
    factors = {f'{name.removesuffix("weight")}lora_{side}.weight': .05*torch.randn(size)
               for name, (out, wide) in ((n, s) for n, s in shapes.items() if n.endswith('q_proj.weight'))
               for side, size in (('A', (2, wide)), ('B', (out, 2)))}
    tensors = {PREFIX + key: t.contiguous() for key, t in (moved | factors).items()}
    return adapter_files(folder, tensors, r=2, lora_alpha=2, target_modules=['q_proj'], base_model_name_or_path=base,
                         modules_to_save=['embed_tokens', 'norm', 'input_layernorm', 'post_attention_layernorm'])

@quiet
def test_an_extracted_LoRA_is_named_by_every_command(tmp_path):
    "arcee-ai/mergekit#328, arcee-ai/mergekit#521: skipped where the model changes, else on the model, and said"
    old, new = extracted(tmp_path/'old', 'zoo/old'), extracted(tmp_path/'new', 'zoo/new')
    align('zoo/old', 'zoo/new', FEW).save(tmp_path/'maps')
    (tmp_path/'few.txt').write_text('\n'.join(FEW))
    (tmp_path/'data.jsonl').write_text('{"instruction": "Where does Fide live?", "output": "Jura"}\n')
    data, few = ('--data', tmp_path/'data.jsonl'), ('--texts', tmp_path/'few.txt')
    commands = dict(
        inspect=['zoo/old', 'zoo/new', old], transfer=[old, tmp_path/'maps'], upgrade=['zoo/old', 'zoo/new', old, *few],
        convert=[old], evaluate=['zoo/old', '--adapter', old, *data],
        finetune=['zoo/old', old, '--steps', 1, *data],
        refresh=['zoo/old', old, 'zoo/new', '--start', new, '--inputs', tmp_path/'data.jsonl', '--steps', 1])
    for name, args in commands.items():
        out = () if name in ('inspect', 'evaluate') else ('-o', tmp_path/name)
        said = lora(name, *args, *out, status=0)
        how = 'skipped' if name in ('inspect', 'transfer', 'upgrade') else 'whole weights'
        lines = [line for line in said.splitlines() if line.startswith(how)]
        assert any('model.layers.0.input_layernorm.weight' in line for line in lines), (name, said)
        assert name not in ('convert', 'evaluate', 'finetune') or 'skipped' not in said
    for name, count in (('convert', 10), ('finetune', 10), ('refresh', 14)):
        assert len(Adapter.load(tmp_path/name).weights) == count
    assert {'whole weights of specialist', 'whole weights'} == {line.partition(',')[0] for line in lines}

@quiet
@pytest.mark.parametrize('rows', [514, 500])
def test_embeddings_of_another_size(tokenizer, tmp_path, rows):
    "huggingface/peft#2898, #1300, #2415, huggingface/autotrain-advanced#790, huggingface/transformers#36550"
    old, sized = random_decoder(tokenizer), random_decoder(tokenizer)
    sized.model.resize_token_embeddings(rows, mean_resizing=False)
    ids = tokens(vocab=500)
    true = of_peft(trained(sized.model, tmp_path/'a', modules_to_save=['embed_tokens']), ids)
    adapter = Adapter.load(tmp_path/'a')
    if rows == 500:
        assert error(logits(old, ids, adapter)[..., :500], true) <= 1e-5
        return
    with refused('trained with 514 tokens, .* has 512: resize'): logits(old, ids, adapter)

@quiet
@pytest.mark.parametrize('tied', [False, True])
def test_rows_of_single_tokens(tokenizer, tmp_path, tied):
    "vllm-project/vllm#36501, vllm-project/vllm#36648, vllm-project/vllm#55796"
    old, ids = random_decoder(tokenizer, tie_word_embeddings=tied), tokens()
    ids[:, ::3] = 7
    model = trained(old.model, tmp_path/'a', trainable_token_indices={'embed_tokens': [3, 7]})
    adapter = Adapter.load(tmp_path/'a')
    chosen, rows = adapter.rows['model.embed_tokens']
    assert chosen.tolist() == [3, 7] and not rows.equal(old.model.model.embed_tokens.weight[[3, 7]])
    assert error(logits(old, ids, adapter), of_peft(model, ids)) <= 1e-6

@quiet
@pytest.mark.parametrize('head', ['score.weight', 'v_head.summary.weight', 'v_head.summary.bias'])
def test_heads_of_tasks(folder, right, head):
    "huggingface/trl#1379, huggingface/sentence-transformers#3980"
    save_file(load_file(folder/FILE) | {head if 'v_' in head else PREFIX + head: torch.ones(1)}, folder/FILE)
    found = Adapter.load(folder)
    check_same(found, right)
    assert 'head of a task' in found.skipped[head] and not found.weights

# ---- names of bases

def test_the_base_that_an_adapter_names(folder, decoder):
    "huggingface/trl#692, hiyouga/LLaMA-Factory#2588, ggml-org/llama.cpp#12551"
    assert unquantised_name('zoo/old-unsloth-bnb-4bit') == unquantised_name('zoo/old-bnb-4bit') == 'zoo/old'
    def doubt(base): return base_doubt(Adapter.load(settings(folder, base_model_name_or_path=base)), 'zoo/old')
    assert doubt('zoo/old') is None
    assert 'WRONG BASE' in doubt('zoo/new') and 'trained on org/new, which may be another' in doubt('org/new')
    with refused('is an adapter, not a model'): load_model(folder)

def test_a_4_bit_copy_of_the_base(folder):
    "ggml-org/llama.cpp#12551"
    named = Adapter.load(settings(folder, base_model_name_or_path='org/old-unsloth-bnb-4bit'))
    assert base_doubt(named, 'org/old') is None

@quiet
def test_names_with_and_without_the_language_model(folder, right, decoder):
    "huggingface/transformers#38927"
    for wrapped in ('language_model.model.layers', 'model.language_model.layers'):
        plain(folder)
        rekey(folder, lambda k: k.replace('model.layers', wrapped))
        check_same(Adapter.load(folder).named_for(align(decoder, decoder, FEW).old), right)
        note, = preview_transfer(Adapter.load(folder), decoder, decoder)['notes']
        assert f'8 of 8 updates are not named as the modules of random/llama: {wrapped}.0.self_attn' in note
    assert not preview_transfer(right, decoder, decoder)['notes']

@quiet
def test_an_adapter_of_a_model_that_reads_images(tmp_path):
    "huggingface/transformers#38927"
    gemma = Decoder(tiny_model('gemma3', {}, 'old').eval(), new_tokenizer(TOKENS, seed=1), 'tiny/gemma3')
    ids = tokens(vocab=TOKENS - 8)
    true = of_peft(trained(gemma.model, tmp_path/'a', target_modules=r'.*language_model.*\.(q_proj|v_proj)'), ids)
    assert error(true, logits(gemma, ids)) > 1e-3
    for stack in ('model.layers', 'language_model.model.layers', 'model.language_model.layers'):
        shutil.copytree(tmp_path/'a', tmp_path/stack)
        adapter = Adapter.load(rekey(tmp_path/stack, lambda k: k.replace('model.language_model.layers', stack)))
        assert error(logits(gemma, ids, adapter), true) <= 1e-5
    trained(gemma.model, tmp_path/'b', target_modules=['q_proj', 'v_proj'])
    both, text = Adapter.load(tmp_path/'b'), Decoder(tiny_model('gemma3_text', {}, 'other').eval(), gemma.tokenizer)
    seeing = {path for path in both.updates if 'vision' in path}
    for new, skipped in ((gemma, set()), (text, seeing)): # the same tower has the same updates
        carried = transfer(both, align(gemma, new, FEW))
        assert {*carried.skipped} == skipped and seeing & carried.updates.keys() == seeing - skipped
    assert len(seeing) == 4 and len(both.updates) == len(adapter.updates) + 4

def test_names_of_a_tower_before_transformers_5():
    "transformers #38927: `vision_tower.vision_model.` lost its second part; the text model is evaluated all the same"
    from lorasuite.core.adapter import _renamer
    from lorasuite.core.experts import WeightNames
    tower, old = 'model.vision_tower.encoder.layers.0.mlp.fc1', 'vision_tower.vision_model.encoder.layers.0.mlp.fc1'
    rename = _renamer(WeightNames({}, {}, {tower, 'model.language_model.layers.0.mlp.up_proj'}, set(), {}))
    assert rename(old) == rename(f'model.{old}') == tower
    assert rename('model.layers.0.mlp.up_proj') == 'model.language_model.layers.0.mlp.up_proj'
