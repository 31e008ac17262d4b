r"""Steps per second and memory of every method on one machine, on batches of one task's token lengths.

Needs torch, transformers, accelerate and peft alone, so that it runs where the pipeline is not installed:

    python -m finetune.efficiency --model conf/model/roberta_base.yaml --protocol conf/protocol/printed.yaml \
        --lengths lengths/cola.json --output results/efficiency/roberta_base

Weights and bases are random: speed and memory do not depend on their values.
"""
