"""What a step is made of: two counts that are asked of it."""

from finetune.efficiency.step_parts import Counted, counts


def test_a_step_of_24_layers_is_few_operations_and_fewer_waits():
    for step in (2, 3):  # the first one makes the state
        found = counts(step)
        assert 100 < found["operations"] <= 400
        assert 1 <= found["waits"] <= 8


def test_what_waits_is_counted_however_it_is_read():
    import torch

    with Counted() as counted:
        torch.ones(3).nonzero()
        bool(torch.ones(()))
        torch.ones(3).tolist()
    assert counted.found["nonzero"] == 1 and counted.found["_local_scalar_dense"] == 2
    assert torch.ones(2).tolist() == [1.0, 1.0]
