"""The figures of the page on speed: ratios of things that run in turn in one run

`make bench` runs every comparison in a process of its own, on one thread, and keeps its result in build/bench:
started again, it goes on with those that are missing. `python benchmarks/bench.py NAME…` runs some; `--large` adds the
one at 7B → 8B shapes, which takes half an hour. What is measured is CPU time; after a warm-up every arm runs several
times, in turn.
"""
import argparse, json, os, resource, statistics, subprocess, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD, RESULTS = ROOT/'build'/'bench', ROOT/'lorasuite'/'data'/'benchmarks.json'
BASELINE = 'bd7a15a' # the last build before models were visited block by block
PEERS = ('torch-cka==0.21', 'ckatorch==1.0.3', 'pytorch-cka==1.1.3', 'lapx==0.11.1')

# ---- how things are measured

def timed(call):
    "CPU seconds of a call, and what it returns"
    start = time.process_time()
    found = call()
    return time.process_time() - start, found

def in_turn(arms, repeats=3, warm_up=True):
    "CPU seconds of every arm, each run in turn, and what each returned last"
    if warm_up:
        for call in arms.values(): call()
    seconds, found = {name: [] for name in arms}, {}
    for _ in range(repeats):
        for name, call in arms.items():
            spent, found[name] = timed(call)
            seconds[name].append(spent)
    return seconds, found

def process(code, *args, path=ROOT):
    "CPU seconds and peak memory in GB of Python code in a process of its own, with another source tree"
    start = 'import sys; sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]\n'
    environment = os.environ | dict(PYTHONPATH=str(path), OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    end = '\nimport re, time\n' # `ru_maxrss` would begin with the memory of the process that started this one
    end += 'peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]\n'
    end += 'print(time.process_time(), int(peak)/1e6)'
    call = [sys.executable, '-c', start + code + end, *map(str, args)]
    done = subprocess.run(call, env=environment, cwd=path, text=True, capture_output=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return tuple(map(float, done.stdout.split()[-2:]))

def baseline():
    "The source tree of the build that is compared with"
    folder = BUILD/BASELINE
    if not folder.exists():
        folder.mkdir(parents=True)
        packed = subprocess.run(['git', 'archive', BASELINE, 'lorasuite'], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(['tar', '-x', '-C', folder], input=packed.stdout, check=True)
    return folder

def peers():
    "Packages of others, in a folder of their own"
    folder = BUILD/'peers'
    if not folder.exists():
        pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '-q', '--no-deps']
        subprocess.run([*pip, '--target', folder, *PEERS], check=True)
    sys.path.append(str(folder))

def model(shape, name, **changes):
    "A random model, made once"
    from shapes import make
    return make(BUILD/'models'/name, shape, **changes)

# ---- whole alignments, against the build before

def aligned(old, new, repeats):
    "`align` of two models by both builds, each in a process of its own"
    now = 'from lorasuite.stages.alignment import align; align(*sys.argv[1:3])'
    before = 'from lorasuite.transfer import align; align(*sys.argv[1:3])'
    runs = {'lorasuite': [], f'build {BASELINE}': []}
    for _ in range(repeats):
        runs['lorasuite'].append(process(now, old, new))
        runs[f'build {BASELINE}'].append(process(before, old, new, path=baseline()))
    return dict(seconds={name: [cpu for cpu, _ in found] for name, found in runs.items()},
                gb={name: max(gb for _, gb in found) for name, found in runs.items()})

def align_small():
    "Two models of the shapes of SmolLM-135M: 30 layers, 49,152 tokens"
    import torch
    old, new = (model('smollm-135m', f'small{seed}', seed=seed, dtype=torch.float32) for seed in (0, 1))
    return aligned(old, new, repeats=1)

def align_depths():
    "Two models of 8 layers against two of 32, otherwise of the shapes of SmolLM-135M, with 4,096 tokens"
    import torch
    now, found = 'from lorasuite.stages.alignment import align; align(*sys.argv[1:3])', {}
    for layers in (8, 32):
        changes = dict(layers=layers, vocab_size=4096, dtype=torch.float32)
        pair = [model('smollm-135m', f'deep{layers}-{seed}', seed=seed, **changes) for seed in (0, 1)]
        found[f'{layers} layers'] = process(now, *pair)
    return dict(seconds={name: [cpu] for name, (cpu, _) in found.items()},
                gb={name: gb for name, (_, gb) in found.items()})

def align_large():
    "The shapes of Llama-2-7B and Llama-3-8B, 2 layers of each"
    old, new = model('llama-2-7b', 'large0', layers=2), model('llama-3-8b', 'large1', layers=2, seed=1)
    return aligned(old, new, repeats=1)

# ---- CKA, against packages

def recorded_models(layers, batches, rows, width):
    "Modules that give activations back which were recorded, so that only the comparison costs anything"
    import torch
    from torch import nn
    class Recorded(nn.Module):
        def __init__(self): super().__init__(); self.at = 0
        def forward(self, x): return self.kept[self.at]
    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            g = torch.Generator().manual_seed(seed)
            self.layers = nn.ModuleList(Recorded() for _ in range(layers))
            base = torch.randn(batches, rows, width, generator=torch.Generator().manual_seed(0))
            for layer in self.layers: layer.kept = base + torch.randn(base.shape, generator=g)
        def forward(self, x):
            for layer in self.layers:
                layer.at = int(x[0, 0])
                found = layer(x)
            return found
    return Model(1), Model(2)

def compare_ours(one, other):
    "The table of CKA as `cka_table` computes it"
    import torch
    from lorasuite.stages.cka import _cosines_of_features, centred_features
    batches = zip(*(zip(*(layer.kept for layer in m.layers)) for m in (one, other)))
    by_batch = lambda parts: torch.stack([centred_features(x) for x in parts])
    return _cosines_of_features((by_batch(a), by_batch(b)) for a, b in batches)

def compare_pytorch_cka(one, other, data):
    "The same by pytorch-cka"
    from cka import compute_cka
    names = [f'layers.{i}' for i in range(len(one.layers))]
    return compute_cka(one, other, data, layers=names, device='cpu', progress=False)[0]

def compare_torch_cka(one, other, data):
    "The same by torch-cka"
    import contextlib, io, warnings
    from torch_cka import CKA
    names = [f'layers.{i}' for i in range(len(one.layers))]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        found = CKA(one, other, model1_layers=names, model2_layers=names, device='cpu')
        found.compare(data, data)
    return found.hsic_matrix

def cka():
    "A table of 24 × 24 layers over 4 batches of 256 rows, 1,024 wide"
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    peers()
    one, other = recorded_models(24, 4, 256, 1024)
    data = DataLoader(TensorDataset(torch.arange(4.).repeat_interleave(256)[:, None]), 256)
    arms = {'lorasuite': partial(compare_ours, one, other),
            'pytorch-cka 1.1.3': partial(compare_pytorch_cka, one, other, data),
            'torch-cka 0.21': partial(compare_torch_cka, one, other, data)}
    seconds, found = in_turn(arms)
    return dict(seconds=seconds, difference={name: (table - found['lorasuite']).abs().max().item()
                                             for name, table in found.items()})

# ---- heads and updates of one layer, against the published formula as it is written

PAIRS = { # old and new: hidden size, heads, key-value heads, head size
    'Pythia 1B → 1.4B': ((2048, 8, 8, 256), (2048, 16, 16, 128)),
    'Bloomz 560M → 1.1B': ((1024, 16, 16, 64), (1536, 16, 16, 96)),
    'Llama 2 7B → Llama 3 8B': ((4096, 32, 32, 128), (4096, 32, 8, 128)),
    'Qwen 1.5 1.8B → 2.5 3B': ((2048, 16, 16, 128), (2048, 16, 2, 128)),
    'MiniCPM S 1B → 2B': ((1536, 24, 8, 64), (2304, 36, 36, 64))}

def one_block(hidden, heads, kv_heads, head_size):
    "A random model of one layer with a small vocabulary and MLP, and its block in 32 bits"
    import torch
    from shapes import random_model
    from transformers import LlamaConfig
    from lorasuite.core.block import read_block
    from lorasuite.core.model import Decoder
    config = LlamaConfig(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         head_dim=head_size, num_hidden_layers=1, intermediate_size=64, vocab_size=64)
    decoder = Decoder(random_model(config, torch.float32, 'cpu', hidden), name='random')
    return decoder, read_block(decoder, 0, torch.float32)

def partners_of(old, new, H):
    "Partners of heads by the published similarity"
    from lorasuite.stages.head_mapping import match
    from lorasuite.stages.paper import paper_head_similarity
    return match(paper_head_similarity(old[1], new[1], H))

def factored(old, new, H, updates):
    "Partners of heads and the carried updates of q, k, v and o, without a matrix of hidden × hidden numbers"
    from lorasuite.core.model import model_info
    from lorasuite.stages.alignment import Pair
    from lorasuite.stages.block_maps import BlockMaps, norm_gains
    from lorasuite.stages.head_mapping import match
    from lorasuite.stages.paper import _paper_heads, _paper_rows, _published_similarity
    from lorasuite.stages.transfer import transfer_updates
    rows, rows2 = _paper_rows(old[1], H), _paper_rows(new[1])
    partners = match(_published_similarity(rows, rows2))
    maps = _paper_heads(rows, rows2, partners)
    maps = BlockMaps(dict(heads=partners), maps, norm_gains(old[1], new[1])).to(H.dtype)
    infos = [model_info(decoder).blocks[0] for decoder, _ in (old, new)]
    pair = Pair((0, 0), maps, *infos, H, H.T)
    return transfer_updates(updates, pair)

def dense_seconds(old, new, H):
    "CPU seconds of one layer as the formula is written: one of every kind of step measured, times how many there are"
    import torch
    (q, k, v, o), (q2, k2, v2, o2) = ([b.by_head(role, fold=False)[0] for role in 'qkvo'] for b in (old[1], new[1]))
    heads, heads2 = old[1].found.heads, new[1].found.heads
    first, matrices = timed(lambda: [H.T@a.T@b@H for a, b in ((q, k), (v, o))])
    second, matrices2 = timed(lambda: [a.T@b for a, b in ((q2, k2), (v2, o2))])
    flat, flat2 = (torch.cat([X.flatten() for X in some]) for some in (matrices, matrices2))
    third, _ = timed(lambda: torch.cosine_similarity(flat, flat2, 0))
    fourth, _ = timed(lambda: torch.linalg.svd(matrices2[0] + matrices[0]))
    return heads*first + heads2*second + heads*heads2*third + 4*fourth

def heads(name):
    "One layer of one pair: heads matched, updates of rank 32 carried"
    import torch
    old, new = (one_block(*shape) for shape in PAIRS[name])
    g = torch.Generator().manual_seed(0)
    H = torch.randn(old[1].hidden, new[1].hidden, generator=g)/new[1].hidden**.5
    updates = {role: (torch.randn(32, W.shape[1], generator=g), torch.randn(len(W), 32, generator=g))
               for role, W in ((role, old[1].stored(role)) for role in 'qkvo')}
    seconds, _ = in_turn({'lorasuite': partial(factored, old, new, H, updates)})
    return dict(seconds=seconds | {'as it is written': [dense_seconds(old, new, H)]})

# ---- matching and rotations, against scipy and others

def similarities(n, noise, seed=0):
    "Cosines of n units with the same units in another order and with noise, or with others"
    import torch
    g = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(n, 256, generator=g), torch.randn(n, 256, generator=g)
    if noise is not None: Y = X[torch.randperm(n, generator=g)] + noise*Y
    normalise = torch.nn.functional.normalize
    return normalise(X, dim=1)@normalise(Y, dim=1).T

def matching(n, noise):
    "The best assignment of a table of cosines"
    import lap, torch
    from scipy.optimize import linear_sum_assignment
    from lorasuite.stages.head_mapping import match
    table = similarities(n, noise)
    total = lambda rows, columns: table[rows, columns].double().sum().item()
    def ours():
        source = match(table)
        return total(source, torch.arange(n))
    def scipy(): return total(*map(torch.from_numpy, linear_sum_assignment(table.numpy(), maximize=True)))
    def lapx(): return total(torch.arange(n), torch.from_numpy(lap.lapjv(-table.double().numpy())[1]).long())
    seconds, found = in_turn(dict(lorasuite=ours, scipy=scipy, lapx=lapx))
    return dict(seconds=seconds, difference={name: abs(x - found['lorasuite'])/n for name, x in found.items()})

def match_descended():
    "4,096 neurons of a descended model"
    peers()
    return matching(4096, .5)

def match_unrelated():
    "2,048 neurons of an unrelated model"
    peers()
    return matching(2048, None)

def polar():
    "The rotation of a stream of 2,048, condition 1e4"
    import torch
    from lorasuite.stages.transfer_matrix import polar_factor
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(2048, 2048, generator=g, dtype=torch.float64))[0] for _ in range(2))
    C = U*torch.logspace(0, -4, 2048, dtype=torch.float64)@V.T
    def svd():
        U, _, Vt = torch.linalg.svd(C)
        return U@Vt
    seconds, found = in_turn({'lorasuite': lambda: polar_factor(C)[0], 'svd': svd}, repeats=2, warm_up=False)
    return dict(seconds=seconds, difference={name: (X - U@V.T).norm().item()/2048**.5 for name, X in found.items()})

# ---- adapters

def wide_alignment():
    "An alignment at the shapes of Llama-2-7B and Llama-3-8B with all 32 layers, whose maps are those of one"
    from lorasuite.stages.alignment import align, Alignment
    folder = BUILD/'wide'
    if not folder.exists():
        few = dict(layers=1, vocab_size=5000)
        found = align(model('llama-2-7b', 'wide0', **few), model('llama-3-8b', 'wide1', seed=1, **few))
        def deep(info): return replace(info, blocks=info.blocks*32)
        replace(found, layers=[(i, i) for i in range(32)], blocks=found.blocks*32, cka=found.cka.new_ones(32, 32),
                old=deep(found.old), new=deep(found.new)).save(folder)
    return Alignment.load(folder)

def wide_adapter(info):
    "A LoRA of rank 32 for all seven roles of all layers"
    import torch
    from lorasuite.core.adapter import Adapter
    g, updates = torch.Generator().manual_seed(0), {}
    for layer, block in enumerate(info.blocks):
        for role, path in block.modules.items():
            out, in_ = block.shapes[role]
            A, B = torch.randn(32, in_, generator=g), .01*torch.randn(out, 32, generator=g)
            updates[f'{info.stack}.{layer}.{path}'] = A, B
    return Adapter(updates, info.name, info.layers)

def one_adapter():
    "One more adapter at 7B → 8B: rank 32, seven roles, 32 layers; beside it, its file is read and one is written"
    import shutil
    from safetensors.torch import load_file, save_file
    from lorasuite.stages.transfer import transfer
    from lorasuite.core.adapter import Adapter
    alignment = wide_alignment()
    source = BUILD/'adapter'
    if not source.exists(): wide_adapter(alignment.old).save(source)
    def carry():
        out = BUILD/'carried'
        if out.exists(): shutil.rmtree(out)
        transfer(Adapter.load(source), alignment).save(out)
    def copy():
        tensors = load_file(source/'adapter_model.safetensors')
        save_file({name: t.clone() for name, t in tensors.items()}, BUILD/'copy.safetensors')
    seconds, _ = in_turn({'lorasuite': carry, 'read and write': copy})
    return dict(seconds=seconds)

# ---- training

def tiny_training(layers, hidden):
    "A model with a LoRA, and rows to train on"
    from lorasuite.core.loading import load_model
    from lorasuite.training.examples import encode, load_data
    folder = model('smollm-135m', f'training{hidden}', layers=layers, hidden_size=hidden, vocab_size=4096,
                   num_attention_heads=hidden//64, num_key_value_heads=hidden//192, intermediate_size=hidden*8//3)
    import torch
    decoder = load_model(folder, torch.device('cpu'), torch.float32)
    rows = [encode(e, decoder.tokenizer) for e in load_data('zoo/train.jsonl')[:64]]
    return decoder, rows

def with_lora(decoder, config=None):
    "A fresh LoRA on a copy of a model"
    import copy
    from peft import get_peft_model, LoraConfig
    config = config or LoraConfig(r=8, target_modules='all-linear', task_type='CAUSAL_LM')
    return get_peft_model(copy.deepcopy(decoder.model), config)

def bare_loop(decoder, rows, steps, config=None, after=None):
    "The same steps in a plain loop of PyTorch"
    import torch
    from transformers import DataCollatorForSeq2Seq
    peft = with_lora(decoder, config)
    pad = DataCollatorForSeq2Seq(decoder.tokenizer, padding=True)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0)
    peft.train()
    for step in range(steps):
        batch = pad([dict(row) for row in rows[step*16 % 64:][:16]])
        loss = peft(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.)
        optimizer.step()
        if after: after(peft, step)
        optimizer.zero_grad()
        loss.item()

def our_loop(decoder, rows, steps, method=None, loss=None):
    "Steps by `fit`"
    from lorasuite.training.trainer import fit
    peft = with_lora(decoder)
    callbacks = [method(peft)] if method else []
    fit(peft, rows, decoder.tokenizer, steps, 1e-4, callbacks=callbacks, loss=loss)

def steps_of(arms, few=2, more=12):
    "Seconds of a step: a run of few steps is taken off a run of more, so that what happens once does not count"
    seconds = {name: [] for name in arms}
    for _ in range(3):
        for name, call in arms.items():
            spent = [timed(partial(call, steps=n))[0] for n in (few, more)]
            seconds[name].append((spent[1] - spent[0])/(more - few))
    return dict(seconds=seconds)

def training():
    "A step of `fit` against a plain loop: 16 examples, 6 layers of 576"
    decoder, rows = tiny_training(6, 576)
    return steps_of({'lorasuite': partial(our_loop, decoder, rows), 'plain loop': partial(bare_loop, decoder, rows)})

def training_methods():
    "30 steps of LoRA², ALoRA and PEFT's AdaLoRA against LoRA, all that they do on the way: 2 layers of 192"
    from peft import AdaLoraConfig
    from transformers import DataCollatorForSeq2Seq
    from lorasuite.tuners.alora import ALoRA
    from lorasuite.tuners.lora2 import LoRA2
    decoder, rows = tiny_training(2, 192)
    batch = {**DataCollatorForSeq2Seq(decoder.tokenizer, padding=True)([dict(row) for row in rows[:4]])}
    ada = AdaLoraConfig(init_r=8, target_r=4, total_step=30, tinit=3, tfinal=12, deltaT=10, task_type='CAUSAL_LM',
                        target_modules='all-linear')
    def update(peft, step): peft.base_model.update_and_allocate(step)
    ours = partial(our_loop, decoder, rows, 30)
    seconds, _ = in_turn({'LoRA': ours, 'LoRA²': partial(ours, method=partial(LoRA2, target=4)),
                          'ALoRA': partial(ours, method=partial(ALoRA, batch=batch)),
                          'AdaLoRA (PEFT)': partial(bare_loop, decoder, rows, 30, config=ada, after=update)}, repeats=2)
    return dict(seconds=seconds)

VOCABULARIES = 49_152, 128_256, 262_144

def soft_targets(decoder, rows):
    "Rows of examples, and 16 likely tokens at each of their learned positions, as a refresh has them"
    import torch
    from lorasuite.training.refresh import SoftTargetLoss
    g, total = torch.Generator().manual_seed(0), sum(t != -100 for row in rows for t in row['labels'])
    numbers = iter(range(total))
    rows = [row | dict(labels=[t if t == -100 else next(numbers) for t in row['labels']]) for row in rows]
    ids = torch.randint(decoder.vocab, (total, 16), generator=g)
    return rows, SoftTargetLoss(ids, torch.rand(total, 16, generator=g).softmax(1))

def vocabulary_arms(vocabulary):
    "Ways to train a narrow model with a vocabulary: arm: call with the number of steps"
    import torch
    from lorasuite.core.loading import load_model
    from lorasuite.training.examples import encode, load_data
    folder = model('smollm-135m', f'vocabulary{vocabulary}', layers=4, hidden_size=192, vocab_size=vocabulary,
                   num_attention_heads=3, num_key_value_heads=1, intermediate_size=512)
    decoder = load_model(folder, torch.device('cpu'), torch.float32)
    rows = [encode(e, decoder.tokenizer) for e in load_data('zoo/train.jsonl')[:64]]
    softened, loss = soft_targets(decoder, rows)
    return {'a step of refresh': partial(our_loop, decoder, softened, loss=loss),
            'a labelled step': partial(our_loop, decoder, rows),
            'a labelled step, plain loop': partial(bare_loop, decoder, rows)}

def vocabulary(size):
    "A step of refresh and labelled steps, 16 short examples, 4 layers of 192"
    found = steps_of(vocabulary_arms(size), more=7)
    code = f"sys.path.append('benchmarks'); import bench; bench.vocabulary_arms({size})[sys.argv[1]](steps=3)"
    return found | dict(gb={arm: process(code, arm)[1] for arm in found['seconds']})

def answers():
    "Answers to 64 prompts of 10 to 300 tokens, 16 at a time: in the order of their lengths, and as they come"
    import torch
    from lorasuite.training import evaluate
    decoder, _ = tiny_training(6, 576)
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 300, (64,), generator=g).tolist()
    prompts = [torch.randint(20, 500, (n,), generator=g).tolist() for n in lengths]
    ask = partial(evaluate.generate, decoder.model, decoder.tokenizer, batch_size=16)
    def as_they_come(): return [text for i in range(0, 64, 16) for text in ask(prompts[i:i+16])]
    seconds, found = in_turn({'lorasuite': partial(ask, prompts), 'as they come': as_they_come})
    same = sum(a == b for a, b in zip(*found.values()))/64
    return dict(seconds=seconds, equal=same)

# ---- growth

def block_maps(hidden):
    "The maps of one pair of layers of a width: MLPs 3 times as wide, heads of 64"
    import torch
    from shapes import random_model
    from transformers import LlamaConfig
    from lorasuite.core.model import Decoder
    from lorasuite.stages.alignment import _block_maps_by
    config = LlamaConfig(hidden_size=hidden, num_attention_heads=hidden//64, num_key_value_heads=hidden//256,
                         num_hidden_layers=1, intermediate_size=3*hidden, vocab_size=64)
    old, new = (Decoder(random_model(config, torch.bfloat16, 'cpu', seed), name=f'random{seed}') for seed in (0, 1))
    I = torch.linalg.qr(torch.randn(hidden, hidden))[0].double()
    X = torch.randn(2048, 2048)
    def maps(): return _block_maps_by('exact', old, new, (0, 0), I, I.T, None)
    seconds, _ = in_turn({'lorasuite': maps, 'a product of 2048 × 2048 × 2048': lambda: X@X}, repeats=2)
    return seconds

def growth():
    "The maps of one pair of layers, for streams of 512 to 2,560"
    found = {hidden: block_maps(hidden) for hidden in (512, 1024, 1536, 2048, 2560)}
    product = [s for seconds in found.values() for s in seconds['a product of 2048 × 2048 × 2048']]
    return dict(seconds={f'{hidden} wide': seconds['lorasuite'] for hidden, seconds in found.items()} |
                {'a product of 2048 × 2048 × 2048': product})

# ---- all of it

COMPARISONS = dict(
    cka=cka, matching=match_descended, unrelated=match_unrelated, polar=polar, training=training,
    methods=training_methods, answers=answers, growth=growth, adapter=one_adapter, align=align_small,
    depth=align_depths) | {
    f'heads: {name}': partial(heads, name) for name in PAIRS} | {
    f'vocabulary {size:,}': partial(vocabulary, size) for size in VOCABULARIES}
LARGE = dict(large=align_large)

def title(name):
    "What a comparison compares"
    call = (COMPARISONS | LARGE)[name]
    if not isinstance(call, partial): return call.__doc__
    return f'{name.removeprefix("heads: ")}, one layer' if call.func is heads else f'{call.func.__doc__}, {name}'

def run(name):
    "One comparison, in this process"
    import torch
    torch.set_num_threads(1)
    found = (COMPARISONS | LARGE)[name]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
    (BUILD/f'{name}.json').write_text(json.dumps(dict(title=title(name), process_gb=peak) | found, indent=1))

def collect():
    "Write what there is where the page finds it"
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {} # what was measured before
    made = {name: BUILD/f'{name}.json' for name in COMPARISONS | LARGE}
    found = known | {name: json.loads(file.read_text()) for name, file in made.items() if file.exists()}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n')
    return found

def ratios(found):
    "Median seconds of every arm as a multiple of the first"
    medians = {arm: statistics.median(seconds) for arm, seconds in found['seconds'].items()}
    return {arm: round(x/next(iter(medians.values())), 2) for arm, x in medians.items()}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of a comparison: {", ".join(COMPARISONS | LARGE)}')
    parser.add_argument('--large', action='store_true', help='add the one at 7B → 8B shapes')
    parser.add_argument('--here', action='store_true', help='run one comparison in this process')
    args = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if args.here: run(args.names[0])
    else:
        for name in args.names or [*COMPARISONS, *(LARGE if args.large else ())]:
            if not args.names and (BUILD/f'{name}.json').exists(): continue
            print(f'== {name}: {title(name)}', flush=True)
            subprocess.run([sys.executable, __file__, '--here', name], check=True,
                           env=os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', HF_HUB_OFFLINE='1'))
            print(f'   {ratios(collect()[name])}', flush=True)
