"""Helpers of the tests: random models, random adapters, and what an adapter does to the logits"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from lorasuite.core.adapter import Adapter
from lorasuite.core.model import Decoder
from lorasuite.stages.drift import module_drifts

def random_decoder(tokenizer, family='llama', hidden=64, layers=4, heads=4, kv_heads=2, intermediate=96, seed=0,
                   **config):
    "An untrained model whose norm gains, offsets and biases are random too"
    sizes = dict(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                 num_key_value_heads=kv_heads, intermediate_size=intermediate, max_position_embeddings=256,
                 pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False, initializer_range=.1)
    if family == 'opt': sizes |= dict(ffn_dim=intermediate, word_embed_proj_dim=hidden)
    if family in ('qwen3', 'gemma2', 'gemma3_text'): sizes |= dict(head_dim=hidden//heads)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | config)).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith('weight'): p.data.uniform_(.5, 2)
        if name.endswith('bias'): p.data.normal_(std=.5)
    return Decoder(model, tokenizer, f'random/{family}')

def as_phi(decoder):
    "A Phi-3 that computes what a Llama does"
    sizes = dict(hidden=64, layers=4, heads=4, kv_heads=2, intermediate=96, rms_norm_eps=1e-6)
    phi = random_decoder(decoder.tokenizer, 'phi3', **sizes)
    own, found = decoder.model.state_dict(), {}
    for name in phi.model.state_dict():
        parts = dict(qkv_proj=['q_proj', 'k_proj', 'v_proj'], gate_up_proj=['gate_proj', 'up_proj'])
        fused = next((fused for fused in parts if fused in name), None)
        found[name] = torch.cat([own[name.replace(fused, p)] for p in parts[fused]]) if fused else own[name]
    phi.model.load_state_dict(found)
    return phi

def random_adapter(adapter, seed=0):
    "The same adapter with a random B: as if it had been trained"
    torch.manual_seed(seed)
    updates = {p: (A, .05*torch.randn_like(B)) for p, (A, B) in adapter.updates.items()}
    return Adapter(updates, adapter.base, adapter.layers)

def only(adapter, leaf):
    "The updates of one module type, e.g. `q_proj`"
    updates = {p: ab for p, ab in adapter.updates.items() if p.endswith(leaf)}
    return Adapter(updates, adapter.base, adapter.layers)

def tokens(vocab=512, texts=3, length=20, seed=0):
    "Random token ids, none of them special"
    return torch.randint(2, vocab, (texts, length), generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def logits(decoder, ids, adapter=None):
    "Real forward passes, through PEFT where there is an adapter"
    if adapter is None: return decoder.model(ids).logits
    with adapter.on(decoder) as model: return model(ids).logits

def effect(decoder, ids, adapter):
    "What the adapter adds to the logits"
    return logits(decoder, ids, adapter) - logits(decoder, ids)

def error(found, true):
    "Relative error in the Frobenius norm"
    return ((found - true).norm()/true.norm()).item()

def effect_error(old, adapter, new, carried, ids=None, new_id=None):
    "How far the effect of `carried` on `new` is from that of `adapter` on `old`; `new_id`: new id of every old token"
    ids = tokens(old.vocab) if ids is None else ids
    new_id = torch.arange(old.vocab) if new_id is None else new_id
    return error(effect(new, new_id[ids], carried)[..., new_id], effect(old, ids, adapter))

def whole(adapter):
    "All dense updates, one after another"
    return torch.cat([adapter.delta(p).flatten() for p in sorted(adapter.updates)])

def largest_drift(carried, alignment, old, new):
    "The largest drift of a module that an adapter updates, as a share of its weight"
    return max((D.norm()/W.norm()).item() for _, D, W in module_drifts(carried, alignment, old, new))
