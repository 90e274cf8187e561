"""`inference-config.yaml`: the settings of an engine, checked all at once, each fault with its line.

This module imports pydantic, so `penstock/__init__` reaches it lazily.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from penstock.config_values import FilePath, Microseconds, Milliseconds, Seconds, Section, Size
from penstock.credentials import Grant, Role, ServerTls, check_readable, grant, read_tokens
from penstock.errors import ConfigError


class AutoscalingConfig(Section):
    """Validated and exported for an orchestrator; Penstock starts no replicas."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_gpu_utilization: float = Field(default=0.7, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})"
            )
        return self


class ServingConfig(Section):
    """Batching.

    `max_latency_ms` is the limit of each request; `guard_ms` of it are kept to encode and write the reply.
    `inline_limit_us`: a shorter predicted run starts on the thread that read the request. `max_requests` and
    `max_queued_rows` bound each model's lane, for requests of high priority; those of low priority have half
    as much room of their own. A quarter of each is kept for connections that have nothing in it. Where both
    classes wait, low priority gets `low_share` of the batches, at least. Requests are of high
    priority unless they say otherwise.

    A run that takes longer than `breaker_timeout_ms` (None: twice `max_latency_ms`) and than eight times its
    predicted time, or `breaker_failures` failed runs in a row, open the model's circuit breaker: its requests
    are UNAVAILABLE at once, until a trial run on zeros succeeds. That is made when the run that hung has
    returned, and `breaker_probe_ms` after a failure.
    """

    max_batch_size: int = Field(default=64, ge=1, le=64)
    max_latency_ms: Milliseconds = Field(default=50.0, gt=0, le=60_000)
    max_rows_per_request: int = Field(default=4096, ge=1)
    inline_limit_us: Microseconds = Field(default=200, ge=0)
    guard_ms: Milliseconds = Field(default=0.5, ge=0)
    max_requests: int = Field(default=4096, ge=1, le=1 << 20)
    max_queued_rows: int = Field(default=16_384, ge=1, le=1 << 24)
    low_share: float = Field(default=0.125, ge=0.001, le=0.5)
    breaker_timeout_ms: Annotated[Milliseconds, Field(gt=0, le=3_600_000)] | None = None
    breaker_probe_ms: Milliseconds = Field(default=1000.0, gt=0, le=3_600_000)
    breaker_failures: int = Field(default=5, ge=1, le=1_000_000)
    allow_replay: bool = False
    autoscaling: AutoscalingConfig | None = None


class LimitsConfig(Section):
    """Bounds on what peers may ask for.

    A connection is not read while more than `pause_output_bytes` of its replies wait, holds at most
    `max_output_bytes` of them, and is dropped if it takes next to nothing for `slow_reader_timeout` seconds.
    `max_calls` and `max_admin_calls` bound the calls of the other methods that wait, of all connections;
    `max_calls_per_connection` those of one, so that it cannot keep the others out.

    Times, seconds; None: no limit. A peer has `handshake_timeout` for TLS and `auth_timeout` to show a token
    where tokens are set. One whose unfinished message grows by less than 64 KiB in `read_timeout` is dropped,
    as is one that asks nothing for `idle_timeout`. After `max_connection_age`, give or take a tenth, it is
    told to move to a new connection; the old one ends when its requests are answered, and takes no new ones
    after `connection_age_grace`. `max_connections_per_address` is for each IP address.
    """

    max_message_bytes: Size = Field(default=16 << 20, ge=1024)
    max_depth: int = Field(default=32, ge=4, le=1024)
    max_connections: int = Field(default=1024, ge=1)
    max_in_flight_per_connection: int = Field(default=1024, ge=1)
    max_output_bytes: Size = Field(default=64 << 20, ge=1 << 16)
    pause_output_bytes: Size = Field(default=1 << 20, ge=1)
    slow_reader_timeout: Seconds = Field(default=10.0, gt=0)
    read_timeout: Seconds = Field(default=30.0, gt=0)
    handshake_timeout: Seconds = Field(default=10.0, gt=0)
    auth_timeout: Seconds = Field(default=10.0, gt=0)
    idle_timeout: Annotated[Seconds, Field(gt=0)] | None = None
    max_connection_age: Annotated[Seconds, Field(gt=0)] | None = None
    connection_age_grace: Seconds = Field(default=10.0, gt=0)
    max_connections_per_address: Annotated[int, Field(ge=1)] | None = None
    max_calls: int = Field(default=256, ge=1)
    max_admin_calls: int = Field(default=16, ge=1)
    max_calls_per_connection: int = Field(default=64, ge=1)


class TlsConfig(Section):
    """PEM files for the "tls://" addresses; read again on SIGHUP. TLS 1.2 is the oldest version spoken.

    With `client_ca`, client certificates are asked for and verified; `require_client_cert` refuses clients
    that have none.
    """

    cert: FilePath
    key: FilePath
    client_ca: FilePath | None = None
    require_client_cert: bool = False

    @field_validator("cert", "key", "client_ca")
    @classmethod
    def _readable(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is not None:
            check_readable(str(info.field_name), path)
        return path

    @model_validator(mode="after")
    def _usable(self) -> TlsConfig:
        self.files().context()
        return self

    def files(self) -> ServerTls:
        """Return the files as the server takes them."""
        return ServerTls(self.cert, self.key, self.client_ca, self.require_client_cert)


class TokenConfig(Section):
    """A token, or just its text. An expired one is refused, also on connections that showed it before."""

    token: SecretStr
    role: Literal["data", "admin"] | None = None
    expires: datetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {"token": value} if isinstance(value, str) else value

    @field_validator("token")
    @classmethod
    def _usable(cls, token: SecretStr) -> SecretStr:
        grant(token.get_secret_value(), "data")
        return token


class AuthConfig(Section):
    """Tokens, in the file or in files of their own (`TOKEN [EXPIRES]` a line); without any, all may do all.

    With any, every request (health too) needs `auth` first on its connection. Admin tokens allow everything,
    the others no admin methods. A connection ends after `max_failures` wrong tokens.
    """

    tokens: Annotated[list[TokenConfig], Field(min_length=1)] | None = None
    token_file: FilePath | None = None
    admin_tokens: Annotated[list[TokenConfig], Field(min_length=1)] | None = None
    admin_token_file: FilePath | None = None
    max_failures: int = Field(default=3, ge=1)

    @field_validator("token_file", "admin_token_file")
    @classmethod
    def _holds_tokens(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_tokens(path, "data")
        return path

    @field_validator("admin_tokens")
    @classmethod
    def _are_admin(cls, tokens: list[TokenConfig] | None) -> list[TokenConfig] | None:
        if any(token.role == "data" for token in tokens or ()):
            raise ValueError('an admin token has the role "data"; expected it under tokens')
        return tokens

    def grants(self) -> list[Grant]:
        """Read the token files and return what each token allows; empty: no authentication."""
        roles: tuple[tuple[list[TokenConfig] | None, Role], ...]
        roles = (self.tokens, "data"), (self.admin_tokens, "admin")
        made = [
            grant(given.token.get_secret_value(), given.role or role, given.expires)
            for tokens, role in roles
            for given in tokens or ()
        ]
        if self.token_file is not None:
            made += read_tokens(self.token_file, "data")
        if self.admin_token_file is not None:
            made += read_tokens(self.admin_token_file, "admin")
        return made


class ServerConfig(Section):
    """Where to listen: "tcp://host:port", "tls://host:port" or "unix:///path".

    `workers` processes answer side by side; more than one share the feature caches, by files in
    `data_dir/arena` (a tmpfs is the best place for it), and one that dies is started again, at most
    `max_restarts` times in `restart_window` seconds, all together. `call_threads` run the methods that are
    no predictions. A shutdown ends after `drain_timeout` seconds at the latest; once all is answered, peers
    have `goaway_grace` seconds to hang up by themselves.
    """

    listen: list[str] = Field(default=["tcp://127.0.0.1:7064"], min_length=1)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    workers: int = Field(default=1, ge=1, le=32)
    max_restarts: int = Field(default=10, ge=0)
    restart_window: Seconds = Field(default=60.0, gt=0)
    tls: TlsConfig | None = None
    auth: AuthConfig = Field(default_factory=AuthConfig)
    call_threads: int = Field(default=4, ge=1, le=256)
    drain_timeout: Seconds = Field(default=30.0, gt=0)
    goaway_grace: Seconds = Field(default=0.5, ge=0)

    @field_validator("listen")
    @classmethod
    def _addresses(cls, listen: list[str]) -> list[str]:
        for address in listen:
            if not _is_address(address):
                raise ValueError(
                    f'"{address}" is no address; expected "tcp://host:port", "tls://host:port" or "unix:///path"'
                )
        if len(set(listen)) != len(listen):
            raise ValueError("an address is given twice")
        return listen

    @model_validator(mode="after")
    def _tls_has_files(self) -> ServerConfig:
        if self.tls is None and any(address.startswith("tls:") for address in self.listen):
            raise ValueError('listen has a "tls://" address; expected a tls section with cert and key')
        return self


class FeatureStoreConfig(Section):
    """The folder of the feature definitions."""

    repo_path: FilePath | None = None


class FeatureCacheConfig(Section):
    """`capacity` rows per view; `ttl` in seconds, None: no limit beyond a row's own validity.

    `negative_ttl`: seconds for which a key without data is remembered as such, where that is less than `ttl`.
    `refresh_ahead`: the last part of a row's life, 0 to 0.5, in which a read has it loaded again in the
    background; at most a minute before its validity ends. 0: never.
    """

    capacity: int = Field(default=1 << 17, ge=1)
    ttl: Annotated[Seconds, Field(gt=0)] | None = None
    negative_ttl: Annotated[Seconds, Field(gt=0)] | None = 10.0
    refresh_ahead: float = Field(default=0.1, ge=0, le=0.5)


def _mode(value: object) -> object:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML's on and off


class EdgeCacheConfig(Section):
    """Predictions of common inputs: `capacity` for each model version, each for `ttl` seconds at most.

    `mode`: "auto" uses the cache for models whose rows cost enough (several microseconds), "on" for all,
    "off" for none. The `precompute` most frequent requests of one row are computed before a version goes
    live and after a materialization that touches them.
    """

    capacity: int = Field(default=1 << 16, ge=1, le=1 << 28)
    ttl: Seconds = Field(default=60.0, gt=0, le=1e9)
    mode: Annotated[Literal["auto", "on", "off"], BeforeValidator(_mode)] = "auto"
    precompute: int = Field(default=1024, ge=0, le=1 << 16)


class ModelCacheConfig(Section):
    """`memory`: bytes for loaded model versions and the buffers of their lanes.

    Previous versions are dropped to make room, the one least recently live first; a version for which there
    is none even so is not loaded.
    """

    memory: Size = Field(default=1 << 30, ge=1)


class CachesConfig(Section):
    edge: EdgeCacheConfig = Field(default_factory=EdgeCacheConfig)
    features: FeatureCacheConfig = Field(default_factory=FeatureCacheConfig)
    models: ModelCacheConfig = Field(default_factory=ModelCacheConfig)


class ProcessConfig(Section):
    """The child process of a Python entry point, seconds.

    `start_timeout`: to become ready, warm-up included. `run_timeout`: for one run; then the process is killed
    and started again. `restart_backoff` is the pause before that, doubled up to `restart_backoff_max` while
    the process does not last.
    """

    start_timeout: Seconds = Field(default=30.0, gt=0, le=3600)
    run_timeout: Seconds = Field(default=2.0, gt=0, le=3600)
    restart_backoff: Seconds = Field(default=0.1, ge=0.001, le=3600)
    restart_backoff_max: Seconds = Field(default=10.0, ge=0.001, le=3600)

    @model_validator(mode="after")
    def _ordered(self) -> ProcessConfig:
        if self.restart_backoff_max < self.restart_backoff:
            raise ValueError(
                f"restart_backoff_max ({self.restart_backoff_max:g} s) is below "
                f"restart_backoff ({self.restart_backoff:g} s)"
            )
        return self


class ModelConfig(Section):
    """One served model: the bundle folder to add to data_dir (None: it is there), and the version or alias.

    A bundle that the registry sees for the first time becomes the champion; later promotions and rollbacks
    hold, whatever `path` says. `threads` of onnxruntime for one run. A Python entry point runs in a `process`
    of its own, or in a `thread` of this one, where its runs hold up the answers of all models.
    """

    path: FilePath | None = None
    version: Annotated[str, BeforeValidator(lambda v: str(v) if type(v) is int else v)] = Field(
        default="champion", min_length=1
    )
    on_missing: Literal["nan", "error"] = "nan"
    threads: int = Field(default=1, ge=1, le=256)
    isolation: Literal["process", "thread"] = "process"
    process: ProcessConfig = Field(default_factory=ProcessConfig)


class PrometheusConfig(Section):
    """Where metrics are served for Prometheus: "host:port", at /metrics. Needs the extra `prometheus`."""

    listen: str = "127.0.0.1:9464"

    @field_validator("listen")
    @classmethod
    def _host_and_port(cls, listen: str) -> str:
        if not _is_address(f"tcp://{listen}"):
            raise ValueError('expected "host:port"')
        return listen


class TracingConfig(Section):
    """OpenTelemetry spans of requests that carry a sampled `traceparent`. Needs the extra `otel`.

    `exporter`: "otlp" (HTTP, to the URL `endpoint`; None: OTEL_EXPORTER_OTLP_ENDPOINT) or "console". `sample`
    is the share of the sampled traces to keep, `capacity` the number of requests that may wait for their
    spans; more are dropped and counted.
    """

    exporter: Literal["otlp", "console"] = "otlp"
    endpoint: str | None = None
    sample: float = Field(default=1.0, ge=0, le=1)
    capacity: int = Field(default=4096, ge=1, le=1 << 20)
    service: str = Field(default="penstock", min_length=1)

    @field_validator("endpoint")
    @classmethod
    def _url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError("expected an http:// or https:// URL")
        return endpoint


class SkewConfig(Section):
    """Sampled feature vectors, for `penstock features verify`.

    `share`: of the keys whose vectors are logged; a key is always or never. `memory`: bytes of a model's
    vectors that may wait to be written, more are dropped and counted; `log_bytes`: disk of a process.
    """

    share: float = Field(default=0.001, ge=0, le=1)
    memory: Size = Field(default=1 << 20, ge=1 << 12, le=1 << 30)
    log_bytes: Size = Field(default=64 << 20, ge=1 << 16)


class MonitoringConfig(Section):
    """Panes and windows, seconds. `label_capacity` is the number of served rows kept for their labels.

    `ring_rows`: served rows of a model that may wait for the monitor; beyond that the oldest are dropped from
    the log, the label join and freshness, and counted. Drift counts every row whatever happens.
    `log_flush`: served rows are on disk after this, seconds; `log_bytes`: disk for their log.
    """

    pane: Seconds = Field(default=300.0, ge=1)
    window: Seconds = Field(default=86_400.0, ge=1)
    score_bins: int = Field(default=1024, ge=2, le=65_536)
    label_capacity: int = Field(default=1 << 20, ge=1)
    ring_rows: int = Field(default=1 << 16, ge=1)
    log_flush: Seconds = Field(default=1.0, gt=0)
    log_bytes: Size = Field(default=1 << 30, ge=1 << 20)
    prometheus: PrometheusConfig | None = None
    tracing: TracingConfig | None = None
    skew: SkewConfig = Field(default_factory=SkewConfig)

    @model_validator(mode="after")
    def _whole_panes(self) -> MonitoringConfig:
        if self.window < self.pane or self.window % self.pane:
            raise ValueError(f"window ({self.window:g} s) is not a multiple of pane ({self.pane:g} s)")
        return self


class Config(Section):
    """The whole file. Every section may be left out."""

    serving: ServingConfig = Field(default_factory=ServingConfig)
    server: ServerConfig = Field(default_factory=ServerConfig)
    feature_store: FeatureStoreConfig = Field(default_factory=FeatureStoreConfig)
    caches: CachesConfig = Field(default_factory=CachesConfig)
    models: dict[str, ModelConfig] = Field(default_factory=dict)
    monitoring: MonitoringConfig = Field(default_factory=MonitoringConfig)
    data_dir: FilePath = Path("penstock-data")

    @field_validator("models", mode="before")
    @classmethod
    def _no_models(cls, value: Any) -> Any:
        return {} if value is None else value


@dataclass(frozen=True)
class Fault:
    """One fault of a file: 1-based line (0: the file as a whole) and what is wrong."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


Location = tuple[int | str, ...]
_SECRET = frozenset({"tokens", "admin_tokens"})  # their values are in no message


def check_config(path: str | Path, *, bundles: bool = False) -> tuple[Config | None, list[Fault]]:
    """Read and check the file at `path`; return the config, or None and every fault, by line.

    `bundles`: also whether there is a model bundle at each path that the configuration names.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return None, [Fault(0, f"cannot be read: {error}")]
    return check_text(text, base=file.parent, bundles=bundles)


def check_text(
    text: str, *, base: str | Path = ".", bundles: bool = False
) -> tuple[Config | None, list[Fault]]:
    """Check YAML `text`, whose relative paths start at `base`; `bundles` as in `check_config`."""
    faults: list[Fault] = []
    lines: dict[Location, int] = {}
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        data = _build(loader, node, (), lines, faults, set()) if node is not None else {}
    except yaml.YAMLError as error:
        return None, [_yaml_fault(error)]
    except RecursionError:
        return None, [Fault(0, "is nested too deeply")]
    finally:
        if loader is not None:
            loader.dispose()
    config: Config | None = None
    if not isinstance(data, dict) and data is not None:
        faults.append(Fault(1, f"is a {type(data).__name__}; expected a mapping of sections"))
    else:
        try:
            config = Config.model_validate(data, context={"base": Path(base)})
        except ValidationError as error:
            told = {fault.line for fault in faults}
            for item in error.errors(include_url=False):
                fault = _fault(dict(item), lines)
                if item["input"] is not None or fault.line not in told:  # YAML made no value: already told
                    faults.append(fault)
    for name, model in config.models.items() if bundles and config is not None else ():
        if model.path is not None and not (model.path / "model.yaml").is_file():
            at = ("models", name, "path")
            message = f"{_name(at)} is {str(model.path)!r}; expected the folder of a model bundle"
            faults.append(Fault(lines.get(at, 0), message))
    faults.sort(key=lambda fault: fault.line)
    return (None if faults else config), faults


def load_config(path: str | Path) -> Config:
    """Return the config at `path`; raises ConfigError, whose message lists every fault with its line."""
    config, faults = check_config(path)
    if config is None:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    return config


def _is_address(address: str) -> bool:
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:
        return False
    if url.query or url.fragment or url.username is not None:
        return False
    if url.scheme in ("tcp", "tls"):
        return bool(url.hostname) and port is not None and not url.path
    return url.scheme == "unix" and not url.netloc and len(url.path) > 1


def _build(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    at: Location,
    lines: dict[Location, int],
    faults: list[Fault],
    seen: set[int],
) -> Any:
    """Make plain data of `node`, noting the line of each location, duplicate keys and aliases."""
    line = lines.setdefault(at, node.start_mark.line + 1)  # of the key, where there is one
    if id(node) in seen:  # an alias could be cyclic, or grow without bound
        faults.append(Fault(line, f"{_name(at)} uses a YAML alias; write the value out"))
        return None
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        made: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                faults.append(Fault(key_line, f"{_name(at)} has a key that is not a name"))
                continue
            key = key_node.value
            place = (*at, key)
            if key in made:
                faults.append(Fault(key_line, f"{_name(place)} is given twice; first on line {lines[place]}"))
                continue
            lines[place] = key_line
            made[key] = _build(loader, value_node, place, lines, faults, seen)
        return made
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*at, i), lines, faults, seen) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node)
    except (ValueError, yaml.constructor.ConstructorError) as error:
        reason = error.problem if isinstance(error, yaml.constructor.ConstructorError) else error
        faults.append(Fault(line, f"{_name(at)}: {reason}"))
        return None


def _yaml_fault(error: yaml.YAMLError) -> Fault:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return Fault(mark.line + 1 if mark is not None else 0, f"is not YAML: {problem}")


def _name(at: Location) -> str:
    name = ""
    for part in at:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or "the file"


def _fault(error: dict[str, Any], lines: dict[Location, int]) -> Fault:
    at: Location = tuple(error["loc"])
    known = at
    while known not in lines and known:
        known = known[:-1]
    line = lines.get(known, 0)
    if error["type"] == "extra_forbidden":
        names = _fields_at(at[:-1])
        near = difflib.get_close_matches(str(at[-1]), names, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(names)}"
        return Fault(line, f"unknown key {_name(at)}; {hint}")
    reason = str(error["msg"]).removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if isinstance(error["input"], dict | list) or _SECRET & set(at):
        return Fault(line, f"{_name(at)}: {reason}")
    return Fault(line, f"{_name(at)} is {error['input']!r}: {reason}")


def _fields_at(at: Location) -> list[str]:
    """The known keys of the section at `at`, found from the models themselves."""
    section: type[BaseModel] = Config
    for part in at:
        if section is Config and part == "models":
            section = ModelConfig
        elif str(part) in section.model_fields:
            kind = section.model_fields[str(part)].annotation
            kinds = (kind, *getattr(kind, "__args__", ()))
            section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)
