#!/usr/bin/env bash
# Versions: mlx-lm 0.32.2 with mlx 0.32.4 (CPU), transformers 5.23.0, torch 2.13.0.
# Guess:    mlx-lm computes the logits of transformers for a model that transformers 5 saved, or says what it cannot
#           read. It requires transformers 5 itself.
# Seen:     transformers 5 writes rope_theta and the rope scaling of Llama 3 into rope_parameters. For Llama, Qwen2,
#           Mistral, Gemma 2, OLMo 2, SmolLM3, Mixtral and Phi-3, mlx-lm looks at the old places only and takes its
#           default base (such as 10000) and no scaling: other logits, without a word. Granite and Helium are refused
#           with a TypeError on rope_theta; Qwen3 is right. With rope_theta (and rope_scaling) copied to the top of
#           config.json all are right. A merged adapter that is saved with transformers 5 and served with mlx-lm is
#           not the model that was tested.
# Fails if this changes. Needs a network and about 2 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cat > "$place/try.py" <<'PY'
import json, sys
from pathlib import Path
import mlx.core as mx
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=.2)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SCALED = dict(rope_type='llama3', rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4.,
              original_max_position_embeddings=64)
ids = torch.arange(2, 62)[None]

def mlx(folder):
    "Log-probabilities in mlx-lm, or what it says"
    try: model, _ = load_model(folder)
    except TypeError as e: return str(e)
    model.set_dtype(mx.float32)
    model.eval()
    return torch.tensor(model(mx.array(ids.tolist()))[0].tolist()).log_softmax(-1)

def error(found, true): return found if isinstance(found, str) else (found - true).abs().max().item()

def both(name, family, rope, **extra):
    "Errors for the folder as transformers writes it, and with the settings at the top as well"
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **extra, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = Path(sys.argv[1])/name
    model.save_pretrained(folder)
    with torch.no_grad(): true = model(ids).logits[0].log_softmax(-1)
    as_saved = error(mlx(folder), true)
    config = json.loads((folder/'config.json').read_text())
    assert 'rope_theta' not in config and config['rope_parameters']['rope_theta'] == rope['rope_theta']
    config['rope_theta'] = rope['rope_theta']
    if rope['rope_type'] != 'default': config['rope_scaling'] = rope
    (folder/'config.json').write_text(json.dumps(config))
    return as_saved, error(mlx(folder), true)

plain = dict(rope_type='default', rope_theta=5e5)
cases = {family: (family, plain, {}) for family in ('llama', 'qwen2', 'mistral', 'gemma2', 'olmo2', 'smollm3', 'phi3')}
cases |= {'mixtral': ('mixtral', plain, EXPERTS), 'llama, scaled': ('llama', SCALED, {})}
for name, (family, rope, extra) in cases.items():
    saved, copied = both(name, family, rope, **extra)
    print(f'{name}: largest error of a log-probability {saved:.1e} as saved, {copied:.1e} with the settings at the top')
    assert saved > .01 and copied < 1e-4
for family in ('granite', 'helium'):
    saved, copied = both(family, family, plain)
    print(f'{family}: {saved}; {copied:.1e} with the settings at the top')
    assert 'rope_theta' in saved and copied < 1e-4
saved, copied = both('qwen3', 'qwen3', plain)
print(f'qwen3: {saved:.1e} as saved')
assert max(saved, copied) < 1e-4
PY
"$place/venv/bin/python" "$place/try.py" "$place"
