"""What an experiment needs, before anything runs: time, memory, disk, judge calls; and after it, what it took.

:mod:`~finetune.plan.experiment` lists the work of all cells from the configuration, :mod:`~finetune.plan.flops` counts
its operations, :mod:`~finetune.plan.throughput` says how fast a card is, from what was measured or else from its peak,
:mod:`~finetune.plan.memory` calculates memory, :mod:`~finetune.plan.actual` reads what a run took from its records,
:mod:`~finetune.plan.text` prints it. Configuration comes in as plain dictionaries.
"""
