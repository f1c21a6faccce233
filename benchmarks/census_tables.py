"""What the census must be told of single settings and architectures to make them tiny"""
import torch

# ---- sizes by the name of the setting: a number, or a function of (hidden, the full value, the whole configuration)

def hidden(h, value, config): return h
def heads(h, value, config): return h//16
def wide(h, value, config): return 3*h//2
def narrow(h, value, config): return 3*h//4 if value else value

def kv_heads(h, value, config):
    "As many as query heads where the full model has as many, one where it has one, else half"
    names = ('num_attention_heads', 'n_head', 'num_heads', 'n_heads')
    queries = next((config[n] for n in names if isinstance(config.get(n), int)), None)
    if value == 1: return 1
    return h//16 if value == queries else h//32

def head_size(h, value, config):
    "16; with latent attention it is the size of what is rotated, or of both parts"
    if value == config.get('qk_rope_head_dim'): return 8
    return 24 if value == config.get('qk_head_dim') else 16

def names(text): return text.split()

WIDTHS = {}
WIDTHS |= dict.fromkeys(names('''hidden_size d_model n_embd embedding_dim emb_dim embed_dim out_hidden_size
    hidden_size_global text_hidden_size projection_dim vision_output_dim projector_output_dim
    encoder_hidden_size output_dim word_embed_proj_dim attention_hidden_size lru_width backbone_hidden_size
    embedding_size hidden_dim input_embedding_size output_embedding_size adapter_out_dim image_text_hidden_size
    vision_hidden_size moe_hidden_size audio_hidden_size thinker_hidden_size patch_embed_hidden_size
    decoder_hidden_size pooler_output_size image_token_embed_dim pronunciation_embed_dim shape_embed_dim
    adapter_input_size downsample_hidden_size projection_hidden_size'''), hidden)
WIDTHS |= dict.fromkeys(names('''num_attention_heads n_head n_heads attention_heads num_heads encoder_attention_heads
    decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
    conf_num_attention_heads num_sliding_attention_heads'''), heads)
WIDTHS |= dict.fromkeys(names('num_key_value_heads num_kv_heads swa_num_key_value_heads'), kv_heads)
WIDTHS |= dict.fromkeys(names('''intermediate_size ffn_dim d_ff dff n_inner ffn_hidden_size dim_ff decoder_ffn_dim
    encoder_ffn_dim mlp_dim feed_forward_size d_inner intermediate_size_mlp dense_intermediate_size
    projector_hidden_size projector_input_dim projection_hidden_dim alignment_intermediate_size merged_hidden_size
    projection_intermediate_size'''), wide)
WIDTHS |= dict.fromkeys(names('''moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
    moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim expert_ffn_hidden_size'''),
    narrow)
LAYERS = set(names('''num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers layers
    num_decoder_layers num_encoder_layers num_blocks num_layers_per_stack depth conf_num_hidden_layers
    resampler_depth'''))
WIDTHS |= dict(
    vocab_size=320, vocab_size_per_layer_input=320, decoder_vocab_size=320, unpadded_vocab_size=320,
    additional_vocab_size=0, head_dim=head_size, swa_head_dim=16, dim_head=16, d_kv=16, kv_channels=16, d_head=16,
    attention_head_dim=16, attention_head_size=16, global_head_dim=32, index_head_dim=16, index_n_heads=2,
    kv_lora_rank=24, q_lora_rank=32, o_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, qk_head_dim=24,
    v_head_dim=16, rotary_dim=8, linear_key_head_dim=8, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_head_dim=16, linear_num_heads=4, hidden_size_per_layer_input=16, laurel_rank=8,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, zero_expert_num=2,
    num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_top_k=2, moe_k=2, top_k_experts=2,
    n_group=lambda h, value, config: min(value, 2), num_expert_group=lambda h, value, config: min(value, 2),
    topk_group=1, n_shared_experts=lambda h, value, config: min(value, 1),
    num_shared_experts=lambda h, value, config: min(value, 1), moe_num_shared_experts=1,
    mamba_d_state=8, mamba_d_conv=4, mamba_d_head=16, mamba_headdim=16, mamba_head_dim=16, ssm_state_size=8,
    state_size=8, mamba_n_heads=lambda h, value, config: h//8, mamba_num_heads=lambda h, value, config: h//8,
    n_mamba_heads=lambda h, value, config: 2, mamba_d_ssm=lambda h, value, config: 2*h, mamba_dt_rank=8,
    time_step_rank=8, n_groups=lambda h, value, config: min(value, 2), mamba_chunk_size=8, chunk_size=8,
    sliding_window=16, sliding_window_size=16, attention_chunk_size=16, window_size=4, local_attention=16,
    attention_window_size=16, index_topk=64, lora_rank=8, adapter_rank=8, block_size=8, block_multiple_of=8,
    patch_size=lambda h, value, config: 4 if isinstance(value, int) else [4]*len(value),
    image_size=lambda h, value, config: 16 if isinstance(value, int) else [16]*len(value),
    num_position_embeddings=16, spatial_merge_size=2, num_mel_bins=16, n_mel_bins=16, max_source_positions=64,
    image_seq_length=4, mm_tokens_per_image=4, num_query_tokens=4, latent_query_num=4, codebook_size=32,
    resampler_n_latents=4, resampler_num_latents=4, resampler_n_heads=4, resampler_head_dim=16, resampler_heads=2,
    num_image_tokens=4, first_k_dense_replace=1, num_dense_layers=1, hc_lowrank=16, ple_embed_dim=16,
    ngram_vocab_size_base=64, split_ngram_parts=4, encoder_hash_byte_group_vocab=50, router_hidden_size=16,
    max_window_layers=2, position_embedding_size=64, num_nextn_predict_layers=0, max_num_patches=64, pos_emb_height=8,
    pos_emb_width=8, base_channels=32, num_res_blocks=1, num_codebooks=2, codebook_dim=32, num_filters=8,
    index_block_size=8, index_topk_blocks=8)

CAUSAL_TEXT = {'gemma4_assistant': dict(text_config=dict(
    model_type='gemma4_text', hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_hidden_layers=6,
    num_kv_shared_layers=6))}    # key: what its configuration must be given to be made at all
ENCODERS = set(names('''bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
    roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod xlm git'''))
OTHERS = set(names('''xlnet reformer diffusion_gemma cpmant musicgen musicgen_melody gemma4_assistant blip pi0
    gemma4_unified_assistant kyutai_speech_to_text qwen2_5_omni qwen3_omni_moe moshi'''))

# ---- settings of single architectures: a dictionary, or a function of hidden and layers; `a.b` is b in the part a

MIXED = ['linear_attention', 'full_attention']
SLIDING = ['sliding_attention', 'full_attention']
MOE = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1)

def kinds(values:list, **more):
    "Layers of these kinds in turn"
    return lambda hidden, layers: dict(layer_types=(values*layers)[:layers]) | more

def head_of(**more):
    "The head size where transformers cannot do without"
    return dict(head_dim=16) | more

def short_convolutions(hidden, layers):
    types = (['conv', 'full_attention']*layers)[:layers]
    return dict(layer_types=types, full_attn_idxs=[i for i, kind in enumerate(types) if kind == 'full_attention'])

def transcriber(hidden, layers):
    return {'text_config.layers_block_type': (['linear_attention', 'moe', 'full_attention', 'mlp']*layers)[:layers]}

def blt(hidden, layers):
    part = dict(hidden_size=hidden, num_attention_heads=hidden//16, num_key_value_heads=hidden//16,
                intermediate_size=3*hidden//2, num_hidden_layers=2, head_dim=16)
    parts = {f'{name}_config.{n}': v for name in ('patcher', 'encoder', 'decoder') for n, v in part.items()}
    return parts | {'encoder_config.cross_attn_k': 2, 'global_config.num_hidden_layers': layers,
                    'encoder_hash_byte_group_vocab': 50}

def gemma_3n(hidden, layers):
    return dict(num_kv_shared_layers=2, layer_types=(['sliding_attention', 'full_attention']*layers)[:layers],
                intermediate_size=[3*hidden//2]*layers, activation_sparsity_pattern=[.5] + [0.]*(layers - 1))

def zamba(hidden, layers):
    return dict(layers_block_type=(['linear_attention', 'hybrid']*3)[:layers],
                num_attention_heads=hidden//16, num_key_value_heads=hidden//16, attention_hidden_size=2*hidden,
                attention_head_dim=32, mamba_dt_rank=8)

def zamba2(hidden, layers):
    types = (['linear_attention', 'hybrid']*3)[:layers]
    return dict(layers_block_type=types, hybrid_layer_ids=[i for i, t in enumerate(types) if t == 'hybrid'],
                attention_head_dim=32, mamba_headdim=16, n_mamba_heads=hidden//8, num_query_groups=hidden//16,
                attention_hidden_size=2*hidden, num_key_value_heads=hidden//16)

def prefixed(prefix, settings):
    "Settings of a part"
    if callable(settings): return lambda **sizes: prefixed(prefix, settings(**sizes))
    return {f'{prefix}.{name}': value for name, value in settings.items()}

def compass(hidden, layers):
    rope = dict(rope_type='default', rope_theta=10000., mrope_section=[4, 2, 2])
    return dict(layer_types=(SLIDING*layers)[:layers], num_key_value_heads=2,
                rope_parameters=dict(sliding_attention=rope, full_attention=rope))

def dots3(hidden, layers):
    sliding = dict(num_attention_heads=hidden//16, num_key_value_heads=hidden//16, q_lora_rank=32, kv_lora_rank=24,
                   head_dim=32, qk_nope_head_dim=16, v_head_dim=16, qk_rope_head_dim=16)
    types = (['indexed_attention', 'sliding_attention']*layers)[:layers]
    own = {i: sliding for i, kind in enumerate(types) if kind == 'sliding_attention'}
    return dict(layer_types=types, num_key_value_heads=hidden//16, head_dim=24, rope_parameters=None,
                per_layer_config=own)

def assistant(hidden, layers):
    settings = dict(num_kv_shared_layers=layers, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
                    enable_moe_block=False, use_double_wide_mlp=False, num_hidden_layers=layers,
                    layer_types=(SLIDING*layers)[:layers])
    return prefixed('text_config', settings)

def dots3_all(hidden, layers):
    towers = {'vision_config.adapter_in_dim': hidden, 'audio_config.adapter_in_dim': hidden,
              'audio_config.hidden_size': hidden, 'audio_config.adapter_input_size': hidden}
    return prefixed('text_config', dots3(hidden, layers)) | towers

def mistral_4(hidden, layers): return dict(head_dim=16, qk_head_dim=16, qk_nope_head_dim=8)

QWEN_4 = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=4)
IMAGE_WORDS = {'<image>': 310}
text = lambda **settings: prefixed('text_config', settings)
MROPE = {'text_config.rope_parameters': dict(rope_type='default', rope_theta=10000., mrope_section=[4, 2, 2])}
QUARTER = dict(rope_type='default', rope_theta=10000., partial_rotary_factor=.5, mrope_section=[2, 1, 1])
GLM_V = {'text_config.rope_parameters': dict(rope_type='default', rope_theta=10000., mrope_section=[4, 2, 2])}

OVERRIDES = dict(
    bamba=dict(attn_layer_indices=[1, 3]), granitemoehybrid=kinds(MIXED, num_local_experts=4, num_experts_per_tok=2),
    blt=blt, jamba=dict(attn_layer_offset=1, attn_layer_period=2, expert_layer_period=2, expert_layer_offset=1),
    cohere_compass_text=compass,
    deepseek_v2=dict(num_experts_per_tok=2, first_k_dense_replace=1), dots1=MOE,
    gemma3n_text=gemma_3n, hunyuan_v1_dense=head_of(), hunyuan_v1_moe=head_of(num_experts=4, moe_topk=2),
    ministral=head_of(), nemotron=head_of(num_key_value_heads=2),
    hrm_text=lambda hidden, layers: dict(num_layers_per_stack=2, num_hidden_layers=2*2*(3 + 1)),
    lfm2=short_convolutions, lfm2_moe=short_convolutions,
    mamba2=lambda hidden, layers: dict(num_heads=hidden//8, head_dim=16, n_groups=2),
    xlstm=dict(num_heads=4, chunk_size=16), zamba=zamba, zamba2=zamba2, zaya=dict(num_experts_per_tok=1),
    glm5_next=text(qk_rope_head_dim=0, index_kpool=2),
    step3p7=text(sliding_window=16))
OVERRIDES |= {
    'dbrx': {'attn_config.rope_theta': 10000., 'attn_config.clip_qkv': 8.},
    'xlstm': lambda hidden, layers: dict(num_heads=2, chunk_size=16),
    'zamba': zamba, 'dots3_note_text': dots3, 'dots3_note': dots3, 'qwen4_exp_text': QWEN_4, 'qwen4_exp': QWEN_4,
    'gemma4_unified_assistant': assistant, 'gemma4_assistant': assistant,
    'multimodal/dots3_note': dots3_all, 'multimodal/qwen4_exp': prefixed('text_config', QWEN_4),
    'multimodal/cohere_compass': prefixed('text_config', compass),
    'reformer': lambda hidden, layers: dict(
        is_decoder=True, axial_pos_shape=[8, 16], axial_pos_embds_dim=[16, hidden - 16],
        attn_layers=['local', 'lsh']*(layers//2),
        local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_buckets=4, max_position_embeddings=128),
    'codegen': dict(n_head=4), 'xmod': dict(default_language='en_XX'), 'multimodal/mistral4': mistral_4,
    'multimodal/florence2': {'vision_config.embed_dim': [32, 64, 64, 64], 'vision_config.num_heads': [2, 4, 4, 4],
                             'vision_config.num_groups': [2, 4, 4, 4], 'vision_config.patch_size': [7, 3, 3, 3]},
    'multimodal/qwen3_omni_moe': {'talker_config.text_config.shared_expert_intermediate_size': 48,
                                  'talker_config.spatial_merge_size': 2},
    'multimodal/lfm2_vl': prefixed('text_config', short_convolutions), 'multimodal/nemo_speechlm': transcriber,
    'multimodal/molmo2': {'adapter_config.vision_feature_layer': [0, 1]},
    'multimodal/fun_asr_nano': lambda hidden, layers: {'adaptor_config.intermediate_size': hidden//4},
    'multimodal/deepseek_ocr2': lambda hidden, layers: {
        'text_config.mlp_layer_types': ['dense'] + ['sparse']*(layers - 1),
        'text_config.num_experts_per_tok': 2},
    'multimodal/granite4_vision': dict(deepstack_layer_map=[[0, 1], [1, 2]], downsample_rate='2/4'),
    'multimodal/chameleon': dict(vocabulary_map=IMAGE_WORDS), 'multimodal/emu3': dict(vocabulary_map=IMAGE_WORDS),
    'multimodal/glm4v': MROPE, 'multimodal/glm46v': MROPE, 'multimodal/glm_ocr': MROPE, 'multimodal/glmga': MROPE,
    'multimodal/glm4v_moe': {'text_config.rope_parameters': QUARTER}, 'multimodal/paddleocr_vl': MROPE,
    'multimodal/qwen2_vl': MROPE, 'multimodal/qwen2_5_vl': MROPE, 'multimodal/qwen2_5_omni_thinker': MROPE,
    'multimodal/hunyuan_vl': text(head_dim=16, rope_parameters=dict(
        rope_type='dynamic', rope_theta=10000., alpha=1000., factor=1., xdrope_section=[2, 2, 2, 2])),
    'multimodal/diffusion_gemma': text(
        num_experts=4, top_k_experts=2, moe_intermediate_size=48),
    'multimodal/ernie4_5_vl_moe': lambda hidden, layers: {
        'text_config.moe_intermediate_size': [48, 32],
        'text_config.rope_parameters': dict(rope_type='default', rope_theta=10000., mrope_section=[3, 3, 2])},
    'multimodal/kyutai_speech_to_text': lambda hidden, layers: {'codec_config.upsample_groups': hidden}}
# ---- variants: name: key, settings

def every_other(first, second): return kinds([first, second])

WINDOWS = kinds(SLIDING, use_sliding_window=True, sliding_window=16)
VARIANTS = {
    'llama, one key-value head': ('llama', dict(num_key_value_heads=1)),
    'llama, grouped': ('llama', dict(num_key_value_heads=2)),
    'llama, tied': ('llama', dict(tie_word_embeddings=True)),
    'llama, biases': ('llama', dict(attention_bias=True, mlp_bias=True)),
    'llama, heads of 32': ('llama', dict(head_dim=32, num_key_value_heads=2)),
    'mistral, no window': ('mistral', dict(sliding_window=None)),
    'qwen2, tied': ('qwen2', dict(tie_word_embeddings=True)),
    'qwen2, sliding layers': ('qwen2', WINDOWS),
    'qwen3, biases': ('qwen3', dict(attention_bias=True)),
    'qwen3, sliding layers': ('qwen3', WINDOWS),
    'gemma2, untied': ('gemma2', dict(tie_word_embeddings=False)),
    'gemma3_text, one key-value head': ('gemma3_text', dict(num_key_value_heads=1)),
    'phi, q/k norms': ('phi', dict(qk_layernorm=True)),
    'phi3, partial rotary': ('phi3', dict(partial_rotary_factor=.5)),
    'stablelm, q/k norms': ('stablelm', dict(qk_layernorm=True)),
    'stablelm, parallel': ('stablelm', dict(use_parallel_residual=True, use_qkv_bias=True)),
    'persimmon, no q/k norms': ('persimmon', dict(qk_layernorm=False)),
    'gpt_neox, sequential': ('gpt_neox', dict(use_parallel_residual=False)),
    'gpt_neox, no biases': ('gpt_neox', dict(attention_bias=False)),
    'falcon, multi-query': ('falcon', dict(multi_query=True, new_decoder_architecture=False)),
    'falcon, new architecture': ('falcon', dict(new_decoder_architecture=True, num_kv_heads=2)),
    'falcon, alibi': ('falcon', dict(alibi=True, multi_query=False, parallel_attn=False, bias=True,
                                     new_decoder_architecture=False)),
    'falcon, one norm': ('falcon', dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    'opt, norms after': ('opt', dict(do_layer_norm_before=False)),
    'opt, projected words': ('opt', dict(word_embed_proj_dim=32)),
    'gpt_bigcode, all heads': ('gpt_bigcode', dict(multi_query=False)),
    'gpt2, no scale': ('gpt2', dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True)),
    'mpt, clipped': ('mpt', {'attn_config.clip_qkv': 6.}),
    'bloom, residual after norm': ('bloom', dict(apply_residual_connection_post_layernorm=True)),
    'olmo, clipped': ('olmo', dict(clip_qkv=8.)),
    'cohere, q/k norms': ('cohere', dict(use_qk_norm=True)),
    'granite, multipliers': ('granite', dict(embedding_multiplier=6., residual_multiplier=.3, attention_multiplier=.1,
                                             logits_scaling=4.)),
    'glm, whole rotary': ('glm', dict(partial_rotary_factor=1.)),
    'glm4_moe, q/k norms': ('glm4_moe', dict(use_qk_norm=True, first_k_dense_replace=2)),
    'mixtral, many experts': ('mixtral', dict(num_local_experts=8, num_experts_per_tok=3)),
    'qwen2_moe, dense first': ('qwen2_moe', dict(mlp_only_layers=[0, 1])),
    'qwen3_moe, dense first': ('qwen3_moe', dict(mlp_only_layers=[0])),
    'qwen3_moe, every second': ('qwen3_moe', dict(decoder_sparse_step=2)),
    'qwen3_next, full layers first': ('qwen3_next', every_other('full_attention', 'linear_attention')),
    'qwen3_5_text, linear layers only': ('qwen3_5_text', kinds(['linear_attention'])),
    'deepseek_v2, no q latent': ('deepseek_v2', dict(q_lora_rank=None)),
    'deepseek_v3, all dense': ('deepseek_v3', dict(first_k_dense_replace=99, mlp_layer_types='remove')),
    'deepseek_v3, no q latent': ('deepseek_v3', dict(q_lora_rank=None)),
    'deepseek_v3, biases': ('deepseek_v3', dict(attention_bias=True)),
    'granitemoehybrid, mamba only': ('granitemoehybrid', kinds(['linear_attention'])),
    'granitemoehybrid, no experts': ('granitemoehybrid', dict(num_local_experts=0)),
    'gpt_oss, full layers': ('gpt_oss', kinds(['full_attention'])),
    'smollm3, rotary everywhere': ('smollm3', lambda hidden, layers: dict(no_rope_layers=[1]*layers)),
    'llama4_text, dense and experts': ('llama4_text', dict(interleave_moe_layer_step=2, moe_layers=[1, 3])),
    'lfm2, attention first': ('lfm2', every_other('full_attention', 'conv')),
    'gemma3n_text, no shared keys': ('gemma3n_text', dict(num_kv_shared_layers=0)),
    'gemma4_text, experts': ('gemma4_text', dict(enable_moe_block=True, num_experts=4, top_k_experts=2,
                                                 moe_intermediate_size=48)),
    'gemma4_text, shared keys': ('gemma4_text', kinds(SLIDING, num_kv_shared_layers=2)),
    'gemma4_text, no words by layer': ('gemma4_text', dict(hidden_size_per_layer_input=0)),
    'starcoder2, grouped': ('starcoder2', dict(num_key_value_heads=2)),
    'nemotron_h, attention first': ('nemotron_h', lambda hidden, layers: dict(
        layers_block_type=(['full_attention', 'mlp', 'linear_attention', 'moe']*2)[:layers])),
    'llava, qwen2 inside': ('multimodal/llava', lambda hidden, layers: {'text_config.model_type': 'qwen2'})}

# ---- models that do not answer to tokens alone: the part that does, or what else they need

PARTS = {'multimodal/blip-2': 'language_model', 'multimodal/instructblip': 'language_model',
         'multimodal/instructblipvideo': 'language_model', 'multimodal/kosmos-2': 'text_model',
         'multimodal/voxtral_realtime': 'model.language_model'}

def idefics_image(config):
    "An image that the text does not look at"
    pixels = torch.randn(2, 1, 3, config.vision_config.image_size, config.vision_config.image_size)
    return dict(pixel_values=pixels, image_attention_mask=torch.ones(2, 24, 1))

def voxtral_delay(config):
    "The embedding of the delay, by which its blocks are scaled"
    return dict(t_cond=torch.randn(1, config.text_config.hidden_size))

INPUTS = {'multimodal/idefics': idefics_image, 'multimodal/voxtral_realtime': voxtral_delay}
