"The order of the house: what may import what, names, docments, lines, the wheel, the pages, and what the README says"
import ast, re, subprocess, sys, zipfile
from collections import defaultdict
from configparser import ConfigParser
from pathlib import Path

import pytest

import lorasuite

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from docments import definitions

LIBRARY = ROOT/'lorasuite'
MODULES = sorted(p for p in LIBRARY.rglob('*.py') if p.name != '_modidx.py')
FORBIDDEN = dict(
    core={'stages', 'training', 'tuners', 'forecast', 'lab', 'cli'},
    stages={'training', 'tuners', 'forecast', 'lab', 'cli'},
    training={'tuners', 'forecast', 'lab', 'cli'},
    tuners={'forecast', 'lab', 'cli'},
    forecast={'lab', 'cli'},
    lab={'cli'})

def module_name(path):
    "`lorasuite.core.files` for lorasuite/core/files.py"
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')

def label(path): return module_name(path).removeprefix('lorasuite.')

def targets(node, path):
    "The modules that an import statement of the module at `path` names, in full"
    if isinstance(node, ast.Import): return [name.name for name in node.names]
    package = path.relative_to(ROOT).parent.parts
    start = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
    whole = '.'.join(filter(None, [start, node.module]))
    return [whole, *(f'{whole}.{name.name}' for name in node.names)]

def imports(tree, path):
    "The modules that the statements below `tree` import"
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {target for node in nodes for target in targets(node, path)}

def outside_functions(tree):
    "`tree` without the bodies of its functions: what runs when the module is imported"
    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node): return None
        visit_AsyncFunctionDef = visit_FunctionDef
    return Cut().visit(tree)

def source(path): return path.read_text(encoding='utf-8')

def rooms(names):
    "The rooms of the house that imported modules are in; a public name counts for the room that it lives in"
    homes = {f'lorasuite.{name}': f'lorasuite.{home}' for name, home in lorasuite._HOMES.items()}
    inside = [homes.get(name, name).split('.') for name in names]
    return {parts[1] for parts in inside if parts[0] == 'lorasuite' and len(parts) > 1}

@pytest.mark.parametrize('path', [p for p in MODULES if p.parent != LIBRARY], ids=label)
def test_floors(path):
    "No module imports one of a floor above it, not even inside a function"
    room = path.relative_to(LIBRARY).parts[0]
    assert not rooms(imports(ast.parse(source(path)), path)) & FORBIDDEN[room]

def test_only_the_command_stands_beside_the_rooms():
    assert {p.name for p in MODULES if p.parent == LIBRARY} == {'__init__.py', 'cli.py'}
    assert {p.name for p in LIBRARY.iterdir() if (p/'__init__.py').is_file()} == {*FORBIDDEN}

def roundabout(tree):
    "Ways to a module of ours that are no import statement: strings for `import_module`, attributes of lorasuite"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'lorasuite':
            if not node.attr.startswith('__'): yield f'lorasuite.{node.attr}'
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        if name not in ('import_module', '__import__'): continue
        yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))

@pytest.mark.parametrize('path', [p for p in MODULES if p.parent != LIBRARY], ids=label)
def test_nobody_goes_round_the_floors(path):
    "`core.formats` is the one that finds modules by name: those of its own folder"
    named = {name for name in roundabout(ast.parse(source(path))) if name.startswith('lorasuite')}
    assert named <= {'lorasuite.core.formats.', 'lorasuite.core.formats'}

def test_ways_round_are_seen():
    for statement in ("importlib.import_module('lorasuite.lab.zoo')", "import lorasuite\nlorasuite.finetune"):
        assert any(name.startswith('lorasuite.') for name in roundabout(ast.parse(statement))), statement

def test_the_floors_are_told_apart():
    "The check itself: relative, absolute and lazy imports are all seen"
    path = LIBRARY/'core'/'model.py'
    for statement in ('from ..lab.zoo import x', 'from lorasuite.lab import zoo', 'import lorasuite.lab.zoo',
                      'from .. import lab', 'def f():\n    from ..lab import zoo'):
        assert rooms(imports(ast.parse(statement), path)) == {'lab'}, statement
    assert rooms(imports(ast.parse('from lorasuite import upgrade'), path)) != set()
    assert rooms(imports(ast.parse('from .files import resolve\nimport torch'), path)) == {'core'}

def test_only_the_demo_of_the_command_uses_the_laboratory():
    tree = ast.parse(source(LIBRARY/'cli.py'))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    demo = next(n for n in functions if n.name in ('demo', 'demo_command'))
    assert 'lab' in rooms(imports(demo, LIBRARY/'cli.py'))
    tree.body.remove(demo)
    assert 'lab' not in rooms(imports(tree, LIBRARY/'cli.py'))

@pytest.mark.parametrize('path', MODULES, ids=label)
def test_nothing_draws_before_it_must(path):
    names = imports(outside_functions(ast.parse(source(path))), path)
    assert not {name.split('.')[0] for name in names} & {'matplotlib', 'seaborn'}

def test_files_need_no_torch():
    names = imports(ast.parse(source(LIBRARY/'core'/'files.py')), LIBRARY/'core'/'files.py')
    assert not {name.split('.')[0] for name in names} & {'torch', 'transformers', 'peft'}
    assert rooms(names) == set()

def test_the_package_alone_loads_nothing_heavy():
    code = 'import sys, lorasuite; print(sorted({"torch", "transformers", "matplotlib"} & sys.modules.keys()))'
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'

def test_public_names_are_found():
    for name in lorasuite.__all__: assert callable(getattr(lorasuite, name)), name

def owned(path):
    "The public names that a module defines"
    for node in ast.parse(source(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names = [node.name]
        elif isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
        else: continue
        yield from (name for name in names if not name.startswith('_'))

FORMAT = {'read', 'write', 'recognises', 'check_base', 'check_parts'} # what every format of adapters may define

def test_a_name_has_one_owner():
    "But for the modules of formats, which all answer to the same few names"
    owners = defaultdict(set)
    for path in MODULES:
        shared = FORMAT if path.parent.name == 'formats' else set()
        for name in {*owned(path)} - shared: owners[name].add(module_name(path))
    assert {name: sorted(found) for name, found in owners.items() if len(found) > 1} == {}

def called(method):
    "Is a method one that torch or the Trainer calls, and documents?"
    return method.name == 'forward' or method.name.startswith('on_')

@pytest.mark.parametrize('path', MODULES, ids=label)
def test_public_definitions_are_documented(path):
    "Each has a docstring of at most a few lines, and each parameter its docment"
    missing = []
    for d in definitions(path):
        if not d.public: continue
        if not d.docstring: missing.append(f'{d.name}: docstring')
        missing += [f'{d.name}: {p.name}' for p in d.parameters if not p.docment and not p.name.startswith('*')]
        missing += [f'{d.name}.{m.name}: docstring' for m in d.methods if m.public and not (m.docstring or called(m))]
    assert missing == []

@pytest.mark.parametrize('path', MODULES, ids=label)
def test_lines_are_short(path):
    generated = re.sub(r'(?s)^__all__ = \[.*?\]$', '', source(path), flags=re.MULTILINE)
    assert [(len(line), line.strip()) for line in generated.splitlines() if len(line) > 120] == []

def test_docments_are_read():
    "The reader of docments: defaults, stars, returns, methods, fields of dataclasses, options of the command"
    from docments import Reader
    text = '''
Rate = Annotated[float, Option(help='peak rate')]
def f(
    a:int, # first
    *rest:str, # others
    b:dict|None=None, # (n, d) last
) -> list: # all
    "What it does"
@dataclass
class C:
    "A class"
    x:int # a field
    def show(self, rate:Rate=1): "Show it"
'''
    f, c = Reader(text).definitions()
    assert [(p.name, p.type, p.default, p.docment) for p in f.parameters] == [
        ('a', 'int', '', 'first'), ('*rest', 'str', '', 'others'), ('b', 'dict | None', 'None', '(n, d) last')]
    assert (f.returns.type, f.returns.docment, f.docstring) == ('list', 'all', 'What it does')
    assert [(p.name, p.docment) for p in c.parameters] == [('x', 'a field')]
    assert [(p.type, p.docment) for p in c.methods[0].parameters] == [('float', 'peak rate')]

def test_versions_agree():
    "settings.ini, the package and CITATION.cff name the same version, and the changelog tells what is in it"
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    version = settings['DEFAULT']['version']
    assert version == lorasuite.__version__
    assert f'\nversion: {version}\n' in source(ROOT/'CITATION.cff')
    assert f'## [{version}]' in source(ROOT/'CHANGELOG.md')

def test_every_notebook_is_in_the_sidebar():
    listed = re.findall(r'- (nbs/\S+\.ipynb)', source(ROOT/'_quarto.yml'))
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').rglob('[!.]*.ipynb')}
    assert len(listed) == len(set(listed)) and set(listed) == there

def test_the_home_page_names_every_notebook_of_course_and_laboratory():
    readme = source(ROOT/'README.md')
    for room in ('course', 'lab', 'tutorials'):
        for path in (ROOT/'nbs'/room).glob('[!.]*.ipynb'): assert f'({path.relative_to(ROOT).as_posix()})' in readme

def build_wheel(folder):
    "Build the wheel from a copy of what git would hand out, in `folder`"
    copy = folder/'copy'
    names = 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'lorasuite'
    copy.mkdir()
    for name in names: (copy/name).symlink_to(ROOT/name)
    command = [sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', str(folder)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return next(folder.glob('*.whl'))

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    pytest.importorskip('setuptools')
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp('wheel'))) as archive: yield set(archive.namelist())

def test_the_wheel_holds_the_house(wheel):
    "All modules and all data, and neither notebooks, tests nor caches"
    skipped = '__pycache__', '.ipynb_checkpoints'
    files = [p for p in LIBRARY.rglob('*') if p.is_file() and not set(skipped) & set(p.parts)]
    assert {p.relative_to(ROOT).as_posix() for p in files} <= wheel
    assert 'lorasuite/py.typed' in wheel
    assert {name.split('/')[0] for name in wheel if '.dist-info' not in name} == {'lorasuite'}
    assert not [name for name in wheel if '__pycache__' in name or name.endswith('.ipynb')]
