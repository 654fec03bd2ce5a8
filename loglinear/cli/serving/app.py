"""The application: routes, limits and errors. transformers' handlers write the answers."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager

from loglinear.cli.serving import requests
from loglinear.cli.serving.requests import ChatRequest, CompletionRequest, Refused
from loglinear.cli.serving.turns import CURRENT, Limits, OneQueue, Turn
from loglinear.evaluation.sampling import GREEDY
from loglinear.models import LogLinearForCausalLM
from loglinear.serving import Engine

DEFAULT_TOKENS = 1024  # of an answer whose request names no length
MOST_REQUESTS = 256  # open at a time: one, or as many as an engine has rows, is answered, and the others wait
BYTES_PER_TOKEN, OTHER_BYTES = 16, 65_536  # limits of a body: per token of the longest prompt, and for the rest
BODY_SECONDS = 30.0
Handler = CompletionHandler | ChatCompletionHandler
FAILED = "the server failed; its log says why"
LOG = logging.getLogger("uvicorn.error")
GONE = 499  # status of a response whose client has left


class OneModel(ModelManager):
    """A manager of the loaded model. transformers' own manager finds only classes of transformers."""

    def __init__(self, name: str, model: LogLinearForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.model, self.tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id


class Server:
    """The state of all routes: one model, its engine, its handlers, its limits and its open requests.

    A request whose client has left is open until its turn has come.
    """

    def __init__(
        self,
        name: str,
        model: LogLinearForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        engine: Engine | None,
    ) -> None:
        self.name, self.model, self.tokenizer, self.limits, self.engine = name, model, tokenizer, limits, engine
        manager, queue = OneModel(name, model, tokenizer), OneQueue(at_once=engine is not None)
        self.completions, self.chats = CompletionHandler(manager, queue), ChatCompletionHandler(manager, queue)
        self.open: set[Turn] = set()

    async def answer(self, request: Request, kind: type[requests.Request], handler: Handler) -> Response:
        """Check a request, wait for its turn and answer it. The answer ends early if the client leaves.

        Raises Refused for a request that gets no answer.
        """
        parsed = requests.parse(kind, await self._body(request))
        turn = self._turn(parsed)
        self.open = {other for other in self.open if not other.is_over}
        if len(self.open) >= MOST_REQUESTS:
            raise Refused(f"{MOST_REQUESTS} requests are open: try again later", status=429)
        self.open.add(turn)
        request.scope["end"] = turn.cancel
        CURRENT.set(turn)
        tokens = next(iter(parsed.lengths.values()), min(DEFAULT_TOKENS, self.limits.tokens))
        body = {**parsed.body(), "stream": parsed.stream, "max_tokens": tokens}
        response = await _while_connected(request, handler.handle_request(body, uuid.uuid4().hex))
        if isinstance(response, StreamingResponse):
            response.body_iterator = _events(response.body_iterator)
        return response

    def _turn(self, parsed: requests.Request) -> Turn:
        self.require_model(parsed.model)
        most = self.limits.tokens
        for name, tokens in parsed.lengths.items():
            if tokens > most:
                raise Refused(f"{name} must be at most {most} on this server, got {requests.shown(tokens)}", param=name)
        options = parsed.sampling(GREEDY)
        if parsed.logit_bias:
            options["sequence_bias"] = {(self._token(key),): bias for key, bias in parsed.logit_bias.items()}
        turn = Turn(self.model, self.tokenizer, self.limits, options=options, stops=parsed.stop, seed=parsed.seed)
        turn.engine = self.engine
        return turn

    def _token(self, text: str) -> int:
        most = self.model.config.vocab_size - 1
        if not (text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and int(text) <= most):
            raise Refused(f"logit_bias must have tokens 0 to {most}, got {requests.shown(text)}", param="logit_bias")
        return int(text)

    def require_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise Refused(f"there is no model {requests.shown(name)}, only {self.name!r}", param="model", status=404)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(f"the content type must be application/json, got {requests.shown(kind)}", status=415)
        try:
            return await asyncio.wait_for(self._read(request), BODY_SECONDS)
        except asyncio.TimeoutError:  # noqa: UP041 (another class before Python 3.11)
            raise Refused(f"the body did not come within {BODY_SECONDS:g} seconds", status=408) from None

    async def _read(self, request: Request) -> bytes:
        most = BYTES_PER_TOKEN * self.limits.prompt_tokens + OTHER_BYTES
        data, size = bytearray(), 0
        async for part in request.stream():  # to its end: many clients read no answer before they have sent everything
            size += len(part)
            if size <= most:
                data += part
        if size > most:
            raise Refused(f"the body has {size:,} bytes, and this server takes at most {most:,}", status=413)
        return bytes(data)

    async def load(self, request: Request) -> Response:
        """Answer `transformers chat`, which asks for its model here and waits for "ready"."""
        try:
            name = json.loads(await self._body(request)).get("model")
        except (ValueError, AttributeError, RecursionError):
            raise Refused('the body must be a JSON object with a "model"') from None
        self.require_model(str(name))
        event = json.dumps({"status": "ready", "model": self.name, "cached": True})
        return Response(_data(event), media_type="text/event-stream")


async def _while_connected(request: Request, work: Any) -> Response:
    """Return the response, or an empty one if the client leaves first."""
    work, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        # The body has been read, so the client can only send that it leaves.
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=GONE)
    except TemplateError as error:
        raise Refused(f"the chat template refuses these messages: {error}", param="messages") from error
    finally:
        work.cancel()
        gone.cancel()


async def _events(parts: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """Pass the events of a stream on, then its end. An error becomes an event, as the status has been sent."""
    try:
        async for part in parts:
            yield part
    except Refused as error:
        yield _data(json.dumps(_described(str(error), error.param)))
    except Exception:
        LOG.exception("a stream failed")
        yield _data(json.dumps(_described(FAILED, kind="server_error")))
    yield _data("[DONE]")


def _data(text: str) -> str:
    return f"data: {text}\n\n"


class EndTurns:
    """ASGI middleware that ends a request's turn as soon as its response ends, for any reason."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            if end := scope.get("end"):
                end()


def application(
    name: str,
    model: LogLinearForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    engine: Engine | None = None,
) -> FastAPI:
    """Return the ASGI application that serves one model under a name.

    Requests are rows of the model's engine. Without an engine they take turns.
    """
    server = Server(name, model, tokenizer, limits, engine)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(EndTurns)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await server.answer(request, CompletionRequest, server.completions)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.answer(request, ChatRequest, server.chats)

    @app.post("/load_model")
    async def load(request: Request) -> Response:
        return await server.load(request)

    served = {"id": name, "object": "model", "created": 0, "owned_by": "loglinear"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{asked:path}")
    async def describe_model(asked: str) -> dict[str, Any]:
        server.require_model(asked)
        return served

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _error(error.status, str(error), error.param)

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{error.detail}: {request.method} {requests.shown(request.url.path)}")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(500, FAILED, kind="server_error")

    return app


def _error(status: int, message: str, param: str | None = None, kind: str = "invalid_request_error") -> Response:
    return JSONResponse(_described(message, param, kind), status_code=status)


def _described(message: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return an error of OpenAI's shape with a message of one line."""
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": param, "code": None}}
