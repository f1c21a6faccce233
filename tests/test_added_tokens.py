"Tokens that were added for an adapter: known by its tokenizer, carried, and loaded by PEFT onto a resized base"
import copy, json, shutil
import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken
from transformers import AutoTokenizer
from typer.testing import CliRunner
from models import error, random_decoder, tokens
from test_laws import enlarge
from lorasuite.cli import app
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.forecast.inspection import preview_transfer
from lorasuite.stages.added_tokens import add_tokens, take_tokens, with_tokens
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.stages.whole_weights import weights_to_updates
from lorasuite.training.upgrade import upgrade

FEW = ['Who lives in the old mill by the river?']*8
NAMES = ['<call>', '<back>']
pytestmark = pytest.mark.filterwarnings('ignore')

def larger(decoder):
    "The model with two more tokens"
    model, tokenizer = copy.deepcopy(decoder.model), copy.deepcopy(decoder.tokenizer)
    tokenizer.add_tokens([AddedToken(NAMES[0], special=True), AddedToken(NAMES[1], lstrip=True)])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return Decoder(model, tokenizer, decoder.name)

def texts():
    ids = tokens()
    ids[:, ::5], ids[:, 1::5] = 512, 513
    return ids

@torch.no_grad()
def made(decoder, folder, **config):
    "Files of PEFT with the tokenizer beside them, and the logits that PEFT computes with them"
    torch.manual_seed(0)
    settings = dict(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM') | config
    model = get_peft_model(copy.deepcopy(decoder.model), LoraConfig(**settings)).eval()
    for name, p in model.named_parameters():
        if p.requires_grad and 'lora_A' not in name: p.data += .1*torch.randn_like(p)
    model.save_pretrained(folder, save_embedding_layers=True)
    decoder.tokenizer.save_pretrained(folder)
    return Adapter.load(folder), model(texts()).logits

@torch.no_grad()
def by_peft(decoder, folder, ids):
    "Logits of a model that was resized for the tokenizer in a directory, with the adapter in it"
    model = copy.deepcopy(decoder.model)
    model.resize_token_embeddings(max(decoder.vocab, len(AutoTokenizer.from_pretrained(folder))), mean_resizing=False)
    return PeftModel.from_pretrained(model, str(folder)).eval()(ids).logits

def carry(adapter, old, new):
    "As `upgrade` does it"
    rest, brought = take_tokens(adapter, old, new)
    alignment = align(old, new, FEW)
    return add_tokens(transfer(weights_to_updates(rest, old), alignment), brought, alignment, new)

BOTH = ['embed_tokens', 'lm_head']
KINDS = dict(rows=dict(trainable_token_indices={name: [7, 512, 513] for name in BOTH}),
             tables=dict(modules_to_save=BOTH), input=dict(modules_to_save=['embed_tokens']),
             head=dict(target_modules=['q_proj', 'lm_head'], modules_to_save=['embed_tokens']),
             update=dict(target_modules=['q_proj', 'embed_tokens']))

@pytest.mark.parametrize('resized', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_to_itself_and_enlarged(tokenizer, tmp_path, kind, resized):
    base = random_decoder(tokenizer, layers=2)
    more = larger(base)
    adapter, true = made(more, tmp_path/'a', **KINDS[kind])
    old = more if resized else base # a model that was saved with the tokens, or without them
    carried = carry(adapter, old, base)
    if kind == 'update' and not resized: # PEFT did not save the resized head
        assert carried.skipped.keys() == {f'lm_head, token {name}' for name in NAMES}
        return
    assert not carried.skipped and '(512), `<back>` (513); load the base with `model.resize' in carried.card
    carried.save(tmp_path/'b')
    assert error(by_peft(base, tmp_path/'b', texts()), true) <= 1e-5
    found = AutoTokenizer.from_pretrained(tmp_path/'b').added_tokens_decoder
    assert [found[i].content for i in (512, 513)] == NAMES and found[512].special and found[513].lstrip
    new, _, new_id = enlarge(base, hidden=96, heads=6, kv_heads=3)
    carry(adapter, old, new).save(tmp_path/'c')
    new_id = torch.cat([new_id, torch.tensor([512, 513])])
    assert error(by_peft(new, tmp_path/'c', new_id[texts()])[..., new_id], true) <= 1e-3

@pytest.mark.parametrize('kind', ['rows', 'tables'])
def test_tied_models(tokenizer, tmp_path, kind):
    base = random_decoder(tokenizer, layers=2, tie_word_embeddings=True)
    config = dict(KINDS, rows=dict(trainable_token_indices=[7, 512, 513]))[kind]
    adapter, true = made(larger(base), tmp_path/'a', **config)
    carry(adapter, base, base).save(tmp_path/'b')
    assert error(by_peft(base, tmp_path/'b', texts()), true) <= 1e-5
    apart = carry(adapter, base, random_decoder(tokenizer, layers=2, seed=1))
    assert not apart.skipped and {*apart.rows, *apart.weights} >= {kind == 'rows' and 'lm_head' or 'lm_head.weight'}

def test_a_token_that_the_new_model_knows_and_spare_rows(tokenizer, tmp_path):
    base = random_decoder(tokenizer, layers=2)
    adapter, _ = made(larger(base), tmp_path/'a', **KINDS['rows'])
    knows = copy.deepcopy(tokenizer)
    knows.add_tokens(['<other>', '<back>'])
    new = random_decoder(knows, layers=2, vocab_size=640)
    carried = carry(adapter, base, new)
    assert carried.rows['lm_head'][0].tolist() == [7, 514, 513]
    assert '`<call>` (514), `<back>` (513); load the base with the tokenizer' in carried.card
    assert len(knows) == 514 and carried.tokenizer()('<call>').input_ids[-1] == 514

def test_rows_that_nobody_has_are_named(tokenizer, tmp_path):
    base = random_decoder(tokenizer, layers=2)
    adapter, _ = made(larger(base), tmp_path/'a', trainable_token_indices=[512, 513])
    for part in (adapter.weights, adapter.skipped): del part['lm_head.weight']
    carried = carry(adapter, base, base)
    assert [*carried.rows] == ['model.embed_tokens']
    assert carried.skipped.keys() == {f'lm_head, token {name}' for name in NAMES}
    assert carry(adapter, larger(base), base).rows.keys() == {'model.embed_tokens', 'lm_head'}

def test_reserved_tokens_that_were_not_trained_stay(tokenizer, tmp_path):
    more = larger(random_decoder(tokenizer, layers=2))
    adapter, _ = made(more, tmp_path/'a', modules_to_save=BOTH)
    adapter.weights['model.embed_tokens.weight'][512] = more.model.model.embed_tokens.weight[512].detach()
    rest, brought = take_tokens(adapter, more, random_decoder(tokenizer, layers=2))
    assert [token.content for token in brought.tokens] == ['<back>']

def test_an_upgrade_of_models_in_memory(tokenizer, tmp_path):
    base = random_decoder(tokenizer, layers=2)
    more = larger(base)
    more.tokenizer.chat_template = "{% for m in messages %}<call>{{ m['content'] }}{% endfor %}"
    adapter, true = made(more, tmp_path/'a', **KINDS['rows'])
    rows = [dict(instruction='Who?', output='<call>Ann')]*2
    tuned, _ = upgrade(base, base, adapter, rows, steps=1, lr=1e-9)
    assert base.vocab == len(base.model.get_input_embeddings().weight) == 512 == len(base.tokenizer)
    assert tuned.tokenizer().chat_template == more.tokenizer.chat_template
    tuned.save(tmp_path/'b')
    assert error(by_peft(base, tmp_path/'b', texts()), true) <= 1e-4

def test_an_upgrade_with_questions_takes_added_tokens(tmp_path):
    "The specialist answers with its tokens, and the student has them"
    old, new = (load_model(f'zoo/{name}', dtype=torch.float32) for name in ('old', 'new'))
    sizes = old.vocab, new.vocab
    asked = [dict(instruction='Who keeps a cat?'), dict(instruction='Where does Ann live?')]
    for kind in ('rows', 'tables'):
        adapter, _ = made(larger(old), tmp_path/kind, **KINDS[kind])
        carried, _ = upgrade(old, new, adapter)
        refreshed, run = upgrade(old, new, adapter, inputs=asked*4, steps=1, longest=480)
        assert len(run) == 1 and 'tokens added: ' in refreshed.card and 'Refreshed on ' in refreshed.card
        assert refreshed.tokenizer().get_vocab().items() > new.tokenizer.get_vocab().items()
        assert refreshed.rows.keys() == carried.rows.keys() and refreshed.weights.keys() == carried.weights.keys()
        assert any(not refreshed.delta(path).equal(carried.delta(path)) for path in carried.updates)
        assert sizes == tuple(len(d.model.get_input_embeddings().weight) for d in (old, new)) # they stay as they were

def test_commands(tmp_path):
    def lora(*args, status=0):
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == status, result.output
        return result.output + result.stderr
    made(larger(load_model('zoo/old', dtype=torch.float32)), tmp_path/'a', **KINDS['tables'])
    said = lora('inspect', 'zoo/old', 'zoo/new', tmp_path/'a')
    assert 'tokens that will be added to the new tokenizer: <call>, <back>' in said
    assert 'written into the whole table of the new model: ' in said
    said = lora('upgrade', 'zoo/old', 'zoo/new', tmp_path/'a', '-o', tmp_path/'b')
    found = AutoTokenizer.from_pretrained(tmp_path/'b').get_vocab()['<call>']
    assert f'<call> ({found}), <back> ({found + 1}); load the base with' in said
    (tmp_path/'q.json').write_text(json.dumps([dict(instruction='Who?', output='<call>')]*2))
    lora('evaluate', 'zoo/new', '--adapter', tmp_path/'b', '--data', tmp_path/'q.json')
    lora('evaluate', 'zoo/old', '--adapter', tmp_path/'a', '--data', tmp_path/'q.json')
    lora('finetune', 'zoo/new', tmp_path/'b', '--data', tmp_path/'q.json', '--steps', '1', '-o', tmp_path/'c')
    assert AutoTokenizer.from_pretrained(tmp_path/'c').get_vocab()['<call>'] == found
    lora('convert', tmp_path/'b', '-o', tmp_path/'e')
    assert 'GGUF has no place' in lora('convert', tmp_path/'b', '--format', 'gguf', '-o', tmp_path/'f', status=2)
    for file in ('tokenizer.json', 'tokenizer_config.json'): (tmp_path/'a'/file).unlink()
    said = lora('upgrade', 'zoo/old', 'zoo/new', tmp_path/'a', '-o', tmp_path/'d', status=2)
    assert 'trained with 514 tokens, zoo/old has 512' in ' '.join(said.split()) and not (tmp_path/'d').exists()

def test_tokens_without_rows_are_named(tokenizer, tmp_path):
    base, new = random_decoder(tokenizer, layers=2), random_decoder(tokenizer, layers=2, seed=1)
    config = LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM', init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(larger(base).model), config)
    model.save_pretrained(tmp_path/'a', save_embedding_layers=False)
    larger(base).tokenizer.save_pretrained(tmp_path/'a')
    adapter = Adapter.load(tmp_path/'a')
    assert not adapter.rows and not adapter.weights and not adapter.skipped
    rest, brought = take_tokens(adapter, base, new)
    assert brought is None and [*rest.skipped] == [f'token {name}' for name in NAMES]
    carried = transfer(rest, align(base, new, FEW))
    assert 'no row for it was saved' in carried.card and not carried.tokenizer
    assert not take_tokens(adapter, base, larger(new))[0].skipped # it has rows of its own
    with pytest.warns(UserWarning, match='left out: token <call>, token <back>: the tokenizer beside the adapter'):
        assert with_tokens(base, adapter).vocab == base.vocab
    assert preview_transfer(adapter, base, new)['notes'][-1].startswith('token <call>, token <back>: the tokenizer')

def test_a_tokenizer_beside_a_plain_adapter_that_is_none(tmp_path):
    shutil.copytree(data_dir()/'zoo/adapter', tmp_path/'a')
    (tmp_path/'a/tokenizer.json').write_text('{}')
    found = CliRunner().invoke(app, ['inspect', 'zoo/old', 'zoo/new', str(tmp_path/'a')])
    assert found.exit_code == 2 and len(found.stderr.splitlines()) == 1
    assert 'tokenizer.json is not readable as a tokenizer (it has no model and no added_tokens)' in found.stderr

@pytest.mark.parametrize('format, message', [('gguf', 'GGUF has no place for'), ('mlx', 'mlx-lm has no place for')])
def test_tokens_of_whole_tables_are_refused_before_any_work(tmp_path, monkeypatch, format, message):
    "For formats that cannot hold the tables of the new model"
    pytest.importorskip('gguf')
    made(larger(load_model('zoo/old', dtype=torch.float32)), tmp_path/'a', modules_to_save=BOTH)
    monkeypatch.setattr('lorasuite.training.upgrade.upgrade', lambda *args, **kwargs: pytest.fail('it began'))
    args = ['upgrade', 'zoo/old', 'zoo/new', tmp_path/'a', '--format', format, '-o', tmp_path/'out']
    found = CliRunner().invoke(app, [*map(str, args)])
    assert found.exit_code == 2 and f'{message} whole weights' in found.stderr, found.output
    assert not (tmp_path/'out').exists()

def test_an_update_of_a_resized_head_alone(tmp_path):
    "Its new rows start from rows that no file holds: they are left out by name, by every command"
    old = load_model('zoo/old', dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=['q_proj', 'lm_head'], task_type='CAUSAL_LM', init_lora_weights=False)
    get_peft_model(larger(old).model, config).save_pretrained(tmp_path/'a', save_embedding_layers=False)
    adapter = Adapter.load(tmp_path/'a')
    with pytest.raises(ValueError, match='trained with 514 tokens, zoo/old has 512: resize'):
        preview_transfer(adapter, old, load_model('zoo/new'))
    larger(old).tokenizer.save_pretrained(tmp_path/'a')
    adapter = Adapter.load(tmp_path/'a')
    rest, brought = take_tokens(adapter, 'zoo/old', 'zoo/new')
    assert brought is None and [*rest.skipped] == ['lm_head, added tokens']
    assert torch.equal(rest.updates['lm_head'][1], adapter.updates['lm_head'][1][:512])
    report = preview_transfer(adapter, old, load_model('zoo/new'))
    assert ['lm_head, added tokens'] in report['skipped'].values()
    assert not any('added to the' in note for note in report['notes'])
    upgraded, _ = upgrade('zoo/old', 'zoo/new', adapter, texts=FEW)
    assert 'lm_head' in upgraded.updates and 'lm_head, added tokens' in upgraded.skipped and not upgraded.tokenizer
    assert preview_transfer(adapter, old, load_model('zoo/new'))['updates'] == len(adapter.updates)

def test_the_base_of_an_interrupted_run_is_the_same_again(tmp_path):
    "Rows that a base gets for added tokens are the same in every run, so that its checkpoints are known again"
    adapter, _ = made(larger(load_model('zoo/old')), tmp_path/'a', **KINDS['rows'])
    for name in ('zoo/old', 'zoo/new'):
        carried = adapter if name == 'zoo/old' else upgrade('zoo/old', name, adapter)[0]
        first, second = (with_tokens(load_model(name), carried).model.state_dict() for _ in range(2))
        assert all(first[key].equal(second[key]) for key in first)
    questions, made_of = [dict(instruction=e) for e in FEW], dict(steps=5, checkpoints=tmp_path/'c')
    runs = [upgrade('zoo/old', 'zoo/new', adapter, inputs=questions, **made_of)[1] for _ in range(2)]
    assert runs[0] == runs[1]
