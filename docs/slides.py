"Slides of the tutorials, from their built pages: one for each heading and each cell below it."

import copy
import shutil
from importlib.util import find_spec
from pathlib import Path

from bs4 import BeautifulSoup

REVEAL = ['dist/reveal.css', 'dist/reveal.js', 'dist/theme/white.css', 'LICENSE']
FONTS = 'dist/theme/fonts/source-sans-pro'
MOST_LINES = 12  # of code above a picture
HEADINGS = ('h1', 'h2', 'h3', 'h4')
TEMPLATE = Path(__file__).parent / 'templates' / 'slides.html'


def reveal_folder():
    "Where `sphinx-revealjs` keeps its copy of reveal.js"
    package = Path(find_spec('sphinx_revealjs').origin).parent
    return package / '_static' / 'revealjs'


def copy_reveal(out):
    "The files of reveal.js that slides need"
    source, target = reveal_folder(), out / '_static' / 'reveal'
    for name in REVEAL:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    shutil.copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)


def has_long_code(block):
    "Whether a cell shows a picture below so much code that it needs a slide of its own"
    code = block.select_one('div.cell_input') if is_cell(block) else None
    picture = block.select_one('div.cell_output img') if code else None
    return picture is not None and code.get_text().count('\n') > MOST_LINES


def cell_parts(cell):
    "Code and output of a cell as two cells"
    for dropped in ('output', 'input'):
        part = copy.copy(cell)
        part.select_one(f'div.cell_{dropped}').decompose()
        yield part


def blocks(node):
    "Parts of a page in reading order: headings and what stands below them"
    for child in node.find_all(recursive=False):
        if child.name == 'section':
            yield from blocks(child)
        elif child.get('class') != ['page-links']:
            yield from cell_parts(child) if has_long_code(child) else [child]


def is_cell(block):
    return 'cell' in (block.get('class') or [])


def split_slides(parts):
    "Lists of parts: a slide ends after a cell and before a heading"
    slide = []
    for block in parts:
        if block.name in HEADINGS and slide:
            yield slide
            slide = []
        slide.append(block)
        if is_cell(block):
            yield slide
            slide = []
    if slide:
        yield slide


def clean(block):
    "A copy of a part without signs that only a page needs"
    block = copy.copy(block)
    for sign in block.select('a.headerlink, span.cell-anchor'):
        sign.decompose()
    for node in [block, *block.find_all(id=True)]:
        node.attrs.pop('id', None)
    return block


def slide_html(parts):
    return f'<section><div class="slide">{"".join(str(clean(p)) for p in parts)}</div></section>'


def stacks(slides):
    "Slides in stacks: a heading of the second rank begins a new one"
    found = []
    for slide in slides:
        if slide[0].name in ('h1', 'h2') or not found:
            found.append([])
        found[-1].append(slide)
    return found


def deck(text):
    "The slides of a built page, as a page"
    soup = BeautifulSoup(text, 'html.parser')
    article = soup.select_one('article.bd-article')
    found = stacks(split_slides(list(blocks(article))))
    body = '\n'.join(f'<section>{"".join(map(slide_html, stack))}</section>' for stack in found)
    title = article.find('h1').get_text().rstrip('#')
    return TEMPLATE.read_text(encoding='utf-8').replace('{title}', title).replace('{body}', body)


def write_slides(out, names):
    "A deck beside the page of each notebook"
    copy_reveal(out)
    for name in names:
        page = out / f'{name}.html'
        target = page.with_suffix('.slides.html')
        target.write_text(deck(page.read_text(encoding='utf-8')), encoding='utf-8')
