"""The protocols of ``conf/protocol``: what differs between those that should differ in little."""

from pathlib import Path

import yaml

PROTOCOLS = Path(__file__).parents[3] / "conf" / "protocol"


def test_sound_mlp_differs_from_sound_in_what_trains_alone():
    sound, mlp = (yaml.safe_load((PROTOCOLS / f"{name}.yaml").read_text()) for name in ("sound", "sound_mlp"))
    sources = [protocol.pop("sources") for protocol in (sound, mlp)][1]
    different = {key: (sound.get(key), mlp.get(key)) for key in sound | mlp if sound.get(key) != mlp.get(key)}
    assert different == {"name": ("sound", "sound_mlp"), "train": ("all", "mlp")} and sources["like"] == "sound"
