"""Validate a judge before it judges: how far its ratings agree with GPT-4's, on answers that GPT-4 has rated.

    python experiments/judge_agreement.py judge=open_weight_24gb
    python experiments/judge_agreement.py judge=qwen_coder_0_5b part=20

The record and the judgments land in ``results/judges/<judge>/``; Table 6 and the report page carry its figures beside
the scores of that judge. See conf/judge_agreement.yaml.
"""

import json
import sys
from typing import Any

from finetune.runs.command import script


@script("judge_agreement")
def main(config: dict[str, Any]) -> None:
    from finetune.mt_bench.validation import validate_judge

    record = validate_judge(config)
    sys.stdout.write(json.dumps(record["agreement"], indent=1) + "\n")


if __name__ == "__main__":
    main()
