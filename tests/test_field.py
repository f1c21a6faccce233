"""The exercise of the page on the field: its solution runs, and says what the text says"""
import json, re
from pathlib import Path
import torch
from lorasuite.core.adapter import Adapter, balance
from lorasuite.core.loading import load_model

NOTEBOOK = Path(__file__).parents[1]/'nbs'/'course'/'25_field.ipynb'

def solution():
    cells = [''.join(c['source']) for c in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']]
    text = next(c for c in cells if '<summary>Solution</summary>' in c)
    return re.search(r'```python\n(.*?)```', text, re.S)[1]

def alike(A, B): return torch.randn_like(A)*A.std(), torch.randn_like(B)*B.std()

def test_the_solution_runs(capsys):
    torch.manual_seed(0)
    specialist = Adapter.load('zoo/adapter')
    other = Adapter({p: alike(A, B) for p, (A, B) in specialist.updates.items()})
    names = dict(torch=torch, Adapter=Adapter, balance=balance, old=load_model('zoo/old'), specialist=specialist,
                 other=other)
    exec(solution(), names)
    near, near_factors, far, far_factors = (int(n) for n in re.findall(r'(\d+)%', capsys.readouterr().out))
    assert near <= near_factors < 10 < 2*far < far_factors
    mean = names['average']([specialist, other])
    for p in specialist.updates:
        true = (specialist.delta(p) + other.delta(p))/2
        torch.testing.assert_close(mean.delta(p), true, rtol=0, atol=1e-5)
