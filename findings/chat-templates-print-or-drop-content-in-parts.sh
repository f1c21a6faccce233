#!/usr/bin/env bash
# Versions: transformers 5.23.0; chat templates of models as TRL 1.16.0 keeps them.
# Guess:    a message whose content is a list of text parts, as OpenAI's interface and processors have it, is rendered
#           as its text or refused, by every template and for every model; and so is plain text by the templates of
#           vision models.
# Seen:     of 41 templates of text and vision models 18 render both alike and 8 refuse one of them. Eleven (Gemma,
#           Llama 3 to 3.2, LFM 2, Nemotron 3, Cohere 2) print the list as Python or JSON writes it, braces and all,
#           so that is what a model is asked and trained on. Qwen3 and Qwen3-2507 render neither question nor answer,
#           only the frame of the turns; so do SmolVLM and Idefics 3 with plain text. transformers says nothing.
# Fails if this changes. Needs a network and about 300 MB in a temporary folder.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q transformers==5.23.0 jinja2==3.1.6
"$place/venv/bin/pip" install -q --no-deps trl==1.16.0
cat > "$place/try.py" <<'PY'
from importlib.metadata import distribution
from pathlib import Path
from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token='<s>', eos_token='</s>')
plain = [dict(role='user', content='QUESTION'), dict(role='assistant', content='ANSWER')]
parts = [dict(role=turn['role'], content=[dict(type='text', text=turn['content'])]) for turn in plain]

def seen(template, chat):
    "What becomes of the text in this template"
    try: text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except (TemplateError, TypeError): return 'refused'
    if "'type':" in text or '"type":' in text: return 'printed'
    found = [word in text for word in ('QUESTION', 'ANSWER')]
    assert found[0] == found[1]
    return 'rendered' if all(found) else 'dropped'

found = {}
folder = Path(distribution('trl').locate_file('trl/chat_templates'))
for file in sorted(folder.glob('*.jinja')):
    if file.stem.endswith('_training'): continue
    template = file.read_text()
    found.setdefault((seen(template, plain), seen(template, parts)), []).append(file.stem)
for (text, content), names in found.items(): print(f'plain text {text}, parts {content}: {len(names)}:', *names)
counts = {key: len(names) for key, names in found.items()}
assert counts == {('rendered', 'rendered'): 18, ('rendered', 'printed'): 11, ('rendered', 'refused'): 7,
                  ('refused', 'rendered'): 1, ('rendered', 'dropped'): 2, ('dropped', 'rendered'): 2}
assert found['rendered', 'dropped'] == ['qwen3', 'qwen3_instruct_2507']
assert found['dropped', 'rendered'] == ['idefics3', 'smolvlm']
PY
"$place/venv/bin/python" "$place/try.py"
