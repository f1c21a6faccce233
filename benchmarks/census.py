"""A census: what becomes of an adapter in every architecture that transformers has

Each architecture is built tiny and random, given a LoRA on all linear maps by PEFT, and the LoRA is carried to the
same model and to one of another size. A verdict says whether its effect on the logits came through.
"""
import os
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import argparse, json, multiprocessing, re, shutil, sys, tempfile, time, traceback, warnings
from collections import Counter
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
import torch
import transformers
from peft import get_peft_model, LoraConfig, PeftModel
from torch import nn, Tensor
from transformers import PreTrainedModel
from lorasuite import align, load_model, transfer
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_skeleton
from lorasuite.lab.zoo import new_tokenizer
sys.path.insert(0, str(Path(__file__).parent))
from census_models import architectures, kind_of, model_class, tiny_model, TOKENS
from census_tables import INPUTS, PARTS

RESULTS = data_dir()/'census.json'
LIMIT = 120         # seconds for one architecture
EXACT = 1e-5        # relative error of the effect on the logits, or what rounding does to it
RANK = 4
EFFECT = .1, .5     # how large an effect is to be, relative to the logits
TEXTS = ['The old lighthouse keeper climbed the stairs every evening to light the lamp.',
         'What is 14 plus 23? 37', 'She opened the letter slowly.', 'def mean(xs): return sum(xs)/len(xs)']
VERDICTS = ('exact', 'exact_named', 'wrong', 'lost', 'refused', 'crash', 'build_failed', 'timeout')
PREFIX = 'base_model.model.'

# ---- models and adapters on disk

@cache
def tokenizer_folder() -> Path:
    "A directory with a tiny tokenizer, made once"
    folder = Path(tempfile.mkdtemp(prefix='census-tokenizer-'))
    new_tokenizer(TOKENS, seed=1).save_pretrained(folder)
    return folder

def save_model(key:str, extra:dict, size:str, folder:Path):
    "Build a tiny model and write it with its tokenizer"
    tiny_model(key, extra, size).save_pretrained(folder)
    for file in tokenizer_folder().iterdir(): shutil.copy(file, folder)

def read_model(key:str, folder:Path) -> PreTrainedModel:
    "The model as its own class reads it"
    return model_class(key).from_pretrained(folder, dtype=torch.float32, attn_implementation='eager').eval()

def linear_leaves(model:PreTrainedModel) -> list[str]:
    "The last names of all linear maps but the output embedding"
    head = model.get_output_embeddings()
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return sorted({n if n.rpartition('.')[2].isdigit() else n.rpartition('.')[2] for n in found})

def plain_paths(model:PreTrainedModel) -> list[str]:
    "The paths of what is a linear map and nothing more, but for the output embedding"
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]

def adapted(key:str, folder:Path, targets='all-linear') -> tuple[PreTrainedModel, PeftModel, list[str]]:
    "A model, an untrained LoRA on all its linear maps, and what PEFT refused: then on maps by name without those"
    refused = []
    while True:
        model = read_model(key, folder) # PEFT leaves a model half adapted where it refuses
        settings = LoraConfig(r=RANK, lora_alpha=2*RANK, target_modules=targets)
        try: return model, get_peft_model(model, settings), refused
        except Exception as e: why = f'{type(e).__name__}: {e}'
        model = read_model(key, folder)
        if targets == 'all-linear': left = linear_leaves(model)
        else: left = [name for name in targets if f"'{name.rpartition('.')[2]}'" not in why]
        if left == targets or not left: left = plain_paths(model)
        if left == targets: raise ValueError(why)
        targets = left
        refused.append(why.partition('\n')[0].partition(' Incompatible')[0])

def lora_factors(model:PeftModel) -> list[tuple[str, Tensor]]:
    "The factors of all updates"
    return [(n, p) for n, p in model.named_parameters() if '.lora_' in n]

@torch.no_grad()
def randomise_adapter(model:PeftModel, seed:int=0):
    "Random A and B, as if they had been trained"
    torch.manual_seed(seed)
    for name, p in lora_factors(model): p.normal_(std=.1 if 'lora_B' in name else p.shape[-1]**-.5)

@torch.no_grad()
def temper(model:PeftModel, effect):
    "Scale B until the effect is clear but moderate"
    for _ in range(6):
        size = effect()
        if EFFECT[0] <= size <= EFFECT[1] or size == 0: return
        for name, p in lora_factors(model):
            if 'lora_B' in name: p.mul_(min(4, max(.2, .25/size)))

# ---- effects on the logits

def token_ids() -> Tensor: # (2, 24)
    "Random ordinary tokens"
    return torch.randint(2, TOKENS, (2, 24), generator=torch.Generator().manual_seed(0))

@torch.no_grad()
def logits(key:str, model:PreTrainedModel) -> Tensor:
    "What the text model says to random tokens"
    part = model.get_submodule(PARTS.get(key, ''))
    torch.manual_seed(0)
    extra = INPUTS[key](model.config) if key in INPUTS else {}
    out = part(input_ids=token_ids(), use_cache=False, **extra)
    return (out.logits if 'logits' in out else out.last_hidden_state).float()

def share(found:Tensor, true:Tensor) -> float:
    "The norm of one thing relative to another"
    return (found.norm()/true.norm().clamp_min(1e-30)).item()

def runs(key:str, model:PreTrainedModel) -> bool:
    "Can it be asked for logits?"
    try: logits(key, model)
    except Exception: return False
    return True

def make_adapter(key:str, folder:Path, place:Path) -> tuple[dict, list[str]]: # targets, what PEFT would not do
    "Write a random adapter of a model"
    base = read_model(key, folder)
    before = logits(key, base) if runs(key, base) else None
    if before is not None and not torch.equal(before, logits(key, read_model(key, folder))):
        raise ValueError('a model that is read twice gives two answers')
    plain = plain_paths(base)
    base, model, refused = adapted(key, folder)
    if not runs(key, base):
        refused.append('the model with a LoRA on all linear maps does not run: only on plain ones')
        base, model, more = adapted(key, folder, plain)
        refused += more
    randomise_adapter(model)
    if runs(key, base): temper(model, lambda: share(logits(key, base) - before, before))
    model.save_pretrained(place)
    torch.save(dict(config=model.peft_config['default'], factors=dict(lora_factors(model))), truth_file(place))
    return targets_of(model), refused

def truth_file(place:Path) -> Path: # the factors as they are in memory
    "Beside an adapter, what does not depend on how PEFT names and reads it"
    return place.with_suffix('.pt')

@torch.no_grad()
def as_made(base:PreTrainedModel, place:Path) -> PeftModel:
    "A model with the adapter that `make_adapter` made, without PEFT's reader, which loses some in silence"
    truth = torch.load(truth_file(place), weights_only=False)
    model = get_peft_model(base, truth['config'])
    for name, p in lora_factors(model): p.copy_(truth['factors'][name])
    return model.eval()

@torch.no_grad()
def adapter_effect(key:str, folder:Path, place:Path, without:dict[str, list]={}, load=PeftModel.from_pretrained
                   ) -> tuple[Tensor, Tensor]:
    "What an adapter adds to the logits without some of its updates, by default as PEFT loads it; and the logits"
    base = read_model(key, folder)
    before = logits(key, base)
    model = load(base, place)
    targets = targets_of(model)
    for name, p in lora_factors(model):
        path = name.removeprefix(PREFIX).rpartition('.lora_')[0]
        if 'lora_B' in name and path in without: silence(p, targets[path].experts, without[path])
    return logits(key, base) - before, before

@torch.no_grad()
def rounding_error(key:str, folder:Path, place:Path, without:dict[str, list], true:Tensor) -> float:
    "What changing the last bit of an adapter's numbers does to its effect: deep recurrences amplify it"
    def nudged(base, place):
        model = as_made(base, place)
        g = torch.Generator().manual_seed(0)
        for _, p in lora_factors(model): p.mul_(1 + 2**-24*torch.randn(p.shape, generator=g))
        return model
    return share(adapter_effect(key, folder, place, without, nudged)[0] - true, true)

# ---- accounts

class Target(NamedTuple):
    "What a pair of factors in PEFT's file updates"
    name:str    # path of a module, or of a parameter that holds several experts
    experts:int # how many; 0 for a module

def targets_of(model:PeftModel) -> dict[str, Target]: # path in PEFT's file: what is updated there
    "All modules and parameters that an adapter updates"
    found = {}
    for name, module in model.named_modules():
        path = name.removeprefix(PREFIX)
        if not getattr(module, 'lora_A', None) and not getattr(module, 'lora_embedding_A', None): continue
        parameter, experts = getattr(module, 'parameter_name', 'weight'), getattr(module, 'num_experts', 0)
        whole = path.replace('.base_layer', '')
        found[path] = Target(f'{whole}.{parameter}', experts) if experts > 1 else Target(whole, 0)
    return found

def silence(B:Tensor, experts:int, which:list[int]):
    "Zero the B of a whole update, or of some experts: PEFT's columns are (rank, experts)"
    if not experts: B.zero_()
    for expert in which: B.view(len(B), -1, experts)[..., expert] = 0

def named_in(target:Target, names) -> list[str]:
    "The names that speak of a target: its own, of one role in it, of one of its experts"
    return [n for n in names if n == target.name or n.startswith((f'{target.name} ', f'{target.name}['))]

def experts_in(names:list[str], experts:int) -> set[int]:
    "The experts that names speak of; a name without a number speaks of all"
    numbers = [re.search(r'\[(\d+)\]', n) for n in names]
    return {*range(experts)} if None in numbers else {int(n[1]) for n in numbers}

def account_one(target:Target, done, skipped) -> tuple[str, list[int]]: # what became of it, experts that were skipped
    "Was an update carried, skipped by name, partly both, or lost?"
    moved, named = named_in(target, done), named_in(target, skipped)
    if not target.experts and moved: return 'partly' if named else 'carried', []
    if not target.experts: return 'skipped' if named else 'lost', []
    gone = experts_in(named, target.experts)
    if len(experts_in(moved, target.experts) | gone) < target.experts: return 'lost', []
    return 'skipped' if gone else 'carried', sorted(gone)

def account(targets:dict[str, Target], carried:Adapter) -> dict[str, dict]: # fate: path in PEFT's file: skipped experts
    "What became of each update"
    done = carried.updates | carried.embeddings | carried.rows
    fates = dict(carried={}, skipped={}, partly={}, lost={})
    for path, target in targets.items():
        fate, gone = account_one(target, done, carried.skipped)
        fates[fate][path] = gone
    return fates

def by_reason(targets:list[Target], skipped:dict[str, str]) -> dict[str, dict]: # reason: kind of module: how many
    "Why updates were skipped, without the numbers of layers"
    kinds = {}
    for target in targets:
        name = next(iter(named_in(target, skipped)))
        why = re.sub(r'\d+', 'N', skipped[name].replace(name, '…').replace(target.name, '…'))
        kinds.setdefault(why, Counter())[re.sub(r'\d+', 'N', target.name)] += 1
    return {why: dict(found) for why, found in kinds.items()}

# ---- one architecture

def failure(e:BaseException) -> str:
    "An error in a line, and where it was raised"
    frames = traceback.extract_tb(e.__traceback__)
    where = next((f for f in reversed(frames) if 'lorasuite' in f.filename), frames[-1])
    said = re.sub(tempfile.gettempdir() + r'/tmp[a-z0-9_]+/', '', str(e))[:500]
    return f'{type(e).__name__}: {said} ({Path(where.filename).name}:{where.lineno})'

def peft_loses(key:str, folder:Path, place:Path) -> float|str: # share of the effect, or an error
    "How much of its own adapter PEFT loses between saving and loading"
    try: true, read = (adapter_effect(key, folder, place, load=f)[0] for f in (as_made, PeftModel.from_pretrained))
    except Exception as e: return failure(e)
    return round(share(read - true, true), 6)

def outcome(e:Exception) -> str: # `refused` or `crash`
    "A `ValueError` is an answer, anything else is none"
    return 'refused' if isinstance(e, ValueError) else 'crash'

def carry(old:Path, new:Path, place:Path) -> Adapter:
    "Carry an adapter by the public functions"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return transfer(Adapter.load(place), align(load_model(old), load_model(new), TEXTS))

def judge(key:str, folder:Path, place:Path, targets:dict[str, Target], carried:Adapter) -> dict: # of the entry
    "The verdict on a carried adapter, and what it rests on"
    fates = account(targets, carried)
    skipped = by_reason([targets[path] for path in fates['skipped']], carried.skipped)
    found = dict(carried=len(fates['carried']), skipped=skipped, partly=sorted(fates['partly']),
                 lost=sorted(fates['lost']))
    if fates['lost']: return found | dict(verdict='lost')
    carried.save(folder.parent/'carried')
    true, before = adapter_effect(key, folder, place, fates['skipped'], as_made)
    effect, _ = adapter_effect(key, folder, folder.parent/'carried')
    error, rounding = share(effect - true, true), rounding_error(key, folder, place, fates['skipped'], true)
    if share(true, before) == 0: return found | dict(verdict='exact_named' if share(effect, before) == 0 else 'wrong')
    named = fates['skipped'] or fates['partly']
    verdict = 'wrong' if not error <= max(EXACT, 10*rounding) else 'exact_named' if named else 'exact'
    return found | dict(effect=share(true, before), error=error, rounding=rounding, verdict=verdict)

def self_transfer(key:str, folder:Path, place:Path, targets:dict[str, Target]) -> dict: # of the entry
    "Carry an adapter to the model that it was made for"
    try: carried = carry(folder, folder, place)
    except Exception as e: return dict(verdict=outcome(e), why=failure(e))
    try: return judge(key, folder, place, targets, carried)
    except Exception as e: why = failure(e)
    return dict(verdict='crash' if runs(key, read_model(key, folder)) else 'build_failed', why=why)

def other_size(key:str, extra:dict, folder:Path, place:Path) -> str:
    "Carry an adapter to a larger model of the same architecture"
    new = folder.parent/'other'
    try: save_model(key, extra, 'other', new)
    except Exception as e: return f'build_failed: {failure(e)}'
    try: carried = carry(folder, new, place)
    except Exception as e: return f'{outcome(e)}: {failure(e)}'
    try:
        carried.save(folder.parent/'carried-other')
        effect, _ = adapter_effect(key, new, folder.parent/'carried-other')
        return 'ok' if effect.isfinite().all() else 'crash: the logits are not finite'
    except Exception as e: return f'crash: {failure(e)}'

def skeleton_seconds(folder:Path) -> float|str:
    "How long it takes to understand a model without its weights"
    start = time.perf_counter()
    try: load_skeleton(folder)
    except Exception as e: return f'{outcome(e)}: {failure(e)}'
    return round(time.perf_counter() - start, 3)

def examine(name:str, folder:Path, keep=lambda entry: None) -> dict: # entry of the census
    "All that the census asks of one architecture; `keep` is called on the way"
    key, extra = architectures()[name]
    start = time.perf_counter()
    entry = dict(name=name, key=key, kind='', model=model_class(key).__name__)
    entry.update(verdict='timeout', why='while it was built')
    old, place = folder/'old', folder/'adapter'
    keep(entry)
    try:
        entry['kind'] = kind_of(key)
        save_model(key, extra, 'old', old)
        targets, refused = make_adapter(key, old, place)
        entry.update(updates=len(targets), why='while it was carried')
        if refused: entry['peft'] = refused
    except Exception as e: return entry | dict(verdict='build_failed', why=failure(e))
    keep(entry)
    del entry['why']
    entry.update(peft_loses=peft_loses(key, old, place), understood_s=skeleton_seconds(old))
    entry.update(self_transfer(key, old, place, targets))
    keep(entry)
    entry['other_size'] = other_size(key, extra, old, place)
    return entry | dict(seconds=round(time.perf_counter() - start, 1))

# ---- all of them

def work(name:str, file:Path):
    "Examine one architecture in a process of its own; the entry is written to a file"
    quiet()
    def keep(entry): file.write_text(json.dumps(entry))
    with tempfile.TemporaryDirectory() as folder: keep(examine(name, Path(folder), keep))

def quiet():
    "Let the libraries keep silent"
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    for stream in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

class Job:
    "An architecture that is being examined"
    def __init__(self, name:str, folder:Path, limit:float):
        self.name, self.limit, self.start = name, limit, time.perf_counter()
        self.file = folder/(re.sub(r'\W', '_', name) + '.json')
        self.process = multiprocessing.get_context('fork').Process(target=work, args=(name, self.file))
        self.process.start()

    @property
    def over(self) -> bool: return not self.process.is_alive() or self.seconds > self.limit
    @property
    def seconds(self) -> float: return time.perf_counter() - self.start

    def entry(self) -> dict:
        "What was found out; a process that ended too early is a crash, one that was too slow a timeout"
        late = self.process.is_alive()
        if late: self.process.kill()
        self.process.join()
        entry = json.loads(self.file.read_text()) if self.file.is_file() else dict(name=self.name)
        if not late and self.process.exitcode: entry.update(verdict='crash', why=f'exit code {self.process.exitcode}')
        if late and entry['verdict'] != 'timeout': entry['other_size'] = 'timeout'
        return entry | dict(seconds=round(self.seconds, 1))

def examine_all(names:list[str], jobs:int, limit:float):
    "Yield the entries of architectures as they come"
    waiting, running = [*reversed(names)], []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs: running.append(Job(waiting.pop(), Path(folder), limit))
            time.sleep(.02)
            for job in [job for job in running if job.over]:
                running.remove(job)
                yield job.entry()

def versions() -> dict[str, str]:
    "What the census was taken with"
    return {name: version(name) for name in ('transformers', 'peft', 'torch')}

def read_results(file:Path) -> dict[str, dict]: # name: entry
    "The entries of an earlier, perhaps interrupted run with the same versions"
    if not file.is_file(): return {}
    results = json.loads(file.read_text())
    return {e['name']: e for e in results['entries']} if results['versions'] == versions() else {}

def write_results(file:Path, entries:dict[str, dict]):
    "Write all entries, one a line, by name"
    lines = ',\n'.join(json.dumps(entries[name], ensure_ascii=False) for name in sorted(entries))
    head = json.dumps(dict(date=str(date.today()), versions=versions()))[:-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix('.part')
    new.write_text(f'{head}, "entries": [\n{lines}\n]}}\n', encoding='utf-8')
    new.replace(file)

def summary(entries:list[dict]) -> str:
    "Verdicts over decoders, and over all"
    decoders = [e for e in entries if e['kind'] == 'decoder']
    lines = []
    for title, some in (('decoders', decoders), ('all', entries)):
        counts = Counter(e['verdict'] for e in some)
        shares = ', '.join(f'{v} {counts[v]} ({counts[v]/len(some):.0%})' for v in VERDICTS if counts[v])
        lines.append(f'{title} ({len(some)}): {shares}')
    sizes = Counter(e.get('other_size', 'none').partition(':')[0] for e in decoders)
    return '\n'.join([*lines, f'another size: {dict(sizes)}'])

def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', default='', help='regular expression that names must contain')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--limit', type=float, default=LIMIT, help='seconds for one architecture')
    parser.add_argument('--again', action='store_true', help='examine also what the output has already')
    return parser.parse_args()

def main():
    args = arguments()
    torch.set_num_threads(1)
    entries = read_results(args.out)
    wanted = [n for n in architectures() if re.search(args.only, n)]
    todo = [n for n in wanted if args.again or n not in entries]
    tokenizer_folder()
    for i, entry in enumerate(examine_all(todo, args.jobs, args.limit), 1):
        entries[entry['name']] = entry
        write_results(args.out, entries)
        why = entry.get('why', '')[:110]
        print(f"{i}/{len(todo)} {entry['name']}: {entry['verdict']} {entry['seconds']} s {why}", flush=True)
    shutil.rmtree(tokenizer_folder())
    print(summary([entries[n] for n in wanted if n in entries]))

if __name__ == '__main__': main()
