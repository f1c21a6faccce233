"Turn a notebook into a page of the website: its text, its code and its saved outputs. Nothing is executed."
import ast, re

import yaml
from execnb.nbio import nb2str
from nbdev.doclinks import NbdevLookup
from notebooks import cfg, colab_link, is_badge, is_install, nbs, only_imports, processed

number = r'\d+[a-zA-Z0-9]*_'

def page_name(path):
    "The page of the notebook at `path`: its number is dropped, as in nbdev's links"
    return path.relative_to(nbs).with_name(re.sub(f'^{number}', '', path.name))

def front_matter(nb, path):
    "The YAML at the top of a page"
    if 'title' not in nb.frontmatter_: raise ValueError(f'{path} does not begin with a `# Title`')
    own = {k: v for k, v in nb.frontmatter_.items() if k not in ('output-file', 'skip_exec')}
    if any(is_badge(cell) for cell in nb.cells):
        own['code-links'] = [dict(text='Open in Colab', icon='google', href=colab_link(path))]
    return f'---\n{yaml.safe_dump(own)}---\n'

def link_pages(text, depth):
    "Make links to the site relative, and links to numbered notebooks lead to their pages"
    text = text.replace(f'{cfg.doc_host}{cfg.doc_baseurl}/', '../'*depth)
    text = re.sub(r'(\.html#\w+)\.\w+\)', r'\1)', text) # a method is shown with its class
    return re.sub(rf'(\]\((?:[\w.-]+/)*){number}([\w-]+\.ipynb)', r'\1\2', text)

def is_shown(cell):
    "Does `cell` belong to the story? Buttons, settings, hidden cells and the imports of exported code do not"
    if is_badge(cell) or is_install(cell): return False
    kinds = cell.directives_.keys() if 'directives_' in cell else ()
    if {'hide', 'default_exp'} & set(kinds): return False
    return not ('export' in kinds and only_imports(cell))

def headings(cells):
    "The anchors that the headings in `cells` get"
    text = '\n'.join(cell.source for cell in cells if cell.cell_type == 'markdown')
    titles = re.findall(r'^#+ (.*)', text, flags=re.MULTILINE)
    return {re.sub(r'\W+', '-', title.lower()).strip('-') for title in titles}

def defined(cell):
    "The function or class that an exported `cell` defines, a public one first, in lower case; `None` without one"
    if 'export' not in getattr(cell, 'directives_', {}): return None
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    names = [node.name.lower() for node in ast.parse(cell.source).body if isinstance(node, kinds)]
    return min(names, key=lambda name: name.startswith('_'), default=None)

def set_anchors(cells):
    "Give each exported definition the anchor that links to its name lead to"
    taken = headings(cells)
    for cell in cells:
        name = defined(cell)
        if name and name not in taken: cell.source = f'#| label: {name}\n{cell.source}'
        taken.add(name)

def plain(cell):
    "Leave out the directives of `cell` that are for tests"
    if cell.cell_type == 'code': cell.source = re.sub(r'^#\|\s*eval:.*\n', '', cell.source, flags=re.MULTILINE)

def page(path):
    "The notebook at `path` as a page"
    nb, lookup = processed(path), NbdevLookup()
    matter = front_matter(nb, path)
    nb.cells = [nb.cells[0], *filter(is_shown, nb.cells[1:])]
    set_anchors(nb.cells[1:])
    for cell in nb.cells:
        plain(cell)
        if cell.cell_type == 'markdown': cell.source = lookup.linkify(cell.source)
    nb.cells[0].source = matter
    return nb

def write_page(nb, name, folder):
    "Write the page `nb` to its place in `folder`"
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(link_pages(nb2str(nb), len(name.parts) - 1), encoding='utf-8')
