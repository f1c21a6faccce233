"Cells of a notebook by their kind, as the site, the checks and the runner tell them apart."
import ast, re

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, extract_directives

cfg = get_config()
root, nbs = cfg.config_path, cfg.nbs_path
MISSING = "importlib.util.find_spec('lorasuite') is None"

def notebooks():
    "All notebooks of the project, in order"
    return sorted(nbglob(as_path=True))

def directives(cell):
    "The `#|` directives at the top of a cell, with their arguments"
    return extract_directives(cell, remove=False) if cell.cell_type == 'code' else {}

def parse_code(cell):
    "The statements of a code cell, without its magics and shell commands"
    return ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', cell.source, flags=re.MULTILINE)).body

def is_skipped(cell):
    "Do tests pass over `cell`?"
    found = directives(cell)
    return found.get('eval:', [''])[0].lower() == 'false' or bool(found.keys() & set(cfg.tst_flags.split()))

def is_exported(cell): return 'export' in directives(cell)

def is_badge(cell):
    "Is `cell` the button that opens the notebook in Colab?"
    return cell.cell_type == 'markdown' and cell.source.startswith('[![Open in Colab]')

def is_install(cell):
    "Is `cell` the one that installs the library, where it is missing or where a GPU is used?"
    if cell.cell_type != 'code' or '%pip install' not in cell.source: return False
    return f'github.com/{cfg.user}/{cfg.repo}' in cell.source and (MISSING in cell.source or is_skipped(cell))

def only_imports(cell):
    "Has `cell` imports and nothing else?"
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in parse_code(cell))

def colab_link(path):
    "Where Colab opens the notebook at `path`"
    branch = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}'
    return f'{branch}/{path.relative_to(root).as_posix()}'

def badge(path):
    "The button that opens the notebook at `path` in Colab"
    return f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab_link(path)})'

def processed(path):
    "The notebook at `path`, its title in `frontmatter_` and in a raw first cell, its directives in `directives_`"
    return NBProcessor(path, procs=FrontmatterProc, process=True).nb

def skips_execution(path):
    "Does the front matter of the notebook at `path` say `skip_exec: true`?"
    return processed(path).frontmatter_.get('skip_exec', False)
