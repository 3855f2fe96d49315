"Formulas as MathML, which browsers draw themselves: no script, no fonts from elsewhere."

import re

from docutils import nodes
from latex2mathml.converter import convert

DOUBLED = re.compile(r'\\\\[A-Za-z]')
PRIME = '&#x02032;'
MINUS = '&#x02212;'
PRIMED = re.compile(rf'<msup>(<mi>[^<]*</mi>)<mi>{PRIME}</mi></msup>')
SIGN = re.compile(rf'(<mo[^>]*>(?:&#x00028;|&#x0003D;|[(\[=,]|,)</mo>)<mo>{MINUS}</mo>')


def formula(text, display):
    """MathML of a formula in TeX

    A minus after a bracket is a sign, not a difference. A prime is no superscript: fonts raise it.
    """
    if DOUBLED.search(text) and r'\begin' not in text:
        raise ValueError(f'the formula {text!r} has doubled backslashes')
    made = convert(text.replace(r'\operatorname', r'\mathrm'), display=display)
    made = PRIMED.sub(rf'<mrow>\1<mo class="prime" lspace="0" rspace="0">{PRIME}</mo></mrow>', made)
    made = made.replace(r'>\|<', '>&#x02016;<')  # after \big the converter leaves the TeX
    if '\\' in re.sub(r'<[^>]*>', '', made):
        raise ValueError(f'the formula {text!r} keeps a command of TeX: {made}')
    return SIGN.sub(rf'\1<mo form="prefix">{MINUS}</mo>', made)


def visit_inline(self, node):
    self.body.append(formula(node.astext(), 'inline'))
    raise nodes.SkipNode


def visit_block(self, node):
    self.body.append(f'<div class="math">{formula(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    "An extension of Sphinx: the renderer `mathml`"
    app.add_html_math_renderer('mathml', (visit_inline, None), (visit_block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
