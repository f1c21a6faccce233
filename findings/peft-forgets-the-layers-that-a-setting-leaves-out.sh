#!/usr/bin/env bash
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    an adapter whose file has tensors for all layers while `layers_to_transform` in its settings names one of
#           them is refused, or PEFT warns that tensors of the file found no place.
# Seen:     it loads without a word, with the updates of that one layer; the others are dropped. `load_adapter` lists
#           them as unexpected keys, but `PeftModel.from_pretrained`, which calls it, throws that list away and warns
#           of missing keys only.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import json, sys, warnings
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

folder, ids = Path(sys.argv[1])/'adapter', torch.arange(2, 12)[None]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)

def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes)).eval()

@torch.no_grad()
def effect(model): return model(ids).logits - base()(ids).logits

made = get_peft_model(base(), LoraConfig(r=4, target_modules=['v_proj'], task_type='CAUSAL_LM'))
for name, p in made.named_parameters():
    if 'lora_B' in name: torch.nn.init.normal_(p, std=.3)
true = effect(made)
made.save_pretrained(folder)
settings = json.loads((folder/'adapter_config.json').read_text())
(folder/'adapter_config.json').write_text(json.dumps(settings | dict(layers_to_transform=1)))

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    loaded = PeftModel.from_pretrained(base(), folder)
told = [str(w.message) for w in said if 'key' in str(w.message) or 'layer' in str(w.message)]
off = ((effect(loaded) - true).norm()/true.norm()).item()
result = loaded.load_adapter(folder, 'again')
print(f'warnings of keys or layers: {told}; effect off by {off:.0%}; '
      f'{len(result.unexpected_keys)} tensors have no place, as load_adapter returns')
assert not told and off > .2 and len(result.unexpected_keys) == 4
PY
"$place/venv/bin/python" -W ignore "$place/try.py" "$place"
