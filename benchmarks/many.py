"""Many adapters in one command: against as many single commands, and with processes killed in the middle

`python benchmarks/many.py` measures 1,000 tiny adapters, half of the single commands before and half after them.
`python benchmarks/many.py --kill 300` kills workers, then whole commands, and compares the results byte by byte."""
import argparse, filecmp, json, random, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import psutil, torch
from safetensors.torch import load_file, save_file
from lorasuite.core.files import data_dir

SINGLE = 10

def make_adapters(folder, count):
    "Copies of the tiny adapter, each with other numbers"
    source = data_dir()/'zoo'/'adapter'
    tensors = load_file(source/'adapter_model.safetensors')
    for i in range(count):
        one = folder/f'adapter{i:04}'
        shutil.copytree(source, one)
        g = torch.Generator().manual_seed(i)
        changed = {key: t + .01*t.std()*torch.randn(t.shape, generator=g) for key, t in tensors.items()}
        save_file(changed, one/'adapter_model.safetensors', metadata={'format': 'pt'})

def command(*args): return [sys.executable, '-m', 'lorasuite.cli', *map(str, args)]

def cost(*args, status=0):
    "Seconds and CPU seconds of one command"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command(*args), capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-2000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, x) - getattr(before, x) for x in ('ru_utime', 'ru_stime'))
    return dict(seconds=time.perf_counter() - start, cpu=cpu)

def same(folder, other):
    "Do two directories hold the same files, byte by byte?"
    names = [{p.relative_to(f).as_posix() for p in f.rglob('*') if p.is_file()} for f in (folder, other)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(folder, other, names[0], shallow=False)[1:])

def mean(costs): return {name: sum(c[name] for c in costs)/len(costs) for name in costs[0]}

def load_test(work, count, jobs):
    "One command for all against single commands, in turn"
    def single(i):
        found = cost('transfer', work/'adapters'/f'adapter{i:04}', work/'alignment', '-o', work/f'single{i}')
        print(f'single {i}: {found}', file=sys.stderr)
        return found
    singles = [single(i) for i in range(SINGLE//2)]
    many = cost('transfer', f'{work}/adapters/*', work/'alignment', '-o', work/'many', '--jobs', jobs, '--json')
    again = cost('transfer', f'{work}/adapters/*', work/'alignment', '-o', work/'many', '--jobs', jobs, '--json')
    singles += [single(i) for i in range(SINGLE//2, SINGLE)]
    equal = all(same(work/f'single{i}', work/'many'/f'adapter{i:04}') for i in range(SINGLE))
    one = mean(singles)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024
    ratios = {name: one[name]*count/many[name] for name in ('seconds', 'cpu')}
    return dict(adapters=count, jobs=jobs, single=one, many=many, second_run=again, largest_process_mb=largest,
                ratios=ratios, equal=equal)

def workers_of(process):
    "The worker processes of a command"
    def with_spawn(p): return 'multiprocessing.spawn' in ' '.join(p.cmdline())
    try: return [p for p in process.children(recursive=True) if with_spawn(p)]
    except psutil.Error: return []

def kill_one(process, draw):
    "Kill a worker of a command, if it has any"
    found = workers_of(process)
    if found: draw.choice(found).kill()
    return bool(found)

def wait_for(out, count):
    "Wait until so many results are there"
    while len([*out.glob('adapter*')]) < count: time.sleep(.05)

def start(work, out, jobs):
    "A command in the background"
    args = command('transfer', f'{work}/adapters/*', work/'alignment', '-o', out, '--jobs', jobs, '--json')
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def kill_workers(work, count, jobs, draw):
    "Kill workers all along one command"
    out, killed = work/'workers', 0
    run = start(work, out, jobs)
    for step in range(1, 6):
        wait_for(out, step*count//7)
        killed += kill_one(psutil.Process(run.pid), draw)
    said, _ = run.communicate()
    report = json.loads(said)
    again = json.loads(start(work, out, jobs).communicate()[0])
    return dict(killed=killed, status=run.returncode, carried=report['carried'], failed=report['failed'],
                carried_by_second_run=again['carried'])

def kill_commands(work, count, jobs):
    "Kill the whole command three times, then let it end"
    out, left = work/'commands', []
    for step in (1, 2, 3):
        run = start(work, out, jobs)
        wait_for(out, step*count//4)
        workers = workers_of(psutil.Process(run.pid))
        run.kill()
        run.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        left.append(len(alive))
    report = json.loads(start(work, out, jobs).communicate()[0])
    return dict(workers_left=left, kept=report['kept'], carried=report['carried'], failed=report['failed'])

def equal_results(reference, out, count):
    "Are all results of two runs there, and the same?"
    names = [sorted(p.name for p in folder.iterdir() if p.name not in ('report.json', '.claims'))
             for folder in (reference, out)]
    return len(names[0]) == count and names[0] == names[1] and all(same(reference/n, out/n) for n in names[0])

def kill_test(work, count, jobs):
    "Results after killing, against those of an uninterrupted run"
    cost('transfer', f'{work}/adapters/*', work/'alignment', '-o', work/'reference', '--jobs', jobs, '--json')
    found = dict(adapters=count, jobs=jobs, workers=kill_workers(work, count, jobs, random.Random(0)),
                 commands=kill_commands(work, count, jobs))
    for name in ('workers', 'commands'): found[name]['equal'] = equal_results(work/'reference', work/name, count)
    return found

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--count', type=int, default=1000, help='adapters of the load test')
    parser.add_argument('--kill', type=int, default=0, metavar='COUNT', help='kill processes among so many adapters')
    parser.add_argument('--jobs', type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        work = Path(d)
        make_adapters(work/'adapters', args.kill or args.count)
        cost('align', 'zoo/old', 'zoo/new', '-o', work/'alignment')
        found = kill_test(work, args.kill, args.jobs) if args.kill else load_test(work, args.count, args.jobs)
        print(json.dumps(found, indent=1))
