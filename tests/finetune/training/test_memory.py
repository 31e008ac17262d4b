"""Memory counted from tensors: against sums written out here."""

import pytest
import torch

from finetune.training import memory
from sparsegrad import Basis, CompactGradient, sparsegrad_layers

SIZE = 32 * 64
MATRICES = 4


@pytest.fixture
def prepared(classifier, build):
    """``prepared("lora", steps=1)``: model and optimizer after some steps on one batch."""

    def make(name, load, steps=1, one_backward=False, overrides=()):
        method = build(name, "protocol.density=null", "model.k=20", *overrides, one_backward=one_backward)
        model = method.prepare(classifier())
        optimizer = method.optimizer(model, 1e-3, 0.0)
        batch = load("cola")[1]["train"].batch(range(8))
        labels = batch.pop("labels")
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
            optimizer.step()
        return model, optimizer

    return make


def test_storages_are_counted_once():
    a, empty = torch.zeros(10), torch.zeros(0)
    assert memory.tensor_bytes([]) == 0
    assert memory.tensor_bytes([a, a[:5], a.view(2, 5)]) == 40
    assert memory.tensor_bytes([a, torch.zeros(3, dtype=torch.float64)]) == 64
    assert memory.tensor_bytes([empty, torch.zeros(0), torch.zeros(4)]) == 16  # the empty hide no other


def test_components(method_name, prepared, load):
    model, optimizer = prepared(method_name, load)
    numbers, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False)
    )
    expected = {"parameters": 4 * numbers, "optimizer_state": 2 * 4 * trained, "bases": 0}
    if method_name in ("meprop", "sparsegrad"):
        # Two moments and an index for each of 20 entries of each matrix; dense moments for all else.
        expected["optimizer_state"] = 2 * 4 * (numbers - MATRICES * SIZE) + MATRICES * 20 * (4 + 4 + 8)
    if method_name == "sparsegrad":  # one basis a layer kind, shared by its layers: 32 x 32 and 64 x 64 each
        expected["bases"] = 2 * 4 * (32 * 32 + 64 * 64)
    assert memory.components(model, optimizer) == expected


def test_bases_that_layers_share_are_counted_once(random_bases):
    basis = random_bases()["up"]
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Module(), torch.nn.Module()
    model.a.basis = model.b.basis = basis
    assert isinstance(basis, Basis)
    found = memory.components(model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    assert found["bases"] == 4 * (32 * 32 + 64 * 64)


def backward(model, load):
    batch = load("cola")[1]["train"].batch(range(8))
    labels = batch.pop("labels")
    torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()


@pytest.mark.parametrize(
    ("name", "one_backward", "held"),
    [("full", True, 4 * SIZE), ("sparsegrad", True, 20 * (4 + 8)), ("sparsegrad", False, 4 * SIZE)],
)
def test_gradients_that_are_held(name, one_backward, held, prepared, load):
    """SparseGrad's are its entries once they are selected; counting selects nothing."""
    model, _ = prepared(name, load, steps=0, one_backward=one_backward)
    assert memory.gradient_bytes(model) == 0
    backward(model, load)
    dense = sum(p.numel() for p in model.parameters()) - MATRICES * SIZE
    assert memory.gradient_bytes(model) == 4 * dense + MATRICES * held
    gradients = [layer.weight.grad for layer in sparsegrad_layers(model).values()]
    assert all(isinstance(gradient, CompactGradient) is one_backward for gradient in gradients)


def test_saved_activations_are_those_of_the_largest_pass_and_off_by_choice():
    model, notes = torch.nn.Linear(6, 5), {}
    for rows in (2, 4, 3):
        with memory.saved_activations(model, notes, True):
            kept = model(torch.randn(rows, 6))
            model(torch.randn(70, 6))  # saved for a result that nobody keeps
        assert kept.requires_grad
    with memory.saved_activations(model, notes, False):
        kept = model(torch.randn(50, 6))
    assert notes["saved_activations"] == 4 * 4 * 6  # the input; the weight is a parameter


def test_counting_does_not_change_gradients(classifier, load):
    found = []
    for active in (True, False):
        model = classifier(dropout=False)
        with memory.saved_activations(model, {}, active):
            backward(model, load)
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_no_allocators_peak_on_a_cpu():
    device = torch.device("cpu")
    memory.reset_peak(device)
    assert memory.peak(device) is None
    assert memory.device_name(device) == {"type": "cpu", "name": f"{torch.get_num_threads()} CPU threads"}


@pytest.mark.cuda
def test_peak_of_a_cuda_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    memory.reset_peak(device)
    before = memory.peak(device)
    held = torch.zeros(1 << 20, device=device)
    assert memory.peak(device) - before >= held.numel() * 4
    assert memory.device_name(device)["type"] == "cuda"
