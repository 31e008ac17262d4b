"""Memory of saved activations without the memory: a forward pass on torch's fake tensors, which have shapes only.

Autograd saves for a fake tensor what it saves for a real one, so nothing is estimated: which tensors a frozen linear
layer needs, what autocast copies, what LoRA casts, all follow from the model itself. Counted are storages, each once,
parameters and buffers left out, as :func:`finetune.training.memory.saved_activations` counts them in a run.

Two micro-batches are never in memory at once. Within one, for b rows of t tokens and a vocabulary of v:

    without checkpointing   all that is saved + two float32 copies of the logits, 8 b t v bytes
    with checkpointing      the inputs of all blocks (bfloat16 under autocast, 2 b t hidden each) + the largest of
                            - autocast's copies of the trained weights + what one block saves   (forward)
                            - what is saved outside the blocks + two float32 copies of the logits  (loss)
                            - what one block saves                                                 (backward)

The two copies of the logits: the cast to float32 and the one that drops the last token, or their gradients. Gradients
of activations, about the size of one block's largest tensors, are not counted; a reserve stands for them. Where logits
are computed in chunks of c tokens, 12 c v bytes stand in their place: of one chunk log-probabilities and both copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from finetune.plan.flops import blocks_of
from finetune.training.losses import causal_outputs, summed_loss
from finetune.training.memory import Saved


@dataclass
class Activations:
    """Bytes that autograd saves in one forward pass.

    Attributes:
        blocks: what each block saves, copies of weights left out.
        copies: autocast's low-precision copies of float32 weights.
        outside: what is saved before the first block, after the last one, and by the loss.
        inputs: hidden states that enter the blocks.
        logits: two float32 copies of the logits, not saved but there at the loss.
    """

    blocks: list[int] = field(default_factory=list)
    copies: int = 0
    outside: int = 0
    inputs: int = 0
    logits: int = 0

    @property
    def saved(self) -> int:
        """All that is saved without checkpointing."""
        return sum(self.blocks) + self.copies + self.outside

    def peak(self, checkpointing: bool) -> int:
        """The most of one micro-batch that is there at once, by the formulas of this module."""
        if not checkpointing:
            return self.saved + self.logits
        return self.inputs + max(self.copies + max(self.blocks), self.outside + self.logits)


def measure(model: Any, rows: int, tokens: int, *, precision: str, logits_chunk: int | None = None) -> Activations:
    """Activations of a causal language model or a sequence classifier in training, prepared by a method.

    Args:
        model: on the meta device; its ``requires_grad`` flags count. It is turned into fake tensors.
        rows, tokens: of a micro-batch without padding.
        precision: ``fp32``, or ``bf16`` autocast.
        logits_chunk: tokens whose logits are held at a time; None: all.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    found, head = Activations(), model.get_output_embeddings()
    causal, words = head is not None, 0 if head is None else head.weight.shape[0]
    options = {"use_cache": False} if causal else {}
    with FakeTensorMode(allow_non_fake_inputs=True):  # an adapter may hold real indices beside its parameters
        own = _give_fake_tensors(model.train())
        with _blocks(model, found, causal) as current, _saved(model, found, own, current):
            ids = torch.zeros(rows, tokens, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                if logits_chunk is not None:
                    inputs = {"input_ids": ids, **options}
                    loss = causal_outputs(model, model, inputs, ids, logits_chunk)
                    found.logits = 12 * logits_chunk * words
                else:
                    logits = model(input_ids=ids, **options).logits
                    labels = ids if causal else torch.zeros(rows, dtype=torch.long)
                    loss, found.logits = summed_loss(logits.float(), labels), 2 * 4 * logits.numel()
        del loss  # until all was counted it held the graph
    return found


def _give_fake_tensors(model: nn.Module) -> set[int]:
    """Replace meta tensors by fake ones on the CPU, shared ones once; returns their storages' addresses."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = type(tensor)(new, requires_grad=tensor.requires_grad) if parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
    return {tensor.untyped_storage()._cdata for tensor in made.values()}


@contextmanager
def _blocks(model: nn.Module, found: Activations, causal: bool) -> Iterator[list[int]]:
    """Follow which block runs: the yielded list holds its number, or nothing outside of all.

    Raises:
        ValueError: if the model has no blocks.
    """
    current: list[int] = []

    def enter(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current.append(len(found.blocks))
        found.blocks.append(0)
        found.inputs += args[0].untyped_storage().nbytes()
        # transformers leaves the mask out where nothing is padded, but can't look into a fake tensor to see that.
        return args, kwargs | ({"attention_mask": None} if causal else {})

    layers = blocks_of(model).values()
    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: current.clear()) for layer in layers]
    try:
        yield current
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _saved(model: nn.Module, found: Activations, own: set[int], current: list[int]) -> Iterator[None]:
    """Count every storage that the forward pass leaves saved: in its block, as a copy of a weight, or outside."""
    weights = {tuple(p.shape) for p in model.parameters() if p.requires_grad and p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    places: WeakKeyDictionary[Saved, int | None] = WeakKeyDictionary()  # in the order of saving

    def pack(tensor: Tensor) -> Saved:
        held = Saved(tensor)
        places[held] = current[0] if current else None
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        yield
    counted = set(own)
    for held, storage in ((one, storage) for one in places for storage in one.storages()):
        if storage._cdata in counted:
            continue
        counted.add(storage._cdata)
        if tuple(held.tensor.shape) in weights and held.tensor.dtype == torch.bfloat16:
            found.copies += storage.nbytes()
        elif (block := places[held]) is not None:
            found.blocks[block] += storage.nbytes()
        else:
            found.outside += storage.nbytes()
