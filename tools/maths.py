"Draw the formulas of HTML pages as MathML, which needs neither a script nor the network."
import html, json, re, sys

import pypandoc

formula = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.DOTALL)

def block(kind, tex):
    "A formula in the terms of pandoc"
    return dict(t='Plain', c=[dict(t='Math', c=[dict(t=f'{kind.title()}Math'), html.unescape(tex)])])

def mathml(formulas):
    "MathML of each (kind, TeX) in `formulas`"
    doc = {'pandoc-api-version': [1,23,1], 'meta': {}, 'blocks': [block(*f) for f in formulas]}
    options = ['--mathml', '--fail-if-warnings']
    try: out = pypandoc.convert_text(json.dumps(doc), 'html', format='json', extra_args=options)
    except RuntimeError as error: sys.exit(str(error))
    out = out.replace('<mo accent="true">\u0302</mo>', '<mo accent="true" stretchy="false">\u0302</mo>')
    return re.findall(r'<math.*?</math>', out, re.DOTALL)

def draw_formulas(texts):
    "Replace the TeX in the HTML `texts` by MathML"
    found = sorted({f for text in texts for f in formula.findall(text)})
    drawn = dict(zip(found, mathml(found), strict=True))
    return [formula.sub(lambda m: drawn[m.groups()], text) for text in texts]
