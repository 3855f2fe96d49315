"""Design lints: the order of packages and notebooks, and functions from notebooks to lists of faults.

A lint answers with an empty list where all is well. `nbs/design.ipynb` shows them at work; `test_design.py` holds
every notebook to them.
"""

import ast, io, json, re, socket, tokenize
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT / 'nbs', 'mobileclip_nb'

# The one order of packages: a package imports from lower layers only (layers are counted from 1).
LAYERS = [
    ['core', 'blocks', 'losses'],
    ['preprocessing'],
    ['models', 'augment', 'datasets'],
    ['shards', 'inference', 'export'],
    ['reinforce', 'loaders'],
    ['train', 'evaluate', 'bench'],
    ['experiments', 'downstream', 'vlm', 'widgets'],
    ['cli'],
]
SIDEWAYS = {  # within a layer, a package may import these
    'inference': ['shards', 'export'],
    'vlm': ['downstream'],
    'experiments': ['downstream', 'vlm'],
    'widgets': ['experiments'],
}
FORBIDDEN = {  # although they stand lower
    'shards': ['models'],
    'loaders': ['models'],
    'losses': ['core', 'blocks'],
}
GUIDES = ['index', 'demo', 'tutorials/', 'ablations/', 'apps/', 'design']  # they export nothing
GUIDES += ['export/09_homes', 'export/14_eight_bits']
GUIDES += ['inference/08_approximate_index', 'inference/07_search_tried']  # they measure
GUIDES += ['bench/08_feed', 'reinforce/08_reference_defects', 'vlm/07_first_token']
LIMIT = dict(
    width=100,
    data_width=140,
    cell=40,
    class_cell=120,
    body=40,
    module=500,
    parameters=8,
    public_parameters=12,
    cells=70,
    size=1_000_000,
    prose=1.0,
    checked=0.9,
    hidden=4,
)
# What crosses a limit for a reason: at most five entries, (lint, notebook) to the reason.
EXCEPTIONS = {}

DIRECTIVE = re.compile(r'^#\|\s*(\w+)', re.M)
MAGIC = re.compile(r'^(\s*)[%!].*$', re.M)


@dataclass(frozen=True)
class Cell:
    kind: str
    source: str
    id: str | None
    outputs: tuple = ()

    @cached_property
    def flags(self):
        return set(DIRECTIVE.findall(self.source))

    @cached_property
    def is_exported(self):
        return self.kind == 'code' and bool(self.flags & {'export', 'exports', 'exporti'})

    @cached_property
    def python(self):
        "The source with lines of shell and magic replaced"
        return MAGIC.sub(r'\1pass', self.source)

    @cached_property
    def lines(self):
        "Lines that are neither blank nor comments"
        lines = [line.strip() for line in self.source.splitlines()]
        return [line for line in lines if line and not line.startswith('#')]

    @cached_property
    def tree(self):
        return ast.parse(self.python)


@dataclass(frozen=True)
class Notebook:
    path: Path

    @cached_property
    def name(self):
        "Its path under `nbs/` without the suffix: `shards/04_sample`"
        inside = self.path.relative_to(NBS) if self.path.is_relative_to(NBS) else self.path
        return inside.with_suffix('').as_posix()

    @cached_property
    def cells(self):
        raw = json.loads(self.path.read_text(encoding='utf-8'))['cells']
        return [
            Cell(c['cell_type'], ''.join(c['source']), c.get('id'), tuple(c.get('outputs', ())))
            for c in raw
        ]

    @cached_property
    def code(self):
        return [c for c in self.cells if c.kind == 'code']

    @cached_property
    def prose(self):
        return [c for c in self.cells if c.kind == 'markdown']

    @cached_property
    def exported(self):
        return [c for c in self.code if c.is_exported]

    @cached_property
    def module(self):
        "The module it exports, from `#| default_exp`"
        for c in self.code:
            if found := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M):
                return found[1]
        return None

    @cached_property
    def package(self):
        return self.name.split('/')[0] if '/' in self.name else ''

    @cached_property
    def definitions(self):
        "Functions and classes that its exported cells define at the top"
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return [n for c in self.exported for n in c.tree.body if isinstance(n, kinds)]


def notebooks():
    "All notebooks, packages in the order of their layers, then the others"
    order = [p for layer in LAYERS for p in layer]
    paths = [p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    found = [Notebook(p) for p in sorted(paths)]
    return sorted(found, key=lambda n: order.index(n.package) if n.package in order else len(order))


def library():
    "Notebooks that export a module, in import order"
    return [n for n in notebooks() if n.module is not None]


def functions(nb):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [n for c in nb.exported for n in ast.walk(c.tree) if isinstance(n, kinds)]


# --- sizes ---------------------------------------------------------------------------------------


def body_lines(function):
    "Lines of a function without signature and docstring"
    rest = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - rest[0].lineno + 1 if rest else 0


def sizes(nb):
    "Cells, functions, modules and notebooks within their limits"
    out = []
    for c in nb.exported:
        is_class = len(c.tree.body) == 1 and isinstance(c.tree.body[0], ast.ClassDef)
        if len(c.lines) > LIMIT['class_cell' if is_class else 'cell']:
            out.append(f'exported cell {c.id} has {len(c.lines)} lines')
    for f in functions(nb):
        if (n := body_lines(f)) > LIMIT['body']:
            out.append(f'{f.name} has a body of {n} lines')
    if (n := sum(len(c.lines) for c in nb.exported)) > LIMIT['module']:
        out.append(f'exports {n} lines')
    if len(nb.cells) > LIMIT['cells']:
        out.append(f'{len(nb.cells)} cells')
    if (n := nb.path.stat().st_size) > LIMIT['size']:
        out.append(f'{n / 1e6:.1f} MB')
    return out


def is_public_api(function, nb):
    "Constructors, losses and names of `mobileclip_nb.__all__` may take more parameters"
    import mobileclip_nb

    public = {'train', 'finetune', 'reinforce', *mobileclip_nb.__all__}
    return function.name in public | {'__init__'} or function.name.endswith(('_loss', '_distill'))


def parameters(nb):
    "Few parameters a function"
    out = []
    for f in functions(nb):
        named = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        n = len([a for a in named if a.arg not in ('self', 'cls')])
        most = LIMIT['public_parameters' if is_public_api(f, nb) else 'parameters']
        if n > most:
            out.append(f'{f.name} takes {n} parameters')
    return out


# --- form ----------------------------------------------------------------------------------------


def width(nb):
    "No line of code wider than its limit; inside `# fmt: off` the limit of data tables holds"
    out = []
    for c in nb.code:
        limit = LIMIT['width']
        for line in c.source.splitlines():
            if '# fmt: off' in line:
                limit = LIMIT['data_width']
            elif '# fmt: on' in line:
                limit = LIMIT['width']
            if len(line) > limit:
                out.append(f'cell {c.id} has a line of {len(line)} columns')
    return out


def statements(nb):
    "No `;` between statements"
    out = []
    for c in nb.code:
        tokens = list(tokenize.generate_tokens(io.StringIO(c.python).readline))
        for token, after in zip(tokens, tokens[1:]):
            ends_line = after.type in (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT)
            if token.type == tokenize.OP and token.string == ';' and not ends_line:
                out.append(f'cell {c.id} has several statements in line {token.start[0]}')
    return out


def prose(nb):
    "At least as many words as lines of code"
    lines = sum(len(c.lines) for c in nb.code)
    words = sum(len(c.source.split()) for c in nb.prose)
    if not lines or words / lines >= LIMIT['prose']:
        return []
    return [f'{words / lines:.2f} words of prose a line of code']


CHECK = re.compile(r'\b(assert|test_\w+|expect_\w+|assert_close|raises)\b')


def is_checked(nb, index):
    "A check follows the cell within three cells"
    near = [c for c in nb.cells[index + 1 : index + 5] if c.kind == 'code' and not c.is_exported]
    return any(CHECK.search(c.source) for c in near)


def checks(nb):
    "Nine exported definitions in ten are followed by a check"
    kinds = (ast.FunctionDef, ast.ClassDef)
    defining = [
        i
        for i, c in enumerate(nb.cells)
        if c.is_exported and any(isinstance(n, kinds) for n in c.tree.body)
    ]
    bare = [i for i in defining if not is_checked(nb, i)]
    if not defining or 1 - len(bare) / len(defining) >= LIMIT['checked']:
        return []
    return [f'cell {nb.cells[i].id} defines and nothing checks it' for i in bare]


def form(nb):
    "Every cell has an id; few are hidden; a cell that imports does nothing else"
    out = [f'a cell without id: {c.source[:40]!r}' for c in nb.cells if not c.id]
    if (n := sum('hide' in c.flags for c in nb.code)) > LIMIT['hidden']:
        out.append(f'{n} hidden cells')
    for c in nb.exported:
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in c.tree.body]
        if any(imports) and not all(imports):
            out.append(f'cell {c.id} mixes imports with other code')
    return out


# --- language ------------------------------------------------------------------------------------

WORDS = re.compile(
    r'\b(opinions?|refus(?:e|es|ed|al)|both hands|same hand|other hand|spoiled|innocent'
    r'|teachers? (?:say|says|think|thinks))\b',
    re.I,
)


def strings(tree):
    "Docstrings and messages: the constant parts of all strings"
    return [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]


def language(nb):
    "No private words in prose, docstrings and messages; a constant of one word is data"
    texts = [c.source for c in nb.prose]
    for c in nb.exported:
        texts += [s for s in strings(c.tree) if not s.isidentifier()]
    found = {word.lower() for text in texts for word in WORDS.findall(text)}
    return [f'says {word!r}' for word in sorted(found)]


# --- exported code -------------------------------------------------------------------------------


def untyped(f):
    "Parameters and results of a function that carry no annotation"
    a = f.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    named = [x for x in named if x and x.arg not in ('self', 'cls')]
    out = [f'{f.name}({x.arg}) has no type' for x in named if x.annotation is None]
    is_special = f.name.startswith('__') and f.name.endswith('__')
    if f.returns is None and not is_special:
        out.append(f'{f.name} does not say what it returns')
    return out


def fault_of_call(call):
    "Why exported code does not make this call, or an empty string"
    name = ast.unparse(call.func)
    if name in ('sys.exit', 'print'):
        return name
    if name == 'torch.load' and 'weights_only=True' not in ast.unparse(call):
        return 'torch.load that would unpickle'
    return ''


def fault_of_node(n):
    "Why exported code does not hold this node, or an empty string"
    if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names):
        return 'import *'
    if isinstance(n, (ast.Import, ast.ImportFrom)) and 'fastcore' in ast.unparse(n):
        return 'imports fastcore'
    if isinstance(n, ast.Assert):
        return 'assert'
    if isinstance(n, ast.ExceptHandler) and n.type is None:
        return 'bare except'
    if isinstance(n, ast.Call):
        return fault_of_call(n)
    if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.args.vararg and n.args.kwarg:
        return f'{n.name} passes *args, **kwargs through'
    if isinstance(n, ast.Constant) and isinstance(n.value, str) and is_program(n.value):
        return 'Python in a string'
    return ''


def is_program(text):
    "A string that holds a program: several statements, one of them an import"
    if not re.search(r'(?:^|[\n;]\s*)(?:import|from) \w', text):
        return False
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return len(body) > 1


def code(nb):
    "Exported code does not print, exit, assert, unpickle, import everything or hide its types"
    out = [fault_of_node(n) for c in nb.exported for n in ast.walk(c.tree)]
    out += [fault for f in functions(nb) for fault in untyped(f)]
    if 'utils' in (nb.module or ''):
        out.append('a module named utils')
    return list(dict.fromkeys(fault for fault in out if fault))


# --- outputs -------------------------------------------------------------------------------------

PRIVATE = re.compile(r'(?<![\w.:/])/(?:home|root|Users|work|tmp|opt|mnt|private|var)/[\w.-]')


SHOWING = ('Markdown', 'Picture', 'print', 'display', 'draw_', 'render_')


def shows(cell):
    "Whether a cell prints, or ends in a name or a call that is there to be shown"
    if '#| eval: false' in cell.source or not cell.tree.body:
        return False
    values = [n.value for n in cell.tree.body if isinstance(n, ast.Expr)]
    called = [ast.unparse(v.func) for v in values if isinstance(v, ast.Call)]
    ends = cell.tree.body[-1]
    return (
        any(name in ('print', 'display') for name in called)
        or isinstance(ends, ast.Expr)
        and (
            isinstance(ends.value, ast.Name)
            or isinstance(ends.value, ast.Call)
            and ast.unparse(ends.value.func).startswith(SHOWING)
        )
    )


def outputs(nb):
    "Stored outputs are all there, without an error, a missing command, a path or a host name"
    out, host = [], socket.gethostname()
    if any(c.outputs for c in nb.code):
        out += [f'cell {c.id} has lost its output' for c in nb.code if shows(c) and not c.outputs]
    for c in nb.code:
        if any(o['output_type'] == 'error' for o in c.outputs):
            out.append(f'cell {c.id} ended in an error')
        shown = [o.get('data', {'text': o.get('text', '')}) for o in c.outputs]
        text = json.dumps(
            [{k: v for k, v in d.items() if not k.startswith('image/')} for d in shown]
        )
        if found := PRIVATE.search(text):
            out.append(f'cell {c.id} shows a path of this machine: {found[0]}')
        if 'command not found' in text:
            out.append(f'cell {c.id} called a command that was not there')
        if len(host) > 3 and host in text:
            out.append(f'cell {c.id} names the host')
    return out


# --- between notebooks ---------------------------------------------------------------------------


def imports(nb):
    "Our modules that exported code imports from, with the names: `{'core.files': {'whole'}}`"
    found = {}
    for c in nb.exported:
        for n in ast.walk(c.tree):
            if isinstance(n, ast.ImportFrom) and f'{n.module or ""}.'.startswith(f'{LIB}.'):
                module = n.module.removeprefix(LIB).lstrip('.')
                found.setdefault(module, set()).update(a.name for a in n.names)
    return found


NAMED = re.compile(r'`(?:nbs/)?((?:[a-z]+/)?(?:\d\d)_\w+?)(?:\.ipynb)?`')


def missing_notebooks(text, nbs):
    "Notebooks that prose names in backticks and that are not there"
    there = {n.name for n in nbs}
    return [name for name in NAMED.findall(text) if name not in there]


def layer_of(package):
    return next((k for k, layer in enumerate(LAYERS, 1) if package in layer), None)


def package_of(nb):
    "The package whose laws hold for a notebook: every `__main__` counts as `cli`"
    return 'cli' if nb.module.split('.')[-1] == '__main__' else nb.package


def is_allowed(importing, imported):
    "Whether one package may import from another"
    if importing == imported:
        return True
    if imported in FORBIDDEN.get(importing, ()):
        return False
    if imported in SIDEWAYS.get(importing, ()):
        return True
    return layer_of(imported) < layer_of(importing)


def order(nbs):
    "A notebook's name is its module; imports point down, in packages and inside them"
    out, place = [], {n.module: k for k, n in enumerate(nbs)}
    by_module = {n.module: n for n in nbs}
    for n in nbs:
        path = n.path.with_suffix('').name
        expected = f'{n.package}.{path.split("_", 1)[1]}'
        if n.module not in (expected, expected.removeprefix('cli.')):
            out.append(f'{n.name} exports {n.module!r}')
        if layer_of(n.package) is None:
            out.append(f'{n.name} is in no package of LAYERS')
        for m in imports(n):
            if m and m not in by_module:
                out.append(f'{n.name} imports {m!r}, which no notebook exports')
            elif m and not is_allowed(package_of(n), package_of(by_module[m])):
                out.append(f'{n.name} imports {m!r}: {package_of(n)} may not import from there')
            elif m and package_of(n) == by_module[m].package and place[m] >= place[n.module]:
                out.append(f'{n.name} imports {m!r}, which comes after it')
    if len(by_module) != len(nbs):
        out.append('two notebooks export one module')
    numbers = [n.name.split('_')[0] for n in nbs]
    return out + [f'{k}_ stands twice' for k in sorted(set(numbers)) if numbers.count(k) > 1]


def private_imports(nbs):
    "No module imports a private name of another"
    out = []
    for n in nbs:
        for m, names in imports(n).items():
            private = sorted(x for x in names if x.startswith('_') and not x.startswith('__'))
            out += [f'{n.name} imports {x} of {m}' for x in private]
    return out


def repeated_names(nbs):
    "No public function or class stands in two modules"
    found = {}
    for n in nbs:
        for d in n.definitions:
            if not d.name.startswith('_') and d.name != 'main':
                found.setdefault(d.name, set()).add(n.module)
    return [f'{name}: {", ".join(sorted(ms))}' for name, ms in sorted(found.items()) if len(ms) > 1]


WORD = re.compile(r'\w+')


def hidden_api(nbs, texts):
    "A public definition without a caller outside its notebook is documented: a docstring, types"
    words = {n.name: set(WORD.findall('\n'.join(c.source for c in n.code))) for n in nbs}
    elsewhere = set(WORD.findall('\n'.join(texts)))
    out = []
    for n in nbs:
        called = elsewhere.union(*(found for name, found in words.items() if name != n.name))
        for d in n.definitions:
            if d.name.startswith('_') or d.name in called:
                continue
            lacks = untyped(d) if isinstance(d, ast.FunctionDef) else []
            if lacks or not ast.get_docstring(d):
                out.append(f'{n.name}: {d.name} has no caller elsewhere and is not documented')
    return out


def names(nbs, public):
    "No module bears the name of a package of ours or of a public name"
    modules = {n.module for n in nbs}
    packages = {m.split('.')[0] for m in modules if '.' in m}
    tops = {m.split('.')[0] for m in modules}
    out = [f'{m} is a module and a package' for m in modules & packages]
    return out + [f'{m} is a module and a public name' for m in tops & set(public)]


# --- the graph of packages -----------------------------------------------------------------------


def package_graph(nbs):
    "The packages that each package imports from, by exported code"
    graph = {p: set() for layer in LAYERS for p in layer if any(n.package == p for n in nbs)}
    home = {n.module: package_of(n) for n in nbs}
    for n in nbs:
        graph[package_of(n)] |= {home[m] for m in imports(n) if m in home} - {package_of(n)}
    return graph


def levels(graph):
    "The level of each package, 1 for those that import nothing; a circle is an error"
    level, waiting = {}, dict(graph)
    while waiting:
        free = [p for p, below in waiting.items() if below <= set(level)]
        if not free:
            raise ValueError(f'packages import each other in a circle: {sorted(waiting)}')
        for p in free:
            level[p] = 1 + max((level[b] for b in waiting[p]), default=0)
        waiting = {p: below for p, below in waiting.items() if p not in free}
    return level
