"""Everything that needs a GPU, in one run of some minutes: laws, alignment at 7B → 8B shapes, training, memory

`python benchmarks/gpu.py` writes lorasuite/data/gpu.json, which the page on speed shows. `--small` tries the script on
a CPU. A check that fails is written down with its error, and the others go on.
"""
import os
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import argparse, datetime, json, tempfile, time
from functools import partial
from importlib.metadata import version
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder, pick_device
from lorasuite.lab.effect import adapter_effect, compare_effects, held_out_ids
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.training.evaluate import evaluate
from lorasuite.training.examples import load_data
from lorasuite.training.finetune import finetune, init_adapter
from lorasuite.training.refresh import refresh, teacher_top_k
from lorasuite.tuners.alora import ALoRA, batch_of
from lorasuite.tuners.lora2 import LoRA2
from shapes import make

RESULTS = data_dir()/'gpu.json'
SMALL = dict(hidden_size=1152, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4, vocab_size=2000)
CPU = torch.device('cpu')
STEPS, ROWS, RANK = 8, 8, 16

def say(text): print(f'== {text}', flush=True)

class Costs:
    "Seconds of a part of the run, and the most memory of the device that it took"
    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        return self
    def __exit__(self, *_):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.gb = torch.cuda.max_memory_allocated()/1e9 if torch.cuda.is_available() else None
    def dict(self): return dict(seconds=self.seconds, gb=self.gb)

# ---- the tiny pair

def laws(device):
    "Identity, and what the tiny adapter is worth on both models, computed on the device"
    old, new = (load_model(name, device, torch.float32) for name in ('zoo/old', 'zoo/new'))
    adapter, ids = Adapter.load('zoo/adapter'), held_out_ids(old)
    same = transfer(adapter, align(old, old))
    identity = compare_effects(adapter_effect(old, ids, same), adapter_effect(old, ids, adapter))['error']
    carried = transfer(adapter, align(old, new))
    rows = load_data('zoo/test.jsonl')
    found = dict(old=evaluate(old, rows, adapter), base=evaluate(new, rows), carried=evaluate(new, rows, carried))
    assert identity <= 1e-4, identity
    return dict(identity=identity) | {name: score.accuracy for name, score in found.items()}

# ---- models of real shapes

def same_partners(one, other):
    "Shares of heads and of neurons that have the same partner in two alignments"
    both = [*zip(one.blocks, other.blocks, strict=True)]
    def equal(a, b): return (a == b).double().mean().item()
    def share(kind): return sum(equal(getattr(a, kind), getattr(b, kind)) for a, b in both)/len(both)
    return dict(layers=one.layers == other.layers, heads=share('heads'), neurons=share('neurons'))

def align_wide(old, new, device):
    "The same alignment on the device and on the processor"
    costs, found = {}, {}
    for name, where in (('device', device), ('cpu', CPU)):
        models = [load_model(folder, where, lazy=True) for folder in (old, new)]
        say(f'align on {where}')
        with Costs() as cost: found[name] = align(*models)
        costs[name] = cost.dict()
    with Costs() as cost: transfer(random_adapter(old), found['device'])
    return costs | dict(transfer=cost.seconds, equal=same_partners(*found.values()))

def random_adapter(folder):
    "A LoRA of every role with a random B, as if it had been trained"
    adapter = init_adapter(load_model(folder, CPU, torch.bfloat16), RANK)
    updates = {path: (A, .01*torch.randn_like(B)) for path, (A, B) in adapter.updates.items()}
    return Adapter(updates, adapter.base, adapter.layers)

def load_4bit(folder):
    "A model in 4 bits"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map=0)
    return Decoder(model.eval(), AutoTokenizer.from_pretrained(folder), str(folder))

def training_steps(train):
    "Seconds of a step, and memory: a run of few steps is taken off a run of more"
    with Costs() as short: train(steps=2)
    with Costs() as long: train(steps=2 + STEPS)
    return dict(seconds_a_step=(long.seconds - short.seconds)/STEPS, gb=long.gb)

def rows(): return load_data('zoo/train.jsonl')[:ROWS*4]

def tune(decoder, steps, **kwargs):
    _, run = finetune(decoder, rows(), steps=steps, rank=RANK, batch_size=ROWS, **kwargs)
    assert all(map(torch.isfinite, torch.tensor(run))), run

def tuning(new, device, **kwargs):
    "Steps of a plain LoRA in bfloat16"
    decoder = load_model(new, device, torch.bfloat16)
    return training_steps(partial(tune, decoder, **kwargs))

def tuning_4bit(new, device):
    "Steps of a plain LoRA on a base in 4 bits"
    return training_steps(partial(tune, load_4bit(new)))

def tuning_alora(new, device):
    "A short training by ALoRA, with one round of measuring its directions, divided by its steps"
    decoder = load_model(new, device, torch.bfloat16)
    batch = batch_of(rows()[:4], decoder.tokenizer)
    with Costs() as cost: tune(decoder, STEPS, method=partial(ALoRA, batch=batch, rounds=1))
    return dict(seconds_a_step=cost.seconds/STEPS, gb=cost.gb)

def refreshing(old, new, device):
    "Steps of a refresh, after the teacher has said what it expects along the answers"
    teacher, student = (load_model(folder, device, torch.bfloat16) for folder in (old, new))
    with Costs() as lessons: notes = teacher_top_k(teacher.model, teacher.tokenizer, rows())
    taught = [row | note for row, note in zip(rows(), notes)]
    def train(steps): refresh(student, taught, steps=steps, rank=RANK, batch_size=ROWS)
    return dict(lessons=lessons.dict()) | training_steps(train)

# ---- all of it

def checks(folder, device, small):
    "Name and call of every check"
    changes = SMALL if small else {}
    make_one = partial(make, layers=4, device=device, **changes)
    old, new = make_one(folder/'old', 'llama-2-7b', seed=0), make_one(folder/'new', 'llama-3-8b', seed=1)
    yield 'laws', partial(laws, device)
    yield 'align', partial(align_wide, old, new, device)
    yield 'LoRA', partial(tuning, new, device)
    yield 'LoRA, recomputing', partial(tuning, new, device, gradient_checkpointing=True)
    yield 'LoRA²', partial(tuning, new, device, method=partial(LoRA2, target=RANK/2, every=2))
    yield 'ALoRA', partial(tuning_alora, new, device)
    yield 'refresh', partial(refreshing, old, new, device)
    yield 'LoRA in 4 bits', partial(tuning_4bit, new, device)

def attempt(name, check):
    "The result of a check, or its error"
    say(name)
    with Costs() as cost:
        try: found = check()
        except Exception as e: found = dict(error=f'{type(e).__name__}: {e}'[:300])
    say(f'{name}: {found} ({cost.seconds:.0f} s)')
    return found | dict(whole=cost.dict())

def main(small, out):
    "Run all checks, and write what was found after each"
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == 'cuda' else device.type
    said = dict(device=name, date=datetime.date.today().isoformat(), layers=4, small=small,
                versions={package: version(package) for package in ('torch', 'transformers', 'peft')})
    with tempfile.TemporaryDirectory() as d:
        for name, check in checks(Path(d), device, small):
            said[name] = attempt(name, check)
            Path(out).write_text(json.dumps(said, indent=1))
    return [name for name, found in said.items() if isinstance(found, dict) and 'error' in found]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--small', action='store_true', help='small shapes, to try the script where there is no GPU')
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    if failed := main(args.small, args.out): raise SystemExit(f'failed: {", ".join(failed)}')
