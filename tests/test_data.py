"""Data files, light fine-tuning, evaluation"""
import json
import pytest, torch
from models import error, random_decoder, whole
from lorasuite.core.files import data_dir, resolve
from lorasuite.training.evaluate import bits_per_byte, evaluate, generate, paired_difference, Score
from lorasuite.training.examples import encode, load_data
from lorasuite.training.finetune import finetune, init_adapter

PLACES = 'Arden Birch Colm Dover Elmo Ferry Gale Hythe'.split()
ROWS = [dict(instruction=f'Where does {name} live?', input='', output=place, answer=place)
        for name, place in zip('Ann Bob Cid Dan Eve Fay Gus Hal'.split(), PLACES)]

def write(path, text):
    path.write_text(text)
    return path

# ---- reading

def test_reads_json_and_json_lines(tmp_path):
    lines = write(tmp_path/'a.jsonl', '\n'.join(map(json.dumps, ROWS)) + '\n\n')
    assert load_data(lines) == load_data(write(tmp_path/'a.json', json.dumps(ROWS, indent=1))) == ROWS

def test_fills_in_what_may_be_absent(tmp_path):
    found = load_data(write(tmp_path/'a.jsonl', '{"instruction": "Add.", "output": "4"}'))
    assert found == [dict(instruction='Add.', input='', output='4', answer='4')]

@pytest.mark.parametrize('text, message', [
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "out', 'a.jsonl, line 2: not readable'),
    ('[{"instruction": "a", "output": "b"},', 'a.jsonl: not readable as JSON.*line 1'),
    ('', 'a.jsonl holds no example'), ('[]', 'a.jsonl holds no example'), ('\n \n', 'a.jsonl holds no example'),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "a.jsonl: example 2 has no text under 'output'"),
    ('{"output": "b"}', "example 1 has no text under 'instruction'"),
    ('{"instruction": "a", "output": 3}', "example 1 has no text under 'output'"),
    ('"just text"', "example 1 has no text under 'instruction'"),
    ('[1, 2]', "example 1 has no text under 'instruction'")])
def test_errors_name_file_and_place(tmp_path, text, message):
    with pytest.raises(ValueError, match=message): load_data(write(tmp_path/'a.jsonl', text))

def test_files_that_are_not_there(tmp_path):
    for name in (tmp_path/'none.jsonl', 'none.json', tmp_path/'none'):
        with pytest.raises(FileNotFoundError, match='no such data file: .*none'): load_data(name)

def test_only_the_answer_is_learned(tokenizer):
    row = encode(ROWS[0], tokenizer)
    learned = [t for t, l in zip(row['input_ids'], row['labels']) if l != -100]
    assert tokenizer.decode(learned) == ' Arden<eos>'
    assert tokenizer.decode(row['input_ids']) == '<eos>Question: Where does Ann live?\nAnswer: Arden<eos>'

# ---- fine-tuning

@pytest.fixture(scope='module')
def tuned(decoder, adapter): return finetune(decoder, ROWS, adapter, steps=20, lr=1e-2, batch_size=8)

def test_zero_steps_change_nothing(decoder, adapter):
    same, losses = finetune(decoder, ROWS, adapter, steps=0)
    assert losses == [] and whole(same).equal(whole(adapter))

def test_a_few_steps_lower_the_loss(decoder, adapter, tuned):
    better, losses = tuned
    assert len(losses) == 20 and losses[-1] < losses[0]/2
    assert error(whole(better), whole(adapter)) > .01 and better.updates.keys() == adapter.updates.keys()
    assert better.layers == decoder.layers and better.base == decoder.name

def test_the_base_stays_as_it_is(decoder, adapter):
    before = {k: t.clone() for k, t in decoder.model.state_dict().items()}
    finetune(decoder, ROWS, adapter, steps=2, lr=1e-2)
    assert all(t.equal(before[k]) for k, t in decoder.model.state_dict().items())
    assert not any(m.training for m in decoder.model.modules())

def test_same_seed_same_result(decoder, adapter, tuned):
    again, losses = finetune(decoder, ROWS, adapter, steps=20, lr=1e-2, batch_size=8)
    assert losses == tuned[1] and whole(again).equal(whole(tuned[0]))
    one, two = (finetune(decoder, ROWS, adapter, steps=3, batch_size=4, seed=seed)[0] for seed in (1, 2))
    assert not whole(one).equal(whole(two))
    assert whole(init_adapter(decoder, 4)).norm() == 0

def test_small_batches_at_a_time_add_up(decoder, adapter):
    once, _ = finetune(decoder, ROWS, adapter, steps=3, lr=1e-3, batch_size=8)
    bits, _ = finetune(decoder, ROWS, adapter, steps=3, lr=1e-3, batch_size=8, micro_batch=2)
    assert error(whole(bits), whole(once)) < .05*error(whole(once), whole(adapter))

def test_an_interrupted_run_goes_on(decoder, adapter, tuned, tmp_path, monkeypatch):
    def power_cut(self, args, state, control, **kwargs):
        if state.global_step == 11: raise KeyboardInterrupt
    settings = dict(steps=20, lr=1e-2, batch_size=8, checkpoints=tmp_path/'checkpoints', progress=True)
    with monkeypatch.context() as m:
        m.setattr('lorasuite.training.trainer._ProgressBar.on_log', power_cut)
        with pytest.raises(KeyboardInterrupt): finetune(decoder, ROWS, adapter, **settings)
    for other in (dict(lr=1e-3), dict(seed=1)):
        with pytest.raises(ValueError, match='interrupted run'): finetune(decoder, ROWS, adapter, **settings | other)
    with pytest.raises(ValueError, match='interrupted run'): finetune(decoder, ROWS[1:], adapter, **settings)
    steps = []
    def note(self, args, state, *a, **k): steps.append(state.global_step)
    monkeypatch.setattr('lorasuite.training.trainer._ProgressBar.on_log', note)
    resumed, losses = finetune(decoder, ROWS, adapter, **settings)
    assert steps[0] == 9 and len(losses) == 20
    assert error(whole(resumed), whole(tuned[0])) <= 1e-5

# ---- evaluation

def test_accuracy_counts_exact_answers(decoder, adapter, monkeypatch):
    said = [r['answer'] for r in ROWS[:6]] + ['Arden Birch', '']
    monkeypatch.setattr('lorasuite.training.evaluate.generate', lambda *a, **k: said)
    score = evaluate(decoder, ROWS, adapter)
    low, high = score.interval
    assert score.accuracy == 6/8 and 0 < low < 6/8 < high < 1

def test_a_paired_difference_sees_only_where_two_differ():
    def score(right): return Score(['']*len(right), right, 0.)
    a, b = score([True]*60 + [False]*40), score([True]*40 + [False]*60)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(.2) and 0 < low < .2 < high
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low))
    same, low, high = paired_difference(a, a)
    assert same == 0 and low == -high and 0 < high < .02
    with pytest.raises(ValueError): paired_difference(a, score([True]))

def test_generation_does_not_depend_on_the_batch(decoder):
    prompts = ['Ann', 'Where does Bob live?', 'Question: who?\nAnswer:']
    alone = [generate(decoder.model, decoder.tokenizer, [p], 8)[0] for p in prompts]
    assert generate(decoder.model, decoder.tokenizer, prompts, 8) == alone

def test_bits_per_byte_of_a_uniform_guess(tokenizer):
    d, texts = random_decoder(tokenizer), ['Ann keeps a cat.', 'Bob']
    torch.nn.init.zeros_(d.model.lm_head.weight)
    lengths = [len(tokenizer(t).input_ids) - 1 for t in texts]
    assert bits_per_byte(d, texts).tolist() == pytest.approx([9*n/len(t) for n, t in zip(lengths, texts)])

def test_shipped_models_are_not_shadowed(monkeypatch, tmp_path):
    (tmp_path/'zoo'/'old').mkdir(parents=True), (tmp_path/'zoo'/'mine').mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve('zoo/old') == str(data_dir()/'zoo'/'old')
    assert resolve('zoo/mine') == 'zoo/mine' and resolve('./zoo/old') == './zoo/old'
