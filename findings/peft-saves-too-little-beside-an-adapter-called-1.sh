#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    two adapters that PEFT takes under the names '0' and '1' are saved whole, each in its folder.
# Seen:     save_pretrained leaves out every tensor that has the name of another adapter anywhere between the dots of
#           its path. Of adapter '0' only layer 0 is written and of '1' only layer 1; of '2' beside '1' only what is
#           outside layer 1. Nothing is said on saving; only who loads the file is told of missing keys, when the
#           trained weights are gone. Names that are part of no path, such as 'a0' and 'a1', are saved whole.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import sys, warnings
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

place, ids = Path(sys.argv[1]), torch.arange(2, 34)[None]

def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

def saved(*names):
    "For every adapter the paths in its file, and the error of its logits after loading"
    config, found, true = LoraConfig(target_modules=['q_proj', 'v_proj']), {}, {}
    model = get_peft_model(tiny(), config, adapter_name=names[0])
    for name in names[1:]: model.add_adapter(name, config)
    for path, p in model.named_parameters():
        if 'lora_' in path: torch.nn.init.normal_(p, std=.2)
    for name in names:
        model.set_adapter(name)
        true[name] = logits(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model.save_pretrained(place)
    assert not [w for w in said if 'deprecated' not in str(w.message)]
    for name in names:
        paths = sorted(load_file(place/name/'adapter_model.safetensors'))
        change = logits(PeftModel.from_pretrained(tiny(), place/name)) - base
        found[name] = paths, ((change - (true[name] - base)).norm()/(true[name] - base).norm()).item()
        print(f'adapters {names}, {name}: {len(paths)} tensors, error {found[name][1]:.2f}')
    return found

base = logits(tiny())
for paths, error in saved('a0', 'a1').values(): assert len(paths) == 8 and error < 1e-5
for name, (paths, error) in saved('0', '1').items():
    assert len(paths) == 4 and all(f'layers.{name}.' in path for path in paths) and error > .1
beside = saved('1', '2')
assert len(beside['1'][0]) == 8 and beside['1'][1] < 1e-5
assert len(beside['2'][0]) == 4 and not any('layers.1.' in path for path in beside['2'][0]) and beside['2'][1] > .1
PY
"$place/venv/bin/python" "$place/try.py" "$place/adapters"
