"""Access control of the dashboard: this machine only, or everyone with the token.

Without a token, the server answers only requests for a loopback host name. So other sites cannot
reach the server through a name that resolves to this machine (DNS rebinding). With a token, the
reader opens `/?token=...` once, and a cookie derived from the token identifies the browser
afterwards. A program may send the token as a bearer token instead. With a token, the server answers
requests for any host name, because a proxy may pass on its own name. This is safe: a browser sends
the cookie only to the name that set the cookie.
"""

import hashlib
import hmac
import ipaddress
from urllib.parse import urlencode

from flask import Flask, Response, redirect, request
from werkzeug.wrappers import Response as AnyResponse

COOKIE = "spiketrain-dashboard"
_DAYS = 30
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def guard(server: Flask, *, host: str, token: str | None) -> None:
    """Make a server refuse unauthorised readers, and set headers that protect the page.

    Raises:
        ValueError: the token is empty, or the server is open to other machines without a token.
    """
    if token is not None and not token.strip():
        raise ValueError(
            "dashboard: --token must not be empty; python -c 'import secrets;"
            " print(secrets.token_urlsafe())' prints a token"
        )
    if not is_loopback(host) and token is None:
        raise ValueError(
            "dashboard: without a --token, --host must be localhost or a loopback address; got"
            f" {host}"
        )
    policy = "; ".join(
        [
            *("default-src 'none'", "script-src 'self'", "style-src 'self' 'unsafe-inline'"),
            *("img-src 'self' data: blob:", "connect-src 'self'"),
            *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
        ]
    )

    @server.before_request
    def refuse() -> AnyResponse | None:
        if token is not None:
            return _refuse_unknown(token)
        if not is_loopback(_name_of(request.host)):
            return Response(
                "dashboard: without a --token, the host of the address must be localhost or a"
                f" loopback address; got {request.host[:100]!r}\n",
                status=403,
                mimetype="text/plain",
            )
        return None

    @server.after_request
    def harden(response: Response) -> Response:
        response.headers.update(HEADERS)
        response.headers["Content-Security-Policy"] = policy
        response.headers.setdefault("Cache-Control", "no-store")
        return response


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name_of(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _refuse_unknown(token: str) -> AnyResponse | None:
    """Return None for a request with the cookie or the bearer token, else a refusal or redirect."""
    # The cookie is derived from the token and does not reveal the token.
    cookie = hmac.digest(token.encode(), b"spiketrain dashboard", hashlib.sha256).hex()
    query_token = request.args.get("token")
    if query_token is not None:
        if not _is_equal(query_token, token):
            return _refused("dashboard: the token in the address must be the server's --token")
        others = urlencode(
            [(name, value) for name, value in request.args.items(multi=True) if name != "token"]
        )
        response = redirect(request.path + (f"?{others}" if others else ""), 303)
        # A proxy with TLS sets this header. A forged header harms only its sender.
        schemes = request.headers.get("X-Forwarded-Proto", "").lower().replace(" ", "").split(",")
        response.set_cookie(
            COOKIE,
            cookie,
            max_age=_DAYS * 86400,
            httponly=True,
            # links on other sites send the cookie; posts, images and frames do not
            samesite="Lax",
            secure=request.is_secure or "https" in schemes,
        )
        return response
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    if _is_equal(request.cookies.get(COOKIE, ""), cookie) or (
        scheme.lower() == "bearer" and _is_equal(bearer, token)
    ):
        return None
    return _refused(
        "dashboard: the first request must have the token, /?token=TOKEN; a cookie then replaces it"
    )


def _is_equal(one: str, other: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode())


def _refused(sentence: str) -> Response:
    return Response(
        f"{sentence}\n", 401, headers={"WWW-Authenticate": "Bearer"}, mimetype="text/plain"
    )
