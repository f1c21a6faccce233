#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    an adapter that is saved and loaded again changes the logits as before; of the keys of alpha_pattern that
#           fit a module the same one counts.
# Seen:     the first key that fits counts, in the order in which they were given, but adapter_config.json is written
#           with sorted keys. With {'layers.1.mlp.down_proj': 64, 'down_proj': 8}, the exception before the rule, the
#           second layer is trained with alpha 64 and loaded with 8, since `down_proj` comes first in the alphabet. No
#           word about it. The same keys in rank_pattern make an adapter that PEFT itself cannot load. With q_proj and
#           model.layers.1.self_attn.q_proj the alphabet has the order right by chance.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import sys, warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

ids = torch.arange(2, 34)[None]

def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

def scales(model):
    return [m.scaling['default'] for n, m in model.named_modules() if n.endswith(('q_proj', 'down_proj'))]

def save(**settings):
    "A model with an adapter, which is saved"
    config = LoraConfig(r=4, lora_alpha=4, target_modules=['q_proj', 'down_proj'], **settings)
    model = get_peft_model(tiny(), config)
    for name, p in model.named_parameters():
        if 'lora_' in name: torch.nn.init.normal_(p, std=.1)
    model.save_pretrained(sys.argv[1])
    return model

def load(): return PeftModel.from_pretrained(tiny(), sys.argv[1])

base = logits(tiny())
cases = (('down_proj', 'layers.1.mlp.down_proj', False), ('q_proj', 'model.layers.1.self_attn.q_proj', True))
for leaf, path, right in cases:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = save(alpha_pattern={path: 64, leaf: 8})
        loaded = load()
    said = [str(w.message) for w in said if 'deprecated' not in str(w.message)]
    error = ((logits(loaded) - logits(model)).norm()/(logits(model) - base).norm()).item()
    print(f'{path} and {leaf}: scales {scales(model)} before, {scales(loaded)} loaded; error {error:.2f},',
          f'warnings {said}')
    assert error < 1e-5 if right else error > .1
    assert not said and max(scales(model)) == 16 and max(scales(loaded)) == (16 if right else 2)
save(rank_pattern={'layers.1.mlp.down_proj': 8, 'down_proj': 2})
try: load()
except RuntimeError as e: print('rank_pattern:', str(e).splitlines()[1].strip())
else: raise SystemExit('rank_pattern is loaded')
PY
"$place/venv/bin/python" "$place/try.py" "$place/adapter"
