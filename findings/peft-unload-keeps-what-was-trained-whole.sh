#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    unload() gives the base model back, as its documentation says, with its logits: those inside
#           disable_adapter().
# Seen:     the LoRA is taken off, but modules that were trained whole (modules_to_save), here lm_head, stay in their
#           trained state and replace the base's. Nothing is said. Saved as "the base" or given to a second adapter,
#           this model is neither the base nor the adapted one. Without modules_to_save unload() is right.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import warnings
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

ids = torch.arange(2, 34)[None]

def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

base = logits(tiny())
for whole in (None, ['lm_head']):
    model = get_peft_model(tiny(), LoraConfig(target_modules=['q_proj', 'v_proj'], modules_to_save=whole))
    for name, p in model.named_parameters():
        if 'lora_' in name: torch.nn.init.normal_(p, std=.1)
        if 'modules_to_save' in name: p.data *= 1.5
    with model.disable_adapter(): assert torch.equal(logits(model), base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        unloaded = model.unload()
    difference = ((logits(unloaded) - base).norm()/base.norm()).item()
    print(f'modules_to_save={whole}: the unloaded model differs from the base by {difference:.2f}')
    assert not said and (difference > .1 if whole else difference == 0)
PY
"$place/venv/bin/python" "$place/try.py"
