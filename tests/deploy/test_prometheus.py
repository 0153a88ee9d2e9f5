"""The monitoring that deploy/ ships works against what the server exposes."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import ServerProcess

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def dashboard_expressions() -> list[str]:
    """PromQL of the panels, with Grafana's variables filled in."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "fsa.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*") for target in targets]


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names(expression: str) -> set[str]:
    """The server's metrics in a PromQL expression."""
    return set(re.findall(r"\bfsa_\w+", expression))


def exposed(families: Iterator[Metric]) -> dict[str, bool]:
    """Name of each series that the server declares -> whether it has a sample now."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {
        family.name + suffix: bool(family.samples)
        for family in families
        for suffix in suffixes.get(family.type, ("",))
    }


@pytest.fixture(scope="module")
def series(server: ServerProcess) -> dict[str, bool]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as response:
        return exposed(text_string_to_metric_families(response.read().decode()))


def test_every_metric_in_dashboard_and_alerts_is_exposed(series: dict[str, bool]) -> None:
    expressions = [*dashboard_expressions(), *(rule["expr"] for rule in alert_rules())]
    used = set().union(*map(names, expressions))
    assert used
    assert used <= series.keys()


@needs_promtool
def test_prometheus_accepts_the_configuration() -> None:
    config = str(DEPLOY / "prometheus" / "prometheus.yml")
    check = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    tests = str(Path(__file__).with_name("alerts_test.yml"))
    check = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_prometheus_scrapes_the_server(prometheus: Any) -> None:
    assert [result["value"][1] for result in prometheus.query('up{job="fsa"}')] == ["1"]
    (build,) = prometheus.query("fsa_build_info")
    assert build["metric"]["version"]


def test_every_panel_shows_what_the_server_has(prometheus: Any, series: dict[str, bool]) -> None:
    """A wrong label name or value in a panel's query would leave it empty."""
    empty = [expression for expression in dashboard_expressions() if not prometheus.query(expression)]
    assert [expression for expression in empty if all(series[name] for name in names(expression))] == []


def test_every_alert_rule_is_evaluated(prometheus: Any) -> None:
    groups = prometheus.get("rules")["groups"]
    health = {rule["name"]: (rule["health"], rule["state"]) for group in groups for rule in group["rules"]}
    assert health == {rule["alert"]: ("ok", "inactive") for rule in alert_rules()}
