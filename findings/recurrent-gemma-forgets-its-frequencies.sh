#!/usr/bin/env bash
# Versions: transformers 5.0.0, torch 2.13.0.
# Guess:    a RecurrentGemma that is saved and read again gives the logits that it gave before.
# Seen:     the rotary frequencies of its attention are no part of the file and are not computed again on reading: they are
#           whatever was in that memory, such as 2.9e-38. No message, and the logits are those of another model. Several
#           readings may differ from each other. Gemma, which has the same kind of frequencies, is read right, and so is
#           RecurrentGemma in transformers 5.23.0. The census of lorasuite found it by reading each model twice.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.0.0
cat > "$place/try.py" <<'PY'
import tempfile
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ids = torch.arange(3, 43)[None]

@torch.no_grad()
def logits(model): return model.eval()(input_ids=ids, use_cache=False).logits

def frequencies(model): return [b for name, b in model.named_buffers() if name.endswith('rotary_emb.inv_freq')]

def after_saving(family):
    torch.manual_seed(0)
    more = dict(lru_width=64) if family == 'recurrent_gemma' else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **more))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same = all(torch.allclose(a, b) for a, b in zip(frequencies(model), frequencies(read), strict=True))
    return same, torch.allclose(logits(model), logits(read), atol=1e-4), frequencies(read)

for family, right in (('gemma', True), ('recurrent_gemma', False)):
    same, equal, found = after_saving(family)
    print(f'{family}: frequencies {"kept" if same else found}, logits {"the same" if equal else "differ"}')
    assert found and same is equal is right
PY
"$place/venv/bin/python" "$place/try.py"
