"""Chat templates beside adapters: kept where a model was trained through one, and used when the adapter is put on"""
import copy, hashlib, json, shutil
from dataclasses import replace
import pytest
from peft import PeftModel
from test_cli import report, run, ZOO
from lorasuite.core.adapter import Adapter
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.forecast.diagnostics import diagnose
from lorasuite.stages.added_tokens import with_template
from lorasuite.stages.alignment import align
from lorasuite.stages.many import carry_whole
from lorasuite.training.evaluate import evaluate
from lorasuite.training.examples import load_data
from lorasuite.training.finetune import finetune
from lorasuite.training.prompts import Prompts, Renderer, renderers_of_both
from lorasuite.training.refresh import distillation_data, refresh
from lorasuite.lab.refit import best_refit
from lorasuite.training import upgrade as upgrade_module
from lorasuite.training.upgrade import upgrade

ASKED = "{% if m['role'] == 'user' %}Ask: {{ m['content'] }}\nSay:{% else %} {{ m['content'] }}<eos>{% endif %}"
TEMPLATE = '{% for m in messages %}' + ASKED + '{% endfor %}'
AS_TRAINED = TEMPLATE.replace('Ask', 'Question').replace('Say', 'Answer') # the form of the tiny adapter
SHA256 = hashlib.sha256(TEMPLATE.encode()).hexdigest()
QUESTION = dict(instruction='Who keeps a cat?')

@pytest.fixture(scope='module')
def data(): return load_data('zoo/train.jsonl')

@pytest.fixture(scope='module')
def maps(): return align('zoo/old', 'zoo/new')

@pytest.fixture
def chatty(tmp_path):
    "The tiny adapter with a template beside it, as Unsloth, TRL and Axolotl leave one"
    shutil.copytree(ZOO/'adapter', tmp_path/'chatty')
    (tmp_path/'chatty'/'chat_template.jinja').write_text(AS_TRAINED)
    return tmp_path/'chatty'

def with_own(name, template):
    "A tiny model whose tokenizer has a chat template"
    model = load_model(name)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return Decoder(model.model, tokenizer, name)

def test_a_given_template_is_kept_and_used(tmp_path):
    (tmp_path/'t.jinja').write_text(TEMPLATE)
    few, short = ('--data', 'zoo/train.jsonl'), ('--steps', 2)
    said = report('finetune', 'zoo/new', *few, *short, '--chat-template', tmp_path/'t.jinja', '-o', tmp_path/'a')
    assert said['prompt'] == 'given chat template'
    assert (tmp_path/'a'/'chat_template.jinja').read_text() == TEMPLATE
    card = (tmp_path/'a'/'README.md').read_text()
    assert f'`given chat template`, kept as `chat_template.jinja`, SHA-256 `{SHA256}`.' in card
    PeftModel.from_pretrained(load_model('zoo/new').model, str(tmp_path/'a'))
    asked = ('evaluate', 'zoo/new', '--adapter', tmp_path/'a', '--data', 'zoo/test.jsonl')
    assert report(*asked)['prompt'] == "adapter's chat template"
    assert report(*asked, '--prompt', 'qa')['prompt'] == "plain prompt 'Question: {instruction}\\nAnswer:'"
    said = report('finetune', 'zoo/new', tmp_path/'a', *few, *short, '-o', tmp_path/'b')
    assert said['prompt'] == "adapter's chat template"
    assert (tmp_path/'b'/'chat_template.jinja').read_text() == TEMPLATE
    report('finetune', 'zoo/new', tmp_path/'a', *few, *short, '--prompt', 'qa', '-o', tmp_path/'c')
    assert not (tmp_path/'c'/'chat_template.jinja').exists()

def test_the_template_beside_a_specialist_is_used(chatty):
    "The tiny adapter answers as it was trained, through a template that writes the same, and worse through another"
    test, old = load_data('zoo/test.jsonl')[:60], load_model('zoo/old')
    plain = evaluate(old, test, Adapter.load('zoo/adapter'))
    (chatty/'chat_template.jinja').write_text('{{ bos_token }}' + AS_TRAINED)
    assert evaluate(old, test, Adapter.load(chatty)).answers == plain.answers and plain.accuracy > .9
    other = replace(Adapter.load(chatty), chat_template=TEMPLATE)
    assert evaluate(old, test, other).accuracy < .5
    assert evaluate(old, test, other, prompts=Prompts('qa')).answers == plain.answers
    assert distillation_data(old, test[:4], other)['answer'] != distillation_data(old, test[:4])['answer']

def test_older_files_of_tokenizers(chatty):
    (chatty/'chat_template.jinja').unlink()
    for said in (AS_TRAINED, [dict(name='tools', template='x'), dict(name='default', template=AS_TRAINED)]):
        (chatty/'tokenizer_config.json').write_text(json.dumps(dict(chat_template=said)))
        assert Adapter.load(chatty).chat_template == AS_TRAINED
    for text in ('{', '[]', '{"chat_template": 3}', '{"chat_template": [3]}', '{}'):
        (chatty/'tokenizer_config.json').write_text(text)
        assert Adapter.load(chatty).chat_template == ''

def test_a_carried_adapter_keeps_it_for_a_model_without_one(chatty, maps, tmp_path):
    carried = carry_whole(Adapter.load(chatty), maps)
    assert carried.chat_template == AS_TRAINED
    assert 'kept as `chat_template.jinja`, `zoo/new` has no default one\n  - SHA-256 `' in carried.card
    carried.save(tmp_path/'out')
    assert Adapter.load(tmp_path/'out').chat_template == AS_TRAINED
    new = with_own('zoo/new', TEMPLATE)
    upgraded, _ = upgrade('zoo/old', new, chatty)
    assert not upgraded.chat_template and 'left out, `zoo/new` has its own' in upgraded.card
    assert str(Renderer.of(new, None, upgraded)) == 'own chat template'
    assert not carry_whole(Adapter.load('zoo/adapter'), maps).chat_template

@pytest.fixture
def talking(tmp_path):
    "The tiny old model with a chat template that writes what its adapter was trained with, as an ordinary directory"
    shutil.copytree(ZOO/'old', tmp_path/'talking')
    (tmp_path/'talking'/'chat_template.jinja').write_text('{{ bos_token }}' + AS_TRAINED)
    return tmp_path/'talking'

def test_the_template_of_the_old_model_goes_along(talking, data, maps):
    "A new model without a template is asked in that of the old one, which ordinary adapters were trained in"
    template = (talking/'chat_template.jinja').read_text()
    carried, _ = upgrade(talking, 'zoo/new', 'zoo/adapter')
    assert carried.chat_template == template and 'kept as `chat_template.jinja`, `zoo/new` has no' in carried.card
    maps = replace(maps, old=replace(maps.old, name=str(talking)))
    assert carry_whole(Adapter.load('zoo/adapter'), maps).chat_template == template
    gone = replace(maps, old=replace(maps.old, name='not/here'))
    assert not carry_whole(Adapter.load('zoo/adapter'), gone).chat_template
    named, _ = upgrade(talking, 'zoo/new', 'zoo/adapter', prompts=Prompts('qa'))
    assert not named.chat_template and 'chat template' not in named.card
    own, _ = upgrade(talking, with_own('zoo/new', TEMPLATE), 'zoo/adapter')
    assert not own.chat_template and 'old specialist: left out, `zoo/new` has its own' in own.card
    same, _ = upgrade(talking, with_own('zoo/new', template), 'zoo/adapter')
    assert not same.chat_template and 'chat template' not in same.card
    test, new = load_data('zoo/test.jsonl')[:60], load_model('zoo/new')
    assert evaluate(new, test, carried).accuracy > .8

def test_lessons_are_learned_in_the_template_of_the_old_model(talking, tmp_path):
    template, said = (talking/'chat_template.jinja').read_text(), []
    questions = [dict(instruction=e['instruction']) for e in load_data('zoo/train.jsonl')[:8]]
    upgraded, _ = upgrade(talking, 'zoo/new', 'zoo/adapter', inputs=questions, steps=1, say=said.append)
    assert said[:2] == ['prompt of the old model: own chat template',
                        "prompt of the new model: old specialist's chat template"]
    assert upgraded.chat_template == template
    few = ('--inputs', tmp_path/'few.jsonl', '--steps', 1)
    (tmp_path/'few.jsonl').write_text(''.join(json.dumps(q) + '\n' for q in questions))
    forms = dict(old='own chat template', new="old specialist's chat template")
    assert report('refresh', talking, 'zoo/adapter', 'zoo/new', *few, '-o', tmp_path/'one')['prompts'] == forms
    for name in 'ab': shutil.copytree(ZOO/'adapter', tmp_path/name)
    many = report('refresh', talking, tmp_path/'a', tmp_path/'b', 'zoo/new', *few, '-o', tmp_path/'many')
    assert many['prompts'] == forms
    for made in (tmp_path/'one', tmp_path/'many'/'a', tmp_path/'many'/'b'):
        assert Adapter.load(made).chat_template == template
    plain = report('refresh', talking, 'zoo/adapter', 'zoo/new', *few, '--prompt', 'qa', '-o', tmp_path/'plain')
    assert 'plain prompt' in plain['prompts']['new'] and not Adapter.load(tmp_path/'plain').chat_template
    seen = run('inspect', talking, 'zoo/new', '--inputs', tmp_path/'few.jsonl').stdout
    assert "the new model is asked by its old specialist's chat template" in seen

def test_a_refit_asks_both_models_rightly(chatty, data, maps):
    questions = [dict(instruction=e['instruction']) for e in data[:12]]
    old, new = map(load_model, ('zoo/old', 'zoo/new'))
    fitted = best_refit(Adapter.load(chatty), maps, old, new, questions)
    plain = best_refit(Adapter.load('zoo/adapter'), maps, old, new, questions)
    assert all(fitted.delta(path).equal(plain.delta(path)) for path in plain.updates) # the same texts
    assert fitted.chat_template == AS_TRAINED and plain.chat_template == ''
    assert "old model, asked for the refit: form of the prompts: `adapter's chat template`, kept" in fitted.card
    assert 'new model, asked for the refit: form of the prompts: `plain prompt' in plain.card
    fitted = best_refit(Adapter.load(chatty), maps, old, new, questions, prompts=(None, Prompts(template=TEMPLATE)))
    assert fitted.chat_template == TEMPLATE

def test_an_upgrade_asks_both_models_rightly(chatty, data, monkeypatch):
    "The lessons are those of the form that lies beside the adapter, and the student is asked in it too"
    questions, said, taught = [dict(instruction=e['instruction']) for e in data[:12]], [], []
    keep = upgrade_module.keep_lessons
    def keeping(*args, **kwargs):
        found = keep(*args, **kwargs)
        taught.append([*found['answer']])
        return found
    monkeypatch.setattr(upgrade_module, 'keep_lessons', keeping)
    def go(adapter, **kwargs): return upgrade('zoo/old', 'zoo/new', adapter, inputs=questions, steps=2, say=said.append,
                                              **kwargs)[0]
    plain, upgraded = go('zoo/adapter'), go(chatty)
    assert upgraded.chat_template == AS_TRAINED and plain.chat_template == ''
    assert taught[0] == taught[1] # the same texts
    specialist, carried = Adapter.load(chatty), upgrade('zoo/old', 'zoo/new', chatty)[0]
    lessons = distillation_data(load_model('zoo/old'), questions, specialist)
    by_hand, _ = refresh(load_model('zoo/new'), lessons, carried, specialist=specialist, steps=2, lr=3e-4)
    assert all(upgraded.delta(path).equal(by_hand.delta(path)) for path in by_hand.updates)
    assert said[:2] == [f"prompt of the {side} model: plain prompt 'Question: {{instruction}}\\nAnswer:'"
                        for side in ('old', 'new')]
    assert said[3:5] == ["prompt of the old model: adapter's chat template",
                         "prompt of the new model: old specialist's chat template"]
    (chatty/'chat_template.jinja').write_text(TEMPLATE)
    other = go(chatty)
    assert taught[2] != taught[0] and other.chat_template == TEMPLATE and SHA256 in other.card
    assert any(not other.delta(path).equal(plain.delta(path)) for path in plain.updates)
    given = go('zoo/adapter', prompts=(None, Prompts(template=TEMPLATE)))
    assert taught[3] == taught[0] and given.chat_template == TEMPLATE and SHA256 in given.card

def test_a_refreshed_student_is_asked_like_its_teacher(chatty, data):
    new, specialist = load_model('zoo/new'), Adapter.load(chatty)
    settings = dict(steps=1, specialist=specialist)
    assert refresh(new, data[:8], **settings)[0].chat_template == AS_TRAINED
    assert refresh(new, data[:8], prompts=Prompts('qa'), **settings)[0].chat_template == ''
    assert refresh(with_own('zoo/new', TEMPLATE), data[:8], **settings)[0].chat_template == ''

def test_texts_are_asked_in_no_form():
    new = load_model('zoo/new')
    for rows, form in (([dict(text='Ann keeps a cat.')], 'none, texts as they stand'),
                       ([dict(prompt='2 + 2 =', output=' 4')], 'as they stand in the data')):
        assert f'Form of the prompts: {form}.' in finetune(new, rows, steps=1)[0].card

def test_a_template_that_cannot_be_used_is_refused_before_any_work(chatty):
    (chatty/'chat_template.jinja').write_text('{{ "hello" }}')
    done = run('evaluate', 'zoo/old', '--adapter', chatty, '--data', 'zoo/test.jsonl')
    assert done.exit_code == 2 and 'does not write what the user says: give another with --chat-template' in done.stderr

def test_the_card_of_an_upgrade_with_data(data):
    questions = [dict(instruction=e['instruction']) for e in data[:6]]
    tuned, both = (upgrade('zoo/old', 'zoo/new', 'zoo/adapter', data[:16], asked, steps=1)[0].card
                   for asked in (None, questions))
    for card in (tuned, both):
        assert 'from 28 updates; the transfer itself used no label.' in card and 'without any label' not in card
        assert '(updates untrained after the transfer): 2, 4' in card
        assert card.count('Form of the prompts: `plain') == 1
    assert 'Tuned afterwards on 16 labelled examples: 1 steps' in tuned
    assert 'Refreshed on 0 answers of the old specialist and 16 labelled examples: 1 steps' in both # all are labelled

def test_the_owner_of_a_template_is_named(chatty, tmp_path):
    (chatty/'chat_template.jinja').write_text('{% for')
    for command in (['evaluate', 'zoo/old', '--adapter', chatty, '--data', 'zoo/test.jsonl'],
                    ['upgrade', 'zoo/old', 'zoo/new', chatty, '--inputs', 'zoo/test.jsonl', '-o', tmp_path/'out']):
        done = run(*command)
        assert done.exit_code == 2 and f'the chat template of {chatty} does not take this chat' in done.stderr
    shutil.copytree(ZOO/'old', tmp_path/'several')
    settings = tmp_path/'several'/'tokenizer_config.json'
    told = json.loads(settings.read_text())
    for wrong, message in (([dict(name='rag', template='x')], 'has several chat templates (rag), and none is called'),
                           (5, 'chat_template in its tokenizer_config.json is 5, where a text belongs')):
        settings.write_text(json.dumps(told | dict(chat_template=wrong)))
        done = run('evaluate', tmp_path/'several', '--data', 'zoo/test.jsonl')
        assert done.exit_code == 2 and message in done.stderr and 'fault of lorasuite' not in done.stderr
    settings.write_text(json.dumps(told | dict(model_max_length='x')))
    done = run('inspect', tmp_path/'several', 'zoo/new')
    assert done.exit_code == 2 and "model_max_length in its tokenizer_config.json is 'x'" in done.stderr

def test_a_chat_with_tools_is_asked_by_the_template_for_tools(talking):
    "The default one of an old model goes along, and its own specialist is still asked by all of them"
    (talking/'chat_template.jinja').unlink()
    settings = json.loads((talking/'tokenizer_config.json').read_text())
    settings['chat_template'] = [dict(name='default', template=AS_TRAINED), dict(name='tool_use', template=TEMPLATE)]
    (talking/'tokenizer_config.json').write_text(json.dumps(settings))
    old, new, asked = load_model(talking), load_model('zoo/new'), dict(messages=[dict(role='user', content='Hi?')])
    tools = [dict(type='function', function=dict(name='f', description='d', parameters={}))]
    first, second = renderers_of_both(old, new, None, with_template(Adapter.load('zoo/adapter'), old))
    assert (str(first), str(second)) == ('own chat template', "old specialist's chat template")
    assert first.text(asked) == second.text(asked) == 'Question: Hi?\nAnswer:'
    assert first.text(asked | dict(tools=tools)) == 'Ask: Hi?\nSay:'

def test_a_named_form_leaves_the_template_behind(chatty, data):
    "Also one that lies beside the adapter, and the card does not say that it is there"
    for more in ({}, dict(inputs=data[:4], steps=1), dict(data=data[:4], steps=1)):
        upgraded, _ = upgrade('zoo/old', 'zoo/new', chatty, prompts=Prompts('qa'), **more)
        assert not upgraded.chat_template and 'kept as' not in upgraded.card

def test_an_end_that_the_new_model_does_not_know_is_not_learned():
    "What is a token of the old model would be letters for the new one, which it would write behind each answer"
    new, marked = load_model('zoo/new'), AS_TRAINED.replace('<eos>', '<|im_end|>')
    example = QUESTION | dict(output='Mamus')
    for template in (marked, marked.replace('<|im_end|>', '<|im_end|>\n')):
        row = Renderer.of(new, None, None, Adapter({}, chat_template=template)).encode(example)
        assert new.tokenizer.decode([i for i in row['labels'] if i != -100]) == ' Mamus<eos>'
        assert new.tokenizer.decode(row['input_ids']) == 'Question: Who keeps a cat?\nAnswer: Mamus<eos>'
    spaced = Renderer.of(new, Prompts(template=AS_TRAINED.replace('<eos>', '\n'))).encode(example)
    assert new.tokenizer.decode(spaced['input_ids']).endswith(' Mamus\n<eos>')

def test_all_that_ask_both_models_ask_the_new_one_alike(talking, data):
    "A refit and the signs of `inspect --deep` are judged by answers in the form that a refresh would ask in"
    old, new, specialist = load_model(talking), load_model('zoo/new'), Adapter.load('zoo/adapter')
    questions = [dict(instruction=e['instruction']) for e in data[:12]]
    maps = align(old, new)
    refitted = best_refit(specialist, maps, old, new, questions)
    assert refitted.chat_template == old.tokenizer.chat_template
    found = diagnose(old, new, maps, specialist, questions)
    asked = with_template(specialist, old)
    assert found == diagnose(old, new, maps, asked, questions) and found['agreement_carried'] > .8

def several_of(folder, **templates):
    "A model directory whose tokenizer has templates with names"
    file = folder/'tokenizer_config.json'
    named = [dict(name=name, template=text) for name, text in templates.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(chat_template=named)))
    return folder

@pytest.mark.parametrize('wrong, why', [('{% for', 'TemplateSyntaxError'), ('{{ "hello" }}', 'does not write what is')])
def test_a_template_that_cannot_be_used_is_left_out_of_a_carry(chatty, talking, maps, tmp_path, wrong, why):
    "By name, in the output and in the card, whether the adapter has it or its model"
    (chatty/'chat_template.jinja').write_text(wrong)
    (talking/'chat_template.jinja').write_text(wrong)
    maps.save(tmp_path/'maps')
    for out, command in (('a', ['upgrade', 'zoo/old', 'zoo/new', chatty]), ('b', ['transfer', chatty, tmp_path/'maps']),
                         ('c', ['upgrade', talking, 'zoo/new', 'zoo/adapter'])):
        done = run(*command, '-o', tmp_path/out)
        assert done.exit_code == 0 and 'old specialist: left out, it cannot be used (`' in done.stdout
        assert f'the chat template that {command[-1] if out != "b" else chatty} is asked in cannot be' in done.stderr
        assert why in done.stderr and why in (tmp_path/out/'README.md').read_text()
        assert not (tmp_path/out/'chat_template.jinja').exists()
    with pytest.warns(UserWarning, match=why): carried = carry_whole(Adapter.load(chatty), maps)
    assert not carried.chat_template

def test_a_new_model_with_several_templates_and_no_default(talking, tmp_path):
    "It is asked like one without any, in the old one's template; without that, the message names what helps"
    new = several_of(shutil.copytree(ZOO/'new', tmp_path/'several'), rag=TEMPLATE, tools=TEMPLATE)
    few = tmp_path/'q.jsonl'
    few.write_text(json.dumps(QUESTION) + '\n')
    taught = ('--inputs', few, '--steps', 1)
    assert run('upgrade', talking, new, 'zoo/adapter', *taught, '-o', tmp_path/'a').exit_code == 0
    assert Adapter.load(tmp_path/'a').chat_template == (talking/'chat_template.jinja').read_text()
    assert f'`{new}` has no default one' in (tmp_path/'a'/'README.md').read_text()
    done = run('upgrade', 'zoo/old', new, 'zoo/adapter', *taught, '-o', tmp_path/'b')
    assert done.exit_code == 2 and '(rag, tools), and none is called default: give' in done.stderr
    assert '--chat-template FILE, or OLD,NEW' in done.stderr and 'plain prompt (--prompt)' in done.stderr
    (tmp_path/'t.jinja').write_text(TEMPLATE)
    for more in (['--chat-template', f',{tmp_path}/t.jinja'], ['--prompt', 'qa']):
        done = run('upgrade', 'zoo/old', new, 'zoo/adapter', *taught, *more, '-o', tmp_path/more[0])
        assert done.exit_code == 0, done.output

def test_the_card_says_what_lies_beside_its_adapter(chatty, data, maps):
    "A later training in another form leaves the template out, or puts its own there"
    new, carried = load_model('zoo/new'), carry_whole(Adapter.load(chatty), maps)
    kept = 'kept as `chat_template.jinja`'
    for train in (refresh, finetune):
        same, _ = train(new, data[:4], carried, steps=1)
        plain, _ = train(new, data[:4], same, steps=1, prompts=Prompts('qa'))
        given, _ = train(new, data[:4], same, steps=1, prompts=Prompts(template=TEMPLATE))
        assert [x.card.count(kept) for x in (carried, same, plain, given)] == [1, 2, 0, 1]
        assert plain.card.count('not kept here') == 2 and f'{kept}, SHA-256 `{SHA256}`' in given.card
    specialist, forms = Adapter.load(chatty), (None, Prompts('qa'))
    refitted = best_refit(specialist, maps, load_model('zoo/old'), new, data[:6], prompts=forms)
    assert not refitted.chat_template and kept not in refitted.card
