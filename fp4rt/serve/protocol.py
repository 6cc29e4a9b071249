"""What is said over HTTP: every request and response as a struct, with its bounds; the OpenAPI file is made from these.

They follow OpenAI's API reference (completions, chat completions, models) and vLLM's additions to it (top_k, min_p,
repetition_penalty, ignore_eos, cache_salt, chat_template_kwargs, reasoning_content, tokenize, detokenize,
tokenizer_info). A field that is not here is refused, so that no option is ever silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

MAX_CHOICES = 128       # replies that one request may ask for: prompts times n
MAX_PROMPT_IDS = 1 << 21


class Request(Struct, forbid_unknown_fields=True):
    """A body that a client sends."""


class Response(Struct):
    """A body that the server sends."""


# -- Parts ----------------------------------------------------------------------------------------------------------

Name = Annotated[str, Meta(min_length=1, max_length=512)]
Label = Annotated[str, Meta(max_length=512)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=16)] | None
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
LogitBias = Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]],
                      Meta(max_length=1024, description="Token id to what is added to its logit.")]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Object = dict[str, Any]


class StreamOptions(Request):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Meta(description="Taken and not needed: nothing is padded.")] = None


class Sampled(Request):
    """What both kinds of completion take."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="0 is greedy; others are at least 0.001.")] | None = None
    top_p: Annotated[float, Meta(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="0 and -1 are off.")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=256, description="Requests share cached prefixes only with their "
                                                                "own salt.")] | None = None
    user: Annotated[Label | None, Meta(description="Taken and not used.")] = None


# -- /v1/completions ------------------------------------------------------------------------------------------------


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(max_length=MAX_PROMPT_IDS)]], Meta(
        min_length=1, max_length=MAX_PROMPT_IDS,
        description="Texts, token ids, or lists of token ids; one kind in one request.")]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Must equal n.")] | None = None
    suffix: Annotated[None, Meta(description="Not taken.")] = None


class Usage(Response):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptTokensDetails(Response):
    cached_tokens: int


class CompletionLogprobs(Response):
    text_offset: Annotated[list[int], Meta(description="Where in the text each token begins, in characters.")]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Response, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(Response, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


# -- /v1/chat/completions -------------------------------------------------------------------------------------------


class ContentPart(Request):
    """A part of a message. Only text is taken; other kinds are refused by name."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    video_url: Any = None
    file: Any = None


class CalledFunction(Request):
    name: FunctionName
    arguments: Annotated[str, Meta(description="A JSON object, as text.")]


class CalledTool(Request, kw_only=True):
    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(max_length=1024)] | None = None
    name: Label | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[CalledTool], Meta(max_length=128)] | None = None
    tool_call_id: Label | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class Function(Request):
    name: FunctionName
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class ToolDefinition(Request):
    type: Literal["function"]
    function: Function


class FunctionChoice(Request):
    name: FunctionName


class ToolChoice(Request):
    type: Literal["function"]
    function: FunctionChoice


class TextFormat(Request, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Request, tag_field="type", tag="json_object"):
    pass


class JsonSchema(Request, kw_only=True):
    name: FunctionName
    description: str | None = None
    schema: Object
    strict: bool | None = None


class JsonSchemaFormat(Request, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class ChatRequest(Sampled, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=65536)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolDefinition], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: Annotated[Object | None, Meta(
        description="More variables for the model's chat template, such as enable_thinking.")] = None
    modalities: list[Literal["text"]] | None = None
    metadata: Annotated[Object | None, Meta(description="Taken and not used.")] = None
    service_tier: Annotated[Label | None, Meta(description="Taken and not used.")] = None
    store: Annotated[Literal[False] | None, Meta(description="Nothing is stored.")] = None
    safety_identifier: Annotated[Label | None, Meta(description="Taken and not used.")] = None
    prompt_cache_key: Annotated[Label | None, Meta(description="Taken and not used: prefixes are found by "
                                                               "themselves.")] = None


class TopLogprob(Response):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Response):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Response):
    content: list[TokenLogprob]


class ReplyFunction(Response):
    name: str
    arguments: str


class ReplyTool(Response, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: ReplyFunction


class ReplyToolDelta(ReplyTool, kw_only=True):
    index: int


class Reply(Response, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ReplyTool] | UnsetType = UNSET


class ReplyDelta(Response):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ReplyToolDelta] | UnsetType = UNSET


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(Response, kw_only=True):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(Response, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(Response, kw_only=True):
    index: int
    delta: ReplyDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Response, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None | UnsetType = UNSET


# -- The others -----------------------------------------------------------------------------------------------------


class TokenizeRequest(Request):
    """Either a prompt, or messages with what belongs to them."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=65536)] | None = None
    tools: Annotated[list[ToolDefinition], Meta(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: Object | None = None


class TokenizeResponse(Response):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Request, kw_only=True):
    """Ids within the model's vocabulary."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_PROMPT_IDS)]


class DetokenizeResponse(Response):
    prompt: str


class TokenizerInfo(Response):
    """What a client needs to count tokens and render conversations with this server's tokenizer, as lm-eval does."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Model(Response, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fp4rt"
    max_model_len: int


class Models(Response, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(Response):
    status: Literal["ok", "draining"]


class ErrorDetail(Response):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Response):
    error: ErrorDetail
