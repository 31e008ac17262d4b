"""accelerate: prepare, accumulate, clipping, mixed precision, and a state that a run goes on from bit for bit."""

import pytest
import torch
from literal import train
from torch import nn

from sparsegrad import SparseGradAdamW, clip_grad_norm_, param_groups, sparsify

OPTIONS = [
    {"form": "folded"},
    {"form": "rotated"},
    {"form": "truncated", "update": "side"},
    {"form": "truncated", "keep": 4},
]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


@pytest.fixture
def made(blocks, block_bases, block_patterns):
    def make(options):
        model = sparsify(blocks(torch.float32), block_bases(dtype=torch.float32), 9, block_patterns, **options)
        return model, SparseGradAdamW(param_groups(model), lr=1e-2)

    return make


@pytest.fixture
def accelerator():
    """``accelerator(**arguments)``: a new one on the CPU; accelerate shares state between those of a process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    def make(**given):
        reset()
        return Accelerator(cpu=True, **given)

    yield make
    reset()


def steps(accelerator, model, optimizer, scheduler, batches, max_norm=None):
    """accelerate's loop, two micro-batches a step."""
    for x in batches:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = model(x).float().square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients and max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def micro_batches(number):
    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(number)]


@by_options
def test_its_loop_takes_the_steps_of_a_plain_one(options, made, accelerator):
    """Two micro-batches a step, and a schedule; against torch's loop without accelerate."""
    model, optimizer = made(options)
    own = accelerator(gradient_accumulation_steps=2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
    steps(own, *own.prepare(model, optimizer, scheduler), micro_batches(6))
    other, its_optimizer = made(options)
    its_scheduler = torch.optim.lr_scheduler.LinearLR(its_optimizer, total_iters=3)
    for first, second in zip(*[iter(micro_batches(6))] * 2, strict=True):
        its_optimizer.zero_grad()
        for x in (first, second):
            (other(x).square().mean() / 2).backward()
        its_optimizer.step()
        its_scheduler.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@by_options
def test_a_saved_state_goes_on_bit_for_bit(options, made, accelerator, tmp_path):
    """``save_state`` and ``load_state``, under bfloat16 autocast and clipping."""
    given = {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}

    def prepared():
        model, optimizer = made(options)
        own = accelerator(**given)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        return own, *own.prepare(model, optimizer, scheduler)

    own, model, optimizer, scheduler = prepared()
    steps(own, model, optimizer, scheduler, micro_batches(4), max_norm=0.1)
    own.save_state(str(tmp_path))
    steps(own, model, optimizer, scheduler, micro_batches(8)[4:], max_norm=0.1)
    again, other, its_optimizer, its_scheduler = prepared()
    again.load_state(str(tmp_path))
    steps(again, other, its_optimizer, its_scheduler, micro_batches(8)[4:], max_norm=0.1)
    assert scheduler.get_last_lr() == its_scheduler.get_last_lr()
    for (name, p), q in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_its_clipping_counts_whole_gradients_and_ours_what_is_kept(made, accelerator):
    """Ours may be called in the loop in its place; the norm of what is kept is never the larger one."""
    model, optimizer = made(OPTIONS[0])
    own = accelerator()
    model, optimizer = own.prepare(model, optimizer)
    own.backward(model(micro_batches(1)[0]).square().mean())
    whole = own.clip_grad_norm_(model.parameters(), torch.inf)
    torch.testing.assert_close(whole, nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert clip_grad_norm_(model, torch.inf) < whole
    optimizer.step()


def test_a_model_taken_out_again_is_the_sparsified_one(made, accelerator):
    model, optimizer = made(OPTIONS[0])
    own = accelerator()
    wrapped, _ = own.prepare(model, optimizer)
    assert own.unwrap_model(wrapped) is model
    train(model, optimizer, range(1), torch.float32)
