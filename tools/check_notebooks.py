"Stop if a notebook is not clean, not executed, shows an error or a warning, or needs more than the library."
import ast, re, sys
from collections import Counter

from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from notebooks import badge, cfg, is_badge, is_exported, is_install, notebooks, parse_code, skips_execution

LINE = 120

def is_clean(path):
    "Would `nbdev_clean` leave the notebook at `path` as it is?"
    nb = read_nb(path)
    clean_nb(nb)
    return nb2str(nb) == path.read_text(encoding='utf-8')

def is_title(cell):
    "Is `cell` a title, a subtitle and settings? nbdev drops whatever else the first cell says."
    first, *rest = cell.source.splitlines()
    return first.startswith('# ') and all(line[:1] in ('', '>', '-') for line in rest)

def requirements(key):
    "The packages that a setting of settings.ini names, as they are imported"
    return [re.split(r'[<>=;]', r)[0].replace('-', '_') for r in cfg.get(key, '').split()]

SETTINGS = 'requirements', 'eval_requirements', 'cuda_requirements', 'ray_requirements'
ALONG = 'IPython', 'huggingface_hub', 'jinja2', 'numpy', 'pandas', 'tokenizers' # come with the others, or with Jupyter
AVAILABLE = {cfg.lib_name, *ALONG, *sys.stdlib_module_names, *(name for key in SETTINGS for name in requirements(key))}

def imported(cell):
    "The packages that a code cell imports"
    for node in ast.walk(ast.Module(parse_code(cell), [])):
        if isinstance(node, ast.Import): yield from (name.name.split('.')[0] for name in node.names)
        if isinstance(node, ast.ImportFrom): yield node.module.split('.')[0] if node.level == 0 else cfg.lib_name

def opened(cell):
    "The names of files and folders that a code cell writes down as it opens them"
    for node in ast.walk(ast.Module(parse_code(cell), [])):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        if not re.match('Path$|open$|glob|listdir|load|read|imread', name): continue
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))

def head_faults(path, cells):
    "What is wrong with the first cells of a notebook"
    if not is_title(cells[0]): yield 'has more than `# Title` and `> subtitle` in its first cell'
    if all(cell.cell_type != 'code' for cell in cells): return # only to be read: nothing to open in Colab
    place = next((i for i, cell in enumerate(cells[:3]) if is_badge(cell)), None)
    if place is None: yield 'has no "Open in Colab" as its second or third cell'
    elif cells[place].source.strip() != badge(path): yield 'has the "Open in Colab" of another notebook'
    elif not is_install(cells[place + 1]): yield 'does not install the library right after "Open in Colab"'

def link_faults(path, cells):
    "Which of the pages that explain words and symbols a notebook does not lead to"
    text = '\n'.join(cell.source for cell in cells if cell.cell_type == 'markdown')
    folder = path.parent.name
    needed = ['glossary'] if folder in ('course', 'lab') else []
    if folder == 'course' and path.name[:2] not in PROSE_ONLY: needed.append('notation')
    for name in needed:
        if f'{name}.ipynb' not in text: yield f'does not lead to the {name}'

PROSE_ONLY = '00', '01', '16' # parts of the course without formulas

def definitions(cell):
    "The public functions and classes that a code cell defines"
    nodes = [node for node in parse_code(cell) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [node.name for node in nodes if not node.name.startswith('_')]

def code_faults(cell):
    "What is wrong with a code cell"
    first = next(iter(cell.source.splitlines()), '')
    for name in sorted(set(imported(cell)) - AVAILABLE):
        yield f'imports {name}, which the library does not require ({first} …)'
    if any(name.startswith('..') for name in opened(cell)): yield f'reads files beside it ({first} …)'
    names = definitions(cell)
    if is_exported(cell) and len(names) > 1: yield f'exports {" and ".join(names)} in one cell instead of one each'
    for line in cell.source.splitlines():
        if len(line) > LINE: yield f'has a line of {len(line)} characters: {line.strip()[:60]} …'

def output_faults(path, code):
    "What is wrong with the saved outputs"
    outputs = [o for cell in code for o in cell.outputs]
    if code and not outputs and not skips_execution(path): yield 'has no outputs'
    if any(o.output_type == 'error' for o in outputs): yield 'shows an error'
    if any(o.get('name') == 'stderr' for o in outputs): yield 'shows stderr'
    if str(cfg.config_path) in nb2str(outputs): yield 'shows the path of this checkout'

def faults(path):
    "What is wrong with the notebook at `path`, in words"
    cells = read_nb(path).cells
    code = [cell for cell in cells if cell.cell_type == 'code']
    if not is_clean(path): yield 'is not clean'
    yield from head_faults(path, cells)
    yield from link_faults(path, cells)
    for cell in code: yield from code_faults(cell)
    yield from output_faults(path, code)
    for source, n in Counter(cell.source for cell in code if '\n' in cell.source).items():
        if n > 1: yield f'has the same cell {n} times: {source.splitlines()[0]} …'

if __name__ == '__main__':
    found = [f'{path} {fault}' for path in notebooks() for fault in faults(path)]
    if found: sys.exit('\n'.join(found + ['`make notebooks` executes and cleans them']))
