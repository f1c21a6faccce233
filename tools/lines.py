"Give every line of the code on a page an element of its own, so that a wrapped line can be indented."
import re

block = re.compile(r'(<pre[^>]*><code class="sourceCode[^"]*)("[^>]*>)(.*?)(</code></pre>)', re.DOTALL)
part = re.compile(r'<span[^>]*>|</span>|[^<]+')

def split_lines(markup):
    "Highlighted code as lines in each of which every `<span>` that is opened is closed"
    lines, span = [''], ''
    for token in part.findall(markup):
        if token.startswith('<'): lines[-1], span = lines[-1] + token, token*(token != '</span>')
        else:
            first, *rest = token.split('\n')
            lines[-1] += first
            for text in rest:
                lines[-1] += '</span>' if span else ''
                lines.append(span + text)
    return lines

def indent(line):
    "The number of blanks that a line of markup begins with"
    text = re.sub(r'<[^>]*>', '', line)
    return len(text) - len(text.lstrip(' '))

def element(line): return f'<span class="line" style="--in:{indent(line)}">{line}\n</span>'

def line_up(match):
    "One block of code, a line an element"
    start, attributes, markup, end = match.groups()
    if '<span id="cb' in markup: return match[0] # quarto has done it
    return f'{start} lined{attributes}{"".join(map(element, split_lines(markup)))}{end}'

def line_up_code(text):
    "The page `text` with every line of its code in an element of its own"
    return block.sub(line_up, text)
