"Execute notebooks, all of nbs/ or those named, each in an empty directory, and save them; with `--check` save nothing."
import argparse, os, sys, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from execnb.nbio import nb2str, read_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from notebooks import is_skipped, notebooks, skips_execution

SLOW_IMPORTS = ['torch', 'transformers', 'peft', 'datasets', 'matplotlib.pyplot', 'pandas'] # once for all

def run_cell(shell, cell):
    "Execute `cell`, keeping all its outputs but stderr"
    cell.outputs = []
    shell.cell(cell)
    cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']

def failure(shell, cell, path):
    "What went wrong in `cell` of the notebook at `path`, in words"
    return f'{path}, cell {cell.id}:\n\n{cell.source}\n\n{shell.prettytb(fname=path.name)}'

def run_cells(nb, path):
    "Execute the cells of `nb` in the current directory; return what went wrong, if anything"
    shell = CaptureShell(mpl_format='png')
    for cell in nb.cells:
        if cell.cell_type != 'code' or is_skipped(cell): continue
        run_cell(shell, cell)
        if shell.exc: return failure(shell, cell, path)

def save(nb, path):
    "Write `nb` clean to `path`, all or nothing"
    clean_nb(nb)
    unfinished = path.with_name(f'.{path.name}')
    unfinished.write_text(nb2str(nb), encoding='utf-8')
    unfinished.replace(path)

def run_notebook(path, keep):
    "Execute the notebook at `path` in an empty directory, and save it if `keep`; return what went wrong, if anything"
    os.environ['IN_TEST'] = '1'
    tools = str(Path(__file__).parent)
    sys.path = [p for p in sys.path if p != tools]
    nb = read_nb(path)
    with TemporaryDirectory() as empty:
        os.chdir(empty)
        error = run_cells(nb, path)
        os.chdir(path.parent)
    if keep and not error: save(nb, path)
    return error

def run_apart(path, keep, context):
    "Execute the notebook at `path` in a process of its own; return what went wrong, if anything"
    start = time.time()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        error = pool.submit(run_notebook, path, keep).result()
    print(f'{path} ({"failed" if error else f"{time.time() - start:.0f} s"})', flush=True)
    return error

def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('paths', nargs='*', type=Path, metavar='NOTEBOOK')
    parser.add_argument('--check', action='store_true', help='save nothing')
    parser.add_argument('--workers', type=int, default=1, help='notebooks at a time')
    return parser.parse_args()

if __name__ == '__main__':
    args = arguments()
    paths = [p.resolve() for p in args.paths or notebooks()]
    paths = [p for p in paths if not skips_execution(p)]
    context = get_context('forkserver')
    context.set_forkserver_preload(SLOW_IMPORTS)
    with ThreadPoolExecutor(args.workers) as pool:
        errors = list(pool.map(partial(run_apart, keep=not args.check, context=context), paths))
    if any(errors): sys.exit('\n'.join(filter(None, errors)))
