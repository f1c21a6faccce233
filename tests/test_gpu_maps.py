"""Maps of blocks on a GPU: the same calls, on a device that is only pretended here, give the same maps"""
import pytest, torch
from mixers import KINDS
from pretend import GPU, OnGPU, pretending
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.stages import alignment
from lorasuite.stages.alignment import align
from lorasuite.stages.cka import probe_texts
from lorasuite.stages.head_mapping import match

def test_the_pretended_device_refuses_what_a_real_one_refuses():
    X = torch.eye(2)
    with pretending():
        Y = X.to('cuda')
        assert Y.device == GPU and isinstance(Y@Y, OnGPU) and not isinstance(Y.cpu(), OnGPU)
        assert isinstance(torch.ones(2, device=Y.device), OnGPU) and isinstance(X.to(Y), OnGPU)
        for wrong in (lambda: X@Y, lambda: Y + torch.ones(2), lambda: torch.where(X > 0, Y, Y)):
            with pytest.raises(RuntimeError, match='same device'): wrong()
        with pytest.raises(TypeError, match='cuda'): Y.numpy()
        assert Y[torch.tensor([1])].tolist() == [[0, 1]] # indexes may be on the CPU
        assert match(Y).tolist() == [0, 1]

@pytest.mark.parametrize('method', ['exact', 'paper'])
def test_alignment(method, monkeypatch):
    old, new = load_model('zoo/old'), load_model('zoo/new')
    expected = align(old, new, probe_texts()[:16], method)
    monkeypatch.setattr(alignment, 'maps_device', lambda device: GPU)
    with pretending(): found = align(old, new, maps=expected, method=method)
    assert torch.equal(found.read, expected.read) and torch.equal(found.write, expected.write)
    check_equal(expected.blocks, found.blocks)

def check_equal(expected, found):
    "All maps are the same, and on the CPU"
    for a, b in zip(expected, found, strict=True):
        a, b = a.tensors(), b.tensors()
        assert a.keys() == b.keys() and not any(isinstance(t, OnGPU) for t in b.values())
        for name in a: assert torch.equal(a[name], b[name]), name

@pytest.mark.parametrize('name', ['gpt_oss', 'deepseek_v3', 'qwen3_next', 'jamba'])
def test_mixers(name, monkeypatch):
    old, new, truth = KINDS[name].pair()
    old, new = (Decoder(model, name=name) for model in (old, new))
    write = truth['stream'].double()
    for pair in enumerate(truth.get('layers', range(old.layers))):
        args = 'exact', old, new, pair, write.T, write, None
        expected = alignment._block_maps_by(*args)
        with monkeypatch.context() as patched, pretending():
            patched.setattr(alignment, 'maps_device', lambda device: GPU)
            found = alignment._block_maps_by(*args)
        check_equal([expected], [found])
        assert found.unmatched == expected.unmatched
