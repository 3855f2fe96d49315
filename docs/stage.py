"The source tree of the site: notebooks without hidden cells, and the pages between them."

import ast, json, re, shutil, sys
from dataclasses import dataclass, field

import api_pages
from library import LIB, NBS, REPOSITORY, ROOT, SETTINGS, Module, public_names, repository_url
from prose import link_names, names_here, title_and_summary

sys.path.insert(0, str(ROOT / 'tests'))
import design

DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
NOTEBOOK = re.compile(r'\(((?:\w+/)?\w+)\.ipynb\)')
WIDGET = 'application/vnd.jupyter.widget-view+json'
TITLES = {'ablations': 'Ablations', 'apps': 'Apps', 'tutorials': 'Tutorials'}
ABOUT = {
    'ablations': "Claims of the papers' tables as questions, their price, and what was run here.",
    'apps': 'Pages for a browser: how to start them and what to look for.',
    'tutorials': 'The course: short notebooks that run offline on a laptop.',
}


@dataclass
class Site:
    "What is shown: notebooks by name, modules, and names that become links"

    notebooks: dict
    modules: list
    main_path: list
    names: dict = field(default_factory=dict)

    def __post_init__(self):
        self.names = public_names(self.modules)

    def own_names(self, nb):
        "Names of a notebook's own module: `main` stands in several"
        modules = [m for m in self.modules if m.name == nb.module]
        return {name: f'{m.full}.{name}' for m in modules for name in m.definitions}

    def has(self, file):
        "Whether a file stands in the source tree of the site"
        if file.suffix == '.ipynb':
            return file in {n.path for n in self.notebooks.values()}
        return file.is_relative_to(NBS / 'images') and file.is_file()

    @property
    def home(self):
        "The notebook of each module"
        return {n.module: n.name for n in self.notebooks.values() if n.module}


def is_main_table(text):
    "Whether an output of the index is its table of the main path"
    return text.startswith('| notebook | paper')


def main_table():
    "The table of the main path as the index shows it"
    cells = design.Notebook(NBS / 'index.ipynb').code
    texts = [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.outputs]
    return next(text for text in texts if is_main_table(text.lstrip()))


def read_site(only=None):
    "The site of all notebooks, or of some"
    found = {n.name: n for n in design.notebooks() if only is None or n.name in only}
    modules = [Module(n.module) for n in found.values() if n.module]
    path = [name for name in NOTEBOOK.findall(main_table()) if name in found]
    return Site(found, [m for m in modules if m.path.is_file()], list(dict.fromkeys(path)))


# --- notebooks -----------------------------------------------------------------------------------


def imported_names(nb):
    "Names that the cells of a notebook define or import from the library"
    known = set()
    for cell in nb.code:
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.ImportFrom) and (
                node.level or f'{node.module}.'.startswith(LIB)
            ):
                known |= {a.name for a in node.names}
    return known | {d.name for d in nb.definitions}


def is_shown(cell):
    "Whether the site shows a cell: it has content and does not ask to be hidden"
    text = ''.join(cell['source'])
    hidden = re.search(r'^#\|\s*hide\b', text, re.M)
    return not hidden and (DIRECTIVE.sub('', text).strip() or cell.get('outputs'))


def shown_output(output, convert):
    "An output as the site shows it, or None: a widget is shown by its picture"
    data = dict(output.get('data', {}))
    if WIDGET in data:
        del data[WIDGET]
        if not any(kind.startswith('image/') for kind in data):
            return None
    if 'text/markdown' in data:
        data['text/markdown'] = convert(''.join(data['text/markdown']))
    return output | ({'data': data} if data else {})


def code_cell(cell, convert):
    "A code cell without directives; `echo: false` hides its source"
    source = ''.join(cell['source'])
    tags = ['exported'] if re.search(r'^#\|\s*export', source, re.M) else []
    tags += ['remove-input'] if re.search(r'^#\|\s*echo:\s*false', source, re.M) else []
    outputs = [shown_output(o, convert) for o in cell['outputs']]
    new = cell | dict(source=DIRECTIVE.sub('', source).strip('\n'), metadata=dict(tags=tags))
    return new | dict(outputs=[o for o in outputs if o is not None])


def markdown(text):
    return dict(cell_type='markdown', metadata={}, source=text)


def anchor(cell):
    "The place that a link from the API leads to"
    return markdown(f'<span class="cell-anchor" id="cell-{cell["id"]}"></span>')


def shown_cells(nb, convert):
    "The cells of a notebook as the site shows them; `convert` changes Markdown"
    cells = json.loads(nb.path.read_text(encoding='utf-8'))['cells']
    for cell in filter(is_shown, cells):
        if cell['cell_type'] == 'markdown':
            yield markdown(convert(''.join(cell['source'])))
        elif cell['cell_type'] == 'code':
            new = code_cell(cell, convert)
            if 'exported' in new['metadata']['tags']:
                yield anchor(cell)
            yield new


def launch_links(nb):
    "Links of a tutorial: its slides, and where it runs without an installation"
    path = nb.path.relative_to(ROOT).as_posix()
    place = f'{SETTINGS["user"]}/{SETTINGS["repo"]}'
    branch = SETTINGS['branch']
    return {
        'Slides': f'{nb.path.stem}.slides.html',
        'Colab': f'https://colab.research.google.com/github/{place}/blob/{branch}/{path}',
        'Binder': f'https://mybinder.org/v2/gh/{place}/{branch}?urlpath=lab/tree/{path}',
    }


def page_links(nb, site):
    "A line of links below the title of a notebook"
    up = '../' * nb.name.count('/')
    there = {m.name for m in site.modules}
    links = {'API': f'{up}api/{nb.module}.html'} if nb.module in there else {}
    links |= {'Notebook on GitHub': repository_url(nb.path.relative_to(ROOT).as_posix())}
    links |= launch_links(nb) if nb.package == 'tutorials' else {}
    shown = ' · '.join(f'<a href="{url}">{text}</a>' for text, url in links.items())
    note = colab_note() if nb.package == 'tutorials' else ''
    return markdown(f'<p class="page-links">{shown}</p>{note}')


def colab_note():
    "What a page on Colab needs first"
    binder = (ROOT / '.binder' / 'requirements.txt').read_text(encoding='utf-8')
    extras = re.search(r'\[(.+)\]', binder)[1]
    command = f'%pip install "{LIB}[{extras}] @ git+{REPOSITORY}"'
    return f'<p class="page-links">On Colab, run this first: <code>{command}</code></p>'


def below_summary(cells, new):
    "Cells with another one below the title and the summary"
    text = cells[0]['source']
    head = re.match(r'# .+\n*(?:>.*\n?)*', text)[0]
    rest = text[len(head) :]
    return [markdown(head), new, *([markdown(rest)] if rest.strip() else []), *cells[1:]]


def stage_notebook(nb, site, folder):
    "Write a notebook as the site shows it"
    names = names_here(site.names, imported_names(nb)) | site.own_names(nb)

    def convert(text):
        return link_names(text, names, nb.path, site.has)

    cells = list(shown_cells(nb, convert))
    if nb.name == 'index':
        cells.append(markdown(root_toctree(site)))
    else:
        cells = below_summary(cells, page_links(nb, site))
    meta = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    meta |= dict(language_info=dict(name='python', pygments_lexer='ipython3'))
    raw = dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)
    for k, cell in enumerate(cells):
        cell['id'] = f'c{k}'
    write(folder / f'{nb.name}.ipynb', json.dumps(raw))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


# --- tables of contents --------------------------------------------------------------------------


def guide_folders():
    "Folders of notebooks that export nothing, in the order of the design"
    return [name.rstrip('/') for name in design.GUIDES if name.endswith('/')]


def packages():
    "All packages, from the lowest layer up"
    return [package for layer in design.LAYERS for package in layer]


def root_toctree(site):
    "The parts of the site"
    first, *others = [f for f in guide_folders() if members(site, f)]
    return api_pages.toctree([first, 'papers', *others, 'engineering', 'api'])


def members(site, package):
    "Notebooks of a folder, in order"
    return sorted(n.name for n in site.notebooks.values() if n.package == package)


def summary(nb):
    return title_and_summary(nb.prose[0].source if nb.prose else '')


def rows(site, names, up=''):
    "A row for each notebook: title and summary"
    for name in names:
        title, text = summary(site.notebooks[name])
        number = f'`{name}`'
        text = text.replace('|', '\\|')
        yield [f'[{title}]({up}{name}.ipynb)', text, number]


def list_page(site, title, about, names, up='', entries=None):
    "A page that lists notebooks"
    table = api_pages.table(['notebook', 'what it shows', 'name'], list(rows(site, names, up)))
    tree = api_pages.toctree([up + name for name in (names if entries is None else entries)])
    return '\n\n'.join([f'# {title}', about, table, tree])


def guide_page(site, folder):
    "The page of a folder of guides; the demo stands with the tutorials"
    names = members(site, folder)
    if folder == guide_folders()[0]:
        names += [name for name in ('demo',) if name in site.notebooks]
    title = TITLES.get(folder, folder.replace('_', ' ').capitalize())
    return list_page(site, title, ABOUT.get(folder, ''), names)


def papers_page(site):
    "The main path as the index lists it"
    about = 'The main path: notebooks that follow both papers (1: MobileCLIP, 2: MobileCLIP2).'
    tree = api_pages.toctree(site.main_path)
    text = main_table().strip()
    shown = [
        line
        for line in text.split('\n')
        if not NOTEBOOK.search(line) or NOTEBOOK.search(line)[1] in site.notebooks
    ]
    return '\n\n'.join(['# The papers', about, '\n'.join(shown), tree])


def package_about(package):
    "What a package holds, from the table of CONTRIBUTING.md"
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    found = re.search(rf'^\| `{package}` \| (.+) \|$', text, re.M)
    return found[1][0].upper() + found[1][1:] + '.' if found else ''


def package_page(site, package):
    "The page of a package: all its notebooks; those of the main path stand in its own contents"
    names = members(site, package)
    own = [name for name in names if name not in site.main_path]
    about = f'{package_about(package)}\n\n[API of this package](../api/{package}.md)'
    return list_page(site, package, about, names, '../', own)


def engineering_page(site, shown):
    "Packages by layer"
    lines = [
        f'| {k} | ' + ' · '.join(f'[{p}](packages/{p}.md)' for p in layer if p in shown) + ' |'
        for k, layer in enumerate(design.LAYERS, 1)
    ]
    table = '\n'.join(['| layer | packages |', '| --- | --- |', *reversed(lines)])
    about = 'A package imports from lower layers only. The main path: [the papers](papers.md).'
    first = ['design'] if 'design' in site.notebooks else []
    tree = api_pages.toctree([*first, *[f'packages/{p}' for p in shown]])
    return '\n\n'.join(['# Engineering', about, table, tree])


def api_tree(site, shown):
    "Pages of the API by path"
    pages = {}
    for m in site.modules:
        here = names_here(site.names, set(m.public))
        pages[f'api/{m.name}'] = api_pages.module_page(m, here, site.home.get(m.name))
    for package in shown:
        inside = [m for m in site.modules if package_of(m, site) == package]
        pages[f'api/{package}'] = api_pages.package_page(package, inside)
    return pages | {'api': api_pages.front_page(shown, site.modules, site.names)}


def package_of(module, site):
    "The package whose notebook exports a module"
    return site.home[module.name].split('/')[0]


def pages_between(site):
    "All pages that no notebook is, by path"
    shown = [p for p in packages() if members(site, p)]
    pages = {folder: guide_page(site, folder) for folder in guide_folders()}
    pages = {folder: text for folder, text in pages.items() if members(site, folder)}
    pages |= {f'packages/{p}': package_page(site, p) for p in shown}
    pages |= {'papers': papers_page(site), 'engineering': engineering_page(site, shown)}
    return pages | api_tree(site, shown)


def stage(folder, only=None):
    "Write the source tree of the site and return what it shows"
    shutil.rmtree(folder, ignore_errors=True)
    site = read_site(only)
    for nb in site.notebooks.values():
        stage_notebook(nb, site, folder)
    for path, text in pages_between(site).items():
        write(folder / f'{path}.md', text + '\n')
    shutil.copytree(NBS / 'images', folder / 'images')
    return site
