"""Write the page of Appendix E from an experiment's answers and judgments.

python experiments/examples.py name=local questions=mt_bench_inf
"""

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig

from finetune.mt_bench.judged import read_judgments
from finetune.mt_bench.questions import load_questions
from finetune.report.evidence.experiment import load_experiment
from finetune.report.page.examples import parts_of, read_answers, to_html
from finetune.store.files import write_atomically

log = logging.getLogger(__name__)


@hydra.main(version_base=None, config_path="../conf", config_name="examples")
def main(cfg: DictConfig) -> None:
    results = Path("results") / cfg.name
    try:
        parts = parts_of(
            load_experiment(cfg.experiment, cfg.name),
            questions=load_questions(Path(cfg.questions.root) / cfg.questions.folder / cfg.questions.questions),
            examples=list(cfg.questions.examples),
            answers=read_answers(results / "mt_bench" / "answers"),
            judgments=read_judgments(results / "mt_bench" / "judgments"),
        )
        path = results / "examples.html"
        write_atomically(path, to_html(cfg.name, parts))
        log.info("%s", path)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
