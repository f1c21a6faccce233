#!/usr/bin/env bash
# Versions: TRL 1.16.0 (trl.experimental.gkd and gold), transformers 5.23.0, torch 2.13.0.
# Guess:    with lmbda=1 every answer is sampled from the student, so the answers in the data set, which the trainers
#           require but replace, change nothing. And one step over four examples has the same loss and gradient
#           whether they are one batch or four that are accumulated.
# Seen:     the divergence is summed over the sampled tokens and divided by the number of tokens in the answers that
#           were replaced. The same samples with reference answers of 60 characters instead of 1 have 1/30.5 of the
#           loss and of the gradient, in GKD and in GOLD. GOLD (also off policy) divides by n times too many tokens
#           when n batches are accumulated; with use_uld_loss it divides by nothing, and loss and gradient are n
#           times too large. AdamW forgives a constant factor, but not clipping, whose limit is 1, nor that the
#           factor differs from step to step with the length of the references. GKD accumulates right, and
#           DistillationTrainer counts for itself.
# Fails if this changes. Needs a network and about 2 GB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0
cat > "$place/try.py" <<'PY'
import sys
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token='</s>', pad_token='<pad>')
tokenizer.chat_template = ("{% for m in messages %}{{ m.role[0] + ':' + m.content + '</s>' }}{% endfor %}"
                           "{% if add_generation_prompt %}a:{% endif %}")
tokenizer.save_pretrained(f'{sys.argv[1]}/teacher')

def tiny(seed):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, initializer_range=.2,
                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **sizes))

def step(kind, answer, lmbda, batches=1, **settings):
    "Loss and norm of the gradient of one step over four chats with this answer, and the sampled answers"
    data = Dataset.from_list([dict(messages=[dict(role='user', content=f'{i}+1?'),
                                             dict(role='assistant', content=answer)]) for i in range(4)])
    if kind == 'GKD': Config, Trainer, limit = GKDConfig, GKDTrainer, dict(max_new_tokens=16)
    else: Config, Trainer, limit = GOLDConfig, GOLDTrainer, dict(max_completion_length=16)
    args = Config(output_dir=f'{sys.argv[1]}/out', lmbda=lmbda, per_device_train_batch_size=4//batches,
                  gradient_accumulation_steps=batches, max_steps=1, max_length=128, logging_steps=1, seed=1,
                  use_cpu=True, bf16=False, report_to=[], save_strategy='no', disable_tqdm=True, **limit, **settings)
    trainer = Trainer(model=tiny(0), teacher_model=tiny(1), args=args, train_dataset=data, processing_class=tokenizer)
    sampled, generate = [], trainer.generate_on_policy_outputs
    def keep(*given):
        out = generate(*given)
        sampled.append(out[0][out[2] != -100].tolist())
        return out
    trainer.generate_on_policy_outputs = keep
    trainer.train()
    log = trainer.state.log_history[0]
    return log['loss'], log['grad_norm'], sampled

def ratio(one, two):
    "How much larger loss and gradient of the second are"
    return two[0]/one[0], two[1]/one[1]

def near(pair, value): return all(abs(x/value - 1) < 1e-3 for x in pair)

seen = {}
for kind in ('GKD', 'GOLD'):
    short, long = (step(kind, answer, 1.) for answer in ('2', 'two'*20))
    assert short[2] == long[2] and short[2], 'other samples'
    seen[f'{kind}, sampled answers, references of 60 characters against 1'] = ratio(short, long), 2/61
for batches in (2, 4):
    whole, parts = (step('GKD', 'two and', 0., n) for n in (1, batches))
    seen[f'GKD, {batches} batches against one'] = ratio(whole, parts), 1
    for uld in (False, True):
        settings = dict(use_uld_loss=uld, teacher_tokenizer_name_or_path=f'{sys.argv[1]}/teacher')
        whole, parts = (step('GOLD', 'two and', 0., n, **settings) for n in (1, batches))
        expected = batches if uld else 1/batches
        seen[f'GOLD, use_uld_loss={uld}, {batches} batches against one'] = ratio(whole, parts), expected
for case, (pair, expected) in seen.items():
    print(f'{case}: loss times {pair[0]:.4f}, gradient times {pair[1]:.4f}')
for case, (pair, expected) in seen.items(): assert near(pair, expected), case
PY
TRL_EXPERIMENTAL_SILENCE=1 "$place/venv/bin/python" "$place/try.py" "$place"
