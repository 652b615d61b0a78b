"""What a request to the server may hold: its messages are checked before anything is computed for them."""

import base64
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse

from ..prompt import ROLES

FETCH_SECONDS = 20.0  # for a remote image, in all


class RequestError(ValueError):
    """A request that cannot be served, and the HTTP status that says so."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.code = status, code


def check_messages(messages, allow_remote: bool, max_bytes: int) -> None:
    """Check the form of a chat's messages, and put remote images into them as data URIs if they are allowed.

    Raises:
        RequestError: if a role, a part or the place of an image cannot be used.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list with at least one message", "invalid_messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise RequestError(400, f"role {role!r} is not one of {', '.join(ROLES)}", "invalid_role")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list)):
            raise RequestError(400, "content must be text or a list of parts", "invalid_content")
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                continue
            if kind not in ("image_url", "input_image", "image"):
                raise RequestError(
                    400, f"a part has the type {kind!r}; it must be text or image_url", "invalid_content"
                )
            source = part.get("image_url", part.get("image"))
            url = source.get("url") if isinstance(source, dict) else source
            if not isinstance(url, str):
                raise RequestError(400, "an image part has no url", "invalid_image")
            if url[:5].lower() != "data:":
                if not allow_remote:
                    raise RequestError(
                        400,
                        "images must be data: URIs; this server does not fetch any (--allow-remote-images)",
                        "invalid_image",
                    )
                url = fetch(url, max_bytes)
            part.clear()
            part.update(type="image_url", image_url={"url": url})


def check_inputs(body: dict) -> tuple[list[str], str]:
    """What a request for embeddings wants: texts and data: URIs, and the form of the answer.

    Raises:
        RequestError: if there is something else.
    """
    inputs, form = body.get("input"), body.get("encoding_format") or "float"
    inputs = inputs if isinstance(inputs, list) else [inputs]
    if not inputs or not all(isinstance(text, str) and text for text in inputs):
        raise RequestError(400, "input must be a text, a data: URI of an image, or a list of them", "invalid_input")
    if form not in ("float", "base64"):
        raise RequestError(400, f"encoding_format is {form!r}; it must be float or base64", "invalid_input")
    return inputs, form


def fetch(url: str, max_bytes: int) -> str:
    """A remote image as a data URI, from a public address alone: it is resolved once, and connected to as resolved."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(400, f"{url[:200]}: only http and https images are fetched", "invalid_image")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0][4][0]
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise RequestError(400, f"{parts.hostname}: is not a public address", "invalid_image")
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=FETCH_SECONDS)
        connection.sock = socket.create_connection((address, port), FETCH_SECONDS)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=parts.hostname)
        connection.request("GET", urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")))
        response, data, limit = connection.getresponse(), b"", time.monotonic() + FETCH_SECONDS
        if response.status != 200:
            raise RequestError(400, f"{url[:200]}: the server said {response.status}", "invalid_image")
        while block := response.read1(1 << 16):
            data += block
            if len(data) > max_bytes or time.monotonic() > limit:
                raise RequestError(400, f"{url[:200]}: is too large or too slow", "invalid_image")
    except (OSError, ValueError, http.client.HTTPException) as e:
        if isinstance(e, RequestError):
            raise
        raise RequestError(400, f"{url[:200]}: could not be fetched ({e})", "invalid_image") from e
    return f"data:image/unknown;base64,{base64.b64encode(data).decode()}"
