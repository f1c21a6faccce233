"""The laboratory's records, and the advice that is made of them"""
import statistics
import pytest
from lorasuite.forecast.advice import advise, CLOSE, compared, expect, measured, NEEDS, OPTIONS, regret, text_advice
from lorasuite.lab import experiments, recipes, results, search, upgrades


def sign(agreement, **more): return dict(agreement_carried=agreement) | more

def test_records_hold_every_run_that_is_planned(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, 'STARTS', dict.fromkeys(lab.STARTS, lambda cell, seed: None))
    monkeypatch.setattr(lab, 'ALIGNED', ())
    kept = results.records()['runs']
    of = lambda hop, task: [r for r in kept if (r['hop'], r['task']) == (hop, task)]
    key = lambda r: tuple(r[k] for k in lab.RUN)
    for hop, task in lab.CELLS:
        rows, planned = of(hop, task), []
        lab.plan(lab.Cell(hop, task, tmp_path), lambda *how: planned.append((how[0], *how[2:])), rows, of(lab.LIKE.get(hop, hop), task))
        assert {p for p in planned if p[0] != 'copy'} <= {*map(key, rows)} <= {*planned} | {('signs', *[None]*4), ('copy', 'test', 0, 0., 0)}, (hop, task)
        assert len(rows) == len({*map(key, rows)})
        assert all(0 <= r['accuracy'] <= 1 for r in rows if r['way'] != 'signs')

def test_ways_that_know_only_the_new_model_are_shared():
    assert results.accuracies('far_back', 'labels', 'lora-all') == results.accuracies('back', 'labels', 'lora-all') != {}
    assert results.accuracies('far_back', 'labels', 'carried') != results.accuracies('back', 'labels', 'carried')
    assert results.accuracies('itself', 'labels', 'lora-all') == {}

def test_intervals():
    assert results.interval([.5]) == (.5, 0)
    m, h = results.interval([.1, .2, .3])
    assert m == pytest.approx(.2) and h == pytest.approx(4.302653*.1/3**.5)
    assert results.paired({0: .5}, {0: .4, 1: .5, 2: .6})[0] == pytest.approx(0)
    assert results.paired({0: .5, 1: .7, 2: .6}, {0: .4, 1: .6, 2: .5}) == pytest.approx((.1, 0), abs=1e-9)

def test_expectations_follow_the_nearest_and_stay_among_the_known():
    known = [(0., dict(carry=0., retrain=1.)), (1., dict(carry=1., retrain=.9))]
    xs = [expect(x, known) for x in (-.2, 0, .25, .5, .75, 1, 1.2)]
    assert [x['carry'] for x in xs] == sorted(x['carry'] for x in xs) and xs[1]['carry'] < .01 and xs[5]['carry'] > .99 and xs[3]['carry'] == pytest.approx(.5)
    assert all(.9 <= x['retrain'] <= 1 for x in xs) and expect(30., known)['carry'] == pytest.approx(.5) # nothing is like it

def test_advice_is_the_cheapest_of_the_good():
    for x in (0., .3, .6, .9, 1.):
        advice = advise(sign(x))
        better = [o for o in advice['keeps'] if advice['keeps'][o] >= max(advice['keeps'].values()) - CLOSE]
        assert advice['recommendation'] == better[0] and [*advice['keeps']] == [o for o in OPTIONS if o in advice['keeps']]
        assert advice['sign'] == 'agreement' and f"advice: {advice['recommendation']}" in text_advice(advice) and NEEDS[better[0]] in text_advice(advice)
    assert 'copy' not in advise(sign(.9))['keeps']

def test_a_copy_that_answers_alike_is_advised():
    assert advise(sign(1., agreement_copy=1.))['keeps']['copy'] == advise(sign(1.))['keeps']['carry']
    assert advise(sign(.9, agreement_copy=0.))['recommendation'] != 'copy'

def test_where_all_answers_agree_carrying_is_enough():
    assert expect(1., [(.5, dict(carry=.5, retrain=1.))], ('carry',)) == dict(carry=1., retrain=1.)
    advice = advise(sign(1.))
    assert advice['recommendation'] == 'carry' and advice['keeps']['carry'] == pytest.approx(1, abs=.02)

def test_a_hop_is_judged_without_itself():
    m = next(m for m in measured() if m['hop'] == 'far')
    assert advise(m, without='far')['keeps'] != advise(m)['keeps'] == advise(m, without='nothing')['keeps']

def test_without_questions_kinship_decides():
    signs = [next(m for m in measured() if m['hop'] == hop) for hop in ('new', 'stranger')]
    near, far = (advise({k: v for k, v in m.items() if not k.startswith('agreement')}) for m in signs)
    assert near['sign'] == far['sign'] == 'heads' and near['keeps']['carry'] > .7 > .2 > far['keeps']['carry']

def test_following_the_advice_costs_little():
    policies = {option: statistics.mean(regret(m, option) for m in compared()) for option in OPTIONS if option != 'copy'}
    advised = statistics.mean(regret(m, advise(m, without=m['hop'])['recommendation']) for m in compared())
    assert advised <= .01 and advised < policies['carry']/5
