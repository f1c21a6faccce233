"Measure the style of a checkout: `python tools/measure_style.py [FOLDER …]` prints one column for each."
import ast, json, re, sys
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles

def cells(folder, kind):
    "The sources of all cells of a kind in the notebooks of `folder`"
    for path in sorted(folder.glob('nbs/**/*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == kind: yield ''.join(cell['source'])

def modules(folder):
    "The modules of the library, without the index that nbdev makes"
    return [p for p in sorted(folder.glob('lorasuite/**/*.py')) if p.name != '_modidx.py']

def tree(path): return ast.parse(path.read_text(encoding='utf-8'))

def scripts(folder):
    "The lines that are written by hand in tests, tools, benchmarks and setup.py"
    for pattern in ('tests/*.py', 'tools/*.py', 'benchmarks/*.py', 'setup.py'):
        for path in folder.glob(pattern): yield from path.read_text(encoding='utf-8').splitlines()

def code_lines(sources):
    "Lines of code that say something"
    return [line for source in sources for line in source.splitlines() if line.strip()]

def functions(folder):
    "All functions and methods of the library"
    for path in modules(folder): yield from (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef))

def body_length(function):
    "Lines of a function without its signature and docstring"
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0

def own_expressions(statement):
    "Expressions in a statement, without those of the statements inside it"
    todo, count = list(ast.iter_child_nodes(statement)), 0
    while todo:
        node = todo.pop()
        if isinstance(node, ast.stmt): continue
        count += isinstance(node, ast.expr)
        todo += ast.iter_child_nodes(node)
    return count

def statements(folder):
    "Statements of the library but imports, definitions, docstrings and `__all__`"
    passed = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef
    for path in modules(folder):
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.stmt) or isinstance(node, passed): continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant): continue
            yield node

def targets(node):
    "The names that a statement at the top of a module defines"
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    if isinstance(node, ast.Assign): return [t.id for t in node.targets if isinstance(t, ast.Name)]
    return []

def owners(folder):
    "The modules in which each name is defined"
    found = defaultdict(list)
    for path in modules(folder):
        for node in tree(path).body:
            for name in targets(node):
                if not name.startswith('__'): found[name].append(path.stem)
    return found

def spread(numbers):
    "Median, 90th percentile and maximum"
    return f'{median(numbers):.0f} / {quantiles(numbers, n=10)[-1]:.0f} / {max(numbers)}'

def over(lines, limit): return sum(len(line) > limit for line in lines)

def measure(folder):
    "The measures of `folder`, by name"
    code, prose = list(cells(folder, 'code')), list(cells(folder, 'markdown'))
    lines = code_lines(code)
    lengths = [body_length(f) for f in functions(folder)]
    written, names = lines + list(scripts(folder)), owners(folder)
    public = [name for name in names if not name.startswith('_')]
    comments = [line for line in lines if re.match(r'\s*#(?!\|)', line)]
    return {
        'prose words per code line': f'{sum(len(text.split()) for text in prose)/len(lines):.1f}',
        'code cell, median lines': median(len(code_lines([source])) for source in code),
        'function body, median / p90 / max lines': spread(lengths),
        'comments on lines of their own': f'{len(comments)/len(lines):.1%}',
        'lines over 120': over(written, 120),
        'lines over 160': over(written, 160),
        'expressions a statement, median': median(map(own_expressions, statements(folder))),
        'public names': len(public),
        'private names': len(names) - len(public),
        'public names with two owners': sum(len(names[name]) > 1 for name in public),
        'modules': len(modules(folder)),
    }

if __name__ == '__main__':
    folders = [Path(name) for name in sys.argv[1:] or ['.']]
    columns = [measure(folder) for folder in folders]
    for name in columns[0]: print(f'{name:42}', *(f'{column[name]!s:>16}' for column in columns))
