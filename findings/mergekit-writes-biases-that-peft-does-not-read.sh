#!/usr/bin/env bash
# Versions: mergekit 0.1.5, PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    mergekit-extract-lora at full rank gives an adapter with which PEFT turns the base into the fine-tuned
#           model, or it says what it leaves out.
# Seen:     for a model whose maps have biases, such as Qwen2, it writes their differences to the file as
#           lora_B.bias, but not `lora_bias` to the configuration, without which PEFT has no place for them. They are
#           dropped without a word: here the logits miss 35% of what the fine-tuning did. If only the weights
#           changed the adapter is exact, and so it is for Llama. With `lora_bias` set to true by hand it is exact
#           too, but then PEFT adds a bias to the maps that have none and cannot merge them.
# Fails if this changes. Needs a network and about 2 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 mergekit==0.1.5
cat > "$place/try.py" <<'PY'
import json
import subprocess
import sys
import warnings
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

place = Path(sys.argv[1])
ids = torch.arange(2, 34)[None]

def tiny(kind):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

def extract(kind, changed):
    "The folder of the base, that of the adapter, and the logits of the base and of the tuned model"
    folder = place/f'{kind}-{"-".join(changed)}'
    base, tuned = tiny(kind), tiny(kind)
    torch.manual_seed(1)
    for name, p in tuned.named_parameters():
        if 'proj' in name and name.rpartition('.')[2] in changed: p.data += .1*torch.randn_like(p)
    base.save_pretrained(folder/'base')
    tuned.save_pretrained(folder/'tuned')
    command = ['--model', folder/'tuned', '--base-model', folder/'base', '--out-path', folder/'adapter']
    command = [place/'venv/bin/mergekit-extract-lora', *command]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 'bias' not in done.stdout + done.stderr
    return folder/'base', folder/'adapter', logits(base), logits(tuned)

def load(base, adapter):
    "The model with the adapter, and what was said about the adapter's keys"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model, [str(w.message) for w in said if 'bias' in str(w.message) or 'keys' in str(w.message)]

for kind, changed in (('llama', ['weight']), ('qwen2', ['weight']), ('qwen2', ['weight', 'bias'])):
    base, adapter, before, after = extract(kind, changed)
    biases = [name for name in load_file(adapter/'adapter_model.safetensors') if name.endswith('lora_B.bias')]
    model, said = load(base, adapter)
    error = ((logits(model) - after).norm()/(after - before).norm()).item()
    print(f'{kind}, changed {changed}: {len(biases)} biases in the file, error {error:.4f}, said {said}')
    assert not said and len(biases) == (6 if kind == 'qwen2' else 0)
    assert .1 < error < 1 if 'bias' in changed else error < 1e-4
config = json.loads((adapter/'adapter_config.json').read_text())
assert 'lora_bias' not in config
(adapter/'adapter_config.json').write_text(json.dumps(config | dict(lora_bias=True)))
model, said = load(base, adapter)
error = ((logits(model) - after).norm()/(after - before).norm()).item()
print(f'the last one with lora_bias: error {error:.4f}, warnings {len(said)}')
assert error < 1e-4
try: model.merge_and_unload()
except RuntimeError as e: print('merging:', e)
else: raise AssertionError('merges')
PY
"$place/venv/bin/python" "$place/try.py" "$place"
