"""The requests that the server accepts. Every field is checked before a handler or the model sees it.

An unlisted field is refused, and so is a value that the server would have to ignore. null means absent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, ValidationError, model_validator

from loglinear.cli.options import LARGEST
from loglinear.evaluation.sampling import HOTTEST

MOST_STOPS, LONGEST_STOP = 4, 256  # strings, and characters of one
MOST_BIASES = 300
LARGEST_SEED = 2**63 - 1  # of torch's generators and of OpenAI's API; `loglinear generate` also seeds numpy: 2**32 - 1
SHOWN = 60  # characters of a refused value


class Refused(Exception):
    """A request that gets no answer. The text is one line for the client."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def only(value: Any) -> BeforeValidator:
    """Return a validator for an unsupported field, which accepts only the value without effect."""

    def check(given: Any) -> Any:
        if given != value or isinstance(given, bool) != isinstance(value, bool):
            raise ValueError(f"must be {value!r}, as no other value is supported")
        return given

    return BeforeValidator(check)


class Checked(BaseModel):
    """A model with strict types, finite numbers and no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


# The ranges of the command line and of `loglinear.evaluation.sample`.
Temperature = Annotated[float, Field(ge=0, le=HOTTEST)]
TopP = Annotated[float, Field(gt=0, le=1)]


class GenerationFlags(Checked):
    """The part of `transformers chat`'s `generation_config` that a request may set."""

    transformers_version: str | None = None
    do_sample: bool = True
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    top_p: TopP | None = None


class StreamOptions(Checked):
    """The options of a stream. Streams always end with their usage."""

    include_usage: bool = True


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class Request(Checked, ABC):
    """The fields of both endpoints."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] = {}
    generation_config: Json[GenerationFlags] | None = None
    user: str | None = None  # a label without effect
    n: Annotated[Any, only(1)] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None

    @model_validator(mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("stop"), str):
            return {**values, "stop": [values["stop"]]}
        return values

    @model_validator(mode="after")
    def _said_once(self) -> Request:
        flags = self.generation_config or GenerationFlags()
        for name in ("temperature", "top_p"):
            if None not in (getattr(self, name), getattr(flags, name)):
                raise ValueError(f"{name} and generation_config.{name} exclude each other")
        if len(self.lengths) > 1:
            raise ValueError(f"{' and '.join(self.lengths)} exclude each other")
        return self

    @property
    def lengths(self) -> dict[str, int]:
        """Return the field that limits the tokens of the answer, with its value. At most one is set."""
        flags = self.generation_config or GenerationFlags()
        lengths = {"max_tokens": self.max_tokens, "generation_config.max_new_tokens": flags.max_new_tokens}
        return {name: value for name, value in lengths.items() if value is not None}

    def sampling(self, greedy_below: float) -> dict[str, Any]:
        """Return the settings of a GenerationConfig without its length."""
        flags = self.generation_config or GenerationFlags()
        temperature = flags.temperature if self.temperature is None else self.temperature
        top_p = flags.top_p if self.top_p is None else self.top_p
        if not flags.do_sample or (temperature is not None and temperature < greedy_below):
            return {"do_sample": False}
        given = {"temperature": temperature, "top_p": top_p, "top_k": flags.top_k}
        return {name: value for name, value in given.items() if value is not None}

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """Return the prompt or the messages for transformers' handler."""


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str = ""
    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    logprobs: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None

    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt}


class TextPart(Checked):
    """A text that is part of a message."""

    type: Literal["text"]
    text: str


class Message(Checked):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ResponseFormat(Checked):
    """The format of an answer, which is always text."""

    type: Literal["text"]


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[Any, only(False)] = None
    response_format: ResponseFormat | None = None

    @property
    def lengths(self) -> dict[str, int]:
        value = self.max_completion_tokens
        return {**super().lengths, **({} if value is None else {"max_completion_tokens": value})}

    def body(self) -> dict[str, Any]:
        return {"messages": [message.model_dump() for message in self.messages]}


Kind = TypeVar("Kind", bound=Request)


def parse(kind: type[Kind], data: bytes) -> Kind:
    """Return the request in a body.

    Raises Refused, which names the first wrong field, its value and the expected one.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise _explained(first["type"], first["loc"], first["msg"], first["input"]) from None
    except RecursionError:
        raise Refused("the body is nested too deeply") from None


def _explained(kind: str, place: tuple[int | str, ...], message: str, given: Any) -> Refused:
    # the place of a union also names its choices, which are types
    names = [str(part) for part in place if not str(part).startswith(("list[", "function-")) and part != "str"]
    param = ".".join(names) or None
    name = param if param is None or (param.isprintable() and len(param) <= SHOWN) else shown(param)
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    if kind == "json_invalid" and name is None:
        return Refused(f"the body is not JSON: {text.removeprefix('Invalid JSON: ')}")
    if kind == "extra_forbidden":
        return Refused(f"{name} is not supported", param=param)
    if kind == "missing":
        return Refused(f"{name} is missing", param=param)
    if name is None:
        return Refused(text if isinstance(given, dict) else f"the body must be a JSON object, got {shown(given)}")
    return Refused(f"{name} {text[0].lower()}{text[1:]}, got {shown(given)}", param=param)


def shown(value: Any) -> str:
    """Return a value for an error's text: one short line."""
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
