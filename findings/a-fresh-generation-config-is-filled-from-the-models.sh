#!/usr/bin/env bash
# Versions: transformers 5.23.0, torch 2.13.0.
# Guess:    generate(generation_config=GenerationConfig(do_sample=False, …)) is greedy: what the given configuration leaves
#           open has the defaults of GenerationConfig, as the documentation of generate says.
# Seen:     what it leaves open is taken from the model's own generation_config. With a repetition penalty and a suppressed
#           token there, the answer of the fresh configuration differs in every token from the greedy one. Only naming each
#           setting with its neutral value gives the greedy answer. An evaluation that passes a fresh configuration measures
#           the model's habits.
# Fails if this changes. Needs a network and about 1.5 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$place/try.py" <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, eos_token_id=1)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes)).eval()
model.lm_head.weight.data.normal_(std=.5)
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])

def said(**settings):
    config = GenerationConfig(max_new_tokens=12, do_sample=False, **settings)
    return model.generate(ids, generation_config=config)[0, 8:].tolist()

greedy = said()
model.generation_config.repetition_penalty = 50.
model.generation_config.suppress_tokens = greedy[:1]
fresh, neutral = said(), said(repetition_penalty=1., suppress_tokens=[])
print('greedy:  ', greedy)
print('fresh:   ', fresh)
print('neutral: ', neutral)
assert neutral == greedy and all(a != b for a, b in zip(fresh, greedy))
PY
"$place/venv/bin/python" "$place/try.py"
