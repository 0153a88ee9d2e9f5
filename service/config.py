"""Every setting of the server in one typed object: defaults < file < environment < flags.

Importing this module is cheap (no torch, no grpc), so that ``fsa config`` and ``--help`` are.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

from pydantic import Field, FilePath, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

MIB = 1 << 20
GIB = 1 << 30
# Protobuf and gRPC frame a message with signed 32-bit lengths.
MAX_MESSAGE_BYTES = (2 << 30) - 1
# Read by clients of the command line, by the demo and by Docker Compose.
OTHER_VARIABLES = {"FSA_TARGET", "FSA_CACHE", "FSA_RUNTIME"}
# What a worker is told of a batch is bounded (service.records).
MAX_BATCH_REQUESTS = 1024
# What the kernels take: fsa_core.problem, whose import would bring torch.
MAX_SLOTS = 4096
# Kubernetes sets FSA_SERVE_PORT and more like it where there is a Service named fsa-serve.
SERVICE_LINKS_PREFIX = "FSA_SERVE_"

Port = Annotated[int, Field(ge=0, le=65535)]


class Backend(StrEnum):
    """The implementations of attention that a worker can be told to use."""

    AUTO = "auto"
    TRITON = "triton"
    CPU = "cpu"
    REFERENCE = "reference"


class LogLevel(StrEnum):
    """The least severe records that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """One JSON object a line, or a line for people."""

    JSON = "json"
    TEXT = "text"


class Settings(BaseSettings):
    """The server's settings.

    A keyword given to the constructor (a command line flag) wins over the environment
    (``FSA_<NAME>``), which wins over the TOML file named by ``config``, which wins over the defaults.
    An unknown name in the file or among the keywords is an error, as is a value out of range.
    """

    model_config = SettingsConfigDict(env_prefix="FSA_", extra="forbid", frozen=True, allow_inf_nan=False)

    config: FilePath | None = Field(
        default=None,
        description="TOML file with any of these settings. Read before the environment and the flags.",
    )

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that the gRPC and the metrics port listen on. The default is reachable from "
        "this machine only, as there is no authentication yet; a container sets 0.0.0.0.",
    )
    port: Port = Field(default=50051, description="gRPC port. 0: any free one, named in the ready line.")
    metrics_port: Port = Field(
        default=9464,
        description="Port of Prometheus' /metrics. 0: any free one, named in the ready line.",
    )
    reflection: bool = Field(default=False, description="Serve gRPC reflection, for tools such as grpcurl.")

    devices: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda|cuda:\d+(,cuda:\d+)*)$",
        description="Devices that get a worker process each: auto (every GPU, or the CPU where there is "
        "none), cpu, cuda (every GPU), or a list such as cuda:0,cuda:1.",
    )
    backend: Backend = Field(
        default=Backend.AUTO, description="Attention implementation; auto: triton on a GPU, cpu elsewhere."
    )
    tuning_file: FilePath | None = Field(
        default=None,
        description="Table that `fsa tune` wrote, to choose kernels by on devices of its kind. Without it "
        "the one in the user's configuration directory counts, then the shipped one.",
    )

    max_inflight_requests: PositiveInt = Field(
        default=256,
        description="Requests admitted whose answer is not yet with the client, at most. More get "
        "RESOURCE_EXHAUSTED.",
    )
    max_inflight_bytes: int = Field(
        default=4 * GIB,
        ge=64 * MIB,
        description="Bytes of shared host memory that admitted requests may hold, inputs and outputs, and of "
        "answers that are being sent. Taken from the system as it is first needed.",
    )
    max_workspace_bytes: PositiveInt = Field(
        default=8 * GIB,
        description="Bytes of device workspace that admitted requests may be planned to need, in sum.",
    )

    max_message_bytes: int = Field(
        default=512 * MIB, gt=0, le=MAX_MESSAGE_BYTES, description="Bytes of one gRPC message, at most."
    )
    max_tokens: PositiveInt = Field(
        default=1 << 20, description="Query tokens in a request, and key tokens in a request, at most."
    )
    max_sequences: PositiveInt = Field(default=4096, description="Packed sequences in a request, at most.")
    max_q_heads: PositiveInt = Field(default=256, description="Query heads in a request, at most.")
    max_slots: int = Field(
        default=1024, gt=0, le=MAX_SLOTS, description="Slots in a row of block indices, at most."
    )

    max_batch_requests: int = Field(
        default=64, gt=0, le=MAX_BATCH_REQUESTS, description="Requests in one batch, at most."
    )
    max_batch_tokens: PositiveInt = Field(
        default=65536,
        description="Query and key tokens in one batch, at most. A larger request rides alone.",
    )
    max_batch_bytes: PositiveInt = Field(
        default=1 * GIB,
        description="Bytes of inputs and outputs in one batch, at most. A larger request rides alone.",
    )
    max_batch_delay_seconds: NonNegativeFloat = Field(
        default=0.0,
        description="How long a request may wait for company while a worker is free, in seconds, but no "
        "longer than half of the time to its deadline. 0: a free worker takes what is there.",
    )

    worker_wait_seconds: PositiveFloat = Field(
        default=30.0,
        description="How long queued requests wait for a worker while none is up, in seconds, before "
        "they get UNAVAILABLE. Their own deadlines hold as well.",
    )
    batch_timeout_seconds: PositiveFloat = Field(
        default=120.0,
        description="How long a worker may take for one request, in seconds, before it is killed as hung; "
        "for a batch of several four times as long at most. No request that takes longer alone is ever "
        "answered, and others that are in the worker are sent again.",
    )
    worker_healthy_seconds: NonNegativeFloat = Field(
        default=10.0,
        description="How long a worker must have been up, in seconds, for its next restart to be at once. "
        "After shorter lives the wait between restarts doubles, from 0.2 s to 10 s.",
    )
    drain_grace_seconds: NonNegativeFloat = Field(
        default=30.0,
        description="How long requests in flight may take to finish after SIGTERM, until clients have their "
        "answers, in seconds.",
    )

    log_level: LogLevel = Field(
        default=LogLevel.INFO, description="The least severe records that are written."
    )
    log_format: LogFormat = Field(
        default=LogFormat.JSON,
        description="json: one object a line; text: a line for people. To standard error.",
    )

    @model_validator(mode="after")
    def _a_message_fits_the_budget(self) -> "Settings":
        if self.max_message_bytes > self.max_inflight_bytes:
            raise ValueError(
                f"max_message_bytes ({self.max_message_bytes}) must not exceed "
                f"max_inflight_bytes ({self.max_inflight_bytes})"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file: the first that has a value wins."""
        path = init_settings().get("config") or env_settings().get("config")
        file = TomlConfigSettingsSource(settings_cls, toml_file=path)
        if "config" in file.toml_data:
            raise SettingsError("config: a settings file cannot name another")
        return init_settings, env_settings, file


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Those that begin as settings do, in any case, and are none: misspelt, most likely."""
    prefix = str(Settings.model_config["env_prefix"])
    known = {prefix + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    return sorted(
        name
        for name in environment
        if name.upper().startswith(prefix)
        and name.upper() not in known
        and not name.startswith(SERVICE_LINKS_PREFIX)
    )
