"""What the library is compared with, written out the long way without its code, and what several of its tests do."""

import torch
from torch import nn

OUT, IN, K = 11, 7, 9


def top_k(G, k=K):
    flat = G.flatten().tolist()
    return torch.tensor(sorted(sorted(range(len(flat)), key=lambda j: (-abs(flat[j]), j))[:k]))


def coo(indices, values, shape):
    rows_columns = torch.stack((indices // shape[1], indices % shape[1]))
    return torch.sparse_coo_tensor(rows_columns, values, shape, check_invariants=True).coalesce()


def plain(bias=True, out_features=OUT, in_features=IN, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def batches(n, dims=3, seed=1):
    """Inputs, targets and a mask of rows (tokens) that take no part in the loss."""
    generator = torch.Generator().manual_seed(seed)
    shape = (15,) if dims == 2 else (3, 5)
    for _ in range(n):
        x, target = (torch.randn(*shape, f, generator=generator, dtype=torch.float64) for f in (IN, OUT))
        yield x, target, torch.rand(*shape, 1, generator=generator) < 0.6


def loss_of(layer, x, target, mask):
    return ((torch.tanh(layer(x)) - target) ** 2 * mask).sum()


def train(model, optimizer, steps, dtype=torch.float64, clip=None):
    """Steps of a stack of blocks, each on a batch of its own number."""
    for i in steps:
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        optimizer.zero_grad()
        y = model(x.to(model.head.weight.device, dtype))
        y.to(torch.promote_types(dtype, torch.float32)).square().sum().backward()
        if clip is not None:
            clip(model, 1.0)
        optimizer.step()
    optimizer.zero_grad()


def snapshot(model):
    return dict(model.named_modules()), {name: t.clone() for name, t in _values(model).items()}


def assert_unchanged(model, before):
    modules, state = before
    assert dict(model.named_modules()) == modules  # the same objects
    after = _values(model)
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


def _values(model):
    """Without the notes of which entries steps have moved: a step of zero moves some to where they are."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".moved")}
