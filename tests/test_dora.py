"DoRA: read, put on its model, carried and written as PEFT means it"
import json, re
from dataclasses import replace
import pytest, torch
from models import error, random_decoder, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from lorasuite import Adapter, align, transfer
from lorasuite.cli import app
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.core.ranks import relative_errors, truncate
from lorasuite.lab.oracle import grow
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.dora import dora_update, fit_dora, transfer_dora
from lorasuite.training.examples import load_data
from lorasuite.training.upgrade import upgrade

FEW = probe_texts()[:16]

@pytest.fixture(scope='module')
def old(tokenizer): return random_decoder(tokenizer, layers=2)

@torch.no_grad()
def logits(model): return model(tokens()).logits

@pytest.fixture(scope='module')
def made(old, tmp_path_factory):
    "A DoRA of random numbers as PEFT saves it, and what it adds to the logits"
    folder, base = tmp_path_factory.mktemp('dora')/'adapter', logits(old.model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=['q_proj', 'v_proj', 'up_proj', 'down_proj'])
    model = get_peft_model(old.model, config)
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.03)
        if 'magnitude' in name: p.data.mul_(1 + .05*torch.randn_like(p))
    model.save_pretrained(folder)
    effect = logits(model.eval()) - base
    model.unload()
    return folder, effect

@pytest.fixture(scope='module')
def to_itself(old): return align(old, old, FEW)

def test_a_file_of_PEFT_is_read_and_put_on_its_model_as_PEFT_does(old, made):
    folder, true = made
    adapter = Adapter.load(folder)
    assert adapter.magnitudes.keys() == adapter.updates.keys() and len(adapter.updates) == 8
    base = logits(old.model)
    with adapter.on(old) as model:
        assert error(logits(model) - base, true) <= 1e-5
        again = Adapter.from_peft(model)
    assert all(torch.equal(again.magnitudes[path], m) for path, m in adapter.magnitudes.items())

def test_it_is_carried_to_its_own_model_exactly_and_written_for_PEFT(old, made, to_itself, tmp_path):
    folder, true = made
    base = logits(old.model)
    carried = transfer_dora(Adapter.load(folder), to_itself, old=old, new=old)
    carried.save(tmp_path/'carried')
    assert json.loads((tmp_path/'carried/adapter_config.json').read_text())['use_dora'] is True
    model = PeftModel.from_pretrained(old.model, str(tmp_path/'carried'))
    assert error(logits(model) - base, true) <= 1e-4
    model.unload()
    assert not carried.skipped and 'DoRA carried as the nearest DoRA of rank 4' in carried.card

def readers_of(adapter):
    "The adapter without what writes to the stream"
    paths = [path for path in adapter.updates if not path.endswith('down_proj')]
    return replace(adapter, updates={path: adapter.updates[path] for path in paths},
                   magnitudes={path: adapter.magnitudes[path] for path in paths})

def test_readers_are_carried_exactly_to_an_enlarged_model(old, made, tokenizer):
    "Their outputs are heads and neurons, which only change places"
    folder, _ = made
    new = Decoder(grow(old, hidden=96, intermediate=160, heads=8, kv_heads=4)[0], tokenizer, 'enlarged')
    adapter = readers_of(Adapter.load(folder))
    base = logits(old.model)
    with adapter.on(old) as model: true = logits(model) - base
    alignment = align(old, new, FEW)
    carried = transfer_dora(adapter, alignment, old=old, new=new)
    base = logits(new.model)
    with carried.on(new) as model: assert error(logits(model) - base, true) <= 1e-3
    lora = transfer_dora(adapter, alignment, plain=True, old=old, new=new)
    with lora.on(new) as model: assert error(logits(model) - base, true) > .1
    assert not lora.magnitudes

def test_a_plain_LoRA_states_its_error(old, made, to_itself):
    folder, true = made
    base, errors = logits(old.model), []
    for rank in (4, 32):
        carried = transfer_dora(Adapter.load(folder), to_itself, rank=rank, plain=True, old=old, new=old)
        said = re.search(r'nearest LoRA of rank (\d+): error of the updates (\S+) on average', carried.card)
        assert int(said[1]) == rank and {len(A) for A, _ in carried.updates.values()} == {rank}
        with carried.on(old) as model: errors.append((error(logits(model) - base, true), float(said[2])))
    assert errors[0][0] > errors[1][0] and errors[0][1] > errors[1][1]

def test_it_is_carried_along_a_saved_alignment_and_beside_new_layers(old, made, tokenizer, tmp_path):
    "New layers without a partner get a magnitude that changes nothing"
    folder, _ = made
    deeper = Decoder(grow(old, layers=3)[0], tokenizer, 'deeper')
    for decoder, name in ((old, 'old'), (deeper, 'deeper')):
        decoder.model.save_pretrained(tmp_path/name)
        tokenizer.save_pretrained(tmp_path/name)
    adapter = readers_of(Adapter.load(folder))
    carried = transfer(adapter, align(tmp_path/'old', tmp_path/'deeper', FEW))
    assert len(carried.updates) == 9 and carried.magnitudes.keys() == carried.updates.keys()
    with carried.on(deeper) as model: effect = logits(model)
    with adapter.on(old) as model: true = logits(model)
    assert error(effect, true) <= 1e-3

def change(made, tmp_path, tensors=lambda t: t, **settings):
    "The adapter with other tensors or settings"
    folder = made[0]
    config = json.loads((folder/'adapter_config.json').read_text()) | settings
    save_file(tensors(load_file(folder/'adapter_model.safetensors')), tmp_path/'adapter_model.safetensors')
    (tmp_path/'adapter_config.json').write_text(json.dumps(config))
    return tmp_path

def test_a_switch_without_magnitudes_is_refused(made, tmp_path):
    keep = lambda t: {key: x for key, x in t.items() if 'layers.1.mlp.up_proj.lora_magnitude' not in key}
    with pytest.raises(ValueError, match=r'use_dora is set, but .* lora_magnitude_vector for \S*1\.mlp\.up_proj:'):
        Adapter.load(change(made, tmp_path, keep))

def test_magnitudes_without_the_switch_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match='does not set use_dora'): Adapter.load(change(made, tmp_path, use_dora=False))

@pytest.mark.parametrize('bad', [lambda m: m[:3].clone(), lambda m: m*torch.nan])
def test_magnitudes_of_another_size_or_not_finite_are_refused(made, tmp_path, bad):
    spoil = lambda t: {key: bad(x) if 'layers.0.self_attn.q_proj.lora_magnitude' in key else x for key, x in t.items()}
    with pytest.raises(ValueError, match='q_proj needs one finite magnitude for each of 64 outputs'):
        Adapter.load(change(made, tmp_path, spoil))

def test_an_output_embedding_is_left_out_by_name(old, to_itself):
    W = old.model.lm_head.weight.detach()
    update = torch.randn(2, 64), .01*torch.randn(len(W), 2)
    q = old.path(0, 'q')
    other = torch.randn(2, 64), .01*torch.randn(64, 2)
    adapter = Adapter({'lm_head': update, q: other}, magnitudes=dict(lm_head=W.norm(dim=1), **{q: torch.ones(64)}))
    carried = transfer_dora(adapter, to_itself, old=old, new=old)
    assert 'magnitudes of an output embedding' in carried.skipped['lm_head'] and [*carried.updates] == [q]

def test_fit_finds_a_DoRA_again():
    g = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=g).double() for shape in ((24, 16), (3, 16), (24, 3)))
    m = (W + .1*B@A).norm(dim=1)*torch.linspace(.8, 1.2, 24).double()
    delta = dora_update(W, A, .1*B, m)
    assert error(dora_update(W, *fit_dora(W, delta, 3)), delta) <= 1e-7
    assert error(dora_update(W, *fit_dora(W, delta, 1)), delta) > .01

def test_a_weight_with_rows_of_zeros_gets_no_update(old, made, tokenizer):
    "PEFT would divide by the length of these rows: here the down projection of an idle layer"
    new = Decoder(grow(old, layers=3)[0], tokenizer, 'deeper')
    carried = transfer_dora(Adapter.load(made[0]), align(old, new, FEW), old=old, new=new)
    with carried.on(new) as model: assert logits(model).isfinite().all()
    idle, = {new.path(layer, 'down') for layer in range(3)} - carried.updates.keys()
    assert not new.model.get_submodule(idle).weight.any() and not carried.skipped

def test_MLX_holds_it_too(tmp_path):
    old = load_model('zoo/old')
    shapes = {old.path(0, role): (64, 64) for role in 'qv'}
    updates = {path: (torch.randn(2, i), .03*torch.randn(o, 2)) for path, (o, i) in shapes.items()}
    adapter = Adapter(updates, 'zoo/old', old.layers, magnitudes={path: 1 + torch.rand(64) for path in updates})
    adapter.save(tmp_path/'mlx', format='mlx')
    assert json.loads((tmp_path/'mlx/adapter_config.json').read_text())['fine_tune_type'] == 'dora'
    again = Adapter.load(tmp_path/'mlx')
    assert all(torch.equal(again.magnitudes[path], m) for path, m in adapter.magnitudes.items())
    assert all(error(again.delta(path), adapter.delta(path)) <= 1e-6 for path in updates)

def test_the_command_writes_a_plain_LoRA_where_it_is_asked_for_one(tmp_path):
    from typer.testing import CliRunner
    from lorasuite.cli import app
    model = get_peft_model(load_model('zoo/old').model, LoraConfig(r=2, use_dora=True, target_modules=['q_proj']))
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.03)
    model.save_pretrained(tmp_path/'dora')
    align('zoo/old', 'zoo/new', FEW).save(tmp_path/'maps')
    def run(*args): return CliRunner().invoke(app, ['transfer', *map(str, args)])
    assert run(tmp_path/'dora', tmp_path/'maps', '-o', tmp_path/'a').exit_code == 0
    assert Adapter.load(tmp_path/'a').magnitudes
    refused = run(tmp_path/'dora', tmp_path/'maps', '-o', tmp_path/'b', '--format', 'gguf')
    assert refused.exit_code == 2 and 'GGUF holds no DoRA: transfer it with --plain-rank' in refused.stderr
    plain = '--format', 'gguf', '--plain-rank', 3
    assert run(tmp_path/'dora', tmp_path/'maps', '-o', tmp_path/'b', *plain).exit_code == 0
    refused = run('zoo/adapter', tmp_path/'maps', '-o', tmp_path/'c', '--plain-rank', 3)
    assert refused.exit_code == 2 and 'is for a DoRA, which the adapter is not' in refused.stderr

def test_the_error_of_a_cut_is_that_of_the_whole_update(tokenizer, tmp_path):
    base = random_decoder(tokenizer, layers=1)
    base.model.save_pretrained(tmp_path/'base')
    base.tokenizer.save_pretrained(tmp_path/'base')
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=['q_proj'], use_dora=True, task_type='CAUSAL_LM', init_lora_weights=False)
    model = get_peft_model(base.model, config)
    for name, p in model.named_parameters():
        if 'magnitude' in name: p.data *= 1 + .3*torch.rand_like(p)
    adapter = replace(Adapter.from_peft(model), base=str(tmp_path/'base'))
    model.unload()
    (path, m), = adapter.magnitudes.items()
    W = base.model.get_submodule(path).weight.detach()
    whole = lambda a: dora_update(W, *a.updates[path], m)
    cut = truncate(adapter, 1)
    right = error(whole(cut), whole(adapter))
    adapter.save(tmp_path/'dora')
    args = ['convert', tmp_path/'dora', '-o', tmp_path/'out', '--max-rank', '1', '--dtype', 'float32', '--json']
    said = CliRunner().invoke(app, [str(a) for a in args])
    assert json.loads(said.stdout)['rank_error'] == pytest.approx(right, rel=1e-3)
    assert abs(relative_errors(adapter, cut)[0] - right) > .01 # of B A alone

def test_a_dora_is_refreshed_on_questions(tmp_path):
    "Its magnitudes learn too; as a plain LoRA it has none"
    old, questions = load_model('zoo/old', dtype=torch.float32), load_data('zoo/train.jsonl', labelled=False)[:16]
    torch.manual_seed(0)
    model = get_peft_model(old.model, LoraConfig(r=4, use_dora=True, target_modules=['q_proj', 'up_proj']))
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data.normal_(std=.02)
    model.save_pretrained(tmp_path/'dora')
    carried, _ = upgrade('zoo/old', 'zoo/new', tmp_path/'dora')
    refreshed, run = upgrade('zoo/old', 'zoo/new', tmp_path/'dora', inputs=questions, steps=2)
    assert len(run) == 2 and refreshed.magnitudes.keys() == carried.magnitudes.keys() == carried.updates.keys()
    assert all(not refreshed.magnitudes[path].equal(m) for path, m in carried.magnitudes.items())
    assert 'Refreshed on ' in refreshed.card and 'carried from `zoo/old`' in refreshed.card
    refreshed.save(tmp_path/'out')
    assert Adapter.load(tmp_path/'out').magnitudes.keys() == carried.magnitudes.keys()
    plain, run = upgrade('zoo/old', 'zoo/new', tmp_path/'dora', inputs=questions, steps=2, plain_rank=4)
    assert len(run) == 2 and not plain.magnitudes
