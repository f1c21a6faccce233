#!/usr/bin/env bash
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0.
# Guess:    where a model with an embedding and a head of its own was resized for new tokens, save_pretrained
#           (save_embedding_layers='auto') puts both tables beside the adapter, whatever LoRA targets: it does so for
#           LoRA on q_proj, and says that the tables were resized.
# Seen:     with LoRA on q_proj and on one of the tables, only that table is written. The other one, its new rows
#           included, is lost without a word: the model that is read again has fresh rows there, and other logits. With
#           embed_tokens among the targets the new tokens cannot be predicted as trained; with lm_head they are not read.
#           With modules_to_save=['embed_tokens'] both tables are there, and the embedding three times: as the module
#           that was trained, as the original beside it, and once more under its plain name.
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
from transformers import LlamaConfig, LlamaForCausalLM

place = sys.argv[1]
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, tie_word_embeddings=False)).save_pretrained(f'{place}/base')

def resized():
    model = LlamaForCausalLM.from_pretrained(f'{place}/base')
    model.resize_token_embeddings(70, mean_resizing=False)
    return model.eval()

def read_again(name, **settings):
    "The tables in the file, and how far the logits of the adapter that is read again are off, of old and of new tokens"
    model = get_peft_model(resized(), LoraConfig(r=2, **settings))
    for parameter in model.parameters():
        if parameter.requires_grad: parameter.data.add_(torch.randn_like(parameter)*.1)
    model.save_pretrained(f'{place}/{name}')
    again = PeftModel.from_pretrained(resized(), f'{place}/{name}').eval()
    def off(ids): return (model(torch.tensor([ids])).logits - again(torch.tensor([ids])).logits)[0, -1].abs()
    tables = sorted(key.removeprefix('base_model.model.') for key in load_file(f'{place}/{name}/adapter_model.safetensors')
                    if 'q_proj' not in key and 'lora' not in key)
    old, new = off([1, 2, 3]), off([1, 2, 65])
    found = tables, old[:64].max().item() > 1e-4, old[64:].max().item() > 1e-4, new[:64].max().item() > 1e-4
    print(name, found)
    return found

with torch.no_grad():
    both = read_again('neither', target_modules=['q_proj'])
    embedding = read_again('embedding', target_modules=['q_proj', 'embed_tokens'])
    head = read_again('head', target_modules=['q_proj', 'lm_head'])
    whole = read_again('whole', target_modules=['q_proj'], modules_to_save=['embed_tokens'])
assert both == (['lm_head.weight', 'model.embed_tokens.weight'], False, False, False)
assert embedding == (['model.embed_tokens.base_layer.weight'], False, True, False) # new tokens are not predicted
assert head == (['lm_head.base_layer.weight'], False, False, True) # new tokens are not read
names = [f'model.embed_tokens.{name}' for name in ('modules_to_save.weight', 'original_module.weight', 'weight')]
assert whole == (['lm_head.weight', *names], False, False, False)
print('as described')
PY
OMP_NUM_THREADS=1 "$place/venv/bin/python" -W ignore "$place/try.py" "$place"
