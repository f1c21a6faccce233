#!/usr/bin/env bash
# Versions: xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0.
# Guess:    a GGUF adapter whose adapter.lora.alpha is 0 changes nothing: its scale is alpha over the rank. PEFT does
#           so with lora_alpha=0.
# Seen:     it runs at scale 1, like an adapter whose alpha is the rank and like one without the key. Alpha 0.001 does
#           what one expects. An adapter that was scaled to nothing, such as the neutral case of a sweep over alpha,
#           has its full effect instead. A scale of 0 that is given to the server does switch it off.
# Fails if this changes. Needs a network and about 200 MB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0
cat > "$place/try.py" <<'PY'
import sys
import gguf, numpy as np, xllamacpp

place, size, hidden, inner, layers, rank = sys.argv[1], 64, 64, 96, 2, 4
chance = np.random.default_rng(0)

def normal(*shape, std=.2): return (chance.standard_normal(shape)*std).astype(np.float32)

def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

def write_base(file):
    "A random Llama with a vocabulary of numbers"
    w = gguf.GGUFWriter(file, 'llama')
    w.add_context_length(512); w.add_embedding_length(hidden); w.add_block_count(layers)
    w.add_feed_forward_length(inner)
    w.add_head_count(4); w.add_head_count_kv(4); w.add_rope_dimension_count(16); w.add_layer_norm_rms_eps(1e-6)
    w.add_vocab_size(size); w.add_tokenizer_model('llama'); w.add_token_list([f'<{i}>' for i in range(size)])
    w.add_token_scores([0.]*size); w.add_token_types([2] + [1]*(size - 1))
    w.add_unk_token_id(0); w.add_bos_token_id(1); w.add_eos_token_id(1); w.add_add_bos_token(False)
    w.add_tensor('token_embd.weight', normal(size, hidden)); w.add_tensor('output.weight', normal(size, hidden))
    w.add_tensor('output_norm.weight', np.ones(hidden, np.float32))
    for i in range(layers):
        for name in ('attn_norm', 'ffn_norm'): w.add_tensor(f'blk.{i}.{name}.weight', np.ones(hidden, np.float32))
        for name in ('attn_q', 'attn_k', 'attn_v', 'attn_output'):
            w.add_tensor(f'blk.{i}.{name}.weight', normal(hidden, hidden))
        for name in ('ffn_gate', 'ffn_up'): w.add_tensor(f'blk.{i}.{name}.weight', normal(inner, hidden))
        w.add_tensor(f'blk.{i}.ffn_down.weight', normal(hidden, inner))
    finish(w)

def write_adapter(file, alpha):
    w = gguf.GGUFWriter(file, 'llama')
    w.add_type('adapter'); w.add_string('adapter.type', 'lora')
    if alpha is not None: w.add_float32('adapter.lora.alpha', alpha)
    w.add_tensor('blk.0.attn_output.weight.lora_a', a)
    w.add_tensor('blk.0.attn_output.weight.lora_b', b)
    finish(w)

def answer(adapter=None, scale=1.):
    "Log-probabilities of the next token"
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = base, 512, 1, False, 0
    p.cpuparams.n_threads = 1
    if adapter: p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, scale)]
    asked = dict(prompt=list(range(2, 42)), n_predict=1, n_probs=10**6, temperature=0, cache_prompt=False)
    said = xllamacpp.Server(p).handle_completions(asked)['choices'][0]['logprobs']['content'][0]['top_logprobs']
    return np.array([t['logprob'] for t in sorted(said, key=lambda t: t['id'])])

def change(alpha, scale=1.):
    "Largest change of a log-probability by the adapter with this alpha"
    write_adapter(f'{place}/adapter.gguf', alpha)
    return answer(f'{place}/adapter.gguf', scale) - without

base, a, b = f'{place}/base.gguf', normal(rank, hidden, std=1.), normal(hidden, rank, std=.1)
write_base(base)
without = answer()
full, zero, missing, little, off = change(float(rank)), change(0.), change(None), change(.001), change(0., 0.)
for name, found in {f'alpha {rank}, the rank': full, 'alpha 0': zero, 'no alpha': missing, 'alpha 0.001': little,
                    'alpha 0, scale 0 in the server': off}.items():
    print(f'{name}: largest change {np.abs(found).max():.4f}')
assert np.abs(full).max() > .5 and np.array_equal(zero, full) and np.array_equal(missing, full)
assert np.abs(little).max() < .01 and not off.any()
PY
"$place/venv/bin/python" "$place/try.py" "$place"
