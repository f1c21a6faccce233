"""Blocks: what is read of a model, and that a new kind of unit is a matter of rows in one table"""
from dataclasses import replace
import pytest, torch
from models import random_decoder
from lorasuite.core.architecture import ROLE_SPACES
from lorasuite.core.block import Block, read_block
from lorasuite.core.model import model_info, ModelInfo, Norm
from lorasuite.stages.alignment import Alignment
from lorasuite.stages.block_maps import exact_block
from lorasuite.stages.transfer import transfer_update

FAMILIES = ['llama', 'qwen3', 'gemma2', 'phi3', 'olmo2', 'gpt_neox', 'gpt2', 'bloom', 'falcon', 'opt']

@pytest.mark.parametrize('family', FAMILIES)
def test_shapes_follow_from_the_spaces_of_roles(family, tokenizer):
    decoder = random_decoder(tokenizer, family, layers=2)
    block, info = read_block(decoder, 1), model_info(decoder)
    assert block.roles == decoder.roles
    for role in block.roles:
        assert tuple(block.weight(role).shape) == tuple(block.weight(role, fold=False).shape) == info.shape(role)
        rows = sum(map(len, [info.fused_rows(info.modules[role])[role]]))
        assert rows == info.shape(role)[0]
    assert block.by_head('q').shape == block.by_head('o').shape == (decoder.heads, decoder.head_size, decoder.hidden)

def test_a_model_info_survives_json(tokenizer):
    info = replace(model_info(random_decoder(tokenizer, 'phi3')), revision='abc', sha256={'model.safetensors': '0'})
    kept = info.to_json()
    assert 'ends' in kept and 'embedding_paths' not in kept
    assert ModelInfo.from_json(kept) == info
    with pytest.raises(TypeError): ModelInfo.from_json(kept | dict(unknown=1))

# ---- a toy kind of block: beside attention and the MLP, a second set of units with one reader and one writer

TWINS = dict(twin_in=('stream', 'twins'), twin_out=('twins', 'stream'))

@pytest.fixture
def toy(monkeypatch, tokenizer):
    "A block with twelve twins, and its copy with the twins in another order, scaled, and one more that is idle"
    for role, spaces in TWINS.items(): monkeypatch.setitem(ROLE_SPACES, role, spaces)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    old, order, scale = read_block(random_decoder(tokenizer), 0), torch.randperm(12, generator=g), .5 + draw(12).abs()
    rows, columns = draw(12, old.hidden), draw(old.hidden, 12)
    idle = torch.zeros(1, old.hidden).double()
    rows2 = torch.cat([(scale[:, None]*rows)[order], idle])
    columns2 = torch.cat([(columns/scale)[:, order], idle.T], 1)
    def with_twins(rows, columns):
        weights = old.weights | dict(twin_in=rows, twin_out=columns)
        ones = torch.ones(old.hidden).double()
        before = old.before | dict(twin_in=Norm('rms', ones, 0*ones))
        behind = old.behind | dict(twin_in=torch.ones(len(rows)).double(), twin_out=ones)
        return Block(old.path, weights, before, behind, old.heads, old.kv_heads, old.head_size, old.norm_kind)
    return with_twins(rows, columns), with_twins(rows2, columns2), order

def test_a_new_kind_of_unit_needs_rows_in_one_table_only(toy, tokenizer):
    old, new, order = toy
    same = torch.eye(old.hidden).double()
    maps = exact_block(old, new, same, same)
    assert maps.partners['twins'].tolist() == [*order.tolist(), -1]
    info = model_info(random_decoder(tokenizer))
    alignment = Alignment('exact', info, info, same, same, [(0, 0)], [maps], {}, same)
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x, shape = draw(old.hidden), {role: tuple(old.weights[role].shape) for role in TWINS}
    out = lambda block, rows, columns: (block.weights['twin_out'] + columns)@((block.weights['twin_in'] + rows)@x)
    update = {role: (draw(2, inputs), draw(outputs, 2)) for role, (outputs, inputs) in shape.items()}
    carried = {role: transfer_update(role, *ab, maps, alignment) for role, ab in update.items()}
    dense = lambda updates: [B@A for A, B in (updates['twin_in'], updates['twin_out'])]
    assert torch.allclose(out(new, *dense(carried)), out(old, *dense(update)))
