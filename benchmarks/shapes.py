"""Models of real shapes with random weights, for measurements: what they cost does not depend on what they know"""
import json, shutil
from pathlib import Path
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from lorasuite.core.files import resolve

SHAPES = {
    'smollm-135m': dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                        num_key_value_heads=3, num_hidden_layers=30, tie_word_embeddings=True),
    'llama-2-7b': dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                       num_key_value_heads=32, num_hidden_layers=32),
    'llama-3-8b': dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                       num_key_value_heads=8, num_hidden_layers=32),
    'minicpm-s-1b': dict(vocab_size=73440, hidden_size=1536, intermediate_size=3840, num_attention_heads=24,
                         num_key_value_heads=8, num_hidden_layers=52, tie_word_embeddings=True),
    'minicpm-2b': dict(vocab_size=122753, hidden_size=2304, intermediate_size=5760, num_attention_heads=36,
                       num_key_value_heads=36, num_hidden_layers=40, tie_word_embeddings=True)}

def write_tokenizer(folder, vocabulary, first):
    "The tokenizer of the tiny models with as many words as a model has rows, numbered from `first`"
    source = Path(resolve('zoo/old'))
    found = json.loads((source/'tokenizer.json').read_text())
    known = found['model']['vocab']
    top = 1 + max([*known.values(), *(token['id'] for token in found['added_tokens'])])
    known |= {f'qz{first + i}': top + i for i in range(vocabulary - top)}
    (folder/'tokenizer.json').write_text(json.dumps(found))
    shutil.copy(source/'tokenizer_config.json', folder)

@torch.no_grad()
def random_model(config, dtype, device, seed):
    "Weights of a normal distribution, norms of ones"
    with init_empty_weights(): model = LlamaForCausalLM(config) # its buffers are real, its parameters are not
    torch.manual_seed(seed)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None: continue
            numbers = torch.ones(p.shape) if p.ndim == 1 else torch.empty(p.shape, dtype=dtype, device=device)
            if p.ndim > 1: numbers.normal_(std=.02)
            module._parameters[name] = nn.Parameter(numbers.to(device, dtype))
    model.tie_weights()
    return model.to(device)

def make(folder, shape, layers=None, seed=0, dtype=torch.bfloat16, device='cpu', **changes):
    "A directory with a model of a shape, once; a fifth of the words of two seeds is not shared"
    folder = Path(folder)
    if (folder/'tokenizer.json').exists(): return folder
    settings = SHAPES[shape] | (dict(num_hidden_layers=layers) if layers else {}) | changes
    random_model(LlamaConfig(**settings), dtype, device, seed).save_pretrained(folder)
    write_tokenizer(folder, settings['vocab_size'], seed*settings['vocab_size']//5)
    return folder
