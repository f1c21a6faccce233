#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    modules_to_save=['norm'] trains and saves the last norm of a Llama, model.norm: target_modules compares whole
#           names between the dots of a path, and so does this.
# Seen:     it is enough that a path ends in these letters. input_layernorm and post_attention_layernorm of every layer are
#           made trainable and saved too, five modules for two layers, without a word. target_modules=['proj'] in the same
#           model matches nothing, though q_proj ends in it.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import tempfile
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

def tiny():
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

model = get_peft_model(tiny(), LoraConfig(target_modules=['q_proj'], modules_to_save=['norm']))
trained = [n for n, p in model.named_parameters() if p.requires_grad and 'lora' not in n]
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    saved = [key for key in load_file(f'{folder}/adapter_model.safetensors') if 'lora' not in key]
print(len(trained), 'modules trained whole;', 'saved:', *saved)
assert len(trained) == len(saved) == 5 and sum('layernorm' in key for key in saved) == 4
try: get_peft_model(tiny(), LoraConfig(target_modules=['proj']))
except ValueError as e: print('refused:', e)
else: raise SystemExit('target_modules matched by the letters at the end, too')
PY
"$place/venv/bin/python" "$place/try.py"
