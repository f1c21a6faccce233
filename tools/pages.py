"Turn a notebook into a page of the website, as nbdev does."
import os, re

import yaml
from execnb.nbio import nb2str, read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from run_notebooks import is_skipped

cfg = get_config()
root, nbs = cfg.config_path, cfg.nbs_path
number = r'\d+[a-zA-Z0-9]*_'

def page_name(path):
    "The page of the notebook at `path`: its number is dropped, as in nbdev's links"
    return path.relative_to(nbs).with_name(re.sub(f'^{number}', '', path.name))

def front_matter(nb, path):
    "The YAML at the top of a page"
    if 'title' not in nb.frontmatter_: raise ValueError(f'{path} does not begin with a `# Title`')
    colab = f'https://colab.research.google.com/github/{cfg.user}/{cfg.repo}/blob/{cfg.branch}'
    link = dict(text='Open in Colab', icon='google', href=f'{colab}/{path.relative_to(root).as_posix()}')
    own = {k:v for k,v in nb.frontmatter_.items() if k != 'output-file'}
    return f'---\n{yaml.safe_dump({**own, "code-links": [link]})}---\n'

def link_pages(text, depth):
    "Make links to the site relative, and links to numbered notebooks lead to their pages"
    text = text.replace(f'{cfg.doc_host}{cfg.doc_baseurl}/', '../'*depth)
    return re.sub(rf'(\]\((?:[\w.-]+/)*){number}([\w-]+\.ipynb)', r'\1\2', text)

def unlink_code(cell):
    "Take nbdev's links out of the signatures that `cell` shows, where they cannot be followed"
    plain = lambda block: re.sub(r'\[`([\w.]+)`\]\([^)]*\)', r'`\1`', block[0])
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = re.sub(r'```.*?```', plain, ''.join(data['text/markdown']), flags=re.DOTALL)

def skip_flagged(cell):
    "Mark a `cell` that tests pass over, so that it is not executed for the documentation either"
    if cell.cell_type == 'code' and is_skipped(cell): cell.source = f'#| eval: false\n{cell.source}'

def write_page(path, folder):
    "Write the page of the notebook at `path` into `folder`: API docs in, exported and hidden cells out"
    os.environ['IN_TEST'] = '1'
    os.chdir(path.parent)
    nb, name = read_nb(path), page_name(path)
    for cell in nb.cells: skip_flagged(cell)
    FilterDefaults()(nb)
    for cell in nb.cells: unlink_code(cell)
    nb.cells[0].source = front_matter(nb, path)
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(link_pages(nb2str(nb), len(name.parts)-1), encoding='utf-8')
