"""Links of a built site: `python docs/crawl.py FOLDER` prints what is wrong.

Faults are dead links, pages that no link leads to, and files that a browser fetches from elsewhere.
"""

import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {
    ('script', 'src'),
    ('img', 'src'),
    ('link', 'href'),
    ('source', 'src'),
    ('iframe', 'src'),
}
SEARCH = 'search.html'  # a form leads there
NOT_FETCHED = {'canonical', 'next', 'prev', 'search', 'index', 'author', 'license'}
CSS_URL = re.compile(r'url\(\s*["\']?([^"\')]+)')
CSS_IMPORT = re.compile(r'@import\s+["\']([^"\']+)')


class Page(HTMLParser):
    "Ids and links of a page; `fetched` are links that a browser follows by itself"

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched, self.in_style = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.in_style = tag == 'style'
        for name in ('href', 'src'):
            if attrs.get(name) and tag != 'base':
                self.links.append(attrs[name])
                is_fetched = (tag, name) in FETCHED and attrs.get('rel') not in NOT_FETCHED
                self.fetched += [attrs[name]] if is_fetched else []
        self.fetched += CSS_URL.findall(attrs.get('style') or '')

    def handle_data(self, data):
        if self.in_style:
            self.fetched += css_links(data)

    def handle_endtag(self, tag):
        self.in_style = self.in_style and tag != 'style'


def css_links(text):
    return [*CSS_URL.findall(text), *CSS_IMPORT.findall(text)]


def is_outside(link):
    parts = urlsplit(link)
    return bool(parts.netloc) or parts.scheme in ('mailto', 'data', 'javascript')


def fault_of_link(link, file, pages, root):
    "Why a link of a file leads nowhere, or an empty string"
    parts = urlsplit(link)
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    target = target / 'index.html' if target.is_dir() else target
    if not target.is_relative_to(root):
        return 'leads out of the site'
    if not target.is_file():
        return 'no such file'
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return 'no such place in the page'
    return ''


def is_fetched_from_elsewhere(link):
    return bool(urlsplit(link).netloc)


def page_faults(file, page, pages, root):
    "Dead links of a page and what it fetches from elsewhere"
    out = []
    for link in dict.fromkeys(page.links):
        fault = '' if is_outside(link) else fault_of_link(link, file, pages, root)
        out += [f'{link}: {fault}'] if fault else []
    out += [f'{x}: fetched from elsewhere' for x in page.fetched if is_fetched_from_elsewhere(x)]
    return out


def css_faults(file, root):
    "Dead links of a style sheet and what it fetches from elsewhere"
    out = []
    for link in css_links(file.read_text(encoding='utf-8')):
        if is_fetched_from_elsewhere(link):
            out.append(f'{link}: fetched from elsewhere')
        elif not is_outside(link) and (fault := fault_of_link(link, file, {}, root)):
            out.append(f'{link}: {fault}')
    return out


def unreached(pages, root):
    "Pages that no chain of links from the first page leads to"
    seen, todo = set(), [root / 'index.html']
    while todo:
        file = todo.pop()
        if file in seen or file not in pages:
            continue
        seen.add(file)
        inside = [unquote(urlsplit(x).path) for x in pages[file].links if not is_outside(x)]
        todo += [(file.parent / path).resolve() for path in inside if path]
    return sorted(set(pages) - seen)


def read_pages(root):
    "All pages of a site by file"
    return {f: Page(f.read_text(encoding='utf-8')) for f in sorted(root.rglob('*.html'))}


def count_links(pages):
    "Links that stay inside the site"
    return sum(not is_outside(link) for page in pages.values() for link in page.links)


def crawl(folder):
    "Number of pages and of links inside, and all faults"
    root = Path(folder).resolve()
    pages = read_pages(root)
    out = []
    for file, page in pages.items():
        name = file.relative_to(root).as_posix()
        out += [f'{name}: {fault}' for fault in page_faults(file, page, pages, root)]
    for file in sorted(root.rglob('*.css')):
        name = file.relative_to(root).as_posix()
        out += [f'{name}: {fault}' for fault in css_faults(file, root)]
    lost = [f.relative_to(root).as_posix() for f in unreached(pages, root)]
    out += [f'{name}: no page leads here' for name in lost if name != SEARCH]
    return len(pages), count_links(pages), out


def main(folder):
    pages, links, found = crawl(folder)
    print(f'{pages} pages, {links} links inside, {len(found)} faults')
    print('\n'.join(found))
    return 1 if found or not pages else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
