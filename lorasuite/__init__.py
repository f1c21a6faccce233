"""Carry a LoRA adapter from an old language model to its successor."""
__version__ = "0.1.0"
from importlib import import_module

_HOMES = dict(
    Adapter='core.adapter', load_model='core.loading',
    Alignment='stages.alignment', align='stages.alignment', transfer='stages.transfer',
    finetune='training.finetune', refresh='training.refresh', evaluate='training.evaluate',
    upgrade='training.upgrade', inspect='forecast.inspection')
__all__ = sorted(_HOMES)

def __getattr__(name:str):
    "Import a public name when it is first asked for, so that `import lorasuite` loads nothing heavy"
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)

def __dir__() -> list[str]:
    "All names, those that are not imported yet among them"
    return sorted({*globals(), *__all__})
