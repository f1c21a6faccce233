"Definitions of a module with their docstrings and docments, read from its source; nothing is imported."
import ast, io, tokenize
from dataclasses import dataclass, field

@dataclass
class Parameter:
    "A parameter, a field of a dataclass, or what is returned"
    name: str
    type: str = ''
    default: str = ''
    docment: str = ''

@dataclass
class Definition:
    "A function or a class"
    name: str
    line: int
    docstring: str
    parameters: list[Parameter]
    returns: Parameter
    methods: list['Definition'] = field(default_factory=list)
    is_class: bool = False

    @property
    def public(self): return not self.name.startswith('_')

def comments(source):
    "The comment on each line of `source`"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('#').strip() for t in tokens if t.type == tokenize.COMMENT}

def option(node):
    "Type and help of `Annotated[float, typer.Option(help='…')]`; `None` for anything else"
    if not isinstance(node, ast.Subscript) or getattr(node.value, 'id', '') != 'Annotated': return None
    kind, marker = node.slice.elts[:2]
    texts = [k.value for k in getattr(marker, 'keywords', []) if k.arg == 'help']
    return ast.unparse(kind), ''.join(ast.unparse(text).strip('f\'"') for text in texts)

def aliases(tree):
    "Options that have a name, such as `Rate = Annotated[…]`: their types and their help"
    named = [node for node in tree.body if isinstance(node, ast.Assign) and option(node.value)]
    return {node.targets[0].id: option(node.value) for node in named}

class Reader:
    "Reads the definitions of a module's source"
    def __init__(self, source):
        self.tree, self.comments = ast.parse(source), comments(source)
        self.aliases = aliases(self.tree)

    def parameter(self, name, line, annotation=None, default=None):
        "A parameter whose docment, if any, is the comment on `line`"
        kind = ast.unparse(annotation) if annotation else ''
        found = option(annotation) or self.aliases.get(kind)
        kind, docment = found or (kind, self.comments.get(line, ''))
        return Parameter(name, kind, ast.unparse(default) if default else '', docment)

    def arguments(self, args):
        "The parameters of a function, `self` and `cls` left out"
        plain = args.posonlyargs + args.args
        defaults = [None]*(len(plain) - len(args.defaults)) + args.defaults
        named = list(zip(plain, defaults))
        if args.vararg: named.append((args.vararg, None))
        named += zip(args.kwonlyargs, args.kw_defaults)
        if args.kwarg: named.append((args.kwarg, None))
        stars = {id(args.vararg): '*', id(args.kwarg): '**'}
        return [self.parameter(stars.get(id(a), '') + a.arg, a.lineno, a.annotation, d)
                for a, d in named if a.arg not in ('self', 'cls')]

    def function(self, node):
        "A function or a method"
        returns = Parameter('returns')
        if node.returns: returns = self.parameter('returns', node.returns.end_lineno, node.returns)
        return Definition(node.name, node.lineno, ast.get_docstring(node) or '', self.arguments(node.args), returns)

    def fields(self, node):
        "The fields of a dataclass or a named tuple"
        rows = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return [self.parameter(n.target.id, n.lineno, n.annotation, n.value) for n in rows]

    def kind(self, node):
        "A class"
        methods = [self.function(n) for n in node.body if isinstance(n, ast.FunctionDef)]
        start = next((m for m in methods if m.name == '__init__'), None)
        parameters = start.parameters if start else self.fields(node)
        docstring = ast.get_docstring(node) or ''
        return Definition(node.name, node.lineno, docstring, parameters, Parameter('returns'), methods, True)

    def definitions(self):
        "The functions and classes at the top of the module"
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef): yield self.kind(node)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): yield self.function(node)

def definitions(path):
    "The functions and classes of the module at `path`"
    return list(Reader(path.read_text(encoding='utf-8')).definitions())
