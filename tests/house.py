"The rules of the house as functions: each takes notebooks and answers with a list of faults, empty where all is well."

import ast, json, re, socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT / 'nbs', 'mobileclip_nb'
WALL = dict(
    cell=40, function=40, module=500, cells=70, prose=1.0, checked=0.9, hidden=4, size=1_000_000
)
DIRECTIVE = re.compile(r'^#\|\s*(\w+)', re.M)


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
    def exported(self):
        return self.kind == 'code' and bool(self.flags & {'export', 'exports', 'exporti'})

    @cached_property
    def lines(self):
        return [l for l in self.source.splitlines() if l.strip() and not l.lstrip().startswith('#')]

    @cached_property
    def tree(self):
        return ast.parse(re.sub(r'^\s*[%!].*$', 'pass', self.source, flags=re.M))


@dataclass(frozen=True)
class Notebook:
    path: Path

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
    def exported(self):
        return [c for c in self.code if c.exported]

    @cached_property
    def module(self):
        return next(
            (
                m[1]
                for c in self.code
                if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))
            ),
            None,
        )

    @cached_property
    def number(self):
        return (
            int(self.path.name[:2])
            if self.path.name[:2].isdigit() and self.path.parent == NBS
            else None
        )


def notebooks():
    return [
        Notebook(p) for p in sorted(NBS.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts
    ]


def library():
    return [n for n in notebooks() if n.number is not None]


def body(f):
    "Lines of a function without signature and docstring"
    rest = f.body[1:] if ast.get_docstring(f) is not None else f.body
    return f.end_lineno - rest[0].lineno + 1 if rest else 0


def sizes(nb):
    "Cells, functions, modules, notebooks: nothing longer than its wall"
    out = [
        f'exported cell {c.id} has {len(c.lines)} lines'
        for c in nb.exported
        if len(c.lines) > WALL['cell']
    ]
    for f in (
        f
        for c in nb.exported
        for f in ast.walk(c.tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
    ):
        if (n := body(f)) > WALL['function']:
            out.append(f'{f.name} has a body of {n} lines')
    if (n := sum(len(c.lines) for c in nb.exported)) > WALL['module']:
        out.append(f'exports {n} lines')
    if len(nb.cells) > WALL['cells']:
        out.append(f'{len(nb.cells)} cells')
    if (n := nb.path.stat().st_size) > WALL['size']:
        out.append(f'{n / 1e6:.1f} MB')
    return out


def prose(nb):
    "As many words as lines of code, at the least"
    lines, words = (
        sum(len(c.lines) for c in nb.code),
        sum(len(c.source.split()) for c in nb.cells if c.kind == 'markdown'),
    )
    return (
        [f'{words / lines:.2f} words of prose a line of code']
        if lines and words / lines < WALL['prose']
        else []
    )


CHECK = re.compile(r'\b(assert|test_\w+|expect_\w+|assert_close|raises)\b')


def checks(nb):
    "Nine exported definitions in ten are followed within three cells by a check"
    defining = [
        i
        for i, c in enumerate(nb.cells)
        if c.exported and any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in c.tree.body)
    ]
    bare = [
        i
        for i in defining
        if not any(
            c.kind == 'code' and not c.exported and CHECK.search(c.source)
            for c in nb.cells[i + 1 : i + 5]
        )
    ]
    if not defining or 1 - len(bare) / len(defining) >= WALL['checked']:
        return []
    return [f'cell {nb.cells[i].id} defines and nothing checks it' for i in bare]


def form(nb):
    "Every cell has an id; few are hidden; a cell that imports does nothing else"
    out = [f'a cell without id: {c.source[:40]!r}' for c in nb.cells if not c.id]
    if (n := sum('hide' in c.flags for c in nb.code)) > WALL['hidden']:
        out.append(f'{n} hidden cells')
    for c in nb.exported:
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in c.tree.body]
        if any(imports) and not all(imports):
            out.append(f'cell {c.id} mixes imports with other code')
    return out


def taste(nb):
    "What exported code does not do"
    out = []
    for c in nb.exported:
        for n in ast.walk(c.tree):
            if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names):
                out.append('import *')
            if isinstance(n, (ast.Import, ast.ImportFrom)) and 'fastcore' in ast.unparse(n):
                out.append('imports fastcore')
            if isinstance(n, ast.Assert):
                out.append('assert')
            if isinstance(n, ast.ExceptHandler) and n.type is None:
                out.append('bare except')
            if isinstance(n, ast.Call) and ast.unparse(n.func) == 'sys.exit':
                out.append('sys.exit')
            if isinstance(n, ast.Call) and ast.unparse(n.func) == 'print':
                out.append('print')
            if (
                isinstance(n, ast.Call)
                and ast.unparse(n.func) == 'torch.load'
                and 'weights_only=True' not in ast.unparse(n)
            ):
                out.append('torch.load that would unpickle')
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if n.args.vararg and n.args.kwarg:
                    out.append(f'{n.name} passes *args, **kwargs through')
                out += untyped(n)
    if 'utils' in (nb.module or ''):
        out.append('a module named utils')
    return list(dict.fromkeys(out))


def untyped(f):
    "Arguments and answers of a function that carry no annotation"
    a = f.args
    named = [
        x
        for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        if x and x.arg not in ('self', 'cls')
    ]
    out = [f'{f.name}({x.arg}) has no type' for x in named if x.annotation is None]
    if f.returns is None and not (f.name.startswith('__') and f.name.endswith('__')):
        out.append(f'{f.name} does not say what it returns')
    return out


PRIVATE = re.compile(r'(?<![\w.:/])/(?:home|root|Users|work|tmp|opt|mnt|private|var)/[\w.-]')


def outputs(nb):
    "Stored outputs hold no error, no missing command, no absolute path and no host name"
    out, host = [], socket.gethostname()
    for c in nb.code:
        if any(o['output_type'] == 'error' for o in c.outputs):
            out.append(f'cell {c.id} ended in an error')
        text = json.dumps(
            [
                {
                    k: v
                    for k, v in o.get('data', {'text': o.get('text', '')}).items()
                    if not k.startswith('image/')
                }
                for o in c.outputs
            ]
        )
        if PRIVATE.search(text):
            out.append(f'cell {c.id} shows a path of this machine: {PRIVATE.search(text)[0]}')
        if 'command not found' in text:
            out.append(f'cell {c.id} called a command that was not there')
        if len(host) > 3 and host in text:
            out.append(f'cell {c.id} names the host')
    return out


def imports(nb):
    "House modules that exported code imports, at module level or inside functions"
    mods = set()
    for c in nb.exported:
        for n in ast.walk(c.tree):
            if isinstance(n, ast.ImportFrom) and (n.module or '').startswith(LIB):
                base = n.module.removeprefix(LIB).lstrip('.')
                mods |= {base} if base else {a.name for a in n.names}
    return mods


NAMED = re.compile(r'`(?:nbs/)?((?:\d\d|t\d)_[\w.]+?)(?:\.ipynb)?`')


def dead(text, nbs):
    "Notebooks that prose names in backticks and that are not there"
    there = {n.path.stem for n in nbs}
    return [name for name in NAMED.findall(text) if name not in there]


FORBIDDEN = {
    4: {5, 6, 7, 8},
    5: {6, 7, 8},
    6: {4, 5, 7, 8},
    7: {4, 5, 8},
}  # floors that a floor must not import


def order(nbs):
    "A file's name is its module; imports point down; floors keep their distance"
    out, number = [], {n.module: n.number for n in nbs}
    file = {n.module: n.path.name for n in nbs}
    for n in nbs:
        if n.module != n.path.stem.split('_', 1)[1]:
            out.append(f'{n.path.name} exports {n.module!r}')
        for m in imports(n):
            if m not in number:
                out.append(f'{n.path.name} imports {m!r}, which no notebook exports')
            elif file[m] >= n.path.name:
                out.append(f'{n.path.name} imports {m!r}, which stands above it')
            elif number[m] // 10 in FORBIDDEN.get(n.number // 10, ()):
                out.append(f'{n.path.name} imports {m!r} across a forbidden edge')
    if len(number) != len(nbs):
        out.append('two notebooks export one module')
    return out


def names(nbs, public):
    "No module bears the name of a package of ours or of a public name"
    mods = {n.module for n in nbs}
    packages = {m.split('.')[0] for m in mods if '.' in m}
    tops = {m.split('.')[0] for m in mods}
    return [f'{m} is a module and a package' for m in mods & packages] + [
        f'{m} is a module and a public name' for m in tops & set(public)
    ]
