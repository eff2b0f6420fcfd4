"""What requests may say: OpenAI's fields, with those that vLLM and others added, and `/predict`'s."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Every list has a bound, and what is wrong in it is told of its first part only. They are far above what is of use.
MOST_CHOICES = 128
MOST_PROMPTS = 4096
MOST_MESSAGES = 2**14
MOST_PARTS = 4096  # of a message: texts, calls
MOST_TOOLS = 1024
MOST_BIASES = 4096
MOST_IDS = 2**19
MOST_STOPS = 16
T = TypeVar("T")
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = Annotated[str, Field(max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[TokenId], Field(max_length=MOST_IDS, fail_fast=True)]
Prompts = Annotated[list[T], Field(max_length=MOST_PROMPTS, fail_fast=True)]
Parts = Annotated[list[T], Field(max_length=MOST_PARTS, fail_fast=True)]


def _few(biases: Any) -> Any:
    """Before each of them is looked at."""
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:
        raise ValueError(f"at most {MOST_BIASES:,} tokens may have a bias, not {len(biases):,}")
    return biases


class Part(BaseModel):
    """A part of a request. A field that is null is as if it were left out."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {name: part for name, part in value.items() if part is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in given if name not in known]
        for name in unknown[1:]:  # one is enough to tell of
            del given[name]
        return given


class Strict(Part):
    """A field that is not known is refused: an option that is accepted acts."""

    model_config = ConfigDict(extra="forbid")


class Lenient(Part):
    """A part that clients send back as they got it, with what else was in it."""

    model_config = ConfigDict(extra="ignore")


class SamplingFields(Strict):
    """How tokens are drawn; what is left out is as the server was started with."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="-1 or 0: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class PredictRequest(SamplingFields):
    prompt: str
    max_new_tokens: Count | None = None


class StreamOptions(Lenient):
    include_usage: bool = False


class Notes(Strict):
    """What OpenAI's services do with a request besides answering it; there is nothing to do here."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class OpenAIRequest(SamplingFields, Notes):
    """What chat and text completions have in common."""

    model: str | None = Field(None, description="One of /v1/models; the first of them where it is left out")
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MOST_BIASES), BeforeValidator(_few)] | None = None
    ignore_eos: bool = Field(False, description="Go on to max_tokens, whatever the model says")

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(Lenient):
    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Lenient):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Lenient):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts[TextPart] | None = None
    name: str | None = None
    tool_calls: Parts[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Lenient):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class FunctionName(Lenient):
    name: str


class NamedTool(Lenient):
    type: Literal["function"]
    function: FunctionName


class JsonSchema(Lenient):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, description="For chat templates that have it")
    modalities: Parts[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template")


class CompletionRequest(OpenAIRequest):
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="0 generates nothing: with `echo` and `logprobs` it is the prompt that is scored"
    )
    prompt: str | Ids | Prompts[str] | Prompts[Ids]
    echo: bool = Field(False, description="Begin the text with the prompt")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="Log-probabilities of each token and of this many most likely ones in its place; with `echo`, of "
        "the prompt's too",
    )
    best_of: Annotated[int, Field(ge=1, le=1, description="Only 1: the best of several is not chosen")] | None = None
