#!/usr/bin/env bash
# Versions: TRL 1.16.0 (trl.experimental.gold), transformers 5.23.0, torch 2.13.0.
# Guess:    GOLD with use_uld_loss compares student and teacher at every token of the answer, as its documentation says
#           (no token is dropped, the loss is over the full completion). A student that is trained on answers of one
#           token, such as the letter of a choice, learns the teacher's choice.
# Seen:     by default (uld_token_merge_strategy='observed') the logits are taken at the answer's own positions, which
#           predict the token after each. What the prompt's last position predicts, the first token of the answer,
#           is never compared and gets no gradient. For answers of one token only what comes after the answer is
#           trained: after 200 steps the student is as far from the teacher's choice as before. With 'bayesian' the
#           positions are right and the distance falls to nothing. The help of this setting, a way to merge tokens of
#           unequal tokenizers, names the positions, but it decides so for equal tokenizers too; the trainer's page
#           does not mention it, and nothing warns.
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

@torch.no_grad()
def distance(student, teacher, prompts):
    "Mean KL divergence from the teacher of what the student says first"
    ids = tokenizer(prompts, return_tensors='pt').input_ids
    s, t = (model.eval()(ids).logits[:, -1].log_softmax(-1) for model in (student, teacher))
    return (t.exp()*(t - s)).sum(-1).mean().item()

def distil(answer, **settings):
    "Positions whose logits get a gradient, length of the prompt, distances before and after 200 steps"
    chats = [[dict(role='user', content=f'{i}?'), dict(role='assistant', content=answer)] for i in range(4)]
    prompts = [tokenizer.apply_chat_template(c[:1], tokenize=False, add_generation_prompt=True) for c in chats]
    student, teacher, kept = tiny(0), tiny(1), []
    before = distance(student, teacher, prompts)
    args = GOLDConfig(output_dir=f'{sys.argv[1]}/out', lmbda=0., use_uld_loss=True, uld_use_hybrid_loss=True,
                      teacher_tokenizer_name_or_path=f'{sys.argv[1]}/teacher', max_completion_length=16, max_length=64,
                      per_device_train_batch_size=4, max_steps=200, learning_rate=1e-2, seed=1, use_cpu=True,
                      bf16=False, report_to=[], save_strategy='no', disable_tqdm=True, logging_strategy='no',
                      **settings)
    trainer = GOLDTrainer(model=student, teacher_model=teacher, args=args, processing_class=tokenizer,
                          train_dataset=Dataset.from_list([dict(messages=c) for c in chats]))
    def keep(module, given, logits):
        if logits.requires_grad and not kept: logits.retain_grad(); kept.append(logits)
    hook = student.lm_head.register_forward_hook(keep)
    trainer.train()
    hook.remove()
    trained = (kept[0].grad.abs().sum(-1) > 0).nonzero()[:, 1].unique().tolist()
    return trained, len(tokenizer(prompts[0]).input_ids), before, distance(student, teacher, prompts)

found = {}
for answer in ('A', 'Yes.'):
    for strategy in (None, 'bayesian'):
        found[answer, strategy] = distil(answer, **(dict(uld_token_merge_strategy=strategy) if strategy else {}))
for (answer, strategy), (trained, prompt, before, after) in found.items():
    print(f'answer {answer!r}, strategy {strategy or "default"}: the prompt ends at position {prompt - 1}, gradients '
          f'at {trained}, distance {before:.3f} before, {after:.4f} after')
    first = prompt - (strategy == 'bayesian')
    assert trained == list(range(first, first + len(answer)))
    assert after < .02 if strategy else after > .7*before
PY
TRL_EXPERIMENTAL_SILENCE=1 "$place/venv/bin/python" "$place/try.py" "$place"
