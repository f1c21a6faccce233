"Stop if a notebook is not clean, was not executed, or shows an error or a warning."
import sys
from collections import Counter

from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from run_notebooks import skips_execution

def is_clean(path):
    "Would `nbdev_clean` leave the notebook at `path` as it is?"
    nb = read_nb(path)
    clean_nb(nb)
    return nb2str(nb) == path.read_text(encoding='utf-8')

def is_title(cell):
    "Is `cell` a title, a subtitle and settings? nbdev drops whatever else the first cell says."
    first, *rest = cell.source.splitlines()
    return first.startswith('# ') and all(line[:1] in ('', '>', '-') for line in rest)

def faults(path):
    "What is wrong with the notebook at `path`, in words"
    cells = read_nb(path).cells
    code = [c for c in cells if c.cell_type == 'code']
    outputs = [o for c in code for o in c.outputs]
    if not is_title(cells[0]): yield 'has more than `# Title` and `> subtitle` in its first cell'
    if not is_clean(path): yield 'is not clean'
    if code and not outputs and not skips_execution(path): yield 'has no outputs'
    if any(o.output_type == 'error' for o in outputs): yield 'shows an error'
    if any(o.get('name') == 'stderr' for o in outputs): yield 'shows stderr'
    for source, n in Counter(c.source for c in code if '\n' in c.source).items():
        if n > 1: yield f'has the same cell {n} times: {source.splitlines()[0]} …'
    if str(get_config().config_path) in nb2str(outputs): yield 'shows the path of this checkout'

if __name__ == '__main__':
    found = [f'{path} {fault}' for path in sorted(nbglob(as_path=True)) for fault in faults(path)]
    if found: sys.exit('\n'.join(found + ['`make notebooks` executes and cleans them']))
