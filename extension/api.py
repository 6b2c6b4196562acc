"""Routes under /tome-sampler/v1/, behind the host's API authentication. They take no paths from callers, and change
nothing."""

import secrets
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared

import tome_sampler
from tome_sampler.config import MergeConfig

from .fields import CUSTOM, OFF, PRESETS, TITLE
from .maps import KINDS, drawn, png
from .presets import Presets
from .request import schema
from .run import Run

PREFIX = "/tome-sampler/v1"
MOST_STEPS = 200  # of the last run's statistics


def add_routes(app: Any, run: Run, presets: Presets) -> None:
    """``on_app_started``. Only where the host offers its own API."""
    flags = shared.cmd_opts
    if not (getattr(flags, "api", False) or getattr(flags, "nowebui", False)):
        return
    users = _users(getattr(flags, "api_auth", None))
    guards = [Depends(_guard(users))] if users else []
    # the app outlives a reload of the UI: the routes of the load before are replaced
    app.router.routes[:] = [r for r in app.router.routes if not str(getattr(r, "path", "")).startswith(PREFIX)]
    app.include_router(routes(run, presets), prefix=PREFIX, dependencies=guards)


def routes(run: Run, presets: Presets) -> APIRouter:
    """The routes, without a host around them."""
    router = APIRouter(tags=[TITLE])

    @router.get("/version")
    def version() -> dict[str, str]:
        return {"version": tome_sampler.__version__, "title": TITLE}

    @router.get("/schema")
    def arguments() -> dict[str, Any]:
        return schema()

    @router.get("/presets")
    def all_presets() -> dict[str, Any]:
        built_in = {name: MergeConfig.preset(library).to_dict() for name, library in PRESETS.items()}
        return {OFF: None, **built_in, CUSTOM: MergeConfig().to_dict(), **presets.saved()}

    @router.get("/last")
    def last_run() -> dict[str, Any]:
        found = run.record.to_dict()
        for one in found["passes"]:
            statistics = dict(one["statistics"])
            statistics["steps"] = statistics["steps"][:MOST_STEPS]
            one["statistics"] = statistics
        return found

    @router.get("/last/overlay/{number}/{kind}", response_class=Response)
    def overlay(number: int, kind: str, hires: bool = False) -> Response:
        maps = [one for p in run.record.passes if p.hires == hires for one in p.maps]
        if kind not in KINDS:
            raise HTTPException(404, f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        if not 0 <= number < len(maps):
            raise HTTPException(404, f"number is {number}; the last run has {len(maps)} maps, counted from 0")
        image = drawn(maps[number], run.record.picture, kind)
        if image is None:
            raise HTTPException(404, f"map {number} has no importance: that step had no guidance before it")
        return Response(png(image), media_type="image/png")

    return router


def _users(option: Any) -> dict[str, str]:
    """``--api-auth user:password,user:password``."""
    pairs = [pair.split(":", 1) for pair in (option or "").split(",") if ":" in pair]
    return {user.strip(): password.strip() for user, password in pairs}


def _guard(users: dict[str, str]) -> Any:
    def allowed(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
        password = users.get(given.username)
        if password is None or not secrets.compare_digest(given.password.encode(), password.encode()):
            raise HTTPException(401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"})

    return allowed
