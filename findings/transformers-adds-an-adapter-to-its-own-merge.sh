#!/usr/bin/env bash
# Versions: transformers 5.23.0, PEFT 0.21.2, torch 2.13.0.
# Guess:    a merged model that is saved into the folder of its adapter is loaded from there as it was saved. The
#           folder holds a whole model; the adapter beside it is for PeftModel.
# Seen:     from_pretrained, of AutoModelForCausalLM and of LlamaForCausalLM, sees adapter_config.json and puts the
#           adapter on the merged model: it counts twice. The class is LlamaForCausalLM as ever, and nothing is said.
#           `base_model_name_or_path` in the adapter names another folder; it is not looked at.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import json, logging, sys, warnings
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

place = sys.argv[1]
ids = torch.arange(2, 34)[None]
said = []
class Keep(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
logging.getLogger('transformers').addHandler(Keep(logging.WARNING))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes)).save_pretrained(f'{place}/base')
model = get_peft_model(AutoModelForCausalLM.from_pretrained(f'{place}/base'), LoraConfig(target_modules=['q_proj']))
updates = {}
for name, m in model.named_modules():
    if not hasattr(m, 'lora_A'): continue
    torch.nn.init.normal_(m.lora_B['default'].weight, std=.5)
    updates[name.removeprefix('base_model.model.')] = m.get_delta_weight('default').detach()
model.save_pretrained(f'{place}/run')
merged = model.merge_and_unload()
weights = {path: merged.get_submodule(path).weight.detach().clone() for path in updates}
true = logits(merged)
merged.save_pretrained(f'{place}/run')
merged.save_pretrained(f'{place}/alone')
for path, update in updates.items(): merged.get_submodule(path).weight.data += update
twice = logits(merged)
assert json.load(open(f'{place}/run/adapter_config.json'))['base_model_name_or_path'] == f'{place}/base'

def error(a, b): return ((a - b).norm()/b.norm()).item()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for factory in (AutoModelForCausalLM, LlamaForCausalLM):
        alone, run = (factory.from_pretrained(f'{place}/{folder}') for folder in ('alone', 'run'))
        assert type(run) is LlamaForCausalLM
        print(f'{factory.__name__}: {error(logits(alone), true):.2f} alone, {error(logits(run), true):.2f} beside',
              f'the adapter, {error(logits(run), twice):.2f} against the adapter put on twice')
        assert error(logits(alone), true) < 1e-5 and error(logits(run), true) > .1 and error(logits(run), twice) < 1e-4
said += [str(w.message) for w in caught if 'deprecated' not in str(w.message)]
print('said:', said)
assert not said
PY
"$place/venv/bin/python" "$place/try.py" "$place"
