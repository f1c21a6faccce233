#!/usr/bin/env bash
# Versions: xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0, on a CPU.
# Guess:    a float32 model with a float32 cache (cache_type_k and cache_type_v) is computed in float32:
#           log-probabilities are exact to about 1e-5, whichever way attention is computed.
# Seen:     flash attention is on by default and computes with float16 keys and values in any case. The float32 cache,
#           which is twice as large, changes no digit; log-probabilities of this model are off by 0.01. Only without
#           flash attention does the type of the cache count, and then they agree with our own float64 attention to
#           1e-5. Who measures a converted adapter against another library needs both settings.
# Fails if this changes. Needs a network and about 200 MB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q xllamacpp==2026.10.11549 gguf==0.19.0
cat > "$place/try.py" <<'PY'
import sys
import gguf, numpy as np, xllamacpp

place, size, hidden, inner, layers, heads = sys.argv[1], 64, 64, 96, 2, 4
chance, weights, ids = np.random.default_rng(0), {}, list(range(2, 42))

def add(writer, name, *shape):
    "A random tensor"
    values = chance.standard_normal(shape)*.2 if len(shape) > 1 else np.ones(shape)
    weights[name] = values.astype(np.float32)
    writer.add_tensor(f'{name}.weight', weights[name])

def write_base(file):
    "A random Llama with a vocabulary of numbers"
    w = gguf.GGUFWriter(file, 'llama')
    w.add_context_length(512); w.add_embedding_length(hidden); w.add_block_count(layers)
    w.add_feed_forward_length(inner)
    w.add_head_count(heads); w.add_head_count_kv(heads); w.add_rope_dimension_count(hidden//heads)
    w.add_layer_norm_rms_eps(1e-6); w.add_rope_freq_base(1e4)
    w.add_vocab_size(size); w.add_tokenizer_model('llama'); w.add_token_list([f'<{i}>' for i in range(size)])
    w.add_token_scores([0.]*size); w.add_token_types([2] + [1]*(size - 1))
    w.add_unk_token_id(0); w.add_bos_token_id(1); w.add_eos_token_id(1); w.add_add_bos_token(False)
    add(w, 'token_embd', size, hidden); add(w, 'output', size, hidden); add(w, 'output_norm', hidden)
    for i in range(layers):
        for name in ('attn_norm', 'ffn_norm'): add(w, f'blk.{i}.{name}', hidden)
        for name in ('attn_q', 'attn_k', 'attn_v', 'attn_output'): add(w, f'blk.{i}.{name}', hidden, hidden)
        for name in ('ffn_gate', 'ffn_up'): add(w, f'blk.{i}.{name}', inner, hidden)
        add(w, f'blk.{i}.ffn_down', hidden, inner)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x/x.sum(-1, keepdims=True)

def exact():
    "Log-probabilities of the next token, in float64"
    def linear(name, x): return x@weights[name].T.astype(float)
    def norm(name, x): return x/np.sqrt((x*x).mean(-1, keepdims=True) + 1e-6)*weights[name]
    def split(x): return x.reshape(len(ids), heads, -1).swapaxes(0, 1)
    def turn(x):
        z = (x[..., ::2] + 1j*x[..., 1::2])*angles
        return np.stack([z.real, z.imag], -1).reshape(x.shape)
    width = hidden//heads
    angles = np.exp(1j*np.outer(np.arange(len(ids)), 1e4**(-np.arange(0, width, 2)/width)))
    past = np.tril(np.ones((len(ids), len(ids)), bool))
    x = weights['token_embd'][ids].astype(float)
    for i in range(layers):
        block = f'blk.{i}.'
        h = norm(block + 'attn_norm', x)
        q, k, v = (split(linear(block + name, h)) for name in ('attn_q', 'attn_k', 'attn_v'))
        attention = softmax(np.where(past, turn(q)@turn(k).swapaxes(1, 2)/width**.5, -np.inf))
        x = x + linear(block + 'attn_output', (attention@v).swapaxes(0, 1).reshape(len(ids), hidden))
        h = norm(block + 'ffn_norm', x)
        gate = linear(block + 'ffn_gate', h)
        x = x + linear(block + 'ffn_down', gate/(1 + np.exp(-gate))*linear(block + 'ffn_up', h))
    return np.log(softmax(linear('output', norm('output_norm', x))[-1]))

def answer(cache, flash):
    "Log-probabilities of the next token in llama.cpp; flash=None leaves the default"
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = base, 512, 1, False, 0
    p.cpuparams.n_threads = 1
    p.cache_type_k = p.cache_type_v = getattr(xllamacpp.ggml_type, f'GGML_TYPE_{cache}')
    if flash: p.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f'LLAMA_FLASH_ATTN_TYPE_{flash}')
    asked = dict(prompt=ids, n_predict=1, n_probs=10**6, temperature=0, cache_prompt=False)
    said = xllamacpp.Server(p).handle_completions(asked)['choices'][0]['logprobs']['content'][0]['top_logprobs']
    return np.array([t['logprob'] for t in sorted(said, key=lambda t: t['id'])])

base = f'{place}/base.gguf'
write_base(base)
true, said = exact(), {}
for flash in (None, 'ENABLED', 'DISABLED'):
    for cache in ('F16', 'F32'):
        said[flash, cache] = answer(cache, flash)
        error = np.abs(said[flash, cache] - true).max()
        print(f'flash attention {(flash or "by default").lower()}, cache {cache}: largest error {error:.1e}')
        assert error < 2e-5 if (flash, cache) == ('DISABLED', 'F32') else 3e-4 < error < .1
for flash in (None, 'ENABLED'): assert np.array_equal(said[flash, 'F32'], said[None, 'F16'])
PY
"$place/venv/bin/python" "$place/try.py" "$place"
