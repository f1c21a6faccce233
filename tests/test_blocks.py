"""Blocks: what is read of a model, and that a new kind of unit is a matter of rows in one table"""
from dataclasses import replace
import pytest, torch
from models import random_decoder
from lorasuite.core.block import Block, read_block
from lorasuite.core.model import BlockInfo, model_info, ModelInfo, Norm
from lorasuite.stages.alignment import Pair
from lorasuite.stages.block_maps import exact_block
from lorasuite.stages.transfer import transfer_updates

FAMILIES = ['llama', 'qwen3', 'gemma2', 'phi3', 'olmo2', 'gpt_neox', 'gpt2', 'bloom', 'falcon', 'opt']

@pytest.mark.parametrize('family', FAMILIES)
def test_shapes_follow_from_the_spaces_of_roles(family, tokenizer):
    decoder = random_decoder(tokenizer, family, layers=2)
    block, info = read_block(decoder, 1), model_info(decoder)
    assert block.roles == decoder.roles
    for role in block.roles:
        assert tuple(block.weight(role).shape) == tuple(block.weight(role, fold=False).shape) == info.shape(1, role)
        rows = info.blocks[1].fused_rows(info.blocks[1].modules[role])[role]
        assert len(rows) == info.shape(1, role)[0]
    assert block.by_head('q').shape == block.by_head('o').shape == (decoder.heads, decoder.head_size, decoder.hidden)

def test_a_model_info_survives_json(tokenizer):
    info = replace(model_info(random_decoder(tokenizer, 'phi3')), revision='abc', sha256={'model.safetensors': '0'})
    kept = info.to_json()
    assert 'ends' in kept and 'embedding_paths' not in kept
    assert ModelInfo.from_json(kept) == info
    with pytest.raises(TypeError): ModelInfo.from_json(kept | dict(unknown=1))

# ---- a toy kind of block: beside attention and the MLP, a second set of units with one reader and one writer

TWINS = {'twin.up': ('stream', 'twins'), 'twin.down': ('twins', 'stream')}

@pytest.fixture
def toy(tokenizer):
    "A block with twelve twins, and its copy with the twins in another order, scaled, and one more that is idle"
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    old, order, scale = read_block(random_decoder(tokenizer), 0), torch.randperm(12, generator=g), .5 + draw(12).abs()
    rows, columns = draw(12, old.hidden), draw(old.hidden, 12)
    idle = torch.zeros(1, old.hidden).double()
    rows2 = torch.cat([(scale[:, None]*rows)[order], idle])
    columns2 = torch.cat([(columns/scale)[:, order], idle.T], 1)
    def with_twins(rows, columns):
        found = replace(old.found, modules=old.found.modules | {role: role for role in TWINS},
                        spaces=old.found.spaces | TWINS)
        weights = old.weights | {'twin.up': rows, 'twin.down': columns}
        ones = torch.ones(old.hidden).double()
        before = old.before | {'twin.up': Norm('rms', ones, 0*ones)}
        behind = old.behind | {'twin.up': torch.ones(len(rows)).double(), 'twin.down': ones}
        return Block(old.path, found, weights, before, behind, old.hidden, old.norm_kind)
    return with_twins(rows, columns), with_twins(rows2, columns2), order

def test_a_second_mlp_needs_spaces_of_its_roles_only(toy):
    old, new, order = toy
    same = torch.eye(old.hidden).double()
    maps = exact_block(old, new, same, same)
    assert maps.partners['twins'].tolist() == [*order.tolist(), -1]
    shapes = {role: tuple(old.weights[role].shape) for role in TWINS}
    info = BlockInfo(dict.fromkeys(TWINS, ''), {}, TWINS, shapes)
    pair = Pair((0, 0), maps, info, info, same, same)
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x = draw(old.hidden)
    out = lambda block, rows, columns: (block.weights['twin.down'] + columns)@((block.weights['twin.up'] + rows)@x)
    update = {role: (draw(2, inputs), draw(outputs, 2)) for role, (outputs, inputs) in shapes.items()}
    carried = transfer_updates(update, pair)
    dense = lambda updates: [B@A for A, B in (updates['twin.up'], updates['twin.down'])]
    assert torch.allclose(out(new, *dense(carried)), out(old, *dense(update)))
