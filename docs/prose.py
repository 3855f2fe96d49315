"Markdown of notebooks as the site needs it: links to the repository, names as links to the API."

import re
from pathlib import Path

from library import ROOT, repository_url

FENCE = re.compile(r'^\s*(```|~~~)')
HTML = re.compile(r'^\s*</?(details|summary|div|p|table|picture)\b|^\s*<!--')
PART = re.compile(
    r'(?P<link>!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)[^)]*\))'
    r'|(?P<role>\{[\w:]+\}`[^`]*`)'
    r'|(?P<code>(?P<ticks>`+)(?P<name>.+?)(?P=ticks)(?!`))'
)
NAME = re.compile(r'([A-Za-z_][\w.]*)(\(\.{0,3}\))?')


def escape_cell(text):
    "Text for a cell of a table in Markdown"
    return re.sub(r'(?<!\\)\|', r'\\|', text.replace('\n', ' '))


def is_plain(name):
    "A single word in lower case may mean something else than a function"
    return re.fullmatch('[a-z0-9]+', name) is not None


def names_here(names, known):
    "Names that may become links where some names are known, as those that a notebook imports"
    return {k: full for k, full in names.items() if k in known or not is_plain(k)}


def name_link(code, names):
    "A role of Sphinx for a code span that is a public name, or None"
    found = NAME.fullmatch(code)
    if not found or found[1] not in names:
        return None
    return f'{{py:obj}}`{code} <{names[found[1]]}>`'


def site_target(target, path, staged):
    "Where a link of a notebook leads on the site: what is not staged is shown by the repository"
    if re.match(r'\w+:|#', target) or path is None:
        return target
    bare, _, anchor = target.partition('#')
    file = (path.parent / bare).resolve()
    if staged(file):
        return target
    if not file.is_relative_to(ROOT):
        return target
    return repository_url(file.relative_to(ROOT).as_posix()) + (f'#{anchor}' if anchor else '')


def convert_line(line, names, path, staged):
    "One line of prose"

    def convert(match):
        if match['link']:
            return match['link'].replace(
                match['target'], site_target(match['target'], path, staged)
            )
        if match['role']:
            return match['role']
        return name_link(match['name'], names) or match['code']

    return PART.sub(convert, line)


def link_names(text, names, path=None, staged=Path.is_file):
    "Markdown with links for the site; names in headings, blocks of code and HTML stay as they are"
    out, fenced, in_html = [], False, False
    for line in text.split('\n'):
        fence = FENCE.match(line) is not None
        fenced ^= fence
        in_html = bool(line.strip()) and (in_html or HTML.match(line) is not None)
        free = not (fence or fenced or in_html)
        shown = {} if line.startswith('#') else names
        out.append(convert_line(line, shown, path, staged) if free else line)
    return '\n'.join(out)


def title_and_summary(text):
    "The heading and the summary of a notebook's first cell"
    title = re.search(r'^# (.+)$', text, re.M)
    summary = re.search(r'^> (.+)$', text, re.M)
    return (title[1] if title else '', summary[1] if summary else '')
