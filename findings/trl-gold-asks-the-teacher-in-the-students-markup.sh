#!/usr/bin/env bash
# Versions: TRL 1.16.0 (trl.experimental.gold), transformers 5.23.0, torch 2.13.0.
# Guess:    GOLD distils from a teacher with another tokenizer. With chats as data (`messages`) each model reads a chat
#           in its own chat template, as GOLD renders it for teachers that see images, and the answer ends with each
#           model's own end of turn.
# Seen:     the chat is rendered once, in the student's template, and this text is given to the teacher. Its own
#           template is not used, though its tokenizer has one. The labels and ends of turn of the student, one token
#           there, reach the teacher as letters (`<`, `/`, `s`, `>`), and so does the end of the answer, which is
#           followed by the teacher's end as well. So an instruction-tuned teacher is asked as it never was in its
#           training, and what it would say next in its own format is not what is distilled. It is so on policy and
#           off policy, and nothing is said.
# Fails if this changes. Needs a network and about 2 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0
cat > "$place/try.py" <<'PY'
import logging
import sys
import warnings
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gold import GOLDConfig, GOLDTrainer

def bytewise(template, end, **special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, eos_token=end, pad_token='<pad>', **special)
    tokenizer.chat_template = template
    return tokenizer

students = bytewise("{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}", '</s>')
teachers = bytewise("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
                    "{% if add_generation_prompt %}<|assistant|>{% endif %}", '<|end|>',
                    additional_special_tokens=['<|user|>', '<|assistant|>'])
teachers.save_pretrained(f'{sys.argv[1]}/teacher')
chat = [dict(role='user', content='1+1?'), dict(role='assistant', content='Two.')]

def tiny(seed, tokenizer):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, initializer_range=.2,
                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

said = []
class Keep(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
for name in (None, 'trl', 'transformers'): logging.getLogger(name).addHandler(Keep())

def read(lmbda):
    "The tokens that student and teacher read in one step"
    student, teacher, tokens = tiny(0, students), tiny(1, teachers), {}
    for model, tokenizer in ((student, students), (teacher, teachers)):
        def keep(module, given, tokenizer=tokenizer): tokens[tokenizer] = given[0][0].tolist()
        model.model.embed_tokens.register_forward_pre_hook(keep)
    args = GOLDConfig(output_dir=f'{sys.argv[1]}/out', lmbda=lmbda, use_uld_loss=True, max_completion_length=8,
                      teacher_tokenizer_name_or_path=f'{sys.argv[1]}/teacher', max_length=128, max_steps=1,
                      per_device_train_batch_size=1, seed=1, use_cpu=True, bf16=False, report_to=[],
                      save_strategy='no', disable_tqdm=True, logging_strategy='no')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        GOLDTrainer(model=student, teacher_model=teacher, args=args, processing_class=students,
                    train_dataset=Dataset.from_list([dict(messages=chat)])).train()
    said.extend(str(w.message) for w in caught)
    return tokens[students], tokens[teachers]

own = teachers.apply_chat_template(chat, return_dict=True)['input_ids']
student, teacher = read(0.)
print('the student reads', students.convert_ids_to_tokens(student))
print('the teacher reads', teachers.convert_ids_to_tokens(teacher))
print('its own template ', teachers.convert_ids_to_tokens(own))
text = students.apply_chat_template(chat, tokenize=False)
assert students.decode(student) == text == 'user: 1+1?</s>assistant: Two.</s>'
assert teacher == teachers(text)['input_ids'] + [teachers.eos_token_id]
assert student.count(students.eos_token_id) == 2 and len(teacher) == len(student) + 2*(len('</s>') - 1) + 1
student, teacher = read(1.)
asked = teachers(students.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))['input_ids']
print('on policy the teacher reads', teachers.decode(teacher[:len(asked)]), 'and the sampled answer')
assert teacher[:len(asked)] == asked
for ids in teachers.convert_tokens_to_ids(['<|user|>', '<|assistant|>']): assert ids in own and ids not in teacher
assert not [message for message in said if 'template' in message or 'teacher' in message]
PY
TRL_EXPERIMENTAL_SILENCE=1 "$place/venv/bin/python" "$place/try.py" "$place"
