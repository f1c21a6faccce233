"Execute notebooks in place: all of nbs/, or those named on the command line."
import os, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from execnb.nbio import nb2str, read_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, extract_directives

def is_skipped(cell):
    "Does `nbdev_test` pass over `cell`?"
    directives = extract_directives(cell, remove=False)
    return directives.get('eval:', [''])[0].lower() == 'false' or directives.keys() & set(get_config().tst_flags.split())

def skips_execution(path):
    "Does the front matter of the notebook at `path` say `skip_exec: true`?"
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    return nb.frontmatter_.get('skip_exec', False)

def run_cell(shell, cell):
    "Execute `cell`, keeping all its outputs but stderr"
    cell.outputs = []
    shell.cell(cell)
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']

def run_notebook(path):
    "Execute the notebook at `path` and save it clean; on an error leave it as it was and return the traceback"
    os.environ['IN_TEST'] = '1'
    os.chdir(path.parent)
    nb, shell = read_nb(path), CaptureShell(path, mpl_format='png')
    for cell in nb.cells:
        if cell.cell_type != 'code' or is_skipped(cell): continue
        run_cell(shell, cell)
        if shell.exc: return f'{cell.source}\n\n{shell.prettytb(fname=path.name)}'
    clean_nb(nb)
    unfinished = path.with_name(f'.{path.name}')
    unfinished.write_text(nb2str(nb), encoding='utf-8')
    unfinished.replace(path)

def run_apart(path):
    "Execute the notebook at `path` in a process of its own"
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(run_notebook, path).result()

if __name__ == '__main__':
    for path in map(Path, sys.argv[1:] or sorted(nbglob())):
        if skips_execution(path): continue
        print(path, flush=True)
        error = run_apart(path.resolve())
        if error: sys.exit(error)
