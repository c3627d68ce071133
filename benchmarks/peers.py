"""The same factors four ways: this library, kronfluence, curvlinops, and the hooks of a textbook.

Each takes (model, batches of ids [B, T], targets, labels "sample" or "data") and gives {name: (A [d_in, d_in], G [d_out, d_out])}:
averages over positions, of gradients of the summed loss. The model is as before afterwards."""
import contextlib
import copy
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn


@contextlib.contextmanager
def as_it_was(model):
    "Flags of the parameters and training modes as before, afterwards; no gradient is left."
    flags, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    try: yield
    finally:
        for p, f in flags: p.requires_grad_(f); p.grad = None
        for m, t in modes: m.training = t


def curvtools(model, batches, targets, labels="sample"):
    from curvtools.kfac import collect
    return {n: (f.A, f.G) for n, f in collect(model, batches, targets, labels=labels, progress=False).items()}


def textbook(model, batches, targets, labels="sample"):
    "Forward hooks for A, backward hooks for G, one ordinary backward pass from the loss to the embeddings."
    names, A, G, n, handles = [t.name for t in targets], {}, {}, 0, []
    def forward(name):
        def f(m, args, out): x = args[0].detach().flatten(0, -2).float(); A[name] = A.get(name, 0) + x.T @ x
        return f
    def backward(name):
        def f(m, gin, gout): g = gout[0].detach().flatten(0, -2).float(); G[name] = G.get(name, 0) + g.T @ g
        return f
    with as_it_was(model):
        model.eval(); model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(False)
        for name in names:
            m = model.get_submodule(name); m.weight.requires_grad_(True)
            handles += [m.register_forward_hook(forward(name)), m.register_full_backward_hook(backward(name))]
        handles.append(model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_(True)))   # so that the pass reaches all
        try:
            for ids in batches:
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
                F.cross_entropy(logits.float(), _labels(logits, ids, labels), reduction="sum").backward()
                n += len(logits)
                for p in model.parameters(): p.grad = None
        finally:
            for h in handles: h.remove()
    return {k: (A[k] / n, G[k] / n) for k in names}


def _labels(logits, ids, labels):
    if labels == "data": return ids[:, 1:].flatten()
    return torch.multinomial(logits.detach().float().softmax(-1), 1)[:, 0]


def kronfluence(model, batches, targets, labels="sample"):
    "Its own loop over a loader, with the task that its documentation writes for language models."
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State
    names = [t.name for t in targets]
    class Language(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(input_ids=batch["input_ids"][:, :-1], use_cache=False).logits.flatten(0, 1)
            return F.cross_entropy(logits.float(), _labels(logits, batch["input_ids"], "sample" if sample else "data"), reduction="sum")
        def compute_measurement(self, batch, model): return self.compute_train_loss(batch, model)
        def get_influence_tracked_modules(self): return names
    with as_it_was(model):
        memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        task, twin = Language(), copy.deepcopy(model, memo)                  # other modules, the same weights
        twin.eval(); twin = prepare_model(twin, task).to(next(model.parameters()).device)      # its constants
        how = FactorArguments(use_empirical_fisher=labels == "data")
        _, f = fit_covariance_matrices_with_loader(twin, State(cpu=next(model.parameters()).device.type == "cpu"), task, [dict(input_ids=b) for b in batches], how, tracked_module_names=names, disable_tqdm=True)
    n = sum(b[:, 1:].numel() for b in batches)
    return {k: (f["activation_covariance"][k] / n, f["gradient_covariance"][k] / n) for k in names}


class _Classes(nn.Module):
    "Logits [B, V, S], as the cross-entropy of PyTorch wants them."
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, ids): return self.model(input_ids=ids, use_cache=False).logits.transpose(1, 2)


def curvlinops(model, batches, targets, labels="sample"):
    from curvlinops import KFACLinearOperator
    rows, S = sum(len(b) for b in batches), batches[0].shape[1] - 1
    with as_it_was(model):
        model.eval(); model.requires_grad_(False)
        params = [model.get_submodule(t.name).weight for t in targets]
        for p in params: p.requires_grad_(True)
        K = KFACLinearOperator(_Classes(model), nn.CrossEntropyLoss(reduction="sum"), params, [(b[:, :-1], b[:, 1:]) for b in batches], check_deterministic=False,
                               fisher_type="mc" if labels == "sample" else "empirical", num_per_example_loss_terms=S, num_data=rows)
        K.compute_kronecker_factors()
    A, G, n = K._input_covariances, K._gradient_covariances, rows * S
    return {t.name: (A[f"model.{t.name}"], G[f"model.{t.name}"] / n) for t in targets}    # its G is a sum where the loss is one


def available():
    "Those whose package is there, by name."
    return dict(curvtools=curvtools, textbook=textbook, **({"kronfluence": kronfluence} if find_spec("kronfluence") else {}), **({"curvlinops": curvlinops} if find_spec("curvlinops") else {}))
