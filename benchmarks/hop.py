"""Upgrades of a real language model, measured as the laboratory measures

One model of 135M parameters is upgraded to enlargements of itself; its adapter for sums goes through every method.
"""
from real import ADAPTER, CACHE, CPU, enlarge, MODEL, prepare, say, train
import random
from functools import cached_property, partial
from pydoc_data.topics import topics
from tqdm.auto import tqdm
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import atomic_directory, data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.drift import take_back_drift
from lorasuite.training.evaluate import bits_per_byte
from lorasuite.training.trainer import fit
from lorasuite.lab.experiments import record_experiment
from lorasuite.lab.recipes import Experiment, Method, METHODS, START_ADAPTERS, start_adapter
from lorasuite.lab.search import method_search, tune_and_test
from lorasuite.lab.store import collect, read_records
from lorasuite.lab.upgrades import weight_change
from lorasuite.lab.zoo import pack_texts

PLACE = CACHE/'hop'
RESULTS = data_dir()/'hop.json'
RATES = dict(enlarged=0., gentle=5e-5, harsh=3e-4)  # upgrade: learning rate of the further training
LARGER = PLACE/'enlarged'
STEPS, BATCH, LENGTH = 100, 4, 128                  # of the further training
SEEDS = range(3)
FIRST = 'gentle'                                    # the upgrade with all methods; on the others those of `SOME`
BACK = {'drift': 8, 'drift-64': 64}                 # method: ranks of the drift to take back
SOME = ('base', 'rescaled', 'carried', *BACK)
UNTRAINED = ('base', 'cross_lora', 'paper', 'rescaled', 'random', 'carried', 'refitted', *BACK)
TRIED = METHODS | {name: Method(name) for name in BACK} | {
    'carried+100': Method('carried', 100),
    'carried+refresh': Method('carried', teacher=True)}
FRESH = [(20, lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3)] + [(40, lr) for lr in (3e-4, 1e-3)]
GRIDS = {                                           # method: steps and learning rates to try
    'lora-100': FRESH,
    'paper+100': FRESH,
    'carried+100': [(0, 0.)] + [(20, lr) for lr in (1e-4, 3e-4, 1e-3)],
    'carried+refresh': [(20, lr) for lr in (1e-4, 3e-4, 1e-3)],
    'lora-all': [(40, lr) for lr in (1e-4, 3e-4, 1e-3, 3e-3)]}

def without_drift(experiment:Experiment, seed:int, rank:int) -> Adapter:
    "The carried adapter with some ranks of the drift taken back"
    carried = start_adapter(experiment, 'carried', seed)
    return take_back_drift(carried, experiment.alignment, experiment.old, experiment.new, rank)

START_ADAPTERS |= {name: partial(without_drift, rank=rank) for name, rank in BACK.items()}

def documents() -> tuple[list[str], list[str]]: # to train on, held out
    "Python's own documentation, which every Python has"
    texts = {} # a set that keeps the order
    for name in sorted(topics):
        for text in topics[name].split('\n\n'):
            if len(text) > 80: texts[text] = None
    texts = [*texts]
    return [text for i, text in enumerate(texts) if i % 10], texts[::10][:60]

def make_successor(upgrade:str, lr:float):
    "An enlargement that computes the same, or one that was trained further on other text"
    if not LARGER.is_dir(): enlarge(load_model(MODEL, **CPU), LARGER)
    if (PLACE/upgrade).is_dir(): return
    new = load_model(LARGER, **CPU)
    texts, held_out = documents()
    before = bits_per_byte(new, held_out, batch_size=4).mean().item()
    rows = pack_texts(new.tokenizer, texts, STEPS*BATCH, LENGTH)
    fit(new.model.train(), rows, new.tokenizer, STEPS, lr, batch_size=BATCH, progress=True)
    new.model.eval()
    after = bits_per_byte(new, held_out, batch_size=4).mean().item()
    print(f'bits per byte of held-out documentation: {before:.3f} -> {after:.3f}')
    with atomic_directory(PLACE/upgrade) as tmp:
        new.model.save_pretrained(tmp)
        new.tokenizer.save_pretrained(tmp)

def sum_example(x:int, y:int) -> dict[str, str]:
    "A short sum as a labelled example"
    return dict(instruction=f'What is {x} plus {y}?', input='', output=str(x + y), answer=str(x + y))

def sums() -> dict[str, list[dict]]:
    "The adapter's own 640 sums, and others that it never saw"
    rng = random.Random(0)
    seen = [(rng.randint(10, 59), rng.randint(10, 39)) for _ in range(640)]
    others = sorted({(x, y) for x in range(10, 60) for y in range(10, 40)} - {*seen})
    rng.shuffle(others)
    splits = dict(train=seen, validation=others[:60], inputs=others[60:360], test=others[360:560])
    return {split: [sum_example(*pair) for pair in pairs] for split, pairs in splits.items()}

class RealExperiment(Experiment):
    "An upgrade of the real model, as the laboratory sees it"
    @cached_property
    def data(self) -> dict[str, list[dict]]: return sums()
    @cached_property
    def old(self) -> Decoder: return load_model(MODEL, **CPU)
    @cached_property
    def new(self) -> Decoder: return load_model(PLACE/self.upgrade, **CPU)
    @cached_property
    def source(self) -> Adapter: return Adapter.load(ADAPTER)
    @cached_property
    def drift(self) -> float: return weight_change(load_model(LARGER, **CPU), self.new)

def plan(experiment:Experiment, do, rows:list[dict]):
    "All runs of an upgrade, in order"
    first = experiment.upgrade == FIRST
    untrained, grids = (UNTRAINED, GRIDS) if first else (SOME, {})
    runs = len(untrained) + sum(len(grid) + len(SEEDS) for grid in grids.values())
    with tqdm(total=runs, desc=experiment.upgrade) as bar:
        def go(name):
            def run(*how):
                bar.set_description(f'{experiment.upgrade}: {name}')
                do(name, TRIED[name], *how)
                bar.update()
            return run
        for name in untrained: go(name)('test', 0, 0., 0)
        for name, grid in grids.items():
            tune_and_test(method_search(name, TRIED[name], grid), go(name), rows, SEEDS)

def main():
    say('SmolLM2-135M from its wheel')
    prepare()
    say('a LoRA for short sums')
    train(load_model(MODEL, **CPU))
    runs = []
    for upgrade in RATES:
        say(f'the upgrade {upgrade}')
        make_successor(upgrade, RATES[upgrade])
        file = PLACE/'runs'/f'{upgrade}.jsonl'
        record_experiment(RealExperiment(upgrade, 'additions', PLACE), file, plan)
        runs += read_records(file)['runs']
    collect(runs, RESULTS, 'make hop')

if __name__ == '__main__': main()
