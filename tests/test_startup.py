"""What a fresh Python loads: help and `import lorasuite` nothing heavy, `inspect` only what it needs"""
import inspect, json, subprocess, sys
from enum import Enum
from types import FunctionType, ModuleType

import pytest
import typer
import lorasuite
from lorasuite import cli
from lorasuite.core.architecture import ROLES
from lorasuite.core.files import data_dir
from lorasuite.stages.alignment import ALIGN_METHODS
from lorasuite.training.evaluate import MATCHES
from lorasuite.training.refresh import SOFT_WEIGHT
from transformers import SchedulerType

HEAVY = ('torch', 'transformers', 'datasets', 'peft', 'accelerate', 'safetensors', 'numpy', 'scipy', 'pandas')
PLOTS = ('matplotlib', 'seaborn')
COMMANDS = ('demo', 'inspect', 'align', 'transfer', 'convert', 'finetune', 'refresh', 'synthesize', 'evaluate',
            'upgrade')

def loaded(code, *args):
    "The modules that a fresh Python has loaded when it ends"
    listing = f'import sys\ntry:\n    {code}\nfinally: print("\\nLOADED", *sys.modules)'
    done = subprocess.run([sys.executable, '-c', listing, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition('\nLOADED')[2].split()

def command(*args):
    "The modules that the command has loaded"
    return loaded('from lorasuite.cli import app; app()', *args)

def of(modules, *packages):
    "Those of some packages"
    return [m for m in modules if m in packages or m.startswith(tuple(f'{p}.' for p in packages))]

def test_the_package_loads_nothing():
    modules = loaded('import lorasuite; dir(lorasuite)')
    assert not of(modules, *HEAVY, *PLOTS, 'typer') and of(modules, 'lorasuite') == ['lorasuite']

def test_files_load_only_the_standard_library():
    assert not of(loaded('import lorasuite.core.files'), *HEAVY, *PLOTS, 'typer')

@pytest.mark.parametrize('args', [['--help'], *([name, '--help'] for name in COMMANDS)], ids=' '.join)
def test_help_loads_only_typer(args):
    modules = command(*args)
    assert 'typer' in modules and not of(modules, *HEAVY, *PLOTS, 'rich')
    ours = ['', '.cli', '.core', '.core.files', '.core.names', '.core.settings']
    assert sorted(of(modules, 'lorasuite')) == [f'lorasuite{name}' for name in ours]

def test_all_commands_are_tested():
    listed = typer.main.get_command(cli.app).commands
    assert sorted(listed) == sorted(COMMANDS)

def test_inspect_loads_only_what_it_needs():
    zoo = data_dir()/'zoo'
    modules = command('inspect', zoo/'old', zoo/'new', zoo/'adapter')
    assert 'torch' in modules and 'lorasuite.forecast.inspection' in modules
    above = ('lorasuite.lab', 'lorasuite.tuners', 'lorasuite.training', 'lorasuite.forecast.advice')
    assert not of(modules, *above, *PLOTS, 'datasets', 'pandas', 'pyarrow', 'sklearn', 'transformers.trainer')

@pytest.mark.parametrize('home', ['stages.alignment', 'stages.transfer', 'training.evaluate', 'training.finetune'])
def test_no_stage_loads_a_plotting_library(home):
    modules = loaded(f'import lorasuite.{home}')
    assert f'lorasuite.{home}' in modules
    assert not of(modules, *PLOTS, 'lorasuite.lab', 'lorasuite.tuners')

# ---- the public names

PUBLIC = ('Adapter', 'Alignment', 'align', 'evaluate', 'finetune', 'inspect', 'load_model', 'refresh', 'transfer',
          'upgrade')
MODULES = ('stages.transfer', 'training.evaluate', 'training.finetune', 'training.refresh', 'training.upgrade')

def test_the_public_names():
    assert lorasuite.__all__ == sorted(PUBLIC) and {*PUBLIC, '__version__'} <= {*dir(lorasuite)}
    for name in PUBLIC:
        thing = getattr(lorasuite, name)
        assert thing.__name__ == name and isinstance(thing, (type, FunctionType))
        assert thing.__module__.startswith('lorasuite.')
    with pytest.raises(AttributeError, match='nothing'): lorasuite.nothing
    with pytest.raises(ImportError, match='nothing'): from lorasuite import nothing

def test_everything_can_be_imported_at_once():
    names = {}
    exec('from lorasuite import *', names)
    assert {*PUBLIC} <= {*names}

@pytest.mark.parametrize('name', MODULES)
def test_a_module_stays_a_module(name):
    "Importing a function of the same name does not hide the module"
    function = getattr(lorasuite, name.split('.')[1])
    found = {}
    exec(f'import lorasuite.{name} as T', found)
    assert isinstance(found['T'], ModuleType) and callable(function)
    assert getattr(found['T'], name.split('.')[1]) is function

def test_the_package_is_typed():
    assert (data_dir().parent/'py.typed').is_file()

# ---- what the command says of modules that it does not load

def parameter(name, option):
    "Option of a command"
    return next(p for p in typer.main.get_command(cli.app).commands[name].params if p.name == option)

def test_help_agrees_with_the_modules():
    for name in ('align', 'upgrade'): assert parameter(name, 'method').help == f'one of: {", ".join(ALIGN_METHODS)}'
    assert f'all of {",".join(ROLES)} by default' in parameter('finetune', 'roles').help
    schedule = parameter('finetune', 'schedule')
    assert schedule.help == f'how the learning rate falls: {", ".join(s.value for s in SchedulerType)}'
    assert parameter('refresh', 'soft').default == SOFT_WEIGHT
    said = parameter('evaluate', 'match').help
    assert all(match in said for match in MATCHES)

def test_every_schedule_is_accepted():
    schedule = next(t for t in vars(cli)['_Schedule'].__args__ if isinstance(t, type) and issubclass(t, Enum))
    assert [s.value for s in schedule] == [s.value for s in SchedulerType]

def test_a_command_calls_the_function_of_its_name():
    from lorasuite.stages import many
    from lorasuite.training import refresh_many
    for name in {*COMMANDS} & {*PUBLIC} - {'transfer', 'refresh'}:
        body = inspect.getsource(getattr(cli, f'{name}_command'))
        assert f'from {getattr(lorasuite, name).__module__} import' in body, name
    assert 'import carry_whole' in inspect.getsource(cli._transfer_one) and many.transfer is lorasuite.transfer
    assert 'learn_lessons' in inspect.getsource(cli._refresh_one) and refresh_many.refresh is lorasuite.refresh

# ---- the report of `inspect`

def test_the_report_is_a_dict_a_text_and_a_table():
    report = lorasuite.inspect('zoo/old', 'zoo/new', 'zoo/adapter')
    assert isinstance(report, dict) and json.loads(json.dumps(report))['shared_tokens'] == 512
    assert 'all have a place' in str(report) and str(report).splitlines()[0].split() == ['zoo/old', 'zoo/new']
    html = report._repr_html_()
    assert html.count('<tr>') == len(report['sizes']) + 1 and 'shared tokens: 512 of 512 old and 548 new' in html

def test_the_table_is_escaped():
    report = lorasuite.inspect('zoo/old', 'zoo/new')
    html = type(report)(report | dict(old='<b>', notes=['<i>']))._repr_html_()
    assert '<b>' not in html and '&lt;b&gt;' in html and '<i>' not in html and '&lt;i&gt;' in html
