#!/usr/bin/env bash
# Versions: transformers 5.23.0, PEFT 0.21.2, torch 2.13.0.
# Guess:    AutoModelForCausalLM.from_pretrained on the folder of a DoRA adapter gives the logits of PeftModel on the
#           same folder, as it does for LoRA and rsLoRA.
# Seen:     the factors are loaded, the trained magnitudes are not: the report of loading lists each as UNEXPECTED
#           under its name in the file and as MISSING with `.weight` at the end. They are the row norms of the base's
#           weights, as in an untrained DoRA. No error. load_adapter does the same, and save_pretrained then writes
#           the untrained magnitudes.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

place, ids = sys.argv[1], torch.arange(2, 34)[None]
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes)).save_pretrained(f'{place}/base')

def tiny(): return AutoModelForCausalLM.from_pretrained(f'{place}/base')

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

def magnitudes(folder):
    return {key: t for key, t in load_file(f'{folder}/adapter_model.safetensors').items() if 'magnitude' in key}

base = logits(tiny())
for kind, settings in dict(LoRA={}, rsLoRA=dict(use_rslora=True), DoRA=dict(use_dora=True)).items():
    folder = f'{place}/{kind}'
    trained = get_peft_model(tiny(), LoraConfig(target_modules=['q_proj', 'v_proj'], **settings))
    untrained = {name: p.detach().clone() for name, p in trained.named_parameters() if 'magnitude' in name}
    for name, p in trained.named_parameters():
        if 'magnitude' in name: p.data *= 1.5
        elif 'lora_' in name: torch.nn.init.normal_(p, std=.1)
    trained.save_pretrained(folder)
    true = logits(trained)

    def error(model): return ((logits(model) - true).norm()/(true - base).norm()).item()

    loaded, model = AutoModelForCausalLM.from_pretrained(folder), tiny()
    model.load_adapter(folder)
    found = [error(m) for m in (PeftModel.from_pretrained(tiny(), folder), loaded, model)]
    print(f'{kind}: error {found[0]:.2f} PeftModel, {found[1]:.2f} from_pretrained, {found[2]:.2f} load_adapter')
    assert max(found) < 1e-5 if kind != 'DoRA' else found[0] < 1e-5 and min(found[1:]) > .05
held = [p for name, p in loaded.named_parameters() if 'magnitude' in name]
assert len(held) == 4 and all(torch.allclose(a, b) for a, b in zip(held, untrained.values(), strict=True))
model.save_pretrained(f'{place}/again')
before, after = magnitudes(f'{place}/DoRA'), magnitudes(f'{place}/again')
ratios = [(a/b).mean().item() for a, b in zip(before.values(), after.values(), strict=True)]
print('trained magnitudes over those that are saved again:', *(f'{ratio:.2f}' for ratio in ratios))
assert all(abs(ratio - 1.5) < 1e-3 for ratio in ratios)
PY
"$place/venv/bin/python" "$place/try.py" "$place"
