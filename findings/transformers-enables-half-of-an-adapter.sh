#!/usr/bin/env bash
# Versions: transformers 5.23.0, PEFT 0.21.2, torch 2.13.0.
# Guess:    disable_adapters() and then enable_adapters() of a transformers model lead back to the logits of the
#           adapter, as leaving PEFT's disable_adapter() does.
# Seen:     disable_adapters switches off the LoRA and the modules that were trained whole (modules_to_save);
#           enable_adapters switches on the LoRA only. Half of the adapter stays off, without a word, and set_adapter
#           does not bring it back. Who compares a model with and without its adapter in this way measures the whole
#           one only the first time. PEFT's context manager on the same adapter is right, and so are both for an
#           adapter without whole modules.
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

place, ids = sys.argv[1], torch.arange(2, 34)[None]

def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

base = logits(tiny())
for whole in (None, ['lm_head']):
    trained = get_peft_model(tiny(), LoraConfig(target_modules=['q_proj', 'v_proj'], modules_to_save=whole))
    for name, p in trained.named_parameters():
        if 'lora_' in name: torch.nn.init.normal_(p, std=.1)
        if 'modules_to_save' in name: p.data *= 1.5
    true = logits(trained)
    trained.save_pretrained(place)

    def error(model): return ((logits(model) - true).norm()/(true - base).norm()).item()

    model, said = tiny(), []
    model.load_adapter(place)
    found = dict(loaded=error(model))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model.disable_adapters()
        assert torch.equal(logits(model), base)
        model.enable_adapters()
        found['enabled'] = error(model)
        model.set_adapter('default')
        found['set'] = error(model)
    peft = PeftModel.from_pretrained(tiny(), place)
    with peft.disable_adapter(): assert torch.equal(logits(peft), base)
    found['PEFT, enabled'] = error(peft)
    print(f'modules_to_save={whole}:', ', '.join(f'{name} {e:.2f}' for name, e in found.items()))
    assert not said and max(found['loaded'], found['PEFT, enabled']) < 1e-5
    assert all(found[name] > .1 if whole else found[name] < 1e-5 for name in ('enabled', 'set'))
PY
"$place/venv/bin/python" "$place/try.py" "$place/adapter"
