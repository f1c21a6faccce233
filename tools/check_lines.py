"Stop if a line of tests, tools, benchmarks or setup.py is too long; check_notebooks.py looks at notebooks."
import sys

from check_notebooks import LINE
from notebooks import root

def long_lines(path):
    "The numbers and lengths of the lines of the file at `path` that are too long"
    lines = path.read_text(encoding='utf-8').splitlines()
    return [(n, len(line)) for n, line in enumerate(lines, 1) if len(line) > LINE]

def scripts():
    "The Python files that are written by hand"
    folders = [root/name for name in ('benchmarks', 'tests', 'tools')]
    return [*(path for folder in folders for path in sorted(folder.glob('*.py'))), root/'setup.py']

if __name__ == '__main__':
    found = []
    for path in scripts():
        found += [f'{path.relative_to(root)}:{n} has {length} characters' for n, length in long_lines(path)]
    if found: sys.exit('\n'.join([*found, f'A line has at most {LINE} characters.']))
