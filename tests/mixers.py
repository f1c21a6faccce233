"""Oracles for kinds of parts: tiny models of many kinds, and changes of their weights that keep what they compute

Every surgery takes a model and returns another of the same class with the same logits, and the truth: a dictionary
from a place (`layers.1.mlp.experts`) to an order (entry i: which old unit the new unit i is, -1 for an added one)
or to a matrix that takes an old space to the new one (`stream`, latents).
"""
import copy, math
from dataclasses import dataclass, field
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from models import error
from lorasuite.core.adapter import Adapter

VOCAB = 512

# --- random models ---------------------------------------------------------------------------------------------

def is_zero_centred(module):
    "Does a norm multiply by 1 + its weight?"
    if 'Norm' not in type(module).__name__ or 'Gated' in type(module).__name__: return False
    if getattr(module, 'weight', None) is None: return False
    ones = torch.ones_like(module.weight)
    return bool(((module(ones) - module.weight) - 1).abs().max() < 1e-3)

def _fill_parameter(name, p, g):
    "Random numbers of a size that suits the kind of parameter"
    leaf = name.rpartition('.')[2]
    draw = torch.randn(p.shape, generator=g)
    if leaf == 'A_log': draw = draw.mul(.7)
    elif name.endswith('embed_tokens.weight'): pass
    elif 'conv' in name and p.ndim == 3: draw = draw.mul(.6)
    elif leaf.startswith(('lambda_', 'sinks')) or leaf in ('D', 'dt_bias'): draw = draw.mul(.5)
    elif p.ndim == 1: draw = draw.mul(.1)
    else: draw = draw.mul(.2)
    p.copy_(draw)

def _pair_routers(model):
    "Give routers rows in pairs r, −r: then at least half of all logits are above 0, that of an added expert"
    for name, p in model.named_parameters():
        if name.endswith(('gate.weight', 'router.weight')): _pair_rows(p)

def is_router(path):
    "Does a module choose among experts?"
    return path.endswith(('.gate', '.router', '.router.layer'))

def _pair_rows(W):
    "Make the second half of an even number of rows the first one turned round"
    half = len(W)//2
    if len(W) == 2*half: W[half:] = -W[:half]

@torch.no_grad()
def random_model(family, seed=0, **config):
    "An untrained model of which every gain, bias and free parameter is random"
    sizes = dict(vocab_size=VOCAB, pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
                 rms_norm_eps=1e-8, norm_eps=1e-8, max_position_embeddings=256)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | config)).eval().float()
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters(): _fill_parameter(name, p, g)
    for module in model.modules():
        if 'Norm' not in type(module).__name__ or getattr(module, 'weight', None) is None: continue
        centred = is_zero_centred(module)
        module.weight.uniform_(.5, 2, generator=g).sub_(float(centred))
        if getattr(module, 'bias', None) is not None: module.bias.normal_(generator=g)
    for name, b in model.named_buffers():
        if name.endswith('e_score_correction_bias'): b.normal_(std=.1, generator=g)
        if name.endswith('layer_scalar'): b.uniform_(.5, 1.5, generator=g)
    _pair_routers(model)
    return model

# --- tools -----------------------------------------------------------------------------------------------------

def stretch(old, new, g, rename=False):
    "(new, old) with orthonormal columns: a rotation into more dimensions, or only new places with signs"
    if not rename: return torch.linalg.qr(torch.randn(new, old, generator=g, dtype=torch.float64))[0]
    P = torch.zeros(new, old, dtype=torch.float64)
    signs = torch.randint(0, 2, (old,), generator=g).double()*2 - 1
    P[torch.randperm(new, generator=g)[:old], torch.arange(old)] = signs
    return P

def blocks_of(order, size):
    "Indices of units of several rows: from an order of units to one of rows"
    return (order[:, None]*size + torch.arange(size)).flatten()

class Surgery:
    "The weights of a model by name, in float64, changed one axis at a time"
    def __init__(self, model, seed=0):
        self.old, self.config, self.truth = model, copy.deepcopy(model.config), {}
        self.state = {n: t.detach().double() if t.is_floating_point() else t for n, t in model.state_dict().items()}
        self.g = torch.Generator().manual_seed(seed)
        self.centred = {n for n, m in model.named_modules() if is_zero_centred(m)}

    def __contains__(self, name): return name in self.state

    def prefixes(self, ending):
        "The paths of all modules whose name ends so"
        return [n for n, _ in self.old.named_modules() if n.endswith(ending)]

    def index(self, name, axis, order):
        "Put entries in another order, if there is such a tensor"
        if name in self.state: self.state[name] = self.state[name].index_select(axis, order)

    def apply(self, name, axis, M):
        "A linear map along one axis, if there is such a tensor"
        if name not in self.state: return
        moved = self.state[name].movedim(axis, -1)@M.T
        self.state[name] = moved.movedim(-1, axis).contiguous()

    def scale(self, name, axis, factors):
        "Multiply entries along one axis, if there is such a tensor"
        if name in self.state: self.state[name] = (self.state[name].movedim(axis, -1)*factors).movedim(-1, axis)

    def order(self, n): return torch.randperm(n, generator=self.g)

    def uniform(self, *shape): return torch.rand(*shape, generator=self.g, dtype=torch.float64)*1.5 + .5

    def gain(self, norm):
        "What a norm multiplies by"
        return self.state[f'{norm}.weight'] + float(norm in self.centred)

    def set_gain(self, norm, gain):
        self.state[f'{norm}.weight'] = gain - float(norm in self.centred)

    @torch.no_grad()
    def model(self, **config):
        "The new model, with some settings changed"
        for setting, value in config.items(): setattr(self.config, setting, value)
        new = type(self.old)(self.config).eval().to(self.old.dtype)
        new.load_state_dict(self.state)
        return new

# --- the residual stream ---------------------------------------------------------------------------------------

READERS = {'q_proj', 'k_proj', 'v_proj', 'q_a_proj', 'kv_a_proj_with_mqa', 'in_proj', 'in_proj_qkvz', 'in_proj_ba',
           'in_proj_qkv', 'in_proj_z', 'in_proj_a', 'in_proj_b', 'gate_proj', 'up_proj', 'gate_up_proj', 'gate',
           'router', 'shared_expert_gate', 'w1', 'w3', 'input_linear'}
WRITERS = {'o_proj', 'out_proj', 'down_proj', 'w2', 'output_linear'}
MIXERS = ('self_attn', 'linear_attn', 'mamba', 'conv')

@dataclass
class Stream:
    "Where a family normalises its residual stream: names of norms in a block, and outside"
    mixer:str|None = 'input_layernorm'
    mlp:str|None = 'post_attention_layernorm'
    after:dict[str, tuple[str, ...]] = field(default_factory=dict) # `mixer`, `mlp`: norms of what they write
    last:str = 'model.norm'
    transposed:bool = False # are the experts stored as (E, in, out)?

STREAMS = dict(
    llama4_text=Stream(transposed=True), gpt_oss=Stream(transposed=True),
    bamba=Stream(mlp='pre_ff_layernorm', last='model.final_layernorm'),
    falcon_h1=Stream(mlp='pre_ff_layernorm', last='model.final_layernorm'),
    jamba=Stream(mlp='pre_ff_layernorm', last='model.final_layernorm'),
    lfm2=Stream('operator_norm', 'ffn_norm', last='model.embedding_norm'),
    olmo2=Stream(None, None, dict(mixer=('post_attention_layernorm',), mlp=('post_feedforward_layernorm',))),
    afmoe=Stream(mlp='pre_mlp_layernorm',
                 after=dict(mixer=('post_attention_layernorm',), mlp=('post_mlp_layernorm',))),
    gemma4_text=Stream(mlp='pre_feedforward_layernorm',
                       after=dict(mixer=('post_attention_layernorm',),
                                  mlp=('post_feedforward_layernorm', 'post_per_layer_input_norm'))))

def stream_side(name, tensor, transposed=False):
    "How a tensor of a block touches the stream: `read` or `write`, and on which axis; None where it does not"
    *path, leaf = name.split('.')
    bias = leaf.endswith('bias')
    leaf = path[-1] if leaf in ('weight', 'bias') else leaf.removesuffix('_bias')
    flip = transposed and tensor.ndim == 3
    if leaf in WRITERS: return 'write', -1 if bias or flip else -2
    if leaf in READERS and not bias: return 'read', -2 if flip else -1

def change_norm_after(s, norm, P):
    "A norm of what is written to the stream: its gain takes new places, and makes up for added zeros"
    gain = P.abs()@s.gain(norm)*math.sqrt(P.shape[1]/P.shape[0])
    s.set_gain(norm, torch.where(P.any(1), gain, s.uniform(len(P))))

def change_norm_before(s, norm, readers, P):
    "Give a norm new gains, those that it had go into its readers, which read the stretched space; returns the map"
    if norm is None: M = P
    else:
        gain, gain2 = s.gain(norm), s.uniform(len(P))
        M = P*gain*math.sqrt(P.shape[1]/P.shape[0])/gain2[:, None]
        s.set_gain(norm, gain2)
    for name, axis in readers: s.apply(name, axis, M)

def _change_block(s, stream, block, P):
    "Re-express one block in the stretched stream"
    read = dict(mixer=[], mlp=[])
    for name in [n for n in s.state if n.startswith(block)]:
        part = 'mixer' if name.removeprefix(block).startswith(MIXERS) else 'mlp'
        side = stream_side(name, s.state[name], stream.transposed)
        if side and side[0] == 'write': s.apply(name, side[1], P)
        if side and side[0] == 'read': read[part].append((name, side[1]))
    for part, norm in (('mixer', stream.mixer), ('mlp', stream.mlp)):
        change_norm_before(s, norm and block + norm, read[part], P)
        for after in stream.after.get(part, ()):
            if f'{block}{after}.weight' in s: change_norm_after(s, block + after, P)

def change_stream(s, hidden=None):
    "Rotate the residual stream, and widen it; where norms follow writers, coordinates take new places with signs"
    stream = STREAMS.get(s.config.model_type, Stream())
    old = s.config.hidden_size
    P = stretch(old, hidden or old, s.g, rename=bool(stream.after))
    s.truth['stream'] = P
    for i in range(s.config.num_hidden_layers): _change_block(s, stream, f'model.layers.{i}.', P)
    scaled = getattr(s.config, 'mup_enabled', False) or s.config.model_type.startswith('gemma')
    s.apply('model.embed_tokens.weight', 1, P/math.sqrt(len(P)/old) if scaled else P)
    change_norm_before(s, stream.last, [('lm_head.weight', 1)], P)
    s.config.hidden_size = len(P)
    return P

# --- depth -----------------------------------------------------------------------------------------------------

def _moved(name, at):
    "The name of a part after a layer has been put in at `at`"
    path = name.split('.')
    if path[:2] == ['model', 'layers'] and int(path[2]) >= at: path[2] = str(int(path[2]) + 1)
    return '.'.join(path)

def _idle_tensor(s, name, tensor):
    "Random numbers like those of a tensor, or zeros where it writes to the stream"
    side = stream_side(name, tensor)
    if side and side[0] == 'write': return torch.zeros_like(tensor)
    return tensor.flatten()[s.order(tensor.numel())].view_as(tensor)

def add_layer(s, at, like):
    "Put in a layer that adds nothing to the stream, of the kind of layer `like`; to be called before `change_stream`"
    block = f'model.layers.{like}.'
    new = {n.removeprefix(block): _idle_tensor(s, n, t) for n, t in s.state.items() if n.startswith(block)}
    norms = {n.removeprefix(block) for n in s.centred if n.startswith(block)}
    s.state = {_moved(n, at): t for n, t in s.state.items()}
    s.state |= {f'model.layers.{at}.{n}': t for n, t in new.items()}
    s.centred = {_moved(n, at) for n in s.centred} | {f'model.layers.{at}.{n}' for n in norms}
    s.truth['layers'] = [l + (l >= at) for l in range(s.config.num_hidden_layers)]
    s.config.num_hidden_layers += 1
    for setting in ('layer_types', 'no_rope_layers', 'mlp_layer_types'):
        kinds = vars(s.config).get(setting)
        if isinstance(kinds, list): setattr(s.config, setting, kinds[:at] + [kinds[like]] + kinds[at:])
    for setting in ('mlp_only_layers', 'attn_layer_indices', 'moe_layers'):
        layers = vars(s.config).get(setting)
        if not isinstance(layers, list): continue
        moved = [l + (l >= at) for l in layers]
        setattr(s.config, setting, sorted(moved + [at]*(like in layers)))

# --- neurons and experts ---------------------------------------------------------------------------------------

MLPS = (('gate_proj', 'up_proj', 'down_proj'), ('w1', 'w3', 'w2'))

def permute_neurons(s, mlp):
    "Neurons of an ordinary MLP take new places"
    if f'{mlp}.input_linear.weight' in s: return permute_fused_neurons(s, mlp)
    gate, up, down = next(names for names in MLPS if f'{mlp}.{names[0]}.weight' in s)
    order = s.order(len(s.state[f'{mlp}.{up}.weight']))
    for name in (f'{mlp}.{gate}', f'{mlp}.{up}'):
        for part in ('weight', 'bias'): s.index(f'{name}.{part}', 0, order)
    s.index(f'{mlp}.{down}.weight', 1, order)
    s.truth[mlp] = order

def permute_fused_neurons(s, mlp):
    "Neurons of an MLP that holds gate above up in `input_linear`"
    inner = s.state[f'{mlp}.output_linear.weight'].shape[1]
    order = s.order(inner)
    s.index(f'{mlp}.input_linear.weight', 0, torch.cat([order, order + inner]))
    s.index(f'{mlp}.output_linear.weight', 1, order)
    s.truth[mlp] = order

def permute_expert_neurons(s, experts, transposed=False, interleaved=False):
    "Neurons inside each expert of a fused weight take new places, other ones in each expert"
    up, down = f'{experts}.gate_up_proj', f'{experts}.down_proj'
    rows, columns = (2, 1) if transposed else (1, 2)
    inner = s.state[down].shape[columns]
    orders = torch.stack([s.order(inner) for _ in s.state[down]])
    pairs = torch.cat([orders, orders + inner], 1)
    if interleaved: pairs = torch.stack([orders*2, orders*2 + 1], -1).flatten(1)
    def each(name, axis, order):
        if name not in s: return
        s.state[name] = torch.stack([W.index_select(axis - 1, o) for W, o in zip(s.state[name], order)])
    each(up, rows, pairs)
    each(f'{up}_bias', 1, pairs)
    each(down, columns, orders)
    s.truth[f'{experts}.neurons'] = orders

EXPERT_PARTS = ('gate_up_proj', 'gate_up_proj_bias', 'down_proj', 'down_proj_bias')

def draw_experts(s, count, added, groups=1):
    "An order of experts with `added` new ones (−1) in each group; groups change places too"
    orders = []
    for group in s.order(groups):
        inside = torch.cat([s.order(count//groups), torch.full((added,), -1)])
        inside = inside[s.order(len(inside))]
        orders.append(torch.where(inside < 0, inside, inside + group*(count//groups)))
    return torch.cat(orders)

def take_or_fill(s, name, order, fill):
    "Entries in a new order; those of added units are random (`fill` None) or a number"
    if name not in s: return
    found = s.state[name][order.clamp_min(0)]
    added = order < 0
    if fill is None: found[added] = .2*torch.randn(found[added].shape, generator=s.g, dtype=torch.float64)
    else: found[added] = fill
    s.state[name] = found

def permute_experts(s, moe, router, added=0, groups=1, bias=None):
    """Experts take new places with the router's rows; an added expert is never picked: `bias` names what is added to
    its score, −10; without one its logit is 0, and routers of `random_model` have half of all logits above 0"""
    order = draw_experts(s, len(s.state[f'{moe}.experts.down_proj']), added, groups)
    for part in EXPERT_PARTS: take_or_fill(s, f'{moe}.experts.{part}', order, None)
    take_or_fill(s, f'{moe}.{router}.weight', order, None if bias else 0)
    if bias: take_or_fill(s, f'{moe}.{bias}', order, -10. if 'router.bias' not in bias else -1e3)
    s.truth[f'{moe}.experts'] = order
    return len(order)

# --- attention -------------------------------------------------------------------------------------------------

def draw_heads(s, heads, kv_heads):
    "An order of query heads and one of key-value heads that keeps queries with their keys"
    kv = s.order(kv_heads)
    size = heads//kv_heads
    return torch.cat([group*size + s.order(size) for group in kv]), kv

def permute_heads(s, attention, heads, kv_heads, head, drawn=None, out='o_proj', doubled=False):
    "Heads take new places, with biases, sinks, gates, and norms over the whole projection"
    q, kv = drawn or draw_heads(s, heads, kv_heads)
    q_rows, kv_rows, q_doubled = blocks_of(q, head), blocks_of(kv, head), blocks_of(q, 2*head)
    for part in ('weight', 'bias'):
        s.index(f'{attention}.q_proj.{part}', 0, q_doubled if doubled else q_rows)
        s.index(f'{attention}.gate_proj.{part}', 0, q_rows)
        for leaf in ('k_proj', 'v_proj'): s.index(f'{attention}.{leaf}.{part}', 0, kv_rows)
    s.index(f'{attention}.{out}.weight', 1, q_rows)
    s.index(f'{attention}.sinks', 0, q)
    for norm, rows in (('q_norm', q_rows), ('k_norm', kv_rows)):
        name = f'{attention}.{norm}.weight'
        if name in s and len(s.state[name]) == len(rows) > head: s.index(name, 0, rows)
    s.truth[attention] = q

def permute_plain_attention(s, **settings):
    "The heads of every `self_attn`, by the sizes of the configuration"
    c = s.config
    head = getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads
    for attention in s.prefixes('.self_attn'):
        permute_heads(s, attention, c.num_attention_heads, c.num_key_value_heads, head, **settings)

def permute_differential_heads(s, attention, heads, kv_heads, head):
    "Pairs (h, h + heads/2) of queries stay pairs; so do those of keys and the two halves of each value"
    q, kv = draw_heads(s, heads//2, kv_heads//2)
    q_rows = blocks_of(torch.cat([q, q + heads//2]), head)
    kv_rows = blocks_of(torch.cat([kv, kv + kv_heads//2]), head)
    for part in ('weight', 'bias'):
        s.index(f'{attention}.q_proj.{part}', 0, q_rows)
        for leaf in ('k_proj', 'v_proj'): s.index(f'{attention}.{leaf}.{part}', 0, kv_rows)
    s.index(f'{attention}.o_proj.weight', 1, blocks_of(q, 2*head))
    s.truth[attention] = q

def change_latent(s, attention, kind, size=None):
    "Rotate and widen the latent of queries (`q`) or of keys and values (`kv`); the rotary rows below it stay"
    norm, down = f'{attention}.{kind}_a_layernorm', f'{attention}.{kind}_a_proj'
    if f'{norm}.weight' not in s: return
    if kind == 'kv': down += '_with_mqa'
    old = len(s.gain(norm))
    P = stretch(old, size or old, s.g)
    rest = len(s.state[f'{down}.weight']) - old
    for part in ('weight', 'bias'): s.apply(f'{down}.{part}', 0, torch.block_diag(P, torch.eye(rest).double()))
    change_norm_before(s, norm, [(f'{attention}.{kind}_b_proj.weight', 1)], P)
    s.truth[f'{attention}.{kind}_latent'] = P

def permute_latent_heads(s, attention, c):
    "Heads of latent attention: (nope, rope) rows of q, (key, value) rows of kv_b"
    order = s.order(c.num_attention_heads)
    q = blocks_of(order, c.qk_nope_head_dim + c.qk_rope_head_dim)
    s.index(f'{attention}.q_b_proj.weight', 0, q)
    s.index(f'{attention}.q_proj.weight', 0, q)
    s.index(f'{attention}.kv_b_proj.weight', 0, blocks_of(order, c.qk_nope_head_dim + c.v_head_dim))
    s.index(f'{attention}.o_proj.weight', 1, blocks_of(order, c.v_head_dim))
    s.truth[attention] = order

# --- gated delta nets, Mamba and short convolutions ------------------------------------------------------------

def change_inner_gain(s, norm, out, repeats=1):
    "Give a norm before an output projection new gains; the old ones go into the projection's columns"
    gain2 = s.uniform(len(s.state[norm]))
    s.scale(out, 1, (s.state[norm]/gain2).repeat(repeats))
    s.state[norm] = gain2

@dataclass
class DeltaOrder:
    "Where the heads and channels of a gated delta net go"
    key:torch.Tensor        # heads
    value:torch.Tensor      # heads
    keys:torch.Tensor       # channels of all key heads, the order inside a head is one for each head
    values:torch.Tensor     # channels of all value heads, one order inside for all: they share a norm
    inside:torch.Tensor     # that order

def draw_delta(s, c):
    "Key heads with their value heads, value heads inside their group, channels inside heads"
    key = s.order(c.linear_num_key_heads)
    group = c.linear_num_value_heads//c.linear_num_key_heads
    value = torch.cat([k*group + s.order(group) for k in key])
    size = c.linear_key_head_dim
    keys = torch.cat([k*size + s.order(size) for k in key])
    inside = s.order(c.linear_value_head_dim)
    return DeltaOrder(key, value, keys, (value[:, None]*c.linear_value_head_dim + inside).flatten(), inside)

def grouped_rows(order, c, of_key, of_value):
    "Rows of a projection grouped by key head: `of_key` times its channels, `of_value` times those of its value heads"
    n, d = c.linear_num_key_heads, c.linear_key_head_dim
    v = c.linear_num_value_heads//n*c.linear_value_head_dim
    wide = of_key*d + of_value*v
    rows = []
    for i, k in enumerate(order.key):
        own, theirs = order.keys[i*d:(i + 1)*d] - k*d, order.values[i*v:(i + 1)*v] - k*v
        parts = [own + j*d for j in range(of_key)] + [theirs + of_key*d + j*v for j in range(of_value)]
        rows.append(torch.cat(parts) + k*wide)
    return torch.cat(rows)

def ba_rows(order, c):
    "Rows of Qwen3-Next's `in_proj_ba`: for each key head the b, then the a of its value heads"
    n, group = c.linear_num_key_heads, c.linear_num_value_heads//c.linear_num_key_heads
    heads = order.value.view(n, group) - order.key[:, None]*group
    return (torch.cat([heads, heads + group], 1) + order.key[:, None]*2*group).flatten()

def permute_delta_net(s, net):
    "Heads and channels of a gated delta net take new places; the gains of its norm go into the output projection"
    c, order = s.config, draw_delta(s, s.config)
    size = len(order.keys)
    qkv = torch.cat([order.keys, order.keys + size, order.values + 2*size])
    s.index(f'{net}.in_proj_qkvz.weight', 0, grouped_rows(order, c, 2, 2))
    s.index(f'{net}.in_proj_ba.weight', 0, ba_rows(order, c))
    s.index(f'{net}.in_proj_qkv.weight', 0, qkv)
    s.index(f'{net}.in_proj_z.weight', 0, order.values)
    for leaf in ('in_proj_b.weight', 'in_proj_a.weight', 'A_log', 'dt_bias'): s.index(f'{net}.{leaf}', 0, order.value)
    s.index(f'{net}.conv1d.weight', 0, qkv)
    s.index(f'{net}.norm.weight', 0, order.inside)
    s.index(f'{net}.out_proj.weight', 1, order.values)
    change_inner_gain(s, f'{net}.norm.weight', f'{net}.out_proj.weight', len(order.value))
    s.truth |= {f'{net}.keys': order.key, f'{net}.values': order.value, f'{net}.channels': order.values}

def permute_mamba2(s, mamba):
    "Groups, heads in their group, channels in their head and states in their group take new places"
    c = s.config
    heads, groups, head, states = c.mamba_n_heads, c.mamba_n_groups, c.mamba_d_head, c.mamba_d_state
    order, group = draw_heads(s, heads, groups)
    channels = torch.cat([h*head + s.order(head) for h in order])
    state = torch.cat([k*states + s.order(states) for k in group])
    inner = len(channels)
    conv = torch.cat([channels, state + inner, state + inner + len(state)])
    rows = torch.cat([channels, conv + inner, order + inner + len(conv)])
    for part in ('weight', 'bias'):
        s.index(f'{mamba}.in_proj.{part}', 0, rows)
        s.index(f'{mamba}.conv1d.{part}', 0, conv)
    for leaf in ('A_log', 'D', 'dt_bias'): s.index(f'{mamba}.{leaf}', 0, order)
    s.index(f'{mamba}.norm.weight', 0, channels)
    s.index(f'{mamba}.out_proj.weight', 1, channels)
    if f'{mamba}.norm.weight' in s: change_inner_gain(s, f'{mamba}.norm.weight', f'{mamba}.out_proj.weight')
    s.truth |= {mamba: order, f'{mamba}.channels': channels}

def permute_mamba1(s, mamba):
    "Channels take new places, states too; the latent of the time steps is rotated, its norm's gains go into dt_proj"
    c = s.config
    inner = len(s.state[f'{mamba}.D'])
    order, state = s.order(inner), s.order(c.mamba_d_state)
    P = stretch(c.mamba_dt_rank, c.mamba_dt_rank, s.g)
    for part in ('weight', 'bias'):
        s.index(f'{mamba}.in_proj.{part}', 0, torch.cat([order, order + inner]))
        s.index(f'{mamba}.conv1d.{part}', 0, order)
        s.index(f'{mamba}.dt_proj.{part}', 0, order)
    s.index(f'{mamba}.x_proj.weight', 1, order)
    for leaf in ('A_log', 'D'): s.index(f'{mamba}.{leaf}', 0, order)
    s.index(f'{mamba}.A_log', 1, state)
    s.index(f'{mamba}.out_proj.weight', 1, order)
    latent = torch.cat([state, state + len(state)])
    s.apply(f'{mamba}.x_proj.weight', 0, torch.block_diag(P, torch.eye(2*len(state)).double()))
    s.index(f'{mamba}.x_proj.weight', 0, torch.cat([torch.arange(len(P)), latent + len(P)]))
    change_norm_before(s, f'{mamba}.dt_layernorm', [(f'{mamba}.dt_proj.weight', 1)], P)
    for norm in ('b_layernorm', 'c_layernorm'): s.index(f'{mamba}.{norm}.weight', 0, state)
    s.truth |= {f'{mamba}.channels': order, f'{mamba}.states': state, f'{mamba}.dt_latent': P}

def permute_short_conv(s, conv):
    "Channels take new places; B, C, x and the convolution are scaled, and the output projection makes up for it"
    n = s.state[f'{conv}.out_proj.weight'].shape[1]
    order = s.order(n)
    b, c, x, w = (s.uniform(n) for _ in range(4))
    for part in ('weight', 'bias'):
        s.index(f'{conv}.in_proj.{part}', 0, torch.cat([order, order + n, order + 2*n]))
        s.scale(f'{conv}.in_proj.{part}', 0, torch.cat([b, c, x]))
        s.index(f'{conv}.conv.{part}', 0, order)
        s.scale(f'{conv}.conv.{part}', 0, w*b*x if part == 'bias' else w)
    s.index(f'{conv}.out_proj.weight', 1, order)
    s.scale(f'{conv}.out_proj.weight', 1, 1/(b*c*x*w))
    s.truth[f'{conv}.channels'] = order

# --- kinds of models -------------------------------------------------------------------------------------------

def _finish(s, hidden=None, layer=None, **config):
    "Put in an idle layer (`layer`: its place, and an old layer of its kind), change the stream, build the new model"
    if layer: add_layer(s, *layer)
    if hidden and getattr(s.config, 'head_dim', None) is None and hasattr(s.config, 'num_key_value_heads'):
        config = dict(head_dim=s.config.hidden_size//s.config.num_attention_heads) | config
    change_stream(s, hidden)
    return s.model(**config), s.truth

def _dense_mlps(s, ending='.mlp'):
    "Paths of the MLPs that are no experts"
    return [m for m in s.prefixes(ending) if any(f'{m}.{n}.weight' in s for n in ('gate_proj', 'w1', 'input_linear'))]

def _change_experts(s, moes, router='gate', layout=None, shared=None, **settings):
    "Permute and add experts, neurons in each of them, and those of the expert beside them"
    count = None
    for moe in moes:
        if f'{moe}.experts.down_proj' not in s: continue
        permute_expert_neurons(s, f'{moe}.experts', **layout or {})
        count = permute_experts(s, moe, router, **settings)
        if shared: permute_neurons(s, f'{moe}.{shared}')
    return count

@torch.no_grad()
def change_mixtral(model, seed=0, hidden=48, added=1, layer=None):
    "Heads, experts, their neurons, an expert that is never picked, a wider rotated stream"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    return _finish(s, hidden, layer, num_local_experts=_change_experts(s, s.prefixes('.mlp'), added=added))

@torch.no_grad()
def change_qwen_moe(model, seed=0, hidden=48, added=1, layer=None):
    "Qwen2-MoE and Qwen3-MoE: as Mixtral, with dense layers and shared experts"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    shared = 'shared_expert' if model.config.model_type == 'qwen2_moe' else None
    for mlp in _dense_mlps(s): permute_neurons(s, mlp)
    return _finish(s, hidden, layer, num_experts=_change_experts(s, s.prefixes('.mlp'), shared=shared, added=added))

@torch.no_grad()
def change_gpt_oss(model, seed=0, hidden=48, added=2, layer=None):
    "Sinks, biases everywhere, experts stored (E, in, out) with gate and up interleaved"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    layout = dict(transposed=True, interleaved=True)
    count = _change_experts(s, s.prefixes('.mlp'), 'router', layout, bias='router.bias', added=added)
    return _finish(s, hidden, layer, num_local_experts=count)

@torch.no_grad()
def change_llama4(model, seed=0, hidden=48, added=1, layer=None):
    "Experts stored (E, in, out) and fed with scaled inputs, a shared expert, layers without rotary positions"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    for mlp in _dense_mlps(s, '.feed_forward'): permute_neurons(s, mlp)
    layout = dict(transposed=True)
    count = _change_experts(s, s.prefixes('.feed_forward'), 'router', layout, 'shared_expert', added=added)
    return _finish(s, hidden, layer, num_local_experts=count)

@torch.no_grad()
def change_deepseek(model, seed=0, hidden=48, latents=(16, 20), added=1, layer=None):
    "Latents rotated and widened, heads, experts in their groups with router corrections, dense first layers"
    s = Surgery(model, seed)
    for attention in s.prefixes('.self_attn'):
        permute_latent_heads(s, attention, s.config)
        for kind, size in zip(('q', 'kv'), latents): change_latent(s, attention, kind, size)
    for mlp in _dense_mlps(s): permute_neurons(s, mlp)
    corrected = any(n.endswith('e_score_correction_bias') for n in s.state)
    settings = dict(bias='gate.e_score_correction_bias', groups=s.config.n_group, added=added) if corrected else {}
    count = _change_experts(s, s.prefixes('.mlp'), shared='shared_experts', **settings)
    ranks = dict(kv_lora_rank=latents[1])
    if s.config.q_lora_rank: ranks |= dict(q_lora_rank=latents[0])
    return _finish(s, hidden, layer, **ranks, n_routed_experts=count)

@torch.no_grad()
def change_qwen_next(model, seed=0, hidden=48, added=1, layer=None):
    "Qwen3-Next and Qwen3.5: gated delta nets, attention whose q holds a gate beside each query, experts or MLPs"
    s = Surgery(model, seed)
    permute_plain_attention(s, doubled=True)
    for net in s.prefixes('.linear_attn'): permute_delta_net(s, net)
    for mlp in _dense_mlps(s): permute_neurons(s, mlp)
    count = _change_experts(s, s.prefixes('.mlp'), shared='shared_expert', added=added)
    return _finish(s, hidden, layer, **dict(num_experts=count) if count else {})

@torch.no_grad()
def change_mamba2(model, seed=0, hidden=None, layer=None):
    "Bamba, Falcon-H1 and Granite 4: heads of Mamba 2 and of attention, neurons, experts"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    for mamba in s.prefixes('.mamba'): permute_mamba2(s, mamba)
    for ending in ('.feed_forward', '.shared_mlp'):
        for mlp in _dense_mlps(s, ending): permute_neurons(s, mlp)
    count = _change_experts(s, s.prefixes('.block_sparse_moe'), 'router', added=1)
    config = dict(num_local_experts=count) if count else {}
    if hidden and s.config.model_type != 'falcon_h1': config |= dict(mamba_expand=1)
    return _finish(s, hidden, layer, **config)

@torch.no_grad()
def change_jamba(model, seed=0):
    "Channels and states of Mamba 1, rotated time steps, attention without positions, experts in some layers"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    for mamba in s.prefixes('.mamba'): permute_mamba1(s, mamba)
    for mlp in _dense_mlps(s, '.feed_forward'): permute_neurons(s, mlp)
    _change_experts(s, s.prefixes('.feed_forward'), 'router')
    return _finish(s)

@torch.no_grad()
def change_lfm2(model, seed=0, layer=None):
    "Channels of short convolutions, permuted and scaled; attention with norms of each head"
    s = Surgery(model, seed)
    permute_plain_attention(s, out='out_proj')
    for conv in s.prefixes('.conv'):
        if f'{conv}.in_proj.weight' in s: permute_short_conv(s, conv)
    for mlp in _dense_mlps(s, '.feed_forward'): permute_neurons(s, mlp)
    return _finish(s, layer=layer)

@torch.no_grad()
def change_afmoe(model, seed=0, hidden=48, added=1, layer=None):
    "A gate beside q, norms before and after each part, experts with a bias, sliding and unrotated layers"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    for mlp in _dense_mlps(s): permute_neurons(s, mlp)
    settings = dict(shared='shared_experts', bias='expert_bias', added=added)
    return _finish(s, hidden, layer, num_experts=_change_experts(s, s.prefixes('.mlp'), 'router.gate', **settings))

@torch.no_grad()
def change_olmo2(model, seed=0, hidden=48, layer=None):
    "Norms over all queries and all keys, and norms only behind the parts"
    s = Surgery(model, seed)
    permute_plain_attention(s)
    for mlp in _dense_mlps(s): permute_neurons(s, mlp)
    return _finish(s, hidden, layer)

@torch.no_grad()
def change_diffllama(model, seed=0, hidden=48, layer=None):
    "Pairs of heads whose attention is subtracted"
    s, c = Surgery(model, seed), model.config
    head = getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads
    for attention in s.prefixes('.self_attn'):
        permute_differential_heads(s, attention, c.num_attention_heads, c.num_key_value_heads, head)
    for mlp in _dense_mlps(s): permute_neurons(s, mlp)
    return _finish(s, hidden, layer)

@torch.no_grad()
def change_gemma4(model, seed=0, hidden=48):
    "Channels of per-layer inputs, heads of layers that share keys and values, norms before and after each part"
    s, c = Surgery(model, seed), model.config
    drawn = draw_heads(s, c.num_attention_heads, c.num_key_value_heads)
    for i, attention in enumerate(s.prefixes('.self_attn')):
        head = c.per_layer_config[i].head_dim
        permute_heads(s, attention, c.num_attention_heads, c.num_key_value_heads, head, drawn)
    for mlp in _dense_mlps(s): permute_neurons(s, mlp)
    permute_per_layer_inputs(s, c)
    P = change_stream(s, hidden)
    for i in range(c.num_hidden_layers):
        s.apply(f'model.layers.{i}.per_layer_input_gate.weight', 1, P)
        s.apply(f'model.layers.{i}.per_layer_projection.weight', 0, P)
    s.apply('model.per_layer_model_projection.weight', 1, P*math.sqrt(len(P)/c.hidden_size))
    return s.model(), s.truth

def permute_per_layer_inputs(s, c):
    "Channels of the inputs of each layer: one order for all layers, since they share a norm"
    size = c.hidden_size_per_layer_input
    order = s.order(size)
    rows = blocks_of(torch.arange(c.num_hidden_layers), size).view(-1, size)[:, order].flatten()
    s.index('model.embed_tokens_per_layer.weight', 1, rows)
    s.index('model.per_layer_model_projection.weight', 0, rows)
    s.index('model.per_layer_projection_norm.weight', 0, order)
    for i in range(c.num_hidden_layers):
        s.index(f'model.layers.{i}.per_layer_input_gate.weight', 0, order)
        s.index(f'model.layers.{i}.per_layer_projection.weight', 1, order)
    s.truth['per_layer'] = order

# --- the models of the tests, and how each is changed -------------------------------------------------------------

@dataclass
class Kind:
    "A tiny model and a change that keeps what it computes"
    family:str
    change:object
    config:dict
    settings:dict = field(default_factory=dict)

    def pair(self, seed=0):
        "The model, the changed one and the truth"
        old = random_model(self.family, seed, **self.config)
        return old, *self.change(old, seed + 1, **self.settings)

_BASE = dict(hidden_size=32, num_hidden_layers=3, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
_FOUR = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
_LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
_SHARED = _FOUR | dict(shared_expert_intermediate_size=28)
_LATENT = dict(
    num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
    first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, norm_topk_prob=True)
_DELTA = _SHARED | dict(num_hidden_layers=4, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
                        linear_key_head_dim=6, linear_value_head_dim=8)
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=6, mamba_expand=2, mamba_chunk_size=16)
_FALCON = dict(
    mamba_d_ssm=64, mamba_rms_norm=True, mamba_proj_bias=True, head_dim=8, ssm_multipliers=[.7, 1.3, .8, 1.1, .9],
    mlp_multipliers=[.8, 1.2], key_multiplier=.7, attention_in_multiplier=.9, attention_out_multiplier=1.2,
    ssm_in_multiplier=1.1, ssm_out_multiplier=.8, embedding_multiplier=1.5, lm_head_multiplier=.6)
_GRANITE = dict(layer_types=['mamba', 'attention', 'mamba'], shared_intermediate_size=28, residual_multiplier=.7,
                embedding_multiplier=1.5, logits_scaling=2., attention_multiplier=.3)
_JAMBA = dict(attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
              num_experts_per_tok=2, mamba_d_state=6, mamba_dt_rank=5, mamba_expand=2)
_AFMOE = dict(num_hidden_layers=4, head_dim=8, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
              moe_intermediate_size=24, num_dense_layers=1, mup_enabled=True, sliding_window=8,
              global_attn_every_n_layers=2)
_GEMMA4 = dict(
    num_hidden_layers=5, head_dim=8, global_head_dim=12, hidden_size_per_layer_input=6, num_kv_shared_layers=2,
    vocab_size_per_layer_input=VOCAB, sliding_window=8,
    layer_types=['sliding_attention', 'full_attention', 'sliding_attention', 'sliding_attention', 'full_attention'])
_LLAMA4 = dict(num_hidden_layers=4, head_dim=8, intermediate_size_mlp=44, interleave_moe_layer_step=2,
               no_rope_layer_interval=2, attention_chunk_size=8)

KINDS = dict(
    mixtral=Kind('mixtral', change_mixtral, _BASE | _LOCAL | dict(head_dim=8), dict(layer=(1, 0))),
    qwen2_moe=Kind('qwen2_moe', change_qwen_moe, _BASE | _SHARED),
    qwen3_moe=Kind('qwen3_moe', change_qwen_moe, _BASE | _FOUR | dict(head_dim=8, mlp_only_layers=[1]),
                   dict(layer=(1, 2))),
    gpt_oss=Kind('gpt_oss', change_gpt_oss, _BASE | _LOCAL | dict(head_dim=8, sliding_window=8), dict(layer=(2, 1))),
    llama4=Kind('llama4_text', change_llama4, _BASE | _LOCAL | _LLAMA4),
    deepseek_v2=Kind('deepseek_v2', change_deepseek,
                     _BASE | _LATENT | dict(q_lora_rank=None, topk_method='greedy')),
    deepseek_v3=Kind('deepseek_v3', change_deepseek,
                     _BASE | _LATENT | dict(q_lora_rank=12, attention_bias=True, n_group=2, topk_group=1),
                     dict(layer=(2, 1))),
    qwen3_next=Kind('qwen3_next', change_qwen_next, _BASE | _DELTA, dict(layer=(1, 2))),
    qwen3_5=Kind('qwen3_5_text', change_qwen_next, _BASE | _DELTA, dict(layer=(1, 2))),
    qwen3_5_moe=Kind('qwen3_5_moe_text', change_qwen_next, _BASE | _DELTA),
    bamba=Kind('bamba', change_mamba2, _BASE | _MAMBA2 | dict(attn_layer_indices=[1], mamba_proj_bias=True),
               dict(hidden=64, layer=(1, 0))),
    falcon_h1=Kind('falcon_h1', change_mamba2, _BASE | _MAMBA2 | _FALCON, dict(hidden=48, layer=(1, 0))),
    granite4=Kind('granitemoehybrid', change_mamba2, _BASE | _MAMBA2 | _LOCAL | _GRANITE,
                  dict(hidden=64, layer=(1, 2))),
    jamba=Kind('jamba', change_jamba, _BASE | _JAMBA),
    lfm2=Kind('lfm2', change_lfm2,
              _BASE | dict(block_auto_adjust_ff_dim=False, layer_types=['conv', 'full_attention', 'conv'],
                           conv_bias=True), dict(layer=(2, 0))),
    afmoe=Kind('afmoe', change_afmoe, _BASE | _AFMOE),
    olmo2=Kind('olmo2', change_olmo2, _BASE, dict(layer=(1, 1))),
    diffllama=Kind('diffllama', change_diffllama, _BASE | dict(num_attention_heads=8, num_key_value_heads=4)),
    gemma4=Kind('gemma4_text', change_gemma4, _BASE | _GEMMA4))

# --- adapters and their effects ----------------------------------------------------------------------------------

def expert_parameters(model):
    "Paths of the fused weights of experts"
    return [n for n, p in model.named_parameters() if p.ndim == 3 and n.split('.')[-2] == 'experts']

def router_parameters(model):
    "Paths of the routers that are no linear modules"
    found = [n for n, m in model.named_modules() if n.endswith(('.gate', '.router')) and not isinstance(m, nn.Linear)]
    return [f'{n}.weight' for n in found if getattr(model.get_submodule(n), 'weight', None) is not None]

def linear_paths(model):
    "Paths of all linear modules but the head and routers that return more than a product"
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if type(m).forward is nn.Linear.forward and m is not head]

def peft_paths(model):
    """The linear modules that a LoRA of PEFT acts on: Jamba reads `dt_proj.weight` past any adapter, and PEFT refuses
    `out_proj` wherever it believes to see a Mamba"""
    without = dict(jamba='dt_proj', falcon_h1='out_proj').get(model.config.model_type)
    return [path for path in linear_paths(model) if path.rpartition('.')[2] != without]

RANK, SIZE = 2, .2 # of the updates of random adapters

def _random_update(g, out, into):
    return torch.randn(RANK, into, generator=g)/math.sqrt(into), SIZE*torch.randn(out, RANK, generator=g)

def random_updates(model, seed=0):
    "An `Adapter` that PEFT had no hand in: all linear modules, routers and experts, also those that PEFT cannot adapt"
    g, updates = torch.Generator().manual_seed(seed), {}
    transposed = STREAMS.get(model.config.model_type, Stream()).transposed
    routers = [path.removesuffix('.weight') for path in router_parameters(model)]
    for path in linear_paths(model) + routers:
        updates[path] = _random_update(g, *model.get_submodule(path).weight.shape)
        if is_router(path): _pair_rows(updates[path][1])
    for path in expert_parameters(model):
        experts, *sides = model.get_parameter(path).shape
        if transposed: sides = sides[::-1]
        for i in range(experts): updates[f'{path}[{i}]'] = _random_update(g, *sides)
    return Adapter(updates, layers=model.config.num_hidden_layers)

def random_adapter(model, folder, seed=0):
    """A PEFT adapter of all linear modules, experts and routers with random A and B, saved to `folder`; PEFT leaves
    out dense MLPs and shared experts of some models"""
    config = LoraConfig(r=RANK, lora_alpha=2*RANK, task_type='CAUSAL_LM', target_modules=peft_paths(model),
                        target_parameters=expert_parameters(model) + router_parameters(model) or None)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    g = torch.Generator().manual_seed(seed)
    for name, p in wrapped.named_parameters():
        if 'lora_' not in name: continue
        p.data = torch.randn(p.shape, generator=g)*(SIZE if 'lora_B' in name else 1/math.sqrt(p.shape[1]))
        if is_router(name.partition('.lora_B')[0]): _pair_rows(p.data)
    wrapped.save_pretrained(folder)
    return folder

def with_adapter(model, adapter):
    "A copy of a model with an adapter on it: by PEFT from a directory, or by adding `B A` to the weights by hand"
    if isinstance(adapter, Adapter):
        return merged_by_hand(model, {path: adapter.delta(path) for path in adapter.updates})
    return PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).eval()

@torch.no_grad()
def merged_by_hand(model, updates):
    "A copy of a model with dense updates (out, in) added, those of experts under `PATH[N]`, `PATH` of the parameter"
    model = copy.deepcopy(model)
    transposed = STREAMS.get(model.config.model_type, Stream()).transposed
    for path, update in updates.items():
        name, _, expert = path.partition('[')
        if expert:
            weight = model.get_parameter(name)[int(expert.rstrip(']'))]
            weight += update.T if transposed else update
        else: model.get_submodule(name).weight += update
    return model

@torch.no_grad()
def peft_updates(model, folder):
    "What each part of an adapter adds to its weight, (out, in), as PEFT applies it: path or `PATH[N]`: update"
    transposed = STREAMS.get(model.config.model_type, Stream()).transposed
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    found = {}
    for path, module in wrapped.base_model.model.named_modules():
        if not isinstance(module, LoraLayer): continue
        update, path = module.get_delta_weight('default').detach(), path.replace('.base_layer', '')
        if update.ndim == 2: found[path] = update
        if update.ndim == 3:
            name = f'{path}.{module.parameter_name}'
            found |= {f'{name}[{i}]': W.T if transposed else W for i, W in enumerate(update)}
    return found

@torch.no_grad()
def effect(model, adapter, ids):
    "What an adapter adds to the logits"
    return with_adapter(model, adapter)(ids).logits - model(ids).logits

def effect_error(old, new, old_adapter, new_adapter, ids):
    "How far the effect of the new adapter on the new model is from that of the old one on the old model"
    return error(effect(new, new_adapter, ids), effect(old, old_adapter, ids))

def without_skipped(adapter, skipped):
    "An `Adapter` without the updates that are named in `skipped`, whatever follows their path there"
    def named(path): return any(name == path or name.startswith(f'{path} ') for name in skipped)
    return Adapter({p: ab for p, ab in adapter.updates.items() if not named(p)}, adapter.base, adapter.layers)
