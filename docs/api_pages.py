"Pages of the API: the definitions of each module, with signatures, comments of parameters, links."

import ast, copy, re, sys

from library import LIB, ROOT, front_names, methods, repository_url
from prose import escape_cell, link_names

sys.path.insert(0, str(ROOT))
from mobileclip_nb.core.docstrings import read_fields, read_header

SHOWN = 12  # lines of the value of a constant
UNREAD = (ast.GeneratorExp, ast.ListComp, ast.DictComp, ast.SetComp, ast.Lambda, ast.JoinedStr)
HIDDEN_ARGS = ('self', 'cls')


def first_line(node):
    "The first sentence or line of a docstring"
    return (ast.get_docstring(node) or '').split('\n')[0]


def table(head, rows):
    "A table in Markdown"
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def code(text):
    "Code in a cell of a table; nothing for no text"
    return f'`{escape_cell(text)}`' if text else ''


# --- parameters ----------------------------------------------------------------------------------


def decorators(node):
    return [ast.unparse(d) for d in node.decorator_list]


def arguments(node):
    "Parameters of a function: name as it is shown, annotation, default"
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    found = [(x.arg, x.annotation, d) for x, d in zip(plain, defaults)]
    found += [(f'*{a.vararg.arg}', a.vararg.annotation, None)] if a.vararg else []
    found += [(x.arg, x.annotation, d) for x, d in zip(a.kwonlyargs, a.kw_defaults)]
    found += [(f'**{a.kwarg.arg}', a.kwarg.annotation, None)] if a.kwarg else []
    return [x for x in found if x[0] not in HIDDEN_ARGS]


def is_field(node):
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def fields(node):
    "Fields of a dataclass or a named tuple, as parameters"
    own = [n for n in node.body if is_field(n) and not n.target.id.startswith('_')]
    own = [n for n in own if 'ClassVar' not in ast.unparse(n.annotation)]
    return [(n.target.id, n.annotation, n.value) for n in own]


def comment_above(lines, lineno):
    "Comments that stand alone above a line"
    found = []
    for line in reversed(lines[: lineno - 1]):
        if not line.strip().startswith('# '):
            break
        found.insert(0, line.strip().removeprefix('# '))
    return ' '.join(found)


def field_comments(module, node):
    "Comments of a class's fields, beside or above them"
    found = read_fields(module.lines[node.lineno - 1 :])
    for n in node.body:
        if is_field(n) and n.target.id not in found:
            found[n.target.id] = comment_above(module.lines, n.lineno)
    return found


def parameter_rows(arguments_, comments, names):
    "Rows of a table of parameters"
    for name, annotation, default in arguments_:
        kind = '' if annotation is None else ast.unparse(annotation)
        value = '' if default is None else ast.unparse(default)
        comment = comments.get(name) or comments.get(name.lstrip('*'), '')
        yield [code(name), shown_type(kind, names), code(value), prose_cell(comment, names)]


def shown_type(kind, names):
    "A type; a link where it is a class of ours"
    bare = kind.removesuffix(' | None').strip('\'"')
    if bare in names and bare[0].isupper():
        rest = kind.replace(bare, '', 1)
        return link_names(f'`{bare}`', names) + (f' {code(rest.strip())}' if rest.strip() else '')
    return code(kind)


def prose_cell(text, names):
    return escape_cell(link_names(text.replace('$', '\\$'), names))


def parameter_table(rows):
    "A table of parameters; without a column that is empty"
    head = ['Parameter', 'Type', 'Default', 'Meaning']
    kept = [k for k in range(len(head)) if any(row[k] for row in rows)]
    return table([head[k] for k in kept], [[row[k] for k in kept] for row in rows])


def parameters(arguments_, comments, result, returns, names):
    "The table of parameters and the line on the result"
    rows = list(parameter_rows(arguments_, comments, names))
    parts = [parameter_table(rows)] if rows else []
    if result:
        kind = f'`{returns}`: ' if returns else ''
        parts.append(f'**Returns** {kind}{link_names(result.replace("$", chr(92) + "$"), names)}')
    return parts


# --- definitions ---------------------------------------------------------------------------------


def readable(default):
    "A default that Sphinx can read; `...` stands for a longer expression, which the table shows"
    if default is None or not any(isinstance(n, UNREAD) for n in ast.walk(default)):
        return default
    return ast.Constant(...)


def readable_arguments(args):
    "Parameters of a function with defaults that Sphinx can read"
    new = copy.deepcopy(args)
    new.defaults = [readable(d) for d in new.defaults]
    new.kw_defaults = [readable(d) for d in new.kw_defaults]
    return new


def field_signature(fields_):
    "Parameters of a class whose fields are its parameters"
    shown = [(name, readable(default)) for name, _, default in fields_]
    shown = [n + (f'={ast.unparse(d)}' if d is not None else '') for n, d in shown]
    return f'({", ".join(shown)})'


def signature(node):
    "Parameters in brackets, as Python writes them"
    args = ast.unparse(readable_arguments(node.args))
    args = re.sub(r'^(self|cls)(, /)?(, |$)', '', args)
    returns = f' -> {ast.unparse(node.returns)}' if node.returns else ''
    return f'({args}){returns}'


def doc(node, names):
    return link_names((ast.get_docstring(node) or '').replace('$', '\\$'), names)


def directive(kind, head, body, colons, options=()):
    "A directive of Sphinx's Python domain"
    fence = ':' * colons
    lines = [f'{fence}{{py:{kind}}} {head}', *[f':{option}:' for option in options], '', *body]
    return '\n'.join([*lines, fence, ''])


def function_body(module, node, names):
    "Docstring, parameters and result of a function"
    comments, result = read_header(module.lines[node.lineno - 1 :])
    returns = ast.unparse(node.returns) if node.returns else ''
    rest = parameters(arguments(node), comments, result, returns, names)
    return [part + '\n' for part in [doc(node, names), *rest] if part]


def method_page(module, owner, node, names):
    "One method or property of a class"
    marks = decorators(node)
    head = f'{owner}.{node.name}'
    if any(mark in ('property', 'cached_property') for mark in marks):
        return directive('property', head, function_body(module, node, names), 4)
    options = [o for o in ('classmethod', 'staticmethod') if o in marks]
    head += signature(node)
    return directive('method', head, function_body(module, node, names), 4, options)


def constructor(module, node):
    "Signature, parameters and comments of what makes an object of a class"
    init = next((n for n in node.body if getattr(n, 'name', '') == '__init__'), None)
    if init is not None:
        comments, _ = read_header(module.lines[init.lineno - 1 :])
        return signature(init).split(' -> ')[0], arguments(init), comments
    own = fields(node)
    return field_signature(own) if own else '', own, field_comments(module, node)


def class_body(module, node, names):
    "Docstring, bases, parameters and methods of a class"
    head, own, comments = constructor(module, node)
    bases = ', '.join(link_names(f'`{ast.unparse(b)}`', names) for b in node.bases)
    parts = [doc(node, names), f'Bases: {bases}' if bases else '']
    parts += parameters(own, comments, '', '', names)
    parts += [method_page(module, node.name, n, names) for n in methods(node)]
    return head, [part + '\n' for part in parts if part]


def cell_link(module, node, notebook):
    "A link to the cell of the notebook's page that holds a definition"
    if notebook is None:
        return []
    href = f'../{notebook}.html#cell-{module.cell_of(node)}'
    return [f'<p class="cell-link"><a href="{href}">Explained in {notebook}</a></p>\n']


def definition(module, node, names, notebook):
    "A function or a class"
    link = cell_link(module, node, notebook)
    if isinstance(node, ast.ClassDef):
        head, body = class_body(module, node, names)
        return directive('class', node.name + head, [*body[:1], *link, *body[1:]], 6)
    body = function_body(module, node, names)
    return directive('function', node.name + signature(node), [*body, *link], 6)


def value(module, name, node, names):
    "A constant with the comment beside it"
    own = module.lines[node.lineno - 1 : node.end_lineno]
    left = len(own) - SHOWN
    shown = '\n'.join([*own[:SHOWN], *([f'# and {left} more lines'] if left > 0 else [])])
    line = module.lines[node.lineno - 1]
    comment = line.split('  # ')[1] if '  # ' in line and node.lineno == node.end_lineno else ''
    comment = comment or comment_above(module.lines, node.lineno)
    if comment.startswith(('%%', 'fmt:')):
        comment = ''
    body = [link_names(comment.replace('$', '\\$'), names) + '\n', f'```python\n{shown}\n```\n']
    return directive('data', name, body, 6)


# --- pages ---------------------------------------------------------------------------------------


def module_page(module, names, notebook):
    "The page of a module"
    source = repository_url(module.path.relative_to(ROOT).as_posix())
    links = [f'[Notebook](../{notebook}.ipynb)'] if notebook else []
    links.append(f'[Source]({source})')
    body = [definition(module, n, names, notebook) for n in module.definitions.values()]
    body += [value(module, k, n, names) for k, n in module.values.items()]
    parts = [
        f'# {module.name.replace("__", chr(92) + "_" + chr(92) + "_")}',
        doc(module.tree, names),
    ]
    parts += [' · '.join(links), f'```{{py:module}} {module.full}\n```', *body]
    return '\n\n'.join(parts)


def module_rows(modules):
    "A row for each module: its page and its summary"
    for m in modules:
        yield [f'[`{m.name}`]({m.name}.md)', escape_cell(first_line(m.tree))]


def toctree(entries, title=''):
    "A hidden table of contents"
    caption = [f':caption: {title}'] if title else []
    return '\n'.join(['```{toctree}', ':hidden:', *caption, '', *entries, '```'])


def package_page(package, modules):
    "The page of a package: its modules"
    rows = list(module_rows(modules))
    parts = [f'# {package}', table(['module', 'what it holds'], rows)]
    return '\n\n'.join([*parts, toctree([m.name for m in modules])])


def front_page(packages, modules, names):
    "The first page of the API: names of the library itself, then the packages"
    by_name = {m.name: m for m in modules}
    rows = []
    for name, home in sorted(front_names().items()):
        if home not in by_name:
            continue
        node = by_name[home].definitions.get(name)
        text = prose_cell(first_line(node), names) if node is not None else ''
        rows.append([link_names(f'`{LIB}.{name}`', names), text])
    listed = ', '.join(f'[`{p}`](api/{p}.md)' for p in packages)
    parts = [
        '# API',
        f'Names of `{LIB}` itself; {{ref}}`all names <genindex>`, {{ref}}`all modules <modindex>`.',
    ]
    parts += [table(['name', 'what it does'], rows), f'## Packages\n\n{listed}']
    return '\n\n'.join([*parts, toctree([f'api/{p}' for p in packages])])
