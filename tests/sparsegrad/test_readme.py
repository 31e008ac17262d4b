"""The lines of README's section "The library" run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lines():
    """All Python of that section: the second block goes on where the first ends."""
    section = (ROOT / "README.md").read_text().split("\n## The library\n")[1].split("\n## ")[0]
    return "".join(re.findall(r"```python\n(.*?)```", section, re.S))


def test_the_method_runs_as_pasted(lines, tmp_path):
    """In a fresh interpreter without network; the comparison takes no part, and what is left is a plain BERT."""
    check = 'import sys\nassert "finetune" not in sys.modules\n'
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", lines + check], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert weights["bert.encoder.layer.0.intermediate.dense.weight"].shape == (256, 64)
    assert not [name for name in weights if "basis" in name]
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "bases.safetensors"}
    assert done.stdout.startswith("trainable params:")
