"""Generate the text, tasks, dialogues, questions and judge prompts of the smoke experiment.

python experiments/generate.py name=smoke
"""

from pathlib import Path
from typing import Any

from finetune.data.generated import write_corpus, write_task
from finetune.data.generated_chat import write_chat
from finetune.runs.command import only_writer, script
from finetune.store.places import LOCKS


@script("generate")
def main(config: dict[str, Any]) -> None:
    folder, glue, seed = Path("results") / config["name"], config["glue"], config["seed"]
    with only_writer(folder / "data", LOCKS, folder / "chat"):
        write_corpus(folder / "data" / "text" / "corpus.txt", glue["corpus_sentences"], seed)
        for task in glue["tasks"]:
            write_task(task, folder / "data" / "glue", glue["train"], glue["validation"], seed)
        write_chat(folder / "chat", **config["chat"], seed=seed)


if __name__ == "__main__":
    main()
