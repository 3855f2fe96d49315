"The library as the site shows it: settings, modules and definitions, read from the source."

import ast
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / 'nbs'
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def read_settings():
    "The section of settings.ini"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


SETTINGS = read_settings()
LIB = SETTINGS['lib_path']
REPOSITORY = f'https://github.com/{SETTINGS["user"]}/{SETTINGS["repo"]}'


def repository_url(path, lines=''):
    "The page of the repository that shows a file or a folder of it"
    kind = 'tree' if (ROOT / path).is_dir() else 'blob'
    return f'{REPOSITORY}/{kind}/{SETTINGS["branch"]}/{path}{lines}'


@dataclass(frozen=True)
class Module:
    name: str  # inside the library: `blocks.repmixer`

    @property
    def path(self):
        return ROOT / LIB / f'{self.name.replace(".", "/")}.py'

    @property
    def full(self):
        return f'{LIB}.{self.name}'

    @cached_property
    def text(self):
        return self.path.read_text(encoding='utf-8')

    @cached_property
    def lines(self):
        return self.text.splitlines()

    @cached_property
    def tree(self):
        return ast.parse(self.text)

    @cached_property
    def public(self):
        "Names of `__all__`, in the order of the source"
        return next((ast.literal_eval(n.value) for n in assignments(self.tree, '__all__')), [])

    @cached_property
    def definitions(self):
        "Public functions and classes by name"
        found = {n.name: n for n in self.tree.body if isinstance(n, DEFINITIONS)}
        return {name: found[name] for name in self.public if name in found}

    @cached_property
    def values(self):
        "Public names that are assigned, and the statements that do it"
        names = [name for name in self.public if name not in self.definitions]
        found = {name: assignments(self.tree, name) for name in names}
        return {name: statements[0] for name, statements in found.items() if statements}

    def cell_of(self, node):
        "The id of the notebook's cell that a definition comes from, or an empty string"
        heads = [line for line in self.lines[: node.lineno] if line.startswith('# %% ../')]
        return heads[-1].rsplit('#', 1)[1] if heads else ''


def assignments(tree, name):
    "Statements at the top of a module that assign a name"
    found = []
    for node in tree.body:
        targets = getattr(node, 'targets', [getattr(node, 'target', None)])
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            found.append(node)
    return found


def methods(node):
    "Public methods and properties of a class, `forward` and calls among them"
    own = [n for n in node.body if isinstance(n, DEFINITIONS[:2])]
    return [n for n in own if not n.name.startswith('_') or n.name == '__call__']


def public_names(modules):
    "Where names lead: a public name, with its class or module before it, to its full name"
    found = {}
    for m in modules:
        found |= {name: m.full for name in (m.full, m.name) if '.' in name}
        for name in [*m.definitions, *m.values]:
            full = f'{m.full}.{name}'
            found |= {shown: full for shown in (name, f'{m.name}.{name}', full)}
            found[f'{m.name.rsplit(".", 1)[-1]}.{name}'] = full
        for name, node in m.definitions.items():
            own = methods(node) if isinstance(node, ast.ClassDef) else []
            found |= {f'{name}.{n.name}': f'{m.full}.{name}.{n.name}' for n in own}
    there = {m.name for m in modules}
    front = {k: home for k, home in front_names().items() if home in there}
    return found | {f'{LIB}.{name}': f'{LIB}.{home}.{name}' for name, home in front.items()}


def front_names():
    "Names of the library itself and the modules that hold them, from its `__init__.py`"
    tree = ast.parse((ROOT / LIB / '__init__.py').read_text(encoding='utf-8'))
    (table,) = assignments(tree, '_HOME')
    return {k.arg: ast.literal_eval(k.value) for k in table.value.keywords}


def source_lines(full_name, modules):
    "The path and the lines of a definition, such as `mobileclip_nb/blocks/ffn.py#L3-L9`"
    for m in modules:
        if full_name.startswith(f'{m.full}.'):
            node = find_node(m, full_name.removeprefix(f'{m.full}.').split('.'))
            if node is not None:
                return (
                    f'{m.path.relative_to(ROOT).as_posix()}',
                    f'#L{node.lineno}-L{node.end_lineno}',
                )
    return None


def find_node(module, names):
    "A definition, a method or an assignment of a module"
    node = module.definitions.get(names[0]) or module.values.get(names[0])
    if node is None or len(names) == 1:
        return node
    return next((n for n in methods(node) if n.name == names[1]), None)
