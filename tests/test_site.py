"The pages of the site: every exported definition with its code and in its place, nothing of the machinery around it"
import ast, json, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
pytest.importorskip('nbdev')
from execnb.nbio import dict2nb, mk_cell, nb2str, read_nb
from check_notebooks import code_faults, head_faults
from lines import line_up_code
from nbdev.config import get_config
from notebooks import badge, is_exported, MISSING, nbs, notebooks, only_imports
from pages import link_pages, page
from reference import add_reference, exporting

KINDS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef

def without_directives(source): return re.sub(r'^#\|.*\n', '', source, flags=re.MULTILINE)

def code(cells): return [without_directives(c.source) for c in cells if c.cell_type == 'code']

@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.relative_to(nbs).as_posix())
def test_every_definition_is_shown(path):
    "In the order of the notebook, with its body, without directives"
    exported = [c for c in read_nb(path).cells if c.cell_type == 'code' and is_exported(c) and not only_imports(c)]
    shown = code(page(path).cells)
    places = [shown.index(without_directives(c.source)) for c in exported]
    assert places == sorted(places)
    directives = re.findall(r'^#\|\s*(\w+)', '\n'.join(c.source for c in page(path).cells), flags=re.MULTILINE)
    assert set(directives) <= {'label', 'echo', 'output'}

@pytest.mark.parametrize('path', notebooks(), ids=lambda p: p.relative_to(nbs).as_posix())
def test_no_machinery_is_shown(path):
    text = '\n'.join(c.source for c in page(path).cells[1:])
    assert 'colab-badge.svg' not in text and 'find_spec' not in text and 'default_exp' not in text

def test_outputs_are_those_of_the_notebook():
    "Nothing is executed for a page"
    path = nbs/'course'/'05_transfer_matrix.ipynb'
    saved = [c.outputs for c in read_nb(path).cells if c.cell_type == 'code' and c.outputs]
    assert json.dumps([c.outputs for c in page(path).cells if c.cell_type == 'code' and c.outputs]) == json.dumps(saved)

def test_the_reference_lists_every_public_definition():
    text = '\n'.join(c.source for c in add_reference(page(nbs/'reference'/'api.ipynb')).cells)
    for module in exporting():
        file = (get_config().lib_path/module.replace('.', '/')).with_suffix('.py')
        tree = ast.parse(file.read_text(encoding='utf-8'))
        names = [n.name for n in tree.body if isinstance(n, KINDS) and not n.name.startswith('_')]
        for name in names: assert f'{{#{module}.{name}}}' in text

def test_links_lead_to_pages():
    assert link_pages('[a](../lab/05_x_y.ipynb) [b](z.ipynb)', 1) == '[a](../lab/x_y.ipynb) [b](z.ipynb)'
    address = f'{get_config().doc_host}{get_config().doc_baseurl}'
    assert link_pages(f'[`D.f`]({address}/core/a.html#d.f)', 1) == '[`D.f`](../core/a.html#d)'

def test_lines_of_code_can_be_indented_when_they_wrap():
    "Spans are closed and opened again at line ends, and the text stays the same"
    markup = '<span class="st">"a\n    b"</span>\n  x <span class="op">=</span> 1'
    html = line_up_code(f'<pre class="sourceCode python"><code class="sourceCode python">{markup}</code></pre>')
    assert html.count('<span class="line"') == 3 and '--in:4' in html and '--in:2' in html
    lines = html.removesuffix('</code></pre>').split('<span class="line"')[1:]
    assert all(line.count('<span') + 1 == line.count('</span>') for line in lines)
    assert re.sub(r'<[^>]*>', '', html) == re.sub(r'<[^>]*>', '', markup) + '\n'

def cell(source, kind='code'): return mk_cell(source, kind)

def test_what_a_notebook_may_not_do_is_found():
    for source in ('import fastcore', 'from nbdev.showdoc import show_doc', 'def f(): import pytest', 'import _pytest'):
        assert 'imports' in next(code_faults(cell(source)))
    assert 'reads files beside it' in next(code_faults(cell("open('../benchmarks/x.json')")))
    assert 'characters' in next(code_faults(cell('x = ' + '1'*120)))
    assert 'f and g' in next(code_faults(cell('#| export\ndef f(): pass\ndef g(): pass')))
    assert not [*code_faults(cell('#| export\ndef _f(): pass\ndef g(): pass'))]
    assert not [*code_faults(cell('#| export\nimport torch, json\nfrom .core import x\nfrom lorasuite.core import y'))]

def test_the_first_cells_are_looked_at():
    path = nbs/'course'/'06_cka.ipynb'
    title = cell('# T\n> s', 'markdown')
    address = f'{get_config().user}/{get_config().repo}'
    install = cell(f'if {MISSING}:\n    %pip install git+https://github.com/{address}')
    good = [title, cell(badge(path), 'markdown'), install]
    assert not [*head_faults(path, good)]
    assert not [*head_faults(path, [title, cell('only text', 'markdown')])]
    other = cell(badge(nbs/'index.ipynb'), 'markdown')
    assert 'of another notebook' in next(head_faults(path, [title, other, install]))
    assert 'no "Open in Colab"' in next(head_faults(path, [title, install]))
    for other in ('x = 1', '%pip install x', f'%pip install git+https://github.com/{address}'):
        assert 'install' in next(head_faults(path, good[:2] + [cell(other)]))

def run(*arguments):
    command = [sys.executable, str(ROOT/'tools'/'run_notebooks.py'), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

def notebook(path, *sources):
    "A notebook of code cells"
    cells = [dict(cell_type='code', id=f'cell{i}', metadata={}, outputs=[], source=s) for i, s in enumerate(sources)]
    path.write_text(nb2str(dict2nb(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))))
    return path

def test_notebooks_run_in_an_empty_directory(tmp_path):
    "Outputs are saved, cell ids stay, flagged cells are passed over; `--check` saves nothing"
    sources = 'import os\nprint(os.listdir())', '#| gpu\nprint(1/0)', 'import sys\nprint("x", file=sys.stderr)'
    path = notebook(tmp_path/'a.ipynb', *sources)
    before = path.read_text()
    assert run('--check', path).returncode == 0 and path.read_text() == before
    assert run(path).returncode == 0
    cells = read_nb(path).cells
    assert [c.id for c in cells] == ['cell0', 'cell1', 'cell2']
    assert [''.join(o.text) for c in cells for o in c.outputs] == ['[]\n']

def test_a_failing_notebook_is_named(tmp_path):
    good = notebook(tmp_path/'good.ipynb', 'x = 1')
    bad = notebook(tmp_path/'bad.ipynb', 'x = 1', 'assert x == 2, "no"')
    before = bad.read_text()
    done = run('--workers', 2, bad, good)
    assert done.returncode == 1 and bad.read_text() == before
    assert all(text in done.stderr for text in ('bad.ipynb, cell cell1', 'assert x == 2', 'AssertionError: no'))

def test_notebooks_cannot_import_the_tools(tmp_path):
    assert run('--check', notebook(tmp_path/'a.ipynb', 'import measure_style')).returncode == 1
