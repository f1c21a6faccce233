"""A device that is not there: tensors that say they are on a GPU, compute on the CPU, and refuse what a GPU refuses"""
from contextlib import contextmanager
import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device('cuda', 0)
INDEXES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__} # may mix devices, as real ones do

class OnGPU(torch.Tensor):
    "A tensor that says that it is on a GPU"
    @property
    def device(self): return GPU

def bare(x): return x.as_subclass(torch.Tensor) if isinstance(x, OnGPU) else x

def on_gpu(x): return x.as_subclass(OnGPU) if isinstance(x, torch.Tensor) else x

def leaves(x):
    "All tensors in lists, tuples and tables"
    if isinstance(x, torch.Tensor): return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [leaf for part in parts for leaf in leaves(part)]

def swap(f, x):
    "The same with another form of every tensor"
    if isinstance(x, torch.Tensor): return f(x)
    if not leaves(x): return x
    if isinstance(x, dict): return {key: swap(f, part) for key, part in x.items()}
    parts = [swap(f, part) for part in x]
    return type(x)(*parts) if hasattr(x, '_fields') else type(x)(parts)

def wanted(args, kwargs):
    "The device that a call of `to`, or a factory, asks for, if any"
    found = [kwargs['device']] if kwargs.get('device') is not None else []
    found += [x for x in args[1:] if isinstance(x, (str, torch.device))]
    found += [x.device for x in args[1:] if isinstance(x, torch.Tensor)]
    return torch.device(found[0]) if found else None

class Pretending(TorchFunctionMode):
    "Every call looks at where its tensors are"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            tensors = leaves((args, kwargs))
            there = [isinstance(x, OnGPU) for x in tensors]
            name = getattr(func, '__name__', str(func))
            if func is torch.Tensor.device.__get__ and any(there): return GPU
            if name == '__get__' and any(there): return self.run(func, args, kwargs, True)
            if name == 'numpy' and any(there): raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name == 'cpu': return bare(args[0])
            if name == 'to': return self.move(args, kwargs, any(there[:1]))
            if func not in INDEXES and name not in ('copy_', 'index_put', 'index_put_', 'take'):
                if any(there) and any(not on and x.ndim for on, x in zip(there, tensors)):
                    raise RuntimeError(f'{name}: expected all tensors to be on the same device')
                if name == 'lstsq' and any(there) and kwargs.get('driver') != 'gels':
                    raise RuntimeError('lstsq: on a GPU there is only the driver gels')
            asked = kwargs.get('device')
            if asked is not None and torch.device(asked).type == 'cuda':
                return on_gpu(func(*swap(bare, args), **swap(bare, kwargs) | dict(device='cpu')))
            return self.run(func, args, kwargs, any(there[:1]) if func in INDEXES else any(there))

    def run(self, func, args, kwargs, there):
        found = func(*swap(bare, args), **swap(bare, kwargs))
        return swap(on_gpu if there else bare, found)

    def move(self, args, kwargs, there):
        "`Tensor.to`, to a device, a type, both, or as another tensor"
        goal = wanted(args, kwargs)
        there = goal.type == 'cuda' if goal else there
        dtypes = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
        dtypes += [x.dtype for x in args[1:] if isinstance(x, torch.Tensor)]
        found = bare(args[0]).to(*dtypes) if dtypes else bare(args[0])
        return on_gpu(found) if there else found

@contextmanager
def pretending():
    "Tensors can be moved to `cuda`"
    with Pretending(): yield
