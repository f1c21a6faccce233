#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    after hotswap_adapter the model computes what the second adapter computes when it is loaded afresh, and
#           what is saved is the second adapter; or an error is raised, as the documentation promises for unlike
#           adapters.
# Seen:     rank_pattern is not read. A second adapter with rank 2 in one module is scaled there by alpha over the
#           common rank; the logits are wrong without a word (alpha_pattern is compared, and refused). And the
#           adapter's configuration in the model stays that of the first one: after swapping in another lora_alpha the
#           logits are right, but save_pretrained writes the old lora_alpha, so the saved adapter is another one.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import tempfile, warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoConfig, AutoModelForCausalLM

ids = torch.arange(2, 34)[None]

def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, initializer_range=.2)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

@torch.no_grad()
def logits(model): return model.eval()(ids, use_cache=False).logits

def saved(**settings):
    "A folder with an adapter"
    config = LoraConfig(**dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj']) | settings)
    model = get_peft_model(tiny(), config)
    for name, p in model.named_parameters():
        if 'lora_' in name: torch.nn.init.normal_(p, std=.2)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return folder

def load(folder): return PeftModel.from_pretrained(tiny(), folder)

def swapped(**settings):
    "Errors of the logits after the swap, and after saving and loading the swapped adapter"
    first, second = saved(), saved(**settings)
    model, true, base = load(first), logits(load(second)), logits(tiny())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        hotswap_adapter(model, second, adapter_name='default')
        again = tempfile.mkdtemp()
        model.save_pretrained(again)
    assert not said, [str(w.message) for w in said]
    return tuple(((logits(m) - true).norm()/(true - base).norm()).item() for m in (model, load(again)))

same, alpha, rank = swapped(), swapped(lora_alpha=32), swapped(rank_pattern={'v_proj': 2})
for name, (now, later) in {'the same settings': same, 'lora_alpha': alpha, 'rank_pattern': rank}.items():
    print(f'{name}: error {now:.2f} after the swap, {later:.2f} after saving and loading')
try: swapped(alpha_pattern={'v_proj': 16})
except ValueError as e: print('alpha_pattern is refused:', e)
else: raise SystemExit('alpha_pattern is not refused')
assert max(same) < 1e-5 and alpha[0] < 1e-5 and alpha[1] > .1 and min(rank) > .1
PY
TMPDIR="$place" "$place/venv/bin/python" "$place/try.py"
