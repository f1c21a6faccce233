#!/usr/bin/env bash
# Versions: TRL 1.16.0, transformers 5.23.0, torch 2.13.0.
# Guess:    with TRL's training template the tokens that assistant_only_loss trains are those that the model has to
#           produce after the generation prompt of the same template.
# Seen:     so it is for Llama 3, Gemma, Phi-3 and Qwen2.5-VL. For Qwen3.5 (no-think) the empty think block is
#           trained, though the generation prompt already ends with it: the loss counts tokens that the model never
#           has to produce. For Qwen3.5 (think), Qwen 3.6 and 3.8 the opening <think> is trained and also given; for
#           GPT-OSS the label of the turn and for Qwen2.5 its last line break. For DeepSeek V3 the label is trained
#           and what is given, <think>, never occurs in training.
# Fails if this changes. Needs a network and about 2 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 trl==1.16.0
cat > "$place/try.py" <<'PY'
from pathlib import Path
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token='<s>', eos_token='</s>')
chat = [dict(role='user', content='Which?'), dict(role='assistant', content='This.')]

def learned(name):
    "The generation prompt, what is trained, and what follows the prompt in the training text (or None)"
    tokenizer.chat_template = (Path(trl.__file__).parent/'chat_templates'/f'{name}.jinja').read_text()
    tokenizer.chat_template = get_training_chat_template(tokenizer)
    given = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    text = tokenizer.decode(whole['input_ids'])
    trained = tokenizer.decode([i for i, mask in zip(whole['input_ids'], whole['assistant_masks']) if mask])
    return given, trained, text.removeprefix(given) if text.startswith(given) else None

for name in ('llama3', 'gemma', 'phi3', 'qwen2_5_vl'):
    given, trained, after = learned(name)
    print(f'{name}: trained is what follows the generation prompt: {trained!r}')
    assert trained == after
twice = dict(qwen3_5_nothink='<think>\n\n</think>\n\n', qwen3_5_think='<think>\n', qwen3_6='<think>\n',
             qwen3_8='<think>\n', gptoss='<|start|>assistant', qwen2_5='\n')
for name, part in twice.items():
    given, trained, after = learned(name)
    print(f'{name}: {part!r} is given by the generation prompt and trained; trained {trained!r}')
    assert given.endswith(part) and trained == part + after
given, trained, after = learned('deepseekv3')
print(f'deepseekv3: the generation prompt {given!r}, trained {trained!r}')
assert given.endswith('<think>\n') and after is None and '<think>' not in trained
PY
"$place/venv/bin/python" "$place/try.py"
