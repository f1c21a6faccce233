"Build the website into _docs: pages from the notebooks, rendered by quarto where there is one, else by smalldocs."
import re, shutil, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lines import line_up_code
from maths import draw_formulas
from notebooks import cfg, nbs, notebooks, root
from pages import number, page, page_name, write_page
from reference import add_reference

REFERENCE = nbs/'reference'/'api.ipynb'

def site_settings(paths):
    "The settings in _quarto.yml, with the names of the pages for those of the notebooks"
    text = (root/'_quarto.yml').read_text(encoding='utf-8')
    listed = set(re.findall(r'- (nbs/\S+\.ipynb)', text))
    there = {p.relative_to(root).as_posix() for p in paths}
    if there - listed: sys.exit(f'_quarto.yml does not list {", ".join(sorted(there - listed))}')
    if listed - there: sys.exit(f'_quarto.yml lists what is not there: {", ".join(sorted(listed - there))}')
    return re.sub(rf'{nbs.name}/((?:[\w-]+/)*)(?:{number})?', r'\1', text)

def prepare(folder):
    "Fill `folder` with the pages, settings and other files that the site is rendered from"
    paths = notebooks()
    shutil.copytree(nbs, folder, ignore=shutil.ignore_patterns('*.ipynb', '.*'), dirs_exist_ok=True)
    (folder/'_quarto.yml').write_text(site_settings(paths), encoding='utf-8')
    for path in paths:
        nb = page(path)
        if path == REFERENCE: add_reference(nb)
        write_page(nb, page_name(path), folder)

def render(folder):
    "Render the pages in `folder` and return the folder of the site"
    quarto, smalldocs = shutil.which('quarto'), shutil.which(Path(sys.executable).with_name('smalldocs'))
    if not (quarto or smalldocs): sys.exit('The website needs quarto, or Python 3.11 or later for smalldocs.')
    command = [smalldocs, 'render', folder, '--strict', '--quiet']
    if quarto: command = [quarto, 'render', folder, '-M', 'html-math-method:mathml']
    if subprocess.run(command).returncode: sys.exit('The website does not build.')
    return folder/cfg.doc_path.name

def local(path, text):
    "`text` of the page or style sheet at `path` without fonts and scripts from elsewhere, its code ready to be wrapped"
    if path.suffix == '.css': return re.sub(r'@import\s*(?:url\([^)]*\)|"[^"]*")[^;]*;', '', text)
    return line_up_code(re.sub(r'<link\b[^>]*/katex[^>]*>|<script\b[^>]*/katex[^>]*></script>', '', text))

remote = re.compile(r'<(?:script|img|iframe)\b[^>]*\bsrc="https?:'
                    r'|<link\b[^>]*rel="stylesheet"[^>]*href="https?:|@import|url\(["\']?https?:')

def finish(site):
    "Let the `site` be read without a network"
    files = [p for p in site.rglob('*') if p.suffix in ('.html', '.css')]
    texts = draw_formulas([local(p, p.read_text(encoding='utf-8')) for p in files])
    for path, text in zip(files, texts): path.write_text(text, encoding='utf-8')
    fetching = [p.name for p, text in zip(files, texts) if remote.search(text)]
    if fetching: sys.exit(f'These need the network: {", ".join(fetching)}')

def build(folder):
    "Build the site in the empty `folder` and put it in the place of the one before"
    prepare(folder)
    site = render(folder)
    finish(site)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(site, cfg.doc_path)

if __name__ == '__main__':
    with TemporaryDirectory() as folder: build(Path(folder))
    print(f'{cfg.doc_path.name}/index.html')
