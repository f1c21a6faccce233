"""Carry an adapter to a quantised copy of its base and back; a program of its own, because bitsandbytes changes what other libraries do when they find it"""
import os, sys, tempfile
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
from pathlib import Path
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from models import error, random_adapter, random_decoder, whole
from lorasuite.finetune import fresh
from lorasuite.model import load_decoder
from lorasuite.transfer import align, transfer
from lorasuite.zoo import new_tokenizer

tokenizer, (bits, bound) = new_tokenizer(512, seed=1), sys.argv[1:]
plain = random_decoder(tokenizer, intermediate=128)
with tempfile.TemporaryDirectory() as d:
    plain.model.save_pretrained(f'{d}/plain'), tokenizer.save_pretrained(f'{d}/small')
    AutoModelForCausalLM.from_pretrained(f'{d}/plain', quantization_config=BitsAndBytesConfig(**{bits: True}), device_map='cpu').save_pretrained(f'{d}/small')
    small = load_decoder(Path(d)/'small')
adapter, there, back = random_adapter(fresh(plain, 4)), align(plain, small), align(small, plain)
for maps in there.blocks: assert maps['heads'].tolist() == list(range(4)) and maps['neurons'].tolist() == list(range(128))
off = error(whole(transfer(adapter, there)), whole(adapter)), error(whole(transfer(transfer(adapter, there), back)), whole(adapter))
assert 0 < off[0] <= float(bound) and off[1] <= float(bound), off
print('carried', off)
