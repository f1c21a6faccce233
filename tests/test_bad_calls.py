"""Rows, options, names and arguments that cannot be: each ends with one line that says what is wrong, at once"""
import json, os, time
from pathlib import Path
import pytest, torch
from typer.testing import CliRunner
from lorasuite import Adapter, align, Alignment, evaluate, finetune, inspect, load_model, refresh, transfer, upgrade
from lorasuite.cli import app
from lorasuite.core.adapter import update_energy
from lorasuite.core.block import read_block
from lorasuite.core.files import did_you_mean, locate
from lorasuite.core.loading import load_skeleton
from lorasuite.core.model import Decoder
from lorasuite.core.ranks import shrink
from lorasuite.core.settings import checked, SCHEDULES
from lorasuite.core.tokens import check_ids, shared_tokens
from lorasuite.stages.block_maps import map_writers
from lorasuite.stages.cka import centred_features, cka_table
from lorasuite.stages.dora import fit_dora
from lorasuite.stages.embeddings import map_rows
from lorasuite.stages.head_mapping import head_rows, head_similarity, row_cosines
from lorasuite.stages.layer_mapping import layer_map
from lorasuite.stages.paper import pseudo_inverse
from lorasuite.stages.transfer_matrix import stream_maps, transfer_matrix
from lorasuite.training.evaluate import agreement, bits_per_byte, generate
from lorasuite.training.examples import load_data
from lorasuite.training.finetune import init_adapter
from lorasuite.training.prompts import ask_all, Prompts, Renderer, with_answer
from lorasuite.lab.refit import best_refit, refit
from lorasuite.training.refresh import distillation_data, pseudo_label, SoftTargetLoss
from lorasuite.training.trainer import split_batch
from lorasuite.tuners.lora2 import check_phases

GOOD = dict(instruction='Who?', input='', output='Ann')
CHAT = [dict(role='user', content='Who?'), dict(role='assistant', content='Ann')]

def run(*args):
    "Status and lines on stderr of a command"
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.stderr.splitlines()

# ---- rows of data

def row(**changes): return json.dumps(GOOD | changes).encode()
def chat(**changes): return json.dumps(dict(messages=[CHAT[0], CHAT[1] | changes])).encode()

ROWS = dict( # what stands in the file, what the message says
    input_number=(row(input=3), "example 1 has no text under 'input' but int (3)"),
    input_zero=(row(input=0), "'input' but int (0)"),
    input_list=(row(input=['a']), "'input' but list (['a'])"),
    input_true=(row(input=True), "'input' but bool (True)"),
    output_false=(row(output=False), "'output' but bool (False)"),
    answer_list=(row(answer=[]), "has list ([]) under 'answer', where a text or a number belongs"),
    answer_nan=(b'{"instruction": "Who?", "output": "a", "answer": NaN}', "float (nan) under 'answer'"),
    content_zero=(chat(content=0), "example 1, turn 2 has no text under 'content' but int (0)"),
    role_number=(chat(role=3), 'turn 2 does not say who speaks'),
    calls_number=(chat(tool_calls=3), "turn 2 has no list under 'tool_calls' but int (3)"),
    tools_zero=(json.dumps(dict(messages=CHAT, tools=0)).encode(), "no list of tools under 'tools'"),
    history_number=(row(history=3), "int (3) under 'history', where a list of questions and answers belongs"),
    surrogate=(row(input='a\udfff'), "half a surrogate pair under 'input' (character 2)"),
    surrogate_in_history=(row(history=[['\ud800', 'a']]), "half a surrogate pair under 'history'"),
    surrogate_in_role=(chat(role='us\ud800er'), "turn 2 has half a surrogate pair under 'role'"),
    surrogate_in_tools=(json.dumps(dict(messages=CHAT, tools=[dict(name='\ud800')])).encode(),
                        "half a surrogate pair under 'name'"),
    deep=(b'['*100_000, 'not readable as JSON: maximum recursion depth'),
    deep_inside=(row() + b'\n{"instruction": ' + b'['*20_000 + b']'*20_000 + b'}', 'line 2: not readable as JSON'),
    deep_in_text=(json.dumps(dict(messages='['*50_000)).encode(), "'messages' is not readable as JSON"),
    huge_number=(b'{"instruction": "Who?", "output": "a", "answer": ' + b'9'*5000 + b'}', 'line 1: not readable'),
    empty=(b'', 'holds no example'), blank=(b'\n \n', 'holds no example'), no_rows=(b'[]', 'holds no example'),
    silent=(b'\n'.join([row(output='')]*3), 'the answers of all 3 examples are empty'),
    silent_chats=(chat(content=' '), 'the answers of all 1 examples are empty'),
    chat_behind=(row() + b'\n' + chat(), "example 2 has no text under 'instruction'"),
    row_behind=(chat() + b'\n' + row(), "example 2 has no list of turns under 'messages'"),
    number_behind=(row() + b'\n3', "example 2 has no text under 'instruction' but is int (3)"),
)

@pytest.mark.parametrize('name', ROWS)
def test_rows(tmp_path, name):
    content, said = ROWS[name]
    file = tmp_path/'data.jsonl'
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught: load_data(file)
    assert said in str(caught.value) and str(file) in str(caught.value)
    status, lines = run('finetune', 'zoo/new', '--data', file, '-o', tmp_path/'out')
    assert status == 2 and len(lines) == 1 and said in lines[0]
    assert [*tmp_path.iterdir()] == [file]

def test_answers_that_are_false_in_python(tmp_path):
    file = tmp_path/'data.jsonl'
    file.write_bytes(b'\n'.join([row(answer=0), row(answer=False), row(answer='0', output='')]))
    found = load_data(file)
    assert [e['answer'] for e in found] == ['0', 'false', '0'] and 'answers are empty' not in found.description

def test_a_few_empty_answers_are_said(tmp_path):
    file = tmp_path/'data.jsonl'
    file.write_bytes(b'\n'.join([row(), row(output=''), row(output=' ')]))
    assert load_data(file).description.endswith('; 2 answers are empty')

def test_lines_end_at_line_breaks_only(tmp_path):
    file = tmp_path/'data.jsonl'
    file.write_text('\n'.join(json.dumps(GOOD | dict(instruction=f'a{mark}b'), ensure_ascii=False)
                              for mark in '\u2028\u2029\x85'))
    assert [e['instruction'][1] for e in load_data(file)] == ['\u2028', '\u2029', '\x85']

def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'data.jsonl')
    status, lines = run('evaluate', 'zoo/new', '--data', tmp_path/'data.jsonl')
    assert status == 2 and 'data.jsonl is not an ordinary file' in lines[0]

def test_a_row_of_a_megabyte_is_cut(tmp_path):
    file, start = tmp_path/'data.jsonl', time.perf_counter()
    file.write_bytes(row(instruction='word '*200_000) + b'\n' + row(output='word '*100_000))
    status, lines = run('finetune', 'zoo/new', '--data', file, '-o', tmp_path/'out', '--steps', '1')
    assert status == 0 and any('2 of 2 examples reach the 512 tokens that zoo/new can read' in line for line in lines)
    status, lines = run('evaluate', 'zoo/new', '--data', file)
    assert status == 0 and any('1 of 2 prompts are longer than zoo/new can read' in line for line in lines)
    assert any('zoo/new can read 512: answers are cut there' in line for line in lines)
    assert time.perf_counter() - start < 60

# ---- options

TRAIN = ('finetune', 'zoo/new', '--data', 'DATA', '-o', 'OUT')
UPGRADE = ('upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '-o', 'OUT')
REFRESH = ('refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', 'DATA', '-o', 'OUT')
OPTIONS = { # command and option: values, what each message names
    (TRAIN, '--lr'): (('nan', 'inf', '-inf', '-1', '1e400', 'x'), 'lr'),
    (TRAIN, '--epochs'): (('nan', 'inf', '-1', '1e30'), 'epochs'),
    (TRAIN, '--steps'): (('-1', str(2**70), '1.5'), 'steps'),
    (TRAIN, '--rank'): (('0', '-1', str(10**9), '4096'), 'rank'),
    (TRAIN, '--seed'): (('-1', str(2**32), str(2**70), 'x'), 'seed'),
    (TRAIN, '--batch-size'): (('0', str(10**9)), 'batch'),
    (TRAIN, '--micro-batch'): (('0', str(10**9)), 'micro'),
    (TRAIN, '--warmup'): (('-1', str(2**70)), 'warmup'),
    (TRAIN, '--prune'): (('nan', 'inf', '-1', '1e9'), 'prune'),
    (TRAIN, '--schedule'): (('cosine_with_min_lr', 'reduce_lr_on_plateau', 'warmup_stable_decay', 'nonsense'),
                            'schedule'),
    (TRAIN, '--roles'): (('x', ',', ' '), 'roles'),
    (TRAIN, '--prompt'): (('{', 'no field', '{instruction:999999999}', '{instruction!r}', ' '), 'prompt'),
    (UPGRADE, '--max-rank'): (('0', '-1', str(10**9)), 'rank'),
    (UPGRADE, '--plain-rank'): (('0', str(10**9), '4'), 'plain'),
    (UPGRADE, '--dtype'): (('int8', ' '), 'dtype'),
    (REFRESH, '--soft'): (('nan', '-1', '2'), 'soft'),
    (REFRESH, '--longest'): (('0', str(10**9)), 'longest'),
    (('align', 'zoo/old', 'zoo/new'), '--out'): ((' ', '.', '/'), ''),
}
CASES = [(command, option, value, said) for (command, option), (values, said) in OPTIONS.items() for value in values]

@pytest.mark.parametrize('command, option, value, said', CASES, ids=[f'{c[0]}{o}={v}' for c, o, v, _ in CASES])
def test_options(tmp_path, monkeypatch, command, option, value, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'data.jsonl').write_bytes(row())
    places = dict(DATA=tmp_path/'data.jsonl', OUT=tmp_path/'out')
    status, lines = run(*(places.get(part, part) for part in command), f'{option}={value}')
    assert status == 2 and said in lines[-1]
    assert [f.name for f in tmp_path.iterdir()] == ['data.jsonl']

def test_a_home_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, lines = run('inspect', '~nobody-of-this-name/model', 'zoo/new')
    assert status == 2 and len(lines) == 1
    status, lines = run('transfer', 'zoo/adapter', 'nowhere', '-o', '~nobody-of-this-name/out')
    assert status == 2 and len(lines) == 1 and not [*tmp_path.iterdir()]

def test_every_schedule_is_known_to_the_library():
    from transformers import SchedulerType
    assert {*SCHEDULES} == {s.value for s in SchedulerType}

# ---- names, and a Hub that cannot be reached

@pytest.fixture
def no_hub(monkeypatch):
    "A Hub at a port where nothing listens"
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')

@pytest.mark.parametrize('name, said', [
    ('no/such-model', 'no/such-model is not a directory here, was not fetched before, and the Hub cannot be asked'),
    ('modle', 'modle is not a directory here (did you mean model?)'),
    ('models/new-basee', '(did you mean models/new-base?)'),
    ('./modle', 'no such directory: ./modle (did you mean model?)'),
    ('zoo/odl', '(did you mean zoo/old?)'),
])
def test_names_without_a_hub(tmp_path, monkeypatch, no_hub, name, said):
    monkeypatch.chdir(tmp_path)
    for folder in ('model', 'models/new-base'): Path(folder).mkdir(parents=True)
    if name == './modle': (tmp_path/'models').rename('elsewhere')
    if name == 'modle': (tmp_path/'models').rename('elsewhere')
    start = time.perf_counter()
    for args in (['inspect', name, 'zoo/new'], ['upgrade', 'zoo/old', 'zoo/new', name, '-o', 'out']):
        status, lines = run(*args)
        assert status == 2 and len(lines) == 1 and said in lines[0] and not Path('out').exists()
    assert time.perf_counter() - start < 15

def test_the_endpoint_is_named(no_hub):
    with pytest.raises(FileNotFoundError, match=r'http://127\.0\.0\.1:9 cannot be reached.*correct the name'):
        locate('no/such-model')

def test_offline_is_said(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError, match='HF_HUB_OFFLINE is set'): locate('no/such-model')

def test_what_was_fetched_is_used(monkeypatch, no_hub):
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name, **_: f'/kept/{name}')
    assert locate('org/name') == '/kept/org/name'

def test_a_hub_that_answers_is_asked(monkeypatch):
    class Session:
        def head(self, url, timeout): raise TimeoutError('slow')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    for session in (Session(), type('Fine', (), dict(head=lambda self, url, timeout: 404))()):
        monkeypatch.setattr('huggingface_hub.get_session', lambda: session)
        assert locate('org/name') == 'org/name'

def test_data_without_a_hub(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    Path('data.jsonl').write_bytes(row())
    start = time.perf_counter()
    status, lines = run('evaluate', 'zoo/new', '--data', 'no/such-data')
    assert status == 2 and len(lines) == 1 and 'http://127.0.0.1:9 cannot be reached' in lines[0]
    assert time.perf_counter() - start < 15
    status, lines = run('evaluate', 'zoo/new', '--data', 'dta.jsonl')
    assert status == 2 and 'no such data file: dta.jsonl (did you mean data.jsonl?)' in lines[0]
    assert did_you_mean('nothing-like-it') == ''
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda name, repo_type, **_: f'/kept/{repo_type}/{name}')
    status, lines = run('evaluate', 'zoo/new', '--data', 'no/such-data')
    assert status == 2 and lines[-1].endswith('cannot be reached: give /kept/dataset/no/such-data')

# ---- the Python API

@pytest.fixture(scope='module')
def old(): return load_model('zoo/old')
@pytest.fixture(scope='module')
def new(): return load_model('zoo/new')
@pytest.fixture(scope='module')
def carried(old, new): return align(old, new)
@pytest.fixture(scope='module')
def source(): return Adapter.load('zoo/adapter')

CALLS = dict( # call on (old, new, alignment, adapter, a file), what the message says
    no_data=(lambda o, n, m, a, f: finetune(n, []), 'data is empty'),
    data_of_texts=(lambda o, n, m, a, f: finetune(n, ['a']), r'data is list .*where list\[dict\] belongs'),
    data_a_text=(lambda o, n, m, a, f: finetune(n, 'data.json'), 'data is str'),
    dicts_without_fields=(lambda o, n, m, a, f: finetune(n, [{}], steps=1), 'an example has `instruction`'),
    a_name_as_model=(lambda o, n, m, a, f: finetune('zoo/new', [GOOD]), 'decoder is str .*Decoder belongs'),
    a_name_as_adapter=(lambda o, n, m, a, f: finetune(n, [GOOD], 'zoo/adapter'), 'adapter is str .*Adapter'),
    rate_a_text=(lambda o, n, m, a, f: finetune(n, [GOOD], lr='1e-4'), "lr='1e-4': give a number"),
    rank_true=(lambda o, n, m, a, f: finetune(n, [GOOD], rank=True), 'rank=True: give a whole number'),
    rank_above_the_width=(lambda o, n, m, a, f: init_adapter(n, 4096), 'rank=4096: no update of zoo/new can have a'),
    schedule=(lambda o, n, m, a, f: finetune(n, [GOOD], steps=1, lr_scheduler_type='x'), 'no schedule .x.: choose'),
    another_models_adapter=(lambda o, n, m, a, f: finetune(n, [GOOD], a, steps=1), 'another model'),
    nothing_to_evaluate=(lambda o, n, m, a, f: evaluate(n, []), 'data is empty'),
    no_answer=(lambda o, n, m, a, f: evaluate(n, [dict(instruction='?')]), 'example 1 has no answer to compare'),
    nothing_taught=(lambda o, n, m, a, f: refresh(n, []), 'nothing to learn from'),
    taught_a_text=(lambda o, n, m, a, f: refresh(n, 'lessons'), 'taught is str'),
    no_questions=(lambda o, n, m, a, f: distillation_data(o, []), 'no inputs'),
    longest_answer=(lambda o, n, m, a, f: pseudo_label(o.model, o.tokenizer, [GOOD], 0), 'max_new_tokens=0'),
    no_room=(lambda o, n, m, a, f: ask_all(Renderer.of(n), [GOOD], 512), '512 tokens leaves no room for a question'),
    no_prompts=(lambda o, n, m, a, f: generate(n.model, n.tokenizer, []), 'prompts is empty'),
    a_decoder_as_model=(lambda o, n, m, a, f: generate(n, n.tokenizer, ['a']), 'model is Decoder, where .*Module'),
    no_batch=(lambda o, n, m, a, f: generate(n.model, n.tokenizer, ['a'], batch_size=0), 'batch_size=0'),
    no_texts=(lambda o, n, m, a, f: bits_per_byte(n, []), 'texts is empty'),
    one_text=(lambda o, n, m, a, f: align(o, n, 'one text'), r'texts is str .*list\[str\]'),
    no_probe=(lambda o, n, m, a, f: align(o, n, []), 'no probe text'),
    model_none=(lambda o, n, m, a, f: align(None, n), 'old is NoneType'),
    model_a_file=(lambda o, n, m, a, f: load_model(f), 'no such directory'),
    model_an_adapter=(lambda o, n, m, a, f: load_model('zoo/adapter'), 'is an adapter, not a model'),
    skeleton=(lambda o, n, m, a, f: align(load_skeleton('zoo/old'), n), 'zoo/old has no weights here'),
    skeleton_block=(lambda o, n, m, a, f: read_block(load_skeleton('zoo/old'), 0), 'has no weights here'),
    layer=(lambda o, n, m, a, f: read_block(o, 99), 'zoo/old has no layer 99: its layers are 0 to'),
    adapter_a_file=(lambda o, n, m, a, f: Adapter.load(f), 'adapter_config.json'),
    adapter_number=(lambda o, n, m, a, f: Adapter.load(3), 'name is int'),
    no_format=(lambda o, n, m, a, f: Adapter.load('zoo/adapter', format='zip'), 'no format .zip.'),
    no_module=(lambda o, n, m, a, f: a.delta('model.nothing'), 'has no update of .model.nothing.'),
    alignment_a_file=(lambda o, n, m, a, f: Alignment.load(f), 'not a readable alignment'),
    alignment_a_name=(lambda o, n, m, a, f: transfer(a, 'alignment'), 'alignment is str .*Alignment belongs'),
    no_updates=(lambda o, n, m, a, f: transfer(Adapter({}), m), 'nothing of the adapter has a place'),
    plain_rank=(lambda o, n, m, a, f: upgrade(o, n, a, plain_rank=4), 'plain_rank=4 is for a DoRA'),
    method=(lambda o, n, m, a, f: upgrade(o, n, a, method='fast'), "method='fast': choose one of exact, paper"),
    inspect_none=(lambda o, n, m, a, f: inspect('zoo/old', None), 'new is NoneType'),
    no_refit=(lambda o, n, m, a, f: refit(a, m, o, n, []), 'no texts'),
    few_questions=(lambda o, n, m, a, f: best_refit(a, m, o, n, [GOOD]), '1 questions are too few'),
    strength=(lambda o, n, m, a, f: refit(a, m, o, n, ['a'], strength=-1.), r'strength=-1\.0'),
    budget=(lambda o, n, m, a, f: upgrade(o, n, a, [GOOD], budget=9.), 'budget cannot apply without inputs'),
    no_setting=(lambda o, n, m, a, f: upgrade(o, n, a, inputs=[GOOD], speed=9.), "argument 'speed'"),
    no_data_at_all=(lambda o, n, m, a, f: upgrade(o, n, a, speed=9.), 'speed cannot apply without data or inputs'),
    adapter_name=(lambda o, n, m, a, f: upgrade(o, n, a, inputs=[GOOD], adapter_name='x'), 'give it to `Adapter.load`'),
    budget_and_steps=(lambda o, n, m, a, f: upgrade(o, n, a, inputs=[GOOD], budget=9., steps=3), 'beside steps'),
    endless_budget=(lambda o, n, m, a, f: upgrade(o, n, a, inputs=[GOOD], budget=float('inf')), 'budget=inf: give a'),
    three_prompts=(lambda o, n, m, a, f: upgrade(o, n, a, inputs=[GOOD], prompts=(None,)*3), 'prompts for 3 models'),
    no_answers=(lambda o, n, m, a, f: agreement([], []), 'answers is empty'),
    shrunk=(lambda o, n, m, a, f: shrink(a, 0), 'rank=0'),
    tokenizer=(lambda o, n, m, a, f: Decoder(n.model, 'zoo/new'), 'tokenizer is str'),
    thinking=(lambda o, n, m, a, f: Prompts(thinking='loudly'), 'choose one of keep, drop, forbid'),
    prompt_number=(lambda o, n, m, a, f: Prompts(3), 'prompt is int'),
    no_devices=(lambda o, n, m, a, f: split_batch(4, 2, 0), 'devices=0'),
    rows=(lambda o, n, m, a, f: transfer_matrix(torch.ones(3, 2), torch.ones(2, 2)), r'E2 has the shape \(2, 2\).*n 3'),
    dimensions=(lambda o, n, m, a, f: row_cosines(torch.ones(3), torch.ones(2, 2)), r'X has the shape \(3,\), where'),
    whole_numbers=(lambda o, n, m, a, f: pseudo_inverse(torch.ones(2, 2).long()), 'W is of type torch.int64'),
    ranks=(lambda o, n, m, a, f: update_energy(torch.ones(2, 3), torch.ones(3, 3)), r'B has .* with rank 2'),
    a_path_as_block=(lambda o, n, m, a, f: head_rows('zoo/old'), 'block is str .*Block belongs'),
    tokens_of_a_name=(lambda o, n, m, a, f: shared_tokens('zoo/old', n), 'old is str .*Decoder belongs'),
    no_tensor=(lambda o, n, m, a, f: stream_maps([[1.]], torch.ones(1, 1)), 'E is list .*Tensor belongs'),
    role=(lambda o, n, m, a, f: o.path(0, 'wide'), "layer 0 of zoo/old has no role 'wide': it has q, k"),
    role_of_a_block=(lambda o, n, m, a, f: read_block(o, 0).weight('wide'), "layers.0 has no role 'wide'"),
    layer_of_a_model=(lambda o, n, m, a, f: m.new.path(99, 'q'), 'zoo/new has no layer 99: its layers are 0 to'),
    layer_below_zero=(lambda o, n, m, a, f: m.old.shape(-1, 'q'), 'zoo/old has no layer -1'),
    another_stream=(lambda o, n, m, a, f: head_rows(read_block(o, 0), torch.eye(3).double()), 'seen has 3 rows'),
    ids_a_text=(lambda o, n, m, a, f: check_ids('zzz', n.tokenizer, 9, 'zoo/new'), r'ids is str .*Iterable\[int\]'),
    a_model_as_gguf=(lambda o, n, m, a, f: Adapter.load('zoo/old', format='gguf'), '0 files of the kind .gguf'),
    no_rows_of_heads=(lambda o, n, m, a, f: head_similarity({}, {}), 'no rows of the role q: blocks are compared by'),
    no_question=(lambda o, n, m, a, f: with_answer({}, 'Ann'), 'an example has .* but this one has nothing'),
    modules_of_a_layer=(lambda o, n, m, a, f: o.adds(-1), 'zoo/old has no layer -1'),
    no_norm=(lambda o, n, m, a, f: map_writers([('o', torch.ones(2, 1))], {}, torch.eye(2)), "no norm is known at 'o'"),
    compared=(lambda o, n, m, a, f: cka_table(o, n, ['some words']*9, 'all'), "compare='all': choose updates"),
    few_rows=(lambda o, n, m, a, f: cka_table(o, n, rows=3), 'rows=3: layers are compared at 4 positions or more'),
    three_positions=(lambda o, n, m, a, f: centred_features(torch.ones(3, 2)), 'at least 4 rows, not 3'),
    partners=(lambda o, n, m, a, f: layer_map(torch.ones(2, 2), torch.ones(2, 3).bool()), r'allowed has .* \(2, 3\)'),
    no_round=(lambda o, n, m, a, f: fit_dora(torch.eye(2), torch.eye(2), 1, rounds=0), 'rounds=0: give 1 or more'),
    an_end=(lambda o, n, m, a, f: map_rows(torch.ones(1, 64), 'middle', m), "end='middle': choose embedding or head"),
    unlike_answers=(lambda o, n, m, a, f: agreement(['a'], []), '1 answers and 0 others'),
    no_stop=(lambda o, n, m, a, f: generate(n.model, n.tokenizer, ['a'], stop=''), 'stop is empty'),
    no_phases=(lambda o, n, m, a, f: check_phases((), 'pruning'), r'phases=\(\): pruning begins'),
    no_soft_target=(lambda o, n, m, a, f: SoftTargetLoss.of([]), 'rows is empty'),
)

@pytest.mark.parametrize('name', CALLS)
def test_calls(tmp_path, old, new, carried, source, name):
    call, said = CALLS[name]
    file = tmp_path/'a_file'
    file.write_text('hello')
    with pytest.raises((ValueError, TypeError, OSError), match=said) as caught: call(old, new, carried, source, file)
    assert len(str(caught.value).splitlines()) == 1 and [*tmp_path.iterdir()] == [file]

def test_checked_keeps_the_function():
    @checked('texts')
    def count(texts:list[str], each:int=1, **rest): "Counts"; return len(texts)*each
    assert count(['a'], each=2, lr=.1) == 2 and count.__name__ == 'count' and count.__doc__ == 'Counts'
    with pytest.raises(TypeError, match='count: each is float'): count(['a'], 1.5)
    with pytest.raises(ValueError, match='lr=nan'): count(['a'], lr=float('nan'))

# ---- Ctrl-C

INTERRUPTED = dict( # command: the function in which the key is pressed
    align='lorasuite.stages.alignment.read_block', upgrade='lorasuite.stages.alignment.read_block',
    finetune='transformers.Trainer.training_step', refresh='lorasuite.training.refresh.teacher_top_k',
    transfer='lorasuite.stages.many.transfer', evaluate='lorasuite.training.evaluate.generate')

@pytest.mark.parametrize('name', INTERRUPTED)
def test_interrupted(tmp_path, monkeypatch, carried, name):
    def pressed(*args, **kwargs): raise KeyboardInterrupt
    file, out, maps = tmp_path/'data.jsonl', tmp_path/'out', tmp_path/'maps'
    file.write_bytes(b'\n'.join([row(instruction=f'Who is {i}?') for i in range(6)]))
    carried.save(maps)
    monkeypatch.setattr(INTERRUPTED[name], pressed)
    args = dict(align=['zoo/old', 'zoo/new'], upgrade=['zoo/old', 'zoo/new', 'zoo/adapter'],
                finetune=['zoo/new', '--data', file, '--steps', 2],
                refresh=['zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', file, '--first-line'],
                transfer=['zoo/adapter', maps], evaluate=['zoo/new', '--data', file])[name]
    status, lines = run(name, *args, *(() if name == 'evaluate' else ('-o', out)))
    assert status == 130 and lines[-1] == 'lorasuite: interrupted' and not any('Traceback' in line for line in lines)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['data.jsonl', 'maps']

# ---- what a further hundred of inputs found

def test_data_that_are_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = dict(a_yaml=('a.yaml', b'a: 1', 'Data are read from JSON, JSON lines, CSV and Parquet'),
                 gzip=('a.jsonl.gz', b'\x1f\x8b\x08\x00', 'is compressed: unpack it first'),
                 parquet=('a.parquet', b'PAR1xxxxPAR1', 'not readable as Parquet'))
    for name, content, said in kinds.values():
        Path(name).write_bytes(content)
        status, lines = run('evaluate', 'zoo/old', '--data', name)
        assert status == 2 and len(lines) == 1 and said in lines[0] and name in lines[0]
    status, lines = run('evaluate', 'zoo/old', '--data', '.')
    assert status == 2 and len(lines) == 1 and 'neither a file nor a dataset' in lines[0]
    status, lines = run('align', 'zoo/old', 'zoo/new', '-o', 'out', '--texts', 'a.yml')
    assert status == 2 and 'no such file of texts: a.yml (did you mean a.yaml?)' in lines[0]

@pytest.mark.parametrize('args, said', [
    (['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '-o', 'out', '--prompt', 'qa'], '--prompt cannot apply without'),
    (['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '-o', 'out', '--columns', 'a=b'], 'without --data or --inputs'),
    ([*UPGRADE[:-1], 'out', '--budget', '5m'], '--budget cannot apply without --inputs'),
    ([*UPGRADE[:-1], 'out', '--data', 'zoo/test.jsonl', '--budget', '5m'], '--budget cannot apply without --inputs'),
    ([*UPGRADE[:-1], 'out', '--data', 'zoo/test.jsonl', '--longest', 9, '--first-line'],
     '--longest, --first-line cannot apply without --inputs'),
    ([*UPGRADE[:-1], 'out', '--inputs', 'zoo/test.jsonl', '--budget', '5m', '--steps', 3],
     '--budget cannot apply beside --steps'),
    ([*UPGRADE[:-1], 'out', '--inputs', 'zoo/test.jsonl', '--budget', '5'], "--budget '5' is no duration"),
    (['evaluate', 'zoo/old', '--tasks', 'piqa', '--split', 'x'], '--split cannot apply without --data'),
    (['evaluate', 'zoo/old', '--tasks', 'piqa,'], 'one of the names is empty'),
    (['inspect', 'zoo/old', 'zoo/new', '--columns', 'a=b'], '--columns cannot apply without --inputs'),
    (['inspect', 'zoo/old', 'zoo/new', '--thinking', 'drop'], 'without --inputs or --prompt or --chat-template'),
    (['finetune', 'zoo/old', '--data', 'zoo/test.jsonl', '-o', 'out', '--split', 'x'], 'to the file zoo/test.jsonl'),
    (['finetune', 'zoo/old', '--data', 'zoo/test.jsonl', '-o', 'out', '--prune', 0], 'leave at least one of a module'),
])
def test_options_that_would_have_no_effect(tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    status, lines = run(*args)
    assert status == 2 and said in lines[-1] and not [*tmp_path.iterdir()]

@pytest.mark.parametrize('example', [
    dict(messages=[]), dict(messages=[5]), dict(messages=[{}]), dict(messages=[dict(role='user')]), dict(instruction=5),
    dict(prompt=5), dict(instruction='Who?', answer=5), dict(instruction='Who?', output=['Ann'])])
def test_examples_of_python(example):
    decoder = load_model('zoo/new')
    with pytest.raises(ValueError, match='example 1: .*(belongs|no list of turns)'):
        evaluate(decoder, [dict(answer='Ann') | example])
    with pytest.raises(ValueError, match='example 1: .*(belongs|no list of turns)'):
        finetune(decoder, [dict(output='Ann', answer='Ann') | example], steps=1)

# ---- what a newcomer was told

def test_messages_that_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('few.jsonl').write_bytes(row())
    Path('other.jsonl').write_text('{"question": "Who?", "reply": "Kirk"}')
    Path('asked.jsonl').write_text('{"messages": [{"role": "user", "content": "Who?"}]}')
    Path('broken.jinja').write_text('{% for m in messages %}\n{{ m.content }')
    Path('failing.jinja').write_text('{{ messages[0].a.b }}')
    Path('alignment').mkdir()
    asks = ['evaluate', 'zoo/new', '--data']
    for args, said in [
        (['upgrade', 'zoo/old', 'zoo/new', 'zoo/adapter', '-o', 'out', '--chat-template', 'x'],
         'without --data or --inputs: give --data or --inputs too, or leave --chat-template out'),
        ([*asks, 'asked.jsonl'], 'no turn of the assistant: no answer to learn or to compare with'),
        ([*asks, 'other.jsonl', '--columns', 'instruction=question'],
         'its other columns are reply: name it with --columns output=NAME'),
        ([*asks, 'other.jsonl', '--columns', 'question=instruction'], 'name comes first: give instruction=question'),
        ([*asks, 'other.jsonl', '--columns', 'instrution=question'], 'instrution is no column that is read'),
        (['transfer', 'zoo/adapter', 'alignmnet', '-o', 'out'], 'alignment: alignmnet (did you mean alignment?)'),
        (['transfer', 'zoo/adapter', 'zoo/adapter', 'alignmnet', '-o', 'out'], '/alignment?)'),
        ([*asks, 'few.jsonl', '--chat-template', 'broken.jinja'], 'broken.jinja, line 2: no chat template in Jinja'),
        ([*asks, 'few.jsonl', '--chat-template', 'failing.jinja'], '--chat-template failing.jinja: the chat templ'),
    ]:
        status, lines = run(*args)
        assert status == 2 and said in lines[-1], lines
    assert not Path('out').exists()

def test_the_help_of_chat_templates():
    def speaks_of_two(command): return 'OLD,NEW' in CliRunner().invoke(app, [command, '--help']).output
    assert not any(map(speaks_of_two, ('finetune', 'evaluate', 'transfer'))) # a transfer asks nothing
    assert all(map(speaks_of_two, ('upgrade', 'refresh', 'inspect')))

# ---- a third hundred

def test_questions_that_ask_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('blank.jsonl').write_bytes(b'\n'.join([row(instruction=' \n')]*3))
    status, lines = run(*UPGRADE[:-1], 'out', '--inputs', 'blank.jsonl')
    assert status == 2 and len(lines) == 1 and 'the questions of all 3 examples are empty: name the column' in lines[0]
    Path('some.jsonl').write_bytes(b'\n'.join([row(instruction=''), row()]))
    assert load_data('some.jsonl', labelled=False).description.endswith('; 1 questions are empty')
    Path('in_input.jsonl').write_bytes(row(instruction='', input='Who?'))
    assert 'empty' not in load_data('in_input.jsonl', labelled=False).description

def test_columns_given_twice(tmp_path):
    file = tmp_path/'a.jsonl'
    file.write_text('{"question": "Who?", "reply": "Ann", "other": "Bob"}')
    asks = ['evaluate', 'zoo/new', '--data', file, '--columns']
    status, lines = run(*asks, 'output=reply,instruction=question,output=other')
    assert status == 2 and 'output is given twice: leave one out' in lines[-1]
    assert run(*asks, 'output=reply, instruction=question')[0] == 0 # a blank before our name

def test_teacher_data_where_the_result_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teach = ['refresh', 'zoo/old', 'zoo/adapter', 'zoo/new', '--inputs', 'zoo/test.jsonl', '-o', 'out', '--lessons']
    for lessons in ('out', 'out/lessons', './out'):
        status, lines = run(*teach, lessons)
        assert status == 2 and len(lines) == 1 and f'--lessons {Path(lessons)} lies where the result goes' in lines[0]
    assert not [*tmp_path.iterdir()]

def test_texts_without_a_text(tmp_path):
    (tmp_path/'texts').write_text(' \n\n')
    status, lines = run('align', 'zoo/old', 'zoo/new', '-o', tmp_path/'out', '--texts', tmp_path/'texts')
    assert status == 2 and f'{tmp_path}/texts holds no text to compare layers on' in lines[0]

def test_a_folder_in_the_way_of_checkpoints(tmp_path, monkeypatch):
    "It is found out before the alignment"
    (tmp_path/'.out-checkpoints').mkdir()
    (tmp_path/'.out-checkpoints'/'thesis').touch()
    monkeypatch.setattr('lorasuite.training.upgrade.align', lambda *args, **kwargs: pytest.fail('it aligned'))
    status, lines = run(*UPGRADE[:-1], tmp_path/'out', '--inputs', 'zoo/test.jsonl')
    assert status == 2 and '.out-checkpoints is in the way' in lines[-1]
    assert [p.name for p in tmp_path.iterdir()] == ['.out-checkpoints']

def test_a_budget_beyond_all_numbers(tmp_path):
    status, lines = run(*UPGRADE[:-1], tmp_path/'out', '--inputs', 'zoo/test.jsonl', '--budget', f'{"9"*400}h')
    assert status == 2 and 'budget=inf: give a number from 0 to' in lines[-1] and not [*tmp_path.iterdir()]
