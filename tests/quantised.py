"""Carry an adapter to a quantised copy of its base and back, and train one on it

A program of its own, because bitsandbytes changes what other libraries do when they find it"""
import os, sys, tempfile
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from models import error, random_adapter, random_decoder, whole
from peft import LoraConfig, get_peft_model
from lorasuite.core.loading import load_model
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.training.examples import encode
from lorasuite.training.finetune import init_adapter
from lorasuite.training.trainer import fit
from lorasuite.lab.zoo import new_tokenizer

tokenizer, (bits, bound) = new_tokenizer(512, seed=1), sys.argv[1:]
plain = random_decoder(tokenizer, intermediate=128)
with tempfile.TemporaryDirectory() as d:
    plain.model.save_pretrained(f'{d}/plain')
    tokenizer.save_pretrained(f'{d}/small')
    settings = BitsAndBytesConfig(**{bits: True})
    small = AutoModelForCausalLM.from_pretrained(f'{d}/plain', quantization_config=settings, device_map='cpu')
    small.save_pretrained(f'{d}/small')
    small = load_model(Path(d)/'small')
    quantised = AutoModelForCausalLM.from_pretrained(f'{d}/small') # `load_model` gives it back in full on a CPU
adapter, there, back = random_adapter(init_adapter(plain, 4)), align(plain, small), align(small, plain)
for maps in there.blocks:
    assert maps.heads.tolist() == list(range(4))
    assert maps.neurons.tolist() == list(range(128))
carried = transfer(adapter, there)
off = error(whole(carried), whole(adapter)), error(whole(transfer(carried, back)), whole(adapter))
assert 0 < off[0] <= float(bound) and off[1] <= float(bound), off
print('carried', off)

homes = dict(Ann='Arden', Bob='Birch', Cid='Colm', Dan='Dover')
rows = [encode(dict(instruction=f'Where does {n} live?', output=v), tokenizer) for n, v in homes.items()]
base = {n: p.clone() for n, p in quantised.named_parameters()}
model = get_peft_model(quantised, LoraConfig(r=4, lora_alpha=4, task_type='CAUSAL_LM'))
options = [{}, dict(gradient_checkpointing=True)]
runs = [fit(model, rows, tokenizer, 15, 1e-2, batch_size=4, **more) for more in options]
assert all(run[-1] < run[0] - .5 for run in runs), runs
assert {p.dtype for p in quantised.parameters() if p.requires_grad} == {torch.float32}
assert len({p.dtype for p in base.values()}) > 1
after = {n.replace('.base_layer', ''): p for n, p in model.get_base_model().named_parameters() if 'lora' not in n}
assert all(p.equal(base[n]) for n, p in after.items())
print('trained', runs[0][0], runs[1][-1])
