"Write README.md from nbs/index.ipynb; with --check, stop if it would change."
import re, sys

from notebooks import cfg, nbs, processed, root

def title(frontmatter): return f'# {frontmatter["title"]}\n\n> {frontmatter["description"]}'

def fenced(text, language=''): return f'```{language}\n{text.rstrip()}\n```'

def shown(output):
    "One output of a cell"
    if output.output_type == 'stream': return fenced(''.join(output.text))
    if 'image/png' in output.data: sys.exit('README.md cannot show a plot: save it in nbs/images and link to it')
    if 'text/markdown' in output.data: return ''.join(output.data['text/markdown'])
    return fenced(''.join(output.data['text/plain']))

def code(cell):
    "A code cell and what it shows"
    return '\n\n'.join([fenced(cell.source, 'python'), *map(shown, cell.outputs)])

def link(match):
    "A link that is relative to nbs/, made relative to the top of the project"
    return match[0] if re.match(r'[a-z]+:|#|/', match[1]) else f']({nbs.name}/{match[1]})'

def readme():
    "The home page as Markdown"
    nb = processed(nbs/cfg.readme_nb)
    cells = [code(c) if c.cell_type == 'code' else c.source for c in nb.cells[1:]]
    return re.sub(r'\]\(([^)\s]+)\)', link, '\n\n'.join([title(nb.frontmatter_), *cells])) + '\n'

if __name__ == '__main__':
    path = root/'README.md'
    if '--check' not in sys.argv: path.write_text(readme(), encoding='utf-8')
    elif path.read_text(encoding='utf-8') != readme():
        sys.exit('README.md is not in sync with nbs/index.ipynb. Run `make readme`.')
