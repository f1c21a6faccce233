"""Light fine-tuning: equal steps on any number of devices, packing, recomputation, precision, cost"""
import json, os, shutil, subprocess, sys, time
from contextlib import suppress
from inspect import signature
import psutil, pytest, torch
from models import error, random_adapter, random_decoder, whole
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_families import FAMILIES
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, modeling_utils
from typer.testing import CliRunner
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.model import pick_device
from lorasuite.training.examples import encode
from lorasuite.training.finetune import finetune, init_adapter
from lorasuite.training.prompts import Prompts
from lorasuite.training.trainer import (
    check_packing, fit, learned_positions, logits_at, plot_losses, Run, split_batch, token_loss, watch_memory)
from lorasuite.cli import app

NAMES = 'Ann Bob Cid Dan Eve Fay Gus Hal Ida Jon Kit'.split()
PLACES = 'Arden Birch Colm Dover Elmo Ferry Gale Hythe Ilkley Jura Kirk'.split()
TAILS = ['', ' live', ' go when it rains']*4
ROWS = [dict(instruction=f'{q} {name}{tail}?', input='', output=place, answer=place)
        for q in ('Where does', 'Who is') for name, place, tail in zip(NAMES, PLACES, TAILS)]
ENOUGH = dict(steps=6, lr=1e-3, batch_size=8)

@pytest.fixture
def rows(tokenizer): return [encode(e, tokenizer) for e in ROWS]

# ---- steps

SHARED = [(16, None, 1, (16, 1)), (16, 4, 1, (4, 4)), (16, None, 2, (8, 1)), (16, 4, 2, (4, 2)), (16, 16, 4, (4, 1)),
          (1, None, 1, (1, 1))]

@pytest.mark.parametrize('batch, micro, devices, expected', SHARED)
def test_a_step_is_shared(batch, micro, devices, expected):
    assert split_batch(batch, micro, devices) == expected and expected[0]*expected[1]*devices == batch

@pytest.mark.parametrize('batch, micro, devices', [(16, 3, 1), (10, None, 3), (16, None, 32), (12, 8, 1)])
def test_a_rest_is_refused(batch, micro, devices):
    with pytest.raises(ValueError, match='choose a multiple of'): split_batch(batch, micro, devices)

def asked(monkeypatch):
    "Token ids of all rows that the model is shown, in order"
    seen, call = [], DataCollatorForSeq2Seq.__call__
    def collate(self, features, *args, **kwargs):
        seen.append([tuple(f['input_ids']) for f in features])
        return call(self, features, *args, **kwargs)
    monkeypatch.setattr(DataCollatorForSeq2Seq, '__call__', collate)
    return seen

def test_every_pass_shows_every_example_and_steps_are_equal(decoder, adapter, rows, monkeypatch):
    seen = asked(monkeypatch)
    finetune(decoder, ROWS, adapter, epochs=3, batch_size=4)
    steps, stream = [len(s) for s in seen], sum(seen, [])
    everything = sorted(tuple(r['input_ids']) for r in rows)
    assert steps == [4]*17 and all(sorted(stream[i:i+22]) == everything for i in (0, 22, 44))
    assert stream[:22] != stream[22:44]

def test_epochs_and_steps(decoder, adapter):
    count = lambda **kw: len(finetune(decoder, ROWS, adapter, batch_size=8, **kw)[1])
    assert count() == 9 and count(epochs=1) == 3 and count(epochs=.5) == 2
    assert count(epochs=5, steps=2) == 2 and count(epochs=0) == 0

def test_the_card_says_how_the_model_was_asked(decoder, adapter):
    tuned, _ = finetune(decoder, ROWS, adapter, steps=1, prompts=Prompts('Q: {instruction}\nA:'))
    assert "Form of the prompts: `plain prompt 'Q: {instruction}\\nA:'`." in tuned.card

def test_fewer_examples_than_a_step(decoder, adapter, monkeypatch):
    seen = asked(monkeypatch)
    finetune(decoder, ROWS[:3], adapter, steps=2)
    assert [len(s) for s in seen] == [16, 16] and len(set(seen[0])) == 3

def test_schedule_by_its_own_name(decoder, adapter):
    schedules = (dict(), dict(lr_scheduler_type='cosine'), dict(warmup_steps=5))
    results = [whole(finetune(decoder, ROWS, adapter, **ENOUGH, **kw)[0]) for kw in schedules]
    assert all(error(a, results[0]) > 1e-4 for a in results[1:])
    with pytest.raises(ValueError, match='sawtooth'):
        finetune(decoder, ROWS, adapter, **ENOUGH, lr_scheduler_type='sawtooth')

# ---- what is learned, and by what

def test_roles_of_a_fresh_lora(decoder):
    tuned, run = finetune(decoder, ROWS, **ENOUGH, rank=4, roles=['q', 'v'])
    assert tuned.updates.keys() == {decoder.path(l, r) for l in range(decoder.layers) for r in 'qv'}
    assert run.trained == sum(A.numel() + B.numel() for A, B in tuned.updates.values())
    assert {len(A) for A, _ in tuned.updates.values()} == {4}
    with pytest.raises(ValueError, match='random/llama has no x, z: its roles are q, k'):
        finetune(decoder, ROWS, roles=['x', 'q', 'z'])

def test_the_whole_text(decoder, adapter, tokenizer):
    losses = {}
    for both in (False, True):
        losses[both] = fit_loss(decoder, adapter, [encode(e, tokenizer, train_on_inputs=both) for e in ROWS])
    nats, lengths = [], [len(encode(e, tokenizer)['input_ids']) - 1 for e in ROWS]
    with torch.no_grad(), adapter.on(decoder) as model:
        for e in ROWS:
            ids = torch.tensor([encode(e, tokenizer)['input_ids']])
            nats.append(model(ids, labels=ids).loss.item()*(ids.numel() - 1))
    assert losses[True] == pytest.approx(sum(nats)/sum(lengths), rel=1e-5)
    assert abs(losses[True] - losses[False]) > .01

def fit_loss(decoder, adapter, rows, **kw):
    "Loss over all rows at the start"
    with adapter.on(decoder, trainable=True) as model:
        return fit(model, rows, decoder.tokenizer, 1, 1e-3, batch_size=len(rows), **kw)[0]

@pytest.mark.parametrize('name', [*FAMILIES, 'cohere', 'granite'])
def test_logits_where_something_is_learned(tokenizer, name):
    "As the model gives them everywhere, also where caps and scales follow the output embedding"
    options = dict(family=name) | FAMILIES.get(name, {})
    if name == 'granite': options |= dict(logits_scaling=3.)
    decoder = random_decoder(tokenizer, layers=2, **options)
    rows = [encode(e, tokenizer) for e in ROWS[:3]]
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True)(rows)
    at, learned = learned_positions(batch['labels'])
    assert torch.equal(learned, batch['labels'][batch['labels'] != -100])
    with torch.no_grad():
        out = decoder.model(**batch, use_cache=False)
        batch.pop('labels')
        some = logits_at(decoder.model, at, **batch, use_cache=False)
    assert error(some, out.logits[at]) <= 1e-5
    assert token_loss(some, learned).item()/len(learned) == pytest.approx(out.loss.item(), rel=1e-4)

@pytest.mark.skipif(not hasattr(modeling_utils, 'slice_logits_to_keep'), reason='a mask since transformers 5.22')
def test_logits_are_those_that_transformers_keeps(tokenizer):
    model = random_decoder(tokenizer).model
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True)([encode(e, tokenizer) for e in ROWS[:3]])
    at, _ = learned_positions(batch.pop('labels'))
    with torch.no_grad():
        theirs = model(**batch, use_cache=False, logits_to_keep=at).logits
        assert torch.equal(logits_at(model, at, **batch, use_cache=False), theirs)

def test_an_updated_output_embedding_sees_what_is_learned(tokenizer):
    model = get_peft_model(random_decoder(tokenizer).model, LoraConfig(r=2, target_modules=['lm_head', 'q_proj']))
    for n, p in model.named_parameters():
        if 'lora' in n: torch.nn.init.normal_(p, std=.1)
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True)([encode(e, tokenizer) for e in ROWS[:3]])
    at, _ = learned_positions(batch.pop('labels'))
    with torch.no_grad():
        assert error(logits_at(model, at, **batch), model(**batch).logits[at]) <= 1e-5

def test_embeddings_and_rows_are_tuned_too(decoder, tokenizer, tmp_path):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=['q_proj', 'embed_tokens'], task_type='CAUSAL_LM')
    model = get_peft_model(random_decoder(tokenizer).model, config)
    for n, p in model.named_parameters():
        if 'lora' in n: torch.nn.init.normal_(p, std=.1)
    start = Adapter.from_peft(model)
    start.skipped['lm_head'] = 'left out'
    tuned, _ = finetune(decoder, ROWS, start, **ENOUGH)
    assert tuned.skipped == start.skipped and tuned.embeddings.keys() == start.embeddings.keys() != set()
    for p, ab in start.embeddings.items(): assert all(error(x, y) > 1e-4 for x, y in zip(tuned.embeddings[p], ab))

# ---- packing

@pytest.fixture(scope='module')
def model(tokenizer): return lambda name: random_decoder(tokenizer, layers=2, **dict(family=name) | FAMILIES[name])

def gradients(decoder, adapter, batch):
    with adapter.on(decoder, trainable=True) as model:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

BLIND = ('bloom', 'opt', 'falcon', 'falcon_rw', 'falcon_40b') # to positions that begin anew

@pytest.mark.parametrize('name', FAMILIES)
def test_packed_examples_do_not_see_each_other(name, model, rows, tokenizer):
    d = model(name)
    if name in BLIND:
        message = f'type {d.model.config.model_type} lets examples in one row see each other'
        with pytest.raises(ValueError, match=message): check_packing(d.model, rows[0])
    else:
        check_packing(d.model, rows[0])
        start = random_adapter(init_adapter(d, 4))
        a, g = gradients(d, start, DataCollatorForSeq2Seq(tokenizer, padding=True)([dict(r) for r in rows]))
        b, h = gradients(d, start, DataCollatorWithFlattening()([dict(r) for r in rows]))
        assert abs(a - b) <= 1e-5*a and error(h, g) <= 1e-5

def test_packed_training_is_unpacked_training(decoder, adapter):
    a, losses = finetune(decoder, ROWS, adapter, **ENOUGH, pack=False, micro_batch=4)
    b, packed = finetune(decoder, ROWS, adapter, **ENOUGH, pack=True, micro_batch=4)
    assert packed == pytest.approx(losses, rel=1e-5)
    assert error(whole(b), whole(a)) < 1e-3*error(whole(a), whole(adapter))

def test_packing_that_is_refused_trains_nothing(model, adapter):
    d = model('bloom')
    start = random_adapter(init_adapter(d, 4))
    with pytest.raises(ValueError, match='bloom'): finetune(d, ROWS, start, **ENOUGH, pack=True)
    assert not any('lora' in n for n, _ in d.model.named_parameters())

# ---- memory and precision

@pytest.mark.parametrize('name', ['llama', 'gpt2', 'bloom'])
def test_computing_twice_changes_nothing(name, model):
    d = model(name)
    start = random_adapter(init_adapter(d, 4))
    a, losses = finetune(d, ROWS, start, **ENOUGH, gradient_checkpointing=False)
    b, again = finetune(d, ROWS, start, **ENOUGH, gradient_checkpointing=True)
    assert again == pytest.approx(losses, rel=1e-5) and error(whole(b), whole(a)) < 1e-3*error(whole(a), whole(start))

def test_it_really_computes_twice(decoder, adapter):
    calls, hook = [], decoder.blocks[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
    count = lambda **kw: (calls.clear(), finetune(decoder, ROWS, adapter, steps=2, batch_size=4, **kw), len(calls))[2]
    try: assert count() == 2 and count(gradient_checkpointing=True) == 4 and count() == 2
    finally: hook.remove()

def test_the_model_is_as_it_was(decoder, adapter):
    def state():
        model = decoder.model
        flags = [getattr(m, 'gradient_checkpointing', None) for m in model.modules()]
        return model.config.use_cache, model.training, flags, [p.requires_grad for p in model.parameters()]
    before = state()
    assert before[0] is True
    finetune(decoder, ROWS, adapter, **ENOUGH, gradient_checkpointing=True)
    assert state() == before

PRECISIONS = [(torch.float32, {}, torch.float32), (torch.float32, dict(bf16=True), torch.bfloat16),
              (torch.bfloat16, {}, torch.bfloat16), (torch.bfloat16, dict(bf16=False), torch.float32)]

@pytest.mark.parametrize('base, asked, inside', PRECISIONS)
def test_precision_of_the_base_or_as_asked(tokenizer, adapter, base, asked, inside):
    d, seen = random_decoder(tokenizer), []
    d.model.to(base)
    with adapter.on(d, trainable=True) as model:
        layer = next(m for n, m in model.named_modules() if n.endswith('lora_B.default'))
        layer.register_forward_hook(lambda m, a, out: seen.append((out.dtype, m.weight.dtype)))
        losses = fit(model, [encode(e, tokenizer) for e in ROWS], tokenizer, 3, 1e-3, **asked)
    assert {*seen} == {(inside, torch.float32)} and len(losses) == 3

def test_memory_is_the_peak_of_the_training():
    peak = watch_memory(torch.device('cpu'))
    if peak() is None: pytest.skip('only Linux tells')
    torch.ones(25_000_000)
    assert 95e6 < peak() < 130e6
    assert watch_memory(torch.device('cpu'))() < 20e6

def test_memory_of_a_gpu_is_what_was_given_out(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', reset.append)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 7)
    assert watch_memory(torch.device('cuda', 1))() == 7 and reset == [torch.device('cuda', 1)]

def test_every_process_has_its_own_gpu(monkeypatch):
    chosen = [0]
    fakes = dict(is_available=lambda: True, set_device=chosen.append, current_device=lambda: chosen[-1])
    for name, f in fakes.items(): monkeypatch.setattr(torch.cuda, name, f)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    assert pick_device() == torch.device('cuda', 0)
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert pick_device() == torch.device('cuda', 3)

# ---- the record

def test_a_run_is_a_list_of_losses_with_its_cost(decoder, adapter):
    begin = time.perf_counter()
    _, run = finetune(decoder, ROWS, adapter, **ENOUGH)
    assert isinstance(run, Run) and json.loads(json.dumps(run)) == run and len(run) == 6
    assert 0 < run.seconds < time.perf_counter() - begin and run.validation == {}
    assert run.trained == sum(t.numel() for ab in adapter.updates.values() for t in ab)
    assert finetune(decoder, ROWS, adapter, steps=0)[1] == Run() == []

def test_validation_loss(decoder, adapter, tokenizer):
    held_out = ROWS[:4]
    tuned, run = finetune(decoder, ROWS[4:], adapter, steps=20, lr=1e-3, batch_size=4, validation=held_out)
    assert sorted(run.validation) == list(range(0, 21, 2)) and len(run) == 20
    for a, step in ((adapter, 0), (tuned, 20)):
        direct = fit_loss(decoder, a, [encode(e, tokenizer) for e in held_out])
        assert run.validation[step] == pytest.approx(direct, rel=1e-4)
    plain, _ = finetune(decoder, ROWS[4:], adapter, steps=20, lr=1e-3, batch_size=4)
    assert whole(plain).equal(whole(tuned))

def test_the_curve_shows_training_and_validation():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    plot_losses(dict(a=[Run([3., 2., 1.], validation={0: 4., 3: 2.}), [3., 2.]], b=[[1.]]), ax)
    drawn = [line.get_xydata().tolist() for line in ax.lines]
    assert drawn == [[[1, 3], [2, 2], [3, 1]], [[0, 4], [3, 2]], [[1, 3], [2, 2]], [[1, 1]]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['a', 'a, validation', 'b']
    plt.close(fig)

# ---- two processes

def command(work, out, *more):
    return ['finetune', 'zoo/old', 'zoo/adapter', '--data', str(work/'data.jsonl'), '-o', str(work/out),
            '--steps', '60', '--lr', '3e-4', '--batch-size', '8', '--json', *more]

@pytest.fixture
def work(tmp_path):
    lines = (data_dir()/'zoo'/'train.jsonl').read_text().splitlines(keepends=True)
    (tmp_path/'data.jsonl').write_text(''.join(lines[:30]))
    return tmp_path

def run(args):
    "In this process"
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    return result.stdout

def launch(args):
    "In two processes, on CPUs, by the launcher of `accelerate launch` for several GPUs; for CPUs it starts only one"
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}
    env['OMP_NUM_THREADS'] = '1'
    settings = ['--nproc_per_node', '2', '--rdzv_backend', 'c10d', '--rdzv_endpoint', '127.0.0.1:0']
    launcher = [sys.executable, '-m', 'torch.distributed.run', *settings, '-m', 'lorasuite.cli']
    return subprocess.Popen(launcher + args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def cut_short(process, folder):
    "Kill a training when it has written its first checkpoint"
    while not [*folder.glob('checkpoint-*/sealed.json')]:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert sum('lorasuite.cli' in child.cmdline() for child in children) == 2
    for child in children:
        with suppress(psutil.NoSuchProcess): child.kill()
    process.communicate(timeout=60)

def tensors(path):
    found = load_file(path/'adapter_model.safetensors')
    return torch.cat([t.flatten().double() for _, t in sorted(found.items())])

def test_two_processes_do_what_one_does_also_when_interrupted(work):
    cut_short(launch(command(work, 'two')), work/'.two-checkpoints')
    assert {p.name for p in work.iterdir()} == {'data.jsonl', '.two-checkpoints', '.two-lorasuite'}
    shutil.copytree(work/'.two-checkpoints', work/'.handed-over-checkpoints')
    two = launch(command(work, 'two'))
    whole = [json.loads(run(command(work, out))) for out in ('one', 'handed-over')]
    out, err = two.communicate(timeout=240)
    assert two.returncode == 0, err[-3000:]
    whole.append(json.loads(out)) # one object, though there are two processes
    for said in whole:
        assert said['steps'] == 60 and said['trained'] == whole[0]['trained']
        assert said['loss'] == pytest.approx(whole[0]['loss'], rel=1e-2)
    assert error(tensors(work/'two'), tensors(work/'one')) > 0 # sums in another order
    places = (work/'one', work/'handed-over', work/'two', data_dir()/'zoo'/'adapter')
    one, handed_over, two, start = (tensors(p) for p in places)
    for other in (two, handed_over): assert error(other, one) < 1e-2*error(one, start)
    assert {p.name for p in work.iterdir()} == {'data.jsonl', 'one', 'two', 'handed-over'}

def test_only_the_first_process_checks_writes_and_talks(work, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    (work/'out').mkdir()
    assert run(command(work, 'out', '--steps', '0')).strip() == '' and not any((work/'out').iterdir())
    monkeypatch.setenv('RANK', '0')
    assert 'exists already' in CliRunner().invoke(app, command(work, 'out')).stderr
    assert json.loads(run(command(work, 'new', '--steps', '0')))['steps'] == 0
    assert (work/'new'/'adapter_model.safetensors').is_file()

# ---- the command

def test_every_option_reaches_the_training(work, monkeypatch):
    asked = {}
    def fake(*args, **kwargs):
        asked.update(signature(finetune).bind(*args, **kwargs).arguments)
        return init_adapter(args[0]), Run([1.])
    monkeypatch.setattr('lorasuite.training.finetune.finetune', fake)
    options = ('--epochs 2 --lr .1 --schedule cosine --warmup 3 --batch-size 4 --micro-batch 2 --rank 5 --roles q,v '
               '--whole --pack --bf16 --gradient-checkpointing --seed 6 --json').split()
    run(['finetune', 'zoo/old', '--data', str(work/'data.jsonl'), '-o', str(work/'out'), *options])
    rest = asked.pop('kwargs')
    assert len(asked.pop('data')) == 30 and asked.pop('decoder').layers == 4
    assert asked == dict(adapter=None, steps=None, lr=.1, rank=5, seed=6, epochs=2, batch_size=4, roles=['q', 'v'],
                         train_on_inputs=True, prompts=Prompts())
    assert rest == dict(micro_batch=2, pack=True, checkpoints=work/'.out-checkpoints', progress=False, warmup_steps=3,
                        lr_scheduler_type='cosine', gradient_checkpointing=True, bf16=True, fp16=False)

def test_options_that_cannot_be(work):
    wrong = (['--schedule', 'sawtooth'], 'sawtooth'), (['--roles', 'q,x'], 'has no x'), \
            (['--micro-batch', '3'], 'choose a multiple of 3'), (['--batch-size', '0'], 'batch-size')
    for more, message in wrong:
        result = CliRunner().invoke(app, [a for a in command(work, 'out') if a != 'zoo/adapter'] + more)
        assert result.exit_code == 2 and message in result.stderr, more
        assert {p.name for p in work.iterdir()} == {'data.jsonl'}, more

def test_a_fresh_lora_from_the_command(work):
    options = '--rank 3 --roles down --epochs 1 --pack --bf16 --gradient-checkpointing --json'.split()
    said = run(['finetune', 'zoo/old', '--data', str(work/'data.jsonl'), '-o', str(work/'out'), *options])
    said = json.loads(said)
    made = Adapter.load(work/'out')
    assert said['steps'] == 2 and {len(A) for A, _ in made.updates.values()} == {3}
    assert all(p.endswith('down_proj') for p in made.updates) and len(made.updates) == 4
    assert said['trained'] == sum(t.numel() for ab in made.updates.values() for t in ab)
    assert any(made.norm(p) for p in made.updates)

def test_two_processes_prune_alike(work):
    prune = lambda out: command(work, out, '--prune', '8', '--lr', '3e-3')
    two = launch(prune('two'))
    run(prune('one'))
    out, err = two.communicate(timeout=240)
    assert two.returncode == 0, err[-3000:]
    one, two = (Adapter.load(work/out) for out in ('one', 'two'))
    ranks = [{p: len(A) for p, (A, _) in a.updates.items()} for a in (one, two)]
    assert ranks[0] == ranks[1] and error(whole(two), whole(one)) < 1e-2
