"""How long the command takes to start, as ratios to the imports that it cannot do without; run it on an idle machine"""
import json, statistics, subprocess, sys, time
from importlib.resources import files

ZOO = files('lorasuite')/'data'/'zoo'
REPEATS = 9

def imports(*names): return ['-c', f'import {", ".join(names)}']
def lorasuite(*args): return ['-m', 'lorasuite.cli', *map(str, args)]

PAIRS = { # what is measured: a command, what it is compared with, the largest ratio that we allow
    'lorasuite --help': (lorasuite('--help'), imports('typer'), 1.5),
    'lorasuite finetune --help': (lorasuite('finetune', '--help'), imports('typer', 'pydantic'), None),
    'import lorasuite': (imports('lorasuite'), ['-c', 'pass'], None),
    'lorasuite inspect OLD NEW': (lorasuite('inspect', ZOO/'old', ZOO/'new'),
                                  imports('torch', 'transformers', 'peft'), 1.25),
}

def seconds(args):
    "How long a fresh Python takes"
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start

def ratio(args, other):
    "A command against another, each in turn; the first run of both only fills the file cache"
    pairs = [(seconds(args), seconds(other)) for _ in range(REPEATS + 1)][1:]
    each = sorted(a/b for a, b in pairs)
    medians = [statistics.median(times) for times in zip(*pairs)]
    return dict(ratio=medians[0]/medians[1], lowest=each[0], highest=each[-1], seconds=medians[0], reference=medians[1])

def table(found):
    "The ratios for people"
    head = f'{"":28}{"ratio":>7}{"lowest":>8}{"highest":>9}{"allowed":>9}   compared with'
    allowed = lambda r: '' if r['allowed'] is None else f"{r['allowed']:.2f}"
    rows = [f"{name:28}{r['ratio']:7.2f}{r['lowest']:8.2f}{r['highest']:9.2f}{allowed(r):>9}   {r['compared_with']}"
            for name, r in found.items()]
    return '\n'.join([head, *rows])

if __name__ == '__main__':
    found = {}
    for name, (args, other, allowed) in PAIRS.items():
        found[name] = ratio(args, other) | dict(allowed=allowed, compared_with=other[1], repeats=REPEATS)
    print(table(found), file=sys.stderr)
    print(json.dumps(found, indent=1))
