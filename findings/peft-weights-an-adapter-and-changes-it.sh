#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    add_weighted_adapter(['one'], [1.], 'sum', combination_type='cat') makes a copy of the adapter: its
#           documentation calls `cat` precise. What it cannot combine it refuses, as it refuses unequal ranks for
#           `linear`.
# Seen:     only a plain LoRA is copied. With rsLoRA the copy is sqrt(r) times as strong as the adapter: lora_alpha
#           becomes the rank, which is a scale of 1 without rsLoRA, but use_rslora stays on. With lora_bias the bias
#           of B is lost, with DoRA the trained magnitudes are lost, and whole modules (modules_to_save) are the
#           base's again. No error and no warning in any of these. `svd` and `linear` do the same.
# Output:   error of the logits, as a fraction of the adapter's effect (the same for cat, svd and linear): plain 0.00,
#           rsLoRA 0.61, lora_bias 0.81, DoRA 0.37, modules_to_save 0.25
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
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('qwen2', **sizes))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

@torch.no_grad()
def trained(**settings):
    "A model with an adapter called `one`, changed in all that it trains"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], **settings)
    model = get_peft_model(tiny(), config, adapter_name='one')
    for name, p in model.named_parameters():
        if 'lora_magnitude' in name or 'modules_to_save' in name: p.mul_(1.3)
        elif 'lora_' in name: p.copy_(torch.randn_like(p)*.2)
    return model

base, found, said = logits(tiny()), {}, []
cases = dict(plain={}, rsLoRA=dict(use_rslora=True), lora_bias=dict(lora_bias=True), DoRA=dict(use_dora=True),
             modules_to_save=dict(modules_to_save=['lm_head']))
for case, settings in cases.items():
    for way in ('cat', 'svd', 'linear'):
        model = trained(**settings)
        true = logits(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            model.add_weighted_adapter(['one'], [1.], 'sum', combination_type=way)
            model.set_adapter('sum')
        said += [str(w.message) for w in caught]
        found[case, way] = ((logits(model) - true).norm()/(true - base).norm()).item()
        if case == 'rsLoRA':
            strength, *_ = [(m.get_delta_weight('sum').norm()/m.get_delta_weight('one').norm()).item()
                            for m in model.modules() if hasattr(m, 'get_delta_weight')]
            print(f'rsLoRA, {way}: {strength:.3f} times as strong')
            assert abs(strength - 4**.5) < 1e-3
    print(f'{case:16}', *(f'{way} {found[case, way]:.2f} ' for way in ('cat', 'svd', 'linear')))
print('warnings:', said)
assert all(error < 1e-3 if case == 'plain' else error > .1 for (case, _), error in found.items())
assert not said
PY
"$place/venv/bin/python" "$place/try.py"
