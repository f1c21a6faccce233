#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    when get_peft_model refuses a module, the model is as it was, and a second call trains what it names and nothing
#           else.
# Seen:     a Falcon H1 with a LoRA on all linear maps is refused (out_proj of a Mamba). The modules before the refused
#           one (the MLP and mamba.in_proj of the first block) keep their LoRA. A second call for q_proj alone trains these
#           too, and all are saved. A fresh model that loads the saved adapter gets q_proj only, since the others are not in
#           its target_modules. So what was trained is not what is loaded.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import tempfile
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2,
                 mamba_d_state=8, pad_token_id=0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('falcon_h1', **sizes))

def adapted(model):
    return sorted({n.partition('.lora_')[0].removeprefix('base_model.model.') for n, _ in model.named_parameters() if 'lora_' in n})

model = tiny()
try: get_peft_model(model, LoraConfig(target_modules='all-linear'))
except ValueError as e: print('refused:', e)
else: raise SystemExit('it was not refused')
again = get_peft_model(model, LoraConfig(target_modules=['q_proj']))
trained = {n for n, p in again.named_parameters() if p.requires_grad}
extra = [name for name in adapted(again) if not name.endswith('q_proj')]
print('asked for q_proj, trained as well:', *extra)
assert 'model.layers.0.mamba.in_proj' in extra and any('in_proj.lora_A' in n for n in trained)
with tempfile.TemporaryDirectory() as folder:
    again.save_pretrained(folder)
    saved = [k for k in load_file(f'{folder}/adapter_model.safetensors') if 'in_proj' in k]
    loaded = adapted(PeftModel.from_pretrained(tiny(), folder))
print(len(saved), 'tensors of it are saved;', 'loaded:', *loaded)
assert len(saved) == 2 and all(name.endswith('q_proj') for name in loaded)
fresh = adapted(get_peft_model(tiny(), LoraConfig(target_modules=['q_proj'])))
assert all(name.endswith('q_proj') for name in fresh)
PY
"$place/venv/bin/python" "$place/try.py"
