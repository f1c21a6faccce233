"""Rounds of a training: when they end, what they save, and what an interrupted one goes on with"""
import json
from statistics import mean
import pytest
from test_finetune import launch
from typer.testing import CliRunner
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.training import rounds as module
from lorasuite.training.evaluate import pad_id
from lorasuite.training.examples import load_data
from lorasuite.training.prompts import Renderer
from lorasuite.training.refresh import (
    answer_rows, distillation_data, Overheard, pseudo_label, refresh, teacher_top_k
)
from lorasuite.training.refresh_many import learn_lessons, RefreshOptions
from lorasuite.training.rounds import answer_chances, refresh_in_rounds
from lorasuite.training.trainer import LightTrainer

LINES = (data_dir()/'zoo'/'train.jsonl').read_text().splitlines(keepends=True)

def run(*args): return CliRunner().invoke(app, [str(a) for a in args])

@pytest.fixture(scope='module')
def zoo(): return {n: load_model(f'zoo/{n}') for n in ('old', 'new', 'stranger')}

@pytest.fixture(scope='module')
def specialist(): return Adapter.load('zoo/adapter')

@pytest.fixture(scope='module')
def taught(zoo, specialist):
    return distillation_data(zoo['old'], load_data(data_dir()/'zoo'/'train.jsonl', labelled=False)[:48], specialist)

@pytest.fixture
def clock(monkeypatch):
    "A clock on which every look takes a second: rounds end at the same steps on every machine; no patience"
    class Clock:
        now = 0.
        def perf_counter(self):
            self.now += 1.
            return self.now
    monkeypatch.setattr(module, 'time', Clock())
    monkeypatch.setattr(module, 'SLOW_START', 0)

def judged(monkeypatch, *chances):
    "Chances that are measured one after another, the last for ever: of each answer, or the same of all"
    left = [c if isinstance(c, list) else [c, c] for c in chances]
    monkeypatch.setattr(module, 'answer_chances', lambda *args: left.pop(0) if len(left) > 1 else left[0])

def interrupted(monkeypatch, at):
    "A training that is interrupted once, at a step"
    step, made = LightTrainer.training_step, []
    def stop(self, *args, **kwargs):
        made.append(1)
        if len(made) == at: raise KeyboardInterrupt
        return step(self, *args, **kwargs)
    monkeypatch.setattr(LightTrainer, 'training_step', stop)

def bytes_of(adapter): return {path: (A.numpy().tobytes(), B.numpy().tobytes()) for path, (A, B) in
                               adapter.updates.items()}

@pytest.mark.parametrize('chances, steps', [((.5, .5), 16), ((.5, .6, .6), 32), ((.5, .5, .6, .6), 64),
                                            ((.5, .6, .7, .8, .9, .9), 192)])
def test_two_rounds_without_gain_end_it(zoo, taught, clock, monkeypatch, chances, steps):
    judged(monkeypatch, *chances)
    said = []
    refreshed, losses = refresh_in_rounds(zoo['old'], taught, batch_size=2, say=said.append)
    assert len(losses) == steps and len(said) == len(losses.chances) - 1
    assert said[-1].endswith('the last round: another minute brings less than a point')
    assert f'{steps} steps' in refreshed.card and '6 lessons kept aside' in refreshed.card

def test_a_fresh_lora_may_bring_nothing_at_first(zoo, taught, specialist, clock, monkeypatch):
    "Between unrelated models 16 steps are no sign: there a refresh went from 6 to 93% in a minute"
    monkeypatch.setattr(module, 'SLOW_START', 64)
    for start, chances, steps in ((None, (.5,), 64), (specialist, (.5,), 16), (None, (.5, float('nan')), 16)):
        judged(monkeypatch, *chances)
        _, losses = refresh_in_rounds(zoo['old'], taught, start, batch_size=2)
        assert len(losses) == steps

def test_a_training_in_rounds_is_one_of_the_lessons_left(zoo, taught, clock, monkeypatch):
    "A single round of eight steps, by hand: the rate falls, one lesson in eight is not learned"
    judged(monkeypatch, .5)
    first = refresh_in_rounds(zoo['old'], taught, seconds=1e-3, rank=4)
    learned = [e for i, e in enumerate(taught) if i % 8]
    by_hand = refresh(zoo['old'], learned, steps=8, batch_size=8, rank=4, warmup_steps=0)
    assert first[1] == by_hand[1] and bytes_of(first[0]) == bytes_of(by_hand[0])

def test_the_time_is_kept(zoo, taught, clock, monkeypatch):
    "A look takes a second: after 8 steps ten fit into the 2.5 s that are left, then nine, half a round; then too few"
    judged(monkeypatch, .1, .2, .3, .4, .5, .6, .7, .8, .9)
    said = []
    _, losses = refresh_in_rounds(zoo['old'], taught, seconds=4.5, batch_size=2, say=said.append)
    assert [*losses.chances] == [0, 8, 18, 27]
    assert said[-1].endswith('the last round: no further one fits into the time')

@pytest.mark.parametrize('chances, best', [((.5, .4, .3), 0), ((.1, .2, .8, .7, .7), 16), ((.1, .2, .2, .2), 32)])
def test_the_best_student_is_handed_back(zoo, taught, clock, monkeypatch, tmp_path, chances, best):
    "Of equal ones the last; an interrupted run remembers one that was better than where it goes on"
    how = dict(batch_size=2, rank=4)
    judged(monkeypatch, *chances)
    refreshed, losses = refresh_in_rounds(zoo['new'], taught, **how)
    if best == 16:
        judged(monkeypatch, .8) # flat from the start: two rounds
        shorter, steps = refresh_in_rounds(zoo['new'], taught, **how)
        assert len(steps) == best and bytes_of(refreshed) == bytes_of(shorter)
    assert any(refreshed.delta(path).any() for path in refreshed.updates) == (best > 0)
    assert f'{max(chances):.1%} after it' in refreshed.card
    assert (f'(after {best} steps;' in refreshed.card) == (best < len(losses))
    judged(monkeypatch, *chances)
    interrupted(monkeypatch, len(losses) - 2)
    with pytest.raises(KeyboardInterrupt): refresh_in_rounds(zoo['new'], taught, checkpoints=tmp_path/'c', **how)
    judged(monkeypatch, chances[-1])
    again, _ = refresh_in_rounds(zoo['new'], taught, checkpoints=tmp_path/'c', **how)
    assert bytes_of(again) == bytes_of(refreshed) and again.card == refreshed.card

def test_lessons_that_took_the_whole_budget_leave_one_round(zoo, taught, specialist, clock, monkeypatch, tmp_path):
    judged(monkeypatch, .1, .2, .3, .4)
    how = dict(options=RefreshOptions(budget=5.), checkpoints=tmp_path/'checkpoints', spent=7.)
    _, losses = learn_lessons(zoo['new'], taught, specialist, None, [], **how)
    assert len(losses) == 8

def test_an_interrupted_training_goes_on_with_its_last_round(zoo, taught, clock, monkeypatch, tmp_path):
    def go():
        judged(monkeypatch, .1, .2, .3, .3, .3)
        return refresh_in_rounds(zoo['new'], taught, batch_size=2, rank=4, checkpoints=tmp_path/'checkpoints')
    whole = go()
    interrupted(monkeypatch, 20)
    other = tmp_path/'other'
    judged(monkeypatch, .1, .2, .3, .3, .3)
    how = dict(batch_size=2, rank=4, checkpoints=other)
    with pytest.raises(KeyboardInterrupt): refresh_in_rounds(zoo['new'], taught, **how)
    assert {p.name for p in other.glob('checkpoint-*')} == {'checkpoint-8', 'checkpoint-16'}
    judged(monkeypatch, .3, .3)
    again = refresh_in_rounds(zoo['new'], taught, **how)
    assert again[1] == whole[1] and again[1].chances == whole[1].chances
    assert bytes_of(again[0]) == bytes_of(whole[0])

def test_a_student_that_may_be_as_good_is_kept(zoo, taught, clock, monkeypatch):
    "A little lower on four answers is not worse; much lower is, and so is what gives no number"
    start, little, much, none = [.9, .5, .9, .5], [.89, .52, .86, .5], [.5, .1, .4, .2], [float('nan')]*4
    for later, kept in ((little, 16), (much, 0), (none, 0)):
        judged(monkeypatch, start, later)
        refreshed, run = refresh_in_rounds(zoo['new'], taught, batch_size=2, rank=4)
        assert run.kept == kept and len(run) == 16
        assert any(refreshed.delta(path).any() for path in refreshed.updates) == (kept > 0)
        assert ('and is left out' in refreshed.card) == (kept < 16)

def test_other_lessons_are_another_run(zoo, taught, clock, monkeypatch, tmp_path):
    judged(monkeypatch, .1, .2, .2)
    interrupted(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        refresh_in_rounds(zoo['new'], taught, batch_size=2, rank=4, checkpoints=tmp_path/'checkpoints')
    with pytest.raises(ValueError, match='interrupted run that differs from this one'):
        refresh_in_rounds(zoo['new'], [*taught][::-1], batch_size=2, rank=4, checkpoints=tmp_path/'checkpoints')

def test_the_chance_is_that_of_the_answers(zoo, taught, specialist):
    "The specialist gives its own answers the chance that its lessons say"
    rows = answer_rows(Renderer.of(zoo['old']), [*taught])
    with specialist.on(zoo['old']) as model: found = mean(answer_chances(model, zoo['old'].tokenizer, rows))
    def own(note):
        chances = [dict(zip(o, c))[t] for t, o, c in zip(note['tokens'], note['options'], note['chances'])]
        product = 1.
        for chance in chances: product *= chance
        return product**(1/len(chances))
    assert found == pytest.approx(sum(map(own, taught))/len(taught), rel=1e-4)
    assert not zoo['old'].model.training

def test_what_is_overheard_is_what_is_read(zoo, specialist):
    "Prompts of unlike lengths, an answer twice, and one that is no answer of the model"
    old, questions = zoo['old'], load_data(data_dir()/'zoo'/'train.jsonl', labelled=False)[:20]
    questions += [questions[0], dict(instruction=questions[1]['instruction'] + ' Say it again, please, and slowly.')]
    heard = Overheard(8, pad_id(old.tokenizer))
    with specialist.on(old) as model:
        examples = pseudo_label(model, old.tokenizer, questions, listener=heard)
        rows = answer_rows(Renderer(old.tokenizer), examples)
        assert sum(heard.at(row) is not None for row in rows) == len(rows)
        other = examples[0] | dict(output='Nowhere', answer='Nowhere')
        assert heard.at(answer_rows(Renderer(old.tokenizer), [other])[0]) is None
        listened = teacher_top_k(model, old.tokenizer, [*examples, other], 8, heard=heard)
        read = teacher_top_k(model, old.tokenizer, [*examples, other], 8)
    for a, b in zip(listened, read, strict=True):
        assert a['tokens'] == b['tokens']
        for o, c, o2, c2 in zip(a['options'], a['chances'], b['options'], b['chances'], strict=True):
            assert dict(zip(o, c)) == pytest.approx(dict(zip(o2, c2)), abs=1e-5)

@pytest.mark.parametrize('options, message', [
    (['--budget', '5'], "--budget '5' is no duration: write it as 90s, 5m or 1.5h"),
    (['--budget', '5m', '--steps', 3], '--budget cannot apply beside --steps'),
    (['--budget', '5m', '--epochs', 3], '--budget cannot apply beside --epochs')])
def test_budgets_that_cannot_be(tmp_path, options, message):
    command = ['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', 'zoo/test.jsonl', '-o', tmp_path/'o']
    result = run(*command, *options)
    assert result.exit_code == 2 and message in result.stderr and not [*tmp_path.iterdir()]

def test_two_processes_stop_together(tmp_path):
    (tmp_path/'asked.jsonl').write_text(''.join(LINES[:32]))
    running = launch(['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', str(tmp_path/'asked.jsonl'),
                      '-o', str(tmp_path/'out'), '--budget', '4s', '--json'])
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err[-3000:]
    assert json.loads(out)['steps'] >= 8 and 'after 8 steps' in err
    assert {p.name for p in tmp_path.iterdir()} == {'asked.jsonl', 'out'}

def test_resumed_with_less_time_than_it_took(zoo, taught, clock, monkeypatch, tmp_path):
    "One round is made in any case, and with a whole fall of the rate"
    judged(monkeypatch, .1, .2, .3, .4)
    interrupted(monkeypatch, 12)
    how = dict(batch_size=2, rank=4, checkpoints=tmp_path/'checkpoints')
    with pytest.raises(KeyboardInterrupt): refresh_in_rounds(zoo['new'], taught, seconds=60., **how)
    said = []
    refreshed, losses = refresh_in_rounds(zoo['new'], taught, seconds=.1, say=said.append, **how)
    assert len(losses) == 16 and [*losses.chances] == [0, 8, 16]
    assert said[-1].endswith('the last round: no further one fits into the time')

def test_no_number_is_no_gain(zoo, taught, clock, monkeypatch):
    "A training that has come to grief ends after two rounds and not after a million steps"
    judged(monkeypatch, .5, float('nan'))
    _, losses = refresh_in_rounds(zoo['old'], taught, batch_size=2)
    assert len(losses) == 16

def test_labels_kept_aside_are_not_learned(zoo, taught, clock, monkeypatch):
    "Where labels answer all questions, some of them judge; where there are too few to spare one, the card says so"
    judged(monkeypatch, .5)
    rows = load_data(data_dir()/'zoo'/'train.jsonl')[:48]
    refreshed, _ = refresh_in_rounds(zoo['old'], taught, labelled=rows, batch_size=2)
    assert 'Refreshed on 0 answers of the old specialist and 42 labelled examples' in refreshed.card
    assert '- on 6 lessons kept aside, the mean chance of an answer' in refreshed.card
    few, _ = refresh_in_rounds(zoo['old'], list(taught)[:4], batch_size=2)
    assert '- on 4 lessons that were learned too, the mean chance of an answer' in few.card
