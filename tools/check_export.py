"Stop if lorasuite/ is not what `nbdev_export` makes of nbs/."
import subprocess, sys
from pathlib import Path
from shutil import copy, copytree
from tempfile import TemporaryDirectory

from nbdev.config import get_config

def export_copy(root, work):
    "Export the notebooks of the project at `root` inside the empty folder `work`, and return the package made there"
    package = work/get_config().lib_path.name
    package.mkdir()
    copy(root/'settings.ini', work)
    copy(get_config().lib_path/'__init__.py', package)
    copytree(get_config().nbs_path, work/'nbs')
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=work, check=True)
    return package

def sources(package): return {p.relative_to(package): p.read_text(encoding='utf-8') for p in package.rglob('*.py')}

def differences(package, exported):
    "Names of the modules that differ between `package` and `exported`, or are in one only"
    a, b = sources(package), sources(exported)
    return sorted(str(k) for k in a.keys()|b.keys() if a.get(k) != b.get(k))

if __name__ == '__main__':
    root = get_config().config_path
    with TemporaryDirectory() as work: found = differences(get_config().lib_path, export_copy(root, Path(work)))
    if found: sys.exit(f'Not in sync with nbs/: {", ".join(found)}. Run `nbdev_export`.')
