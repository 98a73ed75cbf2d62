"""Says which requests a page of this machine may send: those of the page itself, and of no other web site.

A browser sends requests of any site to 127.0.0.1, and takes any name that a site's owner points there for that site
(DNS rebinding). The first kind gives itself away by its origin, the second by its host.
"""

import urllib.parse
from collections.abc import Mapping

HOSTS = ("127.0.0.1", "localhost", "::1")


def refusal(headers: Mapping[str, str], path: str) -> str:
    """Returns why a request is refused, "" if it is not.

    Args:
      headers: headers of the request, by lower-case names.
      path: path that it asks for.
    """
    host = headers.get("host", "")
    if _name(host) not in HOSTS:
        return "this page answers to 127.0.0.1 and localhost alone"
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return "this page takes no requests of other sites"
    # A link from elsewhere may lead to the page, and nothing may load its parts.
    if path != "/" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "this page takes no requests of other sites"
    return ""


def _name(host: str) -> str:
    """Returns the name in a Host header, without its port; "" if it has another form."""
    try:
        parts = urllib.parse.urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    plain = not (parts.path or parts.query or parts.fragment or parts.username or parts.password)
    return (parts.hostname or "") if plain else ""
