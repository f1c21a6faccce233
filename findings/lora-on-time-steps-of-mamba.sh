#!/usr/bin/env bash
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    a LoRA on dt_proj, a linear module of Mamba's mixer, changes the logits, and by as much before as after a merge.
# Seen:     Mamba, Falcon Mamba and Jamba read dt_proj.weight and never call the module (on the path without CUDA kernels). The
#           LoRA has no effect at all on the logits and gets no gradient, without a warning; `all-linear` trains it like any
#           other. Merged into the weight, the same LoRA changes the logits.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$place/try.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0, initializer_range=.2)
JAMBA = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
             expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_dt_rank=4, use_mamba_kernels=False)
ids = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(0))
for family, extra in dict(mamba={}, falcon_mamba={}, jamba=JAMBA).items():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | extra)).eval()
    before = base(ids, use_cache=False).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=['dt_proj'])).eval()
    factors = [p for n, p in model.named_parameters() if 'lora_' in n]
    for p in factors: torch.nn.init.normal_(p)
    logits = model(ids, use_cache=False).logits
    gradients = [None] if not logits.requires_grad else torch.autograd.grad(logits.sum(), factors, allow_unused=True)
    attached = (logits.detach() - before).abs().max().item()
    merged = (model.merge_and_unload()(ids, use_cache=False).logits.detach() - before).abs().max().item()
    print(f'{family}: largest change of a logit attached {attached:.1e}, merged {merged:.1e}')
    assert attached == 0 and merged > 1e-4 and all(g is None or not g.any() for g in gradients)
PY
"$place/venv/bin/python" "$place/try.py"
