"""The exercise of the page on the field: its solution runs, and says what the text says"""
import json, re
from pathlib import Path
import torch
from lorasuite.core.adapter import Adapter, balance
from lorasuite.core.loading import load_model

def test_the_solution_runs(capsys):
    notebook = json.loads((Path(__file__).parents[1]/'nbs'/'course'/'25_field.ipynb').read_text(encoding='utf-8'))
    text = next(''.join(c['source']) for c in notebook['cells'] if '<summary>Solution</summary>' in ''.join(c['source']))
    torch.manual_seed(0)
    specialist = Adapter.load('zoo/adapter')
    other = Adapter({p: (torch.randn_like(A)*A.std(), torch.randn_like(B)*B.std()) for p, (A, B) in specialist.updates.items()})
    names = dict(torch=torch, Adapter=Adapter, balance=balance, old=load_model('zoo/old'), specialist=specialist, other=other)
    exec(re.search(r'```python\n(.*?)```', text, re.S)[1], names)
    near, near_factors, far, far_factors = (int(n) for n in re.findall(r'(\d+)%', capsys.readouterr().out))
    assert near <= near_factors < 10 < 2*far < far_factors
    mean = names['average']([specialist, other])
    for p in specialist.updates: torch.testing.assert_close(mean.delta(p), (specialist.delta(p) + other.delta(p))/2, rtol=0, atol=1e-5)
