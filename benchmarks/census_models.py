"""Tiny random models of every architecture that transformers has"""
import math
from functools import cache
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from census_tables import CAUSAL_TEXT, ENCODERS, LAYERS, OTHERS, OVERRIDES, VARIANTS, WIDTHS

VOCAB = 320         # rows of every embedding table
TOKENS = 300        # of the tokenizer; the ids above are images, sounds and the like
SIZES = dict(old=dict(hidden=64, layers=4), other=dict(hidden=96, layers=6))

# ---- which architectures there are

def mapping(name:str) -> dict[str, str]: # model type: name of its class
    "One of transformers' tables; empty where this version has none of that name"
    return dict(getattr(modeling_auto, f'MODEL_FOR_{name}_MAPPING_NAMES', {}))

def class_names() -> dict[str, str]: # name in the census: class; `multimodal/` where a second class has the key
    "All architectures that the installed transformers can make text with"
    causal = mapping('CAUSAL_LM')
    both = mapping('IMAGE_TEXT_TO_TEXT') | mapping('MULTIMODAL_LM')
    return causal | {f'multimodal/{key}': c for key, c in both.items() if causal.get(key) != c}

def architectures() -> dict[str, tuple[str, dict]]: # name: key of the class, overrides of its configuration
    "All keys and all variants of settings whose key this transformers has"
    keys = class_names()
    variants = {name: (key, extra) for name, (key, extra) in VARIANTS.items() if key in keys}
    return {key: (key, {}) for key in keys} | variants

@cache
def model_class(key:str) -> type[PreTrainedModel]: # the class that the mapping names
    "The class of an architecture"
    name = class_names()[key]
    return getattr(transformers, name[0] if isinstance(name, (list, tuple)) else name)

def kind_of(key:str) -> str: # `decoder`, `encoder`, `encoder-decoder` or `other`
    "Does it write text from left to right?"
    model_type = key.removeprefix('multimodal/')
    if model_type in OTHERS: return 'other'
    if model_type in ENCODERS: return 'encoder'
    config = default_config(key)
    return 'encoder-decoder' if config.is_encoder_decoder else 'decoder'

# ---- configurations

@cache
def default_config(key:str) -> PreTrainedConfig:
    "The configuration as its class makes it, of full size; for a text-only class that of the text"
    model_type = key.removeprefix('multimodal/')
    config = CONFIG_MAPPING[model_type](**CAUSAL_TEXT.get(key, {}))
    wanted = model_class(key).config_class
    text = config.get_text_config(decoder=True) if not isinstance(config, wanted) else config
    return text if isinstance(text, wanted) else config

def layer_count(config:dict) -> int|None:
    "How many layers a (sub-)configuration has"
    names = ('num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'decoder_layers', 'depth', 'layers')
    return next((config[n] for n in names if isinstance(config.get(n), int)), None)

def per_layer(config:dict, layers:int|None) -> dict[str, list]: # name: one value a layer
    "The settings that hold one value for each layer"
    return {n: v for n, v in config.items() if layers and isinstance(v, list) and len(v) == layers}

def chosen_layers(lists:dict[str, list], layers:int, wanted:int) -> list[int]: # ascending
    "Some layers of which every kind that there is is among them, from the front"
    kinds = [str([values[i] for values in lists.values()]) for i in range(layers)]
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    if len(first) > wanted: first = first[:wanted]
    rest = [i for i in range(layers) if i not in first]
    return sorted(first + rest[:max(0, wanted - len(first))])

def shrink(config:dict, hidden:int, layers:int, tower:bool=False) -> dict:
    "A configuration with every size small, its sub-configurations too"
    config = {str(n): v for n, v in config.items()}
    old, wanted = layer_count(config), 2 if tower else layers
    lists = per_layer(config, old)
    kept = chosen_layers(lists, old, wanted) if old else []
    small = dict(pad_token_id=0) if 'model_type' in config else {} # some models of transformers 5.0 ask for it
    for name, value in config.items():
        if isinstance(value, dict): small[name] = shrink_part(name, value, hidden, layers, tower)
        elif name in lists: small[name] = [value[i] for i in kept]
        else: small[name] = small_value(name, value, hidden, wanted, config)
    return small

def shrink_part(name:str, value:dict, hidden:int, layers:int, tower:bool) -> dict:
    "A sub-configuration, or a dictionary of settings as it is"
    if name.endswith(('label2id', 'id2label', 'rope_parameters', 'compress_rates', 'rope_scaling')):
        return small_rope(value) if name.startswith('rope') else value
    if name == 'per_layer_config': return {}
    away = not any(word in name for word in ('text', 'llm', 'thinker', 'language', 'decoder', 'vlm', 'attn', 'ffn'))
    return shrink(value, hidden, layers, tower or away)

def small_rope(rope:dict) -> dict:
    "Rotary settings for heads of 16"
    if any(isinstance(v, dict) for v in rope.values()):
        return {n: small_rope(v) if isinstance(v, dict) else v for n, v in rope.items()}
    if 'mrope_section' not in rope: return rope
    pairs = int(8*rope.get('partial_rotary_factor', 1))
    return rope | dict(mrope_section=[pairs - 2*(pairs//3), pairs//3, pairs//3])

def small_value(name:str, value, hidden:int, layers:int, config:dict):
    "The small value of one setting"
    if name == 'use_mamba_kernels': return False # they are for GPUs
    if isinstance(value, bool) or value is None: return value
    if name in LAYERS: return layers if value > 2 or layers > 2 else value
    if name in WIDTHS:
        width = WIDTHS[name]
        return width(hidden, value, config) if callable(width) else width
    if name.endswith(('token_id', 'token_index', '_token_ids')) : return small_token(name, value)
    if name in INDEX_LISTS: return [i for i in range(layers) if i in INDEX_LISTS[name]]
    return value

INDEX_LISTS = dict.fromkeys(('deepstack_visual_indexes', 'global_attn_indexes', 'fullatt_block_indexes'), (0, 1))
INDEX_LISTS |= dict(intermediate_layers_indices=(0, 1), cross_attention_layers=(1, 3), mlp_only_layers=(1,),
                    spatial_target_layers=(1, 2))
FEW = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1)

def small_token(name:str, value):
    "A token id within the table: that of <pad> or <eos>, or one above the tokenizer's"
    if name in FEW: return FEW[name]
    place = TOKENS + sum(map(ord, name))%(VOCAB - TOKENS)
    if isinstance(value, list): return [TOKENS + i for i in range(len(value))]
    return place if value >= 0 else value

def deep_update(config:dict, extra:dict) -> dict:
    "Put settings into a configuration; `a.b` means b in the sub-configuration a, and None removes"
    config = dict(config)
    for name, value in extra.items():
        head, _, rest = name.partition('.')
        if rest: config[head] = deep_update(config.get(head) or {}, {rest: value})
        elif value == 'remove': config.pop(head, None)
        else: config[head] = value
    return config

def overrides(key:str, sizes:dict) -> dict: # setting: value
    "What the general rules get wrong for one architecture"
    found = OVERRIDES.get(key, OVERRIDES.get(key.removeprefix('multimodal/'), {}))
    return found(**sizes) if callable(found) else found

OLD_SPELLINGS = dict(linear_attention='mamba', full_attention='attention')

def as_spelled(small:dict, default:dict) -> dict:
    "A configuration with kinds of layers as this version of transformers spells them for this architecture"
    hybrid = any('mamba' in name for name in default)
    lists = {name: small[name] for name in ('layer_types', 'layers_block_type') if small.get(name)}
    old = [name for name in lists if 'mamba' in str(default.get(name) or hybrid*'mamba')]
    return small | {name: [OLD_SPELLINGS.get(kind, kind) for kind in lists[name]] for name in old}

def tiny_config(key:str, extra:dict, size:str='old') -> PreTrainedConfig:
    "The configuration of a tiny model"
    config, sizes = default_config(key), SIZES[size]
    small = shrink(config.to_dict(), **sizes)
    extra = extra(**sizes) if callable(extra) else extra
    small = deep_update(deep_update(small, overrides(key, sizes)), extra)
    made = type(config).from_dict(as_spelled(small, config.to_dict()))
    made._attn_implementation = 'eager'
    return made

# ---- weights

def fan_in(p:torch.Tensor) -> int:
    "By how many inputs an output of a weight is made"
    return math.prod(p.shape[1:]) if p.ndim != 3 or p.shape[1] == 1 else min(p.shape[1:])

def randomise_vector(name:str, p:torch.Tensor):
    "A gain around 1, a bias around 0, whatever else somewhat other than it was"
    if not p.numel(): return
    if p.std(correction=0) > 0: return p.add_(.1*p.abs()*torch.randn_like(p))
    norm = 'norm' in name or 'ln' in name
    low = .3 if p.flatten()[0] == 1 or norm and name.endswith('weight') else .1
    p.add_(torch.empty_like(p).uniform_(-low, low))

@torch.no_grad()
def randomise(model:PreTrainedModel, seed:int=0):
    "Give a model random weights that do not make its logits degenerate"
    torch.manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        if p.ndim < 2: randomise_vector(name, p)
        elif id(p) in tables: p.normal_(std=.5)
        elif p.numel() and p.dtype.is_floating_point: p.normal_(std=fan_in(p)**-.5)
    kept = model.state_dict()
    for name, b in model.named_buffers():
        if name in kept and b.is_floating_point() and 'num_batches' not in name: randomise_vector(name, b)

def tiny_model(key:str, extra:dict, size:str='old') -> PreTrainedModel:
    "A tiny random model of an architecture"
    torch.manual_seed(0)
    model = model_class(key)(tiny_config(key, extra, size)).float().eval()
    randomise(model, dict(old=1, other=2)[size])
    return model
