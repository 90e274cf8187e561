"""The configuration file: what it accepts, and that every fault is told with its line."""

from pathlib import Path

import pytest

from penstock.config import Config, check_text, load_config
from penstock.errors import ConfigError

SPECIFIED = """\
serving:
  max_batch_size: 64
  max_latency_ms: 50
  autoscaling:
    min_replicas: 3
    max_replicas: 100
    target_gpu_utilization: 0.7
"""


def faults_of(text):
    config, faults = check_text(text)
    assert config is None
    return [(fault.line, fault.message) for fault in faults]


def good(text, **kwargs):
    config, faults = check_text(text, **kwargs)
    assert faults == []
    return config


def test_the_specified_block_is_accepted_as_it_stands():
    serving = good(SPECIFIED).serving
    assert (serving.max_batch_size, serving.max_latency_ms) == (64, 50)
    scaling = serving.autoscaling
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_gpu_utilization) == (3, 100, 0.7)


@pytest.mark.parametrize("text", ["", "# nothing\n", "serving:\nserver:\nmodels:\n"])
def test_an_empty_file_or_section_is_all_defaults(text):
    config = good(text)
    assert config == Config()
    assert config.serving.inline_limit_us == 200
    assert config.serving.max_rows_per_request == 4096
    assert config.serving.allow_replay is False


def test_durations_and_sizes_have_units():
    config = good(
        "serving: {max_latency_ms: 0.5s, inline_limit_us: 1ms}\n"
        "caches: {features: {ttl: 1h}, models: {memory: 2GiB}}\n"
        "monitoring: {pane: 1m, window: 7d}\n"
    )
    assert (config.serving.max_latency_ms, config.serving.inline_limit_us) == (500, 1000)
    assert (config.caches.features.ttl, config.caches.models.memory) == (3600, 2 << 30)
    assert (config.monitoring.pane, config.monitoring.window) == (60, 7 * 86400)


def test_relative_paths_start_at_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("feature_store: {repo_path: repo/}\nmodels: {fraud: {path: /abs, version: 3}}\n")
    config = load_config(file)
    assert config.feature_store.repo_path == tmp_path / "repo"
    assert config.models["fraud"].path == Path("/abs")
    assert config.models["fraud"].version == "3"
    assert config.data_dir == tmp_path / "penstock-data"  # the default is no exception


def test_all_faults_are_told_at_once_in_line_order():
    text = (
        "serving:\n  max_batch_size: 65\n  max_latncy_ms: 5\nsever: {}\nmonitoring:\n  pane: soon\n"
        "serving: {}\n"
    )
    found = faults_of(text)
    assert [line for line, _ in found] == [2, 3, 4, 6, 7]
    assert found[0][1].startswith("serving.max_batch_size is 65: ")
    assert found[1][1] == 'unknown key serving.max_latncy_ms; did you mean "max_latency_ms"?'
    assert found[2][1] == 'unknown key sever; did you mean "server"?'
    assert "monitoring.pane is 'soon': expected a duration" in found[3][1]
    assert found[4][1] == "serving is given twice; first on line 1"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("serving:\n  max_batch_size: true\n", 2, "serving.max_batch_size is True"),
        ("serving:\n  max_batch_size: 0\n", 2, "greater than or equal to 1"),
        ("serving:\n  max_latency_ms: .inf\n", 2, "finite"),
        ("serving:\n  max_latency_ms: 5 parsecs\n", 2, "a number in ms"),
        ("serving:\n  max_latency_ms: 50x\n", 2, "a number in ms"),
        ("serving:\n  inline_limit_us: 0.5us\n", 2, "integer"),
        ("serving:\n  allow_replay: 1\n", 2, "boolean"),
        ("serving:\n  autoscaling:\n    min_replicas: 3\n    max_replicas: 2\n", 2, "below min_replicas (3)"),
        ("serving:\n  autoscaling:\n    min_replica: 3\n", 3, 'did you mean "min_replicas"?'),
        ("serving:\n  autoscaling:\n    target_gpu_utilization: 70\n", 3, "less than or equal to 1"),
        ("server:\n  listen:\n    - 7064\n", 3, "server.listen[0] is 7064"),
        ("server:\n  listen: [http://x:1]\n", 2, 'expected "tcp://host:port"'),
        ("server:\n  listen: ['tcp://h:99999']\n", 2, "is no address"),
        ("server:\n  listen: ['unix:///a', 'unix:///a']\n", 2, "given twice"),
        ("server:\n  listen: []\n", 2, "at least 1 item"),
        ("server:\n  limits:\n    max_dept: 1\n", 3, 'did you mean "max_depth"?'),
        ("caches:\n  models:\n    memory: lots\n", 3, "expected a size"),
        ("caches:\n  features:\n    ttl: 0\n", 3, "greater than 0"),
        ("models:\n  m:\n    on_mising: nan\n", 3, 'did you mean "on_missing"?'),
        ("models:\n  m:\n    on_missing: zero\n", 3, "models.m.on_missing is 'zero'"),
        ("monitoring:\n  pane: 7\n  window: 20\n", 1, "not a multiple of pane"),
        ("feature_store:\n  repo_path: ''\n", 2, "expected a path"),
        ("data_dir: 5\n", 1, "data_dir is 5: expected a path"),
        ("caches:\n  models:\n    memory: " + "9" * 400 + "GB\n", 3, "caches.models.memory is inf"),
        ("monitoring:\n  pane: " + "9" * 400 + "h\n", 2, "finite"),
        ("\n\nzzz: 1\n", 3, "known keys: serving, server"),
        ("serving: 3\n", 1, "serving is 3"),
        ("- a\n", 1, "expected a mapping"),
        ("serving: [\n", 2, "is not YAML"),
        ("a: 1\n---\nb: 2\n", 2, "is not YAML"),
        ("data_dir: !!python/name:os.system x\n", 1, "could not determine a constructor"),
        ("serving: &s {}\nserver: *s\n", 2, "server uses a YAML alias"),
        ("serving: &s\n  autoscaling: *s\n", 2, "uses a YAML alias"),
        ("? [a]\n: 1\n", 1, "a key that is not a name"),
    ],
)
def test_each_bad_input_is_told_by_line(text, line, message):
    assert any(at == line and message in said for at, said in faults_of(text)), faults_of(text)


def test_a_value_that_yaml_cannot_make_is_told_once():
    assert faults_of("data_dir: 2024-99-99\n") == [(1, "data_dir: month must be in 1..12")]


def test_load_config_raises_one_error_with_every_fault(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sevring: {}\nserver: {listn: []}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{file}: line 1: ")
    assert second.startswith(f"{file}: line 2: ")


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_deep_nesting_is_a_fault_not_a_crash():
    assert faults_of("[" * 5000) == [(0, "is nested too deeply")]
