"""Multimodal wrappers are read whole, with the class that they were saved from; encoders are refused in one line"""
import copy, json
import pytest, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from lorasuite import align, transfer
from lorasuite.core import loading
from lorasuite.core.adapter import Adapter
from lorasuite.core.dry_run import out_features
from lorasuite.core.experts import expert_stacks, split_expert
from lorasuite.core.loading import load_model, load_skeleton
from lorasuite.core.model import Decoder, model_info

TEXT = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=1)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=14)
ROTARY = dict(rope_type='default', rope_theta=1e4, mrope_section=[1, 1, 2])
IMAGE = dict(image_token_id=500)
MIXED = dict(layer_types=['linear_attention', 'full_attention'], linear_num_key_heads=2, linear_num_value_heads=4,
             linear_key_head_dim=8, linear_value_head_dim=8)

# ---- model type: class, text, vision, the rest

WRAPPERS = dict(
    gemma3=('Gemma3ForConditionalGeneration', {}, {}, dict(image_token_id=500, mm_tokens_per_image=4)),
    gemma4=('Gemma4ForConditionalGeneration',
            dict(layer_types=['sliding_attention', 'full_attention'], global_head_dim=16, hidden_size_per_layer_input=8,
                 vocab_size_per_layer_input=512, num_kv_shared_layers=0),
            dict(head_dim=8, global_head_dim=8, num_key_value_heads=2, position_embedding_size=16),
            dict(image_token_id=500, audio_config=None)),
    mistral3=('Mistral3ForConditionalGeneration', dict(model_type='mistral'),
              dict(model_type='pixtral', head_dim=8), IMAGE),
    llama4=('Llama4ForConditionalGeneration', dict(intermediate_size_mlp=64, num_local_experts=2, moe_layers=[1]),
            dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16), IMAGE),
    qwen2_5_vl=('Qwen2_5_VLForConditionalGeneration', dict(rope_parameters=ROTARY),
                QWEN_VISION | dict(fullatt_block_indexes=[0]), IMAGE),
    qwen3_vl=('Qwen3VLForConditionalGeneration', dict(rope_parameters=ROTARY),
              QWEN_VISION | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]), IMAGE),
    qwen3_5=('Qwen3_5ForConditionalGeneration', MIXED | dict(rope_parameters=ROTARY | dict(partial_rotary_factor=1.)),
             QWEN_VISION | dict(num_position_embeddings=16), IMAGE),
    internvl=('InternVLForConditionalGeneration', dict(model_type='qwen2'),
              dict(image_size=[28, 28], patch_size=[14, 14]), IMAGE),
    llava=('LlavaForConditionalGeneration', dict(model_type='llama'), dict(model_type='clip_vision_model'),
           IMAGE),
    paligemma=('PaliGemmaForConditionalGeneration', dict(model_type='gemma'), dict(model_type='siglip_vision_model'),
               dict(image_token_id=500, projection_dim=32)),
    idefics3=('Idefics3ForConditionalGeneration', dict(model_type='llama'), {}, IMAGE),
    smolvlm=('SmolVLMForConditionalGeneration', dict(model_type='llama'), {}, IMAGE),
    aya_vision=('AyaVisionForConditionalGeneration', dict(model_type='cohere2'), dict(model_type='siglip_vision_model'),
                dict(image_token_id=500, adapter_layer_norm_eps=1e-6)),
    glm4v=('Glm4vForConditionalGeneration', dict(rope_parameters=ROTARY | dict(partial_rotary_factor=1.)),
           QWEN_VISION, IMAGE))

def tiny(kind):
    "A random wrapper, its configuration as small as it can be"
    name, text, vision, rest = WRAPPERS[kind]
    config = CONFIG_MAPPING[kind](text_config=TEXT | text, vision_config=VISION | vision, **rest)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for p in model.parameters(): p.data.normal_(std=.1)
    return model

@torch.no_grad()
def text_logits(model, device='cpu'):
    return model(input_ids=torch.arange(4, 16, device=device)[None], use_cache=False).logits

def rewrite(folder, **changes):
    "Change entries of a configuration on disk"
    file = folder/'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

@pytest.fixture(scope='session')
def saved(tokenizer, tmp_path_factory):
    "Directories of the wrappers, each with a tokenizer and without a processor"
    made = {}
    def save(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny(kind).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]
    return save

@pytest.fixture
def whole(monkeypatch):
    "`load_model` and `load_skeleton` answer with what they have read, before a `Decoder` is made of it"
    monkeypatch.setattr(loading, 'Decoder', type('Read', (), dict(__new__=lambda _, model, *rest: model)))

# ---- reading

@pytest.mark.parametrize('kind', WRAPPERS)
@pytest.mark.parametrize('lazy', [False, True])
def test_logits_are_those_of_its_own_class(kind, lazy, saved, whole):
    found = load_model(saved(kind), torch.device('cpu'), lazy=lazy)
    assert type(found).__name__ == WRAPPERS[kind][0]
    assert torch.equal(text_logits(found), text_logits(tiny(kind)))

@pytest.mark.parametrize('kind', WRAPPERS)
def test_lazy_leaves_the_blocks_in_their_files(kind, saved, whole):
    found = load_model(saved(kind), torch.device('cpu'), lazy=True)
    stack, _ = loading.find_blocks(found)
    text_logits(found)
    here = [n for n, p in found.named_parameters() if n.startswith(f'{stack}.') and p.device.type != 'meta']
    assert all('conv1d' in n for n in here) # read by the module around it

@pytest.mark.parametrize('kind', WRAPPERS)
def test_the_text_model_alone_reads_lazily(kind, saved, whole, tokenizer):
    "`align` asks it and not the wrapper, which may call other parts"
    found, expected = (Decoder(load_model(saved(kind), torch.device('cpu'), lazy=lazy), tokenizer, kind)
                       for lazy in (True, False))
    ids = torch.arange(2, 26)[None]
    assert torch.equal(found.read(ids)[0], expected.read(ids)[0])
    assert torch.equal(found.stream(ids[0]), expected.stream(ids[0]))

@pytest.mark.parametrize('kind', ['mistral3', 'gemma3', 'gemma4', 'paligemma', 'smolvlm', 'qwen3_5'])
def test_lazy_computes_in_float32(kind, saved, whole, tokenizer, tmp_path):
    model = tiny(kind).bfloat16()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = load_model(tmp_path, torch.device('cpu'), lazy=True)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    expected = load_model(tmp_path, torch.device('cpu'), torch.float32)
    assert torch.equal(text_logits(found), text_logits(expected))

def test_lazy_keeps_what_other_modules_read(tokenizer, tmp_path):
    "The router of LongCat multiplies by `self.classifier.weight`; a placeholder there gives random logits"
    sizes = dict(vocab_size=512, hidden_size=32, num_layers=1, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2, ffn_hidden_size=32, expert_ffn_hidden_size=16, n_routed_experts=4, moe_topk=2,
                 q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8,
                 zero_expert_num=1)
    torch.manual_seed(0)
    model = transformers.LongcatFlashForCausalLM(CONFIG_MAPPING['longcat_flash'](**sizes)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = loading._read_checked(tmp_path, torch.float32)
    expected = text_logits(model)
    lazy = loading._offload(model, torch.device('cpu'), None)
    assert all(torch.equal(text_logits(lazy), expected) for _ in range(3))

def test_lazy_keeps_complex_buffers(saved, whole):
    found, expected = (load_model(saved('llama4'), torch.device('cpu'), lazy=lazy) for lazy in (True, False))
    buffers, true = dict(found.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == true.keys() and any(b.is_complex() for b in true.values())
    assert all(torch.equal(buffers[name], b) for name, b in true.items())

@pytest.mark.parametrize('kind', WRAPPERS)
def test_skeleton_has_the_modules_and_no_weights(kind, saved, whole):
    found = load_skeleton(saved(kind))
    assert type(found).__name__ == WRAPPERS[kind][0]
    shapes = lambda model: {n: p.shape for n, p in model.state_dict().items()}
    assert shapes(found) == shapes(tiny(kind))
    assert {p.device.type for p in found.parameters()} == {'meta'}

@pytest.mark.parametrize('kind', WRAPPERS)
@pytest.mark.parametrize('read', [load_model, lambda folder: load_model(folder, lazy=True), load_skeleton])
def test_decoder(kind, read, saved):
    decoder = read(saved(kind))
    assert decoder.layers == 2 and decoder.hidden == 32 and decoder.vocab == 512

# ---- the class

@pytest.mark.parametrize('kind', ['gemma3', 'llama4', 'mistral3', 'qwen3_5'])
@pytest.mark.parametrize('named', ['nothing', 'the text', 'an unknown class'])
def test_class_is_that_of_the_whole_configuration(kind, named, saved, whole, tmp_path):
    text = dict(gemma3='Gemma3ForCausalLM', llama4='Llama4ForCausalLM', mistral3='MistralForCausalLM',
                qwen3_5='Qwen3_5ForCausalLM')[kind]
    for file in saved(kind).iterdir(): (tmp_path/file.name).symlink_to(file)
    (tmp_path/'config.json').unlink()
    (tmp_path/'config.json').write_bytes((saved(kind)/'config.json').read_bytes())
    names = {'nothing': None, 'the text': [text], 'an unknown class': ['OtherForCausalLM']}
    rewrite(tmp_path, architectures=names[named])
    assert type(load_model(tmp_path, torch.device('cpu'))).__name__ == WRAPPERS[kind][0]

@pytest.mark.parametrize('kind,name', [('gemma3', 'Gemma3ForCausalLM'), ('llama4', 'Llama4ForCausalLM'),
                                       ('qwen3_5', 'Qwen3_5ForCausalLM'), ('gemma4', 'Gemma4ForCausalLM')])
def test_text_models_of_the_same_families(kind, name, whole, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny(kind).config.get_text_config()).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for lazy in (False, True):
        found = load_model(tmp_path, torch.device('cpu'), lazy=lazy)
        assert type(found).__name__ == name and torch.equal(text_logits(found), text_logits(model))

# ---- the files

@pytest.mark.parametrize('kind', ['gemma3', 'qwen3_5', 'llama4'])
def test_half_a_checkpoint_is_refused(kind, saved, whole, tokenizer, tmp_path):
    tiny(kind).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    weights = {k: w for k, w in load_file(file).items() if 'vis' not in k}
    save_file(weights, file, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=r'lacks weights \(\d+ in all, first .*vis.*fetch the model again'):
        load_model(tmp_path)

@pytest.mark.parametrize('kind', ['internvl', 'mistral3'])
def test_a_head_of_its_own_is_kept_where_the_configuration_ties(kind, saved, whole, tokenizer, tmp_path):
    model = tiny(kind)
    assert model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    head = torch.randn(512, 32)
    save_file(load_file(file) | {'language_model.lm_head.weight': head}, file, metadata=dict(format='pt'))
    found = load_model(tmp_path, torch.device('cpu'))
    assert torch.equal(found.get_output_embeddings().weight, head)
    assert not torch.equal(found.get_input_embeddings().weight, head)

def test_added_tokens_may_lie_beyond_the_embedding(saved, whole, tokenizer, tmp_path):
    tiny('gemma3').save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    longer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    longer.add_tokens(['<image>', '<row_1_col_1>'], special_tokens=True)
    longer.save_pretrained(tmp_path)
    assert len(longer) > 512 and load_model(tmp_path, torch.device('cpu')) is not None

# ---- adapters

PREFIXES = ['model.layers', 'model.language_model.layers', 'language_model.model.layers', 'model.text_model.layers']

def random_pair(g, out, into):
    return torch.randn(2, into, generator=g)/into**.5, .2*torch.randn(out, 2, generator=g)

def text_and_vision(decoder, g):
    "Random updates of all linear maps and experts in the blocks, and of all linear maps outside"
    stacks, inside, outside = expert_stacks(decoder.model), {}, {}
    for path, module in decoder.model.named_modules():
        if out_features(module) and getattr(module, 'weight', None) is not None and not path.endswith('lm_head'):
            part = inside if path.startswith(f'{decoder.stack}.') else outside
            if module.weight.ndim == 2: part[path] = random_pair(g, *module.weight.shape)
    for path, stack in stacks.items():
        for expert in range(stack.experts): inside[f'{path}[{expert}]'] = random_pair(g, stack.out, stack.in_)
    return inside, outside

def merged(model, adapter):
    "A copy of a model with every update added to its weight by hand"
    found, stacks = copy.deepcopy(model), expert_stacks(model)
    for path in adapter.updates:
        parameter, expert = split_expert(path)
        delta = adapter.delta(path)
        if expert is None: found.get_submodule(parameter).weight.data += delta
        else: found.get_parameter(parameter).data[expert] += delta.T if stacks[parameter].transposed else delta
    return found

@pytest.fixture
def decoder(kind, tokenizer):
    return Decoder(tiny(kind), tokenizer, kind)

@pytest.mark.parametrize('kind', WRAPPERS)
@pytest.mark.parametrize('prefix', PREFIXES)
def test_adapters_of_all_versions_are_read(kind, prefix, decoder):
    inside, _ = text_and_vision(decoder, torch.Generator().manual_seed(0))
    other = {path.replace(decoder.stack, prefix, 1): ab for path, ab in inside.items()}
    named = Adapter(other).named_for(model_info(decoder))
    assert named.updates.keys() == inside.keys() and not named.skipped
    assert all(named.updates[path][0] is ab[0] for path, ab in inside.items())

@pytest.mark.parametrize('kind', WRAPPERS)
def test_an_adapter_on_a_wrapper_is_whole(kind, decoder, tmp_path):
    inside, outside = text_and_vision(decoder, torch.Generator().manual_seed(0))
    assert outside
    adapter = Adapter(inside | outside).named_for(model_info(decoder))
    base, true = text_logits(decoder.model), text_logits(merged(decoder.model, adapter))
    with adapter.on(decoder) as model: found = text_logits(model)
    assert (true - base).norm() > .01*base.norm() and (found - true).norm() < 1e-4*(true - base).norm()
    adapter.save(tmp_path/'a')
    again = Adapter.load(tmp_path/'a').named_for(model_info(decoder))
    assert again.updates.keys() == adapter.updates.keys()
    assert all(torch.equal(again.delta(path), adapter.delta(path)) for path in again.updates)

@pytest.mark.parametrize('kind', WRAPPERS)
def test_towers_are_carried_where_they_are_the_same_and_skipped_by_name_elsewhere(kind, decoder, tokenizer):
    inside, outside = text_and_vision(decoder, torch.Generator().manual_seed(0))
    adapter = Adapter(inside | outside, base=kind)
    carried = transfer(adapter, align(decoder, decoder))
    assert carried.updates.keys() == adapter.updates.keys() and not carried.skipped
    assert all(torch.equal(carried.delta(path), adapter.delta(path)) for path in outside)
    other = tiny(kind)
    for path in outside: other.get_submodule(path).weight.data.normal_(std=.1)
    carried = transfer(adapter, align(decoder, Decoder(other, tokenizer, 'other')))
    assert carried.updates.keys() == inside.keys() and carried.skipped.keys() == outside.keys()
    why = 'it lies outside the blocks of the text model, and the new model has another weight there'
    assert {*carried.skipped.values()} == {why}

def test_updates_of_a_tower_that_is_not_there_are_skipped_by_name(tokenizer):
    text = Decoder(transformers.Gemma3ForCausalLM(tiny('gemma3').config.text_config).eval(), tokenizer, 'text')
    vision = 'model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj'
    pair = random_pair(torch.Generator().manual_seed(0), 32, 32)
    whole = Adapter({'model.language_model.layers.0.self_attn.q_proj': pair, vision: pair})
    named = whole.named_for(model_info(text))
    assert [*named.updates] == ['model.layers.0.self_attn.q_proj'] and [*named.skipped] == [vision]
    with pytest.raises(ValueError, match=f'{vision}.*images or sound'), whole.on(text): pass

# ---- other kinds of models

OTHERS = [('t5', 'T5ForConditionalGeneration', 'an encoder-decoder'),
          ('bart', 'BartForConditionalGeneration', 'an encoder-decoder'),
          ('marian', 'MarianMTModel', 'an encoder-decoder'),
          ('whisper', 'WhisperForConditionalGeneration', 'an encoder-decoder'),
          ('florence2', 'Florence2ForConditionalGeneration', 'an encoder-decoder'),
          ('bert', 'BertForMaskedLM', 'an encoder'), ('bert', 'BertModel', 'an encoder'),
          ('bert', 'BertLMHeadModel', 'an encoder'), ('roberta', 'RobertaForSequenceClassification', 'an encoder'),
          ('modernbert', 'ModernBertForMaskedLM', 'an encoder'), ('deberta-v2', 'DebertaV2ForMaskedLM', 'an encoder'),
          ('electra', 'ElectraForPreTraining', 'an encoder'),
          ('bert-generation', 'BertGenerationEncoder', 'an encoder'),
          ('xlm', 'XLMWithLMHeadModel', 'an encoder'),
          ('vit', 'ViTForImageClassification', 'no language model that generates text'),
          ('clip', 'CLIPModel', 'no language model that generates text')]

@pytest.mark.parametrize('kind,name,what', OTHERS)
@pytest.mark.parametrize('read', [load_model, load_skeleton])
def test_other_kinds_are_refused_from_the_configuration_alone(kind, name, what, read, tmp_path):
    CONFIG_MAPPING[kind](architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as e: read(tmp_path)
    said = f'{tmp_path} is {what} ({name}): lorasuite carries adapters of decoder-only language models'
    assert str(e.value) == said

def names_of(task):
    "Model type: class, of one of transformers' tables"
    names = getattr(modeling_auto, f'MODEL_FOR_{task}_MAPPING_NAMES')
    return {key: name if isinstance(name, str) else name[0] for key, name in names.items()}

BOTH = names_of('MASKED_LM') | names_of('SEQ_TO_SEQ_CAUSAL_LM')

@pytest.mark.parametrize('kind', BOTH)
def test_all_encoders_and_encoder_decoders_are_refused_in_one_line(kind, tmp_path):
    config = CONFIG_MAPPING[kind](architectures=[BOTH[kind]])
    if kind not in names_of('MASKED_LM') and not config.is_encoder_decoder: pytest.skip('a decoder that also hears')
    config.save_pretrained(tmp_path)
    what = 'encoder-decoder' if config.is_encoder_decoder else 'encoder'
    with pytest.raises(ValueError, match=rf'an {what} \({BOTH[kind]}\): [^\n]* decoder-only language models$'):
        load_model(tmp_path)

def test_an_encoder_decoder_in_memory_is_refused_too():
    small = dict(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    model = transformers.T5ForConditionalGeneration(CONFIG_MAPPING['t5'](**small))
    with pytest.raises(ValueError, match='is an encoder-decoder .*decoder-only'): load_model(model)

DECODERS = [('bert', 'BertLMHeadModel', dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                             num_attention_heads=2, is_decoder=True)),
            ('bart', 'BartForCausalLM', dict(d_model=32, decoder_layers=1, decoder_attention_heads=2,
                                             decoder_ffn_dim=48)),
            ('xlm', 'XLMWithLMHeadModel', dict(emb_dim=32, n_layers=1, n_heads=2, causal=True))]

@pytest.mark.parametrize('kind,name,sizes', DECODERS)
def test_their_decoders_alone_are_read(kind, name, sizes, whole, tokenizer, tmp_path):
    model = getattr(transformers, name)(CONFIG_MAPPING[kind](vocab_size=512, **sizes)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(text_logits(load_model(tmp_path, torch.device('cpu'))), text_logits(model))
