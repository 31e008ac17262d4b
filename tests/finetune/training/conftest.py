"""A split that tells which rows are asked for, and may end the run as a kill does."""

import pytest


class Spy:
    def __init__(self, split, calls, error):
        self.split, self.rows, self.calls, self.error = split, [], calls, error

    def __len__(self):
        return len(self.split)

    def targets(self, rows):
        return len(rows)

    def batch(self, rows):
        if len(self.rows) == self.calls:
            raise self.error
        self.rows.append(list(rows))
        return self.split.batch(rows)


class Killed(Exception):
    pass


@pytest.fixture
def spy(load):
    """``spy("cola", calls=None)``: the training split; ``rows`` are those of every batch. Killed after so many."""

    def make(task="cola", calls=None, **options):
        return Spy(load(task, **options)[1]["train"], calls, Killed)

    make.Killed = Killed
    return make
