"What a worker process does in the tests that kill it; it imports nothing heavy"
import os, signal

def start(threads):
    "Prepare nothing"

def carry(job, path):
    "Kill this process at the first attempt at an adapter, or at every attempt at `always`"
    mark = job.out.with_suffix('.tried')
    if not mark.exists() or job.adapter == 'always':
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return dict(adapter=job.adapter, out=str(job.out), status='carried')

def start_third(folder, threads):
    "Kill this process before it does anything, but for every third one"
    tried = len([*folder.glob('start*')])
    (folder/f'start{tried}').touch()
    if tried % 3 < 2: os.kill(os.getpid(), signal.SIGKILL)
