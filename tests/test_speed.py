"""The comparisons behind the page on speed: what they compare computes the same, and all of them were measured"""
import json, sys
from pathlib import Path
import torch
from lorasuite.core.files import data_dir

sys.path.append(str(Path(__file__).parents[1]/'benchmarks'))
import bench

def test_every_comparison_was_measured():
    found = json.loads((data_dir()/'benchmarks.json').read_text(encoding='utf-8'))
    assert {*bench.COMPARISONS} <= {*found}
    assert all(x > 0 for row in found.values() for seconds in row['seconds'].values() for x in seconds)

def test_tables_of_recorded_activations():
    one, other = bench.recorded_models(layers=3, batches=2, rows=16, width=8)
    table = bench.compare_ours(one, other)
    data = [torch.full((16, 1), float(i)) for i in range(2)]
    assert table.shape == (3, 3)
    assert all(torch.equal(one(x), kept) for x, kept in zip(data, one.layers[-1].kept))

def test_a_layer_as_the_formula_is_written():
    "What is carried from blocks of h × h' numbers is what the formula gives as matrices"
    old, new = bench.one_block(64, 4, 4, 16), bench.one_block(96, 4, 4, 24)
    H = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))/10
    A, B = torch.randn(2, 64), torch.randn(64, 2)
    A2, B2 = bench.factored(old, new, H, dict(q=(A, B)))['q']
    partners = bench.partners_of(old, new, H).tolist()
    q, q2 = (block.by_head('q', fold=False) for _, block in (old, new))
    heads = [q2[b]@H.T@q[a].T@(B@A).split(16)[a]@H for b, a in enumerate(partners)]
    assert torch.allclose(torch.cat(heads), B2@A2, atol=1e-3*(B2@A2).abs().max())
    assert bench.dense_seconds(old, new, H) > 0
