"""The web application of `mmclip demo`. It keeps nothing: an upload lives in memory while its answer is made."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from mmclip_dist.demo.answer import Answer, Reports, answer, parse_findings
from mmclip_dist.evaluate.report import numbers
from mmclip_dist.inference import MMCLIPModel

MAX_UPLOAD = 64 << 20
"""Bytes of a request: a radiograph of 16 megapixels and 16 bits takes 32 MiB."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
}  # fmt: skip


class _InMemory(MultiPartParser):
    spool_max_size = MAX_UPLOAD + 1  # never a file


def build_app(
    model: MMCLIPModel, *, title: str, findings: Sequence[str], reports: Reports | None = None, hosts: Sequence[str]
) -> Starlette:
    """title: of the model; findings: in the form at first; hosts: names under which a browser may ask, as another site could
    give its own name this address."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("mmclip_dist.demo", "."), jinja2.PackageLoader("mmclip_dist.evaluate.report", ".")]
        ),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page, one_at_a_time = environment.get_template("page.html"), Lock()

    def shown(text: str, found: Answer | None = None, fault: str | None = None, status: int = 200) -> HTMLResponse:
        content = page.render(
            title=title, findings=text, found=found, fault=fault, numbers=numbers, limit=MAX_UPLOAD >> 20,
            searched=reports is not None,
        )  # fmt: skip
        return HTMLResponse(content, status, _HEADERS)

    def answered(image: bytes, names: list[str]) -> Answer:
        with one_at_a_time:
            return answer(model, image, names, reports)

    async def home(request: Request) -> HTMLResponse:
        return shown("\n".join(findings))

    async def asked(request: Request) -> HTMLResponse:
        text = "\n".join(findings)
        try:
            form = await _InMemory(request.headers, _limited(request), max_files=1, max_fields=2).parse()
            given, upload = form.get("findings"), form.get("image")
            text = given if isinstance(given, str) else ""
            names = parse_findings(text)
            image = await upload.read() if isinstance(upload, UploadFile) else b""
            if not image:
                raise ValueError("No image is given: choose a JPEG, PNG or DICOM file.")
            return shown(text, await run_in_threadpool(answered, image, names))
        except (ValueError, MultiPartException) as error:
            return shown(text, fault=str(error), status=400)
        except HTTPException as error:
            return shown(text, fault=error.detail, status=error.status_code)

    return Starlette(
        routes=[Route("/", home), Route("/", asked, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[*hosts])],
    )


async def _limited(request: Request) -> Any:
    """The body's parts, until they are too many."""
    read = 0
    async for part in request.stream():
        read += len(part)
        if read > MAX_UPLOAD:
            raise HTTPException(413, f"The upload is larger than {MAX_UPLOAD >> 20} MiB.")
        yield part
