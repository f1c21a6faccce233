"""Where a carried adapter loses its skill: by role, by depth, by what moved; and what mends it without labels

One real model of 135M parameters, its enlargement after three strengths of further training, and two tasks: sums, whose
answers are written, and words, which are called good or bad. Every score is kept as soon as it is made.
"""
from real import ADAPTER, CACHE, CPU, download, MODEL, prepare, say, train
import random, zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, cached_property, partial
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from hop import documents, LARGER, make_successor, PLACE, RATES, sums
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align, Alignment
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.drift import take_back_drift
from lorasuite.stages.transfer import transfer, transfer_updates
from lorasuite.training.evaluate import bits_per_byte
from lorasuite.training.finetune import finetune
from lorasuite.training.prompts import Renderer
from lorasuite.training.refresh import answer_rows, distillation_data, predict_answers, refresh
from lorasuite.training.synthesize import synthesize
from lorasuite.lab.refit import paired_positions, record_inputs, refit
from lorasuite.lab.store import collect, RunLog

LEXICON = 'vaderSentiment==3.3.2'           # words with a mean judgement of ten people from -4 to 4, MIT licence
FILE, RESULTS = CACHE/'attribution.jsonl', data_dir()/'attribution.json'
KEY = ('drift', 'task', 'what', 'part')
DRIFTS = dict(gentle=RATES['gentle'], middle=1.2e-4, harsh=RATES['harsh'])
TASKS = ('sums', 'words')
CLEAR = 1.5                                 # a word is taken where the mean judgement is so far from 0
DEPTHS = 4                                  # parts of the depth
LR, STEPS = 1e-3, 40                         # of the training on all labels
QUESTIONS = 60                              # to test on
STRENGTH = .1                               # of a refit
RANKS = (1, 8, 64)                          # of the drift, taken back
STRENGTHS = (1.25, 1.5)                     # of the whole carried adapter
ASKED, LEARNED = 64, 8                       # questions of a refresh, and how many in a step
BATCH = 10                                  # questions at a time

# ---- the task of words

def judged_words() -> list[tuple[str, float]]:
    "Words with their judgement, from the lexicon's wheel"
    archive, = download(CACHE/'lexicon', LEXICON)
    with zipfile.ZipFile(archive) as wheel:
        lines = wheel.read('vaderSentiment/vader_lexicon.txt').decode().splitlines()
    found = [line.split('\t')[:2] for line in lines]
    return [(word, float(mean)) for word, mean in found if word.isalpha() and word.islower()]

def word_example(word:str, good:bool) -> dict[str, str]:
    "A word as a labelled example"
    answer = 'good' if good else 'bad'
    return dict(instruction=f'Is "{word}" a good or a bad word?', input='', output=answer, answer=answer)

def words() -> dict[str, list[dict]]:
    "As many good words as bad ones"
    rng = random.Random(0)
    kinds = [[word for word, mean in judged_words() if sign*mean >= CLEAR] for sign in (1, -1)]
    rows = [word_example(word, good) for good, kind in zip((True, False), kinds) for word in rng.sample(kind, 450)]
    rng.shuffle(rows)
    return dict(train=rows[:640], validation=rows[640:700], test=rows[700:])

def specialist(task:str) -> Adapter:
    "An adapter of the old model, made once"
    if task == 'sums': return Adapter.load(ADAPTER)
    place = CACHE/'words'
    if not place.is_dir():
        finetune(load_model(MODEL, **CPU), words()['train'], steps=80, lr=1e-3, progress=True)[0].save(place)
    return Adapter.load(place)

# ---- parts of adapters, put where they do not belong

def exchanged(adapter:Adapter, other:Adapter, chosen:Callable[[str], bool]) -> Adapter:
    "An adapter with some updates of another one"
    updates = {path: pair for path, pair in adapter.updates.items() if not chosen(path)}
    return replace(adapter, updates=updates | {path: pair for path, pair in other.updates.items() if chosen(path)})

@contextmanager
def adding(decoder:Decoder, adapter:Adapter, part:Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator:
    "A model to whose projections something is added, made of their input and an update's factors"
    def hook(A, B): return lambda module, inputs, output: output + part(inputs[0], A, B)
    hooks = [decoder.model.get_submodule(path).register_forward_hook(hook(A.float(), B.float()))
             for path, (A, B) in adapter.updates.items()]
    try: yield decoder.model
    finally:
        for handle in hooks: handle.remove()

@torch.no_grad()
def answers(model:torch.nn.Module, decoder:Decoder, rows:list[dict]) -> list[tuple[list[float], bool]]:
    "Loss of each token of each answer in nats, and whether greedy decoding would give the answer"
    found = {}
    for i, logits, tokens in predict_answers(model, decoder.tokenizer, rows, BATCH):
        losses = cross_entropy(logits.float(), tokens, reduction='none').tolist()
        found[i] = losses, (logits.argmax(-1) == tokens).all().item()
    return [found[i] for i in range(len(rows))]

def answers_apart(inputs:Decoder, weights:Decoder, adapter:Adapter, rows:list[dict]) -> list[tuple[list[float], bool]]:
    "The answers of a model to which an adapter adds what it adds to another model"
    found, tape = [], deque()
    def record(x, A, B):
        tape.append(x@A.T@B.T)
        return tape[-1]
    def play(x, A, B): return tape.popleft()
    for i in range(0, len(rows), BATCH):
        some = rows[i:i+BATCH]
        with adding(inputs, adapter, record) as model: answers(model, inputs, some)
        with adding(weights, adapter, play) as model: found += answers(model, weights, some)
    return found

# ---- mends that need no question of the task, and a refresh on some of it

def rescaled(source:Adapter, carried:Adapter, alignment:Alignment, old:Decoder, new:Decoder) -> Adapter:
    "Each update at the scale at which it reads in general texts what it read on the old model"
    batches, batches2 = paired_positions(old, new, probe_texts())
    source, updates = source.named_for(alignment.old), {**carried.updates}
    places = [(pair, role) for pair in alignment.pairs for role in pair.old.modules]
    places = [(pair, role) for pair, role in places if old.path(pair.layers[0], role) in source.updates]
    read = record_inputs(old, source, batches, [(pair.layers[0], role) for pair, role in places])
    read2 = record_inputs(new, carried, batches2, [(pair.layers[1], role) for pair, role in places])
    for pair, role in places:
        layer, layer2 = pair.layers
        A, B = (t.double() for t in source.updates[old.path(layer, role)])
        A2, B2 = transfer_updates({role: (A, B)}, pair)[role]
        Z, Y = read[layer, role]@A.T, read2[layer2, role]@A2.T
        updates[new.path(layer2, role)] = A2.float(), (B2*(Z*Y).sum()/Y.square().sum()).float()
    return replace(carried, updates=updates)

def stronger(adapter:Adapter, factor:float) -> Adapter:
    "An adapter at another strength"
    return replace(adapter, updates={path: (A, B*factor) for path, (A, B) in adapter.updates.items()})

@torch.no_grad()
def drift_taken_back(carried:Adapter, before:Decoder, new:Decoder, rank:int) -> Adapter:
    "An adapter to which the largest part of its modules' drift is added, with the opposite sign"
    updates = {}
    for path, (A, B) in carried.updates.items():
        U, s, V = torch.svd_lowrank(before.model.get_submodule(path).weight - new.model.get_submodule(path).weight,
                                    rank + 8, niter=4)
        updates[path] = torch.cat([A, V.T[:rank].to(A)]), torch.cat([B, (U*s)[:, :rank].to(B)], 1)
    return replace(carried, updates=updates)

# ---- one upgrade and one task

class Case:
    "A drift and a task"
    def __init__(self, drift:str, task:str):
        self.drift, self.task, self.place, self.kept = drift, task, CACHE/'attribution', {}
        self.source, self.data = specialist(task), sums() if task == 'sums' else words()
        self.old, self.before, self.new = (load_model(path, **CPU) for path in (MODEL, LARGER, PLACE/drift))
        self.test = self.data['test'][:QUESTIONS]
        self.rows = answer_rows(Renderer.of(self.new), self.test)
        assert self.rows == answer_rows(Renderer.of(self.before), self.test)

    @cached_property
    def alignment(self) -> Alignment:
        "The maps, kept for both tasks"
        if not (self.place/self.drift).is_dir(): align(self.old, self.new).save(self.place/self.drift)
        return Alignment.load(self.place/self.drift)
    @cached_property
    def carried(self) -> Adapter: return transfer(self.source, self.alignment)

    @cached_property
    def trained(self) -> Adapter:
        "The carried adapter, trained on all labels"
        place = self.place/f'{self.drift}-{self.task}'
        if not place.is_dir():
            finetune(self.new, self.data['train'], self.carried, steps=STEPS, lr=LR, progress=True)[0].save(place)
        return Adapter.load(place)
    @cached_property
    def refitted(self) -> Adapter:
        "The carried adapter, refitted on general texts"
        return refit(self.source, self.alignment, self.old, self.new, probe_texts(), STRENGTH)

    @cached_property
    def written(self) -> list[dict]:
        "Questions that the specialist writes itself"
        return synthesize(self.old, self.source, ASKED)[0]
    def asked(self, kind:str) -> list[dict]:
        "Questions of a kind"
        if kind == 'written': return self.written
        other = words if self.task == 'sums' else sums
        return (self.data if kind == 'its own' else other())['train'][:ASKED]
    def found_drift(self, rank:int) -> Adapter:
        "The carried adapter with a part of the drift taken back that the weights of both models tell"
        return take_back_drift(self.carried, self.alignment, self.old, self.new, rank)
    @cache
    def lessons(self, kind:str) -> list[dict]:
        "What the specialist answers to questions of a kind"
        return distillation_data(self.old, self.asked(kind), self.source)
    def refreshed(self, kind:str, steps:int=20, lr:float=3e-4, drift:bool=False) -> Adapter:
        "The carried adapter after a refresh on questions of a kind, perhaps with the drift taken back before"
        start = self.found_drift(BACK) if drift else self.carried
        return refresh(self.new, self.lessons(kind), start, steps=steps, lr=lr, batch_size=LEARNED)[0]
    def refreshed_once(self, part:str) -> Adapter:
        "A refresh, kept for its price on text"
        if part not in self.kept: self.kept[part] = self.refreshed(**REFRESHES[part])
        return self.kept[part]

    def depth(self, path:str) -> int:
        "The part of the depth that a module belongs to, counted from 0"
        return int(path.removeprefix(f'{self.new.stack}.').partition('.')[0])*DEPTHS//self.new.layers
    def role(self, path:str) -> str:
        return next(role for role in self.new.roles if path.endswith(self.new.path(0, role).partition('.0.')[2]))

    def made(self, what:str, part:str) -> Adapter|None:
        "An adapter of the new model"
        if what == 'put': return exchanged(self.carried, self.trained, self.chosen(part))
        if what == 'taken': return exchanged(self.trained, self.carried, self.chosen(part))
        if part == 'refit': return self.refitted
        if part == 'refit of the last layers': return exchanged(self.carried, self.refitted, self.chosen(LAST))
        if part in REFRESHES: return self.refreshed_once(part)
        if part == 'scales': return rescaled(self.source, self.carried, self.alignment, self.old, self.new)
        name, _, number = part.rpartition(' ')
        if name == 'found drift': return self.found_drift(int(number))
        if name == 'drift': return drift_taken_back(self.carried, self.before, self.new, int(number))
        if name == 'strength': return stronger(self.carried, float(number))
        return dict(base=lambda: None, carried=lambda: self.carried, trained=lambda: self.trained)[part]()
    def chosen(self, part:str) -> Callable[[str], bool]:
        "Whether a module is of a role, or of a part of the depth"
        return lambda path: part in (self.role(path), f'depth {self.depth(path)}')

    def answered(self, what:str, part:str) -> list[tuple[list[float], bool]]:
        "The answers of one way"
        if what == 'moved':
            inputs, weights = (self.new if moves in part else self.before for moves in ('inputs', 'weights'))
            return answers_apart(inputs, weights, self.carried, self.rows)
        decoder = self.old if part == 'specialist' else self.new
        rows = answer_rows(Renderer.of(self.old), self.test) if part == 'specialist' else self.rows
        adapter = self.source if part == 'specialist' else self.made(what, part)
        if adapter is None: return answers(decoder.model, decoder, rows)
        with adapter.on(decoder) as model: return answers(model, decoder, rows)

    def row(self, what:str, part:str) -> dict:
        "How well a way answers: mean loss in nats, share of right answers, losses one by one and by place"
        tokens, right = zip(*self.answered(what, part))
        losses = [sum(x) for x in tokens]
        ends = [[x[0], sum(x[1:-1]), x[-1]] for x in tokens]
        return dict(drift=self.drift, task=self.task, what=what, part=part, loss=sum(losses)/len(losses),
                    accuracy=sum(right)/len(right), losses=[round(x, 3) for x in losses],
                    places=[sum(x)/len(x) for x in zip(*ends)])

    def texts(self, part:str) -> dict:
        "Bits per byte of held-out documentation, for which the model was trained on"
        decoder, adapter = (self.before, None) if part == 'before' else (self.new, self.made('mended', part))
        with adapter.on(decoder) if adapter else nullcontext():
            bits = bits_per_byte(decoder, documents()[1], batch_size=4).mean().item()
        return dict(drift=self.drift, task=self.task, what='texts', part=part, bits=bits)

LAST = f'depth {DEPTHS - 1}'
BACK = 8                                    # ranks of the drift before a refresh
FASTER, SLOWER, SLOWEST = 1e-3, 1e-4, 3e-5  # other learning rates of it
OWN = { # name: how the carried adapter is refreshed on questions of the task
    'refresh on its own questions': dict(kind='its own'),
    'slower refresh on its own questions': dict(kind='its own', lr=SLOWER),
    'faster refresh on its own questions': dict(kind='its own', lr=FASTER),
    'refresh after the drift': dict(kind='its own', drift=True),
    'slower refresh after the drift': dict(kind='its own', lr=SLOWER, drift=True),
    'slowest refresh after the drift': dict(kind='its own', lr=SLOWEST, drift=True)}
REFRESHES = { # the same with those on other questions
    'refresh on other questions': dict(kind='other'), 'refresh on written questions': dict(kind='written'),
    'longer refresh on written questions': dict(kind='written', steps=60),
    'written refresh after the drift': dict(kind='written', lr=SLOWER, drift=True), **OWN}

def parts(roles:tuple[str, ...]) -> Iterator[tuple[str, str]]:
    "All that is measured of a case: its kind, and what it is"
    yield from (('whole', part) for part in ('specialist', 'base', 'carried', 'trained'))
    yield from (('moved', part) for part in ('nothing', 'inputs', 'weights', 'inputs and weights'))
    places = *roles, *(f'depth {i}' for i in range(DEPTHS))
    yield from ((what, place) for what in ('put', 'taken') for place in places)
    drifts = [f'drift {rank}' for rank in RANKS]
    strengths = [f'strength {factor:g}' for factor in STRENGTHS]
    found = [f'found {drift}' for drift in drifts]
    mends = 'scales', 'refit', 'refit of the last layers', *drifts, *found, *strengths, *REFRESHES
    yield from (('mended', part) for part in mends)
    yield from (('texts', part) for part in ('before', 'base', 'carried', 'trained', *drifts, *found, *OWN))

def main():
    say('SmolLM2-135M from its wheel, and an adapter for each task')
    prepare()
    train(load_model(MODEL, **CPU))
    log = RunLog(FILE, KEY, 'make attribution')
    for drift, lr in DRIFTS.items():
        make_successor(drift, lr)
        for task in TASKS:
            case = Case(drift, task)
            for what, part in tqdm([*parts(case.new.roles)], f'{drift}, {task}'):
                make = case.texts if what == 'texts' else partial(case.row, what)
                log.add((drift, task, what, part), partial(make, part))
    collect(log.rows, RESULTS, 'make attribution')

if __name__ == '__main__': main()
