"""The laboratory's records, and the advice that is made of them"""
import statistics
import pytest
from scipy.stats import fisher_exact, ttest_1samp, ttest_rel
from lorasuite.forecast.advice import (
    advise, CALIBRATION, CLOSE, compared, expect, measured, OPTIONS, regret, text_advice)
from lorasuite.lab import results
from lorasuite.lab.experiments import EXPERIMENTS, plan, SETTINGS_FROM
from lorasuite.lab.recipes import Experiment, RUN_KEY
from lorasuite.lab.store import select_runs


def sign(agreement, **more): return dict(agreement_carried=agreement) | more

@pytest.mark.parametrize('upgrade, task', EXPERIMENTS)
def test_records_hold_every_run_that_is_planned(upgrade, task, tmp_path):
    "Whether there is a direct copy, the plan cannot say without models"
    recorded = results.records()['runs']
    rows = select_runs(recorded, hop=upgrade, task=task)
    others = select_runs(recorded, hop=SETTINGS_FROM.get(upgrade, upgrade), task=task)
    planned, experiment = [], Experiment(upgrade, task, tmp_path)
    experiment.copies = False
    plan(experiment, lambda name, method, *how: planned.append((name, *how)), rows, others)
    keys = {tuple(row[column] for column in RUN_KEY) for row in rows}
    assert len(rows) == len(keys)
    assert {*planned} <= keys <= {*planned} | {('signs', *[None]*4), ('copy', 'test', 0, 0., 0)}
    assert all(0 <= row['accuracy'] <= 1 for row in rows if row['way'] != 'signs')

def test_methods_that_know_only_the_new_model_are_shared():
    def found(upgrade): return {m: results.accuracies(upgrade, 'labels', m) for m in ('lora-all', 'carried')}
    far_back, back = found('far_back'), found('back')
    assert far_back['lora-all'] == back['lora-all'] != {} and far_back['carried'] != back['carried']
    assert results.accuracies('itself', 'labels', 'lora-all') == {}

def test_intervals():
    assert results.interval([.5]) == (.5, 0)
    m, h = results.interval([.1, .2, .3])
    assert m == pytest.approx(.2) and h == pytest.approx(4.302653*.1/3**.5)
    assert results.paired({0: .5}, {0: .4, 1: .5, 2: .6})[0] == pytest.approx(0)
    assert results.paired({0: .5, 1: .7, 2: .6}, {0: .4, 1: .6, 2: .5}) == pytest.approx((.1, 0), abs=1e-9)

def test_p_values_are_those_of_scipy():
    "A paired t-test over draws, Fisher's exact test for single runs"
    xs, ys = dict(enumerate([.5, .7, .65])), dict(enumerate([.4, .65, .6]))
    assert results.p_value(xs, ys) == pytest.approx(ttest_rel([*xs.values()], [*ys.values()]).pvalue)
    assert results.p_value(xs, {0: .3}) == pytest.approx(ttest_1samp([*xs.values()], .3).pvalue)
    assert results.p_value({0: .6}, {0: .5}, 200) == pytest.approx(fisher_exact([[120, 80], [100, 100]]).pvalue)
    assert results.p_value({0: .5, 1: .5}, {0: .5, 1: .5}) == 1 and results.p_value({0: .5, 1: .5}, {0: .4, 1: .4}) == 0
    assert results.unpaired(.6, .5, 100) == (pytest.approx(.1), pytest.approx(1.96*.07))

def test_p_values_are_corrected_for_their_number():
    "Holm's step-down method, in any order, never below the plain p-value nor above Bonferroni's"
    ps = dict(a=.04, b=.01, c=.03, d=.9)
    found = results.holm(ps)
    assert found == pytest.approx(dict(a=.09, b=.04, c=.09, d=.9)) and [*found] == [*ps]
    assert all(ps[k] <= found[k] <= min(1, 4*ps[k]) for k in ps)
    assert results.holm(dict(a=.01)) == dict(a=.01) and results.holm({}) == {}

def test_the_calibration_is_made_of_the_records(tmp_path):
    "The file that the advice reads is what the laboratory's records give, byte for byte"
    results.write_calibration(tmp_path/'calibration.json')
    assert (tmp_path/'calibration.json').read_bytes() == CALIBRATION.read_bytes()
    with pytest.raises(OSError, match='cannot write'): results.write_calibration(tmp_path/'missing'/'calibration.json')

def test_the_calibration_holds_what_the_records_say():
    "Computed here once more, without the function that writes it"
    recorded = results.records()['runs']
    signs = [r for r in recorded if r['way'] == 'signs']
    assert [(m['upgrade'], m['task']) for m in measured()] == [(r['hop'], r['task']) for r in signs]
    for m, r in zip(measured(), signs):
        names = {*r} - {'hop', 'task', 'way', 'split', 'steps', 'lr', 'seed'}
        assert {*m} == names | {'upgrade', 'task', 'kept'} and all(m[name] == r[name] for name in names)
        for option, method in results.OPTION_METHODS.items():
            xs = results.accuracies(r['hop'], r['task'], method)
            assert (option in m['kept']) == bool(xs)
            if xs: assert m['kept'][option] == statistics.mean(xs.values())/r['old']
    assert OPTIONS.keys() == results.OPTION_METHODS.keys()

ADVISED = dict( # upgrade: for labels and sums what the advice was before it had a file of its own, with all upgrades
    # and without this one; and the share that carrying should keep, judged without this one
    far=[('carry + refresh', 'carry + refresh', 0.9437), ('retrain', 'carry + refresh', 0.7063)],
    stranger=[('retrain', 'retrain', 0.0229), ('retrain', 'retrain', 0.0341)],
    new=[('carry + refresh', 'carry', 0.9886), ('carry + refresh', 'carry + refresh', 0.9786)],
    sibling=[('carry + refresh', 'carry + refresh', 0.9874), ('carry + refresh', 'carry + refresh', 0.9675)],
    back=[('carry + refresh', 'carry + refresh', 0.906), ('retrain', 'retrain', 0.404)],
    far_back=[('retrain', 'carry + refresh', 0.6995), ('carry + refresh', 'carry + refresh', 0.5507)],
    strange_back=[('retrain', 'retrain', 0.0328), ('retrain', 'retrain', 0.0779)],
    short=[('carry + refresh', 'carry + refresh', 0.858), ('carry + refresh', 'carry + refresh', 0.8476)],
    medium=[('carry + refresh', 'carry + refresh', 0.945), ('carry + refresh', 'carry + refresh', 0.769)],
    enlarged=[('carry', 'carry', 1.0062), ('carry', 'carry', 1.0062)],
    itself=[('copy', 'copy', 1.0062), ('copy', 'copy', 1.0062)])

def test_the_advice_is_what_it_was_before_it_had_a_file_of_its_own():
    for m in measured():
        alone = advise(m, without=m['upgrade'])
        found = advise(m)['recommendation'], alone['recommendation'], round(alone['keeps']['carry'], 4)
        assert found == ADVISED[m['upgrade']][m['task'] == 'sums'], (m['upgrade'], m['task'])
    assert len(measured()) == 2*len(ADVISED)

def test_expectations_follow_the_nearest_and_stay_among_the_known():
    known = [(0., dict(carry=0., retrain=1.)), (1., dict(carry=1., retrain=.9))]
    xs = [expect(x, known) for x in (-.2, 0, .25, .5, .75, 1, 1.2)]
    carried = [x['carry'] for x in xs]
    assert carried == sorted(carried) and carried[1] < .01 and carried[5] > .99 and carried[3] == pytest.approx(.5)
    assert all(.9 <= x['retrain'] <= 1 for x in xs)
    assert expect(30., known)['carry'] == pytest.approx(.5) # nothing is like it

def test_advice_is_the_cheapest_of_the_good():
    for x in (0., .3, .6, .9, 1.):
        advice = advise(sign(x))
        better = [o for o in advice['keeps'] if advice['keeps'][o] >= max(advice['keeps'].values()) - CLOSE]
        assert advice['recommendation'] == better[0]
        assert [*advice['keeps']] == [o for o in OPTIONS if o in advice['keeps']]
        text = text_advice(advice)
        assert advice['sign'] == 'agreement' and f"advice: {better[0]}" in text and OPTIONS[better[0]] in text
    assert 'copy' not in advise(sign(.9))['keeps']

def test_a_copy_that_answers_alike_is_advised():
    assert advise(sign(1., agreement_copy=1.))['keeps']['copy'] == advise(sign(1.))['keeps']['carry']
    assert advise(sign(.9, agreement_copy=0.))['recommendation'] != 'copy'

def test_where_all_answers_agree_carrying_is_enough():
    assert expect(1., [(.5, dict(carry=.5, retrain=1.))], ('carry',)) == dict(carry=1., retrain=1.)
    advice = advise(sign(1.))
    assert advice['recommendation'] == 'carry' and advice['keeps']['carry'] == pytest.approx(1, abs=.02)

def test_an_upgrade_is_judged_without_itself():
    m = next(m for m in measured() if m['upgrade'] == 'far')
    assert advise(m, without='far')['keeps'] != advise(m)['keeps'] == advise(m, without='nothing')['keeps']

def test_without_questions_relatedness_decides():
    signs = [next(m for m in measured() if m['upgrade'] == name) for name in ('new', 'stranger')]
    near, far = (advise({k: v for k, v in m.items() if not k.startswith('agreement')}) for m in signs)
    assert near['sign'] == far['sign'] == 'heads'
    assert near['keeps']['carry'] > .7 > .2 > far['keeps']['carry']

def test_following_the_advice_costs_little():
    carrying = statistics.mean(regret(m, 'carry') for m in compared())
    advised = statistics.mean(regret(m, advise(m, without=m['upgrade'])['recommendation']) for m in compared())
    assert advised <= .01 and advised < carrying/5
