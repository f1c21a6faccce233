"""What CPU seconds buy after an upgrade: carried, the drift taken back, refreshed, refitted, or trained on labels

One real pair (a model of 135M parameters and an enlargement of it that was trained on) and four tiny ones. Every run
is kept as soon as it is made; started again, the command goes on with those that are missing.
"""
from real import ADAPTER, CACHE, MODEL, prepare, say, train
import random, time
from collections.abc import Iterator
from functools import cache
import torch
from hop import make_successor, PLACE, RATES, sums
from tqdm.auto import tqdm
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.lab.recipes import Experiment
from lorasuite.lab.refit import best_refit
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.drift import take_back_drift
from lorasuite.stages.transfer import transfer
from lorasuite.training.evaluate import evaluate
from lorasuite.training.examples import load_data
from lorasuite.training.finetune import finetune
from lorasuite.training.refresh import distillation_data, refresh
from lorasuite.training.rounds import refresh_in_rounds
from lorasuite.training.synthesize import synthesize
from lorasuite.lab.store import collect, RunLog, select_runs

FILE = CACHE/'minutes.jsonl'
RESULTS = data_dir()/'minutes.json'
KEY = ('pair', 'way', 'split', 'questions', 'steps', 'lr', 'seed')
CPU = dict(device=torch.device('cpu'), dtype=torch.float32)
SEEDS = range(2)
BACK, BACK_STEPS = 8, {5, 20, 100} # ranks of the drift to take back, and steps of refreshes after it
WRITTEN, WRITTEN_STEPS = 300, (40, 160) # questions that are written, and steps of refreshes on them
SHOWN = 5                               # questions that are shown where the base writes more of them
TUNED = 'gentle'                        # the pair whose refreshes have a rate of their own from either start
REFRESH_RATES = (1e-4, 3e-4, 1e-3)      # to choose from
PAIRS = { # pair: rate of a refresh; questions and steps of refreshes; steps and rates of LoRAs on 100 and on all labels
    'new': (1e-3, {64: (5, 10, 20, 50, 100, 200), 300: (5, 20, 100, 200)}, {100: 100, None: 300}, (1e-3, 3e-3, 1e-2)),
    'new-far': (1e-3, {64: (5, 10, 20, 50, 100, 200), 300: (5, 20, 100, 200)}, {100: 100, None: 300},
                (1e-3, 3e-3, 1e-2)),
    'stranger': (3e-3, {64: (20, 100, 200), 300: (20, 100, 200)}, {100: 100, None: 300}, (1e-3, 3e-3, 1e-2)),
    'back': (1e-3, {64: (5, 10, 20, 50, 100, 200), 300: (5, 20, 100, 200)}, {100: 400, None: 1200}, (1e-3, 3e-3)),
    'gentle': (3e-4, {64: (5, 10, 20, 40, 80), 300: (10, 40, 80)}, {100: 20}, (3e-4, 1e-3, 3e-3))}

TAUGHT = ('refreshed', 'drift refreshed', 'rounds', 'written', 'seeded') # ways that learn from lessons

def timed(make) -> tuple: # what was made, CPU seconds
    begin = time.process_time()
    made = make()
    return made, time.process_time() - begin

def parts_of(name:str) -> tuple: # old and new model, an adapter of the old one, data
    "What a pair is made of"
    if name == 'gentle': return load_model(MODEL, **CPU), load_model(PLACE/name, **CPU), Adapter.load(ADAPTER), sums()
    if name == 'back':
        found = Experiment(name, 'sums', CACHE/'minutes'/'lab')
        return found.old, found.new, found.source, found.data
    data = {split: load_data(data_dir()/'zoo'/f'{split}.jsonl') for split in ('train', 'validation', 'test')}
    return load_model('zoo/old'), load_model(f'zoo/{name}'), Adapter.load('zoo/adapter'), data

class Pair:
    "Two models, an adapter of the first, and a task"
    def __init__(self, name:str):
        self.name = name
        self.rate, self.refreshes, self.labels, self.rates = PAIRS[name]
        self.old, self.new, self.source, self.data = parts_of(name)
        self.data = dict(inputs=self.data['train']) | self.data
        self.rank = max(len(A) for A, _ in self.source.updates.values())

    @cache
    def alignment(self) -> Alignment:
        "The maps, kept beside the runs"
        file = CACHE/'minutes'/self.name
        if not file.is_dir(): align(self.old, self.new).save(file)
        return Alignment.load(file)
    @cache
    def carried(self) -> Adapter: return transfer(self.source, self.alignment())
    @cache
    def mended(self) -> tuple: # the carried adapter with drift taken back, CPU seconds
        return timed(lambda: take_back_drift(self.carried(), self.alignment(), self.old, self.new, BACK))
    def asked(self, way:str, questions:int, seed:int) -> list[dict]: # questions of the task, or written ones
        draw = random.Random(seed)
        if way == 'written': return synthesize(self.old, self.source, questions, seed=seed)[0]
        if way != 'seeded': return draw.sample(self.data['inputs'], questions)
        seeds = draw.sample(self.data['inputs'], SHOWN)
        return seeds + synthesize(self.old, self.source, questions - SHOWN, seed=seed, seeds=seeds)[0]
    @cache
    def lessons(self, way:str, questions:int, seed:int) -> tuple: # lessons, CPU seconds
        return timed(lambda: distillation_data(self.old, self.asked(way, questions, seed), self.source))
    def taught(self, way:str, questions:int, seed:int) -> tuple: # lessons that ways may share, CPU seconds
        return self.lessons(way if way in ('written', 'seeded') else 'real', questions, seed)

    def make(self, way:str, questions:int, steps:int, lr:float, seed:int) -> tuple: # adapter, CPU seconds before, steps
        "Make a specialist"
        start = None if self.name == 'stranger' else self.carried()
        if way in ('base', 'specialist'): return None, 0., 0
        if way == 'carried': return self.carried(), 0., 0
        if way == 'drift': return *self.mended(), 0
        if way == 'refitted':
            asked = random.Random(seed).sample(self.data['inputs'], questions)
            return best_refit(self.source, self.alignment(), self.old, self.new, asked), 0., 0
        how = dict(lr=lr, rank=self.rank, seed=seed)
        if way == 'labels':
            rows = random.Random(seed).sample(self.data['train'], questions) if questions else self.data['train']
            return finetune(self.new, rows, steps=steps, **how)[0], 0., steps
        taught, seconds = self.taught(way, questions, seed)
        if way == 'drift refreshed':
            start, more = self.mended()
            seconds += more
        if way != 'rounds':
            return refresh(self.new, taught, start, steps=steps, batch_size=8, **how)[0], seconds, steps
        adapter, run = refresh_in_rounds(self.new, taught, start, **how)
        return adapter, seconds, len(run)

    def row(self, way:str, split:str, questions:int|None, steps:int, lr:float, seed:int) -> dict:
        "A run, and how well its specialist answers"
        if way in TAUGHT: self.taught(way, questions, seed)
        if way in ('drift', 'drift refreshed'): self.mended()
        (adapter, before, made), seconds = timed(lambda: self.make(way, questions, steps, lr, seed))
        old = way == 'specialist'
        score = evaluate(self.old if old else self.new, self.data[split], self.source if old else adapter)
        return dict(pair=self.name, way=way, split=split, questions=questions, steps=steps, lr=lr, seed=seed,
                    made=made, before=round(before, 2), seconds=round(seconds, 2), accuracy=score.accuracy)

def best_rate(pair:Pair, rows:list[dict], way:str, questions:int|None) -> float:
    "The rate that was best on validation questions, of equal ones the lowest"
    tried = select_runs(rows, pair=pair.name, way=way, split='validation', questions=questions)
    return max(sorted(tried, key=lambda row: row['lr']), key=lambda row: row['accuracy'])['lr']

def rates_of_refreshes(pair:Pair, rows:list[dict]) -> Iterator[tuple]: # last the rates of both starts
    "Choose the rates of refreshes from the carried adapter, and from that with drift taken back"
    if pair.name != TUNED: return pair.rate, pair.rate/3
    for way in ('refreshed', 'drift refreshed'):
        yield from ((way, 'validation', 64, 20, lr, 100) for lr in REFRESH_RATES)
    return [best_rate(pair, rows, way, 64) for way in ('refreshed', 'drift refreshed')]

def runs_of(pair:Pair, rows:list[dict]) -> Iterator[tuple]:
    "The runs of a pair, cheap ones first; what is tuned has the rate that was best on validation questions"
    yield from (('specialist', 'test', 0, 0, 0., 0), ('base', 'test', 0, 0, 0., 0))
    related = pair.name != 'stranger'
    if related: yield from (('carried', 'test', 0, 0, 0., 0), ('drift', 'test', 0, 0, 0., 0))
    rate, rate_after = yield from rates_of_refreshes(pair, rows)
    for questions, steps in pair.refreshes.items():
        yield from (('refreshed', 'test', questions, n, rate, seed) for seed in SEEDS for n in steps)
        after = sorted(BACK_STEPS.intersection(steps)) if related else []
        yield from (('drift refreshed', 'test', questions, n, rate_after, seed) for seed in SEEDS for n in after)
        yield from (('rounds', 'test', questions, 0, rate, seed) for seed in SEEDS)
    real = pair.name == TUNED
    for n in WRITTEN_STEPS[:1] if real else WRITTEN_STEPS:
        yield from (('written', 'test', WRITTEN, n, rate, seed) for seed in SEEDS)
        if real: yield from (('seeded', 'test', WRITTEN, n, rate, seed) for seed in SEEDS)
    for labels, steps in pair.labels.items():
        yield from (('labels', 'validation', labels, steps, lr, 100) for lr in pair.rates)
        best = best_rate(pair, rows, 'labels', labels)
        yield from (('labels', 'test', labels, steps, best, seed) for seed in SEEDS)
    if related: yield from (('refitted', 'test', 64, 0, 0., seed) for seed in SEEDS)

def main():
    say('SmolLM2-135M from its wheel, its adapter for sums, and its successor')
    prepare()
    train(load_model(MODEL, **CPU))
    make_successor('gentle', RATES['gentle'])
    log = RunLog(FILE, KEY, 'make minutes')
    for name in PAIRS:
        pair = Pair(name)
        for how in tqdm(runs_of(pair, log.rows), name):
            way, split, questions, *rest = how
            log.add((name, *how), lambda: pair.row(way, split, questions, *rest))
    collect(log.rows, RESULTS, 'make minutes')

if __name__ == '__main__': main()
