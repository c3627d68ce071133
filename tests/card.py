"""A GPU where there is none: `x.to("card")` lies on the CPU but says that it does not, and what mixes it with a tensor of the CPU raises, as on a GPU.

So the tests of a GPU say without one whether a function keeps to its model's device, and whether the numbers come out. To be imported before curvtools, in a process of its own, as it puts other functions into torch.
Made with torch's hooks for devices written in Python (`torch.utils.backend_registration`). Not there: derivatives in forward mode, and what only CUDA has."""
import contextlib

import torch
from torch.utils import backend_registration as registration
from torch.utils._pytree import tree_leaves, tree_map

NAME, aten = "card", torch.ops.aten
ANY_DEVICE = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}   # indices may lie on the CPU


class Module(registration._DummyBackendModule):
    "What torch asks of `torch.card`."
    def get_rng_state(self, device=0): return torch.zeros(0, dtype=torch.uint8)
    def set_rng_state(self, state, device=0): pass
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]


def there(device): return device is not None and torch.device(device).type == NAME
def listed(at): return torch.tensor(at) if isinstance(at, list) else tuple(map(listed, at)) if isinstance(at, tuple) else at


class Card(torch.Tensor):
    "A tensor of the card; `raw` holds its numbers."
    @staticmethod
    def __new__(cls, raw): return torch.Tensor._make_wrapper_subclass(cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=torch.device(NAME, 0), layout=raw.layout)
    def __init__(self, raw): self.raw = raw
    def __repr__(self): return f"Card({self.raw})"
    def __getitem__(self, at): return super().__getitem__(listed(at))
    def __setitem__(self, at, value): super().__setitem__(listed(at), value)
    def tolist(self): return self.raw.tolist()
    def data_ptr(self): return self.raw.data_ptr()
    def untyped_storage(self): return self.raw.untyped_storage()
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return run(op, args, kwargs or {})


def down(x):
    "What the CPU is given for it."
    if isinstance(x, Card): return x.raw
    if isinstance(x, torch.device) and x.type == NAME: return torch.device("cpu")
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) and x.device.type == NAME else x       # zeros that nobody wrote down


def moved(op, x, kwargs):
    to = kwargs.pop("device", x.device)
    for k in ("non_blocking", "pin_memory"): kwargs.pop(k, None)
    raw = op(down(x), **kwargs)
    return Card(raw) if there(to) else raw


def run(op, args, kwargs):
    "One operation of torch."
    if op is aten._to_copy.default: return moved(op, args[0], dict(kwargs))
    if op is aten.copy_.default: down(args[0]).copy_(down(args[1])); return args[0]
    if op is aten._efficientzerotensor.default: op = aten.zeros.default
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours, theirs = [x for x in tensors if x.device.type == NAME], [x for x in tensors if x.device.type != NAME and x.dim()]
    if ours and theirs and op not in ANY_DEVICE: raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! ({op})")
    here = there(kwargs["device"]) if kwargs.get("device") is not None else bool(ours)
    known = {id(down(x)): x for x in ours}                                   # what is written in place stays the tensor it is
    up = lambda x: known.get(id(x), None) if id(x) in known else Card(x) if isinstance(x, torch.Tensor) and here else x
    return tree_map(up, op(*tree_map(down, args), **{k: v for k, v in tree_map(down, kwargs).items() if k != "pin_memory"}))


def past_the_dispatcher(make):
    "torch.tensor and its like."
    def f(data, *args, device=None, **kw): return make(data, *args, **kw).to(device) if there(device) else make(data, *args, device=device, **kw)
    return f


def inference_mode(on=True):
    "Its tensors take no wrapper."
    return torch.no_grad()(on) if callable(on) else torch.no_grad() if on else contextlib.nullcontext()


def kind(*x): return torch.nn.Parameter if len(x) == 1 and isinstance(x[0], Card) and getattr(x[0], "_is_param", False) else type(*x)


registration._setup_privateuseone_for_python_backend(NAME, Module())
library = torch.library.Library("_", "IMPL"); library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
torch.tensor, torch.as_tensor, torch.eye, torch.inference_mode = *map(past_the_dispatcher, (torch.tensor, torch.as_tensor, torch.eye)), inference_mode

from curvtools import experts, targets       # noqa: E402  after torch is as they shall find it

targets.type = experts.type = kind           # a weight that lies there is a parameter as any other
