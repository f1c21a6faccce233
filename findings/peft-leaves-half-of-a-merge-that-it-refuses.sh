#!/usr/bin/env bash
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    an adapter with `lora_bias=True` on maps without a bias cannot be merged; merge_adapter refuses it and
#           leaves the model as it was.
# Seen:     it adds B A to the first weight and refuses then, because there is no bias to add to. The layer does not
#           count as merged, so unmerge_adapter takes nothing out, and the adapter is still put on top: the logits of
#           a caller who goes on are off by 9% of its effect, and by 66% after it is unloaded. With safe_merge=True
#           the weight stays as it was.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import copy, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)
base = AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes)).eval()
ids = torch.arange(2, 12)[None]

@torch.no_grad()
def tried(**how):
    "What a refused merge changes: the first weight, the logits with the adapter, and those after it is unloaded"
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=['v_proj', 'o_proj'], lora_bias=True, task_type='CAUSAL_LM')
    model = get_peft_model(copy.deepcopy(base), config)
    for name, p in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(p, std=.3)
    plain, worn = base(ids).logits, model(ids).logits
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    weight = layer.base_layer.weight.clone()
    try: model.merge_adapter(**how)
    except RuntimeError as e: assert 'lora_bias=True' in str(e), e
    else: raise SystemExit('it was merged')
    assert not layer.merged
    model.unmerge_adapter()
    moved = (layer.base_layer.weight - weight).norm()/weight.norm()
    effect = (worn - plain).norm()
    return [float(x) for x in (moved, (model(ids).logits - worn).norm()/effect,
                               (model.unload()(ids).logits - plain).norm()/effect)]

for how in ({}, dict(safe_merge=True)):
    moved, worn, left = tried(**how)
    print(f'{how or "plain"}: first weight moved {moved:.2f} of its norm; logits off by {worn:.3f} of the effect '
          f'with the adapter, {left:.3f} without it')
    if how: assert moved == worn == left == 0
    else: assert moved > 1 and worn > .05 and left > .3
PY
"$place/venv/bin/python" -W ignore "$place/try.py"
