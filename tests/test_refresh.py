"""The old specialist as a teacher: what it says, byte by byte, and what students learn of it"""
import json
from functools import cache
import pytest, torch
from hypothesis import given, settings, strategies as st
from models import error, whole
from test_finetune import launch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.tokens import bytes_to_id, id_to_bytes
from lorasuite.training.evaluate import evaluate
from lorasuite.training.examples import encode, load_data
from lorasuite.training.finetune import finetune, init_adapter
from lorasuite.training.refresh import (
    continuations, distillation_data, project_to_vocabulary, pseudo_label, refresh, student_targets,
    teacher_top_k, token_starts, token_texts
)
from lorasuite.training.trainer import learned_positions
from lorasuite.lab.world import corpus
from lorasuite.cli import app

PLACES = 'Arden Birch Colm Dover Elmo Ferry Gale Hythe'.split()
ROWS = [dict(instruction=f'Where does {name} live?', input='', output=place, answer=place)
        for name, place in zip('Ann Bob Cid Dan Eve Fay Gus Hal'.split(), PLACES)]

@pytest.fixture(scope='module')
def zoo(): return {n: load_model(f'zoo/{n}') for n in ('old', 'stranger')}

@pytest.fixture(scope='module')
def specialist(): return Adapter.load('zoo/adapter')

@pytest.fixture(scope='module')
def questions(): return load_data(data_dir()/'zoo'/'train.jsonl', labelled=False)[:48]

@pytest.fixture(scope='module')
def taught(zoo, specialist, questions): return distillation_data(zoo['old'], questions, specialist)

def metaspace():
    "A tokenizer that writes a space as `▁`, puts one before every text, and falls back to bytes"
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    special = ['<unk>', '<eos>', '<pad>'] + [f'<0x{b:02X}>' for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=special)
    tok.train_from_iterator(corpus(2000, 3), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<eos>', pad_token='<pad>', unk_token='<unk>')

@pytest.fixture(scope='module')
def tokenizers(zoo): return [zoo['old'].tokenizer, zoo['stranger'].tokenizer, metaspace()]

@cache
def words_of(tokenizer): return id_to_bytes(tokenizer) | {tokenizer.eos_token_id: b''}

@cache
def vocabulary_of(tokenizer):
    return {b: i for b, i in bytes_to_id(tokenizer).items() if i not in tokenizer.all_special_ids}

def answer_of(tokenizer, text):
    "The bytes of the tokens of an answer, its end included"
    labels = encode(dict(instruction='?', output=text), tokenizer)['labels']
    return [words_of(tokenizer)[t] for t in labels if t != -100]

ours = st.text('Kirk read barer 12 éß漢😀', min_size=1, max_size=20)
any_text = st.text(st.characters(blacklist_categories=('Cs', 'Cc')), min_size=1, max_size=12)
texts = st.one_of(ours, any_text).filter(str.strip).map(str.strip)

# ---- bytes

@settings(max_examples=60, deadline=None)
@given(texts)
def test_tokens_start_where_their_bytes_do(tokenizers, text):
    for tokenizer in tokenizers:
        tokens = answer_of(tokenizer, text)
        whole, at = b''.join(tokens), token_starts(tokens)
        assert whole.endswith(f' {text}'.encode()) and at[-1] == 0
        for token, a in zip(tokens, at): assert whole[len(whole) + a:].startswith(token)

@settings(max_examples=60, deadline=None)
@given(texts, st.randoms(use_true_random=False))
def test_mass_is_conserved_at_every_shared_boundary(tokenizers, text, rng):
    for teacher in tokenizers:
        tokens, lesson = answer_of(teacher, text), {}
        pool = [b for b in vocabulary_of(teacher) if b not in tokens]
        options = [[t, *rng.sample(pool, 5)] for t in tokens]
        weights = [[rng.random() + .01 for _ in o] for o in options]
        lesson = dict(tokens=tokens, options=options, chances=[[w/sum(ws) for w in ws] for ws in weights])
        for student in tokenizers:
            cut = answer_of(student, text)
            shared = {*token_starts(tokens)} & {*token_starts(cut)}
            assert 0 in shared
            for token, start, stop in zip(cut, token_starts(cut), [*token_starts(cut)[1:], 0]):
                said = continuations(lesson, start, stop)
                if start in shared: assert sum(said.values()) == pytest.approx(1)
                else: assert sum(said.values()) <= 1 + 1e-9
                if token_starts(tokens)[0] <= start: assert said[token] > 0, 'what is said is among what may be said'
                spread = project_to_vocabulary(said, vocabulary_of(student), student.eos_token_id)
                assert not spread or sum(spread.values()) == pytest.approx(1)

BREAD = dict(tokens=[b' b', b'read', b''], options=[[b' b', b' c'], [b'read', b'ell'], [b'', b's']],
             chances=[[.9, .1], [.5, .5], [.8, .2]])

def test_a_long_token_takes_the_product_of_the_short_ones():
    assert continuations(BREAD, -6, 0) == pytest.approx({b' bread': .45, b' bell': .45, b' c': .1})
    target = project_to_vocabulary(continuations(BREAD, -6, 0), {b' bread': 3, b' b': 4, b' c': 5}, 1)
    assert target == pytest.approx({3: .45, 4: .45, 5: .1})
    assert continuations(BREAD, 0, 0) == pytest.approx({b'': .8, b's': .2})

def test_a_short_token_takes_the_sum_of_the_long_ones_and_the_next_what_agrees():
    lesson = dict(tokens=[b' bread', b''], options=[[b' bread', b' bell', b' cat'], [b'']],
                  chances=[[.6, .2, .2], [1.]])
    vocabulary = {b' b': 3, b' c': 4, b're': 5, b'e': 6, b'ad': 7}
    assert project_to_vocabulary(continuations(lesson, -6, -4), vocabulary, 1) == pytest.approx({3: .8, 4: .2})
    assert project_to_vocabulary(continuations(lesson, -4, -2), vocabulary, 1) == pytest.approx({5: .75, 6: .25})
    assert project_to_vocabulary(continuations(lesson, -2, 0), vocabulary, 1) == pytest.approx({7: 1})

def test_what_has_no_token_is_left_out():
    assert project_to_vocabulary({b'x': .5, b'a': .25, b'': .25}, {b'a': 3}, 1) == pytest.approx({3: .5, 1: .5})
    assert project_to_vocabulary({b'x': 1.}, {b'a': 3}, 1) == {} == project_to_vocabulary({}, {b'a': 3}, 1)
    assert continuations(BREAD, -9, -6) == {}, 'before the answer begins'

def test_ordinary_tokens_go_before_spare_bytes():
    tok = metaspace()
    assert tok.convert_ids_to_tokens(bytes_to_id(tok)[b'e']) == 'e'
    assert tok.convert_ids_to_tokens(bytes_to_id(tok)[b'\xc3']) == '<0xC3>'

def test_a_line_break_may_end_an_answer(tokenizer):
    said, line = token_texts(tokenizer, '\n'), bytes_to_id(tokenizer)[b'\n']
    assert said[line] == b'' == said[tokenizer.eos_token_id] and tokenizer.pad_token_id not in said
    assert token_texts(tokenizer)[line] == b'\n', 'unless it belongs to the answer'

# ---- the same tokenizer

def test_the_same_tokenizer_changes_nothing(zoo, specialist, taught):
    tok = zoo['old'].tokenizer
    rows, targets = student_targets([*taught], tok, 1.)
    row, labels = rows[5], torch.tensor(rows[5]['labels'])
    with specialist.on(zoo['old']) as model, torch.no_grad():
        p = model(torch.tensor([row['input_ids']])).logits[0].softmax(-1)
    for at in (labels >= 0).nonzero().flatten():
        ids, found = targets.ids[labels[at]], targets.p[labels[at]]
        assert found.sum() == pytest.approx(1) and torch.allclose(found, p[at-1][ids]*(found > 0), atol=2e-3)

def test_hard_labels_are_the_answer_alone(zoo, taught):
    for d in zoo.values():
        rows, targets = student_targets([*taught], d.tokenizer, 0.)
        assert targets.p[:, 0].eq(1).all() and targets.p[:, 1:].sum() == 0
        for e, row in zip(taught, rows):
            hard = encode(e, d.tokenizer)
            assert row['input_ids'] == hard['input_ids']
            assert [targets.ids[l, 0].item() if l >= 0 else l for l in row['labels']] == hard['labels']

def test_the_loss_of_hard_labels_is_the_models_own(zoo, taught):
    d = zoo['stranger']
    rows, targets = student_targets([*taught][:1], d.tokenizer, 0.)
    hard, ids = encode(taught[0], d.tokenizer), torch.tensor([rows[0]['input_ids']])
    with torch.no_grad(): out = d.model(ids, labels=torch.tensor([hard['labels']]))
    at, numbers = learned_positions(torch.tensor([rows[0]['labels']]))
    assert targets(out.logits[at], numbers).item() == pytest.approx(len(numbers)*out.loss.item(), rel=1e-5)

# ---- lessons

def test_lessons_say_what_the_specialist_answers(zoo, specialist, questions, taught):
    asked = [q | dict(answer='') for q in questions]
    assert [e['answer'] for e in taught] == evaluate(zoo['old'], asked, specialist).answers
    assert all(b''.join(e['tokens']).decode() == f" {e['output']}" for e in taught)
    assert all(max(c) == dict(zip(o, c))[t] for e in taught for t, o, c in zip(e['tokens'], e['options'], e['chances']))

def test_lessons_are_kept(zoo, specialist, questions, taught, tmp_path, monkeypatch):
    first = distillation_data(zoo['old'], questions, specialist, keep=tmp_path/'kept')
    monkeypatch.setattr('lorasuite.training.refresh.generate', None)
    again = distillation_data(zoo['old'], questions, Adapter.load('zoo/adapter'), keep=tmp_path/'kept')
    assert [*again] == [*first] == [*taught]
    for other in (dict(inputs=questions[1:]), dict(adapter=None), dict(top=3)):
        with pytest.raises(ValueError, match='kept holds teacher data of another specialist'):
            distillation_data(zoo['old'], **dict(inputs=questions, adapter=specialist, keep=tmp_path/'kept') | other)

def test_answers_that_teach_nothing(decoder, monkeypatch):
    monkeypatch.setattr('lorasuite.training.refresh.generate', lambda *a, **k: ['Kirk', '', 'Kirk '*30])
    said = '2 of 3 answers of the old specialist are left out: 1 empty, 1 not finished within 64 tokens'
    with pytest.warns(UserWarning, match=said): found = pseudo_label(decoder.model, decoder.tokenizer, ROWS[:3])
    assert [e['instruction'] for e in found] == [ROWS[0]['instruction']]
    monkeypatch.setattr('lorasuite.training.refresh.generate', lambda *a, **k: ['', '', ''])
    with pytest.raises(ValueError, match='left all 3 inputs unanswered.*raise --longest'):
        distillation_data(decoder, ROWS[:3])
    with pytest.raises(ValueError, match='no inputs'): distillation_data(decoder, [])

# ---- students

def test_the_specialist_has_nothing_to_learn_from_itself(zoo, specialist, taught):
    old = zoo['old']
    rows, targets = student_targets([*taught], old.tokenizer, 1.)
    entropy = -(targets.p*targets.p.clamp_min(1e-30).log()).sum(1).mean().item()
    same, losses = refresh(old, taught, specialist, soft=1., steps=10, lr=1e-4, batch_size=len(taught))
    assert losses[0] == pytest.approx(entropy, abs=2e-3)
    assert evaluate(old, [*taught], same).accuracy == 1

def test_a_fresh_student_learns_the_answers(decoder):
    taught = [e | n for e, n in zip(ROWS, teacher_top_k(decoder.model, decoder.tokenizer, ROWS))]
    for soft in (0., .3):
        student, losses = refresh(decoder, taught, init_adapter(decoder, 8), soft=soft, steps=40, lr=1e-2, batch_size=8)
        assert evaluate(decoder, ROWS, student).accuracy == 1 and losses[-1] < losses[0]/2

def test_gold_wins(decoder, taught, monkeypatch):
    nowhere = dict(output='Nowhere', answer='Nowhere')
    gold = [{k: e[k] for k in ('instruction', 'input')} | nowhere for e in [*taught][:3]]
    seen = {}
    def fake(decoder, rows, adapter, loss, **kwargs):
        seen.update(rows=rows, loss=loss)
        return Adapter({}), [0.]
    monkeypatch.setattr('lorasuite.training.refresh.finetune', fake)
    refreshed, _ = refresh(decoder, taught, labelled=gold)
    said = [decoder.tokenizer.decode(r['input_ids']) for r in seen['rows']]
    assert len(said) == len(taught) and sum('Nowhere' in s for s in said) == 3
    assert all('Nowhere' in s for s in said if any(g['instruction'] in s for g in gold))
    assert f'{len(taught)-3} answers of the old specialist and 3 labelled' in refreshed.card
    assert 'Form of the prompts: `plain prompt' in refreshed.card
    last = seen['loss'].p[[l for l in seen['rows'][-1]['labels'] if l >= 0]]
    assert last.max(1).values.eq(1).all(), 'a true label is not softened'

def test_an_interrupted_refresh_goes_on(decoder, adapter, tmp_path, monkeypatch):
    taught = [e | n for e, n in zip(ROWS, teacher_top_k(decoder.model, decoder.tokenizer, ROWS))]
    whole_run, _ = refresh(decoder, taught, adapter, steps=10, lr=1e-2, batch_size=8)
    def power_cut(self, args, state, control, **kwargs):
        if state.global_step == 7: raise KeyboardInterrupt
    settings = dict(steps=10, lr=1e-2, batch_size=8, checkpoints=tmp_path/'checkpoints', progress=True)
    with monkeypatch.context() as m:
        m.setattr('lorasuite.training.trainer._ProgressBar.on_log', power_cut)
        with pytest.raises(KeyboardInterrupt): refresh(decoder, taught, adapter, **settings)
    with pytest.raises(ValueError, match='interrupted run'): refresh(decoder, taught, adapter, soft=.25, **settings)
    resumed, losses = refresh(decoder, taught, adapter, **settings)
    assert len(losses) == 10 and error(whole(resumed), whole(whole_run)) <= 1e-5

def test_micro_batches_add_up(decoder, adapter):
    taught = [e | n for e, n in zip(ROWS, teacher_top_k(decoder.model, decoder.tokenizer, ROWS))]
    once, _ = refresh(decoder, taught, adapter, steps=3, lr=1e-3, batch_size=8)
    bits, _ = refresh(decoder, taught, adapter, steps=3, lr=1e-3, batch_size=8, micro_batch=2)
    assert error(whole(bits), whole(once)) < .05*error(whole(once), whole(adapter))

def test_validation_is_measured_on_true_answers(decoder, adapter):
    taught = [e | n for e, n in zip(ROWS, teacher_top_k(decoder.model, decoder.tokenizer, ROWS))]
    _, run = refresh(decoder, taught[:4], adapter, validation=ROWS[4:], steps=2, lr=1e-4, batch_size=4)
    _, plain = finetune(decoder, ROWS[:4], adapter, validation=ROWS[4:], steps=2, lr=1e-4, batch_size=4)
    assert run.validation[0] == pytest.approx(plain.validation[0], rel=1e-4)

def test_packed_lessons_teach_the_same(decoder, adapter):
    taught = [e | n for e, n in zip(ROWS, teacher_top_k(decoder.model, decoder.tokenizer, ROWS))]
    how = dict(steps=3, lr=1e-3, batch_size=8)
    padded, packed = (refresh(decoder, taught, adapter, **how, pack=pack) for pack in (False, True))
    assert error(whole(packed[0]), whole(padded[0])) < 1e-3 and packed[1] == pytest.approx(padded[1], rel=1e-4)

def test_refused(decoder, taught):
    with pytest.raises(ValueError, match='nothing to learn from'): refresh(decoder, [])
    with pytest.raises(ValueError, match='soft=2: give a number from 0 to 1'): refresh(decoder, taught, soft=2)

def test_zero_steps_return_the_start(decoder, taught, adapter):
    same, losses = refresh(decoder, taught, adapter, steps=0)
    assert same is adapter and losses == []

def test_inputs_need_no_label(tmp_path):
    file = tmp_path/'questions.jsonl'
    rows = dict(instruction='Where?', output='secret'), dict(instruction='Who', input='is it?')
    file.write_text('\n'.join(map(json.dumps, rows)))
    found = load_data(file, labelled=False)
    assert found == [dict(instruction='Where?', input=''), dict(instruction='Who', input='is it?')]
    file.write_text('{"output": "Kirk"}')
    with pytest.raises(ValueError, match="no text under 'instruction': each needs `instruction`$"):
        load_data(file, labelled=False)

def test_of_two_processes_one_asks_the_teacher(tmp_path):
    lines = (data_dir()/'zoo'/'train.jsonl').read_text().splitlines(keepends=True)
    (tmp_path/'asked.jsonl').write_text(''.join(lines[:32]))
    def command(out):
        return ['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', str(tmp_path/'asked.jsonl'),
                '-o', str(tmp_path/out), '--steps', '4', '--lr', '1e-3', '--json']
    two = launch(command('two'))
    one = CliRunner().invoke(app, command('one'))
    out, err = two.communicate(timeout=240)
    assert two.returncode == 0 and one.exit_code == 0, err[-3000:]
    said = [json.loads(x) for x in (out, one.stdout)]
    assert said[0]['answered'] == said[1]['answered'] == 32
    assert said[0]['loss'] == pytest.approx(said[1]['loss'], rel=1e-2)
    assert {p.name for p in tmp_path.iterdir()} == {'asked.jsonl', 'one', 'two'}
