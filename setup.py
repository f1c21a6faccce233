"The package's metadata, read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}

setup(
    name=cfg['lib_name'], version=cfg['version'], license=cfg['license'],
    description=cfg['description'], keywords=cfg['keywords'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    classifiers=['Development Status :: 3 - Alpha', f'Intended Audience :: {cfg["audience"]}',
                 f'Natural Language :: {cfg["language"]}', 'Programming Language :: Python :: 3'],
    python_requires=f'>={cfg["min_python"]}', install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=[cfg['lib_name'], f'{cfg["lib_name"]}.*']),
    package_data={cfg['lib_name']: cfg['package_data'].split()},
    entry_points=dict(
        console_scripts=cfg['console_scripts'].split(), nbdev=[f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']),
    zip_safe=False)
