"""8-bit and 4-bit bases"""
import os, subprocess, sys
from pathlib import Path
import pytest

BITSANDBYTES = Path(sys.prefix)/'bitsandbytes' # where `make` installs it, out of the way of everything else

@pytest.mark.skipif(not BITSANDBYTES.is_dir(), reason='bitsandbytes is installed by `make`, on Linux')
@pytest.mark.parametrize('bits, bound', [('load_in_8bit', .03), ('load_in_4bit', .3)])
def test_quantised_bases(bits, bound):
    here = Path(__file__).parent
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(BITSANDBYTES), str(here)]), OMP_NUM_THREADS='1')
    command = [sys.executable, here/'quantised.py', bits, str(bound)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert 'carried' in run.stdout and 'trained' in run.stdout, run.stderr[-3000:]
