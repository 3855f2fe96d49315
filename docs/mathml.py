"Formulas as MathML, which browsers draw themselves: no script, no fonts from elsewhere."

from latex2mathml.converter import convert


def formula(text, display):
    "MathML of a formula in TeX; a prime is a sign of its own"
    return convert(text.replace("'", r'^{\prime}'), display=display)


def visit_inline(self, node):
    self.body.append(formula(node.astext(), 'inline'))
    raise_skip()


def visit_block(self, node):
    self.body.append(f'<div class="math">{formula(node.astext(), "block")}</div>')
    raise_skip()


def raise_skip():
    from docutils import nodes

    raise nodes.SkipNode


def setup(app):
    "An extension of Sphinx: the renderer `mathml`"
    app.add_html_math_renderer('mathml', (visit_inline, None), (visit_block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
