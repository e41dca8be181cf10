"""Serves a page on this machine only, and lets it reach nothing else."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from experiments.explore_page import CSS, theme
from experiments.report import REPORT
from experiments.run_folder import RunFolder
from mops_fl.errors import InputError

LOOPBACK = "127.0.0.1"
# The browser itself then refuses whatever is not from this server.
OWN_ONLY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def build_app(page: gr.Blocks, runs: Sequence[RunFolder]) -> FastAPI:
    """The page at `/`, and the report of each run at `/report/<its place>`."""
    app = FastAPI(openapi_url=None)
    # A page elsewhere could else have its own name resolve to this machine, and read what is served here.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])

    @app.middleware("http")
    async def keep_to_this_machine(request: Request, respond: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await respond(request)
        response.headers["Content-Security-Policy"] = OWN_ONLY
        return response

    @app.get("/report/{place}")
    def report(place: int) -> HTMLResponse:
        if not 0 <= place < len(runs) or not (runs[place].path / REPORT).is_file():
            raise HTTPException(404, "There is no such report.")
        return HTMLResponse((runs[place].path / REPORT).read_text(encoding="utf-8"))

    gr.mount_gradio_app(
        app, page, "/", theme=theme(), css=CSS, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False,
        enable_monitoring=False, pwa=False,
    )  # fmt: skip
    return app


def listen(port: int) -> socket.socket:
    """A socket of this machine's own at `port`, or at any free one for 0.

    Raises:
        InputError: the port is taken, or not for users.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"Port {port} cannot be used ({error.strerror}); give another, or 0 for any free one."
        ) from error
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until Ctrl-C."""
    listener.listen()
    print(f"http://{LOOPBACK}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    # A browser keeps a stream open for as long as it shows the page; it is not waited for.
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=1))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print()
