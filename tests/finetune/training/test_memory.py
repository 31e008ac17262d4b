"""Memory counted from tensors: against sums written out here."""

import pytest
import torch

from finetune.training import memory
from sparsegrad import Basis, sparsegrad_layers

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
    a = torch.zeros(10)
    assert memory.tensor_bytes([a]) == 40
    assert memory.tensor_bytes([a, a[:5], a.view(2, 5)]) == 40
    assert memory.tensor_bytes([a, torch.zeros(3, dtype=torch.float64)]) == 64
    assert memory.tensor_bytes([]) == 0


def test_sparse_tensors_count_indices_and_values():
    sparse = torch.sparse_coo_tensor([[0, 1, 1], [2, 0, 2]], [1.0, 2.0, 3.0], (2, 3), check_invariants=True)
    assert memory.tensor_bytes([sparse]) == 2 * 3 * 8 + 3 * 4


def test_empty_tensors_do_not_hide_others():
    assert memory.tensor_bytes([torch.zeros(0), torch.zeros(0), torch.zeros(4)]) == 16


def test_components_of_full_fine_tuning(prepared, load):
    model, optimizer = prepared("full", load)
    numbers = sum(p.numel() for p in model.parameters())
    found = memory.components(model, optimizer)
    assert found == {"parameters": 4 * numbers, "optimizer_state": 2 * 4 * numbers, "bases": 0}


def test_components_of_lora(prepared, load):
    model, optimizer = prepared("lora", load)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = memory.components(model, optimizer)
    assert found["optimizer_state"] == 2 * 4 * trained
    assert found["parameters"] == 4 * sum(p.numel() for p in model.parameters())


def test_components_of_sparsegrad_after_one_step(prepared, load):
    model, optimizer = prepared("sparsegrad", load)
    numbers = sum(p.numel() for p in model.parameters())
    found = memory.components(model, optimizer)
    assert found["parameters"] == 4 * numbers
    # Two moments and an index for each of 20 entries of each matrix; dense moments for all else.
    assert found["optimizer_state"] == 2 * 4 * (numbers - MATRICES * SIZE) + MATRICES * 20 * (4 + 4 + 8)
    # One basis a layer kind, shared by its layers: 32 x 32 and 64 x 64 each.
    assert found["bases"] == 2 * 4 * (32 * 32 + 64 * 64)


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


def test_gradients_that_are_held(prepared, load):
    model, _ = prepared("full", load, steps=0)
    assert memory.gradient_bytes(model) == 0
    backward(model, load)
    assert memory.gradient_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("one_backward", "held"), [(True, 20 * (4 + 8)), (False, 4 * SIZE)])
def test_gradients_of_sparsegrad_are_its_entries_once_selected(one_backward, held, prepared, load):
    model, _ = prepared("sparsegrad", load, steps=0, one_backward=one_backward)
    backward(model, load)
    dense = sum(p.numel() for p in model.parameters()) - MATRICES * SIZE
    assert memory.gradient_bytes(model) == 4 * dense + MATRICES * held
    assert len(sparsegrad_layers(model)) == MATRICES


def test_counting_gradients_selects_nothing(prepared, load):
    model, _ = prepared("sparsegrad", load, steps=0)
    backward(model, load)
    memory.gradient_bytes(model)
    assert all(layer.weight.grad is not None for layer in sparsegrad_layers(model).values())


def test_saved_activations_of_one_linear_layer():
    model, notes = torch.nn.Linear(6, 5), {}
    x = torch.randn(3, 6, requires_grad=True)
    with memory.saved_activations(model, notes, True):
        model(x).sum()
    assert notes["saved_activations"] == 4 * 3 * 6  # the input; the weight is a parameter


def test_saved_activations_are_the_largest_pass_and_off_by_choice():
    model, notes = torch.nn.Linear(6, 5), {}
    for rows in (2, 4, 3):
        with memory.saved_activations(model, notes, True):
            model(torch.randn(rows, 6))
    assert notes["saved_activations"] == 4 * 4 * 6
    with memory.saved_activations(model, notes, False):
        model(torch.randn(50, 6))
    assert notes["saved_activations"] == 4 * 4 * 6


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
