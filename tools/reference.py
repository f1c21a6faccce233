"The reference page of the website: every public function and class, its parameters and what it returns."
import ast, html, re

from docments import definitions
from execnb.nbio import mk_cell
from nbdev.doclinks import NbdevLookup
from notebooks import cfg, notebooks, processed
from pages import page_name

def told_in(path):
    "The module that the notebook at `path` exports, if any"
    found = (getattr(cell, 'directives_', {}) for cell in processed(path).cells)
    return next((d['default_exp'][0] for d in found if 'default_exp' in d), None)

def exporting():
    "The notebook of each module"
    return {module: path for path in notebooks() if (module := told_in(path))}

def module_file(module): return (cfg.lib_path/module.replace('.', '/')).with_suffix('.py')

def code(text): return f'<code>{html.escape(text)}</code>' if text else ''

def prose(text):
    "The Markdown `text` as HTML, as far as docments need it"
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(text, quote=False))

def sentence(text): return text if text.endswith(('.', '?', '!')) else f'{text}.'

def default(parameter):
    "The default of a parameter as a reader would write it"
    return re.sub(r'^field\(default_factory=(\w+)\)$', r'\1()', parameter.default)

def row(parameter):
    "A row of the table of parameters"
    cells = code(parameter.type), code(default(parameter)), prose(parameter.docment)
    name = '<em>returns</em>' if parameter.name == 'returns' else code(parameter.name)
    return f'<tr><td>{name}</td>' + ''.join(f'<td>{cell}</td>' for cell in cells) + '</tr>'

def table(definition):
    "The parameters of `definition` and what it returns, as an HTML table"
    rows = [row(p) for p in definition.parameters]
    if definition.returns.type: rows.append(row(definition.returns))
    if not rows: return ''
    head = ''.join(f'<th>{title}</th>' for title in ('parameter', 'type', 'default', 'meaning'))
    return f'```{{=html}}\n<table class="api"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>\n```'

def call(method):
    "How a method is called"
    return f'{method.name}({", ".join(p.name for p in method.parameters)})'

def methods(definition):
    "The documented public methods of a class, one a line"
    shown = [m for m in definition.methods if m.public and m.docstring]
    return '\n'.join(f'- `.{call(m)}`: {m.docstring.splitlines()[0]}' for m in shown)

def entry(definition, module, page):
    "What the reference says of one definition"
    title = f'### {definition.name} {{#{module}.{definition.name}}}'
    story = f'[Code and examples]({page}#{definition.name.lower()})'
    purpose = sentence(definition.docstring) if definition.docstring else ''
    parts = title, purpose, table(definition), methods(definition), story
    return '\n\n'.join(filter(None, parts))

def section(module, path):
    "What the reference says of one module"
    page = f'../{page_name(path).as_posix()}'
    source = module_file(module).read_text(encoding='utf-8')
    purpose = sentence(ast.get_docstring(ast.parse(source)))
    title = processed(path).frontmatter_['title']
    head = f'## {module} {{#{module}}}\n\n{purpose} Code and examples: [{title}]({page}).'
    shown = [d for d in definitions(module_file(module)) if d.public]
    return '\n\n'.join([head, *(entry(d, module, page) for d in shown)])

def room(module):
    "The place of `module` in the order of the rooms"
    rooms = ['core', 'stages', 'training', 'tuners', 'forecast', 'lab', 'cli']
    return rooms.index(module.split('.')[0]), module

def add_reference(nb):
    "Put the reference at the end of the page `nb`"
    found, lookup = exporting(), NbdevLookup()
    nb.cells += [mk_cell(lookup.linkify(section(m, found[m])), 'markdown') for m in sorted(found, key=room)]
    return nb
