"""What the image and the commands that start it say agrees with what the server does."""

import re
from pathlib import Path

import yaml

from service.config import Settings

ROOT = Path(__file__).resolve().parents[2]


def test_requests_in_flight_may_finish_before_the_container_is_killed() -> None:
    grace_seconds = Settings.model_fields["drain_grace_seconds"].default
    (command,) = re.findall(r"^docker run (?:.*\\\n)*.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    told = re.search(r"--stop-timeout (\d+)", command)
    assert told is not None
    assert int(told[1]) > grace_seconds
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert int(compose["services"]["server"]["stop_grace_period"].removesuffix("s")) > grace_seconds


def test_tuning_tables_are_kept_in_the_volume_as_the_user_has_no_home() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    (volume,) = re.findall(r"^VOLUME (\S+)$", lines, re.MULTILINE)
    (config,) = re.findall(r"\bXDG_CONFIG_HOME=(\S+)", lines)
    assert Path(config).is_relative_to(volume)
    assert "--home-dir /nonexistent" in lines
