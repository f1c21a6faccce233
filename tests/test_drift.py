"""Drift that is taken back; that an enlargement has none is tested with the laws"""
from copy import deepcopy
from dataclasses import replace
import pytest, torch
from models import as_phi, error, logits, only, random_adapter, random_decoder, tokens
from typer.testing import CliRunner
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages.alignment import align
from lorasuite.stages.dora import best_lora
from lorasuite.stages.drift import check_drift, column_space, take_back_drift
from lorasuite.stages.transfer import transfer
from lorasuite.training.evaluate import evaluate
from lorasuite.training.examples import load_data
from lorasuite.training.finetune import init_adapter
from lorasuite.training.upgrade import upgrade

DRIFTED = ('self_attn.v_proj', 'mlp.gate_proj', 'mlp.down_proj', 'mlp.dense_4h_to_h', 'qkv_proj') # of any family

def drifted(decoder, rank, size=.01, which=DRIFTED):
    "The same model, some of whose weights have changed by a product of a rank"
    model, g = deepcopy(decoder.model), torch.Generator().manual_seed(3)
    for name, W in model.named_parameters():
        if not name.removesuffix('.weight').endswith(which): continue
        change = torch.randn(len(W), rank, generator=g)@torch.randn(rank, W.shape[1], generator=g)
        W.data += size*W.data.norm()/change.norm()*change
    return Decoder(model, decoder.tokenizer, decoder.name)

@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gpt_neox', 'phi3'])
def test_a_drift_of_low_rank_is_taken_back_whole(family, tokenizer):
    old = random_decoder(tokenizer, family, layers=2)
    adapter = random_adapter(init_adapter(old, 4))
    new, maps = drifted(old, 2), align(old, old)
    carried, true = transfer(adapter, maps), logits(old, tokens(), adapter)
    def left(adapter): return error(logits(new, tokens(), adapter), true)
    few, whole = (take_back_drift(carried, maps, old, new, rank) for rank in (1, 2))
    assert left(whole) <= 1e-3 < left(few) < left(carried) and left(carried) > .005

def test_only_what_the_adapter_updates_is_taken_back(decoder, adapter):
    new, maps = drifted(decoder, 2), align(decoder, decoder)
    part = only(adapter, 'v_proj')
    mended = take_back_drift(transfer(part, maps), maps, decoder, new, 2)
    assert mended.updates.keys() == part.updates.keys()
    assert ranks(mended) == {4 + 2}
    assert '2 ranks of each module are taken back (100% of ‖drift‖²)' in take_back_drift(
        replace(transfer(part, maps), card='x\n'), maps, decoder, new, 2).card

def test_a_rank_beyond_the_module_is_cut(decoder, adapter):
    maps = align(decoder, decoder)
    mended = take_back_drift(replace(transfer(adapter, maps), card='x\n'), maps, decoder, drifted(decoder, 2), 500)
    largest = max(len(A) for A, _ in mended.updates.values()) - 4
    assert largest < 500 and f'of which {largest} ranks of each module' in mended.card
    for path, (A, B) in mended.updates.items():
        assert len(A) == 4 + path.endswith(DRIFTED)*min(len(B), A.shape[1]), path

@pytest.mark.parametrize('family, which', [('gpt_neox', 'mlp.dense_h_to_4h'), ('gpt2', 'mlp.c_fc'), ('opt', 'fc1')])
def test_readers_behind_a_LayerNorm_with_offset(family, which, tokenizer):
    old = random_decoder(tokenizer, family, layers=2)
    maps, new = align(old, old), drifted(old, 2, which=which)
    carried = transfer(random_adapter(init_adapter(old, 4)), maps)
    true = logits(old, tokens(), carried)
    def left(adapter): return error(logits(new, tokens(), adapter), true)
    assert left(take_back_drift(carried, maps, old, new, 2)) < left(carried)/3

def test_a_module_that_was_zero(decoder, adapter):
    old = Decoder(deepcopy(decoder.model), decoder.tokenizer, decoder.name)
    zero, new = old.model.model.layers[1].self_attn.o_proj.weight, Decoder(deepcopy(old.model), old.tokenizer, old.name)
    zero.data.zero_()
    new.model.model.layers[1].self_attn.o_proj.weight.data = torch.outer(torch.ones(64), torch.ones(64))/64
    maps = align(decoder, decoder)
    carried = transfer(adapter, maps)
    mended = take_back_drift(carried, maps, old, new, 1)
    assert error(logits(new, tokens(), mended), logits(old, tokens(), carried)) <= 1e-3

def test_roles_of_a_fused_module_that_are_not_updated_keep_their_drift(decoder, tokenizer):
    old = as_phi(decoder)
    part = only(random_adapter(init_adapter(decoder, 4)), 'q_proj')
    maps = align(decoder, old)
    carried, new = transfer(part, maps), drifted(old, 2, which='qkv_proj')
    mended = take_back_drift(carried, maps, decoder, new, 2)
    for path, (A, B) in mended.updates.items():
        more = B[:, 4:]@A[4:]
        assert len(A) == 6 and more[:64].norm() > 0 and not more[64:].any(), path

def test_no_drift_adds_nothing(decoder, adapter):
    maps = align(decoder, decoder)
    carried = transfer(adapter, maps)
    mended = take_back_drift(carried, maps, decoder, decoder)
    assert all(len(A) == 4 for A, _ in mended.updates.values()) and 'no drift' in mended.card

def test_drift_is_taken_back_once(decoder, adapter):
    maps, new = align(decoder, decoder), drifted(decoder, 2)
    mended = take_back_drift(transfer(adapter, maps), maps, decoder, new, 2)
    with pytest.raises(ValueError, match='drift is taken back in this adapter: once will do'):
        take_back_drift(mended, maps, decoder, new, 2)

def test_another_model_than_the_aligned_one(decoder, adapter, tokenizer):
    maps, wider = align(decoder, decoder), random_decoder(tokenizer, hidden=96, heads=6)
    carried = transfer(adapter, maps)
    with pytest.raises(ValueError, match='is not built like'): take_back_drift(carried, maps, decoder, wider)
    with pytest.warns(UserWarning, match='random/llama was aligned, and other is given'):
        take_back_drift(carried, maps, decoder, Decoder(decoder.model, tokenizer, 'other'))
    with pytest.warns(UserWarning, match='as those of unrelated models'):
        take_back_drift(carried, maps, decoder, random_decoder(tokenizer, seed=5))

def test_column_space_of_dependent_columns():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(9, 3, generator=g).double()@torch.randn(3, 5, generator=g).double()
    Q = column_space(M)
    assert Q.shape == (9, 3) and error(Q@Q.T@M, M) < 1e-9

def test_refusals(decoder, adapter, monkeypatch):
    maps = align(decoder, decoder)
    dora = replace(adapter, magnitudes={p: torch.ones(len(B)) for p, (_, B) in adapter.updates.items()})
    with pytest.raises(ValueError, match='carry it as a plain LoRA'): take_back_drift(dora, maps, decoder, decoder)
    with pytest.raises(ValueError, match='by the method exact, not by paper'): check_drift(adapter, 'paper')
    head = Adapter({'lm_head': best_lora(torch.ones(512, 64), 2)}, decoder.name, decoder.layers)
    with pytest.raises(ValueError, match='updates no module of a block'): take_back_drift(head, maps, decoder, decoder)
    monkeypatch.setattr('lorasuite.training.upgrade.align', lambda *args, **kwargs: pytest.fail('it aligned'))
    with pytest.raises(ValueError, match='updates no module of a block'): upgrade(decoder, decoder, head, drift_rank=2)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f'drift_rank={wrong}'):
            upgrade('zoo/old', 'zoo/new', 'zoo/adapter', drift_rank=wrong)
    with pytest.raises(ValueError, match='not by paper'):
        upgrade('zoo/old', 'zoo/new', 'zoo/adapter', method='paper', drift_rank=8)

def test_it_is_worth_something_on_a_successor():
    new, test = load_model('zoo/new-far'), load_data('zoo/test.jsonl')[:160]
    scores = {rank: evaluate(new, test, upgrade('zoo/old', new, 'zoo/adapter', drift_rank=rank)[0])
              for rank in (None, 8)}
    assert scores[8].accuracy > scores[None].accuracy + .02

UPGRADE = 'upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter'

def ranks(adapter): return {len(A) for A, _ in adapter.updates.values()}

def test_the_command(tmp_path):
    done = CliRunner().invoke(app, [*UPGRADE, '--drift-rank', '4', '-o', str(tmp_path/'out')])
    assert done.exit_code == 0 and '4 ranks of each module are taken back' in done.stdout
    made, before = (ranks(Adapter.load(place)) for place in (tmp_path/'out', 'zoo/adapter'))
    assert made == before | {rank + 4 for rank in before} # a new layer without a partner keeps its untrained update
    assert 'taken back' in (tmp_path/'out'/'README.md').read_text(encoding='utf-8')
    cut = '4 --max-rank 8', 'give --max-rank 20 or more'
    for wrong, words in (cut, ('0', 'greater than or equal to 1'), ('4 --method paper', 'not by paper')):
        done = CliRunner().invoke(app, [*UPGRADE, '--drift-rank', *wrong.split(), '-o', str(tmp_path/'no')])
        assert done.exit_code == 2 and words in done.stderr and not (tmp_path/'no').exists()
