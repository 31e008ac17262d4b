"""Judge answers to MT-Bench with a judge model: one answer file, or all methods and seeds of a model.

    python experiments/judgments.py model=stories260k method=sparsegrad seed=1 judge=local
    OPENAI_API_KEY=... python experiments/judgments.py model=llama2_7b method=full scale=llama/paper judge=openai

As DVC runs it: ``cell=params.yaml name=smoke model=tiny_llama judge=local``; see conf/mt_bench.yaml.
What is judged is not judged again; failures are counted, listed in ``<model>-<method>-seed<seed>.failures.jsonl``, and
done again by the next run.
"""

from typing import Any

from finetune.runs.command import script


@script("mt_bench")
def main(config: dict[str, Any]) -> None:
    from finetune.mt_bench.cells import work_of
    from finetune.mt_bench.judgment_cells import judge_cells

    root, methods, seeds = work_of(config)
    answers, folder = (root / "mt_bench" / kind / config["model"]["name"] for kind in ("answers", "judgments"))
    judge_cells(config, methods, seeds, answers, folder)


if __name__ == "__main__":
    main()
